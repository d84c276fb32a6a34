"""Killed at any system call that changes a file while training saves and exports, a run goes on to the same bits.

The calls are those that Python reports to an audit hook (open to write, rename, remove, rmdir, mkdir), fsync, and the
middle of every write. KILLS=all takes every one of them, minutes; else all renames and removals, and a few of the
others.
"""

import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import Forked, go, metrics, same, training, weights

import parts.record
import parts.weights
import train

SELECT = ["--select", "iterit", "--ratio", "4", "--update-ratio", "1.5", "--epochs", "2", "--batch-size", "4"]
MORE = [*SELECT, "--eval", "tiny", "--save-every", "1"]
ENTRIES = {"os.rename", "os.remove", "os.rmdir"}


def changes(event, args, out):
    """Whether an audited call changes something in the folder `out`."""
    path = os.fspath(args[0]) if args and isinstance(args[0], str | os.PathLike) else ""
    if event == "open":
        return path.startswith(str(out)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event not in ENTRIES | {"os.mkdir", "os.truncate"} or not (path.startswith(str(out)) or "/" not in path):
        return False
    there = "/" not in path or os.path.lexists(path)  # a name alone: rmtree's, in a folder that it has opened
    return there != (event == "os.mkdir")


def killed_at(number, out, rank="0", trace=None):
    """train.py in processes of which `rank` is killed before its call `number` (from 1 on) of those that change `out`;
    all calls of that rank go to the file `trace`."""

    def main(argv):
        calls, real_fsync = [], os.fsync
        real_save, real_line = parts.weights.save_file, parts.record.GrowingFile.write

        def called(what):
            if os.environ.get("RANK", "0") == rank:
                calls.append(what)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                if trace:
                    os.write(trace_to, f"{what}\n".encode())

        def fsync(handle):
            called("fsync")
            real_fsync(handle)

        def save_file(tensors, path, **more):
            real_save(tensors, path, **more)
            os.truncate(path, os.path.getsize(path) // 2)  # killed here it is half written
            real_save(tensors, path, **more)

        def write_bytes(path, content):
            with open(path, "wb", buffering=0) as file:
                file.write(content[: len(content) // 2])
                called(f"write {path}")
                file.write(content[len(content) // 2 :])

        def write_line(log, row):
            size = log.size
            os.write(log.file.fileno(), b'{"torn')
            called(f"write {log.path}")
            log.file.truncate(size)
            real_line(log, row)

        trace_to = os.open(trace, os.O_WRONLY | os.O_CREAT) if trace else None
        os.fsync, parts.weights.save_file, Path.write_bytes = fsync, save_file, write_bytes
        parts.record.GrowingFile.write = write_line
        sys.addaudithook(lambda event, args: changes(event, args, out) and called(f"{event} {args[0]}"))
        return train.main(argv)

    return main


def run(out, bench, main=train.main, ranks=None):
    return Forked(main, training(out, *MORE, stages=("tiny",)), bench, ranks).wait()


def calls_of(folder, bench, ranks=None, rank="0"):
    """What a run does that nobody kills."""
    done = run(folder / "traced", bench, killed_at(0, folder / "traced", rank, folder / "trace"), ranks)
    assert done.returncode == 0, done.stderr
    return (folder / "trace").read_text().splitlines()


def to_kill(calls, few):
    """The numbers of the calls to be killed at: all with KILLS=all; else renames and removals and every `few`-th."""
    everything = os.environ.get("KILLS") == "all"
    return [n for n, c in enumerate(calls, 1) if everything or c.split()[0] in ENTRIES or n % few == 0]


@pytest.fixture(scope="module")
def straight(bench):
    (bench / "tiny.jsonl").write_text("".join((bench / "s1.jsonl").read_text().splitlines(keepends=True)[:8]))
    go(bench, bench / "unkilled", *MORE, stages=("tiny",))
    return bench / "unkilled"


def finishes(out, bench, straight, ranks=None):
    """The same command ends well, with everything that a run leaves which nobody killed, and nothing else."""
    done = run(out, bench, ranks=ranks)
    assert done.returncode == 0 and "damaged" not in done.stderr, done.stderr
    for name in ("held_out.json", "order.jsonl", "stage1/selection-epoch0.jsonl", "stage1/selection-epoch1.jsonl"):
        if not ranks:
            assert (out / name).read_bytes() == (straight / name).read_bytes(), name
    if not ranks:
        assert same(weights(out, "stage1"), weights(straight, "stage1")) and metrics(out) == metrics(straight)
    left, wanted = ({p.name for p in folder.rglob("*") if "resume" not in p.parts} for folder in (out, straight))
    assert left == wanted and len(list((out / "resume").iterdir())) <= 3  # the next save removes one


def test_killed_at_any_call_it_goes_on(bench, straight, tmp_path):
    calls = calls_of(tmp_path, bench)
    kinds = Counter(call.split()[0] for call in calls)
    assert min(kinds[k] for k in ("os.rename", "os.remove", "os.rmdir", "os.truncate", "fsync", "write", "open")) >= 3
    for number in to_kill(calls, few=6):
        out = tmp_path / str(number)
        killed = run(out, bench, killed_at(number, out))
        assert killed.returncode == -signal.SIGKILL, (number, calls[number - 1], killed.stderr)
        finishes(out, bench, straight)


def test_killed_between_the_two_renames_of_an_export_and_again_while_it_goes_on(bench, straight, tmp_path):
    """The second time it saves under a name that is taken, and exports over a folder that is there."""
    calls = calls_of(tmp_path, bench)
    between = next(n for n, c in enumerate(calls, 1) if c.startswith("os.rename") and c.endswith("/stage1.tmp"))
    killed, traced = tmp_path / "killed", tmp_path / "traced again"
    assert run(killed, bench, killed_at(between, killed)).returncode == -signal.SIGKILL
    assert (killed / "stage1.old").exists() and not (killed / "stage1").exists()
    shutil.copytree(killed, traced)
    assert run(traced, bench, killed_at(0, traced, trace=tmp_path / "again")).returncode == 0
    for number in to_kill((tmp_path / "again").read_text().splitlines(), few=20):
        out = tmp_path / f"again {number}"
        shutil.copytree(killed, out)
        assert run(out, bench, killed_at(number, out)).returncode == -signal.SIGKILL
        finishes(out, bench, straight)


@pytest.mark.parametrize("rank, few", [("0", 9), ("1", 2)])
def test_one_of_two_ranks_killed_at_any_call_the_other_ends_and_both_go_on(rank, few, bench, straight, tmp_path):
    calls = calls_of(tmp_path, bench, ranks=2, rank=rank)
    numbers = to_kill(calls, few)
    for number in numbers if os.environ.get("KILLS") else numbers[:: 8 if rank == "0" else 4]:
        out = tmp_path / str(number)
        killed = run(out, bench, killed_at(number, out, rank), ranks=2)
        assert killed.returncode and "Traceback" not in killed.stderr, (number, calls[number - 1], killed.stderr)
        finishes(out, bench, straight, ranks=2)
