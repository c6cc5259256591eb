"""A real model trained on whole sequences against something else, by its dose record."""

from dataclasses import dataclass

import numpy as np

from experiments.real_models import DoseResults
from llama_long_utils.notebooks import measured
from tools.claims.line import Interval


@dataclass(frozen=True)
class Comparison:
    """Whole sequences with full context minus something, at the largest dose, and what other seeds say of it.

    Attributes:
        found: value and bounds, in nats per token, of the first seed.
        tokens: it was trained on.
        seeds: the same difference of every seed, by dose (tokens), where several were run.
    """

    found: Interval
    tokens: int
    seeds: dict[int, tuple[float, ...]]

    @property
    def spread(self) -> float:
        """How far seeds lie apart at most, at any dose, in nats; 0 if there is one."""
        return max((max(values) - min(values) for values in self.seeds.values()), default=0.0)

    @property
    def gains(self) -> bool:
        """Below zero by its interval, and by more than seeds lie apart."""
        return self.found[2] < 0 and -self.found[0] > self.spread

    def __str__(self) -> str:
        return f"**{self.says}** {measured(*self.found, digits=3)}"

    @property
    def says(self) -> str:
        """In words."""
        return "better" if self.gains else "worse" if self.found[1] > 0 else "not shown"

    @property
    def runs(self) -> str:
        """How many seeds were run at the largest dose, in words."""
        count = len(self.seeds.get(self.tokens, ()))
        return f"{count} seeds (numbers and brackets: the first)" if count else "one seed"


def compared(results: DoseResults, line: str, place: str = "far", *, whole: bool = False) -> Comparison | None:
    """A line of `DoseResults.worth` at its largest dose, and what other seeds say of it; None if it was not run."""
    rows = results.worth(r"\d+", place, whole=whole)
    rows = rows[rows.line == line]
    if rows.empty:
        return None
    arms = rows["first"].fillna(rows.arm)
    rows = rows.assign(seed=arms.str.extract(r"-s(\d+)")[0].astype(int)).sort_values(["tokens_trained", "seed"])
    last = rows[rows.seed == 0].iloc[-1]
    several = rows.groupby("tokens_trained").filter(lambda dose: len(dose) > 1)
    seeds = {int(dose): tuple(part.nats) for dose, part in several.groupby("tokens_trained")}
    return Comparison((last.nats, last.low, last.high), int(last.tokens_trained), seeds)


def statements_found(results: DoseResults, arm: str, length: int) -> str:
    """How many planted statements an arm found at a length, and other seeds of it as many tokens."""
    table = results.record.table("retrieval").query("task == 'key' and length == @length")
    names = table.arm + np.where(table.tokens_trained > 0, "-" + table.tokens_trained.astype(str), "")
    seed = names.str.extract(r"-s(\d+)-")[0].fillna("0")
    parts = table[names.str.replace(r"-s\d+-", "-s0-", regex=True) == arm].groupby(seed)
    found = [f"{round((part.exact * part.questions).sum())} of {part.questions.sum()}" for _, part in parts]
    return "; another seed ".join(found) or "not asked"
