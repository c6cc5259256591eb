"""Where the models of the pretraining experiment are trained and read: a GPU if there is one, else a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import LlamaForCausalLM

from llama_long_utils.model import loss
from llama_long_utils.training.processes import join_processes

COMPILE = True  # unless it was found to be no faster
LABELS_AT_ONCE = 8192  # whose logits of 2,048 tokens each exist at a time on a GPU: 64 MiB; fewer are launches only


def on_device(model: LlamaForCausalLM, *, bf16: bool, compiled: bool) -> LlamaForCausalLM:
    """The model where it is trained, its decoder in bf16 autocast; on a GPU its layers may be compiled.

    All layers share what is compiled. A layer that cannot be compiled runs as it is.
    """
    device = join_processes().device
    decoder = model.to(device).model
    decoder.forward = torch.autocast(device.type, torch.bfloat16, enabled=bf16)(decoder.forward)
    if compiled and COMPILE and device.type == "cuda":
        compile_layers(model)
    return model


def compile_layers(model: LlamaForCausalLM) -> None:
    """Let each layer be compiled when it first runs, for the one shape that it gets."""
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 64  # lengths, attentions, models
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def for_reading(model: LlamaForCausalLM) -> None:
    """Take back what `on_device` did but for the place: fp32, nothing compiled."""
    vars(model.model).pop("forward", None)
    for layer in model.model.layers:
        layer._compiled_call_impl = None


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """On a GPU, let products of fp32 be computed in TF32 and the loss take many tokens at once, while training."""
    if device.type != "cuda":
        yield
        return
    before, chunk = torch.get_float32_matmul_precision(), loss.CHUNK
    torch.set_float32_matmul_precision("high")
    loss.CHUNK = LABELS_AT_ONCE
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        loss.CHUNK = chunk
