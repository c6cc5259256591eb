"""Data sets for a hub of this machine, under the names, configurations and columns that a preset asks for."""

from itertools import islice
from pathlib import Path

import pandas as pd

from llama_long_utils.data.sources import load_documents
from llama_long_utils.settings import Preset

COUNTS = {"books": 6, "files": 400}  # of each split


def texts(book_characters: int, start: int) -> list[str]:
    """Books of so many characters, plays and speeches one after another, or else files of Python's library."""
    if not book_characters:
        files = [document.text for document in load_documents("python-stdlib") if len(document.text) < 20_000]
        return files[start::2][: COUNTS["files"]]
    parts = [document.text for name in ("shakespeare", "sotu") for document in load_documents(name)]
    books, place = [], start
    while len(books) < COUNTS["books"]:
        book = ""
        while len(book) < book_characters:
            book += parts[place * 7 % len(parts)][: book_characters // 2]
            place += 2
        books.append(book)
    return books


def serve_texts(preset: Preset, root: Path, book_characters: int = 400_000) -> None:
    """Write datasets/OWNER/NAME below a hub's root for every source of a preset that comes from the hub."""
    for source in preset.data.mixture:
        if not source.name.startswith("hub:"):
            continue
        folder = root / "datasets" / source.name.removeprefix("hub:")
        folder.mkdir(parents=True, exist_ok=True)
        splits = [split for split in (source.split, source.held_out_split) if split]
        long = any(source.name.endswith(name) for name in preset.data.held_out)
        lines = ["---", "configs:", f"- config_name: {source.config or 'default'}", "  data_files:"]
        for number, split in enumerate(splits):
            rows = texts(book_characters if long else 0, number)
            for part in range(2):
                file = folder / f"{source.config or 'data'}-{split}-{part}.parquet"
                pd.DataFrame({source.column: list(islice(rows, part, None, 2))}).to_parquet(file, row_group_size=4)
            lines += [f"  - split: {split}", f"    path: {source.config or 'data'}-{split}-*.parquet"]
        (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
