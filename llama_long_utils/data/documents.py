"""Documents: splitting them into training and held-out ones, and turning them into token ids."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from llama_long_utils.paths import CACHE


@dataclass(frozen=True)
class Document:
    """One text that is never cut across the split: `source` is the corpus, `name` is unique in it."""

    source: str
    name: str
    text: str


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as token ids: int32 array of shape (tokens,), BOS first and EOS last."""

    source: str
    name: str
    token_ids: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def first(self, tokens: int) -> "TokenizedDocument":
        """Its first tokens, as a document."""
        return TokenizedDocument(self.source, self.name, self.token_ids[:tokens])


def tokenize_documents(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, *, cache: Path | None = CACHE
) -> list[TokenizedDocument]:
    """Turn documents into token ids, BOS at the start and EOS at the end of each.

    The ids are kept in `cache` under a hash of the texts and of the tokenizer, because tokenizing
    20 MB costs about ten seconds and three notebooks need the same ids.
    """
    key = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for document in documents:
        key.update(f"\0{document.source}\0{document.name}\0{document.text}".encode())
    stored = cache / "tokens" / f"{key.hexdigest()[:32]}.npy" if cache else None
    if stored and stored.exists():
        flat = np.load(stored, allow_pickle=False)
    else:
        texts = [document.text for document in documents]
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        rows = [np.array([bos, *row, eos], dtype=np.int32) for row in rows]
        flat = np.concatenate([[len(rows)], [len(row) for row in rows], *rows]).astype(np.int32)
        if stored:
            stored.parent.mkdir(parents=True, exist_ok=True)
            half_written = stored.with_suffix(f".{os.getpid()}.npy")
            np.save(half_written, flat)
            half_written.replace(stored)
    count = int(flat[0])
    ends = count + 1 + np.cumsum(flat[1 : count + 1])
    rows = np.split(flat[: ends[-1]], ends[:-1])
    rows[0] = rows[0][count + 1 :]
    return [TokenizedDocument(d.source, d.name, row) for d, row in zip(documents, rows, strict=True)]


def split_documents(
    documents: list[Document], held_out: Mapping[str, int], *, minimum_characters: int, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split whole documents into training and held-out ones, before any tokenizer sees them.

    Args:
        held_out: how many documents of each source to hold out, for example {"sotu": 18}.
        minimum_characters: only documents at least this long can be held out.
        seed: the order of candidates is the order of sha256("seed:source:name"), so a document
            drops out of the held-out side only if one added later precedes it.

    Returns:
        (training documents, held-out documents), both in the order given.

    Raises:
        ValueError: a source has too few documents of that length.
    """

    def draw(document: Document) -> str:
        return hashlib.sha256(f"{seed}:{document.source}:{document.name}".encode()).hexdigest()

    chosen: set[tuple[str, str]] = set()
    for source, count in held_out.items():
        lengths = [len(document.text) for document in documents if document.source == source]
        candidates = [d for d in documents if d.source == source and len(d.text) >= minimum_characters]
        if len(candidates) < count:
            raise ValueError(
                f"cannot hold out {count} documents of {source!r} with at least {minimum_characters:,} characters: "
                f"{len(candidates)} of its {len(lengths)} are that long (the longest has {max(lengths, default=0):,}); "
                "lower held_out or minimum_characters"
            )
        chosen |= {(d.source, d.name) for d in sorted(candidates, key=draw)[:count]}
    training = [d for d in documents if (d.source, d.name) not in chosen]
    if not training:
        raise ValueError(
            f"all {len(documents)} documents are held out, none is left to train on: add documents or lower held_out"
        )
    return training, [d for d in documents if (d.source, d.name) in chosen]
