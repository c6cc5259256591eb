"""Rotary position embeddings (RoPE) and every common way to scale them to a longer window.

Notation: d is the head dimension, b the base. Pair j of the d/2 pairs turns by the angle
inv_freq[j] = b ** (-2j / d) radians per token (RoFormer, arXiv:2104.09864, section 3.2.2). A scaling
method changes these frequencies and, some of them, the temperature of the attention.

Training and evaluation use transformers' own implementation of each method (`Scaling.parameters`);
the functions here say what it computes, and `base.check_rope` compares the two on every load.
"""

import math
from collections.abc import Sequence

import torch

from llama_long_utils.settings import METHODS, Method, Scaling, ntk_base

__all__ = ["METHODS", "Method", "Scaling", "ntk_base"]  # the numbers of a scaling; here is what they do


def inverse_frequencies(head_dim: int, base: float) -> torch.Tensor:
    """Angle per token of each pair: fp32 tensor of shape (head_dim / 2,), in radians, falling from 1."""
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def wavelengths(inv_freq: torch.Tensor) -> torch.Tensor:
    """Tokens that each pair needs for one full turn, same shape as `inv_freq`."""
    return 2 * math.pi / inv_freq


def position_interpolation(inv_freq: torch.Tensor, factor: float) -> torch.Tensor:
    """PI (Chen et al., arXiv:2306.15595, equation 4): every position is divided by `factor`."""
    return inv_freq / factor


def dynamic_ntk_base(head_dim: int, base: float, factor: float, original_window: int, length: int) -> float:
    """The base of dynamic NTK for a text of `length` tokens (transformers' form); up to the window unchanged."""
    stretch = factor * max(length, original_window) / original_window - (factor - 1)
    return ntk_base(head_dim, base, stretch)


def ntk_by_parts(
    inv_freq: torch.Tensor, factor: float, original_window: int, slow: float = 1.0, fast: float = 4.0
) -> torch.Tensor:
    """NTK by parts (YaRN, arXiv:2309.00071, section 3.2), with the thresholds of Llama 3.1 (Meta's code).

    Pairs with over `fast` turns in the window stay, under `slow` are slowed. Between them frequencies are blended.
    """
    turns = original_window / wavelengths(inv_freq)
    keep = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / factor


def yarn(inv_freq: torch.Tensor, base: float, factor: float, original_window: int) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv:2309.00071, section 3): by parts as above, between 32 turns and one, plus a temperature.

    The ramp runs over pair numbers, as in the authors' code and in transformers; the paper's own is linear in turns.
    The factor of cos and sin is 0.1 ln(factor) + 1 (its square scales the attention logits).
    """
    pairs = len(inv_freq)

    def pair_with(turns: float) -> float:
        return pairs * math.log(original_window / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(pair_with(32)), 0)
    last = min(math.ceil(pair_with(1)), 2 * pairs - 1)
    interpolate = ((torch.arange(pairs) - first) / max(last - first, 0.001)).clamp(0, 1)
    mixed = interpolate * inv_freq / factor + (1 - interpolate) * inv_freq
    return mixed, 0.1 * math.log(factor) + 1.0


def longrope(
    inv_freq: torch.Tensor, pair_factors: Sequence[float], factor: float, original_window: int
) -> tuple[torch.Tensor, float]:
    """LongRoPE (arXiv:2402.13753): a factor of its own for each pair, found by search, and a temperature."""
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original_window))
    return inv_freq / torch.tensor(pair_factors, dtype=torch.float32), attention_factor


def proportional(inv_freq: torch.Tensor, factor: float, rotated_share: float) -> torch.Tensor:
    """Only the fastest `rotated_share` of the pairs turn, the others carry no position (p-RoPE, arXiv:2410.06205)."""
    rotated = int(rotated_share * len(inv_freq))
    return torch.cat([inv_freq[:rotated], torch.zeros(len(inv_freq) - rotated)]) / factor


def rotation(scaling: Scaling, length: int = 0) -> tuple[torch.Tensor, float]:
    """Frequencies, shape (head_dim / 2,), and the factor of cos and sin; only dynamic NTK depends on `length`."""
    if scaling.pretrained:
        return _by_transformers(scaling)
    plain = inverse_frequencies(scaling.head_dim, scaling.base)
    match scaling.method:
        case "pi":
            return position_interpolation(plain, scaling.factor), 1.0
        case "ntk":
            return inverse_frequencies(scaling.head_dim, ntk_base(scaling.head_dim, scaling.base, scaling.factor)), 1.0
        case "dynamic_ntk":
            base = dynamic_ntk_base(scaling.head_dim, scaling.base, scaling.factor, scaling.original_window, length)
            return inverse_frequencies(scaling.head_dim, base), 1.0
        case "ntk_by_parts":
            return ntk_by_parts(plain, scaling.factor, scaling.original_window), 1.0
        case "yarn":
            return yarn(plain, scaling.base, scaling.factor, scaling.original_window)
        case "longrope":
            return longrope(plain, scaling.pair_factors, scaling.factor, scaling.original_window)
        case "proportional":
            return proportional(plain, scaling.factor, scaling.rotated_share), 1.0
        case _:  # none, abf, and xpos_abf, whose decay is not part of the rotation
            return plain, 1.0


def _by_transformers(scaling: Scaling) -> tuple[torch.Tensor, float]:
    """`rotation` of a base with a rule of its own: transformers knows more of them than the methods here."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = scaling.parameters()
    window, head_dim = scaling.max_position_embeddings, scaling.head_dim
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=window, rope_parameters=parameters)
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
