"""Random numbers that depend only on a key: not on the state of a generator, the order of calls or the ranks."""

import hashlib

import torch
from torch import Tensor

GOLDEN, MIX_1, MIX_2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def random_key(*numbers: int) -> int:
    """A 63-bit hash of these numbers, the same on every machine."""
    return int.from_bytes(hashlib.blake2s(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def mix_bits(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014): a bijection of int64 whose results look random."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * MIX_1
    x = (x ^ (x >> 27 & 2**37 - 1)) * MIX_2
    return x ^ (x >> 31 & 2**33 - 1)


def token_keys(keys: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    """A key of each token (T,) from those of the documents (D,), of which each has `lengths` (D,) tokens."""
    return mix_bits(keys.repeat_interleave(lengths) + GOLDEN * positions)


def keyed_uniform(keys: Tensor, width: int) -> Tensor:
    """(T, width) fp32, uniform in [0, 1); row t depends on keys[t] alone. Other keys, such as keys + 1, give other
    numbers."""
    columns = torch.arange(1, width + 1, device=keys.device)
    return (mix_bits(keys[:, None] + GOLDEN * columns) >> 40 & 2**24 - 1).float() / 2**24
