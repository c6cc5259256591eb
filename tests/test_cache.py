import errno
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from llama_long_utils import commands
from llama_long_utils.cache import Cache, digest
from llama_long_utils.paths import whole_folder, write_atomically


@dataclass(frozen=True)
class Settings:
    rate: float
    name: str = "a"


class Counted:
    """Makes a result and counts how often."""

    def __init__(self, result):
        self.result, self.calls = result, 0

    def __call__(self, *_arguments):
        self.calls += 1
        return self.result


def test_a_result_is_made_once_for_the_same_inputs_and_again_for_others(tmp_path):
    make = Counted({"nll": np.arange(5.0)})
    for _ in range(2):
        found = Cache(tmp_path, 1, {"base": "abc"}).arrays("text", make, settings=Settings(0.1))
        assert found["nll"].tolist() == [0, 1, 2, 3, 4]
    assert make.calls == 1
    Cache(tmp_path, 1, {"base": "abc"}).arrays("text", make, settings=Settings(0.2))
    Cache(tmp_path, 1, {"base": "abd"}).arrays("text", make, settings=Settings(0.1))
    Cache(tmp_path, 2, {"base": "abc"}).arrays("text", make, settings=Settings(0.1))
    assert make.calls == 4


def test_a_result_has_the_same_types_when_it_is_made_and_when_it_is_read(tmp_path):
    cache, make = Cache(tmp_path, 1), Counted({1: (2, 3)})
    assert [cache.value("x", make) for _ in range(2)] == [{"1": [2, 3]}] * 2
    found = [cache.items("y", ["one"], lambda items: [(1, 2) for _ in items], item_key=str) for _ in range(2)]
    assert found == [[[1, 2]]] * 2
    nothing = Counted(None)
    assert [cache.value("nothing", nothing) for _ in range(2)] == [None] * 2
    assert (make.calls, nothing.calls) == (1, 1)


def damage_zeroed_tail(content):
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


DAMAGES = {
    "empty": lambda content: b"",
    "half-written": lambda content: content[: len(content) // 2],
    "zeroed tail": damage_zeroed_tail,
    "garbage": lambda content: b"garbage" * 100,
    "one flipped bit": lambda content: content[:150] + bytes([content[150] ^ 1]) + content[151:],
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("kind", ["arrays", "value", "items"])
def test_a_file_that_is_not_whole_is_made_again_and_a_line_says_so(tmp_path, kind, damage, capsys):
    cache = Cache(tmp_path, 1)
    make = Counted({"a": np.arange(1000)} if kind == "arrays" else [1.5] * (100 if kind == "value" else 1))
    call = {
        "arrays": lambda: cache.arrays("x", make),
        "value": lambda: cache.value("x", make),
        "items": lambda: cache.items("x", ["one"], make, item_key=str),
    }[kind]
    expected = call()
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    np.testing.assert_equal(call(), expected)
    assert make.calls == 2
    assert "is not whole" in capsys.readouterr().out
    np.testing.assert_equal(call(), expected)
    assert make.calls == 2


def test_a_file_under_another_results_name_is_not_taken_for_this_one(tmp_path):
    cache = Cache(tmp_path, 1)
    cache.value("one", lambda: 1)
    (one,) = tmp_path.iterdir()
    one.rename(cache.path("two", {}, ".json"))
    assert cache.value("two", lambda: 2) == 2


def test_an_interrupted_series_asks_no_finished_item_again(tmp_path):
    asked = []

    def measure(part):
        if "c" in part and len(asked) < 3:
            raise KeyboardInterrupt
        asked.extend(part)
        return [letter.upper() for letter in part]

    cache = Cache(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        cache.items("letters", ["a", "b", "c"], measure, item_key=str)
    asked.append("interrupted")
    assert cache.items("letters", ["c", "b", "a", "d"], measure, item_key=str) == ["C", "B", "A", "D"]
    assert asked == ["a", "b", "interrupted", "c", "d"]


def test_results_are_read_back_as_json_has_them(tmp_path):
    cache = Cache(tmp_path, 1)
    for _ in range(2):
        found = cache.value("row", lambda: {"nll": 0.1 + 0.2, "text": "ü\n", "none": None})
    assert found == {"nll": 0.1 + 0.2, "text": "ü\n", "none": None}
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["key"] == {"name": "row", "version": 1}


def test_a_key_tells_arrays_apart_by_dtype_shape_and_content():
    one = np.arange(6, dtype=np.int32)
    others = [one.astype(np.int64), one.reshape(2, 3), one + 1]
    assert len({digest(array) for array in [one, *others]}) == 4
    assert digest(one) == digest(np.arange(12, dtype=np.int32)[:6])
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"rate": float("nan")})


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(commands, "CACHE", cache)
    cache.write_text("a file where the folder should be")
    cache.with_name("other").write_text("another")
    elsewhere = "; LLAMA_LONG_CACHE=FOLDER puts the cache elsewhere"
    for file, end in ((cache / "models" / "one", elsewhere), (cache.with_name("other") / "one", "")):
        with pytest.raises(SystemExit) as ended:
            commands.run_command(lambda file=file: write_atomically(file, b""))
        assert str(ended.value) == f"error: {file.parent}: {'Not a directory' if end else 'File exists'}{end}"


def test_a_full_disk_is_named_with_its_place_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match=r"No space left.*file\.json"):
        write_atomically(tmp_path / "file.json", b"1")
    assert not [*tmp_path.iterdir()]
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError, match=r"make room.*adapter"), whole_folder(tmp_path / "adapter"):
        raise SafetensorError(words)  # which is no OSError
    with pytest.raises(SafetensorError, match="header"), whole_folder(tmp_path / "adapter"):
        raise SafetensorError("header too large")
