"""Held-out texts of many kinds for the dose experiment, and how much of each the training documents hold.

Beside a preset's own held-out documents there are texts that most Linux machines have: manuals, headers, sources. One
that shares too many stretches of characters with the training documents, or repeats itself too much, is left out.
"""

import gzip
import hashlib
import html.parser
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llama_long_utils.data.documents import Document, TokenizedDocument, split_documents, tokenize_documents
from llama_long_utils.data.sources import check_sources, load_documents
from llama_long_utils.settings import Data

SHINGLE = 50  # characters of a stretch
MOST_SHARED, MOST_REPEATED = 0.05, 0.5  # of a text's stretches
PER_KIND = 2
FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
FOLDERS = {
    "python-projects": Path(sysconfig.get_paths()["purelib"]),
    "vim-manual": Path("/usr/share/vim/vim90/doc"),
    "man-pages": Path("/usr/share/man"),
    "node-docs": Path("/usr/share/doc/nodejs/api"),
    "rust-books": next(Path.home().glob(".rustup/toolchains/stable*/share/doc/rust/html"), Path("/none")),
    "info-manuals": Path("/usr/share/info"),
    "c-headers": Path("/usr"),
    "perl": Path("/usr/share/perl/5.36.0"),
}
NAMES = {
    "python-projects": ("scipy/stats/_stats_py.py", "torch/fx/experimental/symbolic_shapes.py", "pandas/core/frame.py"),
    "vim-manual": ("options.txt", "eval.txt", "syntax.txt"),
    "man-pages": ("man1/bash.1.gz", "man5/proc.5.gz", "man1/git-config.1.gz"),
    "node-docs": ("fs.md", "stream.md", "crypto.md"),
    "rust-books": ("reference/print.html", "book/print.html", "cargo/print.html"),
    "info-manuals": ("coreutils.info.gz", "sed.info.gz", "gettext.info.gz"),
    "c-headers": ("include/sqlite3.h", "local/cuda-13.0/include/cuda.h", "include/linux/bpf.h"),
    "perl": ("perl5db.pl", "CPAN.pm", "CGI.pm"),
}


class _Page(html.parser.HTMLParser):
    """The text of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.hidden += tag in ("script", "style", "nav", "head")
        if tag in ("p", "h1", "h2", "h3", "h4", "li", "pre", "tr", "div"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "nav", "head")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def _read(kind: str, path: Path) -> str:
    """The text of a file as a person reads it."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if kind == "man-pages":
        page = subprocess.run(["groff", "-Tascii", "-P-c", "-man", "-t"], input=raw, capture_output=True).stdout
        raw = subprocess.run(["col", "-bx"], input=page, capture_output=True).stdout
    text = raw.decode(errors="replace")
    if path.suffix == ".html":
        page = _Page()
        page.feed(text)
        text = re.sub(r"\n{3,}", "\n\n", "".join(page.parts))
    return text


def machine_texts() -> list[Document]:
    """The texts of `NAMES` that this machine has; a line names those that it has not."""
    found, missing = [], []
    for kind, names in NAMES.items():
        for name in names:
            path = FOLDERS[kind] / name
            if path.is_file():
                found.append(Document(kind, name, _read(kind, path)))
            else:
                missing.append(name)
    if missing:
        print(f"not on this machine, so not read: {', '.join(missing)}", flush=True)
    return found


def shingles(text: str) -> np.ndarray:
    """Hashes of every stretch of SHINGLE bytes, white space collapsed: uint64 of shape (stretches,).

    A polynomial in FACTOR modulo 2^64, as a difference of running sums: equal stretches have equal hashes anywhere.
    """
    raw = np.frombuffer(re.sub(r"\s+", " ", text).encode(), dtype=np.uint8).astype(np.uint64)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(raw * _powers(FACTOR, len(raw)))])
    stretches = max(len(raw) - SHINGLE + 1, 0)
    return (sums[SHINGLE:] - sums[:-SHINGLE])[:stretches] * _powers(pow(FACTOR, -1, 2**64), stretches)


def _powers(factor: int, count: int) -> np.ndarray:
    return np.cumprod(np.full(count, factor, dtype=np.uint64))


def read_texts(
    data: Data, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, int], *, more: bool = True
) -> tuple[list[TokenizedDocument], list[TokenizedDocument], list[dict[str, Any]]]:
    """(training documents, a stretch of each held-out text, a row about each stretch).

    Args:
        lengths: tokens of a stretch: the first, or of a text shorter than that the second; shorter ones are left out.
        more: texts of this machine too, up to PER_KIND of each kind.
    """
    documents = [document for source in data.sources for document in load_documents(source)]
    held_out = check_sources(data.sources, data.held_out)
    sides = split_documents(documents, held_out, minimum_characters=data.minimum_characters, seed=data.split_seed)
    training, kept = sides[0], [*sides[1], *(machine_texts() if more else [])]
    seen = np.sort(shingles("\n".join(document.text for document in training)))
    stretches, rows = [], []
    own, width = set(data.sources), "<u2" if len(tokenizer) <= 2**16 else "<u4"
    for document, text in zip(tokenize_documents(kept, tokenizer), kept, strict=True):
        full = document.source not in own and sum(row["kind"] == document.source for row in rows) == PER_KIND
        length = next((length for length in lengths if document.tokens >= length), 0)
        if full or not length:
            continue
        first = int(np.random.default_rng([0, len(rows)]).integers(0, document.tokens - length + 1))
        ids = document.token_ids[first : first + length].copy()
        ids[0] = tokenizer.bos_token_id
        hashes = shingles(tokenizer.decode(ids[1:]))
        shared = float((seen[np.searchsorted(seen, hashes).clip(max=len(seen) - 1)] == hashes).mean())
        repeated = float(1 - len(np.unique(hashes)) / len(hashes))
        if shared >= MOST_SHARED or repeated >= MOST_REPEATED:
            print(f"left out: {document.name} shares {shared:.0%}, repeats {repeated:.0%}", flush=True)
            continue
        stretches.append(TokenizedDocument(document.source, document.name, ids))
        rows.append(
            {
                **{"kind": document.source, "source": document.name, "document_tokens": document.tokens},
                **{"first": first, "tokens": length},
                "sha256_of_ids": hashlib.sha256(ids.astype(width).tobytes()).hexdigest(),
                "sha256_of_text": hashlib.sha256(text.text.encode()).hexdigest(),
                "share_in_training": round(shared, 4),
                "repeats_itself": round(repeated, 4),
            }
        )
    return tokenize_documents(training, tokenizer), stretches, rows
