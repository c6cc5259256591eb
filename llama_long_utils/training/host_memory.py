"""Memory of the process on a CPU: how much it held, and what glibc keeps."""

import ctypes
import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

GAPS_GIB = 0.5  # free memory that may stay resident: less costs page faults


def peak_memory_gib() -> float:
    """Highest memory so far: allocated on the GPU if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if platform.system() == "Darwin" else 2**20)


def keep_freed_memory() -> None:
    """Ask glibc, if it is used and there is no GPU, to keep large freed blocks: a step allocates the same again."""
    m_trim_threshold, m_mmap_threshold = -1, -3  # from malloc.h
    if _glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def give_back_gaps(model: nn.Module, limit_gib: float = GAPS_GIB) -> list[RemovableHandle]:
    """After each decoder layer, give free memory back if more than `limit_gib` is resident above the most allocated.

    glibc aligns torch's blocks and rarely finds the old place again for a new one. Without this, a step of 2,048 tokens
    of SmolLM2-135M's shape, all layers recomputed, held 2.7 GiB above the weights instead of 0.4. What was allocated at
    once before stays for the next step. Returns the hooks, to be removed after training; none without glibc or on GPUs.
    """
    if not _glibc():
        return []
    from llama_long_utils.model.loss import causal_lm  # seconds to import, also where a notebook has no model

    libc, highest = ctypes.CDLL(None), 0
    libc.mallinfo2.restype = _MallocInfo

    def gaps() -> int:
        """Resident bytes beyond the most that was allocated after a layer: those of libraries, and free ones."""
        nonlocal highest
        now = libc.mallinfo2()
        highest = max(highest, now.uordblks + now.hblkhd)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") - highest

    most = gaps() + limit_gib * 2**30

    def check(*_arguments: Any) -> None:
        if gaps() > most:
            libc.malloc_trim(0)

    def after(_layer: nn.Module, _inputs: Any, hidden: torch.Tensor) -> None:
        check()
        if hidden.requires_grad:
            hidden.register_hook(check)  # before the layer's backward pass

    return [layer.register_forward_hook(after) for layer in causal_lm(model).model.layers]


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc" and not torch.cuda.is_available()
