"""Seconds of a training step before it is run: operation by operation, what limits it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

from llama_long_utils.settings import Lora
from llama_long_utils.training.planner import step_flops
from llama_long_utils.training.random_llama import StepShape, random_llama, training_steps

INTENSITY = 20  # operations per byte, above which a matrix product counts as computing
# Attention and the products with 4-bit weights are counted by their operations, and `empty` moves nothing.
ELSEWHERE = ("scaled_dot_product", "gemm_4bit", "aten::empty")
WARM_UP = 16  # tokens of a first step, which makes the optimizer's state


@dataclass(frozen=True)
class Rates:
    """What a machine does per second: operations in large matrix products and in attention, bytes read and written."""

    products: float
    attention: float
    bandwidth: float


def step_seconds(config: LlamaConfig, lora: Lora, shape: StepShape, rates: Rates) -> dict[str, float]:
    """Predicted seconds of a training step, by what they go to: a roofline, operation by operation.

    The adapters' products are too thin to compute much, up to rank 20 or so: their time is in "memory", with that of
    all other operations.
    """
    flops = step_flops(config, lora, shape.length, shape.memory_savings)
    return {
        "products": shape.sequences * (flops["linear"] + flops["head"]) / rates.products,
        "attention": shape.sequences * flops["attention"] / rates.attention,
        "memory": moved_bytes(config, lora, shape) / rates.bandwidth,
    }


def moved_bytes(config: LlamaConfig, lora: Lora, shape: StepShape) -> int:
    """Bytes that the operations of a step read and write, but for attention and large matrix products."""
    counter = MovedBytes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = random_llama(config, lora, shape.dtype)
        with counter:
            for _loss in training_steps(model, shape, [WARM_UP, shape.length], entering=counter.enter):
                pass
    return counter.moved


class MovedBytes(TorchDispatchMode):
    """Adds up the bytes that operations read and write which compute little: their time is that of the memory."""

    moved = 0

    def enter(self, component: str) -> None:
        """A new step starts with "saved"."""
        if component == "saved":
            self.moved = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        output = operator(*arguments, **options)
        if operator is torch.ops.prim.device.default or any(name in operator.name() for name in ELSEWHERE):
            return output
        made, read = (list(filter(torch.is_tensor, tree_leaves(values))) for values in (output, [arguments, options]))
        known = {tensor.untyped_storage()._cdata for tensor in read}
        is_new = any(tensor.untyped_storage()._cdata not in known for tensor in made)
        if is_new or operator._schema.is_mutable:
            if operator is torch.ops.aten.copy_.default:
                read = read[1:]  # what is overwritten is not read
            moved = sum(tensor.nbytes for tensor in read + made)
            count = flop_registry.get(operator.overloadpacket)
            if not count or count(*arguments, **options, out_val=output) < INTENSITY * moved:
                self.moved += moved
        return output
