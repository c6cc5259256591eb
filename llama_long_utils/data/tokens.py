"""A source as token ids, in shards that are made while it is read, and that are mapped into memory.

`datasets.map` makes such files too, but from a data set that is complete: the first row is there when the last one is
done. Here a shard is there as soon as it is made; made once, its text is not read again.
"""

import fcntl
from collections.abc import Iterator
from io import BytesIO
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llama_long_utils.cache import Cache, digest
from llama_long_utils.data.documents import Document, Rules, TokenizedDocument
from llama_long_utils.data.sources import read_source, survey
from llama_long_utils.paths import CACHE, file_sha256, write_atomically
from llama_long_utils.settings import Source

VERSION = 3  # raise it when the same text and tokenizer give other ids, or other documents a shard
SHARD = 2**22  # characters of a shard, about


def write_shard(rules: Rules, cache: Cache, number: int, documents: list[Document], behind: Any) -> None:
    """Tokenize documents into the shard of this number; `behind` is the place in the source where the next begins.

    `ends[i]` to `ends[i + 1]` are the token ids of the i-th document. The shard without any is the last.
    Of processes that come with the same shard, one makes it while the others wait.
    """

    def make() -> dict[str, Any]:
        rows = rules.encode(documents)
        content = BytesIO()
        np.save(content, np.concatenate([np.empty(0, rules.dtype), *rows]))
        tokens = write_atomically(cache.path(f"{number:06}", {}, ".npy"), content.getvalue())
        return {
            "sha256": file_sha256(tokens),
            "ends": np.cumsum([0, *map(len, rows)]).tolist(),
            "names": [document.name for document in documents],
            "characters": [len(document.text) for document in documents],
            "behind": behind,
        }

    lock = cache.path(f"{number:06}", {}, ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)  # the kernel takes it back if the process dies
        cache.value(f"{number:06}", make)


class TokenizedSource:
    """The documents of a source, of this identity (`survey`), as token ids. What was read once is in the cache."""

    def __init__(self, source: Source, identity: list[Any], rules: Rules, cache: Path = CACHE) -> None:
        self.source, self.identity, self.rules, self.folder = source, identity, rules, cache
        inputs = {"tokenizer": digest(rules), "source": identity}
        self.key = digest(VERSION, inputs)
        self.cache = Cache(cache / "shards" / f"{Path(source.name).name}-{self.key}", VERSION, inputs)

    def __iter__(self) -> Iterator[tuple[TokenizedDocument, int]]:
        """Each document, and how many characters it has."""
        for token_ids, shard in self.shards():
            rows = zip(shard["names"], shard["characters"], pairwise(shard["ends"]), strict=True)
            for name, characters, (start, stop) in rows:
                yield TokenizedDocument(self.source.name, name, token_ids[start:stop]), characters

    def shards(self) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """All shards in order, as token ids and what `write_shard` says of them; made when they are asked for.

        ValueError if the source is no longer what it was when the run began.
        """
        reader, behind = None, None
        for number in count():
            shard = self.stored(number)
            if shard:
                reader = None
            else:
                if reader is None and survey(self.source)[1] != self.identity:
                    raise ValueError(f"the texts of {self.source.name!r} have changed since the start: run again")
                reader = reader or read_source(self.source, behind, cache=self.folder)
                documents, characters = [], 0
                while characters < SHARD and (read := next(reader, None)):
                    document, behind = read
                    documents.append(document)
                    characters += len(document.text)
                write_shard(self.rules, self.cache, number, documents, behind)
                shard = self.stored(number)
            if not shard[1]["names"]:
                return
            behind = shard[1]["behind"]
            yield shard

    def stored(self, number: int) -> tuple[np.ndarray, dict[str, Any]] | None:
        """A whole shard of the cache; one that is not whole is removed, to be made again."""
        found = self.cache.read(f"{number:06}", {}, ".json")
        if found is None:
            return None
        index, tokens = (self.cache.path(f"{number:06}", {}, suffix) for suffix in (".json", ".npy"))
        if not tokens.is_file() or file_sha256(tokens) != found["sha256"]:
            print(f"{tokens.name} in {tokens.parent.name}/ is not whole: made again", flush=True)
            index.unlink(missing_ok=True)
            return None
        return np.asarray(np.load(tokens, mmap_mode="r") if found["names"] else np.empty(0)), found
