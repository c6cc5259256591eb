"""The claims scoreboard: the paper's twelve claims against our records, one line each.

Verdicts follow intervals. A comparison whose arms were not fit for it is undecided, whatever its numbers say.
"""

import argparse
from functools import cache
from html import escape

from experiments.race_longer_results import longer_results
from experiments.race_results import race_results
from llama_long_utils.presets import load_preset
from llama_long_utils.records import read_published
from tools.claims.attention import full_attention
from tools.claims.context import model_size, power_law
from tools.claims.instruction import instruction_tuning
from tools.claims.line import Line
from tools.claims.methods import past_the_window, perplexity, retrieval, xpos
from tools.claims.pretraining import data_mix, short_then_long
from tools.claims.short_tasks import short_tasks

NAMES = {  # in which `Line.scale` says it, and what the table says
    "Qwen2.5-Coder": "Qwen2.5-Coder-1.5B",
    "SmolLM2": "SmolLM2-135M",
    "tiny Llama": "tiny Llama",
    "from scratch": "small Llamas from scratch",
    "Llama 2 7B": "Llama 2 7B, random weights",
}


@cache  # a second, and a page asks for it three times
def scoreboard() -> dict[str, Line]:
    """C1 to C12 in order."""
    preset, published = load_preset("tiny"), read_published("llama2_long")
    race = race_results(preset)
    longer = longer_results(preset) or race
    more = read_published("llama2_long_benchmarks")
    lines = [
        past_the_window(race, longer, published["figure_5b"]),
        perplexity(longer, published["table_5"]),
        retrieval(longer, published["figure_5b"]),
        xpos(longer, race, published["table_5"], published["figure_5b"]),
        power_law(published),
        model_size(published["figure_1_power_law"]),
        short_tasks(more["table_1"]),
        data_mix(more["table_7"]),
        short_then_long(published["table_10"], published["table_11"]),
        *instruction_tuning(published["table_9"]),
        full_attention(published["attention"]),
    ]
    return {f"C{number}": line for number, line in enumerate(lines, start=1)}


def scoreboard_table() -> str:
    """The scoreboard in Markdown: a row for each claim, its verdict with a reason, and the models."""
    rows = [["", "the paper's claim", "verdict", "why", "on"]]
    for name, line in scoreboard().items():
        verdict = line.verdict.partition(":")[0]
        models = ", ".join(shown for words, shown in NAMES.items() if words in line.scale)
        rows.append([name, line.claim, f"**{verdict}**", line.reason, models])
    return markdown_table(rows)


def scoreboard_details() -> str:
    """The numbers behind each verdict, in Markdown: a folded list for each claim."""
    folded = []
    for name, line in scoreboard().items():
        verdict, _, reason = line.verdict.partition(": ")
        parts = {"the paper": line.paper, "we found": line.ours, "on": line.scale, f"so: {verdict}": reason}
        listed = (f"- **{part}**{_listed(text)}" for part, text in parts.items())
        summary = f"<details><summary>{name} · {escape(line.claim)}: {verdict}</summary>"
        folded.append("\n\n".join([summary, "\n".join(listed), "</details>"]))
    return "\n\n".join(folded)


def _listed(text: str) -> str:
    """Clauses as a list inside a list; one alone behind a colon."""
    clauses = text.split("; ")
    return "".join(f"\n  - {clause}" for clause in clauses) if len(clauses) > 1 else f": {text}" * bool(text)


def markdown_table(rows: list[list[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"{scoreboard_table()}\n\n{scoreboard_details()}")
