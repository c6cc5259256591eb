"""Records of real models as notebook 13 tells them: what a dose is worth, statements found, tasks before and after."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from llama_long_utils.evaluation.statistics import FEWEST
from llama_long_utils.figures import BLUE, RED, intervals, plt, save_figure
from llama_long_utils.notebooks import measured
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, recorded

WAYS = {"full": "whole sequences", "pose": "PoSE", "short": "short, no skips"}
PLACES = {
    "inside": {"label": "inside the old window", "color": RED, "marker": "o"},
    "far": {"label": "in the far half of the texts", "color": BLUE, "marker": "s"},
}
SHARES = {"mmlu": "accuracy", "hellaswag": "accuracy_per_character", "truthfulqa_mc1": "accuracy_per_character"}
SHARES |= {"gsm8k": "exact_match", "humaneval": "passed"}


@dataclass(frozen=True)
class DoseResults:
    """The record `06_dose_response` of a preset. "inside" is the old window, "far" the far half of the texts.

    Intervals are the wider of two: over kinds and texts, and Student's over the kinds' means.
    """

    preset: str
    record: Record

    def rows(self, table: str, place: str) -> pd.DataFrame:
        """The rows of a table at a place."""
        new = self.record.table("held_out").tokens.max()
        low, high = (0, load_preset(self.preset).base.window) if place == "inside" else (new // 2, new)
        rows = self.record.table(table)
        if "kinds_low" in rows:
            rows["low"], rows["high"] = rows[["low", "kinds_low"]].min(axis=1), rows[["high", "kinds_high"]].max(axis=1)
        return rows[(rows.position_low == low) & (rows.position_high == high)]

    def largest(self, way: str, at_most: float = np.inf) -> str:
        """The arm of a way with the largest dose, of the first seed: "full16k-s0-10485760"; empty if it was not run."""
        arms = self.record.table("arms")
        arms = arms[arms.arm.str.fullmatch(rf"{way}\d+k?-s0") & (arms.tokens <= at_most)]
        last = arms.sort_values("tokens").tail(1)
        return "".join(last.arm + "-" + last.tokens.astype(str))

    def compare(self, pairs: dict[str, tuple[str, str]]) -> pd.DataFrame:
        """First minus second reading of each named pair at both places; pairs that were not read are left out."""
        found = []
        for place in ("inside", "far"):
            table = self.rows("differences", place).set_index(["first", "second"])
            names = {quantity: pair for quantity, pair in pairs.items() if pair in table.index}
            found += [{"quantity": name, "place": place, **table.loc[pair]} for name, pair in names.items()]
        return pd.DataFrame(found).assign(model=self.preset)

    def four_bits(self) -> pd.DataFrame:
        """What 4 bits cost the base and the extended model, and how gains depend on the base they are measured from."""
        full = self.largest("full")
        return self.compare(
            {
                "base: 16 bits minus NF4": ("base/window", "base-nf4/window"),
                "extended minus NF4 base": (f"{full}/full", "base-nf4/window"),
                "extended minus 16-bit base": (f"{full}/full", "base/window"),
                "extended: 16 bits minus NF4": (f"{full}-16bit/full", f"{full}/full"),
            }
        )

    def alternatives(self) -> pd.DataFrame:
        """Whole sequences with full context against what reads in windows, and YaRN against the base."""
        control, full = self.largest("control"), self.largest("full")
        same = self.largest("full", at_most=int(control.rpartition("-")[2]))
        return self.compare(
            {
                "whole sequences minus control, equal tokens": (f"{same}/full", f"{control}/window"),
                "whole sequences, largest dose, minus 16-bit base": (f"{full}/full", "base/window"),
                "control minus 16-bit base": (f"{control}/window", "base/window"),
                "YaRN, untrained, minus NF4 base": ("yarn-nf4/full", "base-nf4/window"),
            }
        )

    def worth(self, seed: str = "0") -> pd.DataFrame:
        """What full context is worth far out, by way and dose: minus the same model's windows, and minus the control's.

        Args:
            seed: a regular expression.

        Returns:
            The columns of the record, with `line`: the way, or "fair" for whole sequences minus the control after as
            many tokens.
        """
        own, pairs = self.rows("full_minus_windows", "far").query("weights == 'nf4'"), self.rows("differences", "far")
        own = own.assign(line=own.arm.str.extract(rf"^([a-z]+)\d+k?-s{seed}$")[0])
        full = pairs["first"].str.extract(rf"^full.*-s({seed})-(\d+)/full")
        control = pairs.second.str.extract(r"^control.*-s\d+-(\d+)/")
        fair = pairs[full[1] == control[0]].assign(line="fair")
        return pd.concat([own[own.line.isin(WAYS)], fair]).sort_values(["line", "tokens_trained"], kind="stable")

    def apart(self, line: str) -> float:
        """How far runs of other seeds lie apart on a line of `worth`, in nats; 0 if there is one seed."""
        every = self.worth(r"\d+")
        spread = every[every.line == line].groupby("tokens_trained").nats.agg(np.ptp)
        return float(spread.max())

    def ahead(self, rows: pd.DataFrame, line: str) -> pd.Series:
        """Whether differences are below zero by the whole interval, and by more than seeds lie apart."""
        return (rows.high < 0) & (-rows.nats > self.apart(line))

    def doses_that_pay(self) -> pd.DataFrame:
        """In words for a table: from which dose on each line of `worth` is `ahead`, its largest dose, other seeds."""
        rows, every = [], self.worth(r"\d+")
        for line, part in self.worth().groupby("line"):
            last, pays = part.iloc[-1], part[self.ahead(part, line)].tokens_trained.min() / 1e6
            runs = every[every.line == line].groupby("tokens_trained").nats.agg(list)
            runs = runs[runs.map(len) > 1]
            row = {"trained on": WAYS.get(line, "whole sequences, minus the control's windows")}
            row |= {"pays from": f"{pays:.1f}M tokens" if pays > 0 else "no dose"}
            row |= {"largest dose": f"{last.tokens_trained / 1e6:.1f}M"}
            row |= {"nats": measured(last.nats, last.low, last.high, digits=3)}
            row |= {"texts that gain": f"{last.below_zero} of {last.documents}"}
            row |= {"without the strongest": f"{last.without_one:+.3f}"}
            seeds = (
                f"{', '.join(map('{:+.3f}'.format, values))} at {tokens / 1e6:.1f}M" for tokens, values in runs.items()
            )
            rows.append({"model": self.preset, **row, "seeds": "; ".join(seeds) or "one"})
        return pd.DataFrame(rows)

    def statements(self) -> pd.DataFrame:
        """Planted statements found, by fifth of the depth: the base, YaRN and the largest dose of three ways.

        Columns model, length (tokens), arm, fifth_of_depth, questions, exact (share), low, high, right (count).
        """
        asked = self.record.table("retrieval").query("task == 'key'").assign(model=self.preset)
        arms = {"base-nf4": "base", "yarn-nf4": "yarn", self.largest("control"): "control"}
        arms |= {self.largest(way): way for way in ("pose", "full")}
        names = asked.arm + np.where(asked.tokens_trained > 0, "-" + asked.tokens_trained.astype(str), "")
        asked = asked.assign(arm=names.map(arms), right=(asked.exact * asked.questions).round().astype(int))
        return asked.dropna(subset="arm").sort_values(["length", "arm", "fifth_of_depth"])


def read_dose_results(presets: list[str]) -> dict[str, DoseResults]:
    """The dose records of those presets that have one."""
    found = {preset: recorded(preset, "06_dose_response") for preset in presets}
    return {preset: DoseResults(preset, record) for preset, record in found.items() if record}


def draw_differences(table: pd.DataFrame, folder: Path, slug: str, number: str, caption: str) -> None:
    """A panel for each model: what `DoseResults.compare` found, with intervals, inside the old window and far out."""
    models, names = list(table.model.unique()), table.quantity.unique()
    figure, panels = plt.subplots(1, len(models), figsize=(5 + 3.6 * len(models), 3.6), sharey=True, squeeze=False)
    for name, axes in zip(models, panels[0], strict=True):
        part = table[table.model == name]
        intervals(axes, part, row="quantity", colour="place", value="nats", zero=0, styles=PLACES, names=names)
        axes.set(title=name, xlabel="nats per token; left of the line the first is better")
        axes.get_legend().remove()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    alt = "; ".join(f"{row.model}, {row.quantity}, {row.place} {row.nats:+.2f}" for row in table.itertuples())
    save_figure(figure, folder, slug, number, f"{caption} Recorded, one seed, the wider of two 95% intervals.", alt)


def read_tasks(preset: str, pair: str = "base -> extended") -> tuple[pd.DataFrame, pd.DataFrame]:
    """What an extension, or 4 bits, did to tasks, as recorded in `08_benchmark_deltas`; empty tables without a record.

    Returns:
        (shares of right answers in points, NLL of the right answer in nats per token inside the old window): the
        record's columns with `model`, `row` (task and length), `each` (differences of fewer than eight questions,
        which then have no interval). MMLU's NLL, that of a letter, is left out.
    """
    record = recorded(preset, "08_benchmark_deltas")
    if record is None:
        return pd.DataFrame(columns=["task"]), pd.DataFrame(columns=["task"])
    table, window = record.table("deltas").assign(model=preset), load_preset(preset).base.window
    table = table[table.pair == pair]
    shares = table[(table.metric == table.task.map(SHARES)) & (table.length == 0)].copy()
    shares[["difference", "low", "high"]] *= 100
    costs = table[(table.metric == "answer_nll") & (table.task != "mmlu") & (table.length <= window)].copy()
    costs["row"] = costs.task + np.where(costs.length > 0, costs.length.map(", {:,} tokens".format), "")
    costs["each"] = [_single(record, row) for row in costs.itertuples()]
    costs.loc[costs["items"] < FEWEST, ["low", "high"]] = np.nan
    return shares, costs


def _single(record: Record, row: tuple) -> np.ndarray:
    """Each question's difference, if they are few."""
    before, after = (record.arrays[f"{row.task}_{row.length}_{arm}_{row.metric}"] for arm in row.pair.split(" -> "))
    return after - before if len(after) < FEWEST else np.array([])
