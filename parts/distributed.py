"""Distributed setup: torchrun's process group, device and precision of a rank, communication, sharding."""

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parts.cli import InputError, WorkError, set_parent_death_signal


@dataclass(frozen=True)
class DistributedEnv:
    """`rank` of `world_size` processes, each with its own device; `mesh` is how a model is sharded over them."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh  # ("shard",), or ("replicate", "shard")

    @property
    def writes_shard(self) -> bool:
        """Whether this rank is in the first replica, which writes files."""
        return self.mesh.ndim == 1 or self.mesh.get_coordinate()[0] == 0


def is_first_rank() -> bool:
    """Whether this process is rank 0 of torchrun; also before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


RENDEZVOUS_SECONDS = 600  # for all ranks to arrive; they start together
TORCHRUN_REPLY_SECONDS = 10  # for torchrun, which runs already, to answer; otherwise it has been killed
# In torch's messages:
PEER_LOST_MESSAGES = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def rendezvous() -> dist.Store:
    """The TCP store of torchrun's ranks, once all have arrived; a local one without torchrun. Raises WorkError if a
    rank is missing after RENDEZVOUS_SECONDS."""
    if "RANK" not in os.environ:
        return dist.HashStore()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    end = time.monotonic() + RENDEZVOUS_SECONDS
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # hosted by torchrun; otherwise by rank 0
    store, serves = None, rank == 0 and not served
    answer = time.monotonic() + (TORCHRUN_REPLY_SECONDS if served else RENDEZVOUS_SECONDS)
    while store is None:
        try:
            # Python handles no signals during a C++ call, so wait for a few seconds at a time.
            store = dist.TCPStore(host, port, world_size, serves, timedelta(seconds=3), wait_for_workers=False)
        except dist.DistError as e:
            if serves or time.monotonic() > answer:
                raise WorkError(f"the ranks cannot connect at {host}:{port} ({str(e).splitlines()[0]})") from None
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    store.set(f"rank {rank} came", "")
    for other in range(world_size):
        wait_for_key(store, f"rank {other} came", end)
    return store


def wait_for_key(store: dist.Store, key: str, end: float = math.inf) -> bytes:
    """Wait for the value that another rank sets under `key`; signals are handled meanwhile. Raises WorkError if the
    store is gone, or at the time `end` (of time.monotonic)."""
    try:
        while not store.check([key]):
            if time.monotonic() > end:
                raise WorkError(f"{key!r} did not happen within {RENDEZVOUS_SECONDS} s: the ranks did not all start")
            time.sleep(0.02)
        return store.get(key)
    except dist.DistError:
        raise WorkError("") from None  # the rank that hosted the store has ended and printed the reason


@contextmanager
def first_rank_first(store: dist.Store) -> Iterator[bool]:
    """A context manager whose block runs on rank 0 first, then on the others; yields whether this is rank 0. If it
    fails on rank 0, which prints the error, the others raise InputError."""
    if not is_first_rank():
        if wait_for_key(store, "first rank") == b"failed":
            raise InputError("")
        yield False
        return
    try:
        yield True
    except BaseException:
        store.set("first rank", "failed")
        time.sleep(0.5 if "RANK" in os.environ else 0)  # the others read it and exit without an error message
        raise
    store.set("first rank", "done")


@contextmanager
def init_distributed(replicas: int = 1, store: dist.Store | None = None) -> Iterator[DistributedEnv]:
    """A context manager that joins torchrun's process group (or a group of one) and leaves it at the end. `store`: from
    `rendezvous`.

    Raises InputError, and WorkError instead of torch's errors when another rank has ended."""
    tune_malloc()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        set_parent_death_signal(signal.SIGTERM)  # when torchrun itself is killed
    rank_args = {"rank": int(os.environ.get("RANK", 0)), "world_size": int(os.environ.get("WORLD_SIZE", 1))}
    store = dist.PrefixStore("group", store or rendezvous())
    # The first rank writes a large model while the others wait.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2), store=store, **rank_args)
    try:
        world_size = dist.get_world_size()
        if world_size % replicas:
            raise InputError(f"--replicas {replicas} does not divide the {world_size} ranks")
        shape, names = (world_size,), ("shard",)
        if replicas > 1:
            shape, names = (replicas, world_size // replicas), ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        yield DistributedEnv(dist.get_rank(), world_size, device, mesh)
    except WorkError:
        raise
    except RuntimeError as e:
        if isinstance(e, dist.DistError) or any(word in str(e) for word in PEER_LOST_MESSAGES):
            raise WorkError(
                f"rank {rank_args['rank']}: another rank has ended; run the same command again to resume"
            ) from e
        raise
    finally:
        dist.destroy_process_group()


def broadcast(value):
    """Rank 0's value (any picklable object) on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce(numbers: list[float]) -> list[float]:
    """Each number summed over the ranks, in fp64 on the CPU, so that no rank waits for its device."""
    if dist.get_world_size() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gradient_norm(gradients: list[Tensor], ranks: DistributedEnv) -> float:
    """The norm of all gradients (this rank's shards) over all ranks. Computed in pieces and fp64: torch's norm of a
    large fp32 tensor on a CPU is wrong in the third digit, and depends on the number of ranks."""
    square = torch.zeros((), device=ranks.device, dtype=torch.float64)
    length = 2**20 if ranks.device.type == "cpu" else 2**24  # GPUs sum pairwise, but each kernel launch has a cost
    for g in gradients:
        for piece in g.flatten().split(length):
            square += piece.float().square().sum()
    dist.all_reduce(square, group=ranks.mesh.get_group("shard"))
    return square.sqrt().item()


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's shard of a tensor and its offset in the full tensor; for a plain tensor, the tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a plain or sharded one; for a sharded tensor every rank must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def check_shared(file: Path) -> None:
    """Raise InputError, on every rank, if some rank does not see the `file` that rank 0 has written."""

    def content() -> str | None:
        return file.read_text() if file.exists() else None

    expected = broadcast(content())
    for _ in range(20):  # other nodes may see it with a delay
        if content() == expected:
            break
        time.sleep(0.5)
    missing = int(all_reduce([content() != expected])[0])
    if missing:
        raise InputError(f"{file.parent} is not the same folder for {missing} ranks: --out must be shared by all nodes")


def resolve_dtype(choice: str) -> str:
    """The choice itself, "bf16" or "fp32". For "auto": "bf16" if this machine's device computes in it, else "fp32"."""
    if choice != "auto":
        return choice
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bf16" if has_bf16 else "fp32"


def compute_dtype(choice: str) -> torch.dtype:
    """The dtype for "bf16", "fp32" or "auto"."""
    return torch.bfloat16 if resolve_dtype(choice) == "bf16" else torch.float32


def tune_malloc() -> None:
    """Make glibc keep freed memory for the next step: mapping it again takes a third of the time of a CPU run."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        try:
            libc = ctypes.CDLL("libc.so.6")
            for option, value in ((-4, 0), (-1, -1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD off, M_TOP_PAD
                libc.mallopt(option, value)
        except (OSError, AttributeError):
            pass  # another libc


def reshard(model: torch.nn.Module) -> None:
    """Call after forward passes without a backward: otherwise FSDP keeps the gathered parameters until the next
    backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_model(
    model: torch.nn.Module, blocks: Sequence[torch.nn.Module], dtype: torch.dtype, mesh: DeviceMesh
) -> None:
    """Apply FSDP2 to each block and to the rest: computation in `dtype`, gradient reduction in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in [*blocks, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
