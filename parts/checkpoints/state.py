"""Saved state: tensors by name, in one safetensors file per rank, and a JSON file of the progress.

    folder/NAME/rank00000.safetensors …     the rows of each tensor that belong to the rank
    folder/NAME/state.json                  progress, and a checksum of every file

A state written by any number of ranks is read by any other.
"""

import hashlib
import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parts.checkpoints.weights import DTYPES, INTEGERS, open_tensors, read_slice, write_tensors
from parts.cli import InputError, WorkError, raise_if_any
from parts.distributed import DistributedEnv, broadcast, local_part
from parts.files import atomic_write, fsync_path, remove_path, sha256, temporary_path

KEPT_STATES = 2  # states


def save_state(folder: Path, name: str, ranks: DistributedEnv, tensors: dict[str, Tensor], progress: dict) -> None:
    """Write folder/NAME/, and keep it and the previous one (names must be in increasing order). Every rank must call.

    A state is never overwritten: if NAME exists, the new one is NAME-0001, … It is renamed to NAME after it is on disk,
    and only then older states are removed, so that after a kill the newest named folder is complete. Raises WorkError.
    """
    file = f"rank{ranks.rank:05}.safetensors"
    try:
        new = None
        if ranks.rank == 0:
            new = temporary_path(unused_folder(folder, name))
            remove_path(new)
            new.mkdir(parents=True)
        new = broadcast(new)
        checksum = write_rank(new / file, ranks, tensors) if ranks.writes_shard else None
        checksums = [None] * ranks.world_size
        dist.all_gather_object(checksums, (file, checksum))
        if ranks.rank == 0:
            state = json.dumps({"progress": progress, "files": {f: c for f, c in checksums if c}})
            manifest = {"state": state, "sha256": hashlib.sha256(state.encode()).hexdigest()}
            atomic_write(new / "state.json", json.dumps(manifest, indent=1))
            fsync_path(new, inside=True)
            os.replace(new, new.with_suffix(""))
            fsync_path(folder)
            for old in saved_states(folder)[:-KEPT_STATES]:
                os.replace(old, temporary_path(old))  # rename first: a named folder is always complete
                remove_path(temporary_path(old))
    except (OSError, WorkError) as e:
        if ranks.rank == 0 and new:
            with suppress(OSError):
                remove_path(new)
        raise WorkError(
            f"the state could not be saved in {folder} ({e}); the previous one is kept: free disk space and run the "
            "same command again"
        ) from None
    dist.barrier()


def unused_folder(folder: Path, name: str) -> Path:
    """folder/NAME, or if it exists folder/NAME-0001, … with the next free number."""
    matches = [re.fullmatch(rf"{re.escape(name)}-(\d{{4}})", path.name) for path in folder.glob(f"{name}-*")]
    numbers = [int(match[1]) for match in matches if match]
    if not numbers and not (folder / name).exists():
        return folder / name
    return folder / f"{name}-{max(numbers, default=0) + 1:04}"


def write_rank(path: Path, ranks: DistributedEnv, tensors: dict[str, Tensor]) -> str:
    """Write and sync the rows that belong to this rank; returns the file's sha256."""
    parts = {n: local_part(tensor) for n, tensor in tensors.items()}
    # Tensors that are not sharded are equal on every rank.
    written = {n: p for n, p in parts.items() if p[0].numel() and (ranks.rank == 0 or p[0].dim())}
    first_rows = {n: offset[0] for n, (_, offset) in written.items() if offset}
    content = {n: part.to("cpu").contiguous() for n, (part, _) in written.items()}
    write_tensors(path, content, {"first_rows": json.dumps(first_rows)})
    fsync_path(path)
    return sha256(path)


def saved_states(folder: Path) -> list[Path]:
    """The paths of all states in a folder, oldest first."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and path.suffix != ".tmp")


def read_manifest(path: Path) -> dict:
    """Read state.json: {"progress", "files": {file: sha256}}. Raises ValueError, KeyError, TypeError or OSError if
    damaged."""
    manifest = json.loads((path / "state.json").read_text())
    if hashlib.sha256(manifest["state"].encode()).hexdigest() != manifest["sha256"]:
        raise ValueError("state.json does not match its checksum")
    return json.loads(manifest["state"])


def newest_state(folder: Path) -> Path | None:
    """The newest undamaged state; prints damaged ones on stderr. Removes the remains of interrupted saves."""
    for path in folder.glob("*.tmp"):
        remove_path(path)
    for path in reversed(saved_states(folder)):
        try:
            damaged = [f for f, c in read_manifest(path)["files"].items() if Path(f).name != f or sha256(path / f) != c]
            if not damaged:
                return path
            reason = f"{damaged[0]} does not match its checksum"
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            reason = str(e)
        print(f"{path} is damaged ({reason}): using the state before it", file=sys.stderr)
    return None


@dataclass
class SavedTensor:
    """A tensor of a saved state: its dtype, its full shape, and its rows in each file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[tuple[Path, int, int]]  # file, first row, rows

    def copy_to(self, target: Tensor) -> None:
        """Fill this rank's part of `target`, plain or sharded. Raises InputError if the shapes differ."""
        if tuple(target.shape) != self.shape:
            raise InputError(f"the saved {self.name} has the shape {self.shape}, not {tuple(target.shape)}")
        local, offset = local_part(target)
        for file, first, rows in self.pieces:
            if local.dim() == 0:
                read_slice(file, self.name, local, ())
                continue
            a, b = max(offset[0], first), min(offset[0] + len(local), first + rows)
            if a < b:
                read_slice(file, self.name, local[a - offset[0] : b - offset[0]], (a - first, *offset[1:]))


def read_state(path: Path) -> tuple[dict, dict[str, SavedTensor]]:
    """The progress of a state, and its tensors by name; reads headers only."""
    state = read_manifest(path)
    tensors: dict[str, SavedTensor] = {}
    for file in state["files"]:
        with open_tensors(path / file) as f:
            first_rows = json.loads(f.metadata()["first_rows"])
            for name in f.keys():  # noqa: SIM118 (no dictionary)
                piece = f.get_slice(name)
                shape = tuple(piece.get_shape())
                first, rows = first_rows.get(name, 0), shape[0] if shape else 1
                saved = tensors.setdefault(name, SavedTensor(name, (DTYPES | INTEGERS)[piece.get_dtype()], shape, []))
                saved.pieces.append((path / file, first, rows))
                saved.shape = (max(saved.shape[0], first + rows), *shape[1:]) if shape else ()
    return state["progress"], tensors


# ---------------------------------------------------------------- training state


@dataclass
class TrainingState:
    """Everything that a resumed run needs; anything else is lost at a kill.

    Put additional tensors, such as an average of the weights, into `more`: by name, plain or sharded, updated in place.
    Additional numbers are fields of the progress.
    """

    trained: dict[str, nn.Parameter]  # by name
    optimizer: torch.optim.Optimizer
    progress: Any  # a dataclass of numbers, strings and lists
    more: dict[str, Tensor]


UNSHARDED = {
    torch.optim.Adafactor: "its statistics of rows and columns are not sharded as the parameters are",
    torch.optim.Rprop: "it writes to single entries of a gradient, which torch does not do on shards",
}


def check_optimizer(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> None:
    """Raise ValueError for a configuration that an optimizer would silently ignore, InputError if it cannot step."""
    kind, sharded = type(optimizer).__name__, any(isinstance(p, DTensor) for p in trained.values())
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(f"make_optimizer: {kind} recomputes the loss within a step, which is not supported")
    for unsharded, reason in UNSHARDED.items():
        if sharded and isinstance(optimizer, unsharded):
            raise InputError(f"make_optimizer: {kind} works on one rank only: {reason}")
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    missing = [name for name, p in trained.items() if grouped.count(id(p)) != 1]
    if missing or len(grouped) != len(trained):
        raise ValueError(
            f"make_optimizer: each trained parameter must be in one group: {', '.join(missing) or 'others'}"
        )
    if any(group["lr"] for group in optimizer.param_groups):
        raise ValueError('make_optimizer: the lr of a group would be overwritten: give the group an "lr_scale"')


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """All tensors of a state, by name: weight/NAME, more/NAME, and optimizer/KEY/NAME for the optimizer's tensors of
    each parameter."""
    tensors = {f"weight/{name}": p.detach() for name, p in state.trained.items()}
    tensors |= {f"more/{name}": tensor for name, tensor in state.more.items()}
    for name, p in state.trained.items():
        values = state.optimizer.state.get(p, {})
        tensors |= {f"optimizer/{key}/{name}": value for key, value in values.items() if isinstance(value, Tensor)}
    return tensors


def describe_optimizer(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict:
    """The parts of an optimizer's state that are not tensors: its class, and numbers by parameter and by group. Raises
    WorkError for anything else."""
    numbers = {}
    for name, p in trained.items():
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, Tensor | int | float | None):
                raise WorkError(f"the optimizer's {key} is a {type(value).__name__}, which cannot be saved")
            if isinstance(value, int | float):
                numbers.setdefault(name, {})[key] = value
    groups = [{k: v for k, v in g.items() if isinstance(v, int | float) and k != "lr"} for g in optimizer.param_groups]
    return {"kind": type(optimizer).__name__, "numbers": numbers, "groups": groups}


def save_training(folder: Path, name: str, ranks: DistributedEnv, state: TrainingState) -> None:
    """Save a TrainingState with `save_state`."""
    description = {"progress": asdict(state.progress), "optimizer": describe_optimizer(state.trained, state.optimizer)}
    save_state(folder, name, ranks, state_tensors(state), description)


def restore_training(state: TrainingState, saved: dict[str, SavedTensor], description: dict) -> None:
    """Copy the saved tensors (of `read_state`) into weights, optimizer and `more`, with any sharding. `description`:
    from `describe_optimizer`. Raises InputError for unexpected tensors and for missing weights or tensors of `more`."""
    in_place = {f"weight/{name}": p.detach() for name, p in state.trained.items()}
    in_place |= {f"more/{name}": tensor for name, tensor in state.more.items()}
    of_optimizer = {name: tensor for name, tensor in saved.items() if name.startswith("optimizer/")}
    if description["kind"] != type(state.optimizer).__name__:
        kind = type(state.optimizer).__name__
        raise InputError(f"the saved state is of {description['kind']}, but this run uses {kind}")
    missing = [name for name in in_place if name not in saved]
    raise_if_any(missing, "trained parameters or additional tensors are not in the saved state")
    unexpected = [name for name in saved if name not in in_place and name not in of_optimizer]
    unexpected += [name for name in of_optimizer if name.split("/", 2)[2] not in state.trained]
    raise_if_any(unexpected, "tensors of the saved state do not belong to any trained parameter")
    for name, target in in_place.items():
        saved[name].copy_to(target)
    restore_optimizer(state.optimizer, of_optimizer, description, state.trained)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, SavedTensor], description: dict, trained: dict[str, nn.Parameter]
) -> None:
    """Restore the tensors optimizer/KEY/NAME and the numbers of `describe_optimizer`. Raises InputError."""
    if len(description["groups"]) != len(optimizer.param_groups):
        raise InputError(
            f"the saved optimizer has {len(description['groups'])} groups, this one {len(optimizer.param_groups)}"
        )
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")  # numbers such as the step
    for name, tensor in saved.items():
        _, key, parameter = name.split("/", 2)
        p = trained[parameter]
        optimizer.state[p][key] = init_optimizer_state(tensor, p, on_device)
        tensor.copy_to(optimizer.state[p][key])
    for group, numbers in zip(optimizer.param_groups, description["groups"]):
        group.update(numbers)
    for parameter, numbers in description["numbers"].items():
        optimizer.state[trained[parameter]].update(numbers)


def init_optimizer_state(saved: SavedTensor, p: nn.Parameter, on_device: bool) -> Tensor:
    """An empty tensor for an optimizer's state of `p`, sharded like `p` if it has the same shape. `on_device`: put
    scalars on the device too. Raises InputError."""
    if saved.shape == tuple(p.shape):
        return torch.empty_like(p, dtype=saved.dtype, requires_grad=False)
    if saved.shape and isinstance(p, DTensor):
        raise InputError(
            f"the saved {saved.name} has the shape {saved.shape}, its parameter {tuple(p.shape)}: it cannot be sharded"
        )
    return torch.empty(saved.shape, dtype=saved.dtype, device=p.device if on_device or saved.shape else "cpu")
