"""Perplexity by position: what each token costs, given everything before it in its document.

One uncached forward pass per text scores every token with its full context. Means are over
tokens (sum of nats / number of tokens), bands are over documents.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.records import read_arrays, write_arrays


@torch.no_grad()
def token_nll(model: PreTrainedModel | PeftModel, document: TokenizedDocument, tokens: int | None = None) -> np.ndarray:
    """NLL of every token but BOS in a document or its first `tokens`, in nats: float32.

    Shape (min(tokens, length) - 1,). Entry i is the cost of the token at position i + 1, given the
    i + 1 tokens before it (BOS is one of them and is never scored itself).
    """
    ids = torch.from_numpy(document.token_ids[:tokens]).long()[None].to(model.device)
    hidden = hidden_states(model, ids)
    return next_token_nll(hidden, causal_lm(model).get_output_embeddings(), ids, reduction="none")[0].cpu().numpy()


@torch.no_grad()
def nll_in_windows(model: PreTrainedModel | PeftModel, document: TokenizedDocument, window: int) -> np.ndarray:
    """NLL of a document read in windows that slide by half their length, in nats: shape (windows, window - 1), float32.

    Each window is a text of its own: BOS stands in place of its first token, which is not scored.
    `sliding_window` and `separate_windows` choose from it.

    Raises:
        ValueError: the length is not a multiple of half a window.
    """
    if document.tokens < window or document.tokens % (window // 2):
        raise ValueError(
            f"a text of {document.tokens} tokens cannot be read in windows of {window} sliding by {window // 2}"
        )
    ids = torch.from_numpy(document.token_ids).long().to(model.device)
    windows = ids.unfold(0, window, window // 2).clone()
    windows[:, 0] = ids[0]
    head = causal_lm(model).get_output_embeddings()
    rows = [
        next_token_nll(hidden_states(model, batch), head, batch, reduction="none").cpu() for batch in windows.split(16)
    ]
    return torch.cat(rows).numpy()


def sliding_window(rows: np.ndarray) -> np.ndarray:
    """The tokens that `token_nll` scores, each from the window of `nll_in_windows` where it has seen more.

    Shape (..., windows, window - 1) -> (..., tokens - 1). Every token from position window / 2 on has
    seen window / 2 to window - 1 tokens, whatever its position: what a model with that window can do
    on exactly this text.
    """
    half = (rows.shape[-1] + 1) // 2
    later = rows[..., half - 1 :]
    return np.concatenate([rows[..., 0, : half - 1], later.reshape(*later.shape[:-2], -1)], axis=-1)


def separate_windows(rows: np.ndarray) -> np.ndarray:
    """The tokens of every second window of `nll_in_windows`: side by side, they know nothing of each other.

    Shape (..., windows, window - 1) -> (..., scored tokens).

    Raises:
        ValueError: the text does not end with a window.
    """
    if rows.shape[-2] % 2 == 0:
        raise ValueError(f"{rows.shape[-2]} windows that overlap by half leave half a window over: cut the text")
    apart = rows[..., ::2, :]
    return apart.reshape(*apart.shape[:-2], -1)


VERSION = 1  # of how texts are read: raise it when an NLL changes


def fingerprint(*made_of: bytes) -> str:
    """Eight hexadecimal digits that name what a measurement was made of."""
    key = hashlib.sha256(str(VERSION).encode())
    for part in made_of:
        key.update(part)
    return key.hexdigest()[:8]


@dataclass(frozen=True)
class Reader:
    """Reads texts by models and keeps each result below `folder`: an interrupted run goes on.

    The folder must stand for the weights and the RoPE of all models that are named; see `fingerprint`.
    """

    folder: Path

    def nll(
        self, name: str, model: PreTrainedModel | PeftModel, texts: Sequence[Sequence[TokenizedDocument]]
    ) -> list[np.ndarray]:
        """`token_nll` of the stretches of each document: arrays of shape (stretches, tokens - 1)."""
        return self._measure(name, texts, lambda text: token_nll(model, text))

    def windows(
        self, name: str, model: PreTrainedModel | PeftModel, texts: Sequence[Sequence[TokenizedDocument]], window: int
    ) -> list[np.ndarray]:
        """`nll_in_windows` of the stretches of each document: arrays of shape (stretches, windows, window - 1)."""
        return self._measure(f"{name}-{window}", texts, lambda text: nll_in_windows(model, text, window))

    def second_reading_saves(
        self,
        name: str,
        model: PreTrainedModel | PeftModel,
        texts: Sequence[TokenizedDocument],
        gap: int,
        *,
        passage: int = 128,
        skipped: int = 20,
    ) -> np.ndarray:
        """What having read a passage before saves, in nats per token: float64 of shape (texts,).

        A passage stands at the end, after a passage and `gap` tokens of the same text. Where it stands at the beginning
        as well, it is read a second time; in the control another one does, and all the rest is the same.

        Args:
            texts: each of at least 1 + 2 `passage` + `gap` tokens.
            skipped: tokens of the passage not counted, until it is known which one it is.
        """
        nll = []
        for first in (1 + passage + gap, 1):
            made = []
            for text in texts:
                ids = text.token_ids
                starts = ids[:1], ids[first : first + passage], ids[1 + passage : 1 + passage + gap]
                made.append([replace(text, token_ids=np.concatenate([*starts, ids[1 : 1 + passage]]))])
            rows = np.concatenate(self.nll(name, model, made))
            nll.append(rows[:, skipped - passage :].mean(1, dtype=np.float64))
        return nll[0] - nll[1]

    def _measure(
        self,
        name: str,
        texts: Sequence[Sequence[TokenizedDocument]],
        measure: Callable[[TokenizedDocument], np.ndarray],
    ) -> list[np.ndarray]:
        measured = []
        for cuts in texts:
            rows = []
            for cut in cuts:
                path = self.folder / f"{name}-{cut.name.replace('/', '.')}-{fingerprint(cut.token_ids.tobytes())}.npz"
                if not path.is_file():
                    write_arrays(path, {"nll": measure(cut)})
                rows.append(read_arrays(path)["nll"])
            measured.append(np.stack(rows))
        return measured


def random_stretches(
    documents: Sequence[TokenizedDocument], tokens: int, *, at_most: int, seed: int, far_tokens: int = 0
) -> list[list[TokenizedDocument]]:
    """Up to `at_most` stretches of `tokens` tokens from random places of each document, BOS first.

    Stretches of one document do not overlap; documents shorter than one stretch are left out. Read
    from their beginnings instead, documents confound position with content: the opening of a speech
    is easier to predict than its middle, in any context.

    Args:
        far_tokens: length of the stretches of one document of each source, the first that is long enough, where it is
            more than `tokens`.

    Returns:
        One list of stretches for each document that is long enough.

    Raises:
        ValueError: no document is that long.
    """
    generator = np.random.default_rng(seed)
    stretches = []
    read_far: set[str] = set()
    for document in documents:
        length = tokens
        if far_tokens > tokens and document.tokens >= far_tokens and document.source not in read_far:
            length = far_tokens
            read_far.add(document.source)
        count = min(at_most, document.tokens // length)
        gaps = np.sort(generator.integers(0, document.tokens - count * length + 1, count)) if count else []
        cut = []
        for number, gap in enumerate(gaps):
            first = int(gap) + number * length
            ids = document.token_ids[first : first + length].copy()
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


def one_array(nll: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of all documents, shorter ones filled up with NaN: float16, shape (stretches, longest)."""
    longest = max(rows.shape[1] for rows in nll)
    filled = [np.pad(rows, ((0, 0), (0, longest - rows.shape[1])), constant_values=np.nan) for rows in nll]
    return np.concatenate(filled).astype(np.float16)


def documents_of(array: np.ndarray) -> list[np.ndarray]:
    """The rows that `one_array` joined, one stretch of each document: float32 arrays of shape (1, tokens - 1)."""
    return [row[np.isfinite(row)][None].astype(np.float32) for row in array]


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


def paired_table(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    edges: Sequence[int],
    *,
    bootstrap_samples: int,
    seed: int,
) -> pd.DataFrame:
    """Mean NLL of `first` minus `second` per position bucket, with its 95% interval over documents.

    Columns: position_low, position_high, nll (the difference), low, high (nats), documents.
    """
    nats_first, tokens = bucket_sums(first, edges)
    nats_second, _ = bucket_sums(second, edges)
    difference = nats_first - nats_second
    low, high = Bootstrap(len(first), bootstrap_samples, seed).interval(difference, tokens)
    return pd.DataFrame(
        {
            "position_low": edges[:-1],
            "position_high": edges[1:],
            "nll": difference.sum(axis=0) / tokens.sum(axis=0),
            "low": low,
            "high": high,
            "documents": (tokens > 0).sum(axis=0),
        }
    )


def paired_difference(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], low: int, high: int, *, bootstrap_samples: int, seed: int
) -> tuple[float, float, float]:
    """Mean NLL of `first` minus `second` at positions [low, high), with its 95% interval, in nats."""
    table = paired_table(first, second, [low, high], bootstrap_samples=bootstrap_samples, seed=seed)
    return tuple(map(float, table.loc[0, ["nll", "low", "high"]]))


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
        sliding: the same tokens through a sliding window, from `sliding_window`: the short context of LongPPL,
            which scores only tokens that the long context makes KEY_GAIN nats cheaper and cheaper than KEY_LOSS.
        separate: from `separate_windows`.
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
