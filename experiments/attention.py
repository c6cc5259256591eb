"""Attention that transformers does not have: importing this file lets `load_base` build "xpos" and "s2"."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llama_long_utils.model.base import XPOS

S2_GROUPS = 4  # LongLoRA's choice, arXiv:2309.12307, section 3.2


def xpos_decay(head_dim: int) -> torch.Tensor:
    """How much each pair's share of the score shrinks per original window of distance: shape (head_dim / 2,).

    zeta_j = (2j / d + 0.8) / 1.8. With Llama 2's window of 4,096 this gives the xPos ABF curve of Figure 4 of Llama 2
    Long, which prints no formula; the form is that of xPos (arXiv:2212.10554, section 3.2) with gamma = 0.8.
    """
    return (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim + 0.8) / 1.8


def attention_score(
    inv_freq: torch.Tensor, distance: torch.Tensor, decay: torch.Tensor | None = None, decay_window: int = 1
) -> torch.Tensor:
    """Attention score of two all-ones vectors at a distance, scaled by 1/sqrt(d).

    The curves of Figure 4 of Llama 2 Long (arXiv:2309.16039):
    s(D) = (1 / sqrt(d)) * sum_j 2 cos(inv_freq[j] * D) * decay[j] ** (D / decay_window).

    Shapes: inv_freq (d/2,), distance (n,) in tokens, decay (d/2,) from `xpos_decay`; scores (n,), in float64.
    """
    terms = 2 * (distance[:, None].double() * inv_freq[None, :].double()).cos()
    if decay is not None:
        terms = terms * decay.double() ** (distance[:, None].double() / decay_window)
    return terms.sum(dim=1) / math.sqrt(2 * len(inv_freq))


def xpos_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    position_ids: Tensor,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA on queries and keys (already rotated) that grow and shrink with position, as in xPos.

    The query at position m is multiplied by zeta ** (m / S), the key at n by zeta ** (-n / S), so the score of
    pair j carries zeta_j ** ((m - n) / S). S is the config's `xpos_window`.

    Shapes: query (batch, heads, length, head_dim), position_ids (batch or 1, length). Keys and values may have fewer
    heads, and more tokens if they come from a cache, which holds unscaled keys from position 0 on and no padding.
    """
    decay = xpos_decay(query.shape[-1]).to(query.device).log().repeat(2)  # pairs are split in halves
    cached = key.shape[2] > query.shape[2]
    key_positions = torch.arange(key.shape[2], device=key.device)[None] if cached else position_ids
    # Counted from the middle, so that neither side overflows in bf16; only differences matter.
    middle = position_ids.amax(dim=-1, keepdim=True) / 2

    def grown(states: Tensor, positions: Tensor, sign: int) -> Tensor:
        exponent = sign * ((positions - middle) / module.config.xpos_window)[:, None, :, None] * decay
        return states * exponent.exp().to(states.dtype)

    query, key = grown(query, position_ids, 1), grown(key, key_positions, -1)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def s2_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Shifted sparse attention (S2-Attn, LongLoRA): cheap, for training only; evaluate under full attention.

    Tokens attend within groups of a quarter of the length; in the second half of the heads the groups are shifted by
    half a group. The first and the last half group stay by themselves, while LongLoRA's wrap around and meet.

    Shapes: query (batch, heads, length, head_dim); keys and values may have fewer heads.

    Raises:
        ValueError: the length does not divide into groups, or the batch is packed or padded.
    """
    length = query.shape[2]
    if mask is not None:
        raise ValueError("S2 attention takes whole sequences only: no packing, no padding (packing.whole_pieces)")
    if length % (2 * S2_GROUPS):
        raise ValueError(f"S2 attention needs a length that is a multiple of {2 * S2_GROUPS}, got {length}")
    group, half_heads = length // S2_GROUPS, query.shape[1] // 2
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))

    def within(part: slice, heads: slice, size: int) -> Tensor:
        states = [states[:, heads, part].unflatten(2, (-1, size)) for states in (query, key, value)]
        return F.scaled_dot_product_attention(*states, is_causal=True, scale=scaling).flatten(2, 3)

    straight = within(slice(None), slice(half_heads), group)
    edge, shifted = group // 2, slice(half_heads, None)
    first = within(slice(edge), shifted, edge)
    middle = within(slice(edge, length - edge), shifted, group)
    last = within(slice(length - edge, None), shifted, edge)
    output = torch.cat([straight, torch.cat([first, middle, last], dim=2)], dim=1)
    return output.transpose(1, 2).contiguous(), None


for name, attention in ((XPOS, xpos_attention), ("s2", s2_attention)):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
