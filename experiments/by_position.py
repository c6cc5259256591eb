"""The loss of several arms by position, as notebooks 6 and 13 draw it."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama_long_utils.figures import look, mark_window, plt, token_axis


def two_scales(table: pd.DataFrame, window: int, limits: tuple[float, float]) -> Figure:
    """Arms minus the base in its own window, by position: a panel with all of it, and one between the limits (nats).

    A line for each arm over the middles of position buckets, with bands where the table has low and high. Its other
    columns: arm, position_low, position_high, nll. Arms without a marker (controls) are dashed, without band.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4))
    for axes, title in zip(panels, ("all arms", "the same, enlarged"), strict=True):
        _draw(axes, table, window)
        axes.set_title(title)
    panels[0].legend(loc="upper left")
    panels[1].set_ylim(limits)
    return figure


def enlarged(table: pd.DataFrame, window: int, limits: tuple[float, float]) -> Figure:
    """The second panel of `two_scales` alone. The legend says how far a line climbs that leaves it."""
    figure, axes = plt.subplots(figsize=(9, 4.4))
    _draw(axes, table, window)
    handles, labels = axes.get_legend_handles_labels()
    most = table.groupby(table.arm.map(lambda arm: look(arm)["label"])).nll.max()
    leaving = {label: f"{label},\nclimbs to {most[label]:+.1f}" for label in most.index[most > limits[1]]}
    figure.legend(handles, [leaving.get(label, label) for label in labels], loc="outside right upper")
    axes.set_ylim(limits)
    return figure


def _draw(axes: Axes, table: pd.DataFrame, window: int) -> None:
    edges = np.log2([max(1, table.position_low.min()), table.position_high.max()])
    ticks = [2**power for power in range(math.ceil(edges[0]), math.floor(edges[1]) + 1)]
    for arm, rows in table.groupby("arm", sort=False):
        form, centre = look(arm), np.sqrt(rows.position_low * rows.position_high)
        axes.plot(centre, rows.nll, markersize=4, **form)
        if "low" in rows and form["marker"]:
            axes.fill_between(centre, rows.low, rows.high, color=form["color"], alpha=0.15, linewidth=0)
    token_axis(axes, ticks, "position in the text (tokens)")
    axes.axhline(0, **look("sliding_window"))
    mark_window(axes, window)
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("NLL minus the base's in its own window (nats)")


def collapse_in_words(table: pd.DataFrame, window: int, own: float) -> str:
    """What ends the collapse past the window, what that costs, and whether length pays (`own`: full context minus
    windows, nats): a sentence from the table of `two_scales`, whose arms have no intervals here."""
    past = table[table.position_low >= window].groupby("arm").nll.max()
    ends = "ends" if past.rope_base_only < past.base / 2 else "does not end"
    repairs = "repairs" if past.extended <= 0 < past.rope_base_only else "does not repair"
    pays = "Length does not yet pay" if own >= 0 else "That length pays is not shown"
    return f"A raised RoPE base {ends} the collapse, and training {repairs} what that costs. {pays}."
