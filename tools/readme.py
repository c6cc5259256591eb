"""The parts of README and notebooks that are made from other files."""

import re
from pathlib import Path

import nbformat
import pandas as pd

from llama_long_utils.figures import LABELS
from llama_long_utils.paths import REPOSITORY, RESULTS, write_atomically
from llama_long_utils.records import read_published, read_record, read_table
from tools.sequence import delivered, index, links
from tools.store import write_notebook


def write_generated(check: bool = False) -> list[Path]:
    """Write what is made from other files: the README's index and results, the links of each notebook.

    Args:
        check: only return the files that are out of step.
    """
    changed = []
    readme = REPOSITORY / "README.md"
    text = readme.read_text("utf-8")
    new = text
    for name, content in {"index": index(), "results": results_summary()}.items():
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


def results_summary() -> str:
    """Markdown: NLL by position as recorded at every preset, beside published perplexities at 7B."""
    records = {path: read_table(path, "nll_by_position") for path in RESULTS.glob("*/06_perplexity_by_position.json")}
    lines = []
    for path, table in sorted(records.items(), key=lambda entry: entry[1].position_high.max()):
        lines += _measured(path, pd.concat([table, read_table(path, "control")]))
    published = pd.DataFrame(read_published("perplexity_by_context")["rows"])
    contexts = sorted(published.context.unique())
    lines.append(f"| published: perplexity on PG19 | {' | '.join(f'{context:,}' for context in contexts)} |")
    lines.append("|---|" + "---|" * len(contexts))
    for (paper, model), rows in published.groupby(["paper", "model"], sort=False):
        values = rows.set_index("context").perplexity
        cells = " | ".join(f"{values[context]:.2f}" if context in values else "-" for context in contexts)
        lines.append(f"| {model} ({paper}) | {cells} |")
    return "\n".join(lines)


def _measured(path: Path, table: pd.DataFrame) -> list[str]:
    """A record's NLL in its last seven position buckets, and where it comes from."""
    buckets = table.drop_duplicates(["position_low", "position_high"]).sort_values("position_low").tail(7)
    head = " | ".join(
        f"{low:,} to {high:,}" for low, high in zip(buckets.position_low, buckets.position_high, strict=True)
    )
    lines = [f"| measured: NLL in nats, by position | {head} |", "|---|" + "---|" * len(buckets)]
    for arm, rows in table.groupby("arm", sort=False):
        by_low = rows.set_index("position_low")
        found = [by_low.loc[low] if low in by_low.index else None for low in buckets.position_low]
        shown = [f"{row.nll:.2f} [{row.low:.2f}, {row.high:.2f}]" if row is not None else "-" for row in found]
        lines.append(f"| {LABELS[arm]} | {' | '.join(shown)} |")
    provenance, preset = read_record(path)["provenance"], path.parent.name
    counts = " and ".join(f"{count}" for count in sorted(set(buckets.documents), reverse=True))
    few = ", of three the lowest and highest" if buckets.documents.min() == 3 else ""
    return [
        *lines,
        "",
        f"Preset {preset}, {counts} held-out documents, 95% bootstrap over documents{few}, {provenance['date']}, "
        f"commit {provenance['commit']}, {provenance['device']} ([record](data/results/{preset}/{path.name})).",
        "",
    ]
