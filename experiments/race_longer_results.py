"""Reading the longer race (race_longer.py): what was expected of it, and how each came out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.pretraining_gpu_results import HOLDS, OPEN, REFUTED, in_nats, judge_below
from experiments.pretraining_results import EQUAL
from experiments.race_results import FULL_LENGTH, OF_THE_PAPER, ZERO_SHOT, RaceResults, draw_floor, race_results
from llama_long_utils.figures import BLUE, intervals, look, mark_window, plt, save_figure, token_axis
from llama_long_utils.notebooks import measured
from llama_long_utils.paths import RESULTS
from llama_long_utils.records import Record
from llama_long_utils.settings import Preset

SLUG = "11_longer_race"
OTHER_RATE = "11_longer_race_at_another_rate"
TIMES = 16  # as many steps as in the race: what is said is of a race of this length
QUARTER = 5e-4  # the other record's learning rate: a quarter of the preset's
METHODS = OF_THE_PAPER
AT_QUARTER = ("none", "abf")  # those of the other record
FORMS = ({"color": "0.6", "marker": "o"}, {"color": BLUE, "marker": "s"})  # after few steps and after many
RECOVERED = 0.1  # nat: a method further above the base inside the old window has not recovered from its change
KEPT = 0.8  # share of the score at the shortest length that is called kept at the longest


def longer_results(preset: Preset, slug: str = SLUG, methods: Sequence[str] = METHODS) -> RaceResults | None:
    """The longer race from its committed record; None until these methods are in it with all seeds, trained so long."""
    path = RESULTS / preset.name / f"{slug}.json"
    asked = [f" --times {TIMES} "] + [f" --learning-rate {QUARTER:g} "] * (slug == OTHER_RATE)
    if not path.is_file() or not all(one in f"{Record(path).content['provenance']['command']} " for one in asked):
        return None
    results = race_results(preset, path)
    seeds = results.arms[results.arms.training == FULL_LENGTH].groupby("method").seed.nunique()
    return results if all(seeds.get(method, 0) == len(preset.race.seeds) for method in methods) else None


def judged_longer(longer: RaceResults, short: RaceResults) -> pd.DataFrame:
    """A row for each expectation of (1) to (6) above: expected, found, in nats or points of ROUGE-L, and judged.

    `short` is the race of few steps.
    """
    old, new = longer.window, longer.edges[-1]
    lengths = longer.lengths
    shortest, asked, longest = lengths[0], lengths[-2], lengths[-1]

    def nll(first: tuple[str, str], second: tuple[str, str], low: int, high: int) -> dict[str, float]:
        (one, tokens), (other, _) = (longer.nll(*arm, low, high) for arm in (first, second))
        return longer.mean(one - other, tokens)

    def retrieved(method: str, length: int) -> np.ndarray:
        return longer.rouge_l(method, FULL_LENGTH, length)[0]

    trained = {method: (method, FULL_LENGTH) for method in METHODS}
    recovery = recovered(longer)
    abf, plain = nll(trained["abf"], trained["pi"], old, new), nll(trained["pi"], trained["none"], old, new)
    ones = np.ones(retrieved("abf", longest).shape[1])
    kept = longer.mean(retrieved("abf", longest) - KEPT * retrieved("abf", shortest), ones)
    before, after = short.rouge_l("abf", FULL_LENGTH, longest)[0].mean(), retrieved("abf", longest).mean()
    behind, xpos = (longer.mean(retrieved(name, asked) - retrieved("abf", asked), ones) for name in ("pi", "xpos_abf"))
    rows = [
        (
            f"PI recovers inside the old window: at most {RECOVERED} nat above the base",
            in_nats(recovery),
            HOLDS if recovery["high"] < RECOVERED else REFUTED if recovery["low"] > RECOVERED else OPEN,
        ),
        (
            "past the old window, ABF reads no worse than PI",
            in_nats(abf),
            HOLDS if abf["high"] < EQUAL else REFUTED if abf["low"] > 0 else OPEN,
        ),
        ("past the old window, PI reads better than plain RoPE", in_nats(plain), judge_below(plain)),
        (
            f"ABF loses more than {1 - KEPT:.0%} of its score from {shortest:,} to {longest:,} tokens",
            f"{_in_points(kept)} against {KEPT:.0%} of it",
            HOLDS if kept["high"] < 0 else REFUTED if kept["low"] >= 0 else OPEN,
        ),
        (
            f"ABF retrieves more at {longest:,} tokens than after few steps (means)",
            f"{after:.0f}, before {before:.0f}",
            HOLDS if after > before else REFUTED,
        ),
        (f"PI retrieves less than ABF at {asked:,} tokens", _in_points(behind), judge_below(behind)),
        (f"xPos on ABF retrieves less than ABF at {asked:,} tokens", _in_points(xpos), judge_below(xpos)),
    ]
    return pd.DataFrame(rows, columns=["expected", "found", "judged"])


def recovered(longer: RaceResults) -> dict[str, float]:
    """Trained PI's NLL minus the untrained base's in the far half of the old window: value, low, high."""
    place = longer.window // 2, longer.window
    (pi, tokens), (base, _) = longer.nll("pi", FULL_LENGTH, *place), longer.nll("none", ZERO_SHOT, *place)
    return longer.mean(pi - base, tokens)


def changed_rule(longer: RaceResults) -> str:
    """What a rule that was changed when the numbers were known makes of the first expectation: sentences."""
    found = recovered(longer)
    said = f"PI's interval is {in_nats(found)} nat. The limit, {RECOVERED} nat, "
    if not found["low"] <= RECOVERED <= found["high"]:
        return f"{said}lies outside it, so the change makes no difference."
    return f"{said}lies inside it. The rule written beforehand would have called that *{HOLDS}*; we print *{OPEN}*."


def judged_slower(slower: RaceResults, longer: RaceResults, short: RaceResults) -> pd.DataFrame:
    """As `judged_longer`, of expectations (7) to (9): `slower` is the longer race at a lower learning rate."""
    asked, places = slower.lengths[-2], (slower.window, slower.edges[-1])
    copied = [race.rouge_l("abf", FULL_LENGTH, asked)[0] for race in (slower, longer, short)]
    higher, before = (slower.mean(copied[0] - other, np.ones(copied[0].shape[1])) for other in copied[1:])
    (plain, tokens), (abf, _) = (slower.nll(method, FULL_LENGTH, *places) for method in ("none", "abf"))
    loss = slower.mean(plain - abf, tokens)
    more, less = higher["low"] > 0, before["high"] < 0
    rows = [
        (
            f"ABF retrieves more at {asked:,} tokens than at the full rate",
            _in_points(higher),
            HOLDS if more else REFUTED if higher["high"] < 0 else OPEN,
        ),
        (
            f"ABF retrieves no less at {asked:,} tokens than after few steps",
            _in_points(before),
            REFUTED if less else HOLDS if before["value"] >= 0 else OPEN,
        ),
        (
            "past the old window, plain RoPE reads worse than ABF",
            in_nats(loss),
            HOLDS if loss["low"] > 0 else REFUTED if loss["high"] < EQUAL else OPEN,
        ),
    ]
    return pd.DataFrame(rows, columns=["expected", "found", "judged"])


def _in_points(found: dict[str, float]) -> str:
    return measured(found["value"], found["low"], found["high"], digits=0)


def draw_longer(longer: RaceResults, short: RaceResults, folder: Path, slug: str, number: str, caption: str) -> None:
    """After few and after many steps: NLL in the far half of the old window minus the base's, and past it, ABF's."""
    styles = {name: {**form, "label": name} for name, form in zip(_names(short, longer), FORMS, strict=True)}
    names = {method: look(method, "method")["label"] for method in METHODS}
    near, far = [], []
    for trained, race in zip(styles, (short, longer), strict=True):
        places = ((near, (longer.window // 2, longer.window), ("none", ZERO_SHOT)),)
        places += ((far, (longer.window, longer.edges[-1]), ("abf", FULL_LENGTH)),)
        for rows, place, beside in places:
            other, tokens = race.nll(*beside, *place)
            for method in METHODS:
                if (method, FULL_LENGTH) != beside:
                    change = race.nll(method, FULL_LENGTH, *place)[0] - other
                    rows.append({"method": names[method], "trained": trained, **race.mean(change, tokens)})
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    titles, labels = ("inside the old window", "past the old window"), ("the untrained base's", "ABF's")
    for panel, rows, title, label in zip(panels, (near, far), titles, labels, strict=True):
        table = pd.DataFrame(rows)
        intervals(panel, table, row="method", colour="trained", zero=0, styles=styles, names=list(names.values()))
        panel.set(title=title, xlabel=f"NLL minus {label} (nats)")
        panel.get_legend().remove()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    said = [
        "; ".join(f"{row['method']} {in_nats(row)}" for row in rows if row["trained"] == [*styles][-1])
        for rows in (near, far)
    ]
    plain = next(row for row in far[::-1] if row["method"] == names["none"])
    alike = "not shown to read worse than ABF" if plain["low"] <= 0 else "read worse than ABF"
    message = f"**After many steps unscaled RoPE is {alike} past the old window, {in_nats(plain)} nat.**"
    first = longer.edges[longer.edges.index(longer.window) + 1]
    (one, tokens), (other, _) = (longer.nll(name, FULL_LENGTH, longer.window, first) for name in ("none", "abf"))
    caption += f" Unscaled RoPE minus ABF up to {first:,} tokens: {in_nats(longer.mean(one - other, tokens))} nat."
    alt = f"After many steps, in nats, inside the old window minus the base: {said[0]}; past it minus ABF: {said[1]}."
    save_figure(figure, folder, slug, number, f"{message} {caption}", alt)


def draw_longer_retrieval(
    longer: RaceResults, short: RaceResults, floors: pd.DataFrame, folder: Path, slug: str, number: str, caption: str
) -> None:
    """ROUGE-L by length after few and after many steps with the floor, a panel for each of the paper's methods."""
    figure, panels = plt.subplots(1, len(METHODS), figsize=(11, 3.6), sharey=True)
    for panel, method in zip(panels, METHODS, strict=True):
        for name, race, form, side in zip(_names(short, longer), (short, longer), FORMS, (0.97, 1.03), strict=True):
            found = pd.DataFrame(race.mean(*race.rouge_l(method, FULL_LENGTH, length)) for length in race.lengths)
            beside = side * np.array(race.lengths)
            panel.vlines(beside, found.low, found.high, color=form["color"], linewidth=1.4)
            panel.plot(beside, found.value, label=name, **form)
        draw_floor(panel, longer.lengths, floors)
        panel.set_title(look(method, "method")["label"])
        token_axis(panel, longer.lengths, "length (tokens)")
        mark_window(panel, longer.window, "")
    panels[0].set(ylabel="ROUGE-L, first sentence", ylim=(0, 100), yticks=range(0, 101, 20))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    asked = longer.lengths[-2]
    plain, abf = (longer.rouge_l(method, FULL_LENGTH, asked)[0] for method in ("none", "abf"))
    ahead = longer.mean(abf - plain, np.ones(abf.shape[1]))
    apart = "more" if ahead["low"] > 0 else "less" if ahead["high"] < 0 else "not detectably more or less"
    message = f"**After many steps ABF retrieves {apart} than unscaled RoPE at {asked:,} tokens: {abf.mean():.0f} and "
    message += f"{plain.mean():.0f} points, a difference of {_in_points(ahead)}.**"
    change = longer.mean(abf - short.rouge_l("abf", FULL_LENGTH, asked)[0], np.ones(abf.shape[1]))
    caption += f" ABF's retrieval at {asked:,} tokens, after many steps minus after few: {_in_points(change)}."
    alt = f"At {asked:,} tokens, after many steps, unscaled RoPE scores {plain.mean():.0f}, ABF {abf.mean():.0f}."
    save_figure(figure, folder, slug, number, f"{message} {caption}", alt)


def _names(*races: RaceResults) -> list[str]:
    return [f"{_tokens(race):,} training tokens" for race in races]


def _tokens(race: RaceResults) -> int:
    """How many an arm was trained on at full length."""
    return int(race.arms[race.arms.training == FULL_LENGTH].tokens.iloc[0])
