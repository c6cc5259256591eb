import dataclasses

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from conftest import LORA, RAISED, new_llama
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.packing import skip_positions, training_sequences
from llama_long_utils.evaluation.perplexity import token_nll
from llama_long_utils.model.adapters import AdapterCard, add_lora, load_adapter, save_adapter
from llama_long_utils.model.base import load_base
from llama_long_utils.model.weights import weights_sha256
from llama_long_utils.settings import METHODS, MemorySavings, TrainingSettings
from llama_long_utils.training.trainer import ChunkedLossTrainer, last_whole_checkpoint, run_fingerprint, train

SETTINGS = TrainingSettings(
    window=64,
    reach=64,
    pack=True,
    attention="sdpa",
    steps=6,
    sequences_per_step=4,
    sequences_at_once=2,
    learning_rate=1e-3,
    warmup_steps=2,
    weight_decay=0.0,
    gradient_clipping=1.0,
    memory_savings=MemorySavings(recomputed_layers=9, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused"),
    long_document_weight=1.0,
    self_quoting_share=0.0,
    checkpoint_every=2,
    seed=0,
)


def sequences(count=24):
    # Pieces of very different lengths, so that a mean of means differs from the mean over tokens.
    generator = np.random.default_rng(0)
    documents = [
        TokenizedDocument("mine", str(n), generator.integers(2, 100, size).astype(np.int32))
        for n, size in enumerate([300, 7, 40, 90, 5, 21, 130, 3])
    ]
    return training_sequences(documents, 64, count, padding_id=1, seed=0)


def lora_model(base_folder):
    return add_lora(load_base(base_folder, RAISED, dtype="bfloat16"), LORA, seed=0)


def trained_weights(model):
    return {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}


def test_tiles_and_offloading_change_no_step(base_folder, tmp_path):
    plain = SETTINGS.memory_savings
    runs = []
    lean = dataclasses.replace(plain, recomputed_layers=1, tile=24, offload_checkpoints=True, optimizer="adamw_8bit")
    for memory_savings in (plain, lean):
        settings = dataclasses.replace(SETTINGS, memory_savings=memory_savings)
        runs.append(train(lora_model(base_folder), sequences(), settings, tmp_path / str(memory_savings.tile)))
    for plain, tiled in zip(*runs, strict=True):
        assert tiled["loss"] == pytest.approx(plain["loss"], rel=2e-3)  # bf16


def test_trap_11_accumulation_does_not_change_the_step(tmp_path):
    logs, weights = [], []
    for at_once in (4, 1):
        model = new_llama(seed=0)
        settings = dataclasses.replace(SETTINGS, sequences_at_once=at_once, steps=2)
        logs.append(train(model, sequences(8), settings, tmp_path / str(at_once)))
        weights.append(trained_weights(model))
    for whole, accumulated in zip(*logs, strict=True):
        assert whole["loss"] == pytest.approx(accumulated["loss"], rel=1e-5)
        assert whole["grad_norm"] == pytest.approx(accumulated["grad_norm"], rel=1e-4)
        assert whole["tokens"] == accumulated["tokens"]


def test_loss_is_per_token_and_tokens_are_counted_exactly(tmp_path):
    data = sequences()
    log = train(new_llama(seed=0), data, SETTINGS, tmp_path)
    assert [row["step"] for row in log] == list(range(1, 7))
    assert log[-1]["tokens"] == sum(sequence.label_tokens for sequence in data)
    assert log[0]["loss"] == pytest.approx(np.log(128), rel=0.05)  # a random model guesses
    assert log[-1]["peak_gib"] > 0


def test_schedule_is_warm_up_then_cosine(tmp_path):
    log = train(new_llama(seed=0), sequences(), SETTINGS, tmp_path)
    rates = [row["learning_rate"] for row in log]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1e-3)
    assert rates[2:] == sorted(rates[2:], reverse=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_goes_back_onto_its_base(base_folder, tmp_path, method):
    factors = {"pair_factors": (2.0,) * 16} if method == "longrope" else {}
    rope = dataclasses.replace(RAISED, method=method, **factors)
    model = add_lora(load_base(base_folder, rope, dtype="float32"), LORA, seed=0)
    log = train(model, sequences(8), dataclasses.replace(SETTINGS, steps=2), tmp_path / "run")
    assert all(np.isfinite(row["loss"]) for row in log)
    card = AdapterCard("a test", weights_sha256(base_folder), rope, {}, {}, {})
    save_adapter(model, card, tmp_path / "adapter")
    base = load_base(base_folder, rope, dtype="float32")
    loaded = load_adapter(base, tmp_path / "adapter", base_folder)
    text = TokenizedDocument("mine", "long", (np.arange(200) % 100).astype(np.int32))
    np.testing.assert_allclose(token_nll(loaded, text, 200), token_nll(model, text, 200), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("reach", "attention"), [(64, "sdpa"), (512, "sdpa"), (64, "s2"), (512, "s2")])
def test_short_training_for_a_long_window(base_folder, tmp_path, reach, attention):
    settings = dataclasses.replace(SETTINGS, reach=reach, pack=False, attention=attention, steps=2)
    base = load_base(base_folder, RAISED, dtype="float32", attention=attention)
    text = TokenizedDocument("mine", "long", (np.arange(1000) % 100).astype(np.int32))
    data = skip_positions(training_sequences([text], 64, 8, padding_id=1, seed=0, pack=False), reach, seed=0)
    log = train(add_lora(base, LORA, seed=0), data, settings, tmp_path)
    assert log[-1]["tokens"] == 8 * 63


def test_a_killed_run_goes_on_and_ends_in_the_same_weights(base_folder, tmp_path, monkeypatch):
    straight = lora_model(base_folder)
    whole_log = train(straight, sequences(), SETTINGS, tmp_path / "straight")

    original = ChunkedLossTrainer.training_step

    def killed(self, *arguments, **options):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ChunkedLossTrainer, "training_step", killed)
        train(lora_model(base_folder), sequences(), SETTINGS, tmp_path / "killed")
    (tmp_path / "killed" / "checkpoint-99").mkdir()  # a checkpoint that was not written to its end

    resumed = lora_model(base_folder)
    log = train(resumed, sequences(), SETTINGS, tmp_path / "killed")
    assert [row["tokens"] for row in log] == [row["tokens"] for row in whole_log]
    for name, weight in trained_weights(straight).items():
        torch.testing.assert_close(trained_weights(resumed)[name], weight, atol=1e-6, rtol=1e-4)


def test_a_finished_run_is_only_read(base_folder, tmp_path, monkeypatch):
    model = lora_model(base_folder)
    log = train(model, sequences(), SETTINGS, tmp_path)

    def no_step(self, *arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(ChunkedLossTrainer, "training_step", no_step)
    again = lora_model(base_folder)
    assert train(again, sequences(), SETTINGS, tmp_path) == log
    for name, weight in trained_weights(model).items():
        torch.testing.assert_close(trained_weights(again)[name], weight)


def test_trap_16_training_stops_at_once_if_a_gradient_is_missing(base_folder, tmp_path):
    model = lora_model(base_folder)
    next(w for name, w in model.named_parameters() if "lora_B" in name).requires_grad_(False)
    with pytest.raises(RuntimeError, match="1 of 14 LoRA-B matrices got no gradient"):
        train(model, sequences(), SETTINGS, tmp_path)


def test_half_written_checkpoint_is_passed_over(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_whole_checkpoint(tmp_path / "nothing") is None


def test_wrong_number_of_sequences_is_refused(tmp_path):
    with pytest.raises(ValueError, match="need 24 sequences of 64 tokens, got 3 of 64"):
        train(new_llama(seed=0), sequences(3), SETTINGS, tmp_path)


def test_settings_are_validated():
    with pytest.raises((ValueError, ValidationError), match="must be a multiple"):
        dataclasses.replace(SETTINGS, sequences_per_step=3)


def test_fingerprint_follows_settings_and_data():
    one = run_fingerprint(SETTINGS, sequences())
    assert one == run_fingerprint(SETTINGS, sequences())
    assert one != run_fingerprint(dataclasses.replace(SETTINGS, seed=1), sequences())
    assert one != run_fingerprint(SETTINGS, sequences()[::-1])
    assert one != run_fingerprint(SETTINGS, sequences(), rope_base=5e5)
