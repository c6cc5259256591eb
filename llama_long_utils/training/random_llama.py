"""A Llama with random weights in NF4, and its training steps on random tokens: real tensors, or torch's fake ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llama_long_utils.model.adapters import add_lora
from llama_long_utils.model.attention import DOCUMENTS, ContextShare, share_context
from llama_long_utils.model.base import nf4
from llama_long_utils.model.loss import causal_lm, hidden_states, next_token_nll
from llama_long_utils.model.memory_savings import OffloadedCheckpoints, apply_memory_savings
from llama_long_utils.settings import Lora, MemorySavings

# Whole sequences need no mask. transformers sees that in the data, and fake tensors have none.
UNMASKED = "sdpa_unmasked"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(UNMASKED, lambda *_arguments, **_options: None)
BLOCK = 64  # weights that share a scale in bitsandbytes' NF4
Made = Callable[[torch.Tensor, str, str], None]


@dataclass(frozen=True)
class StepShape:
    """A training step: `length` tokens in each of `sequences` whole rows, computed in `dtype`.

    `accumulated`: gradients of an earlier batch are there. `gpu`: `ledger.attention_workspace` is counted, too.
    `packed`: "documents" attention, whose peak is highest if the last token alone is a document of its own.
    `context`: of the `processes`, those that share a row, of which this one has `length` tokens. `sharded`: all of the
    processes share the layers' frozen weights.
    """

    length: int
    dtype: str
    memory_savings: MemorySavings
    sequences: int = 1
    accumulated: bool = False
    gpu: bool = False
    packed: bool = False
    context: int = 1
    processes: int = 1
    sharded: bool = False


def training_steps(
    model: PeftModel,
    shape: StepShape,
    lengths: Sequence[int],
    *,
    entering: Callable[[str], None] = lambda _component: None,
    offloading: AbstractContextManager | None = None,
    begun: bool = False,
) -> Iterator[torch.Tensor]:
    """Steps on random tokens of the training loop, each of its length; yields their losses in nats per token.

    `entering` is called with the name of each component whose turn it is; `offloading` replaces `OffloadedCheckpoints`.
    `begun`: the optimizer's state is there before the first step.
    """
    apply_memory_savings(model.train(), shape.memory_savings)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    in_8_bits = "8bit" in shape.memory_savings.optimizer
    with unset_fake_temporarily():  # 8 bits need a table of real numbers
        paged = shape.memory_savings.optimizer.startswith("paged") and trained[0].is_cuda
        eight_bits = PagedAdamW8bit if paged else AdamW8bit
        optimizer = eight_bits(trained) if in_8_bits else torch.optim.AdamW(trained, fused=True)
    head = causal_lm(model).get_output_embeddings()
    offloading = offloading or OffloadedCheckpoints(head.weight.shape[1])
    if begun:
        entering("optimizer")
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad()
    for length in lengths:
        entering("saved")
        ids = torch.randint(len(head.weight), (shape.sequences, length), device=head.weight.device)
        positions = torch.arange(length, device=ids.device)[None]
        positions[:, -1] *= not shape.packed
        with offloading if shape.memory_savings.offload_checkpoints else nullcontext():
            hidden = hidden_states(model, ids, positions)
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


def random_llama(
    config: PreTrainedConfig,
    lora: Lora,
    dtype: str,
    *,
    packed: bool = False,
    context: int = 1,
    device: str = "cpu",
    made: Made = lambda _tensor, _component, _name: None,
) -> PeftModel:
    """A Llama with random weights in NF4 and adapters on it, as transformers, bitsandbytes and PEFT build it.

    Each weight is packed to 4 bits before the next is made, so that one exists in 16 bits at a time. `made` is called
    with each tensor, its component and the name of its weight. `packed` and `context`: as in `StepShape`.
    """
    config = type(config)(**{**config.to_dict(), "dtype": dtype})
    config._attn_implementation = DOCUMENTS if packed else UNMASKED
    with unset_fake_temporarily(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
        model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=nf4(dtype))
        model.is_loaded_in_4bit = True
        adapted = add_lora(model, lora, seed=0)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    _fill(adapted, device, made)
    model.tie_weights()
    if context > 1:
        share_context(adapted, ContextShare(size=context))
    return adapted


def _fill(model: PeftModel, device: str, made: Made) -> None:
    with unset_fake_temporarily():  # makes its tables, with real data
        quantize_4bit(torch.ones(BLOCK, device=device), compress_statistics=True, quant_type="nf4")
    tied = causal_lm(model).config.tie_word_embeddings
    for module_name, module in model.named_modules():
        for name, weight in list(module._parameters.items()):
            if weight is None or (tied and module_name.endswith("lm_head")):
                continue
            full_name = f"{module_name}.{name}"
            values = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            if "norm" in full_name:
                values.fill_(1.0)
            elif "lora_B" in full_name:
                values.zero_()
            else:
                values.normal_(std=0.02)
            component = "adapters" if weight.requires_grad else "weights"
            packed = {}
            if isinstance(module, Linear4bit) and name == "weight":
                values, state = quantize_4bit(values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
                module.support_avx512bf16_for_cpu = False  # as `load_base` sets it
                for scales in (state.absmax, state.state2.absmax, state.state2.code, state.code):
                    made(scales, component, full_name)
                packed = {"quant_state": state, "bnb_quantized": True}
            new = nn.Parameter(values, requires_grad=weight.requires_grad)
            vars(new).update(packed)
            module._parameters[name] = new
            made(new, component, full_name)
