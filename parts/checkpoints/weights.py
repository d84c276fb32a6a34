"""Tensors in safetensors files: read in slices into a rank's shard, written in shards. Pickle is never used."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from parts.cli import InputError, WorkError, raise_if_any
from parts.distributed import all_reduce, broadcast, full_tensor, local_part
from parts.files import atomic_path, atomic_write, read_json_object

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
SHARD_BYTES = 5 * 10**9
READ_BYTES = 2**24  # read per slice: pages of a mapped file count as memory until it is closed
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_tensors(path: Path):
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: damaged, truncated or unreadable ({e}); copy or download it again") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Raises WorkError."""
    try:
        with atomic_path(path) as new:
            save_file(tensors, new, metadata=metadata)
            new.chmod(0o644)  # safetensors creates files that only their owner can read
    except (OSError, SafetensorError) as e:
        raise WorkError(f"{path} could not be written ({e})") from None


# ---------------------------------------------------------------- reading


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an HF folder: the single file, or the shards that the index names. Raises InputError."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        if any(p.suffix in (".bin", ".pth", ".pt") for p in folder.glob("*")):
            raise InputError(
                f"{folder} has only pickled weights (.bin or .pth), which can run code when loaded. Convert them once, "
                "where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise InputError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [n for n in names if Path(n).name != n or n in ("", ".", "..") or "\\" in n]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{index}: not an index with a weight_map of names ({e!r})") from None
    if outside:
        raise InputError(f"{index}: names a file outside the folder: {outside[0]!r}")
    return [folder / name for name in sorted(names)]


def find_tensors(folder: Path, shapes: dict[str, tuple[int, ...]], surplus: set[str]) -> dict[str, Path]:
    """The file of each tensor of `shapes` in an HF folder, by name. Reads only the files' headers.

    Tensors named in `surplus` are allowed, as are the rotary frequencies of old exports. Raises one InputError that
    lists every tensor that is missing, unexpected, of another shape or not of floats.
    """
    found: dict[str, Path] = {}
    errors = []
    for path in weight_files(folder):
        with open_tensors(path) as f:
            for key in f.keys():  # noqa: SIM118 (no dictionary)
                piece = f.get_slice(key)
                shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
                if key not in shapes:
                    if not (key in surplus or key.endswith("rotary_emb.inv_freq")):
                        errors.append(f"surplus: {key} {shape}")
                    continue
                if key in found:
                    errors.append(f"twice: {key}, in {found[key].name} and {path.name}")
                elif shape != shapes[key]:
                    errors.append(f"wrong shape: {key} is {shape}, config.json asks for {shapes[key]}")
                elif dtype not in DTYPES:
                    errors.append(f"not of floats: {key} is {dtype}")
                found[key] = path
    errors += [f"missing: {key} {shape}" for key, shape in shapes.items() if key not in found]
    raise_if_any(errors, f"tensors in {folder} do not fit config.json")
    return found


def tensors_differ(folder: Path, first: str, second: str) -> bool:
    """Whether an HF folder contains both tensors with different values. Reads a few rows at a time."""
    files = {}
    for path in weight_files(folder) if any(folder.glob("*.safetensors")) else []:
        with open_tensors(path) as f:
            files |= dict.fromkeys({first, second} & set(f.keys()), path)
    if len(files) < 2:
        return False
    with open_tensors(files[first]) as f, open_tensors(files[second]) as g:
        a, b = f.get_slice(first), g.get_slice(second)
        if a.get_shape() != b.get_shape() or a.get_dtype() != b.get_dtype():
            return True
        return any(not torch.equal(a[k : k + 1024], b[k : k + 1024]) for k in range(0, a.get_shape()[0], 1024))


def stored_dtype(path: Path, key: str) -> torch.dtype:
    with open_tensors(path) as f:
        return DTYPES[f.get_slice(key).get_dtype()]


@torch.no_grad()
def check_nan(tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise InputError, on every rank, listing the tensors read from `folder` that contain NaN."""
    has_nan = all_reduce([bool(local_part(t)[0].isnan().any()) for t in tensors.values()])
    raise_if_any([name for name, nan in zip(tensors, has_nan) if nan], f"tensors of {folder} contain NaN")


def read_slice(path: Path, key: str, target: Tensor, offset: tuple[int, ...]) -> None:
    """Fill `target` with the slice at `offset` of the tensor `key`, converting the dtype, a few rows at a time."""
    if target.dim() == 0:
        with open_tensors(path) as f:
            target.copy_(f.get_tensor(key))
        return
    step = max(1, READ_BYTES // max(1, target[:1].numel() * 8))
    for a in range(0, len(target), step):
        rows = target[a : a + step]
        first = (offset[0] + a, *offset[1:])
        with open_tensors(path) as f:
            rows.copy_(f.get_slice(key)[tuple(slice(o, o + n) for o, n in zip(first, rows.shape))])


# ---------------------------------------------------------------- writing


@torch.no_grad()
def save_weights(
    folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype, merged: Callable[[str, Tensor], Tensor]
) -> None:
    """Write tensors, plain or sharded over the ranks, as `dtype` to the safetensors of an HF folder: one file, or
    shards of at most 5 GB with an index. Rank 0 writes, a shard at a time; every rank must call. `merged` maps a name
    and its full tensor to the tensor to write. Raises WorkError.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    writes = not dist.is_initialized() or dist.get_rank() == 0
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i, _ in enumerate(shards, 1)]
    )
    for file, names in zip(files, shards):
        part = {}
        for name in names:
            tensor = merged(name, full_tensor(tensors[name]))
            if writes:
                part[name] = tensor.to("cpu", dtype).contiguous()
        if writes:
            write_tensors(folder / file, part, {"format": "pt"})
    if writes and len(shards) > 1:
        (folder / SINGLE).unlink(missing_ok=True)  # from an earlier save: readers would prefer it
        total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        atomic_write(
            folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
        )


@torch.no_grad()
def checksum(tensors: dict[str, Tensor]) -> str:
    """A checksum of the tensors' bits, as 16 hex digits: the same for any number of ranks. Every rank must call."""
    # One tensor for all sums: many small tensors would fragment the memory that the pieces free.
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=next(iter(tensors.values())).device)
    for k, tensor in enumerate(tensors.values()):
        local, offset = local_part(tensor.detach())
        bits = local.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.itemsize])
        position = offset[0] * math.prod(tensor.shape[1:]) if offset else 0
        for piece in bits.flatten().split(2**18):
            positions = torch.arange(position, position + len(piece), device=piece.device)
            sums[k] += (piece.long() * (positions % 65521 + 1)).sum()  # wraps around on every machine
            position += len(piece)
    sharded = [t for t in tensors.values() if isinstance(t, DTensor)]
    if sharded:
        dist.all_reduce(sums, group=sharded[0].device_mesh.get_group(-1))  # the other replicas have the same sums
    return hashlib.sha256(json.dumps([list(tensors), sums.tolist()]).encode()).hexdigest()[:16]


def check_weights(parameters: dict[str, Tensor], folder: Path, out: Path) -> None:
    """Raise InputError, on every rank, if the weights just loaded from `folder` contain NaN or differ from those that
    the run began with. A new run records them in its run.json."""
    path = out / "run.json"
    check_nan(parameters, folder)
    weights, run = checksum(parameters), broadcast(read_json_object(path))
    if run["weights"] not in (None, weights):
        raise InputError(f"the weights in {folder} are not those with which the run in {out} began: give another --out")
    if dist.get_rank() == 0:
        atomic_write(path, json.dumps(run | {"weights": weights}, indent=1))
