"""What every notebook does: it starts with checked parameters, checks claims and states findings."""

import logging
import warnings
from typing import Any

from llama_long_utils.presets import preset_from_parameters
from llama_long_utils.progress import headless
from llama_long_utils.settings import Preset


def check(claim: str, holds: bool) -> None:
    """Print a claim that holds; raise AssertionError with it if it does not."""
    if not holds:
        raise AssertionError(f"does not hold: {claim}")
    print(f"holds: {claim}")


def finding(claim: str, holds: bool) -> None:
    """Print whether a measured claim holds. Another preset may find something else, and its notebook goes on."""
    print(f"{'holds' if holds else 'does not hold'}: {claim}")


def start(namespace: dict[str, Any], parameters: dict[str, Any]) -> Preset:
    """The preset of a notebook, after its parameters were checked. Sets the style and silences the libraries.

    Args:
        namespace: the notebook's `globals()`.
        parameters: the notebook's parameters and their types, see `preset_from_parameters`.
    """
    preset = preset_from_parameters(namespace, parameters)
    for name in ("transformers", "peft", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    from llama_long_utils.figures import use_style
    from llama_long_utils.training.host_memory import keep_freed_memory

    transformers_logging.set_verbosity_error()  # the import has set its own level
    warnings.filterwarnings("ignore", category=FutureWarning)
    if headless():
        transformers_logging.disable_progress_bar()
    use_style()
    keep_freed_memory()
    return preset
