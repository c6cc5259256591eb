"""Intervals and paired comparisons."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True)
class Bootstrap:
    """Resampled documents, the same for every arm, so that differences are paired."""

    documents: int
    samples: int
    seed: int

    def weights(self) -> np.ndarray:
        """How often each sample draws each document: shape (samples, documents)."""
        generator = np.random.default_rng(self.seed)
        return generator.multinomial(self.documents, np.full(self.documents, 1 / self.documents), size=self.samples)

    def interval(self, nats: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """95% percentile interval of sum(nats) / sum(tokens) over documents, per bucket."""
        weights = self.weights()
        with np.errstate(invalid="ignore"):  # a sample may miss every document of a bucket: 0 / 0
            means = (weights @ nats) / (weights @ tokens)
        low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
        return low, high


SAMPLES = 2000  # bootstrap
SEED = 0


@dataclass(frozen=True)
class Paired:
    """After minus before with its 95% interval; `discordant` items changed sides, `p` is McNemar's (NaN for means)."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    discordant: float = math.nan
    p: float = math.nan


def paired_accuracy(before: np.ndarray, after: np.ndarray) -> Paired:
    """Compare right (1) and wrong (0) answers to the same items.

    Only items that changed sides (discordant ones) tell the models apart. If nothing changed, each of them turned right
    with probability 1/2: McNemar's exact test. The interval takes the extremes of two exact ones (Clopper-Pearson), for
    the share of items that changed sides and for the share of those that turned right. So it is wider than need be, and
    leaves out 0 exactly when p < 0.05.
    """
    _same_items(before, after)
    items = len(before)
    gained = int(((before == 0) & (after == 1)).sum())
    lost = int(((before == 1) & (after == 0)).sum())
    discordant = gained + lost
    changed = binomtest(discordant, items).proportion_ci(0.95, method="exact")
    low, high, p = -1.0, 1.0, 1.0  # of right minus wrong among the items that changed sides
    if discordant:
        test = binomtest(gained, discordant)
        low, high = (2 * bound - 1 for bound in test.proportion_ci(0.95, method="exact"))
        p = float(test.pvalue)
    low *= changed.low if low > 0 else changed.high
    high *= changed.high if high > 0 else changed.low
    return Paired(before.mean(), after.mean(), (gained - lost) / items, low, high, discordant, p)


def paired_mean(before: np.ndarray, after: np.ndarray) -> Paired:
    """Compare any score on the same items: a 95% percentile bootstrap over items of the mean difference."""
    _same_items(before, after)
    change = after - before
    low, high = _bootstrap(change)
    return Paired(before.mean(), after.mean(), change.mean(), low, high)


def _same_items(before: np.ndarray, after: np.ndarray) -> None:
    if before.shape != after.shape or not len(before):
        raise ValueError(f"paired scores need the same items: {len(before)} before, {len(after)} after")


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    low, high = Bootstrap(len(values), SAMPLES, SEED).interval(values[:, None], np.ones((len(values), 1)))
    return float(low[0]), float(high[0])
