"""Documents: splitting them into training and held-out ones, and turning them into token ids."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:  # three seconds to import, and sources are checked without it
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Document:
    """A text, or a part of a long one: `source` is the corpus, `name` is unique in it. No text is on both sides."""

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

    def part(self, start: int, stop: int) -> "TokenizedDocument":
        """Its tokens from `start` to before `stop` as a document, with BOS in place of the first of them."""
        ids = self.token_ids[start:stop].copy()
        ids[:1] = self.token_ids[0]
        return TokenizedDocument(self.source, self.name, ids)


@dataclass(frozen=True)
class Rules:
    """All that decides the token ids of a text: the tokenizer as JSON, BOS and EOS."""

    tokenizer: str
    bos: int
    eos: int
    dtype: str  # of stored ids

    @cached_property
    def loaded(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer)

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Token ids of each text, BOS first and EOS last."""
        found = self.loaded.encode_batch_fast([one.text for one in documents], add_special_tokens=False)  # on all cores
        return [np.array([self.bos, *one.ids, self.eos], dtype=self.dtype) for one in found]


def rules_of(tokenizer: "PreTrainedTokenizerBase") -> Rules:
    """The rules of a tokenizer: vocabulary, merges, normalization."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}  # of a call only
    dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"
    return Rules(json.dumps(rules), tokenizer.bos_token_id, tokenizer.eos_token_id, dtype)


def tokenize_documents(documents: list[Document], tokenizer: "PreTrainedTokenizerBase") -> list[TokenizedDocument]:
    """Documents as token ids, in memory."""
    rows = zip(documents, rules_of(tokenizer).encode(documents), strict=True)
    return [TokenizedDocument(one.source, one.name, ids.astype(np.int32)) for one, ids in rows]


def draw(seed: int, source: str, name: str) -> str:
    """A hash by which documents are held out, whatever others there are, and wherever a source's folder stands."""
    return hashlib.sha256(f"{seed}:{source.rstrip('/').rpartition('/')[2]}:{name}".encode()).hexdigest()


def whole(name: str) -> str:
    """The name of the text that a document of this name is, or is a part of."""
    return re.sub(r"(?i)(\.(txt|md)):\d+$", r"\1", name)


def excerpts(text: str) -> set[bytes]:
    """Of every 64 bytes about one run of 64, chosen by how it begins: of a near copy, mostly the same."""
    content = text.encode()
    heads = np.ndarray(max(len(content) - 63, 0), "<u8", content, strides=(1,))
    chosen = np.flatnonzero(heads * np.uint64(0x9E3779B97F4A7C15) < 2**58)  # a multiplicative hash
    return {content[start : start + 64] for start in chosen.tolist()}


def count_to_hold_out(long: int, sources: int = 1) -> int:
    """Of a source's `long` texts: its part of eight, from which on there are intervals, but of few only a third."""
    return max(1, min(-(-8 // sources), long // 3))


def split_documents(
    documents: list[Document], held_out: Mapping[str, int] | None, *, minimum_characters: int, seed: int
) -> tuple[list[Document], list[Document]]:
    """(training documents, held-out ones), in their order; ValueError if too few are long.

    A copy of a held-out text is on neither side. Nor is a near copy: what holds more than half of its `excerpts`, and
    at least five. 21 MB are compared in 0.6 seconds.

    Args:
        held_out: how many documents of each source to hold out, for example {"sotu": 18}; None: `count_to_hold_out`.
        minimum_characters: only documents at least this long can be held out.
        seed: candidates are taken in the order of `draw`, which a new document hardly changes.
    """
    texts = {(one.source, one.name): " ".join(one.text.split()) for one in documents}
    chosen: set[tuple[str, str]] = set()
    wanted = dict.fromkeys(one.source for one in documents) if held_out is None else held_out
    for source, count in wanted.items():
        lengths = [len(document.text) for document in documents if document.source == source]
        long = [d for d in documents if d.source == source and len(d.text) >= minimum_characters]
        different = {texts[d.source, d.name]: d for d in reversed(long)}.values()
        of_text: dict[str, Document] = {}  # one part of each
        for document in sorted(different, key=lambda d: draw(seed, d.source, d.name)):
            of_text.setdefault(whole(document.name), document)
        candidates = list(of_text.values())
        count = count or count_to_hold_out(len(candidates), len(wanted))
        if len(candidates) < count:
            shorter = f", or minimum_characters to {sorted(lengths)[-count]}" if len(lengths) > count else ""
            raise ValueError(
                f"cannot hold out {count} documents of {source!r} with at least {minimum_characters:,} characters: "
                f"{len(candidates)} of its {len(lengths)}, copies left out, are that long (the longest has "
                f"{max(lengths, default=0):,}); lower held_out{shorter}"
            )
        chosen |= {(d.source, d.name) for d in candidates[:count]}
    tested = {texts[one] for one in chosen}
    found = [excerpts(text) for text in tested]
    copies = set(tested)
    for text in texts.values() if found else ():
        own = excerpts(text)
        if any(2 * len(own & one) > max(len(one), 8) for one in found):
            copies.add(text)
    wholes = {(source, whole(name)) for (source, name), text in texts.items() if text in copies}
    training = [d for d in documents if (d.source, whole(d.name)) not in wholes]
    if not training:
        copied = len(documents) - len(chosen)
        raise ValueError(
            f"none of {len(documents)} documents is left to train on: {len(chosen)} are held out, {copied} are copies "
            "or parts of these; hold out less, add more"
        )
    return training, [d for d in documents if (d.source, d.name) in chosen]
