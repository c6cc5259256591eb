import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import experiments.attention  # noqa: F401 (registers s2)
from conftest import LORA, RAISED, new_llama, training_sequences
from experiments.pretraining import leaving_off
from llama_long_utils.cache import digest
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.packing import skip_positions
from llama_long_utils.evaluation.perplexity import token_nll
from llama_long_utils.model.adapters import AdapterCard, add_lora, load_adapter, save_adapter
from llama_long_utils.model.base import load_base
from llama_long_utils.model.weights import weights_sha256
from llama_long_utils.paths import file_sha256
from llama_long_utils.settings import METHODS, MemorySavings, TrainingSettings
from llama_long_utils.training.trainer import CHECKSUMS, StepLog, last_whole_checkpoint, run_key, train

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


def sequences(count=24, window=64):
    # Pieces of very different lengths, so that a mean of means differs from the mean over tokens.
    generator = np.random.default_rng(0)
    documents = [
        TokenizedDocument("mine", str(n), generator.integers(2, 100, size).astype(np.int32))
        for n, size in enumerate([300, 7, 40, 90, 5, 21, 130, 3])
    ]
    return training_sequences(documents, window, count, padding_id=1, seed=0)


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


def test_accumulation_does_not_change_the_step(tmp_path):
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
    data = training_sequences([text], 64, 8, padding_id=1, seed=0, pack=False)
    data = list(skip_positions(data, reach, seed=0))
    log = train(add_lora(base, LORA, seed=0), data, settings, tmp_path)
    assert log[-1]["tokens"] == 8 * 63


def interrupted_after(monkeypatch, step):
    """Ctrl-C when a step has been logged, and before its checkpoint would be written."""
    original = StepLog.on_log

    def on_log(self, arguments, state, *others, **options):
        original(self, arguments, state, *others, **options)
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(StepLog, "on_log", on_log)


def assert_equal_weights(model, other):
    expected = trained_weights(other)
    assert all(torch.equal(weight, expected[name]) for name, weight in trained_weights(model).items())


def test_an_interrupted_run_ends_in_the_same_weights_bit_for_bit(base_folder, tmp_path, monkeypatch, capsys):
    straight = lora_model(base_folder)
    whole_log = train(straight, sequences(), SETTINGS, tmp_path / "straight")
    stopped = lora_model(base_folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="from the checkpoint of step 4"):
        interrupted_after(patch, 5)
        train(stopped, sequences(), SETTINGS, tmp_path / "stopped")
    assert capsys.readouterr().out == ""
    with pytest.raises(RuntimeError, match="weights of an interrupted run: build it anew"):
        train(stopped, sequences(), SETTINGS, tmp_path / "stopped")
    (tmp_path / "stopped" / "checkpoint-99").mkdir()  # one that was not written to its end

    resumed = lora_model(base_folder)
    log = train(resumed, sequences(), SETTINGS, tmp_path / "stopped")
    said = capsys.readouterr().out
    assert "checkpoint-99 of stopped is not whole and is passed over" in said
    assert "an interrupted run continues after step 4 of 6\n" in said
    assert [row["tokens"] for row in log] == [row["tokens"] for row in whole_log]
    assert [row["loss"] for row in log] == [row["loss"] for row in whole_log]
    assert_equal_weights(resumed, straight)


def test_a_run_that_leaves_off_goes_on_with_longer_sequences(tmp_path):
    straight = new_llama(seed=0)
    log = train(straight, sequences(), SETTINGS, tmp_path / "straight")
    before = train(new_llama(seed=0), sequences(), SETTINGS, tmp_path / "run", build=partial(leaving_off, 3))
    assert [row["loss"] for row in before] == [row["loss"] for row in log[:3]]
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    same = new_llama(seed=0)
    train(same, sequences(), SETTINGS, tmp_path / "same")
    assert_equal_weights(same, straight)

    longer = dataclasses.replace(SETTINGS, window=128, reach=128, sequences_per_step=2)
    after = train(new_llama(seed=1), sequences(12, window=128), longer, tmp_path / "run")
    assert after[:3] == before
    assert [row["learning_rate"] for row in after] == [row["learning_rate"] for row in log]


def test_a_run_that_left_no_checkpoint_says_that_it_begins_again(base_folder, tmp_path, monkeypatch, capsys):
    settings = dataclasses.replace(SETTINGS, steps=2, checkpoint_every=100)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="no checkpoint was written yet"):
        interrupted_after(patch, 1)
        train(lora_model(base_folder), sequences(8), settings, tmp_path / "run")
    train(lora_model(base_folder), sequences(8), settings, tmp_path / "run")
    assert "after step 0 of 2: it left no checkpoint (there is one every 100)" in capsys.readouterr().out


def test_a_finished_run_is_only_read(base_folder, tmp_path, monkeypatch, capsys):
    model = lora_model(base_folder)
    log = train(model, sequences(), SETTINGS, tmp_path / "run")

    def no_step(self, *arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(StepLog, "on_pre_optimizer_step", no_step)
    again = lora_model(base_folder)
    assert train(again, sequences(), SETTINGS, tmp_path / "run") == log
    assert_equal_weights(again, model)
    assert capsys.readouterr().out == ""


def test_stages_may_train_one_model_in_turn(tmp_path):
    model, settings = new_llama(seed=0), dataclasses.replace(SETTINGS, steps=1)
    first = train(model, sequences(4), settings, tmp_path / "first")
    assert train(model, sequences(4), settings, tmp_path / "second")[0]["loss"] == pytest.approx(first[0]["loss"])


def test_numbers_that_are_not_finite_stop_the_run_at_that_step(base_folder, tmp_path):
    model = lora_model(base_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = torch.nan
    with pytest.raises(RuntimeError, match="step 1: loss nan, gradient norm nan: training stops"):
        train(model, sequences(), SETTINGS, tmp_path / "nan")
    model, backward_passes = lora_model(base_folder), []

    def overflow_in_step_two(gradient):
        backward_passes.append(1)
        return gradient * torch.inf if len(backward_passes) == 3 else gradient

    next(w for name, w in model.named_parameters() if "lora_B" in name).register_hook(overflow_in_step_two)
    with pytest.raises(RuntimeError, match=r"step 2: loss \d.*, gradient norm (inf|nan): training stops"):
        train(model, sequences(), SETTINGS, tmp_path / "inf")
    assert not list(tmp_path.glob("*/checkpoint-*"))


@pytest.fixture(scope="module")
def stopped_run(base_folder, tmp_path_factory):
    """A run with two checkpoints, of which the newer will be broken, and the model that it ends in."""
    folder = tmp_path_factory.mktemp("run")
    model = lora_model(base_folder)
    train(model, sequences(), SETTINGS, folder)
    whole = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(folder / "checkpoint-4", whole / "checkpoint-4")
    shutil.copytree(folder / "checkpoint-4", whole / "checkpoint-5")
    return whole, model


FAULTS = {
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no schedule": lambda folder: (folder / "scheduler.pt").unlink(),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "half an optimizer": lambda folder: (folder / "optimizer.pt").write_bytes(
        (folder / "optimizer.pt").read_bytes()[:1000]
    ),
    "a state that is a list": lambda folder: (folder / "trainer_state.json").write_text("[]"),
    "an empty state": lambda folder: (folder / "trainer_state.json").write_text("{}"),
    "half a state": lambda folder: (folder / "trainer_state.json").write_text('{"global_st'),
    "no checksums": lambda folder: (folder / CHECKSUMS).unlink(),
    "empty checksums": lambda folder: (folder / CHECKSUMS).write_text("{}"),
    "checksums that are a list": lambda folder: (folder / CHECKSUMS).write_text("[]"),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_not_whole_is_passed_over_for_the_one_before(stopped_run, tmp_path, fault):
    folder = shutil.copytree(stopped_run[0], tmp_path / "run")
    (folder / "checkpoint-abc").mkdir()  # an odd name is nobody's
    assert last_whole_checkpoint(folder) == (folder / "checkpoint-5", [])
    FAULTS[fault](folder / "checkpoint-5")
    checkpoint, (line,) = last_whole_checkpoint(folder)
    assert checkpoint == folder / "checkpoint-4"
    assert "checkpoint-5 of run is not whole and is passed over" in line
    assert not (folder / "checkpoint-5").exists()
    assert last_whole_checkpoint(tmp_path / "nothing") == (None, [])


def test_the_checkpoint_before_leads_to_the_same_weights(base_folder, stopped_run, tmp_path):
    folder = shutil.copytree(stopped_run[0], tmp_path / "run")
    (folder / "checkpoint-5" / "rng_state.pth").unlink()
    resumed = lora_model(base_folder)
    train(resumed, sequences(), SETTINGS, folder)
    assert_equal_weights(resumed, stopped_run[1])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_not_executed(base_folder, stopped_run, tmp_path, name):
    """Even with checksums that fit."""
    folder = shutil.copytree(stopped_run[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-5")
    torch.save({"state": Malicious(tmp_path / "executed")}, folder / "checkpoint-4" / name)
    sums = json.loads((folder / "checkpoint-4" / CHECKSUMS).read_text())
    sums[name] = file_sha256(folder / "checkpoint-4" / name)
    (folder / "checkpoint-4" / CHECKSUMS).write_text(json.dumps(sums))
    assert last_whole_checkpoint(folder)[0] is not None
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        train(lora_model(base_folder), sequences(), SETTINGS, folder)
    assert not (tmp_path / "executed").exists()


def test_training_stops_at_once_if_a_gradient_is_missing(base_folder, tmp_path):
    model = lora_model(base_folder)
    next(w for name, w in model.named_parameters() if "lora_B" in name).requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"1 of \d+ trained weights got no gradient, the first .*lora_B"):
        train(model, sequences(), SETTINGS, tmp_path)
    model = lora_model(base_folder)
    model.unused = torch.nn.Parameter(torch.ones(3))  # as a norm was whose copy ran the original's weight
    with pytest.raises(RuntimeError, match=r"1 of \d+ trained weights got no gradient, the first unused"):
        train(model, sequences(), SETTINGS, tmp_path / "norm")


def test_wrong_number_of_sequences_is_refused(tmp_path):
    with pytest.raises(ValueError, match="need 24 sequences of 64 tokens, got 3 of 64"):
        train(new_llama(seed=0), sequences(3), SETTINGS, tmp_path)


def test_settings_are_validated():
    with pytest.raises((ValueError, ValidationError), match="must be a multiple"):
        dataclasses.replace(SETTINGS, sequences_per_step=3)


def test_the_key_of_a_run_follows_everything_that_its_weights_depend_on():
    def name(settings=SETTINGS, data="texts", **other):
        return digest(run_key(settings, data, **other))

    one = name()
    assert one == name()
    names = [
        name(dataclasses.replace(SETTINGS, seed=1)),
        name(data="other texts"),
        name(rope=RAISED),
    ]
    assert len({one, *names}) == 4
