"""This process among the ranks: joining torchrun's group, its device and precision, and what ranks tell each other."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

from parts.program import InputError, die_with_parent


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world_size` processes, each with its own device; `mesh` is how a model is sharded over them."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh  # ("shard",), or ("replicate", "shard")

    @property
    def writes_shard(self) -> bool:
        """Of the replicas, the first writes."""
        return self.mesh.ndim == 1 or self.mesh.get_coordinate()[0] == 0


def is_first_rank() -> bool:
    """Whether torchrun calls this process rank 0, also before it has joined."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_ranks(replicas: int = 1) -> Iterator[Ranks]:
    """Join torchrun's process group, or be a group of one; leave it at the end. Raises InputError."""
    keep_memory()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        die_with_parent(signal.SIGTERM)  # when torchrun itself is killed
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # The others wait while the first reads and tokenises.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2), **alone)
    try:
        world_size = dist.get_world_size()
        if world_size % replicas:
            raise InputError(f"--replicas {replicas} does not divide the {world_size} ranks")
        shape, names = (world_size,), ("shard",)
        if replicas > 1:
            shape, names = (replicas, world_size // replicas), ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        yield Ranks(dist.get_rank(), world_size, device, mesh)
    finally:
        dist.destroy_process_group()


def broadcast(value):
    """Rank 0's value (anything that pickles; it never leaves these processes) on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce(numbers: list[float]) -> list[float]:
    """Each number summed over the ranks, in fp64; on CPUs, so that no rank waits for its device."""
    if dist.get_world_size() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gradient_norm(gradients: list[Tensor], ranks: Ranks) -> float:
    """The norm over all these gradients (this rank's parts of them) and all ranks. In pieces and fp64: torch's own norm
    of a large fp32 tensor on a CPU is wrong in the third digit, and differs with the number of ranks."""
    square = torch.zeros((), device=ranks.device, dtype=torch.float64)
    length = 2**20 if ranks.device.type == "cpu" else 2**24  # a GPU sums in a tree, but starts slowly
    for g in gradients:
        for piece in g.flatten().split(length):
            square += piece.float().square().sum()
    dist.all_reduce(square, group=ranks.mesh.get_group("shard"))
    return square.sqrt().item()


def check_shared(file: Path) -> None:
    """Raise InputError, on every rank, where some rank does not see the `file` that rank 0 has written."""

    def content() -> str | None:
        return file.read_text() if file.exists() else None

    wanted = broadcast(content())
    for _ in range(20):  # other nodes may see it late
        if content() == wanted:
            break
        time.sleep(0.5)
    blind = int(all_reduce([content() != wanted])[0])
    if blind:
        raise InputError(f"{file.parent} is not the same folder for {blind} ranks: --out must be seen by all nodes")


def compute_dtype(choice: str) -> torch.dtype:
    """Of "bf16", "fp32" or "auto": bf16 where this machine's device computes in it."""
    if choice == "auto":
        if torch.cuda.is_available():
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if choice == "bf16" else torch.float32


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next step: mapping it anew costs a CPU run a third of its time."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        try:
            libc = ctypes.CDLL("libc.so.6")
            for option, value in ((-4, 0), (-1, -1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD off, M_TOP_PAD
                libc.mallopt(option, value)
        except (OSError, AttributeError):
            pass  # another libc


def reshard(model: torch.nn.Module) -> None:
    """After passes without a backward: else what FSDP gathered stays until one comes, and stands in for the
    parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
