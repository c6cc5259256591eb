import numpy as np
import pytest
import torch

from conftest import functions_of, new_llama
from experiments.power_law import fit_power_law, power_law
from experiments.real_models import unpadded
from llama_long_utils import progress
from llama_long_utils.cache import Cache
from llama_long_utils.data.documents import TokenizedDocument
from llama_long_utils.evaluation.perplexity import (
    Reader,
    bucket_sums,
    nll_in_windows,
    nll_table,
    padded,
    paired_difference,
    paired_table,
    perplexity,
    random_stretches,
    sliding_window,
    token_nll,
)
from llama_long_utils.evaluation.statistics import Bootstrap
from llama_long_utils.records import read_published

OPTIONS = {"bootstrap_samples": 300, "seed": 0}


def text(length, name="a", seed=0):
    ids = np.random.default_rng(seed).integers(2, 128, length).astype(np.int32)
    ids[0] = 0
    return TokenizedDocument("mine", name, ids)


def nll_of_last(model, ids):
    """Cost of the last token by all logits of a pass of its own, in nats."""
    ids = torch.from_numpy(ids).long()[None]
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits[0, -1]
    return torch.nn.functional.cross_entropy(logits, ids[0, -1]).item()


def test_each_token_but_bos_is_scored_once_and_with_all_of_the_text_before_it():
    model, document = new_llama(seed=0), text(50)
    nll = token_nll(model, document, 50)
    assert nll.shape == (49,)
    for position in (1, 25, 49):
        assert nll[position - 1] == pytest.approx(nll_of_last(model, document.token_ids[: position + 1]), abs=1e-4)
    np.testing.assert_allclose(token_nll(model, document, 20), nll[:19], atol=1e-4)


def test_a_bucket_is_the_mean_over_tokens_and_not_over_documents():
    nll = [np.full(10, 1.0), np.full(2, 4.0)]
    table = nll_table("base", nll, [1, 20], **OPTIONS)
    assert table.nll.item() == pytest.approx((10 * 1 + 2 * 4) / 12)
    assert table.nll.item() != pytest.approx(np.mean([row.mean() for row in nll]))
    assert (table.tokens.item(), table.documents.item()) == (12, 2)


def test_bucket_edges_are_positions_counted_from_bos():
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


NOTEBOOK = functions_of("06_perplexity_by_position")


def test_power_law_finds_its_own_parameters():
    context = 2.0 ** np.arange(1, 14)
    found = fit_power_law(context, (25.4 / context) ** 0.45 + 1.56)
    assert found == pytest.approx({"alpha": 25.4, "beta": 0.45, "gamma": 1.56, "rmse": 0}, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("size", ["7B", "13B", "70B"])
def test_power_law_fits_the_published_curves_as_well_as_the_paper_s_own_parameters(size):
    published = read_published("llama2_long")
    context = np.array(published["figure_1"]["context"], dtype=float)
    loss = np.array(published["figure_1"]["loss"][size])
    printed = published["figure_1_power_law"][size]
    found = fit_power_law(context, loss)
    curves = [power_law(context, np.log(one["alpha"]), one["beta"], one["gamma"]) for one in (found, printed)]
    ours, theirs = (np.mean((np.log(curve) - np.log(loss)) ** 2) for curve in curves)
    assert ours <= theirs  # least squares in log-loss cannot do worse
    assert (found["beta"], found["gamma"]) == pytest.approx((printed["beta"], printed["gamma"]), abs=0.025)


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
    np.testing.assert_allclose(slid[:15], full[:15], atol=1e-4)
    for position in (24, 31):  # in the window from 16 on, where BOS stands in place of the first token
        window = np.concatenate([document.token_ids[:1], document.token_ids[17 : position + 1]])
        assert slid[position - 1] == pytest.approx(nll_of_last(model, window), abs=1e-4)
    with pytest.raises(ValueError, match="a text of 50 tokens cannot be read in windows of 16"):
        nll_in_windows(model, text(50), 16)


def test_every_second_window_is_a_text_of_its_own():
    model, document = new_llama(seed=0), text(64)
    for number, nll in enumerate(nll_in_windows(model, document, 16)[::2]):
        ids = document.token_ids[16 * number : 16 * (number + 1)].copy()
        ids[0] = document.token_ids[0]
        alone = token_nll(model, TokenizedDocument("mine", "a", ids), 16)
        np.testing.assert_allclose(nll, alone, atol=1e-4)


def test_perplexity_is_of_the_mean_over_the_units_asked_for():
    nll = [np.full((1, 8), 3.0), np.full((2, 8), 2.0)]
    found = perplexity(nll, **OPTIONS)
    assert np.log(found["perplexity"]) == pytest.approx((8 * 3 + 16 * 2) / 24)
    assert found["units"] == 24
    per_word = perplexity(nll, [4, 8], **OPTIONS)
    assert np.log(per_word["perplexity"]) == pytest.approx((8 * 3 + 16 * 2) / 12)
    assert np.isnan(perplexity([np.array([]), np.array([])], **OPTIONS)["perplexity"])
    many = perplexity([np.full(5, value) for value in np.linspace(2, 3, 20)], **OPTIONS)
    assert many["low"] < many["perplexity"] < many["high"]


def test_one_document_of_each_source_is_read_further():
    named = [TokenizedDocument(source, f"{source}{n}", text(700, "", n).token_ids) for source in "ab" for n in range(4)]
    short = TokenizedDocument("c", "c0", text(250).token_ids)
    stretches = random_stretches([short, *named], 200, far_length=600, at_most=1, seed=0)
    assert [cut.tokens for (cut,) in stretches] == [200, 600, 200, 200, 200, 600, 200, 200, 200]
    nats, tokens = bucket_sums([np.ones((1, cut.tokens - 1)) for (cut,) in stretches], [100, 200, 600])
    np.testing.assert_array_equal(tokens[:, 0], 100)
    np.testing.assert_array_equal(tokens[:, 1], [0, 400, 0, 0, 0, 400, 0, 0, 0])
    np.testing.assert_array_equal(nats, tokens)
    array = padded([np.full((1, cut.tokens - 1), 2.5) for (cut,) in stretches])
    assert array.shape == (9, 599)
    apart = unpadded(array)
    assert [rows.shape for rows in apart] == [(1, cut.tokens - 1) for (cut,) in stretches]
    assert all((rows == 2.5).all() for rows in apart)
    higher = [rows + 0.25 * (rows.size > 500) for rows in apart]
    table = paired_table(higher, apart, [1, 200, 600], **OPTIONS)
    np.testing.assert_allclose(table.nll, [0.25 * 2 / 9, 0.25], rtol=1e-6)
    assert table.documents.tolist() == [9, 2]
    assert table.low[0] < table.nll[0] < table.high[0]
    assert np.isnan([table.low[1], table.high[1]]).all()  # two documents have no interval


def test_tokens_that_only_one_of_two_arms_read_are_not_compared():
    longer, shorter = [np.full((1, 9), 2.0)] * 8, [np.full((1, 4), 1.5)] * 8
    table = paired_table(longer, shorter, [1, 3, 10], **OPTIONS)
    assert table.nll.tolist() == [0.5, 0.5]
    assert list(table) == ["position_low", "position_high", "nll", "low", "high", "documents"]


def passes(model):
    """A list to which every forward pass of the model adds its shape."""
    shapes = []
    model.model.register_forward_pre_hook(
        lambda _module, _arguments, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_an_interrupted_reader_does_not_read_again_what_it_has(tmp_path):
    model, texts = new_llama(seed=0), [[text(64)], [text(64, "b", 1)]]
    expected = [token_nll(model, document)[None] for (document,) in texts]
    cache = Cache(tmp_path, 1, {"model": "a"})
    Reader(model, cache).nll(texts[:1])
    read = passes(model)
    np.testing.assert_array_equal(Reader(model, cache).nll(texts), expected)
    assert read == [(1, 64)]
    np.testing.assert_array_equal(Reader(model, cache).windows(texts, 32)[1][0], nll_in_windows(model, texts[1][0], 32))
    read.clear()
    np.testing.assert_array_equal(Reader(model, cache).nll(texts), expected)
    assert not read


def test_how_far_a_reader_is_can_be_seen(tmp_path, monkeypatch):
    """Minutes of reading without a word look like a kernel that hangs."""
    monkeypatch.setenv(progress.FILE, str(tmp_path / "said"))
    model, said = new_llama(seed=0), []
    model.model.register_forward_pre_hook(lambda *_: said.append((tmp_path / "said").read_text()))
    monkeypatch.setitem(progress.PAUSE, "file", 0.0)
    Reader(model, Cache(tmp_path, 1)).nll([[text(64), text(64, "c", 2)], [text(64, "b", 1)]])
    assert [one.split(",")[1] for one in said] == [" nll: 0%", " nll: 33%", " nll: 67%"]
    assert (tmp_path / "said").read_text() == ""


def test_another_model_another_text_and_another_window_are_read(tmp_path):
    model, (one, other) = new_llama(seed=0), (text(64), text(64, seed=1))
    cache = Cache(tmp_path, 1, {"model": "a"})
    Reader(model, cache).nll([[one]])
    read = passes(model)
    Reader(model, cache).nll([[other]])  # of the same name
    Reader(model, Cache(tmp_path, 1, {"model": "b"})).nll([[one]])
    Reader(model, Cache(tmp_path, 2, {"model": "a"})).nll([[one]])
    assert read == [(1, 64)] * 3
    Reader(model, cache).windows([[one]], 16)
    Reader(model, cache).windows([[one]], 32)
    assert read[3:] == [(7, 16), (3, 32)]


def test_names_of_documents_may_be_long_and_in_any_script(tmp_path):
    model = new_llama(seed=0)
    for name in ("\u6587" * 80, "a/../b", "x" * 300):
        Reader(model, Cache(tmp_path, 1)).nll([[text(16, name)]])
    assert len(list(tmp_path.iterdir())) == 3


def test_copying_benefit_is_what_a_reader_saves_that_read_the_passage_before(tmp_path):
    model = new_llama(seed=0)
    texts = [text(51, name, seed) for seed, name in enumerate("ab")]
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda _module, _arguments, options: read.append(options["input_ids"][0].tolist()), with_kwargs=True
    )
    saved = NOTEBOOK.copying_benefit(Reader(model, Cache(tmp_path, 1)), texts, 30, passage=10, skip=4)
    hook.remove()
    control, again = read[0], read[2]
    ids = texts[0].token_ids.tolist()
    assert again == ids[:41] + ids[1:11]  # BOS, passage, gap, passage
    assert control == [ids[0], *ids[41:51], *ids[11:41], *ids[1:11]]  # another first passage, all else the same
    nll = [token_nll(model, TokenizedDocument("mine", "a", np.array(one, dtype=np.int32))) for one in (control, again)]
    assert saved[0] == pytest.approx(float(nll[0][-6:].mean() - nll[1][-6:].mean()), abs=1e-6)
    assert saved.shape == (2,)
