"""The memory of a process and its device: how much is free, how much was used, out-of-memory errors."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from parts.cli import WorkError


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate: on its GPU, or of a CPU's memory, which the ranks of a node share,
    within the limits of cgroups and ulimit -v."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free in torch's cache
        return torch.cuda.mem_get_info(device)[0] + cached
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(min([min([available_memory(), *cgroup_memory()]) / ranks, *address_space()]))


def available_memory() -> float:
    """Bytes available on this machine, including caches that the kernel would drop."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """Bytes left within the limit of each control group (version 1 or 2) of this process, and of their parents."""
    names = {"": ("memory.max", "memory.current", "inactive_file")}
    names["memory"] = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    left = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controller, path = line.split(":", 2)
        if controller not in names:
            continue
        limit, usage, cached = names[controller]
        group = root / controller / path.strip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            try:
                maximum, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                statistics = (folder / "memory.stat").read_text().split()
                file_cache = int(statistics[statistics.index(cached) + 1])  # dropped when memory is needed
            except (OSError, ValueError):  # no such file, or "max"
                continue
            left.append(max(0.0, maximum - used + file_cache))
    return left


def address_space() -> list[float]:
    """Bytes left within `ulimit -v`, if it is set."""
    try:
        import resource  # not on every system

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return []
    return [] if limit == resource.RLIM_INFINITY else [max(0.0, limit - used)]


def resident_memory() -> int:
    """Bytes of this process that are in memory now; the peak so far on systems without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        return memory_in_use(torch.device("cpu"))


def memory_in_use(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def oom_advice(micro_batch_tokens: int) -> Iterator[None]:
    """A context manager that turns an out-of-memory error of a GPU into a WorkError that names flags to try."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        flags = f"--micro-batch-tokens {micro_batch_tokens // 2}, --checkpoint-activations, --param-dtype bf16"
        raise WorkError(f"out of GPU memory: try {flags} or --lora 16; --dry-run says what they need ({e})") from None


def oom_message(e: BaseException) -> str:
    """The first line of an out-of-memory error, "" for other errors. On CPUs torch raises a plain RuntimeError."""
    phrases = ("can't allocate memory", "out of memory", "not enough memory")
    is_oom = isinstance(e, MemoryError | torch.OutOfMemoryError) or any(phrase in str(e) for phrase in phrases)
    if isinstance(e, WorkError) or not is_oom:  # a WorkError has its own message
        return ""
    return (str(e) or type(e).__name__).splitlines()[0]
