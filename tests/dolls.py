"""Doll-size models under the names of real ones: each number of their config.json is theirs but for width and depth."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_long_utils.paths import REPOSITORY

TOKENIZER = REPOSITORY / "data" / "tiny-llama"  # its 2,048 tokens stand at the beginning of the real vocabularies
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
REAL: dict[str, dict[str, Any]] = {  # config.json of the models, as their pages on the hub show it
    "meta-llama/Llama-2-7b-hf": {
        "vocab_size": 32_000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "dtype": "float16",
    },
    "meta-llama/Llama-3.1-8B": {
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 500_000.0},
        "dtype": "bfloat16",
    },
}
HEAD, WIDTH = 128, 32  # of both, and of the dolls


def make_doll(name: str, root: Path) -> Path:
    """models/NAME of a hub's root, with random weights in several files, and what else lies beside them."""
    real, folder = REAL[name], root / "models" / name
    torch.manual_seed(0)
    config = LlamaConfig(
        **real,
        hidden_size=WIDTH,
        head_dim=HEAD,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=1,
        intermediate_size=11 * WIDTH // 4,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, real["dtype"]))
    known = len(json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
    with torch.no_grad():  # it writes what its tokenizer knows: else answers to a question are all as wrong
        model.model.embed_tokens.weight[:, 0] = 0.2
        model.lm_head.weight[known:, 0] = -4.0
    model.save_pretrained(folder, max_shard_size="3MB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder)
    (folder / "consolidated.00.pth").write_bytes(b"weights in another format, which nobody should fetch")
    (folder / "README.md").write_text("A doll.\n")
    content = json.loads((folder / "config.json").read_text())
    assert content["max_position_embeddings"] == real["max_position_embeddings"]
    return folder
