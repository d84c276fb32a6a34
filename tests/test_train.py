"""train.py against a plain loop with transformers; killed at random moments; with wrong arguments and data."""

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import Forked, close, go, hf_model, metrics, run_forked, same, torchrun, training, weights
from safetensors.torch import load_file, save_file

import data
import model
import train
from parts import memory_plan
from parts.checkpoints import config as config_file
from parts.checkpoints import run_log
from parts.files import sha256
from parts.flops import training_flops
from parts.text import templates
from parts.text.rows import messages_of, read_rows
from parts.text.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def reference(bench):
    """A run without kills and signals."""
    out = bench / "reference"
    go(bench, out, "--eval", "s2")
    return out


# ---------------------------------------------------------------- is it the right computation


def test_training_equals_a_plain_loop_with_transformers(bench, tmp_path):
    go(
        bench,
        tmp_path / "o",
        "--micro-tokens",
        "100",
        "--lr",
        "3e-3",
        "1e-3",
        "--epochs",
        "2",
        "1",
        "--weight-decay",
        "0.3",
        "--clip",
        "0.5",
        stages=("s1", "s2"),
    )
    rows = [r for r in metrics(tmp_path / "o") if "loss" in r]
    hf = transformers.AutoModelForCausalLM.from_pretrained(bench / "m", attn_implementation="eager")
    tokenizer, seen = load_tokenizer(bench / "m"), 0
    for k, (lr, epochs) in enumerate(((3e-3, 2), (1e-3, 1))):
        documents, _ = read_rows(bench / f"s{k + 1}.jsonl")
        rendered = [templates.render(r.turns, templates.TEMPLATES["phased"], tokenizer) for r in documents]
        steps = epochs * math.ceil(len(documents) / 8)
        decay, rest = [p for p in hf.parameters() if p.dim() > 1], [p for p in hf.parameters() if p.dim() == 1]
        adam = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95)
        )
        warmup = math.ceil(0.1 * steps)
        for batch in [
            b for e in range(epochs) for b in data.epoch_batches(None, np.arange(len(documents)), 8, 0, k, e)
        ]:
            losses = []
            for d in batch:  # one by one, no packing at all
                tokens, loss_mask = (torch.tensor(x) for x in rendered[d])
                logits = hf(tokens[None]).logits[0, :-1]
                losses.append(F.cross_entropy(logits[loss_mask[1:]], tokens[1:][loss_mask[1:]], reduction="none"))
            loss = torch.cat(losses).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.5)
            step = rows[seen]["step"] - 1
            rate = (
                lr * (step + 1) / warmup
                if step < warmup
                else lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
            )
            for group in adam.param_groups:
                group["lr"] = rate
            adam.step()
            adam.zero_grad()
            assert rows[seen]["loss"] == pytest.approx(loss.item(), rel=1e-4), rows[seen]
            assert rows[seen]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
            assert rows[seen]["lr"] == pytest.approx(rate)
            seen += 1
    assert seen == len(rows)
    for name, p in hf.named_parameters():
        ours = weights(tmp_path / "o", "stage2")[
            name
        ]  # single entries whose gradient is all but zero may take AdamW elsewhere
        assert (ours - p.detach()).norm() <= 1e-3 * p.norm(), name


@pytest.mark.parametrize(
    "ranks, more",
    [
        (None, ["--micro-tokens", "60"]),
        (2, []),
        (3, ["--micro-tokens", "90"]),
        (2, ["--replicas", "2"]),
        (None, ["--checkpoint-activations"]),
    ],
)
def test_ranks_and_micro_batches_do_not_change_the_result(ranks, more, bench, reference, tmp_path):
    go(bench, tmp_path / "o", "--eval", "s2", *more, ranks=ranks)
    close(metrics(tmp_path / "o"), metrics(reference))
    a, b = weights(tmp_path / "o"), weights(reference)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)


def test_the_torchrun_command_trains_and_a_signal_saves_the_state(bench, reference, tmp_path):
    command = [*torchrun(2), *training(tmp_path / "o", "--eval", "s2")]
    run = subprocess.Popen(command, cwd=bench, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (tmp_path / "o" / "metrics.jsonl").exists():
        time.sleep(0.01)
    run.terminate()
    assert "state saved" in run.communicate()[1] and run.returncode
    done = subprocess.run(command, cwd=bench, capture_output=True, text=True)
    assert done.returncode == 0 and "Resuming" in done.stdout, done.stderr
    close(metrics(tmp_path / "o"), metrics(reference))


def test_the_same_command_gives_bit_identical_weights(bench, reference, tmp_path):
    go(bench, tmp_path / "o", "--eval", "s2")
    assert same(weights(tmp_path / "o"), weights(reference)) and metrics(tmp_path / "o") == metrics(reference)


def test_held_out_loss_equals_transformers(bench, reference):
    rows = [r for r in metrics(reference) if "eval_loss" in r]
    assert [r["stage"] for r in rows] == ["start", "stage1", "stage2", "stage3"]
    tokenizer = load_tokenizer(bench / "m")
    documents, _ = read_rows(bench / "s2.jsonl")
    for folder, row in zip(("m", "reference/stage1", "reference/stage2", "reference/stage3"), rows):
        hf = transformers.AutoModelForCausalLM.from_pretrained(bench / folder)
        total = count = 0
        with torch.no_grad():
            for r in documents:
                tokens, loss_mask = (
                    torch.tensor(x) for x in templates.render(r.turns, templates.TEMPLATES["phased"], tokenizer)
                )
                losses = F.cross_entropy(hf(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
                total, count = total + losses[loss_mask[1:]].sum().item(), count + loss_mask[1:].sum().item()
        assert row["eval_loss"] == pytest.approx(total / count, rel=1e-4)


def test_each_stage_starts_from_the_previous_one_and_transformers_reads_its_export(bench, reference):
    rows = [r for r in metrics(reference) if "loss" in r]
    assert [(r["stage"], r["step"]) for r in rows] == [
        (f"stage{k + 1}", i + 1) for k, n in enumerate((4, 3, 4)) for i in range(n)
    ]
    assert [r["global_step"] for r in rows] == list(range(1, 12))
    assert not same(weights(reference, "stage1"), weights(reference, "stage2"))
    folder = reference / "stage3"
    assert json.loads((folder / "template.json").read_text()) == {"template": "phased"}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2] and generation["bos_token_id"] == 1
    assert "Assistant" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert load_tokenizer(folder).encode("abc") == load_tokenizer(bench / "m").encode("abc")
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    run = json.loads((reference / "run.json").read_text())
    assert run["arguments"]["stages"] == ["s1", "s2", "s3"] and run["hashes"]["s1.jsonl"] == sha256(bench / "s1.jsonl")


def test_optimizer_and_schedule_are_reset_per_stage_or_kept(bench, reference, tmp_path):
    go(
        bench,
        tmp_path / "o",
        "--eval",
        "s2",
        "--optimizer-state",
        "keep",
        "--schedule",
        "linear",
        "--warmup-ratio",
        "0.3",
    )
    kept = [r for r in metrics(tmp_path / "o") if "lr" in r]
    assert [r["lr"] for r in kept] == pytest.approx(
        [5e-4 * x for x in (0.25, 0.5, 0.75, 1, *(1 - i / 7 for i in range(7)))]
    )
    reset = [r["lr"] for r in metrics(reference) if "lr" in r]
    assert reset[0] == reset[4] == reset[7] == 5e-4
    assert not same(weights(tmp_path / "o"), weights(reference))


@pytest.mark.parametrize(
    "schedule, theirs",
    [
        ("cosine", transformers.get_cosine_schedule_with_warmup),
        ("linear", transformers.get_linear_schedule_with_warmup),
    ],
)
def test_schedules_equal_transformers_after_warmup(schedule, theirs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.7)
    reference = theirs(optimizer, 4, 40)
    for step in range(40):
        ours = train.learning_rate(step, 40, 0.7, schedule, 0.1)
        assert (
            ours == pytest.approx(reference.get_last_lr()[0])
            if step >= 4
            else ours == pytest.approx(0.7 * (step + 1) / 4)
        )
        optimizer.step()
        reference.step()


def test_replay_adds_a_fraction_of_every_earlier_stage(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(bench)
    args = train.parse_args(training(tmp_path, "--replay", "0.5", "--template", "phased"))
    stages, _, _ = train.read_data(args, first=False)
    assert [s.mixed_in for s in stages] == [0, 15, 15 + 11] and [len(s.documents) for s in stages] == [30, 37, 52]
    ids = stages[2].documents.ids
    assert (
        sum(i.startswith("s1") for i in ids) == 15
        and sum(i.startswith("s2") for i in ids) == 11
        and len(set(ids)) == 52
    )
    assert train.read_data(args, first=False)[0][2].documents.ids == ids
    d = ids.index(next(i for i in ids if i.startswith("s1")))
    tokens = stages[2].documents.pack(np.array([d]))[0].tolist()
    row = next(r for r in read_rows("s1.jsonl")[0] if r.id == ids[d])
    assert tokens == templates.render(row.turns, templates.TEMPLATES["phased"], load_tokenizer("m"))[0]


@pytest.mark.parametrize("frozen", [(), ("embed", "layers.0."), ("norm",), ("head",), ("mlp", "embed", "head")])
def test_flops_equal_torchs_flop_counter(frozen):
    from torch.utils.flop_counter import FlopCounterMode

    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = config_file.parse_config(dict(model_type="llama", vocab_size=111, **sizes))
    ours = model.Transformer(config)
    for name, p in ours.named_parameters():
        p.requires_grad_(not any(part in name for part in frozen))
    trained = train.trained_parameters(ours)
    tokens, cu_seqlens = torch.arange(40), torch.arange(41, dtype=torch.int32)
    targets = torch.where(tokens % 2 == 0, tokens, -100)
    with FlopCounterMode(display=False) as counter:
        ours(tokens, torch.zeros(40, dtype=torch.int64), cu_seqlens, targets)[0].backward()
    lengths = np.ones(40)  # attention to oneself: n (n + 1) / 2 pairs is then what the kernel computes too
    expected = training_flops(ours, set(trained)).of_batch(lengths, 20)
    layers_back = 1 if "layers.0." in frozen else 2
    recomputed = 2 * layers_back * config.n_heads * config.head_dim * 40  # the scores, once more; not counted
    unseen = 2 * 20 * config.dim * config.vocab_size * ("head.weight" in trained)  # by addmm_, which it does not know
    assert counter.get_total_flops() == expected + recomputed - unseen


# ---------------------------------------------------------------- does it survive


def states(out):
    return sorted((out / "resume").glob("*-????????"))


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(seed, bench, reference, tmp_path):
    rng, out, kills = random.Random(seed), tmp_path / "o", 0
    while True:
        run = Forked(train.main, training(out, "--eval", "s2", "--save-every", "1"), bench)
        run.wait_until((out / "metrics.jsonl").exists)
        try:
            done = run.wait(timeout=rng.uniform(0.0, 0.3) if kills < 5 else 300)
            break
        except TimeoutError:
            run.kill()
            kills += 1
    assert done.returncode == 0 and kills
    assert same(weights(out), weights(reference)) and same(weights(out, "stage1"), weights(reference, "stage1"))
    assert metrics(out) == metrics(reference)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_ends_with_130(number, bench, reference, tmp_path):
    out = tmp_path / "o"
    run = Forked(train.main, training(out, "--eval", "s2"), bench).wait_until((out / "metrics.jsonl").exists)
    run.send_signal(number)
    done = run.wait()
    assert done.returncode == 130 and "state saved" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert states(out) and len(metrics(out)) < len(metrics(reference))
    go(bench, out, "--eval", "s2")
    assert same(weights(out), weights(reference)) and metrics(out) == metrics(reference)


def test_a_run_resumes_on_another_number_of_ranks(bench, reference, tmp_path):
    out = tmp_path / "o"
    for ranks, stop_at in ((2, "000-00000003"), (3, "001-00000003"), (None, "never")):
        run = Forked(train.main, training(out, "--eval", "s2", "--save-every", "1"), bench, ranks)
        run.wait_until(lambda at=stop_at: any(s.name >= at for s in states(out)))
        run.kill()
    close(metrics(out), metrics(reference))


@pytest.mark.parametrize("damage", ["flip", "cut", "no state", "empty folder"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(damage, bench, reference, tmp_path):
    out = tmp_path / "o"
    run = Forked(train.main, training(out, "--eval", "s2", "--save-every", "1"), bench)
    run.wait_until((out / "resume" / "001-00000002").exists).kill()
    newest, before = states(out)[::-1][:2]
    file = newest / "rank00000.safetensors"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        (newest / "state.json").unlink()
        if damage == "empty folder":
            file.unlink()
    done = go(bench, out, "--eval", "s2", "--save-every", "1")
    assert f"{newest} is damaged" in done.stderr and f"Resuming from {before}" in done.stdout
    assert same(weights(out), weights(reference)) and metrics(out) == metrics(reference)


def test_a_full_disk_stops_with_a_clear_error_and_the_old_state_intact(bench, reference, tmp_path):
    out, size = tmp_path / "o", (bench / "m" / "model.safetensors").stat().st_size

    def limited(argv):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # An export fits; a state, which is three times as large, does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size, 2 * size))
        return train.main(argv)

    done = run_forked(limited, *training(out, "--eval", "s2", "--save-every", "2"), cwd=bench, expect=1)
    assert "could not be saved" in done.stderr
    assert not list((out / "resume").iterdir())
    go(bench, out, "--eval", "s2", "--save-every", "2")
    assert same(weights(out), weights(reference)) and metrics(out) == metrics(reference)


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "selection-epoch0.jsonl", "state.json", "config.json"])
def test_an_error_of_a_full_disk_names_the_file(name, bench, tmp_path):
    def limited(argv):
        real_bytes, real_line = Path.write_bytes, run_log.AppendLog.write

        class Full:
            def write(self, *_):
                raise OSError(errno.ENOSPC, "No space left on device")

            close = write

        def write_bytes(path, content):
            return Full().write(b"") if path.name == f"{name}.tmp" else real_bytes(path, content)

        def write_line(log, row):
            log.file = Full() if log.path.name == name else log.file
            real_line(log, row)

        Path.write_bytes, run_log.AppendLog.write = write_bytes, write_line
        return train.main(argv)

    more = ("--select", "static", "--ratio", "8")
    done = Forked(limited, training(tmp_path / "o", *more, stages=("s1",)), bench).wait()
    assert done.returncode == 1 and f"/{name}" in done.stderr and "No space left" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    go(bench, tmp_path / "o", *more, stages=("s1",))


def test_rows_longer_than_the_models_positions_give_a_warning(bench, tmp_path):
    assert "above the 256 positions" not in go(bench, tmp_path / "a", "--dry-run", stages=("s1",)).stderr
    told = go(bench, tmp_path / "a", "--dry-run", "--max-len", "300", stages=("s1",)).stderr
    assert "--max-len 300 is above the 256 positions" in told and "the longest row has" in told
    (tmp_path / "long.jsonl").write_text(json.dumps({"data": ["Say it.", "abc" * 100]}) + "\n")
    assert "above the 256" in go(bench, tmp_path / "a", "--dry-run", stages=(str(tmp_path / "long"),)).stderr


def test_training_raises_no_warnings_and_reads_odd_paths(bench, tmp_path):
    folder = tmp_path / "größe"
    shutil.copytree(bench / "m", folder / "m")
    shutil.copy(bench / "s1.jsonl", folder)
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-W", "error", train.__file__, "--model", folder / "m", "--stages", folder / "s1"]
    command += ["--lr", "1e-3", "--select", "static", "--ratio", "8", "--out", folder / "o", "--eval", folder / "s1"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, errors="replace")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (folder / "o" / "stage1" / "tokenizer.model").exists()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
def test_compiled_blocks_give_the_same_losses(bench, tmp_path):
    go(bench, tmp_path / "a", stages=("s1",))
    go(bench, tmp_path / "b", "--compile", stages=("s1",))
    close(metrics(tmp_path / "a"), metrics(tmp_path / "b"))


def test_a_finished_run_has_nothing_to_do(bench, reference):
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*.safetensors")}
    done = go(bench, reference, "--eval", "s2")
    assert "all stages done" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in reference.rglob("*.safetensors")}


def test_resuming_with_other_arguments_or_data_is_an_error(bench, reference, tmp_path):
    done = go(bench, reference, "--eval", "s2", "--lr", "0.5", "--replay", "0.1", code=2)
    assert "--lr was [0.0005, 0.0005, 0.0005], is [0.5, 0.5, 0.5]" in done.stderr and "--replay was 0.0" in done.stderr
    go(bench, tmp_path / "o", stages=("s1",))
    rows = (bench / "s1.jsonl").read_text()
    try:
        (bench / "s1.jsonl").write_text(rows.replace("Say", "Tell"))
        assert "s1.jsonl has changed" in go(bench, tmp_path / "o", stages=("s1",), code=2).stderr
    finally:
        (bench / "s1.jsonl").write_text(rows)


def test_a_run_does_not_resume_with_another_dtype_where_auto_means_another(bench, tmp_path):
    go(bench, tmp_path / "o", "--dtype", "auto", stages=("s1",))
    was = json.loads((tmp_path / "o" / "run.json").read_text())["arguments"]["dtype"]
    other = {"bf16": "fp32", "fp32": "bf16"}[was]
    assert "all stages done" in go(bench, tmp_path / "o", "--dtype", was, stages=("s1",)).stdout
    done = go(bench, tmp_path / "o", "--dtype", other, stages=("s1",), code=2)
    assert f"--dtype was '{was}', is '{other}'" in done.stderr


# ---------------------------------------------------------------- what goes wrong


@pytest.fixture
def poisoned(bench, tmp_path):
    """A model whose embedding of one letter is infinite, and a stage in which one row contains that letter."""
    folder = tmp_path / "p"
    shutil.copytree(bench / "m", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][load_tokenizer(folder).encode("q")[-1]] = math.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = [{"id": f"row{i}", "data": ["Say it.", "abcdefgh"[: i % 7 + 1]]} for i in range(40)]
    rows[23]["data"] = ["Say q.", "a"]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_a_loss_that_is_not_finite_stops_with_the_rows_and_keeps_the_state(bench, poisoned):
    more = ["--model", str(poisoned / "p")]
    done = go(bench, poisoned / "o", *more, stages=(str(poisoned / "s"),), code=1)
    step = next(i for i, b in enumerate(data.epoch_batches(None, np.arange(40), 8, 0, 0, 0), 1) if 23 in b)
    assert f"stage1, step {step}" in done.stderr and "row23" in done.stderr and "s.jsonl:24" in done.stderr
    assert done.stderr.count("s.jsonl:") == 8
    state = sorted((poisoned / "o" / "resume").glob("*-????????"))[-1]
    assert state.name == f"000-{step - 1:08}"
    skipped = go(bench, poisoned / "o", *more, "--skip-nonfinite", "1", stages=(str(poisoned / "s"),))
    rows = metrics(poisoned / "o")
    assert len(rows) == 5 and [r["step"] for r in rows if r["loss"] is None] == [step] and "Resuming" in skipped.stdout
    assert skipped.stdout.count("s.jsonl:") == 8 and "row23 (" in skipped.stdout
    assert f"stage1, step {step}: the loss is" in skipped.stdout and "skipped (1 of 1)" in skipped.stdout
    assert "1 of 5 steps were skipped" in skipped.stdout and "1 of them skipped" in skipped.stdout
    summary = next(line for line in skipped.stdout.splitlines() if "5 steps, loss" in line)
    first, last = (float(x) for x in summary.split("loss ")[1].split(",")[0].split(" -> "))
    assert math.isfinite(first) and math.isfinite(last)
    assert [r.get("skipped") for r in rows] == [True if r["step"] == step else None for r in rows]
    for name, w in weights(poisoned / "o", "stage1").items():
        assert name == "model.embed_tokens.weight" or w.isfinite().all()


@pytest.mark.parametrize(
    "more, word",
    [
        (["--stages", "nowhere"], "nowhere: no such file"),
        (["--stages", "s1", "s2", "--lr", "1", "2", "3"], "--lr has 3 values"),
        (["--model", "nowhere"], "config.json not found"),
        (["--batch-size", "0"], "at least 1"),
        (["--lr", "nan"], "finite"),
        (["--replay", "1.5"], "below 1"),
        (["--template", "llama3"], "start_header_id"),
        (["--schedule", "steps"], "invalid choice"),
        (["--max-len", "3"], "nothing supervised"),
        (["--epochs", "x"], "invalid"),
        (["--replicas", "2"], "does not divide"),
    ],
)
def test_wrong_arguments_end_with_2_and_one_clear_error(more, word, bench, tmp_path):
    done = go(bench, tmp_path / "o", *more, code=2)
    assert word in done.stderr
    assert not (tmp_path / "o" / "metrics.jsonl").exists()


def test_bad_rows_of_all_files_are_reported_together_or_skipped(bench, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"data": ["q", "a"]}\n{"data": ["q", ""]}\nnonsense\n')
    stages = (str(tmp_path / "a"), str(tmp_path / "b.jsonl"))
    done = go(bench, tmp_path / "o", stages=stages, code=2)
    assert "4 rows cannot be used" in done.stderr
    assert all(f"{name}.jsonl:{line}:" in done.stderr for name in "ab" for line in (2, 3))
    done = go(bench, tmp_path / "o", "--skip-bad-rows", stages=stages)
    assert (
        "4 unusable rows are skipped" in done.stdout
        and len(json.loads((tmp_path / "o" / "run.json").read_text())["skipped_rows"]) == 4
    )


def test_a_dry_run_plans_without_reading_or_writing_weights(bench, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(bench / "m", folder)
    (folder / "model.safetensors").unlink()
    (tmp_path / "many").mkdir()
    for name in ("1.jsonl", "2.jsonl"):
        (tmp_path / "many" / name).write_bytes((bench / "s2.jsonl").read_bytes())
    done = go(
        bench,
        tmp_path / "o",
        "--model",
        str(folder),
        "--dry-run",
        "--plan-world-size",
        "64",
        "--max-len",
        "80",
        stages=("s1", str(tmp_path / "many")),
    )
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert lines["stage2"][2] == "44" and lines["stage2"][-2] == "6" and int(lines["stage2"][7]) > 0
    assert "1 rank" in done.stdout and "64 ranks" in done.stdout and "activations" in lines
    parameters = sum(v.numel() for v in load_file(bench / "m" / "model.safetensors").values())
    assert f"{parameters:,} parameters" in done.stdout
    assert not (tmp_path / "o" / "run.json").exists() and not (tmp_path / "o" / "stage1").exists()


def test_a_tokenizer_of_another_model_is_an_error(bench, shared, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(bench / "m", folder)
    (folder / "tokenizer.model").write_bytes((shared / "tokenizers" / "llama2.model").read_bytes())
    assert "do not belong together" in go(bench, tmp_path / "o", "--model", str(folder), code=2).stderr


def test_the_real_scored_rows_train_with_the_real_tokenizer(shared, tmp_path):
    hf_model(vocab_size=32000, scale=0.02, max_position_embeddings=2048).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.model").write_bytes((shared / "tokenizers" / "llama2.model").read_bytes())
    lines = (shared / "alpaca_scored_stage3.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "s1.jsonl").write_bytes(b"".join(lines[:60]))
    stages = ("s1", str(shared / "alpaca_scored_stage3.jsonl"))
    done = go(tmp_path, tmp_path / "o", "--dry-run", "--skip-bad-rows", stages=stages)
    assert "3,995" in done.stdout and "5 unusable rows are skipped" in done.stdout
    go(tmp_path, tmp_path / "o", "--template", "mistral", stages=("s1",))
    rows = metrics(tmp_path / "o")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_transformers_renders_prompts_of_an_export_token_for_token(shared, bench, tmp_path):
    hf_model(vocab_size=32000, max_position_embeddings=2048, num_hidden_layers=1).save_pretrained(tmp_path / "m")
    shutil.copyfile(shared / "tokenizers" / "llama2.model", tmp_path / "m" / "tokenizer.model")
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        json.dumps({"legacy": False, "bos_token": "<s>", "eos_token": "</s>"})
    )
    go(bench, tmp_path / "o", "--model", str(tmp_path / "m"), stages=("s1",))
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "o" / "stage1"),
        load_tokenizer(tmp_path / "o" / "stage1"),
    )
    for row in read_rows(shared / "alpaca_scored_stage3.jsonl")[0][:200]:
        encoded = theirs.apply_chat_template(messages_of(row.turns[:1]), add_generation_prompt=True)["input_ids"]
        assert encoded == templates.render(row.turns[:1], templates.TEMPLATES["phased"], ours)[0], row.source


# ---------------------------------------------------------------- what is trained


def freeze(*parts):
    """train.py with one line changed: parameters whose names contain one of `parts` are frozen."""

    def main(argv):
        real = train.build_model

        def build_model(*a):
            model = real(*a)
            for name, p in model.named_parameters():
                p.requires_grad_(not any(part in name for part in parts))
            return model

        train.build_model = build_model
        return train.main(argv)

    return main


def sgd(argv):
    """train.py with another optimizer."""
    train.make_optimizer = lambda trained, options: torch.optim.SGD(trained.values(), lr=0.0, momentum=0.9)
    return train.main(argv)


def adafactor(argv):
    """An optimizer whose state has other shapes than its parameters, and cannot be sharded like them."""
    train.make_optimizer = lambda trained, options: torch.optim.Adafactor(trained.values(), lr=0.0)
    return train.main(argv)


CHANGES = {"embeddings frozen": freeze("embed"), "norms frozen": freeze("norm"), "SGD with momentum": sgd}


@pytest.mark.parametrize("change, ranks, keep", [  # every two of the three together
    ("embeddings frozen", None, False), ("embeddings frozen", 2, True), ("norms frozen", None, True),
    ("norms frozen", 2, False), ("SGD with momentum", None, False), ("SGD with momentum", 2, True),
])  # fmt: skip
def test_frozen_parameters_do_not_change_and_any_optimizer_resumes(change, ranks, keep, bench, tmp_path):
    more = ["--lr", "1e-2", "--save-every", "1", *(["--optimizer-state", "keep"] if keep else [])]
    go(bench, tmp_path / "a", *more, main=CHANGES[change], ranks=ranks, stages=("s1", "s2"))
    run = Forked(CHANGES[change], training(tmp_path / "b", *more, stages=("s1", "s2")), bench, ranks)
    run.wait_until((tmp_path / "b" / "resume" / "001-00000001").exists).kill()
    done = go(bench, tmp_path / "b", *more, main=CHANGES[change], ranks=ranks, stages=("s1", "s2"))
    assert "Resuming" in done.stdout
    before, whole, again = (
        load_file(bench / "m" / "model.safetensors"),
        weights(tmp_path / "a", "stage2"),
        weights(tmp_path / "b", "stage2"),
    )
    assert same(whole, again) and metrics(tmp_path / "a") == metrics(tmp_path / "b")
    for name, w in whole.items():
        frozen = change.split()[0][:4] in name and change != "SGD with momentum"
        assert torch.equal(w, before[name]) == frozen, name
    if frozen_part := {"embeddings frozen": "embed", "norms frozen": "norm"}.get(change):
        state = load_file(states(tmp_path / "a")[-1] / "rank00000.safetensors")
        assert not [name for name in state if frozen_part in name]


def test_an_optimizer_with_state_of_any_shape_resumes_on_one_rank_and_is_an_error_on_two(bench, tmp_path):
    more = ["--lr", "1e-2", "--save-every", "1"]
    go(bench, tmp_path / "a", *more, main=adafactor, stages=("s1",))
    Forked(adafactor, training(tmp_path / "b", *more, stages=("s1",)), bench).wait_until(
        (tmp_path / "b" / "resume" / "000-00000002").exists
    ).kill()
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    go(bench, tmp_path / "b", *more, main=adafactor, stages=("s1",))
    assert same(weights(tmp_path / "a", "stage1"), weights(tmp_path / "b", "stage1"))
    done = Forked(adafactor, training(tmp_path / "c", *more, stages=("s1",)), bench, ranks=2).wait()
    assert done.returncode == 2 and "Adafactor works on one rank only" in done.stderr


@pytest.mark.parametrize("kind, ranks, reason", [
    (torch.optim.Adafactor, 2, "statistics of rows and columns"), (torch.optim.Rprop, 2, "single entries"),
    (torch.optim.LBFGS, 2, "recomputes the loss"), (torch.optim.LBFGS, None, "recomputes the loss"),
])  # fmt: skip
def test_an_optimizer_that_cannot_step_is_an_error_at_the_start(kind, ranks, reason, bench, tmp_path):
    def main(argv):
        train.make_optimizer = lambda trained, options: kind(trained.values(), lr=0.0)
        return train.main(argv)

    done = Forked(main, training(tmp_path / "o"), bench, ranks).wait()
    assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "o" / "metrics.jsonl").exists()


def test_a_state_of_other_trained_parameters_is_an_error(bench, tmp_path):
    more, stages = ["--save-every", "1"], ("s1", "s2")
    Forked(train.main, training(tmp_path / "o", *more, stages=stages), bench).wait_until(
        (tmp_path / "o" / "resume" / "000-00000002").exists
    ).kill()
    done = go(bench, tmp_path / "o", *more, main=sgd, stages=stages, code=2)
    assert "the saved state is of AdamW, but this run uses SGD" in done.stderr
    done = go(bench, tmp_path / "o", *more, main=freeze("norm"), stages=stages, code=2)
    assert "do not belong to any trained parameter" in done.stderr and "exp_avg/norm.weight" in done.stderr
    Forked(freeze("norm"), training(tmp_path / "p", *more, stages=stages), bench).wait_until(
        (tmp_path / "p" / "resume" / "000-00000002").exists
    ).kill()
    done = go(bench, tmp_path / "p", *more, stages=stages, code=2)
    assert "are not in the saved state" in done.stderr and "norm.weight" in done.stderr


def test_frozen_parameters_have_no_gradient_state_or_flops():
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    ours = model.Transformer(config_file.parse_config(dict(model_type="llama", vocab_size=111, **sizes)))
    everything = train.trained_parameters(ours)
    ours.embed.requires_grad_(False)
    trained = train.trained_parameters(ours)
    assert everything.keys() - trained.keys() == {"embed.weight"}
    whole, part = (
        memory_plan.memory_plan(ours, set(t), 1, torch.float32, 100, 50, False, False) for t in (everything, trained)
    )
    assert whole["gradients"] - part["gradients"] == 4 * 111 * 64 and whole["weights"] == part["weights"]
    tokens, cu_seqlens = torch.arange(40), torch.tensor([0, 40], dtype=torch.int32)
    ours(tokens, tokens, cu_seqlens, tokens)[0].backward()
    assert ours.embed.weight.grad is None and all(p.grad is not None for p in trained.values())


def test_a_group_sets_lr_scale_and_every_parameter_is_in_a_group(bench, tmp_path):
    def with_groups(**of_embed):
        def make_optimizer(trained, _):
            rest = [p for name, p in trained.items() if "embed" not in name]
            return torch.optim.SGD([{"params": [trained["embed.weight"]], **of_embed}, {"params": rest}], lr=0.0)

        def main(argv):
            train.make_optimizer = make_optimizer
            return train.main(argv)

        return main

    go(bench, tmp_path / "a", "--lr", "1e-2", main=with_groups(lr_scale=0.0), stages=("s1",))
    before, after = load_file(bench / "m" / "model.safetensors"), weights(tmp_path / "a", "stage1")
    assert [torch.equal(before[n], after[n]) for n in ("model.embed_tokens.weight", "lm_head.weight")] == [True, False]
    done = Forked(with_groups(lr=1e-3), training(tmp_path / "b", stages=("s1",)), bench).wait()
    assert done.returncode and "lr_scale" in done.stderr

    def left_out(argv):
        train.make_optimizer = lambda trained, _: torch.optim.SGD([p for p in trained.values() if p.dim() > 1], lr=0.0)
        return train.main(argv)

    done = Forked(left_out, training(tmp_path / "c", stages=("s1",)), bench).wait()
    assert done.returncode and "each trained parameter must be in one group: layers.0.attention_norm" in done.stderr


def test_a_trained_parameter_without_effect_is_an_error(bench, tmp_path):
    def main(argv):
        real = train.build_model

        def build_model(*a):
            built = real(*a)
            built.layers[0].adapter = torch.nn.Parameter(torch.zeros(3))
            return built

        train.build_model, train.check_weights = build_model, lambda *a: None
        return train.main(argv)

    done = Forked(main, training(tmp_path / "o", stages=("s1",)), bench).wait()
    assert done.returncode and "do not affect the loss: layers.0.adapter" in done.stderr


def test_numbers_in_the_groups_of_an_optimizer_are_restored(bench, tmp_path):
    class Counting(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-1e-2 / group["k"])

    def main(argv):
        train.make_optimizer = lambda trained, _: Counting(trained.values(), lr=0.0)
        return train.main(argv)

    go(bench, tmp_path / "a", "--save-every", "1", main=main, stages=("s1",))
    run = Forked(main, training(tmp_path / "b", "--save-every", "1", stages=("s1",)), bench)
    run.wait_until((tmp_path / "b" / "resume" / "000-00000002").exists).kill()
    go(bench, tmp_path / "b", "--save-every", "1", main=main, stages=("s1",))
    assert same(weights(tmp_path / "a", "stage1"), weights(tmp_path / "b", "stage1"))


def test_changed_code_is_reported_when_a_run_resumes(bench, tmp_path):
    go(bench, tmp_path / "o", stages=("s1",))
    assert "code changed" not in go(bench, tmp_path / "o", stages=("s1",)).stderr
    run = json.loads((tmp_path / "o" / "run.json").read_text())
    (tmp_path / "o" / "run.json").write_text(json.dumps(run | {"code": "0123"}))
    assert "the code changed since this run began" in go(bench, tmp_path / "o", stages=("s1",)).stderr


def test_an_older_run_resumes_with_the_default_of_a_new_flag(bench, tmp_path):
    go(bench, tmp_path / "o", stages=("s1",))
    run = json.loads((tmp_path / "o" / "run.json").read_text())
    for name in ("max_grad_norm", "schedule", "epochs", "lr"):
        del run["arguments"][name]
    (tmp_path / "o" / "run.json").write_text(json.dumps(run))
    assert "all stages done" in go(bench, tmp_path / "o", stages=("s1",)).stdout
    assert (
        "--max-grad-norm was 1.0, is 0.5" in go(bench, tmp_path / "o", "--clip", "0.5", stages=("s1",), code=2).stderr
    )
