"""The figures of notebook 10, and what it says of the reward models, from its record."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments.preference import KEPT
from experiments.race_results import wider
from llama_long_utils.evaluation.statistics import share_interval
from llama_long_utils.figures import AMBER, BLUE, GREEN, GREY, plt, save_figure
from llama_long_utils.notebooks import finding, measured, say, show_table, shown
from llama_long_utils.records import Record, recorded

LOOKS = {"rl": ("RL against the reward model", BLUE, "s"), "dpo": ("DPO on the same pairs", AMBER, "v")}
CONTROLS = ("rl on gold", "tight rl", "imitation", "slow dpo", "dpo with text", "slow dpo with text")
NEW = ", new seeds"
CALLED = {"text 0.7, rate 4e-4": "retuned dpo with text"}  # an arm's name in the record, and for a reader
CALLED |= {"rl, 0.125": "an eighth of rl", "dpo, 0.125": "an eighth of dpo"}
PANELS = {
    "proxy_scaled": ("proxy", "standard deviations above start"),
    "gold": ("gold", "share of tokens that match"),
    "words_right": ("right words", "share of answers"),
}


def record_with_controls(preset: str, slug: str) -> Record:
    """A preset's record; tiny's if it has none, or one without controls (`preference.SMALL`)."""
    record = recorded(preset, slug)
    return record if record and "retrieval" in record.content["tables"] else recorded("tiny", slug)


def draw_by_step(
    drawn: pd.DataFrame, columns: dict[str, tuple[str, str]]
) -> tuple[plt.Figure, Sequence[plt.Axes], list[str]]:
    """A panel for each column (its title, its unit), against steps of each of LOOKS; and where each begins and ends."""
    figure, panels = plt.subplots(1, len(columns), figsize=(9.5, 3.7), sharex=True, layout="constrained")
    ends = []
    for arm, (label, colour, marker) in LOOKS.items():
        part = drawn[drawn.arm.isin(["sft", arm])]
        for axes, value in zip(panels, columns, strict=True):
            for _, rows in part.groupby("seed"):
                axes.plot(rows.step, rows[value], color=colour, alpha=0.3, linewidth=1)
            means = part.groupby("step")[value].mean()
            axes.plot(means.index, means, color=colour, marker=marker, label=label)
            ends.append(f"{label}, {columns[value][0]}: {means.iloc[0]:z.2f} to {means.iloc[-1]:.2f}")
    for axes, (title, ylabel) in zip(panels, columns.values(), strict=True):
        axes.set(title=title, ylabel=ylabel, xlabel="step of its training")
        axes.locator_params(axis="y", nbins=6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure, panels, ends


def draw_gold_and_proxy(curves: pd.DataFrame, folder: Path, slug: str, number: str, origin: str) -> None:
    """Proxy, gold and right words of greedy answers against steps: thin lines are seeds."""
    greedy = curves[curves.decoding == "greedy"]
    figure, _, ends = draw_by_step(greedy, PANELS)
    means = greedy[greedy.arm.isin(["sft", "rl"])].groupby("step")[[*PANELS]].mean()
    change = means.iloc[-1] - means.iloc[0]
    message = "Proxy, gold and right words in training."
    if change.words_right < 0 < min(change.proxy_scaled, change.gold):
        message = "RL raises the proxy, and gold with it, while fewer of its answers begin with the right words."
    caption = f"""**{message}** Proxy: what the reward model says. Gold: what was meant. Right
words: answers that begin with the whole right answer. A step of RL is not a step of DPO.

*Greedy answers to held-out questions, {origin}; thin lines: single seeds.*"""
    save_figure(figure, folder, slug, number, caption, "; ".join(ends) + ".")


def draw_preferred(wins: pd.DataFrame, folder: Path, slug: str, number: str, origin: str) -> None:
    """How often answers are preferred to the instruction-tuned model's, and to those cut to the same length."""
    names = {"rl": "RL", "dpo": "DPO", "sft, stopped": "no training: stop at\nthe first punctuation"}
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for end, (shift, label) in {
        "": (-0.14, "to its answer"),
        "_cut": (0.14, "to its answer, cut to the same length"),
    }.items():
        drawn = wins.reset_index(drop=True)
        if end:  # without training the cut answer is the same answer
            drawn = drawn[drawn.arm.isin(LOOKS)]
        draw_marks(axes, drawn, f"preferred{end}", end, drawn.index + shift, [bool(end)] * len(drawn))
        fill = "none" if end else "0.2"
        axes.scatter([], [], s=44, facecolors=fill, edgecolors="0.2", linewidths=1.6, label=label)
    axes.axvline(0.5, color="0.35", linewidth=1)
    axes.set(yticks=range(len(wins)), yticklabels=[f"{names[row.arm]}, {row.decoding}" for row in wins.itertuples()])
    axes.set(ylim=(len(wins) - 0.5, -0.5), xlabel="share preferred to the instruction-tuned model (ties: half)")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=2)
    trained = wins[wins.arm.isin(LOOKS)]
    message = "How often answers are preferred."
    if trained.low.min() > 0.5:
        message = f"All are preferred. At equal length {at_equal_length(trained)}."
    caption = f"""**{message}** Filled: against the instruction-tuned model's own answer. Hollow: against that answer,
cut and ended where the other ends.

*Judged by gold, a program; {wins.questions.iloc[0]} questions, {origin}; 95%, the wider over questions or seeds.*"""
    said = [
        f"{row.arm}, {row.decoding}: {row.preferred:.2f}" + f", cut {row.preferred_cut:.2f}" * (row.arm in LOOKS)
        for row in wins.itertuples()
    ]
    save_figure(figure, folder, slug, number, caption, "; ".join(said) + ".")


def at_equal_length(trained: pd.DataFrame) -> str:
    """Which answers are preferred to the untrained ones cut to the same length, and which are worse: a clause."""
    named = trained.assign(name=trained.arm.str.upper() + "'s " + trained.decoding)
    better, worse = named.name[named.low_cut > 0.5], named.name[named.high_cut < 0.5]
    said = f"{' and '.join(better)} answers are still preferred" if len(better) else "none is shown to be preferred"
    return f"{said}, and {' and '.join(worse)} ones are worse than no training" if len(worse) else said


def draw_marks(
    axes: plt.Axes, table: pd.DataFrame, column: str, end: str, heights: Sequence[float], hollow: Sequence[bool]
) -> None:
    """A mark, filled or hollow, and its interval for each row of a table with a column `arm`."""
    for height, white, (_, row) in zip(heights, hollow, table.iterrows(), strict=True):
        colour = colour_of(row.arm)
        axes.hlines(height, row[f"low{end}"], row[f"high{end}"], color=colour, linewidth=1.8)
        fill = {"facecolors": "white" if white else colour, "edgecolors": colour, "linewidths": 1.6}
        axes.scatter(row[column], height, s=44, zorder=3, **fill)


def colour_of(arm: str) -> str:
    """One colour for all kinds of RL, of DPO, of DPO with a text beside the pairs; grey for the others."""
    if "text" in arm:
        return GREEN
    return BLUE if "rl" in arm else AMBER if "dpo" in arm else GREY


def changes_by_measure(changes: pd.DataFrame) -> pd.DataFrame:
    """The change of each measure of greedy answers at the end of training, by arm and by what it is compared with."""
    since = {"sft": "start", "first": "first look"}
    compared = changes[changes.arm.isin(LOOKS) & (changes.decoding == "greedy") & (changes.measure != "exact")]
    compared = compared.assign(
        change=[measured(row.difference, row.low, row.high) for row in compared.itertuples()],
        minus=compared.arm + " minus " + compared.since.map(since),
        measure=compared.measure.map({name: title for name, (title, _) in PANELS.items()}),
    )
    return compared.pivot_table("change", "measure", "minus", aggfunc="first", sort=False).reset_index()


def at_the_end(ends: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds at the end of training (index: decoding and arm) as a table for a reader."""
    of_arms = ends.index.isin(["sft", "sft, stopped", *LOOKS], level="arm")
    names = {"words_right": "right words", "proxy_scaled": "proxy (sd)"}
    table = ends[of_arms].drop(columns="proxy").rename(columns=names)
    return table.assign(length=table.length.round().astype(int)).reset_index()


def what_costs_what(
    ends: pd.DataFrame, wins: pd.DataFrame, changes: pd.DataFrame, costs: pd.DataFrame, fresh: Record | None
) -> pd.DataFrame:
    """By arm, the cheapest first: what sampled answers win, also against the untrained ones cut to the same length.

    `words_right` is of greedy answers, with the change to the start and its interval where it was measured; `cost` in
    nats a token of long documents with its interval, and `at_most` the highest end of a seed's interval. `fresh` is the
    record of arms on new seeds, if there is one: see `on_new_seeds`.
    """
    sampled = wins[wins.seed.isna() & (wins.decoding == "sampled")].set_index("arm")
    table = sampled[["preferred", "low", "high", "preferred_cut", "low_cut", "high_cut"]].join(
        ends.loc["greedy", ["words_right"]], how="inner"
    )
    words = changes[(changes.decoding == "greedy") & (changes.measure == "words_right") & (changes.since == "sft")]
    names = {"difference": "change", "low": "low_change", "high": "high_change"}
    table = table.join(words.set_index("arm")[[*names]].rename(columns=names))
    table["kl"] = ends.loc["sampled", "kl"]
    rows = {}
    for arm, each in costs.groupby("arm"):  # resampled together, documents would spread no wider than the seeds' means
        low, high = wider(each.low.mean(), each.high.mean(), each.nll)
        rows[arm] = {"cost": each.nll.mean(), "low_cost": low, "high_cost": high, "at_most": each.high.max()}
    table = table.join(pd.DataFrame.from_dict(rows, orient="index"), how="inner")
    return pd.concat([table, *([on_new_seeds(fresh)] if fresh else [])]).sort_values("cost")


def on_new_seeds(fresh: Record) -> pd.DataFrame:
    """As `what_costs_what`, of arms that were tested on new seeds: the cost is that of unread documents.

    That of the study's documents has names that end in "_study". `ends`: where each seed's interval ends.
    """
    won, read, answers = (fresh.table(name) for name in ("wins", "nll", "answers"))
    sampled = won[won.seed.isna() & (won.decoding == "sampled")].set_index("arm")
    table = sampled[["preferred", "low", "high", "preferred_cut", "low_cut", "high_cut"]]
    begin = answers[(answers.decoding == "greedy") & (answers.arm == answers.test)].groupby("arm").words_right.mean()
    table = table.assign(words_right=begin)
    for end, part in {"": read[read.unread], "_study": read[~read.unread]}.items():
        whole, each = part[part.seed.isna()].set_index("arm"), part[part.seed.notna()].groupby("arm").high
        table[[f"cost{end}", f"low_cost{end}", f"high_cost{end}"]] = whole[["nll", "low", "high"]]
        table = table.assign(**{f"at_most{end}": each.max(), f"ends{end}": each.apply(list)})
    return table.rename(index=f"{{}}{NEW}".format)


def in_brackets(row: pd.Series, name: str, end: str = "", *, sign: bool = False) -> str:
    """A number of `what_costs_what` with its interval; "-" where it was not measured."""
    numbers = row[[name, f"low{end}", f"high{end}"]]
    return "-" if numbers.isna().any() else measured(*numbers, sign=sign)


def called(arm: str) -> str:
    """An arm's name for a reader, on new seeds or not."""
    name = arm.removesuffix(NEW)
    return CALLED.get(name, name) + arm[len(name) :]


def near(value: float, limit: float) -> str:
    """With three digits, or four where three do not tell it from the limit."""
    return f"{value:.{4 if f'{value:.3f}' == f'{limit:.3f}' else 3}f}"


def say_controls(table: pd.DataFrame, fresh: Record | None, limit: float) -> None:
    """What the controls tell apart, and the arms on new seeds: tables, and findings that hold or do not."""
    if fresh:
        say("What arms on new seeds cost, in nats a token, and how many of their seeds' intervals end above the limit:")
        show_table(costs_on_new_seeds(table, limit))
    for arm, above in (("rl", False), ("tight rl", False), ("rl on gold", True)):
        change, more = table.loc[arm, ["change", "low_change", "high_change"]], "more" if above else "fewer"
        shown(f"{arm}: {more} greedy answers begin right than before", change, above=above, digits=2)
    finding("imitation: preferred less often than dpo, intervals apart", table.high["imitation"] < table.low["dpo"])
    asked = [arm for arm in CONTROLS if arm in table.index]
    kept = [arm for arm in asked if table.at_most[arm] <= limit]
    print(f"of {len(asked)} controls, within {limit:g} nat on the study's seeds: {', '.join(kept) or 'none'}")
    say_new_seeds(fresh, limit)


def in_figure(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `what_costs_what` without all but the smallest share of each arm's change."""
    larger = [f"{arm}, {share:g}" for arm in LOOKS for share in KEPT if share > min(KEPT)]
    return table[~table.index.isin(larger)]


def controls_in_words(table: pd.DataFrame, limit: float) -> str:
    """The conclusions from the controls, as list items."""
    gold, text, dpo = (table.loc[arm] for arm in ("rl on gold", "dpo with text", "dpo"))
    tests = []
    for arm, new in table[table.index.str.endswith(NEW)].iterrows():
        above = sum(high > limit for high in new.ends)
        kept = "in every seed" if not above else f"but for {above} of {len(new.ends)} seeds"
        tests.append(f"{called(arm.removesuffix(NEW))} {kept}, preferred {in_brackets(new, 'preferred')}")
    return f"""- **Words fell with the learnt reward, not with gold.** With gold as the reward {gold.words_right:.0%}
  of greedy answers begin right. Reading costs nearly as much: {gold.cost:.3f} nat, with the learnt reward
  {table.cost["rl"]:.3f}.
- **With a text beside the pairs DPO costs less**: {text.cost:.3f} nat, not {dpo.cost:.3f}. On new seeds and unread
  documents it keeps within {limit:g} nat: {"; ".join(tests) or "not tested"}."""


def say_new_seeds(fresh: Record | None, limit: float) -> None:
    """What was expected of the arms that were tested on new seeds, and whether it holds."""
    if not fresh:
        say("Arms on new seeds: no record of this preset.")
        return
    won, read = fresh.table("wins"), fresh.table("nll")
    for arm in won.arm.unique():
        most = read[(read.arm == arm) & read.unread & read.seed.notna()].high.max()
        whole = won[(won.arm == arm) & (won.decoding == "sampled") & won.seed.isna()].iloc[0]
        name = called(f"{arm}{NEW}")
        for rival, end in (("the instruction-tuned model", ""), ("its answer cut to the same length", "_cut")):
            share = whole[[f"preferred{end}", f"low{end}", f"high{end}"]]
            shown(f"{name}: preferred to {rival}", share, than=0.5, digits=2, sign=False)
        costly = f"{name}: every seed's interval on unread documents within {limit:g} nat"
        finding(f"{costly} (at most {most:.4f})", most <= limit)


def costs_on_new_seeds(table: pd.DataFrame, limit: float) -> pd.DataFrame:
    """What arms on new seeds cost on unread documents and on the study's, seeds beside: text for a reader."""
    rows = []
    for arm, row in table[table.index.str.endswith(NEW)].iterrows():
        for documents, end in {"unread": "", "the study's": "_study"}.items():
            highs = row[f"ends{end}"]
            cost = measured(*row[[f"cost{end}", f"low_cost{end}", f"high_cost{end}"]], digits=3)
            shown = {
                "arm": called(arm),
                "documents": documents,
                "cost": cost,
                "highest end": near(max(highs), limit),
            }
            rows.append(shown | {"seeds above": f"{sum(high > limit for high in highs)} of {len(highs)}"})
    return pd.DataFrame(rows)


def draw_tradeoff(table: pd.DataFrame, limit: float, folder: Path, slug: str, number: str, origin: str) -> None:
    """A line for each arm, those on new seeds first, then the cheapest: its cost, and what it wins by then."""
    parts = [f"{arm}, {share:g}" for arm in LOOKS for share in KEPT]
    drawn = in_figure(table)
    again = drawn.index.str.endswith(NEW)
    rows = pd.concat([drawn[again], drawn[~again]]).reset_index(names="arm")
    places = range(len(rows))
    wide = {"width_ratios": (1.6, 1, 1)}
    figure, panels = plt.subplots(1, 3, figsize=(10, 5.6), sharey=True, layout="constrained", gridspec_kw=wide)
    for axes, end in zip(panels[1:], ("", "_cut"), strict=True):
        draw_marks(axes, rows, f"preferred{end}", end, places, [False] * len(rows))
        axes.set(xlim=(min(rows.low.min(), rows.low_cut.min()) - 0.03, rows.high.max() + 0.03))
        axes.axvline(0.5, color="0.35", linewidth=1)
    draw_marks(panels[0], rows, "cost", "_cost", places, rows.at_most > limit)
    panels[0].axvline(limit, color="0.35", linestyle=":")
    form = {"s": 44, "edgecolors": "0.2", "linewidths": 1.6}
    panels[0].scatter([], [], facecolors="0.2", label=f"every seed within {limit:g} nat", **form)
    panels[0].scatter([], [], facecolors="white", label="not every seed", **form)
    panels[0].legend(loc="center right", bbox_to_anchor=(1, 0.58))
    share = "share of sampled answers"
    titles = {"cost on long text": "nats per token", "preferred": share, "at equal length": share}
    for axes, (title, unit) in zip(panels, titles.items(), strict=True):
        axes.set(title=title, xlabel=unit, yticks=places, ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticklabels(rows.arm.str.removesuffix(NEW).map(called))
        axes.grid(axis="y", visible=False)
        if again.any():
            axes.axhline(again.sum() - 0.5, color="0.6", linewidth=0.8)
    if again.any():
        kinds = {0: "new seeds, unread documents", again.sum(): "the study's seeds and documents"}
        for place, kind in kinds.items():
            panels[0].text(rows.high_cost.max(), place, kind, ha="right", va="center", color="0.35", fontsize=11)
    trained = table[~table.index.isin([*parts, *(f"{arm}{NEW}" for arm in table.index)])]  # each setting once
    rank = trained.cost.rank().corr(trained.preferred.rank())
    message = "What is won, and what it costs."
    if rank > 0.8:
        message = "Arms that win more mostly cost more on long text."
    fair = [called(arm) for arm in rows.arm[rows.low_cut > 0.5]]
    won = (
        f"only {' and '.join([', '.join(fair[:-1])] * (len(fair) > 1) + fair[-1:])} win"
        if fair
        else "none is shown to win"
    )
    caption = f"""**{message} Against answers of equal length {won}.** Left: cost (filled: every seed within {limit:g}
nat, dotted). Middle and right: share of sampled answers preferred. Green: with text; amber: dpo; blue: rl.

*{origin[0].upper()}{origin[1:]}. 95%: shares, the wider over questions or seeds; costs, over documents or seeds.*"""
    said = [
        f"{called(row.arm)}: preferred {row.preferred:.2f} (cut: {row.preferred_cut:.2f}) at {row.cost:+.3f} nats, "
        f"at most {near(row.at_most, limit)}"
        for row in rows.itertuples()
    ]
    save_figure(figure, folder, slug, number, caption, "; ".join(said) + ".")


def raters_in_words(raters: pd.DataFrame, ends: pd.DataFrame, beta: float) -> str:
    """What the reward models agree with and go by, and what KL costs of the reward."""
    agreed = [round(right * count) for right, count in zip(raters.right, raters.held_out, strict=True)]
    total, rank = raters.held_out.sum(), raters.filter(like="rank_").mean()
    agreement = measured(sum(agreed) / total, *share_interval(sum(agreed), total), sign=False)
    risen = ends.proxy["sampled", "rl"] - ends.proxy["sampled", "sft"]
    return f"""Of {raters.held_out[0]} comparisons each that they were not trained on, the reward models agree with
    {", ".join(map(str, agreed))}. Together that is {agreement}: too few to tell them from chance.

    What they did learn is the ending. Over the instruction-tuned model's sampled answers their number goes with having
    ended: the rank correlation is {rank["rank_ended"]:.1f}. With right words it is {abs(rank["rank_words"]):.1f}.

    The KL penalty is weak. At the end KL costs {beta * ends.kl["sampled", "rl"]:.2f} of a reward that
    has risen by {risen:.1f}."""
