"""What one training step needs in memory, by component, without a GPU and without weights.

The ledger runs the real model class, PEFT's adapters, bitsandbytes' 4-bit operators and our loss under
torch's fake tensors, which have shapes and no data, and notes every storage that is allocated and freed.
torch's own `MemTracker` does not take frozen parameters (it hooks every gradient), hence `StorageTracker`.
The same steps run with real tensors and random weights (`random_llama`, `training_steps`), to compare.
"""

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW8bit
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.settings import Lora, MemorySavings
from llama_long_utils.training.memory_savings import OffloadedCheckpoints, apply_memory_savings

# Where the bytes of a step are: frozen weights; trainable weights; their gradients; what the optimizer keeps; what the
# forward pass leaves for the backward pass (with checkpointing: one hidden state per layer); the loss; and what the
# backward pass makes: recomputed activations and their gradients.
COMPONENTS = ("weights", "adapters", "gradients", "optimizer", "saved", "loss", "backward")
HOST = "host"  # what offloading keeps in host memory
MOVED = "moved"  # what operations read and write that compute little: their time is that of the memory
INTENSITY = 20  # operations per byte, above which a matrix product counts as computing
# Whole sequences need no mask. transformers sees that in the data, and fake tensors have none.
UNMASKED = "sdpa_unmasked"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(UNMASKED, lambda *_arguments, **_options: None)
LAYERS_RUN = 2  # of each kind, recomputed or not
WARM_UP = 16  # tokens
BLOCK = 64  # weights that share a scale in bitsandbytes' NF4


@dataclass(frozen=True)
class StepShape:
    """A training step: `length` tokens in each of `sequences` rows, computed in `dtype` ("bfloat16" or "float32").

    Whole sequences: packed ones need a mask of length x length as well. `accumulated`: gradients of an earlier batch
    are there already.
    """

    length: int
    dtype: str
    memory_savings: MemorySavings
    sequences: int = 1
    accumulated: bool = False


class StorageTracker(TorchDispatchMode):
    """Adds up the bytes of all storages that live, by the component that was current when they were allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.component = "weights"
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.highest = self.host = self.moved = 0
        self._live: dict[int, tuple[int, str]] = {}

    def enter(self, component: str) -> None:
        """What is allocated from now on belongs to this component; a new step starts with "saved"."""
        self.component = component
        if component == "saved":
            self.highest = self.moved = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        output = operator(*arguments, **options)
        made, read = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
            for tree in (output, (arguments, options))
        )
        for tensor in made:
            self.add(tensor)
        known = {tensor.untyped_storage()._cdata for tensor in read}
        is_new = any(tensor.untyped_storage()._cdata not in known for tensor in made)
        # Attention and the products with 4-bit weights are counted by their operations, and `empty` moves nothing.
        counted = any(name in operator.name() for name in ("scaled_dot_product", "gemm_4bit", "aten::empty"))
        if (is_new or operator._schema.is_mutable) and not counted:
            if "aten::copy_" in operator.name():
                read = read[1:]  # what is overwritten is not read
            moved = sum(tensor.nbytes for tensor in read + made)
            count = flop_registry.get(operator.overloadpacket)
            if not count or count(*arguments, **options, out_val=output) < INTENSITY * moved:
                self.moved += moved
        return output

    def add(self, tensor: torch.Tensor, component: str | None = None) -> None:
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
        total = self.now.total() - self.now[HOST]
        if total > self.highest:
            self.highest, self.peak = total, dict(self.now)
        self.host = max(self.host, self.now[HOST])

    def _free(self, key: int) -> None:
        size, component = self._live.pop(key)
        self.now[component] -= size


def ledger(config: LlamaConfig, lora: Lora, shape: StepShape) -> dict[str, int]:
    """Bytes of each component at the moment when one training step needs most memory.

    The step is a second one: the optimizer's state exists. A few seconds for any model, on any machine: beyond two
    layers of a kind, recomputed or not, every further one adds what the second added to one.

    Args:
        config: of the model; its linear layers are taken as NF4 with double quantisation, but for the head.

    Returns:
        Bytes by name: those of COMPONENTS, whose sum is the peak; the most that offloading keeps on the "host"; and
        what the step's operations read and write, but for attention and large matrix products, as "moved".
    """
    recomputed = min(shape.memory_savings.recomputed_layers, config.num_hidden_layers)
    wanted = [recomputed, config.num_hidden_layers - recomputed]
    run = [min(count, LAYERS_RUN) for count in wanted]
    any_count = replace(shape, memory_savings=replace(shape.memory_savings, recomputed_layers=0))
    counted = partial(_run, config.to_json_string(use_diff=False), json.dumps(asdict(lora)), any_count)
    most = counted(*run)
    total = dict(most)
    for kind, left_out in enumerate(count - LAYERS_RUN for count in wanted):
        if left_out > 0:
            less = counted(*(count - (index == kind) for index, count in enumerate(run)))
            total = {name: total[name] + left_out * (most[name] - less[name]) for name in total}
    if shape.accumulated:
        total["gradients"] = total["adapters"]  # as many, in the same type
    return total


def above_weights(counts: dict[str, int]) -> int:
    """Bytes of a ledger's peak that are not there before the step: all but weights and adapters."""
    return sum(counts[name] for name in COMPONENTS) - counts["weights"] - counts["adapters"]


@cache
def _run(config_json: str, lora_json: str, shape: StepShape, recomputed: int, plain: int) -> dict[str, int]:
    """The counts of a model with so many layers; kept, because a planner asks for the same ones again."""
    config = LlamaConfig(**{**json.loads(config_json), "num_hidden_layers": recomputed + plain})
    lora = Lora(**json.loads(lora_json))
    shape = replace(shape, memory_savings=replace(shape.memory_savings, recomputed_layers=recomputed))
    tracker = StorageTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = random_llama(config, lora, shape.dtype, made=tracker.add)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: tracker.add(weight.grad, "gradients"))
        with tracker:
            offloading = _CountedOffload(config.hidden_size, tracker)
            # A short step first: it makes the optimizer's state.
            for _loss in training_steps(
                model, shape, [WARM_UP, shape.length], entering=tracker.enter, offloading=offloading
            ):
                pass
    return {**{name: tracker.peak.get(name, 0) for name in COMPONENTS}, HOST: tracker.host, MOVED: tracker.moved}


def training_steps(
    model: PeftModel,
    shape: StepShape,
    lengths: Sequence[int],
    *,
    entering: Callable[[str], None] = lambda _component: None,
    offloading: AbstractContextManager | None = None,
) -> Iterator[torch.Tensor]:
    """Steps of the training loop on random tokens, without the `Trainer` around them.

    Args:
        model: from `random_llama`.
        shape: everything about the steps but their length.
        lengths: tokens per sequence of each step.
        entering: called with the name of each component whose turn it is.
        offloading: what offloads checkpoints if the memory_savings ask for it.

    Yields:
        After each step its loss in nats per token, a scalar.
    """
    apply_memory_savings(model.train(), shape.memory_savings)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    in_8_bits = "8bit" in shape.memory_savings.optimizer
    with unset_fake_temporarily():  # 8 bits need a table of real numbers
        optimizer = AdamW8bit(trained) if in_8_bits else torch.optim.AdamW(trained, fused=True)
    head = causal_lm(model).get_output_embeddings()
    offloading = offloading or OffloadedCheckpoints(head.weight.shape[1])
    for length in lengths:
        entering("saved")
        ids = torch.randint(len(head.weight), (shape.sequences, length))
        with offloading if shape.memory_savings.offload_checkpoints else nullcontext():
            hidden = hidden_states(model, ids)
        entering("loss")
        nll = next_token_nll(hidden, head, ids) / ids.numel()
        entering("backward")
        nll.backward()
        loss = nll.detach()
        del hidden, nll
        entering("optimizer")
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


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


Made = Callable[[torch.Tensor, str], None]


def random_llama(
    config: LlamaConfig, lora: Lora, dtype: str, *, made: Made = lambda _tensor, _component: None
) -> PeftModel:
    """A Llama with random weights in NF4 and adapters on it, as transformers, bitsandbytes and PEFT build it.

    It is built without weights; then each gets its own and is packed to 4 bits before the next, so that no more than
    one weight exists in 16 bits at a time.

    Args:
        dtype: "bfloat16" or "float32", as in `models.load_base`.
        made: called with each tensor and its component.
    """
    config = type(config)(**{**config.to_dict(), "dtype": dtype})
    config._attn_implementation = UNMASKED
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    before = torch.get_default_dtype()
    with unset_fake_temporarily(), torch.device("meta"):
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
        model.is_loaded_in_4bit = True
        adapted = add_lora(model, lora, seed=0)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    _fill(adapted, made)
    model.tie_weights()
    return adapted


def _fill(model: PeftModel, made: Made) -> None:
    with unset_fake_temporarily():  # makes its tables, with real data
        quantize_4bit(torch.ones(BLOCK), compress_statistics=True, quant_type="nf4")
    tied = causal_lm(model).config.tie_word_embeddings
    for module_name, module in model.named_modules():
        if tied and module_name.endswith("lm_head"):
            continue
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            full_name = f"{module_name}.{name}"
            values = torch.empty(weight.shape, dtype=weight.dtype)
            if "norm" in full_name:
                values.fill_(1.0)
            elif "lora_B" in full_name:
                values.zero_()
            else:
                values.normal_(std=0.02)
            component = "adapters" if weight.requires_grad else "weights"
            if isinstance(module, Linear4bit) and name == "weight":
                values, state = quantize_4bit(values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
                module.support_avx512bf16_for_cpu = False  # as models.load_base sets it
                for scales in (state.absmax, state.state2.absmax, state.state2.code, state.code):
                    made(scales, component)
            new = nn.Parameter(values, requires_grad=weight.requires_grad)
            if isinstance(module, Linear4bit) and name == "weight":
                vars(new).update(quant_state=state, bnb_quantized=True)
            module._parameters[name] = new
            made(new, component)
