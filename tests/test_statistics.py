"""Intervals hold what they say, and paired comparisons agree with their tests."""

import tracemalloc

import numpy as np
import pytest

from experiments.dose_record import KindBootstrap
from llama_long_utils.evaluation.statistics import (
    SAMPLES,
    SEED,
    Bootstrap,
    mean_interval,
    paired_accuracy,
    paired_mean,
    share_interval,
)


def test_paired_accuracy_is_mcnemar_s_exact_test():
    # 21 children before and after, 7 changed one way, 1 the other (Fagerland et al., 2014, doi:10.1002/sim.6148).
    before = np.array([1.0] * 1 + [1] * 1 + [0] * 7 + [0] * 12)
    after = np.array([1.0] * 1 + [0] * 1 + [1] * 7 + [0] * 12)
    found = paired_accuracy(before, after)
    assert found.p == pytest.approx(2 * (1 + 8) / 2**8)
    assert (found.discordant, found.difference) == (8, pytest.approx(6 / 21))
    # Clopper-Pearson: 7 of 8 is [0.4735, 0.9968], 8 of 21 is [0.1811, 0.6156].
    assert (found.low, found.high) == pytest.approx(((2 * 0.4735 - 1) * 0.6156, (2 * 0.9968 - 1) * 0.6156), abs=1e-4)


@pytest.mark.parametrize(("gains", "losses", "items"), [(0.05, 0.05, 100), (0.1, 0.02, 100), (0.01, 0.01, 50)])
def test_paired_interval_covers_the_truth_at_least_as_often_as_it_says(gains, losses, items):
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        kind = generator.choice(3, items, p=[gains, losses, 1 - gains - losses])
        found = paired_accuracy((kind == 1).astype(float), (kind == 0).astype(float))
        covered += found.low <= gains - losses <= found.high
    assert covered >= 0.95 * 300


@pytest.mark.parametrize(("gained", "lost"), [(6, 0), (5, 0), (12, 3), (10, 3), (2, 2)])
def test_interval_and_test_never_contradict_each_other(gained, lost):
    before = np.array([0.0] * gained + [1.0] * lost + [1.0] * 40)
    after = np.array([1.0] * gained + [0.0] * lost + [1.0] * 40)
    found = paired_accuracy(before, after)
    assert (found.low > 0) == (found.p < 0.05)
    swapped = paired_accuracy(after, before)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_equal_answers_leave_room_for_what_was_not_seen():
    found = paired_accuracy(np.ones(100), np.ones(100))
    assert (found.p, found.difference) == (1, 0)
    assert found.high == -found.low == pytest.approx(1 - 0.025 ** (1 / 100))


def test_paired_mean_has_the_interval_of_the_differences():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 10, 400)  # shared by both models, so it must not widen the interval
    change = generator.normal(0.5, 1, 400)
    found = paired_mean(hard, hard + change)
    half = 1.96 * change.std() / 20
    assert (found.low, found.high) == pytest.approx((change.mean() - half, change.mean() + half), abs=0.02)
    with pytest.raises(ValueError, match="paired scores need the same items: 3 before, 2 after"):
        paired_mean(np.zeros(3), np.zeros(2))


def test_seven_items_have_no_interval_and_eight_have_one():
    for values in (np.arange(7.0) % 2, np.arange(8.0) % 2):
        pair = (values, 1 - values)
        bounds = [mean_interval(values), share_interval(int(values.sum()), len(values))]
        bounds += [(found.low, found.high) for found in (paired_mean(*pair), paired_accuracy(*pair))]
        assert np.isnan(bounds).all() == (len(values) == 7)
        assert np.isfinite(bounds).all() == (len(values) == 8)


def test_a_column_that_few_units_have_is_left_without_bounds():
    counts = np.array([[1.0, 1.0]] * 7 + [[1.0, 0.0]])
    low, high = Bootstrap(8, 200, 0).interval(counts * np.arange(8.0)[:, None], counts)
    assert low[0] < 3.5 < high[0]
    assert np.isnan([low[1], high[1]]).all()


def test_kinds_are_drawn_before_the_units_within_them():
    kinds = ["speech"] * 6 + ["play"] * 3
    weights = KindBootstrap(9, 4000, 0, kinds).weights()
    speeches, plays = weights[:, :6].sum(axis=1), weights[:, 6:].sum(axis=1)
    assert set(zip(speeches, plays, strict=True)) == {(12, 0), (6, 3), (0, 6)}
    assert (speeches == 0).mean() == pytest.approx(0.25, abs=0.03)
    with pytest.raises(ValueError, match="2 kinds for 9 units"):
        KindBootstrap(9, 10, 0, ["a", "b"]).weights()


def test_what_differs_by_kind_is_less_certain_than_its_documents_look():
    generator = np.random.default_rng(0)
    kinds = np.repeat(["a", "b", "c"], 10)
    values = np.repeat([-1.0, 0.0, 1.0], 10) + generator.normal(0, 0.1, 30)
    ones = np.ones((30, 1))
    width = {}
    for name, bootstrap in {"documents": Bootstrap(30, 2000, 0), "kinds": KindBootstrap(30, 2000, 0, kinds)}.items():
        low, high = bootstrap.interval(values[:, None], ones)
        width[name] = float(high[0] - low[0])
    assert width["kinds"] > 2 * width["documents"]


def test_samples_of_a_mean_are_drawn_in_parts_to_the_same_bounds_and_in_less_memory():
    values = np.random.default_rng(0).normal(size=2000)
    tracemalloc.start()
    found = mean_interval(values)
    part = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    together = Bootstrap(len(values), SAMPLES, SEED).interval(values[:, None], np.ones((len(values), 1)))
    assert found == tuple(float(bound[0]) for bound in together)
    assert part < 8 * SAMPLES * len(values) / 4
