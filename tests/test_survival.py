"""Robustness of training: locks, signals at any moment, damaged files, changed inputs, error messages."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Forked, children_of, go, hf_model, metrics, run_forked, same, torchrun, training, weights
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

import data
import generate
import model
import score
import train
from parts import cli, decoding, distributed, optimizer
from parts.checkpoints import lock
from parts.checkpoints.run_log import AppendLog
from parts.checkpoints.state import newest_state
from parts.cli import InputError, WorkError
from parts.files import json_values
from parts.text.memmap import StringArray, map_arrays, save_arrays
from parts.text.rows import find_files, read_rows


@pytest.fixture(scope="module")
def reference(bench):
    out = bench / "survives"
    prompts = [json.dumps({"prompt": f"Say {word}."}) for word in ("abc", "zyx", "hello")]
    (bench / "prompts.jsonl").write_text("\n".join(prompts))
    go(bench, out, *MORE)
    return out


MORE = ("--eval", "s2", "s3", "--eval-every", "2", "--sample", "prompts.jsonl")


def order(out):
    return [json.loads(line) for line in (out / "order.jsonl").read_text().splitlines()]


def same_run(out, other):
    assert metrics(out) == metrics(other) and (out / "order.jsonl").read_bytes() == (other / "order.jsonl").read_bytes()
    for stage in ("stage1", "stage2", "stage3"):
        assert same(weights(out, stage), weights(other, stage))
        assert (out / stage / "samples.json").read_bytes() == (other / stage / "samples.json").read_bytes()


# ---------------------------------------------------------------- whose folder it is


@pytest.mark.parametrize("model, stages, out", [
    ("m", ("exp/stage1", "exp/stage2"), "exp"), ("mods/stage1", ("s1",), "mods"), ("m", ("exp/stage1",), "exp/stage1"),
])  # fmt: skip
def test_an_output_never_overwrites_an_input(model, stages, out, bench, tmp_path):
    shutil.copytree(bench / "m", tmp_path / "m")
    shutil.copytree(bench / "m", tmp_path / "mods" / "stage1")
    shutil.copy(bench / "s1.jsonl", tmp_path)
    for k in (1, 2):
        (tmp_path / "exp" / f"stage{k}").mkdir(parents=True)
        shutil.copy(bench / f"s{k}.jsonl", tmp_path / "exp" / f"stage{k}" / "rows.jsonl")
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    argv = ["--model", model, "--stages", *stages, "--out", out, "--lr", "1e-3"]
    done = run_forked(train.main, *argv, cwd=tmp_path, expect=2)
    assert "which is read" in done.stderr
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()) == before


def test_a_folder_with_files_but_no_run_is_an_error(bench, tmp_path):
    (tmp_path / "o" / "stage2").mkdir(parents=True)
    (tmp_path / "o" / "stage2" / "precious").write_text("x")
    assert "it is not the folder of a run" in go(bench, tmp_path / "o", code=2).stderr
    assert (tmp_path / "o" / "stage2" / "precious").exists()


def test_a_second_run_in_a_folder_names_the_holder_of_the_lock(bench, tmp_path):
    run = Forked(train.main, training(tmp_path / "o", "--epochs", "50"), bench)
    run.wait_until((tmp_path / "o" / "metrics.jsonl").exists)
    done = go(bench, tmp_path / "o", "--epochs", "50", code=2)
    assert f"in use by process {run.pids[0]} on" in done.stderr
    run.kill()
    done = Forked(train.main, training(tmp_path / "o", "--epochs", "50"), bench)
    done.wait_until((tmp_path / "o" / "lock").exists)
    done.wait_until(lambda: f"process {done.pids[0]} " in (tmp_path / "o" / "lock").read_text())
    done.send_signal(signal.SIGTERM)
    assert done.wait().returncode == 130


def test_workers_whose_torchrun_was_killed_save_and_end(bench, tmp_path):
    command = [*torchrun(2), *training(tmp_path / "o", "--epochs", "500")]
    run = subprocess.Popen(command, cwd=bench, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and not (tmp_path / "o" / "metrics.jsonl").exists():
        time.sleep(0.02)
    holder = int((tmp_path / "o" / "lock").read_text().split()[1])
    run.kill()
    run.wait()
    end = time.monotonic() + 30
    while os.path.exists(f"/proc/{holder}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{holder}") and newest_state(tmp_path / "o" / "resume")


def test_ranks_with_different_folders_end_with_an_error(bench, tmp_path):
    def elsewhere(argv):
        if os.environ["RANK"] == "1":
            shutil.copytree(bench, tmp_path / "other", ignore=shutil.ignore_patterns("shared_not*"))
            os.chdir(tmp_path / "other")
        return train.main(argv)

    try:
        done = Forked(elsewhere, training("shared_not"), bench, ranks=2).wait()
    finally:
        shutil.rmtree(bench / "shared_not")
    assert done.returncode == 2 and "must be shared by all nodes" in done.stderr


def without_flock(argv):
    """train.py on a file system without flock."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = flock
    return train.main(argv)


@pytest.mark.parametrize("main", [train.main, without_flock])
def test_only_one_process_has_the_lock_and_a_killed_process_loses_it(main, bench, reference, tmp_path):
    out, more = tmp_path / "o", (*MORE, "--save-every", "1")
    run = Forked(main, training(out, *more), bench).wait_until((out / "metrics.jsonl").exists)
    run.send_signal(signal.SIGSTOP)
    done = go(bench, out, *more, main=main, code=2)
    assert f"in use by process {run.pids[0]} on" in done.stderr
    assert ("no flock" in done.stderr) == (main is without_flock)
    run.kill()
    assert (out / "lock").exists()
    go(bench, out, *more, main=main)
    same_run(out, reference)
    assert not (out / "lock").exists()


def test_a_removed_lock_file_lets_no_second_run_in(bench, tmp_path):
    out = tmp_path / "o"
    run = Forked(train.main, training(out, "--epochs", "99"), bench).wait_until((out / "metrics.jsonl").exists)
    (out / "lock").unlink()
    assert "in use by another process" in go(bench, out, "--epochs", "99", code=2).stderr
    run.kill()
    more = ("--epochs", "99", "--save-every", "1")
    run = Forked(without_flock, training(tmp_path / "p", *more), bench)
    run.wait_until((tmp_path / "p" / "metrics.jsonl").exists)
    (tmp_path / "p" / "lock").unlink()
    done = run.wait()
    assert done.returncode == 1 and "was removed or replaced" in done.stderr and "Traceback" not in done.stderr


def test_a_lock_is_only_broken_if_its_process_has_certainly_ended(tmp_path, monkeypatch):
    me = lock.describe_process()
    ended = os.fork() or os._exit(0)
    os.waitpid(ended, 0)
    host, boot, namespace = lock.machine_id().split(" ")
    line, place, ticks = me.splitlines()
    dead = line.replace(str(os.getpid()), str(ended))
    for holder, wanted in {
        me: False,
        "\n".join([dead, place, ticks]): True,
        "\n".join([line, place, "17"]): True,  # its number belongs to another process by now
        "\n".join([dead, f"elsewhere {boot} {namespace}", ticks]): False,
        "\n".join([line, f"{host} earlier {namespace}", ticks]): True,
        "\n".join([dead, f"{host} {boot} pid:[1]", ticks]): False,
        "somebody": False,
        "": True,
    }.items():
        assert lock.process_has_ended(holder) == wanted, holder
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / "lock").write_text("\n".join([dead, f"elsewhere {boot} {namespace}", ticks]))
    with pytest.raises(InputError, match=f"process {ended} .* remove"), lock.lock_folder(tmp_path):
        pass


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_any_other_error_of_flock_means_that_it_is_not_supported(error, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.lock_folder(tmp_path / "o") as held:
        held.check()
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"), lock.lock_folder(tmp_path / "o"):
            pass
    assert not (tmp_path / "o").exists() and "no flock" in capsys.readouterr().err


def test_the_lock_file_is_locked_if_folders_cannot_be(tmp_path, monkeypatch):
    """As on NFS, which locks only files that are open for writing."""
    real = fcntl.flock

    def flock(handle, how):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.lock_folder(tmp_path / "o") as held:
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"), lock.lock_folder(tmp_path / "o"):
            pass
        held.check()
        held.path.unlink()
        with pytest.raises(WorkError, match="removed or replaced"):
            held.check()


def test_a_folder_that_is_recreated_before_flock_is_not_locked(tmp_path, monkeypatch):
    """Otherwise this process would lock a removed folder, and another process the new folder of the same name."""
    real = fcntl.flock

    def flock(handle, how):
        (tmp_path / "o").rmdir()
        (tmp_path / "o").mkdir()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match="in use by another process"), lock.lock_folder(tmp_path / "o"):
        pass


def test_without_flock_the_process_that_creates_the_lock_file_first_has_the_lock(tmp_path, monkeypatch):
    real, other = lock.read_holder, lock.describe_process()

    def read_holder(path):
        holder = real(path)
        if holder is None:
            path.write_text(other)
        return holder

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "read_holder", read_holder)
    with pytest.raises(InputError, match=f"in use by process {os.getpid()}"), lock.lock_folder(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == other


def test_a_mistyped_stage_leaves_no_files(bench, tmp_path):
    assert "no such file" in go(bench, tmp_path / "o", stages=("s1", "s9"), code=2).stderr
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------- the start on several ranks


def test_torchrun_killed_during_the_start_leaves_no_worker(bench, tmp_path):
    out = tmp_path / "o"
    run = subprocess.Popen(
        [*torchrun(2), *training(out)], cwd=bench, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    workers = []
    while run.poll() is None and not (out / "lock").exists() and not (len(workers) == 2 and all(map(listens, workers))):
        workers = [pid for pid in children_of(run.pid) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    run.kill()
    run.wait()
    end = time.monotonic() + 8  # less than what the ranks wait for one another at least
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    left = [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    go(bench, out, stages=("s1",))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's end on Linux only")
def test_a_worker_ends_if_its_parent_is_killed_while_it_imports_torch(tmp_path):
    """Here importing torch takes a minute."""
    (tmp_path / "torch.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path('tmp').write_text(str(os.getpid()))\n"
        "os.rename('tmp', 'importing')\n"
        "time.sleep(60)\n"
    )
    program = "import subprocess, sys; subprocess.run([sys.executable, sys.argv[1]])"
    env = os.environ | {"RANK": "0", "PYTHONPATH": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", program, ROOT / "train.py"], cwd=tmp_path, env=env)
    while parent.poll() is None and not (tmp_path / "importing").exists():
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    worker, end = int((tmp_path / "importing").read_text()), time.monotonic() + 10
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < end:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{worker}")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's end on Linux only")
def test_the_parent_death_signal_is_sent_if_the_parent_has_ended_already(tmp_path):
    def main(argv):
        if os.fork():
            time.sleep(60)  # until its child kills it
        parent, libc = os.getppid(), cli.ctypes.CDLL(None)

        class Late:
            def prctl(self, *arguments):
                os.kill(parent, signal.SIGKILL)
                while os.getppid() == parent:
                    time.sleep(0.01)
                return libc.prctl(*arguments)

        cli.ctypes.CDLL = lambda name: Late()
        signal.signal(signal.SIGTERM, lambda *_: (tmp_path / "told").touch())
        cli.set_parent_death_signal(signal.SIGTERM)
        (tmp_path / "done").touch()
        os._exit(0)

    Forked(main, [], tmp_path).wait(timeout=30)
    end = time.monotonic() + 10
    while not (tmp_path / "done").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / "done").exists() and (tmp_path / "told").exists()


def listens(pid):
    """Whether a process handles SIGTERM. Ours does before it imports torch, which takes seconds."""
    with contextlib.suppress(OSError):
        caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(caught, 16) >> signal.SIGTERM - 1 & 1)


def test_waiting_for_a_missing_rank_has_a_time_limit(bench, tmp_path):
    def main(argv):
        distributed.RENDEZVOUS_SECONDS = 0.3
        return train.main(argv) if os.environ["RANK"] == "0" else 0

    done = Forked(main, training(tmp_path / "o"), bench, ranks=2).wait(timeout=30)
    assert done.returncode == 1 and "did not all start" in done.stderr and not (tmp_path / "o").exists()


def test_a_worker_without_its_torchrun_gives_up_soon(bench, tmp_path):
    def main(argv):
        distributed.TORCHRUN_REPLY_SECONDS = 0.1
        return train.main(argv)

    with socket.socket() as s:  # nobody listens there
        s.bind(("127.0.0.1", 0))
        env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(s.getsockname()[1])}
        done = Forked(main, training(tmp_path / "o"), bench, ranks=2, env=env).wait(timeout=30)
    assert done.returncode == 1 and "the ranks cannot connect" in done.stderr and not (tmp_path / "o").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_a_rank_while_the_first_rank_reads(rank, bench, tmp_path):
    def main(argv):
        def read(*_, **__):
            (tmp_path / "reading").touch()
            while True:
                time.sleep(0.01)

        train.read_data = read
        return train.main(argv)

    run = Forked(main, training(tmp_path / "o"), bench, ranks=2).wait_until((tmp_path / "reading").exists)
    os.kill(run.pids[rank], signal.SIGTERM)
    end = time.monotonic() + 10
    while run.pids[rank] not in run.codes and time.monotonic() < end:
        run.poll()
        time.sleep(0.01)
    code = run.codes.get(run.pids[rank])
    run.kill()
    assert code == 130 and "Traceback" not in run.wait().stderr


def test_a_wrong_stage_ends_all_ranks_with_one_message(bench, tmp_path):
    done = go(bench, tmp_path / "o", stages=("s1", "s9"), code=2, ranks=2)
    assert done.stderr.count("no such file") == 1


# ---------------------------------------------------------------- signals at any moment


def interrupted(module, name, at, number=signal.SIGTERM):
    """train.py, which gets a signal when the function is called the at-th time."""

    def main(argv):
        real, calls = getattr(module, name), []

        def called(*a, **kw):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), number)
            return real(*a, **kw)

        setattr(module, name, called)
        return train.main(argv)

    return main


@pytest.mark.parametrize("module, name, at, number", [
    (train, "held_out_loss", 3, signal.SIGTERM), (decoding, "decode_step", 5, signal.SIGTERM),
    (train, "export", 2, signal.SIGTERM), (optimizer, "gradient_norm", 2, signal.SIGTERM),
    (train, "held_out_loss", 3, signal.SIGKILL), (decoding, "decode_step", 5, signal.SIGKILL),
    (train, "batch_gradients", 6, signal.SIGKILL),
])  # fmt: skip
def test_a_run_stopped_anywhere_resumes_to_the_same_files(module, name, at, number, bench, reference, tmp_path):
    code = 130 if number == signal.SIGTERM else -number
    done = Forked(
        interrupted(module, name, at, number), training(tmp_path / "o", *MORE, "--save-every", "1"), bench
    ).wait()
    assert done.returncode == code, done.stderr
    go(bench, tmp_path / "o", *MORE, "--save-every", "1")
    same_run(tmp_path / "o", reference)
    assert not list((tmp_path / "o").rglob("*.tmp")) and not (tmp_path / "o" / "cache").exists()


@pytest.mark.parametrize("module, name, at", [
    (distributed, "fully_shard", 1), (_fsdp_param.FSDPParam, "_init_sharded_param", 3), (model, "load_weights", 1),
    (FSDPParamGroup, "unshard", 2), (train, "held_out_loss", 1), (FSDPParamGroup, "post_backward", 9),
])  # fmt: skip
@pytest.mark.parametrize("together", [True, False])
def test_a_signal_inside_fsdp_ends_both_ranks_without_a_traceback(module, name, at, together, bench, tmp_path):
    def main(argv):
        if together or os.environ["RANK"] == "1":
            return interrupted(module, name, at)(argv)
        return train.main(argv)

    done = Forked(main, training(tmp_path / "o", "--eval", "s2"), bench, ranks=2).wait(timeout=60)
    began = name in ("held_out_loss", "post_backward")  # training, which either rank can have saved
    assert done.returncode in ((130,) if together or began else (1, 130)), done.stderr
    assert "Traceback" not in done.stderr and "gloo" not in done.stderr, done.stderr
    assert "interrupted" in done.stderr or not (together or began)
    assert ("state saved" in done.stderr) == began == bool(newest_state(tmp_path / "o" / "resume"))


@pytest.mark.parametrize("number, since", [
    (signal.SIGTERM, "lock"), (signal.SIGINT, "lock"), (signal.SIGTERM, "metrics.jsonl"),
    (signal.SIGUSR1, "metrics.jsonl"), (signal.SIGINT, "metrics.jsonl"),
])  # fmt: skip
def test_many_signals_change_neither_the_exit_code_nor_the_result(number, since, bench, reference, tmp_path):
    """After training has begun, the state is saved, except after a second Ctrl-C, which ends the run at once."""
    run = Forked(train.main, training(tmp_path / "o", *MORE), bench).wait_until((tmp_path / "o" / since).exists)
    while run.poll() is None:
        run.send_signal(number)
        time.sleep(0.01)
    done = run.wait()
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    if since == "metrics.jsonl" and number != signal.SIGINT:
        assert "state saved" in done.stderr
    go(bench, tmp_path / "o", *MORE)
    same_run(tmp_path / "o", reference)


def test_a_signal_after_the_work_does_not_change_the_exit_code(bench, tmp_path):
    def late(main):
        def main_then_signal(argv):
            code = main(argv)
            os.kill(os.getpid(), signal.SIGTERM)
            return code

        return main_then_signal

    go(bench, tmp_path / "o", stages=("s1",), main=late(interrupted(train, "batch_gradients", 2)), code=130)
    go(bench, tmp_path / "o", stages=("s1",), main=late(train.main))


def test_a_second_ctrl_c_ends_a_run_immediately(bench, tmp_path):
    def main(argv):
        def busy(*_):
            (tmp_path / "busy").touch()
            while True:
                time.sleep(0.01)

        train.batch_gradients = busy
        return train.main(argv)

    run = Forked(main, training(tmp_path / "o"), bench).wait_until((tmp_path / "busy").exists)
    run.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    done = run.wait(timeout=10)
    assert done.returncode == 130 and "the last saved state is kept" in done.stderr


def test_a_rank_that_is_paused_does_not_change_the_result(bench, tmp_path):
    go(bench, tmp_path / "a", "--eval", "s2", ranks=2)
    run = Forked(train.main, training(tmp_path / "b", "--eval", "s2"), bench, ranks=2)
    run.wait_until((tmp_path / "b" / "metrics.jsonl").exists)
    for pid in run.pids:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.3)
        os.kill(pid, signal.SIGCONT)
    assert run.wait().returncode == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_jump_of_the_clock_does_not_change_the_result(bench, reference, tmp_path):
    def main(argv):
        real, rng = time.time, np.random.default_rng(0)
        time.time = lambda: real() + float(rng.normal()) * 1e7
        return train.main(argv)

    go(bench, tmp_path / "o", *MORE, main=main)
    same_run(tmp_path / "o", reference)
    assert len(list((tmp_path / "o" / "resume").iterdir())) == 2  # and nothing was saved for being late


def test_a_run_killed_while_tokenizing_leaves_no_process_and_resumes(bench, tmp_path):
    rows = [json.dumps({"id": i, "data": [f"Say {i}.", "abc" * 9]}) for i in range(5000)]
    (tmp_path / "many.jsonl").write_text("\n".join(rows))
    more = ("--batch-size", "5000", "--max-len", "16", "--micro-tokens", "90000")

    run = Forked(train.main, training(tmp_path / "o", *more, stages=(str(tmp_path / "many"),)), bench)
    run.wait_until(lambda: len(children_of(run.pids[0])) > 1)
    pids = children_of(run.pids[0])
    run.kill()
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    assert pids and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    go(bench, tmp_path / "o", stages=("s1",))


def test_a_run_with_full_paths_resumes_from_another_working_directory(bench, tmp_path):
    arguments = ["--model", bench / "m", "--stages", bench / "s1", "--out", tmp_path / "o", "--dtype", "fp32"]
    arguments += ["--lr", "5e-4", "--save-every", "1"]
    Forked(interrupted(train, "batch_gradients", 2, signal.SIGKILL), arguments, bench).wait()
    assert "Resuming" in run_forked(train.main, *arguments, cwd=tmp_path).stdout
    arguments[1] = "m"
    done = run_forked(train.main, *arguments, cwd=tmp_path, expect=2)
    assert "config.json not found" in done.stderr


def test_runs_with_repeated_ids_and_repeated_stages_resume(bench, tmp_path):
    rows = [json.dumps({"id": "same", "data": [f"Say {i}.", chr(97 + i) * 3]}) for i in range(20)]
    (tmp_path / "twice.jsonl").write_text("\n".join(rows))
    more, stages = ("--select", "iterit", "--ratio", "8", "--epochs", "2", "--save-every", "1"), ("twice", "twice")
    arguments = [
        "--model",
        bench / "m",
        "--stages",
        *stages,
        "--dtype",
        "fp32",
        "--batch-size",
        "4",
        "--lr",
        "5e-3",
        *more,
    ]
    run_forked(train.main, *arguments, "--out", "a", cwd=tmp_path)
    for at in (2, 4):
        Forked(interrupted(train, "batch_gradients", at, signal.SIGKILL), [*arguments, "--out", "b"], tmp_path).wait()
    run_forked(train.main, *arguments, "--out", "b", cwd=tmp_path)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") and order(tmp_path / "a") == order(tmp_path / "b")
    assert [r["stage"] for r in order(tmp_path / "a")] == ["stage1"] * 4 + ["stage2"] * 4
    assert same(weights(tmp_path / "a", "stage2"), weights(tmp_path / "b", "stage2"))


@pytest.mark.parametrize("ranks", [None, 2])
def test_killed_ifd_scoring_resumes_to_the_same_scores_on_any_number_of_ranks(ranks, bench, tmp_path):
    def arguments(out):
        return ["ifd", "s1.jsonl", "--model", "m", "--out", tmp_path / out, "--dtype", "fp32"]

    def main(argv, at=0):
        score.CHUNK, real, calls = 4, score.SELECTION_SCORE.measure, []

        def measured(*a):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a)

        score.SELECTION_SCORE.measure = measured
        return score.main(argv)

    run_forked(score.main, *arguments("a"), cwd=bench)
    killed = Forked(lambda argv: main(argv, 3), arguments("b"), bench, ranks).wait()
    assert killed.returncode and "Traceback" not in killed.stderr
    kept = 4 * 2 * (ranks or 1)
    done = run_forked(main, *arguments("b"), cwd=bench, ranks=ranks)
    assert f"{30 - kept} scored now" in done.stdout
    a, b = ([json.loads(line)["ifd"] for line in (tmp_path / f).read_text().splitlines()] for f in "ab")
    assert a == pytest.approx(b, rel=1e-5) and len(a) == 30


def test_a_signal_while_tokenizing_ends_with_130(bench, tmp_path):
    done = go(bench, tmp_path / "o", main=interrupted(data, "tokenize_files", 1), code=130)
    assert "nothing to save yet" in done.stderr


def test_a_log_contains_only_complete_writes(tmp_path):
    log = AppendLog(tmp_path / "l", 0)
    log.write({"a": 1})
    size = log.size
    log.write({"b": 2})
    again = AppendLog(tmp_path / "l", size)
    assert again.size == size
    again.write({"c": 3})
    third = AppendLog(tmp_path / "l", again.size)
    third.write({"d": 4})
    assert (tmp_path / "l").read_text() == '{"a": 1}\n{"c": 3}\n{"d": 4}\n'
    short = AppendLog(tmp_path / "l", 10**6)
    short.write({"e": 5})
    assert b"\0" not in (tmp_path / "l").read_bytes() and short.size == (tmp_path / "l").stat().st_size


def test_the_log_is_complete_after_a_signal_while_scoring_and_a_kill(bench, tmp_path):
    more = ("--select", "iterit", "--ratio", "8", "--epochs", "2", "--save-every", "1")
    go(bench, tmp_path / "a", *more, stages=("s1", "s2"))
    main = interrupted(score.SELECTION_SCORE, "measure", 2)
    go(bench, tmp_path / "b", *more, stages=("s1", "s2"), main=main, code=130)
    killed = interrupted(train, "batch_gradients", 2, signal.SIGKILL)
    assert Forked(killed, training(tmp_path / "b", *more, stages=("s1", "s2")), bench).wait().returncode == -9
    go(bench, tmp_path / "b", *more, stages=("s1", "s2"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") and order(tmp_path / "a") == order(tmp_path / "b")


def test_remains_of_killed_saves_are_removed(bench, reference, tmp_path):
    (reference / "resume" / "000-00000009.tmp").mkdir()
    (reference / "resume" / "000-00000009.tmp" / "rank00000.safetensors").write_bytes(b"x" * 1000)
    go(bench, reference, *MORE)
    assert not list((reference / "resume").glob("*.tmp"))


# ---------------------------------------------------------------- changed and damaged


def test_resuming_with_changed_inputs_is_an_error(bench, tmp_path):
    for name in ("m", "many"):
        shutil.copytree(bench / "m", tmp_path / name) if name == "m" else (tmp_path / name).mkdir()
    for k in (1, 2):
        shutil.copy(bench / f"s{k}.jsonl", tmp_path / "many" / f"{k}.jsonl")
    more = ("--save-every", "1")
    arguments = training(tmp_path / "o", *more, stages=("many",))
    Forked(interrupted(train, "batch_gradients", 3, signal.SIGKILL), arguments, tmp_path).wait()
    (tmp_path / "many" / "2.jsonl").rename(tmp_path / "gone.jsonl")
    assert "2.jsonl was used and is not given now" in run_forked(train.main, *arguments, cwd=tmp_path, expect=2).stderr
    (tmp_path / "gone.jsonl").rename(tmp_path / "many" / "2.jsonl")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert "tokenizer_config.json is new" in run_forked(train.main, *arguments, cwd=tmp_path, expect=2).stderr
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    done = run_forked(train.main, *arguments, cwd=tmp_path, expect=2)
    assert "are not those with which the run" in done.stderr
    shutil.copy(bench / "m" / "model.safetensors", file)
    run_forked(train.main, *arguments, cwd=tmp_path)


def test_a_flipped_bit_of_a_state_is_detected(bench, tmp_path):
    arguments = training(tmp_path / "o", "--save-every", "1", stages=("s1",))
    Forked(interrupted(train, "batch_gradients", 3, signal.SIGKILL), arguments, bench).wait()
    newest = newest_state(tmp_path / "o" / "resume")
    content, rng = (newest / "state.json").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (newest / "state.json").write_bytes(damaged)
        found = newest_state(tmp_path / "o" / "resume")
        if found == newest:  # what was flipped says nothing, such as white space
            assert json.loads(damaged) == json.loads(content)
    (newest / "state.json").write_bytes(content)
    assert newest_state(tmp_path / "o" / "resume") == newest


def test_a_flipped_bit_of_a_cache_is_detected(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "c.arrays"
    arrays = {"a": rng.integers(0, 99, 50).astype(np.int32), "b": rng.random(30) < 0.5, "none": np.zeros(0, np.int64)}
    save_arrays(path, arrays, {"x": ["é", 1]})
    found, rest = map_arrays(path)
    assert rest == {"x": ["é", 1]} and all(
        (found[k] == v).all() and found[k].dtype == v.dtype for k, v in arrays.items()
    )
    content = path.read_bytes()
    for _ in range(500):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        assert map_arrays(path) is None or bytes(damaged).split(b" ", 1)[1] == content.split(b" ", 1)[1]
    path.write_bytes(content[:-3])
    assert map_arrays(path) is None and map_arrays(tmp_path / "nowhere") is None
    texts = StringArray.of(["", "é", "x" * 9])
    assert list(texts) == ["", "é", "x" * 9] and len(texts) == 3


def test_text_after_an_array_and_ambiguous_file_names_are_errors(tmp_path):
    for text, line in (('[{"a": 1}]\n[{"b": 2}]', 2), ('[{"a": 1}] garbage', 1), ("[]\n\n x", 3)):
        last = list(json_values(text))[-1]
        assert last[0] == line and isinstance(last[1], InputError) and "after the JSON array" in str(last[1])
    assert len(list(json_values('[{"a": 1}]\n \n'))) == 1
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "x.jsonl").write_text("{}")
    assert find_files("both", [tmp_path]) == [tmp_path / "both" / "x.jsonl"]
    (tmp_path / "both.jsonl").write_text("{}")
    with pytest.raises(InputError, match="both is ambiguous"):
        find_files("both", [tmp_path])
    assert find_files("both.jsonl", [tmp_path]) == [tmp_path / "both.jsonl"]


@pytest.mark.parametrize("row", [
    {"data": ["q", "a"], "score": int("9" * 400)}, {"data": ["q", "a"], "id": "\ud800"},
    {"data": ["q", "a"], "\ud800": 1},
    {"data": ["q\ud800", "a"]}, {"data": ["q", "a"], "score": True},
])  # fmt: skip
def test_odd_rows_are_reported_with_file_and_line(row, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"data": ["q", "a"]}\n' + json.dumps(row) + "\n")
    rows, bad = read_rows(tmp_path / "r.jsonl")
    assert len(rows) == 1 and len(bad) == 1 and "r.jsonl:2" in bad[0]


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize("more, word", [
    (["--seed", "-1"], "at least 0"), (["--select", "static", "--ratio", "inf"], "whole number"),
    (["--select", "iterit", "--update-ratio", "inf"], "finite"), (["--skip-nonfinite", "-2"], "at least 0"),
])  # fmt: skip
def test_wrong_numbers_are_errors_before_anything_is_done(more, word, bench, tmp_path):
    assert word in go(bench, tmp_path / "o", *more, code=2).stderr


def test_the_learning_rate_is_required_except_for_the_demo(bench, tmp_path):
    done = run_forked(train.main, "--model", "m", "--stages", "s1", "--out", tmp_path, cwd=bench, expect=2)
    assert "--lr is required" in done.stderr and "5e-6" in done.stderr and "2e-5" in done.stderr
    assert train.parse_args([]).lr == [5e-4] * 3
    assert train.parse_args(["--model", str(ROOT / "demo" / "model"), "--stages", "s1"]).lr == [5e-4]


def test_weights_with_nan_are_named_before_the_first_step(bench, tmp_path):
    shutil.copytree(bench / "m", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    for ranks in (None, 2):
        done = Forked(train.main, training(tmp_path / "o", "--model", tmp_path / "m"), bench, ranks).wait()
        assert done.returncode == 2 and "contain NaN" in done.stderr and "layers.1.mlp.up_proj.weight" in done.stderr
    assert not (tmp_path / "o" / "metrics.jsonl").exists()


def test_a_step_that_is_not_finite_is_reported_once(bench, tmp_path):
    done = Forked(train.main, training(tmp_path / "o", "--lr", "1e30"), bench, ranks=2).wait()
    assert done.returncode == 1 and done.stderr.count("The rows of this batch") == 1


def test_training_works_without_git_and_with_odd_file_names(bench, tmp_path):
    odd = os.fsdecode(b"r\xff.jsonl")
    shutil.copy(bench / "s1.jsonl", tmp_path / odd)

    def in_a_latin_1_terminal(argv):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="latin-1", errors="strict")
        return train.main(argv)

    more = ("--select", "static", "--ratio", "9")
    arguments = training(tmp_path / "o", *more, stages=(str(tmp_path / odd),))
    run_forked(in_a_latin_1_terminal, *arguments, cwd=bench, env={"PATH": str(tmp_path)})
    assert json.loads((tmp_path / "o" / "run.json").read_text())["git_commit"] is None


def test_a_sample_prompt_outside_the_vocabulary_is_an_error_at_the_start(bench, tmp_path):
    shutil.copytree(bench / "m", tmp_path / "m")
    hf_model(vocab_size=280, scale=0.05).save_pretrained(tmp_path / "m")
    (tmp_path / "s.jsonl").write_text('{"data": ["a", "b"]}\n' * 4)
    (tmp_path / "p.txt").write_text("zzz\n")
    more = ["--model", str(tmp_path / "m"), "--sample", str(tmp_path / "p.txt")]
    done = go(bench, tmp_path / "o", *more, stages=(str(tmp_path / "s"),), code=2)
    assert "do not belong together" in done.stderr and not (tmp_path / "o" / "resume").exists()


def test_torchrun_prints_the_error_message_last(bench, tmp_path):
    command = [*torchrun(1), *training(tmp_path / "o", "--lr", "1e30")]
    done = subprocess.run(command, cwd=bench, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr[done.stderr.index("Root Cause") :]
    assert "the loss is" in last and "--skip-nonfinite N skips" in last and "Traceback" not in last


# ---------------------------------------------------------------- the plan


def test_a_dry_run_writes_nothing_and_checks_everything(bench, reference, tmp_path):
    before = sorted((p, p.stat().st_mtime_ns) for p in reference.rglob("*"))
    assert "--seed was 0, is 1" in go(bench, reference, *MORE, "--seed", "1", "--dry-run", code=2).stderr
    go(bench, reference, *MORE, "--dry-run")
    assert sorted((p, p.stat().st_mtime_ns) for p in reference.rglob("*")) == before
    go(bench, tmp_path / "o", "--dry-run")
    assert not (tmp_path / "o").exists()
    done = go(bench, tmp_path / "o", "--dry-run", "--replicas", "3", "--plan-world-size", "8", code=2)
    assert "--replicas 3 does not divide 8 ranks" in done.stderr
    shutil.copytree(bench / "m", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "norm" not in k}, tmp_path / "m" / "model.safetensors")
    assert (
        "missing: model.norm.weight"
        in go(bench, tmp_path / "o", "--model", str(tmp_path / "m"), "--dry-run", code=2).stderr
    )


def test_distributing_many_long_documents_takes_subquadratic_time():
    lengths = np.random.default_rng(0).integers(1100, 2048, 4000)
    started = time.perf_counter()
    dealt = data.micro_batches(np.arange(4000), lengths, 2, 2048)
    assert time.perf_counter() - started < 1
    assert sorted(d for rank in dealt for part in rank for d in part) == list(range(4000))


# ---------------------------------------------------------------- what a run tells


def test_order_jsonl_lists_the_rows_of_every_step(bench, reference):
    rows = [row for row in metrics(reference) if "loss" in row]
    seen = order(reference)
    assert [(r["stage"], r["step"], len(r["ids"])) for r in seen] == [
        (r["stage"], r["step"], r["documents"]) for r in rows
    ]
    for k, size in ((1, 30), (2, 22), (3, 26)):
        ids = [i for r in seen if r["stage"] == f"stage{k}" for i in r["ids"]]
        assert sorted(ids) == sorted(f"s{k}-{i}" for i in range(size))
    expected = data.epoch_batches(None, np.arange(30), 8, 0, 0, 0)
    assert [r["ids"] for r in seen[:4]] == [[f"s1-{d}" for d in batch] for batch in expected]


def test_the_held_out_matrix_is_printed_and_written(bench, reference):
    found = json.loads((reference / "held_out.json").read_text())
    assert found["stages"] == ["start", "stage1", "stage2", "stage3"] and found["losses"].keys() == {"s2", "s3"}
    last = {(r["eval"], r["stage"]): r["eval_loss"] for r in metrics(reference) if "eval_loss" in r}
    for name, losses in found["losses"].items():
        assert losses == [last[name, stage] for stage in found["stages"]]


def test_samples_are_the_answers_of_the_export_on_any_number_of_ranks(bench, reference, tmp_path):
    go(bench, tmp_path / "o", *MORE, ranks=2)
    for stage in ("stage1", "stage3"):
        rows = json.loads((tmp_path / "o" / stage / "samples.json").read_text())
        assert [r["instruction"] for r in rows] == ["Say abc.", "Say zyx.", "Say hello."]
        assert rows == json.loads((reference / stage / "samples.json").read_text())
        out = tmp_path / f"{stage}.json"
        flags = ["--out", out, "--max-new-tokens", "256", "--dtype", "fp32"]
        run_forked(generate.main, "--model", tmp_path / "o" / stage, "--prompts", bench / "prompts.jsonl", *flags)
        assert [r["output"] for r in json.loads(out.read_text())] == [r["output"] for r in rows]


@pytest.mark.parametrize(
    "stored, said", [(torch.bfloat16, None), (torch.float32, "bfloat16"), (torch.float16, "float32")]
)
def test_exported_weights_have_the_dtype_of_the_model_folder(stored, said, bench, tmp_path):
    shutil.copytree(bench / "m", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({k: v.to(stored) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")} | (
        {"torch_dtype": said} if said else {}
    )
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    go(bench, tmp_path / "o", "--model", str(tmp_path / "m"), stages=("s1",))
    assert {w.dtype for w in weights(tmp_path / "o", "stage1").values()} == {stored}
