"""Sources as a stream: mixed by weight, tokenized in shards, the same after every interruption."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice

import hub_server
import huggingface_hub
import numpy as np
import pytest

from llama_long_utils.cache import Cache, digest
from llama_long_utils.data import mixture, sources, tokens
from llama_long_utils.data.documents import Document, Rules, draw, rules_of
from llama_long_utils.data.mixture import HELD_OUT, Mixture, reading_table
from llama_long_utils.data.packing import cut_document
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.data.sources import load_documents, read_source
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.settings import Data, Source

FOLDER = REPOSITORY / "data" / "tiny-llama"  # not from what trains it: two processes import this file

WORDS = (REPOSITORY / "README.md").read_text().split()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


def write_texts(folder, count, words, first=0):
    """A .jsonl file of `count` texts of so many words, all different."""
    folder.mkdir(exist_ok=True)
    texts = (" ".join([str(number), *np.roll(WORDS, number)[:words]]) for number in range(first, first + count))
    with (folder / "texts.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return folder


def data(*names, held_out=None, **options):
    return Data(list(names), held_out or {}, minimum_characters=1, split_seed=0, **options)


def settings(**numbers):
    plain = {"window": 256, "reach": 256, "steps": 40, "long_document_weight": 1.0, "self_quoting_share": 0.0}
    return dataclasses.replace(load_preset("tiny").training, **{**plain, **numbers})


def test_what_is_not_trained_on_is_counted_where_too_little_is_left(tmp_path, tokenizer):
    words = np.random.default_rng(0).choice([f"word{number}" for number in range(500)], (5, 300))
    texts = [json.dumps({"text": " ".join(row)}) for row in words]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "twice.jsonl").write_text("\n".join(texts + texts))
    found = Mixture(Data([str(tmp_path / "texts")], minimum_characters=1, split_seed=0), tokenizer, cache=tmp_path)
    assert list(found.counts.values()) == [len(found.held_out())] == [1]
    with pytest.raises(ValueError, match="of 10 documents 1 are held out, 1 copies of those left out; the other 8 of"):
        found.reading(settings(steps=4000))


def arrays(sequence):
    return [array for array in vars(sequence).values() if array is not None]


def ids(sequences):
    return digest([arrays(sequence) for sequence in sequences])


@pytest.fixture
def small_parts(monkeypatch):
    """Shards of a few texts, buffers of a few shards, and every folder a stream."""
    monkeypatch.setattr(tokens, "SHARD", 20_000)
    monkeypatch.setattr(mixture, "BUFFER", 20_000)
    monkeypatch.setattr(mixture, "PATIENCE", 80_000)
    monkeypatch.setattr(mixture, "SMALL", 0)


def test_the_default_preset_trains_on_the_same_sequences_bit_by_bit(tokenizer):
    """Its stored adapter was trained on what was drawn from lists in memory in November 2026."""
    tiny = load_preset("tiny")
    texts = Mixture(tiny.data, tokenizer)
    assert ids(TrainingData(texts, tiny.training, tokenizer)) == "e824d762c3287665"
    two_passes = dataclasses.replace(tiny.training, steps=3000)
    assert ids(TrainingData(texts, two_passes, tokenizer)) == "41068dcd112bcc00"
    assert digest([document.token_ids for document in texts.held_out()]) == "94b65346aff6dea0"


def test_a_stream_is_the_same_from_the_cache_and_by_number(tokenizer, tmp_path, small_parts):
    folder = write_texts(tmp_path / "texts", 300, 200)
    texts = Mixture(data(str(folder)), tokenizer, cache=tmp_path)
    drawn = TrainingData(texts, settings(), tokenizer)
    expected = ids(drawn)
    again = TrainingData(Mixture(data(str(folder)), tokenizer, cache=tmp_path), settings(), tokenizer)
    assert ids(again) == expected
    for number in (31, 3, 4, 39, 0):
        assert digest(arrays(again[number])) == digest(arrays(drawn[number]))
    quoting = settings(self_quoting_share=0.5, pack=False, reach=512)
    drawn = TrainingData(texts, quoting, tokenizer)
    assert digest(arrays(drawn[21])) == digest(arrays([*drawn][21]))


def test_training_begins_before_the_stream_is_read_to_its_end(tokenizer, tmp_path, small_parts, monkeypatch):
    folder, read = write_texts(tmp_path / "texts", 3000, 100), []

    def counted(*arguments, **options):
        for document, place in read_source(*arguments, **options):
            read.append(document.name)
            yield document, place

    monkeypatch.setattr(tokens, "read_source", counted)
    texts = Mixture(data(str(folder)), tokenizer, cache=tmp_path)
    drawn = TrainingData(texts, settings(), tokenizer)
    assert drawn[0].label_tokens > 200
    assert 0 < len(read) < 500  # of 3,000
    before = list(read)
    again = TrainingData(Mixture(data(str(folder)), tokenizer, cache=tmp_path), settings(), tokenizer)
    assert digest(arrays(again[0])) == digest(arrays(drawn[0]))
    assert not set(read[len(before) :]) & set(before[:100])  # what is in the cache is not read again


KILLED = """
import sys, time
from pathlib import Path
from llama_long_utils.data import mixture, tokens
from llama_long_utils.data.sequences import TrainingData
sys.path.insert(0, "tests")
from test_mixture import *
tokens.SHARD = mixture.BUFFER = 20_000
mixture.SMALL = 0
tokenizer = load_tokenizer(FOLDER)
texts = mixture.Mixture(data(sys.argv[1]), tokenizer, cache=Path(sys.argv[2]))
drawn = TrainingData(texts, settings(steps=400), tokenizer)
for number in range(400):
    print(number, digest(arrays(drawn[number])), flush=True)
    time.sleep(0.02)
"""


def test_after_a_kill_the_stream_goes_on_at_the_exact_token(tokenizer, tmp_path, small_parts):
    """SIGKILL to the process that trains; another begins at the next sequence."""
    folder = write_texts(tmp_path / "texts", 1000, 200)
    straight = TrainingData(
        Mixture(data(str(folder)), tokenizer, cache=tmp_path / "straight"), settings(steps=400), tokenizer
    )
    expected = [digest(arrays(sequence)) for sequence in straight]
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "cache")]
    found = []
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            number, what = line.split()
            found.append(what)
            if number == "150":
                run.kill()
    assert 150 < len(found) < 400
    texts = Mixture(data(str(folder)), tokenizer, cache=tmp_path / "cache")
    resumed = TrainingData(texts, settings(steps=400), tokenizer)
    assert found + [digest(arrays(resumed[number])) for number in range(len(found), 400)] == expected


def test_a_damaged_shard_is_made_again(tokenizer, tmp_path, small_parts, capsys):
    texts = Mixture(data(str(write_texts(tmp_path / "texts", 300, 200))), tokenizer, cache=tmp_path)
    expected = ids(TrainingData(texts, settings(steps=200), tokenizer))
    files = sorted((tmp_path / "shards").glob("*/[0-9]*"))
    whole = {file: file.read_bytes() for file in files}
    for file, content in ((files[0], b""), (files[3], whole[files[3]][:-100] + bytes(100)), (files[5], b"garbage")):
        file.write_bytes(content)
        assert ids(TrainingData(texts, settings(steps=200), tokenizer)) == expected
        assert "is not whole" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in files} == whole


def test_weights_are_shares_of_tokens_whatever_the_lengths_of_documents(tokenizer, tmp_path, small_parts):
    long = Source(str(write_texts(tmp_path / "long", 60, 2000)), weight=3.0, passes=9)
    short = Source(str(write_texts(tmp_path / "short", 2000, 30, first=5000)), weight=1.0, passes=9)
    texts = Mixture(data(long, short), tokenizer, cache=tmp_path)
    read = Counter()
    for buffer in islice(texts.buffers(settings()), 8):
        for document in buffer:
            read[document.source] += document.tokens
    assert read[long.name] / read.total() == pytest.approx(0.75, abs=0.02)


def test_a_small_source_stands_once_in_a_buffer_and_no_more_often_than_allowed(tokenizer, tmp_path):
    """Its share is that of ten passes of a buffer, among which a sequence drawn at random could be the tenth."""
    small = Source(str(write_texts(tmp_path / "small", 60, 300)), weight=1.0, passes=3)
    large = Source(str(write_texts(tmp_path / "large", 900, 300, first=1000)), weight=1.0)
    texts = Mixture(data(small, large), tokenizer, cache=tmp_path)
    numbers = settings(steps=10_000)
    buffers = texts_until_refused(texts, numbers)
    assert len(buffers) == 3
    for buffer in buffers:
        counts = Counter((document.source, document.name) for document in buffer)
        assert set(counts.values()) == {1}
        assert sum(source == small.name for source, _ in counts) == 60
    least = sum(document.tokens for document in buffers[0])
    (row, _) = texts.reading(settings(steps=least // 256))
    assert row["passes"] == pytest.approx(1, abs=0.05)


def test_documents_outside_the_limits_are_not_trained_on(tokenizer, tmp_path):
    folder = tmp_path / "texts"
    for words in (20, 200, 1000):
        write_texts(folder, 10, words)
    limited = Source(str(folder), minimum_tokens=100, maximum_tokens=1000)
    texts = Mixture(data(limited), tokenizer, cache=tmp_path)
    assert len(texts.lengths[limited.name]) == 10
    assert 100 <= texts.lengths[limited.name].min() <= texts.lengths[limited.name].max() <= 1000


def test_without_packing_short_texts_leave_their_share_and_a_stream_of_others_is_not_read_for_ever(
    tokenizer, tmp_path, small_parts
):
    long = Source(str(write_texts(tmp_path / "long", 60, 2000)), weight=1.0)
    short = Source(str(write_texts(tmp_path / "short", 1500, 40)), weight=1.0, maximum_tokens=255)
    texts = Mixture(data(long, short), tokenizer, cache=tmp_path)
    assert [row["trained_on"] for row in texts.reading(settings(pack=False))] == [40 * 256, 0]
    assert all(sequence.contiguous for sequence in TrainingData(texts, settings(pack=False), tokenizer))
    unlimited = Mixture(data(long, dataclasses.replace(short, maximum_tokens=0)), tokenizer, cache=tmp_path)
    with pytest.raises(ValueError, match=r"no document of 256 to inf tokens in the last .*: set pack = true"):
        list(TrainingData(unlimited, settings(pack=False), tokenizer))


def test_what_will_be_read_is_known_before_training_and_too_many_passes_are_refused(tokenizer, tmp_path):
    folder = write_texts(tmp_path / "texts", 50, 300)
    other = write_texts(tmp_path / "other", 90, 600)
    texts = Mixture(data(str(other), str(folder)), tokenizer, cache=tmp_path)
    rows = texts.reading(settings(steps=400))
    assert [row["source"] for row in rows] == [str(other), str(folder)]
    assert rows[1]["documents"] == 50
    assert sum(row["trained_on"] for row in rows) == 400 * 256
    assert rows[0]["passes"] == pytest.approx(400 * 256 / sum(row["tokens"] for row in rows))
    assert f"{rows[0]['tokens']:,}" in reading_table(rows).to_string()
    alone = Mixture(data(str(folder), passes=2), tokenizer, cache=tmp_path)
    known = alone.reading(settings(steps=40))[0]
    most = int(2 * known["tokens"] / 256)
    assert alone.reading(settings(steps=most))[0]["passes"] == pytest.approx(2, abs=0.02)
    with pytest.raises(ValueError, match=rf"more than passes = 2: lower training.steps to {most}, add texts"):
        alone.reading(settings(steps=most + 2))
    with pytest.raises(ValueError, match="more than passes = 2"):
        alone.reading(settings(steps=most + 2, long_document_weight=2.0))  # each long one twice in a pass
    with pytest.raises(ValueError, match=r"lower training.sequences_per_step or the window, add texts"):
        alone.reading(settings(steps=1, sequences_per_step=most + 2))


def test_a_stream_that_ends_too_early_says_so_when_it_does_and_goes_on_with_more_passes(
    tokenizer, tmp_path, small_parts
):
    folder = str(write_texts(tmp_path / "texts", 100, 300))
    numbers = settings(steps=2000)
    texts = Mixture(data(folder, passes=2), tokenizer, cache=tmp_path)
    (row,) = texts.reading(numbers)
    assert (row["documents"], row["passes"]) == (None, None)
    shown = dict(reading_table([row]).iloc[0])
    assert shown == {
        "source": folder,
        **dict.fromkeys(("documents", "tokens", "passes"), "not known yet"),
        "tokens trained on": "512,000",
        "passes allowed": "2",
        "documents held out": "0",
    }
    drawn, found = TrainingData(texts, numbers, tokenizer), []
    with pytest.raises(ValueError, match=r"was read to its end 2 times, and passes = 2 allows no other: raise passes"):
        found.extend(digest(arrays(drawn[number])) for number in range(2000))
    counts = Counter(document.name for buffer in texts_until_refused(texts, numbers) for document in buffer)
    assert set(counts.values()) == {2}
    more = Mixture(data(folder, passes=4), tokenizer, cache=tmp_path)
    assert more.key == texts.key  # so that the run goes on
    longer = TrainingData(more, numbers, tokenizer)
    assert [digest(arrays(longer[number])) for number in range(100)] == found[:100]


def texts_until_refused(texts, numbers):
    buffers = []
    with pytest.raises(ValueError, match="passes"):
        buffers.extend(texts.buffers(numbers))
    return buffers


def test_documents_held_out_of_a_stream_stay_so_when_it_grows(tokenizer, tmp_path, small_parts):
    folder = write_texts(tmp_path / "texts", 500, 60)
    held_out = {}
    for count in (0, 500):
        write_texts(folder, count, 60, first=500)
        texts = Mixture(data(str(folder), held_out={"texts": 3}), tokenizer, cache=tmp_path)
        trained = {document.name for document in texts.training(texts.sources[0])}
        everything = {document.name for document in load_documents(str(folder))}
        held_out[count] = everything - trained
        assert held_out[count] == {name for name in everything if draw(0, str(folder), name) < HELD_OUT}
        chosen = {document.name for document in texts.held_out()}
        assert len(chosen) == 3
        assert chosen <= held_out[count]
    assert held_out[0] < held_out[500]
    with pytest.raises(ValueError, match=r"cannot hold out 900 documents .*: only \d+ may be held out"):
        Mixture(data(str(folder), held_out={"texts": 900}), tokenizer, cache=tmp_path).held_out()


def test_texts_beside_lines_of_many_change_nothing_for_those(tokenizer, tmp_path, small_parts):
    """A README beside a thousand lines, whose own hash is as good as random, must not hold most of them back."""
    folder = write_texts(tmp_path / "texts", 500, 60)
    alone = Mixture(data(str(folder), held_out={"texts": 3}), tokenizer, cache=tmp_path)
    for name in ("README.md", "NOTES.txt", "more.md"):
        (folder / name).write_text("Where these texts are from. " * 20)
    beside = Mixture(data(str(folder), held_out={"texts": 3}), tokenizer, cache=tmp_path)
    assert alone.limits == beside.limits == {str(folder): HELD_OUT}


@pytest.mark.parametrize(
    ("books", "held_out", "kept_back"), [(60, 8, 16), (24, None, 8), (2, None, 1), (2000, 8, None)]
)
def test_of_a_large_folder_of_few_books_enough_are_held_out(
    tokenizer, tmp_path, small_parts, books, held_out, kept_back
):
    """Two in a hundred would be one book of sixty, and no setting but other files would make them eight."""
    folder = tmp_path / "books"
    folder.mkdir()
    for book in range(books):
        (folder / f"{book}.txt").write_text(f"{book} is the number of this book. " * 4)
        (folder / f"note {book}.txt").write_text("short")
    given = dataclasses.replace(data(str(folder)), held_out=held_out and {"books": held_out}, minimum_characters=20)
    texts = Mixture(given, tokenizer, cache=tmp_path / "cache")
    (source,) = texts.sources
    tested = {document.name for document in texts.held_out()}
    trained = {document.name for document in texts.training(source) if not document.name.startswith("note")}
    assert len(tested) == min(8, books // 2)
    assert not tested & trained
    if kept_back:
        assert books - len(trained) == kept_back
        assert texts.reading(settings())[0]["held_out"] == f"{len(tested)} of {kept_back} texts, by name"
    else:
        assert {*texts.limits.values()} == {HELD_OUT}


def test_a_copy_of_a_held_out_text_is_not_trained_on_in_a_stream(tokenizer, tmp_path, small_parts):
    folder = write_texts(tmp_path / "texts", 500, 60)
    given = data(str(folder), held_out={"texts": 3})
    held_out = {document.name for document in Mixture(given, tokenizer, cache=tmp_path).held_out()}
    texts = {document.name: document.text for document in load_documents(str(folder))}
    with (folder / "texts.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": texts[name]}) + "\n" for name in sorted(held_out) * 9)
    texts = Mixture(given, tokenizer, cache=tmp_path)
    tested = {document.token_ids.tobytes() for document in texts.held_out()}
    trained = {document.token_ids.astype(np.int32).tobytes() for document in texts.training(texts.sources[0])}
    assert len(tested) == 3
    assert not tested & trained


def test_what_is_held_out_is_said_before_training_and_not_searched_for_ever(
    tokenizer, tmp_path, small_parts, monkeypatch
):
    folder = write_texts(tmp_path / "texts", 800, 60)
    stream = Mixture(data(str(folder), held_out={"texts": 3}), tokenizer, cache=tmp_path)
    assert stream.reading(settings())[0]["held_out"] == "3 of 2%, by name"
    monkeypatch.setattr(mixture, "SMALL", 2**25)
    small = Mixture(data(str(folder), held_out={"texts": 3}), tokenizer, cache=tmp_path)
    assert small.reading(settings())[0]["held_out"] == "3"
    monkeypatch.setattr(mixture, "SMALL", 0)
    monkeypatch.setattr(mixture, "PATIENCE", 5000)
    long = dataclasses.replace(data(str(folder), held_out={"texts": 3}), minimum_characters=10_000)
    rare = Mixture(long, tokenizer, cache=tmp_path)
    with pytest.raises(ValueError, match=r"only 0 may be held out, and none was found in the last 5,\d+ tokens; lower"):
        rare.held_out()


def test_texts_that_change_while_they_are_read_are_refused(tokenizer, tmp_path, small_parts):
    folder = write_texts(tmp_path / "texts", 300, 200)
    texts = Mixture(data(str(folder)), tokenizer, cache=tmp_path)
    reader = read_source(texts.sources[0])
    next(reader)
    write_texts(folder, 1, 200, first=9000)
    with pytest.raises(ValueError, match=r"texts.jsonl changed while it was read: run again when nothing writes to it"):
        list(reader)
    with pytest.raises(ValueError, match=r"the texts of .* have changed since the start: run again"):
        list(texts.training(texts.sources[0]))


def test_processes_that_need_the_same_shard_make_it_once(tokenizer, tmp_path, monkeypatch):
    encoded = []

    def slowly(self, given):
        encoded.append(given)
        time.sleep(0.3)
        return [np.arange(3)] * len(given)

    monkeypatch.setattr(Rules, "encode", slowly)
    cache, rules = Cache(tmp_path, 1, {}), rules_of(tokenizer)
    threads = [
        threading.Thread(target=tokens.write_shard, args=(rules, cache, 0, [Document("a", "b", "text")], [1]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.text for (one,) in encoded] == ["text"]


HUB = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_mixture import *
import datasets, huggingface_hub
tokens.SHARD = mixture.BUFFER = 20_000
book = Source("hub:owner/books", column="body", held_out_split="test", weight=3.0)
short = Source("hub:owner/pages", "some", weight=1.0, maximum_tokens=400)
for _ in sys.stdin:  # a fork for each line, which has imported everything and read nothing
    if os.fork() == 0:
        tokenizer = load_tokenizer(FOLDER)
        texts = Mixture(data(book, short, held_out={"books": 2}, passes=9), tokenizer, cache=Path(sys.argv[1]))
        drawn = TrainingData(texts, settings(steps=200), tokenizer)
        found = [digest(arrays(sequence)) for sequence in drawn]
        answer = [texts.key, texts.reading(settings()), [one.name for one in texts.held_out()], found]
        print("ANSWER", json.dumps(answer), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_data_sets_stream_from_the_hub_and_what_was_read_is_not_asked_for_again(tmp_path):
    from datasets import Dataset

    def rows(name, count, words):
        folder = write_texts(tmp_path / name, count, words)
        return [json.loads(line)["text"] for line in (folder / "texts.jsonl").open()]

    books, pages = tmp_path / "hub" / "datasets" / "owner" / "books", tmp_path / "hub" / "datasets" / "owner" / "pages"
    for split, count in (("train", 6), ("test", 4)):
        (books / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"body": rows(split, count, 2000)}).to_parquet(books / "data" / f"{split}-0.parquet")
    (pages / "some").mkdir(parents=True)
    Dataset.from_dict({"text": rows("pages", 60, 60)}).to_parquet(pages / "some" / "train-0.parquet")
    (pages / "README.md").write_text("---\nconfigs:\n- config_name: some\n  data_files: some/*.parquet\n---\n")
    with hub_server.serve(tmp_path / "hub") as hub:
        hub.losses.append("train-0.parquet")

        def run():
            process.stdin.write("go\n")
            process.stdin.flush()
            return json.loads(next(line for line in process.stdout if line.startswith("ANSWER")).partition(" ")[2])

        command = [sys.executable, "-c", HUB, str(tmp_path / "cache")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home")}
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **pipes) as process:
            key, reading, held_out, found = run()
            assert [row["revision"] for row in reading] == [hub.commit] * 2
            assert [row["trained_on"] for row in reading] == [40 * 256 * 3 // 4, 40 * 256 // 4]
            assert held_out == ["0", "1"]
            assert len(found) == 200
            hub.sent.clear()
            assert run() == [key, reading, held_out, found]
            assert not any("parquet" in name for name in hub.sent)  # only the commit was asked for


def test_a_long_file_is_read_in_parts_and_from_any_place(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 1000)
    (tmp_path / "a.txt").write_text("Zeile für Zeile\n" * 300, newline="\r\n")
    (tmp_path / "b.txt").write_text("文" * 2500)  # no line ends
    write_texts(tmp_path, 5, 50)
    source = Source(str(tmp_path))
    read = [*read_source(source)]
    assert "".join(document.text for document, _ in read if document.name.startswith("a")) == "Zeile für Zeile\n" * 300
    assert "".join(document.text for document, _ in read if document.name.startswith("b")) == "文" * 2500
    assert len({document.name for document, _ in read}) == len(read)
    for number, (_, place) in enumerate(read, start=1):
        assert [document for document, _ in read_source(source, json.loads(json.dumps(place)))] == [
            document for document, _ in read[number:]
        ]


def test_parts_of_one_text_are_on_one_side_of_the_split(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 500)
    folder = tmp_path / "texts"
    folder.mkdir()
    for book in range(24):  # half of them are held out, by the folder's name
        (folder / f"{book}.txt").write_text("".join(f"{book} line {line}\n" for line in range(200)))
    for small in (2**25, 0):  # a number of documents is held out of a folder, and by hash of a stream
        monkeypatch.setattr(mixture, "SMALL", small)
        monkeypatch.setattr(mixture, "HELD_OUT", "8")
        texts = Mixture(data(str(folder), held_out={"texts": 2}), tokenizer, cache=tmp_path / str(small))
        (source,) = texts.sources
        kept = {document.name.partition(":")[0] for document in texts.held_out()}
        trained = {document.name.partition(":")[0] for document in texts.training(source)}
        assert kept and trained and not kept & trained
        assert len(list(folder.iterdir())) > len(trained)


@pytest.mark.parametrize("tokens_of_a_document", [256, 300, 384, 512, 1000])
def test_what_is_drawn_without_packing_is_counted_as_it_is_cut(tokens_of_a_document):
    generator, numbers = np.random.default_rng(0), settings(pack=False)
    text = np.arange(tokens_of_a_document)
    cuts = [cut_document(text, 256, int(generator.integers(1, 257))) for _ in range(3000)]
    drawn = np.mean([sum(len(piece) for piece in pieces if len(piece) == 256) for pieces in cuts])
    assert mixture.drawn_tokens(tokens_of_a_document, numbers) == pytest.approx(drawn, rel=0.1)


def test_a_split_that_is_trained_on_is_not_held_out():
    with pytest.raises(ValueError, match="held_out_split = 'train' is what is trained on: name another"):
        Source("hub:owner/books", held_out_split="train")


def test_a_data_set_without_a_revision_keeps_the_commit_it_was_first_read_at(tmp_path, monkeypatch):
    (tmp_path / "hub" / "datasets" / "owner" / "books").mkdir(parents=True)
    with hub_server.serve(tmp_path / "hub") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        first = sources.pinned(Source("hub:owner/books"), tmp_path)
        hub.stop()
        assert first.revision == hub.commit
        assert sources.pinned(Source("hub:owner/books"), tmp_path) == first
