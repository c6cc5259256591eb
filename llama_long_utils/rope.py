"""Rotary position embeddings (RoPE): the numbers that decide how far a model can look.

Notation: d is the head dimension, b the base. Pair j of the d/2 pairs turns by the angle
inv_freq[j] = b ** (-2j / d) radians per token (RoFormer, arXiv:2104.09864, section 3.2.2).
"""

import math

import torch


def inverse_frequencies(head_dim: int, base: float) -> torch.Tensor:
    """Angle per token of each pair: fp32 tensor of shape (head_dim / 2,), in radians, falling from 1."""
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def wavelengths(inv_freq: torch.Tensor) -> torch.Tensor:
    """Tokens that each pair needs for one full turn, same shape as `inv_freq`."""
    return 2 * math.pi / inv_freq


def attention_score(inv_freq: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Attention score of two all-ones vectors at a distance, scaled by 1/sqrt(d).

    The curve of Figure 4 of Llama 2 Long (arXiv:2309.16039):
    s(D) = (1 / sqrt(d)) * sum_j 2 cos(inv_freq[j] * D).

    Args:
        inv_freq: shape (d/2,).
        distance: shape (n,), in tokens.

    Returns:
        Scores of shape (n,), computed in float64.
    """
    angles = distance[:, None].double() * inv_freq[None, :].double()
    return 2 * angles.cos().sum(dim=1) / math.sqrt(2 * len(inv_freq))


def rope_parameters(base: float) -> dict[str, str | float]:
    """The whole dictionary that `from_pretrained(rope_parameters=...)` takes for plain RoPE.

    It must be given at load: set on the config of a built model it changes nothing.
    """
    return {"rope_type": "default", "rope_theta": float(base)}
