"""One training loop, transformers' `Trainer`, for pretraining the tiny model and for LoRA.

The subclass changes two things only: the loss comes from hidden states in chunks and is divided by
the token count of the whole accumulated batch, and each step's log says tokens, speed and memory.
"""

import ctypes
import hashlib
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import PeftModel
from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from llama_long_utils.documents import TokenizedDocument
from llama_long_utils.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.packing import (
    SequenceDataset,
    TrainingSequence,
    quote_themselves,
    skip_positions,
    training_sequences,
)

STRICT = ConfigDict(extra="forbid", strict=True)
GAPS_GIB = 0.5  # free memory that may stay resident: less costs page faults


@dataclass(frozen=True, config=STRICT)
class Techniques:
    """Ways to take less memory. None of them changes the loss or a gradient; 0 and false switch them off.

    `recomputed_layers`: the first so many layers keep only their input and are computed again in the backward pass
    (gradient checkpointing); a number above the model's means all. `tile`: tokens at a time in MLPs and norms.
    `offload_checkpoints`: what recomputed layers keep waits in host memory. `optimizer`: the name in transformers;
    "adamw_8bit" keeps its two numbers per weight in 8 bits, "paged_adamw_8bit" in memory that can move to the host.
    """

    recomputed_layers: NonNegativeInt
    tile: NonNegativeInt
    offload_checkpoints: bool
    optimizer: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]

    def __str__(self) -> str:
        none = "no whole layer recomputed" if self.tile else "nothing recomputed"
        parts = [f"{self.recomputed_layers} layers recomputed" if self.recomputed_layers else none]
        parts += [f"tiles of {self.tile:,} tokens"] * bool(self.tile)
        parts += ["checkpoints on the host"] * self.offload_checkpoints
        parts += [self.optimizer] * ("8bit" in self.optimizer)
        return ", ".join(parts)


@dataclass(frozen=True, config=STRICT)
class TrainingSettings:
    """Numbers of a training run. Tokens per step = window x sequences_per_step.

    `reach` is the highest position, in tokens: above `window` positions are skipped (PoSE). `attention` is
    full ("sdpa") or shifted sparse ("s2"). Both need whole sequences: pack = false. `self_quoting_share` is the
    share of the whole sequences that quote themselves, at any distance (`packing.quote_themselves`).
    """

    window: PositiveInt
    reach: PositiveInt
    pack: bool
    attention: Literal["sdpa", "s2"]
    steps: PositiveInt
    sequences_per_step: PositiveInt
    sequences_at_once: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    gradient_clipping: PositiveFloat
    techniques: Techniques
    long_document_weight: PositiveFloat
    self_quoting_share: Annotated[float, Field(ge=0, le=1)]
    checkpoint_every: PositiveInt
    seed: NonNegativeInt

    def __post_init__(self) -> None:
        if self.reach < self.window:
            raise ValueError(f"reach = {self.reach} must be at least window = {self.window}")
        if self.pack and (self.reach > self.window or self.attention == "s2"):
            raise ValueError("skipped positions (reach > window) and s2 attention need pack = false")
        if self.sequences_per_step % self.sequences_at_once:
            raise ValueError(
                f"sequences_per_step = {self.sequences_per_step} must be a multiple of "
                f"sequences_at_once = {self.sequences_at_once}"
            )


def draw_sequences(
    documents: list[TokenizedDocument], settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase
) -> list[TrainingSequence]:
    """The sequences that a training run reads, in order: cut, packed, quoting themselves and skipped as set."""
    sequences = training_sequences(
        documents,
        settings.window,
        settings.steps * settings.sequences_per_step,
        padding_id=tokenizer.eos_token_id,
        bos_id=tokenizer.bos_token_id,
        seed=settings.seed,
        long_document_weight=settings.long_document_weight,
        pack=settings.pack,
    )
    sequences = quote_themselves(sequences, settings.self_quoting_share, seed=settings.seed)
    return skip_positions(sequences, settings.reach, seed=settings.seed)


Forward = Callable[[torch.Tensor], torch.Tensor]


class _Recompute(torch.autograd.Function):
    """Identity that keeps its input; its backward pass takes the gradient of the *result* of `forward_of_tile`.

    `_Compute` behind it lets that gradient through. So the input is saved before the result is computed, and when a
    checkpointed layer is recomputed, torch stops right there: no tile is computed a third time.
    """

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, forward_of_tile: Forward, tile: int) -> torch.Tensor:
        context.save_for_backward(hidden)
        context.forward_of_tile, context.tile = forward_of_tile, tile
        device = hidden.device.type
        context.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (hidden,) = context.saved_tensors
        of_input = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        device, dtype, enabled = context.autocast
        rows = zip(*(_tokens(tensor).split(context.tile) for tensor in (hidden, gradient, of_input)), strict=True)
        for tile, of_result, of_tile in rows:
            tile = tile.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                result = context.forward_of_tile(tile)
            torch.autograd.backward(result, of_result)
            of_tile.copy_(tile.grad)
        return of_input, None, None


class _Compute(torch.autograd.Function):
    """`forward_of_tile` on tile after tile, nothing saved; gradients pass to `_Recompute` as they are."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, forward_of_tile: Forward, tile: int) -> torch.Tensor:
        output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        for of_tile, result in zip(_tokens(hidden).split(tile), _tokens(output).split(tile), strict=True):
            result.copy_(forward_of_tile(of_tile))
        return output

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


def _tokens(hidden: torch.Tensor) -> torch.Tensor:
    """Shape (batch, length, width) -> (batch * length, width).

    A tile of this is multiplied as it is; of a slice of three dimensions torch makes a batch, and copies the weight.
    """
    return hidden.reshape(-1, hidden.shape[-1])


def apply_techniques(model: PreTrainedModel | PeftModel, techniques: Techniques) -> None:
    """Switch recomputation and tiling on in a model; the optimizer and offloading are the training loop's."""
    if techniques.recomputed_layers:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # The last layers are the ones to spare: their activations are freed first in the backward pass.
        for layer in causal_lm(model).model.layers[techniques.recomputed_layers :]:
            layer.gradient_checkpointing = False
    tile_over_sequence(model, techniques.tile)


def tile_over_sequence(model: PreTrainedModel | PeftModel, tile: int) -> None:
    """Let every MLP and every norm in the layers work on `tile` tokens at a time, in both directions.

    They map each token by itself, so nothing changes but the memory: activations of one tile live instead of a
    whole sequence's, the MLP's being 2.7 times as wide as the model. Each tile is computed forward twice, as often as
    with checkpointing alone.

    Args:
        tile: tokens; 0 leaves the model as it is.
    """
    if not tile:
        return
    for layer in (module for module in model.modules() if hasattr(module, "mlp") and hasattr(module, "self_attn")):
        for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            module.forward = _tiled(module.forward, tile)


def _tiled(forward: Forward, tile: int) -> Forward:
    def run(hidden: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or hidden[..., 0].numel() <= tile:
            return forward(hidden)
        if not hidden.requires_grad:  # nothing before it trains, but something in it may
            hidden = hidden.detach().requires_grad_()
        return _Compute.apply(_Recompute.apply(hidden, forward, tile), forward, tile)

    return run


class OffloadedCheckpoints(saved_tensors_hooks):
    """Inside it, the hidden states that checkpointing keeps wait in pinned host memory instead of on the GPU.

    Copies are queued behind the layer that made them, on the same stream: the host does not wait for them, the next
    layer does. torch's `save_on_cpu` moves everything that is saved, the rotary tables once per layer too. On a CPU
    there is nowhere to go, and nothing is copied; on a GPU it was not run yet.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(self.to_host, self.to_device)
        self.hidden_size = hidden_size

    def is_checkpoint(self, tensor: torch.Tensor) -> bool:
        """Whether it has the shape of hidden states."""
        return tensor.ndim == 3 and tensor.shape[-1] == self.hidden_size

    def to_host(self, tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        """Called for every tensor that the forward pass saves."""
        if tensor.device.type == "cpu" or not self.is_checkpoint(tensor):
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def to_device(self, saved: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        """Called when the backward pass needs it."""
        device, tensor = saved
        return tensor.to(device, non_blocking=True)


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
    apply_techniques(model, settings.techniques)
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
        optim=settings.techniques.optimizer,
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
    trainer = ChunkedLossTrainer(model=model, args=arguments, train_dataset=SequenceDataset(sequences))
    trainer.remove_callback(PrinterCallback)
    trainer.report_every, trainer.offload_checkpoints = report_every, settings.techniques.offload_checkpoints
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


def run_fingerprint(settings: TrainingSettings, sequences: list[TrainingSequence], **other: Any) -> str:
    """Eight hexadecimal digits that name a run: the same code, settings, data and `other` give the same."""
    key = hashlib.sha256(json.dumps({"settings": asdict(settings), **other}, sort_keys=True).encode())
    for module in ("training", "loss"):
        key.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    for sequence in sequences:
        for array in (sequence.input_ids, sequence.labels, sequence.position_ids):
            key.update(array.tobytes())
    return key.hexdigest()[:8]


def headless() -> bool:
    """Whether nobody watches: only a kernel that Jupyter's server started shows progress bars."""
    return "JPY_SESSION_NAME" not in os.environ


def peak_memory_gib() -> float:
    """Highest memory so far: allocated on the GPU if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks: a training step allocates the same ones again.

    Without it, each step returns them to the kernel and pays for the page faults. Does nothing with
    another C library, or on a GPU (where torch has its own allocator).
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # from malloc.h
    if _glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def give_back_gaps(model: PreTrainedModel | PeftModel, limit_gib: float = GAPS_GIB) -> list[RemovableHandle]:
    """After each decoder layer, give free memory back to the kernel if more than `limit_gib` of it is resident.

    glibc aligns torch's blocks and rarely finds the old place again for a new one: without this, gaps of several times
    what a step needs stay resident. Each return costs page faults, a lower limit more of them.

    Returns:
        The hooks that do it, to be removed when training is over; none with another C library or on a GPU.
    """
    if not _glibc():
        return []
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallocInfo
    page = os.sysconf("SC_PAGE_SIZE")

    def gaps() -> int:
        """Resident bytes that are not in allocated blocks: those of libraries, and free ones."""
        allocated = libc.mallinfo2()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        return resident - allocated.uordblks - allocated.hblkhd

    most = gaps() + limit_gib * 2**30

    def check(*_arguments: Any) -> None:
        if gaps() > most:
            libc.malloc_trim(0)

    def after(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        check()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(check)  # before the layer's backward pass

    return [layer.register_forward_hook(after) for layer in causal_lm(model).model.layers]


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc" and not torch.cuda.is_available()
