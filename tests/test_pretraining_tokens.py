import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from experiments import pretraining, pretraining_cells, pretraining_context, pretraining_tokens
from experiments.pretraining_cells import LONG, MORE_TOKENS, MoreTokens
from experiments.pretraining_gpu_results import HOLDS, OPEN, REFUTED
from experiments.pretraining_results import NAMES, PretrainingResults, pretraining_results
from experiments.pretraining_tokens import SLUG, judged_tokens, run_tokens, tokens_cells
from llama_long_utils.evaluation.statistics import Bootstrap

SEEDS, DOCUMENTS = range(3), list("abcdefghijkl")


def test_the_cells_that_decide_come_first_and_have_the_rows_of_16m():
    cells = tokens_cells()
    assert {(cell.size, cell.arm, cell.seed) for cell in cells[:9]} == {
        (MORE_TOKENS, arm, seed) for arm in ("long", "switch-80", "short") for seed in SEEDS
    }
    ours, theirs = (pretraining_cells.long_settings(size, 0) for size in (MORE_TOKENS, "16M"))
    for name in ("window", "reach", "steps", "sequences_per_step", "seed", "warmup_steps", "self_quoting_share"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.learning_rate == pretraining_cells.long_settings("0.9M", 0).learning_rate
    assert ours.checkpoint_every < ours.steps == theirs.checkpoint_every  # a CPU is longer at it, and may be stopped


def test_cells_are_measured_and_joined_with_their_contexts_and_a_second_call_trains_nothing(tmp_path, monkeypatch):
    for name in ("doll", "doll-x2", "doll-x0.5"):
        monkeypatch.setitem(pretraining_cells.SIZES, name, MoreTokens(64, 2, 2, 7e-3, steps=5, sequences=2))
    monkeypatch.setattr(pretraining_cells, "RUNS", tmp_path)
    monkeypatch.setattr(pretraining_tokens, "MORE_TOKENS", "doll")
    monkeypatch.setattr(pretraining_tokens, "TRIED", {"long": {1: (0,)}, "switch-80": {2: (0,)}})
    tokenizer, training, held_out = pretraining.texts()
    for module in (pretraining, pretraining_context):
        monkeypatch.setattr(module, "STRETCHES", 1)
        monkeypatch.setattr(module, "texts", lambda: (tokenizer, training, held_out[:1]))
    results = pretraining_results(run_tokens(tmp_path / "joined"))
    cells = results.cells.set_index(["size", "arm"])
    assert set(cells.index) == {("doll", "long"), ("doll-x2", "switch-80")}
    assert set(cells.tokens) == {5 * 2 * LONG}
    assert list(cells.short_steps) == [0, 4]
    assert results.record
    assert set(results.record.table("context_saved").model) == {"doll"}
    monkeypatch.setattr(pretraining, "train", None)
    monkeypatch.setattr(pretraining_context, "measure", None)
    run_tokens(tmp_path / "joined", finished=True)


def test_a_record_keeps_its_cells_and_gets_finished_ones_with_their_contexts(tmp_path, monkeypatch):
    monkeypatch.setitem(pretraining_cells.SIZES, "doll", MoreTokens(64, 2, 2, 7e-3, steps=2, sequences=1))
    monkeypatch.setattr(pretraining_cells, "RUNS", tmp_path)
    monkeypatch.setattr(pretraining_tokens, "MORE_TOKENS", "doll")
    tokenizer, training, held_out = pretraining.texts()
    for module in (pretraining, pretraining_context):
        monkeypatch.setattr(module, "STRETCHES", 1)
        monkeypatch.setattr(module, "texts", lambda: (tokenizer, training, held_out[:1]))
    for folder, seeds, add in (("whole", (0, 1), False), ("added", (0,), False), ("added", (0, 1), True)):
        monkeypatch.setattr(pretraining_tokens, "TRIED", {"long": {1: seeds}})
        run_tokens(tmp_path / folder, finished=add, add=add)
    whole, added = (pretraining_results(tmp_path / name / f"{SLUG}.json") for name in ("whole", "added"))
    for name in whole.record.content["tables"]:
        pd.testing.assert_frame_equal(added.record.table(name), whole.record.table(name))
    assert added.record.content["provenance"]["seeds"]["training"] == [0, 1]
    assert all(np.array_equal(added.arrays[name], array) for name, array in whole.arrays.items())


@pytest.mark.parametrize("asked", ["finished", "add"])
def test_where_no_cell_is_measured_joining_says_how_to_get_one(tmp_path, monkeypatch, asked):
    monkeypatch.setattr(pretraining_cells, "RUNS", tmp_path)
    with pytest.raises(ValueError, match="no cell is measured yet: leave out --finished and --add, or measure one wit"):
        run_tokens(tmp_path, **{asked: True})
    assert not [*tmp_path.iterdir()]


def made(size, switch, saved, spread=0.0):
    """A size whose switch reads `switch` nat worse than long throughout, and whose context saves `saved` nat."""
    cells = pd.DataFrame([(size, arm, seed) for arm in ("long", "switch-80") for seed in SEEDS], columns=NAMES)
    per_token = np.where(cells.arm == "long", 5.0, 5.0 + switch + spread * (cells.seed - 1))
    arrays = {"nats": np.broadcast_to(100 * per_token[:, None, None, None], (6, 1, 12, 1))}
    arrays |= {"tokens": np.full((12, 1), 100), "edges": np.array([1, 4096]), "ways": np.array(["full"])}
    arrays |= {"documents": np.array(DOCUMENTS), "loss": np.tile(per_token[:, None], (1, 50))}
    rows = [(size, name, 100, 100 * saved, seed) for seed in SEEDS for name in DOCUMENTS]
    saved_table = pd.DataFrame(rows, columns=["model", "document", "tokens", "nats", "seed"])
    record = SimpleNamespace(table={"context_saved": saved_table}.get)
    return PretrainingResults(cells, arrays, Bootstrap(12, 200, 0), record)


@pytest.mark.parametrize(
    ("switch", "judged"),
    [
        (0.02, [HOLDS, REFUTED, HOLDS]),
        (0.20, [REFUTED, REFUTED, HOLDS]),  # a fall, but not by half
        (0.50, [REFUTED, REFUTED, HOLDS]),
        (-0.1, [HOLDS, HOLDS, REFUTED]),
    ],
)
def test_each_expectation_of_the_switch_can_be_refuted(switch, judged):
    wide, large = made("0.9M", 0.3, 0.1), made("16M", -0.1, 0.2)
    table = judged_tokens(made(MORE_TOKENS, switch, 0.15), wide, large)
    assert list(table.judged) == [*judged, HOLDS, HOLDS]


def test_what_seeds_leave_open_is_called_open():
    wide, large = made("0.9M", 0.3, 0.2), made("16M", -0.1, 0.1)
    table = judged_tokens(made(MORE_TOKENS, 0.1, 0.15, spread=0.3), wide, large)
    assert list(table.judged) == [OPEN, HOLDS, HOLDS, REFUTED, REFUTED]


def test_two_seeds_judge_nothing():
    results = made(MORE_TOKENS, -0.1, 0.15)
    few = dataclasses.replace(results, cells=results.cells[results.cells.seed < 2])
    table = judged_tokens(few, made("0.9M", 0.3, 0.1), made("16M", -0.1, 0.2))
    assert set(table.judged) == {"2 seeds: too few to judge"}
