"""The race: every way to scale RoPE and to train it, on equal terms, one arm at a time.

An arm is a RoPE method, a way of training and a seed. All arms share the base, the documents, the LoRA
settings and the number of trained tokens; what differs is in the preset's [race]. An arm is measured
by its NLL at every position and by first-sentence retrieval.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import experiments.attention  # noqa: F401 (registers xPos and S2-Attn)
from experiments.race_results import ZERO_SHOT
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.mixture import read_documents
from llama_long_utils.evaluation.generation import write
from llama_long_utils.evaluation.perplexity import bucket_sums, random_stretches, token_nll
from llama_long_utils.evaluation.retrieval import rouge_l
from llama_long_utils.evaluation.retrieval_items import first_sentence_items
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.paths import RESULTS
from llama_long_utils.presets import RAISED, with_numbers
from llama_long_utils.progress import track
from llama_long_utils.records import Record, papermill_command, read_record, write_record
from llama_long_utils.settings import METHODS, Preset, Scaling, TrainingSettings, raised_base
from llama_long_utils.training.adapter import train_adapter

SLUG = "11_ablations"
QUESTION = "Which way to scale RoPE, and which way to train it, wins on equal terms?"
VERSION = 1  # of what an arm measures: raise it when its numbers change


@dataclass(frozen=True)
class Arm:
    """`training` is "zero-shot" or a name in the preset's [race.trainings]."""

    method: str
    training: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.training}, seed {self.seed}"


def race_arms(preset: Preset) -> list[Arm]:
    """Every arm of the race, those without training first: they have nothing random and one seed."""
    arms = [Arm(method, ZERO_SHOT, preset.race.seeds[0]) for method in METHODS]
    for name, entry in preset.race.trainings.items():
        arms += [Arm(method, name, seed) for seed in preset.race.seeds for method in entry.methods]
    if not preset.race.pair_factors:  # LongRoPE was not searched for this base
        arms = [arm for arm in arms if arm.method != "longrope"]
    return arms


def arm_rope(preset: Preset, method: str) -> Scaling:
    """RoPE of an arm: the preset's windows; ABF and xPos ABF at the raised base, the others at the pretrained one."""
    if method not in METHODS:
        raise ValueError(f"unknown RoPE method {method!r}: use one of {list(METHODS)}")
    return dataclasses.replace(
        preset.control_rope,
        method=method,
        base=raised(preset) if method in RAISED else preset.base.rope_base,
        pair_factors=preset.race.pair_factors if method == "longrope" else (),
        rotated_share=preset.race.rotated_share if method == "proportional" else 1.0,
    )


def raised(preset: Preset) -> float:
    """The extension's RoPE base, or what it would be if its method raised one."""
    base, extension = preset.base, preset.extension
    if extension.method in RAISED:
        return extension.rope_base
    return raised_base(base.head_dim, base.rope_base, base.window, extension.window)


def arm_training(preset: Preset, arm: Arm) -> TrainingSettings | None:
    """The preset's training settings with the numbers of the arm's way of training; None for zero-shot."""
    seeded = with_numbers(preset.training, "training", seed=arm.seed)
    if arm.training == ZERO_SHOT:
        return None
    if arm.training not in preset.race.trainings:
        raise ValueError(f"unknown training {arm.training!r}: use one of {[ZERO_SHOT, *preset.race.trainings]}")
    changes = asdict(preset.race.trainings[arm.training])
    del changes["methods"]
    race = preset.race
    shared = {"warmup_steps": race.warmup_steps, "self_quoting_share": race.self_quoting_share}
    return with_numbers(seeded, "training", **changes, **shared, pack=False)


def run_arm(preset: Preset, arm: Arm) -> Path:
    """Train an arm, unless it is zero-shot, measure it and write its record; or only name the record of before.

    Raises:
        ValueError: the method or the training is unknown.
    """
    scaling, settings = arm_rope(preset, arm.method), arm_training(preset, arm)
    folder = locate_base(preset)
    path = arm_record(preset, arm, weights_sha256(folder))
    if path.is_file():
        read_record(path)
        return path
    started = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    _, held_out = read_documents(preset.data, tokenizer, length=preset.evaluation.tokens)
    if settings is None:
        model: PreTrainedModel | PeftModel = load_arm(preset, "base", scaling=scaling)
    else:
        model, _ = trained_arm(preset, scaling, settings, name="race")
    trained = time.perf_counter() - started
    tables = measure(preset, model, tokenizer, held_out)
    for table in tables.values():
        for column, value in reversed(list(asdict(arm).items())):
            table.insert(0, column, value)
    return write_record(
        path.parent,
        path.stem,
        preset=preset.name,
        question=QUESTION,
        tables=tables,
        seeds={"training": arm.seed, "evaluation": preset.evaluation.seed, "split": preset.data.split_seed},
        seconds=trained,
        provenance={"command": papermill_command("11_ablations", {"preset": preset.name, **asdict(arm)})},
    )


def trained_arm(
    preset: Preset, scaling: Scaling, settings: TrainingSettings, *, name: str
) -> tuple[PeftModel, list[dict[str, float]]]:
    """The base with the adapter that these settings train, under full attention, and `train`'s rows."""
    trained = train_adapter(preset, settings=settings, scaling=scaling, name=name)
    return load_arm(preset, "extended", adapter=trained.folder, scaling=scaling), trained.log


def measure(
    preset: Preset,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[TokenizedDocument],
) -> dict[str, pd.DataFrame]:
    """NLL by position and first-sentence retrieval, one row for each document.

    Returns:
        `nll`: document, position_low, position_high, nats (sum), tokens. `retrieval`: document, length, rouge_l
        (0 to 100), answer, written.
    """
    model.eval()
    evaluation = preset.evaluation
    stretches = random_stretches(held_out, evaluation.tokens, at_most=1, seed=evaluation.seed)
    edges = evaluation.near_edges
    rows = []
    for (cut,) in stretches:
        (nats,), (tokens,) = bucket_sums([token_nll(model, cut, evaluation.tokens)[None]], edges)
        name = f"{cut.source}/{cut.name}"
        rows += [(name, *row) for row in zip(edges[:-1], edges[1:], nats, tokens, strict=True)]
    found = []
    for length in preset.retrieval.lengths:
        items = first_sentence_items(held_out, tokenizer, length, preset.retrieval, seed=evaluation.seed)
        prompts, room = [item.prompt for item in items], preset.retrieval.answer_tokens
        for item, written in zip(items, write(model, tokenizer, prompts, tokens=room), strict=True):
            found.append((item.document, length, rouge_l(item.answer, written), item.answer, written))
    return {
        "nll": pd.DataFrame(rows, columns=["document", "position_low", "position_high", "nats", "tokens"]),
        "retrieval": pd.DataFrame(found, columns=["document", "length", "rouge_l", "answer", "written"]),
    }


def arm_record(preset: Preset, arm: Arm, base_sha256: str) -> Path:
    """Where the record of an arm is once it is measured, named by a hash of everything that its numbers depend on."""
    settings = arm_training(preset, arm)
    parts = [asdict(part) for part in (arm_rope(preset, arm.method), preset.data, preset.lora, preset.evaluation)]
    questions = asdict(preset.retrieval)
    del questions["tasks"]  # notebook 7's
    parts += [questions, asdict(settings) if settings else ZERO_SHOT, preset.base.dtype, base_sha256]
    key = hashlib.sha256(json.dumps([VERSION, *parts]).encode())
    return preset.run_folder / "race" / f"{key.hexdigest()[:12]}.json"


def collect(
    preset: Preset, arms: Sequence[Arm], base_sha256: str, folder: Path, slug: str = SLUG, options: str = ""
) -> Path:
    """Join the records of these arms to folder/SLUG.json and .npz; `options` are those of the command.

    The tables hold means over documents; the arrays hold every document, for intervals, and every text written.

    Raises:
        ValueError: an arm was not measured.
    """
    paths = [arm_record(preset, arm, base_sha256) for arm in arms]
    nll = pd.concat([Record(path).table("nll") for path in paths])
    found = pd.concat([Record(path).table("retrieval") for path in paths])
    provenance = [read_record(path)["provenance"] for path in paths]
    names = ["method", "training", "seed"]
    sums = nll.groupby([*names, "position_low", "position_high"], sort=False)[["nats", "tokens"]].sum()
    by_position = (sums.nats / sums.tokens).rename("value").reset_index()
    by_length = found.groupby([*names, "length"], sort=False).rouge_l.mean().rename("value").reset_index()
    cost = pd.DataFrame([asdict(arm) for arm in arms])
    settings = [arm_training(preset, arm) for arm in arms]
    cost["tokens"] = [s.steps * s.sequences_per_step * s.window if s else 0 for s in settings]
    cost["seconds"] = [number["seconds"] if s else 0.0 for number, s in zip(provenance, settings, strict=True)]
    shape = (len(arms), -1, nll.position_low.nunique())
    arrays = {
        "nats": nll.nats.to_numpy().reshape(shape),
        "tokens": nll.tokens.to_numpy().reshape(shape)[0],
        "documents": nll.document.to_numpy().reshape(shape)[0, :, 0].astype(str),
    }
    for length, rows in found.groupby("length"):
        arrays[f"rouge_l_{length}"] = rows.rouge_l.to_numpy().reshape(len(arms), -1)
        arrays[f"written_{length}"] = rows.written.to_numpy().reshape(len(arms), -1).astype(str)
        arrays[f"answer_{length}"] = rows.answer.to_numpy().reshape(len(arms), -1)[0].astype(str)
        arrays[f"documents_{length}"] = rows.document.to_numpy().reshape(len(arms), -1)[0].astype(str)
    return write_record(
        folder,
        slug,
        arrays=arrays,
        preset=preset.name,
        question=QUESTION,
        tables={"nll_by_position": by_position, "first_sentence_retrieval": by_length, "cost": cost},
        seeds={"training": preset.race.seeds, "evaluation": preset.evaluation.seed, "split": preset.data.split_seed},
        seconds=sum(number["seconds"] for number in provenance),
        provenance={
            "command": f"python -m experiments race --preset {preset.name}{options}",
            **{name: ", ".join(sorted({entry[name] for entry in provenance})) for name in ("commit", "date", "device")},
        },
    )


def in_short(preset: Preset) -> Preset:
    """The same, asked for first sentences at two lengths only, the shortest and the first past the old window."""
    lengths, old = preset.retrieval.lengths, preset.base.window
    some = sorted({lengths[0], next((length for length in lengths if length > old), lengths[0])})
    return dataclasses.replace(preset, retrieval=dataclasses.replace(preset.retrieval, lengths=some))


def race_record(preset: Preset, live: Arm) -> Path:
    """The record of a preset's race, or, if it was not run, of the arm `live` and the paper's four, untrained.

    Those are measured here if they were not before (a minute at `tiny`).
    """
    path = RESULTS / preset.name / f"{SLUG}.json"
    if path.is_file():
        return path
    some = [Arm(method, ZERO_SHOT, preset.race.seeds[0]) for method in ("none", "pi", "abf", "xpos_abf")]
    arms = list(dict.fromkeys([*some, live]))
    for arm in track(arms, "measuring arms"):
        run_arm(preset, arm)
    return collect(preset, arms, weights_sha256(locate_base(preset)), preset.run_folder / "records")


def run_race(preset: Preset, arms: Sequence[Arm], folder: Path, slug: str = SLUG, options: str = "") -> Path:
    """Measure every arm that has no record yet, one after another, then join all in folder/SLUG.json."""
    for number, arm in enumerate(arms, start=1):
        run_arm(preset, arm)
        print(f"[{number}/{len(arms)}] {arm}", flush=True)
    return collect(preset, arms, weights_sha256(locate_base(preset)), folder, slug, options)
