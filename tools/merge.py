"""A standalone model of a preset's adapter: `python -m tools.merge --preset NAME --to FOLDER`.

The adapter is merged into the 16-bit base, whose weights must fit in memory, and the new window and RoPE base are
written into config.json. What comes out is an ordinary model for transformers, vLLM or llama.cpp's converter. If the
base is too large for the GPU, `CUDA_VISIBLE_DEVICES=` in front of the command merges on the host.
"""

import argparse
from pathlib import Path

from llama_long_utils.commands import run_command
from llama_long_utils.paths import check_adapter
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

    from llama_long_utils.model.adapters import find_adapter, merge_adapter, read_card
    from llama_long_utils.model.weights import locate_base

    adapter = find_adapter(preset, adapter)
    print(f"merging {adapter}", flush=True)
    merge_adapter(adapter, locate_base(preset), folder, dtype=preset.base.dtype)
    print(f"{folder}: a model in bfloat16 with RoPE {read_card(adapter).rope}")


if __name__ == "__main__":
    run_command(merge)
