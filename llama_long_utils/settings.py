"""Every number of a preset as a dataclass: checked when it is made, and cheap to import (no torch)."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag
from pydantic.dataclasses import dataclass

from llama_long_utils.paths import REPOSITORY
from llama_long_utils.stages import STRICT, Instruction, Preference, Seed, Share, ShareOrNone, Steps, check_multiple

Questions = Annotated[int, Field(ge=2, le=1000)]  # chance is what an answer scores against another question's
RopeBase = Annotated[float, Field(gt=1)]
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # `model_type` in config.json
ARMS = {
    "base": "the base as pretrained",
    "rope_base_only": "the extension's RoPE, not trained",
    "yarn": "YaRN at the pretrained RoPE base, not trained",
    "extended": "the extension's RoPE with the adapter trained for it",
    "rope_unchanged": "the control: the pretrained RoPE with an adapter trained over the new window",
}


@dataclass(frozen=True, config=STRICT)
class MemorySavings:
    """What a training step does to need less memory. Loss and gradients stay the same; 0 and false switch it off."""

    recomputed_layers: NonNegativeInt  # the first ones, computed again in the backward pass; all, if there are fewer
    tile: NonNegativeInt  # tokens that MLPs and norms compute at a time
    offload_checkpoints: bool  # the inputs of recomputed layers wait in host memory
    optimizer: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]  # paged memory can move to the host

    def __str__(self) -> str:
        none = "no whole layer recomputed" if self.tile else "nothing recomputed"
        parts = [f"{self.recomputed_layers} layers recomputed" if self.recomputed_layers else none]
        parts += [f"tiles of {self.tile:,} tokens"] * bool(self.tile)
        parts += ["checkpoints on the host"] * self.offload_checkpoints
        parts += [self.optimizer] * ("8bit" in self.optimizer)
        return ", ".join(parts)


@dataclass(frozen=True, config=STRICT)
class TrainingSettings:
    """Numbers of a training run. Tokens per step = window x sequences_per_step."""

    window: PositiveInt  # tokens of a sequence
    reach: PositiveInt  # the highest position, in tokens; above `window`, positions are skipped (PoSE)
    pack: bool  # several documents in a sequence; skipped positions and "s2" need false
    attention: Literal["sdpa", "documents", "s2"]  # full; full, packed documents without a mask; shifted sparse
    steps: Steps
    sequences_per_step: PositiveInt
    sequences_at_once: PositiveInt
    learning_rate: Share
    warmup_steps: NonNegativeInt
    weight_decay: ShareOrNone
    gradient_clipping: PositiveFloat
    memory_savings: MemorySavings
    long_document_weight: PositiveFloat
    self_quoting_share: ShareOrNone  # of the sequences quote themselves, at any distance
    checkpoint_every: PositiveInt
    seed: Seed

    def __post_init__(self) -> None:
        if self.reach < self.window:
            raise ValueError(f"reach = {self.reach} must be at least window = {self.window}")
        if self.pack and (self.reach > self.window or self.attention == "s2"):
            raise ValueError("skipped positions (reach > window) and s2 attention need pack = false")
        check_multiple(self, "sequences_per_step", "sequences_at_once")


IGNORED_LABEL = -100
Method = Literal[
    "none", "pi", "abf", "ntk", "dynamic_ntk", "ntk_by_parts", "yarn", "longrope", "xpos_abf", "proportional"
]
METHODS: tuple[str, ...] = get_args(Method)


def ntk_base(head_dim: int, base: float, factor: float) -> float:
    """The base that slows the slowest pair `factor` times, the fastest not at all (YaRN, arXiv:2309.00071, def. 1)."""
    return base * factor ** (head_dim / (head_dim - 2))


def raised_base(head_dim: int, base: float, window: int, new_window: int) -> float:
    """The RoPE base of method "abf" for a longer window, the larger of two numbers, rounded up to two digits.

    Llama 2 Long raised its base 50 times for a window 8 times as long (arXiv:2309.16039): here a power of the factor.
    With b * s^(d / 2j) no pair meets new angles, where pair j is the first without a full turn in the old window
    (arXiv:2310.05209; notebook 2).
    """
    factor = new_window / window
    first = int(head_dim / 2 * math.log(window / (2 * math.pi)) / math.log(base)) + 1
    angles = factor ** min(head_dim / (2 * max(first, 1)), 9.0) if first < head_dim / 2 else 1.0
    wanted = base * max(factor ** math.log(50, 8), angles)
    digit = 10.0 ** (math.floor(math.log10(wanted)) - 1)
    return math.ceil(wanted / digit - 1e-6) * digit


@dataclass(frozen=True, config=STRICT)
class Scaling:
    """One setting of RoPE: a method by name and its numbers.

    `pretrained` is the base's own rule where it is not plain RoPE: `rope_parameters` of its config without the base.
    Method "none" keeps it; "abf" keeps it and raises its base.
    """

    method: Method  # "none" and "abf" (adjusted base frequency) are plain RoPE at `base`
    base: RopeBase  # for "abf" and "xpos_abf" the raised one, for the others the pretrained one
    head_dim: int
    original_window: int  # tokens the model was pretrained with
    window: int  # tokens it is scaled to
    pair_factors: tuple[float, ...] = ()  # for "longrope", head_dim / 2 of them
    rotated_share: Share = 1.0  # for "proportional", of the pairs
    pretrained: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = self.pretrained.get("rope_type")
        if self.pretrained and self.method not in ("none", "abf"):
            fix = "use method 'abf', which keeps it and raises its base"
            raise ValueError(f"the base has rope_type {kind!r}, which method {self.method!r} would replace: {fix}")
        if kind in ("dynamic", "longrope") and self.window > self.original_window:
            fix = "so it cannot be extended: use a base with another rope_type, or its own window"
            raise ValueError(f"the base has rope_type {kind!r}, which changes with the length of the text, {fix}")
        if self.window < self.original_window:
            raise ValueError(f"RoPE cannot be scaled down: window {self.window} < {self.original_window}")
        wanted = self.head_dim // 2 if self.method == "longrope" else 0
        if len(self.pair_factors) != wanted:
            takes = f"takes {wanted} pair_factors, got {len(self.pair_factors)}: 'longrope' needs one for each pair"
            raise ValueError(f"method {self.method!r} {takes}, the other methods none")

    @property
    def factor(self) -> float:
        """How many times longer the window becomes."""
        return self.window / self.original_window

    @property
    def max_position_embeddings(self) -> int:
        """What the model's config must say; transformers starts dynamic NTK past it, so there it is the old window."""
        return self.original_window if self.method == "dynamic_ntk" else self.window

    def parameters(self) -> dict[str, Any]:
        """What `from_pretrained(rope_parameters=...)` takes; set on the config of a built model it changes nothing.

        YaRN and Llama 3's rule need the original window spelled out, or they silently build another ramp.
        """
        numbers: dict[str, Any] = {"rope_theta": self.base, "factor": self.factor}
        original = {"original_max_position_embeddings": self.original_window}
        match self.method:
            case "pi":
                return {"rope_type": "linear", **numbers}
            case "ntk":
                return {"rope_type": "default", "rope_theta": ntk_base(self.head_dim, self.base, self.factor)}
            case "dynamic_ntk":
                return {"rope_type": "dynamic", **numbers}
            case "ntk_by_parts":
                return {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **numbers, **original}
            case "yarn":
                return {"rope_type": "yarn", **numbers, **original}
            case "longrope":
                factors = list(self.pair_factors)
                # The same factors at every length: the model is trained and read with one rotation.
                return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, **numbers, **original}
            case "proportional":
                return {"rope_type": "proportional", "partial_rotary_factor": self.rotated_share, **numbers}
            case _:
                return {"rope_type": "default", **self.pretrained, "rope_theta": self.base}

    def __str__(self) -> str:
        own = f" over the base's {self.pretrained['rope_type']}" if self.pretrained else ""
        return f"{self.method}{own}, base {self.base:,.0f}, window {self.original_window:,} -> {self.window:,}"


@dataclass(frozen=True, config=STRICT)
class BaseModel:
    """The model to extend. `source` is a folder of this repository or a model on the hub.

    `dtype` is what it computes in, in a file also "auto"; a CPU that emulates bfloat16 is 50 to 80 times slower than
    with float32 (measured on AVX2). `rope_scaling` is the one in its config.json, empty for plain RoPE.
    """

    source: str
    dtype: Literal["float32", "bfloat16"]
    window: PositiveInt
    rope_base: RopeBase
    head_dim: Annotated[int, Field(gt=0, multiple_of=2)]
    rope_scaling: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Extension:
    """What it is extended to: a window in tokens, by a method of `METHODS` at a RoPE base."""

    window: PositiveInt
    method: Method
    rope_base: RopeBase
    pair_factors: tuple[float, ...] = ()
    rotated_share: Share = 1.0


@dataclass(frozen=True, config=STRICT)
class Source:
    """One part of a mixture of texts. Shorter and longer documents than the limits are not trained on."""

    name: str  # a corpus, "python-stdlib", a folder, or "hub:owner/name" (`data.sources.load_documents`)
    config: str = ""  # this and the next four: of a data set on the hub
    split: str = "train"
    column: str = "text"
    revision: str = ""  # the newest, if there is none
    held_out_split: str = ""  # which held-out documents are from; without one they are of `split`
    weight: Annotated[float, Field(ge=0)] = 0.0  # share of the tokens trained on, relative to the other sources'
    minimum_tokens: NonNegativeInt = 0
    maximum_tokens: NonNegativeInt = 0  # 0: no limit
    passes: NonNegativeInt = 0  # 0: those of [data]

    def __post_init__(self) -> None:
        where, least, most = f"source {self.name!r}", self.minimum_tokens, self.maximum_tokens
        if 0 < most < least:
            raise ValueError(f"{where}: maximum_tokens = {most} is below minimum_tokens = {least}")
        if self.held_out_split == self.split:
            raise ValueError(f"{where}: held_out_split = {self.split!r} is what is trained on: name another")
        of_hub = {"config": "", "split": "train", "column": "text", "revision": "", "held_out_split": ""}
        given = [field for field, default in of_hub.items() if getattr(self, field) != default]
        if given and not self.name.startswith("hub:"):
            raise ValueError(f"{where} has no {given[0]}: only data sets on the hub, hub:owner/name, do")


def in_full(sources: Sequence[str | Source]) -> list[Source]:
    """Sources of which some are given by name, which may be "hub:owner/name:split:column"."""
    found = []
    for given in sources:
        source = given if isinstance(given, Source) else Source(given)
        if source.name.startswith("hub:") and source.name.count(":") > 1:
            _, name, *rest = source.name.split(":", 3)
            fields = dict(zip(("split", "column"), rest, strict=False))
            source = dataclasses.replace(source, name=f"hub:{name}", **fields)
        found.append(source)
    return found


NameOrSource = Annotated[
    Annotated[str, Tag("name")] | Annotated[Source, Tag("table")],
    Discriminator(lambda given: "name" if isinstance(given, str) else "table"),
]


@dataclass(frozen=True, config=STRICT)
class Data:
    """Document sources, each by its name or as a table, and how many documents of each are held out."""

    sources: Annotated[list[NameOrSource], Field(min_length=1)]  # without weights, a pass reads every document
    held_out: dict[str, PositiveInt] | None = None  # left out: `documents.count_to_hold_out`
    minimum_characters: PositiveInt = dataclasses.field(kw_only=True)  # of a held-out document
    split_seed: Seed = dataclasses.field(kw_only=True)
    passes: PositiveInt = 4  # times a document may be trained on: four cost little beside new text, arXiv:2305.16264

    def __post_init__(self) -> None:
        weights = [source.weight for source in self.mixture]
        if any(weights) and not all(weights):
            raise ValueError(f"sources have the weights {weights}: give a weight above 0 to all of them, or to none")

    @property
    def mixture(self) -> list[Source]:
        """The sources in full, each with its cap on passes."""
        return [dataclasses.replace(one, passes=one.passes or self.passes) for one in in_full(self.sources)]


@dataclass(frozen=True, config=STRICT)
class Lora:
    rank: PositiveInt
    alpha: PositiveInt
    target_modules: Annotated[list[str], Field(min_length=1)]
    train_norms: bool
    train_embeddings: bool


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """What notebook 6 reads, and how it averages."""

    tokens: PositiveInt  # of the stretches that are read of each held-out document
    far_tokens: PositiveInt  # of those of one document of each source
    stretches: PositiveInt  # of each document, at most
    copied_documents: PositiveInt  # for the test of copying, at most
    bucket_edges: Annotated[list[PositiveInt], Field(min_length=2)]  # where buckets begin, and the last one ends
    bootstrap_samples: PositiveInt
    seed: Seed

    @property
    def near_edges(self) -> list[int]:
        """The bucket edges up to `tokens`, between which every document was read."""
        return [edge for edge in self.bucket_edges if edge <= self.tokens]


@dataclass(frozen=True, config=STRICT)
class RetrievalTasks:
    """Questions of notebook 7 besides the first sentence, and how they are scored."""

    questions: Questions  # of each task and length
    depths: Annotated[list[ShareOrNone], Field(min_length=1)]  # of the needle: share of the text before it, rising
    keys: Annotated[int, Field(ge=2, le=100)]  # statements of the multi-key task, one of which is asked for
    hops: Annotated[int, Field(ge=0, le=20)]  # references from the variable asked for to the one that is a number
    generate_up_to: NonNegativeInt  # longest prompt, in tokens, that is answered in writing: keeps keys and values
    threshold: Share  # score that counts as retrieved, for the effective length


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
    """One training of the race: its numbers replace those of [training], for these `methods`."""

    methods: list[Method]
    window: PositiveInt
    reach: PositiveInt
    attention: Literal["sdpa", "s2"]
    steps: Steps
    sequences_per_step: PositiveInt
    sequences_at_once: PositiveInt


@dataclass(frozen=True, config=STRICT)
class Race:
    """Notebook 11: seeds, trainings by name, and the numbers that LongRoPE and proportional RoPE need.

    `self_quoting_share` replaces that of [training]: retrieval is measured, so all arms practise it.
    """

    seeds: Annotated[list[Seed], Field(min_length=1)]
    warmup_steps: NonNegativeInt
    self_quoting_share: ShareOrNone
    pair_factors: tuple[float, ...]
    rotated_share: Share
    trainings: dict[str, RaceTraining]


@dataclass(frozen=True, config=STRICT)
class Preset:
    """`memory_gib` is the memory of the device that trains: `planner.plan` keeps a step below it."""

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
    instruction: Instruction = Field(default_factory=Instruction)
    preference: Preference = Field(default_factory=Preference)

    @property
    def base_rope(self) -> Scaling:
        """RoPE as the base was pretrained with it."""
        base = self.base
        return Scaling("none", base.rope_base, base.head_dim, base.window, base.window, pretrained=base.rope_scaling)

    @property
    def extended_rope(self) -> Scaling:
        """RoPE as the extension scales it."""
        extension = dataclasses.asdict(self.extension)
        return dataclasses.replace(self.base_rope, base=extension.pop("rope_base"), **extension)

    @property
    def control_rope(self) -> Scaling:
        """RoPE unscaled over the new window: what the same training does without the extension."""
        return dataclasses.replace(self.base_rope, window=self.extension.window)

    @property
    def run_folder(self) -> Path:
        """Where runs of this preset write; nothing else is written by a notebook."""
        return REPOSITORY / "runs" / self.name
