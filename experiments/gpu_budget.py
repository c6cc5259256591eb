"""Training steps on one GPU against the ledger, the longest context under a cap, and other trainers beside them.

`make gpu` needs CUDA, nothing of the hub, and nine minutes on an H200. Each measurement is a line of
runs/gpu/measurements.jsonl, and in the record beside that file, before the next begins: whenever the command is
stopped, what was measured is there, and the same command continues. What will not end in time is not started.
Weights are random, in NF4: of what is measured here nothing depends on them. At the end SmolLM2 trains for what time
is left. A library that is missing (TRL, datasets) leaves out the rows that need it, and the line says which.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from transformers import LlamaConfig

from experiments.bench import MODULES, PLAIN, run_trainer, run_trl
from experiments.gpu_checks import Machine, Row, kernels, run_checks
from experiments.gpu_training import train_for
from llama_long_utils.model.memory_savings import PINNED, HostBuffers, apply_memory_savings, succeeded
from llama_long_utils.records import write_record
from llama_long_utils.settings import Lora
from llama_long_utils.training import planner
from llama_long_utils.training.planner import Plan
from llama_long_utils.training.random_llama import StepShape, random_llama, training_steps

SLUG = "04_one_gpu_budget"
OURS = "ours"
OTHERS = {"Trainer + PEFT": run_trainer, "TRL SFTTrainer": run_trl}
RANKS = {"Llama 2 7B": 16, "Llama 3.1 8B": 32}
CAP_GIB = 24.0
WARM_UP = 1024  # tokens of a first step, which loads kernels and makes the optimizer's state
START_SECONDS = 5  # of a task: building a model, pinning memory
TRAINING_SECONDS = 30  # that steps leave to the training at the end
SMALLER = 64  # how much shorter contexts are with --doll
SCRATCH = Path("runs") / "gpu" / "trainer"
DOLL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}


@dataclass(frozen=True)
class Task:
    """A measurement.

    Attributes:
        kind: "checks", "attention", "step" or "training".
        context: tokens; 0 for the longest that is predicted to fit.
        plan: "lean" with every saving, "fit" with the fewest that fit in the memory.
        cap_gib: of torch's allocator; None for all of the device.
    """

    kind: str
    model: str = ""
    context: int = 0
    plan: str = "lean"
    cap_gib: float | None = None
    contender: str = OURS


SEVEN, EIGHT = RANKS
TASKS = (  # the long ones last: where time is short, they are left out
    Task("checks"),
    Task("attention"),
    Task("step", SEVEN, 8192),
    Task("step", SEVEN, 32_768),
    *(
        Task("step", SEVEN, context, "its own", contender=other)
        for context in (8192, 16_384, 32_768)
        for other in OTHERS
    ),
    Task("step", SEVEN, 8192, "fit"),
    Task("step", SEVEN, 32_768, "fit"),
    Task("step", SEVEN, 32_768, "fit", CAP_GIB),
    Task("step", EIGHT, 32_768, "fit", CAP_GIB),
    Task("step", EIGHT, 32_768, cap_gib=CAP_GIB),
    Task("step", EIGHT, 0, cap_gib=CAP_GIB),
    Task("step", SEVEN, 131_072),
    Task("step", SEVEN, 65_536),
    Task("step", EIGHT, 78_848, cap_gib=CAP_GIB),
    Task("training"),
)


class Budget:
    """The tasks, one after the other, on one machine; the model of a task stays for the next."""

    def __init__(self, machine: Machine, doll: bool) -> None:
        self.machine, self.doll = machine, doll
        self.built: tuple[str, Any] = ("", None)
        self.rate: float | None = None  # FLOP/s of the last step
        self.peak_rate = machine.product_rate()

    def config(self, model: str) -> tuple[LlamaConfig, Lora]:
        """Its shape and adapters."""
        config = planner.model_shape(model)
        if self.doll:
            heads = {"num_attention_heads": 4, "num_key_value_heads": config.num_key_value_heads // 8}
            config = LlamaConfig(**DOLL, **heads, max_position_embeddings=131_072)
        return config, Lora(RANKS[model], 2 * RANKS[model], MODULES, train_norms=False, train_embeddings=False)

    def plan(self, task: Task) -> tuple[StepShape, Plan]:
        """The step of a task, and what it is predicted to need."""
        config, lora = self.config(task.model)
        gib = task.cap_gib or self.machine.total_gib or CAP_GIB
        shape = StepShape(task.context, "bfloat16", PLAIN, gpu=self.machine.on_gpu)
        if self.doll:
            shape = replace(shape, length=(task.context or 131_072) // SMALLER)
        elif not task.context:
            shape = replace(shape, length=planner.longest_context(config, lora, shape, gib))
        if task.contender in OTHERS:
            savings = replace(PLAIN, recomputed_layers=config.num_hidden_layers)
        elif task.plan == "lean":
            savings = planner.leanest(config, shape.length, PLAIN)
        else:
            savings = planner.plan(config, lora, shape, gib).memory_savings
        shape = replace(shape, memory_savings=savings)
        return shape, planner.predict(config, lora, shape)

    def model(self, task: Task) -> PeftModel:
        """Random weights, from the last task if it had the same."""
        if self.built[0] != task.model:
            self.built = "", None
            self.machine.forget()
            torch.manual_seed(0)
            self.built = task.model, random_llama(*self.config(task.model), "bfloat16", device=self.machine.device)
        return self.built[1]

    def rows(self, task: Task, left: float) -> list[Row]:
        """What a task gives, one row or several; "skipped" or "error" says why there is nothing.

        Args:
            left: seconds that it may take.
        """
        if left <= 0:
            return [{"skipped": "no time is left"}]
        self.machine.cap(task.cap_gib)
        if task.kind == "checks":
            return list(run_checks(self.machine))
        if task.kind == "attention":
            return list(kernels(self.machine))
        if task.kind == "training":
            self.built = "", None
            self.machine.forget()
            return train_for(self.machine, left, SCRATCH, self.config(SEVEN)[0] if self.doll else None)
        shape, plan = self.plan(task)
        row: Row = {"model": task.model, "context": shape.length, "cap_gib": task.cap_gib, "contender": task.contender}
        if task.contender == OURS:  # and what was predicted before attention's workspace was known
            without = planner.predict(*self.config(task.model), replace(shape, gpu=False)).device_gib
            row |= {"plan": str(plan.memory_savings), "predicted_gib": plan.device_gib}
            row |= {"without_workspace_gib": without, "host_gib": plan.host_gib}
        else:
            row |= {"plan": "its own", "predicted_gib": None, "without_workspace_gib": None, "host_gib": None}
        needed = START_SECONDS + plan.flops / self.rate if self.rate else 0
        if needed > left - TRAINING_SECONDS:
            return [{**row, "skipped": f"it needs {needed:.0f} s, and {left:.0f} s are left"}]
        try:
            seconds = self.step(task, shape)
        except (RuntimeError, ImportError) as error:  # out of memory, mostly
            return [{**row, "error": f"{type(error).__name__}: {error}"[:600]}]
        self.rate = plan.flops / seconds
        speed = {"tokens_per_second": shape.length / seconds, "share_of_bf16_peak": self.rate / self.peak_rate}
        return [{**row, **self.machine.peaks(), "seconds": seconds, **speed}]

    def step(self, task: Task, shape: StepShape) -> float:
        """Seconds of a training step behind a shorter one; of another trainer, of its second step."""
        if task.contender in OTHERS:
            return self.other_step(task, shape.length)
        model = self.model(task)
        give_back(PINNED, unlock)
        steps = training_steps(model, shape, [min(WARM_UP, shape.length), shape.length])
        try:
            next(steps)
            self.machine.forget()
            started = time.perf_counter()
            loss = next(steps)
            self.machine.wait()
            seconds = time.perf_counter() - started
        finally:
            steps.close()
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()}")
        return seconds

    def other_step(self, task: Task, length: int) -> float:
        model = plain_base(self.model(task))
        self.built = "", None  # PEFT changes it
        ids = np.random.default_rng(0).integers(2, model.config.vocab_size, (2, length)).astype(np.int32)
        self.machine.forget()
        try:
            found = OTHERS[task.contender](model, ids, "bfloat16", str(SCRATCH), on_gpu=self.machine.on_gpu)
        finally:
            shutil.rmtree(SCRATCH, ignore_errors=True)
        return found["seconds"][-1]


def give_back(buffers: HostBuffers, release: Callable[[torch.Tensor], Any]) -> None:
    """Release the buffers that are free: steps of another length need others."""
    while buffers.free:
        release(buffers.free.pop())


def unlock(buffer: torch.Tensor) -> None:
    """Undo the locking of a buffer of `PINNED`."""
    succeeded(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))


def plain_base(model: PeftModel) -> Any:
    """The base under the adapters as `from_pretrained` leaves it, with bitsandbytes' own class of parameters."""
    apply_memory_savings(model, PLAIN)
    base = model.unload().requires_grad_(False)
    base.config._attn_implementation = "sdpa"
    for module in base.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            module.weight = Params4bit(
                module.weight.data,
                requires_grad=False,
                quant_state=state,
                blocksize=state.blocksize,
                quant_type="nf4",
                bnb_quantized=True,
                module=module,
            )
            module.quant_state = state
    return base


def measured(out: Path) -> list[Row]:
    """Rows that are on disk, a line for each task; one that was cut off is left out."""
    rows, path = [], out / "measurements.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows += json.loads(line)
        except ValueError:
            continue
    return rows


def append(out: Path, rows: list[Row]) -> None:
    """Write a task's rows so that they survive whatever comes next."""
    with (out / "measurements.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps(rows))  # in front: a line that was cut off ends here
        stream.flush()
        os.fsync(stream.fileno())


def tables(rows: list[Row]) -> dict[str, pd.DataFrame]:
    """The record's tables from the rows of all tasks, as far as they got."""
    found = {"checks": [], "attention": [], "steps": [], "training": []}
    for row in rows:
        kind = {"step": "steps"}.get(row["kind"], row["kind"])
        if kind and not {"error", "skipped"} & set(row):
            found[kind].append({name: value for name, value in row.items() if name not in ("task", "kind")})
    # Every saving under a cap: the longest of them that ran.
    lean = [row for row in found["steps"] if row["cap_gib"] and row["contender"] == OURS and row["host_gib"]]
    columns = ("model", "cap_gib", "context", "allocated_gib", "reserved_gib", "tokens_per_second")
    for model in dict.fromkeys(row["model"] for row in lean):
        best = max((row for row in lean if row["model"] == model), key=lambda row: row["context"])
        found.setdefault("longest", []).append({name: best[name] for name in columns})
    return {name: pd.DataFrame(part) for name, part in found.items() if part}


def write(out: Path, seconds: float) -> Path | None:
    """The record of what was measured so far."""
    found = tables(measured(out))
    if not found:
        return None
    return write_record(
        out,
        SLUG,
        preset="gpu",
        question="What fits on one GPU, and how long does it take?",
        tables=found,
        seeds={"weights and tokens": 0},
        seconds=seconds,
        provenance={"command": "make gpu"},
    )


def run(device: str, seconds: float, out: Path, *, doll: bool = False) -> Path | None:
    """Measure what is not measured yet and return the record.

    Args:
        device: "cuda" or "cpu".
        seconds: nothing starts that would end later.
        doll: tiny shapes, a rehearsal.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    done = {row["task"] for row in measured(out) if not {"error", "skipped"} & set(row)}
    budget, record = Budget(Machine(device), doll), None
    for task in (task for task in TASKS if repr(task) not in done):
        about = {"task": repr(task), "kind": task.kind}
        rows = [{**about, **row} for row in budget.rows(task, left=started + seconds - time.monotonic())]
        append(out, rows)
        record = write(out, time.monotonic() - started)
        for row in rows if task.kind != "training" else rows[-1:]:
            print(summary(row), flush=True)
    return record


def summary(row: Row) -> str:
    """A row in a line."""
    outcome = row.get("skipped") or row.get("error")
    if row["kind"] == "step" and "model" in row:
        about = f"{row['model']}, {row['context']:,} tokens, {row['contender']}"
        memory = f"{row['allocated_gib']:.2f} GiB" if row.get("allocated_gib") else "memory unknown"
        predicted = f" (predicted {row['predicted_gib']:.2f})" if row["predicted_gib"] else ""
        speed = f", {row['tokens_per_second']:,.0f} tokens/s" if not outcome else ""
        return f"{about}: {outcome or memory + predicted + speed}"
    found = [f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in row.items()]
    return f"{row['kind']}: {outcome or ', '.join(found[2:])}"
