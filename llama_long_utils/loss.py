"""Cross-entropy from hidden states: the length x vocabulary logits never exist at once.

The chunking is torch's own `linear_cross_entropy`. It runs in fp32 here, because its bf16 result
would be a bf16 number: a sum over 32,768 tokens with three significant digits.
"""

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from llama_long_utils.packing import IGNORED_LABEL


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
    hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, *, reduction: str = "sum", chunk: int = 1024
) -> torch.Tensor:
    """Negative log-likelihood of each next token, in nats.

    Args:
        hidden: shape (batch, length, hidden).
        head: the linear map to the vocabulary, without bias.
        labels: shape (batch, length), not shifted; positions with label -100 count nothing.
        reduction: "sum" for a scalar (0 if no label counts), "none" for shape (batch, length - 1).
        chunk: tokens whose logits exist at the same time.
    """
    batch, length, width = hidden.shape
    nll = F.linear_cross_entropy(
        hidden[:, :-1].reshape(-1, width).float(),
        head.weight.float(),
        labels[:, 1:].reshape(-1),
        reduction=reduction,
        ignore_index=IGNORED_LABEL,
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, acc_policy="balanced"),
    )
    return nll if reduction == "sum" else nll.reshape(batch, length - 1)
