"""Less memory with the same gradients: recomputed layers, tiles over the sequence, checkpoints on the host."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from llama_long_utils.model.loss import causal_lm
from llama_long_utils.settings import MemorySavings

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


def apply_memory_savings(model: PreTrainedModel | PeftModel, memory_savings: MemorySavings) -> None:
    """Switch recomputation and tiling on in a model; the optimizer and offloading are the training loop's."""
    if memory_savings.recomputed_layers:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # The last layers are the ones to spare: their activations are freed first in the backward pass.
        for layer in causal_lm(model).model.layers[memory_savings.recomputed_layers :]:
            layer.gradient_checkpointing = False
    tile_over_sequence(model, memory_savings.tile)


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
