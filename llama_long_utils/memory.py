"""What one training step needs in memory, by component, without a GPU and without weights.

The ledger runs the real model class, PEFT's adapters, bitsandbytes' 4-bit operators and our loss under
torch's fake tensors, which have shapes and no data, and notes every storage that is allocated and freed.
torch's own `MemTracker` does not take frozen parameters (it hooks every gradient), hence `StorageTracker`.
"""

import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llama_long_utils.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.models import add_lora
from llama_long_utils.presets import Lora
from llama_long_utils.training import OffloadedCheckpoints, tile_over_sequence

# Where the bytes of a step are: frozen weights; trainable weights; their gradients; what the optimizer keeps; what the
# forward pass leaves for the backward pass (with checkpointing: one hidden state per layer); the loss; and what the
# backward pass makes: recomputed activations and their gradients.
COMPONENTS = ("weights", "adapters", "gradients", "optimizer", "saved", "loss", "backward")
HOST = "host"  # what offloading keeps in host memory
# Whole sequences need no mask. transformers sees that in the data, and fake tensors have none.
UNMASKED = "sdpa_unmasked"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(UNMASKED, lambda *_arguments, **_options: None)
LAYERS_RUN = 3
BLOCK = 64  # weights that share a scale in bitsandbytes' NF4


@dataclass(frozen=True)
class StepShape:
    """A training step: `length` tokens in each of `sequences` rows, computed in `dtype` ("bfloat16" or "float32").

    `tile` and `offload` are `training.tile_over_sequence` and `training.OffloadedCheckpoints`.
    """

    length: int
    dtype: str
    gradient_checkpointing: bool
    tile: int = 0
    offload: bool = False
    sequences: int = 1


class StorageTracker(TorchDispatchMode):
    """Adds up the bytes of all storages that live, by the component that was current when they were allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.component = "weights"
        self.now: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.highest = self.host = 0
        self._live: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        output = operator(*arguments, **(options or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
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

    The step is a second one: the optimizer's state exists. A few seconds for any model, on any machine: beyond three
    layers every further one adds what the third added to two.

    Args:
        config: of the model; its linear layers are taken as NF4 with double quantisation, but for the head.

    Returns:
        Bytes by name: those of COMPONENTS, whose sum is the peak, and the most that offloading keeps on the "host".
    """
    layers = config.num_hidden_layers
    if layers <= LAYERS_RUN:
        return _run(config, lora, shape)
    less, more = (
        _run(type(config)(**{**config.to_dict(), "num_hidden_layers": count}), lora, shape)
        for count in (LAYERS_RUN - 1, LAYERS_RUN)
    )
    return {name: more[name] + (layers - LAYERS_RUN) * (more[name] - less[name]) for name in more}


def _run(config: LlamaConfig, lora: Lora, shape: StepShape) -> dict[str, int]:
    model = _outline(config, lora, shape)
    tracker = StorageTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_fake_weights(model, tracker)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in trained:
            weight.register_post_accumulate_grad_hook(lambda weight: tracker.add(weight.grad, "gradients"))
        optimizer = torch.optim.AdamW(trained, fused=True)
        with tracker:
            for _first_then_second in range(2):
                tracker.highest = 0
                tracker.component = "saved"
                ids = torch.zeros(shape.sequences, shape.length, dtype=torch.long)
                with _CountedOffload(config.hidden_size, tracker) if shape.offload else nullcontext():
                    hidden = hidden_states(model, ids)
                tracker.component = "loss"
                nll = next_token_nll(hidden, causal_lm(model).get_output_embeddings(), ids)
                tracker.component = "backward"
                nll.backward()
                del hidden, nll
                tracker.component = "optimizer"
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return {**{name: tracker.peak.get(name, 0) for name in COMPONENTS}, HOST: tracker.host}


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


def _outline(config: LlamaConfig, lora: Lora, shape: StepShape) -> PeftModel:
    """The model with its adapters as transformers, bitsandbytes and PEFT build it, on the meta device."""
    dtype = getattr(torch, shape.dtype)
    config = type(config)(**{**config.to_dict(), "dtype": shape.dtype})
    config._attn_implementation = UNMASKED
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    before = torch.get_default_dtype()
    with torch.device("meta"):
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
        model.is_loaded_in_4bit = True
        adapted = add_lora(model, lora, seed=0)
    if shape.gradient_checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    tile_over_sequence(adapted, shape.tile)
    return adapted.train()


def _give_fake_weights(model: PeftModel, tracker: StorageTracker) -> None:
    """Put fake tensors in place of meta ones, packed to 4 bits by bitsandbytes where a layer is quantised."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        quantize_4bit(torch.ones(BLOCK), compress_statistics=True, quant_type="nf4")  # makes its tables, with real data
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            tracker.component = "adapters" if weight.requires_grad else "weights"
            fake = torch.empty(weight.shape, dtype=weight.dtype)
            if isinstance(module, Linear4bit) and name == "weight":
                fake, state = quantize_4bit(fake, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
                module.support_avx512bf16_for_cpu = False  # as models.load_base sets it
                for scales in (state.absmax, state.state2.absmax, state.state2.code, state.code):
                    tracker.add(scales)
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
                vars(module._parameters[name]).update(quant_state=state, bnb_quantized=True)
            else:
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
            tracker.add(module._parameters[name])
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
