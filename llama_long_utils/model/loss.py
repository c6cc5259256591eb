"""Cross-entropy from hidden states: the length x vocabulary logits never exist at once.

`patch_loss` puts it into a model's forward, so that every wrapper (PEFT, DDP, FSDP, Trainer, TRL) sees it. torch's own
`linear_cross_entropy` does the same, but its result has the dtype of its arguments: to sum over 32,768 tokens it needs
hidden states and head in fp32, a copy of 0.5 GiB for Llama 2 7B and products outside of the GPU's fast bf16 units.
TRL's chunked loss computes each product twice, which ours does for a trained head only. Here products are in the
head's dtype; softmax, sums and a trained head's gradient in fp32.
"""

import functools
import inspect
import types
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llama_long_utils.settings import IGNORED_LABEL

Model = PreTrainedModel | PeftModel
CHUNK = 512  # tokens whose logits exist at the same time: 65 MB for Llama 2's 32,000 tokens
CACHED = 2**22  # logits at the same time in bf16 on a CPU: more leave its caches (128,256 a token: 0.94 s, not 0.71)
LEFT_OUT = ("past_key_values", "use_cache", "logits_to_keep", "return_dict")  # of a forward pass for its loss
SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # configs whose logits are no plain product


def causal_lm(model: Model) -> PreTrainedModel:
    """The transformers model inside, with or without adapters (adapters live in its layers)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def in_compute_dtype(model: Model) -> AbstractContextManager:
    """bf16 autocast if the base is bf16 (LoRA matrices and trained norms are fp32 beside it), else nothing."""
    weight = next(causal_lm(model).parameters())  # the embedding's own, which comes before a copy that is trained
    return torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=weight.dtype == torch.bfloat16)


def compute_in_base_dtype(model: Model) -> None:
    """Let the decoder do what `in_compute_dtype` does, whoever calls it: TRL's fused head and `generate` do not."""
    decoder = causal_lm(model).model
    forward = decoder.forward

    @functools.wraps(forward)
    def run(*arguments: Any, **options: Any) -> Any:
        with in_compute_dtype(model):
            return forward(*arguments, **options)

    decoder.forward = run


def hidden_states(
    model: Model,
    input_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Last hidden states, shape (batch, length, hidden), under bf16 autocast if the weights are bf16.

    Args:
        input_ids, position_ids, attention_mask: shape (batch, length). Without a mask, a jump in the positions starts a
            new document that cannot see the one before it; pass all ones if positions jump inside one document.
        options: others of the decoder's, for example `inputs_embeds`.
    """
    options |= {"position_ids": position_ids, "attention_mask": attention_mask, "use_cache": False}
    with in_compute_dtype(model):
        return causal_lm(model).model(input_ids=input_ids, **options).last_hidden_state


def patch_loss(model: Model) -> None:
    """Let `model(input_ids, labels=labels)` return its loss without logits; without labels nothing changes.

    The forward pass then takes, besides transformers' own arguments:
        labels: shape (batch, length), not shifted; -100 counts nothing.
        shift_labels: instead of `labels`: those that are shifted already (where a sequence is spread over processes).
        num_items_in_batch: what the sum is divided by (`Trainer` passes the labels of the whole accumulated batch);
            without it, the labels of this call.

    Raises:
        ValueError: the head is not a plain linear layer (LoRA on it, a bias, 4 bits) or its logits are scaled.
    """
    inner = causal_lm(model)
    head, config = inner.get_output_embeddings(), inner.config
    plain = isinstance(head, nn.Linear) and head.bias is None and head.weight.shape[0] == head.out_features
    if not plain or any(getattr(config, name, None) for name in SCALED):
        raise ValueError(f"the chunked loss needs logits that are hidden states times a weight, not of {head}")
    plain_forward = type(inner).forward
    names = list(inspect.signature(plain_forward).parameters)

    @functools.wraps(plain_forward)
    def forward(
        self: PreTrainedModel,
        *arguments: Any,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **options: Any,
    ) -> Any:
        if labels is None and shift_labels is None:
            return plain_forward(self, *arguments, **options)
        options |= zip(names[1:], arguments, strict=False)  # names[0] is self
        hidden = hidden_states(self, **{name: value for name, value in options.items() if name not in LEFT_OUT})
        labels = _shifted(labels) if shift_labels is None else shift_labels
        nll = labelled_nll(hidden, self.get_output_embeddings(), labels)
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORED_LABEL).sum().clamp(min=1)
        return CausalLMOutputWithPast(loss=nll.sum() / torch.as_tensor(num_items_in_batch, device=nll.device))

    inner.forward = types.MethodType(forward, inner)  # a copied model gets a bound copy


def next_token_nll(
    hidden: torch.Tensor, head: nn.Linear, labels: torch.Tensor, *, reduction: str = "sum", chunk: int = 0
) -> torch.Tensor:
    """Negative log-likelihood of each next token, in nats, in fp32, from hidden states (batch, length, hidden).

    Labels have shape (batch, length) and are not shifted; positions with label -100 count nothing. The sum, or with
    `reduction` "none" shape (batch, length - 1), 0 where no label counts.
    """
    nll = labelled_nll(hidden, head, _shifted(labels), chunk=chunk)
    return nll.sum() if reduction == "sum" else nll[:, :-1]


def labelled_nll(hidden: torch.Tensor, head: nn.Linear, labels: torch.Tensor, *, chunk: int = 0) -> torch.Tensor:
    """Nats of each label, shape (batch, length), fp32, where hidden[b, t] predicts labels[b, t]; 0 where it is -100.

    `chunk`: tokens whose logits exist at the same time; 0: as many as suit the device.
    """
    flat = hidden.reshape(-1, hidden.shape[-1]).to(head.weight.dtype)
    labels = labels.reshape(-1).to(hidden.device)
    # The ledger's fake tensors have no data to tell by, so there all labels count.
    fake = isinstance(labels, FakeTensor)
    cached = head.weight.dtype == torch.bfloat16 and not fake and not labels.is_cuda  # in fp32 CHUNK is faster
    chunk, block = chunk or CHUNK, max(1, CACHED // len(head.weight)) if cached else chunk or CHUNK
    counted = torch.arange(len(labels)) if fake else (labels != IGNORED_LABEL).nonzero()[:, 0]
    nll = _ChunkedNLL.apply(flat, head.weight, labels, counted, chunk, block, torch.is_grad_enabled())
    return nll.reshape(hidden.shape[:2])


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """The label of each position's next token; the last has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


class _ChunkedNLL(torch.autograd.Function):
    """Only labels that count are multiplied. The gradient of the hidden states is made in the forward pass, while a
    chunk's softmax is there: no product is computed twice, unless the head trains as well."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        counted: torch.Tensor,
        chunk: int,
        block: int,
        with_gradient: bool,
    ) -> torch.Tensor:
        ctx.chunk, at_once = chunk, with_gradient and hidden.requires_grad and not weight.requires_grad
        ctx.grad_hidden = torch.zeros_like(hidden) if at_once else None
        if with_gradient and weight.requires_grad:
            ctx.save_for_backward(hidden, weight, labels, counted)
        nll = torch.zeros(len(labels), dtype=torch.float32, device=hidden.device)
        for rows in counted.split(chunk):
            product = hidden[rows] @ weight.T
            for part, own in zip(product.split(block), rows.split(block), strict=True):
                logits = part.float()
                logits -= logits.amax(dim=1, keepdim=True)
                of_label = logits.gather(1, labels[own, None])
                total = logits.exp_().sum(dim=1, keepdim=True)
                nll[own] = (total.log() - of_label)[:, 0]
                if at_once:
                    logits /= total  # now the probabilities, and then the gradient with respect to the logits
                    part.copy_(logits.scatter_add_(1, labels[own, None], torch.full_like(of_label, -1.0)))
            if at_once:
                ctx.grad_hidden[rows] = product @ weight
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grad_hidden is not None:
            made, ctx.grad_hidden = ctx.grad_hidden, None  # scaled in place, so once only
            return made.mul_(grad_nll[:, None]), *[None] * 6
        if not ctx.saved_tensors:
            raise RuntimeError("the chunked loss has one backward pass: compute it again for another")
        hidden, weight, labels, counted = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in counted.split(ctx.chunk):
            grad_logits = (hidden[rows] @ weight.T).float().softmax(dim=1)
            grad_logits.scatter_add_(1, labels[rows, None], grad_logits.new_full((len(rows), 1), -1.0))
            grad_logits = (grad_logits * grad_nll[rows, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            grad_weight += (grad_logits.T @ hidden[rows]).float()
        return grad_hidden, grad_weight.to(weight.dtype), *[None] * 5
