import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import LORA, new_llama
from llama_long_utils import train as train_command
from llama_long_utils.data import mixture, tokens
from llama_long_utils.data.mixture import read_documents
from llama_long_utils.evaluation.perplexity import token_nll
from llama_long_utils.model.adapters import find_adapter, read_card
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import ADAPTERS, REPOSITORY, alone
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import BaseModel, Data
from llama_long_utils.training.adapter import train_adapter
from llama_long_utils.training.trainer import StepLog

TUNED = str(ADAPTERS / "tiny-instruction")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A preset of a random Llama with the tiny one's tokenizer, and three texts."""
    folder = tmp_path_factory.mktemp("base with ünicode")
    new_llama(seed=0, vocab_size=2048).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "data" / "tiny-llama" / name, folder)
    texts = tmp_path_factory.mktemp("texts")
    for number in range(3):
        (texts / f"{number}.txt").write_text(" ".join(f"Sentence {n * n + number} of it." for n in range(200)))
    tiny = load_preset("tiny")
    training = dataclasses.replace(
        tiny.training, window=64, reach=64, steps=8, sequences_per_step=2, warmup_steps=2, checkpoint_every=3
    )
    return dataclasses.replace(
        tiny,
        name="small",
        base=BaseModel(str(folder), "float32", window=64, rope_base=1e4, head_dim=32),
        extension=dataclasses.replace(tiny.extension, window=512),
        data=Data([str(texts)], {str(texts): 1}, minimum_characters=100, split_seed=0),
        lora=LORA,
        training=training,
    )


@pytest.fixture
def preset(small, tmp_path, monkeypatch):
    monkeypatch.setattr(type(small), "run_folder", tmp_path / "runs")
    return small


def test_a_tokenizer_with_more_tokens_than_the_base_embeds_is_refused_before_texts_are_read(preset, tmp_path):
    """Training would end in torch's "index out of range in self"."""
    folder = tmp_path / "base"
    shutil.copytree(preset.base.source, folder)
    new_llama(seed=0, vocab_size=500).to(torch.bfloat16).save_pretrained(folder)
    base = dataclasses.replace(preset.base, source=str(folder))
    data = dataclasses.replace(preset.data, sources=["no such texts"])
    with pytest.raises(ValueError, match=r"its tokenizer has [\d,]+ tokens, its config.json a vocab_size of 500"):
        train_adapter(dataclasses.replace(preset, base=base, data=data))


def test_a_base_that_does_not_fit_is_refused_before_its_weights_are_looked_for(preset, tmp_path):
    new_llama(seed=0).config.save_pretrained(tmp_path / "no weights")
    large = dataclasses.replace(preset, base=dataclasses.replace(preset.base, source=str(tmp_path / "no weights")))
    with pytest.raises(ValueError, match=r"not even 1,024 tokens would; .*let several devices share .*--shard-base"):
        train_adapter(dataclasses.replace(large, memory_gib=1e-4))
    with pytest.raises(ValueError, match="one process has nobody to share the base with"):
        train_adapter(large, sharded_base=True)


@pytest.fixture(scope="module")
def expected(small, tmp_path_factory):
    """The adapter that an uninterrupted run of `small` ends in, and its log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(small), "run_folder", tmp_path_factory.mktemp("straight"))
        trained = train_adapter(small)
    return load_file(trained.folder / "adapter_model.safetensors"), trained.log


def assert_equal_weights(folder, expected):
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def numbers(log):
    return [(row["step"], row["tokens"], row["loss"], row["grad_norm"]) for row in log]


def no_step(self, *arguments, **options):
    raise AssertionError("trained again")


def stopped_at(monkeypatch, step, error=KeyboardInterrupt):
    original = StepLog.on_pre_optimizer_step

    def on_pre_optimizer_step(self, arguments, state, *others, **options):
        if state.global_step == step:
            raise error
        original(self, arguments, state, *others, **options)

    monkeypatch.setattr(StepLog, "on_pre_optimizer_step", on_pre_optimizer_step)


def test_an_adapter_is_trained_saved_with_its_card_and_read_the_next_time(preset, expected, monkeypatch, capsys):
    trained = train_adapter(preset, name="mine")
    assert capsys.readouterr().out == ""
    assert trained.folder.parent.name.startswith("mine-")
    assert_equal_weights(trained.folder, expected[0])
    assert [row["step"] for row in trained.log] == list(range(1, 9))
    assert trained.log[-1]["tokens"] == trained.label_tokens
    card = read_card(trained.folder)
    assert card.rope == preset.extended_rope
    assert card.training["tokens"] == trained.label_tokens
    assert card.training["run"] == trained.folder.parent.name
    left = trained.folder.with_name(".adapter.abcd")  # as a process leaves it that is killed while it saves
    shutil.copytree(trained.folder, left)
    monkeypatch.setattr(StepLog, "on_pre_optimizer_step", no_step)
    assert train_adapter(preset, name="mine") == trained
    assert not left.exists()
    tokenizer = load_tokenizer(REPOSITORY / "data" / "tiny-llama")
    _, (text,) = read_documents(preset.data, tokenizer)
    model = load_arm(preset, "extended", adapter=trained.folder)
    after = token_nll(model, text, 200).mean()
    with model.disable_adapter():
        assert after < token_nll(model, text, 200).mean() - 0.1


@pytest.mark.parametrize("step", [1, 4, 7])
def test_interrupted_and_called_again_it_ends_in_the_same_weights(preset, expected, monkeypatch, capsys, step):
    """As in a notebook whose kernel is kept: what was half trained is still in memory and must not be used."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_at(patch, step)
        train_adapter(preset)
    trained = train_adapter(preset)
    assert f"an interrupted run continues after step {3 * (step // 3)} of 8" in capsys.readouterr().out
    assert_equal_weights(trained.folder, expected[0])
    assert numbers(trained.log) == numbers(expected[1])


def test_what_cannot_be_evaluated_afterwards_is_said_before_the_training(preset, capsys):
    """It stops nothing: evaluation.tokens may be lowered when the adapter is there."""
    train_adapter(preset, progress=8)
    said = capsys.readouterr().out
    found = re.search(r"evaluation.tokens = 4,096: the longest of 1 held-out documents has ([\d,]+) tokens\n", said)
    assert "fewer than eight documents are held out: no intervals\n" in said
    fits = dataclasses.replace(preset.evaluation, tokens=int(found[1].replace(",", "")))
    train_adapter(dataclasses.replace(preset, evaluation=fits), name="fits", progress=8)
    assert not re.search(r"evaluation\.|retrieval\.", capsys.readouterr().out)


def test_a_run_goes_on_with_other_threads_libraries_and_checkpoints(preset, expected, monkeypatch, capsys):
    """What a rented machine has is not what the last one had; and a person may want a checkpoint sooner."""
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_at(patch, 4)
        patch.setattr("llama_long_utils.records.version", lambda _name: "0.1")
        torch.set_num_threads(threads + 1)
        try:
            train_adapter(preset)
        finally:
            torch.set_num_threads(threads)
    other = dataclasses.replace(preset.training, checkpoint_every=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_at(patch, 5)
        train_adapter(preset, settings=other)
    assert "an interrupted run continues after step 3 of 8" in capsys.readouterr().out
    trained = train_adapter(preset, settings=other)
    assert "an interrupted run continues after step 4 of 8" in capsys.readouterr().out
    assert [row["loss"] for row in trained.log] == pytest.approx([row["loss"] for row in expected[1]], rel=1e-4)
    assert find_adapter(preset) == trained.folder


def test_a_run_on_a_stream_goes_on_at_the_exact_token(preset, tmp_path, monkeypatch):
    """Several buffers and shards; the second start draws what was trained on before by the lengths of documents."""
    for owner, name, size in ((mixture, "SMALL", 0), (mixture, "BUFFER", 300), (tokens, "SHARD", 500)):
        monkeypatch.setattr(owner, name, size)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number:02}.txt").write_text(" ".join(f"Sentence {n * n + number} of it." for n in range(20)))
    data = Data([str(texts)], {}, minimum_characters=100, split_seed=0)
    plain = dataclasses.replace(preset.training, self_quoting_share=0.0, long_document_weight=1.0)
    stream = dataclasses.replace(preset, data=data, training=plain)
    straight = train_adapter(stream, name="straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_at(patch, 5)
        train_adapter(stream, name="interrupted")
    resumed = train_adapter(stream, name="interrupted")
    assert_equal_weights(resumed.folder, load_file(straight.folder / "adapter_model.safetensors"))
    assert numbers(resumed.log) == numbers(straight.log)
    (row,) = read_card(resumed.folder).training["read"]
    assert (row["documents"], row["trained_on"]) == (None, 8 * 2 * 64)


def test_too_few_held_out_documents_are_said_before_training(preset, monkeypatch, tmp_path):
    monkeypatch.setattr(mixture, "SMALL", 0)  # a stream, of whose lines two in a hundred are held out: of these, none
    lines = tmp_path / "texts" / "lines.jsonl"
    lines.parent.mkdir()
    lines.write_text(3 * (json.dumps({"text": "A line of text. " * 400}) + "\n"))
    data = dataclasses.replace(preset.data, sources=[str(lines.parent)], held_out={"texts": 1}, minimum_characters=100)
    monkeypatch.setattr(StepLog, "on_pre_optimizer_step", no_step)
    with pytest.raises(ValueError, match=r"cannot hold out 1 documents of .* only 0 may be held out; lower held_out"):
        train_adapter(dataclasses.replace(preset, data=data))


def test_a_run_shorter_than_its_checkpoints_says_that_it_begins_again(preset, monkeypatch, capsys):
    settings = dataclasses.replace(preset.training, steps=2, checkpoint_every=25)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_at(patch, 1)
        train_adapter(preset, settings=settings)
    train_adapter(preset, settings=settings)
    assert "after step 0 of 2: it left no checkpoint (there is one every 25)" in capsys.readouterr().out


def test_an_adapter_or_a_log_that_was_damaged_is_made_again(preset, expected, capsys):
    trained = train_adapter(preset)
    weights = trained.folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    again = train_adapter(preset)
    assert "the adapter is made again from its run's last checkpoint" in capsys.readouterr().out
    assert_equal_weights(again.folder, expected[0])
    assert numbers(again.log) == numbers(expected[1])
    log = trained.folder.parent.with_suffix(".json")
    log.write_text(log.read_text()[:100])
    assert numbers(train_adapter(preset).log) == numbers(expected[1])
    assert "is not whole" in capsys.readouterr().out


def test_what_changes_the_weights_changes_the_folder(preset, tmp_path):
    short = dataclasses.replace(preset.training, steps=1)
    changed = dataclasses.replace(preset.lora, alpha=16)
    texts = shutil.copytree(preset.data.sources[0], tmp_path / "texts")
    (texts / "more.txt").write_text("Another text. " * 300)
    data = dataclasses.replace(preset.data, sources=[str(texts)], held_out={str(texts): 1})
    folders = {
        train_adapter(one, settings=short, scaling=scaling).folder
        for one, scaling in (
            (preset, None),
            (preset, preset.control_rope),
            (dataclasses.replace(preset, lora=changed), None),
            (dataclasses.replace(preset, data=data), None),
        )
    }
    assert len(folders) == 4
    assert train_adapter(preset, settings=short).folder in folders


def test_two_processes_never_train_in_one_folder(preset):
    folder = train_adapter(preset, settings=dataclasses.replace(preset.training, steps=1)).folder.parent
    lock = alone(folder.with_name(f"{folder.name}.lock"), "the test")
    with lock, pytest.raises(RuntimeError, match=r"another process is training in .*: wait until it has"):
        train_adapter(preset, settings=dataclasses.replace(preset.training, steps=1))
    train_adapter(preset, settings=dataclasses.replace(preset.training, steps=1))  # the lock is given back


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "The same command continues it"),
        (["--preset", "tinny"], "unknown preset 'tinny'"),
        (["--steps", "-3"], "steps = -3"),
        (["--steps", "1000000000"], "steps = 1000000000"),
        (["--seed", "-1"], "seed = -1"),
        (["--report-every", "-3"], "argument --report-every: -3 must be a number of 0 or more"),
        (["--context-parallel", "0"], "argument --context-parallel: 0 must be a number of 1 or more"),
        (["--stage", "sft", "--steps", "0"], "instruction: steps = 0"),
        (["--stage", "rl", "--steps", "0"], "preference.rl: steps = 0"),
        (["--stage", "dpo", "--seed", "-1"], "preference: seed = -1"),
        (["--adapter", TUNED], "--adapter is where sft, reward, rl and dpo begin"),
        (["--preset", "llama2-7b", "--stage", "dpo"], "'llama2-7b' has no instruction-tuned adapter: run --stage sft"),
    ],
)
def test_the_command_answers_within_a_second_of_computing(arguments, said):
    code = f"import sys, time, resource; sys.argv[1:] = {arguments!r}\n"
    code += "from llama_long_utils.train import run_command, train\n"
    code += "try:\n    run_command(train)\nfinally:\n"
    code += "    print('seconds', sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))\n"
    code += "    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    seconds, torch_imported = done.stdout.split("seconds ")[1].split()
    assert float(seconds) < 1.0
    assert torch_imported == "False"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "then: .venv/bin/python -m tools.run --preset tiny --only 06\n"),
        (["--steps", "3"], "--only 06 -p adapter FOLDER\n"),
        (["--control"], "--only 06 -p control_adapter FOLDER\n"),
        (["--stage", "sft"], "then: .venv/bin/python -m llama_long_utils.train --preset tiny --stage reward  # or rl"),
        (["--stage", "reward"], "--stage rl\n"),
        (["--stage", "sft", "--steps", "3"], "--preset tiny --adapter FOLDER --stage reward"),
        (["--stage", "reward", "--adapter", TUNED], f"--adapter {TUNED} --stage rl\n"),
        (["--stage", "reward", "--steps", "3"], "FOLDER\n"),
        (["--stage", "sft"], "-m tools.merge --preset tiny --adapter FOLDER --to FOLDER"),
        (["--stage", "dpo"], "-m tools.merge --preset tiny --adapter FOLDER --to FOLDER"),
    ],
)
def test_the_command_says_what_may_be_run_next(arguments, said, monkeypatch, capsys):
    def trained(*_given, **_options):
        return SimpleNamespace(log=[{"step": 8, "loss": 1.0}], label_tokens=9, folder="FOLDER")

    for name in ("adapter.train_adapter", "instruction.tune_instructions", "preferences.tune_preferences"):
        monkeypatch.setattr(f"llama_long_utils.training.{name}", trained)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    train_command.train()
    assert said in (printed := capsys.readouterr().out)
    follow = ["then:"] * (said != "FOLDER\n" and "dpo" not in arguments)
    follow += ["or:"] * bool({"sft", "dpo"} & {*arguments})
    assert [line.split()[0] for line in printed.splitlines()[1:]] == follow


def test_preference_tuning_by_several_processes_is_refused_at_once():
    command = [sys.executable, "-m", "llama_long_utils.train", "--stage", "dpo"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--stage dpo runs in one process: start it without a launcher")
