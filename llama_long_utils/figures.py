"""How all figures look: one style, one colour for a method everywhere, one way to save."""

import io
from pathlib import Path

import matplotlib.pyplot as plt
import PIL.Image
import seaborn as sns
from IPython.display import Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# One colour for an arm, a method or a component in all figures.
_PALETTE = sns.color_palette("colorblind")
COLOURS = {
    "base": _PALETTE[3],
    "rope_base_only": _PALETTE[2],
    "yarn": _PALETTE[5],
    "extended": _PALETTE[0],
    "rope_unchanged": _PALETTE[1],
    "sliding_window": (0.35, 0.35, 0.35),
}
LABELS = {
    "base": "base",
    "rope_base_only": "base, only RoPE base raised",
    "yarn": "base, YaRN",
    "extended": "extended (LoRA)",
    "rope_unchanged": "trained, RoPE unchanged",
    "sliding_window": "base, sliding window",
}
METHOD_COLOURS = {
    "none": _PALETTE[3],
    "pi": _PALETTE[1],
    "abf": _PALETTE[0],
    "ntk": _PALETTE[2],
    "dynamic_ntk": _PALETTE[9],
    "ntk_by_parts": _PALETTE[4],
    "yarn": _PALETTE[5],
    "longrope": _PALETTE[6],
    "xpos_abf": (0.2, 0.2, 0.2),
    "proportional": _PALETTE[8],
}
METHOD_LABELS = {
    "none": "RoPE, unscaled",
    "pi": "PI",
    "abf": "ABF",
    "ntk": "NTK-aware",
    "dynamic_ntk": "dynamic NTK",
    "ntk_by_parts": "NTK by parts (Llama 3)",
    "yarn": "YaRN",
    "longrope": "LongRoPE",
    "xpos_abf": "xPos ABF",
    "proportional": "proportional",
}
TRAINING_COLOURS = {
    "full-length": _PALETTE[0],
    "short": _PALETTE[3],
    "pose": _PALETTE[2],
    "s2": _PALETTE[1],
    "short-equal-seconds": _PALETTE[3],
    "pose-equal-seconds": _PALETTE[2],
    "s2-equal-seconds": _PALETTE[1],
}
TRAINING_LABELS = {
    "full-length": "full length",
    "short": "short",
    "pose": "PoSE",
    "s2": "S2-Attn",
    "short-equal-seconds": "short, equal seconds",
    "pose-equal-seconds": "PoSE, equal seconds",
    "s2-equal-seconds": "S2-Attn, equal seconds",
}
# Components of a step's memory (memory.COMPONENTS).
COMPONENT_COLOURS = {
    "weights": (0.55, 0.55, 0.55),
    "adapters": _PALETTE[9],
    "gradients": _PALETTE[2],
    "optimizer": _PALETTE[8],
    "saved": _PALETTE[0],
    "loss": _PALETTE[3],
    "backward": _PALETTE[1],
}


def use_style() -> None:
    """Set the one style of all figures."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.figsize": (8.0, 4.2),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 11,
            "axes.grid": True,
            "grid.alpha": 0.35,
            "grid.linewidth": 0.6,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.frameon": False,
            "legend.fontsize": 10,
            "lines.linewidth": 1.8,
        }
    )


def save_figure(figure: Figure, folder: Path, slug: str, number: str, caption: str, alt: str) -> None:
    """Write folder/SLUG.png, show it with alt text, and print its caption under it.

    Args:
        slug: "NN_what_it_shows".
        number: the figure's number, for example "6.1".
        caption: one or two sentences; say whether numbers are live, recorded or published.
        alt: what a reader who cannot see the figure should know.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug}.png"
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    plt.close(figure)
    # 256 colours are enough for a plot and take a third of the bytes in the notebook.
    PIL.Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)
    display(Image(data=path.read_bytes(), alt=alt, width=int(figure.get_figwidth() * 100)))
    display(Markdown(f"**Figure {number}.** {caption}"))


def token_axis(axes: Axes, ticks: list[int], label: str) -> None:
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
