"""What does a model learn longer context from: long documents, or better ones? The rows of the data-mix arms.

Every arm goes on from one short checkpoint with sequences of 4,096 tokens, at equal tokens. A row is either a stretch
of a long document, or four documents of 1,024 tokens that do not see each other. So length can be taken away, and
nothing else: a shredded row has the tokens of the long one, cut into four.

    original      half of the rows are long (speeches, plays), half short (pieces of the Bible)
    long-removed  short rows only
    shredded      the rows of "original", the long ones cut into four
    upweighted    four fifths of the rows are long
    other-domain  Python's standard library at the lengths of "original"
    better        speeches and plays only, at the lengths of "original"

Length is what "shredded" loses against "original", content what "long-removed" loses against "shredded". If the paper
is right (arXiv:2309.16039, Tables 7 and 8), content is the larger, and "better" gains more over "original" than
"upweighted" does.
"""

from dataclasses import replace

import numpy as np

from experiments.pretraining import MIXES, cut, texts
from llama_long_utils.data.documents import TokenizedDocument, tokenize_documents
from llama_long_utils.data.packing import TrainingSequence
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.data.sources import STANDARD_LIBRARY, load_documents
from llama_long_utils.settings import TrainingSettings

PIECE = 1024  # tokens of a short document: about a chapter of the Bible


def mix_rows(mix: str, settings: TrainingSettings) -> list[TrainingSequence]:
    """The sequences of an arm, in order."""
    long_texts, short_texts, share = MIXES[mix]
    long, short = (list(TrainingData(documents(name), settings, texts()[0])) for name in (long_texts, short_texts))
    is_long = np.random.default_rng(settings.seed).permutation(settings.steps) < round(share * settings.steps)
    # From two ends, so that an arm of one kind of text reads none of it twice.
    first, last = iter(long), reversed(short)
    rows = [next(first) if whole else cut(next(last), PIECE) for whole in is_long]
    return [cut(row, PIECE) for row in rows] if mix == "shredded" else rows


def documents(name: str) -> list[TokenizedDocument]:
    """The documents to train on of a kind of text; those of the standard library are all joined into one."""
    tokenizer, training, _ = texts()
    if name == "python":
        files = tokenize_documents(load_documents(STANDARD_LIBRARY), tokenizer)
        return [replace(files[0], token_ids=np.concatenate([file.token_ids for file in files]))]
    return [document for document in training if (document.source == "king-james-bible") == (name == "bible")]
