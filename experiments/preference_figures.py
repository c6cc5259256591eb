"""The figures of notebook 10, and what it says of the reward models, from its record."""

from pathlib import Path

import pandas as pd

from llama_long_utils.evaluation.statistics import share_interval
from llama_long_utils.figures import AMBER, BLUE, plt, save_figure
from llama_long_utils.notebooks import measured
from llama_long_utils.panel import draw_verdicts

LOOKS = {"rl": ("RL against the reward model", BLUE, "s"), "dpo": ("DPO on the same pairs", AMBER, "v")}
PANELS = {
    "proxy_scaled": ("proxy: what the reward model says", "standard deviations above the start"),
    "gold": ("gold: right words, and the end", "share of tokens that match"),
    "words_right": ("words: right, whatever follows", "share of answers that begin right"),
}


def draw_gold_and_proxy(curves: pd.DataFrame, folder: Path, slug: str, number: str, origin: str) -> None:
    """Proxy, gold and right words of greedy answers against steps: thin lines are seeds."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.4), sharex=True, layout="constrained")
    drawn, ends = curves[curves.decoding == "greedy"], []
    for arm, (label, colour, marker) in LOOKS.items():
        part = drawn[drawn.arm.isin(["sft", arm])]
        for axes, value in zip(panels, PANELS, strict=True):
            for _, rows in part.groupby("seed"):
                axes.plot(rows.step, rows[value], color=colour, alpha=0.3, linewidth=1)
            means = part.groupby("step")[value].mean()
            axes.plot(means.index, means, color=colour, marker=marker, label=label)
            ends.append(f"{label}, {value}: {means.iloc[0]:z.2f} to {means.iloc[-1]:.2f}")
    for axes, (title, ylabel) in zip(panels, PANELS.values(), strict=True):
        axes.set(xlabel="step of its own training", title=title, ylabel=ylabel)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    caption = f"Greedy answers to held-out questions, {origin}; thin: single seeds. "
    caption += "A step of RL is not a step of DPO."
    save_figure(figure, folder, slug, number, caption, "; ".join(ends) + ".")


def draw_both_panels(
    ours: pd.DataFrame, published: pd.DataFrame, folder: Path, slug: str, number: str, origin: str
) -> None:
    """Win, tie and loss of our models, judged by a program, and of Llama 2 Long Chat, judged by people."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 3.8), width_ratios=(1.2, 1))
    draw_verdicts(panels[0], ours.assign(row=ours.arm + ", " + ours.decoding), row="row")
    for place, row in enumerate(ours.itertuples()):
        text = f"preferred {row.preferred:.2f} [{row.low:.2f}, {row.high:.2f}]"
        panels[0].text(102, place, text, va="center", fontsize=8)
    draw_verdicts(panels[1], published.assign(row=["vs " + name for name in published.index]), row="row")
    panels[0].set_xlabel("share of held-out questions (%), judged by a program")
    panels[1].set_xlabel("share of votes (%), judged by people")
    panels[1].get_legend().remove()
    caption = f"Left: against the instruction-tuned model, judged by gold, {origin}; brackets: 95% over questions. "
    caption += "Right: Llama 2 Long Chat 70B, judged by people, published (arXiv:2309.16039, Figure 3)."
    rows = [f"{row.arm}, {row.decoding}: {row.win:.0%} win, {row.loss:.0%} loss" for row in ours.itertuples()]
    save_figure(figure, folder, slug, number, caption, "; ".join(rows) + ".")


def draw_tradeoff(
    cost: pd.Series, preferred: pd.DataFrame, limit: float, folder: Path, slug: str, number: str, origin: str
) -> None:
    """What is won against what it costs, by arm, along the averages of the adapters before and after."""
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for arm, (label, colour, marker) in LOOKS.items():
        path = sorted([name for name in cost.index if name.split(",")[0] == arm], key=lambda name: cost[name])
        rows = preferred.loc[path]
        axes.plot([0, *cost[path]], [0.5, *rows.preferred], color=colour, alpha=0.5)
        spread = [rows.preferred - rows.low, rows.high - rows.preferred]
        axes.errorbar(cost[path], rows.preferred, yerr=spread, fmt=marker, color=colour, label=label, capsize=3)
    axes.axvline(limit, color="0.4", linestyle=":")
    axes.axhline(0.5, color="0.4", linewidth=1)
    axes.set(xlabel="cost on held-out long documents (nats per token)", ylabel="preferred, sampled answers")
    axes.legend(loc="upper left")
    shares = sorted({float(name.split(", ")[1]) for name in cost.index if ", " in name})
    parts = ", ".join(f"{share:g}" for share in shares)
    caption = f"What is won and what it costs, {origin}. From the left: nothing, {parts} of the change, all of it. "
    caption += f"Bars: 95% over questions; dotted: {limit:g} nat."
    rows = [f"{arm}: preferred {preferred.preferred[arm]:.2f} at {cost[arm]:+.3f} nats" for arm in cost.index]
    save_figure(figure, folder, slug, number, caption, "; ".join(rows) + ".")


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

    The leash is long. At the end KL costs {beta * ends.kl["sampled", "rl"]:.2f} of a reward that has
    risen by {risen:.1f}."""
