"""The arms of a comparison: a base, its RoPE, an adapter and a dtype, loaded in one way for everybody."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llama_long_utils.model.adapters import find_adapter, load_adapter
from llama_long_utils.model.base import load_base
from llama_long_utils.model.loss import Model
from llama_long_utils.model.memory_savings import READING, apply_memory_savings
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
    preset: Preset, arm: str, *, adapter: Path | str | None = None, scaling: Scaling | None = None, **options: Any
) -> Model:
    """The model of an arm in eval mode; everything that is cheap is checked before its weights are read.

    The adapter, for the arms that have one, is in a folder, by default what `find_adapter` finds; `scaling` takes the
    place of the arm's RoPE; other options are those of `load_base`. ValueError if the arm, its base or its adapter is
    not as the preset says, RuntimeError if the base is not here and cannot be downloaded.
    """
    rope, base = scaling or arm_scaling(preset, arm), locate_base(preset)
    found = find_adapter(preset, adapter, rope) if arm in ADAPTED else None
    model: Model = load_base(base, rope, **{"dtype": preset.base.dtype, **options})
    model = (load_adapter(model, found, base) if found else model).eval()
    apply_memory_savings(model, READING)
    return model


class OneArm:
    """Loads the arms of a preset one in place of the other: two, and what reading takes, may not fit on a GPU."""

    def __init__(self, preset: Preset, adapters: dict[str, Path | str | None]) -> None:
        self.preset, self.adapters, self.held = preset, adapters, {}

    def __call__(self, arm: str) -> Model:
        if arm not in self.held:
            self.held.clear()
            gc.collect()  # a model holds itself, by methods bound to its modules
            self.held[arm] = load_arm(self.preset, arm, adapter=self.adapters.get(arm))
        return self.held[arm]


def arm_inputs(
    preset: Preset, arm: str, *, adapter: Path | str | None = None, scaling: Scaling | None = None, **options: Any
) -> dict[str, Any]:
    """Everything that the numbers of `load_arm` with the same arguments depend on, for the key of a cache."""
    rope = scaling or arm_scaling(preset, arm)
    found = find_adapter(preset, adapter, rope) if arm in ADAPTED else None
    return {
        "base_sha256": weights_sha256(locate_base(preset)),
        "adapter_sha256": weights_sha256(found) if found else None,
        "rope": dataclasses.asdict(rope),
        **{"quantized": True, "dtype": preset.base.dtype, "attention": "sdpa", **options},
    }
