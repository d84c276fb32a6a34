"""What training costs: floating-point operations of a batch, what a device can do, and the memory plan."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from parts.kernels import LOGITS_AT_ONCE
from parts.program import print_table

PEAK_FLOPS = {  # dense bf16, from the vendors' data sheets; a device's name contains the key; first match counts
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What this rank's device can do in a second: known for GPUs (bf16), measured by a matrix product on CPUs."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [flops for key, flops in PEAK_FLOPS.items() if key in name]
        return known[0] if known and dtype == torch.bfloat16 else None
    a = torch.randn(1024, 1024).to(dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward and backward together."""

    per_token: float  # matrix products of the blocks
    per_pair: float  # of a token with one that it attends to
    per_supervised: float  # output head
    window: int | None

    def of_batch(self, lengths: np.ndarray, supervised: int) -> float:
        """Of documents of these lengths: attention over the causal (windowed) pairs of each; nothing counted twice."""
        n = lengths.astype(np.float64)
        w = np.minimum(n, self.window or math.inf)
        pairs = (n * w - w * (w - 1) / 2).sum()
        return self.per_token * n.sum() + self.per_pair * pairs + self.per_supervised * supervised


PLACES = {"attention_norm": 0, "q": 1, "k": 1, "v": 1, "o": 2, "mlp_norm": 3, "gate": 4, "up": 4, "down": 5}


def place(name: str, layers: int) -> tuple[int, int, bool]:
    """How far along the computation a parameter comes in: its block, where in it, and whether behind LoRA's A."""
    if not name.startswith("layers."):
        return (-1 if name == "embed.weight" else layers, 0, False)
    block, *_, module, kind = name.removeprefix("layers.").split(".")
    return (int(block), PLACES.get(module, 0), kind == "lora_B")


def training_flops(model: torch.nn.Module, trained: set[str]) -> Flops:
    """A product costs 2 a matrix entry forward, 2 for the gradient of its input where something before it is trained,
    and 2 for that of the matrix where it is trained itself."""
    config, parameters = model.config, dict(model.named_parameters())
    first = min((place(name, config.n_layers) for name in trained), default=(config.n_layers, 0, False))
    per_token = 0.0
    for name, p in parameters.items():
        if name.startswith("layers.") and p.dim() > 1:
            per_token += (2 + 2 * (place(name, config.n_layers) > first) + 2 * (name in trained)) * p.numel()
    blocks_back = sum((k, PLACES["o"], False) > first for k in range(config.n_layers))
    head = "embed.weight" if config.tied else "head.weight"
    head_gradients = 2 * bool(trained - {head}) + 2 * (head in trained)
    return Flops(
        per_token,
        (4 * config.n_layers + 8 * blocks_back) * config.n_heads * config.head_dim,
        (2 + head_gradients) * config.dim * config.vocab_size,
        config.window,
    )


def memory_plan(
    model: torch.nn.Module,
    trained: set[str],
    shards: int,
    dtype: torch.dtype,
    tokens: int,
    supervised: int,
    checkpointed: bool,
    cuda: bool,
) -> dict[str, float]:
    """Bytes on each rank, estimated, by what needs them, at the moment of a step that needs most; its largest
    micro-batch has so many tokens. `shards`: ranks that a model is sharded over.

    Each moment was compared with the storages that steps of fake tensors hold, 4 layers of 7 B and 8 B.
    """
    c, parameters = model.config, dict(model.named_parameters())
    size, narrow = dtype.itemsize, dtype.itemsize < 4
    passing, during = working_memory(model, trained, shards, dtype, tokens, supervised, checkpointed)
    learned = sum(p.nbytes for name, p in parameters.items() if name in trained)
    runtime = 0.0
    if not cuda:  # what FSDP freed, a CPU's allocator holds, and a part of what passed; Python with torch
        blocks = sum(p.numel() for name, p in parameters.items() if name.startswith("layers."))
        passing += 2 * size * blocks if shards > 1 else 0
        if c.tied and "embed.weight" in trained:  # the gradients of embedding and head, added
            during += 4 * c.dim * c.vocab_size
        runtime = 2**20 * (CPU_RUNTIME + 100 * narrow + 50 * (shards > 1)) + CPU_HELD * during
    return {
        "weights": sum(p.nbytes for p in parameters.values()) / shards,
        "gradients": learned / shards,
        "optimizer": 2 * learned / shards,
        "gathered": passing,
        "activations": during,
        "runtime": runtime,
    }


CPU_RUNTIME, CPU_HELD = 560, 0.2  # MiB of Python with torch; share of activations that the allocator holds back


def working_memory(
    model: torch.nn.Module,
    trained: set[str],
    shards: int,
    dtype: torch.dtype,
    tokens: int,
    supervised: int,
    checkpointed: bool,
) -> tuple[float, float]:
    """Bytes beside weights, gradients and optimizer when these are most: of weights cast or gathered with what FSDP
    reduces, and of activations with the gradients not yet added."""
    c, parameters, size = model.config, dict(model.named_parameters()), dtype.itemsize
    narrow = size < 4

    def numbers(prefix: str, only: set[str] | None = None) -> int:
        return sum(p.numel() for n, p in parameters.items() if n.startswith(prefix) and (only is None or n in only))

    block, learned_block, count = numbers("layers.0."), numbers("layers.0.", trained), c.n_layers
    rest, learned_rest = numbers("") - block * count, numbers("", trained) - learned_block * count
    head = "embed.weight" if c.tied else "head.weight"
    vocabulary, sharded = c.dim * c.vocab_size, shards > 1
    heads, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    ranks = sum(p.shape[0] for name, p in parameters.items() if name.startswith("layers.0.") and "lora_A" in name)

    hidden = size * c.dim * tokens
    # A block keeps for its backward: inputs of norms and matrices, q, k, v, gate and up, statistics of attention.
    kept = tokens * (size * (4 * c.dim + 2 * heads + 2 * keys + 2 * c.hidden_dim + ranks) + 4 * c.n_heads)
    before = hidden if checkpointed else kept  # of each block, while those behind it are computed
    mlp = 6 * size * c.hidden_dim * tokens  # gradients in the backward of SwiGLU
    cast = size * sum(p.numel() for n, p in parameters.items() if n.startswith("layers.0.") and p.dtype != dtype)
    cast_head = size * vocabulary * (parameters[head].dtype != dtype)

    logits = (4 + size * narrow) * min(LOGITS_AT_ONCE, supervised * c.vocab_size)
    logits += (4 + size * narrow) * vocabulary * (head in trained)  # the head's gradient in fp32, and what is added
    at_head = count * before + hidden + 3 * size * c.dim * supervised + logits
    reduced = 4 * learned_block * sharded  # the gradients of the block behind this one, on their way
    in_block = (count - sharded) * before + (kept if checkpointed else 0) + mlp
    if sharded:
        root_gradient = size * vocabulary * (head in trained)
        moments = [
            (2 * size * (rest + block), 3 * hidden),  # embedding, head and the first block are gathered
            (size * rest, at_head),
            (size * (rest + 2 * block) + reduced, in_block + root_gradient),
            (size * (rest + 2 * block), in_block + before),  # the last block: nothing is reduced yet
            ((size + 4) * learned_rest, 0.0),  # gradients of embedding and head, and the same in fp32 to be reduced
        ]
    else:
        moments = [
            (cast_head + (0 if checkpointed else count * cast), at_head),
            (cast * (1 if checkpointed else count), in_block),
        ]
    return max(moments, key=sum)


def print_memory(plans: dict[str, dict[int, dict[str, float]]], free: dict[int, float | None]) -> None:
    """Memory plans by way (flags), the chosen one first, and by number of ranks, side by side; then what each other way
    would need, and the first of them that fits where the chosen one does not. `free`: bytes a rank has."""
    chosen, *others = plans

    def gib(way: str, part: str | None = None) -> list[str]:
        found = (plan[part] if part else sum(plan.values()) for plan in plans[way].values())
        return [f"{n / 2**30:,.2f}" for n in found]

    rows = [(part, *gib(chosen, part)) for part in next(iter(plans[chosen].values()))]
    rows += [("together", *gib(chosen)), *((f"with {way}", *gib(way)) for way in others)]
    print_table(("GiB per rank, estimated", *(f"{w} rank{'s' * (w > 1)}" for w in free)), rows)
    for world, has in free.items():
        needs = {way: sum(plans[way][world].values()) for way in plans}
        if has is not None and needs[chosen] > has:
            fits = next((way for way in others if needs[way] <= has), None)
            advice = (
                f"{fits} fits"
                if fits
                else "no way fits: try --checkpoint-activations, fewer --micro-tokens, more ranks"
            )
            where = f"the {has / 2**30:,.1f} GiB free on each of {world} rank{'s' * (world > 1)}"
            print(f"{chosen} does not fit into {where}; {advice}.")
