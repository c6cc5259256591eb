"""Reading the race: differences between its arms, and which distances a way of training shows."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats
from scipy.signal import correlate

from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.evaluation.statistics import FEWEST, Bootstrap
from llama_long_utils.figures import AMBER, BLUE, RED, TEAL, intervals, look, mark_window, plt, save_figure, token_axis
from llama_long_utils.notebooks import measured, show_table
from llama_long_utils.paths import RESULTS
from llama_long_utils.records import Record, read_arrays
from llama_long_utils.settings import Preset, TrainingSettings

ZERO_SHOT, FULL_LENGTH = "zero-shot", "full-length"


def distances_seen(sequences: Sequence[TrainingSequence], settings: TrainingSettings) -> np.ndarray:
    """How often a training run shows each distance between a query and a key that it attends to.

    Returns:
        Shape (reach,): entry D is the number of such pairs D tokens apart, over all sequences, as a mean over
        heads (half of the heads of shifted sparse attention see other groups).
    """
    counts = np.zeros(settings.reach)
    for sequence in sequences:
        for part, weight in _attention_groups(settings):
            there = np.zeros(settings.reach)
            there[sequence.position_ids[part]] = 1.0
            counts += weight * correlate(there, there)[settings.reach - 1 :]
    return counts.round(6)


def by_distance(counts: np.ndarray, points: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Distances, evenly spread on a logarithmic axis, and the mean count near each; without those that never occur."""
    edges = np.unique(np.geomspace(1, len(counts), points + 1).round().astype(int))
    means = np.add.reduceat(counts, edges[:-1]) / np.diff(edges)
    return np.sqrt(edges[:-1] * edges[1:])[means > 0], means[means > 0]


def live_against_record(live: Record, record: Record) -> tuple[float, float]:
    """How far an arm measured now is from its row in the race's record: nats past the old window's middle, ROUGE-L.

    NaN if it is not part of the race.
    """
    names = ["method", "training", "seed"]
    sums = live.table("nll").groupby([*names, "position_low"])[["nats", "tokens"]].sum()
    nll, rouge_l = sums.nats / sums.tokens, live.table("retrieval").groupby([*names, "length"]).rouge_l.mean()
    nats = nll - record.table("nll_by_position").set_index([*names, "position_low"]).value
    points = rouge_l - record.table("first_sentence_retrieval").set_index([*names, "length"]).value
    return float(nats.groupby(names).tail(3).abs().max()), float(points.abs().max())


def show_by_measure(table: pd.DataFrame, rows: str, *, sign: bool = True) -> None:
    """Show a table of the race with a line for each value of `rows` and a column for each measure."""
    numbers = table[["value", "low", "high", "measure"]].itertuples(index=False, name=None)
    described = [measured(*row, digits=3 if name.startswith("NLL") else 0, sign=sign) for *row, name in numbers]
    wide = table.assign(text=described).pivot_table("text", rows, "measure", aggfunc="first", sort=False)
    show_table(wide.reset_index())


def _attention_groups(settings: TrainingSettings) -> Iterator[tuple[slice, float]]:
    from experiments.attention import S2_GROUPS  # with transformers, which is slow to import

    window = settings.window
    if settings.attention == "sdpa":
        yield slice(0, window), 1.0
        return
    group = window // S2_GROUPS
    for start in range(0, window, group):
        yield slice(start, start + group), 0.5
    for start in range(-group // 2, window, group):
        yield slice(max(start, 0), min(start + group, window)), 0.5


def mean_over_seeds(values: np.ndarray, weights: np.ndarray, bootstrap: Bootstrap) -> dict[str, float]:
    """Weighted mean of values (seeds, documents), and bounds that resample both: NaN of documents below `FEWEST`."""
    seeds, documents = values.shape
    mean = float(values.mean(axis=0).sum() / weights.sum())
    if documents < FEWEST:
        return {"value": mean, "low": math.nan, "high": math.nan}
    of_seeds, of_documents = resampled(seeds, documents, bootstrap)
    means = np.einsum("bs,sd,bd->b", of_seeds, values, of_documents) / (of_documents @ weights)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": mean, "low": float(low), "high": float(high)}


def student_reach(each: np.ndarray) -> float:
    """Half of Student's 95% interval of the mean of two or more seeds' values."""
    return float(stats.t.ppf(0.975, len(each) - 1) * stats.sem(each))


def wider(low: float, high: float, each: pd.Series) -> tuple[float, float]:
    """The outer bounds of an interval over questions and of Student's over the seeds' means, if there are several."""
    if len(each) == 1:
        return low, high
    reach = student_reach(each.to_numpy())
    return min(low, each.mean() - reach), max(high, each.mean() + reach)


def wider_interval(change: np.ndarray, weights: np.ndarray, bootstrap: Bootstrap) -> dict[str, float]:
    """Weighted mean of `change` (seeds, documents), value, with the outer bounds of two 95% intervals, low and high.

    One resamples seeds and documents. Of three seeds that is too narrow, so the other is Student's t of the seeds'
    means: it knows no more than that there are three.
    """
    found, each = mean_over_seeds(change, weights, bootstrap), change.sum(axis=1) / weights.sum()
    if len(each) > 1:
        half = student_reach(each)
        found["low"] = min(found["low"], found["value"] - half)
        found["high"] = max(found["high"], found["value"] + half)
    return found


def resampled(seeds: int, documents: int, bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample of the bootstrap, the share of every seed and how often it draws every document."""
    of_documents = dataclasses.replace(bootstrap, units=documents).weights()
    generator = np.random.default_rng(bootstrap.seed)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(of_documents)) / seeds
    return of_seeds, of_documents


@dataclass(frozen=True)
class RaceResults:
    """The race as recorded: `arms` has a row for each arm, in the order of the arrays' first axis.

    Attributes:
        edges: of the position buckets.
        window: the old one.
    """

    arms: pd.DataFrame
    edges: list[int]
    arrays: dict[str, np.ndarray]
    bootstrap: Bootstrap
    window: int

    def nll(self, method: str, training: str, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Nats of shape (seeds, documents) and tokens of shape (documents,) at positions [low, high)."""
        buckets = slice(self.edges.index(low), self.edges.index(high))
        rows = self._rows(method, training)
        return self.arrays["nats"][rows, :, buckets].sum(axis=2), self.arrays["tokens"][:, buckets].sum(axis=1)

    def rouge_l(self, method: str, training: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """ROUGE-L of shape (seeds, documents) and ones of shape (documents,) at a length."""
        scores = self.arrays[f"rouge_l_{length}"][self._rows(method, training)]
        return scores, np.ones(scores.shape[1])

    @property
    def lengths(self) -> list[int]:
        """Lengths at which first sentences were asked for."""
        return sorted(int(name.removeprefix("rouge_l_")) for name in self.arrays if name.startswith("rouge_l_"))

    def chance(self, length: int) -> float:
        """ROUGE-L of what the first arm wrote at a length against the other documents' sentences."""
        from llama_long_utils.evaluation.retrieval import rouge_l  # with transformers, which is slow to import

        answer, written = (self.arrays[f"{name}_{length}"] for name in ("answer", "written"))
        return np.mean([rouge_l(right, text) for n, text in enumerate(written[0]) for right in np.delete(answer, n)])

    def floors(self, quoting: Record | None) -> pd.DataFrame:
        """What an arm scores that copies nothing, by measure ("ROUGE-L 256", ...): columns value, low, high.

        Args:
            quoting: record 11_quoting_share, whose arm without self-quoting sequences is the floor. Its text is of the
                right document, so it shares more words with the answer than `chance` says. Without it: `chance`.
        """
        names = [f"ROUGE-L {length:,}" for length in self.lengths]
        if quoting and len(copies_nothing := quoting.table("scores").query("share == 0").set_index("measure")):
            return copies_nothing.loc[names, ["value", "low", "high"]]
        chances = [self.chance(length) for length in self.lengths]
        return pd.DataFrame({name: chances for name in ("value", "low", "high")}, index=names)

    def measures(self, method: str, training: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By name, "NLL near" (the last bucket inside the old window), "NLL far" (the last), "ROUGE-L 256", ..."""
        inside = [edge for edge in self.edges if edge <= self.window]
        places = {"NLL near": inside[-2:], "NLL far": self.edges[-2:]}
        found = {name: self.nll(method, training, *place) for name, place in places.items()}
        return found | {f"ROUGE-L {length:,}": self.rouge_l(method, training, length) for length in self.lengths}

    def table(self, *, method: str = "", training: str = "") -> pd.DataFrame:
        """Scores of every arm, as means over seeds and documents with the bounds of `wider_interval`.

        Args:
            method, training: if given, scores are differences to the arm that has this method or training and is else
                the same, paired by document and seed.

        Returns:
            Columns method, training, measure, value, low, high.
        """
        pairs = list(self.arms[["method", "training"]].drop_duplicates().itertuples(index=False, name=None))
        rows = []
        for pair in pairs:
            other = (method or pair[0], training or pair[1])
            if (method or training) and (other == pair or other not in pairs):
                continue
            beside = self.measures(*other)
            for name, (values, weights) in self.measures(*pair).items():
                minus = beside[name][0] if method or training else 0.0
                row = {"method": pair[0], "training": pair[1], "measure": name}
                rows.append({**row, **self.mean(values - minus, weights)})
        return pd.DataFrame(rows, columns=["method", "training", "measure", "value", "low", "high"])

    def mean(self, values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """`wider_interval` by this race's bootstrap. Of one seed the bounds know nothing of seeds."""
        return wider_interval(values, weights, self.bootstrap)

    def _rows(self, method: str, training: str) -> np.ndarray:
        return np.flatnonzero((self.arms.method == method) & (self.arms.training == training))


def race_results(preset: Preset, path: Path | None = None) -> RaceResults:
    """The race of a preset from its record 11_ablations: `path`, or the committed one.

    Raises:
        ValueError: it was not run, or its arrays are missing.
    """
    path = path or RESULTS / preset.name / "11_ablations.json"
    nll = Record(path).table("nll_by_position")
    edges = sorted({*nll.position_low, *nll.position_high})
    arrays = read_arrays(path.with_suffix(".npz"))
    bootstrap = Bootstrap(len(arrays["documents"]), preset.evaluation.bootstrap_samples, preset.evaluation.seed)
    return RaceResults(Record(path).table("cost"), edges, arrays, bootstrap, preset.base.window)


TRAININGS = {
    "full-length": ("full length", BLUE),
    "short": ("short", RED),
    "pose": ("PoSE", TEAL),
    "s2": ("S2-Attn", AMBER),
}
STYLES = {
    ZERO_SHOT: {"label": "zero-shot", "color": "0.5", "marker": "o"},
    FULL_LENGTH: {"label": "trained at full length", "color": BLUE, "marker": "s"},
}
OF_THE_PAPER = ("none", "pi", "abf", "xpos_abf")


def draw_nll(to_abf: pd.DataFrame, folder: Path, slug: str, number: str, caption: str) -> None:
    """A panel near and one far: NLL minus ABF's, untrained and trained. What lies beyond the axis is written there."""
    limits, methods = (-0.18, 0.12), list(to_abf.method.drop_duplicates())
    figure, panels = plt.subplots(1, 2, figsize=(10, 1.2 + 0.4 * len(methods)), sharey=True)
    for panel, place in zip(panels, ("NLL near", "NLL far"), strict=True):
        part = to_abf[(to_abf.measure == place) & to_abf.training.isin(STYLES)]
        intervals(panel, part, row="method", colour="training", zero=0, styles=STYLES)
        for row, beyond in part[part.value > limits[1]].groupby("method").value:
            text = " and ".join(f"{value:+.2f}" for value in beyond) + " →"
            panel.text(limits[1], methods.index(row), text, ha="right", va="center", fontsize=9, color="0.25")
        panel.set(xlim=limits, xlabel=f"{place} minus ABF's (nats)")
    panels[0].set_yticks(range(len(methods)), [look(name, "method")["label"] for name in methods])
    panels[1].get_legend().remove()
    shown = to_abf[to_abf.training.isin(STYLES)].groupby("measure").value
    ends = (f"{place} {shown.min()[place]:+.2f} to {shown.max()[place]:+.2f}" for place in ("NLL near", "NLL far"))
    alt = f"A row for each method, minus ABF: {'; '.join(ends)}."
    save_figure(figure, folder, slug, number, f"{nll_in_words(to_abf)}{caption}", alt)


def nll_in_words(to_abf: pd.DataFrame, near: float = 0.05) -> str:
    """How many methods read about as ABF does far out after training, and which read worse: a sentence, or ""."""
    far = to_abf[(to_abf.measure == "NLL far") & (to_abf.training == FULL_LENGTH)]
    level = far.value.abs() < near
    if level.all() or far.value[~level].min() < 0:  # one that reads better is none "above it"
        return ""
    worse = "; ".join(look(name, "method")["label"] for name in far.method[~level])
    said = f"**Trained, far out, {level.sum()} of {len(far)} methods read within {near:g} nat of ABF. The others are "
    return f"{said}{far.value[~level].min():.1f} nat and more above it: {worse}.** "


def retrieving(scores: pd.DataFrame, floors: pd.DataFrame, measure: str) -> list[str]:
    """Methods trained at full length whose whole interval in a measure lies above that of `RaceResults.floors`."""
    trained = scores[(scores.training == FULL_LENGTH) & (scores.measure == measure)]
    return [look(name, "method")["label"] for name in trained.method[trained.low > floors.high[measure]]]


def draw_retrieval(
    results: RaceResults,
    floors: pd.DataFrame,
    published: dict[str, Any],
    folder: Path,
    slug: str,
    number: str,
    caption: str,
) -> None:
    """ROUGE-L by length of the paper's methods: ours, trained if any was, with the floor, and as published (5b)."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    scores = results.table()
    scores = scores[scores.measure.str.startswith("ROUGE")]
    way = FULL_LENGTH if FULL_LENGTH in set(scores.training) else ZERO_SHOT
    for place, name in enumerate(OF_THE_PAPER):
        line = scores[(scores.training == way) & (scores.method == name)]
        beside, form = np.array(results.lengths) * 1.035 ** (place - 1.5), look(name, "method")
        panels[0].vlines(beside, line.low, line.high, color=form["color"], alpha=0.5, linewidth=1.2)
        panels[0].plot(beside, line.value, markersize=4, **form)
        panels[1].plot(published["length"], published["rouge_l"][name], markersize=4, **form)
    draw_floor(panels[0], results.lengths, floors)
    panels[0].set_title(f"ours, {STYLES[way]['label']}")
    panels[1].set_title("Llama 2 7B, as published")
    windows = (results.lengths, results.window), ([4**k for k in range(4, 8)], 4096)
    for panel, (ticks, window) in zip(panels, windows, strict=True):
        token_axis(panel, ticks, "length (tokens)")
        mark_window(panel, window)
    panels[0].set(ylabel="ROUGE-L", ylim=(0, 112), yticks=range(0, 101, 20))  # room for the windows' names
    panels[0].legend(loc="upper right")
    alt = "Two panels of ROUGE-L against length: ours, and the paper's 7B models, which start near 100."
    message = ""
    if way == FULL_LENGTH:
        asked, longest = (retrieving(scores, floors, f"ROUGE-L {length:,}") for length in results.lengths[-2:])
        far, farthest = (f"{length:,} tokens" for length in results.lengths[-2:])
        paper = {look(name, "method")["label"] for name in OF_THE_PAPER}
        others = ", ".join(name for name in asked if name not in paper) or "none"
        asked, longest = ([name for name in found if name in paper] for found in (asked, longest))
        message = f"**Of the paper's four methods, {_these(asked)} above the floor at {far}, {_these(longest)} at "
        message += f"{farthest}.** Above: by the whole interval. Of the methods not drawn, at {far}: {others}. "
    save_figure(figure, folder, slug, number, message + caption, alt)


def _these(names: Sequence[str]) -> str:
    return f"{names[0]} alone is" if len(names) == 1 else f"{' and '.join(names) or 'none'} {'are' if names else 'is'}"


def draw_floor(panel: Axes, lengths: Sequence[int], floors: pd.DataFrame) -> None:
    """What an arm scores that copies nothing, dashed, with its interval."""
    panel.plot(lengths, floors.value, color="0.4", linestyle="--", linewidth=1)
    panel.fill_between(lengths, floors.low, floors.high, color="0.5", alpha=0.2, linewidth=0)


def at_floor(methods: Sequence[str], scores: pd.DataFrame, floors: pd.DataFrame, measure: str) -> list[str]:
    """Those of the methods of which no trained arm's whole interval in a measure lies above that of the floor."""
    above = (scores.measure == measure) & (scores.training != ZERO_SHOT) & (scores.low > floors.high[measure])
    return [method for method in methods if method not in set(scores.method[above])]


def draw_trainings(
    cheaper: pd.DataFrame, left_out: Sequence[str], folder: Path, slug: str, number: str, caption: str
) -> None:
    """NLL and ROUGE-L, a panel each: cheaper ways minus full-length training, two measures side by side in each.

    Methods in `left_out`, `at_floor`, are not drawn, and the caption says so: what copies nothing cannot lose it.
    """
    drawn = cheaper[~cheaper.method.isin(left_out)]
    drawn = drawn.assign(way=[way_label(row.training, row.method) for row in drawn.itertuples()])
    kept = list(drawn.measure.drop_duplicates())
    marks = zip(kept, ("0.5", BLUE, "0.5", BLUE), "osos", strict=True)
    styles = {name: {"label": name, "color": colour, "marker": marker} for name, colour, marker in marks}
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for panel, pair, unit in zip(panels, (kept[:2], kept[2:]), ("NLL", "ROUGE-L"), strict=True):
        intervals(panel, drawn[drawn.measure.isin(pair)], row="way", colour="measure", zero=0, styles=styles)
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        panel.locator_params(axis="x", nbins=5)
        panel.set_xlabel(f"{unit}, minus full length's ({'nats' if unit == 'NLL' else 'points'})")
    alt = "Two panels of dots with intervals, a row per cheaper way of training: NLL and ROUGE-L differences."
    for method in left_out:
        far = cheaper[(cheaper.method == method) & (cheaper.measure == "NLL far")]
        ways = ", ".join(
            f"{way_label(row.training)} {measured(row.value, row.low, row.high, digits=3)}" for row in far.itertuples()
        )
        caption += f" Not drawn: {look(method, 'method')['label']}, at the floor in retrieval; its NLL far: {ways}."
    save_figure(figure, folder, slug, number, f"{trainings_in_words(drawn)} {caption}", alt)


def way_label(training: str, method: str = "abf") -> str:
    """A way of training in words: "PoSE", "PoSE, equal seconds"; of another method than ABF with the method."""
    way, seconds = training.removesuffix("-equal-seconds"), ", equal seconds" * training.endswith("-equal-seconds")
    return f"{look(method, 'method')['label']}: " * (method != "abf") + TRAININGS[way][0] + seconds


def trainings_in_words(drawn: pd.DataFrame) -> str:
    """What `draw_trainings` shows: sentences on the last measure, on leads in it that are larger nearer, and on NLL."""
    *_, nearer, last = drawn.measure.drop_duplicates()
    far, near = (drawn[drawn.measure == measure].set_index("way") for measure in (last, nearer))
    in_seconds = far.index.str.endswith("equal seconds")
    said = f"**At equal tokens {_beside_full_length(far[~in_seconds])}.**"
    if in_seconds.any():
        said += f" At equal seconds {_beside_full_length(far[in_seconds])}."
    said += f" Both in {last}."
    leads = [(way, near.loc[way]) for way in far.index[far.low > 0] if near.value[way] > far.value[way]]
    described = (f"{way} {measured(row.value, row.low, row.high, digits=0)}" for way, row in leads)
    said += f" In {nearer} the lead is larger still: {'; '.join(described)}." * bool(leads)
    nll = drawn[drawn.measure.str.startswith("NLL")]
    return f"{said} Of the {len(nll)} NLL differences {((nll.low > 0) | (nll.high < 0)).sum()} exclude zero."


def _beside_full_length(far: pd.DataFrame) -> str:
    ways = far.index.str.removesuffix(", equal seconds")
    more, less = (list(ways[beyond]) for beyond in (far.low > 0, far.high < 0))
    both = [f"{' and '.join(part)}{{}} {word}" for part, word in ((more, "more"), (less, "less")) if part]
    if not both:
        return "no difference in retrieval to full length is shown"
    verb = " retrieves" if len(more or less) == 1 else " retrieve"
    return ", ".join([f"{both[0].format(verb)} than full length", *(one.format("") for one in both[1:])])


def way_in_words(way: str, measure: str, beside: pd.Series) -> str:
    """A cheaper way's retrieval beside full length's: a line, from the difference's value, low and high."""
    verdict = "more than" if beside.low > 0 else "less than" if beside.high < 0 else "not detectably more or less than"
    described = measured(beside.value, beside.low, beside.high, digits=0)
    return f"{way} retrieves {verdict} full length, {measure}: {described}"


def skips_in_words(results: RaceResults) -> str:
    """What PoSE's skips give ABF beside short training without them, and which share of its score it keeps far out."""
    shortest, *_, asked, longest = results.lengths
    short = results.table(training="short").query("method == 'abf' and training == 'pose'").set_index("measure")
    added = short.loc[["NLL far", f"ROUGE-L {asked:,}"], ["value", "low", "high"]]
    nll, points = (measured(*row, digits=n) for row, n in zip(added.itertuples(index=False), (3, 1), strict=True))
    scores = results.table().query("method == 'abf'").set_index(["training", "measure"]).value
    at = {(way, n): scores[way, f"ROUGE-L {n:,}"] for way in ("pose", FULL_LENGTH) for n in results.lengths}
    kept = {way: at[way, asked] / at[way, shortest] for way in ("pose", FULL_LENGTH)}
    return (
        f"PoSE's skips, against short training without them: {nll} nat far out, {points} points at {asked:,} tokens. "
        f"Of its score at {shortest:,} tokens PoSE keeps {kept['pose']:.0%} there, full length "
        f"{kept[FULL_LENGTH]:.0%}; at {longest:,} tokens the means are {at['pose', longest]:.1f} and "
        f"{at[FULL_LENGTH, longest]:.1f}."
    )
