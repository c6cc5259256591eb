"""What a sceptic asks of the dose record: how much hangs on one text, on the weights it is read on, on one rate."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.dose_record import SEEN, Readings
from experiments.dose_settings import read_doses
from experiments.real_models import ENDS, LINES, NAMES, WAYS, DoseResults, OtherTexts, describe_line
from llama_long_utils.evaluation.statistics import FEWEST
from llama_long_utils.notebooks import NO_DIFFERENCE, measured, verdict
from llama_long_utils.presets import load_preset

BOUNDS, REPEATS = ["nats", "low", "high"], 0.1
WITHOUT = "without the strongest text"
RIVALS = {"pose": "PoSE", "raised": "RoPE base raised", "yarn": "YaRN"}  # past the old window, in finding statements
TIMES = {2: "twice", 4: "four times"}


def nearly_full(results: DoseResults) -> pd.DataFrame:
    """The lines of `DoseResults.worth` at the largest dose, far out, minus nearly full windows: of all texts, and of
    fewer.

    Returns:
        Columns model, line, texts (all; `WITHOUT` the one that speaks most for the mean's sign; those that repeat
        little of themselves), documents, nats, low, high (missing of fewer than eight texts), ahead (as
        `DoseResults.ahead`), strongest (the text left out).
    """
    readings, held_out = Readings.of(results.record, results.preset), results.record.table("held_out")
    end, last = int(readings.tokens.max()), results.worth(whole=True).groupby("line").tail(1).set_index("line")
    rows = []
    for line in sorted(last.index, key=[*LINES, *WAYS].index):
        first, second = f"{results.largest('full' if line == 'fair' else line)}/full", last.second[line]
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


def worth_table(doses: Mapping[str, DoseResults]) -> pd.DataFrame:
    """For a reader: what full context is worth at each line's largest dose, far out, and in nearly full windows."""
    rows = []
    for name, results in doses.items():
        last, found = results.worth().groupby("line").tail(1).set_index("line"), nearly_full(results)
        for line, part in found.groupby("line", sort=False):
            row, (every, without, few) = last.loc[line], part.itertuples()
            rows.append(
                {
                    "model": name,
                    "full context": describe_line(line),
                    "tokens": f"{row.tokens_trained / 1e6:.1f}M",
                    "far half": _judged(row, bool(results.ahead(row, line))),
                    "texts that gain": f"{row.below_zero} of {row.documents}",
                    "nearly full windows": _judged(every, every.ahead),
                    WITHOUT: _judged(without, without.ahead),
                    few.texts: _judged(few, few.ahead),
                }
            )
    return pd.DataFrame(rows)


def _judged(row: Any, ahead: bool) -> str:
    """A difference with its interval, in bold with its verdict if it has one."""
    judged = "**ahead** " if ahead else "**behind** " if row.low > 0 else ""
    few = " (too few for an interval)" * bool(np.isnan(row.low))
    return judged + measured(row.nats, row.low, row.high, digits=3) + few


def verdicts(doses: Mapping[str, DoseResults]) -> pd.DataFrame:
    """In words for a table: the differences of whole sequences at the largest dose, a column for each model."""
    columns = {}
    for name, results in doses.items():
        found, far = nearly_full(results).set_index(["line", "texts"]), results.worth().groupby("line").tail(1)
        far, near = far.set_index("line"), results.worth(place="inside").query("line == 'fair'").iloc[-1]
        rows = {
            "far half, minus its own windows": (far.loc["full"], results.ahead(far.loc["full"], "full")),
            "... where these are nearly full": (found.loc["full", "all"], found.ahead["full", "all"]),
            "... and without the strongest text": (found.loc["full", WITHOUT], found.ahead["full", WITHOUT]),
            "far half, minus the control's windows": (far.loc["fair"], results.ahead(far.loc["fair"], "fair")),
            "... where the control's are nearly full": (found.loc["fair", "all"], found.ahead["fair", "all"]),
            "inside the old window, minus the control": (near, near.high < 0),
        }
        columns[name] = {
            said: "ahead" if ahead else "behind" if row.low > 0 else NO_DIFFERENCE
            for said, (row, ahead) in rows.items()
        }
    return pd.DataFrame(columns).rename_axis("full context").reset_index()


def nearly_full_in_words(doses: Mapping[str, DoseResults]) -> str:
    """From which dose on a model gains over nearly full windows of its own, if that hangs on one text: sentences."""
    said = []
    for name, results in doses.items():
        part, dose = (
            nearly_full(results).query("line == 'full'").set_index("texts"),
            results.pays_from("full", whole=True),
        )
        if dose and not part.ahead[WITHOUT]:
            text = part.strongest["all"].rpartition("/")[2]
            said.append(
                f"Over nearly full windows {NAMES.get(name, name)} gains from {dose / 1e6:.1f}M tokens on, and without "
                f"the strongest text ({text}) that is not shown."
            )
    return " ".join(said)


def by_repetition(results: DoseResults) -> str:
    """What full context is worth against own windows in texts that repeat themselves, and in the others: a sentence."""
    texts = results.gains_of_texts()
    often = texts.repeats_itself >= REPEATS
    return (
        f"**{results.preset}**: against windows of its own at the largest dose, {often.sum()} texts that repeat at "
        f"least {REPEATS:.0%} of themselves read {texts.nats[often].mean():+.3f} nat, the other {(~often).sum()} texts "
        f"{texts.nats[~often].mean():+.3f}."
    )


def beside_seeds(results: DoseResults, again: OtherTexts) -> str:
    """Whether the lead over another seed's control, on the second set and on both, exceeds what seeds lie apart."""
    found = again.compare().query('quantity == "far out, minus another seed\'s control in windows"')
    apart, found = results.apart("fair"), found.set_index("texts").loc[["second set", "both"]]
    said = [
        f"On {sets} the lead over another seed's control is {'' if row.high < 0 else 'not '}beyond its interval, and "
        f"{'larger' if -row.nats > apart else 'smaller'} than that."
        for sets, row in zip(("the second set", "both sets together"), found.itertuples(), strict=True)
    ]
    return f"Against the control, seeds of **{results.preset}** lie up to {apart:.3f} nat apart. {' '.join(said)}"


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
    """What whole sequences cost inside the old window against the control, by seed and dose; rate, passes: a list."""
    prices, arms = results.worth(r"\d+", place="inside").query("line == 'fair'"), results.record.table("arms")
    last = results.worth(place="inside").query("line == 'fair'").iloc[-1]
    seeds = prices["first"].str.extract(r"-s(\d+)-")[0]
    each = [f"{row.nats:+.3f} after {row.tokens_trained / 1e6:.1f}M tokens" for row in prices.itertuples()]
    each = pd.Series(each, index=prices.index).groupby(seeds).agg(", ".join)
    most, worse = arms.sort_values("tokens").iloc[-1], last.documents - last.below_zero
    return "\n".join(
        [
            f"**{results.preset}**, whole sequences minus the control inside the old window:\n",
            f"- {verdict(*last[BOUNDS], 'better', 'worse')}, worse in {worse} of {last.documents} texts",
            *(f"- seed {seed}: {prices}" for seed, prices in each.items()),
            f"- one learning rate for all arms: {read_doses(results.preset).learning_rate:g}",
            f"- {most.tokens / 1e6:.1f}M tokens are {most.passes:.2f} passes over the training documents",
        ]
    )


def found_in_words(doses: Mapping[str, DoseResults], asked: pd.DataFrame) -> str:
    """Past the old window, where the lead of whole sequences over a rival is beyond its interval over texts; and
    whether the control was asked there: sentences."""
    shown, others, control = [], 0, False
    for name, results in doses.items():
        old = load_preset(name).base.window
        for length, part in asked[(asked.model == name) & (asked.length > old)].groupby("length"):
            sums, readings = part.groupby("arm")[["right", "questions"]].sum(), _rivals(results)
            led = [arm for arm in readings if mean_lead(leads(results, readings[arm], length))[1] > 0]
            others, control = others + len(readings) - len(led), control or "control" in sums.index
            found = ", ".join(f"{RIVALS[arm]} {sums.right[arm]}" for arm in led)
            where = (
                f"In {TIMES.get(length / old, f'{length / old:g} times')} its old window {NAMES.get(name, name)} finds"
            )
            shown += [f"{where} {sums.right['full']} of {sums.questions['full']}, {found}."] if led else []
    none = f"No {'other ' * bool(shown)}lead past an old window is beyond its interval."
    return " ".join([*shown, *[none] * bool(others), *["The control was not asked there."] * (not control)])


def _rivals(results: DoseResults) -> dict[str, str]:
    """The readings of `RIVALS` that a model has."""
    readings = {"pose": results.largest("pose"), "raised": "raised-nf4", "yarn": "yarn-nf4"}
    return {arm: reading for arm, reading in readings.items() if reading}


def found_by_seed(results: DoseResults) -> str:
    """What other seeds than the first found after the largest dose: a sentence, "" if there are none."""
    table, said = results.record.table("retrieval").query("task == 'key'"), []
    for way in ("full", "pose", "control"):
        arm, _, dose = results.largest(way).rpartition("-")
        others = table[
            table.arm.str.fullmatch(arm.replace("-s0", r"-s[1-9]\d*")) & (table.tokens_trained == int(dose or -1))
        ]
        for name, part in others.groupby("arm"):
            sums = (part.exact * part.questions).groupby(part.length).sum().round().astype(int)
            counts = ", ".join(f"{right} in {length:,} tokens" for length, right in sums.items())
            said.append(f"{WAYS.get(way, way)}, seed {name.rpartition('-s')[2]}, {counts}")
    return f"Other seeds after the largest dose, right of 100: {'; '.join(said)}." * bool(said)


def leads_by_text(results: DoseResults, asked: pd.DataFrame) -> str:
    """Statements found by whole sequences minus those of each rival, text by text, at lengths past the old window."""
    part = asked[(asked.model == results.preset) & (asked.length > load_preset(results.preset).base.window)]
    lines = [
        f"**{results.preset}**, past the old window: right answers of whole sequences minus those of a rival, in each "
        "text, and their mean, with Student's t over texts:\n"
    ]
    for length in sorted(part.length.unique()):
        for arm, rival in _rivals(results).items():
            each = leads(results, rival, length)
            by_text = ", ".join(f"{one:+d}" for one in each)
            lines.append(f"- {length:,} tokens, {RIVALS[arm]}: {by_text}; {measured(*mean_lead(each), digits=1)}")
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
