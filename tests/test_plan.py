"""The memory plan: its flags, and its numbers against measured ones."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, go

import train
from parts import memory_plan
from parts.checkpoints.config import parse_config
from parts.options import Weights


def totals(plan: str) -> dict[str, float]:
    """{heading, as "16 ranks": GiB together} of a printed plan."""
    lines = plan.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("GiB per rank"))
    headings = [part.strip() for part in lines[start].split("  ") if part.strip()][1:]
    together = next(line for line in lines[start:] if line.startswith("together"))
    return dict(zip(headings, map(float, together.replace(",", "").split()[1:]), strict=True))


# ---------------------------------------------------------------- for how many ranks


def test_replicas_can_be_planned_for_more_ranks_than_this_machine_has(bench, tmp_path):
    dry = ["--dry-run", "--plan-gpu", "80", "--plan-world-size", "16"]
    assert totals(go(bench, tmp_path / "o", *dry).stdout).keys() == {"1 rank", "16 ranks"}
    assert totals(go(bench, tmp_path / "o", *dry, "--replicas", "2").stdout).keys() == {"16 ranks"}
    done = go(bench, tmp_path / "o", "--dry-run", "--replicas", "2", code=2)
    assert "does not divide 1 rank: --plan-world-size N plans for N ranks" in done.stderr
    assert "does not divide 15 ranks" in go(bench, tmp_path / "o", *dry[:-1], "15", "--replicas", "2", code=2).stderr


@pytest.mark.parametrize("flags", [["--plan-gpu", "80"], ["--plan-gpu", "0"], ["--plan-world-size", "2"]])
def test_planning_flags_need_a_dry_run(flags, bench, tmp_path):
    assert "need --dry-run" in go(bench, tmp_path / "o", *flags, code=2).stderr
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------- on GPUs

SAMPLE = [  # model/layers/ranks/replicas/way/checkpointing of activations
    "7b/32/8/1/fp32/ckpt",  # all of it
    "7b/4/16/2/fp32/keep",
    "7b/2/2/2/fp32/ckpt",  # as many replicas as ranks
    "7b/4/1/1/fp32/keep",
    "8b/4/8/1/bf16/keep",
    "8b/4/16/2/lora/ckpt",
    "70b/2/16/2/bf16/ckpt",
]


def test_the_plan_is_near_the_peak_of_a_step_with_fake_tensors():
    """The tensors of a real step are counted, but not workspaces of kernels or fragmentation; see fake_cuda.py."""
    command = [sys.executable, ROOT / "tests" / "fake_cuda.py", *SAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [line[0] for line in lines] == SAMPLE, done.stderr
    for case, tracked, planned, *_ in lines:
        assert 0.9 * float(tracked) < float(planned) < 1.1 * float(tracked), (case, tracked, planned)


def shape_of(vocab, dim, hidden, layers, heads, kv_heads):
    sizes = {"vocab_size": vocab, "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return parse_config({"model_type": "llama", **sizes, **heads})


SHAPES = {
    "TinyLlama-1.1B": shape_of(32000, 2048, 5632, 22, 32, 4),
    "Llama-2-7B": shape_of(32000, 4096, 11008, 32, 32, 32),
    "Llama-3-8B": shape_of(128256, 4096, 14336, 32, 32, 8),
    "Llama-2-70B": shape_of(32000, 8192, 28672, 80, 64, 8),
}


def test_the_documented_table_of_gpus_equals_the_plan():
    texts = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    tables = re.findall(r"^(\| GiB on each GPU \|.*)\n\| --- .*\n((?:\|.*\n)+)", texts, re.MULTILINE)
    assert len(tables) == 1
    columns = [c.strip() for c in tables[0][0].strip("|").split("|")][1:]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in tables[0][1].splitlines()]
    assert [row[0] for row in rows] == list(SHAPES)
    for name, *figures in rows:
        for column, figure in zip(columns, figures, strict=True):
            world = int(re.search(r"(\d+) GPU", column)[1])
            replicas = int((re.search(r"--replicas (\d+)", column) or [0, 1])[1])
            weights = Weights(lora=16, lora_alpha=32.0) if "--lora 16" in column else Weights()
            weights = Weights("bf16") if "--param-dtype bf16" in column else weights
            model = train.build_meta_model(SHAPES[name], weights, torch.bfloat16)
            how = (world // replicas, torch.bfloat16, 4096, 4096, True, True, replicas)
            plan = memory_plan.memory_plan(model, set(train.trained_parameters(model)), *how)
            assert figure == f"{sum(plan.values()) / 2**30:,.1f}", (name, column)


# ---------------------------------------------------------------- on a CPU


PEAK_OF = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak_of(command) -> int:
    """Peak memory of a program, in bytes. A small process starts it, because ru_maxrss begins with its parent's."""
    done = subprocess.run([sys.executable, "-c", PEAK_OF, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("flags", [["--dtype", "fp32"], ["--dtype", "fp32", "--lora", "16"]])
def test_the_plan_is_at_most_15_percent_above_the_measured_peak(flags, small_smollm2, shared, tmp_path):
    """At most 15 % above: the same command's peak varies by 9 % from run to run, with the allocator's gaps. Two steps:
    in the first, the moments are not there yet."""
    rows = json.loads((shared / "alpaca_random_9k.json").read_text(encoding="utf-8"))[:16]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, ROOT / "train.py", "--model", small_smollm2, "--stages", tmp_path / "rows.jsonl"]
    command += ["--batch-size", "8", "--lr", "1e-4", "--out", tmp_path / "o", *flags]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    (planned,) = totals(done.stdout).values()
    assert 1.0 <= planned * 2**30 / peak_of(command) <= 1.15
