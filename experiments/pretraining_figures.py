"""The figures and tables of notebook 12."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.pretraining import counted_flops, new_model
from experiments.pretraining_cells import LONG, SHORT, SIZES, flops_per_token
from experiments.pretraining_results import (
    EQUAL,
    FEWEST_SEEDS,
    PLACES,
    SWITCHED,
    PretrainingResults,
)
from experiments.race_results import student_reach
from llama_long_utils.figures import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    RED,
    TEAL,
    intervals,
    plt,
    save_figure,
)
from llama_long_utils.notebooks import NO_DIFFERENCE, measured

STYLES = {  # label, colour and marker of every arm
    "long": ("long throughout", BLACK, "D"),
    "switch-20": ("switch at 20%", PURPLE, "^"),
    "switch-40": ("switch at 40%", TEAL, "v"),
    "switch-80": ("switch at 80%", BLUE, "s"),
    "switch-95": ("switch at 95%", AMBER, "P"),
    "short": ("short throughout, in windows", GREY, "o"),
    "in-reach": ("switch at 80%, quotes in reach", GREEN, "<"),
    "continued": ("short, then a second run", RED, "X"),
    "s2": ("S2, long, read whole", GREEN, "*"),
}

LONG_TASKS = ("Qasper", "QuALITY")  # of the paper's Table 10, for a caption


def in_words(table: pd.DataFrame, digits: int) -> list[str]:
    """The numbers of columns value, low and high, with their intervals."""
    return [measured(*row, digits=digits) for row in table[["value", "low", "high"]].itertuples(index=False)]


def in_points(change: dict[str, Any]) -> str:
    """A difference of shares with its interval, in points."""
    return measured(*(100 * change[name] for name in ("value", "low", "high")), digits=1)


def jumps(results: PretrainingResults, size: str) -> pd.DataFrame:
    """How training loss minus the long arm's jumps at each switch, in nats: the first 2 long steps minus 20 before.

    Columns arm, value, low and high, with Student's interval of the seeds' means.
    """
    rows = []
    for name in SWITCHED:
        around = results.spike(size, name)
        each = around[:, 20:22].mean(axis=1) - around[:, :20].mean(axis=1)
        half, value = student_reach(each), each.mean()
        rows.append({"arm": STYLES[name][0], "value": value, "low": value - half, "high": value + half})
    return pd.DataFrame(rows)


def savings() -> pd.DataFrame:
    """For each size the share of attention, and what a switch after 80% of the tokens saves by two counts."""
    rows = []
    for name, shape in SIZES.items():
        if re.fullmatch(r"[\d.]+M", name):  # no doll, pilot or other rate
            lengths, model = (SHORT, LONG), new_model(name, 10_000.0, 0)
            paper = [flops_per_token(shape.layers, shape.hidden, length) for length in lengths]
            own = [counted_flops(model, length) for length in lengths]
            row = {"model": name, "attention / rest": LONG / (6 * shape.hidden)}
            row |= {"saved, the paper's count": 0.8 * (1 - paper[0] / paper[1])}
            rows.append(row | {"saved, what is multiplied": 0.8 * (1 - own[0] / own[1])})
    return pd.DataFrame(rows)


def worth_of_context(results: PretrainingResults, size: str, arms: list[str]) -> pd.DataFrame:
    """What full context gives each arm in the far half against windows of 512: arm, position, value, low, high, each.

    At position "far, minus long": that, minus what it gives to "long"; above zero is less.
    """
    rows, far = [], PLACES["far"]
    for name in (arm for arm in arms if results.seeds(size, arm)):
        gain = results.difference(size, (name, "full"), (name, "window"), *far)
        rows.append({"arm": name, "position": f"{far[0]:,} to {far[1]:,}", **gain})
        if name != "long":
            rows.append({"arm": name, "position": "far, minus long", **results.less_from_context(size, name, *far)})
    return pd.DataFrame(rows)


def row_verdict(row: pd.Series) -> str:
    """What a difference to long throughout says, in words."""
    return "better" if row.high < 0 else "worse" if row.low > 0 else NO_DIFFERENCE


def late_switches(parts: dict[str, PretrainingResults]) -> pd.DataFrame:
    """The switch at 80% minus long throughout: a row for each of `parts`, by tokens that were read, then by parameters.

    A part "SIZE, ..." has the switch at a rate of its own, "SIZE-as-..." reads other tokens than SIZE does. Columns
    size, parameters, tokens, rate, saved (operations, a share), and those of `difference`.
    """
    rows = []
    for name, results in parts.items():
        cost = {column: results.cost(name, "long", column) for column in ("parameters", "tokens", "flops")}
        twice = any(other.startswith(f"{name}, ") for other in parts)
        row = {"size": _size(name), "parameters": cost["parameters"]}
        row |= {"tokens": f"{cost['tokens'] / 1e6:.1f} million", "read": cost["tokens"]}
        row |= {"rate": "its own rate" if ", " in name else "one rate" if twice else ""}
        row |= {"saved": 1 - results.cost(name, "switch-80") / cost["flops"]}
        rows.append(row | results.difference(name, ("switch-80", "full"), ("long", "full")))
    order = ["read", "parameters"]
    return pd.DataFrame(rows).sort_values(order, kind="stable", ignore_index=True).drop(columns="read")


def _size(name: str) -> str:
    """ "0.9M" of "0.9M-as-16M" and of "0.9M, switch at ..."."""
    return re.split(",|-as-", name)[0]


def late_headline(late: pd.DataFrame) -> str:
    """Where a late switch is good enough, by `late_switches`: where a loss of `EQUAL` is excluded at every size."""
    judged = late[late.seeds >= FEWEST_SEEDS]
    enough = (judged.high < EQUAL).groupby(judged.tokens, sort=False).all()
    parts = [f"good enough on {' and '.join(enough.index[enough])} tokens"] if enough.any() else []
    for tokens in enough.index[~enough]:
        part = judged[judged.tokens == tokens]
        worse = " and ".join(dict.fromkeys(part["size"][part.low > 0]))
        parts.append(f"{f'worse at {worse}' if worse else 'not shown to be good enough'} on {tokens}")
    return f"A late switch is {', and '.join(parts) or 'not judged: too few seeds'}"


def other_switches(tables: dict[str, pd.DataFrame]) -> str:
    """Whether earlier and later switches come out as that at 80% does, in words; `tables` are `curriculum`, by size."""
    alike, apart = [], []
    for size, table in tables.items():
        judged = table[table.seeds >= FEWEST_SEEDS]
        words = {row.arm: row_verdict(row) for row in judged.itertuples() if row.arm in SWITCHED}
        usual = words.pop("switch-80", NO_DIFFERENCE)
        for group, which in ((alike, True), (apart, False)):
            names = [
                STYLES[arm][0].removeprefix("switch at ") for arm, word in words.items() if (word == usual) == which
            ]
            group += [f"{', '.join(names)} at {size}"] if names else []
    said = {"come out as that at 80%": alike, "do not": apart}
    lines = [f"Other switches that {what}: {'; '.join(at)}." for what, at in said.items() if at]
    if any((table.set_index("arm").filter(SWITCHED, axis="index").low > 0).any() for table in tables.values()):
        lines.append("Where a switch is worse, whether a still earlier one would be as good was not tested.")
    return " ".join(lines)


def when_long(late: pd.DataFrame) -> str:
    """The answer to notebook 12's question, as far as the records have one: a headline and a table, as Markdown."""
    by_tokens = list(dict.fromkeys(late.tokens))
    lines = ["| switch at 80% | " + " | ".join(f"{tokens} tokens" for tokens in by_tokens) + " |"]
    lines += ["| --- " * (1 + len(by_tokens)) + "|"]
    for size, part in late.sort_values("parameters", kind="stable").groupby("size", sort=False):
        cells = [_late_in_words(part[part.tokens == tokens]) for tokens in by_tokens]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join([f"**{late_headline(late)}.**", "", *lines])


def _late_in_words(part: pd.DataFrame) -> str:
    """What rows of `late_switches` of one size and as many tokens say, one verdict after another."""
    said: dict[str, list[str]] = {}
    for row, text in zip(part.itertuples(), in_words(part, 3), strict=True):
        word = row_verdict(row).replace(NO_DIFFERENCE, "not shown")
        if row.seeds < FEWEST_SEEDS:
            word, text = "too few seeds to judge", ", ".join(f"{one:+.3f}" for one in row.each)
        said.setdefault(word, []).append(f"{text}{f' at {row.rate}' * bool(row.rate)}")
    return "; ".join(f"{word}: {', '.join(found)}" for word, found in said.items()) or "-"


def arms_table(parts: dict[str, PretrainingResults]) -> pd.DataFrame:
    """A row for each arm, a column for each size: its operations, as a share of long's, and its NLL minus long's.

    The last row is what a switch saves by `saved_at_equal_quality`.
    """
    columns = {}
    for size, results in parts.items():
        table = results.curriculum(size)
        shares = dict(zip(table.arm, table.flops, strict=True))
        cells = {arm: f"{shares[arm]:.0%}: {text}" for arm, text in zip(table.arm, in_words(table, 3), strict=True)}
        least, most = results.saved_at_equal_quality(size)
        saved = f"{least:.0%}{f' to {most:.0%}' * (most > least)}" if most else "none shown"
        columns[size] = {STYLES[arm][0]: cell for arm, cell in cells.items() if arm != "long"}
        columns[size]["saved at equal quality"] = saved
    order = [*(label for label, *_ in STYLES.values()), "saved at equal quality"]
    table = pd.DataFrame(columns)
    return table.loc[[label for label in order if label in table.index]].fillna("-").reset_index(names="arm")


def copying_table(results: PretrainingResults, size: str) -> pd.DataFrame:
    """A row for each other arm of a model that copies, as text: what it costs, and what it is worth beside "long"."""
    rows = results.curriculum(size).query("arm != 'long'")
    shown = {"arm": [STYLES[arm][0] for arm in rows.arm], "operations": [f"{share:.0%}" for share in rows.flops]}
    shown |= {"NLL minus long (nats)": in_words(rows, 3)}
    return pd.DataFrame(shown | {"copied far, minus long (points)": rows.copied_less.map(in_points).to_list()})


def draw_copying(results: PretrainingResults, size: str, window: int, folder: Path, slug: str, number: str) -> None:
    """Share of tokens of excerpts that each arm continues correctly, by the distance of what is quoted."""
    edges = results.arrays["distances"]
    figure, axes = plt.subplots(figsize=(8, 4.4))
    own = results.copying(size, "long", low=0, high=1)["value"]
    axes.axhline(100 * own, color="0.35", linestyle="--", linewidth=1, label="outside quotes, long throughout")
    places, said = list(pairwise(edges[1:])), []
    for name in [one for one in STYLES if results.seeds(size, one)]:
        label, colour, marker = STYLES[name]
        shares = [results.copying(size, name, low=low, high=high) for low, high in places]
        line = [100 * share["value"] for share in shares]
        for place, share in enumerate(shares):
            axes.scatter([place] * share["seeds"], 100 * np.array(share["each"]), s=14, c="none", edgecolors=colour)
        label = label.removesuffix(", in windows")  # all arms copy with full context
        axes.plot(line, color=colour, marker=marker, markersize=6, label=label)
        said.append(f"{label}: {line[0]:.0f}% to {line[-1]:.0f}%")
    axes.set_xticks(range(len(places)), [f"{low:,} to {high:,}" for low, high in places])
    axes.axvline([low for low, _ in places].index(window) - 0.5, color="0.4", linestyle=":")
    axes.set_xlabel(f"tokens back to what is quoted; dotted: short sequences have {window}")
    axes.set(ylabel="continued correctly (% of tokens)", ylim=(0, 100))
    figure.legend(loc="outside lower center", ncols=3)
    far = {name: results.copying(size, name)["value"] for name in ("long", "switch-80")}
    caption = f"**From over 1,024 tokens back long throughout continues {far['long']:.0%} of quotes correctly, the "
    caption += f"switch at 80% {far['switch-80']:.0%}.** All arms read the whole text. Dashed: outside quotes, where "
    caption += f"nothing can be copied, long throughout predicts {own:.0%} of tokens.\n\n*{size}, trained on, "
    caption += "recorded by us; held-out texts that quote themselves, without the first tokens of excerpts. Hollow: "
    caption += "orders of the texts; lines: their means.*"
    save_figure(figure, folder, slug, number, caption, f"From near to far: {'; '.join(said)}.")


def draw_late(late: pd.DataFrame, published: dict[str, Any], folder: Path, slug: str, number: str) -> None:
    """A line for each row of `late_switches`, with its interval; the paper's switch is in the caption."""
    rows = late.assign(row=[_late_name(row) for row in late.itertuples()])
    figure, axes = plt.subplots(figsize=(9, 3.9))
    intervals(axes, rows, row="row", zero=0, samples="each")
    axes.set_xlabel("NLL, switch at 80% minus long throughout (nats); to the left is better")
    beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 10, "annotation_clip": False}
    for place, share in enumerate(late.saved):
        axes.annotate(f"{share:.0%}", (1.05, place), **beside)
    axes.annotate("operations\nsaved", (1.05, -0.85), **beside)
    table, nats = published["table_10"], np.log(np.array(published["table_11"]["rows"]))
    saves = 1 - table["flops"][-1] / table["flops"][0]
    change = nats[-1] - nats[0]
    tasks = [f"{name} from {of[0]} to {of[-1]}" for name, of in table["long_tasks"].items() if name in LONG_TASKS]
    caption = f"**{late_headline(late)}.** Good enough: a loss of {EQUAL} nat is excluded at every size. On the right: "
    caption += (
        "share of the operations that the switch saves, by the paper's count.\n\n*Recorded by us. Hollow: seeds; "
    )
    caption += (
        "bars: 95% over seeds and documents, or over seeds alone where that is wider. The paper's switch at 80%, at "
    )
    caption += f"7B, saves {saves:.0%}. It changes NLL by {change.min():+.3f} to {change.max():+.3f} nat, "
    caption += f"{' and '.join(tasks)} (Tables 10 and 11, without intervals).*"
    said = "; ".join(f"{name}: {text}" for name, text in zip(rows.row, in_words(late, 3), strict=True))
    save_figure(figure, folder, slug, number, caption, f"NLL minus long throughout. {said}.")


def _late_name(row: Any) -> str:
    return f"{row.size} on {row.tokens} tokens{f', {row.rate}' * bool(row.rate)}"


def draw_lead(
    parts: dict[str, tuple[PretrainingResults, str]], folder: Path, slug: str, number: str, smooth: int = 20
) -> None:
    """Training loss on short sequences minus that on long ones, on the same tokens, until the switch at 80%.

    `parts` names results and a size. Lines are means over seeds and over `smooth` steps, areas their range over seeds.
    """
    figure, axes = plt.subplots(figsize=(8, 4.2))
    said, colours = [], (GREY, AMBER, BLUE, PURPLE)
    for (label, (results, size)), colour in zip(parts.items(), colours[: len(parts)], strict=True):
        short = int(results.cost(size, "switch-80", "short_steps"))
        each = results.spike(size, "switch-80", before=short, after=0)
        each = np.apply_along_axis(np.convolve, 1, each, np.ones(smooth) / smooth, "valid")
        tokens = results.cost(size, "long", "tokens") / results.cost(size, "long", "long_steps")
        read = tokens * (np.arange(each.shape[1]) + smooth / 2) / 1e6
        axes.fill_between(read, each.min(axis=0), each.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(read, each.mean(axis=0), color=colour, label=label)
        behind = np.flatnonzero(each.mean(axis=0) > 0)
        ahead = "" if behind[-1] + 1 == len(read) else f", and below from {read[behind[-1]]:.1f} million tokens on"
        said.append(f"{label}: {each[:, 0].mean():+.2f} at first, {each[:, -1].mean():+.2f} before the switch{ahead}")
    axes.axhline(0, color="0.35", linewidth=1)
    axes.set(xscale="log", xlabel="tokens read (millions)", ylabel="short minus long (nats)")
    axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    axes.legend()
    turned = [line.partition(":")[0] for line in said if "below from" in line]
    caption = f"**Short steps train worse at first and better later at {' and at '.join(turned) or 'no size'}.** "
    caption += "Training loss on sequences of 512 tokens minus that on 4,096, on the same tokens.\n\n*Recorded by us. "
    caption += "Lines: means over seeds and 20 steps; areas: seeds.*"
    save_figure(figure, folder, slug, number, caption, f"{'; '.join(said)}.")


def context_pairs(groups: Sequence[dict[str, PretrainingResults]]) -> pd.DataFrame:
    """What the longest context saves a model minus what it saves the next smaller one, as `difference` has it.

    Columns larger and smaller name them. The models of a group read as many tokens as each other; the smallest is
    first. A name "SIZE-as-..." is shown as SIZE.
    """
    rows = []
    for group in groups:
        for (smaller, other), (larger, results) in pairwise(group.items()):
            named = {"larger": _size(larger), "smaller": _size(smaller)}
            rows.append(named | results.context_saves_more(larger, smaller, other))
    return pd.DataFrame(rows)


def context_headline(pairs: pd.DataFrame, laws: pd.DataFrame) -> str:
    """Which models save more by context than the next smaller ones, and whether β grows, as the intervals say."""
    said = {}
    for word, part in {"more": pairs[pairs.low > 0], "less": pairs[pairs.high < 0]}.items():
        than = part.groupby("smaller", sort=False).larger
        said[word] = " and ".join(f"{' and '.join(larger)} {word} than {smaller}" for smaller, larger in than)
    saves = f"Context saves {' and '.join(filter(None, said.values()))} on as many tokens"
    if not any(said.values()):
        saves = "That context saves larger models more is not shown"
    elif (pairs.low > 0).all():
        saves = "Larger models save more by context"
    models = laws[laws.model.map(_size).isin([*pairs.larger, *pairs.smaller])].groupby("parameters")
    lows, highs = models.beta_low.min(), models.beta_high.max()
    return f"{saves}; {'β grows' if lows.iloc[-1] > highs.iloc[0] else 'that β grows is not shown'}"


def power_laws(groups: Sequence[dict[str, PretrainingResults]]) -> pd.DataFrame:
    """The laws of all models of these records, of few parameters first."""
    parts = (part.record.table("power_law") for group in groups for part in group.values())
    return pd.concat(parts, ignore_index=True).sort_values(["parameters", "seed"], ignore_index=True)


def draw_context_by_size(groups: Sequence[dict[str, PretrainingResults]], folder: Path, slug: str, number: str) -> None:
    """What the longest context saves, and the exponent of the law, of each model and seed against its parameters.

    `groups` as in `context_pairs`, in colours of their own; models of their records that are in none are grey.
    """
    laws, pairs = power_laws(groups), context_pairs(groups)
    figure, panels = plt.subplots(1, 2, figsize=(9, 4))
    columns = {"saved": "saved by 4,064 tokens (nats)", "beta": "exponent β of the law"}
    looks, legend, other = {}, {}, (GREY, "D", 1.2)
    for group, form in zip(groups, ((BLUE, "o", 0.92), (RED, "s", 1.12)), strict=True):
        name, results = next(iter(group.items()))
        looks |= dict.fromkeys(group, form)
        legend[f"{results.cost(name, 'long', 'tokens') / 1e6:.1f} million tokens read"] = form
    for panel, (column, label) in zip(panels, columns.items(), strict=True):
        for model, part in laws.groupby("model", sort=False):
            colour, mark, aside = looks.get(model, other)
            place = part.parameters * aside * 1.07 ** (part.seed - len(part) // 2)
            reach = part[column] - part[f"{column}_low"], part[f"{column}_high"] - part[column]
            panel.errorbar(place, part[column], yerr=reach, fmt=mark, color=colour, markersize=5)
            if column == "saved":
                height, above = (part.saved_high.max(), 4) if mark == "s" else (part.saved_low.min(), -14)
                form = {"textcoords": "offset points", "ha": "center", "color": colour, "fontsize": 10}
                panel.annotate(_size(model), (part.parameters.mean() * aside, height), (0, above), **form)
        panel.set(xscale="log", xlabel="parameters", ylabel=label, ylim=(0, None))
        panel.margins(x=0.1, y=0.1)
        panel.set_xticks([3.6e5, 9.3e5, 4.3e6, 1.6e7], ["0.4M", "0.9M", "4M", "16M"])
        panel.minorticks_off()
    for label, (colour, mark, _) in (legend | {"trained otherwise": other}).items():
        panels[1].plot([], [], mark, color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=3)
    models = laws.groupby("model", sort=False)
    saved, beta = ("; ".join(f"{model} {one:.2f}" for model, one in models[name].mean().items()) for name in columns)
    differences = [f"{row.larger} minus {row.smaller} {text}" for row, text in
                   zip(pairs.itertuples(), in_words(pairs, 3), strict=True)]  # fmt: skip
    caption = f"**{context_headline(pairs, laws)}.** What context saves, on equal tokens, in nats: "
    caption += f"{'; '.join(differences)}.\n\n*Recorded by us; a mark for each seed, bars: 95% over documents.*"
    misfit = "; ".join(f"{row.model}, seed {row.seed}: {row.rmse:.3f}" for row in laws.itertuples())
    alt = f"Saved, in nats: {saved}. β: {beta}. The law's misfit in nats: {misfit}."
    save_figure(figure, folder, slug, number, caption, alt)
