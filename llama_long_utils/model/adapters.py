"""Loading a base in NF4 with a raised RoPE base, LoRA adapters on it, and merging them.

A PEFT adapter does not know the RoPE base it was trained with, and on a base with other settings it
runs without an error. So each adapter here travels with a card, and loading compares the card with
the base.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from llama_long_utils.model.base import check_rope, load_base
from llama_long_utils.model.weights import load_tokenizer, weights_sha256
from llama_long_utils.paths import ADAPTERS, REPOSITORY
from llama_long_utils.settings import STRICT, Lora, Preset, Scaling

CARD = "adapter_card.json"
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
EMBEDDINGS = ["embed_tokens"]


@dataclass(frozen=True, config=STRICT)
class AdapterCard:
    """What an adapter needs from its base, and where it comes from."""

    base: str
    base_sha256: str
    rope: Scaling
    data: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]


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
    del numbers["memory_savings"]  # they change no gradient
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


def _readme(card: AdapterCard) -> str:
    lines = [f"- {name}: {value}" for name, value in asdict(card).items()]
    return (
        f"---\nlibrary_name: peft\nbase_model: {card.base}\n---\n# LoRA adapter: window {card.rope.window:,} tokens\n\n"
        f"Trained on the NF4 base with RoPE scaled: {card.rope}. PEFT does not store that: load it with\n"
        "`llama_long_utils.models.load_adapter`, which refuses a base with other RoPE settings.\n\n"
        + "\n".join(lines)
        + "\n"
    )
