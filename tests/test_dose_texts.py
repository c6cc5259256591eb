"""The second set of held-out texts: how its files become texts, and which of them are left out."""

import gzip
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest

from experiments import dose_texts
from experiments.dose_inputs import load_inputs, prepare, save_inputs
from experiments.dose_settings import read_doses
from llama_long_utils.data.documents import Document
from llama_long_utils.data.sources import load_documents
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.presets import load_preset


def prose(seed, words=900):
    """Numbers, so that no long stretch is twice in it or in a text of another seed."""
    return " ".join(f"{number:,}" for number in np.random.default_rng(seed).integers(10**7, size=words))


def r_file(*vectors):
    """As R's saveRDS in its binary form, each compressed behind its length, without what R puts after the lines."""
    raw = b""
    for lines in vectors:
        content = b"X\n" + struct.pack(">iiii", 3, 262146, 197888, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
        for line in lines:
            content += struct.pack(">ii", 262153, len(line.encode())) + line.encode()
        raw += struct.pack(">i", len(content)) + zlib.compress(content)
    return raw


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """Sets `SECOND_NAMES` to given ones, of files in the folder it returns."""
    monkeypatch.setattr(dose_texts, "SECOND", tmp_path)

    def names(**kinds):
        monkeypatch.setattr(dose_texts, "SECOND_NAMES", kinds)
        monkeypatch.setattr(dose_texts, "SECOND_FOLDERS", dict.fromkeys(kinds, tmp_path))
        return tmp_path

    return names


def test_files_are_joined_in_the_order_of_their_names_and_of_patterns(unpacked, capsys):
    folder = unpacked(faqs=("b.html faq[1-9].txt", "dictionary.dict.dz", "none.txt"))
    (folder / "faq2.txt").write_text("second")
    (folder / "faq1.txt").write_text("first")
    (folder / "faqs.txt").write_text("no chapter")
    (folder / "b.html").write_text("<head><title>no</title></head><p>page")
    (folder / "dictionary.dict.dz").write_bytes(gzip.compress(b"entry"))
    found = dose_texts.second_texts()
    assert [(text.source, text.text) for text in found] == [("faqs", "\npage\nfirst\nsecond"), ("faqs", "entry")]
    assert "so not read: none.txt" in capsys.readouterr().out


def test_a_novel_is_one_vector_of_lines_in_a_file_of_r(unpacked):
    folder = unpacked(novels=("books#1", "books#0"))
    (folder / "books").write_bytes(r_file(["EMMA", "", "a line"], ["Élinor", "another"]))
    assert [text.text for text in dose_texts.second_texts()] == ["Élinor\nanother", "EMMA\n\na line"]


def test_the_second_set_leaves_out_what_is_trained_on_or_in_the_first_set_or_a_copy(unpacked, monkeypatch, tmp_path):
    preset = load_preset("tiny")
    last = preset.data.sources[-1]
    preset = replace(preset, data=replace(preset.data, sources=[last], held_out={last: 2}))
    doses = replace(read_doses("tiny"), lengths=(4096, 2048))
    trained = max(load_documents(last), key=lambda document: len(document.text))
    texts = {"one": prose(1), "first": prose(2), "two": prose(3), "third": prose(4), "short": prose(5, words=100)}
    texts |= {"trained": trained.text, "dull": "the same again. " * 4000, "copy": f"It follows. {prose(1)}"}
    folder = unpacked(mixed=("one", "copy", "first", "trained", "dull", "short", "two", "third"))
    for name, text in texts.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(dose_texts, "machine_texts", lambda: [Document("prose", "other name", texts["first"])])
    found = prepare(preset, doses, load_tokenizer(preset.base.source), "second")
    assert [text.name for text in found.texts] == ["one", "two"]
    assert [text.tokens for text in found.texts] == [4096, 4096]
    assert (found.training, found.haystacks, found.requests) == ([], [], [])
    assert [row["share_in_training"] for row in found.about] == [0, 0]
    assert max(row["share_in_other_texts"] for row in found.about) < dose_texts.MOST_SHARED
    save_inputs(found, tmp_path / "second.npz")
    again = load_inputs(tmp_path / "second.npz")
    assert again.about == found.about
    assert (again.texts[1].token_ids == found.texts[1].token_ids).all()


def test_the_second_set_has_other_kinds_and_folders_than_the_first():
    assert set(dose_texts.SECOND_NAMES) == set(dose_texts.SECOND_FOLDERS)
    assert not set(dose_texts.SECOND_NAMES) & set(dose_texts.NAMES)
    assert all(folder.is_relative_to(dose_texts.SECOND) for folder in dose_texts.SECOND_FOLDERS.values())
