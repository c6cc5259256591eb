"""The arms of a comparison: a base, its RoPE, an adapter and a dtype, loaded in one way for everybody."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel

from llama_long_utils.model.adapters import find_adapter, load_adapter
from llama_long_utils.model.base import load_base
from llama_long_utils.model.weights import locate_base, weights_sha256
from llama_long_utils.settings import ARMS, Preset, Scaling

ADAPTED = ("extended", "rope_unchanged")


def arm_scaling(preset: Preset, arm: str) -> Scaling:
    """The RoPE of an arm; ValueError if there is no such arm, or none on this base."""
    try:
        match arm:
            case "base":
                return preset.base_rope
            case "rope_unchanged":
                return preset.control_rope
            case "yarn":
                return dataclasses.replace(preset.control_rope, method="yarn")
            case "rope_base_only" | "extended":
                return preset.extended_rope
    except ValidationError as error:
        raise ValueError(f"preset {preset.name!r}, arm {arm!r}: {error.errors()[0]['ctx']['error']}") from None
    raise ValueError(f"unknown arm {arm!r}: use one of {list(ARMS)}")


def load_arm(
    preset: Preset,
    arm: str,
    *,
    adapter: Path | str | None = None,
    quantized: bool = True,
    dtype: str | None = None,
    attention: str = "sdpa",
    scaling: Scaling | None = None,
) -> PreTrainedModel | PeftModel:
    """The model of an arm in eval mode; everything that is cheap is checked before its weights are read.

    The adapter, for the arms that have one, is in a folder, by default what `find_adapter` finds; the other options are
    those of `load_base`. ValueError if the arm, its base or its adapter is not as the preset says, RuntimeError if the
    base is not here and cannot be downloaded.
    """
    rope = scaling or arm_scaling(preset, arm)
    folder = locate_base(preset)
    found = find_adapter(preset, adapter, rope) if arm in ADAPTED else None
    model = load_base(folder, rope, dtype=dtype or preset.base.dtype, quantized=quantized, attention=attention)
    return (load_adapter(model, found, folder) if found else model).eval()


def arm_inputs(preset: Preset, arm: str, **options: Any) -> dict[str, Any]:
    """Everything that the numbers of `load_arm` with the same arguments depend on, for the key of a cache."""
    given = inspect.signature(load_arm).bind(preset, arm, **options)
    given.apply_defaults()
    chosen = given.kwargs
    rope = chosen.pop("scaling") or arm_scaling(preset, arm)
    adapter = chosen.pop("adapter")
    found = find_adapter(preset, adapter, rope) if arm in ADAPTED else None
    return {
        "base_sha256": weights_sha256(locate_base(preset)),
        "adapter_sha256": weights_sha256(found) if found else None,
        "rope": dataclasses.asdict(rope),
        **chosen,
        "dtype": chosen["dtype"] or preset.base.dtype,
    }
