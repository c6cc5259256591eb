"""What must be right on a GPU before its steps are measured: NF4, gradients, optimizers, and attention's kernels."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig

from experiments.bench import MODULES, PLAIN
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.model.memory_savings import OffloadedCheckpoints, apply_memory_savings
from llama_long_utils.settings import Lora, MemorySavings
from llama_long_utils.training.planner import GIB
from llama_long_utils.training.random_llama import StepShape, random_llama, training_steps

Row = dict[str, Any]
EVERY = MemorySavings(recomputed_layers=4, tile=96, offload_checkpoints=True, optimizer="adamw_torch_fused")


class Machine:
    """The device that is measured, "cuda" or "cpu"; on a CPU nothing is known about memory."""

    def __init__(self, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU here: --device cpu --doll rehearses the command without one")
        self.device, self.on_gpu = device, device == "cuda"
        self.total_gib = torch.cuda.get_device_properties(0).total_memory / GIB if self.on_gpu else None

    def cap(self, gib: float | None) -> None:
        """No more than this for torch's allocator from now on; the CUDA context, some 0.5 GiB, is not in it."""
        if self.on_gpu:
            torch.cuda.set_per_process_memory_fraction(min(1.0, (gib or self.total_gib) / self.total_gib))

    def wait(self) -> None:
        """Until everything that was queued is done."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Give back what is cached, and count peaks anew."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> int:
        """Bytes of tensors now."""
        return torch.cuda.memory_allocated() if self.on_gpu else 0

    def peaks(self) -> dict[str, float | None]:
        """The most that tensors held, and that the allocator took for them, in GiB."""
        if not self.on_gpu:
            return {"allocated_gib": None, "reserved_gib": None}
        stats = {"allocated_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
        return {name: value / GIB for name, value in stats.items()}

    def product_rate(self) -> float:
        """FLOP/s of a product of large squares in bf16."""
        side = 8192 if self.on_gpu else 256
        left, right = torch.randn(2, side, side, device=self.device, dtype=torch.bfloat16).unbind()
        return 2 * side**3 / self.seconds(partial(torch.mm, left, right))

    def seconds(self, work: Callable[[], Any], times: int = 20) -> float:
        """Mean of so many calls behind three that load kernels."""
        for count in (3, times):
            self.wait()
            started = time.perf_counter()
            for _ in range(count):
                work()
            self.wait()
        return (time.perf_counter() - started) / times


def run_checks(machine: Machine) -> Iterator[Row]:
    """Rows with check, quantity and value."""
    for check in (nf4, gradients, optimizers):
        for quantity, value in check(machine).items():
            yield {"check": check.__name__, "quantity": quantity, "value": float(value)}


def small_model(machine: Machine, dtype: str) -> PeftModel:
    """Four layers whose adapters all have gradients."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    lora = Lora(rank=16, alpha=32, target_modules=MODULES, train_norms=False, train_embeddings=False)
    model = random_llama(config, lora, dtype, device=machine.device)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.02)
    return model.train()


def nf4(machine: Machine) -> dict[str, float]:
    """The rounding error of normal numbers, 0.09 to 0.10, and the tensors of a model that lie elsewhere."""
    weight = torch.randn(1024, 4096, device=machine.device, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    error = (dequantize_4bit(packed, state).float() - weight.float()).norm() / weight.float().norm()
    model = small_model(machine, "bfloat16")
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [one.quant_state.absmax for one in model.parameters() if hasattr(one, "quant_state")]
    return {"relative error": error.item(), "tensors elsewhere": sum(t.device.type != machine.device for t in tensors)}


def gradients(machine: Machine) -> dict[str, float]:
    """The largest relative difference of a gradient to the plain step's, of the plain step's itself computed again, of
    the chunked loss, and of every memory saving, twice, as the second time takes used buffers."""
    errors = {}
    for dtype in ("float32", "bfloat16"):
        model = small_model(machine, dtype)
        ids = torch.randint(2048, (1, 1000 if machine.on_gpu else 250), device=machine.device)
        plain = _gradients(model, ids, PLAIN, chunked=False)
        variants = {"again": (PLAIN, False), "chunked loss": (PLAIN, True), "savings": (EVERY, True)}
        for name, (savings, chunked) in {**variants, "savings, again": (EVERY, True)}.items():
            found = _gradients(model, ids, savings, chunked)
            worst = max((found[key] - plain[key]).norm() / plain[key].norm() for key in plain)
            errors[f"{dtype}, {name}"] = worst.item()
    return errors


def _gradients(model: PeftModel, ids: torch.Tensor, savings: MemorySavings, chunked: bool) -> dict[str, torch.Tensor]:
    apply_memory_savings(model, savings)
    head = causal_lm(model).get_output_embeddings()
    with OffloadedCheckpoints(head.weight.shape[1]) if savings.offload_checkpoints else nullcontext():
        hidden = hidden_states(model, ids)
    if chunked:
        loss = next_token_nll(hidden, head, ids, chunk=128) / ids.numel()
    else:
        logits = (hidden[0, :-1].to(head.weight.dtype) @ head.weight.T).float()
        loss = F.cross_entropy(logits, ids[0, 1:], reduction="sum") / ids.numel()
    loss.backward()
    found = {name: weight.grad.float() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    return found


def optimizers(machine: Machine) -> dict[str, float]:
    """The loss in a third step, the share of the trained tensors that moved, and what pages change: nothing."""
    found = {}
    for name in ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"):
        model = small_model(machine, "bfloat16")
        trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
        before = {key: weight.detach().clone() for key, weight in trained.items()}
        torch.manual_seed(0)
        shape = StepShape(256, "bfloat16", replace(PLAIN, optimizer=name))
        losses = [loss.item() for loss in training_steps(model, shape, [256] * 3)]
        moved = [not torch.equal(before[key], weight) for key, weight in trained.items()]
        found |= {f"{name}, loss": losses[-1], f"{name}, moved": sum(moved) / len(moved)}
    if machine.on_gpu:
        found["paged minus unpaged, 262,144 numbers"] = _pages_change()
    return found


def _pages_change() -> float:
    """The largest difference that pages make to a weight large enough to have them (100,000 numbers)."""
    results = []
    for kind in (AdamW8bit, PagedAdamW8bit):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(512, 512, device="cuda"))
        optimizer = kind([weight], lr=1e-2)
        for _ in range(3):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        results.append(weight.detach().clone())
    return (results[0] - results[1]).abs().max().item()


def kernels(machine: Machine) -> Iterator[Row]:
    """Causal attention by kernel, with 32 query heads and 32 or 8 of keys and values: speed, and memory when backward.

    Heads lie as a model's projections leave them. Bytes per token are those that the backward pass adds at its peak:
    three gradients and what the kernel needs besides.
    """
    length, width = (32_768, 128) if machine.on_gpu else (256, 16)
    choices: dict[str, Callable[[], AbstractContextManager]] = {
        "torch's choice": nullcontext,
        "flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        "cudnn": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    }
    for key_heads in (32, 8):
        for kernel, choose in choices.items() if machine.on_gpu else list(choices.items())[:1]:
            about = {"query_heads": 32, "key_value_heads": key_heads, "context": length, "kernel": kernel}
            yield {**about, **_attention(machine, choose, length, width, key_heads)}


def _attention(machine: Machine, choose: Callable, length: int, width: int, key_heads: int) -> Row:
    new = partial(torch.randn, device=machine.device, dtype=torch.bfloat16)
    heads = [new(1, length, count, width).transpose(1, 2).requires_grad_() for count in (32, key_heads, key_heads)]
    gradient = new(1, length, 32, width).transpose(1, 2)
    for _ in range(2):  # the first time loads kernels
        for head in heads:
            head.grad = None
        machine.forget()
        times = [time.perf_counter()]
        with choose():
            output = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=key_heads < 32)
            machine.wait()
            times.append(time.perf_counter())
            before = machine.allocated()
            output.backward(gradient)
            machine.wait()
            times.append(time.perf_counter())
    peak = torch.cuda.max_memory_allocated() - before if machine.on_gpu else 0
    flops = 2 * length**2 * 32 * width
    return {
        "node": type(output.grad_fn).__name__,
        "forward_tflops": flops / (times[1] - times[0]) / 1e12,
        "backward_tflops": 2.5 * flops / (times[2] - times[1]) / 1e12,
        "peak_bytes_per_token": peak / length,
    }
