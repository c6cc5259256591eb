"""How all figures look: one style, one colour and marker for a method everywhere, one way to draw and save.

Colours of what is compared differ in hue and lightness, also for the colour-blind, with a contrast of 3 on white.
"""

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

RED, TEAL, PURPLE, BLUE, BLACK, GREY = "#bf3a0a", "#00917c", "#4b1d73", "#0072b2", "#1a1a1a", "#6e6e6e"
AMBER, GREEN, PINK, SKY = "#b37c00", "#2b5a12", "#c2359f", "#2e8fce"

# Label, colour and marker of everything that is compared.
ARMS = {
    "base": ("base", RED, "o"),
    "rope_base_only": ("base, only RoPE base raised", TEAL, "^"),
    "yarn": ("base, YaRN", PURPLE, "X"),
    "extended": ("extended (LoRA)", BLUE, "s"),
    "rope_unchanged": ("trained, RoPE unchanged", BLACK, "D"),
    "sliding_window": ("base, sliding window", GREY, ""),
}
METHODS = {
    "none": ("RoPE, unscaled", RED, "o"),
    "pi": ("PI", AMBER, "v"),
    "abf": ("ABF", BLUE, "s"),
    "ntk": ("NTK-aware", TEAL, "^"),
    "dynamic_ntk": ("dynamic NTK", GREEN, "P"),
    "ntk_by_parts": ("NTK by parts (Llama 3.1)", PINK, "D"),
    "yarn": ("YaRN", PURPLE, "X"),
    "longrope": ("LongRoPE", SKY, "*"),
    "xpos_abf": ("xPos ABF", BLACK, "h"),
    "proportional": ("proportional", GREY, "<"),
}
KINDS = {"arm": ARMS, "method": METHODS}
COLOURS = {name: colour for name, (_, colour, _) in ARMS.items()}


def use_style() -> None:
    """Set the one style of all figures."""
    sns.set_theme(context="notebook", style="ticks")
    plt.style.use(Path(__file__).with_suffix(".mplstyle"))


def look(name: str, kind: str = "arm") -> dict[str, Any]:
    """Label, colour, marker and line style of an arm or a "method", for any of matplotlib's plots."""
    label, colour, marker = KINDS[kind][name]
    return {"label": label, "color": colour, "marker": marker, "linestyle": "-" if marker else "--"}


def intervals(
    axes: Axes,
    table: pd.DataFrame,
    *,
    row: str,
    colour: str | None = None,
    value: str = "value",
    samples: str | None = None,
    zero: float | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
    names: Sequence[str] = (),
) -> None:
    """One line of the figure for each value of column `row`, top down: a marker at `value`, a bar from low to high.

    The table has columns `row`, `value`, low and high (missing of fewer than eight samples). Column `colour` tells
    markers in one line apart, which stand below each other and have a legend; `styles` says how its values look, where
    they are no arms. Column `samples` has a sequence of numbers in each cell, drawn as well. The line of no difference
    is at `zero`. `names` are the values of `row` in their order, where panels share them; default: as they come.
    """
    names = list(dict.fromkeys([*names, *table[row]]))
    groups = list(dict.fromkeys(table[colour])) if colour else [None]
    for number, group in enumerate(groups):
        part = table[table[colour] == group] if colour else table
        form = {"color": BLUE, "marker": "o"} if group is None else dict((styles or {}).get(group) or look(group))
        form.pop("linestyle", None)
        heights = np.array([names.index(one) for one in part[row]]) + 0.22 * (number - (len(groups) - 1) / 2)
        axes.hlines(heights, part.low, part.high, color=form["color"], linewidth=1.6)
        axes.scatter(part[value], heights, s=34, zorder=3, **{**form, "marker": form["marker"] or "|"})
        for height, numbers in zip(heights, part[samples] if samples else (), strict=False):
            axes.scatter(numbers, [height] * len(numbers), s=16, facecolors="none", edgecolors=form["color"], zorder=2)
    if colour:
        axes.legend()
    if zero is not None:
        axes.axvline(zero, color="0.35", linewidth=1)
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)


def mark_window(axes: Axes, window: int, text: str = "old window") -> None:
    """A dotted line at a window's end, named at its top."""
    axes.axvline(window, color="0.4", linestyle=":", linewidth=1.2)
    place = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate(text, (window, 1), xycoords=("data", "axes fraction"), fontsize=9, color="0.35", **place)


def save_figure(figure: Figure, folder: Path, slug: str, number: str, caption: str, alt: str) -> None:
    """Write folder/SLUG.png (SLUG: "NN_what_it_shows"), show it, and print its caption and `alt` under it.

    The caption says whether numbers are live, recorded or published; `alt` is what a reader who cannot see the figure
    should know. It stands in the output's text, as JupyterLab and nbconvert drop the alt text of an image's metadata,
    and JupyterLab removes an `<img>` with its data inside from notebooks that it does not trust yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug}.png"
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    plt.close(figure)
    # 256 colours are enough for a plot and take a third of the bytes in the notebook.
    PIL.Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)
    display(Image(data=path.read_bytes(), alt=alt, width=int(figure.get_figwidth() * 100)))
    words = f"<details><summary>The figure in words</summary>\n\n{escape(alt, quote=False)}\n\n</details>"
    display(Markdown(f"**Figure {number}.** {caption}\n\n{words}"))


def token_axis(axes: Axes, ticks: Sequence[int], label: str) -> None:
    """A logarithmic x axis in tokens with ticks written 512, 1,024, 4K, ..."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: tokens_text(value)))
    axes.set_xlabel(label)


def tokens_text(tokens: float) -> str:
    """1536 -> "1,536", 4096 -> "4K", 1048576 -> "1M"."""
    for unit, suffix in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{int(tokens // unit):,}{suffix}"
    return f"{tokens:,.0f}"
