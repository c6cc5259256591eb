"""What a training step costs before it is run: floating-point operations, memory, and the plan that fits.

A step of LoRA on frozen weights has no weight gradients but the adapters': its backward pass costs as much as
its forward pass, not twice as much. Attention is counted causal (half of the square), as the kernels compute it.
"""

import bisect
from dataclasses import dataclass, replace

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from llama_long_utils.model.weights import model_config, pretrained_numbers
from llama_long_utils.records import read_published
from llama_long_utils.settings import Lora, MemorySavings, Preset, TrainingSettings
from llama_long_utils.training.ledger import COMPONENTS, HOST, StepShape, ledger, linear_shapes, reading
from llama_long_utils.training.processes import Division, divide

GIB = 2**30
USABLE = 0.92  # share of a device's memory that tensors can have: the driver takes some, and gaps between blocks
TILED = 1.13  # seconds of an operation with tiles, by those without: Llama 2 7B, 32,768 tokens, H200 (notebook 4)
MLP = ("gate_proj", "up_proj", "down_proj")


def model_shape(name: str) -> PreTrainedConfig:
    """The configuration of a model, without its weights; raises as `model_config` does.

    `name` is one in data/published/model_shapes.json or the source given there, a folder, or a model on the hub.
    """
    models = read_published("model_shapes")["models"]
    known = models | {shape["source"]: shape for shape in models.values()}
    if name in known:
        return LlamaConfig(**{key: value for key, value in known[name].items() if key != "source"})
    found = model_config(name)
    return AutoConfig.for_model(**found.to_dict() | {"head_dim": pretrained_numbers(found)["head_dim"]})


def step_flops(config: PreTrainedConfig, lora: Lora, length: int, memory_savings: MemorySavings) -> dict[str, int]:
    """Floating-point operations of one training step on one sequence of `length` tokens, recomputation included.

    By kind: "linear" (frozen linear layers), "adapters", "attention" and "head".
    """
    shapes, layers = linear_shapes(config), config.num_hidden_layers
    linear = {name: 2 * inputs * outputs * length for name, (inputs, outputs) in shapes.items()}
    adapters = {name: 2 * lora.rank * sum(shapes[name]) * length for name in lora.target_modules}
    attention = 2 * shapes["o_proj"][0] * length**2  # two products of a length x length triangle
    recomputed = min(memory_savings.recomputed_layers, layers)
    # The MLP's tiles are computed again in the backward pass, in recomputed layers and in the others.
    passes = {name: layers if name in MLP and memory_savings.tile else recomputed for name in shapes}
    return {
        "linear": sum((2 * layers + passes[name]) * cost for name, cost in linear.items()),
        "adapters": sum((3 * layers + passes[name]) * cost for name, cost in adapters.items()),
        "attention": (7 * layers + 2 * recomputed) * attention // 2,  # backward: five products for two
        "head": 4 * config.hidden_size * config.vocab_size * length,
    }


@dataclass(frozen=True)
class Plan:
    """Memory savings, the predicted peak on the device and on the host in GiB, and a step's operations."""

    memory_savings: MemorySavings
    device_gib: float
    host_gib: float
    flops: int

    def __str__(self) -> str:
        memory = f"predicted {self.device_gib:.2f} GiB" + f" and {self.host_gib:.2f} on the host" * (self.host_gib > 0)
        return f"{self.memory_savings}: {memory}, {self.flops:.3g} FLOP for a forward and backward pass"


def step_shape(preset: Preset, settings: TrainingSettings, division: Division) -> StepShape:
    """A process' part of a step of a preset's training; gradients add up where it takes its sequences in turns."""
    return StepShape(
        settings.window // division.context,
        preset.base.dtype,
        settings.memory_savings,
        sequences=division.at_once,
        accumulated=division.sequences > division.at_once,
        gpu=True,
        context=division.context,
        processes=division.processes,
        packed=settings.pack and settings.attention == "documents",  # attended one by one; a mask is not counted
        sharded=division.sharded_base,
    )


def plan_training(preset: Preset, settings: TrainingSettings, division: Division | None = None) -> Plan:
    """The plan for a process of a training run with a preset's base, LoRA settings and memory; see `plan`."""
    shape = step_shape(preset, settings, division or divide(settings))
    return plan(model_shape(preset.base.source), preset.lora, shape, preset.memory_gib)


def unreadable(preset: Preset) -> list[str]:
    """What evaluation would read, or keep to write an answer, beyond the preset's memory: a line for each setting."""
    config, usable, tasks = model_shape(preset.base.source), preset.memory_gib * USABLE, preset.retrieval.tasks
    answered = max([1, *(length for length in preset.retrieval.lengths if length <= tasks.generate_up_to)])
    asked = {"evaluation.far_tokens": preset.evaluation.far_tokens, "retrieval.tasks.generate_up_to": answered}
    lines = []
    for kept, (name, tokens) in enumerate(asked.items()):  # keys and values only for what is answered in writing
        gib = reading(config, preset.lora, preset.base.dtype, tokens, kept=bool(kept)) / GIB
        if gib > usable:
            lines.append(f"{name}: {tokens:,} tokens take {gib:.1f} GiB (predicted) of {usable:.1f} usable: lower it")
    return lines


def plan(config: PreTrainedConfig, lora: Lora, shape: StepShape, gib: float) -> Plan:
    """The memory savings, beside those of the shape, with which a step fits and takes the least time.

    First as few recomputed layers as fit, without tiles or with them, which take `TILED` times as long. Then come
    checkpoints on the host, then 8 bits. `USABLE` of `gib` is planned for. ValueError names the most that fits.
    """
    wanted = shape.memory_savings
    tiled = replace(wanted, tile=wanted.tile or tile_for(shape.length))
    rungs = [[wanted], [wanted, tiled]]
    rungs += [[replace(tiled, offload_checkpoints=True)], [leanest(config, shape.length, wanted)]]
    layers = range(wanted.recomputed_layers, max(config.num_hidden_layers, wanted.recomputed_layers) + 1)
    for number, rung in enumerate(rungs):  # what fits as it is wanted costs least: no ledger of tiles is made then
        found, tried = [], layers if number else layers[:1]
        for savings in rung:
            saving = replace(shape, memory_savings=savings)
            counts = (predict(config, lora, saving, recomputed) for recomputed in tried)
            found += [next((choice for choice in counts if choice.device_gib <= gib * USABLE), None)]
        if any(found):
            return min(filter(None, found), key=lambda one: one.flops * (TILED if one.memory_savings.tile else 1))
    most = longest_context(config, lora, shape, gib)
    advice = f"the longest context that would is {most:,}" if most else "not even 1,024 tokens would"
    others = "" if shape.sharded else ", let several devices share the base (--shard-base)"
    raise ValueError(
        f"a step of {shape.length * shape.context:,} tokens does not fit in {gib:.3g} GiB with any plan: {advice}; "
        f"choose a shorter window{others}, or set the memory if the device has more"
    )


def leanest(config: PreTrainedConfig, length: int, wanted: MemorySavings) -> MemorySavings:
    """Every saving at once; tiles as `wanted` has them, if it has any."""
    return MemorySavings(config.num_hidden_layers, wanted.tile or tile_for(length), True, "paged_adamw_8bit")


def tile_for(length: int) -> int:
    """A sixteenth of the sequence: by then the activations of a tile are small beside one hidden state."""
    return max(256, length // 16)


def predict(config: PreTrainedConfig, lora: Lora, shape: StepShape, recomputed: int | None = None) -> Plan:
    """What a step needs; with `recomputed` so many layers are recomputed, whatever the shape says."""
    if recomputed is not None:
        shape = replace(shape, memory_savings=replace(shape.memory_savings, recomputed_layers=recomputed))
    found = ledger(config, lora, shape)
    flops = step_flops(config, lora, shape.length * shape.context, shape.memory_savings)
    device = sum(found[name] for name in COMPONENTS) / GIB
    return Plan(shape.memory_savings, device, found[HOST] / GIB, shape.sequences * sum(flops.values()) // shape.context)


def longest_context(config: PreTrainedConfig, lora: Lora, shape: StepShape, gib: float) -> int:
    """The most tokens, 1,024 more at a time on a device, with which a step fits in its usable `gib`, leanest plan."""

    def peak(steps: int) -> float:
        length = 1024 * steps
        savings = leanest(config, length, shape.memory_savings)
        return predict(config, lora, replace(shape, length=length, memory_savings=savings)).device_gib

    return 1024 * shape.context * bisect.bisect_right(range(1, 2**20), gib * USABLE, key=peak)
