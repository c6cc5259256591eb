"""A large corpus, read as training reads it: `python -m experiments corpus` writes record 03_corpus.

The texts are sources, headers and documents that this machine has. One process reads them to their end; it is killed on
the way, and another goes on. A third reads the first part, past the kill, which must have the same sequences. Then
training takes a step.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from llama_long_utils.cache import digest
from llama_long_utils.data.mixture import Mixture
from llama_long_utils.data.sequences import TrainingData
from llama_long_utils.model.weights import load_tokenizer
from llama_long_utils.paths import REPOSITORY
from llama_long_utils.presets import load_preset
from llama_long_utils.records import write_record
from llama_long_utils.settings import Data

FOLDERS = (Path(sys.prefix), Path(sys.base_prefix, "lib"), Path("/usr/include"), Path("/usr/share"), Path("/usr/lib"))
KINDS = r"\.(py|pyi|h|hpp|c|cpp|js|mjs|ts|md|rst|txt|css|html|tcl|pl|pm|pod|sh|json|yaml|xml)"
SHORTEST = 500  # characters
ALONE = 2**16  # bytes: a longer file becomes a file, shorter ones are lines of .jsonl
LINES = 2**26  # bytes of a .jsonl
MODEL = REPOSITORY / "data" / "tiny-llama"
WINDOW = 32_768


def machine_texts() -> Iterator[str]:
    """Texts that this machine has, each once, and again with a number in front if they are not enough."""
    seen: set[bytes] = set()
    for around in range(100):
        for folder in FOLDERS:
            for path in sorted(path for path in folder.rglob("*") if re.fullmatch(KINDS, path.suffix)):
                try:
                    text = f"{around}\n" * bool(around) + path.read_text("utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                if len(text) >= SHORTEST and (key := hashlib.sha256(text.encode()).digest()) not in seen:
                    seen.add(key)
                    yield text


def write_corpus(folder: Path, size: int) -> None:
    """So many bytes of text in .txt and .jsonl files; a folder that is there already is kept."""
    if folder.exists():
        return
    scratch, written = folder.with_name(f".{folder.name}"), 0
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for number, text in enumerate(machine_texts()):
        content = text.encode()
        written += len(content)
        if len(content) >= ALONE:
            (scratch / f"{number:06}.txt").write_bytes(content)
        else:
            with (scratch / f"{written // LINES:04}.jsonl").open("a") as lines:
                lines.write(json.dumps({"text": text}) + "\n")
        if written >= size:
            break
    scratch.replace(folder)


def read(texts: str, out: str, until: int) -> None:
    """Draw the sequences of one pass, from where `out` ends to `until`, a line on each; the last line is about all."""
    file = Path(out)
    done = len(file.read_text().splitlines()) if file.exists() else 0
    tokenizer = load_tokenizer(MODEL)
    numbers = {"window": WINDOW, "reach": WINDOW, "self_quoting_share": 0.0, "long_document_weight": 1.0}
    settings = replace(load_preset("tiny").training, steps=until, **numbers)
    data = Data([texts], {}, minimum_characters=1, split_seed=0, passes=1)
    sequences, labels, first = TrainingData(Mixture(data, tokenizer), settings, tokenizer), 0, 0.0
    with file.open("a") as lines:
        try:
            for number in range(done, len(sequences)):
                sequence = sequences[number]
                first = first or time.process_time()
                labels += sequence.label_tokens
                print(digest([sequence.input_ids, sequence.labels, sequence.position_ids]), file=lines, flush=True)
                print(number, flush=True)
        except ValueError as error:  # the pass is over
            print(error, file=sys.stderr)
    about = {"first_sequence_cpu_seconds": first, "cpu_seconds": time.process_time(), "labels": labels}
    print(json.dumps(about), flush=True)


def take_step(texts: str, run_folder: str) -> None:
    """Train the tiny model for a step; what the process has computed by then, from its start."""
    from llama_long_utils.training.adapter import train_adapter  # readers start without it

    tiny = load_preset("tiny")
    settings = replace(tiny.training, steps=1, warmup_steps=0)
    preset = replace(tiny, name=run_folder, data=Data([texts], {}, minimum_characters=1, split_seed=0))
    train_adapter(preset, settings=settings)
    print(json.dumps({"first_step_cpu_seconds": time.process_time()}), flush=True)


def watched(call: str, cache: Path, at: Callable[[int, int], None] = lambda *_: None) -> dict[str, Any]:
    """What a process prints last, and its highest resident memory in GiB.

    Args:
        at: is called with each number that the process prints, and its id.
    """
    command = [sys.executable, "-c", f"from experiments.corpus import *\n{call}"]
    last, samples, environment = "{}", [0], {**os.environ, "LLAMA_LONG_CACHE": str(cache)}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as run:

        def sample() -> None:
            while run.poll() is None:
                samples.append(resident(run.pid))
                time.sleep(0.1)

        sampler = threading.Thread(target=sample)
        sampler.start()
        for line in run.stdout:
            if line[0].isdigit():
                at(int(line), run.pid)
            elif line[0] == "{":
                last = line
    sampler.join()
    if run.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"ended with code {run.returncode}, as said above: {call}")
    return {**json.loads(last), "peak_gib": max(samples) / 2**30}


def resident(process: int) -> int:
    """Bytes of a process; 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(size_gib: float, folder: Path, results: Path) -> Path:
    """Measure, and write the record."""
    started, texts = time.perf_counter(), folder / "texts"
    write_corpus(texts, int(size_gib * 2**30))
    files = [path for path in texts.iterdir()]
    documents = sum(1 if path.suffix == ".txt" else len(path.read_text().splitlines()) for path in files)
    corpus = {"files": len(files), "documents": documents, "bytes": sum(path.stat().st_size for path in files)}
    stop = int(size_gib * 2**30 / 2 / WINDOW / 16)  # of some two bytes a token, a sixteenth of the way

    def kill(number: int, reader: int) -> None:
        if number == stop:
            os.kill(reader, signal.SIGKILL)

    rows, drawn = [], {}
    for name, parts, until in (("straight", 1, 2 * stop), ("killed", 2, 10**6)):
        out, cache = folder / f"{name}.txt", folder / f"cache of {name}"
        out.unlink(missing_ok=True)
        shutil.rmtree(cache, ignore_errors=True)
        call = f"read({str(texts)!r}, {str(out)!r}, {until})"
        found = [watched(call, cache, kill if part < parts - 1 else lambda *_: None) for part in range(parts)]
        drawn[name] = out.read_text().splitlines()
        row = {"run": name, "sequences": len(drawn[name])}
        row |= {"digest": digest(drawn[name][: 2 * stop]), "continued_from": stop if parts > 1 else 0}
        row |= {**found[-1], "peak_gib": max(part["peak_gib"] for part in found)}
        rows.append({**row, "labels_per_cpu_second": row["labels"] / row["cpu_seconds"]})
        print(rows[-1], flush=True)
    if drawn["straight"] != drawn["killed"][: 2 * stop]:
        raise RuntimeError("the two readings gave different sequences")
    for left in (folder / "training", folder / "cache of training"):
        shutil.rmtree(left, ignore_errors=True)
    step = watched(f"take_step({str(texts)!r}, {str(folder)!r})", folder / "cache of training")
    print(step, flush=True)
    return write_record(
        results,
        "03_corpus",
        preset="tiny",
        question="Does a corpus stream: how much memory and time does it take, and is it the same after a kill?",
        tables={"corpus": pd.DataFrame([corpus]), "reading": pd.DataFrame(rows), "training": pd.DataFrame([step])},
        seeds={"split": 0, "training": 0},
        seconds=time.perf_counter() - started,
        provenance={"command": f"python -m experiments corpus --gib {size_gib:g}"},
    )
