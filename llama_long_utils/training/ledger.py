"""What one training step needs in memory, by component, without a GPU and without weights.

The ledger runs the real model class, PEFT's adapters, bitsandbytes' 4-bit operators and our loss under torch's fake
tensors, which have shapes and no data, and notes every storage that is allocated and freed. torch's own `MemTracker`
refuses frozen parameters (it hooks every gradient), hence `StorageTracker`.

Three layers are run, at two short lengths. The bytes at each moment are a line in the length, as the operators are the
same, and every further layer repeats the segment of its kind: the two runs give the peak at any length and depth.
The same steps run with real tensors (`random_llama.py`), to compare.
"""

import json
import weakref
from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedConfig

from llama_long_utils.cache import Cache
from llama_long_utils.model.loss import causal_lm, hidden_states
from llama_long_utils.model.memory_savings import READING, OffloadedCheckpoints, apply_memory_savings
from llama_long_utils.paths import CACHE
from llama_long_utils.records import package_versions
from llama_long_utils.settings import Lora, MemorySavings
from llama_long_utils.training.random_llama import StepShape, random_llama, training_steps

# Frozen weights; trainable weights; their gradients; what the optimizer keeps; what the forward pass leaves for the
# backward pass (with checkpointing: a hidden state per layer); the loss; recomputed activations and their gradients.
COMPONENTS = ("weights", "adapters", "gradients", "optimizer", "saved", "loss", "backward")
HOST = "host"  # what offloading keeps in host memory
COLUMNS = (*COMPONENTS, HOST)
ON_DEVICE = np.array([name in COMPONENTS for name in COLUMNS], dtype=float)
# Layers that are run: the first, whose input has no gradient; another recomputed one; a plain one. A first layer
# that is plain counts like other plain ones, up to two hidden states too much.
FIRST, RECOMPUTED, PLAIN = range(3)
LAYERS_RUN = 3
SHORT = 1024  # tokens: up to here a step is run as it is
GATHERED = 3  # sharded layers that are there as a whole: one that is used, the next one, and what it comes in
ALIKE = 3  # parts, of a tensor that is split, that are run: those after the second allocate and free what that did
MOST_TILES = 32  # of a sequence: more of them are counted as so many
WARM_UP = 16  # tokens
VERSION = 4  # of the numbers that are kept: raise it when they change
SPLIT = torch.Tensor.split
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class StorageTracker(TorchDispatchMode):
    """Adds up the bytes of all storages that live, by the component that was current when they were allocated.

    `segments` of the step, by name: the counts at its begin, and after each allocation in it.
    """

    def __init__(self, gpu: bool = False) -> None:
        super().__init__()
        self.gpu, self.component = gpu, "weights"
        self.now: Counter[str] = Counter()
        self.segments: dict[str, list[tuple[int, ...]]] = {}
        self._current: list[tuple[int, ...]] = []
        self._live: dict[int, tuple[int, str]] = {}

    def counts(self) -> tuple[int, ...]:
        """What lives now, in the order of COLUMNS."""
        return tuple(self.now[name] for name in COLUMNS)

    def enter(self, component: str) -> None:
        """What is allocated from now on belongs to this component."""
        self.component = component
        if component != "loss":  # goes with the last norm
            self.begin(component)

    def begin(self, segment: str) -> None:
        """The segment before ends here."""
        self._current.append(self.counts())
        self._current = self.segments[segment] = [self.counts()]

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if operator is torch.ops.prim.device.default:  # most calls by far: autograd asks again and again
            return arguments[0].fake_device
        output = operator(*arguments, **(options or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(output)):
            self.add(tensor)
        if self.gpu and operator is ATTENTION_BACKWARD:
            workspace = attention_workspace(*arguments[1:3])
            self.now[self.component] += workspace
            self._current.append(self.counts())
            self.now[self.component] -= workspace
        return output

    def add(self, tensor: torch.Tensor, component: str | None = None, _name: str = "") -> None:
        """Count a tensor's storage, once; with `component`, move it there."""
        storage = tensor.untyped_storage()
        key, component = storage._cdata, component or self.component
        if key in self._live:
            size, before = self._live[key]
            if component != self.component:
                self.now[before] -= size
                self.now[component] += size
                self._live[key] = size, component
            return
        size = storage.nbytes()
        self._live[key] = size, component
        self.now[component] += size
        weakref.finalize(storage, self._free, key)
        self._current.append(self.counts())

    def _free(self, key: int) -> None:
        size, component = self._live.pop(key)
        self.now[component] -= size


def attention_workspace(query: torch.Tensor, key: torch.Tensor) -> int:
    """Bytes that attention's backward pass needs on a GPU besides its results, in cuDNN and in FlashAttention-2.

    The query's gradient in fp32, a number for each of its rows, and if heads share keys and values, the gradients of
    both for each query head. Measured on an H200 (torch 2.11, cuDNN 9.19). Shapes: (batch, heads, length, width).
    """
    batch, heads, length, width = query.shape
    shared = key.shape[2] * 4 * width * (key.shape[1] < heads)
    return batch * heads * (length * (4 * width + 4) + shared)


def linear_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers in one decoder layer."""
    hidden, middle = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    read = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": middle, "up_proj": middle}
    shapes = {name: (hidden, outputs) for name, outputs in read.items()}
    return shapes | {"o_proj": (queries, hidden), "down_proj": (middle, hidden)}


def ledger(config: PreTrainedConfig, lora: Lora, shape: StepShape) -> dict[str, int]:
    """Bytes of each of COMPONENTS at the moment when one training step needs most memory, and the most on the "host".

    Linear layers are taken as NF4 with double quantisation, but for the head; the optimizer's state exists.
    """
    recomputed = min(shape.memory_savings.recomputed_layers, config.num_hidden_layers)
    plain, first = config.num_hidden_layers - recomputed, min(recomputed, 1)
    trace = _trace_at(config, lora, shape)
    live = trace["before"] + (config.num_hidden_layers - LAYERS_RUN) * trace["layer"]
    # Autocast's copies of LoRA's weights live until the last layer is left, which frees those of the layers that ran.
    copies = (trace[f"forward {RECOMPUTED}"][-1] + trace[f"backward {RECOMPUTED}"][-1]) * ON_DEVICE
    copies[COLUMNS.index("gradients")] = 0
    highest, host = live, live[COLUMNS.index(HOST)]
    for segment, times in (
        ("saved", 1),
        (f"forward {FIRST}", first),
        (f"forward {RECOMPUTED}", recomputed - first),
        (f"forward {PLAIN}", plain),
        ("head", 1),
        ("backward", 1),
        (f"backward {PLAIN}", plain),
        (f"backward {RECOMPUTED}", recomputed - first),
        (f"backward {FIRST}", first),
        ("optimizer", 1),
    ):
        *moments, change = trace[segment] - (copies * (recomputed - PLAIN) if segment == "head" else 0)
        for repetition in {0, times - 1} if times else ():  # what lives before changes evenly: the extremes are enough
            before = live + repetition * change
            highest = max((highest, *(before + moment for moment in moments)), key=ON_DEVICE.dot)
            host = max(host, *(before[COLUMNS.index(HOST)] + moment[COLUMNS.index(HOST)] for moment in moments))
        live = live + times * change
    total = dict(zip(COLUMNS, highest.round().astype(int).tolist(), strict=True))
    if shape.accumulated:
        total["gradients"] = total["adapters"]  # as many, in the same type
    if shape.processes > 1:
        total["gradients"] += total["adapters"]  # what DDP sends
    if shape.sharded:
        layer = sum(inputs * outputs for inputs, outputs in linear_shapes(config).values()) // 2
        layers = config.num_hidden_layers * layer
        total["weights"] += min(GATHERED, config.num_hidden_layers) * layer - layers + layers // shape.processes
    return total | {HOST: round(host)}


def reading(config: PreTrainedConfig, lora: Lora, dtype: str, tokens: int, *, kept: bool = False) -> int:
    """Bytes on the device at the peak while a model with adapters reads so many tokens at once and trains nothing.

    With `kept` it keeps the keys and values of all of them, from which an answer is written.
    """
    two, three = (_read_once(_with_layers(config, layers), lora, dtype, tokens) for layers in (2, 3))
    of_layer, keys = three - two, linear_shapes(config)["k_proj"][1] * tokens * getattr(torch, dtype).itemsize
    return two - 2 * of_layer + config.num_hidden_layers * (of_layer + 2 * keys * kept)


def _read_once(config: PreTrainedConfig, lora: Lora, dtype: str, tokens: int) -> int:
    tracker = StorageTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = random_llama(config, lora, dtype, made=tracker.add).eval()
        apply_memory_savings(model, READING)
        tracker.enter("saved")
        with tracker, torch.no_grad():
            hidden_states(model, torch.zeros((1, tokens), dtype=torch.long))
    return round(max(map(ON_DEVICE.dot, tracker.segments["saved"])))


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    alike = {"layer_types": None} if getattr(config, "layer_types", None) else {}  # a list with one for each layer
    return AutoConfig.for_model(**config.to_dict() | {"num_hidden_layers": layers} | alike)


def _trace_at(config: PreTrainedConfig, lora: Lora, shape: StepShape) -> dict[str, np.ndarray]:
    """The trace of a step of any length, by the line through two short ones with as many tiles."""
    model = json.dumps(_with_layers(config, LAYERS_RUN).to_dict()), json.dumps(asdict(lora))
    wanted = replace(shape.memory_savings, recomputed_layers=PLAIN)
    savings = replace(wanted, optimizer="adamw_torch_fused")
    shape = replace(shape, accumulated=False, processes=1, sharded=False, memory_savings=savings)
    rows = shape.sequences
    tiles = min(rows * MOST_TILES, rows * shape.length // savings.tile) if savings.tile else 0
    short = max(SHORT, 64 * tiles // rows)
    if config.hidden_size in (short // 2, short, 2 * short):  # offloading would mistake others for hidden states
        short = short * 3 // 2
    if shape.length <= short:
        trace = dict(_kept_trace(*model, shape))
    else:
        tile = rows * short // tiles if tiles else 0
        tiled = {times: replace(savings, tile=times * tile) for times in (1, 2)}
        shapes = [replace(shape, length=times * short, memory_savings=tiled[times]) for times in tiled]
        first, second = (_kept_trace(*model, one) for one in shapes)
        trace = {name: found + (shape.length / short - 1) * (second[name] - found) for name, found in first.items()}
    if "8bit" in wanted.optimizer:  # its state is as large at any length
        eight_bits = MemorySavings(PLAIN, 0, False, "adamw_8bit")
        other = _kept_trace(*model, StepShape(WARM_UP, shape.dtype, eight_bits))
        for name in ("before", "layer"):
            trace[name] = np.where(np.array(COLUMNS) == "optimizer", other[name], trace[name])
    return trace


@cache
def _kept_trace(config_json: str, lora_json: str, shape: StepShape) -> dict[str, np.ndarray]:
    """The trace of a run, from data/cache if it was run before."""
    config, lora = AutoConfig.for_model(**json.loads(config_json)), Lora(**json.loads(lora_json))
    kept = Cache(CACHE / "ledgers", VERSION, {"versions": package_versions()})
    inputs = {"config": json.loads(config_json), "lora": lora, "shape": shape}
    return kept.arrays("trace", lambda: _trace(config, lora, shape), **inputs)


def _trace(config: PreTrainedConfig, lora: Lora, shape: StepShape) -> dict[str, np.ndarray]:
    """What a step of three layers allocates, by segment: arrays with one column for each of COLUMNS.

    A row after each allocation, in bytes above those before the segment; the last row is after its end. Besides:
    "before" the step, and of what lives then the part of one "layer".
    """
    tracker, of_layer = StorageTracker(shape.gpu), Counter()

    def made(tensor: torch.Tensor, component: str, name: str) -> None:
        tracker.add(tensor, component)
        if f".layers.{PLAIN}." in name:
            of_layer[component] += tensor.untyped_storage().nbytes()

    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(torch.Tensor, "split", _first_parts):
        model = random_llama(config, lora, shape.dtype, packed=shape.packed, context=shape.context, made=made)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: tracker.add(weight.grad, "gradients"))
        _begin_segments(model, tracker)
        with tracker:
            counted = _CountedOffload(config.hidden_size, tracker)
            list(training_steps(model, shape, [shape.length], entering=tracker.enter, offloading=counted, begun=True))
            tracker.begin("end")
    before = np.array(tracker.segments["saved"][0], dtype=float)
    of_layer["optimizer"] = before[COLUMNS.index("optimizer")] * of_layer["adapters"] / tracker.now["adapters"]
    trace = {name: np.array(counts, dtype=float) for name, counts in tracker.segments.items() if name != "end"}
    trace = {name: counts[1:] - counts[0] for name, counts in trace.items()}
    # The loss takes chunk after chunk, as many as the length asks for: only its peak is alike at every length.
    head = trace["head"]
    trace["head"] = np.stack([max(head, key=ON_DEVICE.dot), head[-1]])
    return {**trace, "before": before, "layer": np.array([of_layer[name] for name in COLUMNS], dtype=float)}


def _first_parts(tensor: torch.Tensor, size: Any, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """In place of `split`: of tiles, and of the loss' chunks, the first few. Fake results need no others."""
    of_tokens = tensor.ndim < 3 and not dim and isinstance(size, int)
    return SPLIT(tensor[: ALIKE * size] if of_tokens else tensor, size, dim)


def _begin_segments(model: PeftModel, tracker: StorageTracker) -> None:
    """Let the forward and backward pass of each layer, and what lies behind the last one, begin a segment."""

    def forward(index: int, hidden: torch.Tensor) -> None:
        tracker.begin(f"forward {index}" if index < LAYERS_RUN else "head")
        if hidden.requires_grad:
            hidden.register_hook(lambda _gradient: tracker.begin(f"backward {index - 1}") if index else None)

    inner = causal_lm(model).model
    kind = type(inner.layers[0])

    # A hook would run when the layer is recomputed, too, and after checkpointing has kept its input.
    class Segment(kind):
        def __call__(self, hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            forward(self.self_attn.layer_idx, hidden)
            return super().__call__(hidden, *arguments, **options)

    for layer in inner.layers:
        layer.__class__ = Segment
    inner.norm.register_forward_pre_hook(lambda _norm, inputs: forward(LAYERS_RUN, inputs[0]))


class _CountedOffload(OffloadedCheckpoints):
    """Offloading among fake tensors, which are all on the CPU: copies to the host are counted as such."""

    def __init__(self, hidden_size: int, tracker: StorageTracker) -> None:
        super().__init__(hidden_size)
        self.tracker = tracker

    def to_host(self, tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        if not self.is_checkpoint(tensor):
            return tensor.device, tensor
        before, self.tracker.component = self.tracker.component, HOST
        host = tensor.detach().clone()
        self.tracker.component = before
        return tensor.device, host

    def to_device(self, saved: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        return saved[1].clone() if self.is_checkpoint(saved[1]) else saved[1]
