"""Reading the race: differences between its arms, and which distances a way of training shows."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.signal import correlate

from experiments.attention import S2_GROUPS
from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.evaluation.statistics import FEWEST, Bootstrap
from llama_long_utils.notebooks import measured, show_table
from llama_long_utils.paths import RESULTS
from llama_long_utils.records import Record, read_arrays, read_table
from llama_long_utils.settings import Preset, TrainingSettings


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
    """Show a table of the race in two, NLL and ROUGE-L, with a line for each value of `rows` and a column a measure."""
    for kind, digits in (("NLL", 3), ("ROUGE", 0)):
        part = table[table.measure.str.startswith(kind)]
        numbers = part[["value", "low", "high"]].itertuples(index=False, name=None)
        part = part.assign(text=[measured(*row, digits=digits, sign=sign) for row in numbers])
        show_table(part.pivot_table("text", rows, "measure", aggfunc="first", sort=False).reset_index())


def _attention_groups(settings: TrainingSettings) -> Iterator[tuple[slice, float]]:
    window = settings.window
    if settings.attention == "sdpa":
        yield slice(0, window), 1.0
        return
    group = window // S2_GROUPS
    for start in range(0, window, group):
        yield slice(start, start + group), 0.5
    for start in range(-group // 2, window, group):
        yield slice(max(start, 0), min(start + group, window)), 0.5


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

    def measures(self, method: str, training: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By name, "NLL near" (the last bucket inside the old window), "NLL far" (the last), "ROUGE-L 256", ..."""
        inside = [edge for edge in self.edges if edge <= self.window]
        places = {"NLL near": inside[-2:], "NLL far": self.edges[-2:]}
        found = {name: self.nll(method, training, *place) for name, place in places.items()}
        return found | {f"ROUGE-L {length:,}": self.rouge_l(method, training, length) for length in self.lengths}

    def table(self, *, method: str = "", training: str = "") -> pd.DataFrame:
        """Scores of every arm, as means over seeds and documents with 95% intervals that resample both.

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
        """Weighted mean of values (seeds, documents), and its bounds: NaN of fewer documents than `FEWEST`."""
        seeds, documents = values.shape
        mean = float(values.mean(axis=0).sum() / weights.sum())
        if documents < FEWEST:
            return {"value": mean, "low": math.nan, "high": math.nan}
        of_documents = dataclasses.replace(self.bootstrap, units=documents).weights()
        generator = np.random.default_rng(self.bootstrap.seed)
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(of_documents)) / seeds
        means = np.einsum("bs,sd,bd->b", of_seeds, values, of_documents) / (of_documents @ weights)
        low, high = np.percentile(means, [2.5, 97.5])
        return {"value": mean, "low": float(low), "high": float(high)}

    def _rows(self, method: str, training: str) -> np.ndarray:
        return np.flatnonzero((self.arms.method == method) & (self.arms.training == training))


def race_results(preset: Preset, path: Path | None = None) -> RaceResults:
    """The race of a preset from its record 11_ablations: `path`, or the committed one.

    Raises:
        ValueError: it was not run, or its arrays are missing.
    """
    path = path or RESULTS / preset.name / "11_ablations.json"
    nll = read_table(path, "nll_by_position")
    edges = sorted({*nll.position_low, *nll.position_high})
    arrays = read_arrays(path.with_suffix(".npz"))
    bootstrap = Bootstrap(len(arrays["documents"]), preset.evaluation.bootstrap_samples, preset.evaluation.seed)
    return RaceResults(read_table(path, "cost"), edges, arrays, bootstrap, preset.base.window)
