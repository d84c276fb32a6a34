"""Export of a stage: a folder written by all ranks that appears atomically."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from parts.cli import WorkError
from parts.files import atomic_write, fsync_path, remove_path, replace_folder, temporary_path


def write_folder(
    folder: Path, rank: int, write: Callable[[Path], None], write_on_first_rank: Callable[[Path], None]
) -> None:
    """Call `write` (on every rank) and `write_on_first_rank` with a new folder, which then replaces `folder` atomically
    (see `replace_folder`). Raises WorkError."""
    new = temporary_path(folder)
    try:
        if rank == 0:
            remove_path(new)
        dist.barrier()
        write(new)
        if rank == 0:
            write_on_first_rank(new)
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
