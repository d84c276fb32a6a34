"""Export of a stage: a folder written by all ranks that appears atomically."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from parts.cli import WorkError
from parts.files import atomic_write, fsync_path, remove_path, replace_folder, temporary_path


@contextmanager
def atomic_folder(folder: Path, rank: int) -> Iterator[Path]:
    """A context manager that yields the path of a new folder, which replaces `folder` atomically when the block ends
    (see `replace_folder`). Every rank must enter it. Raises WorkError."""
    new = temporary_path(folder)
    try:
        if rank == 0:
            remove_path(new)
        dist.barrier()
        yield new
        if rank == 0:
            fsync_path(new, inside=True)
            replace_folder(folder)
    except (OSError, WorkError) as e:
        if rank == 0:
            with suppress(OSError):
                remove_path(new)
        raise WorkError(
            f"{folder} could not be written ({e}): free disk space and run the same command again"
        ) from None
    dist.barrier()


def write_stage_metadata(folder: Path, new: Path, template: str, samples: list[dict] | None) -> None:
    """Write template.json and samples.json (if there are samples), and copy the selections that are in `folder`."""
    atomic_write(new / "template.json", json.dumps({"template": template}))
    if samples is not None:
        atomic_write(new / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False))
    for path in folder.glob("selection-epoch*.jsonl"):
        shutil.copyfile(path, new / path.name)
