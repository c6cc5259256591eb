"""The notebooks in their one order: the README's index, the links between them and `make run` follow it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_long_utils.paths import REPOSITORY

FOLDER = REPOSITORY / "notebooks"


@dataclass(frozen=True)
class Notebook:
    """One notebook of the sequence.

    Attributes:
        needs_base: it reads the base's weights or tokenizer.
        needs_adapter: it reads the adapter that notebook 5 trained.
        leaves: what it leaves in runs/PRESET besides itself, its figures and its record.
        record_with: parameters with which its committed record is measured, where its defaults are a quick look.
    """

    slug: str
    title: str
    question: str
    needs_base: bool = True
    needs_adapter: bool = False
    leaves: tuple[str, ...] = ()
    record_with: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.slug}.ipynb"


# A notebook is delivered when its file exists; the others are the plan.
SEQUENCE = [
    Notebook("00_overview", "Overview", "What is here, and what holds?"),
    Notebook("01_rope_explained", "RoPE explained", "How does a Llama know where a token stands?", needs_base=False),
    Notebook("02_rope_scaling", "RoPE scaling", "How can RoPE be scaled, and what is kept?", needs_base=False),
    Notebook("03_long_documents", "Long documents", "What does a model have to read to learn long context?"),
    Notebook("04_one_gpu_budget", "One GPU", "What fits on one GPU, and how long does it take?", needs_base=False),
    Notebook(
        "05_finetune_qlora",
        "Finetuning with QLoRA",
        "How is a 4-bit Llama taken from a short to a long window?",
        leaves=("training/*/adapter/adapter_model.safetensors",),
    ),
    Notebook(
        "06_perplexity_by_position",
        "Perplexity by position",
        "Does the extended model use what lies far back?",
        needs_adapter=True,
        record_with={"all_documents": True},
    ),
    Notebook(
        "07_long_range_retrieval",
        "Long-range retrieval",
        "Can it find one sentence in a long text?",
        needs_adapter=True,
        record_with={"questions": None},
    ),
    Notebook(
        "08_benchmark_deltas",
        "Benchmark deltas",
        "What does the extension do to short and long tasks?",
        needs_adapter=True,
        record_with={"items": 100, "tasks": "hellaswag truthfulqa_mc1 mmlu"},
    ),
    Notebook(
        "09_instruction_tuning",
        "Instruction tuning",
        "How does a long base model become a chat model?",
        needs_adapter=True,
        leaves=("instruction/*/adapter/adapter_model.safetensors",),
    ),
    Notebook(
        "10_preference_tuning",
        "Preference tuning",
        "Does preference tuning raise what was meant, and keep long context?",
    ),
    Notebook("11_ablations", "Ablations", "Which way to scale RoPE, and which way to train it, wins on equal terms?"),
    Notebook("12_pretraining_curriculum", "Pretraining curriculum", "When should pretraining sequences become long?"),
    Notebook("13_real_models", "Real models", "What holds for a real LLM?", needs_base=False),
    Notebook(
        "14_published_results",
        "Published results",
        "Which of the paper's gains are larger than chance?",
        needs_base=False,
    ),
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
    parts.append("[all notebooks](00_overview.ipynb)")  # beside them: it works wherever JupyterLab was started
    if place + 1 < len(present):
        parts.append(f"[{present[place + 1].title}]({present[place + 1].slug}.ipynb) →")
    return " · ".join(parts)


def index(folder: str = "notebooks/") -> str:
    """Markdown table of the delivered notebooks, then one line that names the planned ones.

    Args:
        folder: of the notebooks, as seen from the page that shows the table.
    """
    rows = [f"| [{n.slug[:2]}]({folder}{n.slug}.ipynb) | {n.title} | {n.question} |" for n in delivered()]
    planned = [f"{n.slug[:2]} {n.title}" for n in SEQUENCE if n not in delivered()]
    table = "\n".join(["| | notebook | its question |", "|---|---|---|", *rows])
    return table + (f"\n\nPlanned, not there yet: {', '.join(planned)}." if planned else "")
