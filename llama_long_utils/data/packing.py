"""From documents to fixed-length training sequences that never mix documents.

A document longer than the window is cut into whole windows, so that long text stays long; what is
left over is packed best-fit with other left-overs. Each piece restarts its position ids at 0.
transformers reads such restarts as a block-diagonal mask (`attention_mask=None`, `use_cache=False`),
so no token attends across a boundary, and the first token of every piece carries no label.
Sequences may then quote themselves, so that a small model learns to copy from its context, or skip positions.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.settings import IGNORED_LABEL


@dataclass(frozen=True)
class TrainingSequence:
    """One row of a batch: int64 arrays of shape (window,).

    `labels` are not shifted (labels[t] belongs to input_ids[t], as in transformers). Padding and the first token of a
    piece hold -100, by place: a padding id that equals EOS does not hide the real EOS labels.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray | None = None

    @property
    def contiguous(self) -> bool:
        """Whether all of it, without padding, is from one place of one document."""
        return bool((np.diff(self.position_ids) > 0).all())

    @property
    def label_tokens(self) -> int:
        return int((self.labels != IGNORED_LABEL).sum())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What `transformers.Trainer` collates. Shares the arrays' memory."""
        return {name: torch.from_numpy(value) for name, value in vars(self).items() if value is not None}


def cut_document(tokens: np.ndarray, window: int, first_cut: int) -> list[np.ndarray]:
    """Cut one document into a first piece of `first_cut` tokens and then pieces of `window` tokens."""
    if len(tokens) <= window:
        return [tokens]
    return [piece for piece in np.split(tokens, range(first_cut, len(tokens), window)) if len(piece)]


def pack_pieces(pieces: list[np.ndarray], window: int) -> list[list[np.ndarray]]:
    """Best-fit decreasing: each piece goes to the fullest sequence that still has room for it."""
    room: list[tuple[int, int]] = []  # (free tokens, sequence), sorted
    packed: list[list[np.ndarray]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        place = bisect.bisect_left(room, (len(piece), 0))
        if place == len(room):
            free, sequence = window, len(packed)
            packed.append([])
        else:
            free, sequence = room.pop(place)
        packed[sequence].append(piece)
        if free > len(piece):
            bisect.insort(room, (free - len(piece), sequence))
    return packed


def join_pieces(pieces: list[np.ndarray], window: int, padding_id: int, bos_id: int | None = None) -> TrainingSequence:
    """Pieces side by side, padded to `window` tokens; `bos_id` replaces each one's first token, which has no label."""
    if bos_id is not None:
        pieces = [np.concatenate([[bos_id], piece[1:]]) for piece in pieces]
    padding = window - sum(len(piece) for piece in pieces)
    labels = [np.concatenate([[IGNORED_LABEL], piece[1:]]) for piece in pieces]
    labels.append(np.full(padding, IGNORED_LABEL))
    pieces = [*pieces, np.full(padding, padding_id)]
    return TrainingSequence(
        input_ids=np.concatenate(pieces).astype(np.int64),
        labels=np.concatenate(labels).astype(np.int64),
        position_ids=np.concatenate([np.arange(len(piece)) for piece in pieces]).astype(np.int64),
    )


def packed_pieces(
    buffers: Iterable[Sequence[TokenizedDocument]],
    window: int,
    *,
    seed: int,
    long_document_weight: float = 1.0,  # uses of long documents in a pass (arXiv:2309.16039, section 2.1)
    pack: bool = True,
) -> Iterator[list[np.ndarray]]:
    """The pieces of one training sequence after the other; ValueError if no document is as long as the window.

    A buffer is packed and shuffled as a whole, and with `pack` left-overs and short documents are used too.
    """
    generator = np.random.default_rng(seed)
    longest = 0
    for documents in buffers:
        longest = max([longest, *(document.tokens for document in documents)])
        if longest < window:
            found = f"the longest of {len(documents)} has {longest:,}; add longer documents or lower the window"
            raise ValueError(f"no document fills a training window of {window:,} tokens: {found}")
        pieces: list[np.ndarray] = []
        for document in documents:
            weight = long_document_weight if document.tokens >= window else 1.0
            for _ in range(int(weight + generator.random())):
                pieces += cut_document(document.token_ids, window, int(generator.integers(1, window + 1)))
        packed = pack_pieces(pieces if pack else [piece for piece in pieces if len(piece) == window], window)
        for index in generator.permutation(len(packed)):
            yield packed[index]


def with_excerpts(ids: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text that quotes itself, and for each token the place that it is copied from, or -1.

    Half of its stretches become excerpts of 12 to 64 tokens from what stands before them, without any marker.
    """
    window = len(ids)
    place = used = int(generator.integers(48, 129))
    changed, source = ids.copy(), np.full(window, -1)
    while place < window:
        length = min(int(generator.integers(12, 65)), window - place)
        if generator.random() >= 0.5:
            changed[place : place + length] = ids[used : used + length]
            used += length
        else:
            length = min(length, place - 1)
            first = int(generator.integers(1, place - length + 1))
            changed[place : place + length] = changed[first : first + length]
            source[place : place + length] = np.arange(first, first + length)
        place += length
    return changed, source


def quote_themselves(sequences: Iterable[TrainingSequence], share: float, *, seed: int) -> Iterator[TrainingSequence]:
    """Put excerpts of itself (`with_excerpts`) into a share of the sequences, where they hold a single piece."""
    generator = np.random.default_rng(seed)
    for sequence in sequences:
        if generator.random() < share and sequence.contiguous:
            ids, _source = with_excerpts(sequence.input_ids, generator)
            sequence = replace(
                sequence, input_ids=ids, labels=np.where(sequence.labels == IGNORED_LABEL, IGNORED_LABEL, ids)
            )
        yield sequence


def skip_positions(sequences: Iterable[TrainingSequence], reach: int, *, seed: int) -> Iterator[TrainingSequence]:
    """PoSE (arXiv:2309.10400): train at a short length on distances of a long one.

    Each sequence, of one document as `TrainingSettings` asks, is cut in two at a random place, and the second part's
    positions move on by a random number, up to `reach`. All carry an all-ones attention mask: without it, transformers
    takes a jump in the positions for the start of another document, which cannot see the first part.
    """
    generator = np.random.default_rng(seed)
    for sequence in sequences:
        if reach > (window := len(sequence.input_ids)):
            positions = sequence.position_ids.copy()
            positions[int(generator.integers(1, window)) :] += int(generator.integers(0, reach - window + 1))
            sequence = replace(sequence, position_ids=positions, attention_mask=np.ones(window, dtype=np.int64))
        yield sequence
