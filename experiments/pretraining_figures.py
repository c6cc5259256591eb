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
    over_sizes,
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
    plt,
    save_figure,
)
from llama_long_utils.notebooks import NO_DIFFERENCE, measured, verdict

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


def in_words(table: pd.DataFrame, digits: int) -> list[str]:
    """The numbers of columns value, low and high, with their intervals."""
    return [measured(*row, digits=digits) for row in table[["value", "low", "high"]].itertuples(index=False)]


def in_points(change: dict[str, Any]) -> str:
    """A difference of shares with its interval, in points."""
    return measured(*(100 * change[name] for name in ("value", "low", "high")), digits=1)


def jumps(results: PretrainingResults, size: str, arms: Sequence[str] = SWITCHED) -> pd.DataFrame:
    """How training loss minus the long arm's jumps at each switch, in nats: the first 2 long steps minus 20 before.

    Columns arm, value, low and high, with Student's interval of the seeds' means.
    """
    rows = []
    for name in arms:
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


def judged_switches(parts: dict[str, PretrainingResults], alone: str) -> pd.DataFrame:
    """The switch at 80% minus long throughout: a row for each of `parts`, then the first two together, as was planned.

    But for `alone`, which nobody planned to judge with others. Columns value, low, high, and for a reader: what the
    switch costs, as a share of long throughout, and "saved at equal quality", the least and the most operations that a
    switch saves, by `saved_at_equal_quality`.
    """
    rows = []
    for size, results in parts.items():
        least, most = results.saved_at_equal_quality(size)
        row = {"from scratch": size, **results.difference(size, ("switch-80", "full"), ("long", "full"))}
        row["operations"] = f"{results.cost(size, 'switch-80') / results.cost(size, 'long'):.0%}"
        row["saved at equal quality"] = f"{least:.0%}{f' to {most:.0%}' * (most > least)}" if most else "none shown"
        rows.append(row)
    first, second, *_ = (size for size in parts if size != alone)
    both = over_sizes([(parts[size], size) for size in (first, second)], "switch-80")
    unknown = {"operations": "-", "saved at equal quality": "-"}
    rows.append({"from scratch": f"{first} and {second}", **both, **unknown})
    for row in rows:
        one_seed = "one seed, " if row["seeds"] == 1 else ""
        row["switch at 80%"] = one_seed + verdict(row["value"], row["low"], row["high"], "better", "worse")
    return pd.DataFrame(rows).drop(columns=["each", "seeds"])


def when_long(curricula: dict[str, pd.DataFrame], copied_less: pd.Series) -> str:
    """The answer to notebook 12's question, as far as the records have one: a sentence, and a list of what was read.

    `curricula` are those from scratch by size; `copied_less`, by arm, is of the model that copies.
    """
    switches, read = (*SWITCHED, "in-reach"), {}
    for size, table in curricula.items():
        found = table[table.arm.isin(switches) & (table.seeds >= FEWEST_SEEDS)]
        read[f"NLL from scratch, {size}"] = {row.arm: row_verdict(row) for row in found.itertuples()}
    less = pd.DataFrame({arm: {"low": -one["high"], "high": -one["low"]} for arm, one in copied_less.items()}).T
    copied = less[less.index.isin(switches)].itertuples()
    read["Far copying, in the model that copies"] = {row.Index: row_verdict(row) for row in copied}
    said = {"worse": "long throughout is better than", "better": "long throughout is worse than"}
    said[NO_DIFFERENCE] = "no difference is detected between long throughout and"
    lines, level = [], []
    for place, arms in read.items():
        parts = []
        for word, phrase in said.items():
            which = [
                STYLES[arm][0].removeprefix("switch at ").replace(",", " with") for arm in arms if arms[arm] == word
            ]
            each = "the one" if len(arms) == 1 else "any" if word == NO_DIFFERENCE else "every"
            every = f"{each} switch that was run ({', '.join(which)})"
            if which:
                some = f"a switch at {' or '.join(which)}"
                parts.append(f"{phrase} {every if len(which) == len(arms) else some}")
        if parts:
            lines.append(f"- {place}: {'; '.join(parts)}.")
    for size, table in curricula.items():
        table = table[table.arm.isin(switches)]
        for row in table[table.seeds < FEWEST_SEEDS].itertuples():
            each = ", ".join(f"{one:+.3f}" for one in row.each)
            lines.append(f"- Too few seeds to judge: {STYLES[row.arm][0]}, {size} ({each} nat).")
        equal = table[(table.seeds >= FEWEST_SEEDS) & (table.high < EQUAL)].arm
        level += [f"{STYLES[arm][0]} at {size}" for arm in equal]
    answer = (
        f"No switch that was run is shown to be early enough: a loss of {EQUAL} nat from scratch is excluded for none."
    )
    if level:
        answer = f"From scratch these are early enough, as a loss of {EQUAL} nat is excluded: {', '.join(level)}."
    if any("worse" in arms.values() for arms in read.values()):
        answer += " Where a switch is worse, whether a still earlier one would be as good was not tested."
    return "\n".join([answer, "", *lines])


def copying_table(results: PretrainingResults, size: str) -> pd.DataFrame:
    """A row for each arm of a model that copies, as text: what it costs, and what it is worth beside "long"."""
    rows = results.curriculum(size)
    shown = {"arm": [STYLES[arm][0] for arm in rows.arm], "operations": [f"{share:.0%}" for share in rows.flops]}
    shown |= {"NLL minus long (nats)": in_words(rows, 3), "copied": [f"{share:.0%}" for share in rows.copied]}
    return pd.DataFrame(shown | {"copied, minus long (points)": rows.copied_less.map(in_points)})


def draw_copying(results: PretrainingResults, size: str, window: int, folder: Path, slug: str, number: str) -> None:
    """Share of tokens of excerpts that each arm continues correctly, by the distance of what is quoted."""
    edges = results.arrays["distances"]
    figure, axes = plt.subplots(figsize=(8, 4.4))
    own = results.copying(size, "long", low=0, high=1)["value"]
    axes.axhline(100 * own, color="0.35", linestyle="--", linewidth=1, label="text of its own, long throughout")
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
    caption += f"switch at 80% {far['switch-80']:.0%}.** All arms read the whole text.\n\n*{size}, trained on, "
    caption += "recorded by us; held-out texts that quote themselves, without the first tokens of excerpts. Hollow: "
    caption += "orders of the texts; lines: their means.*"
    save_figure(figure, folder, slug, number, caption, f"From near to far: {'; '.join(said)}.")


def draw_switch(
    loss: pd.DataFrame,
    switch: int,
    live: str,
    results: PretrainingResults,
    size: str,
    folder: Path,
    slug: str,
    number: str,
) -> None:
    """The live run's loss, and the recorded arms' minus the long arm's around their switch."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2))
    panels[0].plot(loss.step, loss.loss, color=BLUE, linewidth=1)
    panels[0].axvline(switch + 0.5, color="0.4", linestyle=":")
    panels[0].set(title=f"live: {live}", xlabel="step", ylabel="training loss (nats)")
    for name in SWITCHED:
        around, (label, colour, marker) = results.spike(size, name), STYLES[name]
        binned = (
            around[:, : around.shape[1] // 5 * 5].mean(axis=0).reshape(-1, 5).mean(axis=1)
        )  # the switch is between bins
        panels[1].plot(5 * np.arange(len(binned)) - 18, binned, color=colour, marker=marker, markersize=4, label=label)
    panels[1].axvline(-0.5, color="0.4", linestyle=":")
    panels[1].axhline(0, color="0.35", linewidth=1)
    panels[1].set(title=f"recorded: {size}, minus long throughout", xlabel="steps since the switch")
    panels[1].set_ylabel("difference in loss (nats)")
    figure.legend(loc="outside lower right", ncols=4)
    found = jumps(results, size)
    jumped = " and ".join(found.arm[found.low > 0])
    caption = f"**{f'The loss jumps at {jumped}' if jumped else 'No jump of the loss at a switch is detected'}.** "
    caption += "Intervals: the lines below. Dotted: where long sequences begin.\n\n*Left: training loss of the live "
    caption += "run. Right: recorded by us, means over seeds and five steps.*"
    alt = (
        "Left, a falling loss with its switch marked. Right, loss minus the long arm's around each switch, four curves."
    )
    save_figure(figure, folder, slug, number, caption, alt)


def draw_quality(
    tables: dict[str, pd.DataFrame], published: dict[str, Any], folder: Path, slug: str, number: str
) -> None:
    """NLL minus the long arm's against operations for each size, and the paper's Tables 10 and 11 beside them.

    A size "SIZE, of ..." is drawn into the panel of SIZE, hollow.
    """
    figure, panels = plt.subplots(2, 2, figsize=(8.5, 7.4))
    *ours, theirs = panels.flat
    sizes, said = [size for size in tables if "," not in size], []
    for size, table in tables.items():
        (name, _, other), panel = size.partition(", "), ours[sizes.index(size.partition(",")[0])]
        for row in (table[table.arm != "long"] if other else table).itertuples():
            label, colour, marker = STYLES[row.arm]
            place = row.flops + (0.03 if other else 0.015 * (row.arm == "continued"))  # beside what costs as much
            if row.seeds >= FEWEST_SEEDS:
                panel.vlines(place, row.low, row.high, color=colour, linewidth=1.2 if other else 2)
            label += other.removeprefix("switch at ") and f", {other.removeprefix('switch at ')}"
            panel.scatter(place, row.value, c="white" if other else colour, edgecolors=colour, marker=marker, s=60,
                          label=label, zorder=3)  # fmt: skip
            panel.scatter([place] * len(row.each), row.each, facecolors="none", edgecolors=colour, s=16)
            said.append(f"{name}, {label}: {row.flops:.0%} of the operations, {row.value:+.3f}")
        panel.set_title(f"ours, {name}")
        panel.sharey(ours[0])
    for panel in ours[::2]:
        panel.set_ylabel("NLL minus long's (nats)")
    flops, perplexity = np.array(published["table_10"]["flops"]), published["table_11"]
    nats = np.log(pd.DataFrame(perplexity["rows"], columns=perplexity["columns"]))
    for name, marker, colour in zip(nats, "osD", (GREEN, PURPLE, AMBER), strict=True):
        theirs.plot(flops / flops[0], nats[name] - nats[name][0], marker=marker, color=colour, label=name)
    theirs.set_title("the paper's, 7B: a finer scale")
    theirs.legend(loc="lower left")
    for panel in panels.flat:
        panel.axhline(0, color="0.35", linewidth=1)
        panel.set(xlim=(0, 1.05), xticks=(0, 0.5, 1))
    for panel in panels[1]:
        panel.set_xlabel("operations, share of long's")
    labels = {text: mark for panel in ours for mark, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, ncols=3, loc="outside lower center")
    late = {size: row_verdict(table.set_index("arm").loc["switch-80"]) for size, table in tables.items()}
    in_words = {"better": "reads better at", "worse": "reads worse at", NO_DIFFERENCE: "shows no difference at"}
    found = {says: [size for size in sizes if late[size] == word] for word, says in in_words.items()}
    read = "; ".join(f"{says} {' and '.join(at)}" for says, at in found.items() if at)
    caption = f"**Beside long throughout, a switch at 80% {read}.** Below the line is better, to the left cheaper. "
    caption += "Open squares: the switch at a learning rate of its own.\n\n*Recorded by us. Circles: seeds; bars: "
    caption += "95% over seeds and documents, or over seeds alone where that is wider. Two marks are shifted to the "
    caption += "right of what costs as much. The paper's panel, Tables 10 and 11, has no intervals, a finer scale and "
    caption += "colours of its own.*"
    save_figure(figure, folder, slug, number, caption, f"NLL minus long throughout. {'; '.join(said)}.")


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
    axes.legend()
    turned = [line.partition(":")[0] for line in said if "below from" in line]
    caption = "**Short steps train worse at first, and then better, in: "
    caption += f"{'; '.join(turned) or 'none'}.** Training loss on sequences of 512 tokens minus that on 4,096, on "
    caption += "the same tokens.\n\n*Recorded by us. Lines: means over seeds and 20 steps; areas: seeds.*"
    save_figure(figure, folder, slug, number, caption, f"{'; '.join(said)}.")


def late_by_tokens(parts: dict[str, tuple[PretrainingResults, str]]) -> pd.DataFrame:
    """The switch at 80% minus long throughout, in nats: a row for each size, a column for tokens that were read.

    `parts` as in `draw_lead`: what stands before a comma is the size.
    """
    rows: dict[str, dict[str, str]] = {}
    for label, (results, size) in parts.items():
        late = results.difference(size, ("switch-80", "full"), ("long", "full"))
        tokens = f"{results.cost(size, 'long', 'tokens') / 1e6:.1f} million tokens"
        judged = verdict(late["value"], late["low"], late["high"], "better", "worse")
        rows.setdefault(label.partition(",")[0], {})[tokens] = judged
    return pd.DataFrame(rows).T.fillna("-").rename_axis("switch at 80% minus long").reset_index()


def draw_context_by_size(parts: Sequence[PretrainingResults], folder: Path, slug: str, number: str) -> None:
    """What the longest context saves, and the exponent of the law, of each model and seed against its parameters."""
    laws = pd.concat([part.record.table("power_law") for part in parts], ignore_index=True).sort_values("parameters")
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 4))
    columns = {"saved": "saved by 4,064 tokens (nats)", "beta": "exponent β of the law"}
    for panel, (column, label) in zip(panels, columns.items(), strict=True):
        colours = dict(zip(laws.model.unique(), (BLUE, TEAL, AMBER, GREEN, GREY, PURPLE), strict=False))
        for model, part in laws.groupby("model", sort=False):
            more = "-as-" in model  # trained on more tokens than its size is elsewhere: beside that
            place = part.parameters * 1.12 ** (part.seed - len(part) // 2) * (1.6 if more else 1)
            reach = part[column] - part[f"{column}_low"], part[f"{column}_high"] - part[column]
            mark, fill = "D" if "llama" in model else "s" if more else "o", "white" if more else colours[model]
            panel.errorbar(place, part[column], yerr=reach, fmt=mark, color=colours[model], markerfacecolor=fill)
        panel.set(xscale="log", xlabel="parameters", ylabel=label, ylim=(0, None))
        panel.set_xticks([4e5, 9e5, 4.3e6, 1.6e7], ["0.4M", "0.9M", "4M", "16M"])
        panel.minorticks_off()
    models = laws.groupby("model", sort=False)
    saved, beta = ("; ".join(f"{model} {one:.2f}" for model, one in models[name].mean().items()) for name in columns)
    lows, highs = models.beta_low.min(), models.beta_high.max()
    grows = "is seen" if lows.iloc[-1] > highs.iloc[0] else "is not seen"
    caption = f"**What context saves, and the exponent β, by parameters. That β grows {grows}.** 16M read eight times "
    caption += (
        "the tokens of the smaller sizes (dots). Hollow squares: 0.9M on as many as 16M.\n\n*Recorded by us; a mark "
    )
    caption += "for each seed, bars: 95% over documents. Diamond: the tiny Llama, trained otherwise.*"
    misfit = "; ".join(f"{row.model}, seed {row.seed}: {row.rmse:.3f}" for row in laws.itertuples())
    alt = f"Saved, in nats: {saved}. β: {beta}. The law's misfit in nats: {misfit}."
    save_figure(figure, folder, slug, number, caption, alt)
