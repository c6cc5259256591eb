"""One training loop, transformers' `Trainer`, for pretraining the tiny model and for LoRA.

The loss is in the model (`patch_loss`). A callback adds tokens, speed and memory to each step's log, stops at numbers
that are not finite, and seals each checkpoint with checksums, by which a broken one is recognised.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import set_seed

from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.model.attention import share_context
from llama_long_utils.model.loss import Model, causal_lm, patch_loss
from llama_long_utils.model.memory_savings import apply_memory_savings, offload_checkpoints
from llama_long_utils.paths import file_sha256, write_atomically
from llama_long_utils.progress import in_kernel, progress_bar
from llama_long_utils.settings import TrainingSettings
from llama_long_utils.training.host_memory import GAPS_GIB, give_back_gaps, keep_freed_memory, peak_memory_gib
from llama_long_utils.training.processes import (
    Division,
    SharedSequences,
    add_up_gradients,
    divide,
    join_processes,
    use_one_gpu,
)

CHECKSUMS = "checksums.json"
NEEDED = {"trainer_state.json", "optimizer.pt", "scheduler.pt"}  # beside weights and random states
COLUMNS = ("step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_gib")
PREFERENCES = {  # what TRL calls them in preference tuning: more columns
    "reward": "reward",  # of the answers that were sampled in this step, on average
    "kl": "kl",  # nats a token
    "entropy": "entropy",
    "completions/mean_length": "length",
    "accuracy": "accuracy",  # of the reward model on the comparisons of this step
    "margin": "margin",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}


def train(
    model: Model,
    sequences: Sequence[TrainingSequence],
    settings: TrainingSettings,
    folder: Path,
    *,
    report_every: int = 0,
    gaps_gib: float = GAPS_GIB,
    context_parallel: int = 1,
    build: "Build | None" = None,
    rewarded: bool = False,
) -> list[dict[str, float]]:
    """Train in place and return one row per step: step, tokens, loss (nats), learning_rate, ...

    Checkpoints go to `folder`; a second call with the same arguments and a new model continues from the last whole
    one, or only reads it if the run had finished.

    A line is printed every `report_every` steps, `gaps_gib` of free memory may stay resident (`give_back_gaps`), and
    `context_parallel` processes share a sequence. `build` makes the `Trainer`. If answers are `rewarded`, they
    may be equally good, and a step have no gradient.

    Raises:
        ValueError: `sequences` are not what the settings ask for, or do not divide among the processes.
        RuntimeError: a number is not finite, a LoRA-B matrix gets no gradient, or this model was half trained before.
    """
    state = join_processes()
    division = divide(settings, state.num_processes, context_parallel)
    wanted = settings.steps * settings.sequences_per_step
    if len(sequences) != wanted or (not build and len(sequences[0].input_ids) != settings.window):
        raise ValueError(
            f"{settings.steps} steps of {settings.sequences_per_step} sequences need {wanted} sequences of "
            f"{settings.window} tokens, got {len(sequences)} of {len(sequences[0].input_ids)}"
        )
    if vars(model).get("half_trained"):
        raise RuntimeError("this model holds the weights of an interrupted run: build it anew, then train it")
    began_before = folder.exists()
    with state.main_process_first():  # it takes broken ones away
        checkpoint, passed_over = last_whole_checkpoint(folder)
    step, what = int(checkpoint.name.split("-")[1]) if checkpoint else 0, "training"
    if began_before and step < settings.steps:
        what += f", which was interrupted after step {step:,}"
        why = "" if step else f": it left no checkpoint (there is one every {settings.checkpoint_every})"
        if in_kernel():  # there the bar says it; lines would stay in the stored outputs
            what += "".join(f"; {broken}" for broken in passed_over)
        elif state.is_main_process:
            lines = [*passed_over, f"an interrupted run continues after step {step:,} of {settings.steps:,}{why}"]
            print("\n".join(lines), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    set_seed(settings.seed)
    apply_memory_savings(model, settings.memory_savings)
    if settings.memory_savings.offload_checkpoints:
        offload_checkpoints(model, settings.window // context_parallel * settings.sequences_at_once)
    if causal_lm(model).get_output_embeddings() is not None:  # a reward model has no tokens to lose
        patch_loss(model)
    if context_parallel > 1:
        share_context(model, division.share(state.process_index))
    hooks = give_back_gaps(model, gaps_gib)
    arguments = dict(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=division.at_once,
        gradient_accumulation_steps=division.sequences // division.at_once,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        optim=settings.memory_savings.optimizer,
        max_grad_norm=settings.gradient_clipping,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        seed=settings.seed,
    )
    trainer, labels = (build or plain_trainer)(model, sequences, division, arguments)
    log = StepLog(labels, settings, report_every, step, rewarded)
    trainer.add_callback(log)
    trainer.remove_callback(PrinterCallback)
    if isinstance(causal_lm(model).model, FSDPModule):  # `shard_base`
        trainer.model_wrapped = add_up_gradients(model)
    model.half_trained = True
    bar = progress_bar(what, settings.steps, already=step) if state.is_main_process else nullcontext(log.report_done)
    with bar as log.report_done:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            kept = f"checkpoint of step {log.saved:,}" if log.saved else "beginning, as no checkpoint was written yet"
            raise KeyboardInterrupt(f"stopped: the same command continues from the {kept}") from None
    model.half_trained = False
    for hook in hooks:
        hook.remove()
    names = {**dict(zip(COLUMNS, COLUMNS, strict=True)), **PREFERENCES}
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{names[key]: row[key] for key in names if key in row} for row in rows]


Labels = dict[int, int]  # how many this process was given of each sequence, by its number
Build = Callable[[Model, Sequence[Any], Division, dict[str, Any]], tuple[Trainer, Labels]]


def plain_trainer(
    model: Model, sequences: Sequence[TrainingSequence], division: Division, arguments: dict[str, Any]
) -> tuple[Trainer, Labels]:
    """transformers' `Trainer`, and where it counts labels."""
    config, data = TrainingArguments(**arguments), SharedSequences(sequences, division)
    use_one_gpu(config)
    return Trainer(model=model, args=config, train_dataset=data), data.labels


class StepLog(TrainerCallback):
    """Tokens, speed and memory of each step, a stop where numbers are not finite, and sealed checkpoints."""

    def __init__(self, labels: Labels, settings: TrainingSettings, every: int, saved: int, rewarded: bool) -> None:
        self.labels, self.settings, self.report_every, self.saved = labels, settings, every, saved
        self.checked, self.rewarded, self.started = False, rewarded, time.perf_counter()
        self.report_done: Callable[[float], None] = lambda _steps: None

    def on_train_begin(self, arguments: TrainingArguments, state: TrainerState, *_: Any, **_options: Any) -> None:
        state.save_steps = arguments.save_steps  # not those of the run that is continued

    def on_pre_optimizer_step(self, *_: Any, model: Model, **_options: Any) -> None:
        self.checked = self.checked or not isinstance(model, PeftModel) or check_lora_gradients(model, self.rewarded)

    def on_log(self, arguments: TrainingArguments, state: TrainerState, *_: Any, **_options: Any) -> None:
        row = state.log_history[-1]
        if "loss" not in row:
            return
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise RuntimeError(
                f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}: training stops, and a "
                "checkpoint before this step is kept; look for weights that are not finite, or lower the learning rate"
            )
        now, per_step = time.perf_counter(), self.settings.sequences_per_step
        before = next((earlier["tokens"] for earlier in state.log_history[-2::-1] if "tokens" in earlier), 0)
        numbers = range((row["step"] - 1) * per_step, row["step"] * per_step)
        served = sum(self.labels.pop(number, 0) for number in numbers)  # by this process
        row["tokens"] = before + int(reduce(torch.tensor(served, device=arguments.device), "sum").item())
        row["tokens_per_second"] = (row["tokens"] - before) / (now - self.started)
        row["peak_gib"] = peak_memory_gib()
        self.started = now
        self.report_done(row["step"])
        if self.report_every and state.is_world_process_zero and row["step"] % self.report_every == 0:
            speed = f", {row['tokens_per_second']:,.0f} tokens/s" if row["tokens"] else ""  # answers have no labels
            print(f"step {row['step']:,} of {self.settings.steps:,}: {in_words(row)}{speed}", flush=True)

    def on_save(self, arguments: TrainingArguments, state: TrainerState, *_: Any, **_options: Any) -> None:
        PartialState().wait_for_everyone()  # each writes a file
        self.saved = state.global_step
        if not state.is_world_process_zero:
            return
        folder = Path(arguments.output_dir) / f"checkpoint-{state.global_step}"
        sums = {path.name: file_sha256(path) for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS}
        write_atomically(folder / CHECKSUMS, json.dumps(sums, indent=1).encode())


def in_words(row: dict[str, float]) -> str:
    """How far a step has come: its loss, or where a policy's is 0 by construction, reward and KL."""
    if "reward" in row:
        return f"reward {row['reward']:.3f}, KL {row['kl']:.3f} nats a token"
    return f"loss {row['loss']:.3f}"


def check_lora_gradients(model: PeftModel, rewarded: bool = False) -> bool:
    """Raise RuntimeError if a weight has no gradient or a LoRA-B's is 0; False if all are 0, as of equal `rewarded`."""
    trained = {n: w for n, w in model.named_parameters() if ".ref." not in n and (w.requires_grad or "lora_B" in n)}
    matrices = [name for name in trained if "lora_B" in name]
    dead = [name for name, w in trained.items() if w.grad is None or (name in matrices and not w.grad.any())]
    equal = rewarded and dead == matrices and all(trained[name].grad is not None for name in dead)
    if dead and not equal:
        found = f"{len(dead)} of {len(trained)} trained weights got no gradient, the first {dead[0]}"
        raise RuntimeError(f"{found}: gradient checkpointing or a repacked 4-bit weight cut the graph")
    return not equal


def last_whole_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files have the checksums they were written with, and a line on each one passed over.

    Newer broken ones are removed, so that `Trainer`, which keeps two, does not keep them instead of whole ones.
    """
    passed_over = []
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            sums = json.loads((path / CHECKSUMS).read_text())
            broken = [name for name, checksum in sums.items() if file_sha256(path / name) != checksum]
            broken += sorted(NEEDED - set(sums))
        except (OSError, ValueError, AttributeError) as error:
            broken = [f"{CHECKSUMS} ({type(error).__name__})"]
        if not broken:
            return path, passed_over
        passed_over.append(f"{path.name} of {folder.name} is not whole and is passed over: {', '.join(broken)}")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None, passed_over


VERSION = 2  # of what a run computes: raise it when this loop, the loss, `load_base` or `add_lora` change its numbers


def run_key(settings: TrainingSettings, data: str, **other: Any) -> dict[str, Any]:
    """All that a run's numbers depend on, but for rounding; `data` is a digest of its texts, as `TrainingData.key`."""
    return {"settings": settings, "data": data, "training": VERSION, **other}
