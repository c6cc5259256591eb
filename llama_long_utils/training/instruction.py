"""Instruction tuning of an extended model by TRL's `SFTTrainer`.

TRL masks, cuts and pads; the rest is as in `train_adapter`. Three of its defaults would change the result without a
word: sequences are cut at 1,024 tokens, a preset of fp32 is trained in bf16, and in 4 bits the trained adapter is
rounded to bf16. Its own loss is chunked, too, but computes all products twice, and on a CPU those without labels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from llama_long_utils.cache import digest
from llama_long_utils.data.instructions import InstructionSequence, Maker, dialogue_maker, instruction_sequences
from llama_long_utils.data.mixture import Mixture
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.model.adapters import OWN_ARM, add_lora, find_adapter, load_adapter
from llama_long_utils.model.base import load_base
from llama_long_utils.model.weights import load_tokenizer, locate_base, weights_sha256
from llama_long_utils.settings import IGNORED_LABEL, Preset, TrainingSettings
from llama_long_utils.stages import Instruction
from llama_long_utils.training.adapter import TrainedAdapter, train_stage
from llama_long_utils.training.planner import plan_training
from llama_long_utils.training.processes import Division, divide, join_processes, use_one_gpu
from llama_long_utils.training.trainer import Labels

STAGE = "instruction"  # its settings, and its folder in runs/PRESET


class InstructionTrainer(SFTTrainer):
    """With the loss that `patch_loss` put into the model's forward, in place of TRL's own."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        return Trainer.compute_loss(self, *arguments, **options)


@contextmanager
def weights_kept(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """TRL rounds what is trained to bf16 where the base has 4 bits: afterwards it is as it was before."""
    before = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if name in before:
            weight.data = before[name]


def instruction_trainer(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[InstructionSequence],
    division: Division,
    arguments: dict[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    trainer_class: type[InstructionTrainer] = InstructionTrainer,
) -> tuple[Trainer, Labels]:
    """As `plain_trainer`, by TRL. RuntimeError if TRL would train on other tokens than the sequences say."""
    config = SFTConfig(
        **arguments,
        max_length=window,
        completion_only_loss=True,  # what counts as completion, the sequences say
        gradient_checkpointing=False,  # `apply_memory_savings` has switched on what is needed
        bf16=False,  # `in_compute_dtype` autocasts if the base is bf16
    )
    use_one_gpu(config)
    datasets.disable_progress_bars()
    columns = {name: [vars(one)[name].tolist() for one in sequences] for name in ("input_ids", "completion_mask")}
    with weights_kept(model):
        trainer = trainer_class(
            model=model, args=config, train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer
        )
    counts = [sum(label != IGNORED_LABEL for label in row[1:]) for row in trainer.train_dataset["labels"]]
    if counts != [sequence.label_tokens for sequence in sequences]:
        raise RuntimeError(f"TRL would train on {sum(counts):,} tokens, which are not those of the sequences")
    return trainer, dict(enumerate(counts)) if join_processes().is_main_process else {}  # which counts for all


def instruction_settings(preset: Preset, settings: Instruction, *, extended: bool = True) -> TrainingSettings:
    """[training] with the numbers of instruction tuning; the base as it is takes sequences of its own window."""
    numbers = {name: value for name, value in asdict(settings).items() if hasattr(preset.training, name)}
    numbers["window"] = numbers["reach"] = settings.window or preset.training.window
    training = replace(preset.training, **numbers, pack=False, self_quoting_share=0.0)
    if extended:
        return training
    window = min(preset.base.window, training.window)
    many = settings.sequences_per_step * (training.window // window)
    return replace(training, window=window, reach=window, sequences_per_step=many)


def tune_instructions(
    preset: Preset,
    *,
    settings: Instruction | None = None,
    adapter: Path | str | None = None,
    extended: bool = True,
    long_dialogue: Maker | None = None,
    name: str = OWN_ARM,
    trainer_class: type[InstructionTrainer] = InstructionTrainer,
    progress: int = 0,
) -> TrainedAdapter:
    """Train the extended model's adapter on instructions; as `train_adapter`, in runs/PRESET/instruction.

    `settings` come in place of the preset's [instruction], `long_dialogue` in place of the maker that they name. It
    begins at `adapter`, or at what `find_adapter` finds; not `extended`, at a new one on the base with its RoPE as it
    is, on short sequences. The run folder's name begins with `name`: another is an experiment's arm, which
    `find_adapter` passes over. `trainer_class` may have another loss. Raises as `train_adapter` and `find_adapter`.
    """
    settings, state = settings or preset.instruction, join_processes()
    dialogue_maker(settings)  # there is one
    scaling, training = preset.extended_rope, instruction_settings(preset, settings, extended=extended)
    if not extended:
        scaling, settings = preset.base_rope, replace(settings, sequences_per_step=training.sequences_per_step)
    division = divide(training, state.num_processes)
    if not state.is_main_process:
        state.wait_for_everyone()  # until the first has filled the caches
    base = locate_base(preset)
    start = find_adapter(preset, adapter) if extended else None
    plan = plan_training(preset, training, division)
    tokenizer = load_tokenizer(base)
    mixture = Mixture(preset.data, tokenizer, window=training.window)
    options = {"texts": TrainingData(mixture, training, tokenizer), "long_dialogue": long_dialogue}
    documents = next(mixture.buffers(training))
    sequences = instruction_sequences(documents, tokenizer, settings, training.window, **options)

    def load() -> PeftModel:
        model = load_base(base, scaling, dtype=preset.base.dtype, attention=training.attention)
        if start:
            return load_adapter(model, start, base, trainable=True)
        return add_lora(model, preset.lora, seed=settings.seed)

    began = weights_sha256(start) if start else None
    data = digest([[one.input_ids, one.completion_mask] for one in sequences])
    depends_on = {"data": data, "start": began, "base_bits": "nf4"}
    depends_on |= {"trainer": trainer_class.__name__} if trainer_class is not InstructionTrainer else {}
    given = {"depends_on": depends_on, "noted": {STAGE: asdict(settings), "start": began, "arm": name}}
    build = partial(instruction_trainer, tokenizer=tokenizer, window=training.window, trainer_class=trainer_class)
    options = {"report_every": progress, "build": build, "labels": sum(one.label_tokens for one in sequences)}
    return train_stage(preset, (STAGE, name), training, plan, scaling, load, sequences, **given, **options)
