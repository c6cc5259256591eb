"""Does the loss fall with context as (alpha / c)^beta + gamma, and do larger models use context better?

Llama 2 Long reads both from Figure 1 (claims C5 and C6). Here every context is cut before the same target text, so that
contexts differ in nothing else, and models of different tokenizers are given the same texts.

Expected before it was run. C5 agrees if the law, fitted to contexts up to a quarter of the window, tells the loss at
the longest within 0.02 nat: the whole interval over texts and kinds. It disagrees if the whole interval lies outside.
A line in log c, which has one number less, stands beside it: if that tells as much, the law is not singled out. C6
agrees if beta of the larger model is larger, beyond the interval of the difference on the same targets and contexts. Of
three models each is held against the next smaller one, and both steps must lie above 0.

Changed when the numbers had been seen: an interval is the outer ends of the bootstrap over kinds and texts, which is a
little too narrow with eleven kinds, and of Student's t over kinds, by the jackknife. No verdict changed by that. But
that the law is nearer than the line at SmolLM2, which the bootstrap alone had said, is no longer beyond the interval.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy import stats
from scipy.optimize import curve_fit
from transformers import PreTrainedTokenizerBase

from experiments.dose_record import KindBootstrap
from experiments.dose_settings import read_doses
from experiments.dose_texts import read_texts
from experiments.power_law import CLOSER, power_law
from experiments.real_models import NAMES
from llama_long_utils.cache import Cache
from llama_long_utils.evaluation.statistics import SEED
from llama_long_utils.figures import save_figure
from llama_long_utils.model.arms import arm_inputs, load_arm
from llama_long_utils.model.attention import DOCUMENTS
from llama_long_utils.model.loss import Model, causal_lm, hidden_states, next_token_nll
from llama_long_utils.model.weights import load_tokenizer, locate_base
from llama_long_utils.presets import load_preset
from llama_long_utils.records import device_name, package_versions, recorded, write_record
from llama_long_utils.settings import Preset

SLUG = "06_loss_by_context"
QUESTION = "Does the loss fall with context as a power law, and do larger models use context better?"
VERSION = 1  # of what is measured: raise it when a number changes
TEXTS = "smollm2"  # the preset by whose tokenizer texts are cut
TARGET = 256  # tokens of a target by that tokenizer
SHORTEST = 64
COMPARED_UP_TO = 2048  # tokens of context: what every model read
SAMPLES = 500  # of a bootstrap: each is fitted
ARMS = {  # of a preset: what is read, and the tokens of the longest context, which leaves room for any target
    "tiny": ("extended", 4096 - 3 * TARGET),
    "smollm2": ("base", 8192 - 3 * TARGET),
    "qwen2.5-coder-1.5b": ("base", 2048),  # as long as the others are fitted to: longer ones take hours of a CPU
}


@dataclass(frozen=True)
class Target:
    """A text to score, and what stands before it in its document."""

    kind: str
    document: str
    head: str
    text: str


def targets() -> list[Target]:
    """The last tokens of a stretch of every held-out text, and the stretch before them."""
    preset = load_preset(TEXTS)
    tokenizer = load_tokenizer(locate_base(preset))
    found = []
    for text in read_texts(preset.data, tokenizer, read_doses(TEXTS).lengths)[1]:
        head, scored = (
            tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (text.token_ids[1:-TARGET], text.token_ids[-TARGET:])
        )
        found.append(Target(text.source, text.name, head, scored))
    return found


def contexts(longest: int) -> list[int]:
    """Tokens before a target: powers of two, and the longest."""
    powers = [SHORTEST * 2**power for power in range(20)]
    return [*(power for power in powers if power < longest), longest]


def fitted_up_to(longest: int) -> int:
    """The longest context that a law is fitted to: a quarter of the window, or less."""
    return max(context for context in contexts(longest) if 3 * context <= longest)


@torch.no_grad()
def nats_of(model: Model, tokenizer: PreTrainedTokenizerBase, target: Target, cuts: list[int]) -> dict:
    """Nats of a target behind each context, and the numbers of its tokens and bytes."""
    head, text = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (target.head, target.text))
    output, nats = causal_lm(model).get_output_embeddings(), []
    if len(head) < cuts[-1]:
        raise ValueError(f"{target.document}: {len(head):,} tokens before a target, {cuts[-1]:,} are to be read")
    for cut in cuts:
        ids = torch.tensor([[tokenizer.bos_token_id, *head[-cut:], *text]], device=model.device)
        hidden = hidden_states(model, ids)[:, -len(text) - 1 :]
        nll = next_token_nll(hidden, output, ids[:, -len(text) - 1 :], reduction="none")
        nats.append(float(nll.sum()))
    return {"nats": nats, "tokens": len(text), "bytes": len(target.text.encode())}


def measure(preset: Preset, folder: Path) -> Path:
    """Read every target behind every context with the arm of a preset, and write the record SLUG into a folder."""
    if preset.name not in ARMS:
        raise ValueError(
            f"experiments/context_law.py has no arms for the preset {preset.name!r}, only for {list(ARMS)}"
        )
    (arm, longest), tokenizer = ARMS[preset.name], load_tokenizer(locate_base(preset))
    inputs = {"device": device_name(), "versions": package_versions(), **arm_inputs(preset, arm, attention=DOCUMENTS)}
    cache, cuts, every = Cache(preset.run_folder / "loss-by-context", VERSION, inputs), contexts(longest), targets()
    model = load_arm(preset, arm, attention=DOCUMENTS)
    made = cache.items(
        arm,
        every,
        lambda few: [nats_of(model, tokenizer, target, cuts) for target in few],
        item_key=lambda target: [target, cuts],
        progress="loss by context",
    )
    rows = [
        {"kind": target.kind, "document": target.document, "tokens": one["tokens"], "bytes": one["bytes"]}
        | {"context": cut, "nats": nats}
        for target, one in zip(every, made, strict=True)
        for cut, nats in zip(cuts, one["nats"], strict=True)
    ]
    return write_record(
        folder,
        SLUG,
        preset=preset.name,
        question=QUESTION,
        tables=with_fits(preset.name, pd.DataFrame(rows)),
        seeds={"texts": 0, "bootstrap": SEED},
        seconds=0.0,
        provenance={
            "command": f"python -m experiments context --preset {preset.name}",
            "device": f"{device_name()}, {preset.base.dtype}",
        },
    )


def with_fits(preset: str, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables of a record: `contexts`, as measured, and what is fitted to it, beside smaller models' records."""
    smaller = {name: recorded(name, SLUG) for name in list(ARMS)[: list(ARMS).index(preset)]}
    losses = {name: ContextLoss.of(record.table("contexts")) for name, record in smaller.items() if record}
    losses[preset], up_to = ContextLoss.of(table), fitted_up_to(ARMS[preset][1])
    predictions = losses[preset].predictions(up_to).assign(fitted_up_to=up_to)
    return {"contexts": table, "predictions": predictions, "betas": betas(losses, COMPARED_UP_TO)}


def log_line(context: np.ndarray, first: float, slope: float) -> np.ndarray:
    """A loss that falls by as much with every doubling, in nats."""
    return first - slope * np.log(context)


LAWS: dict[str, tuple[Callable, list[float], tuple]] = {  # where a fit begins, and its bounds
    "power law": (power_law, [3.0, 0.5, 1.5], ([-20, 0.01, 0], [20, 5, 20])),
    "line in log c": (log_line, [4.0, 0.1], ([0, -5], [20, 5])),
}


@dataclass(frozen=True)
class ContextLoss:
    """Nats of each text's target behind each context, from a record; `units` are the target's tokens."""

    contexts: np.ndarray
    nats: np.ndarray
    units: np.ndarray
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, table: pd.DataFrame) -> "ContextLoss":
        """What table `contexts` of a record of `measure` holds."""
        nats = table.pivot_table("nats", ["kind", "document", "tokens"], "context", sort=False)
        kinds, _, units = zip(*nats.index, strict=True)
        return cls(nats.columns.to_numpy(float), nats.to_numpy(), np.array(units, float), kinds)

    def drawn(self) -> np.ndarray:
        """Mean losses of these texts, of SAMPLES draws of kinds and texts, and without each kind: a row for each."""
        weights = KindBootstrap(len(self.units), SAMPLES, SEED, self.kinds).weights()
        without = [[kind != left_out for kind in self.kinds] for left_out in dict.fromkeys(self.kinds)]
        weights = np.concatenate([np.ones((1, len(self.units)), dtype=int), weights, without])
        return (weights @ self.nats) / (weights @ self.units)[:, None]

    def seen(self, contexts: np.ndarray, law: Callable) -> Callable:
        """The law's mean over a target: the first of its tokens has a context, and BOS, before it, later ones more."""
        steps = np.arange(round(self.units.mean()))
        return lambda _, *numbers: law(contexts[:, None] + 1 + steps, *numbers).mean(axis=1)

    def fits(self, name: str, up_to: float, losses: np.ndarray) -> np.ndarray:
        """A law's numbers for each row of losses, fitted to contexts up to one of them."""
        law, begin, bounds = LAWS[name]
        near = self.contexts[self.contexts <= up_to]
        of = self.seen(near, law)
        return np.array(
            [
                curve_fit(of, near, row[: len(near)], begin, bounds=bounds, max_nfev=20_000, x_scale="jac")[0]
                for row in losses
            ]
        )

    def predictions(self, up_to: float) -> pd.DataFrame:
        """Of each law, fitted up to a context: predicted minus measured at the longer ones, nats with 95% intervals.

        `CLOSER` has the power law's distance from what was measured minus the line's.
        """
        losses, found = self.drawn(), {}
        far = self.contexts > up_to
        for name, (law, *_) in LAWS.items():
            of = self.seen(self.contexts[far], law)
            found[name] = np.array([of(None, *numbers) for numbers in self.fits(name, up_to, losses)]) - losses[:, far]
        power, line = found.values()
        found[CLOSER] = abs(power) - abs(line)
        return pd.DataFrame(
            {"law": name, "context": int(context), **_interval(column)}
            for name, errors in found.items()
            for context, column in zip(self.contexts[far], errors.T, strict=True)
        )


def _interval(drawn: np.ndarray) -> dict[str, float]:
    """The value of the texts themselves, and the outer bounds of two 95% intervals; rows as in `ContextLoss.drawn`.

    One is the middle of the draws, the other Student's t over kinds, by the jackknife.
    """
    value, draws, without = drawn[0], drawn[1 : 1 + SAMPLES], drawn[1 + SAMPLES :]
    low, high = np.percentile(draws, [2.5, 97.5])
    half = stats.t.ppf(0.975, len(without) - 1) * np.std(without) * np.sqrt(len(without) - 1)
    return {"value": float(value), "low": float(min(low, value - half)), "high": float(max(high, value + half))}


def betas(losses: dict[str, ContextLoss], up_to: float) -> pd.DataFrame:
    """The power law's beta of each model, and each minus that of the model before it, with 95% intervals.

    All are fitted to the same contexts, at most `up_to`, and to the same draws of the same texts.
    """
    found = {name: part.fits("power law", up_to, part.drawn())[:, 1] for name, part in losses.items()}
    found |= {f"{larger} minus {smaller}": found[larger] - found[smaller] for smaller, larger in pairwise(losses)}
    return pd.DataFrame([{"model": name, **_interval(drawn)} for name, drawn in found.items()])


def draw_laws(losses: dict[str, ContextLoss], folder: Path, slug: str, number: str, caption: str) -> None:
    """A panel for each model: the loss behind each context, and both laws, fitted to the left of the grey line."""
    figure, panels = plt.subplots(1, len(losses), figsize=(min(4.6 * len(losses), 10.5), 4.2), squeeze=False)
    for axes, (name, part) in zip(panels[0], losses.items(), strict=True):
        drawn, up_to = part.drawn(), fitted_up_to(round(part.contexts.max()))
        for (law, (form, *_)), style in zip(LAWS.items(), ("-", ":"), strict=True):
            (numbers,) = part.fits(law, up_to, drawn[:1])
            axes.plot(part.contexts, part.seen(part.contexts, form)(None, *numbers), style, color="0.4", label=law)
        saved = drawn - drawn[:, :1]
        bounds = [_interval(column) for column in saved.T]
        reach = [[abs(one[end] - one["value"]) for one in bounds] for end in ("low", "high")]
        axes.errorbar(part.contexts, drawn[0], yerr=reach, fmt="o", capsize=3, label="measured")
        axes.axvline(1.4 * up_to, color="0.8", zorder=0)
        axes.set(xscale="log", title=NAMES.get(name, f"{name} Llama"), xlabel="tokens before the target")
        axes.set_xticks(part.contexts[::2], [f"{int(context):,}" for context in part.contexts[::2]])
        axes.minorticks_off()
    panels[0][0].set_ylabel("nats per token")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    alt = "Loss against context on a log scale: it falls; the power law bends, the line does not."
    save_figure(figure, folder, slug, number, caption, alt)
