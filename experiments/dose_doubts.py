"""What a sceptic asks of the dose record: how much hangs on one text, on the weights it is read on, on one rate."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from scipy import stats

from experiments.dose_record import SEEN, Readings
from experiments.dose_settings import read_doses
from experiments.real_models import ENDS, NAMES, DoseResults
from llama_long_utils.evaluation.statistics import FEWEST
from llama_long_utils.notebooks import measured, verdict
from llama_long_utils.presets import load_preset

BOUNDS, REPEATS = ["nats", "low", "high"], 0.1
WITHOUT = "without the strongest"


def nearly_full(results: DoseResults) -> pd.DataFrame:
    """Whole sequences at the largest dose, far out, minus nearly full windows: of all texts, and of fewer.

    Returns:
        Columns model, line ("full": minus its own windows; "fair": minus the control's), texts (all; `WITHOUT` the one
        that speaks most for the mean's sign; those that repeat little of themselves), documents, nats, low, high
        (missing of fewer than eight texts), ahead (as `DoseResults.ahead`), strongest (the text left out).
    """
    readings, held_out = Readings.of(results.record, results.preset), results.record.table("held_out")
    end, last = int(readings.tokens.max()), results.worth(whole=True).groupby("line").tail(1).set_index("line")
    rows = []
    for line in ("full", "fair"):
        first, second = f"{results.largest('full')}/full", last.second[line]
        (one, places), (other, _) = (readings.bucket(name, end // 2, end, SEEN) for name in (first, second))
        gap = one - other
        strongest = np.argmax(gap * np.sign(gap.mean()))
        few = held_out.repeats_itself.to_numpy()[places] < REPEATS
        parts = {"all": gap < np.inf, WITHOUT: np.arange(len(gap)) != strongest}
        for texts, kept in (parts | {f"repeat less than {REPEATS:.0%} of themselves": few}).items():
            found = readings.summary(gap[kept], places[kept])
            enough = kept.sum() >= FEWEST
            bounds = {name: f(found[name], found[f"kinds_{name}"]) if enough else np.nan for f, name in ENDS}
            about = {"model": results.preset, "line": line, "texts": texts, "documents": kept.sum()}
            rows.append({**about, "nats": found["nats"], **bounds, "strongest": held_out.source[places[strongest]]})
    table = pd.DataFrame(rows)
    lines = table.groupby("line", sort=False)
    return pd.concat(part.assign(ahead=results.ahead(part, line, whole=True)) for line, part in lines)


def nearly_full_table(doses: Mapping[str, DoseResults]) -> pd.DataFrame:
    """`nearly_full` of each model for a reader, a column for each choice of texts."""
    found = pd.concat(map(nearly_full, doses.values()))
    names = {"full": "its own windows", "fair": "the control's windows"}
    described = [
        f"{'ahead: ' * row.ahead}{measured(row.nats, row.low, row.high, digits=3)}, {row.documents} texts"
        for row in found.itertuples()
    ]
    found = found.assign(described=described, minus=found.line.map(names))
    table = found.pivot_table("described", ["model", "minus"], "texts", aggfunc="first", sort=False)
    return table.rename_axis(None, axis=1).reset_index()


def nearly_full_in_words(doses: Mapping[str, DoseResults]) -> str:
    """Of which models the gain over nearly full windows of their own hangs on one text: a sentence, or ""."""
    own = [nearly_full(results).query("line == 'full'").set_index("texts") for results in doses.values()]
    hangs = [part for part in own if part.ahead["all"] and not part.ahead[WITHOUT]]
    named = (f"{NAMES[part.model.iloc[0]]}: {part.strongest.iloc[0].rpartition('/')[2]}" for part in hangs)
    return f"In nearly full windows the gain is not shown without one text ({'; '.join(named)})." if hangs else ""


def by_repetition(results: DoseResults) -> str:
    """What full context is worth against own windows in texts that repeat themselves, and in the others: a sentence."""
    texts = results.gains_of_texts()
    often = texts.repeats_itself >= REPEATS
    return (
        f"**{results.preset}**: against windows of its own at the largest dose, {often.sum()} texts that repeat at "
        f"least {REPEATS:.0%} of themselves read {texts.nats[often].mean():+.3f} nat, the other {(~often).sum()} texts "
        f"{texts.nats[~often].mean():+.3f}."
    )


def unpacked_in_words(results: DoseResults) -> str:
    """How the largest dose reads on unpacked weights in place of NF4, and what is left of its gains: a list."""
    full, last = results.largest("full"), results.worth().groupby("line").tail(1).set_index("line")
    pairs = {"full": (f"{full}-16bit/full", f"{full}/full"), "window": (f"{full}-16bit/window", f"{full}/window")}
    found = results.compare(pairs | {"fair": (f"{full}-16bit/full", last.second["fair"])})
    said = f"**{results.preset}** after the largest dose"
    if "quantity" not in found:
        return f"{said} was not read on unpacked weights."
    found = found.set_index(["quantity", "place"])
    lines = [f"{said}, on unpacked weights minus on NF4:\n"]
    for place, where in {"inside": "inside the old window", "far": "far out"}.items():
        row = found.loc["full", place]
        judged = verdict(*row[BOUNDS], "better", "worse")
        lines.append(f"- {where} {judged}, worse in {row.documents - row.below_zero:.0f} of {row.documents:.0f} texts")
    change, windows = found.nats.xs("far", level="place"), found.loc[("window", "far"), BOUNDS]
    own = last.nats["full"] + change["full"] - change["window"]
    lines.append(f"- far out, read through windows of the old length: {verdict(*windows, 'better', 'worse')}")
    lines.append(f"- so far out full context minus own windows is {own:+.3f}, on NF4 {last.nats['full']:+.3f}")
    lines.append(f"- and minus the NF4 control's windows {change['fair']:+.3f}, on NF4 {last.nats['fair']:+.3f}")
    return "\n".join(lines)


def prices_in_words(results: DoseResults) -> str:
    """By seed and dose, what whole sequences cost inside the old window against the control; rate and passes."""
    prices, arms = results.worth(r"\d+", place="inside").query("line == 'fair'"), results.record.table("arms")
    seeds = prices["first"].str.extract(r"-s(\d+)-")[0]
    each = [f"{row.nats:+.3f} after {row.tokens_trained / 1e6:.1f}M" for row in prices.itertuples()]
    each = pd.Series(each, index=prices.index).groupby(seeds).agg(", ".join)
    by_seed = "; ".join(f"seed {seed} {prices}" for seed, prices in each.items())
    most = arms.sort_values("tokens").iloc[-1]
    return (
        f"**{results.preset}**, whole sequences minus the control inside the old window: {by_seed} tokens. One "
        f"learning rate for all arms: {read_doses(results.preset).learning_rate:g}. {most.tokens / 1e6:.1f}M tokens "
        f"are {most.passes:.2f} passes over the training documents."
    )


def pose_in_words(results: DoseResults, old: int) -> str:
    """How long PoSE's sequences are: a sentence; "" if it was not run. `old` is the old window."""
    arms = results.record.table("arms")
    windows = sorted({*arms.window[arms.arm.str.startswith("pose")]})
    lengths = " and ".join(f"{window:,} tokens, {window / old:.0%} of the old window" for window in windows)
    return f"PoSE trained on {lengths} ({NAMES[results.preset]}). " * bool(windows)


def leads_by_text(results: DoseResults, asked: pd.DataFrame) -> str:
    """Statements found by whole sequences minus those of each rival, text by text, at lengths past the old window."""
    rivals = {"raised-nf4": "RoPE base raised", "yarn-nf4": "YaRN", results.largest("pose"): "PoSE, trained as long"}
    part = asked[(asked.model == results.preset) & (asked.length > load_preset(results.preset).base.window)]
    lines = [
        f"**{results.preset}**, past the old window: right answers of whole sequences minus those of a rival, in each "
        "text, and their mean, with Student's t over texts:\n"
    ]
    for length in sorted(part.length.unique()):
        for rival, name in rivals.items():
            if rival:
                each = leads(results, rival, length)
                by_text = ", ".join(f"{one:+d}" for one in each)
                lines.append(f"- {length:,} tokens, {name}: {by_text}; {measured(*mean_lead(each), digits=1)}")
    return "\n".join(lines)


def leads(results: DoseResults, rival: str, length: int) -> np.ndarray:
    """Statements that whole sequences found minus those that a rival's reading found, in each text of a length."""
    full, other = (results.found_in_texts(name, length) for name in (results.largest("full"), rival))
    return np.subtract(full, other)


def mean_lead(each: np.ndarray) -> tuple[float, float, float]:
    """Mean over texts, and Student's 95% interval."""
    reach = stats.t.ppf(0.975, len(each) - 1) * stats.sem(each)
    return each.mean(), each.mean() - reach, each.mean() + reach


def practice_in_words(asked: pd.DataFrame) -> Iterator[str]:
    """What the control, which practised copying too, finds at the greatest length it was asked, between its rivals."""
    for model, part in asked.groupby("model", sort=False):
        length = part.length[part.arm == "control"].max()
        right = part[part.length == length].groupby("arm").right.sum()
        yield (
            f"**{model}** at {length:,} tokens: base {right['base']}, control {right['control']}, whole sequences "
            f"{right['full']}."
        )
