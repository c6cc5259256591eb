"""The cells of the pretraining experiment (pretraining.py): sizes, arms, seeds, and how each is trained.

Nothing here trains or reads a text, so that the names and settings of all cells can be asked for at once.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from experiments.pretraining_rates import FACTORS, LARGER, RATED, SEEDS, rate_name
from llama_long_utils.cache import digest
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import MemorySavings, TrainingSettings

VERSION = 1  # of what a cell measures: raise it when its numbers change
PRESET = load_preset("tiny")  # its texts, its tokenizer and its two windows
SHORT, LONG = PRESET.base.window, PRESET.extension.window
SHORT_BASE, LONG_BASE = PRESET.base.rope_base, PRESET.extension.rope_base
RUNS = PRESET.run_folder / "pretraining"
SWITCHES = {"long": 0.0, "switch-20": 0.2, "switch-40": 0.4, "switch-80": 0.8, "switch-95": 0.95, "short": 1.0}
SWITCHES["in-reach"] = 0.8  # "switch-80", but short sequences quote what stands in them
CONTINUED = "continued"  # the arm "short", then trained on long sequences until it has cost what "switch-80" costs
LARGER_ARMS = ("long", "switch-80", "short", "switch-40", "switch-20", "switch-95")  # the first three decide
FROM_SCRATCH_ARMS = ("long", "switch-20", "switch-40", "switch-80", "switch-95", "short", CONTINUED)
TRAINED_ON_ARMS = ("long", "switch-80", "in-reach", "switch-95", "short", CONTINUED)
MIXES = {  # texts of the long rows, of the short rows, share of long rows (pretraining_mix.py)
    "original": ("speeches and plays", "bible", 0.5),
    "long-removed": ("speeches and plays", "bible", 0.0),
    "shredded": ("speeches and plays", "bible", 0.5),
    "upweighted": ("speeches and plays", "bible", 0.8),
    "other-domain": ("python", "python", 0.5),
    "better": ("speeches and plays", "speeches and plays", 0.5),
    "cut-first": ("speeches and plays", "bible", 0.5),  # shredded, and then its pieces quote themselves
}
FROM_SCRATCH_MIXES = ("original", "long-removed", "shredded", "upweighted", "other-domain", "better")
DECIDING_MIXES = ("original", "cut-first", "better")  # that tell length from content
TRAINED_ON_MIXES = (*DECIDING_MIXES, "shredded", "long-removed", "upweighted", "other-domain")
ORDERS = (*SEEDS, 3, 4, 5)  # of the deciding mixes: three told too little (pretraining_mix.py)
MIX_QUOTING = 0.6  # share of the documents that quote themselves, for the tiny Llama
BEFORE = "before"  # the tiny Llama as it is, with the RoPE base raised
SPARSE = "s2"  # long throughout, trained with shifted sparse attention (attention.py)
AS_SPARSE = "long-as-s2"  # long throughout, so many steps that they multiply as much as those of "s2"
SHORT_SPARSE, SHORT_AS_SPARSE = "short-s2", "short-as-s2"  # the same two, of 512 tokens throughout
SPARSE_ARMS = (SPARSE, AS_SPARSE, SHORT_SPARSE, SHORT_AS_SPARSE)
SPARSE_SHARE = 15 / 64  # of full attention's pairs that S2 has: half of the heads 1/4, half 7/32
ARMS = (*SWITCHES, CONTINUED, BEFORE, *(f"mix-{mix}" for mix in MIXES), *SPARSE_ARMS)
EDGES = [1, 16, 64, 128, 256, 512, 1024, 2048, 4096]  # of the positions' buckets


@dataclass(frozen=True)
class Size:
    """The shape of a model, which has Llama's proportions."""

    hidden: int
    layers: int
    heads: int
    learning_rate: float
    steps: int = 400
    sequences: ClassVar[int] = 1  # of 4,096 tokens in a step
    on_a_gpu: ClassVar[bool] = False  # trained on one


@dataclass(frozen=True)
class MoreTokens(Size):
    """A model that reads as many tokens as the one which a GPU trains, in as large steps (pretraining_tokens.py)."""

    sequences: int = 8


@dataclass(frozen=True)
class LargeSize(Size):
    """A model that a GPU trains (pretraining_gpu.py)."""

    sequences: int = 8
    on_a_gpu: ClassVar[bool] = True


SIZES = {
    "doll": Size(64, 2, 2, 7e-3, steps=120),
    "0.4M": Size(64, 2, 2, 7e-3),
    "0.9M": Size(128, 2, 2, 3e-3),  # by pilots of 80 steps, seed 9: at 5e-3 short trains better, long worse
    "4M": Size(256, 4, 4, 3e-3),
    "tiny-llama": Size(256, 4, 4, 1e-3, steps=64),
}
FROM_SCRATCH, TRAINED_ON = "0.4M", "tiny-llama"  # of the records; the last begins as data/tiny-llama
RATES = {  # of the larger size: pretraining_rates.py
    rate_name(LARGER, factor): replace(SIZES[LARGER], learning_rate=factor * SIZES[LARGER].learning_rate)
    for factor in FACTORS
}
SIZES |= RATES
PILOT_FACTORS = (1, 0.5, 2)  # of their learning rate, which pilots compare
TOKENS_FACTORS = (1, 0.5, 2)  # of the recorded rate, at which 0.9M may read as many tokens
PILOTED = {  # sizes whose arms get rates by pilots, and steps of these
    "4M": (SIZES["4M"], 80),
    "16M": (LargeSize(384, 8, 6, 2e-3), 60),
    "16M-doll": (LargeSize(64, 2, 2, 7e-3, steps=5, sequences=2), 3),
}
MORE_TOKENS = "0.9M-as-16M"
SIZES |= {
    rate_name(MORE_TOKENS, factor): MoreTokens(128, 2, 2, factor * SIZES[LARGER].learning_rate)
    for factor in TOKENS_FACTORS
}
for name, (size, steps) in PILOTED.items():
    for factor in PILOT_FACTORS:
        rated = replace(size, learning_rate=factor * size.learning_rate)
        SIZES |= {rate_name(name, factor): rated, rate_name(f"{name}-pilot", factor): replace(rated, steps=steps)}


@dataclass(frozen=True)
class Cell:
    size: str
    arm: str
    seed: int

    @property
    def record(self) -> Path:
        """Where it is once it is measured, named by what its numbers depend on."""
        settings = [long_settings(self.size, self.seed)]
        settings += [later_settings(self)] if self.is_mix else []
        key = digest(VERSION, SIZES[self.size], self.arm, *settings, PRESET.data, EDGES)
        return RUNS / "cells" / f"{self.size}-{self.arm}-{self.seed}-{key[:8]}.json"

    @property
    def folder(self) -> Path:
        """Where its own part is trained, the long one."""
        return RUNS / "long" / self.record.stem

    @property
    def is_mix(self) -> bool:
        """Whether it is of the tiny Llama's data mixes, which begin with its own weights: no short part comes first."""
        return self.size == TRAINED_ON and self.arm.startswith(("mix-", BEFORE))

    @property
    def short_owner(self) -> "Cell | None":
        """The cell "short" whose training this one begins with: two processes must not train it at a time."""
        first = 0 if self.arm.startswith("mix-") else self.seed
        alone = self.arm in ("long", "short", "in-reach", *SPARSE_ARMS) or self.is_mix
        return None if alone else Cell(self.size, "short", first)


def checked_cell(size: str, arm: str, seed: str) -> Cell:
    """A cell by the words of a command line; ValueError if there is none of these names."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: use one of {list(SIZES)}")
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: use one of {list(ARMS)}")
    if not seed.isdigit() or int(seed) >= 2**32:
        raise ValueError(f"{seed!r} is no seed: give a whole number from 0 to {2**32 - 1:,}")
    return Cell(size, arm, int(seed))


def all_cells() -> list[Cell]:
    """The cells of all records, those that decide first: curriculum, data mix, then the tiny Llama trained on."""
    cells = [Cell(FROM_SCRATCH, arm, seed) for seed in SEEDS for arm in FROM_SCRATCH_ARMS]
    cells += [Cell(FROM_SCRATCH, f"mix-{mix}", seed) for seed in SEEDS for mix in FROM_SCRATCH_MIXES]
    cells += [Cell(TRAINED_ON, arm, seed) for seed in SEEDS for arm in TRAINED_ON_ARMS]
    for arms in (LARGER_ARMS[:3], LARGER_ARMS[3:]):
        cells += [Cell(LARGER, arm, seed) for seed in SEEDS for arm in arms]
    cells += [
        Cell(rate_name(LARGER, factor), arm, seed)
        for arm, tried in RATED.items()
        for factor, seeds in tried.items()
        for seed in seeds
    ]
    mixes = [(mix, seed) for mix in TRAINED_ON_MIXES for seed in (ORDERS if mix in DECIDING_MIXES else SEEDS)]
    cells += [Cell(TRAINED_ON, f"mix-{mix}", seed) for mix, seed in sorted(mixes, key=lambda one: one[1])]
    return [*cells, Cell(TRAINED_ON, BEFORE, 0)]


def flops_per_token(layers: int, hidden: int, length: int) -> float:
    """Operations of training on a token of a sequence of `length`, as the paper counts them.

    Six for each weight of the layers, which have 12 h^2, and attention over the whole square. Table 10 follows.
    """
    return 72 * layers * hidden**2 * (1 + length / (6 * hidden))


def long_settings(size: str, seed: int) -> TrainingSettings:
    """A step is one sequence of 4,096 tokens, or of a larger model several."""
    shape = SIZES[size]
    return TrainingSettings(
        window=LONG,
        reach=LONG,
        pack=False,
        attention="sdpa",
        steps=shape.steps,
        sequences_per_step=shape.sequences,
        sequences_at_once=shape.sequences,
        learning_rate=shape.learning_rate,
        warmup_steps=shape.steps // 20,
        weight_decay=0.1,
        gradient_clipping=1.0,
        memory_savings=MemorySavings(
            recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused"
        ),
        long_document_weight=1.0,
        self_quoting_share=PRESET.training.self_quoting_share if size == TRAINED_ON else 0.0,
        checkpoint_every=shape.steps if shape.on_a_gpu else max(shape.steps // 4, 1),
        seed=seed,
    )


def short_folder(size: str, seed: int, until: int, *, in_reach: bool = False) -> Path:
    """Where short sequences are trained up to step `until`."""
    name = f"{size}-{seed}-{digest(VERSION, SIZES[size], long_settings(size, seed), PRESET.data)[:8]}-{until}"
    return RUNS / "short" / (name + "-in-reach" * in_reach)


def short_settings(settings: TrainingSettings) -> TrainingSettings:
    """The same tokens in each step, as sequences of 512."""
    many = settings.sequences_per_step * LONG // SHORT
    return replace(settings, window=SHORT, reach=SHORT, sequences_per_step=many, sequences_at_once=many)


def later_settings(cell: Cell) -> TrainingSettings:
    """Of a run of its own: after the end of "short", at half the learning rate, or the tiny Llama's on a data mix."""
    settings = long_settings(cell.size, cell.seed + 1000)  # other sequences than before
    steps, share = continued_steps(cell.size), settings.self_quoting_share
    rate = settings.learning_rate / 2
    if cell.is_mix:
        steps, share, rate = settings.steps, MIX_QUOTING, settings.learning_rate
    elif cell.arm != CONTINUED:  # a data mix: texts as they are
        steps, share = settings.steps // 4, 0.0
    settings = replace(settings, steps=steps, learning_rate=rate, self_quoting_share=share)
    return replace(settings, warmup_steps=max(steps // 20, 1))


def continued_steps(size: str) -> int:
    """Long steps after 512 tokens throughout at which both together cost what "switch-80" costs."""
    shape = SIZES[size]
    short, long = (flops_per_token(shape.layers, shape.hidden, length) for length in (SHORT, LONG))
    return round((1 - SWITCHES["switch-80"]) * shape.steps * (long - short) / long)
