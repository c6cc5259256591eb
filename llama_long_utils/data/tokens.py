"""A source as token ids, in shards that several processes make while it is read, and that are mapped into memory.

`datasets.map(num_proc=...)` makes such files too, but from a data set that is complete: the first row is there when the
last one is done. Here a shard is there as soon as it is made; made once, its text is not read again.
"""

import ctypes
import fcntl
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from llama_long_utils.cache import Cache, digest
from llama_long_utils.data.documents import Document, TokenizedDocument, tokenizer_rules
from llama_long_utils.data.sources import read_source, survey
from llama_long_utils.paths import CACHE, REPOSITORY, file_sha256, write_atomically
from llama_long_utils.settings import Source

if TYPE_CHECKING:  # three seconds to import, in every process
    from transformers import PreTrainedTokenizerBase

VERSION = 3  # raise it when the same text and tokenizer give other ids, or other documents a shard
SHARD = 2**22  # characters of a shard, about


@dataclass(frozen=True)
class Rules:
    """All that decides the token ids of a text, as it goes to another process: the tokenizer as JSON, BOS and EOS."""

    tokenizer: str
    bos: int
    eos: int
    dtype: str  # of stored ids

    @cached_property
    def loaded(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        # One at a time: what `tokenizers` keeps of a text takes a hundred bytes a token.
        found = (self.loaded.encode_batch_fast([text], add_special_tokens=False)[0].ids for text in texts)
        return [np.array([self.bos, *ids, self.eos], dtype=self.dtype) for ids in found]


def write_shard(rules: Rules, cache: Cache, number: int, documents: list[Document], behind: Any) -> None:
    """Tokenize documents into the shard of this number; `behind` is the place in the source where the next begins.

    Of processes that come with the same shard, one makes it while the others wait.
    """

    def make() -> dict[str, Any]:
        rows = rules.encode([document.text for document in documents])
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


class Workers:
    """Processes that tokenize, one behind each thread. They start with the first whole shard: a few texts need none.

    They are no `multiprocessing` ones: these run the script again that asks for them, unless it is written for that.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", count: int | None = None) -> None:
        dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"
        self.rules = Rules(tokenizer_rules(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, dtype)
        self.first_message = pickle.dumps(self.rules)  # now: no thread adds what it caches
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of a launcher, which share the cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.count = count or max(1, cores // here)
        self.threads: ThreadPoolExecutor | None = None
        self.processes: dict[int, subprocess.Popen] = {}  # by the thread that asks it

    def start(self, *job: Any) -> Future:
        """Begin `write_shard` in another process."""
        self.threads = self.threads or ThreadPoolExecutor(self.count)
        return self.threads.submit(self.ask, job)

    def ask(self, job: tuple) -> None:
        """Have a process write a shard; if the process is killed, nothing is written, and a line says so."""
        process = self.processes.get(thread := threading.get_ident())
        try:
            if process is None:
                command = [sys.executable, "-m", "llama_long_utils.data.tokens"]
                options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
                quiet = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
                process = self.processes[thread] = subprocess.Popen(command, cwd=REPOSITORY, env=quiet, **options)
                process.stdin.write(self.first_message)
            pickle.dump(job, process.stdin)
            process.stdin.flush()
            error = pickle.load(process.stdout)
        except (OSError, EOFError):
            if self.processes.pop(thread, None):  # not by `close`
                process.kill()
                said = "a tokenizing process was killed, maybe for lack of memory: its part is made here\n"
                print(said, end="", flush=True)  # in one piece, as another thread may write, too
        else:
            if error:
                raise error

    def close(self) -> None:
        """Stop them."""
        if self.threads:
            self.threads.shutdown(wait=False, cancel_futures=True)
        stopped, self.threads, self.processes = self.processes, None, {}
        for process in list(stopped.values()):
            process.kill()
            process.wait()


def work() -> None:
    """What a process does: shards that come on standard input, until the one that asks is gone."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    rules, give_back = pickle.load(sys.stdin.buffer), getattr(ctypes.CDLL(None), "malloc_trim", int)
    while sys.stdin.buffer.peek(1):
        try:
            answer = write_shard(rules, *pickle.load(sys.stdin.buffer))
        except Exception as error:
            answer = error
        give_back(0)  # a long text leaves half a GiB
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:
            os._exit(1)  # the one that asked was killed: nobody is to be told


@dataclass(frozen=True)
class Shard:
    """Documents of a source: `ends[i]` to `ends[i + 1]` are the token ids of the i-th. The one without any is the last.

    `behind` is the place in the source where the next shard begins.
    """

    token_ids: np.ndarray
    ends: list[int]
    names: list[str]
    characters: list[int]
    behind: Any


class TokenizedSource:
    """The documents of a source, of this identity (`survey`), as token ids. What was read once is in the cache."""

    def __init__(self, source: Source, identity: list[Any], workers: Workers, cache: Path = CACHE) -> None:
        self.source, self.identity, self.workers, self.folder = source, identity, workers, cache
        inputs = {"tokenizer": digest(workers.rules), "source": identity}
        self.key = digest(VERSION, inputs)
        self.cache = Cache(cache / "shards" / f"{Path(source.name).name}-{self.key}", VERSION, inputs)

    def __iter__(self) -> Iterator[tuple[TokenizedDocument, int]]:
        """Each document, and how many characters it has."""
        for shard in self.shards():
            for name, characters, (start, stop) in zip(
                shard.names, shard.characters, pairwise(shard.ends), strict=True
            ):
                yield TokenizedDocument(self.source.name, name, shard.token_ids[start:stop]), characters

    def shards(self) -> Iterator[Shard]:
        """All shards in order. Those that are not in the cache are made, a few of them ahead of the one asked for.

        ValueError if the source is no longer what it was when the run began.
        """
        waiting: deque[tuple[Shard | Future | None, tuple]] = deque()
        reader, behind, number, more = None, None, 0, True
        while more or waiting:
            # One more for each that is taken, and as many as the workers need while the first is waited for.
            added = False
            while more and len(waiting) < self.workers.count + 2 and not (added and _is_made(waiting[0][0])):
                shard, job = self.stored(number), ()
                if shard:
                    reader, behind, more = None, shard.behind, bool(shard.names)
                else:
                    if reader is None and survey(self.source)[1] != self.identity:
                        raise ValueError(f"the texts of {self.source.name!r} have changed since the start: run again")
                    reader = reader or read_source(self.source, behind, cache=self.folder)
                    documents, characters = [], 0
                    while characters < SHARD and (read := next(reader, None)):
                        document, behind = read
                        documents.append(document)
                        characters += len(document.text)
                    job, more = (self.cache, number, documents, behind), bool(documents)
                    shard = self.workers.start(*job) if characters >= SHARD else None
                waiting.append((shard, job))
                number, added = number + 1, True
            shard, job = waiting.popleft()
            if isinstance(shard, Future):
                shard.result()
            if not isinstance(shard, Shard):
                write_shard(self.workers.rules, *job)  # unless a worker has
                shard = self.stored(job[1])
            if shard.names:
                yield shard

    def stored(self, number: int) -> Shard | None:
        """A whole shard of the cache; one that is not whole is removed, to be made again."""
        found = self.cache.kept(f"{number:06}", {}, ".json")
        if found is None:
            return None
        index, tokens = (self.cache.path(f"{number:06}", {}, suffix) for suffix in (".json", ".npy"))
        if not tokens.is_file() or file_sha256(tokens) != found.pop("sha256"):
            print(f"{tokens.name} in {tokens.parent.name}/ is not whole: made again", flush=True)
            index.unlink(missing_ok=True)
            return None
        ids = np.load(tokens, mmap_mode="r") if found["names"] else np.empty(0)
        return Shard(np.asarray(ids), **found)


def _is_made(shard: Shard | Future | None) -> bool:
    return shard.done() if isinstance(shard, Future) else shard is not None


if __name__ == "__main__":
    work()
