import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import LORA, PLAIN, RAISED, new_llama, small_preset
from llama_long_utils import presets
from llama_long_utils.model import arms
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.base import check_rope, load_base
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.model.weights import locate_base
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.rope import inverse_frequencies, ntk_by_parts, position_interpolation
from llama_long_utils.training.trainer import check_lora_gradients

IDS = torch.arange(64)[None] % 100
LLAMA_31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
OWN_RULES = {  # `rope_scaling` in the config of Llama 3.1 8B, of Qwen 2.5 with YaRN, and of others
    "llama3": {"rope_type": "llama3", **LLAMA_31},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
    },
}


def pretrained(rule, folder):
    """A small Llama as pretrained with a rule of its own, and a preset that describes it, extended twice by ABF."""
    old_names = {"rope_theta": 5e5, "rope_scaling": OWN_RULES[rule]}
    model = new_llama(0, rope_parameters=None, max_position_embeddings=131072, **old_names).eval()
    model.save_pretrained(folder)
    scaling = {name: value for name, value in model.config.rope_parameters.items() if name != "rope_theta"}
    preset = small_preset(folder, window=131072, rope_base=5e5, rope_scaling=scaling)
    extension = dataclasses.replace(preset.extension, window=262144, rope_base=4e6)
    return model, dataclasses.replace(preset, extension=extension)


@pytest.mark.parametrize("rule", OWN_RULES)
def test_base_arm_is_the_pretrained_model_whatever_its_rope(rule, tmp_path):
    model, preset = pretrained(rule, tmp_path)
    loaded = arms.load_arm(preset, "base", quantized=False, dtype="float32")
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert loaded.model.rotary_emb.attention_scaling == model.model.rotary_emb.attention_scaling
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_base_with_rope_of_its_own_is_refused_if_the_preset_does_not_say_so(tmp_path):
    pretrained("llama3", tmp_path)
    preset = small_preset(tmp_path, window=131072, rope_base=5e5)
    with pytest.raises(ValueError, match=r"with rope_scaling = \{factor = 8\.0, .* rope_type = \"llama3\"\}$"):
        locate_base(preset)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("llama3", ntk_by_parts(inverse_frequencies(32, 4e6), 8.0, 8192)),
        ("linear", position_interpolation(inverse_frequencies(32, 4e6), 2.0)),
    ],
)
def test_abf_keeps_a_rule_of_the_base_and_raises_its_base(rule, expected, tmp_path):
    _, preset = pretrained(rule, tmp_path)
    raised = arms.load_arm(preset, "rope_base_only", quantized=False)
    assert raised.config.max_position_embeddings == 262144
    torch.testing.assert_close(raised.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)


def test_another_method_on_a_base_with_a_rule_of_its_own_is_refused_by_its_name(tmp_path, monkeypatch):
    _, preset = pretrained("llama3", tmp_path)
    message = "the base has rope_type 'llama3', which method 'yarn' would replace: use method 'abf'"
    with pytest.raises(
        ValueError, match=rf"^preset 'tiny', arm 'yarn': {message}, which keeps it and raises its base$"
    ):
        arms.load_arm(preset, "yarn")
    text = (presets.PRESETS / "tiny.toml").read_text()
    monkeypatch.setattr(presets, "PRESETS", tmp_path)
    rule = '[base]\nrope_scaling = { rope_type = "llama3", factor = 8.0 }'
    (tmp_path / "mine.toml").write_text(text.replace("[base]", rule).replace('method = "abf"', 'method = "yarn"', 1))
    with pytest.raises(ValueError, match=rf"mine\.toml, \[extension\]: {message}"):
        load_preset("mine")


@pytest.mark.parametrize("rule", ["dynamic", "longrope"])
def test_a_rule_that_changes_with_the_length_is_not_extended(rule, tmp_path):
    _, preset = pretrained(rule, tmp_path)
    with pytest.raises(
        ValueError, match=f"rope_type '{rule}', which changes with the length of the text, so it cannot"
    ):
        arms.load_arm(preset, "extended")


def test_attention_of_the_experiments_is_there_for_a_preset_that_asks_for_it(tmp_path):
    """In a process that has imported no experiment, as the training command's."""
    new_llama(seed=0).save_pretrained(tmp_path)
    code = (
        "import dataclasses, sys; from pathlib import Path; from conftest import RAISED\n"
        "from llama_long_utils.model.base import load_base\n"
        "xpos = dataclasses.replace(RAISED, method='xpos_abf')\n"
        "for rope, attention in ((RAISED, 's2'), (xpos, 'sdpa')):\n"
        "    model = load_base(Path(sys.argv[1]), rope, dtype='float32', attention=attention)\n"
        "    print(model.config._attn_implementation)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])}
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["s2", "xpos"], done.stderr


def test_greedy_is_without_the_penalties_that_a_base_is_published_with(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path, dirs_exist_ok=True)
    published = {"repetition_penalty": 1.1, "do_sample": True, "temperature": 0.7}
    (tmp_path / "generation_config.json").write_text(json.dumps(published))
    model = load_base(tmp_path, RAISED, dtype="float32")
    assert model.generation_config.repetition_penalty in (None, 1.0)
    assert model.generation_config.eos_token_id == model.config.eos_token_id
    assert model.generation_config.use_cache  # whatever the config says


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_architecture_is_loaded_in_4_bits_and_trains_every_lora_matrix_and_norm(architecture, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        architecture,
        **shape,
        head_dim=32,
        num_key_value_heads=1,
        vocab_size=128,
        max_position_embeddings=64,
        sliding_window=None,
        tie_word_embeddings=architecture.startswith("qwen"),
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    base = load_base(locate_base(small_preset(tmp_path)), RAISED, dtype="bfloat16")
    assert type(base).__name__.lower() == f"{architecture}forcausallm"
    model = add_lora(base, LORA, seed=0).train()
    hidden = hidden_states(model, IDS)
    next_token_nll(hidden, causal_lm(model).get_output_embeddings(), IDS).backward()
    check_lora_gradients(model)
    norms = {name for name, weight in model.named_parameters() if "norm" in name and weight.grad is not None}
    assert len(norms) == 2 * (4 if architecture == "qwen3" else 2) + 1


def test_base_is_nf4_with_double_quantisation_and_the_raised_rope(base_folder):
    model = load_base(base_folder, RAISED, dtype="bfloat16")
    state = model.model.layers[0].mlp.down_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert model.config.max_position_embeddings == 512
    check_rope(model, RAISED)


def test_frequencies_cast_to_bf16_and_a_window_set_too_late_are_refused(base_folder):
    model = load_base(base_folder, PLAIN, dtype="float32", quantized=False)
    with pytest.raises(ValueError, match="RoPE is set at load"):
        check_rope(model, dataclasses.replace(PLAIN, window=128))
    with pytest.raises(ValueError, match="which loses radians at long range"):
        check_rope(model.bfloat16(), PLAIN)
