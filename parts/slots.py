"""How many answers fit into memory at once: what is free, what a slot takes, which prompts share a cache."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from parts.program import WorkError

MOST = 128  # slots: more gain little, and on CPUs nothing
USED = 0.85  # of what is free; the rest is for what is not foreseen


# ---------------------------------------------------------------- what is free


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


# ---------------------------------------------------------------- what it takes


def ran_out(e: BaseException) -> str:
    """What a MemoryError or RuntimeError says if it is about memory that is not there (CPUs have no class of their own
    for it), else ""."""
    if isinstance(e, WorkError):  # says all already
        return ""
    said = (str(e) or type(e).__name__).splitlines()[0]
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return said if isinstance(e, MemoryError | torch.OutOfMemoryError) or any(w in str(e) for w in words) else ""


def cache_bytes(config, capacity: int, dtype: torch.dtype) -> int:
    """Keys and values of one slot."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * capacity * dtype.itemsize


def slot_bytes(config, capacity: int, dtype: torch.dtype, sampled: bool) -> int:
    """Of one more answer in the batch: keys and values of `capacity` tokens, its logits and what a decode step makes of
    its one token. `sampled`: not greedy; sorts, and sums in fp64."""
    size = dtype.itemsize
    logits = config.vocab_size * (size + 4 + (56 if sampled else 0))
    token = size * (4 * config.dim + 3 * config.hidden_dim + 4 * config.n_heads * config.head_dim)
    return cache_bytes(config, capacity, dtype) + logits + token + 8 * capacity  # its row of the mask


def working_bytes(model: torch.nn.Module, tokens: int, longest: int, dtype: torch.dtype) -> int:
    """Of what does not grow with the slots: the prefill of so many tokens, attention to the `longest` prompt, weights
    that are cast, or gathered from shards, for as long as they are needed."""
    c, size, block = model.config, dtype.itemsize, 512  # as many queries at a time as parts/kernels.py takes
    prefill = tokens * size * (8 * c.dim + 4 * c.hidden_dim + 6 * c.n_heads * c.head_dim)
    attention = 3 * 4 * c.n_heads * min(block, longest) * longest
    passing = 0
    if isinstance(model.embed.weight, DTensor) or dtype != model.embed.weight.dtype:
        blocks = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.0."))
        rest = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("layers."))
        passing = size * (rest + 2 * blocks)
    return prefill + attention + passing


# ---------------------------------------------------------------- who shares a cache


@dataclass(frozen=True)
class Group:
    """Prompts that are answered with one cache of slots x capacity tokens."""

    members: list[int]
    slots: int
    capacity: int


def plan_groups(needs: list[int], slots_of: Callable[[int], int], window: int | None, divided: bool) -> list[Group]:
    """All prompts, the longest first, in as few groups as let each have enough slots.

    `needs`: tokens of each prompt with its longest answer; `slots_of`: how many slots of a capacity fit. While fewer
    fit than MOST and than wait, those that need less than half of the longest wait for a cache of their own, which has
    more and shorter slots; not `divided`: all share one. A cache never needs more tokens than the window.
    """
    waiting, groups = sorted(range(len(needs)), key=lambda i: -needs[i]), []
    while waiting:
        capacity = min(needs[waiting[0]], window or needs[waiting[0]])
        slots = min(slots_of(capacity), len(waiting))
        count = len(waiting)
        if divided and slots < min(MOST, count):
            count = max(slots, sum(min(needs[i], capacity) > capacity / 2 for i in waiting))
        groups.append(Group(waiting[:count], slots, capacity))
        waiting = waiting[count:]
    return groups


def describe(groups: list[Group], prompts: list[list[int]], config, dtype: torch.dtype) -> str:
    lengths, caches = [len(p) for p in prompts], []
    for g in groups:
        size = g.slots * cache_bytes(config, g.capacity, dtype) / 2**30
        caches.append(f"{g.slots:,} at once in caches of {g.capacity:,} tokens ({size:,.2f} GiB)")
    return f"{len(prompts):,} prompts of {min(lengths):,} to {max(lengths):,} tokens: " + ", then ".join(caches)


def told_of_memory(answering: Iterator, groups: list[Group]) -> Iterator:
    """The same; running out of memory becomes a WorkError that says what to change."""
    try:
        yield from answering
    except (RuntimeError, MemoryError) as e:
        if not ran_out(e):
            raise
        fewer = max(1, max(g.slots for g in groups) // 2)
        advice = f"try --batch-size {fewer}" + " with a smaller --max-new-tokens" * (fewer == 1)
        raise WorkError(f"out of memory: {advice}; what is answered is kept ({ran_out(e)})") from None
