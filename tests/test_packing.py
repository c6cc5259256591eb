import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import new_llama, training_sequences
from experiments.tiny_llama import FOLDER
from llama_long_utils.cache import digest
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.data.packing import join_pieces, pack_pieces, quote_themselves, skip_positions, with_excerpts
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import IGNORED_LABEL

EOS = 1


def document(length, name="a"):
    ids = np.arange(2, length + 2, dtype=np.int32) % 100 + 2
    ids[0], ids[-1] = 0, EOS
    return TokenizedDocument("mine", name, ids)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_packing_loses_nothing_and_never_overfills(sizes):
    packed = pack_pieces([np.full(size, number) for number, size in enumerate(sizes)], 64)
    assert sorted(len(piece) for group in packed for piece in group) == sorted(sizes)
    assert max(sum(map(len, group)) for group in packed) <= 64


def test_long_documents_stay_long():
    sequences = training_sequences([document(1000)], 64, 15, padding_id=EOS, seed=0)
    whole = [s for s in sequences if (np.diff(s.position_ids) == 1).all()]
    assert len(whole) >= 14  # 1,000 tokens hold at least 14 whole windows of 64


def test_eos_labels_stay_although_padding_is_eos():
    sequence = join_pieces([document(10).token_ids, document(12).token_ids], 32, padding_id=EOS)
    assert (sequence.labels == EOS).sum() == 2
    assert (sequence.input_ids == EOS).sum() == 2 + 10
    assert (sequence.labels[22:] == IGNORED_LABEL).all()
    assert sequence.label_tokens == 9 + 11


def test_packed_documents_do_not_see_each_other_and_an_all_ones_mask_leaks():
    model = new_llama(seed=0)
    sequence = join_pieces([document(10).token_ids, document(12).token_ids], 22, padding_id=EOS)
    ids, positions = torch.from_numpy(sequence.input_ids)[None], torch.from_numpy(sequence.position_ids)[None]
    with torch.no_grad():
        alone = model.model(input_ids=ids[:, 10:], use_cache=False).last_hidden_state[0]
        run = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        packed = model.model(**run).last_hidden_state[0, 10:]
        leaking = model.model(**run, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 10:]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    assert (leaking - alone).abs().max() > 1e-2


def test_positions_that_jump_without_a_mask_hide_the_first_part():
    # The reverse: positions that jump inside ONE document (PoSE) need an all-ones mask.
    model = new_llama(seed=0)
    ids = torch.arange(20)[None] % 100
    jumping = torch.cat([torch.arange(10), torch.arange(30, 40)])[None]
    with torch.no_grad():
        run = {"input_ids": ids, "position_ids": jumping, "use_cache": False}
        seen = model.model(**run, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 10:]
        hidden = model.model(**run).last_hidden_state[0, 10:]
        alone = model.model(input_ids=ids[:, 10:], position_ids=jumping[:, 10:], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(hidden, alone, atol=1e-4, rtol=0)
    assert (seen - alone).abs().max() > 1e-2


def test_weight_repeats_long_documents():
    documents = [document(64, "long"), document(20, "short")]
    plain = training_sequences(documents, 64, 20, padding_id=EOS, seed=0, long_document_weight=1.0)
    heavy = training_sequences(documents, 64, 20, padding_id=EOS, seed=0, long_document_weight=3.0)
    assert sum(s.label_tokens == 63 for s in plain) == 10
    assert sum(s.label_tokens == 63 for s in heavy) == 15


def test_same_seed_same_sequences_and_a_window_that_no_document_fills():
    documents = [document(200), document(100)]
    first, again = (training_sequences(documents, 64, 6, padding_id=EOS, seed=3) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
    with pytest.raises(ValueError, match="no document fills a training window of 512 tokens: the longest of 2 has 200"):
        training_sequences(documents, 512, 1, padding_id=EOS, seed=0)


def test_unpacked_sequences_are_whole_windows_of_one_document():
    texts = [document(1000), document(90, "b"), document(30, "c")]
    sequences = training_sequences(texts, 64, 15, padding_id=EOS, seed=0, pack=False)
    assert all(sequence.contiguous for sequence in sequences)
    packed = training_sequences(texts, 64, 60, padding_id=EOS, seed=0)
    assert not all(sequence.contiguous for sequence in packed)


def test_pose_skips_once_and_reaches_far():
    whole = training_sequences([document(1000)], 64, 200, padding_id=EOS, seed=0, pack=False)
    skipped = list(skip_positions(whole, 512, seed=0))
    steps = np.stack([np.diff(sequence.position_ids) for sequence in skipped])
    assert ((steps > 1).sum(axis=1) <= 1).all()
    ends = np.array([sequence.position_ids[-1] for sequence in skipped])
    assert ends.min() + 1 >= 64 and 480 < ends.max() < 512
    assert all((a.labels == b.labels).all() for a, b in zip(whole, skipped, strict=True))
    assert list(skip_positions(whole, 64, seed=0)) == whole


def test_the_second_part_of_a_skipped_sequence_sees_the_first_because_of_its_mask():
    whole = training_sequences([document(1000)], 64, 1, padding_id=EOS, seed=0, pack=False)
    row = next(skip_positions(whole, 512, seed=3)).tensors()
    jump = int((row["position_ids"].diff() > 1).nonzero()[0]) + 1
    model = new_llama(seed=0).eval()
    changed = row["input_ids"].clone()
    changed[0] += 1

    def last(ids, mask):
        with torch.no_grad():
            return model.model(
                ids[None], position_ids=row["position_ids"][None], attention_mask=mask, use_cache=False
            ).last_hidden_state[0, jump:]

    mask = row["attention_mask"][None]
    assert not torch.allclose(last(row["input_ids"], mask), last(changed, mask), atol=1e-6)
    torch.testing.assert_close(last(row["input_ids"], None), last(changed, None))  # without the mask it is blind


def test_bos_stands_before_every_piece_and_hides_no_label():
    plain = training_sequences([document(size) for size in (300, 7, 40, 90, 21)], 64, 10, padding_id=1, seed=0)
    with_bos = training_sequences(
        [document(size) for size in (300, 7, 40, 90, 21)], 64, 10, padding_id=1, bos_id=0, seed=0
    )
    for before, after in zip(plain, with_bos, strict=True):
        starts = after.position_ids == 0
        np.testing.assert_array_equal(before.labels, after.labels)
        assert (after.input_ids[starts & (after.input_ids != 1)] == 0).all()
        np.testing.assert_array_equal(before.input_ids[~starts], after.input_ids[~starts])


def test_excerpts_are_copied_from_what_stands_before_them():
    text = np.arange(1000, 1512)
    for seed in range(30):
        ids, source = with_excerpts(text, np.random.default_rng(seed))
        copied = source >= 0
        assert (source[copied] < np.flatnonzero(copied)).all()
        assert (ids[copied] == ids[source[copied]]).all()
        assert 0.1 < copied.mean() < 0.8
        np.testing.assert_array_equal(ids[~copied], text[: (~copied).sum()])  # the rest is the text itself, in order


def test_quoting_takes_its_share_of_whole_sequences():
    text = TokenizedDocument("mine", "long", np.arange(2, 60_002).astype(np.int32))
    sequences = training_sequences([text], 512, 100, padding_id=1, seed=0, pack=False)
    assert list(quote_themselves(sequences, 0.0, seed=0)) == sequences
    changed = list(quote_themselves(sequences, 0.5, seed=0))
    differs = [bool((a.input_ids != b.input_ids).any()) for a, b in zip(sequences, changed, strict=True)]
    assert 0.3 < np.mean(differs) < 0.7
    for after, differ in zip(changed, differs, strict=True):
        assert not differ or (after.labels[1:] == after.input_ids[1:]).all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "9ac2abccb6103aaa"), ({"window": 512, "reach": 4096, "pack": False}, "c2b1c4422a095fdf")],
)
def test_the_sequences_of_a_run_stay_the_same_bit_by_bit(changes, expected):
    """Stored adapters and records were trained on what the code drew in November 2026: other numbers, other records."""
    generators = [
        (np.random.default_rng(number), size) for number, size in enumerate((9000, 700, 5000, 300, 4096, 1500))
    ]
    texts = [generator.integers(2, 2000, size).astype(np.int32) for generator, size in generators]
    for ids in texts:
        ids[0], ids[-1] = 0, 1
    documents = [TokenizedDocument("mine", str(number), ids) for number, ids in enumerate(texts)]
    numbers = dataclasses.replace(load_preset("tiny").training, steps=12, self_quoting_share=0.5, **changes)
    drawn = TrainingData(documents, numbers, load_tokenizer(FOLDER))
    assert digest([[array for array in vars(sequence).values() if array is not None] for sequence in drawn]) == expected
