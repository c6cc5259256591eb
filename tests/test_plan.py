"""The planner's command line, end to end, for a model of which there is nothing but a config.json."""

import argparse
import json
import re
import sys

import pytest
from transformers import Qwen2Config

from llama_long_utils import plan
from llama_long_utils.commands import tokens
from llama_long_utils.presets import load_preset
from llama_long_utils.training import ledger, planner


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What the command prints for these words."""
    folder = tmp_path_factory.mktemp("qwen")
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 512}
    Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True).save_pretrained(folder)
    cache = tmp_path_factory.mktemp("cache")

    def run(capsys, *words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledger, "CACHE", cache)
            patch.setattr(sys, "argv", ["plan", str(folder), *words])
            plan.main()
        return capsys.readouterr().out

    return run


def test_the_plan_fits_and_so_does_the_longest_window(answer, capsys):
    found = json.loads(answer(capsys, "--window", "8192", "--memory", "0.25", "--json"))
    assert found["peak_gib"] == pytest.approx(sum(found["peak_gib_by_component"].values()))
    assert found["peak_gib"] <= found["usable_gib"] == pytest.approx(0.92 * 0.25)
    assert found["longest_window"] > 8192
    longest = json.loads(answer(capsys, "--window", str(found["longest_window"]), "--memory", "0.25", "--json"))
    assert longest["peak_gib"] <= longest["usable_gib"]
    seconds = found["seconds_per_step"]
    assert seconds["H100 80 GB"] == pytest.approx(found["flops"] / 989e12 / 0.4)
    with pytest.raises(ValueError, match=f"the longest context that would is {found['longest_window']:,}"):
        answer(capsys, "--window", str(2 * found["longest_window"]), "--memory", "0.25")


def test_what_evaluation_takes_is_said_beside_the_step(answer, capsys):
    words = ("--window", "8192", "--memory", "0.25")
    text = json.loads(answer(capsys, *words, "--json"))["evaluation"]
    assert text["tokens"] == 8192
    keys = 2 * 4 * 2 * 32 * 8192 * 2  # of 4 layers and 2 heads of 32 numbers, in 16 bits
    assert text["kept_gib"] - text["read_gib"] == pytest.approx(keys / 2**30)
    shown = answer(capsys, *words)
    assert re.search(r"evaluation +[\d.]+ MiB to read 8,192 tokens, [\d.]+ MiB with all keys and values kept", shown)


def test_several_gpus_take_more_sequences_or_longer_ones(answer, capsys):
    words = ("--window", "8192", "--memory", "0.25")
    one, two, shared = (
        json.loads(answer(capsys, *words, *several, "--json"))
        for several in ((), ("--devices", "2"), ("--devices", "2", "--context-parallel", "2"))
    )
    sent = one["peak_gib_by_component"]["adapters"]  # as many gradients
    assert two["peak_gib_by_component"]["gradients"] == pytest.approx(one["peak_gib_by_component"]["gradients"] + sent)
    assert [found["sequences_per_step"] for found in (one, two, shared)] == [1, 2, 1]
    assert two["flops"] == one["flops"]
    assert shared["flops"] == pytest.approx(one["flops"] / 2)
    assert 1.6 * one["longest_window"] < shared["longest_window"] < 2 * one["longest_window"]
    assert 0.9 * one["longest_window"] < two["longest_window"] <= one["longest_window"]
    table = answer(capsys, *words, "--devices", "2", "--context-parallel", "2")
    assert "1 x 8,192 tokens" in table
    assert "Each of 2 GPUs holds the whole model and takes 1/2 of its sequences" in table
    table = answer(capsys, *words, "--devices", "4", "--shard-base")
    assert "Each of 4 GPUs holds 1/4 of the base's layers and takes its own sequences" in table
    with pytest.raises(SystemExit):
        answer(capsys, *words, "--shard-base")


def test_hundreds_of_sequences_at_once_may_be_asked_for(monkeypatch):
    """They are counted as quickly as one: see test_ledger."""
    monkeypatch.setattr(sys, "argv", ["plan", "Llama 2 7B", "--window", "8192", "--memory", "24", "--sequences", "400"])
    assert plan.arguments().sequences == 400


def test_what_is_small_is_not_shown_as_nothing(answer, capsys):
    table = answer(capsys, "--window", "8192", "--memory", "0.25").splitlines()
    parts = [line.split() for line in table if line.startswith("  ")]
    assert all(float(amount) > 0 for _, amount, unit in (part for part in parts if part[-1] in ("GiB", "MiB", "KiB")))
    assert all(float(part[-2]) > 0 for part in parts if part[-1] == "s")
    assert [plan.amount(gib) for gib in (3.6, 0.004, 5e-5, 0)] == ["3.60 GiB", "4.1 MiB", "52.4 KiB", "nothing"]


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("tinny", "tiny"), ("Lama 2 7B", "Llama 2 7B"), ("data/tiny-lama", "data/tiny-llama"), ("/tmq/model", "")],
)
def test_a_misspelt_model_or_folder_is_no_name_on_the_hub(monkeypatch, misspelt, meant):
    monkeypatch.setattr(sys, "argv", ["plan", misspelt, "--window", "4096", "--memory", "8"])
    with pytest.raises(ValueError, match=f"unknown model {misspelt!r}") as refused:
        plan.arguments()
    said = str(refused.value)
    assert f"did you mean {meant!r}?" in said if meant else "did you mean" not in said


def test_a_preset_s_window_is_above_its_base_s_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", "tiny", "--window", "512"])
    with pytest.raises(ValueError, match="--window 512 is not above the base's own 512 tokens: there is nothing to"):
        plan.arguments()


def test_an_owner_and_a_name_are_a_model_on_the_hub(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", "owner/model", "--window", "4096", "--memory", "8"])
    assert plan.arguments().model == "owner/model"


def test_a_folder_without_a_configuration_is_no_model(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["plan", str(tmp_path), "--window", "4096", "--memory", "8"])
    with pytest.raises(ValueError, match=f"^{tmp_path} is not a model folder: it has no config.json"):
        plan.arguments()


@pytest.mark.parametrize(
    ("text", "window"), [("32K", 32_768), ("128k", 131_072), ("65,536", 65_536), ("32_000", 32_000)]
)
def test_a_window_may_be_written_as_it_is_spoken_of(text, window):
    assert tokens(text) == window


@pytest.mark.parametrize("text", ["0", "-1", "32KB", "1.5K", "K", ""])
def test_a_window_that_is_no_number_is_refused_with_the_fix(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no number of tokens: write 32768 or 32K"):
        tokens(text)


@pytest.mark.parametrize("text", ["24", "24GB", "24 GiB", "24g"])
def test_memory_may_have_a_unit(text):
    assert plan.gibibytes(text) == 24.0


@pytest.mark.parametrize("text", ["24TB", "GB", "much"])
def test_memory_in_another_unit_is_refused_with_the_fix(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no number of GiB: write 24 or 24GB"):
        plan.gibibytes(text)


def test_what_the_peak_assumes_is_said(answer, capsys):
    """The same model had three peaks: with packed documents, without, and without trained norms."""
    plain, without = (answer(capsys, "--window", "512", "--memory", "24", *words) for words in ((), ("--no-norms",)))
    assert " and the norms\n" in plain
    assert ", norms not trained\n" in without
    assert "512 tokens, each attended as one document, bfloat16" in plain
    assert re.search(r"peak +fits: .* usable \(8% kept free\), at once:\n  weights ", plain)
    assert "seconds those of GPUs. On a CPU, train prints" in plain
    found = json.loads(answer(capsys, "--window", "512", "--memory", "24", "--json"))
    assert "attended document by document" in plan.table(found | {"packed": True})


def test_of_a_preset_the_whole_run_is_priced(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", "tiny", "--sequences", "2", "--json"])
    plan.main()
    found = json.loads(capsys.readouterr().out)
    assert found["sequences_of_run"] == 80
    assert found["hours_of_run"]["H100 80 GB"] == pytest.approx(40 * found["seconds_per_step"]["H100 80 GB"] / 3600)
    assert " s for the preset's 80 sequences" in plan.table(found)
    assert [plan.cost(seconds) for seconds in (0.0164, 6.43, 5040, 1e6)] == ["0.016 s", "6.4 s", "1.4 h", "277.8 h"]


@pytest.mark.parametrize("name", ["tiny", "llama2-7b"])
def test_a_preset_s_step_is_the_one_that_training_plans(name, capsys, monkeypatch):
    """Gradients of earlier sequences are there while the next ones are computed."""
    monkeypatch.setattr(sys, "argv", ["plan", name, "--json"])
    plan.main()
    found, preset = json.loads(capsys.readouterr().out), load_preset(name)
    trained = planner.plan_training(preset, preset.training)
    assert found["peak_gib"] == trained.device_gib
    assert found["plan"] == str(trained.memory_savings)


def test_a_window_that_training_refuses_is_refused(monkeypatch):
    words = ["plan", "tiny", "--window", "4097", "--devices", "2", "--context-parallel", "2"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match="a window of 4,097 tokens does not divide into 4 equal chunks"):
        plan.main()


def test_a_window_below_the_shortest_that_is_tried_may_fit(answer, capsys):
    words = ("--window", "256", "--memory", "0.1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "longest_context", lambda *_: 0)  # not even 1,024 tokens
        assert json.loads(answer(capsys, *words, "--json"))["longest_window"] == 0
        assert re.search(r"longest window +fewer than 1,024 tokens", answer(capsys, *words))


def test_seconds_are_given_for_gpus_with_as_much_memory(answer, capsys):
    found = json.loads(answer(capsys, "--window", "8192", "--memory", "40", "--json"))
    assert list(found["seconds_per_step"]) == ["A100 40 GB", "A100 80 GB", "H100 80 GB", "H200 141 GB"]


def test_memory_that_no_listed_gpu_has_is_said(answer, capsys):
    assert "no GPU listed" in answer(capsys, "--window", "512", "--memory", "200")
    assert "no GPU listed" not in answer(capsys, "--window", "512", "--memory", "141")
