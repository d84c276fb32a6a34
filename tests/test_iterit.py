"""IterIT in train.py: the choice of every epoch against transformers and scikit-learn, kills, ranks, wrong
arguments."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Forked, close, go, hf_model, metrics, run_forked, same, training, weights
from hypothesis import given
from hypothesis import strategies as st
from test_score import reference_choice

import data
import score
import train
from parts.checkpoints.state import read_manifest
from parts.text import templates
from parts.text.rows import Turn
from parts.text.tokenizers import load_tokenizer


def chosen(out, epoch, stage="stage1"):
    rows = [json.loads(line) for line in (out / stage / f"selection-epoch{epoch}.jsonl").read_text().splitlines()]
    assert [r["rank"] for r in rows] == list(range(1, len(rows) + 1))
    assert [r["chosen"] for r in rows] == sorted((r["chosen"] for r in rows), reverse=True)
    return [r["id"] for r in rows if r["chosen"]], {r["id"]: r["ifd"] for r in rows}


# ---------------------------------------------------------------- the choice


def test_the_choice_of_every_epoch_is_that_of_transformers_and_scikit_learn(shared, tmp_path):
    """300 real rows, three epochs: scoring, choice and training, done once more without any of ours but the
    rendering."""
    hf = hf_model(vocab_size=32000, max_position_embeddings=2048, scale=0.1)
    hf.save_pretrained(tmp_path / "m")
    shutil.copyfile(shared / "tokenizers" / "llama2.model", tmp_path / "m" / "tokenizer.model")
    rows = [
        r
        for r in map(json.loads, (shared / "alpaca_scored_stage3.jsonl").read_text().splitlines())
        if r["data"][1].strip()
    ]
    rows = rows[:300]
    (tmp_path / "s.jsonl").write_text(
        "".join(json.dumps({"id": i, "data": r["data"]}) + "\n" for i, r in enumerate(rows))
    )
    go(
        tmp_path,
        tmp_path / "o",
        "--select",
        "iterit",
        "--ratio",
        "0.08",
        "--epochs",
        "3",
        "--lr",
        "2e-2",
        "--max-len",
        "140",
        "--warmup-ratio",
        "0",
        stages=("s",),
    )

    tokenizer = load_tokenizer(tmp_path / "m")
    documents = []
    for row in rows:
        tokens, loss_mask = templates.render(
            [Turn("user", row["data"][0]), Turn("assistant", row["data"][1])], templates.TEMPLATES["phased"], tokenizer
        )
        documents.append((torch.tensor(tokens[:140]), torch.tensor(loss_mask[:140])))
    answers = [tokenizer.decode(t[s].tolist()) for t, s in documents]

    def losses(tokens, supervised):
        logits = hf(tokens[None]).logits[0, :-1]
        return F.cross_entropy(logits[supervised[1:]], tokens[1:][supervised[1:]], reduction="none")

    @torch.no_grad()
    def ifd(tokens, supervised):
        alone = torch.cat([tokens[:1], tokens[supervised]])
        by_itself = losses(alone, torch.arange(len(alone)) > 0)
        return (losses(tokens, supervised).double().mean().exp() / by_itself.double().mean().exp()).item()

    budget, known, before = 24, {}, []
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in hf.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in hf.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for epoch in range(3):
        candidates = list(range(300))
        if epoch:
            by_ifd = sorted((d for d in known if known[d] < 1), key=lambda d: -known[d])
            candidates = [*before, *(d for d in by_ifd if d not in before)][: 3 * budget]
        known |= {d: ifd(*documents[d]) for d in candidates}
        good = sorted(d for d in candidates if known[d] < 1) if epoch == 0 else [d for d in candidates if known[d] < 1]
        assert 3 * budget <= len(good) or epoch
        before = [
            good[i]
            for i in reference_choice([known[d] for d in good], [answers[d] for d in good], min(budget, len(good)), 0.1)
        ]
        before += sorted((d for d in candidates if known[d] >= 1), key=lambda d: known[d])[: budget - len(before)]
        ours, scores = chosen(tmp_path / "o", epoch)
        assert len(scores) == len(candidates)
        for d, value in scores.items():
            assert value == pytest.approx(known[int(d)], rel=2e-3)
        assert list(map(int, ours)) == before, epoch
        for at, batch in enumerate(data.epoch_batches(None, np.arange(budget), 8, 0, 0, epoch)):
            torch.cat([losses(*documents[before[i]]) for i in batch]).mean().backward()
            torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
            for group in adam.param_groups:
                group["lr"] = 2e-2 * 0.5 * (1 + math.cos(math.pi * (3 * epoch + at) / 9))
            adam.step()
            adam.zero_grad()
    rows = [r for r in metrics(tmp_path / "o") if "loss" in r]
    assert len(rows) == 9 and rows[-1]["lr"] == pytest.approx(2e-2 * 0.5 * (1 + math.cos(math.pi * 8 / 9)))


@given(
    st.lists(st.one_of(st.floats(0.125, 2.0, width=32), st.just(math.nan)), min_size=1, max_size=20),
    st.integers(1, 20),
    st.booleans(),
)
def test_rows_at_1_or_above_come_only_when_the_better_ones_are_used_up(values, budget, diverse):
    ifd = np.array(values, np.float32)
    answers = [f"word{i} again" for i in range(len(ifd))] if diverse else None
    picks = score.choose_rows(score.IFD.worth(ifd), answers, budget)
    assert len(set(picks.tolist())) == len(picks) == min(budget, int((~np.isnan(ifd)).sum()))
    good = ifd[picks] < 1
    assert good.sum() == min(budget, (ifd < 1).sum()) and (np.diff(good.astype(int)) <= 0).all()
    hard = ifd[picks][~good]
    assert (np.diff(hard) >= 0).all() and list(hard) == sorted(ifd[ifd >= 1])[: len(hard)]
    if not diverse:
        assert (np.diff(ifd[picks][good]) <= 0).all()


# ---------------------------------------------------------------- the run

SELECT = ("--select", "iterit", "--ratio", "7", "--update-ratio", "2", "--epochs", "3", "--lr", "5e-3")


@pytest.fixture(scope="module")
def straight(bench):
    out = bench / "iterit"
    done = go(bench, out, *SELECT, "--save-every", "1", stages=("s1", "s2"))
    assert "stage2, epoch 3: 14 rows scored" in done.stdout and "7 of 30" in done.stdout
    return out


def test_each_stage_chooses_from_its_own_rows_and_steps_are_those_really_taken(bench, straight):
    for stage, size in (("stage1", 30), ("stage2", 22)):
        for epoch in range(3):
            ids, scores = chosen(straight, epoch, stage)
            assert len(ids) == 7 and len(scores) == (size if epoch == 0 else 14)
            assert all(i.startswith(stage.replace("tage", "")) for i in scores)
    rows = [r for r in metrics(straight) if "loss" in r]
    assert [(r["stage"], r["step"], r["documents"]) for r in rows] == [
        (s, k, 7) for s in ("stage1", "stage2") for k in (1, 2, 3)
    ]
    assert any(
        chosen(straight, 0, "stage1")[1][i] != chosen(straight, 1, "stage1")[1][i]
        for i in chosen(straight, 1, "stage1")[1]
    )


def test_a_run_killed_at_any_step_goes_on_with_the_same_bits_and_the_same_choice(bench, straight, tmp_path):
    def killed_before_the_third_step(argv):
        real, taken = train.batch_gradients, []

        def step(*a):
            if len(taken) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            taken.append(1)
            return real(*a)

        train.batch_gradients = step
        return train.main(argv)

    arguments = training(tmp_path / "o", *SELECT, "--save-every", "1", stages=("s1", "s2"))
    codes = [Forked(killed_before_the_third_step, arguments, bench).wait().returncode for _ in range(2)]
    assert codes == [-signal.SIGKILL] * 2
    go(bench, tmp_path / "o", *SELECT, "--save-every", "1", stages=("s1", "s2"))
    assert same(weights(tmp_path / "o", "stage2"), weights(straight, "stage2")) and metrics(tmp_path / "o") == metrics(
        straight
    )
    for stage in ("stage1", "stage2"):
        for epoch in range(3):
            assert chosen(tmp_path / "o", epoch, stage) == chosen(straight, epoch, stage)


def test_a_signal_inside_the_scoring_keeps_what_is_scored(bench, tmp_path):
    rows = [json.dumps({"id": i, "data": [f"Say {i}.", chr(97 + i % 26) * (1 + i % 5)]}) for i in range(700)]
    (tmp_path / "many.jsonl").write_text("\n".join(rows))
    more, stages = ("--select", "static", "--ratio", "40", "--score-type", "ifd"), (str(tmp_path / "many"),)
    go(bench, tmp_path / "straight", *more, stages=stages)

    def told_to_stop_in_the_second_chunk(argv):
        real, calls = score.SELECTION_SCORE.measure, []

        def measured(*a):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*a)

        score.SELECTION_SCORE.measure = measured
        return train.main(argv)

    go(bench, tmp_path / "o", *more, stages=stages, code=130, main=told_to_stop_in_the_second_chunk)
    state = read_manifest(tmp_path / "o" / "resume" / "000-00000000")["progress"]["progress"]
    assert state["selection"]["n_scored"] == 2 * score.CHUNK and state["step"] == 0
    assert "Resuming" in go(bench, tmp_path / "o", *more, stages=stages).stdout
    assert chosen(tmp_path / "o", 0) == chosen(tmp_path / "straight", 0)
    assert same(weights(tmp_path / "o", "stage1"), weights(tmp_path / "straight", "stage1"))


def test_ranks_change_no_choice(bench, straight, tmp_path):
    go(bench, tmp_path / "o", *SELECT, ranks=2, stages=("s1", "s2"))
    close([r for r in metrics(tmp_path / "o") if "loss" in r], [r for r in metrics(straight) if "loss" in r])
    for epoch in range(3):
        assert chosen(tmp_path / "o", epoch, "stage2")[0] == chosen(straight, epoch, "stage2")[0]


def test_static_chooses_once_and_given_scores_are_taken(bench, straight, tmp_path):
    ifd = ["ifd", "s1.jsonl", "--model", "m", "--out", tmp_path / "ifd.jsonl", "--dtype", "fp32"]
    run_forked(score.main, *ifd, cwd=bench)
    done = go(
        bench, tmp_path / "o", *SELECT, "--select", "static", "--scores", str(tmp_path / "ifd.jsonl"), stages=("s1",)
    )
    assert "0 rows scored" in done.stdout and done.stdout.count("chosen, IFD") == 1
    assert (
        chosen(tmp_path / "o", 0)[0] == chosen(straight, 0)[0]
        and not (tmp_path / "o" / "stage1" / "selection-epoch1.jsonl").exists()
    )
    seen = [r["documents"] for r in metrics(tmp_path / "o") if "loss" in r]
    assert seen == [7, 7, 7]
    done = go(bench, tmp_path / "p", *SELECT, "--scores", str(tmp_path / "ifd.jsonl"), stages=("s1", "s2"), code=2)
    assert "22 of 22 rows of s2 are not in --scores" in done.stderr and "s2.jsonl:1" in done.stderr


def test_too_few_good_rows_are_filled_up_and_it_is_said(bench, tmp_path):
    rows = [json.loads(line) for line in (bench / "s1.jsonl").read_text().splitlines()]
    values = [0.5, 0.9, None] + [1.5] * (len(rows) - 3)
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(r | {"ifd": v}) + "\n" for r, v in zip(rows, values)))
    done = go(
        bench,
        tmp_path / "o",
        "--select",
        "static",
        "--ratio",
        "5",
        "--scores",
        str(tmp_path / "f.jsonl"),
        stages=("s1",),
    )
    assert "3 of them at 1 or above" in done.stdout
    ids = chosen(tmp_path / "o", 0)[0]
    assert set(ids[:2]) == {"s1-0", "s1-1"} and ids[2:] == ["s1-3", "s1-4", "s1-5"]
    (tmp_path / "t.jsonl").write_text('{"text": "abc"}\n')
    assert (
        "nothing to choose from"
        in go(bench, tmp_path / "q", "--select", "static", stages=(str(tmp_path / "t"),), code=2).stderr
    )


def test_given_scores_of_rows_that_can_have_none_are_not_taken_and_the_steps_are_those_planned(bench, tmp_path):
    rows = [{"id": f"r{i}", "text": "abc" * (i + 1), "ifd": 0.3} for i in range(6)]  # no prompt, so no IFD
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with_prompt = [{"id": f"p{i}", "data": [f"Say {i}.", "xyz"], "ifd": 0.5 + i / 100} for i in range(10)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in with_prompt))
    (tmp_path / "both").mkdir()
    for name in ("t", "p"):
        shutil.copy(tmp_path / f"{name}.jsonl", tmp_path / "both")
    more = ["--select", "iterit", "--ratio", "14", "--epochs", "2", "--batch-size", "2", "--scores"]
    both = str(tmp_path / "both")
    done = go(bench, tmp_path / "o", *more, *(str(tmp_path / f"{n}.jsonl") for n in "tp"), stages=(both,))
    assert "10 of 10 chosen" in done.stdout
    taken = [r for r in metrics(tmp_path / "o") if "loss" in r]
    assert len(taken) == 10 and "  10 of 16  " in done.stdout and "): 10 steps, loss" in done.stdout
    rates = [train.learning_rate(step, 10, 5e-4, "cosine", 0.1) for step in range(10)]
    assert [r["lr"] for r in taken] == pytest.approx(rates)
    text_only = go(bench, tmp_path / "q", *more, str(tmp_path / "t.jsonl"), stages=(str(tmp_path / "t"),), code=2)
    assert "nothing to choose from" in text_only.stderr


@pytest.mark.parametrize("ifd", ["-0.5", "1e999", "-Infinity"])
def test_given_scores_that_are_negative_or_infinite_are_refused_by_row(ifd, bench, tmp_path):
    lines = (bench / "s1.jsonl").read_text().splitlines()
    lines = [line[:-1] + f', "ifd": {ifd if k == 2 else 0.5}}}' for k, line in enumerate(lines)]
    (tmp_path / "f.jsonl").write_text("\n".join(lines))
    more = ("--select", "static", "--scores", str(tmp_path / "f.jsonl"))
    assert "f.jsonl:3" in go(bench, tmp_path / "o", *more, stages=("s1",), code=2).stderr


@pytest.mark.parametrize(
    "more, word",
    [
        (("--select", "iterit", "--replay", "0.1"), "cannot be combined with --replay"),
        (("--scores", "x"), "--scores needs --select"),
        (("--select", "iterit", "--ratio", "0"), "a fraction above 0 and below 1"),
        (("--select", "iterit", "--ratio", "1.9"), "or a whole number of rows, is 1.9"),
        (("--select", "iterit", "--update-ratio", "0.5"), "at least 1"),
        (("--select", "iterit", "--scores", "nowhere"), "nowhere"),
        (("--select", "best"), "invalid choice"),
    ],
)
def test_wrong_arguments(more, word, bench, tmp_path):
    assert word in go(bench, tmp_path / "o", *more, code=2, stages=("s1",)).stderr
