"""C1 to C4: plain RoPE, PI, ABF and xPos, by the race of notebook 11 and notebook 6's record of a real model."""

from typing import Any

import numpy as np
import pandas as pd

from experiments.pretraining_results import EQUAL
from experiments.race_longer_results import KEPT, RECOVERED
from experiments.race_results import RaceResults, wider_interval
from llama_long_utils.notebooks import measured
from llama_long_utils.presets import load_preset
from llama_long_utils.records import recorded
from llama_long_utils.settings import Preset
from tools.claims.line import AGREES, DISAGREES, MARGIN, MODELS, UNDECIDED, Interval, Line

POSITIONS = "06_perplexity_by_position"
NOT_RECOVERED = "after training PI still reads worse than the base inside the old window"


def past_the_window(race: RaceResults, longer: RaceResults, figure: dict[str, Any]) -> Line:
    """C1: an untrained real model in each kind of text, and the tiny one trained, by first-sentence retrieval.

    `longer` is the race of many steps, by which NLL is judged, too, or again `race`.
    """
    old, new = load_preset("smollm2").base.window, 16_384
    untrained = _by_kinds("smollm2", "base", "sliding_window", old, new)
    by_kind = untrained.groupby(level=0).mean()
    tiny = load_preset("tiny")
    length, edges = race_lengths(tiny)[-2], (tiny.base.window, tiny.extension.window)
    trained, many = (_retrieved(one, "none", "abf", length) for one in (race, longer))
    nats = _difference(longer, "none", "abf", *edges)
    scores = [figure["rouge_l"][name][figure["length"].index(new)] for name in ("none", "abf")]
    fails = by_kind.min() > 0 and max(trained[2], many[2]) < 0
    alike = ""
    if longer is not race and nats[1] <= 0:
        alike = "; after many steps not shown in loss"
    return Line(
        "Plain RoPE fails past its window",
        f"{scores[0]:.0f} against ABF's {scores[1]:.0f} ROUGE-L at {new:,} tokens, both trained (Figure 5b)",
        f"untrained, {old:,} to {new:,}: {measured(untrained.mean())} nat against its own windows, at least "
        f"{measured(by_kind.min())} in each kind of text; trained, {length:,} tokens: {measured(*trained, digits=0)} "
        f"ROUGE-L against ABF; on {_trained_on(longer):,} tokens {measured(*many, digits=0)}, NLL from {edges[0]:,} on "
        f"{measured(*nats)} nat",
        f"{MODELS['smollm2']}, {len(untrained)} documents of {len(by_kind)} kinds; {_race_scale(race, longer)}",
        AGREES if fails else DISAGREES if by_kind.max() < 0 or trained[1] > 0 else f"{UNDECIDED}: by kind or interval",
        f"untrained in every kind of text; trained in retrieval{alike}" if fails else "",
    )


def perplexity(race: RaceResults, table: dict[str, Any]) -> Line:
    """C2: undecided unless PI has recovered inside the old window; then by the intervals of both differences."""
    preset = load_preset("tiny")
    low, high = preset.base.window, preset.extension.window
    first, second = _difference(race, "abf", "pi", low, high), _difference(race, "pi", "none", low, high)
    books = [table["rows"][name][table["columns"].index("books")] for name in ("abf", "pi", "none")]
    lost = _not_recovered(race, preset)
    if first[2] <= EQUAL and second[2] < 0:
        judged = AGREES
    else:
        judged = DISAGREES if first[1] > 0 or second[1] > 0 else f"{UNDECIDED}: the intervals are too wide"
    otherwise = else_it(judged)
    if lost:
        judged = f"{UNDECIDED}: {NOT_RECOVERED} ({measured(*lost)} nat){otherwise}"
    return Line(
        "ABF ≤ PI < plain RoPE in perplexity",
        f"{books[0]:.3f}, {books[1]:.3f}, {books[2]:.3f} on books (Table 5)",
        f"{low:,} to {high:,}: ABF minus PI {measured(*first)} nat, PI minus plain {measured(*second)} nat",
        _race_scale(race),
        judged,
        f"{NOT_RECOVERED}{otherwise}" if lost else "",
    )


def retrieval(race: RaceResults, figure: dict[str, Any]) -> Line:
    """C3: ABF must keep `KEPT` of its score at the longest length, and PI must lie below it.

    Undecided while training is so short that PI has not come back to what the base does inside the old window.
    """
    preset = load_preset("tiny")
    shortest, longest = race_lengths(preset)[0], race_lengths(preset)[-1]
    scores = [race.mean(*race.rouge_l("abf", "full-length", length))["value"] for length in (shortest, longest)]
    pi = race.mean(*race.rouge_l("pi", "full-length", shortest))["value"]
    ours = f"ABF {scores[0]:.0f} at {shortest:,} tokens, {scores[1]:.0f} at {longest:,}; PI {pi:.0f} at {shortest:,}"
    behind = _retrieved(race, "pi", "abf", race_lengths(preset)[-2])
    ours += f"; PI minus ABF at {race_lengths(preset)[-2]:,} tokens: {measured(*behind, digits=0)}"
    near, far = (race.rouge_l("abf", "full-length", length)[0] for length in (shortest, longest))
    held = _wider(race, far - KEPT * near, np.ones(near.shape[1]))
    judged = AGREES if held[1] >= 0 and behind[2] < 0 else DISAGREES if held[2] < 0 or behind[1] > 0 else UNDECIDED
    why = ""
    if _not_recovered(race, preset):
        why = f"{NOT_RECOVERED}{else_it(judged)}"
        falls = f"; ABF falls from {scores[0]:.0f} to {scores[1]:.0f}" if held[2] < 0 else ""
        judged = f"{UNDECIDED}: {why}{falls}"
    at = [figure["rouge_l"][name][-1] for name in ("abf", "pi")]
    return Line(
        "ABF keeps first-sentence retrieval where PI falls",
        f"{at[0]:.0f} against {at[1]:.0f} ROUGE-L at {figure['length'][-1]:,} tokens (Figure 5b, digitised)",
        ours,
        _race_scale(race),
        judged,
        why,
    )


def xpos(race: RaceResults, few: RaceResults, table: dict[str, Any], figure: dict[str, Any]) -> Line:
    """C4: nothing is gained if the interval excludes a gain of the margin, in perplexity and in retrieval.

    `few` is the race of fewer steps, which decides nothing.
    """
    preset = load_preset("tiny")
    low, high, length = preset.base.window, preset.extension.window, race_lengths(preset)[-2]
    nats, retrieved = _difference(race, "xpos_abf", "abf", low, high), _retrieved(race, "xpos_abf", "abf", length)
    points, earlier = measured(*retrieved, digits=0), _difference(few, "xpos_abf", "abf", low, high)
    books = [table["rows"][name][table["columns"].index("books")] for name in ("xpos_abf", "abf")]
    at = [figure["rouge_l"][name][-1] for name in ("xpos_abf", "abf")]
    verdicts = [gains_nothing(-nats[2], -nats[1], EQUAL), gains_nothing(*retrieved[1:], 100 * MARGIN)]
    same = verdicts[0] == verdicts[1]
    better = "better" if nats[0] < 0 else "worse"
    whys = {
        f"it harms retrieval at {length:,} tokens, the length chosen beforehand": retrieved[2] < 0,
        f"after {_trained_on(few):,} tokens of training it still read better": earlier[2] < 0,
        f"it reads {abs(nats[0]):.2f} nat {better}, by more than {EQUAL} or not is open": verdicts[0] == UNDECIDED,
    }
    return Line(
        "xPos on top of ABF gains nothing",
        f"{books[0]:.3f} against {books[1]:.3f} on books (Table 5); {at[0]:.0f} against {at[1]:.0f} ROUGE-L at "
        f"{figure['length'][-1]:,} tokens (Figure 5b)",
        f"xPos minus ABF {measured(*nats, digits=3)} nat, {low:,} to {high:,}; {points} ROUGE-L at {length:,} tokens; "
        f"after {_trained_on(few):,} tokens of training "
        f"{measured(*earlier, digits=3)} nat",
        _race_scale(race),
        verdicts[0] if same else f"{verdicts[1]} in retrieval; {verdicts[0]} in perplexity",
        "; ".join(why for why, true in whys.items() if true),
    )


def else_it(judged: str) -> str:
    """What the verdict would be, were it not for that rule."""
    return f"; without that rule: {judged.partition(':')[0]}"


def gains_nothing(low: float, high: float, margin: float) -> str:
    """By the interval of a gain: agrees if it lies below the margin, disagrees if it lies above."""
    return DISAGREES if low > margin else AGREES if high < margin else UNDECIDED


def _not_recovered(race: RaceResults, preset: Preset) -> Interval | None:
    """PI after training minus the untrained base inside the old window, if PI has not recovered from its change."""
    low, high = preset.base.window // 2, preset.base.window
    (trained, tokens), (base, _) = (
        race.nll(name, way, low, high) for name, way in (("pi", "full-length"), ("none", "zero-shot"))
    )
    loss = _wider(race, trained - base, tokens)
    return loss if loss[0] > RECOVERED else None


def race_lengths(preset: Preset) -> list[int]:
    """Lengths at which the race asks for first sentences."""
    return preset.retrieval.lengths


def _difference(race: RaceResults, first: str, second: str, low: int, high: int) -> Interval:
    """NLL of one trained method minus another's, in nats, over documents and seeds."""
    (one, tokens), (other, _) = (race.nll(name, "full-length", low, high) for name in (first, second))
    return _wider(race, one - other, tokens)


def _retrieved(race: RaceResults, first: str, second: str, length: int) -> Interval:
    """ROUGE-L of one trained method minus another's in first-sentence retrieval."""
    (one, ones), (other, _) = (race.rouge_l(name, "full-length", length) for name in (first, second))
    return _wider(race, one - other, ones)


def _wider(race: RaceResults, change: np.ndarray, weights: np.ndarray) -> Interval:
    found = wider_interval(change, weights, race.bootstrap)
    return found["value"], found["low"], found["high"]


def _race_scale(*races: RaceResults) -> str:
    seeds = races[0].arms.seed[races[0].arms.training == "full-length"].nunique()
    tokens = " and ".join(f"{many:,}" for many in sorted({*map(_trained_on, races)}))
    return f"{MODELS['tiny']}, {seeds} seeds, {tokens} tokens of training"


def _trained_on(race: RaceResults) -> int:
    """Tokens of full-length training."""
    return int(race.arms.tokens[race.arms.training == "full-length"].iloc[0])


def _by_kinds(preset: str, first: str, second: str, low: int, high: int) -> pd.Series:
    """NLL of one arm of notebook 6 minus another's, in nats, a row for each document, named by its kind of text."""
    arrays = recorded(preset, POSITIONS).arrays
    places = slice(low - 1, high - 1)
    change = arrays[f"nll_{first}"][:, places].astype(float) - arrays[f"nll_{second}"][:, places]
    return pd.Series(change.mean(axis=1), [name.split("/")[0] for name in arrays["documents"]])
