"""Held-out texts of many kinds for the dose experiment, and how much of each the training documents hold.

Beside a preset's own held-out documents there are texts that most Linux machines have: manuals, headers, sources. One
that shares too many stretches of characters with the training documents, or repeats itself too much, is left out.

A second set, of other kinds, is for adapters that are trained already. None of it is in the first set. Its texts are in
packages of Debian 12, npm and PyPI, unpacked side by side in `data/cache/dose-texts` (1 GB; nothing is installed):

    apt-get download anarchism cl-asdf crawl-common debian-faq debian-handbook debian-policy debian-reference-de \\
        developers-reference dict-foldoc dict-gcide dict-jargon elpa-magit fortunes libcoq-stdlib linux-doc-6.1 \\
        nethack-common perl-doc postgresql-doc-15 python3.11-doc r-cran-janeaustenr sqlite3-doc
    for package in *.deb; do dpkg -x "$package" .; done
    npm pack lodash@4.18.1 re2@1.24.0 react-dom@19.3.1 rxjs@7.8.2 zod@4.6.7
    pip download --no-deps --no-binary zstandard zstandard==0.25.0
    for name in lodash re2 react-dom rxjs zod zstandard; do
        mkdir $name; tar xf $name-[0-9]*gz -C $name --strip-components=1; done
"""

import gzip
import hashlib
import html.parser
import re
import subprocess
import sysconfig
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from llama_long_utils.data.documents import Document, TokenizedDocument, split_documents, tokenize_documents
from llama_long_utils.data.sources import check_sources, load_documents
from llama_long_utils.paths import CACHE
from llama_long_utils.settings import Data

SHINGLE = 50  # characters of a stretch
MOST_SHARED, MOST_REPEATED = 0.05, 0.5  # of a text's stretches
PER_KIND = 2
Which = Literal["own", "first", "second"]
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

SECOND = CACHE / "dose-texts"
DEBIAN = SECOND / "usr/share"
SECOND_FOLDERS = {
    "novels": SECOND / "usr/lib/R/site-library/janeaustenr/data",
    "dictionaries": DEBIAN / "dictd",
    "essays": DEBIAN / "doc/anarchism/html",
    "faqs": DEBIAN,
    "debian-books": DEBIAN,
    "database-manuals": DEBIAN / "doc",
    "python-manual": DEBIAN / "doc/python3.11/html",
    "kernel-docs": DEBIAN / "doc/linux-doc-6.1/Documentation",
    "c-sources": SECOND,
    "javascript": SECOND,
    "typescript": SECOND,
    "proofs": SECOND / "usr/lib/ocaml/coq/theories",
    "lisp": DEBIAN,
    "game-texts": DEBIAN,
    "quotations": DEBIAN / "games/fortunes",
    "translations": DEBIAN / "doc",
}
PYTHON_CHAPTERS = ("lexical_analysis", "datamodel", "executionmodel", "import", "expressions", "simple_stmts")
SECOND_NAMES = {  # files that belong together are joined in their order, and those of a pattern by name
    "novels": ("Rdata.rdb#0", "Rdata.rdb#4", "Rdata.rdb#2"),
    "dictionaries": ("gcide.dict.dz", "jargon.dict.dz", "foldoc.dict.dz"),
    "essays": ("secA2.html", "secI4.html", "secH3.html"),
    "faqs": ("perl/5.36.0/pod/perlfaq[1-9].pod", "doc/debian/FAQ/debian-faq.en.txt.gz"),
    "debian-books": (
        "doc/debian-policy/policy.txt.gz",
        "developers-reference/developers-reference.txt.gz",
        "doc/debian-policy/fhs/fhs-3.0.txt.gz",
    ),
    "database-manuals": (
        "postgresql-doc-15/html/sql-*.html",
        "sqlite3/fileformat2.html sqlite3/vtab.html sqlite3/fts5.html",
        "postgresql-doc-15/html/app-*.html",
    ),
    "python-manual": (
        " ".join(f"reference/{chapter}.html" for chapter in PYTHON_CHAPTERS),
        "howto/functional.html howto/regex.html howto/descriptor.html howto/enum.html",
        "howto/logging-cookbook.html",
    ),
    "kernel-docs": ("memory-barriers.txt.gz", "admin-guide/cgroup-v2.rst.gz", "filesystems/vfs.rst.gz"),
    "c-sources": ("zstandard/zstd/zstd.c", "re2/vendor/re2/re2/*.cc", "re2/vendor/abseil-cpp/absl/strings/*.cc"),
    "javascript": ("lodash/lodash.js", "react-dom/cjs/react-dom-client.development.js"),
    "typescript": ("rxjs/src/internal/*.ts rxjs/src/internal/observable/*.ts", "zod/src/v4/core/*.ts"),
    "proofs": ("Lists/List.v", "Reals/RiemannInt.v", "ssr/ssrbool.v"),
    "lisp": (
        "emacs/site-lisp/elpa-src/magit-3.3.0/magit-diff.el",
        "common-lisp/source/cl-asdf/build/asdf.lisp",
        "emacs/site-lisp/elpa-src/magit-3.3.0/magit-git.el",
    ),
    "game-texts": ("doc/nethack-common/Guidebook.txt.gz", "crawl/dat/descript/*.txt", "crawl/docs/crawl_manual.txt"),
    "quotations": ("songs-poems", "cookie", "people"),
    "translations": (
        "debian-reference-de/docs/debian-reference.de.txt.gz",
        "debian-handbook/html/fr-FR/network-services.html debian-handbook/html/fr-FR/advanced-administration.html",
    ),
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
    raw = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    if kind == "man-pages":
        page = subprocess.run(["groff", "-Tascii", "-P-c", "-man", "-t"], input=raw, capture_output=True).stdout
        raw = subprocess.run(["col", "-bx"], input=page, capture_output=True).stdout
    text = raw.decode(errors="replace")
    if path.suffix == ".html":
        page = _Page()
        page.feed(text)
        text = re.sub(r"\n{3,}", "\n\n", "".join(page.parts))
    return text


def _r_vector(raw: bytes, number: int) -> str:
    """The lines of one vector of texts among those that an R package's file of data holds."""
    content = b""
    for _ in range(number + 1):  # each has its length in 4 bytes before it
        stream = zlib.decompressobj()
        content, raw = stream.decompress(raw[4:]), stream.unused_data
    place = 31  # R's versions, the encoding's name, the type and the number of lines
    lines = []
    for _ in range(int.from_bytes(content[27:place])):  # flags, a length, a line
        size = int.from_bytes(content[place + 4 : place + 8])
        lines.append(content[place + 8 : place + 8 + size].decode())
        place += 8 + size
    return "\n".join(lines)


def second_texts() -> list[Document]:
    """The texts of `SECOND_NAMES` whose packages are unpacked; a line names those that are not there."""
    found, missing = [], []
    for kind, names in SECOND_NAMES.items():
        for name in names:
            file, _, number = name.partition("#")
            paths = [path for pattern in file.split() for path in sorted(SECOND_FOLDERS[kind].glob(pattern))]
            if not paths:
                missing.append(name)
            elif number:
                found.append(Document(kind, name, _r_vector(paths[0].read_bytes(), int(number))))
            else:
                found.append(Document(kind, name, "\n".join(_read(kind, path) for path in paths)))
    if missing:
        print(f"not in {SECOND}, so not read: {', '.join(missing)}", flush=True)
    return found


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


def _known(documents: list[Document]) -> np.ndarray:
    return np.sort(shingles("\n".join(document.text for document in documents)))


def _share(hashes: np.ndarray, known: np.ndarray) -> float:
    """Of stretches, the share that is among known ones, which are sorted."""
    return float((known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] == hashes).mean())


def _powers(factor: int, count: int) -> np.ndarray:
    return np.cumprod(np.full(count, factor, dtype=np.uint64))


def read_texts(
    data: Data, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, int], which: Which = "first"
) -> tuple[list[TokenizedDocument], list[TokenizedDocument], list[dict[str, Any]]]:
    """(training documents, a stretch of each held-out text, a row about each stretch).

    Args:
        lengths: tokens of a stretch: the first, or of a text shorter than that the second; shorter ones are left out.
        which: the preset's own held-out texts, or with them texts of this machine, or the second set; of the latter
            two up to PER_KIND of each kind. The second set comes without training documents; left out is also what
            shares stretches with the first set's texts, or with what was chosen before it.
    """
    documents = [document for source in data.sources for document in load_documents(source)]
    held_out = check_sources(data.sources, data.held_out)
    sides = split_documents(documents, held_out, minimum_characters=data.minimum_characters, seed=data.split_seed)
    training, kept = sides[0], [*sides[1], *(machine_texts() if which != "own" else [])]
    seen, others = _known(training), []
    if which == "second":
        training, kept, others = [], second_texts(), [_known(kept)]
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
        shared, elsewhere = _share(hashes, seen), max([_share(hashes, other) for other in others], default=0.0)
        repeated = float(1 - len(np.unique(hashes)) / len(hashes))
        if max(shared, elsewhere) >= MOST_SHARED or repeated >= MOST_REPEATED:
            print(f"left out: {document.name} shares {max(shared, elsewhere):.0%}, repeats {repeated:.0%}", flush=True)
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
        if which == "second":
            others.append(np.sort(hashes))
            rows[-1]["share_in_other_texts"] = round(elsewhere, 4)
    return tokenize_documents(training, tokenizer), stretches, rows
