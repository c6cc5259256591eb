"""Loading a base in NF4 with its RoPE scaled, and checking that it rotates as asked."""

from importlib import import_module
from pathlib import Path

import torch
from accelerate import PartialState
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from llama_long_utils.model import attention as _registered  # noqa: F401 ("documents")
from llama_long_utils.model.loss import Model, causal_lm
from llama_long_utils.model.weights import LOCAL
from llama_long_utils.rope import rotation
from llama_long_utils.settings import Scaling

XPOS = "xpos"


def nf4(dtype: str) -> BitsAndBytesConfig:
    """Linear layers in NF4 with double quantisation, multiplied in `dtype`."""
    options = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": getattr(torch, dtype)}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def load_base(
    folder: Path,
    rope: Scaling,
    *,
    dtype: str,
    quantized: bool = True,
    attention: str = "sdpa",
    on_host: bool = False,
    reward: bool = False,
) -> PreTrainedModel:
    """The base in a folder with its RoPE scaled as given, on the process' own GPU if there is one, or `on_host`.

    Args:
        dtype: "bfloat16" or "float32": of embeddings, head, norms, the residual stream and all arithmetic.
        quantized: the linear layers in NF4 with double quantisation; else in `dtype`, too.
        attention: as transformers names it; xPos brings its own.
        reward: with a new head for one number in place of the one for tokens.
    """
    if rope.method == "xpos_abf" or attention == "s2":
        import_module("experiments.attention")  # has both
    quantization, kind, options = nf4(dtype) if quantized else None, AutoModelForCausalLM, {}
    if reward:
        kind, options = AutoModelForSequenceClassification, {"num_labels": 1}
        if quantization:
            quantization.llm_int8_skip_modules = ["score"]
    logging.disable_progress_bar()  # the weights are on this disk
    verbosity = logging.get_verbosity()
    if reward:
        logging.set_verbosity_error()  # no report that a new head is new
    try:
        model, loaded = kind.from_pretrained(
            folder,
            quantization_config=quantization,
            dtype=getattr(torch, dtype),
            rope_parameters=rope.parameters(),
            max_position_embeddings=rope.max_position_embeddings,
            attn_implementation=XPOS if rope.method == "xpos_abf" else attention,
            device_map={"": PartialState().device if torch.cuda.is_available() and not on_host else "cpu"},
            output_loading_info=True,
            **options,
            **LOCAL,
        )
    finally:
        logging.set_verbosity(verbosity)
    if reward and (missing := {*loaded["missing_keys"]} - {"score.weight"}):
        raise ValueError(f"{folder} has no weights for {', '.join(sorted(missing))}")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # A forward without gradients in eval mode would repack the weights for inference on CPUs
            # with AVX512-BF16, and from then on most LoRA matrices would silently get no gradient.
            module.support_avx512bf16_for_cpu = False
    if rope.method == "xpos_abf":
        model.config.xpos_window = rope.original_window
    if not reward:  # without penalties on repetition and the like, which "greedy" would obey, too
        published = model.generation_config
        plain, ends = type(published).from_model_config(model.config), published.eos_token_id
        plain.update(use_cache=True, eos_token_id=plain.eos_token_id if ends is None else ends)
        model.generation_config = plain
    check_rope(model, rope)
    return model


def check_rope(model: Model, rope: Scaling) -> None:
    """Raise ValueError unless the model rotates exactly as `rope` says, by fp32 frequencies."""
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    if rotary.inv_freq.dtype != torch.float32:
        raise ValueError(f"inv_freq is {rotary.inv_freq.dtype}, which loses radians at long range: load with dtype=")
    config = causal_lm(model).config
    inv_freq, attention_factor = rotation(rope)
    same = (
        rotary.inv_freq.shape == inv_freq.shape
        and torch.allclose(rotary.inv_freq.cpu(), inv_freq, rtol=1e-6, atol=0)
        and abs(rotary.attention_scaling - attention_factor) < 1e-6
        and config.max_position_embeddings == rope.max_position_embeddings
        and (config._attn_implementation == XPOS) == (rope.method == "xpos_abf")
    )
    if not same:
        raise ValueError(
            f"the model does not rotate as asked ({rope}) but with {config.rope_parameters} and window "
            f"{config.max_position_embeddings:,}: RoPE is set at load, with load_base(folder, rope)"
        )
