"""The records of a run: run.json, which describes it, and JSONL logs."""

import hashlib
import json
import math
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from parts.cli import InputError, WorkError, format_list, print_table, progress
from parts.files import fsync_path, read_json_object

LOG_FILES = ["metrics.jsonl", "order.jsonl", "held_out.json"]


def describe_run(arguments: dict, versions: dict[str, str], hashes: dict[str, str]) -> dict:
    """The content of run.json; `hashes`: of all files read."""
    root = Path(__file__).resolve().parents[2]
    files = sorted([*root.glob("*.py"), *(root / "parts").rglob("*.py")])
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:
        git = ""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
    versions = {"python": platform.python_version(), **versions}
    code = {"git_commit": git or None, "code": code.hexdigest()[:16], "versions": versions}
    return {"arguments": arguments, "hashes": hashes, **code}


def check_same_run(path: Path, run: dict, resumable: set[str], defaults: dict) -> dict:
    """The content of run.json at `path`, {} if there is none. Raises InputError if it belongs to a run with other
    arguments (except `resumable` ones) or other data.

    An argument that is missing in an older run.json had its default value.
    """
    before = read_json_object(path)
    if not before:
        return before
    old = {k: str(v) if isinstance(v, Path) else v for k, v in defaults.items()} | before.get("arguments", {})
    differs = [
        f"--{k.replace('_', '-')} was {old.get(k)!r}, is {v!r}"
        for k, v in run["arguments"].items()
        if k not in resumable and old.get(k) != v
    ]
    old_hashes, new_hashes = before.get("hashes", {}), run["hashes"]
    changed = [f for f in new_hashes if old_hashes.get(f) != new_hashes[f]]
    differs += [f"{f} has changed" if f in old_hashes else f"{f} is new" for f in changed]
    differs += [f"{f} was used and is not given now" for f in old_hashes if f not in new_hashes]
    if differs:
        raise InputError(
            format_list(f"{path.parent} contains a run with other settings:", differs)
            + "\nRun the same command to resume, or give another --out to start a new run."
        )
    for what in ("code", "versions"):
        if before.get(what) != run[what]:
            print(f"{path.parent}: the {what} changed since this run began; continuing", file=sys.stderr)
    return before


def print_stages(stages: list, chosen: bool) -> None:
    """Print a table of train.py's stages; `chosen`: an epoch uses a selection of the rows."""
    table = []
    for s in stages:
        numbers = [s.mixed_in, s.documents.lengths.sum(), s.documents.target_counts.sum(), s.documents.lengths.max()]
        numbers += [s.documents.truncated, s.documents.truncated_tokens, s.epochs, s.batch_size, s.steps]
        rows = f"{s.rows:,} of {len(s.documents):,}" if chosen else f"{len(s.documents):,}"
        table.append((f"{s.name} {s.source}", rows, *(f"{n:,}" for n in numbers), f"{s.lr:g}"))
    what = "stage, rows, mixed in, tokens, supervised, longest, truncated, tokens cut, epochs, batch, steps, lr"
    print_table(tuple(what.split(", ")), table)


def check_foreign_files(out: Path, written: list[str], inputs: list[Path]) -> None:
    """Raise InputError if out/NAME of something `written` would overwrite an input, or exists but does not belong to a
    run."""
    for path in inputs:
        for target in (out, *(out / name for name in written)):
            if target.resolve() == path.resolve() or (target.resolve() in path.resolve().parents and target != out):
                raise InputError(f"{target} would overwrite {path}, which is read: give another --out")
    existing = [name for name in written if (out / name).exists()]
    if existing and not (out / "run.json").exists():
        raise InputError(
            f"{out} contains {', '.join(existing)} but no run.json, so it is not the folder of a run: "
            "give another --out"
        )


class AppendLog:
    """A JSONL file that rows are appended to; after a kill it is truncated to the size in the saved state."""

    def __init__(self, path: Path, size: int):
        self.path = path
        self.file = open(path, "ab")  # noqa: SIM115 (open until the run ends)
        if self.file.tell() < size:
            print(f"{path} is shorter than recorded in the saved state: lines are missing", file=sys.stderr)
        else:
            self.file.truncate(size)
            self.file.seek(size)

    def write(self, row: dict) -> None:
        """Raises WorkError."""
        try:
            self.file.write((json.dumps(row) + "\n").encode())
            self.file.flush()
        except OSError as e:
            advice = "free disk space and run the same command again"
            raise WorkError(f"{self.path} could not be written ({e.strerror}): {advice}") from None

    def sync(self) -> int:
        """Sync the file to disk; returns its size."""
        fsync_path(self.path)
        return self.size

    @property
    def size(self) -> int:
        return self.file.tell()


def duration(seconds: float) -> str:
    """A readable time: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class RunLog:
    """metrics.jsonl and order.jsonl in the folder `out`, the progress bar, and the summary of a stage. Does nothing if
    `out` is None (on all ranks except rank 0)."""

    def __init__(self, out: Path | None, metrics_size: int, order_size: int):
        self.metrics = AppendLog(out / "metrics.jsonl", metrics_size) if out else None
        self.order = AppendLog(out / "order.jsonl", order_size) if out else None

    def close(self) -> None:
        for log in (self.metrics, self.order) if self.metrics else ():
            with suppress(OSError):  # of a full disk, which `write` has reported
                log.file.close()

    def sync(self) -> tuple[int, int]:
        """Sync both files to disk; returns their sizes."""
        return (self.metrics.sync(), self.order.sync()) if self.metrics else (0, 0)

    def write(self, row: dict) -> None:
        if self.metrics:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self.metrics.write(finite)

    def begin(self, stage: str, steps: int, first_step: int, tokens_left: int) -> None:
        """`tokens_left`: tokens still to train on, in this stage and the later ones."""
        self.losses, self.tokens, self.seconds, self.skipped, self.tokens_left = [], 0, 0.0, 0, tokens_left
        self.bar = progress(steps, stage, "step", initial=first_step, shown=self.metrics is not None, left=False)

    def step(self, row: dict, ids: list[str], seconds: float, skipped: bool) -> None:
        """Log a row with at least stage, step, epoch, loss and tokens, and the ids of the step's rows. Skipped steps
        are not part of the means."""
        speed = row["tokens"] / max(seconds, 1e-6)
        more = {"seconds": round(seconds, 4), "tokens_per_second": round(speed, 1)}
        self.write(row | more | ({"skipped": True} if skipped else {}))
        if self.order:
            self.order.write({key: row[key] for key in ("stage", "step", "epoch")} | {"ids": ids})
        self.losses += [] if skipped else [row["loss"]]
        self.skipped += skipped
        self.tokens, self.seconds = self.tokens + row["tokens"], self.seconds + seconds
        seconds_left = max(0, self.tokens_left - self.tokens) * self.seconds / self.tokens
        in_words = f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s, {duration(seconds_left)} left in all"
        self.bar.set_postfix_str(in_words, refresh=False)
        self.bar.update()

    def end(self) -> str:
        """A summary of what the stage did in this process."""
        self.bar.close()
        skipped = f", {self.skipped} of them skipped" if self.skipped else ""
        if not self.losses:
            return f"no step taken{skipped}" if skipped else "nothing left to train"
        few = max(1, min(10, len(self.losses) // 2))
        first, last = sum(self.losses[:few]) / few, sum(self.losses[-few:]) / few
        speed = self.tokens / max(self.seconds, 1e-6)
        return f"loss {first:.4f} -> {last:.4f}{skipped}, {self.seconds:.1f} s, {speed:,.0f} tokens/s"

    def info(self, text: str) -> None:
        """Print a line on stdout, above the progress bar."""
        if self.metrics and sys.stderr.isatty():
            tqdm.write(text)
        elif self.metrics:
            print(text, flush=True)
