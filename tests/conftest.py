"""A random Llama of a few thousand weights, on disk like a real one.

torch and transformers are imported where they are used: the process that hands out the tests does without them.
"""

import ast
import dataclasses
import json
import socket
from functools import cache
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from llama_long_utils.data import sources
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import Lora, Preset, Scaling

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

sources._load_corpus = cache(sources._load_corpus)  # half a second for each of a hundred tests

LORA = Lora(
    rank=4,
    alpha=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    train_norms=True,
    train_embeddings=False,
)


PLAIN = Scaling("none", 1e4, head_dim=32, original_window=64, window=64)
RAISED = Scaling("abf", 5e5, head_dim=32, original_window=64, window=512)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("base")
    new_llama(seed=0).to(torch.bfloat16).save_pretrained(folder)
    return folder


def new_llama(seed: int, **changes) -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **{
            "vocab_size": 128,
            "max_position_embeddings": 64,
            "rope_parameters": PLAIN.parameters(),
            **shape,
            **changes,
        }
    )
    return LlamaForCausalLM(config)


def training_sequences(documents, window: int, count: int, *, padding_id: int, bos_id=None, **options) -> list:
    """`count` sequences of documents that are passed over as often as needed: `packed_pieces`, joined."""
    from llama_long_utils.data.packing import join_pieces, packed_pieces

    packed = islice(packed_pieces(repeat(documents), window, **options), count)
    return [join_pieces(pieces, window, padding_id, bos_id) for pieces in packed]


@pytest.fixture
def free_port() -> int:
    """A port on this machine where processes of a test meet."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def small_preset(folder: Path, **base: object) -> Preset:
    """The preset "tiny" on the small Llama in a folder, extended as RAISED; `base`: what is different about it."""
    numbers = {"source": str(folder), "window": 64, "rope_base": 1e4, "head_dim": 32, **base}
    tiny = load_preset("tiny")
    extension = dataclasses.replace(tiny.extension, window=RAISED.window, method="abf", rope_base=RAISED.base)
    return dataclasses.replace(tiny, base=dataclasses.replace(tiny.base, **numbers), extension=extension)


def functions_of(notebook: str) -> SimpleNamespace:
    """The functions that a notebook defines, each by its name, with what the notebook imports."""
    cells = json.loads((REPOSITORY / "notebooks" / f"{notebook}.ipynb").read_bytes())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    names: dict[str, object] = {}
    exec(ast.unparse([line for line in ast.parse(code).body if isinstance(line, kinds)]), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if name != "__builtins__"})
