"""How many answers are generated together: with little memory, with limits of cgroups; the answers are the same."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, hf_model, run_forked
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import collect, make

import generate
from generate import Options, plan_slots
from parts import decoding
from parts.cli import WorkError
from parts.kv_cache import MAX_SLOTS, MEMORY_FRACTION, plan_groups, slot_bytes, working_bytes
from parts.memory import cgroup_memory

MiB = 2**20


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 32000, n).tolist() for n in lengths]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=300), st.integers(1, 60_000), st.booleans(), st.booleans())
def test_every_prompt_is_in_one_group_whose_cache_is_large_enough_and_fits(needs, memory, windowed, divided):
    sliding_window = 700 if windowed else None
    groups = plan_groups(needs, lambda capacity: min(MAX_SLOTS, max(1, memory // capacity)), sliding_window, divided)
    order = [i for g in groups for i in g.members]
    assert sorted(order) == list(range(len(needs)))
    assert [needs[i] for i in order] == sorted(needs, reverse=True)
    for g in groups:
        longest = max(needs[i] for i in g.members)
        assert g.capacity == min(longest, sliding_window or longest) and 1 <= g.slots <= min(MAX_SLOTS, len(g.members))
        assert g.slots * g.capacity <= max(memory, g.capacity)
    assert divided or len(groups) == 1
    if divided and not windowed:  # none of the many short ones waits for a slot that is made for the longest
        for g in groups:
            short = [i for i in g.members if needs[i] <= g.capacity / 2]
            assert not short or g.slots == len(g.members) or g.slots == MAX_SLOTS


def test_little_memory_is_used_and_not_exceeded(tmp_path):
    _, model = make(tmp_path, "gqa")
    prompts = prompts_of([20] * 200 + [150] * 20 + [800] * 3)
    limits, options = [100] * len(prompts), Options()
    needed = working_bytes(model, 800, 800, torch.float32)
    one = slot_bytes(model.config, 900, torch.float32, sampled=False)
    free = int((needed + 2.5 * one) / MEMORY_FRACTION)
    groups = plan_slots(model, prompts, limits, options, free)
    assert groups[0].slots == 2 and groups[0].members == [220, 221, 222]
    assert [g.capacity for g in groups] == [900, 250, 120] and groups[0].slots < groups[1].slots < groups[2].slots
    for g in groups:
        size = slot_bytes(model.config, g.capacity, torch.float32, sampled=False)
        assert g.slots * size + needed <= MEMORY_FRACTION * free
        assert (g.slots + 1) * size + needed > MEMORY_FRACTION * free or g.slots == len(g.members)
    sampled, greedy = (plan_slots(model, prompts, limits, Options(temperature=x), 3 * free) for x in (1.0, 0.0))
    assert sampled[0].slots < greedy[0].slots  # sorting takes more than finding the likeliest
    assert [g.slots for g in plan_slots(model, prompts, limits, options, 2**40)] == [MAX_SLOTS]
    assert [g.slots for g in plan_slots(model, prompts, limits, Options(batch_size=7), 0)] == [7]
    assert len(plan_slots(model, prompts, limits, Options(compile=True), free)) == 1  # one shape
    with pytest.raises(WorkError, match="--max-new-tokens"):
        plan_slots(model, prompts, limits, options, int(needed / MEMORY_FRACTION))


@pytest.mark.parametrize("kind", ["gqa", "mistral"])
def test_answers_do_not_depend_on_the_memory_or_on_the_order_of_prompts(kind, tmp_path, monkeypatch):
    _, model = make(tmp_path, kind)  # mistral: a window of 24, and prompts that are longer and shorter
    lengths = [5, 300, 9, 24, 23, 25, 60, 7, 150, 12, 40, 3]
    prompts, limits = prompts_of(lengths), [40, 40, 8, 17, 30, 9, 21, 40, 5, 33, 12, 26]  # so that slots get free apart
    wanted, reasons = collect(model, prompts, limits=limits, batch_size=1)
    needed = working_bytes(model, 512, 300, torch.float32)
    for slots in (1.5, 3.5):
        one = slot_bytes(model.config, 24 if kind == "mistral" else 340, torch.float32, sampled=False)
        monkeypatch.setattr(
            decoding, "free_memory", lambda device, n=slots, one=one: int((needed + n * one) / MEMORY_FRACTION)
        )
        groups = plan_slots(model, prompts, limits, Options())
        assert groups[0].slots == int(slots) and (kind == "mistral") == (len(groups) == 1)
        assert collect(model, prompts, limits=limits) == (wanted, reasons)
    shuffled = np.random.default_rng(1).permutation(len(prompts))
    again, _ = collect(model, [prompts[i] for i in shuffled], limits=[limits[i] for i in shuffled])
    assert [again[list(shuffled).index(i)] for i in range(len(prompts))] == wanted


def test_a_windowed_cache_is_as_long_as_the_window_and_gives_the_same_answers(tmp_path):
    hf, model = make(tmp_path, "mistral")
    prompts = prompts_of([60, 24, 10])
    assert plan_slots(model, prompts, [50] * 3, Options())[0].capacity == 24
    with torch.no_grad():
        for p, ours in zip(prompts, collect(model, prompts, n=50)[0]):
            theirs = hf.generate(torch.tensor([p]), max_new_tokens=50, do_sample=False, pad_token_id=0)[0, len(p) :]
            assert ours == theirs.tolist()


def test_prefill_writes_each_row_of_the_cache_once(tmp_path, monkeypatch):
    """On a GPU the order of writes to the same row is undefined."""
    _, model = make(tmp_path, "mistral")
    written = []

    def keep(within, rows, kept, places, q, k, v):
        written.append([divmod(place, 24) for place in places.tolist()])
        return within(q, k, v)

    monkeypatch.setattr(decoding, "prefill_attention", keep)
    cache = decoding.KVCache(model.config, 3, 24, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        decoding.prefill(model, cache, prompts_of([60, 24, 10]), [2, 0, 1])
    assert sorted(written[0]) == sorted(
        {(2, i) for i in range(24)} | {(0, i) for i in range(24)} | {(1, i) for i in range(10)}
    )


# ---------------------------------------------------------------- what is free, what is taken


def test_limits_of_cgroups_of_both_versions_are_read(tmp_path):
    def group(folder, limit, used, spare, names):
        folder.mkdir(parents=True)
        for name, value in zip(names[:2], (limit, used)):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {spare}\n")

    v2 = ("memory.max", "memory.current", "inactive_file")
    group(tmp_path / "v2" / "job", 1000 * MiB, 600 * MiB, 100 * MiB, v2)
    group(tmp_path / "v2" / "job" / "step", "max", 5, 5, v2)
    (tmp_path / "own").write_text("0::/job/step\n")
    assert cgroup_memory(tmp_path / "v2", tmp_path / "own") == [500 * MiB]
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group(tmp_path / "v1" / "memory" / "a", 300 * MiB, 400 * MiB, 0, v1)
    (tmp_path / "own").write_text("5:cpu:/x\n4:memory:/a\n")
    assert cgroup_memory(tmp_path / "v1", tmp_path / "own") == [0.0]
    assert cgroup_memory(tmp_path / "v1", tmp_path / "absent") == []


DECODING = """
import json, re, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import generate
from generate import Options, plan_slots
from model import load_model
from parts.kv_cache import slot_bytes, working_bytes

def memory(key):  # VmRSS: now, VmHWM: at most since clear_refs
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

prompts = [[i + 1] * n for i, n in enumerate([700] * 8 + [90] * 56)]
options = Options(max_new_tokens=12, temperature={temperature})
model = load_model({folder!r})
list(generate.decode(model, prompts[-2:], {{-1}}, options))  # what torch itself loads at first
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
groups = plan_slots(model, prompts, [12] * 64, options)
list(generate.decode(model, prompts, {{-1}}, options, groups=groups))
slot = max(g.slots * slot_bytes(model.config, g.capacity, torch.float32, {temperature} > 0) for g in groups)
print(json.dumps([memory("VmHWM") - before, slot + working_bytes(model, 700, 700, torch.float32)]))
"""


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_estimate_covers_the_measured_memory_of_decoding(temperature, tmp_path):
    """In a new process: a fork would reuse memory that its parent has freed."""
    sizes = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8)
    hf_model(vocab_size=32000, max_position_embeddings=2048, scale=0.02, **sizes).save_pretrained(tmp_path)
    code = DECODING.format(root=str(ROOT), temperature=temperature, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken, estimate = json.loads(done.stdout)
    assert 0.4 * estimate < taken <= estimate / MEMORY_FRACTION, (taken / MiB, estimate / MiB)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_change(error, tmp_path, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(decoding, "KVCache", full)
    (tmp_path / "p.txt").write_text("".join(f"Start with {i}, add 1 to it.\n" for i in range(6)))
    files = ["--prompts", tmp_path / "p.txt", "--out", tmp_path / "a.json"]
    arguments = ["--model", ROOT / "demo" / "model", *files]
    done = run_forked(generate.main, *arguments, "--batch-size", "4", expect=1)
    assert "--batch-size 2" in done.stderr
    done = run_forked(generate.main, *arguments, expect=1)
    assert "--batch-size 3" in done.stderr and "6 slots" in done.stdout
    monkeypatch.setattr(generate, "load_model", full)
    assert "--server" in run_forked(generate.main, *arguments, expect=1).stderr


def test_generate_prints_its_groups_of_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"Start with {i}, add 1 to it.\n" for i in range(200)))
    files = ["--prompts", tmp_path / "p.txt", "--out", tmp_path / "a.json", "--max-new-tokens", "3"]
    done = run_forked(generate.main, "--model", ROOT / "demo" / "model", *files)
    assert f"{MAX_SLOTS} slots" in done.stdout and math.isfinite(len(json.loads((tmp_path / "a.json").read_text())))
