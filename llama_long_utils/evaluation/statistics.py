"""Intervals and paired comparisons: the one home of bootstraps.

An interval is the 95% percentile interval of a bootstrap that resamples what is independent. Of fewer than `FEWEST`
items there is none, and its bounds are NaN: five numbers are to be shown, not summed up.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

FEWEST = 8  # items or documents that an interval needs
SAMPLES = 2000  # of a bootstrap over items
SEED = 0


@dataclass(frozen=True)
class Bootstrap:
    """Resampled units (documents or items), the same for every arm, so that differences are paired."""

    units: int
    samples: int
    seed: int

    def weights(self) -> np.ndarray:
        """How often each sample draws each unit: int of shape (samples, units)."""
        shares = np.full(self.units, 1 / self.units)
        return np.random.default_rng(self.seed).multinomial(self.units, shares, size=self.samples)

    def interval(self, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of sum(sums) / sum(counts) over units, each of shape (columns,); NaN of fewer units than `FEWEST`.

        Both have shape (units, columns), for example nats and tokens; counts are 0 where a unit has nothing.
        """
        weights = self.weights()
        with np.errstate(invalid="ignore"):  # a sample may miss every unit of a column: 0 / 0
            means = (weights @ sums) / (weights @ counts)
        bounds = np.full((2, means.shape[1]), math.nan)
        enough = (counts > 0).sum(axis=0) >= FEWEST
        bounds[:, enough] = np.nanpercentile(means[:, enough], [2.5, 97.5], axis=0)
        return bounds[0], bounds[1]


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Bounds of the mean of independent values; NaN if there are fewer than `FEWEST`."""
    items, generator = len(values), np.random.default_rng(SEED)
    if items < FEWEST:
        return math.nan, math.nan
    shares = np.full(items, 1 / items)  # drawn a tenth at a time: all at once take 16 KB for each item
    drawn = (generator.multinomial(items, shares, size=SAMPLES // 10) @ values[:, None] for _ in range(10))
    return tuple(np.nanpercentile(np.concatenate([*drawn]) / items, [2.5, 97.5]).tolist())


def share_interval(right: int, items: int) -> tuple[float, float]:
    """Exact bounds (Clopper-Pearson) of a share; NaN if there are fewer items than `FEWEST`."""
    if items < FEWEST:
        return math.nan, math.nan
    bounds = binomtest(right, items).proportion_ci(0.95, method="exact")
    return float(bounds.low), float(bounds.high)


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
    if items < FEWEST:
        low = high = math.nan
    return Paired(before.mean(), after.mean(), (gained - lost) / items, low, high, discordant, p)


def paired_mean(before: np.ndarray, after: np.ndarray) -> Paired:
    """Compare any score on the same items: a bootstrap over items of the mean difference."""
    _same_items(before, after)
    change = after - before
    return Paired(before.mean(), after.mean(), change.mean(), *mean_interval(change))


def _same_items(before: np.ndarray, after: np.ndarray) -> None:
    if before.shape != after.shape or not len(before):
        raise ValueError(f"paired scores need the same items: {len(before)} before, {len(after)} after")
