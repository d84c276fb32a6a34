"""Solutions of the exercises of docs/tour.md, and tests of their results."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, go, metrics, run_forked

import data
import score
import train
from data import tokenize_files
from model import load_model
from parts import options
from parts.distributed import DistributedEnv, init_distributed
from parts.text.rows import Turn
from parts.text.templates import TEMPLATES, Template, render
from parts.text.tokenizers import load_tokenizer

# ---------------------------------------------------------------- 1. a template

VICUNA = Template(
    first=("USER: {}",), later=(" USER: {}",), header=(" ASSISTANT: ",), answer=("{}", "‹eos›"), system_text="{} "
)


def test_a_new_template_trains_and_its_prompts_are_prefixes_of_its_documents(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(TEMPLATES, "vicuna", VICUNA)
    tokenizer = load_tokenizer(bench / "m")
    turns = [Turn("user", "hi"), Turn("assistant", "ho"), Turn("user", "hu"), Turn("assistant", "ha")]
    tokens, loss_mask = render(turns, VICUNA, tokenizer)
    for end in (1, 3):
        prompt, _ = render(turns[:end], VICUNA, tokenizer)
        assert tokens[: len(prompt)] == prompt and not loss_mask[len(prompt) - 1]
    learned = [t for t, learn in zip(tokens, loss_mask) if learn]
    eos = tokenizer.eos_ids[0]
    assert learned.count(eos) == tokens.count(eos) == 2
    assert tokenizer.decode([t for t in learned if t != eos]).replace(" ", "") == "hoha"
    go(bench, tmp_path / "o", "--template", "vicuna", stages=("s1",))
    assert json.loads((tmp_path / "o/stage1/template.json").read_text()) == {"template": "vicuna"}


# ---------------------------------------------------------------- 2. a z-loss


def with_z_loss(losses, log_z, at):
    """PaLM (arXiv 2204.02311, section 5)."""
    return losses + 1e-4 * log_z.square()


def test_a_z_loss_changes_the_gradient_and_no_measured_loss(bench, monkeypatch):
    llama = load_model(bench / "m")
    documents = tokenize_files([bench / "s1.jsonl"], bench / "m", "phased", 2048, shown=False)
    batch, trained = np.arange(8), dict(llama.named_parameters())
    inputs = [torch.from_numpy(a) for a in documents.pack(batch)]
    logits, targets = llama(*inputs[:3]), inputs[3]
    logits, targets = logits[targets != -100], targets[targets != -100]
    cross_entropy = F.cross_entropy(logits, targets)
    wanted = cross_entropy + 1e-4 * logits.logsumexp(1).square().mean()
    wanted_gradients = torch.autograd.grad(wanted, list(trained.values()))

    measured, ifd = llama(*inputs)[1], score.measure_ifd(llama, documents)
    alone = DistributedEnv(0, 1, torch.device("cpu"), None)
    with monkeypatch.context() as patch, init_distributed():
        patch.setattr(train, "training_loss", with_z_loss)
        assert torch.equal(llama(*inputs)[1], measured)
        assert torch.equal(score.measure_ifd(llama, documents), ifd)
        for micro_batch_tokens in (4096, 64):
            loss = train.batch_gradients(llama, trained, documents, batch, micro_batch_tokens, alone, lambda: None)
            assert loss == pytest.approx(cross_entropy.item(), rel=1e-5)  # as measured
            for p, gradient in zip(trained.values(), wanted_gradients):
                torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)
    total, losses = llama(*inputs)  # the gradient without the solution is different
    plain = torch.autograd.grad(total / len(losses), list(trained.values()))
    assert any(not torch.allclose(a, b, rtol=1e-4) for a, b in zip(plain, wanted_gradients))


# ---------------------------------------------------------------- 3. a schedule


def warmup_stable_decay(step, steps, peak, schedule, warmup_ratio):
    """As learning_rate, with "wsd": constant after warm-up, linear to 0 over the last fifth."""
    if schedule != "wsd":
        return learning_rate(step, steps, peak, schedule, warmup_ratio)
    constant = learning_rate(step, steps, peak, "constant", warmup_ratio)
    return constant * min(1.0, (steps - step) / (0.2 * steps))


learning_rate, make_parser = train.learning_rate, options.make_parser


def parser_with_wsd(*args):
    parser = make_parser(*args)
    action = next(a for a in parser._actions if a.dest == "schedule")
    action.choices = [*action.choices, "wsd"]
    return parser


def test_a_new_schedule_sets_the_rates_of_every_stage(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", warmup_stable_decay)
    monkeypatch.setattr(options, "make_parser", parser_with_wsd)
    flags = ("--schedule", "wsd", "--lr", "1e-3", "--batch-size", "3", "--warmup-ratio", "0.2")
    go(bench, tmp_path / "o", *flags, stages=("s1", "s1"))
    rates = [row["lr"] for row in metrics(tmp_path / "o")]
    assert rates == pytest.approx(2 * [0.0005, *8 * [0.001], 0.0005])  # 30 rows: 10 steps a stage


# ---------------------------------------------------------------- 4. frozen embeddings


def all_but_the_embedding(llama):
    llama.embed.weight.requires_grad_(False)
    return trained_parameters(llama)


trained_parameters = train.trained_parameters


def test_frozen_embeddings_do_not_change_and_all_other_weights_do(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "trained_parameters", all_but_the_embedding)
    go(bench, tmp_path / "o", stages=("s1",))
    before, after = (load_model(folder).state_dict() for folder in (bench / "m", tmp_path / "o/stage1"))
    assert [name for name in before if torch.equal(before[name], after[name])] == ["embed.weight"]
    state = (tmp_path / "o/resume").rglob("*.safetensors")
    assert not any(b"embed_tokens" in path.read_bytes() or b"embed.weight" in path.read_bytes() for path in state)


# ---------------------------------------------------------------- 5. a selection score


@torch.no_grad()
def measure_perplexity(llama, documents, micro_batch_tokens=4096, rank=0, world_size=1):
    """Of the supervised tokens of each document, (D,) fp32."""
    perplexities = torch.zeros(len(documents))
    for part in data.micro_batches(np.arange(len(documents)), documents.lengths, 1, micro_batch_tokens)[0]:
        _, losses = llama(*(torch.from_numpy(a) for a in documents.pack(part)))
        for d, of_document in zip(part, losses.split(documents.target_counts[part].tolist())):
            perplexities[d] = of_document.double().mean().exp()
    return perplexities


PERPLEXITY = score.Score("perplexity", "perplexity", measure_perplexity, worth=lambda values: values)


def test_a_new_score_selects_the_rows_with_the_highest_perplexity(bench, tmp_path, monkeypatch):
    """In train.py and in score.py, where IFD's rule would choose the lowest values first."""
    monkeypatch.setattr(score, "SELECTION_SCORE", PERPLEXITY)
    llama = load_model(bench / "m")
    documents = tokenize_files([bench / "s1.jsonl"], bench / "m", "phased", 2048, shown=False)
    values = {}
    for d in range(len(documents)):
        *inputs, targets = (torch.from_numpy(a) for a in documents.pack(np.array([d])))
        values[documents.ids[d]] = F.cross_entropy(llama(*inputs), targets).exp().item()
    assert min(values.values()) > 1
    hardest = sorted(values, key=values.get, reverse=True)[:6]
    flags = ["--select", "iterit", "--score-type", "ifd", "--ratio", "6"]
    output = go(bench, tmp_path / "o", *flags, stages=("s1",)).stdout
    rows = [json.loads(line) for line in (tmp_path / "o/stage1/selection-epoch0.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows if row["chosen"]] == hardest
    assert [row["perplexity"] for row in rows] == pytest.approx(sorted(values.values(), reverse=True), rel=1e-4)
    assert "6 of 30 chosen, perplexity " in output and "better" not in output

    scored, selected = tmp_path / "scored.jsonl", tmp_path / "selected.jsonl"
    arguments = ["ifd", "s1.jsonl", "--model", "m", "--out", scored, "--dtype", "fp32"]
    output = run_forked(score.main, *arguments, cwd=bench).stdout
    assert "perplexity: median" in output and "1 or above" not in output
    for by in ("score", "diversity"):
        run_forked(score.main, "select", scored, "--out", selected, "--ratio", "6", "--by", by)
        rows = [json.loads(line) for line in selected.read_text().splitlines()]
        assert len(rows) == 6 and (by == "diversity" or [row["id"] for row in rows] == hardest)
        assert all(row["perplexity"] == pytest.approx(values[row["id"]], rel=1e-4) for row in rows)
    output = go(bench, tmp_path / "p", *flags, "--scores", str(scored), stages=("s1",)).stdout
    assert "0 rows scored" in output
    ids = json.loads((tmp_path / "p/order.jsonl").read_text().splitlines()[0])["ids"]
    assert set(ids) == set(hardest)


def test_the_tour_names_every_exercise():
    text = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    asked = text[text.index("## Exercises") :]
    for n, words in enumerate(("template", "z-loss", "schedule", "embeddings", "score"), 1):
        assert words in asked.split(f"\n{n}. **")[1].split("**")[0]
