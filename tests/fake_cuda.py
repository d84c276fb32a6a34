"""The memory of a training step on GPUs, followed without a GPU and without memory, against the memory plan.

    python tests/fake_cuda.py                       every case below, a line each
    python tests/fake_cuda.py 7b/32/8/1/fp32/ckpt    only this one

A case is model/layers/ranks/replicas/way/ckpt (or keep)[/tokens]. The real `build_model`, `batch_gradients`, optimizer
step and `save_model` run on fake tensors (torch's FakeTensorMode: shapes and dtypes, no contents), as one rank of a
"fake" process group, whose collectives do nothing. Every storage is counted from its allocation to its end.

torch built for CPUs cannot run autograd on fake tensors of device cuda, so the tensors say "cpu" while parts/kernels.py
is told that they are on CUDA. What this cannot follow, and the plan only estimates on GPUs:
- varlen attention and fused RMSNorm: their outputs and what they keep for backward have the shapes that torch declares,
  workspaces inside of the CUDA kernels are not seen;
- the caching allocator: rounding, fragmentation, and a separate pool for each stream of FSDP;
- what CUDA itself, cuBLAS and NCCL hold.

This file patches modules for the life of its process: import nothing from it, start it as a program.
"""

import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import model as model_file
import train
from model import Transformer
from parts import adamw, kernels, memory_plan
from parts.checkpoints import weights
from parts.checkpoints.config import Config, parse_config
from parts.distributed import DistributedEnv
from parts.options import Computation, Optimization, Weights

aten = torch.ops.aten
MODELS = {  # of their config.json
    "tiny": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
WAYS = {"fp32": Weights(), "bf16": Weights("bf16"), "lora": Weights(lora=16, lora_alpha=32.0)}
RANKS = ((1, 1), (8, 1), (16, 2), (2, 2))
ALL_CASES = [
    f"{name}/4/{ranks}/{replicas}/{way}/{ckpt}"
    for name in MODELS
    for ranks, replicas in RANKS
    for way in WAYS
    for ckpt in ("ckpt", "keep")
]
LENGTH = 256  # tokens of each document; half of them are supervised


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that live, and their peak."""

    def __init__(self):
        super().__init__()
        self.storages, self.total, self.peak = {}, 0, 0  # {address: (weak reference, bytes)}

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage for the first time, or after it was resized."""
        key, (known, before) = storage._cdata, self.storages.get(storage._cdata, (None, 0))
        if known is None or known() is not storage:
            known, before = weakref.ref(storage, lambda _: self.forget(key, known)), 0
        self.storages[key] = (known, storage.nbytes())
        self.total += storage.nbytes() - before
        self.peak = max(self.peak, self.total)

    def forget(self, key: int, ended: weakref.ref) -> None:
        if key in self.storages and self.storages[key][0] is ended:
            self.total -= self.storages.pop(key)[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        to_host = func is aten._to_copy.default and kwargs.get("dtype") == torch.float16  # only the export uses it
        for t in [] if to_host else tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.count(local_part(t)[0].untyped_storage())  # a DTensor's own claims to be the whole's
        return result


class Contents(TorchDispatchMode):
    """Answers what depends on the contents of tensors, which fake ones do not have."""

    def __init__(self, tokens: int, supervised: int):
        super().__init__()
        self.tokens, self.loss_mask = tokens, supervised

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else LENGTH
        if func is aten.nonzero.default:
            return args[0].new_empty((self.loss_mask, 1), dtype=torch.int64)
        if func is aten.repeat_interleave.Tensor:
            return args[0].new_empty((self.tokens,))
        return func(*args, **(kwargs or {}))


class FusedRMSNorm(torch.autograd.Function):
    """What the CUDA kernel keeps and returns; the CPU's F.rms_norm is made of many operators."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty((len(x), 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def fake_model(config: Config, chosen: Weights, dtype: torch.dtype, outline=model_file.build_meta_model) -> Transformer:
    """`build_meta_model`, its parameters fake tensors instead of meta ones."""
    with unset_fake_temporarily():
        model = outline(config, chosen, dtype)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
    return model


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local, (0,) * local.dim()


def patch_modules(tracker_of: dict) -> None:
    """Let the modules of this process take CUDA's ways on fake tensors; nothing is read or written."""
    kernels.on_cuda = lambda x: True
    kernels.F = SimpleNamespace(
        **{**vars(torch.nn.functional), "rms_norm": lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight)}
    )
    adamw.CHUNK_NUMEL = {"cpu": adamw.CHUNK_NUMEL["cuda"]}
    generator = torch.Generator
    torch.Generator = lambda device=None: generator()
    torch.Tensor.__int__ = lambda self: self.item()
    adamw.local_part = weights.local_part = local_part
    model_file.build_meta_model = fake_model
    model_file.find_weight_files = lambda model, folder: {}
    model_file.load_weights = lambda model, files: None
    Transformer.to_empty = lambda self, device: self
    Transformer.init_lora = lambda self, seed: None
    for module in (model_file, weights):
        module.write_tensors = module.atomic_write = lambda *args: None
    resize = torch.UntypedStorage.resize_

    def resize_and_count(storage, size):  # with which FSDP allocates and frees what it gathers
        result = resize(storage, size)
        if "now" in tracker_of:
            tracker_of["now"].count(storage)
        return result

    torch.UntypedStorage.resize_ = resize_and_count


def documents(count: int) -> data.Documents:
    supervised = np.tile(np.arange(LENGTH) >= LENGTH // 2, count)
    names = [str(k) for k in range(count)]
    return data.Documents(
        np.zeros(count * LENGTH, np.int32), supervised, np.arange(count + 1) * LENGTH, names, names, []
    )


def tracked_peak(
    config: Config, chosen: Weights, computation: Computation, ranks: DistributedEnv, tracker: StorageTracker
) -> int:
    """Bytes at the peak of an optimizer step, the gradients of the next batch and the export."""
    tokens = computation.micro_batch_tokens
    rows = documents(tokens // LENGTH * ranks.world_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = train.build_model(None, config, chosen, computation, ranks)
        model.embed.sparse = False  # which is of CPUs
        trained = train.trained_parameters(model)
        optimizer = train.make_optimizer(trained, Optimization(0.1, [0.9, 0.95], 1.0, "cosine", 0.1, "reset", 0, 0))
        for p in model.parameters():  # counted from here on: a real model is built on meta and allocated when sharded
            tracker.count(local_part(p.detach())[0].untyped_storage())
        with tracker:
            for p in trained.values():  # the moments are there from the start, as in every step but the first
                p.grad = torch.zeros_like(p)
            optimizer.step()
            with Contents(tokens, tokens // 2):
                train.batch_gradients(model, trained, rows, np.arange(len(rows)), tokens, ranks, int)
            model_file.save_model(model, Path("nowhere"), torch.float16)
    return tracker.peak


def run_case(case: str, tracker_of: dict) -> tuple[int, dict[str, float]]:
    """The peak that was tracked and the plan's parts, bytes on each rank."""
    name, layers, world, replicas, way, ckpt, *more = case.split("/")
    world, replicas, tokens, activation_checkpointing = (
        int(world),
        int(replicas),
        int(more[0]) if more else 4096,
        ckpt == "ckpt",
    )
    config = parse_config({"model_type": "llama", "num_hidden_layers": int(layers), **MODELS[name]})
    shape, names = (world,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, world // replicas), ("replicate", "shard")
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        ranks = DistributedEnv(0, world, torch.device("cpu"), init_device_mesh("cpu", shape, mesh_dim_names=names))
        tracker_of["now"] = tracker = StorageTracker()
        computation = Computation("bf16", tokens, activation_checkpointing, False)
        peak = tracked_peak(config, WAYS[way], computation, ranks, tracker)
    finally:
        dist.destroy_process_group()
    model = OUTLINE(config, WAYS[way], torch.bfloat16)
    trained = set(train.trained_parameters(model))
    how = (torch.bfloat16, tokens, tokens // 2, activation_checkpointing, True)
    return peak, memory_plan.memory_plan(model, trained, world // replicas, *how, replicas)


OUTLINE = model_file.build_meta_model


def main(cases: list[str]) -> None:
    tracker_of = {}
    patch_modules(tracker_of)
    print("case tracked_gib plan_gib plan_over_tracked_percent")
    for case in cases or ALL_CASES:
        start = time.perf_counter()
        peak, plan = run_case(case, tracker_of)
        planned = sum(plan.values())
        parts = ", ".join(f"{part} {n / 2**30:.2f}" for part, n in plan.items() if n)
        seconds = f"{time.perf_counter() - start:.1f} s"
        print(f"{case} {peak / 2**30:.3f} {planned / 2**30:.3f} {100 * (planned / peak - 1):+.1f} ({parts}; {seconds})")


if __name__ == "__main__":
    main(sys.argv[1:])
