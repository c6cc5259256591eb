"""The loss of several arms by position, as notebooks 6 and 13 draw it."""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from llama_long_utils.figures import look, mark_window, plt, token_axis


def two_scales(table: pd.DataFrame, window: int, limits: tuple[float, float]) -> Figure:
    """Arms minus the base in its own window, by position: a panel with all of it, and one between the limits (nats).

    A line for each arm over the middles of position buckets, with bands where the table has low and high. Its other
    columns: arm, position_low, position_high, nll. Arms without a marker (controls) are dashed, without band.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4))
    edges = np.log2([max(1, table.position_low.min()), table.position_high.max()])
    ticks = [2**power for power in range(math.ceil(edges[0]), math.floor(edges[1]) + 1)]
    for axes, title in zip(panels, ("all arms", "the same, enlarged"), strict=True):
        for arm, rows in table.groupby("arm", sort=False):
            form, centre = look(arm), np.sqrt(rows.position_low * rows.position_high)
            axes.plot(centre, rows.nll, markersize=4, **form)
            if "low" in rows and form["marker"]:
                axes.fill_between(centre, rows.low, rows.high, color=form["color"], alpha=0.15, linewidth=0)
        token_axis(axes, ticks, "position in the text (tokens)")
        axes.axhline(0, **look("sliding_window"))
        mark_window(axes, window)
        axes.set_title(title)
    panels[0].set_ylabel("NLL minus the base's in its own window (nats)")
    panels[0].legend(loc="upper left")
    panels[1].set_ylim(limits)
    return figure
