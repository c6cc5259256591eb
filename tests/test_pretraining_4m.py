from dataclasses import replace

import numpy as np
import pytest

from experiments.pretraining_4m import SIZE, judged_4m
from experiments.pretraining_cells import PILOTED, SIZES
from experiments.pretraining_gpu_results import HOLDS, OPEN, REFUTED, gpu_results
from experiments.pretraining_results import larger_results


def changed(switch: float, sparse: float, saved: float):
    """The record of 16M as one of 4M: nats that the switch and S2 lose, and that context saves more than at 0.9M."""
    results = gpu_results()
    cells, arrays = results.cells.assign(size=SIZE), dict(results.arrays)
    rows = {arm: np.flatnonzero(cells.arm == arm) for arm in ("long", "switch-80", "s2", "short")}
    cells.loc[rows["short"], "arm"] = "long-as-s2"
    nats, loss = arrays["nats"].copy(), arrays["loss"].copy()
    spread = np.array([-0.001, 0.0, 0.001])
    for arm, lost in {"switch-80": switch, "s2": sparse, "short": 0.0}.items():
        nats[rows[arm]] = nats[rows["long"]] + lost * arrays["tokens"]
        loss[rows[arm]] = loss[rows["long"]] + lost + spread[:, None]
    arrays |= {"nats": nats, "loss": loss}
    table = larger_results().record.table("context_saved")
    table = table[table.model == "0.9M"].assign(model=SIZE)
    table["nats"] += saved * table.tokens

    class Table:
        def table(self, _name: str):
            return table

    return replace(results, cells=cells, arrays=arrays, record=Table())


@pytest.mark.parametrize(
    ("lost", "judged"), [(0.1, [HOLDS] * 5), (-0.1, [REFUTED] * 5), (0.0, [REFUTED, OPEN, OPEN, REFUTED, OPEN])]
)
def test_each_expectation_of_4m_can_hold_and_can_be_refuted(lost, judged):
    assert list(judged_4m(changed(lost, lost, lost), larger_results()).judged) == judged


def test_what_too_few_seeds_say_is_open():
    results = changed(0.1, 0.1, 0.1)
    fewer = replace(results, cells=results.cells[(results.cells.arm == "long") | (results.cells.seed < 2)])
    table = judged_4m(fewer, larger_results())
    assert [judged.startswith(OPEN) for judged in table.judged] == [True, True, False, True, True]
    none = replace(results, cells=results.cells[results.cells.arm == "long"])
    assert list(judged_4m(none, larger_results()).found[[0, 3]]) == ["no such arm"] * 2


def test_pilots_have_the_rates_of_the_arms_that_they_choose_for():
    for size, (_, steps) in PILOTED.items():
        names = [name for name in SIZES if name.startswith(f"{size}-pilot")]
        for name in names:
            assert SIZES[name] == replace(SIZES[name.replace("-pilot", "")], steps=steps)
        assert len(names) == 3
