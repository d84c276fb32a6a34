"""What training costs: floating-point operations of a batch, what a device can do, and the memory plan."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from parts.checkpoints.weights import SHARD_BYTES
from parts.cli import print_table
from parts.kernels import MAX_LOGITS
from parts.memory import resident_memory

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
    sliding_window: int | None
    peak: float | None = None  # what all ranks can do in a second, where that is known

    def of_batch(self, lengths: np.ndarray, supervised: int) -> float:
        """Of documents of these lengths: attention over the causal (windowed) pairs of each; nothing counted twice."""
        n = lengths.astype(np.float64)
        w = np.minimum(n, self.sliding_window or math.inf)
        pairs = (n * w - w * (w - 1) / 2).sum()
        return self.per_token * n.sum() + self.per_pair * pairs + self.per_supervised * supervised

    def utilization(self, lengths: np.ndarray, supervised: int, seconds: float) -> float | None:
        """MFU: the share of `peak` that a batch used which took so long."""
        return round(self.of_batch(lengths, supervised) / max(seconds, 1e-6) / self.peak, 4) if self.peak else None


ORDER_IN_BLOCK = {"attention_norm": 0, "q": 1, "k": 1, "v": 1, "o": 2, "mlp_norm": 3, "gate": 4, "up": 4, "down": 5}


def computation_order(name: str, layers: int) -> tuple[int, int, bool]:
    """The order in which the computation uses a parameter: its block, its place there, and whether after LoRA's A."""
    if not name.startswith("layers."):
        return (-1 if name == "embed.weight" else layers, 0, False)
    block, *_, module, kind = name.removeprefix("layers.").split(".")
    return (int(block), ORDER_IN_BLOCK.get(module, 0), kind == "lora_B")


def training_flops(model: torch.nn.Module, trained: set[str], peak: float | None = None) -> Flops:
    """A product costs 2 a matrix entry forward, 2 for the gradient of its input where something before it is trained,
    and 2 for that of the matrix where it is trained itself."""
    config, parameters = model.config, dict(model.named_parameters())
    first = min((computation_order(name, config.n_layers) for name in trained), default=(config.n_layers, 0, False))
    per_token = 0.0
    for name, p in parameters.items():
        if name.startswith("layers.") and p.dim() > 1:
            per_token += (
                2 + 2 * (computation_order(name, config.n_layers) > first) + 2 * (name in trained)
            ) * p.numel()
    blocks_back = sum((k, ORDER_IN_BLOCK["o"], False) > first for k in range(config.n_layers))
    head = "embed.weight" if config.tied else "head.weight"
    head_gradients = 2 * bool(trained - {head}) + 2 * (head in trained)
    return Flops(
        per_token,
        (4 * config.n_layers + 8 * blocks_back) * config.n_heads * config.head_dim,
        (2 + head_gradients) * config.dim * config.vocab_size,
        config.sliding_window,
        peak,
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
    replicas: int = 1,
) -> dict[str, float]:
    """Bytes on each rank, estimated, by what needs them, at the moment of a step that needs most; its largest
    micro-batch has that many tokens. `shards`: ranks that a model is sharded over; `replicas`: number of such groups.

    tests/fake_cuda.py follows the storages of real steps on the paths of GPUs and compares.
    """
    parameters, fsdp = dict(model.named_parameters()), shards * replicas > 1
    step = step_sizes(model, trained, dtype, tokens, supervised, checkpointed)
    moments = fsdp_peaks(step, shards, replicas) if fsdp else single_rank_peaks(step)
    if not cuda:
        moments = cpu_peaks(model, trained, step, moments, fsdp)
    passing, during = max(moments, key=sum)
    learned = sum(p.nbytes for name, p in parameters.items() if name in trained)
    plan = {
        "weights": sum(p.nbytes for p in parameters.values()) / shards,
        "gradients": learned / shards,
        "optimizer": 2 * learned / shards,
        "gathered": passing,
        "activations": during,
    }
    runtime = 0.0 if cuda else process_memory(dtype) + CPU_REST + CPU_UNUSED * sum(plan.values())
    return plan | {"runtime": runtime}


# Measured: bytes of gloo, threads and what checks of the weights leave; share of the tensors' memory that lies in gaps
# of the allocator, at most (it varies by 4 % with the lengths of the rows).
CPU_REST, CPU_UNUSED = 64 * 2**20, 0.05


def process_memory(dtype: torch.dtype) -> int:
    """Bytes that Python, torch, its libraries and all that this process has read take: measured, after a small product
    and its backward, which load the libraries."""
    a = torch.ones(256, 256, dtype=dtype, requires_grad=True)
    (a @ a).float().softmax(-1).sum().backward()
    return resident_memory()


def cpu_peaks(
    model: torch.nn.Module, trained: set[str], step: "StepSizes", moments: list[tuple[float, float]], fsdp: bool
) -> list[tuple[float, float]]:
    """The moments of a CPU, which also makes the exported file in its memory.

    The allocator gives nothing back: the copies of an export are put into what a step has freed where that was large,
    as the gradient of a trained head is; the many small activations of adapters leave no such room.
    """
    c, parameters = model.config, dict(model.named_parameters())
    freed = 2 * step.dtype.itemsize * step.block * step.layers * fsdp  # by FSDP, held by the allocator
    both_ends = 4 * c.dim * c.vocab_size * (c.tied and "embed.weight" in trained)  # two gradients, added
    moments = [(passing + freed, during + both_ends) for passing, during in moments]
    written = {name: p for name, p in parameters.items() if ".lora_" not in name}
    adapted = [parameters[name.replace("lora_A", "weight")] for name in parameters if name.endswith(".lora_A")]
    narrow = not adapted and all(p.dtype == torch.bfloat16 for p in written.values())  # written as they are
    exported = 0 if narrow else min(SHARD_BYTES, 2 * sum(p.numel() for p in written.values()))
    exported += 12 * max((p.numel() for p in adapted), default=0)  # merged: weight, product and sum in fp32
    left = 0 if step.head_gradient else max(during for _, during in moments)
    return [*moments, (exported, left)]


@dataclass(frozen=True)
class StepSizes:
    """What a training step holds beside weights, gradients and the optimizer's state. The root is what is in no block:
    embedding, head and the last norm."""

    layers: int
    dtype: torch.dtype  # of the computation
    root: int  # parameters
    root_trained: int
    block: int  # parameters of one
    block_trained: int
    narrow_weights: bool  # weights are held in bf16: FSDP, which reduces in fp32, converts the gradients
    cast_block: int  # bytes of a block's weights in the dtype of the computation, where they are held in another
    cast_head: int
    hidden: int  # bytes of (tokens, dim)
    kept: int  # bytes that a block keeps for its backward while later blocks are computed
    recomputed: int  # and those that its backward computes again, with activation checkpointing
    mlp: int  # bytes of gradients in the backward of SwiGLU
    head: int  # bytes in the output head and the loss
    head_gradient: int  # bytes, in the dtype of the computation


def step_sizes(
    model: torch.nn.Module, trained: set[str], dtype: torch.dtype, tokens: int, supervised: int, checkpointed: bool
) -> StepSizes:
    """For a micro-batch of that many tokens, `loss_mask` of which carry loss."""
    c, parameters, size = model.config, dict(model.named_parameters()), dtype.itemsize
    block = {name: p for name, p in parameters.items() if name.startswith("layers.0.")}
    root = {name: p for name, p in parameters.items() if not name.startswith("layers.")}

    def count(of: dict[str, torch.nn.Parameter], only: set[str]) -> int:
        return sum(p.numel() for name, p in of.items() if name in only)

    head_name = "embed.weight" if c.tied else "head.weight"
    vocabulary = c.dim * c.vocab_size
    heads, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    lora_ranks = sum(p.shape[0] for name, p in block.items() if "lora_A" in name)
    hidden = size * c.dim * tokens
    # A block keeps for its backward: inputs of norms and matrices, q, k, v, gate and up, statistics of attention.
    kept = tokens * (size * (4 * c.dim + 2 * heads + 2 * keys + 2 * c.hidden_dim + lora_ranks) + 4 * c.n_heads)
    wide = 4 + size * (size < 4)  # of logits and of the head's gradient: fp32, and in the dtype of the computation
    logits = wide * (min(MAX_LOGITS, supervised * c.vocab_size) + vocabulary * (head_name in trained))
    return StepSizes(
        layers=c.n_layers,
        dtype=dtype,
        root=count(root, set(root)),
        root_trained=count(root, trained),
        block=count(block, set(block)),
        block_trained=count(block, trained),
        narrow_weights=any(p.dtype != torch.float32 for name, p in parameters.items() if name in trained),
        cast_block=size * sum(p.numel() for p in block.values() if p.dtype != dtype),
        cast_head=size * vocabulary * (parameters[head_name].dtype != dtype),
        hidden=hidden,
        kept=hidden if checkpointed else kept,
        recomputed=kept if checkpointed else 0,
        mlp=6 * size * c.hidden_dim * tokens,
        head=hidden + 3 * size * c.dim * supervised + logits,
        head_gradient=size * vocabulary * (head_name in trained),
    )


def single_rank_peaks(s: StepSizes) -> list[tuple[float, float]]:
    """Bytes of weights cast and of activations, at the moments of a step that may need most: in the head, and in the
    backward of the last block."""
    cast = s.layers * s.cast_block  # kept until the backward, unless it casts again
    return [
        (s.cast_head + (0 if s.recomputed else cast), s.layers * s.kept + s.head),
        (s.cast_block if s.recomputed else cast, s.layers * s.kept + s.recomputed + s.mlp),
    ]


def fsdp_peaks(s: StepSizes, shards: int, replicas: int) -> list[tuple[float, float]]:
    """Bytes of weights gathered with gradients that are reduced, and of activations, at the moments of a step that may
    need most.

    As FSDP2 of torch 2.13 does it: the root stays gathered from the forward to the end of the backward. What a block
    gathers is copied out of one buffer; that buffer is held until the next block has its own, and in the backward the
    next block's is already there. A block's gradients are copied to an fp32 buffer, held until the next block's are.
    With replicas, what a rank holds of the reduced fp32 gradients is kept until the backward ends, for all blocks
    (`AllReduceState` in torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py). With one shard a replica nothing is
    gathered, but weights are still copied.
    """
    size, buffered = s.dtype.itemsize, shards > 1
    block, root = size * s.block, size * s.root
    reduced = 4 * s.block_trained
    # Bytes a parameter, while gradients are reduced: the buffer, and first the gradients, then this rank's part.
    reducing = 4 + max(size, (4 + 2 * s.narrow_weights) / shards)

    moments = [
        ((1 + buffered) * (root + block), 3 * s.hidden),  # before the first block
        (root + buffered * block, s.layers * s.kept + s.head),
    ]
    for done in {0, min(1, s.layers - 1), s.layers - 1}:  # blocks whose backward is done
        held = 4 * s.block_trained * done / shards * (replicas > 1)
        ahead = buffered * block * (done < s.layers - 1)
        before = (s.layers - done) * s.kept
        gathered = root + block + ahead + reduced * (done > 0) + held
        own_gradients = size * s.block_trained
        moments += [
            (gathered, before + s.recomputed + s.mlp + s.head_gradient),  # in the middle of the block
            (gathered + own_gradients, before + s.hidden + s.head_gradient),  # at its end
            (root + ahead + reducing * s.block_trained + held, before + s.head_gradient),  # and reduced
        ]
    held = 4 * s.block_trained * s.layers / shards * (replicas > 1)
    moments += [(reducing * s.root_trained + held, 0.0)]  # the gradients of the root are reduced
    return moments


def print_memory_plan(plans: dict[str, dict[int, dict[str, float]]], free: dict[int, float | None]) -> None:
    """Memory plans by way (flags), the chosen one first, and by number of ranks, side by side; then what each other way
    would need, and the first of them that fits where the chosen one does not. `free`: bytes that each rank has."""
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
                else "no way fits: try --checkpoint-activations, fewer --micro-batch-tokens, more ranks"
            )
            where = f"the {has / 2**30:,.1f} GiB free on each of {world} rank{'s' * (world > 1)}"
            print(f"{chosen} does not fit into {where}; {advice}.")
