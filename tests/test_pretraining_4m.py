from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from experiments.pretraining_4m import (
    SIZE,
    cost_of_an_early_end,
    equal_seconds_4m,
    judged_4m,
    judged_sparse_4m,
    results_of_4m,
)
from experiments.pretraining_cells import PILOTED, SIZES
from experiments.pretraining_gpu_results import HOLDS, OPEN, REFUTED, gpu_results
from experiments.pretraining_results import larger_results
from experiments.pretraining_sparse import equal_seconds


def changed(switch: float, sparse: float, saved: float):
    """The record of 16M as one of 4M: nats that the switch and S2 lose, and that context saves more than at 0.9M."""
    results = gpu_results()
    cells, arrays = results.cells.assign(size=SIZE), dict(results.arrays)
    rows = {arm: np.flatnonzero(cells.arm == arm) for arm in ("long", "switch-80", "s2", "short")}
    cells.loc[rows["short"], ["arm", "long_steps"]] = ["long-as-s2", 180]
    nats, loss = arrays["nats"].copy(), arrays["loss"].copy()
    spread = np.array([-0.001, 0.0, 0.001])
    for arm, lost in {"switch-80": switch, "s2": sparse, "short": 0.0}.items():
        nats[rows[arm]] = nats[rows["long"]] + lost * arrays["tokens"]
        loss[rows[arm]] = loss[rows["long"]] + lost + spread[:, None]
    arrays |= {"nats": nats, "loss": loss}
    table = larger_results().record.table("context_saved")
    table = table[table.model == "0.9M"].assign(model=SIZE)
    table["nats"] += saved * table.tokens
    speed = pd.DataFrame({"arm": ["long", "s2", "long, eager"], "milliseconds": [30.0, 20.0, 34.0]})
    tables = {"context_saved": table, "as_trained": results.record.table("as_trained"), "speed": speed}

    class Tables:
        def table(self, name: str):
            return tables[name]

    return replace(results, cells=cells, arrays=arrays, record=Tables())


@pytest.mark.parametrize(
    ("lost", "judged", "of_sparse"),
    [
        (0.1, [HOLDS] * 3, [HOLDS] * 3),
        (-0.1, [REFUTED] * 3, [REFUTED] * 3),
        (0.0, [REFUTED, OPEN, OPEN], [REFUTED, OPEN, OPEN]),
    ],
)
def test_each_expectation_of_4m_can_hold_and_can_be_refuted(lost, judged, of_sparse):
    results = changed(lost, lost, lost)
    assert list(judged_4m(results, larger_results()).judged) == judged
    assert list(judged_sparse_4m(results).judged[:3]) == of_sparse


def test_at_equal_seconds_full_attention_has_the_mean_of_what_was_timed_before_and_after_s2():
    """32 ms a step, S2 20 ms: of 400 steps 250. Full attention reads alike at both lengths, 0.1 nat below S2."""
    steps, found = equal_seconds_4m(changed(0.0, 0.1, 0.0))
    assert steps == pytest.approx(400 * 20 / 32)
    assert found["each"] == pytest.approx([-0.1] * 3, abs=1e-5)


def test_by_other_clocks_too_full_attention_reads_worse_in_as_many_seconds():
    """Of the record: CPU seconds of the cells, and the fastest steps."""
    results = results_of_4m()
    fastest = results.record.table("speed").groupby("arm").fastest.min()
    clocks = [None, {"long": fastest[["long", "long, eager"]].mean(), "s2": fastest["s2"]}]
    assert all(equal_seconds(results, size=SIZE, step_seconds=clock)[1]["low"] > 0 for clock in clocks)


def test_what_an_early_end_costs_is_read_in_the_last_steps_of_the_shorter_run():
    results = changed(0.0, 0.0, 0.0)
    loss = results.arrays["loss"]
    loss[results.cells.index[results.cells.arm == "long-as-s2"], 160:180] += 0.3
    loss[results.cells.index[results.cells.arm == "long-as-s2"], 180:] = np.nan  # behind its end
    found = cost_of_an_early_end(results)
    assert found["each"] == pytest.approx([0.299, 0.3, 0.301], abs=1e-4)
    assert found["low"] < 0.3 < found["high"]


def test_what_too_few_seeds_say_is_open():
    results = changed(0.1, 0.1, 0.1)
    fewer = replace(results, cells=results.cells[(results.cells.arm == "long") | (results.cells.seed < 2)])
    table = judged_4m(fewer, larger_results())
    assert [judged.startswith(OPEN) for judged in table.judged] == [True, True, False]
    assert all(judged.startswith(OPEN) for judged in judged_sparse_4m(fewer).judged)
    none = replace(results, cells=results.cells[results.cells.arm == "long"])
    assert judged_4m(none, larger_results()).found[0] == "no such arm"
    assert list(judged_sparse_4m(none).found) == ["no such arm"] * 5


def test_pilots_have_the_rates_of_the_arms_that_they_choose_for():
    for size, (_, steps) in PILOTED.items():
        names = [name for name in SIZES if name.startswith(f"{size}-pilot")]
        for name in names:
            assert SIZES[name] == replace(SIZES[name.replace("-pilot", "")], steps=steps)
        assert len(names) == 3
