"""Perplexity by position: what each token costs, given everything before it in its document.

One uncached forward pass per text scores every token with its full context. Means are over
tokens (sum of nats / number of tokens), bands are over documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import pandas as pd
import torch

from llama_long_utils.cache import Cache
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.model.loss import Model, causal_lm, hidden_states, next_token_nll
from llama_long_utils.progress import track

VERSION = 1  # of what `Reader` keeps: raise it when an NLL changes
Stretches = Sequence[Sequence[TokenizedDocument]]  # of each document, from `random_stretches`


@torch.no_grad()
def token_nll(model: Model, document: TokenizedDocument, tokens: int | None = None) -> np.ndarray:
    """NLL of every token but BOS in a document or its first `tokens`, in nats: float32.

    Shape (min(tokens, length) - 1,). Entry i is the cost of the token at position i + 1, given the
    i + 1 tokens before it (BOS is one of them and is never scored itself).
    """
    ids = torch.from_numpy(document.token_ids[:tokens]).long()[None].to(model.device)
    hidden = hidden_states(model, ids)
    return next_token_nll(hidden, causal_lm(model).get_output_embeddings(), ids, reduction="none")[0].cpu().numpy()


@torch.no_grad()
def nll_in_windows(model: Model, document: TokenizedDocument, window: int) -> np.ndarray:
    """NLL of a document read in windows that slide by half their length, in nats: shape (windows, window - 1), float32.

    Each window is a text of its own: BOS stands in place of its first token, which is not scored.
    `sliding_window` chooses from it; every second row is a window that knows nothing of those beside it. ValueError if
    the length is not a multiple of half a window.
    """
    if document.tokens < window or document.tokens % (window // 2):
        raise ValueError(f"a text of {document.tokens} tokens cannot be read in windows of {window} sliding by half")
    ids = torch.from_numpy(document.token_ids).long().to(model.device)
    windows = ids.unfold(0, window, window // 2).clone()
    windows[:, 0] = ids[0]
    head = causal_lm(model).get_output_embeddings()
    parts = windows.split(max(1, min(16, 2**15 // window)))
    rows = [next_token_nll(hidden_states(model, part), head, part, reduction="none").cpu() for part in parts]
    return torch.cat(rows).numpy()


def sliding_window(rows: np.ndarray) -> np.ndarray:
    """The tokens that `token_nll` scores, each from the window of `nll_in_windows` where it has seen more.

    Shape (..., windows, window - 1) -> (..., tokens - 1). Every token from position window / 2 on has seen window / 2
    to window - 1 tokens, whatever its position: what a model with that window can do on exactly this text.
    """
    half = (rows.shape[-1] + 1) // 2
    later = rows[..., half - 1 :]
    return np.concatenate([rows[..., 0, : half - 1], later.reshape(*later.shape[:-2], -1)], axis=-1)


@dataclass(frozen=True)
class Reader:
    """A model that reads texts, and the cache that keeps each result: its inputs must name the model."""

    model: Model
    cache: Cache

    def nll(self, stretches: Stretches) -> list[np.ndarray]:
        """`token_nll` of the stretches of each document: arrays of shape (stretches, tokens - 1)."""
        return self._read("nll", stretches, lambda stretch: token_nll(self.model, stretch))

    def windows(self, stretches: Stretches, window: int) -> list[np.ndarray]:
        """`nll_in_windows` of the stretches of each document: arrays of shape (stretches, windows, window - 1)."""
        return self._read(f"window-{window}", stretches, lambda stretch: nll_in_windows(self.model, stretch, window))

    def _read(
        self, what: str, stretches: Stretches, measure: Callable[[TokenizedDocument], np.ndarray]
    ) -> list[np.ndarray]:
        def kept(stretch: TokenizedDocument) -> np.ndarray:
            name = f"{what}-{stretch.name}"
            return self.cache.arrays(name, lambda: {"nll": measure(stretch)}, token_ids=stretch.token_ids)["nll"]

        rows = iter([kept(stretch) for stretch in track([*chain.from_iterable(stretches)], f"reading, {what}")])
        return [np.stack([next(rows) for _ in document]) for document in stretches]


def random_stretches(
    documents: Sequence[TokenizedDocument], length: int, *, at_most: int, seed: int, far_length: int = 0
) -> list[list[TokenizedDocument]]:
    """Up to `at_most` stretches of `length` tokens from random places of each document that is long enough, BOS first.

    Stretches of one document do not overlap. Read from their beginnings instead, documents confound position with
    content: the opening of a speech is easier to predict than its middle, in any context. In the first document of each
    source that has them, stretches have `far_length` tokens. ValueError if no document is long enough.
    """
    generator = np.random.default_rng(seed)
    stretches = []
    read_far: set[str] = set()
    for document in documents:
        own = length
        if far_length > length and document.tokens >= far_length and document.source not in read_far:
            own = far_length
            read_far.add(document.source)
        count = min(at_most, document.tokens // own)
        gaps = np.sort(generator.integers(0, document.tokens - count * own + 1, count)) if count else []
        starts = [int(gap) + number * own for number, gap in enumerate(gaps)]
        stretches += [[document.part(start, start + own) for start in starts]] if starts else []
    if not stretches:
        longest = max((document.tokens for document in documents), default=0)
        missing = f"no held-out document has {length:,} tokens: the longest of {len(documents)} has {longest:,}"
        raise ValueError(f"{missing}; lower evaluation.tokens or hold out longer documents")
    return stretches


def bucket_sums(nll: Sequence[np.ndarray], edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of NLL and number of tokens per document and position bucket.

    Both have shape (documents, len(edges) - 1): bucket k holds the tokens at edges[k] <= position < edges[k + 1]. `nll`
    is one array per document, its stretches as rows, from `token_nll`.
    """
    buckets = [slice(low - 1, high - 1) for low, high in pairwise(edges)]
    nats = np.array([[rows[..., bucket].sum(dtype=np.float64) for bucket in buckets] for rows in nll])
    tokens = np.array([[rows[..., bucket].size for bucket in buckets] for rows in nll])
    return nats, tokens


def padded(nll: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of all documents in one array, shorter ones filled up with NaN: float16, shape (stretches, longest)."""
    longest = max(rows.shape[1] for rows in nll)
    filled = [np.pad(rows, ((0, 0), (0, longest - rows.shape[1])), constant_values=np.nan) for rows in nll]
    return np.concatenate(filled).astype(np.float16)


def nll_table(
    arm: str, nll: Sequence[np.ndarray], edges: Sequence[int], *, bootstrap_samples: int, seed: int
) -> pd.DataFrame:
    """Token-weighted mean NLL per position bucket with its 95% interval over documents.

    Columns: arm, position_low, position_high, nll, low, high (nats), documents, tokens.
    """
    nats, tokens = bucket_sums(nll, edges)
    low, high = Bootstrap(len(nll), bootstrap_samples, seed).interval(nats, tokens)
    places = {"arm": arm, "position_low": edges[:-1], "position_high": edges[1:]}
    means = {"nll": nats.sum(axis=0) / tokens.sum(axis=0), "low": low, "high": high}
    return pd.DataFrame({**places, **means, "documents": (tokens > 0).sum(axis=0), "tokens": tokens.sum(axis=0)})


def paired_table(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], edges: Sequence[int], **options: int
) -> pd.DataFrame:
    """`nll_table` of `first` minus `second`, token by token as far as both were read; without arm and tokens."""
    shorter = [min(one.shape[-1], other.shape[-1]) for one, other in zip(first, second, strict=True)]
    pairs = zip(first, second, shorter, strict=True)
    difference = [one[..., :length].astype(float) - other[..., :length] for one, other, length in pairs]
    return nll_table("", difference, edges, **options).drop(columns=["arm", "tokens"])


def paired_difference(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], low: int, high: int, **options: int
) -> tuple[float, float, float]:
    """Mean NLL of `first` minus `second` at positions [low, high), with its 95% interval, in nats."""
    table = paired_table(first, second, [low, high], **options)
    return tuple(map(float, table.loc[0, ["nll", "low", "high"]]))


def perplexity(
    nll: Sequence[np.ndarray], units: Sequence[int] | None = None, *, bootstrap_samples: int, seed: int
) -> dict[str, float]:
    """Perplexity with its 95% interval over documents: perplexity, low, high, units; NaN without units.

    `units`: per document, what its sum of nats is divided by, for example words; default: the tokens in `nll`.
    """
    nats = np.array([rows.sum(dtype=np.float64) for rows in nll])
    units = np.array([rows.size for rows in nll] if units is None else units)
    low, high = Bootstrap(len(nll), bootstrap_samples, seed).interval(nats[:, None], units[:, None])
    with np.errstate(invalid="ignore"):  # of no units: 0 / 0
        value, low, high = np.exp([nats.sum() / units.sum(), low[0], high[0]])
    return {"perplexity": value, "low": low, "high": high, "units": int(units.sum())}
