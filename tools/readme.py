"""The parts of README and notebooks that are made from other files."""

import argparse
import re
from pathlib import Path

import nbformat

from llama_long_utils.paths import REPOSITORY, RESULTS, write_atomically
from llama_long_utils.presets import load_preset, preset_names
from tools.headlines import in_brief
from tools.scoreboard import scoreboard_table
from tools.sequence import delivered, index, links
from tools.store import write_notebook


def presets() -> str:
    """Markdown table of the presets; first those with records of ours."""
    rows = ["| preset | model | window | trained on sequences of | needs | measured by us |", "|---" * 6 + "|"]
    for recorded, name in sorted(((RESULTS / name).is_dir(), name) for name in preset_names())[::-1]:
        preset = load_preset(name)
        windows = f"{preset.base.window:,} to {preset.extension.window:,}"
        skips = ", positions skipped (PoSE)" * (preset.training.window < preset.extension.window)
        measured = "yes" if recorded else "no"
        row = [f"`{name}`", preset.base.source, windows, f"{preset.training.window:,}{skips}", preset.needs, measured]
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def write_generated(check: bool = False) -> list[Path]:
    """Write what is made from other files: four blocks of the README, the links of each notebook.

    Args:
        check: only return the files that are out of step.
    """
    changed = []
    readme = REPOSITORY / "README.md"
    text = readme.read_text("utf-8")
    new = text
    made = {"index": index(), "brief": in_brief(), "presets": presets()}
    made["scoreboard"] = scoreboard_table()
    for name, content in made.items():
        new = re.sub(rf"(?s)(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, c=content: f"{m[1]}{c}\n{m[2]}", new)
    if new != text:
        changed.append(readme)
        if not check:
            write_atomically(readme, new.encode())
    for notebook in delivered():
        stored = nbformat.read(notebook.path, as_version=4)
        last = stored.cells[-1]
        line = links(notebook.slug)
        if last.source.splitlines()[-1] != line:
            changed.append(notebook.path)
            last.source = "\n".join([*last.source.splitlines()[:-1], line])
            if not check:
                write_notebook(stored, notebook.path)
    return changed


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for path in write_generated():
        print("written:", path.relative_to(REPOSITORY))
