"""Texts that quote themselves, so that a small model learns to copy from its context."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.settings import IGNORED_LABEL


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
