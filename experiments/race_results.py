"""Reading the race: differences between its arms, and which distances a way of training shows."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.signal import correlate

from experiments.attention import S2_GROUPS
from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.paths import RESULTS
from llama_long_utils.records import read_arrays, read_table
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
    """The race as recorded: `arms` has a row for each arm, in the order of the arrays' first axis."""

    arms: pd.DataFrame
    edges: list[int]
    arrays: dict[str, np.ndarray]
    bootstrap: Bootstrap

    def nll(self, method: str, training: str, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Nats of shape (seeds, documents) and tokens of shape (documents,) at positions [low, high)."""
        buckets = slice(self.edges.index(low), self.edges.index(high))
        rows = self._rows(method, training)
        return self.arrays["nats"][rows, :, buckets].sum(axis=2), self.arrays["tokens"][:, buckets].sum(axis=1)

    def rouge_l(self, method: str, training: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """ROUGE-L of shape (seeds, documents) and ones of shape (documents,) at a length."""
        scores = self.arrays[f"rouge_l_{length}"][self._rows(method, training)]
        return scores, np.ones(scores.shape[1])

    def _rows(self, method: str, training: str) -> np.ndarray:
        chosen = (self.arms.method == method) & (self.arms.training == training)
        if not chosen.any():
            raise ValueError(f"the race has no arm {method!r} with training {training!r}")
        return np.flatnonzero(chosen)

    def mean(self, values: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
        """Token-weighted mean of values (seeds, documents) with its 95% interval over documents and seeds."""
        seeds, documents = values.shape
        of_documents = dataclasses.replace(self.bootstrap, units=documents).weights()
        generator = np.random.default_rng(self.bootstrap.seed)
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(of_documents)) / seeds
        means = np.einsum("bs,sd,bd->b", of_seeds, values, of_documents) / (of_documents @ tokens)
        low, high = np.percentile(means, [2.5, 97.5])
        return {"value": float(values.mean(axis=0).sum() / tokens.sum()), "low": float(low), "high": float(high)}


def race_results(preset: Preset, folder: Path = RESULTS) -> RaceResults:
    """The race of a preset as recorded below `folder`.

    Raises:
        ValueError: it was not run, or its arrays are missing.
    """
    path = folder / preset.name / "11_ablations.json"
    nll = read_table(path, "nll_by_position")
    edges = sorted({*nll.position_low, *nll.position_high})
    arrays = read_arrays(path.with_suffix(".npz"))
    evaluation = preset.evaluation
    bootstrap = Bootstrap(len(arrays["documents"]), evaluation.bootstrap_samples, evaluation.seed)
    return RaceResults(read_table(path, "cost"), edges, arrays, bootstrap)
