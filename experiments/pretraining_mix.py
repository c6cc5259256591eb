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

To models from scratch far context is worth too little for length to matter. The tiny Llama copies within its window of
512 tokens. So it is trained on, by the same mixes, from its own weights, at equal tokens. Six in ten documents quote
themselves, long and short ones, at any distance within the document. Quotes parted from their originals teach not to
copy (pretraining_copying.py), so length is taken away before the texts quote themselves:

    cut-first     the texts of "original", the long ones cut into four; then each piece quotes itself

Expected: without length, far copying (from over 1,024 tokens back) is worse by more than its interval, and near copying
in the first 1,024 tokens is not. A loss of far copying by two points that is excluded refutes that length matters. If
the paper is right, content ("better" minus "original") changes far NLL and far copying by more than length ("cut-first"
minus "original") does, the intervals apart. Larger in one measure only: undecided, as it depends on what is measured.
Positions beyond 1,024 are never trained without length. That is part of what length gives, and not told from the rest.
Three orders of the texts left both undecided, as Student's t of three is wide. So three more orders were added to the
three mixes that decide. All six count, and no more will be added. The three new ones alone stand beside them: whether
to add them was decided after a look at the others.

The other mixes were then added, in three orders. Expected of "shredded": it copies worse than "cut-first", near and
far. Of "long-removed" minus "cut-first", content without length: far NLL is worse, beyond the interval. Of
"upweighted", if the paper is right: "better" gains more far NLL over "original" than it does, beyond the interval of
the pairs; if length matters more, "upweighted" copies better from far back. Of "other-domain": its far NLL is worse,
beyond the interval, and its copying is not.

The cell "before" is the model as it is, RoPE base raised. A timing run on three documents showed, before any mix was
trained, that it copies from far back already. So a mix may keep or lose this, and need not teach it.
"""

from dataclasses import replace

import numpy as np

from experiments.pretraining import cut, texts
from experiments.pretraining_cells import MIXES
from llama_long_utils.data.documents import TokenizedDocument, tokenize_documents
from llama_long_utils.data.packing import TrainingSequence, join_pieces, with_excerpts
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.data.sources import STANDARD_LIBRARY, load_documents
from llama_long_utils.settings import TrainingSettings

PIECE = 1024  # tokens of a short document: about a chapter of the Bible


def mix_rows(mix: str, settings: TrainingSettings) -> list[TrainingSequence]:
    """The sequences of an arm, in order."""
    long_texts, short_texts, share = MIXES[mix]
    plain = replace(settings, self_quoting_share=0.0)
    long, short = (list(TrainingData(documents(name), plain, texts()[0])) for name in (long_texts, short_texts))
    is_long = np.random.default_rng(settings.seed).permutation(settings.steps) < round(share * settings.steps)
    # From two ends, so that an arm of one kind of text reads none of it twice.
    first, last = iter(long), reversed(short)
    rows = [next(first) if whole else cut(next(last), PIECE) for whole in is_long]
    if mix == "cut-first":
        rows = [cut(row, PIECE) for row in rows]
    generator, share = np.random.default_rng(settings.seed), settings.self_quoting_share
    rows = [quoting(row, share, generator) for row in rows] if share else rows
    return [cut(row, PIECE) for row in rows] if mix == "shredded" else rows


def quoting(row: TrainingSequence, share: float, generator: np.random.Generator) -> TrainingSequence:
    """A row of which a share of the documents quote themselves."""
    pieces = np.split(row.input_ids, np.flatnonzero(row.position_ids == 0)[1:])
    quoted = [with_excerpts(piece, generator)[0] if generator.random() < share else piece for piece in pieces]
    tokenizer = texts()[0]
    return join_pieces(quoted, len(row.input_ids), tokenizer.eos_token_id, tokenizer.bos_token_id)


def documents(name: str) -> list[TokenizedDocument]:
    """The documents to train on of a kind of text; those of the standard library are all joined into one."""
    tokenizer, training, _ = texts()
    if name == "python":
        files = tokenize_documents(load_documents(STANDARD_LIBRARY), tokenizer)
        return [replace(files[0], token_ids=np.concatenate([file.token_ids for file in files]))]
    return [document for document in training if (document.source == "king-james-bible") == (name == "bible")]
