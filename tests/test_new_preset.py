"""The command that writes a preset: for each family, and what it refuses."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llama_long_utils import new_preset, presets
from llama_long_utils.model.arms import load_arm
from llama_long_utils.model.base import check_rope
from llama_long_utils.model.weights import base_config
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset, with_numbers
from llama_long_utils.rope import inverse_frequencies, wavelengths
from llama_long_utils.settings import Preset, raised_base
from llama_long_utils.training.adapter import train_adapter
from llama_long_utils.training.planner import model_shape, plan_training

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {  # what is special about each, in its config.json
    "llama": {"model_type": "llama"},
    "llama-3": {
        "model_type": "llama",
        "rope_parameters": {"rope_theta": 5e5, "original_max_position_embeddings": 16, **LLAMA_3},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},  # biases of queries, keys and values
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},  # norms of queries and keys
}


def write_config(folder, **changes):
    """A config.json of a small model, without weights."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {**shape, "num_key_value_heads": 1, "vocab_size": 2048, "max_position_embeddings": 64, **changes}
    config = AutoConfig.for_model(values.pop("model_type", "llama"), **values)
    config.save_pretrained(folder)
    return config


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Where presets and runs of a test go: not into the repository."""
    folder = tmp_path / "presets"
    folder.mkdir()
    for module in (presets, new_preset):
        monkeypatch.setattr(module, "PRESETS", folder)
    monkeypatch.setattr(Preset, "run_folder", tmp_path / "runs")
    return folder


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "my texts.v2"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(" ".join(f"Sentence {n * n + number} of it." for n in range(200)))
    return folder


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["new_preset", *map(str, words)])
    new_preset.write()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_of_each_family_loads_plans_and_trains(family, written, texts, tmp_path, monkeypatch, capsys):
    base = tmp_path / "My Model"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(write_config(base, **FAMILIES[family]))
    names = dict(model.named_parameters())
    assert ("model.layers.0.self_attn.q_proj.bias" in names) == (family == "qwen2")
    assert ("model.layers.0.self_attn.q_norm.weight" in names) == (family == "qwen3")
    model.to(torch.bfloat16).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "data" / "tiny-llama" / name, base)
    command(monkeypatch, "--base", base, "--window", 128, "--memory", 1, "--texts", texts)
    said = capsys.readouterr().out
    assert "presets/my-model-128.toml: abf" in said
    assert f"texts: {texts} (3 different texts); held out" in said

    preset = load_preset("my-model-128")
    assert base_config(preset).model_type == FAMILIES[family]["model_type"]
    assert (preset.memory_gib, preset.extension.window, preset.training.reach) == (1.0, 128, 128)
    assert preset.data.held_out == {"my texts.v2": 1}
    settings = with_numbers(preset.training, "training", steps=2)
    assert 0 < plan_training(preset, settings).device_gib < 1
    with torch.device("meta"):  # biases, norms of heads and ties are planned for, too
        planned = AutoModelForCausalLM.from_config(model_shape(str(base)))
    assert planned.config.tie_word_embeddings == (family == "qwen3")
    assert {name: weight.shape for name, weight in planned.state_dict().items()} == {
        name: weight.shape for name, weight in model.state_dict().items()
    }
    trained = train_adapter(preset, settings=settings)
    assert [math.isfinite(row["loss"]) for row in trained.log] == [True, True]
    extended = load_arm(preset, "extended", adapter=trained.folder)
    check_rope(extended, preset.extended_rope)
    with pytest.raises(ValueError, match="does not rotate as asked"):
        check_rope(extended, dataclasses.replace(preset.extended_rope, base=preset.base.rope_base))


def test_one_number_changes_the_window_and_the_rope_base_with_it(written, tmp_path, monkeypatch):
    write_config(tmp_path / "base", max_position_embeddings=4096, head_dim=128)
    command(monkeypatch, "--base", tmp_path / "base", "--window", 32_768, "--memory", 24, "--name", "mine")
    before = load_preset("mine")
    file = written / "mine.toml"
    text = file.read_text()
    assert text.count("32_768") == 1
    file.write_text(text.replace("32_768", "16_384"))
    after = load_preset("mine")
    assert (before.extension.rope_base, after.extension.rope_base) == (500_000, raised_base(128, 1e4, 4096, 16_384))
    lengths = (after.training.window, after.training.reach, after.evaluation.tokens, after.retrieval.lengths[-1])
    assert lengths == (16_384,) * 4
    assert (before.data.minimum_characters, after.data.minimum_characters) == (147_456, 73_728)


def test_for_llama_2_it_writes_the_preset_that_is_there(written, tmp_path, monkeypatch):
    ours = load_from_repository("llama2-7b")
    shape = model_shape("Llama 2 7B").to_dict()
    write_config(
        tmp_path / "base",
        **{key: shape[key] for key in ("hidden_size", "num_hidden_layers", "head_dim")},
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    command(monkeypatch, "--base", tmp_path / "base", "--window", 32_768, "--memory", 24, "--name", "mine")
    mine = load_preset("mine")
    for part in ("memory_gib", "extension", "data", "lora", "training", "evaluation", "retrieval"):
        assert getattr(mine, part) == getattr(ours, part), part
    assert mine.base == dataclasses.replace(ours.base, source=mine.base.source, dtype=presets.fastest_dtype())


def load_from_repository(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "PRESETS", REPOSITORY / "presets")
        return load_preset(name)


@pytest.mark.parametrize("shape", [(128, 1e4, 4096, 32_768), (64, 1e4, 512, 4096), (64, 1e5, 8192, 32_768)])
def test_the_raised_base_leaves_no_pair_at_new_angles(shape):
    head_dim, base, old, new = shape
    seen = old / wavelengths(inverse_frequencies(head_dim, base))  # turns within the old window
    reached = new / wavelengths(inverse_frequencies(head_dim, raised_base(*shape)))
    assert (reached <= seen * 1.0001)[seen < 1].all()


def test_texts_may_be_shorter_than_estimated_but_two_must_fill_the_window(written, texts, tmp_path, monkeypatch):
    write_config(tmp_path / "base")
    size = len((texts / "0.txt").read_text())
    words = ["--base", tmp_path / "base", "--memory", 1, "--texts", texts, "--name", "../a", "--window"]
    with pytest.raises(ValueError, match=r"the 3 texts in .* hold about 1,8\d\d tokens to train on, and 4 passes"):
        command(monkeypatch, *words, size)
    command(monkeypatch, *words, size // 4)
    assert load_preset("a").data.minimum_characters <= size + 100
    assert (load_preset("a").training.steps, load_preset("a").data.passes) == (1, 4)
    with pytest.raises(ValueError, match=r"two of the 3 texts in .* must fill 9,999 tokens .*: add longer ones"):
        command(monkeypatch, "--base", tmp_path / "base", "--window", 9999, "--memory", 1, "--texts", texts)
    with pytest.raises(ValueError, match="unknown document source 'nowhere'"):
        command(monkeypatch, "--base", tmp_path / "base", "--window", 128, "--memory", 1, "--texts", "nowhere")
    assert [path.name for path in written.iterdir()] == ["a.toml"]


def test_without_texts_of_ones_own_a_long_window_is_tested_on_few_books(written, tmp_path, monkeypatch):
    write_config(tmp_path / "base")
    for window, books in ((65_536, 16), (131_072, 4)):
        command(monkeypatch, "--base", tmp_path / "base", "--window", window, "--memory", 24, "--name", f"to-{window}")
        mine = load_preset(f"to-{window}")
        assert (mine.evaluation.tokens, mine.evaluation.far_tokens, mine.training.window) == (window,) * 3
        assert (mine.data.held_out, mine.data.minimum_characters) == ({"pg19": books}, 4.5 * window)


def test_the_window_of_a_preset_for_ones_own_texts_is_one_number(written, texts, tmp_path, monkeypatch):
    write_config(tmp_path / "base")
    words = ["--base", tmp_path / "base", "--memory", "1 GB", "--texts", texts, "--name", "mine"]
    command(monkeypatch, *words, "--window", 256)
    file = written / "mine.toml"
    assert "minimum_characters" not in file.read_text()
    tokens = int(re.search("(?m)^tokens = ([0-9_]+)", file.read_text())[1])
    assert 2 * 4 * 128 < tokens < 200 * 4 * 128
    for window in (128, 512):
        file.write_text(re.sub("(?m)^window = 256 ", f"window = {window} ", file.read_text()))
        preset = load_preset("mine")
        assert (preset.data.minimum_characters, preset.training.window) == (4.5 * window, window)
        steps = tokens // (4 * window)
        assert (preset.training.steps, preset.training.warmup_steps) == (steps, steps // 10)
        file.write_text(file.read_text().replace(f"window = {window} ", "window = 256 "))


def test_a_rope_that_changes_with_the_length_leaves_no_file(written, tmp_path, monkeypatch):
    write_config(tmp_path / "base", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="rope_type 'dynamic', which changes with the length of the text"):
        command(monkeypatch, "--base", tmp_path / "base", "--window", 128, "--memory", 1)
    assert not [*written.iterdir()]


def test_numbers_of_a_rope_that_its_config_leaves_empty_are_left_out(written, tmp_path, monkeypatch):
    write_config(tmp_path / "plain", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "factor": 1.0})
    command(monkeypatch, "--base", tmp_path / "plain", "--window", 128, "--memory", 1, "--name", "plain")
    assert load_preset("plain").base.rope_scaling == {}  # plain RoPE has no factor
    rule = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    write_config(tmp_path / "base", rope_parameters={**rule, "attention_factor": None})
    command(monkeypatch, "--base", tmp_path / "base", "--window", 128, "--memory", 1, "--name", "mine")
    assert load_preset("mine").base.rope_scaling == {name: rule[name] for name in rule if name != "rope_theta"}


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        ({}, ["--help"], "--texts FOLDER"),
        ({}, ["--base", "nosuch", "--window", "128", "--memory", "1"], "unknown model 'nosuch': use a folder"),
        (
            {},
            ["--base", "data/tiny-lama", "--window", "1024", "--memory", "1"],
            "unknown model 'data/tiny-lama' (did you mean 'data/tiny-llama'?): there is no such folder; use a folder",
        ),
        ({}, ["--base", "~/mine", "--window", "1024", "--memory", "1"], "unknown model '~/mine': there is no such f"),
        ({}, ["--window", "64", "--memory", "1"], "--window 64 is not above the base's own 64 tokens"),
        ({}, ["--window", "128", "--memory", "1", "--texts", "/no/texts"], "unknown document source '/no/texts': the"),
        ({"sliding_window": 32}, ["--window", "128", "--memory", "1"], "attends to the last 32 tokens only"),
        ({}, ["--window", "8192", "--memory", "1", "--name", "tiny"], "presets/tiny.toml is there and is not overw"),
        ({}, ["--window", "128", "--memory", "1", "--name", "///"], "give --name a letter or a digit"),
        ({}, ["--window", "128", "--memory", "1", "--texts", ""], "--texts is empty: name a folder of texts"),
        (
            {},
            ["--base", "presets", "--window", "128", "--memory", "1"],
            "presets is not a model folder: it has no config.j",
        ),
        ({}, ["--window", "32KB", "--memory", "1"], "'32KB' is no number of tokens: write 32768 or 32K"),
        ({}, ["--window", "8192", "--memory", "nan"], "nan must be a number of 0.1 or more"),
    ],
)
def test_it_answers_within_a_second_of_computing(config, words, said, tmp_path):
    write_config(tmp_path, model_type="mistral", **{"sliding_window": None, **config})
    words = words if "--base" in words else ["--base", str(tmp_path), *words]
    before = {path: path.read_bytes() for path in (REPOSITORY / "presets").iterdir()}
    code = f"import sys, resource; sys.argv[1:] = {words!r}\n"
    code += "from llama_long_utils.new_preset import run_command, write\n"
    code += "try:\n    run_command(write)\nfinally:\n"
    code += "    print('seconds', sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert said in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
    seconds, torch_imported = done.stdout.split("seconds ")[1].split()
    assert float(seconds) < 1.0
    assert torch_imported == "False"
    assert before == {path: path.read_bytes() for path in (REPOSITORY / "presets").iterdir()}


def test_it_holds_out_eight_texts_where_twice_as_many_remain_and_else_says_where(
    written, texts, tmp_path, monkeypatch, capsys
):
    write_config(tmp_path / "base")
    words = ["--base", tmp_path / "base", "--window", 128, "--memory", 1, "--texts", texts, "--name"]
    for count, held_out in ((20, 6), (24, 8)):
        for number in range(3, count):
            (texts / f"{number}.txt").write_text(f"Number {number}. " + (texts / "0.txt").read_text())
        command(monkeypatch, *words, f"of-{count}")
        assert load_preset(f"of-{count}").data.held_out == {"my texts.v2": held_out}
        said = capsys.readouterr().out
        assert (": raise held_out in [data], or add texts)" in said) == (held_out < 8)
        assert f"then: .venv/bin/python -m llama_long_utils.plan of-{count}" in said


def test_every_section_and_every_number_of_the_stages_stands_in_it(written, tmp_path, monkeypatch):
    write_config(tmp_path / "base")
    command(monkeypatch, "--base", tmp_path / "base", "--window", 128, "--memory", 1, "--name", "mine")
    given = tomllib.loads((written / "mine.toml").read_text())
    mine = load_preset("mine")

    def sections(values):
        return {
            part.name: sections(getattr(values, part.name))
            for part in dataclasses.fields(values)
            if dataclasses.is_dataclass(getattr(values, part.name))
        }

    def missing(wanted, found):
        return [name for name in wanted if name not in found or missing(wanted[name], found[name])]

    assert not missing(sections(mine), given)
    stages = {"instruction": given["instruction"], "preference": given["preference"]}
    assert {"window", *stages["instruction"]} == {field.name for field in dataclasses.fields(mine.instruction)}
    assert [*stages["preference"]] == [field.name for field in dataclasses.fields(mine.preference)]
    for name in ("reward", "rl", "dpo"):
        fields = dataclasses.fields(getattr(mine.preference, name))
        assert [*stages["preference"][name]] == [field.name for field in fields]
    assert mine.preference.tokens + mine.preference.answer_tokens <= mine.extension.window
    assert mine.preference.questions * mine.preference.answers <= 256


def test_a_preset_that_is_there_is_never_overwritten(written, tmp_path, monkeypatch, capsys):
    write_config(tmp_path / "base")
    words = ["--base", tmp_path / "base", "--window", 128, "--memory", 1, "--name", "mine"]
    (written / "mine.toml").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, *words)
    assert "presets/mine.toml is there and is not overwritten" in capsys.readouterr().err
    assert (written / "mine.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("gemma", "", "has model_type 'gemma': use one of ['llama', 'mistral', 'qwen2', 'qwen3']"),
        ("llama", "Too short.", "two of the 1 texts in"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_heavy_is_imported(tmp_path, kind, text, said):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "max_position_embeddings": 64}))
    words = ["--base", str(tmp_path), "--window", "128", "--memory", "1", "--texts", str(tmp_path / "texts")]
    heavy = f"import sys; sys.argv[1:] = {[*words, '--name', 'never-written']}; import runpy\n"
    heavy += "try: runpy.run_module('llama_long_utils.new_preset', run_name='__main__')\n"
    heavy += "except SystemExit as error: print(error, sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, cwd=REPOSITORY)
    assert said in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_a_model_of_another_architecture_is_refused(written, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="has model_type 'gpt2': use one of"):
        command(monkeypatch, "--base", tmp_path / "base", "--window", 128, "--memory", 1)
    assert not [*written.iterdir()]


def test_texts_that_may_be_too_short_for_the_window_are_said_beforehand(texts):
    """By characters: a text of so many bytes could fill it, but seldom does."""
    assert new_preset.own_texts(str(texts), 128)["fill"]
    for number in range(3, 40):
        (texts / f"{number}.txt").write_text(" ".join(f"Sentence {n * n + number} of it." for n in range(200)))
    assert not new_preset.own_texts(str(texts), 1024)["fill"]
