"""Reading the longer race (race_longer.py): what was expected of it, and how each came out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.pretraining_gpu_results import HOLDS, OPEN, REFUTED, in_nats, judge_below
from experiments.pretraining_results import EQUAL
from experiments.race_results import FULL_LENGTH, ZERO_SHOT, RaceResults, race_results
from llama_long_utils.figures import BLUE, intervals, look, mark_window, plt, save_figure, token_axis
from llama_long_utils.notebooks import measured
from llama_long_utils.paths import RESULTS
from llama_long_utils.records import Record
from llama_long_utils.settings import Preset

SLUG = "11_longer_race"
OTHER_RATE = "11_longer_race_at_another_rate"
TIMES = 16  # as many steps as in the race: what is said is of a race of this length
QUARTER = 5e-4  # the other record's learning rate: a quarter of the preset's
METHODS = ("none", "pi", "abf", "xpos_abf")  # the paper's
AT_QUARTER = ("none", "abf")  # those of the other record
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


def judged_longer(longer: RaceResults, short: RaceResults, slower: RaceResults | None = None) -> pd.DataFrame:
    """A row for each expectation above: expected, found, in nats or points of ROUGE-L, and judged.

    `short` is the race of few steps, `slower` that of many at a lower learning rate.
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
    recovery = nll(trained["pi"], ("none", ZERO_SHOT), old // 2, old)
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
            f"ABF does not keep {KEPT:.0%} of its score from {shortest:,} to {longest:,} tokens",
            f"{_in_points(kept)} against that share",
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
    if slower:
        rows += _at_a_lower_rate(slower, longer, short)
    return pd.DataFrame(rows, columns=["expected", "found", "judged"])


def _at_a_lower_rate(slower: RaceResults, longer: RaceResults, short: RaceResults) -> list[tuple[str, str, str]]:
    asked, places = slower.lengths[-2], (slower.window, slower.edges[-1])
    copied = [race.rouge_l("abf", FULL_LENGTH, asked)[0] for race in (slower, longer, short)]
    higher, before = (slower.mean(copied[0] - other, np.ones(copied[0].shape[1])) for other in copied[1:])
    (plain, tokens), (abf, _) = (slower.nll(method, FULL_LENGTH, *places) for method in ("none", "abf"))
    loss, rate = slower.mean(plain - abf, tokens), "at a quarter of the learning rate"
    more, less = higher["low"] > 0, before["high"] < 0
    return [
        (
            f"{rate} ABF retrieves more at {asked:,} tokens",
            _in_points(higher),
            HOLDS if more else REFUTED if higher["high"] < 0 else OPEN,
        ),
        (
            f"{rate} ABF retrieves no less there than after few steps",
            _in_points(before),
            REFUTED if less else HOLDS if before["value"] >= 0 else OPEN,
        ),
        (
            f"{rate} plain RoPE reads worse than ABF past the old window",
            in_nats(loss),
            HOLDS if loss["low"] > 0 else REFUTED if loss["high"] < EQUAL else OPEN,
        ),
    ]


def _in_points(found: dict[str, float]) -> str:
    return measured(found["value"], found["low"], found["high"], digits=0)


def draw_longer(
    longer: RaceResults, short: RaceResults, floors: pd.DataFrame, folder: Path, slug: str, number: str, caption: str
) -> None:
    """After few and after many steps: NLL in the far half of the old window, NLL far, and ROUGE-L by length."""
    forms = [{"color": "0.5", "marker": "o"}, {"color": BLUE, "marker": "s"}]
    named = {f"{_tokens(race):,} tokens": race for race in (short, longer)}
    styles = {name: {**form, "label": name} for name, form in zip(named, forms, strict=True)}
    names = {method: look(method, "method")["label"] for method in METHODS}
    near, far = [], []
    for trained, race in named.items():
        places = ((near, (longer.window // 2, longer.window), ("none", ZERO_SHOT)),)
        places += ((far, (longer.window, longer.edges[-1]), ("abf", FULL_LENGTH)),)
        for rows, place, beside in places:
            other, tokens = race.nll(*beside, *place)
            for method in METHODS:
                if (method, FULL_LENGTH) != beside:
                    change = race.nll(method, FULL_LENGTH, *place)[0] - other
                    rows.append({"method": names[method], "trained": trained, **race.mean(change, tokens)})
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.9), width_ratios=(1, 1, 1.25))
    titles = ("inside the old window, minus\nthe untrained base's NLL (nats)", "past it, minus ABF's NLL (nats)")
    for panel, rows, label in zip(panels, (near, far), titles, strict=False):
        table = pd.DataFrame(rows)
        intervals(panel, table, row="method", colour="trained", zero=0, styles=styles, names=list(names.values()))
        panel.set_xlabel(label)
    panels[1].get_legend().remove()
    panels[1].set_yticklabels([])
    for race, line in ((short, {"linestyle": ":", "marker": "", "alpha": 0.8}), (longer, {"linestyle": "-"})):
        for place, method in enumerate(METHODS):
            found = pd.DataFrame(race.mean(*race.rouge_l(method, FULL_LENGTH, length)) for length in race.lengths)
            beside, form = np.array(race.lengths) * 1.04 ** (place - 1.5), {**look(method, "method"), **line}
            if race is longer:
                panels[2].vlines(beside, found.low, found.high, color=form["color"], alpha=0.5, linewidth=1.2)
            panels[2].plot(beside, found.value, markersize=4, **form | {"label": names[method] * (race is longer)})
    panels[2].plot(longer.lengths, floors.value, color="0.4", linestyle="--", linewidth=1)
    panels[2].fill_between(longer.lengths, floors.low, floors.high, color="0.5", alpha=0.2, linewidth=0)
    panels[2].set(ylabel="ROUGE-L, first sentence", ylim=(0, 112), yticks=range(0, 101, 20))
    token_axis(panels[2], longer.lengths, "length (tokens); dotted: few steps")
    mark_window(panels[2], longer.window)
    panels[2].legend(loc="upper right", fontsize=9)
    said = [
        "; ".join(f"{row['method']} {in_nats(row)}" for row in rows if row["trained"] == trained)
        for rows in (near, far)
    ]
    asked = longer.lengths[-2]
    scores = {method: longer.rouge_l(method, FULL_LENGTH, asked)[0].mean() for method in METHODS}
    plain = next(row for row in far[::-1] if row["method"] == names["none"])
    alike = "not shown to read worse than ABF" if plain["low"] <= 0 else "read worse than ABF"
    message = f"**After many steps unscaled RoPE is {alike} past the old window, {in_nats(plain)} nat. At {asked:,} "
    message += f"tokens it retrieves {scores['none']:.0f}, ABF {scores['abf']:.0f}.**"
    change = np.subtract(*(race.rouge_l("abf", FULL_LENGTH, asked)[0] for race in (longer, short)))
    first = longer.edges[longer.edges.index(longer.window) + 1]
    (one, tokens), (other, _) = (longer.nll(name, FULL_LENGTH, longer.window, first) for name in ("none", "abf"))
    caption += f" Unscaled RoPE minus ABF up to {first:,} tokens: {in_nats(longer.mean(one - other, tokens))} nat. "
    caption += f"ABF's retrieval at {asked:,} tokens, after many steps minus after few: "
    caption += f"{_in_points(longer.mean(change, np.ones(change.shape[1])))}. Dashed: the floor, as in Figure 11.3."
    alt = f"After many steps, in nats, inside the old window minus the base: {said[0]}; past it minus ABF: {said[1]}."
    save_figure(figure, folder, slug, number, f"{message} {caption}", alt)


def _tokens(race: RaceResults) -> int:
    """How many an arm was trained on at full length."""
    return int(race.arms[race.arms.training == FULL_LENGTH].tokens.iloc[0])
