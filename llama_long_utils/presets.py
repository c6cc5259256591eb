"""Reading presets: every number that differs between a laptop and a GPU, in one file each."""

import difflib
import json
import tomllib
from pathlib import PurePath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llama_long_utils.paths import PRESETS
from llama_long_utils.settings import (
    BaseModel,
    Data,
    Evaluation,
    Extension,
    Lora,
    MemorySavings,
    Preset,
    Race,
    RaceTraining,
    Retrieval,
    RetrievalTasks,
    TrainingSettings,
)


def preset_names() -> list[str]:
    """The presets there are, by name."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str) -> Preset:
    """Read and validate presets/NAME.toml.

    Raises:
        ValueError: there is no such preset, or a key is unknown, missing or of the wrong type; the
            message names it and the closest known name.
    """
    if name not in preset_names():
        raise ValueError(f"unknown preset {name!r}: use one of {preset_names()}{_closest(name, preset_names())}")
    try:
        values = tomllib.loads((PRESETS / f"{name}.toml").read_text())
        # As JSON, because pydantic's strict mode takes dataclasses from nothing else.
        preset = TypeAdapter(Preset).validate_json(json.dumps({"name": name, **values}))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"presets/{name}.toml is not valid TOML: {error}") from error
    except ValidationError as error:
        raise ValueError(f"presets/{name}.toml: {_explain(error)}") from None
    _check_consistency(preset)
    return preset


def preset_from_parameters(namespace: dict[str, Any], parameters: dict[str, Any]) -> Preset:
    """The preset that a notebook's parameters ask for, after checking that all of them are known.

    papermill only warns about a parameter that the notebook does not have; it still defines it, so
    an unknown one is a literal in the namespace under a name that is not in `parameters`.

    Args:
        namespace: the notebook's `globals()`, in the cell right after the parameters.
        parameters: the names the notebook has, and their types.

    Raises:
        ValueError: a name is unknown or a value of the wrong type.
    """
    literals = (str, int, float, bool, list, dict, type(None))
    builtin = {"In", "Out", "exit", "quit"}
    for name, value in namespace.items():
        known = name in parameters or name in builtin or name.startswith("_")
        if not known and isinstance(value, literals):
            names = list(parameters)
            raise ValueError(f"unknown parameter {name!r}: this notebook has {names}{_closest(name, names)}")
    for name, wanted in parameters.items():
        if not isinstance(namespace[name], wanted):
            kind = getattr(wanted, "__name__", str(wanted))
            raise ValueError(f"parameter {name} = {namespace[name]!r} must be of type {kind}")
    return load_preset(namespace["preset"])


def _check_consistency(preset: Preset) -> None:
    try:
        preset.extended_rope  # noqa: B018 (its own checks run)
    except ValidationError as error:
        raise ValueError(f"presets/{preset.name}.toml, [extension]: {_explain(error)}") from None
    if preset.training.reach > preset.extension.window:
        raise ValueError(
            f"presets/{preset.name}.toml: training.reach = {preset.training.reach} is longer than "
            f"extension.window = {preset.extension.window}"
        )
    sources = preset.data.sources
    unknown = set(preset.data.held_out) - set(sources) - {PurePath(source).name for source in sources}
    if unknown:
        raise ValueError(
            f"presets/{preset.name}.toml: data.held_out names {sorted(unknown)}, which data.sources = "
            f"{sources} does not have"
        )
    edges = preset.evaluation.bucket_edges
    tokens, far_tokens = preset.evaluation.tokens, preset.evaluation.far_tokens
    if sorted(set(edges)) != edges or edges[-1] != far_tokens or tokens not in edges:
        raise ValueError(
            f"presets/{preset.name}.toml: evaluation.bucket_edges must rise from at least 1 over evaluation.tokens = "
            f"{tokens} to evaluation.far_tokens = {far_tokens}, got {edges}"
        )
    for name, values in (("lengths", preset.retrieval.lengths), ("tasks.depths", preset.retrieval.tasks.depths)):
        if sorted(set(values)) != values:
            raise ValueError(
                f"presets/{preset.name}.toml: retrieval.{name} must rise, got {values}: use {sorted(set(values))}"
            )


def _explain(error: ValidationError) -> str:
    parts = [Preset, BaseModel, Extension, Data, Lora, TrainingSettings, MemorySavings, Evaluation, Retrieval, Race]
    known = [field for part in [*parts, RetrievalTasks, RaceTraining] for field in part.__dataclass_fields__]
    messages = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "unexpected_keyword_argument":
            messages.append(f"unknown key {key!r}{_closest(str(problem['loc'][-1]), known)}")
        elif problem["type"] in ("missing", "missing_argument"):
            messages.append(f"key {key!r} is missing")
        elif problem["type"] == "value_error":  # one of our own, which names the value
            messages.append(f"{key + ': ' if key else ''}{problem['ctx']['error']}")
        else:
            messages.append(f"{key} = {problem['input']!r}: {problem['msg']}")
    return "; ".join(messages)


def _closest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
