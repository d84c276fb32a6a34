"""The key/value cache of generation, and how many answers fit into memory together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from parts.cli import WorkError
from parts.kernels import QUERY_BLOCK
from parts.memory import oom_message

MAX_SLOTS = 128  # slots: more are hardly faster, and on CPUs not at all
MEMORY_FRACTION = 0.85  # of the free memory; the rest is a reserve


# ---------------------------------------------------------------- memory


def cache_bytes(config, capacity: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one slot."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * capacity * dtype.itemsize


def slot_bytes(config, capacity: int, dtype: torch.dtype, sampled: bool) -> int:
    """Bytes per slot: keys and values of `capacity` tokens, logits, and the activations of a decode step. `sampled`:
    not greedy; sampling sorts, and sums in fp64."""
    size = dtype.itemsize
    logits = config.vocab_size * (size + 4 + (56 if sampled else 0))
    token = size * (4 * config.dim + 3 * config.hidden_dim + 4 * config.n_heads * config.head_dim)
    return cache_bytes(config, capacity, dtype) + logits + token + 8 * capacity  # its row of the mask


def working_bytes(model: torch.nn.Module, tokens: int, longest: int, dtype: torch.dtype) -> int:
    """Bytes that do not grow with the slots: the prefill of `tokens` tokens, attention over the `longest` prompt, and
    temporary copies of weights that are cast, or gathered from shards."""
    c, size = model.config, dtype.itemsize
    prefill = tokens * size * (8 * c.dim + 4 * c.hidden_dim + 6 * c.n_heads * c.head_dim)
    attention = 3 * 4 * c.n_heads * min(QUERY_BLOCK, longest) * longest
    copies = 0
    if isinstance(model.embed.weight, DTensor) or dtype != model.embed.weight.dtype:
        block = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.0."))
        root = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("layers."))
        copies = size * (root + 2 * block)
    return prefill + attention + copies


# ---------------------------------------------------------------- groups of prompts


@dataclass(frozen=True)
class Group:
    """Prompts that are answered with one cache of slots x capacity tokens."""

    members: list[int]
    slots: int
    capacity: int


def plan_groups(
    needs: list[int], slots_of: Callable[[int], int], sliding_window: int | None, divided: bool
) -> list[Group]:
    """Divide all prompts, longest first, into as few groups as possible such that each has enough slots.

    `needs`: tokens of each prompt with its longest answer; `slots_of`: how many slots of a capacity fit. While fewer
    slots fit than MAX_SLOTS and than prompts wait, prompts that need less than half of the longest get a group of their
    own, with more and shorter slots. Without `divided` all share one group. No slot is longer than the sliding window.
    """
    waiting, groups = sorted(range(len(needs)), key=lambda i: -needs[i]), []
    while waiting:
        capacity = min(needs[waiting[0]], sliding_window or needs[waiting[0]])
        slots = min(slots_of(capacity), len(waiting))
        count = len(waiting)
        if divided and slots < min(MAX_SLOTS, count):
            count = max(slots, sum(min(needs[i], capacity) > capacity / 2 for i in waiting))
        groups.append(Group(waiting[:count], slots, capacity))
        waiting = waiting[count:]
    return groups


def describe_groups(groups: list[Group], prompts: list[list[int]], config, dtype: torch.dtype) -> str:
    lengths, caches = [len(p) for p in prompts], []
    for g in groups:
        size = g.slots * cache_bytes(config, g.capacity, dtype) / 2**30
        caches.append(f"{g.slots:,} slots in caches of {g.capacity:,} tokens ({size:,.2f} GiB)")
    return f"{len(prompts):,} prompts of {min(lengths):,} to {max(lengths):,} tokens: " + ", then ".join(caches)


def raise_oom_with_advice(answering: Iterator, groups: list[Group]) -> Iterator:
    """Iterate over `answering`; an out-of-memory error becomes a WorkError that says what to change."""
    try:
        yield from answering
    except (RuntimeError, MemoryError) as e:
        if not oom_message(e):
            raise
        fewer = max(1, max(g.slots for g in groups) // 2)
        advice = f"try --batch-size {fewer}" + " with a smaller --max-new-tokens" * (fewer == 1)
        raise WorkError(f"out of memory: {advice}; finished answers are kept ({oom_message(e)})") from None


# ---------------------------------------------------------------- the cache


class KVCache:
    """Keys and values of `slots` sequences, allocated once: (slots, capacity, G, hd) per layer. A token is stored at
    its position modulo `capacity`: if that is the sliding window, a new token overwrites the one that leaves it."""

    def __init__(self, config, slots: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layers, slots, capacity, config.n_kv_heads, config.head_dim)
        self.slots, self.capacity = slots, capacity
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Views of the keys and values to write to, (L, slots * capacity, G, hd)."""
        return self.k.flatten(1, 2), self.v.flatten(1, 2)

    def read(self, n: int, kv_len: int) -> tuple[Tensor, Tensor]:
        """Views of the keys and values at the first `kv_len` positions of the first n slots, (L, n, G, kv_len, hd)."""
        return self.k[:, :n, :kv_len].transpose(2, 3), self.v[:, :n, :kv_len].transpose(2, 3)

    def move(self, source: int, target: int, length: int) -> None:
        length = min(length, self.capacity)
        for x in (self.k, self.v):
            x[:, target, :length] = x[:, source, :length]


def prefill_attention(
    within: Callable, rows: tuple[Tensor, Tensor], kept: Tensor, places: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention of prefill: causal within each document. Keys and values of the tokens `kept` (indices) are written to
    the `places` in the layer's rows of the cache."""
    for stored, new in zip(rows, (k, v)):
        stored.index_copy_(0, places, new[kept])
    return within(q, k, v)


def decode_attention(
    rows: tuple[Tensor, Tensor],
    read: tuple[Tensor, Tensor],
    places: Tensor,
    mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """Attention of decode: one token for each of n slots is written to its place in the layer's rows of the cache, and
    attends to `read`. The R query heads of a key/value head share its keys and values without copies."""
    for stored, new in zip(rows, (k, v)):
        stored.index_copy_(0, places, new)
    q = q.unflatten(1, (k.shape[1], -1))  # (n, G, R, hd)
    return F.scaled_dot_product_attention(q, *read, attn_mask=mask).flatten(1, 2)
