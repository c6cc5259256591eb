"""Perplexity by position: what each token costs, given everything before it in its document.

One uncached forward pass per text scores every token with its full context. Means are over
tokens (sum of nats / number of tokens), bands are over documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from scipy.optimize import least_squares
from transformers import PreTrainedModel

from llama_long_utils.documents import TokenizedDocument
from llama_long_utils.loss import causal_lm, hidden_states, next_token_nll


@torch.no_grad()
def token_nll(model: PreTrainedModel | PeftModel, document: TokenizedDocument, tokens: int) -> np.ndarray:
    """NLL of every token but BOS in the first `tokens` of a document, in nats: float32.

    Shape (min(tokens, length) - 1,). Entry i is the cost of the token at position i + 1, given the
    i + 1 tokens before it (BOS is one of them and is never scored itself).
    """
    ids = torch.from_numpy(document.token_ids[:tokens]).long()[None].to(model.device)
    hidden = hidden_states(model, ids)
    return next_token_nll(hidden, causal_lm(model).get_output_embeddings(), ids, reduction="none")[0].cpu().numpy()


def sliding_window_nll(model: PreTrainedModel | PeftModel, document: TokenizedDocument, window: int) -> np.ndarray:
    """NLL of the same tokens as `token_nll`, read through a window that slides by half its length.

    Every token from position window / 2 on has seen window / 2 to window - 1 tokens, whatever its
    position: what a model with that window can do on exactly this text. Each window starts with BOS,
    in place of a token that is not scored there.

    Raises:
        ValueError: the length is not a multiple of half a window.
    """
    half = window // 2
    nll = _nll_in_windows(model, document, window, half)
    return np.concatenate([nll[0, : half - 1], nll[:, half - 1 :].flatten()])


def separate_windows_nll(model: PreTrainedModel | PeftModel, document: TokenizedDocument, window: int) -> np.ndarray:
    """NLL of tokens read in windows side by side, which know nothing of each other: shape (windows x (window - 1),).

    BOS stands in place of the first token of each window, which is not scored.

    Raises:
        ValueError: the length is not a multiple of the window.
    """
    return _nll_in_windows(model, document, window, window).flatten()


@torch.no_grad()
def _nll_in_windows(
    model: PreTrainedModel | PeftModel, document: TokenizedDocument, window: int, stride: int
) -> np.ndarray:
    if document.tokens < window or document.tokens % stride:
        raise ValueError(
            f"a text of {document.tokens} tokens cannot be read in windows of {window} sliding by {stride}"
        )
    ids = torch.from_numpy(document.token_ids).long().to(model.device)
    windows = ids.unfold(0, window, stride).clone()
    windows[:, 0] = ids[0]
    head = causal_lm(model).get_output_embeddings()
    rows = [
        next_token_nll(hidden_states(model, batch), head, batch, reduction="none").cpu() for batch in windows.split(16)
    ]
    return torch.cat(rows).numpy()


def random_stretches(
    documents: Sequence[TokenizedDocument], tokens: int, *, at_most: int, seed: int
) -> list[list[TokenizedDocument]]:
    """Up to `at_most` stretches of `tokens` tokens from random places of each document, BOS first.

    Stretches of one document do not overlap; documents shorter than one stretch are left out. Read
    from their beginnings instead, documents confound position with content: the opening of a speech
    is easier to predict than its middle, in any context.

    Returns:
        One list of stretches for each document that is long enough.

    Raises:
        ValueError: no document is that long.
    """
    generator = np.random.default_rng(seed)
    stretches = []
    for document in documents:
        count = min(at_most, document.tokens // tokens)
        gaps = np.sort(generator.integers(0, document.tokens - count * tokens + 1, count)) if count else []
        cut = []
        for number, gap in enumerate(gaps):
            first = int(gap) + number * tokens
            ids = document.token_ids[first : first + tokens].copy()
            ids[0] = document.token_ids[0]
            cut.append(TokenizedDocument(document.source, document.name, ids))
        stretches += [cut] if cut else []
    if not stretches:
        longest = max((document.tokens for document in documents), default=0)
        raise ValueError(
            f"no held-out document has {tokens:,} tokens: the longest of {len(documents)} has {longest:,}; "
            "lower evaluation.tokens or hold out longer documents"
        )
    return stretches


def bucket_sums(nll: Sequence[np.ndarray], edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of NLL and number of tokens per document and position bucket.

    Args:
        nll: one array per document: its stretches as rows, from `token_nll`.
        edges: bucket k holds the tokens at positions edges[k] <= position < edges[k + 1].

    Returns:
        (nats, tokens), each of shape (documents, len(edges) - 1).
    """
    buckets = [slice(low - 1, high - 1) for low, high in pairwise(edges)]
    nats = np.array([[rows[..., bucket].sum(dtype=np.float64) for bucket in buckets] for rows in nll])
    tokens = np.array([[rows[..., bucket].size for bucket in buckets] for rows in nll])
    return nats, tokens


@dataclass(frozen=True)
class Bootstrap:
    """Resampled documents, the same for every arm, so that differences are paired."""

    documents: int
    samples: int
    seed: int

    def weights(self) -> np.ndarray:
        """How often each sample draws each document: shape (samples, documents)."""
        generator = np.random.default_rng(self.seed)
        return generator.multinomial(self.documents, np.full(self.documents, 1 / self.documents), size=self.samples)

    def interval(self, nats: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """95% percentile interval of sum(nats) / sum(tokens) over documents, per bucket."""
        weights = self.weights()
        with np.errstate(invalid="ignore"):  # a sample may miss every document of a bucket: 0 / 0
            means = (weights @ nats) / (weights @ tokens)
        low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
        return low, high


def nll_table(
    arm: str, nll: Sequence[np.ndarray], edges: Sequence[int], *, bootstrap_samples: int, seed: int
) -> pd.DataFrame:
    """Token-weighted mean NLL per position bucket with its 95% interval over documents.

    Columns: arm, position_low, position_high, nll, low, high (nats), documents, tokens.
    """
    nats, tokens = bucket_sums(nll, edges)
    low, high = Bootstrap(len(nll), bootstrap_samples, seed).interval(nats, tokens)
    return pd.DataFrame(
        {
            "arm": arm,
            "position_low": edges[:-1],
            "position_high": edges[1:],
            "nll": nats.sum(axis=0) / tokens.sum(axis=0),
            "low": low,
            "high": high,
            "documents": (tokens > 0).sum(axis=0),
            "tokens": tokens.sum(axis=0),
        }
    )


def paired_difference(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], low: int, high: int, *, bootstrap_samples: int, seed: int
) -> tuple[float, float, float]:
    """Mean NLL of `first` minus `second` at positions [low, high), with its 95% interval, in nats."""
    nats_first, tokens = bucket_sums(first, [low, high])
    nats_second, _ = bucket_sums(second, [low, high])
    difference = nats_first - nats_second
    below, above = Bootstrap(len(first), bootstrap_samples, seed).interval(difference, tokens)
    return float(difference.sum() / tokens.sum()), float(below[0]), float(above[0])


KEY_GAIN, KEY_LOSS = 2.0, 2.0  # nats; alpha and -beta in LongPPL (arXiv:2410.23771)


def perplexity_by_definition(
    full: Sequence[np.ndarray],
    sliding: Sequence[np.ndarray],
    separate: Sequence[np.ndarray],
    words: Sequence[int],
    utf8_bytes: Sequence[int],
    *,
    last: int,
    bootstrap_samples: int,
    seed: int,
) -> pd.DataFrame:
    """The perplexity of one model on the same texts by each definition in use, with 95% intervals over documents.

    Args:
        full: NLL of each document's stretches with full context, from `token_nll`.
        sliding: the same tokens through a sliding window, from `sliding_window_nll`: the short context of LongPPL,
            which scores only tokens that the long context makes KEY_GAIN nats cheaper and cheaper than KEY_LOSS.
        separate: from `separate_windows_nll`.
        words: white-space words of each document's stretches.
        utf8_bytes: bytes of each document's stretches.
        last: how many tokens at the end the definition "last tokens" scores.

    Returns:
        Columns: definition, perplexity, low, high, units (tokens, words or bytes); perplexity is NaN without units.
    """
    key = [(short - long > KEY_GAIN) & (long < KEY_LOSS) for long, short in zip(full, sliding, strict=True)]
    nats, tokens = _sums(full)
    ratios = {
        "whole text": (nats, tokens),
        "sliding window": _sums(sliding),
        "separate windows": _sums(separate),
        "last tokens": _sums([rows[..., -last:] for rows in full]),
        "key tokens (LongPPL)": _sums([rows[chosen] for rows, chosen in zip(full, key, strict=True)]),
        "per word": (nats, words),
        "per byte": (nats, utf8_bytes),
    }
    bootstrap = Bootstrap(len(full), bootstrap_samples, seed)
    rows = []
    for definition, (costs, units) in ratios.items():
        units = np.asarray(units)
        total = int(units.sum())
        low, high = bootstrap.interval(costs[:, None], units[:, None]) if total else ([np.nan], [np.nan])
        rows.append((definition, *np.exp([costs.sum() / total if total else np.nan, low[0], high[0]]), total))
    return pd.DataFrame(rows, columns=["definition", "perplexity", "low", "high", "units"])


def _sums(nll: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([rows.sum(dtype=np.float64) for rows in nll]), np.array([rows.size for rows in nll])


@dataclass(frozen=True)
class PowerLaw:
    """L(c) = (alpha / c) ** beta + gamma (arXiv:2309.16039, section 3.1), L in nats, c in tokens."""

    alpha: float
    beta: float
    gamma: float
    rmse: float

    def __call__(self, context: np.ndarray) -> np.ndarray:
        return (self.alpha / context) ** self.beta + self.gamma


def fit_power_law(context: np.ndarray, loss: np.ndarray) -> PowerLaw:
    """Least squares in log-loss, the fit that comes nearest to the paper's own parameters.

    Args:
        context: shape (n,), tokens of context.
        loss: shape (n,), nats.

    Returns:
        The law; `rmse` is the root mean square error of the loss itself, in nats.
    """

    def law(parameters: np.ndarray) -> np.ndarray:
        log_alpha, beta, gamma = parameters
        return np.exp(beta * (log_alpha - np.log(context))) + gamma

    fit = least_squares(
        lambda parameters: np.log(law(parameters)) - np.log(loss),
        x0=[np.log(20.0), 0.5, 0.9 * loss.min()],
        bounds=([-20.0, 0.01, 0.0], [20.0, 5.0, loss.max()]),
    )
    rmse = float(np.sqrt(np.mean((law(fit.x) - loss) ** 2)))
    return PowerLaw(float(np.exp(fit.x[0])), float(fit.x[1]), float(fit.x[2]), rmse)
