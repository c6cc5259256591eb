"""From a preset to a trained adapter in its run folder: planned, resumed, saved with its card.

Every stage has its own folder in runs/PRESET, "training" for the extension itself.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors import SafetensorError

from llama_long_utils.cache import Cache
from llama_long_utils.data.mixture import Mixture, reading_table
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.model.adapters import AdapterCard, add_lora, read_card, save_adapter
from llama_long_utils.model.attention import DOCUMENTS
from llama_long_utils.model.base import check_rope, load_base
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.paths import alone, out_of_space
from llama_long_utils.records import package_versions
from llama_long_utils.settings import Preset, Scaling, TrainingSettings
from llama_long_utils.training.planner import USABLE, Plan, plan_training, unreadable
from llama_long_utils.training.processes import divide, join_processes, shard_base
from llama_long_utils.training.trainer import VERSION, run_key, train

FULL = 2**20  # bytes: a disk with less room


@dataclass(frozen=True)
class TrainedAdapter:
    """A finished run: the adapter's folder, `train`'s rows, settings with the plan, labels trained on."""

    folder: Path
    log: list[dict[str, float]]
    settings: TrainingSettings
    label_tokens: int


def train_adapter(
    preset: Preset,
    *,
    settings: TrainingSettings | None = None,
    scaling: Scaling | None = None,
    name: str = "",
    progress: int = 0,
    context_parallel: int = 1,
    sharded_base: bool = False,
) -> TrainedAdapter:
    """Train LoRA on a preset's base, from a new adapter or the last whole checkpoint; a finished run is only read.

    The run folder, runs/PRESET/training/NAME-KEY, is named by everything that the weights depend on, up to rounding. So
    a run goes on with another device of the same dtype, other libraries, or more processes, the first of which writes.

    `settings` and `scaling` come in place of the preset's [training] and its extended RoPE; the planner adds what the
    preset's memory needs. The run folder's name begins with `name`, or the RoPE method. A line is printed every
    `progress` steps. `context_parallel` processes share each sequence; with `sharded_base` each has a part of the base.

    Raises:
        ValueError: a number, the base or the documents do not fit the preset, no plan fits the memory, or a step does
            not divide among the processes.
        RuntimeError: no base can be had, numbers are not finite, the disk is full, or another process is at this run.
    """
    settings, scaling = settings or preset.training, scaling or preset.extended_rope
    state = join_processes()
    division = divide(settings, state.num_processes, context_parallel, sharded_base)
    if context_parallel > 1 and scaling.method in ("dynamic_ntk", "xpos_abf"):
        raise ValueError(f"RoPE of method {scaling.method!r} needs whole sequences: train without --context-parallel")
    if not state.is_main_process:
        state.wait_for_everyone()  # until the first has filled the caches
    plan, base = plan_training(preset, settings, division), locate_base(preset)
    tokenizer = load_tokenizer(base)
    documents = Mixture(preset.data, tokenizer, window=settings.window)
    reading = documents.reading(settings)
    lengths = [document.tokens for document in documents.held_out()]  # too few are said now, not after the training
    sequences = TrainingData(documents, settings, tokenizer)

    def build() -> PeftModel:
        masked = settings.pack and settings.attention == "sdpa" and state.device.type == "cpu"  # twice the time
        attention = DOCUMENTS if masked else settings.attention
        options = {"dtype": preset.base.dtype, "attention": attention, "on_host": sharded_base}
        return add_lora(load_base(base, scaling, **options), preset.lora, seed=settings.seed)

    def load() -> PeftModel:
        if progress and state.is_main_process:
            lines = [reading_table(reading).to_string(index=False)]
            if len(lengths) < 8:
                lines.append("fewer than eight documents are held out: no intervals")
            if lengths and max(lengths) < preset.evaluation.tokens:
                wanted = f"evaluation.tokens = {preset.evaluation.tokens:,}"
                lines.append(f"{wanted}: the longest of {len(lengths)} held-out documents has {max(lengths):,} tokens")
            print("\n".join([*lines, *unreadable(preset)]), flush=True)
        return shard_base(build) if sharded_base else build()

    given = {"depends_on": {"data": sequences.key, "base_bits": "nf4"}, "noted": {"read": reading}}
    options = {"report_every": progress, "context_parallel": context_parallel}
    folder = "training", name or scaling.method
    return train_stage(preset, folder, settings, plan, scaling, load, sequences, **given, **options)


def train_stage(
    preset: Preset,
    folder: tuple[str, str],
    settings: TrainingSettings,
    plan: Plan,
    rope: Scaling,
    load: Callable[[], PeftModel],
    sequences: Sequence[Any],
    *,
    depends_on: dict[str, Any],
    noted: dict[str, Any],
    labels: int | None = None,
    **options: Any,
) -> TrainedAdapter:
    """Train what `load` gives, by the plan, in runs/PRESET/STAGE/NAME-KEY, and save it; `folder` is (STAGE, NAME).

    The key is made of what the weights depend on: settings, base, RoPE, LoRA and what `depends_on` adds, a digest of
    the "data" at least. The card says what is `noted`, too. `options` are those of `trainer.train`. Raises as
    `run_or_read`; RuntimeError if other than `labels` tokens were trained on, before anything is saved.
    """
    (stage, name), savings, base_sha256 = folder, plan.memory_savings, weights_sha256(locate_base(preset))
    asked = replace(settings.memory_savings, optimizer=savings.optimizer)  # what else a plan saves changes no gradient
    depends_on = {"base": base_sha256, "rope": rope, "dtype": preset.base.dtype, "lora": preset.lora, **depends_on}
    key = run_key(replace(settings, memory_savings=asked, checkpoint_every=1), **depends_on)
    runs = Cache(preset.run_folder / stage, VERSION, key)
    settings, run = replace(settings, memory_savings=savings), runs.path(name, {}, "")

    def work() -> list[dict[str, float]]:
        model, room = load(), preset.memory_gib * USABLE - plan.device_gib
        log = train(model, sequences, settings, run, gaps_gib=room / 2, **options)
        check_rope(model, rope)
        if labels not in (None, log[-1]["tokens"]):
            raise RuntimeError(f"{log[-1]['tokens']:,} tokens were trained on, not the {labels:,} of the sequences")
        own = {**asdict(settings), "lora": asdict(preset.lora), **noted, "tokens": log[-1]["tokens"], "run": run.name}
        card = AdapterCard(preset.base.source, base_sha256, rope, asdict(preset.data), own, package_versions())
        if join_processes().is_main_process:
            save_adapter(model, card, run / "adapter")
        return log

    log = run_or_read(runs, name, work)
    return TrainedAdapter(run / "adapter", log, settings, int(log[-1]["tokens"]))


def run_or_read(runs: Cache, name: str, work: Callable[[], list[dict[str, float]]]) -> list[dict[str, float]]:
    """The rows of a finished run of this name, or those that `work` returns once it has saved the run's adapter.

    All processes of a launcher call it. RuntimeError if the disk is full, or another process is at this run.
    """
    state, folder, log_file = join_processes(), runs.path(name, {}, ""), runs.path(name, {}, ".json")

    def begin() -> list[dict[str, float]]:
        broadcast_object_list([None])  # so that the others begin, too
        return work()

    if not state.is_main_process:
        (log,) = broadcast_object_list([None])
        if log is None:
            work()
            (log,) = broadcast_object_list([None])
        return log
    state.wait_for_everyone()
    with alone(folder.with_name(f"{folder.name}.lock"), f"another process is training in {folder}"):
        for left in folder.glob(".adapter.*"):  # by a process that was killed while it saved
            shutil.rmtree(left)
        if not _is_whole(folder / "adapter"):
            log_file.unlink(missing_ok=True)
        try:
            log = runs.value(name, begin)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch does not say that a disk is full
            if shutil.disk_usage(folder.parent).free > FULL and not out_of_space(error):
                raise
            goes_on = f"training continues from the last whole checkpoint ({error})"
            raise RuntimeError(f"the disk that holds {folder} is full: make room and run again; {goes_on}") from error
    broadcast_object_list([log])
    return log


def _is_whole(adapter: Path) -> bool:
    try:
        read_card(adapter)
    except ValueError as error:
        if adapter.exists():
            print(f"the adapter is made again from its run's last checkpoint: {error}", flush=True)
        return False
    return True
