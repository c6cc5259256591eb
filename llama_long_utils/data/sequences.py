"""The sequences of a training run, in order, made when they are asked for."""

from collections.abc import Iterator, Sequence
from itertools import islice, repeat

from transformers import PreTrainedTokenizerBase as Tokenizer

from llama_long_utils.cache import digest
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.mixture import Mixture
from llama_long_utils.data.packing import TrainingSequence, join_pieces, packed_pieces, quote_themselves, skip_positions
from llama_long_utils.settings import TrainingSettings

NEAR = 1024  # sequences that are drawn on the way to another one, which several processes do that share them


class TrainingData(Sequence[TrainingSequence]):
    """The sequences that a training run reads: cut, packed, quoting themselves and skipped as set.

    Texts and settings alone decide them. A run that goes on at number n draws the ones before again, by the lengths of
    their documents, and joins the tokens from there on. Only one buffer of documents is open at a time.
    """

    def __init__(
        self, documents: Mixture | list[TokenizedDocument], settings: TrainingSettings, tokenizer: Tokenizer
    ) -> None:
        self.documents, self.settings, self.tokenizer = documents, settings, tokenizer
        mixed = isinstance(documents, Mixture)
        self.key = documents.key if mixed else digest([document.token_ids for document in documents])
        self.drawn: Iterator[TrainingSequence] = iter(())
        self.next, self.last = 0, None

    def __len__(self) -> int:
        return self.settings.steps * self.settings.sequences_per_step

    def __getitem__(self, number: int) -> TrainingSequence:
        if not 0 <= number < len(self):
            raise IndexError(number)
        if number + 1 != self.next:
            if not self.last or not 0 <= number - self.next < NEAR:
                self.drawn, self.next = self.from_number(number), number
            self.last = next(islice(self.drawn, number - self.next, None))
            self.next = number + 1
        return self.last

    def from_number(self, first: int) -> Iterator[TrainingSequence]:
        """The sequences from number `first` on."""
        settings = self.settings
        buffers = self.documents.buffers(settings) if isinstance(self.documents, Mixture) else repeat(self.documents)
        options = {"long_document_weight": settings.long_document_weight, "pack": settings.pack}
        packed = packed_pieces(buffers, settings.window, seed=settings.seed, **options)
        plain = not settings.self_quoting_share and settings.reach == settings.window
        if plain:  # else the generators of random numbers have to see every sequence
            packed = islice(packed, first, None)
        ids = {"padding_id": self.tokenizer.eos_token_id, "bos_id": self.tokenizer.bos_token_id}
        sequences = (join_pieces(pieces, settings.window, **ids) for pieces in packed)
        sequences = quote_themselves(sequences, settings.self_quoting_share, seed=settings.seed)
        sequences = skip_positions(sequences, settings.reach, seed=settings.seed)
        return sequences if plain else islice(sequences, first, None)
