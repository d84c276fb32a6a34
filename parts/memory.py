"""Memory of this process' device: what is free, what was used at most, and how it sounds when there is none left."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from parts.cli import WorkError


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take: of its GPU, or its share of the machine's (the ranks of a node share it),
    whatever limits of cgroups and ulimit -v leave."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, but held by torch
        return torch.cuda.mem_get_info(device)[0] + cached
    found = [available_memory(), *cgroup_memory()]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(min([min(found) / ranks, *address_space()]))


def available_memory() -> float:
    """Of the machine, with what the kernel would give back of its caches."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """What the limits of this process' control groups leave, of version 2 and 1, each group and those it lies in."""
    names = {"": ("memory.max", "memory.current", "inactive_file")}
    names["memory"] = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    found = []
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
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                statistics = (folder / "memory.stat").read_text().split()
                spare = int(statistics[statistics.index(cached) + 1])  # of files read, given back when needed
            except (OSError, ValueError):  # no such file, or "max"
                continue
            found.append(max(0.0, most - used + spare))
    return found


def address_space() -> list[float]:
    """What `ulimit -v` leaves, if it is set."""
    try:
        import resource  # not on every system

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return []
    return [] if most == resource.RLIM_INFINITY else [max(0.0, most - used)]


def resident_memory() -> int:
    """Bytes of this process that lie in memory now; where the system does not say, the most that did."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        return memory_in_use(torch.device("cpu"))


def memory_in_use(device: torch.device) -> int:
    """The most memory this process has held so far, in bytes: of the GPU, or resident on a CPU machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def oom_advice(micro_tokens: int) -> Iterator[None]:
    """Raise WorkError, with the flags that need less memory, where training needs more than a GPU has."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        ways = f"--micro-tokens {micro_tokens // 2}, --checkpoint-activations, --weights bf16 or --lora 16"
        raise WorkError(f"out of GPU memory: try {ways}; --dry-run says what they need ({e})") from None


def oom_message(e: BaseException) -> str:
    """What a MemoryError or RuntimeError says if it is about memory that is not there (CPUs have no class of their own
    for it), else ""."""
    if isinstance(e, WorkError):  # says all already
        return ""
    said = (str(e) or type(e).__name__).splitlines()[0]
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return said if isinstance(e, MemoryError | torch.OutOfMemoryError) or any(w in str(e) for w in words) else ""
