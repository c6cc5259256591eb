import numpy as np
import pandas as pd
import pytest

from experiments import pretraining, pretraining_cells, pretraining_sparse
from experiments.pretraining_cells import AS_SPARSE, LONG, SHORT_AS_SPARSE, SHORT_SPARSE, SPARSE, Size
from experiments.pretraining_results import NAMES, PretrainingResults, pretraining_results
from experiments.pretraining_sparse import LARGER, SHORT, equal_seconds, run_sparse, short_results
from llama_long_utils.evaluation.statistics import Bootstrap


def test_all_cells_are_measured_and_joined_and_a_second_call_trains_nothing(tmp_path, monkeypatch):
    for name in ("doll", "doll-x0.7", "doll-x1.4"):
        monkeypatch.setitem(pretraining_cells.SIZES, name, Size(64, 2, 2, 7e-3, steps=4))
    monkeypatch.setattr(pretraining_cells, "RUNS", tmp_path)
    monkeypatch.setattr(pretraining_sparse, "LARGER", "doll")
    monkeypatch.setattr(pretraining_sparse, "SEEDS", (0,))
    monkeypatch.setattr(pretraining, "STRETCHES", 1)
    tokenizer, training, held_out = pretraining.texts()
    monkeypatch.setattr(pretraining, "texts", lambda: (tokenizer, training, held_out[:1]))
    record = run_sparse(tmp_path / "joined")
    results = pretraining_results(record)
    assert list(results.cells["size"]) == ["doll"] * 3 + ["doll-x0.7"] * 2
    cells = results.cells[:3].set_index("arm")
    assert set(cells.index) == {SPARSE, AS_SPARSE, "long"}
    assert cells.tokens[SPARSE] == cells.tokens["long"] == 4 * LONG > cells.tokens[AS_SPARSE]
    assert cells.flops_counted[AS_SPARSE] == pytest.approx(cells.flops_counted[SPARSE], rel=0.1)  # whole steps
    own = results.record.table("as_trained")
    assert set(zip(own["size"], own.seed, strict=True)) == {("doll", 0), ("doll-x0.7", 0)}
    short = pretraining_results(run_sparse(tmp_path / "joined", SHORT))
    cells = short.cells[:3].set_index("arm")
    assert set(cells.index) == {SHORT_SPARSE, SHORT_AS_SPARSE, "short"}
    assert set(cells.long_steps) == {0}
    assert cells.tokens[SHORT_SPARSE] == cells.tokens["short"] == 4 * LONG > cells.tokens[SHORT_AS_SPARSE]
    assert cells.flops_counted[SHORT_AS_SPARSE] == pytest.approx(cells.flops_counted[SHORT_SPARSE], rel=0.1)
    assert cells.flops[SHORT_SPARSE] < cells.flops["short"] < results.cells.flops[0]
    assert not short.record.table("as_trained").nats.equals(own.nats)
    monkeypatch.setattr(pretraining, "train", None)
    run_sparse(tmp_path / "joined")
    run_sparse(tmp_path / "joined", SHORT)


def test_at_equal_seconds_full_attention_is_read_between_its_two_lengths():
    """NLL falls by 0.1 nat with each doubling of steps: 100 steps to 400, S2 takes half of the seconds of 400."""
    arms = {"long": (400, 4.0, 4.8), AS_SPARSE: (100, 1.0, 5.0), SPARSE: (400, 2.0, 4.85)}
    rows = [(LARGER, arm, seed) for arm in arms for seed in range(3)]
    cells = pd.DataFrame(rows, columns=NAMES)
    cells["long_steps"], cells["seconds"] = (
        cells.arm.map({arm: row[at] for arm, row in arms.items()}) for at in (0, 1)
    )
    nats = 100 * np.repeat(cells.arm.map({arm: row[2] for arm, row in arms.items()}).to_numpy(), 12)
    arrays = {"nats": nats.reshape(9, 1, 12, 1), "tokens": np.full((12, 1), 100)}
    arrays |= {"edges": np.array([1, 4096]), "ways": np.array(["full"])}
    steps, found = equal_seconds(PretrainingResults(cells, arrays, Bootstrap(12, 500, 0)))
    assert steps == pytest.approx(200)
    assert found["each"] == pytest.approx([4.9 - 4.85] * 3)


def test_on_512_tokens_each_arm_is_judged_at_the_rate_that_trains_better(monkeypatch):
    """Full attention trains better at the lower rate, S2 at the higher one; fewer steps go with full attention."""
    cells = pd.DataFrame([(size, arm, 0) for arm in SHORT.arms for size in (LARGER, f"{LARGER}-x0.7")], columns=NAMES)
    final = {("short", LARGER): 5.0, ("short-s2", f"{LARGER}-x0.7"): 5.0, ("short-as-s2", f"{LARGER}-x0.7"): np.nan}
    loss = np.array([[9.0] * 10 + [final.get((arm, size), 4.0)] * 40 for size, arm, _ in cells.to_numpy()])
    every = PretrainingResults(cells, {"loss": loss}, Bootstrap(12, 500, 0))
    monkeypatch.setattr(pretraining_sparse, "pretraining_results", lambda path: every)
    results, factors = short_results()
    assert factors == {"short": 0.7, "short-s2": 1, "short-as-s2": 0.7}
    assert list(results.cells.index) == [0, 3, 5]
    assert set(results.cells["size"]) == {LARGER}
