"""Reading the record of the instruction ablation: scores by length, differences between arms, what tuning costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.race_results import mean_over_seeds
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.figures import (
    AMBER,
    BLACK,
    BLUE,
    GREY,
    PURPLE,
    RED,
    TEAL,
    intervals,
    plt,
    save_figure,
    token_axis,
)
from llama_long_utils.records import Record, recorded
from llama_long_utils.settings import Preset

SLUG = "09_instruction_tuning"
# Label, colour, marker, and the row of Table 9 that an arm repeats.
LOOKS = {
    "untuned": ("extended, not tuned", GREY, "X", ""),
    "chat base": ("base in its own window, short", RED, "o", "Llama 2 Chat"),
    "short": ("short", AMBER, "v", "RLHF V5 data"),
    "short, text": ("short, plain text", PURPLE, "P", "with pretraining data"),
    "long": ("short, long", TEAL, "^", "with self-instruct, no loss on the prompt"),
    "long, loss on prompt": ("short, long, loss on prompt", BLUE, "s", "with self-instruct, loss on the prompt"),
    "synthetic context": ("short, synthetic context", BLACK, "D", ""),
    "long, 4 times": ("short, long; 4 times the steps", TEAL, "^", ""),
    "long, loss on prompt, 4 times": ("short, long, loss on prompt; 4 times the steps", BLUE, "s", ""),
}
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class InstructionResults:
    """The record of a preset: a row of the arrays for each arm and seed."""

    record: Record
    preset: Preset

    @cached_property
    def runs(self) -> pd.DataFrame:
        return self.record.table("runs")

    @property
    def arms(self) -> list[str]:
        return [arm for arm in LOOKS if arm in {*self.runs.arm}]

    @property
    def lengths(self) -> list[int]:
        return sorted(self.record.table("answers").length.unique())

    @property
    def past(self) -> list[int]:
        """The lengths past the old window, over which scores are averaged."""
        return [length for length in self.lengths if length > self.preset.base.window]

    def scores(self, arm: str, lengths: Sequence[int], measure: str = "exact") -> np.ndarray:
        """Means over questions and lengths, in points for shares: shape (seeds, documents)."""
        rows = np.flatnonzero(self.runs.arm == arm)
        points = 1 if measure == "log_probability" else 100
        return points * np.mean([self.record.arrays[f"{measure}_{length}"][rows] for length in lengths], axis=0)

    def nll(self, arm: str, low: int, high: int) -> np.ndarray:
        """Nats per token at positions [low, high): shape (seeds, documents)."""
        table = self.record.table("nll_by_position")
        runs = table[["arm", "seed"]].drop_duplicates().reset_index(drop=True)
        edges = sorted(table.position_low.unique())
        picked = [number for number, edge in enumerate(edges) if low <= edge < high]
        nats, tokens = (self.record.arrays[name][..., picked].sum(axis=-1) for name in ("nats", "tokens"))
        return (nats / tokens)[np.flatnonzero(runs.arm == arm)]

    def mean(self, values: np.ndarray) -> Interval:
        """With its 95% interval, which resamples seeds and documents."""
        evaluation = self.preset.evaluation
        bootstrap = Bootstrap(values.shape[1], evaluation.bootstrap_samples, evaluation.seed)
        return tuple(mean_over_seeds(values, np.ones(values.shape[1]), bootstrap).values())

    def difference(self, first: str, second: str, lengths: Sequence[int] = (), measure: str = "exact") -> Interval:
        """First minus second arm, paired by document and seed; default: the lengths past the old window."""
        one, other = (self.scores(arm, lengths or self.past, measure) for arm in (first, second))
        return self.mean(one - other)

    def table(self, measure: str = "exact") -> pd.DataFrame:
        """Columns arm, length, value, low, high."""
        rows = [
            (arm, length, *self.mean(self.scores(arm, [length], measure)))
            for arm in self.arms
            for length in self.lengths
        ]
        return pd.DataFrame(rows, columns=["arm", "length", "value", "low", "high"])


def instruction_results(preset: Preset) -> InstructionResults | None:
    """The committed record of a preset, or None."""
    record = recorded(preset.name, SLUG)
    return InstructionResults(record, preset) if record else None


def draw_scores(results: InstructionResults, folder: Path, slug: str, number: str, caption: str) -> None:
    """Exact answers by length, a line with intervals for each arm."""
    table = results.table()
    figure, axes = plt.subplots(figsize=(8, 4.4))
    for place, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
        label, colour, marker, _ = LOOKS[arm]
        form = {"marker": marker, "color": colour, "label": label, "linestyle": "--" if "times" in arm else "-"}
        bars = [rows.value - rows.low, rows.high - rows.value]
        axes.errorbar(rows.length * 1.03 ** (place - 4), rows.value, yerr=bars, capsize=2, **form)
    token_axis(axes, results.lengths, "document, question and answer (tokens)")
    axes.set(ylabel="exact answers (%)", ylim=(-1, None))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    last = table[table.length == results.lengths[-1]]
    said = "; ".join(f"{LOOKS[row.arm][0]} {row.value:.0f}%" for row in last.itertuples())
    alt = f"Exact answers against length, falling for all arms. At {results.lengths[-1]:,} tokens: {said}."
    save_figure(figure, folder, slug, number, caption, alt)


def draw_beside_paper(
    results: InstructionResults, published: dict, folder: Path, slug: str, number: str, caption: str
) -> None:
    """Left: our arms minus short data alone; right: Table 9's rows minus the same row, every task a mark."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    rows = {arm: row for arm, (*_, row) in LOOKS.items() if row and row != "RLHF V5 data" and arm in results.arms}
    ours = pd.DataFrame(
        [(LOOKS[arm][0], *results.difference(arm, "short")) for arm in rows], columns=["row", "value", "low", "high"]
    )
    intervals(left, ours, row="row", zero=0)
    short = np.array(published["rows"]["RLHF V5 data"])
    for place, row in enumerate(rows.values()):
        change = np.array(published["rows"][row]) - short
        right.scatter(change, [place] * len(change), s=30, facecolors="none", edgecolors=BLUE)
    right.axvline(0, color="0.35", linewidth=1)
    left.set(title="ours, past the old window", xlabel="exact answers minus short data's (points)")
    right.set(title="published: five tasks", xlabel="score minus short data's (points)")
    said = "; ".join(f"{row.row} {row.value:+.1f}" for row in ours.itertuples())
    save_figure(figure, folder, slug, number, caption, f"Ours, minus short data, in points: {said}.")


def draw_costs(results: InstructionResults, folder: Path, slug: str, number: str, caption: str) -> None:
    """NLL of held-out documents minus that before tuning, inside the old window and far out."""
    window, reach = results.preset.base.window, results.preset.evaluation.tokens
    places = {"inside the old window": (window // 2, window), "far half": (reach // 2, reach)}
    rows = []
    for arm in (arm for arm in results.arms if arm not in ("untuned", "chat base")):
        for place, (low, high) in places.items():
            cost = results.nll(arm, low, high) - results.nll("untuned", low, high)
            rows.append((LOOKS[arm][0], place, *results.mean(cost)))
    table = pd.DataFrame(rows, columns=["row", "place", "value", "low", "high"])
    styles = {
        place: {"label": place, "color": colour, "marker": marker}
        for place, colour, marker in zip(places, (RED, BLUE), "os", strict=True)
    }
    figure, axes = plt.subplots(figsize=(8, 3.6))
    intervals(axes, table, row="row", colour="place", zero=0, styles=styles)
    axes.set(xlabel="NLL minus that before tuning (nats per token; right: worse)")
    said = "; ".join(f"{row.row}, {row.place} {row.value:+.3f}" for row in table.itertuples())
    save_figure(figure, folder, slug, number, caption, f"Nats against before: {said}.")
