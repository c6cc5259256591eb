"""A random Llama of a few thousand weights, on disk like a real one."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_long_utils.presets import Lora
from llama_long_utils.rope import rope_parameters

LORA = Lora(
    rank=4,
    alpha=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    train_norms=True,
    train_embeddings=False,
)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    new_llama(seed=0).to(torch.bfloat16).save_pretrained(folder)
    return folder


def new_llama(seed: int, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **{
            "vocab_size": 128,
            "max_position_embeddings": 64,
            "rope_parameters": rope_parameters(1e4),
            **shape,
            **changes,
        }
    )
    return LlamaForCausalLM(config)
