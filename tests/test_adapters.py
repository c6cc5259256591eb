import dataclasses
import json
import shutil

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import experiments.attention  # noqa: F401 (registers xPos)
from conftest import LORA, RAISED, new_llama, small_preset
from llama_long_utils.model import adapters
from llama_long_utils.model.adapters import (
    CARD,
    AdaptedLinear,
    AdapterCard,
    add_lora,
    find_adapter,
    load_adapter,
    read_card,
    save_adapter,
)
from llama_long_utils.model.base import check_rope, load_base
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.model.weights import weights_sha256
from llama_long_utils.paths import ADAPTERS
from llama_long_utils.presets import load_preset, preset_names
from llama_long_utils.records import package_versions
from llama_long_utils.training.trainer import check_lora_gradients
from tools.merge import merge_adapter

IDS = torch.arange(64)[None] % 100


def card(base_folder, **changes):
    values = {
        "base": str(base_folder),
        "base_sha256": weights_sha256(base_folder),
        "rope": RAISED,
        "data": {},
        "training": {},
        "versions": package_versions(),
    }
    return AdapterCard(**{**values, **changes})


def with_lora(base_folder, **changes):
    base = load_base(base_folder, RAISED, dtype="bfloat16")
    return add_lora(base, dataclasses.replace(LORA, **changes), seed=0)


def backward(model):
    hidden = hidden_states(model, IDS)
    next_token_nll(hidden, causal_lm(model).get_output_embeddings(), IDS).backward()


@pytest.fixture
def adapter(base_folder, tmp_path):
    model = with_lora(base_folder)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight.data, mean=1.0 if "norm" in name else 0.0, std=0.05)
    save_adapter(model, card(base_folder), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_residual_stream_stays_bf16_beside_fp32_norms_and_adapters(base_folder):
    model = with_lora(base_folder)
    seen = set()
    for layer in causal_lm(model).model.layers:
        layer.register_forward_hook(lambda _m, inputs, output: seen.update([inputs[0].dtype, output.dtype]))
    backward(model)
    assert seen == {torch.bfloat16}


def test_trained_norms_are_fp32_and_saved_with_the_adapter(base_folder, adapter):
    trainable = {name: w for name, w in with_lora(base_folder).named_parameters() if w.requires_grad}
    assert {weight.dtype for weight in trainable.values()} == {torch.float32}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as saved:
        norms = [name for name in saved.keys() if "norm" in name]  # noqa: SIM118
    assert len(norms) == 2 * 2 + 1


def test_embeddings_train_only_if_untied(base_folder):
    model = with_lora(base_folder, train_embeddings=True)
    assert any("embed_tokens" in name and w.requires_grad for name, w in model.named_parameters())
    assert hidden_states(model, IDS).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="untied embeddings"):
        add_lora(new_llama(0, tie_word_embeddings=True), dataclasses.replace(LORA, train_embeddings=True), seed=0)
    with pytest.raises(ValueError, match="the model's linear layers are LoRA's already: load the base anew"):
        add_lora(add_lora(new_llama(0), LORA, seed=0), LORA, seed=0)  # a cell that was run twice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapted_layers_compute_what_pefts_own_do(base_folder, dtype):
    """In fp32 to the last bit, as a scale of 2 rounds nothing; in bf16 a sum is rounded once, not twice."""
    model = add_lora(load_base(base_folder, RAISED, dtype=dtype), dataclasses.replace(LORA, rank=4, alpha=8), seed=0)
    layers = [module for module in model.modules() if type(module) is AdaptedLinear]
    assert len(layers) == 14
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    found = []
    for kind in (AdaptedLinear, Linear4bit):
        for layer in layers:
            layer.__class__ = kind
        model.zero_grad()
        backward(model)
        with torch.no_grad():
            hidden = {"hidden": hidden_states(model, IDS)}
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad} | hidden)
    for name, value in found[1].items():
        same = torch.equal(found[0][name], value)
        assert same if dtype == "float32" else (found[0][name] - value).norm() < 0.03 * value.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_lora_b_gets_a_gradient_with_and_without_checkpointing(base_folder, checkpointing):
    model = with_lora(base_folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    backward(model)
    check_lora_gradients(model)
    next(w for name, w in model.named_parameters() if "lora_B" in name).grad = None
    with pytest.raises(RuntimeError, match="1 of 33 trained weights got no gradient"):
        check_lora_gradients(model)


def test_gradients_that_are_all_zero_as_of_equal_rewards_are_looked_at_again(base_folder):
    model = with_lora(base_folder).train()
    (0 * next_token_nll(hidden_states(model, IDS), causal_lm(model).get_output_embeddings(), IDS)).backward()
    assert not check_lora_gradients(model, rewarded=True)
    with pytest.raises(RuntimeError, match="weights got no gradient"):
        check_lora_gradients(model)  # of plain training
    backward(model)
    assert check_lora_gradients(model, rewarded=True)


def test_a_loaded_adapter_is_called_in_bf16_by_whoever_calls_it(base_folder, adapter):
    model = load_adapter(load_base(base_folder, RAISED, dtype="bfloat16"), adapter, base_folder)
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all()


def test_an_adapter_that_was_merged_in_place_is_not_added_again(base_folder):
    model = with_lora(base_folder)
    layers = [module for module in model.modules() if type(module) is AdaptedLinear]
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.normal_()
        model.merge_adapter()
        ours = hidden_states(model, IDS)
        for layer in layers:
            layer.__class__ = Linear4bit
        assert torch.equal(ours, hidden_states(model, IDS))


def test_evaluation_before_training_does_not_repack_4_bit_weights_and_cut_the_gradients(base_folder):
    model = with_lora(base_folder).eval()
    with torch.no_grad():
        hidden_states(model, IDS)
    model.train()
    backward(model)
    check_lora_gradients(model)


def test_adapter_goes_onto_its_own_base_with_its_own_rope_only(base_folder, adapter, tmp_path):
    right = load_base(base_folder, RAISED, dtype="bfloat16")
    load_adapter(right, adapter, base_folder)
    for wrong in ({"base": 1e4}, {"window": 64}, {"method": "pi"}, {"method": "yarn"}, {"method": "xpos_abf"}):
        model = load_base(base_folder, dataclasses.replace(RAISED, **wrong), dtype="bfloat16")
        with pytest.raises(ValueError, match="was trained with other RoPE settings"):
            load_adapter(model, adapter, base_folder)
    other = tmp_path / "other"
    new_llama(seed=1).to(torch.bfloat16).save_pretrained(other)
    with pytest.raises(ValueError, match="not on the weights in"):
        load_adapter(load_base(other, RAISED, dtype="bfloat16"), adapter, other)


def test_loaded_adapter_is_the_trained_one_to_the_last_bit(base_folder, tmp_path):
    trained = with_lora(base_folder)
    for weight in trained.parameters():
        if weight.requires_grad:
            weight.data += 0.001 * torch.randn_like(weight)  # what a bf16 copy of a norm near 1 would round away
    save_adapter(trained, card(base_folder), tmp_path / "adapter")
    base = load_base(base_folder, RAISED, dtype="bfloat16")
    loaded = load_adapter(base, tmp_path / "adapter", base_folder)
    weights = dict(loaded.named_parameters())
    for name, weight in trained.named_parameters():
        if weight.requires_grad:
            assert weights[name].dtype == torch.float32
            assert torch.equal(weights[name], weight), name
    with torch.no_grad():
        assert torch.equal(hidden_states(loaded, IDS), hidden_states(trained, IDS))


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_card(folder, **changes):
    (folder / CARD).write_text(json.dumps({**json.loads((folder / CARD).read_text()), **changes}))


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def retrain(folder):
    """Other weights in the same shapes."""
    file = folder / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)


DAMAGES = {
    "no card": (lambda folder: (folder / CARD).unlink(), "is not an adapter of this collection"),
    "half a card": (lambda folder: halve(folder / CARD), "is truncated or corrupt .*JSON.*: train it again"),
    "card of before": (lambda folder: edit_card(folder, config_digest=""), "has no hashes: an older version wrote it"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "half a config": (lambda folder: halve(folder / "adapter_config.json"), "adapter_config.json is missing or not"),
    "config is a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "missing or not whole"),
    "fewer modules": (lambda folder: edit_config(folder, target_modules=["q_proj"]), "adapter_config.json was changed"),
    "no norms": (lambda folder: edit_config(folder, modules_to_save=None), "adapter_config.json was changed"),
    "another alpha": (lambda folder: edit_config(folder, lora_alpha=64), "adapter_config.json was changed"),
    "another rank": (lambda folder: edit_config(folder, r=8), "adapter_config.json was changed"),
    "another scale": (lambda folder: edit_config(folder, use_rslora=True), "adapter_config.json was changed"),
    "half the weights": (lambda folder: halve(folder / "adapter_model.safetensors"), "is truncated or corrupt"),
    "other weights": (retrain, "adapter_model.safetensors was changed"),
    "another base": (lambda folder: edit_card(folder, base_sha256="0" * 64), "trained with base_sha256 = 000"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_edited_adapter_is_refused_in_one_line_when_it_is_found(base_folder, adapter, damage):
    preset = small_preset(base_folder)
    assert find_adapter(preset, adapter) == adapter
    spoil, message = DAMAGES[damage]
    spoil(adapter)
    with pytest.raises(ValueError, match=message) as refused:
        find_adapter(preset, adapter)
    assert len(str(refused.value).splitlines()) == 1


def test_adapter_moved_to_another_peft_or_under_another_name_is_the_same(base_folder, adapter):
    edit_config(adapter, peft_version="1.0", base_model_name_or_path="other", inference_mode=False)
    assert find_adapter(small_preset(base_folder), adapter) == adapter


def test_adapter_that_is_not_finite_is_not_saved(base_folder, tmp_path):
    model = with_lora(base_folder)
    next(weight for name, weight in model.named_parameters() if "lora_B" in name).data[1, 2] = torch.nan
    with pytest.raises(
        ValueError, match=r"lora_B\.default\.weight holds numbers that are not finite: the adapter is not"
    ):
        save_adapter(model, card(base_folder), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_saved_adapter_names_its_base_as_the_card_does(base_folder, adapter):
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_folder)


def test_saving_again_replaces_the_adapter_whole(base_folder, adapter):
    save_adapter(with_lora(base_folder), card(base_folder, training={"steps": 1024}), adapter)
    assert read_card(adapter).training == {"steps": 1024}
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_newest_adapter_trained_as_the_preset_says_is_found_and_broken_ones_are_passed_over(
    base_folder, adapter, tmp_path, monkeypatch, capsys
):
    preset = small_preset(base_folder)
    monkeypatch.setattr(type(preset), "run_folder", tmp_path)
    monkeypatch.setattr(adapters, "ADAPTERS", tmp_path / "stored")
    with pytest.raises(ValueError, match="no adapter was trained with preset 'tiny' and RoPE abf"):
        find_adapter(preset)
    as_preset = {**dataclasses.asdict(preset.training), "lora": dataclasses.asdict(preset.lora)}
    edit_card(adapter, data=dataclasses.asdict(preset.data), training={**as_preset, "steps": 2})
    training = shutil.copytree(adapter, tmp_path / "training" / "short" / "adapter")
    with pytest.raises(
        ValueError, match=rf"yet: run 05.*; the one in {training} has steps = 2: name this folder as ad"
    ):
        find_adapter(preset)
    shutil.rmtree(training)
    edit_card(adapter, data=dataclasses.asdict(preset.data), training=as_preset)
    stored = shutil.copytree(adapter, tmp_path / "stored" / "tiny")
    assert find_adapter(preset) == stored
    trained = shutil.copytree(adapter, tmp_path / "training" / "whole" / "adapter")
    assert find_adapter(preset) == trained
    shutil.rmtree(trained)
    quick, broken, old = (
        shutil.copytree(adapter, tmp_path / "training" / name / "adapter") for name in ("quick", "broken", "old")
    )
    edit_card(quick, training={**as_preset, "steps": 3})
    halve(broken / "adapter_model.safetensors")
    edit_card(old, config_digest="")
    assert find_adapter(preset) == stored
    passed_over = capsys.readouterr().out.splitlines()
    assert [line.startswith("passed over: the adapter in ") for line in passed_over] == [True, True]
    assert find_adapter(preset, quick) == quick


def small_tokenizer():
    """One of few tokens, as the doll embeds few."""
    tokens = Tokenizer(WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")


def test_merged_model_loads_plainly_with_the_right_rope_and_without_the_error_of_4_bits(base_folder, adapter, tmp_path):
    small_tokenizer().save_pretrained(base_folder)
    merged_folder = merge_adapter(adapter, base_folder, tmp_path / "merged", dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(merged_folder, dtype=torch.bfloat16)
    check_rope(merged, RAISED)
    assert merged.config.max_position_embeddings == 512
    config = json.loads((merged_folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5  # for what is older than 5, and newer
    assert config["rope_scaling"] is None
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}
    unmerged = load_base(base_folder, RAISED, dtype="bfloat16", quantized=False)
    unmerged = load_adapter(unmerged, adapter, base_folder)
    on_nf4 = load_adapter(load_base(base_folder, RAISED, dtype="bfloat16"), adapter, base_folder)
    with torch.no_grad():
        exact, merged_hidden, nf4_hidden = (hidden_states(m, IDS).float() for m in (unmerged, merged, on_nf4))
    rounding = (merged_hidden - exact).norm() / exact.norm()
    quantisation = (nf4_hidden - exact).norm() / exact.norm()
    assert rounding < 0.02  # merging rounds each weight to bf16 once
    assert quantisation > rounding  # the error that the merged model no longer has


def test_a_merged_rope_other_than_abf_stands_where_older_programs_look_too(tmp_path):
    small_tokenizer().save_pretrained(tmp_path / "base")
    new_llama(seed=0).save_pretrained(tmp_path / "base")
    yarn = dataclasses.replace(RAISED, method="yarn", base=1e4)
    model = add_lora(load_base(tmp_path / "base", yarn, dtype="float32"), LORA, seed=0)
    save_adapter(model, card(tmp_path / "base", rope=yarn), tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged", dtype="float32")
    config = json.loads((merged / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (1e4, yarn.parameters())
    check_rope(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), yarn)


def test_the_lines_in_an_adapters_readme_load_it_with_peft_alone(base_folder, adapter):
    lines = [line for line in (adapter / "README.md").read_text().splitlines() if line.startswith("    ")]
    names = {
        "BASE": base_folder,
        "FOLDER": adapter,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "PeftModel": PeftModel,
    }
    exec("\n".join(line.strip() for line in lines), names)
    check_rope(names["model"], RAISED)
    ours = load_adapter(load_base(base_folder, RAISED, dtype="bfloat16", quantized=False), adapter, base_folder)
    with torch.no_grad():
        plain, expected = (hidden_states(model.bfloat16(), IDS).float() for model in (names["model"], ours))
    assert (plain - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("other", ["k_porj", "lm_head"])
def test_lora_on_a_layer_that_does_not_exist_or_is_the_head_is_refused(base_folder, other):
    wrong = dataclasses.replace(LORA, target_modules=["q_proj", other])
    with pytest.raises(
        ValueError, match=rf"names \['{other}'\]: the model's linear layers are \['down_proj', 'g.*'v_proj'\]"
    ):
        add_lora(load_base(base_folder, RAISED, dtype="float32"), wrong, seed=0)


@pytest.mark.parametrize("folder", sorted(ADAPTERS.iterdir()), ids=lambda folder: folder.name)
def test_stored_adapters_are_whole_and_fit_a_preset(folder):
    preset = max((name for name in preset_names() if folder.name.startswith(name)), key=len)
    assert read_card(folder).rope == load_preset(preset).extended_rope


def test_named_adapter_for_other_rope_settings_is_refused_before_anything_is_loaded():
    preset = load_preset("tiny")
    adapter = "data/adapters/tiny"
    assert find_adapter(preset, adapter) == ADAPTERS / "tiny"
    other = dataclasses.replace(preset, extension=dataclasses.replace(preset.extension, rope_base=1e6))
    with pytest.raises(ValueError, match="trained with rope = abf, base 500,000"):
        find_adapter(other, adapter)


def test_a_merged_model_ends_its_answers_where_the_base_does(base_folder, adapter, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    ends = {"eos_token_id": [1, 5], "pad_token_id": 1, "max_length": 64, "do_sample": True, "temperature": 0.6}
    (base / "generation_config.json").write_text(json.dumps(ends))
    assert load_base(base, RAISED, dtype="float32").generation_config.eos_token_id == [1, 5]
    merged = merge_adapter(adapter, base, tmp_path / "merged", dtype="float32")
    published = json.loads((merged / "generation_config.json").read_text())
    assert published["eos_token_id"] == [1, 5]
    assert "max_length" not in published  # of the old window
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()


def test_a_merged_model_s_tokenizer_cuts_no_text_at_the_old_window(base_folder, adapter, tmp_path):
    """vLLM takes the tokenizer's length for the window, too."""
    base = shutil.copytree(base_folder, tmp_path / "base")
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 64}))
    merged = merge_adapter(adapter, base, tmp_path / "merged", dtype="float32")
    assert AutoTokenizer.from_pretrained(merged).model_max_length == RAISED.window


def test_merging_that_fails_leaves_the_model_of_before(base_folder, adapter, tmp_path):
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_text("of before")
    bare = shutil.copytree(base_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        merge_adapter(adapter, bare, merged, dtype="float32")
    assert (merged / "config.json").read_text() == "of before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "bare", "merged"]


def test_the_stored_instruction_tuned_adapter_is_found_whatever_numbers_were_added_since(monkeypatch, tmp_path):
    preset = load_preset("tiny")
    monkeypatch.setattr(type(preset), "run_folder", tmp_path)
    assert find_adapter(preset, stage="instruction") == ADAPTERS / "tiny-instruction"
