"""Reading the records of a real model that was tuned on instructions and asked SQuAD and HotpotQA."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from experiments.instruction_results import (
    FULL,
    LONG,
    LOOKS,
    LOSS,
    PAIRS,
    PLAIN,
    SLUG,
    InstructionResults,
    two_styles,
)
from llama_long_utils.figures import intervals, plt, save_figure
from llama_long_utils.notebooks import measured
from llama_long_utils.records import recorded
from llama_long_utils.settings import Preset

SETS = {"SQuAD": SLUG, "HotpotQA": "09_on_hotpotqa"}  # records by what was asked
SCORES = {"f1": "F1", "log_probability": "log-probability"}
NO_F1 = "no change of F1 is detected between tuned arms"
NO_CHANGE = "with answers at full weight no change is detected, of F1 or log-probability"
LOW = 10  # points: an F1 below it has few right answers
BY_F1 = {"Qasper": "qasper", "NarrativeQA": "narrativeqa"}  # the tasks of Table 9 that F1 scores


def question_results(preset: Preset) -> dict[str, InstructionResults]:
    """The committed records of a real model by the title of what was asked."""
    found = {title: recorded(preset.name, slug) for title, slug in SETS.items()}
    return {title: InstructionResults(record, preset) for title, record in found.items() if record}


def counts(sets: Mapping[str, InstructionResults]) -> str:
    """How many questions a seed is asked, and the highest share of exact matches: prose."""
    parts = []
    for title, results in sets.items():
        asked = [f"{results.scores(results.arms[0], [at], 'f1').shape[1]} behind {at:,}" for at in results.lengths]
        parts.append(f"{title} asks {' and '.join(asked)} tokens")
    most = max(
        results.scores(arm, [at], "exact").mean()
        for results in sets.values()
        for arm in results.arms
        for at in results.lengths
    )
    return f"Of questions for each seed {', '.join(parts)}. At most {most:.1f} percent of answers match exactly."


def trained_and_asked(sets: Mapping[str, InstructionResults]) -> pd.DataFrame:
    """Of each arm, means over seeds: labels, questions, how many of these are different, F1 past the old window."""
    first = next(iter(sets.values()))
    runs = first.runs.groupby("arm")
    table = runs[["labels", "questions", "different"]].mean().round().astype(int).assign(seeds=runs.size())
    table = table.loc[first.arms]
    for title, results in sets.items():
        scores = {arm: results.mean(results.scores(arm, results.past, "f1")) for arm in results.arms}
        table[f"F1, {title}"] = {arm: measured(*score, digits=1, sign=False) for arm, score in scores.items()}
    return table.reset_index(names="arm").assign(arm=[LOOKS[arm][0] for arm in table.index])


def same_trainings(sets: Mapping[str, InstructionResults]) -> bool:
    """Whether an arm and seed was trained on as much, whatever was asked then."""
    parts = [one.runs.set_index(["arm", "seed"])[["labels", "questions", "different"]] for one in sets.values()]
    return all(parts[0].loc[part.index].equals(part) for part in parts)


def floor_of(results: InstructionResults) -> pd.Series:
    """The one answer that earns most F1 if it is given to every question, with what it earns (shares)."""
    return results.record.table("floors").sort_values("f1").iloc[-1]


def floors_in_words(sets: Mapping[str, InstructionResults]) -> str:
    """What one answer to every question earns, in one sentence."""
    best = {title: floor_of(results) for title, results in sets.items()}
    earned = [f'{100 * one.f1:.1f} in {title} ("{one.answer}")' for title, one in best.items()]
    return f"One answer to every question earns an F1 of at most {' and '.join(earned)}."


def beside_table_9(sets: Mapping[str, InstructionResults], published: dict) -> pd.DataFrame:
    """What the paper claims: changes of F1 in its tasks, and ours past the old window with what they say of that."""
    rows = []
    for claim, name in {"C10": LOSS, "C11, without that loss": PLAIN, "C11, with it": LONG}.items():
        theirs = [published["rows"][LOOKS[arm][-1]] for arm in PAIRS[name]]
        row = {"claim": claim, "difference": name}
        for title, task in BY_F1.items():
            first, second = (values[published["columns"].index(task)] for values in theirs)
            row[f"{title} (Table 9)"] = measured(first - second, digits=1)
        for title, results in sets.items():
            if name not in results.pairs:
                row[title] = "not measured"
                continue
            value, low, high = results.difference(*PAIRS[name], "f1")
            word = "agrees" if low > 0 else "disagrees" if high < 0 else "undecided"
            row[title] = f"{word}: {measured(value, low, high, digits=1)}"
        rows.append(row)
    return pd.DataFrame(rows)


def levels(results: InstructionResults) -> dict[str, bool]:
    """Where no change should be detected past the old window: whether every interval holds 0."""
    every = [results.difference(*pair, "f1") for pair in results.pairs.values()]
    found = {NO_F1: every}
    if FULL in results.pairs:
        full = [results.difference(*PAIRS[FULL], measure) for measure in ("f1", "log_probability")]
        found[NO_CHANGE] = full
    return {claim: all(low <= 0 <= high for _, low, high in changes) for claim, changes in found.items()}


def origin_of(sets: Mapping[str, InstructionResults]) -> str:
    """In words: by whom the records were made, and from when on where they have several dates."""
    first, *others = sorted({results.record.origin for results in sets.values()})
    by, _, date = first.rpartition(" us ")
    return f"{by} us from {date[:10]} on" if others else first


def draw_on_questions(sets: Mapping[str, InstructionResults], folder: Path, slug: str, number: str) -> None:
    """Differences between arms at the real model past its old window: left F1, right log-probability."""
    units = {"f1": "points", "log_probability": "nats per token"}
    names = [name for name in PAIRS if any(name in results.pairs for results in sets.values())]
    rows = [
        (textwrap.fill(name, 26), title, measure, *results.difference(*results.pairs[name], measure))
        for title, results in sets.items()
        for name in names
        for measure in units
        if name in results.pairs
    ]
    table = pd.DataFrame(rows, columns=["row", "asked", "measure", "value", "low", "high"])
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 1.4 + 0.58 * len(names)), sharey=True)
    order, looks = [textwrap.fill(name, 26) for name in names], two_styles(sets)
    for axes, (measure, unit) in zip(panels, units.items(), strict=True):
        part = table[table.measure == measure]
        intervals(axes, part, row="row", colour="asked", zero=0, styles=looks, names=order)
        axes.get_legend().remove()
        axes.set(xlabel=f"difference ({unit})")
        axes.set_title(SCORES[measure] + " of the right answer" * (measure == "log_probability"))
        axes.locator_params(axis="x", nbins=6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    message = f"{likelihood_in_words(sets)} {f1_in_words(sets)}".strip() or "Differences between arms."
    past = ", ".join(f"{length:,}" for length in sorted({at for one in sets.values() for at in one.past}))
    caption = f"""**{message}** Questions behind {past} tokens, past the old window.

*SmolLM2-135M-Instruct, {origin_of(sets)}; 95%, the wider over questions and seeds or over seeds.*"""
    clear = table[(table.low > 0) | (table.high < 0)]
    said = [f"{one.row} ({one.asked}, {SCORES[one.measure]})".replace("\n", " ") for one in clear.itertuples()]
    alt = f"Of {len(table)} intervals {len(table) - len(clear)} hold zero; clear of it: {', '.join(said) or 'none'}."
    save_figure(figure, folder, slug, number, caption, alt)


def likelihood_in_words(sets: Mapping[str, InstructionResults]) -> str:
    """Whether the loss on the prompt makes right answers less likely past the old window, and at full weight; or ""."""
    changes = {
        name: {
            title: one.difference(*one.pairs[name], "log_probability")
            for title, one in sets.items()
            if name in one.pairs
        }
        for name in (LOSS, FULL)
    }
    less = [title for title, (_, _, high) in changes[LOSS].items() if high < 0]
    if not less:
        return ""
    full = [changes[FULL][title] for title in less if title in changes[FULL]]
    level = bool(full) and all(low <= 0 <= high for _, low, high in full)
    also = "; with answers at full weight no change was detected there" * level
    return f"The plain loss on the prompt makes the right answer less likely ({', '.join(less)}){also}."


def f1_in_words(sets: Mapping[str, InstructionResults]) -> str:
    """That F1 decides nothing past the old window, where no interval leaves 0 out; and whether it is low; or ""."""
    if not all(levels(results)[NO_F1] for results in sets.values()):
        return ""
    most = max(results.scores(arm, results.past, "f1").mean() for results in sets.values() for arm in results.arms)
    return f"F1 {'is low in all arms and ' if most < LOW else ''}decides nothing."
