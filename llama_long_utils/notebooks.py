"""The notebooks: their one order, what each of them does first and last, and how their figures look."""

import io
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import PIL.Image
import seaborn as sns
from IPython.display import Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from llama_long_utils.documents import REPOSITORY

if TYPE_CHECKING:
    from llama_long_utils.presets import Preset

FOLDER = REPOSITORY / "notebooks"


@dataclass(frozen=True)
class Notebook:
    """`record_with`: parameters with which its committed record is measured, where its defaults are a quick look."""

    slug: str
    title: str
    question: str
    record_with: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.slug}.ipynb"


# The one list: the README's index, the links between notebooks and `make run` follow it. A notebook
# is delivered when its file exists; the others are the plan.
SEQUENCE = [
    Notebook("01_rope_explained", "RoPE explained", "How does a Llama know where a token stands?"),
    Notebook("02_rope_scaling", "RoPE scaling", "How can RoPE be scaled, and why does raising the base win?"),
    Notebook("03_long_documents", "Long documents", "What does a model have to read to learn long context?"),
    Notebook("04_one_gpu_budget", "One GPU", "What fits on one GPU, and how long does it take?"),
    Notebook("05_finetune_qlora", "Finetuning with QLoRA", "How is a 4-bit Llama taken from a short to a long window?"),
    Notebook(
        "06_perplexity_by_position",
        "Perplexity by position",
        "Does the extended model use what lies far back?",
        record_with={"stretches_per_document": None},
    ),
    Notebook(
        "07_long_range_retrieval",
        "Long-range retrieval",
        "Can it find one sentence in a long text?",
        record_with={"questions": None},
    ),
    Notebook(
        "08_benchmark_deltas",
        "Benchmark deltas",
        "What does the extension do to short and long tasks?",
        record_with={"items": 100, "tasks": "hellaswag truthfulqa_mc1 mmlu"},
    ),
    Notebook("09_instruction_tuning", "Instruction tuning", "How does a long base model become a chat model?"),
    Notebook("10_preference_tuning", "Preference tuning", "Does preference tuning keep long context?"),
    Notebook("11_ablations", "Ablations", "Which of the choices matter?"),
    Notebook("12_pretraining_curriculum", "Pretraining curriculum", "When should pretraining sequences become long?"),
]


def delivered() -> list[Notebook]:
    """The notebooks that exist, in order."""
    return [notebook for notebook in SEQUENCE if notebook.path.is_file()]


def links(slug: str) -> str:
    """Markdown with the delivered notebooks before and after this one."""
    present = delivered()
    place = [notebook.slug for notebook in present].index(slug)
    parts = []
    if place > 0:
        parts.append(f"← [{present[place - 1].title}]({present[place - 1].slug}.ipynb)")
    parts.append("[all notebooks](../README.md#the-notebooks)")
    if place + 1 < len(present):
        parts.append(f"[{present[place + 1].title}]({present[place + 1].slug}.ipynb) →")
    return " · ".join(parts)


def index() -> str:
    """Markdown table of the delivered notebooks, then one line that names the planned ones."""
    rows = [f"| [{n.slug[:2]}](notebooks/{n.slug}.ipynb) | {n.title} | {n.question} |" for n in delivered()]
    planned = [f"{n.slug[:2]} {n.title}" for n in SEQUENCE if n not in delivered()]
    table = "\n".join(["| | notebook | its question |", "|---|---|---|", *rows])
    return table + (f"\n\nPlanned, not there yet: {', '.join(planned)}." if planned else "")


def check(claim: str, holds: bool) -> None:
    """Print a claim that holds; raise AssertionError with it if it does not."""
    if not holds:
        raise AssertionError(f"does not hold: {claim}")
    print(f"holds: {claim}")


def finding(claim: str, holds: bool) -> None:
    """Print whether a measured claim holds: another preset may well find something else, and must go on."""
    print(f"{'holds' if holds else 'does not hold'}: {claim}")


def start(namespace: dict[str, Any], parameters: dict[str, Any]) -> "Preset":
    """The first thing a notebook does: check its parameters, set the style, silence the libraries.

    The imports stand in here because transformers speaks up when it is imported.

    Args:
        namespace: the notebook's `globals()`.
        parameters: the notebook's parameters and their types, for example {"preset": str, "steps": int | None}.
    """
    for name in ("transformers", "peft", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    from llama_long_utils.presets import preset_from_parameters
    from llama_long_utils.training import headless, keep_freed_memory

    warnings.filterwarnings("ignore", category=FutureWarning)
    if headless():
        transformers_logging.disable_progress_bar()
    use_style()
    keep_freed_memory()
    return preset_from_parameters(namespace, parameters)


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
