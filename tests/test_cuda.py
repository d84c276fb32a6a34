"""What only a GPU can show. Skips without one; under four minutes on an H100.

Programs run in processes of their own: CUDA does not survive a fork. The same command with the GPU hidden is the
reference of each. Those that do not wait for each other run side by side: most of their time is the start.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import ROOT, close, hf_model, metrics, same, training, weights

from parts.kernels import VARLEN_DTYPES, varlen_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# ---------------------------------------------------------------- attention


def reference(q, k, v, lengths, sliding_window):
    """(T, H, hd) in fp64, by an explicit mask a document."""
    group, out = q.shape[1] // k.shape[1], []
    q, k, v = (x.double() for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        at = torch.arange(len(a), device=q.device)
        back = at[:, None] - at
        hidden = (back < 0) | (back >= (sliding_window or len(a)))
        scores = torch.einsum("qhd,khd->hqk", a, b) / a.shape[2] ** 0.5
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), c))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sliding_window", [None, 1, 7, 64])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 64), (8, 2, 128), (6, 1, 32)])
def test_attention_equals_the_reference_forward_and_backward(dtype, sliding_window, heads, kv_heads, head_dim):
    lengths = [1, 37, 2, 129, 64, 301]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(n):
        made = torch.randn(sum(lengths), n, head_dim, device="cuda", generator=generator)
        return made.to(dtype).requires_grad_()

    q, k, v, up = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads).detach()
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    ours = varlen_attention(q, k, v, cu_seqlens, max(lengths), sliding_window)
    theirs = reference(q, k, v, lengths, sliding_window)
    tolerance, least = 2e-2 if dtype == torch.bfloat16 else 1e-5, 0.1  # with a window of 1 no key changes anything
    assert ours.dtype == dtype and (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    ours = torch.autograd.grad(ours, (q, k, v), up)
    for mine, true in zip(ours, torch.autograd.grad(theirs, (q, k, v), up.double())):
        assert (mine - true).abs().max() <= 2 * tolerance * max(least, true.abs().max())
    assert torch.bfloat16 in VARLEN_DTYPES


# ---------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def bench(bench, tmp_path_factory):
    """The same with heads of 16 dimensions: those of 12 that the other tests have are nothing for varlen_attn. `wild`
    has larger weights: it answers every prompt otherwise."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("s1.jsonl", "s2.jsonl", "s3.jsonl"):
        (folder / name).write_bytes((bench / name).read_bytes())
    vocab = json.loads((bench / "m" / "config.json").read_text())["vocab_size"]
    for name, scale in (("m", 0.05), ("wild", 0.3)):
        model = hf_model(vocab_size=vocab, scale=scale, max_position_embeddings=256, hidden_size=64)
        assert model.config.head_dim == 16
        model.save_pretrained(folder / name)
        (folder / name / "tokenizer.model").write_bytes((bench / "m" / "tokenizer.model").read_bytes())
    return folder


def at_once(*calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [run.result() for run in [pool.submit(call) for call in calls]]


def program(name, *argv, cwd, cpu=False, expect=0, code=None, launch=()):
    """One of the four programs, or `code` around it, to its end."""
    what = ["-c", code] if code else [*launch, ROOT / f"{name}.py"]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    command = [sys.executable, *map(str, what), *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == expect and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done


TWENTY = ("--epochs", "2")  # stages of 30, 22 and 26 rows: 4 + 3 + 4 steps of 8 an epoch, together 22


@pytest.fixture(scope="module")
def runs(bench, tmp_path_factory):
    """fp32 and bf16 runs of 22 steps on the GPU, and of fp32 on the CPU: their folders by name."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = (("cuda", (), False), ("cpu", (), True), ("bf16", ("--dtype", "bf16"), False))
    at_once(*(partial(program, "train", *training(folder / n, *TWENTY, *m), cwd=bench, cpu=c) for n, m, c in kinds))
    return folder


def test_losses_and_gradient_norms_equal_the_cpus_in_fp32(runs):
    assert len(metrics(runs / "cuda")) == 22
    close(metrics(runs / "cuda"), metrics(runs / "cpu"))


def test_bf16_follows_fp32(runs):
    for ours, theirs in zip(metrics(runs / "bf16"), metrics(runs / "cuda"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)


@pytest.mark.parametrize(
    "more", [("--dtype", "bf16"), ("--weights", "bf16"), ("--lora", "4"), ("--select", "iterit", "--ratio", "20")]
)
def test_a_killed_run_resumes_exactly(more, bench, tmp_path):
    argv = (*TWENTY, *more, "--deterministic", "--save-every", "1")

    def killed():
        command = [str(a) for a in (sys.executable, ROOT / "train.py", *training(tmp_path / "killed", *argv))]
        run = subprocess.Popen(command, cwd=bench, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and not (tmp_path / "killed" / "resume" / "000-00000003").exists():
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert "Resuming" in program("train", *training(tmp_path / "killed", *argv), cwd=bench).stdout

    at_once(partial(program, "train", *training(tmp_path / "whole", *argv), cwd=bench), killed)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


SHARDED = """
import sys
from dataclasses import replace
sys.path.insert(0, {root!r})
import train
build = train.build_model
train.build_model = lambda *a: build(*a[:-1], replace(a[-1], world_size=2))  # wraps as if there were two
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("more", [(), ("--lora", "4"), ("--weights", "bf16"), ("--checkpoint-activations",)])
def test_fsdp_on_nccl_computes_the_same(more, runs, bench, tmp_path):
    """On one rank; of what shards over several, the CPU's tests know."""
    plain, code = runs / "cuda", SHARDED.format(root=str(ROOT))
    calls = [partial(program, "train", *training(tmp_path / "sharded", *TWENTY, *more), cwd=bench, code=code)]
    if more and more != ("--checkpoint-activations",):
        plain = tmp_path / "plain"
        calls.append(partial(program, "train", *training(plain, *TWENTY, *more), cwd=bench))
    at_once(*calls)
    # With weights in bf16 a word's gradients are rounded before they are added up, or after.
    close(metrics(tmp_path / "sharded"), metrics(plain), within=1e-2 if "--weights" in more else 1e-4)


@pytest.mark.parametrize("more", [("--lora", "4"), ("--compile",), ("--checkpoint-activations", "--compile")])
def test_flags_learn_what_they_learn_on_a_cpu(more, bench, tmp_path):
    kinds = (("cuda", more, False), ("cpu", [f for f in more if f != "--compile"], True))
    at_once(*(partial(program, "train", *training(tmp_path / n, *TWENTY, *m), cwd=bench, cpu=c) for n, m, c in kinds))
    close(metrics(tmp_path / "cuda"), metrics(tmp_path / "cpu"))


def test_weights_in_bf16_follow_fp32(runs, bench, tmp_path):
    program("train", *training(tmp_path / "o", *TWENTY, "--weights", "bf16"), cwd=bench)
    for ours, theirs in zip(metrics(tmp_path / "o"), metrics(runs / "cuda"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=3e-2)


def test_torchrun_on_one_gpu(runs, bench, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    program("train", *training(tmp_path / "o", *TWENTY), cwd=bench, launch=launch)
    close(metrics(tmp_path / "o"), metrics(runs / "cuda"))


# ---------------------------------------------------------------- scores and answers


@pytest.mark.parametrize("dtype, within", [("fp32", 1e-4), ("bf16", 5e-2)])
def test_ifd_equals_the_cpus(dtype, within, bench, tmp_path):
    defaults, kinds = ("score", "ifd", "s3.jsonl", "--model", "m"), (("cuda", dtype, False), ("cpu", "fp32", True))
    outs = [tmp_path / f"{name}.jsonl" for name in ("cuda", "cpu")]
    at_once(
        *(partial(program, *defaults, "--out", o, "--dtype", k[1], cwd=bench, cpu=k[2]) for o, k in zip(outs, kinds))
    )
    found = [[json.loads(line)["ifd"] for line in out.read_text().splitlines()] for out in outs]
    assert found[0] == pytest.approx(found[1], rel=within)


@pytest.mark.parametrize("more", [(), ("--compile",), ("--batch-size", "3"), ("--batch-size", "3", "--compile")])
def test_greedy_answers_equal_the_cpus(more, bench, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Say {'abcdefghij'[: 1 + i % 10]} and {i}.\n" for i in range(40)))
    defaults = ("generate", "--model", "wild", "--prompts", prompts, "--dtype", "fp32")
    defaults, outs = (*defaults, "--max-new-tokens", "30"), [tmp_path / "cuda.json", tmp_path / "cpu.json"]
    at_once(
        partial(program, *defaults, "--out", outs[0], *more, cwd=bench),
        partial(program, *defaults, "--out", outs[1], cwd=bench, cpu=True),
    )
    answers = [[row["output"] for row in json.loads(out.read_text())] for out in outs]
    assert answers[0] == answers[1] and len(set(answers[0])) > 5


def test_samples_and_held_out_losses_while_it_trains(bench, tmp_path):
    (tmp_path / "prompts.txt").write_text("Say abc.\nSay xyz.\n")
    more, kinds = ("--sample", tmp_path / "prompts.txt", "--eval", "s1", "s2"), (("cuda", False), ("cpu", True))
    at_once(*(partial(program, "train", *training(tmp_path / n, *more), cwd=bench, cpu=c) for n, c in kinds))
    ours, theirs = ((tmp_path / name / "stage3" / "samples.json").read_text() for name in ("cuda", "cpu"))
    assert json.loads(ours) == json.loads(theirs)
    close(metrics(tmp_path / "cuda"), metrics(tmp_path / "cpu"))


# ---------------------------------------------------------------- memory

LITTLE = """
import sys
sys.path.insert(0, {root!r})
import torch
import {name}
torch.cuda.set_per_process_memory_fraction({share})
sys.exit({name}.main(sys.argv[1:]))
"""


def test_out_of_memory_says_what_to_change(bench, tmp_path):
    share = 128 * 2**20 / torch.cuda.get_device_properties(0).total_memory  # of which cuBLAS alone takes 32
    long = tmp_path / "long.jsonl"
    row = {"instruction": "Say it.", "output": "abcdefgh" * 24}
    long.write_text("".join(json.dumps(row) + "\n" for _ in range(400)))
    argv = ("--model", "m", "--stages", long, "--out", tmp_path / "o", "--lr", "1e-3", "--batch-size", "400")
    code = LITTLE.format(root=str(ROOT), name="train", share=share)
    done = program("train", *argv, "--micro-tokens", "1000000", cwd=bench, code=code, expect=1)
    assert "out of" in done.stderr and "--micro-tokens" in done.stderr and "--checkpoint-activations" in done.stderr
    (tmp_path / "prompts.txt").write_text("".join(f"Say {i}.\n" for i in range(3000)))
    argv = ("--model", "m", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "a.json", "--batch-size", "3000")
    code = LITTLE.format(root=str(ROOT), name="generate", share=share)
    done = program("generate", *argv, cwd=bench, code=code, expect=1)
    assert "out of" in done.stderr and "--batch-size" in done.stderr
