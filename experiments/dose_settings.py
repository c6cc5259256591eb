"""The numbers of the dose experiment in `dose.toml`, by preset, and the ways of training that they name."""

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked

from llama_long_utils.settings import Preset, Scaling

FILE = Path(__file__).with_name("dose.toml")


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Doses:
    """Numbers of one preset; `dose.toml` says what each is."""

    lengths: tuple[int, int]
    asked: tuple[int, ...]
    questions: int
    rank: int
    alpha: int
    learning_rate: float
    tokens_at_once: int
    join_documents: bool
    tasks: tuple[str, ...]
    stages: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Way:
    """How an arm is trained. `full_context`: it is read with full context too, and asked behind longer texts."""

    name: str
    window: int
    reach: int
    rope: Scaling
    quoting: float = 0.35
    seed: int = 0
    full_context: bool = True

    @property
    def label(self) -> str:
        return f"{self.name}-s{self.seed}"


def read_doses(preset: str) -> Doses:
    """The numbers of a preset; ValueError if there are none."""
    found = tomllib.loads(FILE.read_text())
    if preset not in found:
        raise ValueError(f"experiments/{FILE.name} has no numbers for the preset {preset!r}, only for {list(found)}")
    return TypeAdapter(Doses).validate_python(found[preset])


def read_stages(texts: list[str], ways: dict[str, Way]) -> tuple[tuple[str, int], ...]:
    """Stages from texts like "full:20"; ValueError if one names no way or no positive number of steps."""
    stages = []
    for text in texts:
        way, _, steps = text.partition(":")
        if way not in ways or not (steps.isdecimal() and int(steps) > 0):
            raise ValueError(f"{text!r} is no stage: give WAY:STEPS, as full:20, with a way of {list(ways)}")
        stages.append((way, int(steps)))
    return tuple(stages)


def ways_of(preset: Preset) -> dict[str, Way]:
    """The ways by name, in lengths of the preset's windows."""
    old, new = preset.base.window, preset.extension.window
    whole, short = new // 2, old // 4
    raised, plain = preset.extended_rope, preset.base_rope

    def size(tokens: int) -> str:
        return f"{tokens // 1024}k" if tokens >= 1024 else f"{tokens}"

    full, pose = Way(f"full{size(whole)}", whole, whole, raised), Way(f"pose{size(short)}", short, new, raised)
    return {
        "full": full,
        "pose": pose,
        "control": Way(f"control{size(old)}", old, old, plain, full_context=False),
        "short": Way(f"short{size(short)}", short, short, raised),
        "far": Way(f"full{size(new)}", new, new, raised),
        "unquoted": replace(full, name=f"{full.name}-noquote", quoting=0.0),
        **{f"full{seed}": replace(full, seed=seed) for seed in (1, 2)},
        **{f"pose{seed}": replace(pose, seed=seed) for seed in (1, 2)},
    }


def doll(doses: Doses, preset: Preset) -> Doses:
    """A few steps and texts, to see that everything runs."""
    half = preset.extension.window // 2
    stages = (("full", 2), ("full", 4), ("pose", 2), ("control", 2))
    return replace(doses, lengths=(half, half), questions=4, stages=stages)
