"""Presets: every number that differs between a laptop and a GPU, in one file each, in presets/."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from llama_long_utils.documents import REPOSITORY
from llama_long_utils.rope import Method, Scaling
from llama_long_utils.training import STRICT, Techniques, TrainingSettings

FOLDER = REPOSITORY / "presets"


@dataclass(frozen=True, config=STRICT)
class BaseModel:
    """The model to extend. `source` is a folder of this repository or a model on the hub.

    `dtype` is what it computes in: bfloat16 where the hardware multiplies it (GPUs, some CPUs), float32
    elsewhere. A CPU that emulates bfloat16 multiplies it 50 to 80 times slower than float32 (measured on AVX2).
    """

    source: str
    dtype: Literal["float32", "bfloat16"]
    window: PositiveInt
    rope_base: PositiveFloat
    head_dim: Annotated[int, Field(gt=0, multiple_of=2)]


@dataclass(frozen=True, config=STRICT)
class Extension:
    """What it is extended to: a window in tokens, by a method of `rope.METHODS` at a RoPE base."""

    window: PositiveInt
    method: Method
    rope_base: PositiveFloat
    pair_factors: tuple[float, ...] = ()
    rotated_share: float = 1.0


@dataclass(frozen=True, config=STRICT)
class Data:
    """Document sources (see `documents.load_documents`) and how many of each are held out."""

    sources: Annotated[list[str], Field(min_length=1)]
    held_out: dict[str, PositiveInt]
    minimum_characters: PositiveInt
    split_seed: NonNegativeInt


@dataclass(frozen=True, config=STRICT)
class Lora:
    rank: PositiveInt
    alpha: PositiveInt
    target_modules: Annotated[list[str], Field(min_length=1)]
    train_norms: bool
    train_embeddings: bool


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """What notebook 6 reads, and how it averages.

    Attributes:
        tokens: length of the stretches read of each held-out document.
        far_tokens: length of the stretches of one document of each source, where it is more than `tokens`.
        stretches: of each document, at most.
        copied_documents: that the test of copying reads, at most.
        bucket_edges: positions at which the buckets begin, and where the last one ends.
    """

    tokens: PositiveInt
    far_tokens: PositiveInt
    stretches: PositiveInt
    copied_documents: PositiveInt
    bucket_edges: Annotated[list[PositiveInt], Field(min_length=2)]
    bootstrap_samples: PositiveInt
    seed: NonNegativeInt

    @property
    def near_edges(self) -> list[int]:
        """The bucket edges up to `tokens`, between which every document was read."""
        return [edge for edge in self.bucket_edges if edge <= self.tokens]


@dataclass(frozen=True, config=STRICT)
class RetrievalTasks:
    """What only notebook 7 needs: its questions and how they are scored.

    Attributes:
        questions: of each task and length (`documents` says how many of the first sentence there are at most).
        depths: of the needle, as a share of the text before it, rising from 0 to 1 at most.
        keys: statements of the multi-key task, one of which is asked for.
        hops: references from the variable that is asked for to the one that is a number.
        generate_up_to: longest prompt, in tokens, after which answers are also generated, which takes the keys and
            values of the whole prompt; probabilities take none.
        threshold: score from 0 to 1 that counts as retrieved, for the effective length.
    """

    questions: PositiveInt
    depths: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
    keys: Annotated[int, Field(ge=2, le=100)]
    hops: Annotated[int, Field(ge=0, le=20)]
    generate_up_to: NonNegativeInt
    threshold: Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class Retrieval:
    """First-sentence retrieval (`retrieval.py`): lengths in tokens, prompt and answer together; other `tasks`."""

    lengths: Annotated[list[PositiveInt], Field(min_length=1)]
    cue_words: PositiveInt
    answer_words: tuple[PositiveInt, PositiveInt]
    answer_tokens: PositiveInt
    documents: PositiveInt
    prompts_at_once: PositiveInt
    tasks: RetrievalTasks


@dataclass(frozen=True, config=STRICT)
class RaceTraining:
    """One way of training in the race: numbers that replace those of [training], for the `methods` named."""

    methods: list[Method]
    window: PositiveInt
    reach: PositiveInt
    attention: Literal["sdpa", "s2"]
    steps: PositiveInt
    sequences_per_step: PositiveInt
    sequences_at_once: PositiveInt


@dataclass(frozen=True, config=STRICT)
class Race:
    """Notebook 11: seeds, ways of training by name, and the numbers that LongRoPE and proportional RoPE need.

    `self_quoting_share` stands in for that of [training]: retrieval is measured, so all arms practise it.
    """

    seeds: list[int]
    warmup_steps: int
    self_quoting_share: Annotated[float, Field(ge=0, le=1)]
    pair_factors: tuple[float, ...]
    rotated_share: float
    trainings: dict[str, RaceTraining]


@dataclass(frozen=True, config=STRICT)
class Preset:
    """`memory_gib`: of the device that trains; the planner (`budget.plan`) keeps a step below it."""

    name: str
    needs: str
    memory_gib: PositiveFloat
    base: BaseModel
    extension: Extension
    data: Data
    lora: Lora
    training: TrainingSettings
    evaluation: Evaluation
    retrieval: Retrieval
    race: Race

    @property
    def base_rope(self) -> Scaling:
        """RoPE as the base was pretrained with it."""
        base = self.base
        return Scaling("none", base.rope_base, base.head_dim, base.window, base.window)

    @property
    def extended_rope(self) -> Scaling:
        """RoPE as the extension scales it."""
        base, extension = self.base, self.extension
        return Scaling(
            extension.method,
            extension.rope_base,
            base.head_dim,
            base.window,
            extension.window,
            extension.pair_factors,
            extension.rotated_share,
        )

    @property
    def control_rope(self) -> Scaling:
        """RoPE unscaled over the new window: what the same training does without the extension."""
        base = self.base
        return Scaling("none", base.rope_base, base.head_dim, base.window, self.extension.window)

    @property
    def run_folder(self) -> Path:
        """Where runs of this preset write; nothing else is written by a notebook."""
        return REPOSITORY / "runs" / self.name


def preset_names() -> list[str]:
    """The presets there are, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_preset(name: str) -> Preset:
    """Read and validate presets/NAME.toml.

    Raises:
        ValueError: there is no such preset, or a key is unknown, missing or of the wrong type; the
            message names it and the closest known name.
    """
    if name not in preset_names():
        raise ValueError(f"unknown preset {name!r}: use one of {preset_names()}{_closest(name, preset_names())}")
    try:
        values = tomllib.loads((FOLDER / f"{name}.toml").read_text())
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
    unknown = set(preset.data.held_out) - set(preset.data.sources)
    if unknown:
        raise ValueError(
            f"presets/{preset.name}.toml: data.held_out names {sorted(unknown)}, which data.sources = "
            f"{preset.data.sources} does not have"
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
    parts = [Preset, BaseModel, Extension, Data, Lora, TrainingSettings, Techniques, Evaluation, Retrieval, Race]
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
