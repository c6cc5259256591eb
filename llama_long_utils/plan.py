"""What fits on a GPU: `python -m llama_long_utils.plan "Llama 2 7B" --window 32768 --memory 24`.

Predicts, without weights and without a GPU, how a QLoRA step is to be run so that it fits, what it needs by component,
how long it takes, and the longest window that would fit.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from typing import Any

from llama_long_utils.commands import at_least, gibibytes, run_command, tokens
from llama_long_utils.presets import check_model, check_window, load_preset, preset_names
from llama_long_utils.records import read_published
from llama_long_utils.settings import Lora, MemorySavings

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
AT_PEAK = {"saved": "activations", "backward": "workspace"}  # what people call them
PLAIN = MemorySavings(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused")


def arguments() -> argparse.Namespace:
    """What was asked for; heavy modules are imported only after this."""
    parser = argparse.ArgumentParser(prog="python -m llama_long_utils.plan", description=__doc__)
    names = [*{**dict.fromkeys(preset_names()), **read_published("model_shapes")["models"]}]
    parser.add_argument("model", help=f"{', '.join(names)}, a folder with config.json, or owner/name on the hub")
    count = at_least(int, 1)
    parser.add_argument("--window", type=tokens, metavar="N", help="tokens of a sequence (default: the preset's)")
    parser.add_argument("--memory", type=gibibytes, metavar="GIB", help="of a GPU (default: the preset's)")
    parser.add_argument("--devices", type=count, default=1, metavar="K", help="GPUs, each with a copy of the base")
    parser.add_argument("--context-parallel", type=count, default=1, metavar="C", help="GPUs that share a sequence")
    parser.add_argument("--shard-base", action="store_true", help="each GPU keeps a part of the base's layers")
    parser.add_argument("--sequences", type=count, metavar="B", help="at once on a GPU (default: the preset's, or 1)")
    parser.add_argument("--rank", type=count, metavar="R", help="of LoRA (default: the preset's, or 16)")
    parser.add_argument("--layers", nargs="+", choices=LINEAR, metavar="NAME", help="linear layers with LoRA")
    parser.add_argument("--no-norms", action="store_true", help="norms are not trained")
    parser.add_argument("--utilisation", type=float, default=0.4, metavar="SHARE", help="of a GPU's peak operations")
    parser.add_argument("--json", action="store_true", help="for programs")
    asked = parser.parse_args()
    if not 0 < asked.utilisation <= 1:
        parser.error(f"--utilisation {asked.utilisation} must be above 0 and at most 1")
    if asked.devices % asked.context_parallel:
        parser.error(f"--devices {asked.devices} does not divide into groups of {asked.context_parallel}")
    if asked.shard_base and asked.devices == 1:
        parser.error("--shard-base needs --devices 2 or more")
    asked.preset = load_preset(asked.model) if asked.model in preset_names() else None
    check_model(asked.model, names)
    if asked.preset:
        check_model(asked.preset.base.source, preset=asked.model)
        if asked.window:
            check_window(asked.window, asked.preset.base.window)
    elif missing := [name for name in ("window", "memory") if getattr(asked, name) is None]:
        parser.error(f"--{missing[0]} is missing: only presets have one")
    return asked


def predictions(asked: argparse.Namespace) -> dict[str, Any]:
    """The plan and what it costs, by name; ValueError if the model is unknown or the step does not fit."""
    print("counting what a step allocates: some seconds ...", file=sys.stderr, flush=True)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled: without it imports are a second shorter
    from llama_long_utils.training import planner
    from llama_long_utils.training.ledger import COMPONENTS, StepShape, ledger, reading
    from llama_long_utils.training.processes import divide

    preset = asked.preset
    lora = preset.lora if preset else Lora(16, 32, LINEAR, train_norms=True, train_embeddings=False)
    rank, norms = asked.rank or lora.rank, lora.train_norms and not asked.no_norms
    lora = Lora(rank, 2 * rank, asked.layers or lora.target_modules, norms, lora.train_embeddings)
    window, memory = asked.window or preset.training.window, asked.memory or preset.memory_gib
    config = planner.model_shape(preset.base.source if preset else asked.model)
    context, sequences = asked.context_parallel, asked.sequences
    if preset:
        settings = replace(preset.training, window=window, reach=window)
        division = divide(settings, asked.devices, context, asked.shard_base)
        shape = planner.step_shape(preset, settings, replace(division, at_once=sequences or division.at_once))
    else:
        several = {"context": context, "processes": asked.devices, "sharded": asked.shard_base}
        shape = StepShape(window // context, "bfloat16", PLAIN, sequences or 1, gpu=True, **several)
    plan = planner.plan(config, lora, shape, memory)
    counts = ledger(config, lora, replace(shape, memory_savings=plan.memory_savings))
    longest = planner.longest_context(config, lora, shape, memory)
    savings = planner.leanest(config, longest // context, shape.memory_savings)
    lean = replace(shape, length=longest // context, memory_savings=savings)
    text = asked.window or preset.extension.window
    read, kept = (reading(config, lora, shape.dtype, text, kept=kept) / planner.GIB for kept in (False, True))
    gpus = [row for row in read_published("gpus")["rows"] if row["memory_gb"] >= memory]
    seconds = {row["gpu"]: plan.flops / row["bf16_tflops"] / 1e12 / asked.utilisation for row in gpus}
    sequences = asked.devices // context * shape.sequences
    total = preset.training.steps * preset.training.sequences_per_step if preset else 0  # of the preset's run
    return {
        "model": asked.model,
        "window": window,
        "packed": shape.packed,
        "dtype": shape.dtype,
        "memory_gib": memory,
        "usable_gib": memory * planner.USABLE,
        "devices": asked.devices,
        "context_parallel": context,
        "sharded_base": asked.shard_base,
        "sequences_per_step": sequences,
        "lora": asdict(lora),
        "memory_savings": asdict(plan.memory_savings),
        "plan": str(plan.memory_savings),
        "peak_gib": plan.device_gib,
        "peak_gib_by_component": {name: counts[name] / planner.GIB for name in COMPONENTS},
        "host_gib": plan.host_gib * asked.devices,
        "longest_window": longest,
        "longest_window_host_gib": longest and planner.predict(config, lora, lean).host_gib * asked.devices,
        "evaluation": {"tokens": text, "read_gib": read, "kept_gib": kept},
        "flops": plan.flops,
        "utilisation": asked.utilisation,
        "seconds_per_step": seconds,
        "sequences_of_run": total,
        "hours_of_run": {gpu: total / sequences * each / 3600 for gpu, each in seconds.items()} if total else {},
    }


def amount(gib: float) -> str:
    """3.6 -> "3.60 GiB", 0.004 -> "4.1 MiB"; less than a tenth of a KiB is nothing."""
    for size, unit, digits in ((1, "GiB", 2), (2**10, "MiB", 1), (2**20, "KiB", 1)):
        if gib * size >= 0.1:
            return f"{gib * size:.{digits}f} {unit}"
    return "nothing"


def cost(seconds: float) -> str:
    """6.43 -> "6.4 s", 0.0164 -> "0.016 s", 5040 -> "1.4 h"."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def table(found: dict[str, Any]) -> str:
    """The predictions for people."""
    lora, devices, text, longest = (found[name] for name in ("lora", "devices", "evaluation", "longest_window"))
    of = f"for the preset's {found['sequences_of_run']:,} sequences"
    run = {gpu: f", {cost(3600 * hours)} {of}" for gpu, hours in found["hours_of_run"].items()}
    attended = "attended document by document" if found["packed"] else "each attended as one document"
    lines = {
        "model": f"{found['model']} in NF4, LoRA of rank {lora['rank']} on {len(lora['target_modules'])} "
        "linear layers of each decoder layer" + (" and the norms" if lora["train_norms"] else ", norms not trained"),
        "step": f"{found['sequences_per_step']:,} x {found['window']:,} tokens, {attended}, {found['dtype']}",
        "plan": found["plan"],
        "peak": f"fits: {amount(found['peak_gib'])} of {amount(found['usable_gib'])} usable (8% kept free), at once:",
        **{f"  {AT_PEAK.get(name, name)}": amount(gib) for name, gib in found["peak_gib_by_component"].items()},
        "host memory": amount(found["host_gib"]),
        "longest window": (f"{longest:,}" if longest else f"fewer than {1024 * found['context_parallel']:,}")
        + f" tokens, with every memory saving on, and {amount(found['longest_window_host_gib'])} of host memory",
        "evaluation": f"{amount(text['read_gib'])} to read {text['tokens']:,} tokens, {amount(text['kept_gib'])} "
        "with all keys and values kept for an answer",
        "seconds a step": f"at {found['utilisation']:.0%} of a GPU's peak, {found['flops']:.3g} operations on each",
        **{f"  {gpu}": cost(seconds) + run.get(gpu, "") for gpu, seconds in found["seconds_per_step"].items()},
        **({} if found["seconds_per_step"] else {"  no GPU listed": "has so much memory; see --devices"}),
    }
    width = max(map(len, lines))
    shown = [f"{name:{width}}  {value}" for name, value in lines.items()]
    if devices > 1:
        takes = "its own sequences" if (shared := found["context_parallel"]) == 1 else f"1/{shared} of its sequences"
        base = f"1/{devices} of the base's layers" if found["sharded_base"] else "the whole model"
        shown += [
            f"Each of {devices} GPUs holds {base} and takes {takes}. Peak and seconds (without those for "
            "sending) are those of one; tokens of a step, longest window and host memory are those of all."
        ]
    shown += ["All numbers are predictions, seconds those of GPUs. On a CPU, train prints an estimate after a minute."]
    return "\n".join(shown)


def main() -> None:
    """The command line."""
    found = predictions(asked := arguments())
    print(json.dumps(found, indent=1) if asked.json else table(found))


if __name__ == "__main__":
    run_command(main)
