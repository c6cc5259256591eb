import dataclasses
import weakref

import pytest
import torch
from peft import PeftModel

from conftest import LORA, RAISED, small_preset
from llama_long_utils.model.adapters import AdapterCard, add_lora, save_adapter
from llama_long_utils.model.arms import ARMS, OneArm, arm_inputs, arm_scaling, load_arm
from llama_long_utils.model.base import check_rope, load_base
from llama_long_utils.model.weights import weights_sha256


@pytest.fixture(scope="module")
def preset(base_folder):
    return small_preset(base_folder)


@pytest.fixture(scope="module")
def trained(preset, base_folder, tmp_path_factory):
    """A folder with an adapter for each arm that has one."""
    folder = tmp_path_factory.mktemp("adapters")
    for arm, rope in (("extended", preset.extended_rope), ("rope_unchanged", preset.control_rope)):
        model = add_lora(load_base(base_folder, rope, dtype="float32"), LORA, seed=0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight.data, std=0.05)
        card = AdapterCard(str(base_folder), weights_sha256(base_folder), rope, {}, {}, {})
        save_adapter(model, card, folder / arm)
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_has_its_rope_and_its_adapter_and_is_ready_to_be_measured(arm, preset, trained):
    model = load_arm(preset, arm, adapter=trained / arm)
    check_rope(model, arm_scaling(preset, arm))
    assert not model.training
    assert isinstance(model, PeftModel) == (trained / arm).is_dir()


def test_arms_differ_by_rope_as_their_names_say(preset):
    ropes = {arm: arm_scaling(preset, arm) for arm in ARMS}
    assert ropes["base"] == preset.base_rope
    assert ropes["extended"] == ropes["rope_base_only"] == RAISED
    assert ropes["rope_unchanged"] == dataclasses.replace(ropes["base"], window=512)
    assert ropes["yarn"] == dataclasses.replace(ropes["base"], window=512, method="yarn")


def test_of_the_arms_of_a_comparison_one_at_a_time_is_in_memory(preset, trained):
    """Two bases, and what reading a long text takes, would not fit on the GPU that one was trained on."""
    load, models = OneArm(preset, {"extended": trained / "extended"}), weakref.WeakSet()
    for arm in ("base", "extended", "extended", "base"):
        models.add(load(arm))
        assert len(models) == 1
    assert load("base") is load("base")


def test_everything_that_an_arms_numbers_depend_on_is_in_its_inputs(preset, trained):
    adapter = trained / "extended"
    inputs = arm_inputs(preset, "extended", adapter=adapter)
    assert inputs == arm_inputs(preset, "extended", adapter=str(adapter))
    others = [
        arm_inputs(preset, "base"),
        arm_inputs(preset, "base", attention="s2"),
        arm_inputs(preset, "rope_base_only"),
        arm_inputs(preset, "rope_unchanged", adapter=trained / "rope_unchanged"),
        arm_inputs(preset, "base", scaling=RAISED, quantized=False),
        arm_inputs(preset, "extended", adapter=adapter, quantized=False),
        arm_inputs(preset, "extended", adapter=adapter, dtype="bfloat16"),
    ]
    assert len({repr(sorted(one.items())) for one in [inputs, *others]}) == 8


def test_unknown_arm_and_another_arms_adapter_are_refused_before_anything_is_loaded(preset, trained):
    with pytest.raises(ValueError, match=r"unknown arm 'tuned': use one of \['base', 'rope_base_only', 'yarn'"):
        load_arm(preset, "tuned")
    with pytest.raises(ValueError, match="no adapter was trained with preset 'tiny' and RoPE none, base 10,000"):
        load_arm(preset, "rope_unchanged")
    with pytest.raises(ValueError, match="was trained with rope = abf"):
        load_arm(preset, "rope_unchanged", adapter=trained / "extended")
