"""Cross-entropy from hidden states: the length x vocabulary logits never exist at once.

torch's own `linear_cross_entropy` does the same, but its result has the dtype of its arguments: to sum over
32,768 tokens it needs hidden states and head in fp32, a copy of 0.5 GiB for Llama 2 7B and products outside of
the GPU's fast bf16 units. Here products are in the head's dtype; softmax, sums and a trained head's gradient in fp32.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from llama_long_utils.settings import IGNORED_LABEL

CHUNK = 512  # tokens whose logits exist at the same time: 65 MB for Llama 2's 32,000 tokens


def causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside, with or without adapters (adapters live in its layers)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def in_compute_dtype(model: PreTrainedModel | PeftModel) -> AbstractContextManager:
    """bf16 autocast if the base is bf16 (LoRA matrices and trained norms are fp32 beside it), else nothing."""
    weight = causal_lm(model).get_output_embeddings().weight
    return torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=weight.dtype == torch.bfloat16)


def hidden_states(
    model: PreTrainedModel | PeftModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Last hidden states, shape (batch, length, hidden), under bf16 autocast if the weights are bf16.

    Args:
        input_ids: shape (batch, length).
        position_ids: shape (batch, length). With `attention_mask=None`, a jump in the positions
            starts a new document that cannot see the one before it.
        attention_mask: shape (batch, length). Pass all ones if positions jump inside one document.
    """
    with in_compute_dtype(model):
        output = causal_lm(model).model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        )
    return output.last_hidden_state


def next_token_nll(
    hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, *, reduction: str = "sum", chunk: int = CHUNK
) -> torch.Tensor:
    """Negative log-likelihood of each next token, in nats, in fp32.

    Args:
        hidden: shape (batch, length, hidden).
        head: the linear map to the vocabulary, without bias.
        labels: shape (batch, length), not shifted; positions with label -100 count nothing.
        reduction: "sum" for a scalar (0 if no label counts), "none" for shape (batch, length - 1), without gradient.
        chunk: tokens whose logits exist at the same time.
    """
    batch, length, width = hidden.shape
    weight = head.weight
    flat = hidden[:, :-1].reshape(-1, width).to(weight.dtype)
    if reduction == "none" or not torch.is_grad_enabled():
        flat, weight = flat.detach(), weight.detach()
    nll, total = _ChunkedNLL.apply(flat, weight, labels[:, 1:].reshape(-1), chunk)
    return total if reduction == "sum" else nll.reshape(batch, length - 1)


class _ChunkedNLL(torch.autograd.Function):
    """Gradients are made in the forward pass, while a chunk's softmax is there: no product is computed twice."""

    @staticmethod
    def forward(
        context: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        nll = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            counts = labels[part] != IGNORED_LABEL
            label = labels[part].clamp(min=0)[:, None]
            logits = (hidden[part] @ weight.T).float()
            highest = logits.amax(dim=1, keepdim=True)
            logits -= highest
            of_label = logits.gather(1, label)
            total = logits.exp_().sum(dim=1, keepdim=True)
            nll[part] = (total.log() - of_label)[:, 0].where(counts, 0.0)
            if of_hidden is None and of_weight is None:
                continue
            logits /= total  # now the probabilities, and then the gradient with respect to the logits
            logits.scatter_add_(1, label, torch.full_like(of_label, -1.0))
            logits *= counts[:, None]
            of_logits = logits.to(weight.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[part])
            if of_weight is not None:
                of_weight += (of_logits.T @ hidden[part]).float()
        context.mark_non_differentiable(nll)
        context.gradients = of_hidden, of_weight, weight.dtype
        return nll, nll.sum()

    @staticmethod
    def backward(
        context: Any, _of_nll: torch.Tensor, of_total: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        of_hidden, of_weight, dtype = context.gradients
        if of_hidden is not None:
            of_hidden = of_hidden.mul_(of_total.to(of_hidden.dtype))
        if of_weight is not None:
            of_weight = of_weight.mul_(of_total).to(dtype)
        return of_hidden, of_weight, None, None
