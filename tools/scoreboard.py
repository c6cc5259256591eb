"""The claims scoreboard: the paper's twelve claims against our records, one line each.

Verdicts follow intervals. A comparison whose arms were not fit for it is undecided, whatever its numbers say.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from experiments.instruction_results import (
    DILUTION,
    FULL,
    LONG,
    LOSS,
    PAIRS,
    PLAIN,
    InstructionResults,
    instruction_results,
)
from experiments.power_law import CLOSER
from experiments.pretraining_gpu_results import GPU_SIZE, as_trained, gpu_results, rate_factors
from experiments.pretraining_rates import larger_sizes
from experiments.pretraining_results import (
    CONTENT,
    EQUAL,
    FIRST_ORDERS,
    LENGTH,
    MIXED,
    PretrainingResults,
    copying_results,
    heavier,
    mixed_results,
    pretraining_results,
)
from experiments.pretraining_results import SLUG as CURRICULUM
from experiments.pretraining_sparse import LOWER, equal_operations, equal_seconds, sparse_results
from experiments.race_results import RaceResults, race_results, wider_interval
from experiments.real_models import DoseResults, OtherTexts, attention_share, read_dose_results, read_other_texts
from llama_long_utils.evaluation.statistics import FEWEST
from llama_long_utils.notebooks import NO_DIFFERENCE, measured
from llama_long_utils.presets import load_preset
from llama_long_utils.records import read_published, recorded
from llama_long_utils.settings import Preset

# By size. The first with a record speaks for a claim.
MODELS = {"qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B", "smollm2": "SmolLM2-135M", "tiny": "tiny Llama (4.3M)"}
READ_BY_CONTEXT = MODELS | {"tiny": f"{MODELS['tiny']} after its extension"}  # the others as pretrained
AGREES, DISAGREES, UNDECIDED, NOT_TESTED = "agrees", "disagrees", "undecided", "not tested yet"
RECOVERED = 0.1  # nat: a method further above the base inside the old window has not recovered from its change
NOT_RECOVERED = "after training PI still reads worse than the base inside the old window"
KEPT = 0.8  # share of the score at the shortest length that is called kept at the longest
MARGIN = 0.02  # share of right answers that a short task may lose and be called unharmed
CHANCE = {"mmlu": 0.25}  # of its four choices, one is right
REASON_WORDS = 16  # that README gives to a verdict's reason
LARGER = "0.9M"  # parameters of the second size from scratch
FROM_SCRATCH = "0.4M"  # parameters of the models of notebook 12 that have all arms and seeds
TRAINED_ON = "tiny-llama"  # the model of notebook 12 that copies from its context
GLANCE = ["verdict", "why", "on"]  # columns of the short scoreboard
BENCHMARKS, POSITIONS, BY_CONTEXT = "08_benchmark_deltas", "06_perplexity_by_position", "06_loss_by_context"
FORETOLD = 0.02  # nat, by which a law may miss the loss behind the longest context
BOUNDS = ["value", "low", "high"]
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Line:
    """A claim: what the paper found, what we found, on which model with how many seeds, and what follows.

    Attributes:
        why: the verdict's reason in a few words; empty: the verdict says it.
    """

    claim: str
    paper: str
    ours: str = "-"
    scale: str = "-"
    verdict: str = NOT_TESTED
    why: str = ""

    @property
    def reason(self) -> str:
        """`why`, or as many clauses of the verdict's own reason as stay short."""
        first, *others = self.verdict.partition(": ")[2].split("; ")
        for clause in others:
            if len(f"{first} {clause}".split()) > REASON_WORDS:
                break
            first += f"; {clause}"
        return self.why or first


WORDS = """\
- **loss**, **NLL**: the negative natural logarithm of the probability that the model gave to the right token. Its \
unit is the **nat**. A hundredth of a nat less means one percent more probability.
- **arm**: one of the models, or ways of training, that are compared.
- **windows**: the model reads the text through a sliding window of the old length. That is what you would do \
without an extension.
- **full context**: the model reads everything before the token.
- **far out**: positions in the far half of the texts, beyond the old window.
- **control**: the same model, trained on as many tokens without an extension, and read through windows.
- **PoSE**: training on short sequences whose positions skip ahead.
- **planted statement**: a sentence hidden in a text and asked for at the end.
- **RoPE**: rotary position embedding, which turns queries and keys by angles that grow with the position. Four ways \
to change it: **ABF** (adjusted base frequency) raises its base, **PI** (position interpolation) squeezes the \
positions, **YaRN** squeezes slow rotations only, **xPos** lets scores fade with distance.
- **ROUGE-L**: 0 to 100, how many of the wanted words were written in order."""
VERDICTS = """\
**What full context is worth to real models in 4 bits**, in nats per token. Below zero is better. Brackets: the \
outer ends of two 95% intervals, one over texts, one over kinds of text. *Behind*: both intervals lie above zero. \
*Ahead*: both lie below zero, and the lead is larger than the largest distance between seeds at any dose, where \
several were trained. We \
ask more of good news than of bad, but three seeds tell their distance only roughly. *No difference detected*: \
neither of these, which does not mean that both are equal."""
CAVEATS = """\
**Caveats.** Our windows slide by half their length, so a token has on average three quarters of the old window \
before it. A denser slide would be a stronger opponent, and full context would gain less (notebook 13). Seed 0 \
of SmolLM2, but for its largest control, was trained by an earlier form of the script (notebook 13); a seed is held \
against its own control where there is one. SmolLM2's far half lies beyond the sequences that it was trained \
on, Qwen's does not. A third of the training sequences quote themselves, in every model compared. The bases have \
probably read these texts in pretraining."""


def scoreboard() -> dict[str, Line]:
    """C1 to C12 in order."""
    race, published = race_results(load_preset("tiny")), read_published("llama2_long")
    more = read_published("llama2_long_benchmarks")
    lines = [
        _past_the_window(race, published["figure_5b"]),
        _perplexity(race, published["table_5"]),
        _retrieval(race, published["figure_5b"]),
        _xpos(race, published["table_5"], published["figure_5b"]),
        _power_law(published),
        _model_size(published["figure_1_power_law"]),
        _short_tasks(more["table_1"]),
        _data_mix(more["table_7"]),
        _short_then_long(published["table_10"], published["table_11"]),
        *_instruction_tuning(published["table_9"]),
        _full_attention(published["attention"]),
    ]
    return {f"C{number}": line for number, line in enumerate(lines, start=1)}


def scoreboard_table(*, numbers: bool = True) -> str:
    """The scoreboard in Markdown, with what was found (a line for each part of it) or, for a glance, without."""
    rows = [["", "the paper's claim", *(["it found", "we found", "on", "verdict"] if numbers else GLANCE)]]
    for name, line in scoreboard().items():
        judged, colon, reason = line.verdict.partition(":")
        found = [line.paper, line.ours, line.scale, f"**{judged}**{colon}{reason}"]
        found = [text.replace("; ", ";<br>") for text in found]
        rows.append([name, line.claim, *(found if numbers else [f"**{judged}**", line.reason, line.scale])])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def statements_found(results: DoseResults, arm: str, length: int) -> str:
    """How many planted statements an arm found at a length, and other seeds of it as many tokens."""
    table = results.record.table("retrieval").query("task == 'key' and length == @length")
    names = table.arm + np.where(table.tokens_trained > 0, "-" + table.tokens_trained.astype(str), "")
    seed = names.str.extract(r"-s(\d+)-")[0].fillna("0")
    parts = table[names.str.replace(r"-s\d+-", "-s0-", regex=True) == arm].groupby(seed)
    found = [f"{round((part.exact * part.questions).sum())} of {part.questions.sum()}" for _, part in parts]
    return "; another seed ".join(found) or "not asked"


@dataclass(frozen=True)
class Comparison:
    """Whole sequences with full context minus something, at the largest dose, and what other seeds say of it.

    Attributes:
        found: value and bounds, in nats per token, of the first seed.
        tokens: it was trained on.
        seeds: the same difference of every seed, by dose (tokens), where several were run.
    """

    found: Interval
    tokens: int
    seeds: dict[int, tuple[float, ...]]

    @property
    def spread(self) -> float:
        """How far seeds lie apart at most, at any dose, in nats; 0 if there is one."""
        return max((max(values) - min(values) for values in self.seeds.values()), default=0.0)

    @property
    def gains(self) -> bool:
        """Below zero by its interval, and by more than seeds lie apart."""
        return self.found[2] < 0 and -self.found[0] > self.spread

    def __str__(self) -> str:
        return f"**{self.says}** {measured(*self.found, digits=3)}"

    @property
    def says(self) -> str:
        """In words."""
        return "ahead" if self.gains else "behind" if self.found[1] > 0 else NO_DIFFERENCE

    @property
    def runs(self) -> str:
        """How many seeds were run at the largest dose, in words."""
        count = len(self.seeds.get(self.tokens, ()))
        return f"{count} seeds (numbers and brackets: the first)" if count else "one seed"

    @property
    def by_seed(self) -> str:
        """The same difference of every seed, for a table."""
        doses = (f"{', '.join(map('{:+.3f}'.format, some))} at {dose / 1e6:.1f}M" for dose, some in self.seeds.items())
        return "; ".join(doses) or "one seed"


def compared(results: DoseResults, line: str, place: str = "far", *, whole: bool = False) -> Comparison | None:
    """A line of `DoseResults.worth` at its largest dose, and what other seeds say of it; None if it was not run."""
    rows = results.worth(r"\d+", place, whole=whole)
    rows = rows[rows.line == line]
    if rows.empty:
        return None
    arms = rows["first"].fillna(rows.arm)
    rows = rows.assign(seed=arms.str.extract(r"-s(\d+)")[0].astype(int)).sort_values(["tokens_trained", "seed"])
    last = rows[rows.seed == 0].iloc[-1]
    several = rows.groupby("tokens_trained").filter(lambda dose: len(dose) > 1)
    seeds = {int(dose): tuple(part.nats) for dose, part in several.groupby("tokens_trained")}
    return Comparison((last.nats, last.low, last.high), int(last.tokens_trained), seeds)


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


def _race_scale(race: RaceResults) -> str:
    return f"{MODELS['tiny']}, {race.arms[race.arms.training == 'full-length'].seed.nunique()} seeds"


def _by_kinds(preset: str, first: str, second: str, low: int, high: int) -> pd.Series:
    """NLL of one arm of notebook 6 minus another's, in nats, a row for each document, named by its kind of text."""
    arrays = recorded(preset, POSITIONS).arrays
    places = slice(low - 1, high - 1)
    change = arrays[f"nll_{first}"][:, places].astype(float) - arrays[f"nll_{second}"][:, places]
    return pd.Series(change.mean(axis=1), [name.split("/")[0] for name in arrays["documents"]])


def _past_the_window(race: RaceResults, figure: dict[str, Any]) -> Line:
    old, new = load_preset("smollm2").base.window, 16_384
    untrained = _by_kinds("smollm2", "base", "sliding_window", old, new)
    by_kind = untrained.groupby(level=0).mean()
    length = race_lengths(load_preset("tiny"))[-2]
    trained = _retrieved(race, "none", "abf", length)
    scores = [figure["rouge_l"][name][figure["length"].index(new)] for name in ("none", "abf")]
    fails = by_kind.min() > 0 and trained[2] < 0
    return Line(
        "Plain RoPE fails past its window",
        f"{scores[0]:.0f} against ABF's {scores[1]:.0f} ROUGE-L at {new:,} tokens, both trained (Figure 5b)",
        f"untrained, {old:,} to {new:,}: {measured(untrained.mean())} nat against its own windows, at least "
        f"{measured(by_kind.min())} in each kind of text; trained, {length:,} tokens: {measured(*trained, digits=0)} "
        "ROUGE-L against ABF",
        f"{MODELS['smollm2']}, {len(untrained)} documents of {len(by_kind)} kinds; {_race_scale(race)}",
        AGREES if fails else DISAGREES if by_kind.max() < 0 or trained[1] > 0 else f"{UNDECIDED}: by kind or interval",
        "untrained it fails in every kind of text; trained it retrieves less than ABF" if fails else "",
    )


def race_lengths(preset: Preset) -> list[int]:
    """Lengths at which the race asks for first sentences."""
    return preset.retrieval.lengths


def _not_recovered(race: RaceResults, preset: Preset) -> Interval | None:
    """PI after training minus the untrained base inside the old window, if PI has not recovered from its change."""
    low, high = preset.base.window // 2, preset.base.window
    (trained, tokens), (base, _) = (
        race.nll(name, way, low, high) for name, way in (("pi", "full-length"), ("none", "zero-shot"))
    )
    loss = _wider(race, trained - base, tokens)
    return loss if loss[0] > RECOVERED else None


def _perplexity(race: RaceResults, table: dict[str, Any]) -> Line:
    preset = load_preset("tiny")
    low, high = preset.base.window, preset.extension.window
    first, second = _difference(race, "abf", "pi", low, high), _difference(race, "pi", "none", low, high)
    books = [table["rows"][name][table["columns"].index("books")] for name in ("abf", "pi", "none")]
    lost = _not_recovered(race, preset)
    if lost:
        judged = f"{UNDECIDED}: {NOT_RECOVERED} ({measured(*lost)} nat)"
    elif first[2] <= EQUAL and second[2] < 0:
        judged = AGREES
    else:
        judged = DISAGREES if first[1] > 0 or second[1] > 0 else f"{UNDECIDED}: the intervals are too wide"
    return Line(
        "ABF ≤ PI < plain RoPE in perplexity",
        f"{books[0]:.3f}, {books[1]:.3f}, {books[2]:.3f} on books (Table 5)",
        f"{low:,} to {high:,}: ABF minus PI {measured(*first)} nat, PI minus plain {measured(*second)} nat",
        _race_scale(race),
        judged,
        NOT_RECOVERED if lost else "",
    )


def _retrieval(race: RaceResults, figure: dict[str, Any]) -> Line:
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
    if _not_recovered(race, preset):
        judged = f"{UNDECIDED}: {NOT_RECOVERED}"
        if held[2] < 0:
            judged = f"{DISAGREES} that ABF keeps it; {UNDECIDED} beside PI: ABF falls from {scores[0]:.0f} to "
            judged += f"{scores[1]:.0f} after a short training; {NOT_RECOVERED}"
    at = [figure["rouge_l"][name][-1] for name in ("abf", "pi")]
    return Line(
        "ABF keeps first-sentence retrieval where PI falls",
        f"{at[0]:.0f} against {at[1]:.0f} ROUGE-L at {figure['length'][-1]:,} tokens (Figure 5b, digitised)",
        ours,
        _race_scale(race),
        judged,
    )


def _xpos(race: RaceResults, table: dict[str, Any], figure: dict[str, Any]) -> Line:
    preset = load_preset("tiny")
    low, high, length = preset.base.window, preset.extension.window, race_lengths(preset)[-2]
    nats, retrieved = _difference(race, "xpos_abf", "abf", low, high), _retrieved(race, "xpos_abf", "abf", length)
    points = measured(*retrieved, digits=0)
    books = [table["rows"][name][table["columns"].index("books")] for name in ("xpos_abf", "abf")]
    at = [figure["rouge_l"][name][-1] for name in ("xpos_abf", "abf")]
    verdicts = [_gains_nothing(-nats[2], -nats[1], EQUAL), _gains_nothing(*retrieved[1:], 100 * MARGIN)]
    same = verdicts[0] == verdicts[1]
    whys = {
        "it harms retrieval": retrieved[2] < 0,
        f"a gain of {EQUAL} nat is neither shown nor excluded": verdicts[0] == UNDECIDED,
    }
    return Line(
        "xPos on top of ABF gains nothing",
        f"{books[0]:.3f} against {books[1]:.3f} on books (Table 5); {at[0]:.0f} against {at[1]:.0f} ROUGE-L at "
        f"{figure['length'][-1]:,} tokens (Figure 5b)",
        f"xPos minus ABF {measured(*nats, digits=3)} nat, {points} ROUGE-L at {length:,} tokens",
        _race_scale(race),
        verdicts[0] if same else f"{verdicts[1]} in retrieval; {verdicts[0]} in perplexity",
        "; ".join(why for why, true in whys.items() if true),
    )


def _gains_nothing(low: float, high: float, margin: float) -> str:
    """By the interval of a gain: agrees if it lies below the margin, disagrees if it lies above."""
    return DISAGREES if low > margin else AGREES if high < margin else UNDECIDED


def _power_law(published: dict[str, Any]) -> Line:
    law = published["figure_1_power_law"]["7B"]
    claim, paper = "Loss falls with context c as (α/c)^β + γ", f"β = {law['beta']}, γ = {law['gamma']} at 7B (Figure 1)"
    record = recorded("smollm2", BY_CONTEXT)
    if record is None:
        return Line(claim, paper)
    predictions, texts = record.table("predictions"), record.table("contexts").groupby("document").kind.first()
    far = predictions[predictions.context == predictions.context.max()].set_index("law")
    told, line = (tuple(far.loc[name, ["value", "low", "high"]]) for name in ("power law", "line in log c"))
    up_to, longest = far.fitted_up_to.iloc[0], far.context.iloc[0]
    ours = f"fitted up to {up_to:,} tokens and asked for {longest:,}, predicted minus measured in nats; the law "
    ours += f"{_nats(pd.Series(told, BOUNDS))}; a line in log c {_nats(pd.Series(line, BOUNDS))}; the law is nearer "
    ours += f"by {_nats(-far.loc[CLOSER, ['value', 'high', 'low']].set_axis(BOUNDS))}; other models: notebook 13"
    if max(map(abs, told[1:])) < FORETOLD:
        judged = AGREES
    elif min(map(abs, told[1:])) > FORETOLD and told[1] * told[2] > 0:
        judged = DISAGREES
    else:
        known = (told[2] - told[1]) / 2
        judged = f"{UNDECIDED}: the error is known to ±{known:.1f} nat, ±{FORETOLD} was asked, too much of so few texts"
    return Line(
        claim,
        paper,
        ours,
        f"{MODELS['smollm2']} before its extension, {len(texts)} texts of {texts.nunique()} kinds, one seed",
        judged,
    )


def _model_size(laws: dict[str, Any]) -> Line:
    small, large = laws["7B"]["beta"], laws["70B"]["beta"]
    claim, paper = "Larger models use context better", f"β = {small} at 7B, {large} at 70B (Figure 1)"
    record = next((found for preset in MODELS if (found := recorded(preset, BY_CONTEXT))), None)
    if record is None or len(betas := record.table("betas")) == 1:
        return Line(claim, paper)
    steps, each = (betas[betas.model.str.contains(" minus ") == whether] for whether in (True, False))
    ours = "β on the same targets behind the same contexts; "
    ours += "; ".join(f"{row.model} {measured(row.value, row.low, row.high)}" for row in steps.itertuples())
    largest, wide = gpu_results(), larger_sizes()[LARGER]
    more = largest.context_saves_more(GPU_SIZE, LARGER, wide)
    times = largest.cost(GPU_SIZE, "long", "tokens") / wide.cost(LARGER, "long", "tokens")
    ours += f"; from scratch {GPU_SIZE}, on {times:.0f} times the tokens, saves {_nats(pd.Series(more))} nat more by "
    ours += f"its context than {LARGER}"
    judged = AGREES if steps.low.min() > 0 else DISAGREES if steps.high.max() < 0 else UNDECIDED
    texts = record.table("contexts").groupby("document").kind.first()
    names = ", ".join(READ_BY_CONTEXT[name] for name in each.model)
    scale = f"{names}; {len(texts)} texts of {texts.nunique()} kinds, one seed; from scratch {more['seeds']} seeds"
    why = "β is known too badly, and the models differ in data and tokenizer, too"
    return Line(claim, paper, ours, scale, f"{judged}: {why}" if judged == UNDECIDED else judged)


def _short_tasks(table: dict[str, Any]) -> Line:
    place = table["columns"].index("mmlu")
    before, after = (table[model]["7B"][place] for model in ("llama_2", "llama_2_long"))
    claim, paper = "Short tasks do not suffer", f"MMLU {before} to {after} at 7B (Table 1)"
    name = next((preset for preset in MODELS if recorded(preset, BENCHMARKS)), None)
    if name is None:
        return Line(claim, paper)
    deltas = recorded(name, BENCHMARKS).table("deltas")
    accuracy = deltas[(deltas.task == "mmlu") & (deltas.metric == "accuracy")].set_index("pair")
    if "base -> extended" not in accuracy.index:
        return Line(claim, paper)
    mmlu = accuracy.loc["base -> extended"]
    ours = [f"4-bit MMLU {100 * mmlu.before:.1f}% to {100 * mmlu.after:.1f}% ({_points(mmlu, 2)} points)"]
    if "base_16_bit -> extended" in accuracy.index:
        ours.append(f"against the 16-bit base {_points(accuracy.loc['base_16_bit -> extended'], 2)} points")
    short = deltas[(deltas.length == 0) & (deltas["items"] >= FEWEST) & (deltas.pair == "base -> extended")]
    dearer = short[(short.metric == "answer_nll") & (short.low > 0)]
    ours += [f"answers of {row.task} {measured(row.difference, row.low, row.high)} nat" for row in dearer.itertuples()]
    few = short[short.metric.isin(["exact_match", "passed"])]
    ours += [f"{row.task} {_points(row)} points" for row in few.itertuples() if row.before + row.after > 0.1]
    margin = 1.96 * np.sqrt(mmlu.before * (1 - mmlu.before) / mmlu["items"])
    if mmlu.before - margin <= CHANCE["mmlu"]:
        judged = f"{UNDECIDED}: the base answers at chance"
    elif mmlu.high < 0:
        judged = f"{DISAGREES}: on MMLU"
    elif mmlu.low > -MARGIN and "base -> rope_unchanged" in accuracy.index:
        judged = f"{AGREES}: on MMLU, beside a control; other tasks have too few items"
    elif mmlu.low > -MARGIN:
        judged = f"{UNDECIDED}: MMLU {'rises' if mmlu.low > 0 else 'does not fall'} from the same 4-bit base, but no "
        judged += "control was asked; other tasks have too few items"
    else:
        judged = f"{UNDECIDED}: a loss of {100 * MARGIN:.0f} points is not excluded"
    for results in read_dose_results([name]).values():
        inside, before = compared(results, "fair", "inside").found, results.four_bits().query("place == 'inside'")
        before = before.set_index("quantity").loc["extended minus NF4 base", ["nats", "low", "high"]]
        ours.append(f"text inside the old window {measured(*before, digits=3)} nat against the same 4-bit base")
        ours.append(f"{measured(*inside, digits=3)} against a control trained as long")
    return Line(claim, paper, "; ".join(ours), f"{MODELS[name]}, one seed", judged)


def _points(row: Any, digits: int = 0) -> str:
    """A difference of shares with its interval, in points."""
    return measured(100 * row.difference, 100 * row.low, 100 * row.high, digits=digits)


def _data_mix(table: dict[str, Any]) -> Line:
    names = "Long mix", "Llama 2 mix, long text removed"
    rows = [pd.Series(table["rows"][name], table["columns"]) for name in names]
    quality, qmsum = (f"{rows[0][task]:+.0f}% with the new mix, {rows[1][task]:+.0f}%" for task in ("quality", "qmsum"))
    paper = f"over Llama 2: QuALITY {quality} with Llama 2's own, long texts removed; QMSum {qmsum} (Table 7)"
    line = Line("The data mix matters more than the length of texts", paper)
    return line if recorded("tiny", MIXED) is None else _with_mixes_of_a_copying_model(line)


def _with_mixes_of_a_copying_model(line: Line) -> Line:
    """The line of the data mix, judged by the model to which far context is worth something."""
    effects = mixed_results().content_or_length(TRAINED_ON)
    far = effects[effects.place == "far"].set_index(["change", "measure"])
    said = (
        f"{change} {_nats(far.loc[change, 'NLL'])} nat and "
        f"{measured(*far.loc[(change, 'copying'), ['value', 'low', 'high']], digits=1)} points"
        for change in (LENGTH, CONTENT)
    )
    ours = f"far NLL and share copied from over 1,024 tokens back: {'; '.join(said)}"
    orders = far.seeds[[LENGTH, CONTENT]].min()
    scale = f"{MODELS['tiny']}, which copies, trained on, {orders} orders of the texts (seeds)"
    moved = [
        f"{change} moves far {measure}"
        for (change, measure), row in far.loc[[LENGTH, CONTENT]].iterrows()
        if not row.low <= 0 <= row.high
    ]
    by_nll, by_copying = (heavier(effects, measure) for measure in ("NLL", "copying"))
    why = f"in a model that copies, {by_nll} weighs more by NLL, {by_copying} by copying"
    if by_nll == by_copying == "neither":
        why = "; ".join(["in a model that copies, neither weighs more, beyond the interval", *moved])
    judged = UNDECIDED
    if by_nll == by_copying != "neither":
        judged = AGREES if by_nll == "content" else DISAGREES
    fresh = {measure: heavier(effects, measure, skip=FIRST_ORDERS) for measure in ("NLL", "copying")}
    told = f"{fresh['NLL']} by NLL, {fresh['copying']} by copying"
    why += ", by a paired test chosen afterwards"
    judged += f": {why}; on the orders that came later alone, {told}; 'better' means of the same kind as the test texts"
    return replace(line, ours=ours, scale=scale, verdict=judged, why=why)


def _nats(row: Any) -> str:
    return measured(row.value, row.low, row.high, digits=3)


def _short_then_long(flops: dict[str, Any], perplexity: dict[str, Any]) -> Line:
    saved = 1 - flops["flops"][-1] / flops["flops"][0]
    books = [perplexity["rows"][row][perplexity["columns"].index("books")] for row in (-1, 0)]
    qasper, quality = (flops["long_tasks"][task] for task in ("Qasper", "QuALITY"))
    paper = f"{saved:.0%} fewer operations, {books[0]} against {books[1]} perplexity on books, "
    paper += f"but {qasper[-1]} against {qasper[0]} on Qasper, {quality[-1]} against {quality[0]} on QuALITY "
    paper += "(Tables 10, 11)"
    claim = "Pretraining short first, then long, costs less at equal quality"
    if recorded("tiny", CURRICULUM) is None:
        return Line(claim, paper)
    (size, wide), largest = list(larger_sizes().items())[-1], gpu_results()
    scratch = {
        FROM_SCRATCH: _late_switch(pretraining_results(), FROM_SCRATCH),
        LARGER: _late_switch(wide, size),
        GPU_SIZE: _late_switch(largest, GPU_SIZE),
    }
    rates = rate_factors(largest)
    return _with_a_copying_model(
        Line(claim, paper), scratch, rates, own_rates=size != LARGER and bool(rates["long"] != rates["short"])
    )


def _late_switch(results: PretrainingResults, size: str) -> Any:
    """The switch at 80% beside long throughout."""
    return results.curriculum(size).set_index("arm").loc["switch-80"]


def _with_a_copying_model(
    line: Line, scratch: dict[str, Any], rates: dict[str, float], *, own_rates: bool = False
) -> Line:
    """The line of short-then-long pretraining: by sizes from scratch, and by the model that has far context to lose.

    Args:
        scratch: the switch at 80% beside long throughout, by size.
        rates: of the last size, `rate_factors`.
        own_rates: whether the arms of all sizes but the first were trained at different rates.
    """
    results = copying_results()
    late = _late_switch(results, TRAINED_ON)
    less, near = late.copied_less, results.copying(TRAINED_ON, "switch-80", "long", 1, 256)
    points = measured(*(100 * less[name] for name in BOUNDS), digits=1)
    reads = "; ".join(f"{size} {_nats(one)} nat" for size, one in scratch.items())
    ours = f"switch at 80% minus long throughout, from scratch: {reads}, at {scratch[GPU_SIZE].flops:.0%} of the "
    ours += f"operations; in the tiny Llama, which copies, {points} points copied from over 1,024 tokens back"
    steps = f"{late.long_steps:.0f} of {late.short_steps + late.long_steps:.0f} steps long"
    scale = f"Llamas of {', '.join(scratch)} from scratch, {scratch[GPU_SIZE].seeds} seeds each; {MODELS['tiny']}, "
    scale += f"trained on, {late.seeds} orders of the texts, {steps}"
    found = {word: [size for size, one in scratch.items() if _reads(one) == word] for word in ("better", "worse")}
    whys = [f"{word} at {' and '.join(sizes)}" for word, sizes in found.items() if sizes]
    rated = " (arms at rates of their own)" if own_rates else ""
    whys = [f"from scratch it reads {', '.join(whys)}{rated}"] if whys else []
    copies = f"in a model that copies it {'copies less, near and far' if near['high'] < 0 else 'copies less far back'}"
    lost = less["high"] < 0
    why = "; ".join([*whys, *([copies] if lost else [])])
    against, equal = bool(lost or found["worse"]), [size for size, one in scratch.items() if one.high < EQUAL]
    if against:
        judged = f"{UNDECIDED if equal else DISAGREES}: {why}"
    elif len(equal) == len(scratch) and less["low"] > -MARGIN:
        judged = f"{AGREES}: {(why := 'from scratch, and in a model that copies')}"
    else:
        why = f"a loss of {EQUAL} nat or of {100 * MARGIN:.0f} points is not excluded everywhere"
        judged = f"{UNDECIDED}: {why}"
    judged += "; far context is worth little from scratch"
    if GPU_SIZE in equal and rates["long"] > rates["short"]:
        edge = ", the highest tried" if rates["long"] == rates["highest"] else ""
        judged += f"; at {GPU_SIZE} long throughout has {rates['long'] / rates['short']:.0f} times the rate{edge}"
    return replace(line, ours=ours, scale=scale, verdict=judged, why=why)


def _reads(difference: Any) -> str:
    """What an interval of NLL, minus another arm's, says."""
    return "worse" if difference.low > 0 else "better" if difference.high < 0 else NO_DIFFERENCE


def _instruction_tuning(table: dict[str, Any]) -> list[Line]:
    quality = {name: row[table["columns"].index("quality")] for name, row in table["rows"].items()}
    before, without, with_loss = (
        quality[row] for row in ("RLHF V5 data", *(f"with self-instruct, {no}loss on the prompt" for no in ("no ", "")))
    )
    loss = Line("A loss on the long prompt helps instruction tuning", f"QuALITY {without} to {with_loss} (Table 9)")
    long = Line(
        "Self-instructed long questions help without human labels",
        f"QuALITY {before} to {with_loss} with a loss on the prompt, to {without} without (Table 9)",
    )
    results = instruction_results(load_preset("tiny"))
    if results is None:
        return [loss, long]
    points = partial(measured, digits=1)
    asked = f"exact answers to quotations, {results.past[0]:,} to {results.past[-1]:,} tokens:"
    exact = results.difference(*PAIRS[LOSS])
    full, alone, plain, read = (results.difference(*PAIRS[name]) for name in (FULL, DILUTION, PLAIN, LONG))
    kept = results.far_nll(*PAIRS[FULL])
    scale = f"{MODELS['tiny']}, {len(results.seeds('long'))} seeds"
    real = instruction_results(load_preset("smollm2"))
    on_squad = {name: real.difference(*PAIRS[name], "f1") for name in (FULL, PLAIN, LONG)} if real else {}

    ours = f"{asked} {points(*exact)} points; with answers at their weight without it {points(*full)}, and far NLL "
    ours += f"{measured(*kept)} nat; by that dilution of answers alone {points(*alone)}"
    judged = _judged(full, *([on_squad[FULL]] if real else []))
    why = f"with answers at full weight, a control that was added afterwards, {_told(full)} at tiny"
    reason = f"{why}{', and the model reads better' if kept[2] < 0 else ''}"
    if exact[2] < 0:
        why = f"done as in the paper it costs exact answers at tiny; {why}"
        reason += "; done as in the paper, where it dilutes answers, it costs exact ones"
        reason += ", and so does dilution alone" if alone[2] < 0 else ""
    reason += "; compared at one learning rate"
    loss = replace(loss, ours=ours, scale=scale, verdict=f"{judged}: {reason}", why=why)

    ours = f"{asked} without the loss {points(*plain)} points, with it {points(*read)}"
    judged = _judged(on_squad[PLAIN], on_squad[LONG]) if real else UNDECIDED
    reason = f"at tiny no model wrote the questions, a rule quotes them; without the loss {_told(plain)}, "
    reason += f"with it {_told(read)}"
    long = replace(long, ours=ours, scale=scale, verdict=f"{judged}: {reason}")
    return [_on_squad(loss, real, FULL), _on_squad(long, real, LONG)] if real else [loss, long]


def _on_squad(line: Line, results: InstructionResults, pair: str) -> Line:
    """The line with the difference of a pair of arms at the real model, past its old window."""
    f1, likely = (results.difference(*PAIRS[pair], measure) for measure in ("f1", "log_probability"))
    ours = f"{line.ours}; F1 on SQuAD behind {results.past[-1]:,} tokens: {measured(*f1, digits=1)} points, "
    ours += f"log-probability of the answer {measured(*likely)} nat a token"
    told, likelier = (
        "not detectably different" if one[1] <= 0 <= one[2] else "higher" if one[1] > 0 else "lower"
        for one in (f1, likely)
    )
    judged = f"{line.verdict}; at SmolLM2, past the old window, F1 is {told}, log-probability {likelier}"
    seeds = len(results.seeds("long"))
    steps = results.preset.instruction.steps
    scale = (
        f"{line.scale}; {MODELS['smollm2']}, {seeds} seed{'s' if seeds > 1 else ''}, {steps} steps in the old window"
    )
    return replace(line, ours=ours, scale=scale, verdict=judged)


def _judged(*differences: Interval) -> str:
    """Whether all intervals lie above 0, all lie below, or neither."""
    if all(low > 0 for _, low, _ in differences):
        return AGREES
    return DISAGREES if all(high < 0 for *_, high in differences) else UNDECIDED


def _told(difference: Interval) -> str:
    if difference[1] <= 0 <= difference[2]:
        return "no change of exact answers was detected"
    return f"exact answers are {'more' if difference[1] > 0 else 'fewer'}"


def _full_attention(attention: dict[str, Any]) -> Line:
    width = attention["width"]
    crossing = {size: attention["times_width"] * width[size] for size in width}
    record = recorded("gpu", "04_one_gpu_budget")
    steps, device = record.table("steps"), record.content["provenance"]["device"]
    steps = steps[(steps.model == "Llama 2 7B") & steps.cap_gib.isna() & ~steps.tokens_per_second.isna()]
    theirs = steps[steps.contender.str.startswith("Trainer")].sort_values("context")
    ours = steps[(steps.contender == "ours") & steps.context.isin(theirs.context)]
    ours = ours.sort_values("tokens_per_second").groupby("context").tail(1)  # the faster of two plans
    shares = [attention_share(part, crossing["7B"]) for part in (theirs, ours)]
    judged = AGREES if max(shares) < 0.5 else DISAGREES if min(shares) > 0.5 else UNDECIDED
    results = gpu_results()
    sparse = pd.Series(results.difference(GPU_SIZE, ("s2", "full"), ("long", "full")))
    small = sparse_results()
    work, time = (pd.Series(one) for one in (equal_operations(small), equal_seconds(small)[1]))
    better = {"worse": "sparse attention reads better", "better": "full attention reads better"}
    told = [better.get(_reads(one), f"{NO_DIFFERENCE} between full and sparse attention") for one in (work, time)]
    why = f"in time, of a 4-bit step; far above 6 h {told[0]} at equal operations"
    why += " and in equal seconds" if told[0] == told[1] else f", {told[1]} in equal seconds"
    return Line(
        "Below 6 h tokens (h: the model's width) attention is not most of the cost",
        f"attention takes half of the operations only at {crossing['70B']:,} tokens at 70B (section 2.1)",
        f"at {crossing['7B']:,} tokens attention takes {shares[0]:.0%} of a training step's time with Trainer "
        f"and PEFT, at most {shares[1]:.0%} of our faster step's, which also recomputes more when longer (notebook 4); "
        f"trained sparse (S2) at {GPU_SIZE}, NLL {_nats(sparse)} nat, read as trained "
        f"{_nats(pd.Series(as_trained(results)))} nat; at {LARGER}, full attention minus S2 {_nats(work)} nat at equal "
        f"operations, {_nats(time)} in equal seconds (S2 at {LOWER} of the rate, asked as both are open at the whole)",
        f"Llama 2 7B, 4-bit, random weights, one {device}, {len(theirs)} and {len(ours)} lengths, no interval; "
        f"{GPU_SIZE} and {LARGER} from scratch, {sparse.seeds} seeds each, 4,096 tokens, above 6 h there",
        f"{judged}: {why}",
        why,
    )


def in_brief() -> str:
    """Markdown: what was found, in a few sentences."""
    lines = []
    for results in read_dose_results(list(MODELS)).values():
        name = MODELS[results.preset]
        own, far, inside = (compared(results, *line) for line in (("full",), ("fair",), ("fair", "inside")))
        own_nats, far_nats, inside_nats = (measured(*one.found, digits=3) for one in (own, far, inside))
        useful = "Far context became useful" if own.gains else "Far context was not shown to become useful"
        lines += [
            f"**{name}**, after {own.tokens / 1e6:.1f} million tokens of whole long sequences, {own.runs}:\n",
            f"- {useful}: full context reads {own_nats} nat per token against windows of the same model. "
            f"{_part_of_it(results)}",
            f"- Far out, against a control trained on as many tokens: {far.says}, {far_nats} nat.",
            f"- Inside the old window, against that control: {inside.says}, {inside_nats} nat.",
        ]
        if again := read_other_texts(results):
            lines += _on_other_texts(again, far.spread)
        lines[-1] += "\n"
    verdicts = [line.verdict.partition(":")[0] for line in scoreboard().values()]
    counts = ", ".join(f"{verdicts.count(one)} *{one}*" for one in dict.fromkeys(sorted(verdicts)))
    lines.append(f"**The paper's {len(verdicts)} claims**, at the sizes that we could train: {counts}.")
    return "\n".join(lines)


def _part_of_it(results: DoseResults) -> str:
    """The gain over own windows where these are nearly full, and in texts that hardly repeat themselves."""
    full, texts, limit = compared(results, "full", whole=True), results.gains_of_texts(), 0.1
    plain = texts[texts.repeats_itself < limit].nats
    return (
        f"Where those windows are nearly full, it is {measured(*full.found, digits=3)}. In the {len(plain)} of "
        f"{len(texts)} texts that repeat less than {limit:.0%} of themselves, it is {plain.mean():+.3f} on average."
    )


def _on_other_texts(again: OtherTexts, spread: float) -> list[str]:
    """Lines of a list: the same weights on texts that no choice had seen; `spread` as `Comparison` has it."""
    found = again.compare().set_index(["quantity", "texts"])
    own, control = "far out, minus its own windows", "far out, minus another seed's control in windows"
    new, old_and_new = (found.loc[(control, texts)] for texts in ("second set", "both"))
    gains = new.high < 0 and -new.nats > spread
    told = [
        measured(*row[["nats", "low", "high"]], digits=3) for row in (found.loc[(own, "second set")], new, old_and_new)
    ]
    return [
        f"- {new.documents:.0f} other texts of {new.kinds:.0f} kinds, read after every choice was made, with the first "
        f"seed's weights: {told[0]} nat against its own windows. Against another seed's control in windows: "
        f"{'ahead' if gains else 'behind' if new.low > 0 else NO_DIFFERENCE}, {told[1]}; with the first texts, "
        f"{old_and_new.documents:.0f} in all, {told[2]}, which is "
        f"{'more' if -old_and_new.nats > spread else 'less'} than the largest distance between seeds, at any dose."
    ]


def headlines() -> str:
    """Markdown: what was found on real models, a column for each, and the longest training step."""
    doses = read_dose_results(list(MODELS)).values()
    tables = []
    for column_of in (_of_doses, _of_statements):
        columns = [column_of(results) for results in doses]
        tables.append(_markdown([[name, *(column[name] for column in columns)] for name in columns[0]]))
    record = recorded("gpu", "04_one_gpu_budget")
    row, device = record.table("longest").iloc[0], record.content["provenance"]["device"]
    seconds = row.context / row.tokens_per_second
    longest = (
        f"**The longest 4-bit training step that ran**: {row.model}, {row.context:,.0f} tokens in {seconds:.0f} s, "
        f"under a cap of {row.cap_gib:.0f} GiB, {row.allocated_gib:.1f} GiB allocated, activation checkpoints on the "
        f"host (one {device}, random weights)."
    )
    return "\n\n".join(
        [VERDICTS, tables[0], "**Planted statements found**, right to the word:", tables[1], CAVEATS, longest]
    )


def _of_doses(results: DoseResults) -> dict[str, str]:
    """What full context is worth to one model, by question."""
    old, new = load_preset(results.preset).base.window, load_preset(results.preset).extension.window
    own, posed, far, inside = (
        compared(results, *line) for line in (("full",), ("pose",), ("fair",), ("fair", "inside"))
    )
    read = results.record.table("held_out").tokens.max()
    arms = results.record.table("arms").set_index("arm")
    length = int(arms.window[results.largest("full").rpartition("-")[0]].max())
    return {
        "": f"{MODELS[results.preset]}, {old:,} to {new:,} tokens" + (f", read to {read:,}" if read < new else ""),
        "trained on whole sequences": f"{own.tokens / 1e6:.1f} million tokens in sequences of {length:,}, {own.runs}",
        "far out": f"positions {read // 2:,} to {read:,}",
        "far out, full context minus the same model's windows": str(own),
        "own windows, where they are nearly full": str(compared(results, "full", whole=True)),
        "own windows, seed by seed": own.by_seed,
        "the same, trained by PoSE instead": str(posed or "not run"),
        "far out, full context minus the control's windows": str(far),
        "control's windows, where they are nearly full": str(compared(results, "fair", whole=True)),
        "control's windows, seed by seed": far.by_seed,
        "inside the old window, minus the control": str(inside),
        "inside, seed by seed": inside.by_seed,
    }


def _of_statements(results: DoseResults) -> dict[str, str]:
    """How many planted statements one model found, by arm and length."""
    old = load_preset(results.preset).base.window
    found = partial(statements_found, results)
    return {
        "": f"{MODELS[results.preset]}, old window {old:,} tokens, 5 texts of 20 statements",
        "in four times the old window: trained on whole sequences": found(results.largest("full"), 4 * old),
        "in four times the old window: untrained, YaRN": found("yarn-nf4", 4 * old),
        "in twice the old window: trained on whole sequences": found(results.largest("full"), 2 * old),
        "in twice the old window: untrained, RoPE base raised": found("raised-nf4", 2 * old),
        "in twice the old window: untrained, YaRN": found("yarn-nf4", 2 * old),
        "in the old window: trained on whole sequences": found(results.largest("full"), old),
        "in the old window: base": found("base-nf4", old),
        "in the old window: control": found(results.largest("control"), old),
    }


if __name__ == "__main__":
    print(scoreboard_table(), headlines(), sep="\n\n")
