"""Reading the record of the instruction ablation: scores by length, differences between arms, what tuning costs."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.race_results import mean_over_seeds, wider_interval
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.figures import (
    AMBER,
    BLACK,
    BLUE,
    GREY,
    PINK,
    PURPLE,
    RED,
    TEAL,
    intervals,
    plt,
    save_figure,
    token_axis,
)
from llama_long_utils.notebooks import measured
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
    "long, loss on prompt, full answers": ("short, long, loss on prompt; full answers", BLUE, "s", ""),
    "long, diluted answers": ("short, long; answers diluted", TEAL, "^", ""),
    "long, rate / 4": ("short, long; rate / 4", TEAL, "^", ""),
    "long, loss on prompt, rate / 4": ("short, long, loss on prompt; rate / 4", BLUE, "s", ""),
}
# No arm learns to stop at that rate in so few steps, so exact answers compare nothing: only the record has them.
RECORD_ONLY = ("long, rate / 4", "long, loss on prompt, rate / 4")
DRAWN = ("chat base", "short", "long", "long, loss on prompt")
MEASURES = {"exact": "exact answers", "words": "right words, whatever follows"}
WRITER = "qwen2.5-coder-1.5b"  # the preset whose record holds what a chat model asked
LOSS, LONG, PLAIN = "loss on the prompt minus none", "long, loss on prompt minus short", "long minus short"
FULL = "loss on the prompt minus none, answers at full weight"
DILUTED = "loss on the prompt minus none, answers diluted in both"
DILUTION = "diluted answers minus full ones, no loss on the prompt"
BESIDE = "diluted answers minus full ones, loss on prompt"
READ = ("long", "long, loss on prompt", "long, loss on prompt, full answers")
RATE = "loss on the prompt minus none, a quarter of the rate, one seed"
TEXT, LONGER = "plain text minus short", "loss on the prompt minus none, 4 times the steps, one seed"
SYNTHETIC, OLD = "long minus synthetic context", "base in its own window minus short"
EXPECTED = (LOSS, PLAIN, FULL, DILUTION)  # what was written down before the runs judges these
TABLE = (LOSS, FULL, LONGER, TEXT, PLAIN, LONG, SYNTHETIC, OLD)  # the others are drawn, or only in the record
PAIRS = {  # differences: first arm minus second
    LOSS: ("long, loss on prompt", "long"),
    FULL: ("long, loss on prompt, full answers", "long"),
    DILUTED: ("long, loss on prompt", "long, diluted answers"),
    DILUTION: ("long, diluted answers", "long"),
    BESIDE: ("long, loss on prompt", "long, loss on prompt, full answers"),
    RATE: ("long, loss on prompt, rate / 4", "long, rate / 4"),
    LONGER: ("long, loss on prompt, 4 times", "long, 4 times"),
    TEXT: ("short, text", "short"),
    "loss on the prompt minus plain text": ("long, loss on prompt", "short, text"),
    PLAIN: ("long", "short"),
    LONG: ("long, loss on prompt", "short"),
    SYNTHETIC: ("long", "synthetic context"),
    OLD: ("chat base", "short"),
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
    def pairs(self) -> dict[str, tuple[str, str]]:
        """Those of PAIRS that were measured."""
        return {name: pair for name, pair in PAIRS.items() if {*pair} <= {*self.arms}}

    @property
    def lengths(self) -> list[int]:
        return sorted(self.record.table("answers").length.unique())

    @property
    def past(self) -> list[int]:
        """The lengths past the old window, over which scores are averaged."""
        return [length for length in self.lengths if length > self.preset.base.window]

    def seeds(self, arm: str) -> set[int]:
        return {*self.runs.seed[self.runs.arm == arm]}

    def scores(self, arm: str, lengths: Sequence[int], measure: str = "exact", beside: str | None = None) -> np.ndarray:
        """Means over questions and lengths, in points for shares: shape (seeds, documents), or (seeds, questions).

        `beside`: only seeds of that arm, too, where each seed has questions of its own.
        """
        seeds = self.seeds(arm)
        if beside and f"questions_{lengths[0]}" in self.record.arrays:
            seeds &= self.seeds(beside)
        rows = np.flatnonzero((self.runs.arm == arm) & self.runs.seed.isin(seeds))
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
        return tuple(mean_over_seeds(values, *self._units(values)).values())

    def contrast(self, changes: np.ndarray) -> Interval:
        """Mean of (seeds, documents) within the wider bounds of two: `mean`'s, and Student's t over means of seeds."""
        return tuple(wider_interval(changes, *self._units(changes)).values())

    def _units(self, values: np.ndarray) -> tuple[np.ndarray, Bootstrap]:
        """Equal weights of the documents, and what resamples them."""
        documents, evaluation = values.shape[1], self.preset.evaluation
        return np.ones(documents), Bootstrap(documents, evaluation.bootstrap_samples, evaluation.seed)

    def difference(self, first: str, second: str, measure: str = "exact") -> Interval:
        """First minus second arm past the old window, paired by document and seed."""
        at = self.past
        return self.contrast(self.scores(first, at, measure, second) - self.scores(second, at, measure, first))

    def in_words(self, first: str, second: str, measure: str) -> str:
        """`difference` of shares for a reader, or that both arms are at the floor: no score of either is above 0."""
        both = self.scores(first, self.past, measure, second), self.scores(second, self.past, measure, first)
        if not any(scores.any() for scores in both):
            return "both at the floor"
        return measured(*self.difference(first, second, measure), digits=1)

    def far_nll(self, first: str, second: str) -> Interval:
        """First minus second arm's nats per token in the far half."""
        far = (self.preset.evaluation.tokens // 2, self.preset.evaluation.tokens)
        return self.contrast(self.nll(first, *far) - self.nll(second, *far))

    def ended(self, arm: str) -> float:
        """Of the answers whose words are right, the percentage that end there, past the old window."""
        return 100 * float(self.scores(arm, self.past).mean() / self.scores(arm, self.past, "words").mean())

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


def ablation_table(results: InstructionResults) -> pd.DataFrame:
    """Exact answers of each arm past the old window, at its first and last length, labels, and answers that end."""
    table = results.table()
    shown = table.length.isin([results.past[0], results.past[-1]])
    table = table[~table.arm.isin(RECORD_ONLY) & shown].reset_index(drop=True)
    table["exact"] = [measured(*row[3:], digits=0, sign=False) for row in table.itertuples()]
    table["length"] = [f"{length:,}" for length in table.length]
    wide = table.pivot_table("exact", "arm", "length", aggfunc="first", sort=False).reset_index()
    wide["labels"] = [round(results.runs[results.runs.arm == arm].labels.mean()) for arm in wide.arm]
    wide["ends"] = [round(results.ended(arm)) for arm in wide.arm]
    return wide.assign(arm=[LOOKS[arm][0] for arm in wide.arm])


def difference_table(results: InstructionResults) -> pd.DataFrame:
    """Those of TABLE that were measured, past the old window: text for a reader."""
    pairs = {name: pair for name, pair in results.pairs.items() if name in TABLE}
    rows = [[name, *(results.in_words(*pair, measure) for measure in MEASURES)] for name, pair in pairs.items()]
    return pd.DataFrame(rows, columns=["difference", *MEASURES])


def written_pairs() -> Record | None:
    """The record of what a chat model asked about documents."""
    return recorded(WRITER, "09_self_instruct")


def outcomes(pairs: pd.DataFrame) -> pd.DataFrame:
    """What became of the pairs: for each outcome the pairs by kind of answer, and the mean share of words found."""
    named = pairs.assign(outcome=pairs.dropped.replace("", "kept"))
    table = named.pivot_table("place", "outcome", "kind", aggfunc="count", fill_value=0)[["short", "normal"]]
    table["words found"] = named[named.answer != ""].groupby("outcome").found.mean()
    table = table.assign(kept=table.index != "kept").sort_values(["kept", "short"], ascending=[True, False])
    return table.drop(columns="kept").reset_index()


def some_pairs(pairs: pd.DataFrame, count: int) -> pd.DataFrame:
    """Pairs drawn at random, kept and dropped: document, question, answer, outcome."""
    drawn = pairs[pairs.question != ""].sample(count, random_state=0)
    drawn = drawn.assign(outcome=drawn.dropped.replace("", "kept")).sort_values(
        "outcome", key=lambda one: one != "kept"
    )
    return drawn[["document", "question", "answer", "outcome"]]


def draw_scores(results: InstructionResults, folder: Path, slug: str, number: str) -> None:
    """Exact answers and right words by length, a line with intervals for each arm of `DRAWN`, named at its end."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=True)
    said, tables = [], [results.table(measure) for measure in MEASURES]
    for axes, title, table in zip(panels, MEASURES.values(), tables, strict=True):
        for place, (arm, rows) in enumerate(table[table.arm.isin(DRAWN)].groupby("arm", sort=False)):
            _, colour, marker, _ = LOOKS[arm]
            bars = [rows.value - rows.low, rows.high - rows.value]
            form = {"marker": marker, "color": colour, "capsize": 2}
            axes.errorbar(rows.length * 1.03 ** (place - 1.5), rows.value, yerr=bars, **form)
        token_axis(axes, results.lengths, "document, question and answer (tokens)")
        axes.set_title(title)
        last = table[table.arm.isin(DRAWN) & (table.length == results.lengths[-1])]
        said.append(f"{title}: " + "; ".join(f"{LOOKS[row.arm][0]} {row.value:.0f}" for row in last.itertuples()))
    ends = tables[0][tables[0].arm.isin(DRAWN) & (tables[0].length == results.lengths[-1])].sort_values("value")
    height = -math.inf
    for row in ends.itertuples():  # names of lines that end close to each other are pushed apart
        label, colour, *_ = LOOKS[row.arm]
        height = max(row.value, height + 10)
        place = {"xytext": (16, 0), "textcoords": "offset points", "va": "center", "color": colour}
        panels[0].annotate(textwrap.fill(label, 16), (row.length, height), fontsize=10, **place)
    panels[0].set(ylabel="answers (%)", ylim=(-1, None))
    exact, words = (results.difference(*PAIRS[LOSS], measure) for measure in MEASURES)
    message = "Exact answers and right words by length."
    if exact[2] < 0 and words[1] <= 0 <= words[2]:
        message = "The loss on the prompt takes exact answers away; for right words no difference was detected."
    caption = f"""**{message}** Blue against green: the same data with and without that loss. Many blue answers begin
right and do not stop. Other arms are in the table above.

*Answers to quotations from held-out documents, {results.record.origin}; 95% over documents and seeds.*"""
    alt = f"Falling with length in all arms. At {results.lengths[-1]:,} tokens, in percent. {'. '.join(said)}."
    save_figure(figure, folder, slug, number, caption, alt)


def draw_beside_paper(results: InstructionResults, published: dict, folder: Path, slug: str, number: str) -> None:
    """Differences between arms in exact answers, and below each the same difference in the tasks of Table 9."""
    names = (LOSS, LONG, PLAIN, TEXT, OLD)
    figure, axes = plt.subplots(figsize=(9, 4.4))
    said, risen = [], {}
    for place, name in enumerate(names):
        value, low, high = results.difference(*PAIRS[name])
        theirs = [np.array(published["rows"][LOOKS[one][-1]]) for one in PAIRS[name]]
        risen[name] = theirs[0] - theirs[1]
        axes.hlines(place - 0.14, low, high, color=BLACK, linewidth=2)
        axes.scatter(value, place - 0.14, s=44, color=BLACK, zorder=3, label="ours, exact answers" * (not place))
        marks = {"facecolors": "none", "edgecolors": PINK, "linewidths": 1.5}
        axes.scatter(risen[name], [place + 0.16] * 5, s=38, label="the paper's five tasks" * (not place), **marks)
        least, most = risen[name].min(), risen[name].max()
        said.append(f"{name}: ours {value:+.1f}, the paper's {least:+.1f} to {most:+.1f}")
    axes.axvline(0, color="0.35", linewidth=1)
    labels = [name.replace(" minus ", "\nminus ") for name in names]
    axes.set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.5, -0.5))
    axes.set(xlabel="difference (points)")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2)
    message = "Differences in exact answers, and in the paper's tasks."
    if results.difference(*PAIRS[LOSS])[2] < 0 < min(risen[LOSS]):
        message = "The loss on the prompt lifts all five tasks of the paper, and takes our exact answers away."
    caption = f"""**{message}** The paper's tasks have different metrics and no intervals, so each is a mark.

*Ours: past the old window, {results.record.origin}; 95%, the wider over documents and seeds or over seeds. The paper's:
Table 9 of Llama 2 Long.*"""
    save_figure(figure, folder, slug, number, caption, f"In points. {'; '.join(said)}.")


def draw_dilution(results: InstructionResults, folder: Path, slug: str, number: str) -> None:
    """The loss on the prompt taken apart: one step at a time, in exact answers."""
    names = {"both: loss on the prompt\nminus none": LOSS, "add the loss,\nanswers at full weight": FULL}
    names |= {"add the loss,\nanswers diluted": DILUTED, "dilute answers,\nwithout the loss": DILUTION}
    names |= {"dilute answers,\nbeside the loss": BESIDE}
    found = [(name, *results.difference(*PAIRS[pair])) for name, pair in names.items()]
    table = pd.DataFrame(found, columns=["row", "value", "low", "high"])
    figure, axes = plt.subplots(figsize=(9, 3.8))
    kind = "exact answers"
    intervals(axes, table.assign(kind=kind), row="row", colour="kind", zero=0, styles=two_styles([kind]))
    axes.get_legend().remove()
    axes.axhline(0.5, color="0.7", linewidth=0.8)
    for place, row in table.iterrows():
        axes.annotate(
            f"{row.value:+.0f}", (row.value, place), (0, 7), textcoords="offset points", ha="center", fontsize=10
        )
    axes.set(xlabel="change of exact answers (points)")
    ends = table.set_index("row").high
    message, below = "The loss on the prompt taken apart.", ""
    if max(ends.iloc[[3, 4]]) < 0 <= ends.iloc[1]:
        own = "was shown to cost them only where they are diluted" if ends.iloc[2] < 0 else "was not shown to"
        message = f"Diluting the answers costs exact answers. The loss itself {own}."
        below = " At full weight no cost was shown."
    first, second = (results.scores(arm, results.past) for arm in PAIRS[DILUTED])
    third, fourth = (results.scores(arm, results.past) for arm in PAIRS[FULL])
    _, low, high = results.contrast(first - second - third + fourth)
    if below and low <= 0 <= high:
        below += " Nor was it shown that the loss costs more where answers are diluted."
    caption = f"""**{message}** First row: both at once. The others change one at a time, as in the table of
losses.{below}

*Past the old window, {results.record.origin}; 95%, the wider over documents and seeds or over seeds.*"""
    said = "; ".join(f"{row.row} {row.value:+.1f}".replace("\n", " ") for row in table.itertuples())
    save_figure(figure, folder, slug, number, caption, f"Exact answers in points: {said}.")


def two_styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """How marks of up to two kinds look in `intervals`, in colours of no arm that is drawn by length."""
    looks = zip(names, (BLACK, PINK), "os", strict=False)
    return {name: {"label": name, "color": colour, "marker": marker} for name, colour, marker in looks}


def draw_costs(results: InstructionResults, folder: Path, slug: str, number: str) -> None:
    """NLL of held-out documents minus that before tuning, inside the old window and far out; the cheapest first."""
    window, reach = results.preset.base.window, results.preset.evaluation.tokens
    places = {"inside the old window": (window // 2, window), "far half": (reach // 2, reach)}
    marks = zip(places, (GREY, BLUE), "os", strict=True)  # as everywhere
    looks = {place: {"label": place, "color": colour, "marker": marker} for place, colour, marker in marks}
    rows = []
    for arm in (arm for arm in results.arms if arm not in ("untuned", "chat base", *RECORD_ONLY)):
        for place, (low, high) in places.items():
            cost = results.nll(arm, low, high) - results.nll("untuned", low, high)
            rows.append((LOOKS[arm][0], place, *results.contrast(cost)))
    table = pd.DataFrame(rows, columns=["row", "place", "value", "low", "high"])
    figure, axes = plt.subplots(figsize=(9, 4.3))
    cheapest = table[table.place == "far half"].sort_values("value").row
    intervals(axes, table, row="row", colour="place", zero=0, styles=looks, names=cheapest)
    axes.legend(loc="upper right")
    axes.set(xlabel="NLL minus that before tuning (nats per token)")
    message = "NLL of held-out documents minus that before tuning."
    if results.far_nll(*PAIRS[LOSS])[2] < 0:
        message = "With the loss on the prompt a model forgets less of reading than with a loss on answers alone."
    caption = f"""**{message}**

*Held-out documents, {results.record.origin}; 95%, the wider over documents and seeds or over seeds. 4 times: one
seed, over documents.*"""
    far = table[table.place == "far half"].sort_values("value")
    least, most = (f"{row} ({value:+.2f} nat)" for row, value in far[["row", "value"]].iloc[[0, -1]].to_numpy())
    save_figure(figure, folder, slug, number, caption, f"In the far half it changes least in {least}, most in {most}.")
