import json
import subprocess
import sys

import torch

from experiments import gpu_budget
from experiments.gpu_budget import OTHERS, OURS, SLUG, TASKS, measured, run
from llama_long_utils.paths import REPOSITORY, RESULTS
from llama_long_utils.records import read_record


def test_the_whole_command_runs_at_doll_size_on_a_cpu_and_continues_where_it_was_stopped(tmp_path):
    assert run("cpu", seconds=1e-9, out=tmp_path, doll=True) is None
    assert {row["skipped"] for row in measured(tmp_path)} == {"no time is left"}

    record = run("cpu", seconds=600, out=tmp_path, doll=True)
    tables = read_record(record)["tables"]
    committed = read_record(RESULTS / "gpu" / f"{SLUG}.json")["tables"]
    assert {name: set(rows[0]) for name, rows in tables.items() if name in committed} == {
        name: set(rows[0]) for name, rows in committed.items()
    }
    assert len(tables["steps"]) == len(TASKS) - 3
    assert {row["contender"] for row in tables["steps"]} == {OURS, *OTHERS}
    assert [row["step"] for row in tables["training"]] == [1, 2]
    assert {row["weights"] for row in tables["training"]} == {"random"}
    values = {(row["check"], row["quantity"]): row["value"] for row in tables["checks"]}
    assert 0.09 < values["nf4", "relative error"] < 0.1
    assert values["nf4", "tensors elsewhere"] == 0
    assert values["gradients", "float32, savings"] < 1e-5
    assert values["gradients", "float32, savings, again"] < 1e-5
    assert all(values["optimizers", f"{name}, moved"] == 1 for name in ("adamw_torch_fused", "paged_adamw_8bit"))

    path, before = tmp_path / "measurements.jsonl", len(measured(tmp_path))
    path.write_text(path.read_text()[:-40])  # killed while it wrote the last task's
    assert len(measured(tmp_path)) == before - 2
    assert run("cpu", seconds=600, out=tmp_path, doll=True) == record
    assert [row["task"] for row in measured(tmp_path)[before - 2 :]] == [repr(TASKS[-1])] * 2
    assert len(read_record(record)["tables"]["training"]) == 2


def test_a_step_that_cannot_end_in_time_is_not_started():
    budget = gpu_budget.Budget(gpu_budget.Machine("cpu"), doll=True)
    budget.rate = 1.0  # operations per second
    (row,) = budget.rows(TASKS[2], left=100)
    assert row["skipped"].endswith("100 s are left")
    assert budget.built[1] is None


def test_what_does_not_fit_is_a_row_with_its_error(monkeypatch):
    budget = gpu_budget.Budget(gpu_budget.Machine("cpu"), doll=True)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(budget, "step", full)
    (row,) = budget.rows(TASKS[2], left=100)
    assert row["error"] == "OutOfMemoryError: CUDA out of memory"
    assert not gpu_budget.tables([{"kind": "step", **json.loads(json.dumps(row))}])


def test_without_a_gpu_it_ends_before_torch_is_imported(tmp_path):
    code = f"""
import sys
from pathlib import Path
import experiments.__main__ as main
main.GPUS, sys.argv[1:] = [Path({str(tmp_path)!r}, "none")], ["gpu"]
try:
    main.arguments()
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 2)
    assert "there is no GPU here: --device cpu --doll rehearses the command without one" in done.stderr
