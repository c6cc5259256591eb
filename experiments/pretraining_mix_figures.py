"""The figures and tables of notebook 12 about data mixes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from experiments.pretraining_figures import in_words
from experiments.pretraining_rates import SEEDS
from experiments.pretraining_results import (
    CONTENT,
    LENGTH,
    MORE,
    OTHER,
    PARTED,
    PLACES,
    REMOVED,
    PretrainingResults,
)
from llama_long_utils.figures import BLUE, GREY, intervals, plt, save_figure
from llama_long_utils.notebooks import finding, measured


def effects_table(results: PretrainingResults, size: str) -> pd.DataFrame:
    """What content and length do to far NLL, from scratch, as text."""
    effects = results.content_and_length(size)
    shown = effects.assign(text=in_words(effects, 3)).rename(columns={"text": "far NLL (nats)", "seeds": "orders"})
    return shown[["what is changed", "first minus second", "far NLL (nats)", "orders"]]


def context_gains(results: PretrainingResults, size: str, mixes: Sequence[str]) -> pd.DataFrame:
    """What far context is worth to each mix: far NLL with full context minus that in windows, as in `difference`."""
    ways = [((f"mix-{mix}", "full"), (f"mix-{mix}", "window")) for mix in mixes]
    return pd.DataFrame([{"mix": pair[0][0][4:], **results.difference(size, *pair, *PLACES["far"])} for pair in ways])


def new_orders(results: PretrainingResults, size: str) -> pd.DataFrame:
    """What decides between content and length, as text: of all orders, and of those alone that were added later."""
    columns = {
        "all orders": results.cells,
        "new orders alone": results.cells[~results.cells.seed.isin(SEEDS)],
    }
    shown = {}
    for name, cells in columns.items():
        effects = replace(results, cells=cells).content_or_length(size)
        effects = effects[effects.change.isin([LENGTH, CONTENT]) & (effects.place == "far")]
        shown = {column: effects[column].to_list() for column in ("change", "measure")} | shown
        shown[name] = [
            measured(row.value, row.low, row.high, digits=3 if row.measure == "NLL" else 1)
            for row in effects.itertuples()
        ]
    return pd.DataFrame(shown)


def judge_other_mixes(results: PretrainingResults, size: str) -> None:
    """What was expected of the mixes that do not decide between content and length, as far as they are measured."""
    effects = results.content_or_length(size).set_index(["change", "measure", "place"])
    for change, measure, place, worse in (
        (PARTED, "copying", "near", True),
        (PARTED, "copying", "far", True),
        (REMOVED, "NLL", "far", True),
        (OTHER, "NLL", "far", True),
        (OTHER, "copying", "far", False),
    ):
        if (change, measure, place) in effects.index:
            row = effects.loc[change, measure, place]
            is_worse = row.low > 0 if measure == "NLL" else row.high < 0
            said = "worse, beyond the interval" if worse else "not detectably worse"
            finding(f"{change}: {place} {measure} is {said}", is_worse == worse)
    if (MORE, "copying", "far") in effects.index:
        gained = results.difference(size, ("mix-better", "full"), ("mix-upweighted", "full"), *PLACES["far"])
        finding(f"better content gains more far NLL than {MORE}, beyond the interval", gained["high"] < 0)
        finding(f"{MORE}: far copying is better, beyond the interval", effects.low[MORE, "copying", "far"] > 0)


def draw_content_or_length(effects: pd.DataFrame, size: str, folder: Path, slug: str, number: str) -> None:
    """What each change of the mix does to NLL and to copying, near and far."""
    styles = {
        "near": {"label": "near", "color": GREY, "marker": "o"},
        "far": {"label": "far", "color": BLUE, "marker": "s"},
    }
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.8), sharey=True)
    drawn = effects[effects.change != OTHER]
    named = {"NLL": "NLL (nats); to the right is worse", "copying": "copied (points); to the left is worse"}
    for panel, measure in zip(panels, named, strict=True):
        part = drawn[drawn.measure == measure]
        intervals(panel, part, row="change", colour="place", zero=0, samples="each", styles=styles)
        panel.set_xlabel(named[measure])
        panel.locator_params(axis="x", nbins=6)
        panel.get_legend().remove()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    changed = effects[effects.place == "far"].set_index(["change", "measure"]).value
    said = [f"{changed[one, 'copying']:+.1f} points with {one}" for one in (LENGTH, CONTENT)]
    caption = f"**Far copying changes by {', by '.join(said)}.** Far: positions from 2,048 on, or copied from over "
    caption += "1,024 tokens back. Near: positions below 512, or copied from up to 512 tokens back within the first "
    caption += (
        f"1,024.\n\n*Data mixes read by {size}, recorded by us; hollow: orders of the texts, bars: 95% as in Figure "
    )
    caption += "12.1. Another domain, whose NLL is off this scale, is judged below.*"
    far = drawn[drawn.place == "far"]
    alt = "; ".join(f"{row.change}, {row.measure} {row.value:+.2f}" for row in far.itertuples())
    save_figure(figure, folder, slug, number, caption, f"Far: {alt}.")
