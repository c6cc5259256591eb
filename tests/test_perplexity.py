import numpy as np
import pytest
import torch

from conftest import new_llama
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.evaluation.perplexity import (
    Reader,
    bucket_sums,
    documents_of,
    nll_in_windows,
    nll_table,
    one_array,
    paired_difference,
    paired_table,
    perplexity_by_definition,
    random_stretches,
    separate_windows,
    sliding_window,
    token_nll,
)
from llama_long_utils.evaluation.power_law import fit_power_law
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.records import read_published

OPTIONS = {"bootstrap_samples": 300, "seed": 0}


def text(length, name="a", seed=0):
    ids = np.random.default_rng(seed).integers(2, 128, length).astype(np.int32)
    ids[0] = 0
    return TokenizedDocument("mine", name, ids)


def test_traps_20_to_22_each_token_once_with_its_full_context():
    model, document = new_llama(seed=0), text(50)
    nll = token_nll(model, document, 50)
    assert nll.shape == (49,)  # all but BOS, each once
    for position in (1, 25, 49):
        ids = torch.from_numpy(document.token_ids[: position + 1]).long()[None]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1]).logits[0, -1]
        alone = torch.nn.functional.cross_entropy(logits.float(), ids[0, -1])
        assert nll[position - 1] == pytest.approx(alone.item(), abs=0.02)
    np.testing.assert_allclose(token_nll(model, document, 20), nll[:19], atol=0.02)


def test_trap_19_buckets_are_weighted_by_tokens():
    nll = [np.full(10, 1.0), np.full(2, 4.0)]
    table = nll_table("base", nll, [1, 20], **OPTIONS)
    assert table.nll.item() == pytest.approx((10 * 1 + 2 * 4) / 12)
    assert table.nll.item() != pytest.approx(np.mean([row.mean() for row in nll]))
    assert (table.tokens.item(), table.documents.item()) == (12, 2)


def test_trap_21_bucket_edges_are_positions():
    nll = [np.arange(1, 9, dtype=float)]  # the token at position p costs p nats
    nats, tokens = bucket_sums(nll, [1, 2, 4, 9])
    np.testing.assert_array_equal(tokens, [[1, 2, 5]])
    np.testing.assert_array_equal(nats, [[1, 2 + 3, 4 + 5 + 6 + 7 + 8]])


def test_interval_covers_the_mean_about_95_percent_of_the_time():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        rows = [np.full(5, value) for value in generator.normal(3.0, 1.0, 30)]
        table = nll_table("base", rows, [1, 6], bootstrap_samples=400, seed=seed)
        covered += table.low.item() <= 3.0 <= table.high.item()
    assert 175 <= covered <= 198


def test_pairing_sharpens_the_difference():
    generator = np.random.default_rng(0)
    base = [np.full(5, level) for level in generator.normal(3.0, 1.0, 20)]
    better = [row - 0.1 for row in base]
    difference, low, high = paired_difference(better, base, 1, 6, **OPTIONS)
    assert difference == pytest.approx(-0.1)
    assert high - low < 1e-9  # the documents' own levels cancel


def test_bootstrap_draws_whole_documents():
    weights = Bootstrap(7, 50, 0).weights()
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()


def test_power_law_finds_its_own_parameters():
    context = 2.0 ** np.arange(1, 14)
    law = fit_power_law(context, (25.4 / context) ** 0.45 + 1.56)
    assert (law.alpha, law.beta, law.gamma) == pytest.approx((25.4, 0.45, 1.56), rel=1e-3)
    assert law.rmse < 1e-6


@pytest.mark.parametrize(
    ("size", "fitted"), {"7B": (26.6, 0.44, 1.559), "13B": (18.3, 0.494, 1.471), "70B": (18.0, 0.502, 1.359)}.items()
)
def test_power_law_on_the_published_curves(size, fitted):
    figure = read_published("llama2_long")["figure_1"]
    law = fit_power_law(np.array(figure["context"], dtype=float), np.array(figure["loss"][size]))
    assert (law.alpha, law.beta, law.gamma) == pytest.approx(fitted, rel=0.02)


def test_a_context_longer_than_any_document_is_refused():
    with pytest.raises(ValueError, match="no held-out document has 4,096 tokens: the longest of 2 has 60"):
        random_stretches([text(50), text(60)], 4096, at_most=3, seed=0)


def test_stretches_start_with_bos_at_random_places_and_do_not_overlap():
    documents = [text(700, str(seed), seed) for seed in range(8)] + [text(130), text(30)]
    stretches = random_stretches(documents, 100, at_most=3, seed=0)
    assert [len(cut) for cut in stretches] == [3] * 8 + [1]
    firsts = set()
    for cut, document in zip(stretches, documents, strict=False):
        windows = np.lib.stride_tricks.sliding_window_view(document.token_ids, 99)
        places = [np.flatnonzero((windows == stretch.token_ids[1:]).all(axis=1))[0] for stretch in cut]
        assert (np.diff(places) >= 100).all()
        assert all(stretch.tokens == 100 and stretch.token_ids[0] == 0 for stretch in cut)
        firsts.add(int(places[0]))
    assert len(firsts) > 4


def test_several_stretches_of_a_document_are_one_draw_of_the_bootstrap():
    rows = [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[5.0, 6.0]])]
    nats, tokens = bucket_sums(rows, [1, 2, 3])
    np.testing.assert_array_equal(nats, [[4, 6], [5, 6]])
    np.testing.assert_array_equal(tokens, [[2, 2], [1, 1]])


def test_sliding_window_scores_the_same_tokens_with_a_bounded_context():
    model, document = new_llama(seed=0), text(64)
    slid = sliding_window(nll_in_windows(model, document, 16))
    full = token_nll(model, document, 64)
    assert slid.shape == full.shape
    np.testing.assert_allclose(slid[:15], full[:15], atol=0.02)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ids = torch.from_numpy(document.token_ids[16:32]).long()[None].clone()
        ids[0, 0] = document.token_ids[0]  # trap 21: BOS in every window
        logits = model(input_ids=ids).logits[0, :-1].float()
    alone = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
    np.testing.assert_allclose(slid[23:31], alone[7:], atol=0.02)
    with pytest.raises(ValueError, match="a text of 50 tokens cannot be read in windows of 16"):
        nll_in_windows(model, text(50), 16)


def test_separate_windows_are_texts_of_their_own():
    model, document = new_llama(seed=0), text(64)
    nll = separate_windows(nll_in_windows(model, document, 16)).reshape(4, 15)
    for number in range(4):
        ids = document.token_ids[16 * number : 16 * (number + 1)].copy()
        ids[0] = document.token_ids[0]
        alone = token_nll(model, TokenizedDocument("mine", "a", ids), 16)
        np.testing.assert_allclose(nll[number], alone, atol=1e-4)
    with pytest.raises(ValueError, match=r"6 windows .* leave half a window over"):
        separate_windows(nll_in_windows(model, text(56), 16))


def test_definitions_of_perplexity_differ_as_they_should():
    full = [np.full((1, 8), 3.0), np.full((2, 8), 3.0)]
    full[0][0, 2] = 1.0  # cheap, and dear without the far context: a key token
    full[1][0, 5] = 2.5  # not cheap enough
    sliding = [rows.copy() for rows in full]
    sliding[0][0, 2] = sliding[1][0, 5] = 5.0
    separate = [np.full((1, 6), 4.0), np.full((2, 6), 4.0)]
    table = perplexity_by_definition(full, sliding, separate, [4, 8], [32, 64], last=2, **OPTIONS)
    table = table.set_index("definition")
    nats = np.log(table.perplexity)
    total = 24 * 3.0 - 2.0 - 0.5
    assert nats["whole text"] == pytest.approx(total / 24)
    assert nats["per word"] == pytest.approx(total / 12)
    assert nats["per byte"] == pytest.approx(total / 96)
    assert nats["last tokens"] == pytest.approx(3.0)
    assert nats["separate windows"] == pytest.approx(4.0)
    assert nats["key tokens (LongPPL)"] == pytest.approx(1.0)
    assert dict(table.units) == {
        **{"whole text": 24, "sliding window": 24, "separate windows": 18, "last tokens": 6},
        **{"key tokens (LongPPL)": 1, "per word": 12, "per byte": 96},
    }
    assert (table.low <= table.perplexity + 1e-9).all()
    nothing = perplexity_by_definition(full, full, separate, [4, 8], [32, 64], last=2, **OPTIONS)
    assert np.isnan(nothing.set_index("definition").perplexity["key tokens (LongPPL)"])


def test_one_document_of_each_source_is_read_further():
    named = [TokenizedDocument(source, f"{source}{n}", text(700, "", n).token_ids) for source in "ab" for n in range(3)]
    short = TokenizedDocument("c", "c0", text(250).token_ids)
    stretches = random_stretches([short, *named], 200, far_tokens=600, at_most=1, seed=0)
    assert [cut.tokens for (cut,) in stretches] == [200, 600, 200, 200, 600, 200, 200]
    nats, tokens = bucket_sums([np.ones((1, cut.tokens - 1)) for (cut,) in stretches], [100, 200, 600])
    np.testing.assert_array_equal(tokens[:, 0], 100)
    np.testing.assert_array_equal(tokens[:, 1], [0, 400, 0, 0, 400, 0, 0])
    np.testing.assert_array_equal(nats, tokens)
    array = one_array([np.full((1, cut.tokens - 1), 2.5) for (cut,) in stretches])
    assert array.shape == (7, 599)
    apart = documents_of(array)
    assert [rows.shape for rows in apart] == [(1, cut.tokens - 1) for (cut,) in stretches]
    assert all((rows == 2.5).all() for rows in apart)
    higher = [rows + 0.25 * (rows.size > 500) for rows in apart]
    table = paired_table(higher, apart, [1, 200, 600], **OPTIONS)
    np.testing.assert_allclose(table.nll, [0.25 * 2 / 7, 0.25], rtol=1e-6)
    assert table.documents.tolist() == [7, 2]
    assert table.low[0] < table.nll[0] < table.high[0]
    np.testing.assert_allclose(table.loc[1, ["low", "high"]].astype(float), 0.25, rtol=1e-6)


def test_a_reader_that_was_interrupted_does_not_read_again_what_it_has(tmp_path, monkeypatch):
    model, texts = new_llama(seed=0), [[text(64)], [text(64, "b", 1)]]
    expected = [token_nll(model, document)[None] for (document,) in texts]
    read = []

    def until_interrupted(model, document):
        if read:
            raise KeyboardInterrupt
        read.append(document.name)
        return token_nll(model, document)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llama_long_utils.evaluation.perplexity.token_nll", until_interrupted)
        Reader(tmp_path).nll("base", model, texts)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("base-a-*.npz")}
    assert read == ["a"]
    assert len(kept) == 1
    np.testing.assert_array_equal(Reader(tmp_path).nll("base", model, texts), expected)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.glob("base-a-*.npz")}
    np.testing.assert_array_equal(
        Reader(tmp_path).windows("base", model, texts, 32)[1][0], nll_in_windows(model, texts[1][0], 32)
    )


def test_what_a_second_reading_saves(tmp_path, monkeypatch):
    """A reader to whom every token that it has read before costs a quarter."""
    read = []

    def nll(self, name, model, texts):
        rows = []
        for (cut,) in texts:
            ids = cut.token_ids.tolist()
            read.append(ids)
            rows.append(np.array([[0.25 if token in ids[:place] else 1.0 for place, token in enumerate(ids)][1:]]))
        return rows

    monkeypatch.setattr(Reader, "nll", nll)
    texts = [TokenizedDocument("mine", name, np.arange(100, dtype=np.int32) + 100 * (name == "b")) for name in "ab"]
    saved = Reader(tmp_path).second_reading_saves("any", None, texts, 30, passage=10, skipped=4)
    assert saved.tolist() == [0.75, 0.75]
    control, again = read[0], read[2]
    assert control[11:] == again[11:]  # only the first passage differs
    assert (control[1:11], again[1:11]) == ([*range(41, 51)], [*range(1, 11)])
    assert len(again) == 1 + 10 + 30 + 10
