"""What a run takes of the machine: its devices and cores, and memory only as long as it is needed."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
from pathlib import Path

import psutil
import torch
from torch import Tensor


def use_all_cores() -> None:
    """Let torch compute on every core of a CPU: launchers leave it a single thread unless they are told otherwise."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def computes_bf16() -> bool:
    """Whether this CPU has instructions for bf16; without them it is slower than fp32."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and any(name in info.read_text() for name in ("avx512_bf16", "amx_bf16"))


def free_memory(device: torch.device, num_processes: int = 1) -> int:
    """Bytes that a process may still take of a device: of a CPU its share of the machine's, or of its container's.

    Args:
        num_processes: that share a CPU's memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, max(0, int(limit.read_text()) - int(used.read_text())))
    return free // num_processes


def return_freed_memory() -> None:
    """Give back to the system what was freed and what allocators keep for later."""
    gc.collect()
    torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give the free pages of glibc's heap back to the system."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def release_pages(tensor: Tensor) -> None:
    """Give back the memory of a tensor that nothing will read again.

    Weights files are mapped into memory, and a page that was read stays resident until the last tensor of its file
    is gone: casting a model would hold it twice for a while (measured: 5.9 GiB at the peak rather than 3.8).
    """
    if sys.platform == "linux" and tensor.device.type == "cpu":
        page = mmap.PAGESIZE
        first, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
        if end > first:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def peak_memory() -> str:
    """The most memory that this process has held: of its GPU where it has one, else resident."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory"
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 2**30:.1f} GiB of memory"
