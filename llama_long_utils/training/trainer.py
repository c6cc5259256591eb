"""One training loop, transformers' `Trainer`, for pretraining the tiny model and for LoRA.

The subclass changes two things only: the loss comes from hidden states in chunks and is divided by
the token count of the whole accumulated batch, and each step's log says tokens, speed and memory.
"""

import hashlib
import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.progress import headless
from llama_long_utils.settings import TrainingSettings
from llama_long_utils.training.host_memory import give_back_gaps, keep_freed_memory, peak_memory_gib
from llama_long_utils.training.memory_savings import OffloadedCheckpoints, apply_memory_savings


class ChunkedLossTrainer(Trainer):
    """`Trainer` whose loss is a sum over tokens / tokens in the accumulated batch."""

    loss_is_scaled_for_ga = True
    step_started = 0.0
    tokens_in_step = 0
    report_every: int | None = None
    offload_checkpoints = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        labels = inputs.pop("labels")
        offload = OffloadedCheckpoints(causal_lm(model).config.hidden_size)
        with offload if self.offload_checkpoints else nullcontext():
            hidden = hidden_states(model, **inputs)
        self.tokens_in_step = int(num_items_in_batch)
        return next_token_nll(hidden, causal_lm(model).get_output_embeddings(), labels) / num_items_in_batch

    def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(model, *arguments, **options)
        if self.state.global_step == 0 and isinstance(model, PeftModel):
            check_lora_gradients(model)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            seen = next((row["tokens"] for row in reversed(self.state.log_history) if "tokens" in row), 0)
            logs["tokens"] = seen + self.tokens_in_step
            logs["tokens_per_second"] = self.tokens_in_step / (now - self.step_started)
            logs["peak_gib"] = peak_memory_gib()
            self.step_started = now
            if self.report_every and self.state.global_step % self.report_every == 0:
                speed = f"{logs['tokens_per_second']:,.0f} tokens/s"
                print(f"step {self.state.global_step:,}: loss {logs['loss']:.3f}, {speed}", flush=True)
        super().log(logs, start_time)


def train(
    model: PreTrainedModel | PeftModel,
    sequences: list[TrainingSequence],
    settings: TrainingSettings,
    folder: Path,
    *,
    report_every: int | None = None,
) -> list[dict[str, float]]:
    """Train in place and return one row per step: step, tokens, loss (nats), learning_rate, ...

    Checkpoints go to `folder`; a second call with the same arguments goes on from the last whole
    one, or only reads it if the run had finished. `report_every` prints a line every so many steps.

    Raises:
        ValueError: `sequences` are not exactly what the settings ask for.
        RuntimeError: the first backward pass leaves a LoRA-B matrix without a gradient.
    """
    wanted = settings.steps * settings.sequences_per_step
    if len(sequences) != wanted or len(sequences[0].input_ids) != settings.window:
        raise ValueError(
            f"{settings.steps} steps of {settings.sequences_per_step} sequences need {wanted} sequences of "
            f"{settings.window} tokens, got {len(sequences)} of {len(sequences[0].input_ids)}"
        )
    keep_freed_memory()
    set_seed(settings.seed)
    apply_memory_savings(model, settings.memory_savings)
    hooks = give_back_gaps(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.sequences_at_once,
        gradient_accumulation_steps=settings.sequences_per_step // settings.sequences_at_once,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        optim=settings.memory_savings.optimizer,
        max_grad_norm=settings.gradient_clipping,
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=headless(),
        seed=settings.seed,
    )
    trainer = ChunkedLossTrainer(
        model=model, args=arguments, train_dataset=[sequence.tensors() for sequence in sequences]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.report_every, trainer.offload_checkpoints = report_every, settings.memory_savings.offload_checkpoints
    trainer.step_started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    for hook in hooks:
        hook.remove()
    columns = ("step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_gib")
    return [{name: row[name] for name in columns} for row in trainer.state.log_history if "loss" in row]


def check_lora_gradients(model: PeftModel) -> None:
    """Raise RuntimeError if, after a backward pass, a LoRA-B matrix has no gradient."""
    matrices = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    dead = [name for name, weight in matrices.items() if weight.grad is None or not weight.grad.any()]
    if dead:
        raise RuntimeError(
            f"{len(dead)} of {len(matrices)} LoRA-B matrices got no gradient, the first {dead[0]}: "
            "gradient checkpointing or a repacked 4-bit weight cut the graph"
        )


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; half-written newer ones are removed.

    `Trainer` writes trainer_state.json last, so a checkpoint without a readable one is half-written.
    """
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while checkpoints:
        newest = checkpoints.pop()
        try:
            json.loads((newest / "trainer_state.json").read_text())
            return str(newest)
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(newest)
    return None


VERSION = 1  # of the training loop: raise it when its numbers change


def run_fingerprint(settings: TrainingSettings, sequences: list[TrainingSequence], **other: Any) -> str:
    """Eight hexadecimal digits that name a run: the same code, settings, data and `other` give the same."""
    key = hashlib.sha256(
        json.dumps({"version": VERSION, "settings": asdict(settings), **other}, sort_keys=True).encode()
    )
    for sequence in sequences:
        for array in (sequence.input_ids, sequence.labels, sequence.position_ids):
            key.update(array.tobytes())
    return key.hexdigest()[:8]
