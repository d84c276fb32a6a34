"""The memory plan: the bytes that training needs on each rank, estimated before it begins."""

from dataclasses import dataclass

import torch

from parts.checkpoints.weights import SHARD_BYTES
from parts.kernels import MAX_LOGITS
from parts.memory import resident_memory


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
    """Estimated bytes on each rank, by use, at the moment of a step that needs the most.

    `dtype`: of the computation; `tokens`, `supervised`: in the largest micro-batch; `checkpointed`: activations are
    recomputed; `shards`: ranks that a model is sharded over; `replicas`: number of such groups. tests/fake_cuda.py
    compares the plan for GPUs with the tensors that real steps allocate.
    """
    parameters, fsdp = dict(model.named_parameters()), shards * replicas > 1
    step = step_sizes(model, trained, dtype, tokens, supervised, checkpointed)
    peaks = fsdp_peaks(step, shards, replicas) if fsdp else single_rank_peaks(step)
    if not cuda:
        peaks = cpu_peaks(model, trained, step, peaks, fsdp)
    gathered, activations = max(peaks, key=sum)
    trained_bytes = sum(p.nbytes for name, p in parameters.items() if name in trained)
    plan = {
        "weights": sum(p.nbytes for p in parameters.values()) / shards,
        "gradients": trained_bytes / shards,
        "optimizer": 2 * trained_bytes / shards,
        "gathered": gathered,
        "activations": activations,
    }
    runtime = 0.0 if cuda else process_memory(dtype) + CPU_OVERHEAD + CPU_FRAGMENTATION * sum(plan.values())
    return plan | {"runtime": runtime}


# Measured: bytes of gloo, threads and the check of the weights; the largest fraction of the tensors' memory that
# fragmentation adds (it varies by 4 % with the lengths of the rows).
CPU_OVERHEAD, CPU_FRAGMENTATION = 64 * 2**20, 0.05


def process_memory(dtype: torch.dtype) -> int:
    """Bytes of this process so far: Python, torch and its libraries, the rows. A small product and its backward pass
    load the libraries first."""
    a = torch.ones(256, 256, dtype=dtype, requires_grad=True)
    (a @ a).float().softmax(-1).sum().backward()
    return resident_memory()


@dataclass(frozen=True)
class StepSizes:
    """What a training step needs in addition to weights, gradients and optimizer state. The root is all that is in no
    block: embedding, head and last norm."""

    layers: int
    dtype: torch.dtype  # of the computation
    root: int  # parameters of the root
    root_trained: int
    block: int  # parameters of a block
    block_trained: int
    bf16_gradients: bool  # FSDP reduces in fp32 and converts the result to the dtype of the weights
    cast_block: int  # bytes of a block's weights that are cast to the dtype of the computation
    cast_head: int
    hidden: int  # bytes of a tensor (tokens, dim)
    saved: int  # bytes that a block saves for its backward pass
    recomputed: int  # bytes that its backward pass computes again, with activation checkpointing
    mlp: int  # bytes of the gradients in the backward pass of SwiGLU
    head: int  # bytes of the output head and the loss
    head_gradient: int  # bytes, in the dtype of the computation


def step_sizes(
    model: torch.nn.Module, trained: set[str], dtype: torch.dtype, tokens: int, supervised: int, checkpointed: bool
) -> StepSizes:
    c, size = model.config, dtype.itemsize
    parameters = dict(model.named_parameters())
    block = {name: p for name, p in parameters.items() if name.startswith("layers.0.")}
    root = {name: p for name, p in parameters.items() if not name.startswith("layers.")}

    def numel(group: dict[str, torch.nn.Parameter], names: set[str]) -> int:
        return sum(p.numel() for name, p in group.items() if name in names)

    head_name = "embed.weight" if c.tied else "head.weight"
    vocabulary = c.dim * c.vocab_size
    heads, kv_heads = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    lora_ranks = sum(p.shape[0] for name, p in block.items() if "lora_A" in name)
    hidden = size * c.dim * tokens
    # Inputs of norms and matrices, q, k, v, gate and up, statistics of attention.
    saved = tokens * (size * (4 * c.dim + 2 * heads + 2 * kv_heads + 2 * c.hidden_dim + lora_ranks) + 4 * c.n_heads)
    logit_size = 4 + size * (size < 4)  # of logits and of the head's gradient: fp32, and the dtype of the computation
    logits = logit_size * (min(MAX_LOGITS, supervised * c.vocab_size) + vocabulary * (head_name in trained))
    return StepSizes(
        layers=c.n_layers,
        dtype=dtype,
        root=numel(root, set(root)),
        root_trained=numel(root, trained),
        block=numel(block, set(block)),
        block_trained=numel(block, trained),
        bf16_gradients=any(p.dtype != torch.float32 for name, p in parameters.items() if name in trained),
        cast_block=size * sum(p.numel() for p in block.values() if p.dtype != dtype),
        cast_head=size * vocabulary * (parameters[head_name].dtype != dtype),
        hidden=hidden,
        saved=hidden if checkpointed else saved,
        recomputed=saved if checkpointed else 0,
        mlp=6 * size * c.hidden_dim * tokens,
        head=hidden + 3 * size * c.dim * supervised + logits,
        head_gradient=size * vocabulary * (head_name in trained),
    )


# The functions below return pairs of bytes, (weights cast or gathered with gradients being reduced, activations), at
# the moments of a step that may need the most.


def single_rank_peaks(s: StepSizes) -> list[tuple[float, float]]:
    """Without FSDP: in the head, and in the backward pass of the last block."""
    cast = s.layers * s.cast_block  # kept until the backward pass, unless that casts again
    return [
        (s.cast_head + (0 if s.recomputed else cast), s.layers * s.saved + s.head),
        (s.cast_block if s.recomputed else cast, s.layers * s.saved + s.recomputed + s.mlp),
    ]


def fsdp_peaks(s: StepSizes, shards: int, replicas: int) -> list[tuple[float, float]]:
    """With FSDP2 as in torch 2.13.

    The root stays gathered from the forward pass to the end of the backward pass. A block is gathered into a buffer and
    copied out of it. The buffer is freed when the next block has its own; in the backward pass the next block's buffer
    exists already. A block's gradients are copied to an fp32 buffer, which is freed after the next block's reduction.
    With replicas, a rank keeps its part of the reduced fp32 gradients of all blocks until the backward pass ends
    (`AllReduceState` in torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py). With one shard per replica nothing
    is gathered, but weights are still copied.
    """
    size, buffered = s.dtype.itemsize, shards > 1
    block, root = size * s.block, size * s.root
    reduced = 4 * s.block_trained
    # Bytes per parameter while gradients are reduced: the buffer, and first the gradients, then this rank's part.
    reducing = 4 + max(size, (4 + 2 * s.bf16_gradients) / shards)
    kept_per_block = 4 * s.block_trained / shards * (replicas > 1)

    peaks = [
        ((1 + buffered) * (root + block), 3 * s.hidden),  # before the first block
        (root + buffered * block, s.layers * s.saved + s.head),
    ]
    for finished in {0, min(1, s.layers - 1), s.layers - 1}:  # blocks whose backward pass is finished
        kept = kept_per_block * finished
        next_block = buffered * block * (finished < s.layers - 1)
        saved = (s.layers - finished) * s.saved
        gathered = root + block + next_block + reduced * (finished > 0) + kept
        peaks += [
            (gathered, saved + s.recomputed + s.mlp + s.head_gradient),  # in the middle of the block
            (gathered + size * s.block_trained, saved + s.hidden + s.head_gradient),  # at its end
            (root + next_block + reducing * s.block_trained + kept, saved + s.head_gradient),  # being reduced
        ]
    return [*peaks, (reducing * s.root_trained + kept_per_block * s.layers, 0.0)]  # the root's gradients being reduced


def cpu_peaks(
    model: torch.nn.Module, trained: set[str], s: StepSizes, peaks: list[tuple[float, float]], fsdp: bool
) -> list[tuple[float, float]]:
    """The same on a CPU, which also holds the file of an export in memory.

    The allocator returns nothing to the system. An export reuses what a step has freed if the pieces were large, such
    as the gradient of a trained head. The many small activations of adapters leave no such space.
    """
    c, parameters = model.config, dict(model.named_parameters())
    freed = 2 * s.dtype.itemsize * s.block * s.layers * fsdp  # by FSDP, kept by the allocator
    tied_gradients = 4 * c.dim * c.vocab_size * (c.tied and "embed.weight" in trained)  # two gradients, added
    peaks = [(gathered + freed, activations + tied_gradients) for gathered, activations in peaks]
    written = {name: p for name, p in parameters.items() if ".lora_" not in name}
    adapted = [parameters[name.replace("lora_A", "weight")] for name in parameters if name.endswith(".lora_A")]
    unchanged = not adapted and all(p.dtype == torch.bfloat16 for p in written.values())  # written without a copy
    exported = 0 if unchanged else min(SHARD_BYTES, 2 * sum(p.numel() for p in written.values()))
    exported += 12 * max((p.numel() for p in adapted), default=0)  # merged: weight, product and sum in fp32
    not_reused = 0 if s.head_gradient else max(activations for _, activations in peaks)
    return [*peaks, (exported, not_reused)]
