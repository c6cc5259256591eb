"""SmolLM2 trained on whole sequences of 16,384 tokens for the time that is left, by the package's own loop."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from peft import PeftModel
from transformers import LlamaConfig

from experiments.gpu_checks import Machine, Row
from llama_long_utils.data.mixture import Mixture
from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.base import load_base
from llama_long_utils.model.weights import load_tokenizer, locate_base
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import TrainingSettings
from llama_long_utils.training.planner import model_shape
from llama_long_utils.training.random_llama import random_llama
from llama_long_utils.training.trainer import train

FIRST, MOST = 2, 160  # steps that show the speed; steps in all, 10 million tokens
SHARE = 0.8  # of the time that is left: not every step is as fast as the first ones
DIFFERENT = 64  # tokens in random sequences: few, so that there is something to learn
Sequences = Callable[[TrainingSettings], Sequence[TrainingSequence]]


def train_for(machine: Machine, seconds: float, folder: Path, doll: LlamaConfig | None = None) -> list[Row]:
    """A row for each step; "weights" says whose they are: random where SmolLM2's, or its texts, cannot be had.

    Args:
        seconds: that it may take.
        folder: for what the trainer writes, removed at the end.
        doll: the shape of a random model, trained on short sequences.
    """
    window = 128 if doll else 16_384
    settings = replace(
        load_preset("smollm2").training,
        **{"window": window, "reach": window, "self_quoting_share": 0.0, "steps": FIRST, "checkpoint_every": 10 * MOST},
    )
    try:
        weights, model, sequences = random(machine, doll) if doll else smollm2(window)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"random weights: {error}", flush=True)
        weights, model, sequences = random(machine, model_shape("SmolLM2-135M"))
    machine.forget()
    try:
        speed = train(model, sequences(settings), settings, folder / "first")[-1]["tokens_per_second"]
        step = settings.sequences_per_step * window / speed
        steps = min(FIRST if doll else MOST, int(SHARE * seconds / step) - 2 * FIRST)
        if steps < 1:
            return [{"weights": weights, "skipped": f"a step takes {step:.0f} s, and {seconds:.0f} s were left"}]
        settings = replace(settings, steps=steps)
        log = train(model, sequences(settings), settings, folder / "then")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    kept = ("step", "tokens", "loss", "tokens_per_second", "peak_gib")
    return [{"weights": weights, "context": window, **{name: row[name] for name in kept}} for row in log]


def smollm2(window: int) -> tuple[str, PeftModel, Sequences]:
    """The preset's base and texts, on the GPU if there is one."""
    preset = load_preset("smollm2")
    base = locate_base(preset)
    tokenizer = load_tokenizer(base)
    documents = Mixture(preset.data, tokenizer, window=window)
    model = load_base(base, preset.extended_rope, dtype="bfloat16")
    model = add_lora(model, preset.lora, seed=0)
    return "SmolLM2-135M", model, lambda settings: TrainingData(documents, settings, tokenizer)


def random(machine: Machine, config: LlamaConfig) -> tuple[str, PeftModel, Sequences]:
    """A model of this shape, and sequences of few different tokens."""
    lora = load_preset("smollm2").lora

    def sequences(settings: TrainingSettings) -> list[TrainingSequence]:
        shape = settings.steps * settings.sequences_per_step, settings.window
        ids = np.random.default_rng(0).integers(2, 2 + DIFFERENT, shape)
        return [TrainingSequence(row, row, np.arange(settings.window)) for row in ids]

    return "random", random_llama(config, lora, "bfloat16", device=machine.device), sequences
