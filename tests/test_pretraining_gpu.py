import json
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments import pretraining, pretraining_cells, pretraining_context, pretraining_gpu
from experiments import pretraining_gpu_results as judging
from experiments import pretraining_results as pretraining_results_module
from experiments.attention import s2_attention
from experiments.pretraining_cells import AS_SPARSE, LONG, SPARSE_SHARE, Cell
from experiments.pretraining_figures import savings
from experiments.pretraining_gpu import PILOTS, chosen_rates, join, run_seed, set_steps
from experiments.pretraining_gpu_results import HOLDS, NOT_ASKED, OPEN, OTHER_WAY, REFUTED
from experiments.pretraining_results import larger_results, pretraining_results
from llama_long_utils.records import Record, write_record


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The doll with one sequence a step, few steps and two held-out documents; records in a folder of the test."""
    for name in [name for name in pretraining_cells.SIZES if name.startswith("16M-doll")]:
        size = replace(pretraining_cells.SIZES[name], sequences=1, steps=3)
        monkeypatch.setitem(pretraining_cells.SIZES, name, size)
    monkeypatch.setattr(pretraining_cells, "RUNS", tmp_path)
    tokenizer, training, held_out = pretraining.texts()
    for module in (pretraining, pretraining_context):
        monkeypatch.setattr(module, "texts", lambda: (tokenizer, training, held_out[:2]))
    return tmp_path


def test_sparse_attention_costs_what_a_sequence_of_that_length_does():
    """With equal scores a token's output is the mean of the values it sees: as many entries as keys."""
    length = 64
    zeros = torch.zeros(1, 2, length, length)
    values = torch.eye(length).expand(1, 2, -1, -1)
    module = nn.Module()
    module.num_key_value_groups = 1
    output, _ = s2_attention(module, zeros, zeros, values, None, scaling=1.0)
    pairs = int((output > 0).sum()) / 2  # a head
    assert (2 * pairs - length) * LONG == pytest.approx(length**2 * SPARSE_SHARE * LONG)


def test_full_attention_on_fewer_steps_multiplies_as_much_as_sparse_attention():
    set_steps("16M-doll", 400)
    try:
        fewer = pretraining.own_settings(Cell("16M-doll", AS_SPARSE, 0))
    finally:
        set_steps("16M-doll", 5)
    model = pretraining.new_model("16M-doll", 10_000.0, 0)
    sparse, full = (pretraining.counted_flops(model, length) for length in (SPARSE_SHARE * LONG, LONG))
    assert fewer.steps * full == pytest.approx(400 * sparse, rel=0.005)
    assert fewer.warmup_steps == fewer.steps // 20


def test_each_of_long_and_short_gets_the_rate_with_its_own_lowest_loss():
    loss = {("long", 0.5): 4.1, ("long", 1): 4.0, ("long", 2): math.nan, ("short", 0.5): 4.3, ("short", 1): 4.2}
    loss["short", 2] = 3.9
    rows = [{"arm": arm, "factor": factor, "loss": loss[arm, factor], "seconds": 0.1} for arm, factor in PILOTS]
    choice = chosen_rates(pd.DataFrame(rows))
    assert (choice["long"], choice["short"]) == (1, 2)
    assert chosen_rates(pd.DataFrame(columns=["arm", "factor", "loss", "seconds"]))["long"] == 1


def test_a_seed_is_measured_with_its_pilots_and_joined_and_a_second_call_changes_nothing(small, monkeypatch, capsys):
    monkeypatch.setattr(pretraining_gpu, "PILOTS", [("long", 1), ("long", 2), ("short", 1)])
    monkeypatch.setattr(pretraining_gpu, "ARMS", ("long", "switch-80", "s2", AS_SPARSE))
    monkeypatch.setattr(pretraining_gpu, "TIMED", 3)
    monkeypatch.setattr(pretraining_results_module, "LAW_SAMPLES", 20)
    pretraining_gpu.measure_speed("16M-doll")
    paths = run_seed("16M-doll", 0, 1000.0, steps=3)
    assert len(paths) == 4
    assert not list(small.glob("long/*")) and not list(small.glob("trials/*"))  # no weights are left
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*") if path.is_file()}
    assert run_seed("16M-doll", 0, 1000.0, steps=3) == paths
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*") if path.is_file()} == before
    results = pretraining_results(join("16M-doll", small, small / "joined", "1234567"))
    assert results.record.content["provenance"]["commit"].startswith("1234567, named by hand")
    cells = results.cells.set_index("arm")
    assert set(cells["size"]) == {"16M-doll"}
    assert list(cells.long_steps[["long", "switch-80", "s2", AS_SPARSE]]) == [3, 1, 3, 1]
    rates = cells.learning_rate / pretraining_cells.SIZES["16M-doll"].learning_rate
    assert rates["switch-80"] == 1 and rates["s2"] == rates["long"] in (1, 2)
    assert cells.flops_counted["s2"] < cells.flops_counted["long"] / 2 < cells.flops_counted["switch-80"]
    tables = {name: results.record.table(name) for name in ("pilots", "speed", "as_trained", "context_saved")}
    assert set(tables["speed"].arm) == {"long", "s2", "long, eager"}
    own, full = tables["as_trained"], results.arrays["nats"][list(results.cells.arm).index("s2"), 0]
    assert own.nats.to_numpy() == pytest.approx(full.sum(axis=1), rel=3e-2) and set(own["size"]) == {"16M-doll"}
    assert set(tables["context_saved"].model) == {"16M-doll"}
    assert results.record.table("choice").steps[0] == 3
    sparse = list(small.glob("cells/*s2-0-*"))
    for path in sparse:
        path.rename(small / path.name)
    (small / "speed" / "16M-doll.json").rename(small / "speed.json")
    first = join("16M-doll", small, small / "joined")
    assert not {"speed", "as_trained"} & set(pretraining_results(first).record.content["tables"])
    for path in sparse:
        (small / path.name).rename(path)
    (small / "speed.json").rename(small / "speed" / "16M-doll.json")
    added = pretraining_results(join("16M-doll", small, small / "joined", add=True))
    assert added.record.content["tables"] == results.record.content["tables"]
    for name, array in results.arrays.items():
        np.testing.assert_array_equal(added.arrays[name], array)  # NaN behind the end of a loss, too
    with pytest.raises(ValueError, match="holds no cell of 16M-doll that the record lacks"):
        join("16M-doll", small, small / "joined", add=True)
    run_seed("16M-doll", 1, 0.5, steps=3)
    assert "long is left out" in capsys.readouterr().out and not list(small.glob("cells/*-1-*"))


@pytest.fixture
def pilots_only(small, monkeypatch):
    """Seeds whose pilots are all that is done, each within a moment; what was run, in order. A second is 1,000 here."""
    ran = []

    def pilot(size, arm, factor):
        ran.append((arm, factor))
        time.sleep(0.3)
        row = {"arm": arm, "factor": factor, "loss": 5.0 - factor, "seconds": 0.1}
        return pretraining_gpu.recorded(pretraining_gpu.pilot_record(size, arm, factor), "pilots", [row], 9, 1.0)

    class Clock:
        monotonic_ns = time.monotonic_ns

        def monotonic(self):
            return 1000 * time.monotonic()

        def sleep(self, seconds):
            time.sleep(seconds / 1000)

    monkeypatch.setattr(pretraining_gpu, "ARMS", ())
    monkeypatch.setattr(pretraining_gpu, "run_pilot", pilot)
    monkeypatch.setattr(pretraining_gpu, "time", Clock())
    return ran


def choice(small):
    return json.loads((small / "choice-16M-doll.json").read_text())


def test_processes_wait_for_each_other_s_pilots_as_long_as_somebody_is_at_them(small, pilots_only, monkeypatch):
    monkeypatch.setattr(pretraining_gpu, "PILOTS", [("long", 1), ("long", 2)])
    both = [threading.Thread(target=run_seed, args=("16M-doll", seed, 1e6), kwargs={"steps": 3}) for seed in (0, 1)]
    both[0].start()
    time.sleep(0.15)  # so that the second is ready, and waits, before the first is
    pilots_only.append("the second begins")
    both[1].start()
    for thread in both:
        thread.join()
    assert pilots_only == [("long", 1), "the second begins", ("long", 2)]
    assert choice(small)["long"] == 2
    assert run_seed("16M-doll", 2, 1e6) == [] and len(pilots_only) == 3


def test_a_pilot_whose_process_was_stopped_is_run_by_the_next(small, pilots_only, monkeypatch):
    run_pilot = pretraining_gpu.run_pilot

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining_gpu, "run_pilot", stop)
    with pytest.raises(KeyboardInterrupt):
        run_seed("16M-doll", 0, 1e6, steps=3)
    monkeypatch.setattr(pretraining_gpu, "run_pilot", run_pilot)
    run_seed("16M-doll", 0, 1e6, steps=3)
    assert pilots_only == PILOTS and choice(small)["long"] == 2


def test_without_all_pilots_nothing_is_chosen(small, pilots_only):
    with pytest.raises(RuntimeError, match="not all 6 pilots of 16M-doll are finished after 200 s"):
        run_seed("16M-doll", 0, 200.0, steps=3)
    assert pilots_only == PILOTS[:1] and not (small / "choice-16M-doll.json").exists()


def test_a_size_for_a_cpu_takes_the_time_that_it_takes_and_one_for_a_gpu_is_refused_without(small):
    assert [pretraining_gpu.checked_seconds("4M", given, gpu=False) for given in (None, 9.0)] == [math.inf, 9.0]
    assert pretraining_gpu.checked_seconds("16M", None, gpu=True) == 250
    with pytest.raises(ValueError, match=r"--size 16M is trained on a GPU, .* use --size 4M"):
        pretraining_gpu.checked_seconds("16M", None, gpu=False)
    assert pretraining_gpu.most_steps("4M", math.inf, 0.5) == 400


def test_the_most_steps_that_fit_are_taken(small):
    rows = pd.DataFrame([{"arm": "long", "milliseconds": 30.0}])
    path = pretraining_gpu.speed_record("16M-doll")
    about = {"preset": "tiny", "question": "?", "seeds": {"training": 9}, "seconds": 1.0}
    write_record(path.parent, path.stem, tables={"speed": rows}, **about)
    assert Record(path).table("speed").milliseconds[0] == 30
    steps = [pretraining_gpu.most_steps("16M-doll", seconds, 1.0) for seconds in (80, 200, 10_000)]
    assert steps == [200, 400, 800]
    own = pretraining_cells.SIZES["16M-doll"].steps
    assert pretraining_gpu.most_steps("16M-doll", math.inf, 1.0) == own


def test_what_a_switch_saves_is_reported_once_for_each_size():
    assert list(savings().model) == ["0.4M", "0.9M", "4M", "16M"]


def test_another_size_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown size '7B': use one of"):
        pretraining_gpu.checked_size("7B")


def test_the_record_of_16m_follows_from_what_is_in_it():
    results = judging.gpu_results()
    tables = {name: results.record.table(name) for name in ("pilots", "choice", "contexts", "context_saved")}
    chosen = chosen_rates(tables["pilots"])
    assert {name: tables["choice"].iloc[0][name] for name in chosen} == pytest.approx(chosen)
    saved = tables["contexts"].pivot_table("nats", ["seed", "document"], "context")
    recorded = tables["context_saved"].set_index(["seed", "document"]).nats
    assert (saved.iloc[:, 0] - saved.iloc[:, -1]).sub(recorded).abs().max() < 1e-3
    own = results.record.table("as_trained")
    means = own.groupby("seed").nats.sum() / own.groupby("seed").tokens.sum()
    long = [results.mean_nll(row) for row in results.cells.index[results.cells.arm == "long"]]
    assert judging.as_trained(results)["each"] == pytest.approx(list(means - long), abs=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "switch", "worse"),
    [(0.1, 0.2, REFUTED, HOLDS), (-0.1, 0.1, HOLDS, OPEN), (-0.2, -0.1, OTHER_WAY, REFUTED)],
)
def test_an_expectation_is_judged_by_its_interval(low, high, switch, worse):
    found = {"low": low, "high": high}
    assert (judging.judge_no_difference(found), judging.worse_if_above(found)) == (switch, worse)


def test_what_was_expected_of_a_worse_switch_is_asked_only_if_it_is_worse():
    """The recorded switch is better; one that loses as much as that at 0.9M refutes what was expected of it."""
    results, wide = judging.gpu_results(), larger_results()
    assert list(judging.judged_expectations(results, wide).judged[:3]) == [OTHER_WAY, NOT_ASKED, NOT_ASKED]
    rows = {arm: np.flatnonzero(results.cells.arm == arm) for arm in ("long", "switch-80")}
    nats = results.arrays["nats"].copy()
    nats[rows["switch-80"]] = nats[rows["long"]] + 0.3 * results.arrays["tokens"]
    worse = judging.judged_expectations(replace(results, arrays={**results.arrays, "nats": nats}), wide)
    assert list(worse.judged[:3]) == [REFUTED, REFUTED, OPEN]
    assert worse.found[2] == "no such arm"
