"""The numbers of the dose experiment in `dose.toml`, by preset, and the ways of training that they name.

SmolLM2's largest dose was one run, on 23 texts. Expected of what is added, written before it was trained or read:

- Whole sequences, seed 1, 10.5 million tokens: full context is better than the run's own windows in the far half of the
  texts, beyond the interval over kinds and texts, as in seed 0. Refuted if the interval holds zero.
- A second set of texts, of other kinds, read with seed 0's adapter: the same, with its interval. A replication, for no
  choice was made on them. Against the control of its own seed in windows nothing is expected: seed 0 was undecided.
- PoSE, seeds 1 and 2: full context is worth less than windows after 0.33 and 1 million tokens, as in seed 0. Refuted by
  a seed whose interval is below zero.
- RoPE base after training, 1 million tokens at 418,000 and at 2,500,000: NLL in the far half of the texts is within
  0.02 nat of the preset's 1,000,000, though untrained they differ by 0.05 to 0.2. Refuted if the interval excludes it.
- Without self-quoting, 1 million tokens: ordinary text changes by less than 0.01 nat; copies from 16,384 tokens of text
  are found less often, beyond the intervals of both.

- PoSE without self-quoting, 1 million tokens, seed 0: ordinary text changes by less than 0.01 nat, in windows and with
  full context. A text of 16,384 tokens is worth less to copies from it than after each of the three seeds with quoting
  (4.01 to 4.12 nats a token over the question alone). Refuted by an interval outside, or by a worth within or above.

What was expected of whole sequences, of the second set of texts and of PoSE holds (table full_minus_windows of both
records). The two that follow them were left out: the time was up.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as checked

from llama_long_utils.settings import Preset, Scaling

SEEDS = (0, 1, 2)
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
    other_bases: tuple[float, ...]
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


def ways_of(preset: Preset, bases: Sequence[float] = ()) -> dict[str, Way]:
    """The ways by name, in lengths of the preset's windows; `bases` are other RoPE bases for whole sequences."""
    old, new = preset.base.window, preset.extension.window
    whole, short = new // 2, old // 4
    raised, plain = preset.extended_rope, preset.base_rope

    def size(tokens: int) -> str:
        return f"{tokens // 1024}k" if tokens >= 1024 else f"{tokens}"

    full = Way(f"full{size(whole)}", whole, whole, raised)
    ways = {
        "full": full,
        "pose": Way(f"pose{size(short)}", short, new, raised),
        "control": Way(f"control{size(old)}", old, old, plain, full_context=False),
        "short": Way(f"short{size(short)}", short, short, raised),
    }

    def unquoted(way: Way) -> Way:
        return replace(way, name=f"{way.name}-noquote", quoting=0.0)

    again = {f"{key}{seed}": replace(way, seed=seed) for key, way in ways.items() for seed in SEEDS[1:]}
    other_bases = {
        f"full-base{base / 1000:g}k": replace(
            full, name=f"{full.name}-base{base / 1000:g}k", rope=replace(raised, base=base)
        )
        for base in bases
    }
    return {
        **ways,
        **again,
        **other_bases,
        "far": Way(f"full{size(new)}", new, new, raised),
        "unquoted": unquoted(full),
        "pose-unquoted": unquoted(ways["pose"]),
    }


def way_of_label(label: str, ways: dict[str, Way]) -> Way:
    """The way of an arm's name; ValueError if there is none."""
    found = {way.label: way for way in ways.values()}
    if label not in found:
        raise ValueError(f"no way of training is called {label!r}: there are {list(found)}")
    return found[label]


def doll(doses: Doses, preset: Preset) -> Doses:
    """A few steps and texts, to see that everything runs."""
    half = preset.extension.window // 2
    stages = (("full", 2), ("full", 4), ("pose", 2), ("control", 2))
    return replace(doses, lengths=(half, half), questions=4, stages=stages)
