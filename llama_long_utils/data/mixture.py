"""The sources of a preset as one stream of documents, mixed by weight, without those that are held out.

Documents come in buffers, each of which is packed and shuffled as a whole. A corpus that a buffer holds is one buffer,
which is one pass. The next document is from the source furthest behind its share: texts and settings alone decide it.

`datasets.interleave_datasets` draws rows, not tokens: of books and files a hundredth as long, 99% would be of books.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llama_long_utils.cache import digest
from llama_long_utils.data.documents import TokenizedDocument, count_to_hold_out, draw, rules_of, split_documents, whole
from llama_long_utils.data.sources import check_sources, load_documents, pinned, survey
from llama_long_utils.data.tokens import TokenizedSource
from llama_long_utils.paths import CACHE
from llama_long_utils.settings import Data, Source, TrainingSettings

if TYPE_CHECKING:  # three seconds to import, and sources are checked without it
    from transformers import PreTrainedTokenizerBase

SMALL = 2**25  # bytes: a source up to this size may be looked at as a whole before training
BUFFER = 2**24  # tokens
FEWEST = 32  # windows of a buffer that is ended early, so that a source stands in it once
PATIENCE = 4 * BUFFER  # tokens that are read without a document that will do
HELD_OUT = f"{round(0.02 * 2**32):08x}"  # of a stream's documents, two in a hundred: those whose hash is lower


class Mixture:
    """The documents of a preset's sources, to be trained on and held out.

    Of a small source, as many documents are held out as asked for. Of a stream, which may grow, all are that `draw`
    puts below HELD_OUT, or below more in a folder of few files, or none where another split is held out. ValueError if
    a source or a count is wrong or texts are too short, RuntimeError if the hub or PyPI does not answer.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        window: int = 0,  # tokens that the longest document to train on has at least,
        length: int = 0,  # and the longest held-out one
        cache: Path = CACHE,
    ) -> None:
        self.data, given = data, check_sources(data.sources, data.held_out)
        self.sources = [pinned(source, cache) for source in data.mixture]
        surveys = {source.name: survey(source) for source in self.sources}
        self.sizes = {name: size for name, (size, *_) in surveys.items()}
        self.small = {name for name, size in self.sizes.items() if size is not None and size <= SMALL}
        self.weighted = any(source.weight for source in self.sources)
        if None in self.sizes.values() and len(self.sources) > 1 and not self.weighted:
            raise ValueError(f"give each of the sources {[*self.sizes]} a weight: how large they are is not known")
        self.streams = self.small < self.sizes.keys()
        small = [source for source in self.sources if source.name in self.small]
        texts = [document for source in small for document in load_documents(source, cache=cache)]
        counts = None if given is None else {name: count for name, count in given.items() if name in self.small}
        options = {"minimum_characters": data.minimum_characters, "seed": data.split_seed}
        sides = split_documents(texts, counts, **options) if texts else ([], [])
        for side, tokens, name in zip(sides, (window, length), ("training", "held-out"), strict=True):
            longest = max((len(document.text.encode()) for document in side), default=0)
            if side and longest + 3 < tokens and small == self.sources:  # a token is a byte at least; BOS, EOS, a space
                found = f"no {name} document has {tokens:,} tokens: the longest of {len(side)} has {longest:,} bytes"
                raise ValueError(f"{found}; add longer documents or ask for fewer tokens")
        self.chosen = {(document.source, document.name) for document in sides[1]}
        self.read, kept, chosen = (Counter(one.source for one in side) for side in (texts, *sides))
        self.copies = self.read - kept - chosen
        streams = {name: files for name, (*_, files) in surveys.items() if name not in self.small}
        long = {of: [name for name in files if files[name] >= data.minimum_characters] for of, files in streams.items()}
        of_each = {of: count_to_hold_out(len(names) or FEWEST, len(surveys)) for of, names in long.items()}
        self.counts = {**of_each, **chosen} if given is None else given
        hashes = {of: sorted(draw(data.split_seed, of, name) for name in names) for of, names in long.items()}
        self.ranks = {of: min(2 * self.counts.get(of, 0), max(len(found) // 3, 1)) for of, found in hashes.items()}
        self.limits = {of: max([HELD_OUT, *found[self.ranks[of] :][:1]]) for of, found in hashes.items()}
        trained_on = {(document.source, whole(document.name)) for document in sides[0]}
        self.texts_held_out = {(one.source, whole(one.name)) for one in texts} - trained_on  # their copies, too
        self.rules = rules_of(tokenizer)
        self.tokens = {one.name: TokenizedSource(one, surveys[one.name][1], self.rules, cache) for one in self.sources}

    @property
    def key(self) -> str:
        """A digest of what its documents depend on, known without reading them. A cap on passes changes none."""
        data = replace(self.data, sources=[replace(source, passes=1) for source in self.sources], passes=1)
        numbers = [BUFFER, HELD_OUT, SMALL, *[FEWEST] * self.weighted, *["copies"] * self.streams]
        numbers += [*sorted({*self.limits.values()} - {HELD_OUT}), *["moved"] * any("/" in name for name in self.sizes)]
        copies = sorted(self.texts_held_out - {(source, whole(name)) for source, name in self.chosen})
        return digest(data, [tokens.key for tokens in self.tokens.values()], *numbers, *copies)

    def is_held_out(self, source: Source, name: str) -> bool:
        """Whether a document of this name is never trained on."""
        if source.name in self.small or source.held_out_split or source.name not in self.counts:
            return (source.name, whole(name)) in self.texts_held_out
        return draw(self.data.split_seed, source.name, whole(name)) < self.limits[source.name]

    def held_out(self) -> list[TokenizedDocument]:
        """The held-out documents, of a stream the first that are long enough; ValueError if they are too few."""
        found = (document for source in self.sources if source.name in self.counts for document in self._of(source))
        return [replace(document, token_ids=document.token_ids.astype(np.int32)) for document in found]

    def _of(self, source: Source) -> list[TokenizedDocument]:
        count, tokens, shortest = self.counts[source.name], self.tokens[source.name], self.data.minimum_characters
        if source.name in self.small:
            return [document for document, _ in tokens if (source.name, document.name) in self.chosen]
        if source.held_out_split:
            other = replace(source, split=source.held_out_split, held_out_split="")
            tokens = TokenizedSource(other, survey(other)[1], self.rules, tokens.folder)
        chosen: dict[str, TokenizedDocument] = {}  # a part of each text
        passed_over = 0
        for document, characters in tokens:
            passed_over += document.tokens
            held_out = source.held_out_split or self.is_held_out(source, document.name)
            if held_out and characters >= shortest and whole(document.name) not in chosen:
                chosen[whole(document.name)] = document
                passed_over = 0
            if len(chosen) == count or passed_over > PATIENCE:
                break
        if len(chosen) < count:
            rare = f", and none was found in the last {passed_over:,} tokens" if passed_over > PATIENCE else ""
            raise ValueError(
                f"cannot hold out {count} documents of {source.name!r} with at least {shortest:,} characters: only "
                f"{len(chosen)} may be held out{rare}; lower held_out or minimum_characters, or change split_seed"
            )
        return [*chosen.values()]

    def training(self, source: Source, shortest: int = 0) -> Iterator[TokenizedDocument]:
        """The documents of one source to train on, in one pass; ValueError if a stream has none for long."""
        shortest, longest, passed_over = max(shortest, source.minimum_tokens), source.maximum_tokens or float("inf"), 0
        for document, _ in self.tokens[source.name]:
            copy = self.streams and digest(document.token_ids.astype(np.int32)) in self.tested
            if copy or self.is_held_out(source, document.name):
                continue
            if shortest <= document.tokens <= longest:
                passed_over = 0
                yield document
            elif (passed_over := passed_over + document.tokens) > PATIENCE:
                limits = f"{shortest:,} to {longest:,} tokens in the last {passed_over:,}"
                raise ValueError(f"{source.name}: no document of {limits}: set pack = true, or change its limits")

    @cached_property
    def tested(self) -> set[str]:
        """Digests of the held-out documents, which a stream may hold again by other names."""
        return {digest(document.token_ids) for document in self.held_out()}

    @cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """The tokens of each training document of the small sources."""
        sources = (source for source in self.sources if source.name in self.small)
        return {source.name: np.array([one.tokens for one in self.training(source)], int) for source in sources}

    def shares(self, settings: TrainingSettings) -> list[float]:
        """Each source's share of the tokens drawn: by weight, or else by size, so that all end at the same time."""
        sizes = [source.weight or self.sizes[source.name] or 1.0 for source in self.sources]
        if not self.weighted and self.small == self.sizes.keys():
            sizes = [drawn_tokens(self.lengths[name], settings) for name in self.sizes]
        elif not settings.pack:  # short texts, of which nothing could be drawn, leave their share to the others
            shorter = [0 < source.maximum_tokens < settings.window for source in self.sources]
            sizes = [0.0 if short else size for size, short in zip(sizes, shorter, strict=True)]
        return [size / (sum(sizes) or 1.0) for size in sizes]

    def reading(self, settings: TrainingSettings) -> list[dict[str, Any]]:
        """What a run reads of each source, a row for each; None is what a stream does not say before it was read.

        ValueError if documents would be trained on more often than their cap on passes allows.
        """
        rows, wanted = [], settings.steps * settings.sequences_per_step * settings.window
        for source, share in zip(self.sources, self.shares(settings), strict=True):
            held_out, small = self.counts.get(source.name, 0), source.name in self.small
            back = "2%" if self.limits.get(source.name, HELD_OUT) == HELD_OUT else f"{self.ranks[source.name]} texts"
            split = source.held_out_split or (f"{back}, by name" if held_out and not small else "")
            row = {"source": source.name, "revision": source.revision, "documents": None, "tokens": None}
            row |= {"trained_on": round(share * wanted), "passes": None, "at_most": source.passes}
            row["held_out"] = f"{held_out} of {split}" if split else str(held_out)
            if small:
                lengths = self.lengths[source.name]
                passes = share * wanted / (drawn_tokens(lengths, settings) or 1.0)
                allowed, times = source.passes // settings.long_document_weight, passes * settings.long_document_weight
                if passes > allowed:
                    steps, name = int(settings.steps * allowed / passes), source.name
                    fewer = f"training.steps to {steps}" if steps else "training.sequences_per_step or the window"
                    raise ValueError(
                        f"{name}: of {self.read[name]} documents {held_out} are held out, {self.copies[name]} copies "
                        f"of those left out; the other {len(lengths)} of {lengths.sum():,} tokens would be trained on "
                        f"{times:.1f} times, more than passes = {source.passes}: lower {fewer}, add texts, give it "
                        "less weight, lower long_document_weight, or raise passes"
                    )
                row |= {"documents": len(lengths), "tokens": int(lengths.sum()), "passes": times}
            rows.append(row)
        return rows

    def buffers(self, settings: TrainingSettings) -> Iterator[list[TokenizedDocument]]:
        """The documents of one buffer after the other, in the order of the sources, without end.

        ValueError if a source was read as often as its cap on passes allows, or holds nothing to train on.
        """
        count, shares = len(self.sources), self.shares(settings)
        shortest = settings.window if self.weighted and not settings.pack else 0
        readers = [self.training(source, shortest) for source in self.sources]
        taken, before, passes, filled = [0.0] * count, [0.0] * count, [0] * count, 0
        unread = [index for index in range(count) if shares[index] or not self.weighted]
        buffer: list[list[TokenizedDocument]] = [[] for _ in readers]
        while True:
            if not unread:
                raise ValueError(f"no source has documents for a window of {settings.window:,} tokens: set pack = true")
            index = min(unread, key=lambda index: taken[index] / (shares[index] or 1.0))
            document = next(readers[index], None)
            if document is not None:
                buffer[index].append(document)
                taken[index] += drawn_tokens(document.tokens, settings)
                filled += document.tokens
                ended = []
            else:
                unread.remove(index)
                ended = [index] if self.weighted else [] if unread else [*range(count)]
            refused = ""
            for again in ended:
                source, passes[again] = self.sources[again], passes[again] + 1
                if (passes[again] + 1) * settings.long_document_weight > source.passes:
                    refused = f"{source.name} was read to its end {passes[again]} times, and passes = {source.passes} "
                    refused += "allows no other: raise passes to go on from here, or lower training.steps"
            if ended and sum(taken[again] - before[again] for again in ended) == 0:
                names = ", ".join(self.sources[again].name for again in ended)
                refused = f"{names}: pack = {str(settings.pack).lower()}, minimum_tokens and maximum_tokens leave no "
                refused += f"document for a window of {settings.window:,} tokens"
            for again in ended:
                readers[again], before[again] = self.training(self.sources[again], shortest), taken[again]
                unread.append(again)
            enough = FEWEST * settings.window if self.weighted else 1
            if filled >= BUFFER or (filled and refused) or (ended and filled >= enough):
                yield [document for documents in buffer for document in documents]
                buffer, filled = [[] for _ in readers], 0
            if refused:
                raise ValueError(refused)


def drawn_tokens(tokens: int | np.ndarray, settings: TrainingSettings) -> float:
    """The tokens that a pass draws from documents of so many, on average."""
    tokens = np.atleast_1d(tokens)
    long, window = tokens >= settings.window, settings.window
    if not settings.pack:  # the first cut is anywhere in the first window, and what it cuts off is not used
        tokens = np.where(long, np.where(tokens == window, window, tokens - window + 1), 0)
    return float((tokens * np.where(long, settings.long_document_weight, 1.0)).sum())


def reading_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows of `Mixture.reading` as text, for a reader."""
    names = {"trained_on": "tokens trained on", "at_most": "passes allowed", "held_out": "documents held out"}
    table = pd.DataFrame(rows, dtype=object).drop(columns="revision").rename(columns=names).fillna("not known yet")
    return table.map(lambda cell: cell if isinstance(cell, str) else f"{cell:,.{2 * isinstance(cell, float)}f}")


def read_documents(
    data: Data, tokenizer: "PreTrainedTokenizerBase", *, window: int = 0, length: int = 0, cache: Path = CACHE
) -> tuple[Mixture, list[TokenizedDocument]]:
    """(what is trained on, held-out documents) of a preset's sources, as token ids; raises as `Mixture`."""
    mixture = Mixture(data, tokenizer, window=window, length=length, cache=cache)
    held_out = mixture.held_out()
    longest = max((document.tokens for document in held_out), default=length)
    if longest < length:
        raise ValueError(f"no held-out document has {length:,} tokens: the longest of {len(held_out)} has {longest:,}")
    return mixture, held_out
