"""Less memory with the same gradients: recomputed layers, tiles over the sequence, checkpoints on the host."""

import weakref
from collections.abc import Callable
from contextlib import ContextDecorator, suppress
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from llama_long_utils.model.loss import Model, causal_lm
from llama_long_utils.settings import MemorySavings

Forward = Callable[[torch.Tensor], torch.Tensor]
READING = MemorySavings(0, tile=2**15, offload_checkpoints=False, optimizer="adamw_torch_fused")  # nothing is trained


class _Recompute(torch.autograd.Function):
    """Identity that keeps its input; its backward pass takes the gradient of the *result* of `forward_of_tile`.

    `_Compute` lets that gradient through. As the input is saved before the result is computed, torch stops there when
    it recomputes a checkpointed layer: no tile is computed a third time. The weights in `trained` get their gradients
    once, as sums over the tiles, because DDP sends each the first time that it is there.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, forward_of_tile: Forward, tile: int, *trained: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        ctx.forward_of_tile, ctx.tile, ctx.trained = forward_of_tile, tile, trained
        device = hidden.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        totals: list[torch.Tensor | None] = [None] * len(ctx.trained)
        device, dtype, enabled = ctx.autocast
        rows = zip(*(_tokens(tensor).split(ctx.tile) for tensor in (hidden, grad_output, grad_hidden)), strict=True)
        for tile, grad_result, grad_tile in rows:
            tile = tile.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                result = ctx.forward_of_tile(tile)
            found = torch.autograd.grad(result, [tile, *ctx.trained], grad_result, allow_unused=True)
            grad_tile.copy_(found[0])
            for place, part in enumerate(found[1:]):
                totals[place] = part if totals[place] is None else totals[place].add_(part)
        return grad_hidden, None, None, *totals


class _Compute(torch.autograd.Function):
    """`forward_of_tile` on tile after tile, nothing saved; gradients pass to `_Recompute` as they are."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, forward_of_tile: Forward, tile: int) -> torch.Tensor:
        output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        for inputs, result in zip(_tokens(hidden).split(tile), _tokens(output).split(tile), strict=True):
            result.copy_(forward_of_tile(inputs))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad_output, None, None


def _tokens(hidden: torch.Tensor) -> torch.Tensor:
    """(batch, length, width) -> (batch * length, width): of a slice of three dimensions torch would copy the weight."""
    return hidden.reshape(-1, hidden.shape[-1])


def apply_memory_savings(model: Model, memory_savings: MemorySavings) -> None:
    """Switch recomputation and tiling on in a model, and off if another call switched them on.

    Tiles are for every MLP and every norm in the layers, in both directions. These map each token by itself, so nothing
    changes but the memory: activations of one tile live instead of a whole sequence's. Each tile is computed forward
    twice, as often as with checkpointing alone.
    """
    model.activation_checkpointing_disable()
    if memory_savings.recomputed_layers:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # The last layers are the ones to spare: their activations are freed first in the backward pass.
        for layer in causal_lm(model).model.layers[memory_savings.recomputed_layers :]:
            layer.gradient_checkpointing = False
    for module in model.modules():
        if "plain_forward" in vars(module):
            module.forward = vars(module).pop("plain_forward")
    for layer in (module for module in model.modules() if hasattr(module, "mlp") and hasattr(module, "self_attn")):
        for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            if memory_savings.tile:
                module.plain_forward, module.tile = module.forward, memory_savings.tile
                module.forward = MethodType(_in_tiles, module)


def _in_tiles(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """A method, bound anew when a module is copied: PEFT trains a copy of a norm, which must run its own weight."""
    forward, tile = module.plain_forward, module.tile
    if hidden[..., 0].numel() <= tile:
        return forward(hidden)
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    return _Compute.apply(_Recompute.apply(hidden, forward, tile, *trained), forward, tile)


class OffloadedCheckpoints(saved_tensors_hooks, ContextDecorator):
    """Inside it, the hidden states that checkpointing keeps wait in pinned host memory instead of on the GPU.

    Copies are queued behind the layer that made them, on the same stream: the host does not wait for them, the next
    layer does. transformers' own offloading waits for each, and allocates each anew, in torch's pinned memory, which
    rounds 1.08 GiB (141,312 tokens of Llama 2 7B) up to 2. Copies go to `buffers`, by default pinned memory; then
    nothing is copied from a CPU.
    """

    def __init__(self, hidden_size: int, buffers: "HostBuffers | None" = None) -> None:
        super().__init__(self.to_host, self.to_device)
        self.hidden_size, self.buffers = hidden_size, buffers

    def is_checkpoint(self, tensor: torch.Tensor) -> bool:
        """Whether it has the shape of hidden states."""
        return tensor.ndim == 3 and tensor.shape[-1] == self.hidden_size

    def to_host(self, tensor: torch.Tensor) -> Any:
        """Called for every tensor that the forward pass saves."""
        if not self.is_checkpoint(tensor) or (tensor.device.type == "cpu" and not self.buffers):
            return tensor
        return HostCopy(tensor, self.buffers or PINNED)

    def to_device(self, saved: Any) -> torch.Tensor:
        """Called when the backward pass needs it."""
        return saved.host.to(saved.device, non_blocking=True) if isinstance(saved, HostCopy) else saved


class HostBuffers:
    """Host memory that is allocated once and reused: a buffer is free again when autograd drops its copy.

    By then the backward pass, queued on the same stream as the next copy into the buffer, comes before it.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self.allocate = allocate
        self.free: list[torch.Tensor] = []
        self.least = 0  # bytes of each: those of the longest sequence, so that shorter ones need no others

    def take(self, nbytes: int) -> torch.Tensor:
        """At least so many bytes, in one dimension."""
        fits = [(buffer.nbytes, place) for place, buffer in enumerate(self.free) if buffer.nbytes >= nbytes]
        return self.free.pop(min(fits)[1]) if fits else self.allocate(max(nbytes, self.least))


class HostCopy:
    """A tensor's copy in a buffer."""

    def __init__(self, tensor: torch.Tensor, buffers: HostBuffers) -> None:
        buffer, self.device = buffers.take(tensor.nbytes), tensor.device
        self.host = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
        weakref.finalize(self, buffers.free.append, buffer)


def _page_locked(nbytes: int) -> torch.Tensor:
    """Memory that all threads touch and CUDA then locks: several times faster than torch's pinning on one thread."""
    buffer = torch.empty(nbytes, dtype=torch.uint8).zero_()
    if succeeded(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), nbytes, 0)):
        return buffer
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)  # some containers forbid the other way


def succeeded(error: Any) -> bool:
    """Whether a call of CUDA did; CUDA keeps an error for the next kernel to report, so a small one takes it here."""
    if int(error):
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")
    return not int(error)


PINNED = HostBuffers(_page_locked)


def offload_checkpoints(model: Model, tokens: int) -> None:
    """Let every forward pass of the decoder leave its checkpoints, of at most so many tokens, on the host."""
    decoder = causal_lm(model).model
    PINNED.least = tokens * decoder.config.hidden_size * decoder.dtype.itemsize
    decoder.forward = OffloadedCheckpoints(decoder.config.hidden_size)(decoder.forward)
