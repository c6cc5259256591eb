"""A standalone model of a preset's adapter: `python -m tools.merge --preset NAME --to FOLDER`.

The adapter is merged into the 16-bit base, whose weights must fit in memory, and the new window and RoPE base are
written into config.json. What comes out is an ordinary model for transformers, vLLM or llama.cpp's converter. If the
base is too large for the GPU, `CUDA_VISIBLE_DEVICES=` in front of the command merges on the host.
"""

import argparse
import json
import shutil
from pathlib import Path

from llama_long_utils.commands import run_command
from llama_long_utils.paths import check_adapter, whole_folder
from llama_long_utils.presets import load_preset
from tools.run import check_writable


def merge() -> None:
    """What the command does. Heavy imports come after its arguments are checked."""
    parser = argparse.ArgumentParser(prog="python -m tools.merge", description=__doc__)
    parser.add_argument("--preset", required=True, help="a file in presets/")
    parser.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="a new folder for the model")
    parser.add_argument("--adapter", metavar="FOLDER", help="of a stage, for example (default: the newest extension)")
    asked = parser.parse_args()
    preset, folder = load_preset(asked.preset), asked.to.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        parser.error(f"--to {asked.to} is there and is not overwritten: name a new folder")
    adapter = asked.adapter and Path(asked.adapter).absolute()
    check_adapter(adapter)
    check_writable(folder.parent, "merging")

    from llama_long_utils.model.adapters import find_adapter, read_card
    from llama_long_utils.model.weights import locate_base

    adapter = find_adapter(preset, adapter)
    print(f"merging {adapter}", flush=True)
    merge_adapter(adapter, locate_base(preset), folder, dtype=preset.base.dtype)
    print(f"{folder}: a model in bfloat16 with RoPE {read_card(adapter).rope}")


def merge_adapter(adapter: Path, base: Path, folder: Path, *, dtype: str) -> Path:
    """`folder` with the adapter merged into the 16-bit base: a standalone bf16 model with the right RoPE in its config.

    The arithmetic is done in `dtype`. ValueError if the adapter needs xPos, which plain transformers does not have.
    """
    import torch

    from llama_long_utils.model.adapters import load_adapter, read_card
    from llama_long_utils.model.base import load_base
    from llama_long_utils.model.weights import TOKENIZER, load_tokenizer

    card = read_card(adapter)
    if card.rope.method == "xpos_abf":
        raise ValueError(f"the adapter in {adapter} needs xPos, which no config.json can ask for: load it unmerged")
    model = load_base(base, card.rope, dtype=dtype, quantized=False)
    merged = load_adapter(model, adapter, base).merge_and_unload()
    with whole_folder(folder) as scratch:
        merged.to(torch.bfloat16).save_pretrained(scratch)
        longest, rope = load_tokenizer(base).model_max_length, card.rope.parameters()
        for file in (file for pattern in TOKENIZER for file in base.glob(pattern)):
            shutil.copy(file, scratch)
        # What is older than transformers 5 looks here, and would take a base of 10,000 without a word.
        older = {"rope_theta": rope["rope_theta"], "rope_scaling": rope if rope["rope_type"] != "default" else None}
        changes = {"config.json": older}
        if longest < card.rope.window:  # to which tokenizers cut, and vLLM the window
            changes["tokenizer_config.json"] = {"model_max_length": card.rope.window}
        for path, new in ((scratch / name, new) for name, new in changes.items()):
            path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | new, indent=2) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    run_command(merge)
