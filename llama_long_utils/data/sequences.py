"""The sequences of a training run, in order."""

from transformers import PreTrainedTokenizerBase

from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.packing import TrainingSequence, skip_positions, training_sequences
from llama_long_utils.data.quoting import quote_themselves
from llama_long_utils.settings import TrainingSettings


def draw_sequences(
    documents: list[TokenizedDocument], settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase
) -> list[TrainingSequence]:
    """The sequences that a training run reads, in order: cut, packed, quoting themselves and skipped as set."""
    sequences = training_sequences(
        documents,
        settings.window,
        settings.steps * settings.sequences_per_step,
        padding_id=tokenizer.eos_token_id,
        bos_id=tokenizer.bos_token_id,
        seed=settings.seed,
        long_document_weight=settings.long_document_weight,
        pack=settings.pack,
    )
    sequences = quote_themselves(sequences, settings.self_quoting_share, seed=settings.seed)
    return skip_positions(sequences, settings.reach, seed=settings.seed)
