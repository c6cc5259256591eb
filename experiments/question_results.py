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
    Interval,
    two_styles,
)
from llama_long_utils.figures import intervals, plt, save_figure
from llama_long_utils.notebooks import measured
from llama_long_utils.records import recorded
from llama_long_utils.settings import Preset

SETS = {"SQuAD": SLUG, "HotpotQA": "09_on_hotpotqa"}  # records by what was asked
SCORES = {"f1": "F1", "log_probability": "log-probability"}
NO_F1 = "no change of F1 is detected between arms"
NO_CHANGE = "with answers at full weight no change is detected, of F1 or log-probability"
LOW = 10  # points: an F1 below it has few right answers
BY_F1 = {"Qasper": "qasper", "NarrativeQA": "narrativeqa"}  # the tasks of Table 9 that F1 scores


def question_results(preset: Preset) -> dict[str, InstructionResults]:
    """The committed records of a real model by the title of what was asked."""
    found = {title: recorded(preset.name, slug) for title, slug in SETS.items()}
    return {title: InstructionResults(record, preset) for title, record in found.items() if record}


def question_tables(sets: Mapping[str, InstructionResults]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(F1 of the arms by length, differences between arms inside the old window) by what was asked: text for a reader.

    Differences past the old window are drawn: `draw_on_questions`.
    """
    scores, changes = [], []
    for title, results in sets.items():
        for arm in results.arms:
            row = {"asked": title, "arm": LOOKS[arm][0]}
            for length in results.lengths:
                values = results.scores(arm, [length], "f1")
                row[f"F1 behind {length:,} tokens"] = measured(*results.mean(values), digits=1, sign=False)
            scores.append({**row, "seeds": len(values)})
        inside = [length for length in results.lengths if length not in results.past]
        for name, pair in results.pairs.items():
            differences = {text: results.in_words(*pair, measure, inside) for measure, text in SCORES.items()}
            changes.append({"asked": title, "difference": name, **differences})
    return pd.DataFrame(scores), pd.DataFrame(changes)


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


def trainings(results: InstructionResults) -> pd.DataFrame:
    """Of each arm, means over seeds: labels, questions, and how many answers of these are different."""
    means = results.runs.groupby("arm")[["labels", "questions", "different"]].mean().round().astype(int)
    means = means.loc[[arm for arm in results.arms if arm != "untuned"]].reset_index()
    return means.assign(arm=[LOOKS[arm][0] for arm in means.arm])


def same_trainings(sets: Mapping[str, InstructionResults]) -> bool:
    """Whether an arm and seed was trained on as much, whatever was asked then."""
    parts = [one.runs.set_index(["arm", "seed"])[["labels", "questions", "different"]] for one in sets.values()]
    return all(parts[0].loc[part.index].equals(part) for part in parts)


def floor_of(results: InstructionResults) -> pd.Series:
    """The one answer that earns most F1 if it is given to every question, with what it earns (shares)."""
    return results.record.table("floors").sort_values("f1").iloc[-1]


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


def directions(results: InstructionResults) -> dict[str, tuple[Interval, bool, int]]:
    """What was expected past the old window: the difference, whether it should lie above zero, digits to show.

    Only where both arms were measured.
    """
    found = {}
    for name, by in {LOSS: "(C10) by the loss on the prompt", LONG: "(C11) by long documents with it"}.items():
        if name in results.pairs:
            f1, likely = (results.difference(*PAIRS[name], measure) for measure in ("f1", "log_probability"))
            found[f"{by}, F1 rises"] = f1, True, 1
            found[f"{by}, the right answer becomes less likely"] = likely, False, 2
    return found


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
    caption = f"""**{message}** Questions behind {past} tokens, past the old window. Those inside it: table below.

*SmolLM2-135M-Instruct, {origin_of(sets)}; 95%, the wider over questions and seeds or over seeds. Arms of one seed: over
questions.*"""
    said = "; ".join(f"{one.asked}, {SCORES[one.measure]}, {one.row} {one.value:+.2f}" for one in table.itertuples())
    save_figure(figure, folder, slug, number, caption, f"Differences: {said}.".replace("\n", " "))


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
