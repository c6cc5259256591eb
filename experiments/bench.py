"""What a training step costs, measured: `make bench` writes two records for 04_one_gpu_budget.

Every measurement runs in a process of its own and leaves a JSON file in runs/bench, so that a second call goes on where
the first was stopped. Contenders: transformers' `Trainer` with PEFT as its documentation shows, TRL's `SFTTrainer` with
its defaults for long context, and ours with the plans that the planner finds for given memory. Contenders have one
thread each, and their processor's seconds are counted: these are about the same whatever else the machine does.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from experiments.roofline import Rates, step_seconds
from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.attention import DOCUMENTS, document_attention
from llama_long_utils.model.base import load_base
from llama_long_utils.model.loss import CHUNK
from llama_long_utils.paths import REPOSITORY, RESULTS, write_atomically
from llama_long_utils.presets import load_preset
from llama_long_utils.records import write_record
from llama_long_utils.settings import Lora, MemorySavings, Scaling
from llama_long_utils.training import planner, trainer
from llama_long_utils.training.host_memory import GAPS_GIB, keep_freed_memory
from llama_long_utils.training.ledger import COMPONENTS, HOST, StepShape, ledger, random_llama, training_steps
from llama_long_utils.training.planner import GIB, USABLE, leanest, linear_shapes, model_shape, step_flops
from llama_long_utils.training.trainer import train

FOLDER = REPOSITORY / "runs" / "bench"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = Lora(rank=16, alpha=32, target_modules=MODULES, train_norms=False, train_embeddings=False)
PLAIN = MemorySavings(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused")
ALLOCATED_UP_TO = 2048  # tokens: without kept memory a step takes longer, and what it shows is the same
ALL = 10_000  # layers: more than any model has
SHAPE, TINY = "SmolLM2-135M", "tiny"
# What a process has to say about itself, in KiB.
RESIDENT, HIGHEST = "VmRSS", "VmHWM"


def own_memory(entry: str) -> float:
    """RESIDENT now or HIGHEST since `forget_highest`, in GiB."""
    return int(re.search(rf"{entry}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def forget_highest() -> None:
    """From now on HIGHEST is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")


def median_seconds(work: Callable[[], Any], times: int = 5) -> float:
    """Median seconds of so many calls; the first one, which loads kernels and makes buffers, not counted."""
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def fast_dtype() -> tuple[str, float]:
    """The dtype in which this machine multiplies faster, and how fast, in FLOP/s."""
    rates = {}
    for name in ("float32", "bfloat16"):
        one = torch.randn(2048, 2048).to(getattr(torch, name))
        rates[name] = 2 * 2048**3 / median_seconds(partial(torch.mm, one, one))
    return max(rates.items(), key=lambda item: item[1])


def product_rate(length: int, dtype: str) -> float:
    """FLOP/s of the products of SHAPE's step with `length` tokens: one layer's and a chunk of the head, both ways."""
    config, kind = model_shape(SHAPE), getattr(torch, dtype)
    head, layers = (config.hidden_size, config.vocab_size), config.num_hidden_layers
    products = [(length, layers, *shape) for shape in linear_shapes(config).values()]
    flops = seconds = 0.0
    for tokens, count, inputs, outputs in [*products, (CHUNK, length / CHUNK, *head)]:
        weight = torch.randn(outputs, inputs).to(kind)
        hidden, gradient = torch.randn(tokens, inputs).to(kind), torch.randn(tokens, outputs).to(kind)
        forward = median_seconds(partial(torch.nn.functional.linear, hidden, weight))
        seconds += count * (forward + median_seconds(partial(torch.mm, gradient, weight)))
        flops += count * 4 * tokens * inputs * outputs
    return flops / seconds


def attention_rate(length: int, dtype: str) -> float:
    """FLOP/s of a recomputed layer's attention (forward, forward again, backward), counted as `step_flops` does.

    Heads as in SHAPE, in the layout that the projections leave them in.
    """
    config = model_shape(SHAPE)
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    heads = [torch.randn(1, length, count, config.head_dim).transpose(1, 2) for count in (queries, keys, keys)]
    heads = [head.to(getattr(torch, dtype)).requires_grad_() for head in heads]
    options = {"position_ids": torch.arange(length)[None], "scaling": config.head_dim**-0.5}
    attend = partial(document_attention, torch.nn.Module(), *heads, None, **options)

    def layer() -> None:
        attend()
        attend()[0].sum().backward()

    flops = 9 * queries * config.head_dim * length**2
    return flops / median_seconds(layer, times=3 if length < 8192 else 1)


def bandwidth(length: int, dtype: str) -> float:
    """Bytes per second that an MLP's activation in SHAPE reads and writes, into new memory."""
    gate, up = torch.randn(2, length, model_shape(SHAPE).intermediate_size).to(getattr(torch, dtype)).unbind()
    return 5 * gate.nbytes / median_seconds(lambda: torch.nn.functional.silu(gate) * up)


def rates(length: int, dtype: str) -> Rates:
    """What this machine does per second with the shapes that a step of SHAPE has."""
    return Rates(product_rate(length, dtype), attention_rate(length, dtype), bandwidth(length, dtype))


def measured_peak(
    model: str,
    length: int,
    dtype: str,
    memory_savings: dict[str, Any],
    layers: int | None,
    packed: bool = False,
) -> dict:
    """Peak of real steps above what was resident before them, and their seconds; blocks are given back when freed."""
    config = model_shape(model)
    if layers:
        config.num_hidden_layers = layers
    started = time.perf_counter()
    forget_highest()
    llama = random_llama(config, LORA, dtype, packed=packed)
    built = {"build_seconds": time.perf_counter() - started, "build_peak_gib": own_memory(HIGHEST)}
    savings = MemorySavings(**memory_savings)
    warm_up = min(length, 1024)  # loads kernels and makes their buffers, which grow up to some hundred tokens
    for _loss in training_steps(llama, StepShape(warm_up, dtype, PLAIN), [warm_up]):
        pass
    before = own_memory(RESIDENT)
    seconds, losses = [], []
    forget_highest()
    last = time.perf_counter()
    for loss in training_steps(llama, StepShape(length, dtype, savings, packed=packed), [length] * 2):
        seconds.append(time.perf_counter() - last)
        losses.append(loss.item())
        last = time.perf_counter()
    return {
        **built,
        "resident_gib": before,
        "peak_gib_above_weights": own_memory(HIGHEST) - before,
        "seconds": seconds,
        "losses": losses,
    }


def bench_base() -> Path:
    """A folder with random weights of SHAPE in bf16: what all contenders load."""
    folder = FOLDER / "base"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        LlamaForCausalLM(model_shape(SHAPE)).to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(REPOSITORY / "data" / "tiny-llama").save_pretrained(folder)
    return folder


def contender(
    name: str, length: int, dtype: str, steps: int, memory_savings: dict[str, Any] | None, gaps_gib: float = GAPS_GIB
) -> dict:
    """Seconds of each step, peak above the weights, loss of the first step."""
    folder = bench_base()
    config = model_shape(SHAPE)
    window = config.max_position_embeddings
    rope = Scaling("none", config.rope_parameters["rope_theta"], config.head_dim, window, window)
    model = load_base(folder, rope, dtype=dtype, attention=DOCUMENTS if name == "ours" else "sdpa")
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (steps, length)).astype(np.int32)
    with tempfile.TemporaryDirectory() as scratch:
        before = own_memory(RESIDENT)
        forget_highest()
        if name == "ours":
            savings, adapted = MemorySavings(**memory_savings), add_lora(model, LORA, seed=0)
            log = run_ours(adapted, ids, savings, Path(scratch), gaps_gib)
        else:
            log = {"Trainer + PEFT": run_trainer, "TRL SFTTrainer": run_trl}[name](model, ids, dtype, scratch)
        return {**log, "peak_gib_above_weights": own_memory(HIGHEST) - before}


def run_ours(
    model: Any, ids: np.ndarray, memory_savings: MemorySavings, folder: Path, gaps_gib: float = GAPS_GIB
) -> dict:
    """Our training loop."""
    settings = replace(
        load_preset("tiny").training,
        **{"window": ids.shape[1], "reach": ids.shape[1], "pack": False, "steps": len(ids), "learning_rate": 1e-4},
        **{"warmup_steps": 0, "checkpoint_every": 1000, "memory_savings": memory_savings},
    )
    positions = np.arange(ids.shape[1], dtype=np.int32)
    sequences = [TrainingSequence(row, row, positions) for row in ids]
    log = train(model, sequences, settings, folder, gaps_gib=gaps_gib)
    return {"seconds": [ids.shape[1] / row["tokens_per_second"] for row in log], "losses": [row["loss"] for row in log]}


def common_arguments(dtype: str, steps: int, folder: str, on_gpu: bool = False) -> dict[str, Any]:
    """What every contender's trainer is told."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "gradient_checkpointing": True,
        "bf16": dtype == "bfloat16",
        "use_cpu": not on_gpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }


def run_trainer(model: Any, ids: np.ndarray, dtype: str, folder: str, on_gpu: bool = False) -> dict:
    """As PEFT's guide to quantisation and transformers' guide to its `Trainer` show it."""
    from datasets import Dataset  # as for TRL: a machine without them measures the others

    model = prepare_model_for_kbit_training(model)
    settings = LoraConfig(task_type="CAUSAL_LM", r=LORA.rank, lora_alpha=LORA.alpha, target_modules=MODULES)
    model = get_peft_model(model, settings)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    timer = StepTimer()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**common_arguments(dtype, len(ids), folder, on_gpu)),
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=[timer],
    )
    trainer.train()
    return {"seconds": timer.seconds, "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def run_trl(model: Any, ids: np.ndarray, dtype: str, folder: str, on_gpu: bool = False) -> dict:
    """TRL's trainer with its defaults: chunked loss and gradient checkpointing."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    timer = StepTimer()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**common_arguments(dtype, len(ids), folder, on_gpu), max_length=ids.shape[1], packing=False),
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(REPOSITORY / "data" / "tiny-llama"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=LORA.rank, lora_alpha=LORA.alpha, target_modules=MODULES),
        callbacks=[timer],
    )
    if dtype == "float32":  # it makes adapters bf16, which this machine would multiply in software
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    trainer.train()
    return {"seconds": timer.seconds, "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def wait() -> None:
    """Until a GPU has done what was queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_arguments: Any, **_options: Any) -> None:
        wait()
        self.started = time.perf_counter()

    def on_step_end(self, *_arguments: Any, **_options: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self.started)


def trained(model: str, length: int, dtype: str, memory_savings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Peak of the training loop itself, `Trainer` and all, on a model with random weights."""
    config = model_shape(model)
    llama = random_llama(config, LORA, dtype)
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (steps, length)).astype(np.int32)
    before = own_memory(RESIDENT)
    forget_highest()
    with tempfile.TemporaryDirectory() as scratch:
        log = run_ours(llama, ids, MemorySavings(**memory_savings), Path(scratch))
    return {**log, "peak_gib_above_weights": own_memory(HIGHEST) - before}


def allocated(**task: Any) -> dict[str, Any]:
    """As `contender`, where no allocator keeps freed memory: what is resident is what a step holds."""
    trainer.keep_freed_memory = lambda: None
    trainer.give_back_gaps = lambda _model, _limit: []
    return contender(**task)


def profiled(length: int, dtype: str, memory_savings: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step by operator, and between operators, where Python is."""
    llama = random_llama(model_shape(SHAPE), LORA, dtype, packed=True)
    keep_freed_memory()
    shape = StepShape(length, dtype, MemorySavings(**memory_savings), packed=True)
    steps = training_steps(llama, shape, [length] * 2)
    next(steps)
    started = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        next(steps)
        whole = time.perf_counter() - started
    seconds = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    largest = dict(sorted(seconds.items(), key=lambda item: -item[1])[:12])
    return {**largest, "other operators": sum(seconds.values()) - sum(largest.values()), "whole step": whole}


def worker(task: dict[str, Any]) -> None:
    """One measurement: its result as a line for the process that asked."""
    torch.manual_seed(0)
    if task.pop("one_core", False):
        torch.set_num_threads(1)
        time.perf_counter = time.process_time  # every trainer's clock
    kinds = {
        "machine": lambda: dict(zip(("dtype", "matmul"), fast_dtype(), strict=True)),
        "peak": measured_peak,
        "allocated": allocated,
        "contender": contender,
        "profile": profiled,
        "timed": timed,
        "trained": trained,
    }
    print("RESULT " + json.dumps(kinds[task.pop("kind")](**task)), flush=True)


def measured(**task: Any) -> dict[str, Any]:
    """The result of a task, from its file or from a new process."""
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(value)) for value in task.values())
    path = FOLDER / f"{name[:180]}.json"
    if not path.is_file():
        # To compare with what is allocated, freed blocks must not stay resident.
        exact = task["kind"] in ("peak", "allocated")
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"} if exact else None
        task = {name: value for name, value in task.items() if name != "round"}
        command = [sys.executable, "-W", "ignore", "-m", "experiments.bench", "--worker", json.dumps(task)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error in {task}:\n{done.stderr[-3000:]}")
        result = json.loads(done.stdout.rpartition("RESULT ")[2])
        write_atomically(path, json.dumps({"task": task, **result}, indent=1).encode())
        print(f"{name}: {done.stdout.rpartition('RESULT ')[2]}", flush=True)
    return json.loads(path.read_text())


def ledger_check() -> list[dict[str, Any]]:
    """Predicted and measured peaks above the weights, with everything that changes them."""
    rows = []
    for model, length, layers, memory_savings, dtype in CHECKED:
        config = model_shape(model)
        config.num_hidden_layers = layers or config.num_hidden_layers
        found = ledger(config, LORA, StepShape(length, dtype, memory_savings))
        task = {
            "model": model,
            "length": length,
            "dtype": dtype,
            "memory_savings": asdict(memory_savings),
            "layers": layers,
        }
        result = measured(kind="peak", **task)
        rows.append(
            {
                "model": model,
                "layers": config.num_hidden_layers,
                "context": length,
                "dtype": dtype,
                "plan": in_words(memory_savings, config.num_hidden_layers),
                "predicted_gib": above_weights(found) / GIB,
                "measured_gib": result["peak_gib_above_weights"],
            }
        )
    return rows


def above_weights(counts: dict[str, int]) -> int:
    """Bytes of a ledger's peak that are not there before the step: all but weights and adapters."""
    return sum(counts[name] for name in COMPONENTS) - counts["weights"] - counts["adapters"]


def in_words(memory_savings: MemorySavings, layers: int) -> str:
    """A plan as the record names it."""
    return str(replace(memory_savings, recomputed_layers=min(memory_savings.recomputed_layers, layers)))


def planned(length: int, dtype: str, bar: float) -> list[tuple[str, dict[str, Any], float]]:
    """Our plans for the memory that the `Trainer` takes above the weights (`bar`, GiB), and for 0.4 times that.

    Behind each the GiB that it leaves for gaps.
    """
    config = model_shape(SHAPE)
    found = ledger(config, LORA, StepShape(length, dtype, PLAIN))
    weights = (found["weights"] + found["adapters"]) / GIB
    entries = []
    for name, share in (("ours, fast", 0.95), ("ours, lean", 0.38)):
        room = max(share * bar - GAPS_GIB, 0.05) + weights
        chosen = planner.plan(config, LORA, StepShape(length, dtype, PLAIN), room / USABLE)
        gaps = max(share * bar + weights - chosen.device_gib, GAPS_GIB)
        entries.append((name, asdict(chosen.memory_savings), gaps))
    return entries


def contenders(dtype: str, length: int, rounds: int, steps: int, matmul: float) -> list[dict[str, Any]]:
    """Every contender once a round, in an order that turns around."""
    config = model_shape(SHAPE)
    task = {"length": length, "dtype": dtype, "steps": steps, "one_core": True}
    bar = measured(kind="contender", round=0, name="Trainer + PEFT", memory_savings=None, **task)[
        "peak_gib_above_weights"
    ]
    entries = [("Trainer + PEFT", None, None), ("TRL SFTTrainer", None, None)]
    entries += kept(f"planned-with-gaps-{length}-{dtype}", lambda: planned(length, dtype, bar))
    held = {name: None for name, _savings, _gaps in entries}
    for name, savings, _gaps in entries if length <= ALLOCATED_UP_TO else ():
        alone = measured(kind="allocated", name=name.split(",")[0], memory_savings=savings, **{**task, "steps": 1})
        held[name] = alone["peak_gib_above_weights"]
    rows = []
    for number in range(rounds):
        for name, memory_savings, gaps in entries if number % 2 == 0 else entries[::-1]:
            own = {"name": name.split(",")[0], "memory_savings": memory_savings, **task}
            own |= {"gaps_gib": gaps} if gaps else {}
            result = measured(kind="contender", round=number, **own)
            seconds = median(result["seconds"][1:] or result["seconds"])
            savings = MemorySavings(**memory_savings) if memory_savings else replace(PLAIN, recomputed_layers=ALL)
            flops = sum(step_flops(config, LORA, length, savings).values())
            rows.append(
                {
                    "contender": name,
                    "plan": in_words(savings, config.num_hidden_layers) if memory_savings else "its own",
                    "context": length,
                    "round": number,
                    "tokens_per_core_second": length / seconds,
                    "peak_gib_above_weights": result["peak_gib_above_weights"],
                    "allocated_gib": held[name],
                    "fraction_of_matmul_peak": flops / seconds / matmul,
                    "loss": result["losses"][-1],
                }
            )
    return rows


def timed(length: int, dtype: str, steps: int, memory_savings: dict[str, Any]) -> dict[str, Any]:
    """Steps of ours, with the machine's rates before and after them: its speed changes by the hour."""
    keep_freed_memory()
    before = rates(length, dtype)
    result = contender("ours", length, dtype, steps, memory_savings)
    return {**result, "rates": [asdict(before), asdict(rates(length, dtype))]}


def step_times(dtype: str) -> list[dict[str, Any]]:
    """Predicted and measured seconds of our step, all layers recomputed, as the context grows."""
    config, savings = model_shape(SHAPE), replace(PLAIN, recomputed_layers=ALL)
    rows = []
    for length, steps in ((1024, 4), (2048, 3), (4096, 3), (8192, 2), (16_384, 1)):
        result = measured(kind="timed", length=length, dtype=dtype, steps=steps, memory_savings=asdict(savings))
        shape = StepShape(length, dtype, savings)
        around = [step_seconds(config, LORA, shape, Rates(**found)) for found in result["rates"]]
        predicted = pd.DataFrame(around).mean().to_dict()
        rows.append({"context": length, **predicted, "measured": median(result["seconds"][1:] or result["seconds"])})
    return rows


def profile(dtype: str) -> list[dict[str, Any]]:
    """Shares of the operators in a step of 2,048 tokens with all layers recomputed."""
    savings = asdict(replace(PLAIN, recomputed_layers=ALL))
    seconds = measured(kind="profile", length=2048, dtype=dtype, memory_savings=savings)
    del seconds["task"]
    return [{"operator": name, "seconds": value} for name, value in seconds.items()]


CHECKED = [
    (SHAPE, 2048, None, PLAIN, "float32"),
    (SHAPE, 2048, None, replace(PLAIN, recomputed_layers=ALL), "float32"),
    (SHAPE, 2048, None, replace(PLAIN, recomputed_layers=15), "float32"),
    (SHAPE, 2048, None, replace(PLAIN, tile=256), "float32"),
    (SHAPE, 4096, None, replace(PLAIN, recomputed_layers=ALL, tile=256), "float32"),
    (SHAPE, 8192, 6, replace(PLAIN, recomputed_layers=3, tile=512, optimizer="adamw_8bit"), "float32"),
    (TINY, 8192, None, PLAIN, "float32"),
    (TINY, 16_384, None, replace(PLAIN, recomputed_layers=ALL), "float32"),
    (TINY, 16_384, None, replace(PLAIN, recomputed_layers=2, tile=1024), "float32"),
    (TINY, 32_768, None, replace(PLAIN, recomputed_layers=ALL, tile=1024), "float32"),
    (TINY, 4096, None, PLAIN, "bfloat16"),
    (TINY, 8192, None, PLAIN, "bfloat16"),
    (SHAPE, 2048, None, PLAIN, "bfloat16"),
]


def kept(name: str, make: Callable[[], Any]) -> Any:
    """The result of a part, from its file or made now."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        write_atomically(path, json.dumps(make()).encode())
    return json.loads(path.read_text())


PREDICTED = {
    "Llama 2 7B": "bfloat16",
    "Llama 2 13B": "bfloat16",
    "Llama 2 70B": "bfloat16",
    SHAPE: "bfloat16",
    TINY: "float32",
}
CONTEXTS = (4096, 16_384, 32_768, 65_536, 131_072)
DEVICES = (16, 24, 40, 80)
WITH_NORMS = replace(LORA, train_norms=True)  # as the presets have it


def longest_on_line(lengths: Sequence[int], peaks_gib: Sequence[float], gib: float) -> int:
    """The longest context by the line through two peaks, in steps of 1,024 tokens."""
    per_token = (peaks_gib[1] - peaks_gib[0]) / (lengths[1] - lengths[0])
    return max(0, int((gib * USABLE - peaks_gib[0]) / per_token + lengths[0]) // 1024 * 1024)


def predicted_peaks() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The ledger of every model, context and plan by component, and the longest context on each device."""
    rows, longest = [], []
    for model, dtype in PREDICTED.items():
        config = model_shape(model)
        for plan in ("plain", "checkpointing", "lean"):
            totals = []
            for context in CONTEXTS:
                savings = {
                    "plain": PLAIN,
                    "checkpointing": replace(PLAIN, recomputed_layers=ALL),
                    "lean": leanest(config, context, PLAIN),
                }[plan]
                found = ledger(config, WITH_NORMS, StepShape(context, dtype, savings))
                about = {"model": model, "context": context, "plan": plan}
                rows += [
                    {**about, "component": name, "predicted_gib": found[name] / GIB} for name in (*COMPONENTS, HOST)
                ]
                totals.append(sum(found[name] for name in COMPONENTS) / GIB)
                print(model, plan, context, f"{totals[-1]:.2f} GiB", flush=True)
            for gib in DEVICES:
                tokens = longest_on_line(CONTEXTS[-2:], totals[-2:], gib)
                longest.append({"model": model, "device_gib": gib, "plan": plan, "tokens": tokens})
    return rows, longest


def plans() -> list[dict[str, Any]]:
    """What the planner chooses for Llama 2 7B."""
    rows = []
    for gib in DEVICES:
        for context in (32_768, 131_072):
            about = {"model": "Llama 2 7B", "device_gib": gib, "context": context}
            try:
                shape = StepShape(context, "bfloat16", PLAIN)
                plan = planner.plan(model_shape("Llama 2 7B"), WITH_NORMS, shape, gib)
                rows.append(
                    {
                        **about,
                        "plan": str(plan.memory_savings),
                        "predicted_gib": plan.device_gib,
                        "host_gib": plan.host_gib,
                    }
                )
            except ValueError:
                rows.append({**about, "plan": "does not fit", "predicted_gib": None, "host_gib": None})
            print(rows[-1], flush=True)
    return rows


def seven_billion(dtype: str) -> list[dict[str, Any]]:
    """A model of Llama 2 7B's shape built in NF4 and trained for two short steps."""
    config = model_shape("Llama 2 7B")
    savings = replace(PLAIN, recomputed_layers=config.num_hidden_layers)
    task = {"model": "Llama 2 7B", "length": 256, "dtype": dtype, "memory_savings": asdict(savings), "layers": None}
    result = measured(kind="peak", **task)
    run = measured(kind="trained", **{name: value for name, value in task.items() if name != "layers"}, steps=2)
    # A process that builds the tiny model holds little more than the libraries.
    libraries = measured(kind="peak", **{**task, "model": TINY, "length": 8192, "memory_savings": asdict(PLAIN)})
    found = ledger(config, LORA, StepShape(256, dtype, savings))
    weights = (found["weights"] + found["adapters"]) / GIB
    step = above_weights(found) / GIB
    rows = {
        "peak while building, GiB": (weights, result["build_peak_gib"] - libraries["build_peak_gib"]),
        "peak of a step above the weights, GiB": (step, result["peak_gib_above_weights"]),
        # Where freed memory may stay resident, as in every real run.
        f"the same in the Trainer, with {GAPS_GIB} GiB of gaps": (step + GAPS_GIB, run["peak_gib_above_weights"]),
        "seconds to build": (None, result["build_seconds"]),
        "seconds of a step of 256 tokens": (None, result["seconds"][-1]),
    }
    return [{"quantity": name, "predicted": one, "measured": other} for name, (one, other) in rows.items()]


ROUNDS = ((2048, 3, 2), (4096, 1, 2), (8192, 1, 2))  # context, rounds, steps, of which the first is not counted


def write(name: str, question: str, tables: dict[str, list[dict[str, Any]]], started: float, command: str) -> Path:
    """A record of these tables."""
    return write_record(
        RESULTS / "tiny",
        name,
        preset="tiny",
        question=question,
        tables={name: pd.DataFrame(rows) for name, rows in tables.items()},
        seeds={"weights and tokens": 0},
        seconds=time.perf_counter() - started,
        provenance={"command": command},
    )


def compare_trainers() -> Path:
    """The record of our step beside those of other trainers (an hour of one core)."""
    started = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    machine = measured(kind="machine", one_core=True)
    dtype, matmul = machine["dtype"], machine["matmul"]
    bench = [row for sizes in ROUNDS for row in contenders(dtype, *sizes, matmul)]
    tables = {
        "bench": bench,
        "machine": [{"quantity": "dtype", "value": dtype}, {"quantity": "matmul", "value": str(matmul)}],
    }
    command = "python -m experiments bench --trainers"
    return write(
        "04_training_step", "How long does a step take beside other trainers' steps?", tables, started, command
    )


def main() -> Path:
    """All parts but the comparison, then the record."""
    started = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    dtype, matmul = kept("machine", fast_dtype)
    check = ledger_check()
    built = seven_billion(dtype)
    peaks, longest = kept("predicted", predicted_peaks)
    tables = {
        "ledger": peaks,
        "ledger_check": check,
        "longest_context": longest,
        "plans": kept("plans", plans),
        "step_times": step_times(dtype),
        "profile": profile(dtype),
        "seven_billion": built,
        "machine": [{"quantity": "dtype", "value": dtype}, {"quantity": "matmul", "value": str(matmul)}],
    }
    question = "What fits on one GPU, and how long does it take?"
    return write("04_one_gpu_budget", question, tables, started, "make bench")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--worker"]:
        sys.exit("one measurement's process: use `python -m experiments bench`")
    worker(json.loads(sys.argv[2]))
