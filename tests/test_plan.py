"""The planner's command line, end to end, for a model of which there is nothing but a config.json."""

import json
import sys

import pytest
from transformers import Qwen2Config

from llama_long_utils import plan
from llama_long_utils.training import ledger


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What the command prints for these words."""
    folder = tmp_path_factory.mktemp("qwen")
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 512}
    Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "CACHE", tmp_path_factory.mktemp("cache"))

        def run(capsys, *words):
            patch.setattr(sys, "argv", ["plan", str(folder), *words])
            plan.main()
            return capsys.readouterr().out

        yield run


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


def test_several_gpus_take_more_sequences_each_with_its_own_copy(answer, capsys):
    one, two = (
        json.loads(answer(capsys, "--window", "8192", "--memory", "0.25", "--devices", devices, "--json"))
        for devices in ("1", "2")
    )
    changed = {name for name in one if one[name] != two[name]}
    assert changed == {"devices", "sequences_per_step", "longest_window_host_gib"}
    table = answer(capsys, "--window", "8192", "--memory", "0.25", "--devices", "2")
    assert "2 x 8,192 tokens" in table
    assert "2 GPUs are data parallel: each holds the whole model" in table


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
def test_a_misspelt_model_or_folder_is_no_name_on_the_hub(capsys, monkeypatch, misspelt, meant):
    monkeypatch.setattr(sys, "argv", ["plan", misspelt, "--window", "4096", "--memory", "8"])
    with pytest.raises(SystemExit):
        plan.arguments()
    said = capsys.readouterr().err
    assert f"unknown model {misspelt!r}" in said
    assert f"did you mean {meant!r}?" in said if meant else "did you mean" not in said


def test_an_owner_and_a_name_are_a_model_on_the_hub(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", "owner/model", "--window", "4096", "--memory", "8"])
    assert plan.arguments().model == "owner/model"
