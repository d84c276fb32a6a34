"""--lora: against peft on transformers, resumed, on several ranks; its exports, its memory, its flops."""

import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, Forked, close, go, hf_model, metrics, same, training, weights
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from model import Transformer, init_weights, load_model, save_model
from parts import memory_plan, run_plan
from parts.checkpoints import config as config_file
from parts.checkpoints.config import parse_config
from parts.flops import training_flops
from parts.options import TARGETS, Weights
from parts.text import templates
from parts.text.rows import read_rows
from parts.text.tokenizers import load_tokenizer

LORA = ["--lora", "4", "--eval", "s2"]
SWITCHES = {
    "grouped heads": {},
    "biases": dict(attention_bias=True, mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def reference(bench):
    """A run without kills and signals."""
    go(bench, bench / "lora", *LORA, "--save-every", "1")
    return bench / "lora"


def make_meta_model(rank=4, targets=TARGETS, dtype=torch.float32, **changes):
    raw = hf_model(**changes).config.to_dict()
    return train.build_meta_model(parse_config(raw), Weights("fp32", rank, 2.0 * (rank or 0), targets), dtype)


# ---------------------------------------------------------------- against peft


@pytest.mark.parametrize("switch", SWITCHES)
def test_twenty_steps_equal_pefts_and_peft_loads_the_export(switch, bench, tmp_path):
    peft = pytest.importorskip("peft", reason="the oracle is peft, which is not installed")
    vocab = json.loads((bench / "m" / "config.json").read_text())["vocab_size"]
    folder, out = tmp_path / "m", tmp_path / "o"
    hf_model(vocab_size=vocab, scale=0.05, max_position_embeddings=256, **SWITCHES[switch]).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((bench / "m" / "tokenizer.model").read_bytes())
    more = ["--model", str(folder), "--lora", "4", "--lora-alpha", "12", "--epochs", "5", "--lr", "1e-2", "--clip", "0"]
    go(bench, out, *more, "--schedule", "constant", "--warmup-ratio", "0", stages=("s1",))
    ours = [row["loss"] for row in metrics(out)]
    assert len(ours) == 20 and ours[-1] < ours[0] - 0.3

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config = json.loads((out / "stage1" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 12, sorted(TARGETS))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS))
    with train.init_distributed() as ranks:
        args = train.parse_args(training(tmp_path / "x", *more, stages=("s1",)))
        kinds = (train.dataclass_from_args(kind, args) for kind in (train.Weights, train.Computation))
        model = train.build_model(folder, config_file.read_config(folder), *kinds, ranks)
    initial = {train.hf_name(n): p for n, p in model.named_parameters() if "lora" in n}
    found = dict(theirs.named_parameters())
    for name, p in initial.items():
        found[f"base_model.model.{name}.default.weight"].data.copy_(p.detach())
    learned = [p for p in theirs.parameters() if p.requires_grad]
    assert len(learned) == len(initial)
    adam = torch.optim.AdamW(learned, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    rows, tokenizer = read_rows(bench / "s1.jsonl")[0], load_tokenizer(folder)
    rendered = [templates.render(r.turns, templates.TEMPLATES["phased"], tokenizer) for r in rows]
    batches = [b for e in range(5) for b in data.epoch_batches(None, np.arange(len(rows)), 8, 0, 0, e)]
    for loss_of_ours, batch in zip(ours, batches, strict=True):
        losses = []
        for d in batch:
            tokens, loss_mask = (torch.tensor(x) for x in rendered[d])
            logits = theirs(tokens[None]).logits[0, :-1]
            losses.append(F.cross_entropy(logits[loss_mask[1:]], tokens[1:][loss_mask[1:]], reduction="none"))
        loss = torch.cat(losses).mean()
        assert loss_of_ours == pytest.approx(loss.item(), abs=1e-5)
        loss.backward()
        adam.step()
        adam.zero_grad()

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(base, out / "stage1" / "adapter").eval()
    tokens = torch.tensor(rendered[0][0])
    cu_seqlens, positions = torch.tensor([0, len(tokens)], dtype=torch.int32), torch.arange(len(tokens))
    with torch.no_grad():
        merged = load_model(out / "stage1")(tokens, positions, cu_seqlens)
        assert (merged - load_model(folder)(tokens, positions, cu_seqlens)).abs().max() > 0.1
        torch.testing.assert_close(loaded(tokens[None]).logits[0], merged, atol=1e-4, rtol=0)


def test_adapters_are_initialized_as_in_peft():
    peft = pytest.importorskip("peft", reason="the oracle is peft, which is not installed")
    theirs = peft.get_peft_model(hf_model(), peft.LoraConfig(r=4, target_modules=TARGETS))
    ours = make_meta_model().to_empty(device="cpu")
    ours.init_lora(0)
    for name, p in theirs.named_parameters():
        if "lora" in name:
            mine = next(q for n, q in ours.named_parameters() if train.hf_name(n) in name)
            assert mine.shape == p.shape
            bound = 0 if "lora_B" in name else 1 / math.sqrt(p.shape[1])
            assert p.abs().max() <= bound + 1e-7 and mine.abs().max() <= bound + 1e-7
            assert abs(mine.std() - p.std()) <= 0.2 * p.std()


# ---------------------------------------------------------------- freezing and going on


def test_the_base_weights_do_not_change_and_the_state_has_adapters_only(bench, reference):
    before, after = load_file(bench / "m" / "model.safetensors"), weights(reference)
    for name, w in after.items():
        assert torch.equal(w, before[name]) == (not any(target in name for target in TARGETS)), name
    for state in sorted((reference / "resume").iterdir()):
        tensors = load_file(state / "rank00000.safetensors")
        assert tensors and all(".lora_" in name for name in tensors), list(tensors)
    adapter = load_file(reference / "stage3" / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in adapter.values()) == 5760 and all(t.dtype == torch.float32 for t in adapter.values())
    size = max(sum(p.stat().st_size for p in state.iterdir()) for state in (reference / "resume").iterdir())
    assert 3 * 4 * 5760 < size < 3 * 4 * 5760 + 20_000  # weights and two moments, and names


def test_each_stage_continues_with_the_adapters_of_the_previous_one(reference):
    adapters = [load_file(reference / f"stage{k}" / "adapter" / "adapter_model.safetensors") for k in (1, 2, 3)]
    for before, after in itertools.pairwise(adapters):
        assert not same(before, after)
        assert all((before[n] - after[n]).norm() < 0.5 * after[n].norm() for n in after if "lora_A" in n)
    held_out = [row["eval_loss"] for row in metrics(reference) if "eval_loss" in row]
    assert held_out == sorted(held_out, reverse=True)


@pytest.mark.parametrize(
    "ranks, more",
    [(2, []), (3, []), (None, ["--checkpoint-activations", "--micro-tokens", "90"]), (2, ["--replicas", "2"])],
)
def test_ranks_and_micro_batches_change_no_number(ranks, more, bench, reference, tmp_path):
    go(bench, tmp_path / "o", *LORA, *more, "--save-every", "1", ranks=ranks)
    close(metrics(tmp_path / "o"), metrics(reference))
    for name, w in weights(tmp_path / "o").items():
        torch.testing.assert_close(w, weights(reference)[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("ranks, again", [(None, None), (2, 2), (2, None)])
def test_a_killed_run_resumes_exactly(ranks, again, bench, reference, tmp_path):
    more = [*LORA, "--save-every", "1"]
    run = Forked(train.main, training(tmp_path / "o", *more), bench, ranks)
    run.wait_until((tmp_path / "o" / "resume" / "001-00000002").exists).kill()
    assert "Resuming" in go(bench, tmp_path / "o", *more, ranks=again).stdout
    if ranks is None:
        assert same(weights(tmp_path / "o"), weights(reference)) and metrics(tmp_path / "o") == metrics(reference)
    close(metrics(tmp_path / "o"), metrics(reference))


def test_resuming_with_other_adapters_is_an_error(bench, reference):
    done = go(bench, reference, "--lora", "8", "--eval", "s2", "--save-every", "1", code=2)
    assert "--lora was 4, is 8" in done.stderr and "--lora-alpha was 8.0, is 16.0" in done.stderr
    done = go(bench, reference, *LORA, "--lora-targets", "q_proj", "v_proj", "--save-every", "1", code=2)
    assert "--lora-targets was" in done.stderr


@pytest.mark.parametrize(
    "more, word",
    [
        (["--lora", "4", "--lora-targets", "w_proj"], "w_proj"),
        (["--lora", "0"], "--lora"),
        (["--lora-alpha", "4"], "need --lora"),
        (["--lora", "4", "--lora-alpha", "0"], "must not be 0"),
        (["--lora", "4", "--weights", "bf16"], "cannot be combined"),
    ],
)
def test_wrong_flags_are_errors(more, word, bench, tmp_path):
    assert word in go(bench, tmp_path / "o", *more, code=2).stderr


def test_lora_works_with_selection_replay_samples_and_one_optimizer(bench, tmp_path):
    (tmp_path / "p.txt").write_text("Say ab.\n")
    more = ["--lora", "4", "--lora-targets", "q_proj", "down_proj", "--sample", str(tmp_path / "p.txt")]
    for name, others in {"a": ["--select", "iterit", "--ratio", "12"], "b": ["--replay", "0.5"]}.items():
        more_still = [*others, "--optimizer-state", "keep"]
        one = go(bench, tmp_path / name, *more, *more_still, stages=("s1", "s2"))
        go(bench, tmp_path / f"{name}2", *more, *more_still, stages=("s1", "s2"), ranks=2)
        close(metrics(tmp_path / name), metrics(tmp_path / f"{name}2"))
        assert "'Say ab.' ->" in one.stdout
        adapter = load_file(tmp_path / f"{name}2" / "stage2" / "adapter" / "adapter_model.safetensors")
        assert {n.split(".")[6] for n in adapter} == {"q_proj", "down_proj"}


# ---------------------------------------------------------------- what it keeps and costs


BUILD = """
import sys, torch, train
def peak():  # ru_maxrss begins with the parent's
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
folder, flags = sys.argv[1], sys.argv[2:]
args = train.parse_args(["--model", folder, "--stages", "x", "--lr", "1", "--dtype", "bf16", *flags])
with train.init_distributed() as ranks:
    before = peak()
    kinds = (train.dataclass_from_args(kind, args) for kind in (train.Weights, train.Computation))
    model = train.build_model(train.Path(folder), train.read_config(folder), *kinds, ranks)
    print(peak() - before)
"""


@pytest.mark.parametrize("flags", [["--lora", "16"], ["--weights", "bf16"]])
def test_bf16_weights_are_in_memory_once_while_loading_fp32_files(flags, tmp_path):
    raw = dict(model_type="llama", vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8)
    model = Transformer(parse_config(raw | dict(num_attention_heads=12)))
    init_weights(model, 0)
    save_model(model, tmp_path)
    numbers = sum(p.numel() for p in model.parameters())
    command = [sys.executable, "-c", BUILD, tmp_path, *flags]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 1.9 * numbers < int(out) < 2.9 * numbers, f"{int(out) / numbers:.2f} bytes a parameter"


def test_the_base_has_the_dtype_of_the_computation_and_adapters_fp32():
    for dtype in (torch.bfloat16, torch.float32):
        parameters = dict(make_meta_model(dtype=dtype).named_parameters())
        assert {p.dtype for name, p in parameters.items() if "lora" in name} == {torch.float32}
        assert {p.dtype for name, p in parameters.items() if "lora" not in name} == {dtype}


@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "v_proj"], ["down_proj"], ["o_proj", "gate_proj"]])
def test_flops_equal_torchs_flop_counter(targets):
    model = make_meta_model(4, targets).to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.02)
    trained, config = train.trained_parameters(model), model.config
    assert len(trained) == 2 * 2 * len(targets) and all("lora" in name for name in trained)
    tokens, cu_seqlens = torch.arange(40), torch.arange(41, dtype=torch.int32)
    targets_of = torch.where(tokens % 2 == 0, tokens, -100)
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.zeros(40, dtype=torch.int64), cu_seqlens, targets_of)[0].backward()
    assert all((p.grad is not None) == (name in trained) for name, p in model.named_parameters())
    expected = training_flops(model, set(trained)).of_batch(np.ones(40), 20)
    attended = config.n_heads * config.head_dim * 40
    back = 2 if {"q_proj", "k_proj", "v_proj"} & set(targets) else 1
    recomputed = 2 * back * attended
    if "down_proj" in targets:  # its adapter is computed again with the gating, its own product is not
        recomputed += 2 * 40 * 4 * (config.hidden_dim + config.dim) * config.n_layers
        recomputed -= 2 * 40 * 4 * config.dim * (targets == ["down_proj"])  # B of the lowest block, whose x needs none
    spared = 2 * attended * (targets == ["q_proj", "v_proj"])  # the lowest keys need no gradient; it is counted
    assert counter.get_total_flops() == expected + recomputed - spared


def test_the_memory_plan_of_an_8b_model_fits_a_24_gb_gpu():
    raw = dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    config = parse_config(raw | dict(num_attention_heads=32, num_key_value_heads=8))
    model = train.build_meta_model(config, Weights("fp32", 16, 32.0), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248 + 41_943_040
    plan = memory_plan.memory_plan(
        model, set(train.trained_parameters(model)), 1, torch.bfloat16, 4096, 4096, True, True
    )
    assert 8_030_261_248 * 2 / 2**30 < sum(plan.values()) / 2**30 <= 22, plan


def test_the_plan_names_the_first_variant_that_fits(bench, tmp_path):
    dry = ["--dry-run", "--plan-world-size", "2", "--dtype", "auto"]
    plan = go(bench, tmp_path / "o", *dry, "--plan-gpu", "80").stdout
    assert "with --param-dtype bf16" in plan and "with --lora 16" in plan and "does not fit" not in plan
    needs = {line.split("  ")[0].strip(): float(line.split()[-2]) for line in plan.splitlines()[-3:]}
    assert list(needs) == ["together", "with --param-dtype bf16", "with --lora 16"]
    assert "no way fits" in go(bench, tmp_path / "o", *dry, "--plan-gpu", "0.0001").stdout


def test_a_machines_memory_is_divided_among_the_planned_ranks_once(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run_plan, "free_memory", lambda device: 12 / int(os.environ["LOCAL_WORLD_SIZE"]))
    monkeypatch.setattr(run_plan, "print_memory_plan", lambda planned, free: print(free))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # as torchrun says it
        monkeypatch.setenv(name, "2")
    assert "{2: 6.0, 4: 3.0}" in go(bench, tmp_path / "o", "--dry-run", "--plan-world-size", "4").stdout


def test_a_meta_model_takes_no_memory_and_has_adapters_only_with_lora():
    model = make_meta_model(rank=None)
    assert all(p.is_meta and p.requires_grad for p in train.trained_parameters(model).values())
    assert isinstance(model, Transformer) and len(train.trained_parameters(model)) == len(list(model.parameters()))
