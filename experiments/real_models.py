"""Records of real models as notebooks 4 and 13 tell them: doses, statements found, tasks, steps on a GPU."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.dose_record import SECOND_SLUG, SEEN, Readings
from llama_long_utils.evaluation.statistics import FEWEST
from llama_long_utils.figures import BLACK, BLUE, GREY, PINK, RED, TEAL, intervals, plt, save_figure
from llama_long_utils.notebooks import measured
from llama_long_utils.paths import RESULTS
from llama_long_utils.presets import load_preset
from llama_long_utils.records import Record, recorded

NAMES = {"smollm2": "SmolLM2-135M", "qwen2.5-coder-1.5b": "Qwen2.5-Coder-1.5B"}
FILES = {"smollm2": "Q4_1", "qwen2.5-coder-1.5b": "Q4_K_M"}  # how the files are quantised that weights come from
WAYS = {"full": "whole sequences", "pose": "PoSE", "short": "short without skips"}
LINES = {"full": "minus its own windows", "fair": "minus the control's windows"}
SHARED = {"sharex": True, "sharey": True, "squeeze": False}  # panels whose numbers are compared
ENDS = ((min, "low"), (max, "high"))
FORMS = {"full": ("s-", BLUE), "pose": ("^-", TEAL), "short": ("o-", RED), "fair": ("D--", BLACK)}
ARMS = {"base": "base", "raised": "base, RoPE base raised", "yarn": "base, YaRN", "control": "control"}
ARMS |= {"pose": WAYS["pose"], "full": WAYS["full"]}
PLACES = {
    "inside": {"label": "inside the old window", "color": GREY, "marker": "o"},
    "far": {"label": "in the far half of the texts", "color": BLUE, "marker": "s"},
}
SHARES = {"mmlu": "accuracy", "hellaswag": "accuracy_per_character", "truthfulqa_mc1": "accuracy_per_character"}
SHARES |= {"gsm8k": "exact_match", "humaneval": "passed"}
UNPACKED = "base_16_bit -> extended"


@dataclass(frozen=True)
class DoseResults:
    """The record `06_dose_response` of a preset. "inside" is the old window, "far" the far half of the texts.

    Intervals are the outer ends of two: over kinds and texts, and Student's over the kinds' means.
    """

    preset: str
    record: Record

    @property
    def title(self) -> str:
        """Two lines: the model, and how far of its new window texts were read."""
        window = load_preset(self.preset).extension.window
        read = self.record.table("held_out").tokens.max()
        part = f"\nread to {read:,} of {window:,} tokens" if read < window else ""
        return f"{NAMES.get(self.preset, self.preset)}{part}"

    def rows(self, table: str, place: str) -> pd.DataFrame:
        """The rows of a table at a place."""
        new = self.record.table("held_out").tokens.max()
        low, high = (0, load_preset(self.preset).base.window) if place == "inside" else (new // 2, new)
        rows = self.record.table(table)
        if "kinds_low" in rows:
            rows["low"], rows["high"] = rows[["low", "kinds_low"]].min(axis=1), rows[["high", "kinds_high"]].max(axis=1)
        return rows[(rows.position_low == low) & (rows.position_high == high)]

    def largest(self, way: str, at_most: float = np.inf) -> str:
        """The arm of a way with the largest dose, of the first seed: "full16k-s0-10485760"; empty if it was not run."""
        arms = self.record.table("arms")
        arms = arms[arms.arm.str.fullmatch(rf"{way}\d+k?-s0") & (arms.tokens <= at_most)]
        last = arms.sort_values("tokens").tail(1)
        return "".join(last.arm + "-" + last.tokens.astype(str))

    def compare(self, pairs: dict[str, tuple[str, str]]) -> pd.DataFrame:
        """First minus second reading of each named pair at both places; pairs that were not read are left out."""
        found = []
        for place in ("inside", "far"):
            table = self.rows("differences", place).set_index(["first", "second"])
            names = {quantity: pair for quantity, pair in pairs.items() if pair in table.index}
            found += [{"quantity": name, "place": place, **table.loc[pair]} for name, pair in names.items()]
        return pd.DataFrame(found).assign(model=self.preset, title=self.title)

    def four_bits(self) -> pd.DataFrame:
        """What NF4 costs the base and the extended model, and how gains depend on the base they are measured from.

        "Unpacked" are the file's own weights in 16 bits. They were quantised before: `FILES`.
        """
        full = self.largest("full")
        return self.compare(
            {
                "base: unpacked minus NF4": ("base/window", "base-nf4/window"),
                "extended minus NF4 base": (f"{full}/full", "base-nf4/window"),
                "extended minus unpacked base": (f"{full}/full", "base/window"),
                "extended: unpacked minus NF4": (f"{full}-16bit/full", f"{full}/full"),
            }
        )

    def alternatives(self) -> pd.DataFrame:
        """Whole sequences with full context against what reads in windows, and YaRN against the base."""
        control, full = self.largest("control"), self.largest("full")
        same = self.largest("full", at_most=int(control.rpartition("-")[2]))
        return self.compare(
            {
                "whole sequences minus control, equal tokens": (f"{same}/full", f"{control}/window"),
                "whole sequences, largest dose, minus unpacked base": (f"{full}/full", "base/window"),
                "control minus unpacked base": (f"{control}/window", "base/window"),
                "YaRN, untrained, minus NF4 base": ("yarn-nf4/full", "base-nf4/window"),
            }
        )

    def worth(self, seed: str = "0", place: str = "far", whole: bool = False) -> pd.DataFrame:
        """What full context is worth, by way and dose: minus the same model's windows, and minus the control's.

        Args:
            seed: a regular expression.
            place: "far" or "inside".
            whole: only at places where windows have seen at least seven eighths of their length (far out).

        Returns:
            The columns of the record, with `line`: the way, or "fair" for whole sequences minus the control after as
            many tokens.
        """
        if whole:
            pairs = self.rows("whole_windows", place).query("weights == 'nf4'")
            name = pairs.arm + "-" + pairs.tokens_trained.astype(str)
            own, pairs = pairs[pairs.second == name + "/window"], pairs.assign(first=name + "/full")
        else:
            own = self.rows("full_minus_windows", place).query("weights == 'nf4'")
            pairs = self.rows("differences", place)
        own = own.assign(line=own.arm.str.extract(rf"^([a-z]+)\d+k?-s{seed}$")[0])
        full = pairs["first"].str.extract(rf"^full\d+k?-s({seed})-(\d+)/full")
        control = pairs.second.str.extract(r"^control\d+k?-s(\d+)-(\d+)/")
        # The control of an arm's own seed, else of the first seed, else another.
        rank = 2 * (full[0] == control[0]) + (control[0] == "0")
        fair = pairs.assign(line="fair", rank=rank)[full[1] == control[1]].sort_values("rank", kind="stable")
        fair = fair.drop_duplicates("first", keep="last").drop(columns="rank").sort_index()
        return pd.concat([own[own.line.isin(WAYS)], fair]).sort_values(["line", "tokens_trained"], kind="stable")

    def apart(self, line: str, whole: bool = False) -> float:
        """How far runs of other seeds lie apart on a line of `worth`, in nats; 0 if there is one seed."""
        every = self.worth(r"\d+", whole=whole)
        spread = every[every.line == line].groupby("tokens_trained").nats.agg(np.ptp)
        return float(spread.max())

    def ahead(self, rows: pd.DataFrame, line: str, whole: bool = False) -> pd.Series:
        """Whether differences are below zero by the whole interval, and by more than seeds lie apart."""
        return (rows.high < 0) & (-rows.nats > self.apart(line, whole))

    def pays_from(self, line: str, whole: bool = False) -> int | None:
        """The least dose (tokens) from which on every dose of a line of `worth` is `ahead`; None if there is none."""
        part = self.worth(whole=whole).query("line == @line")
        ahead = self.ahead(part, line, whole).to_numpy()
        paying = part.tokens_trained[np.logical_and.accumulate(ahead[::-1])[::-1]]
        return int(paying.iloc[0]) if len(paying) else None

    def seeds_run(self) -> pd.DataFrame:
        """A row for each way of training, a column for each dose: how many seeds were run, "-" for none."""
        arms = self.record.table("arms")
        arms = arms.assign(way=arms.arm.str.extract(r"^([a-z]+)")[0]).sort_values("tokens")
        ways = [way for way in (*WAYS, "control") if way in set(arms.way)]
        counts = arms.pivot_table("seed", "way", "tokens", aggfunc="nunique").reindex(ways)
        counts = counts.map(lambda count: f"{count:.0f}" if count > 0 else "-")
        counts = counts.rename(columns="{:,} tokens".format, index=WAYS).rename_axis("trained on").reset_index()
        return counts.assign(model=self.preset).set_index("model").reset_index()

    def seeds_apart(self) -> pd.DataFrame:
        """Where several seeds were run: `worth` of each, in nats as text, and how far they lie apart; far half."""
        every = self.worth(r"\d+")
        every = every.assign(seed=every["first"].fillna(every.arm).str.extract(r"-s(\d+)")[0])
        every = every.sort_values("line", key=lambda lines: lines.map([*LINES, *WAYS].index), kind="stable")
        rows = []
        for (line, dose), part in every.groupby(["line", "tokens_trained"], sort=False):
            seeds = {f"seed {row.seed}": f"{row.nats:+.3f}" for row in part.sort_values("seed").itertuples()}
            about = {"model": self.preset, "full context": describe_line(line), "tokens": f"{dose / 1e6:.1f}M"}
            rows += [{**about, **seeds, "apart": f"{np.ptp(part.nats):.3f}"}] if len(seeds) > 1 else []
        table = pd.DataFrame(rows).fillna("-")
        return table[[*(name for name in table if name != "apart"), "apart"]] if rows else table

    def gains_of_texts(self) -> pd.DataFrame:
        """The held-out texts with `nats`: largest dose of whole sequences, far half, full context minus own windows."""
        nats = dict(zip(self.record.arrays["readings"], self.record.arrays["nats"], strict=True))
        texts, full = self.record.table("held_out"), self.largest("full")
        gap = (nats[f"{full}/full"] - nats[f"{full}/window"])[:, nats[f"{full}/full"].shape[1] // 2 :]
        return texts.assign(nats=gap.sum(axis=1) / (texts.tokens.max() // 2)).dropna(subset="nats")

    def found_in_texts(self, reading: str, length: int) -> list[int]:
        """How many planted statements a reading that was asked at every length got right in each text of one length."""
        asked = pd.DataFrame({name: self.record.arrays[f"question_{name}"] for name in ("task", "length", "text")})
        asked = asked.assign(exact=self.record.arrays[f"asked_{reading}_exact"])
        asked = asked[(asked.task == "key") & (asked.length == length)]
        return [int(right) for right in asked.groupby("text").exact.sum()]

    def statements(self) -> pd.DataFrame:
        """Planted statements found, by fifth of the depth: three untrained bases and the largest dose of three ways.

        Columns model, length (tokens), arm, fifth_of_depth, questions, exact (share), low, high, right (count).
        """
        asked = self.record.table("retrieval").query("task == 'key'").assign(model=self.preset)
        arms = {"base-nf4": "base", "raised-nf4": "raised", "yarn-nf4": "yarn", self.largest("control"): "control"}
        arms |= {self.largest(way): way for way in ("pose", "full")}
        names = asked.arm + np.where(asked.tokens_trained > 0, "-" + asked.tokens_trained.astype(str), "")
        asked = asked.assign(arm=names.map(arms), right=(asked.exact * asked.questions).round().astype(int))
        return asked.dropna(subset="arm").sort_values(["length", "arm", "fifth_of_depth"])


def describe_line(line: str) -> str:
    """A line of `DoseResults.worth` in words."""
    return f"{WAYS.get(line, WAYS['full'])}, {LINES.get(line, LINES['full'])}"


@dataclass(frozen=True)
class OtherTexts:
    """The first seed's whole sequences at the largest dose, on two sets of texts. No choice was made on the second.

    The control is the one that read both, of another seed: the first seed's was not kept.
    """

    sets: dict[str, Readings]
    full: str
    control: str
    repeats: np.ndarray  # how much of itself each text of the second set holds twice

    def compare(self) -> pd.DataFrame:
        """Columns quantity, texts (the name of a set), and those of `Readings.difference`."""
        old, new = next(iter(self.sets.values())).window, max(one.tokens.max() for one in self.sets.values())
        own, control = f"{self.full}/window", f"{self.control}/window"
        pairs = [("far out, minus its own windows", own, (new // 2, new), 0.0)]
        pairs += [("far out, minus its own nearly full windows", own, (new // 2, new), SEEN)]
        other = "minus another seed's control in"
        pairs += [(f"far out, {other} windows", control, (new // 2, new), 0.0)]
        pairs += [(f"far out, {other} nearly full windows", control, (new // 2, new), SEEN)]
        pairs += [(f"inside the old window, {other} windows", control, (0, old), 0.0)]
        rows = []
        for quantity, second, place, seen in pairs:
            for texts, readings in self.sets.items():
                found = readings.difference(f"{self.full}/full", second, *place, seen)
                found["low"], found["high"] = (f(found[end], found[f"kinds_{end}"]) for f, end in ENDS)
                rows.append({"quantity": quantity, "texts": texts, **found})
        return pd.DataFrame(rows)

    def by_repetition(self, limit: float = 0.1) -> str:
        """What full context is worth in the texts of the second set that repeat themselves, and in the others."""
        readings = self.sets["second set"]
        far = readings.tokens.max() // 2, readings.tokens.max()
        (nats, places), (own, _) = (readings.bucket(f"{self.full}/{way}", *far) for way in ("full", "window"))
        often = self.repeats[places] >= limit
        change = nats - own
        return (
            f"Second set, far out, minus its own windows: {often.sum()} texts that repeat at least {limit:.0%} of "
            f"themselves read {change[often].mean():+.3f} nat, the other {(~often).sum()} {change[~often].mean():+.3f}."
        )

    def table(self) -> pd.DataFrame:
        """The same as text, a column for each set."""
        found = self.compare()
        found["cell"] = [
            f"{measured(row.nats, row.low, row.high, digits=3)}, {row.below_zero} of {row.documents} texts, "
            f"without the strongest {row.without_one:+.3f}"
            for row in found.itertuples()
        ]
        table = found.pivot_table("cell", "quantity", "texts", aggfunc="first", sort=False)
        named = {name: f"{name}: {len(one.kinds)} texts, {len({*one.kinds})} kinds" for name, one in self.sets.items()}
        return table.rename(columns=named).rename_axis(None, axis=1).rename_axis("full context").reset_index()


def read_other_texts(results: DoseResults) -> OtherTexts | None:
    """Both sets of texts of a preset, and them together; None if it has no second one."""
    other = recorded(results.preset, SECOND_SLUG)
    if other is None:
        return None
    first, second = (Readings.of(record, results.preset) for record in (results.record, other))
    control = next(name for name in second.nats if name.startswith("control")).partition("/")[0]
    sets = {"first set": first, "second set": second, "both": first.joined(second)}
    return OtherTexts(sets, results.largest("full"), control, other.table("held_out").repeats_itself.to_numpy())


def read_dose_results(presets: list[str], *, needed: bool = False) -> dict[str, DoseResults]:
    """The dose records of those presets that have one; ValueError if one is `needed`, and none has."""
    found = {preset: recorded(preset, "06_dose_response") for preset in presets}
    if needed and not any(found.values()):
        have = sorted(path.parent.name for path in RESULTS.glob("*/06_dose_response.json"))
        raise ValueError(f"no preset of {presets} has a record 06_dose_response: name one of {have}")
    return {preset: DoseResults(preset, record) for preset, record in found.items() if record}


def draw_differences(table: pd.DataFrame, folder: Path, slug: str, number: str, caption: str) -> None:
    """A panel for each model: what `DoseResults.compare` found, with intervals, inside the old window and far out."""
    models, names = list(table.model.unique()), table.quantity.unique()
    figure, panels = plt.subplots(1, len(models), figsize=(5 + 3.6 * len(models), 3.6), **SHARED)
    for name, axes in zip(models, panels[0], strict=True):
        part = table[table.model == name]
        intervals(axes, part, row="quantity", colour="place", value="nats", zero=0, styles=PLACES, names=names)
        axes.set(title=part.title.iloc[0], xlabel="nats per token; left of the line the first is better")
        axes.get_legend().remove()
    figure.get_layout_engine().set(wspace=0.05)  # so that ticks of two panels are told apart
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    alt = "; ".join(f"{row.model}, {row.quantity}, {row.place} {row.nats:+.2f}" for row in table.itertuples())
    caption += " Recorded, first seed, the outer ends of two 95% intervals."
    save_figure(figure, folder, slug, number, caption, alt)


def draw_worth(
    doses: Mapping[str, DoseResults],
    folder: Path,
    slug: str,
    number: str,
    caption: str,
    *,
    lines: Mapping[str, str] = LINES,
    whole_windows: bool = False,
) -> None:
    """A panel for each model: what `DoseResults.worth` found by dose, with intervals; crosses: other seeds.

    Args:
        lines: which to draw, with their labels.
        whole_windows: read only where windows are nearly full.
    """
    counts = [1 + results.worth().tokens_trained.nunique() for results in doses.values()]
    size = (6.6 + 2 * len(doses), 4.6)
    figure, panels = plt.subplots(1, len(doses), figsize=size, sharey=True, squeeze=False, width_ratios=counts)
    ends = []
    for (name, results), axes in zip(doses.items(), panels[0], strict=True):
        worth, every = (results.worth(seed, whole=whole_windows) for seed in ("0", r"\d+"))
        ticks = sorted({*worth.tokens_trained})
        aside = (1.26 if len(ticks) > 1 else 1.04) ** (1 / len(lines))
        for place, (line, label) in enumerate(lines.items()):
            (form, colour), part = FORMS[line], worth[worth.line == line]
            others = every[(every.line == line) & ~every.nats.isin(part.nats)]
            where, lengths = part.tokens_trained * aside**place, [part.nats - part.low, part.high - part.nats]
            axes.errorbar(where, part.nats, yerr=lengths, fmt=form, capsize=3, color=colour, label=label)
            axes.plot(others.tokens_trained * aside ** (place + 0.5), others.nats, "x", color=colour, ms=7, mew=1.8)
            if len(part):
                ends.append(f"{name}, {label} {part.nats.iloc[-1]:+.3f}")
        axes.plot([], [], "x", color=GREY, ms=7, mew=1.8, label="other seeds")
        axes.axhline(0, color="0.3", linewidth=1)
        title = results.title.replace(" of", "\nof") if len(doses) > 1 else results.title
        axes.set(xscale="log", title=title, xlabel="tokens trained (millions)")
        axes.set(xlim=(ticks[0] / aside**3, ticks[-1] * aside ** (len(lines) + 2)))
        axes.set_xticks(ticks, [f"{tokens / 1e6:.1f}" for tokens in ticks])
        axes.minorticks_off()
    panels[0][0].set_ylabel("full context minus windows (nats per token)")
    crosses, *handles = panels[0][0].get_legend_handles_labels()[0]
    figure.legend(handles=[*handles, crosses], loc="outside lower center", ncols=3 if len(lines) < 3 else 2)
    alt = f"Nats against tokens trained. At the largest dose: {'; '.join(ends)}."
    save_figure(figure, folder, slug, number, caption, alt)


def unpadded(array: np.ndarray) -> list[np.ndarray]:
    """The rows of `padded`, one stretch of each document: float32 arrays of shape (1, tokens - 1)."""
    return [row[np.isfinite(row)][None].astype(np.float32) for row in array]


def worth_in_words(doses: Mapping[str, DoseResults]) -> str:
    """From which dose on each model gains over its own windows, and over the control's: a sentence."""
    said = []
    for line, rival in {"full": "its own windows", "fair": "the control"}.items():
        paying = {NAMES.get(name, name): results.pays_from(line) for name, results in doses.items()}
        said += [f"{name} gains over {rival} from {dose / 1e6:.1f}M tokens on" for name, dose in paying.items() if dose]
        missing = [name for name, dose in paying.items() if not dose]
        if len(missing) == len(paying) > 1:
            missing = ["neither model" if len(paying) == 2 else "no model"]
            said.append(f"{missing[0]} is shown to gain over {rival}")
        else:
            said += [f"{name} is not shown to gain over {rival}" for name in missing]
    return f"{'; '.join(said)}."


def four_bits_in_words(table: pd.DataFrame) -> str:
    """What NF4 costs each base inside the old window, from `DoseResults.four_bits`: a sentence."""
    rows = table[(table.quantity == "base: unpacked minus NF4") & (table.place == "inside")]
    costs = [f"{-row.nats:.2f} nat ({NAMES.get(row.model, row.model)})" for row in rows.itertuples()]
    return f"NF4, on top of the file's own quantisation, costs the base {' and '.join(costs)} inside the old window."


def unpacked(models: Sequence[str]) -> str:
    """What "unpacked" means: a sentence for captions."""
    files = " and ".join(f"{NAMES[model]}'s to {FILES[model]}" for model in models if model in FILES)
    return f"Unpacked: the file's own weights in 16 bits, already quantised ({files})."


def price_in_words(table: pd.DataFrame) -> str:
    """Which models read worse than the control inside the old window, from `DoseResults.alternatives`: a sentence."""
    rows = table[table.quantity.str.contains("equal tokens") & (table.place == "inside")]
    worse = [NAMES.get(model, model) for model in rows.model[rows.low > 0]]
    said = f"{' and '.join(worse) or 'No model'} {'read' if len(worse) > 1 else 'reads'} worse than the control"
    return f"{said} inside the old window."


def draw_statements(asked: pd.DataFrame, folder: Path, slug: str, number: str, caption: str) -> None:
    """Heat maps of `DoseResults.statements`, a panel for each model and length: right answers by arm and fifth, and in
    all; arms that were not asked at a length are left blank."""
    models = list(asked.groupby("model", sort=False))
    most_lengths = max(part.length.nunique() for _, part in models)
    size = (2.0 + 2.7 * most_lengths, 0.6 + 2.8 * len(models))
    figure, panels = plt.subplots(len(models), most_lengths, figsize=size, squeeze=False)
    said = []
    for (model, part), row in zip(models, panels, strict=True):
        arms, most = [arm for arm in ARMS if arm in set(part.arm)], part.questions.max()
        for axes in row[part.length.nunique() :]:
            axes.set_axis_off()
        for length, axes in zip(sorted(part.length.unique()), row, strict=False):
            right = part[part.length == length].pivot_table(index="arm", columns="fifth_of_depth", values="right")
            right = right.reindex(arms)
            axes.imshow(right, cmap="Blues", vmin=0, vmax=most, aspect="auto")
            for name in right.dropna().index:
                arm, counts = arms.index(name), right.loc[name].astype(int)
                for fifth, count in enumerate(counts):
                    colour = "white" if count > most / 2 else "black"
                    axes.text(fifth, arm, str(count), ha="center", va="center", color=colour)
                axes.text(len(counts), arm, str(counts.sum()), ha="center", va="center", weight="bold")
                said.append(f"{model}, {length:,}, {ARMS[name]}: {counts.sum()} of {len(counts) * most}")
            axes.set(
                title=f"{NAMES.get(model, model)}\n{length:,} tokens", xlabel="fifth of the text", xlim=(-0.5, 5.5)
            )
            axes.set_xticks(range(6), ["1", "2", "3", "4", "5", "all"])
            axes.set_yticks(range(len(arms)), [ARMS[arm] for arm in arms] if axes is row[0] else [])
            axes.grid(visible=False)
    save_figure(figure, folder, slug, number, caption, "; ".join(said))


def draw_tasks(shares: pd.DataFrame, costs: pd.DataFrame, folder: Path, slug: str, number: str, caption: str) -> None:
    """Both tables of `read_tasks`, a panel each; hollow: single questions where they are few."""
    marks = zip(shares.model.unique(), (BLACK, PINK), "so", strict=False)
    form = {"colour": "model", "value": "difference", "zero": 0}
    form["styles"] = {
        name: {"label": NAMES.get(name, name), "color": colour, "marker": marker} for name, colour, marker in marks
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.0))
    intervals(left, shares[shares.before + shares.after > 0], row="task", **form)
    left.set(title="right answers", xlabel="after minus before (points)")
    intervals(right, costs, row="row", samples="each", **form)
    right.set(title="NLL of the right answer", xlabel="after minus before (nats per token; right: less likely)")
    for axes in (left, right):
        axes.get_legend().remove()
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    least, most = shares.difference.min(), shares.difference.max()
    save_figure(
        figure,
        folder,
        slug,
        number,
        caption,
        f"Shares change by {least:+.1f} to {most:+.1f} points, likelihoods both ways.",
    )


def read_tasks(preset: str, pair: str = "base -> extended") -> tuple[pd.DataFrame, pd.DataFrame]:
    """What an extension, or 4 bits, did to tasks, as recorded in `08_benchmark_deltas`; empty tables without a record.

    Returns:
        (shares of right answers in points, NLL of the right answer in nats per token inside the old window): the
        record's columns with `model`, `row` (task and length), `each` (differences of fewer than eight questions,
        which then have no interval). MMLU's NLL, that of a letter, is left out.
    """
    record = recorded(preset, "08_benchmark_deltas")
    if record is None:
        return pd.DataFrame(columns=["task"]), pd.DataFrame(columns=["task"])
    table, window = record.table("deltas").assign(model=preset), load_preset(preset).base.window
    table = table[table.pair == pair]
    shares = table[(table.metric == table.task.map(SHARES)) & (table.length == 0)].copy()
    shares[["difference", "low", "high"]] *= 100
    costs = table[(table.metric == "answer_nll") & (table.task != "mmlu") & (table.length <= window)].copy()
    costs["row"] = costs.task + np.where(costs.length > 0, costs.length.map(", {:,} tokens".format), "")
    costs["each"] = [_single(record, row) for row in costs.itertuples()]
    costs.loc[costs["items"] < FEWEST, ["low", "high"]] = np.nan
    return shares, costs


def contrast_beside_accuracy(preset: str, task: str = "mmlu") -> pd.DataFrame:
    """For a reader, how each change from the same NF4 base moved accuracy, NLL and contrast; empty without a record."""
    record = recorded(preset, "08_benchmark_deltas")
    if record is None:
        return pd.DataFrame()
    rows = record.table("deltas").query(f"task == {task!r} and length == 0 and pair.str.startswith('base ->')")
    scale, digits = rows.metric.eq("accuracy") * 99 + 1, rows.metric.map({"accuracy": 1}).fillna(3).astype(int)
    rows[["difference", "low", "high"]] = rows[["difference", "low", "high"]].mul(scale, axis=0)
    names = {"accuracy": "accuracy (points)", "answer_nll": "NLL of the answer (nats)", "contrast": "contrast (nats)"}
    described = [
        measured(row.difference, row.low, row.high, digits=number)
        for row, number in zip(rows.itertuples(), digits, strict=True)
    ]
    rows = rows.assign(described=described, metric=rows.metric.map(names), pair=rows.pair.str.removeprefix("base -> "))
    table = rows.pivot_table("described", "pair", "metric", aggfunc="first", sort=False)
    return table.rename_axis(None, axis=1).rename_axis("minus the base").reset_index()


def tasks_in_words(shares: pd.DataFrame, costs: pd.DataFrame) -> Iterator[str]:
    """What both tables of `read_tasks` say of each model, from the same NF4 base, and from the unpacked one."""
    for name, own in shares.groupby("model", sort=False):
        cost = costs[costs.model == name]
        worse = [row for row in cost.itertuples() if row.low > 0 or (len(row.each) and min(row.each) > 0)]
        listed = "; ".join(f"{row.row} {measured(row.difference, row.low, row.high)}" for row in worse) or "none"
        deltas = recorded(name, "08_benchmark_deltas", needed=True).table("deltas")
        contrast = deltas.query("metric == 'contrast' and high < 0 and pair == 'base -> extended'").itertuples()
        nearer = "; ".join(f"{row.task} {measured(row.difference, row.low, row.high)}" for row in contrast) or "none"
        before = ", ".join(f"{row.task} {row.before:.0%}" for row in own.itertuples())
        yield f"""
        **{name}**, in points and nats per token:

        - From the same NF4 base the share of right answers falls, beyond its interval, in {_fallen(own)}. Before it was
          {before}.
        - {base_in_words(name, own)}
        - The right answer becomes *less* likely, beyond the interval or in each of three questions, in: {listed}.
        - Wrong answers come nearer to it in: {nearer}.
        """


def base_in_words(model: str, shares: pd.DataFrame) -> str:
    """Where the verdict on a share hangs on the base: from the same NF4 base, and from the unpacked one; sentences."""
    other = read_tasks(model, UNPACKED)[0]
    if other.empty:
        return "From the unpacked base nothing was asked."
    said, same = [], shares.set_index("task")
    for row in other.itertuples():
        before, after = same.loc[row.task], measured(row.difference, row.low, row.high)
        if (before.low > 0, before.high < 0) != (row.low > 0, row.high < 0):
            nf4 = measured(before.difference, before.low, before.high)
            said.append(
                f"Against the same NF4 base {row.task} changes by {nf4} points. Against the file's unpacked weights it "
                f"changes by {after} points."
            )
    return " ".join(said) or "Against the file's unpacked weights each verdict is the same."


def fallen_in_words(shares: pd.DataFrame) -> str:
    """In which tasks the share of right answers falls from the same base, and from the unpacked one: a sentence."""
    said = f"From the same NF4 base the share of right answers falls, beyond its interval, in {_fallen(shares)}"
    other = {NAMES[name]: read_tasks(name, UNPACKED)[0] for name in shares.model.unique()}
    others = [f"in {_fallen(table)} ({name})" for name, table in other.items() if len(table)]
    return f"{said}{'; from the unpacked base ' * bool(others)}{'; '.join(others)}."


def _fallen(shares: pd.DataFrame) -> str:
    fallen = shares[shares.high < 0].itertuples()
    return "; ".join(f"{row.task} {measured(row.difference, row.low, row.high)} points" for row in fallen) or "no task"


def _single(record: Record, row: tuple) -> np.ndarray:
    """Each question's difference, if they are few."""
    before, after = (record.arrays[f"{row.task}_{row.length}_{arm}_{row.metric}"] for arm in row.pair.split(" -> "))
    return after - before if len(after) < FEWEST else np.array([])


def beside_trainer(table: pd.DataFrame, memory: str) -> pd.DataFrame:
    """Speed and memory of steps over those of the Trainer at the same context, medians over rounds.

    Args:
        table: columns context, contender, tokens_per_second and `memory`; a contender's name says its plan.
    """
    medians = table.groupby(["context", "contender"], sort=False)[["tokens_per_second", memory]].median()
    ratios = medians.div(medians.xs("Trainer + PEFT", level="contender"), level="context").dropna()
    ratios = ratios.drop("Trainer + PEFT", level="contender")
    ratios = ratios.set_axis(["speed", "memory"], axis=1).rename_axis(["context", "step"]).reset_index()
    return ratios.sort_values("context", kind="stable")


def steps_by_plan(record: Record) -> pd.DataFrame:
    """Steps of Llama 2 7B on a GPU; ours have their plan for a name."""
    steps = record.table("steps").query("model == 'Llama 2 7B'")
    plans = steps.plan.replace({r".*host.*": "lean", " layers| tokens": ""}, regex=True)
    return steps.assign(contender=plans.where(steps.contender == "ours", steps.contender))


def speed_and_memory(records: Sequence[Record], context: int) -> pd.DataFrame:
    """A row for each step of a context on a GPU, by `beside_trainer`: speed and memory, of several days as a range."""
    days = pd.concat([beside_trainer(steps_by_plan(one), "allocated_gib") for one in records])
    days = days[days.context == context]
    theirs = days.step.str.startswith("TRL")
    days["step"] = days.step.where(theirs, "ours, " + days.step)
    by_step = days.sort_values("memory", kind="stable").groupby("step", sort=False)[["speed", "memory"]].agg(_span)
    return by_step.reset_index()


def cpu_speeds(bench: pd.DataFrame) -> pd.DataFrame:
    """A row for each contender on a CPU, a column for each context: speed by `beside_trainer`, per second of a core."""
    bench = bench.assign(tokens_per_second=bench.tokens_per_core_second)
    table = beside_trainer(bench, "peak_gib_above_weights")
    table = table.pivot_table("speed", "step", "context", sort=False).sort_index(axis=1)
    return table.rename(columns="{:,} tokens".format).reset_index()


def _span(values: pd.Series) -> str:
    return " to ".join(dict.fromkeys(f"{end:.2f}" for end in (values.min(), values.max())))


def attention_share(steps: pd.DataFrame, context: int) -> float:
    """Attention's share of a training step's time at a context, from steps of one model at several contexts.

    Seconds per token grow by the same amount with every token of context: that growth is attention.
    """
    slope, rest = np.polyfit(steps.context, 1 / steps.tokens_per_second, 1)
    return slope * context / (slope * context + rest)


def our_faster_steps(steps: pd.DataFrame) -> pd.DataFrame:
    """Of our steps of Llama 2 7B without a cap, at each context of the `Trainer`'s, the faster of two plans."""
    steps = steps[(steps.model == "Llama 2 7B") & steps.cap_gib.isna() & ~steps.tokens_per_second.isna()]
    ours = steps[(steps.contender == "ours") & steps.context.isin(steps.context[steps.contender == "Trainer + PEFT"])]
    return ours.sort_values("tokens_per_second").groupby("context").tail(1)


def training_in_words(record: Record) -> str:
    """How a GPU's training run went, from its rows by step; empty if the record has none."""
    if "training" not in record.content["tables"]:
        return ""
    log = record.table("training")
    tenth, peak = math.ceil(len(log) / 10), log.peak_gib.astype(float).max()
    first, last = log.loss[:tenth].mean(), log.loss[-tenth:].mean()
    kind = "SmolLM2-135M, on its preset's texts"
    if log.weights[0] == "random":
        kind = "a random model of SmolLM2-135M's shape, on sequences of few different tokens"
    memory = "" if math.isnan(peak) else f" in {peak:.1f} GiB"
    return (
        f"`make gpu` ended with a training run: {kind}, {len(log):,} steps of whole sequences of {log.context[0]:,} "
        f"tokens. It reached {log.tokens_per_second.median():,.0f} tokens/s{memory}. The loss went from {first:.2f} to "
        f"{last:.2f}, means over the first and the last tenth of the steps."
    )
