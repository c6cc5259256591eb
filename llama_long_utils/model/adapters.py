"""LoRA adapters: adding, saving, finding and loading them.

PEFT loads an adapter onto another base, with another RoPE, or with an edited config, and says nothing. So each
adapter travels with a card that names all of these by hash, and is compared with it when it is found.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from llama_long_utils.cache import digest
from llama_long_utils.model.base import check_rope
from llama_long_utils.model.loss import compute_in_base_dtype
from llama_long_utils.model.weights import locate_base, weights_sha256
from llama_long_utils.paths import ADAPTERS, CARD, REPOSITORY, check_adapter, whole_folder
from llama_long_utils.settings import STRICT, Lora, Preset, Scaling

NO_GRADIENT = {"memory_savings", "checkpoint_every"}  # settings that change none
README = Path(__file__).with_name("adapter_readme.md.in")
OWN_ARM = "quotations"  # what a card says that is no experiment's
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]  # ends of names: "norm" means q_norm and k_norm, too
# Entries of adapter_config.json that change nothing that the adapter computes.
NO_NUMBERS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}


@dataclass(frozen=True, config=STRICT)
class AdapterCard:
    """What an adapter needs from its base, and where it comes from; `save_adapter` adds the hashes of its own files."""

    base: str
    base_sha256: str
    rope: Scaling
    data: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]
    weights_sha256: str = ""
    config_digest: str = ""


def add_lora(model: PreTrainedModel, settings: Lora, *, seed: int) -> PeftModel:
    """The model with trainable LoRA matrices and, through `modules_to_save`, trainable norms and embeddings.

    Trainable copies are fp32 (a bf16 norm weight near 1 moves in steps of 1/128), but their outputs have the base's
    dtype, so that a bf16 residual stream stays bf16. PEFT's `prepare_model_for_kbit_training` would make it fp32.
    """
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linear -= {"lm_head", "score"}  # which the loss reads in chunks
    unknown = set(settings.target_modules) - linear
    if unknown or isinstance(model, PeftModel):
        linear = "LoRA's already: load the base anew" if isinstance(model, PeftModel) else sorted(linear)
        raise ValueError(f"lora.target_modules names {sorted(unknown)}: the model's linear layers are {linear}")
    if settings.train_embeddings and model.config.tie_word_embeddings:
        raise ValueError("train_embeddings = true needs a base with untied embeddings: set it to false")
    torch.manual_seed(seed)
    saved = NORMS * settings.train_norms + ["embed_tokens"] * settings.train_embeddings
    sizes = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": settings.target_modules}
    return _wrap(model, LoraConfig(task_type="CAUSAL_LM", modules_to_save=saved or None, **sizes))


class AdaptedLinear(Linear4bit):
    """On CPUs, and where nothing is trained, the same sum with less memory: PEFT copies, scales and adds anew."""

    def forward(self, hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        on_gpu = hidden.is_cuda or isinstance(hidden, FakeTensor)  # which stands for one
        trained = self.training or torch.is_grad_enabled()
        if self.disable_adapters or self.merged or (on_gpu and trained):
            return super().forward(hidden, *arguments, **options)
        (name,), result = self.active_adapters, self.base_layer(hidden.flatten(0, -2))
        low = (self.lora_A[name](hidden) * self.scaling[name]).flatten(0, -2)
        result.addmm_(low, self.lora_B[name].weight.T.to(low.dtype))
        return result.unflatten(0, hidden.shape[:-1])


def _wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            # bf16 runs under autocast, which casts LoRA's matrices. PEFT looks for CUDA's autocast only and would
            # turn each input to fp32 on a CPU.
            module.cast_input_dtype_enabled = False
            if type(module) is Linear4bit and not (config.lora_dropout or config.lora_bias or config.use_dora):
                module.__class__ = AdaptedLinear
    keep_copies_fp32(adapted)
    return adapted


def keep_copies_fp32(model: PeftModel) -> None:
    """Trained norms and embeddings, and their copies in other adapters, are fp32, with outputs in the base's dtype."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            dtype = module.original_module.weight.dtype
            for copy in module.modules_to_save.values():
                copy.float()
                if isinstance(copy, torch.nn.Linear):  # a reward model's head, whose number stays fp32
                    copy.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
                elif not copy._forward_hooks:
                    copy.register_forward_hook(lambda _module, _inputs, output, dtype=dtype: output.to(dtype))


def save_adapter(model: PeftModel, card: AdapterCard, folder: Path) -> None:
    """Write a PEFT adapter, its card and a README, all or nothing; ValueError if a trained number is not finite."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not weight.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite: the adapter is not saved")
    for config in model.peft_config.values():
        config.base_model_name_or_path = card.base  # PEFT would write the absolute path of this machine
    with whole_folder(folder) as scratch:
        # Embeddings are saved if modules_to_save names them; left to guess, PEFT would ask the hub about the base.
        model.save_pretrained(scratch, save_embedding_layers=False, selected_adapters=["default"])
        card = replace(card, weights_sha256=weights_sha256(scratch), config_digest=_config_digest(scratch))
        (scratch / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")
        rope, longest = card.rope.parameters(), card.rope.max_position_embeddings
        text = README.read_text("utf-8").format(card=card, name=CARD, rope=rope, longest=longest)
        (scratch / "README.md").write_text(text, encoding="utf-8")


def _config_digest(folder: Path) -> str:
    """A hash of everything in adapter_config.json that changes what the adapter computes."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        numbers = {name: value for name, value in config.items() if name not in NO_NUMBERS}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"adapter_config.json is missing or not whole ({error})") from None
    return digest({name: sorted(value) if isinstance(value, list) else value for name, value in numbers.items()})


def find_adapter(
    preset: Preset, folder: Path | str | None = None, rope: Scaling | None = None, *, stage: str = "training"
) -> Path:
    """The adapter folder named; else the newest trained with the preset's numbers and data; else the stored one.

    `folder` is absolute or seen from the repository; it was trained with `rope`, by default the preset's extended one.
    The `stage` after the extension is the name of its settings, "instruction". ValueError if there is none, or if the
    one named is not whole or not for this preset.
    """
    rope = rope or preset.extended_rope
    needed = {"rope": rope, "base": preset.base.source, "base_sha256": weights_sha256(locate_base(preset))}
    if folder:
        card = read_card(REPOSITORY / folder)
        for name, value in needed.items():
            if getattr(card, name) != value:
                raise ValueError(
                    f"the adapter in {folder} was trained with {name} = {getattr(card, name)}, while preset "
                    f"{preset.name!r} asks for {value}: use the preset, and the arm, it was trained for"
                )
        return REPOSITORY / folder
    others: list[str] = []
    for path in _matching(preset, needed, stage, others):
        return path
    notebook, option = ("05_finetune_qlora", "") if stage == "training" else ("09_instruction_tuning", " --stage sft")
    raise ValueError(
        f"no adapter was trained with preset {preset.name!r} and RoPE {rope} yet: run {notebook}, or "
        f"python -m llama_long_utils.train --preset {preset.name}{option}{''.join(others[:1])}"
    )


def _matching(preset: Preset, needed: dict[str, Any], stage: str, others: list[str]) -> Iterator[Path]:
    """Adapters of a stage with the preset's numbers, the newest first; `others` gets a line on each with other ones."""
    own = {name: value for name, value in asdict(getattr(preset, stage)).items() if name not in NO_GRADIENT}
    numbers = {**(own if stage == "training" else {stage: own}), "lora": asdict(preset.lora)}
    numbers = json.loads(json.dumps({**numbers, "data": asdict(preset.data)}))  # tuples as a card has them
    # A later stage begins at an extension that has the preset's numbers, too.
    later = stage != "training"
    starts = {weights_sha256(path) for path in _matching(preset, needed, "training", [])} if later else set()
    trained = preset.run_folder.glob(f"{stage}/*/adapter/{CARD}")
    newest_first = sorted(trained, key=lambda path: path.stat().st_mtime, reverse=True)
    stored = preset.name if stage == "training" else f"{preset.name}-{stage}"
    for path in [*newest_first, *ADAPTERS.glob(f"{stored}/{CARD}")]:
        try:
            card = read_card(path.parent)
        except ValueError as error:
            print(f"passed over: {error}", flush=True)
            continue
        if card.training.get("arm", OWN_ARM) != OWN_ARM:
            continue  # of an experiment, which may train it in another way
        if all(getattr(card, name) == value for name, value in needed.items()):
            given = {**card.training, "data": {**card.data, "passes": preset.data.passes}}  # a cap changes nothing
            if stage in given:  # numbers that there were not then are as their defaults
                whole = {**asdict(type(getattr(preset, stage))()), **given[stage]}
                given[stage] = {name: whole[name] for name in own}
            other = {name: given.get(name) for name, value in numbers.items() if given.get(name) != value}
            if later and card.training.get("start") not in starts:
                other["start"] = "another extension adapter"
            if not other:
                yield path.parent
                continue
            said = [f"other {name}" if isinstance(was, dict) else f"{name} = {was}" for name, was in other.items()]
            others.append(f"; the one in {path.parent} has {', '.join(said)}: name this folder as adapter to use it")


def read_card(folder: Path) -> AdapterCard:
    """An adapter's card; ValueError if there is none, or if it does not fit the adapter's weights and config."""
    check_adapter(folder.absolute())
    try:
        card = TypeAdapter(AdapterCard).validate_json((folder / CARD).read_bytes())
        if not card.config_digest:
            raise ValueError(f"{CARD} has no hashes: an older version wrote it")
        if card.config_digest != _config_digest(folder):
            raise ValueError("adapter_config.json was changed after training")
        if card.weights_sha256 != weights_sha256(folder):
            raise ValueError("adapter_model.safetensors was changed after training")
    except (SafetensorError, OSError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ValueError(f"the adapter in {folder} is truncated or corrupt ({reason}): train it again") from None
    return card


def load_adapter(model: PreTrainedModel, adapter: Path, base: Path, *, trainable: bool = False) -> PeftModel:
    """A saved adapter on a loaded base, of which `base` is the folder; ValueError unless it is as the card says."""
    card = read_card(adapter)
    try:
        check_rope(model, card.rope)
    except ValueError as error:
        other = f"the adapter in {adapter} was trained with other RoPE settings"
        raise ValueError(f"{other}: {error}. Its own are read_card(adapter).rope") from None
    found = weights_sha256(base)
    if found != card.base_sha256:
        raise ValueError(
            f"the adapter in {adapter} was trained on {card.base} (sha256 {card.base_sha256[:12]}), "
            f"not on the weights in {base} (sha256 {found[:12]}): use its own base or train a new adapter"
        )
    # PeftModel.from_pretrained would round the saved fp32 norms to the base's bf16; here the copies are fp32 first.
    config = LoraConfig.from_pretrained(adapter)
    config.inference_mode = not trainable
    if hasattr(model, "score"):  # a reward model's head is trained and saved whole
        config.task_type, config.modules_to_save = "SEQ_CLS", sorted({*(config.modules_to_save or ()), "score"})
    config.base_model_name_or_path = None  # the card's hash was compared, not a name, which PEFT would warn of
    adapted = _wrap(model, config)
    weights = load_file(adapter / "adapter_model.safetensors")
    if not hasattr(model, "score") and "base_model.model.score.weight" in weights:
        raise ValueError(f"the adapter in {adapter} is a reward model's, which rates answers and writes none")
    if hasattr(model, "score"):
        weights.setdefault("base_model.model.score.weight", model.score.weight)  # a new one, on another adapter
    set_peft_model_state_dict(adapted, weights)
    compute_in_base_dtype(adapted)
    return adapted
