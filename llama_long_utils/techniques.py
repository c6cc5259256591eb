"""What makes a training step smaller without changing its gradients: tiling over the sequence, and offloading.

Gradient checkpointing is transformers' own, the chunked loss is torch's (`loss.py`). Both techniques here
build on checkpointing per layer: they shrink what is left, the recomputation of one layer and the checkpoints.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

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
        of_input = torch.empty_like(hidden)
        device, dtype, enabled = context.autocast
        for start in range(0, hidden.shape[1], context.tile):
            part = slice(start, start + context.tile)
            tile = hidden[:, part].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                result = context.forward_of_tile(tile)
            torch.autograd.backward(result, gradient[:, part])
            of_input[:, part] = tile.grad
        return of_input, None, None


class _Compute(torch.autograd.Function):
    """`forward_of_tile` on tile after tile, nothing saved; gradients pass to `_Recompute` as they are."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, forward_of_tile: Forward, tile: int) -> torch.Tensor:
        output = torch.empty_like(hidden)
        for start in range(0, hidden.shape[1], tile):
            part = slice(start, start + tile)
            output[:, part] = forward_of_tile(hidden[:, part])
        return output

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


def tile_over_sequence(model: PreTrainedModel | PeftModel, tile: int) -> None:
    """Let every MLP and every norm in the layers work on `tile` tokens at a time, in both directions.

    They map each token by itself, so nothing changes but the memory: activations of one tile live instead of a
    whole sequence's, the MLP's being 2.7 times as wide as the model. Recomputation costs what checkpointing costs.
    DeepSpeed's tiled MLP does the same, but recomputes each tile twice inside a checkpointed layer.

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
        if not torch.is_grad_enabled() or hidden.shape[1] <= tile:
            return forward(hidden)
        if not hidden.requires_grad:  # nothing before it trains, but something in it may
            hidden = hidden.detach().requires_grad_()
        return _Compute.apply(_Recompute.apply(hidden, forward, tile), forward, tile)

    return run


class OffloadedCheckpoints(saved_tensors_hooks):
    """Inside it, the hidden states that checkpointing keeps wait in pinned host memory instead of on the GPU.

    Copies are queued behind the layer that made them and do not wait: at 25 GB/s a checkpoint of Llama 2 7B at
    32,768 tokens takes 11 ms, its layer a hundred times that. torch's `save_on_cpu` would wait for each copy, and
    move the rotary tables once per layer too. On a CPU there is nowhere to go, and nothing is copied.
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
