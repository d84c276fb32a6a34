"""This process among the ranks: joining torchrun's group, its device and precision, and what ranks tell each other."""

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
        """Of the replicas, the first writes."""
        return self.mesh.ndim == 1 or self.mesh.get_coordinate()[0] == 0


def is_first_rank() -> bool:
    """Whether torchrun calls this process rank 0, also before it has joined."""
    return os.environ.get("RANK", "0") == "0"


RENDEZVOUS_SECONDS = 600  # seconds in which all ranks must have come; they start together
TORCHRUN_REPLY_SECONDS = 10  # seconds in which torchrun, which runs already, must answer; else it has been killed
PEER_LOST_MESSAGES = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)  # in torch's messages


def rendezvous() -> dist.Store:
    """The store through which the ranks of torchrun find each other, once all have come; alone, one of its own. Raises
    WorkError where they have not within RENDEZVOUS_SECONDS."""
    if "RANK" not in os.environ:
        return dist.HashStore()
    rank, world_size, end = (
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        time.monotonic() + RENDEZVOUS_SECONDS,
    )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun; else by the first rank
    store, serves = None, rank == 0 and not served
    answer = time.monotonic() + (TORCHRUN_REPLY_SECONDS if served else RENDEZVOUS_SECONDS)
    while store is None:
        try:
            # In C++ no signal is answered, so it waits for a few seconds at a time.
            store = dist.TCPStore(host, port, world_size, serves, timedelta(seconds=3), wait_for_workers=False)
        except dist.DistError as e:
            if serves or time.monotonic() > answer:
                raise WorkError(f"the ranks cannot meet at {host}:{port} ({str(e).splitlines()[0]})") from None
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    store.set(f"rank {rank} came", "")
    for other in range(world_size):
        wait_for_key(store, f"rank {other} came", end)
    return store


def wait_for_key(store: dist.Store, key: str, end: float = math.inf) -> bytes:
    """What another rank sets under `key`; signals are answered meanwhile. Raises WorkError when the store is gone, or
    at the time `end` (of time.monotonic)."""
    try:
        while not store.check([key]):
            if time.monotonic() > end:
                raise WorkError(f"{key!r} has not happened in {RENDEZVOUS_SECONDS} s: the ranks did not all start")
            time.sleep(0.02)
        return store.get(key)
    except dist.DistError:
        raise WorkError("") from None  # the rank that served the store has ended, and said why


@contextmanager
def first_rank_works(store: dist.Store) -> Iterator[bool]:
    """Yields whether this is the first rank, whose block the others then wait for before theirs. Raises InputError,
    which the first rank explains, on the others where it failed."""
    if not is_first_rank():
        if wait_for_key(store, "first rank") == b"failed":
            raise InputError("")
        yield False
        return
    try:
        yield True
    except BaseException:
        store.set("first rank", "failed")
        time.sleep(0.5 if "RANK" in os.environ else 0)  # in which the others read it, and need not complain
        raise
    store.set("first rank", "done")


@contextmanager
def init_distributed(replicas: int = 1, store: dist.Store | None = None) -> Iterator[DistributedEnv]:
    """Join torchrun's process group, or be a group of one; leave it at the end. `store`: of `rendezvous`.

    Raises InputError, and WorkError in place of what torch raises when another rank has ended."""
    tune_malloc()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        set_parent_death_signal(signal.SIGTERM)  # when torchrun itself is killed
    place = {"rank": int(os.environ.get("RANK", 0)), "world_size": int(os.environ.get("WORLD_SIZE", 1))}
    store = dist.PrefixStore("group", store or rendezvous())
    # The first rank writes a large model while the others wait.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2), store=store, **place)
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
            raise WorkError(f"rank {place['rank']}: another rank has ended; the same command goes on") from e
        raise
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


def gradient_norm(gradients: list[Tensor], ranks: DistributedEnv) -> float:
    """The norm over all these gradients (this rank's parts of them) and all ranks. In pieces and fp64: torch's own norm
    of a large fp32 tensor on a CPU is wrong in the third digit, and differs with the number of ranks."""
    square = torch.zeros((), device=ranks.device, dtype=torch.float64)
    length = 2**20 if ranks.device.type == "cpu" else 2**24  # a GPU sums in a tree, but starts slowly
    for g in gradients:
        for piece in g.flatten().split(length):
            square += piece.float().square().sum()
    dist.all_reduce(square, group=ranks.mesh.get_group("shard"))
    return square.sqrt().item()


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The part of a tensor that this rank owns, and its offset in the whole; all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, plain or sharded; of a sharded one every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
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


def tune_malloc() -> None:
    """Tell glibc to keep freed memory for the next step: mapping it again costs a CPU run a third of its time."""
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


def shard_model(
    model: torch.nn.Module, blocks: Sequence[torch.nn.Module], dtype: torch.dtype, mesh: DeviceMesh
) -> None:
    """FSDP2 of each block and of the rest: computed in `dtype`, gradients reduced in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in [*blocks, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
