"""The measurement of a large corpus, on a few megabytes: same sequences after kills, memory, the first step's time."""

from pathlib import Path

import torch

from experiments import corpus as corpora
from experiments.corpus import run, write_corpus
from llama_long_utils.records import Record


def test_a_small_corpus_is_read_alike_with_and_without_a_kill_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "FOLDERS", (Path(torch.__file__).parent,))  # to walk the whole machine takes long
    record = run(0.002, tmp_path / "corpus", tmp_path / "results")  # raises if the sequences differ
    corpus, reading, training = (Record(record).table(name).iloc for name in ("corpus", "reading", "training"))
    assert corpus[0].bytes >= 0.002 * 2**30
    assert reading[0].digest == reading[1].digest
    assert 0 < reading[1].continued_from < reading[0].sequences < reading[1].sequences
    assert max(reading[0].peak_gib, reading[1].peak_gib, training[0].peak_gib) <= 2
    assert training[0].first_step_cpu_seconds < 60
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus" / "texts").iterdir()}
    write_corpus(tmp_path / "corpus" / "texts", 10**9)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
