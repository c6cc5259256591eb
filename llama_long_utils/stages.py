"""Numbers of the stages that follow the extension, and the types that all settings share."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Share = Annotated[float, Field(gt=0, le=1)]
ShareOrNone = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Steps = Annotated[int, Field(ge=1, le=1_000_000)]


def check_multiple(settings: Any, whole: str, part: str) -> None:
    """Raise ValueError unless one number of the settings is a multiple of another."""
    numbers = getattr(settings, whole), getattr(settings, part)
    if numbers[0] % numbers[1]:
        raise ValueError(f"{whole} = {numbers[0]} must be a multiple of {part} = {numbers[1]}")


@dataclass(frozen=True, config=STRICT)
class Instruction:
    """Instruction tuning: its data, and what replaces the numbers of [training].

    Of its sequences some are long (a document that fills the window, and questions), some plain text; the others are
    short documents with questions, side by side.
    """

    steps: Steps = 100
    sequences_per_step: PositiveInt = 1
    sequences_at_once: PositiveInt = 1
    learning_rate: Share = 1e-4
    warmup_steps: NonNegativeInt = 5
    checkpoint_every: PositiveInt = 25
    seed: Seed = 0
    long_share: ShareOrNone = 0.5
    text_share: ShareOrNone = 0.0  # all of it is trained on
    loss_on_prompt: bool = True  # on long documents too, not on answers only (arXiv:2309.16039, Table 9)
    window: NonNegativeInt = 0  # tokens of a sequence; 0: as in [training]
    short_window: PositiveInt = 512  # tokens of a short document with its questions
    tokens_per_question: PositiveInt = 256
    quoted_words: PositiveInt = 6  # a question quotes so many
    answer_words: tuple[PositiveInt, PositiveInt] = (2, 8)  # which follow there, up to a punctuation mark
    questions: str = "quotations"  # or a record that `python -m experiments self-instruct` wrote

    def __post_init__(self) -> None:
        long, text = self.long_share, self.text_share
        if long + text > 1:
            raise ValueError(f"long_share = {long} and text_share = {text} are more than all sequences")
        check_multiple(self, "sequences_per_step", "sequences_at_once")


@dataclass(frozen=True, config=STRICT)
class PreferenceStage:
    """One training on preferences: what replaces the numbers of [training]."""

    steps: Steps = 100
    rows_per_step: PositiveInt = 16  # comparisons, or in "rl" answers that are sampled
    rows_at_once: PositiveInt = 4
    learning_rate: Share = 5e-5
    warmup_steps: NonNegativeInt = 5
    checkpoint_every: PositiveInt = 25
    beta: PositiveFloat = 0.1  # the KL penalty: what a nat costs ("rl"), and DPO's beta

    def __post_init__(self) -> None:
        check_multiple(self, "rows_per_step", "rows_at_once")


@dataclass(frozen=True, config=STRICT)
class Preference:
    """Preference tuning: the answers that are compared, and the three trainings."""

    tokens: PositiveInt = 1024  # of a document with its question
    answer_tokens: PositiveInt = 64  # at most
    questions: PositiveInt = 1024  # whose answers are compared
    answers: Annotated[int, Field(ge=2)] = 4  # sampled to each, also in "rl", where they are rated against each other
    temperature: PositiveFloat = 1.0
    errors: ShareOrNone = 0.0  # comparisons that are turned round, as by people who err
    seed: Seed = 0
    reward: PreferenceStage = Field(default_factory=PreferenceStage)
    rl: PreferenceStage = Field(default_factory=PreferenceStage)
    dpo: PreferenceStage = Field(default_factory=PreferenceStage)

    def __post_init__(self) -> None:
        if (rows := self.rl.rows_at_once) % (answers := self.answers):  # which are rated against each other
            raise ValueError(f"rl.rows_at_once = {rows} must be a multiple of answers = {answers} to a question")
