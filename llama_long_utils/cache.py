"""Results that survive an interruption: each is kept in a file that is named by everything it depends on.

A key holds the inputs, spelled out, and a version that a person raises when the code's numbers change. Source text is
no part of it: a comment must not throw two hours of work away. A file that fails its checksum is made again.
"""

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llama_long_utils.paths import write_atomically
from llama_long_utils.progress import progress_bar
from llama_long_utils.records import write_arrays

T = TypeVar("T")
KEY = "__key__"  # the member of an .npz that holds its key
DAMAGES = (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error)  # what a read raises


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that name values, dataclasses, arrays, bytes; ValueError for a number not finite."""
    return hashlib.sha256(_as_json(parts).encode()).hexdigest()[:16]


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    """A value for which JSON has no form; arrays and bytes by their hash."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Path):
        return str(value)
    return dict(value)  # of another kind of mapping


@dataclass(frozen=True)
class Cache:
    """Results below `folder`, of code of this `version`; `inputs` are what all depend on, each call adds its own."""

    folder: Path
    version: int
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def path(self, name: str, inputs: Mapping[str, Any], suffix: str) -> Path:
        """Where a result is kept: a readable name and the digest of its key."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", ".", name)[:80]
        return self.folder / f"{readable}-{digest(self._key(name, inputs))}{suffix}"

    def _key(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return json.loads(_as_json({"name": name, "version": self.version, **self.inputs, **inputs}))

    def read(self, name: str, inputs: Mapping[str, Any], suffix: str, other: Any = None) -> Any:
        """What a file holds; `other` if it is not there, or not whole, which a line says."""
        path, key = self.path(name, inputs, suffix), self._key(name, inputs)
        if not path.is_file():
            return other
        try:
            if suffix == ".npz":
                with np.load(path, allow_pickle=False) as stored:
                    content = dict(stored)
                whole = str(content.pop(KEY, "")) == _as_json(key)
            else:
                stored = json.loads(path.read_bytes())
                content = stored["content"]
                whole = stored["key"] == key and stored["sha256"] == _checksum(content)
            if not whole:
                raise ValueError("its checksum or its key differs")
            return content
        except DAMAGES as error:
            print(f"{path.name} in {path.parent.name}/ is not whole ({error}): made again", flush=True)
            return other

    def arrays(self, name: str, make: Callable[[], dict[str, np.ndarray]], **inputs: Any) -> dict[str, np.ndarray]:
        """Arrays by name, as `make` returns them, from their file or made now."""
        found = self.read(name, inputs, ".npz")
        if found is None:
            self.write(name, inputs, found := make(), ".npz")
        return found

    def value(self, name: str, make: Callable[[], T], **inputs: Any) -> T:
        """A value as JSON has it, from its file or made now."""
        if (found := self.read(name, inputs, ".json", missing := object())) is missing:
            self.write(name, inputs, found := json.loads(json.dumps(make())))  # as it is read from the file
        return found

    def write(self, name: str, inputs: Mapping[str, Any], content: Any, suffix: str = ".json") -> None:
        """Write what `read` finds, over what was there."""
        path, key = self.path(name, inputs, suffix), self._key(name, inputs)
        if suffix == ".npz":  # a zip: each member has a CRC
            write_arrays(path, {**content, KEY: np.array(_as_json(key))})
        else:
            stored = {"key": key, "sha256": _checksum(content), "content": content}
            write_atomically(path, json.dumps(stored).encode())

    def items(
        self,
        name: str,
        items: Sequence[T],
        measure: Callable[[Sequence[T]], Sequence[Any]],
        *,
        item_key: Callable[[T], Any],
        at_once: int = 1,
        progress: str = "",
        **inputs: Any,
    ) -> list[Any]:
        """What was measured of every item, in their order; those in the file are not measured again.

        `measure` gives one result, as JSON has it, for each of a few items: `at_once` between two writes of the file.
        `item_key` is all that an item's result depends on; `progress` says what is measured, in place of the name.
        """
        done: dict[str, Any] = self.read(name, inputs, ".json") or {}
        keys = [digest(item_key(item)) for item in items]
        waiting = [number for number, item_digest in enumerate(keys) if item_digest not in done]
        with progress_bar(progress or name, len(items), already=len(items) - len(waiting)) as report:
            for first in range(0, len(waiting), at_once):
                part = waiting[first : first + at_once]
                results = json.loads(json.dumps(measure([items[number] for number in part])))
                done |= {keys[number]: result for number, result in zip(part, results, strict=True)}
                self.write(name, inputs, done)
                report(len(items) - len(waiting) + first + len(part))
        return [done[item_digest] for item_digest in keys]


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
