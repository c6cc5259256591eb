"""Instruction tuning through TRL, a test for each of its traps that would change the result without a word."""

import dataclasses
import json
import shutil
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from conftest import LORA, RAISED, new_llama
from llama_long_utils.data.instructions import InstructionSequence
from llama_long_utils.model.adapters import AdapterCard, add_lora, find_adapter, load_adapter, read_card, save_adapter
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.base import check_rope, load_base
from llama_long_utils.model.loss import patch_loss
from llama_long_utils.model.weights import load_tokenizer, weights_sha256
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import BaseModel, Data
from llama_long_utils.stages import Instruction
from llama_long_utils.training import adapter as adapter_module
from llama_long_utils.training.adapter import train_adapter
from llama_long_utils.training.instruction import (
    InstructionTrainer,
    instruction_settings,
    instruction_trainer,
    tune_instructions,
    weights_kept,
)
from llama_long_utils.training.processes import Division
from llama_long_utils.training.trainer import StepLog

ALONE = Division(processes=1, context=1, sequences=1, at_once=1)
PLAIN = {"per_device_train_batch_size": 1, "max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(REPOSITORY / "data" / "tiny-llama")


def long_sequences(count=2, tokens=3000):
    generator = np.random.default_rng(0)
    mask = np.zeros(tokens, np.int64)
    mask[-20:] = 1
    return [InstructionSequence(generator.integers(2, 128, tokens), mask) for _ in range(count)]


def rows(sequences):
    columns = {name: [vars(one)[name].tolist() for one in sequences] for name in ("input_ids", "completion_mask")}
    return datasets.Dataset.from_dict(columns)


def adapted(base_folder, dtype="float32"):
    return add_lora(load_base(base_folder, RAISED, dtype=dtype), LORA, seed=0)


def trl_alone(model, sequences, tokenizer, folder, **changes):
    arguments = SFTConfig(output_dir=str(folder), **PLAIN, **{"bf16": False, **changes})
    return SFTTrainer(model=model, args=arguments, train_dataset=rows(sequences), processing_class=tokenizer)


def test_trap_max_length_cuts_at_1024_tokens_and_drops_the_answer(base_folder, tokenizer, tmp_path):
    sequences = long_sequences()
    cut = trl_alone(adapted(base_folder), sequences, tokenizer, tmp_path, completion_only_loss=False)
    assert [len(row) for row in cut.train_dataset["input_ids"]] == [1024, 1024]
    dropped = trl_alone(adapted(base_folder), sequences, tokenizer, tmp_path, completion_only_loss=True)
    assert len(dropped.train_dataset) == 0  # the answers stand at the end
    arguments = {"output_dir": str(tmp_path), **PLAIN}
    build = partial(instruction_trainer, tokenizer=tokenizer, window=3000)
    ours, labels = build(adapted(base_folder), sequences, ALONE, arguments)
    assert [len(row) for row in ours.train_dataset["input_ids"]] == [3000, 3000]
    assert labels == {0: 20, 1: 20}


def test_trap_a_sequence_longer_than_the_window_is_an_error_not_a_cut(base_folder, tokenizer, tmp_path):
    arguments = {"output_dir": str(tmp_path), **PLAIN}
    with pytest.raises(RuntimeError, match="not those of the sequences"):
        instruction_trainer(adapted(base_folder), long_sequences(), ALONE, arguments, tokenizer=tokenizer, window=2990)


def test_trap_loss_on_the_prompt_is_what_the_mask_says(base_folder, tokenizer, tmp_path):
    """completion_only_loss None is False for rows without a column "prompt": the mask would be ignored."""
    sequences = long_sequences(tokens=200)
    ignored = trl_alone(adapted(base_folder), sequences, tokenizer, tmp_path)
    assert ignored.train_dataset["labels"][0] == sequences[0].input_ids.tolist()
    arguments = {"output_dir": str(tmp_path), **PLAIN}
    ours, _ = instruction_trainer(adapted(base_folder), sequences, ALONE, arguments, tokenizer=tokenizer, window=200)
    assert [label != -100 for label in ours.train_dataset["labels"][0]] == sequences[0].completion_mask.astype(
        bool
    ).tolist()


def test_trap_qlora_rounds_the_trained_adapter_to_bf16(base_folder, tokenizer, tmp_path):
    model = adapted(base_folder)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(1e-4)
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    trl_alone(model, long_sequences(tokens=64), tokenizer, tmp_path)
    rounded = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in rounded.values()} == {torch.bfloat16}
    norm = next(name for name in before if "layernorm" in name)
    assert not torch.equal(rounded[norm].float(), before[norm])  # casting back would not help
    kept = adapted(base_folder)
    with torch.no_grad():
        for name, weight in kept.named_parameters():
            if weight.requires_grad:
                weight.copy_(before[name])
    arguments = {"output_dir": str(tmp_path), **PLAIN}
    instruction_trainer(kept, long_sequences(tokens=64), ALONE, arguments, tokenizer=tokenizer, window=64)
    after = {name: weight for name, weight in kept.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_trap_bf16_and_recomputation_are_on_unless_switched_off(base_folder, tokenizer, tmp_path):
    default = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert default.bf16
    assert default.gradient_checkpointing
    arguments = {"output_dir": str(tmp_path), **PLAIN}
    ours, _ = instruction_trainer(
        adapted(base_folder), long_sequences(tokens=64), ALONE, arguments, tokenizer=tokenizer, window=64
    )
    assert not ours.args.bf16
    assert not ours.model.is_gradient_checkpointing


def test_trap_trl_passes_over_a_loss_in_the_model(base_folder, tokenizer, tmp_path):
    """Its own head computes log-probabilities; ours, in the model's forward, is asked by `InstructionTrainer` only."""
    sequences = long_sequences(tokens=64)
    losses, called = [], []
    for trainer in (SFTTrainer, InstructionTrainer):
        model = adapted(base_folder)
        patch_loss(model)
        patched = model.get_base_model().forward

        def counting(*arguments, patched=patched, trainer=trainer, **options):
            called.append(trainer)
            return patched(*arguments, **options)

        model.get_base_model().forward = counting
        config = SFTConfig(
            output_dir=str(tmp_path), **PLAIN, bf16=False, gradient_checkpointing=False, completion_only_loss=True
        )
        with weights_kept(model):
            built = trainer(model=model, args=config, train_dataset=rows(sequences), processing_class=tokenizer)
        batch = built.data_collator([built.train_dataset[0]])
        with torch.no_grad():
            losses.append(float(built.compute_loss(built.model, batch)))
    assert called == [InstructionTrainer]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_trap_an_adapter_is_frozen_unless_it_is_loaded_to_be_trained(base_folder, tmp_path):
    model = adapted(base_folder)
    save_adapter(model, AdapterCard("a test", weights_sha256(base_folder), RAISED, {}, {}, {}), tmp_path / "adapter")
    frozen, trained = (
        load_adapter(
            load_base(base_folder, RAISED, dtype="float32"), tmp_path / "adapter", base_folder, trainable=to_train
        )
        for to_train in (False, True)
    )
    assert not any(weight.requires_grad for weight in frozen.parameters())
    wanted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name, weight in trained.named_parameters() if weight.requires_grad} == wanted
    assert list(trained.peft_config) == ["default"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A preset of a random Llama with three texts, extended from 64 to 512 tokens, and its extended adapter."""
    folder = tmp_path_factory.mktemp("base")
    new_llama(seed=0, vocab_size=2048).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "data" / "tiny-llama" / name, folder)
    texts = tmp_path_factory.mktemp("texts")
    for number in range(3):
        lines = (f"Sentence {n * n + number} of it, which is about {n * 7 + number} stones." for n in range(300))
        (texts / f"{number}.txt").write_text(" ".join(lines))
    tiny = load_preset("tiny")
    training = dataclasses.replace(
        tiny.training, window=512, reach=512, steps=2, sequences_per_step=1, warmup_steps=0, pack=False
    )
    return dataclasses.replace(
        tiny,
        name="small",
        base=BaseModel(str(folder), "float32", window=64, rope_base=1e4, head_dim=32),
        extension=dataclasses.replace(tiny.extension, window=512),
        data=Data([str(texts)], {str(texts): 1}, minimum_characters=100, split_seed=0),
        lora=LORA,
        training=training,
        instruction=Instruction(
            steps=6, learning_rate=1e-3, warmup_steps=1, checkpoint_every=2, short_window=128, tokens_per_question=128,
            quoted_words=4, answer_words=(1, 6), text_share=0.2,
        ),
    )  # fmt: skip


@pytest.fixture
def preset(small, tmp_path, monkeypatch):
    monkeypatch.setattr(type(small), "run_folder", tmp_path / "runs")
    train_adapter(small)
    return small


def numbers(log):
    return [(row["step"], row["tokens"], row["loss"], row["grad_norm"]) for row in log]


def test_a_tuned_adapter_begins_at_the_extended_one_and_is_found(preset, monkeypatch, capsys):
    extended = find_adapter(preset)
    with pytest.raises(ValueError, match="run 09_instruction_tuning"):
        find_adapter(preset, stage="instruction")
    tuned = tune_instructions(preset)
    assert capsys.readouterr().out == ""
    card = read_card(tuned.folder)
    assert card.rope == preset.extended_rope
    assert card.training["start"] == weights_sha256(extended)
    assert card.training["instruction"]["steps"] == 6
    assert card.training["tokens"] == tuned.label_tokens
    assert find_adapter(preset) == extended  # and not the tuned one
    assert find_adapter(preset, stage="instruction") == tuned.folder
    model = load_arm(preset, "extended", adapter=tuned.folder)
    check_rope(model, preset.extended_rope)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (extended, tuned.folder))
    moved = [(after[name] - before[name]).abs().max() for name in before]
    assert 0 < max(moved) < 0.1  # on from there, and not from the start
    monkeypatch.setattr(StepLog, "on_pre_optimizer_step", lambda *_, **__: pytest.fail("trained again"))
    assert tune_instructions(preset) == tuned
    monkeypatch.undo()
    monkeypatch.setattr(type(preset), "run_folder", tuned.folder.parents[2])

    class Doubled(InstructionTrainer):
        def compute_loss(self, *arguments, **options):
            return 2 * super().compute_loss(*arguments, **options)

    arm = tune_instructions(preset, name="arm", trainer_class=Doubled)
    assert arm.log[-1]["loss"] > 1.5 * tuned.log[-1]["loss"]
    assert find_adapter(preset, stage="instruction") == tuned.folder  # not the arm's, which is newer
    other = dataclasses.replace(preset, instruction=dataclasses.replace(preset.instruction, steps=7))
    with pytest.raises(ValueError, match="other instruction"):
        find_adapter(other, stage="instruction")
    again = dataclasses.replace(preset, training=dataclasses.replace(preset.training, learning_rate=1e-4))
    train_adapter(again)
    with pytest.raises(ValueError, match="start = another extension adapter"):  # of the preset as it was before
        find_adapter(again, stage="instruction")


def test_interrupted_it_ends_in_the_same_weights(preset, tmp_path, monkeypatch):
    straight = tune_instructions(preset)
    expected = load_file(straight.folder / "adapter_model.safetensors")
    shutil.rmtree(preset.run_folder / "instruction")
    original = StepLog.on_pre_optimizer_step

    def stop(self, arguments, state, *others, **options):
        if state.global_step == 3:
            raise KeyboardInterrupt
        original(self, arguments, state, *others, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepLog, "on_pre_optimizer_step", stop)
        tune_instructions(preset)
    again = tune_instructions(preset)
    assert numbers(again.log) == numbers(straight.log)
    found = load_file(again.folder / "adapter_model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_the_base_as_it_is_takes_sequences_of_its_own_window(preset):
    settings = dataclasses.replace(preset.instruction, long_share=0.0, text_share=0.0, tokens_per_question=64)
    small = dataclasses.replace(settings, short_window=64, quoted_words=2, answer_words=(1, 4))
    training = instruction_settings(preset, small, extended=False)
    assert (training.window, training.sequences_per_step) == (64, 8)  # the same tokens
    tuned = tune_instructions(preset, settings=small, extended=False)
    assert read_card(tuned.folder).rope == preset.base_rope
    load_arm(preset, "extended", adapter=tuned.folder, scaling=preset.base_rope)


def test_a_step_is_what_transformers_trainer_makes_of_the_same_labels(base_folder, tokenizer, tmp_path):
    """TRL's collator and loop against `Trainer` with labels made by hand: the same loss, accumulated over batches."""
    sequences = [
        InstructionSequence(np.arange(2, 2 + n), (np.arange(n) >= n // 2).astype(np.int64)) for n in (40, 64, 30, 50)
    ]
    arguments = {**PLAIN, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    found = []
    for ours in (True, False):
        model = adapted(base_folder)
        patch_loss(model)
        given = {"output_dir": str(tmp_path / str(ours)), **arguments, "train_sampling_strategy": "sequential"}
        if ours:
            trainer, _ = instruction_trainer(model, sequences, ALONE, given, tokenizer=tokenizer, window=64)
        else:
            from transformers import TrainingArguments

            longest = 64
            padded = [
                {
                    "input_ids": np.pad(one.input_ids, (0, longest - len(one.input_ids)), constant_values=1),
                    "labels": np.pad(
                        np.where(one.completion_mask, one.input_ids, -100),
                        (0, longest - len(one.input_ids)),
                        constant_values=-100,
                    ),
                }
                for one in sequences
            ]
            trainer = Trainer(model=model, args=TrainingArguments(**given), train_dataset=padded)
        trainer.train()
        found.append(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_old_presets_without_the_section_have_its_defaults(tmp_path, monkeypatch):
    assert load_preset("llama2-7b").instruction == Instruction()
    assert load_preset("tiny").instruction.steps == 16
    assert json.dumps(dataclasses.asdict(Instruction()))


def test_other_tokens_than_the_sequences_have_are_an_error_before_anything_is_saved(preset, monkeypatch):
    """Trap: a sampler that leaves rows out trains on less, and a loss looks as ever."""
    whole = adapter_module.train
    monkeypatch.setattr(
        adapter_module, "train", lambda *given, **options: [row | {"tokens": 1} for row in whole(*given, **options)]
    )
    with pytest.raises(RuntimeError, match=r"1 tokens were trained on, not the [\d,]+ of the sequences"):
        tune_instructions(preset)
    assert not [*preset.run_folder.glob("instruction/*/adapter")]
