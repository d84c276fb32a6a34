"""A run killed at any system call that changes a file, in saves and exports, resumes to bit-identical weights.

The calls are those that Python reports to an audit hook (open to write, rename, remove, rmdir, mkdir), fsync, and the
middle of every write. What a kill leaves of one process is what lies in its folder at that moment: one run leaves a
copy of it at every call, and from each the same command must go on. Of two ranks, one is really killed. KILLS=all takes
all calls, minutes; else one of each kind.
"""

import hashlib
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import Forked, go, metrics, same, training, weights

import parts.checkpoints.run_log
import parts.checkpoints.weights
import train

SELECT = ["--select", "iterit", "--ratio", "4", "--update-ratio", "1.5", "--epochs", "2", "--batch-size", "4"]
MORE = [*SELECT, "--eval", "tiny", "--save-every", "1"]
ENTRIES = ("os.rename", "os.remove", "os.rmdir", "half")
EVERYTHING = os.environ.get("KILLS") == "all"


def changes(event, args, out):
    """Whether an audited call changes a file or folder in `out`."""
    path = os.fspath(args[0]) if args and isinstance(args[0], str | os.PathLike) else ""
    if event == "open":
        return path.startswith(str(out)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event not in {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}:
        return False
    if not path.startswith(str(out)) and "/" in path:
        return False
    there = "/" not in path or os.path.lexists(path)  # a name alone: rmtree's, in a folder that it has opened
    return there != (event == "os.mkdir")


def watched(out, before, rank="0"):
    """train.py in processes of which `rank` does `before(number, call)` before each call that changes `out`, the first
    being number 1."""

    def main(argv):
        calls, busy, real_fsync = [], [], os.fsync
        real_save, real_line = parts.checkpoints.weights.save_file, parts.checkpoints.run_log.AppendLog.write

        def called(what):
            if os.environ.get("RANK", "0") == rank and not busy:
                calls.append(what)
                busy.append(1)
                before(len(calls), what)
                busy.pop()

        def fsync(handle):
            called("fsync")
            real_fsync(handle)

        def save_file(tensors, path, **more):
            real_save(tensors, path, **more)
            os.truncate(path, os.path.getsize(path) // 2)
            called(f"half {path}")
            real_save(tensors, path, **more)

        def write_bytes(path, content):
            with open(path, "wb", buffering=0) as file:
                file.write(content[: len(content) // 2])
                called(f"half {path}")
                file.write(content[len(content) // 2 :])

        def write_line(log, row):
            size = log.size
            os.write(log.file.fileno(), b'{"torn')
            called(f"half {log.path}")
            log.file.truncate(size)
            real_line(log, row)

        os.fsync, parts.checkpoints.weights.save_file, Path.write_bytes = fsync, save_file, write_bytes
        parts.checkpoints.run_log.AppendLog.write = write_line
        sys.addaudithook(lambda event, args: changes(event, args, out) and called(f"{event} {args[0]}"))
        return train.main(argv)

    return main


def run(out, bench, main=train.main, ranks=None):
    return Forked(main, training(out, *MORE, stages=("tiny",)), bench, ranks).wait()


def kind(call, out):
    """A description of a call, without numbers and without the names of files in temporary folders."""
    return re.sub(r"\d+", "0", re.sub(r"\.tmp/.*", ".tmp/", call.replace(str(out), "")))


def one_of_each(calls, out):
    """(number, call) of the calls to be killed at."""
    numbered = list(enumerate(calls, 1))
    if EVERYTHING:
        return numbered
    first = {kind(call, out): (number, call) for number, call in reversed(numbered) if call.startswith(ENTRIES)}
    return sorted([*first.values(), *(n for n in numbered[::25] if not n[1].startswith(ENTRIES))])


def content(folder):
    """A digest of all files in a folder."""
    paths = sorted(folder.rglob("*"))
    each = [(str(p.relative_to(folder)), p.read_bytes() if p.is_file() else b"") for p in paths]
    return hashlib.sha256(repr(each).encode()).digest()


def left_by_kills(out, bench, folder):
    """Run in `out` to the end. Returns (call, copy of `out` before the call), without equal copies."""

    def before(number, call):
        if out.exists():
            shutil.copytree(out, folder / str(number))
        with open(folder / "calls", "a") as file:
            file.write(f"{call}\n")

    folder.mkdir()
    done = run(out, bench, watched(out, before))
    assert done.returncode == 0, done.stderr
    calls, found = (folder / "calls").read_text().splitlines(), {}
    for number, call in one_of_each(calls, out):
        if (copy := folder / str(number)).exists():
            found.setdefault(content(copy), (call, copy))
    return calls, list(found.values())


@pytest.fixture(scope="module")
def reference(bench):
    (bench / "tiny.jsonl").write_text("".join((bench / "s1.jsonl").read_text().splitlines(keepends=True)[:8]))
    go(bench, bench / "unkilled", *MORE, stages=("tiny",))
    return bench / "unkilled"


@pytest.fixture(scope="module")
def killed(bench, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return left_by_kills(folder / "out", bench, folder / "copies")


def finishes(out, bench, reference, ranks=None):
    """The same command succeeds and leaves exactly the files of a run that was not killed."""
    done = run(out, bench, ranks=ranks)
    assert done.returncode == 0 and "damaged" not in done.stderr, done.stderr
    for name in ("held_out.json", "order.jsonl", "stage1/selection-epoch0.jsonl", "stage1/selection-epoch1.jsonl"):
        if not ranks:
            assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    if not ranks:
        assert same(weights(out, "stage1"), weights(reference, "stage1")) and metrics(out) == metrics(reference)
    left, wanted = ({p.name for p in folder.rglob("*") if "resume" not in p.parts} for folder in (out, reference))
    assert left == wanted and len(list((out / "resume").iterdir())) <= 3  # the next save removes one


def test_a_run_killed_at_any_system_call_resumes(bench, reference, killed, tmp_path):
    calls, copies = killed
    for word, least in {"os.rename": 9, "os.remove": 3, "os.rmdir": 3, "half": 9, "fsync": 9, "open": 9}.items():
        assert sum(call.startswith(word) for call in calls) >= least, word
    for number, (call, copy) in enumerate(copies):
        print(call, copy)  # shown where it fails
        finishes(shutil.copytree(copy, tmp_path / str(number)), bench, reference)


def test_a_run_killed_between_the_renames_of_an_export_and_while_resuming_resumes(bench, reference, killed, tmp_path):
    """The second time a state and an export of the same name exist already."""
    out = tmp_path / "out"
    copy = next(copy for call, copy in killed[1] if call.startswith("os.rename") and call.endswith("/stage1.tmp"))
    shutil.copytree(copy, out)
    assert (out / "stage1.old").exists() and not (out / "stage1").exists()
    calls, copies = left_by_kills(out, bench, tmp_path / "copies")
    assert any(re.match(r"os.rename .*-0002\.tmp", call) for call in calls)
    new = [(call, again) for call, again in copies if EVERYTHING or re.search(r"os.r.*(stage1|/0|selection)", call)]
    assert len(new) >= 5
    for call, again in new:
        print(call, again)
        finishes(again, bench, reference)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_ranks_resume_after_one_of_them_is_killed_at_any_system_call(rank, bench, reference, tmp_path):
    out, traced = tmp_path / "traced", tmp_path / "calls"

    def note(number, call):
        with open(traced, "a") as file:
            file.write(f"{call}\n")

    def kill_at(number):
        return lambda at, call: at == number and os.kill(os.getpid(), signal.SIGKILL)

    done = run(out, bench, watched(out, note, rank), ranks=2)
    assert done.returncode == 0, done.stderr
    chosen = one_of_each(traced.read_text().splitlines(), out)
    for number, call in chosen if EVERYTHING else chosen[:: 7 if rank == "0" else 2]:
        out = tmp_path / str(number)
        ended = run(out, bench, watched(out, kill_at(number), rank), ranks=2)
        assert ended.returncode and "Traceback" not in ended.stderr, (number, call, ended.stderr)
        finishes(out, bench, reference, ranks=2)
