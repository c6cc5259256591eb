"""The command that makes a standalone model of an adapter."""

import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_long_utils.model.base import check_rope
from llama_long_utils.paths import ADAPTERS
from llama_long_utils.presets import load_preset
from tools.merge import merge


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, words)])
    merge()


def test_the_merged_tiny_llama_rotates_as_its_preset_says_in_plain_transformers(tmp_path, monkeypatch, capsys):
    adapter = shutil.copytree(ADAPTERS / "tiny", tmp_path / "adapter")
    command(monkeypatch, "--preset", "tiny", "--to", tmp_path / "merged", "--adapter", adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    check_rope(merged, load_preset("tiny").extended_rope)
    assert f"{tmp_path / 'merged'}: a model in bfloat16 with RoPE abf, base 500,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "tinny", "--to", "NEW"], "unknown preset 'tinny'"),
        (["--preset", "tiny", "--to", "."], "--to . is there and is not overwritten: name a new folder"),
        (["--preset", "tiny", "--to", "NEW", "--adapter", "nowhere"], "is not an adapter of this collection"),
        (
            ["--preset", "tiny", "--to", "NEW", "--adapter", ADAPTERS / "smollm2"],
            "it was trained for",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").write_text("kept")
    with pytest.raises((SystemExit, ValueError)) as error:
        command(monkeypatch, *words)
    assert said in f"{error.value}{capsys.readouterr().err}"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
