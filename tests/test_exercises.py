"""Solutions of the exercises of docs/tour.md, applied to the running program, and what they promise."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, go, metrics

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


@contextmanager
def replaced(owner, name, value):
    """An attribute replaced for a while: what the solution would write into the file."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# ---------------------------------------------------------------- 1. a template

VICUNA = Template(
    first=("USER: {}",), later=(" USER: {}",), header=(" ASSISTANT: ",), answer=("{}", "‹eos›"), system_text="{} "
)


def test_a_new_template_trains_and_its_prompts_begin_its_documents(bench, tmp_path, monkeypatch):
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


def test_a_z_loss_changes_the_gradient_and_no_measured_loss(bench):
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
    with replaced(train, "training_loss", with_z_loss), init_distributed():
        assert torch.equal(llama(*inputs)[1], measured)
        assert torch.equal(score.measure_ifd(llama, documents), ifd)
        for micro_tokens in (4096, 64):
            loss = train.batch_gradients(llama, trained, documents, batch, micro_tokens, alone, lambda: None)
            assert loss == pytest.approx(cross_entropy.item(), rel=1e-5)  # as measured
            for p, gradient in zip(trained.values(), wanted_gradients):
                torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)
    total, losses = llama(*inputs)  # without the solution the gradient is another one
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


def test_frozen_embeddings_keep_their_bits_and_all_others_move(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "trained_parameters", all_but_the_embedding)
    go(bench, tmp_path / "o", stages=("s1",))
    before, after = (load_model(folder).state_dict() for folder in (bench / "m", tmp_path / "o/stage1"))
    assert [name for name in before if torch.equal(before[name], after[name])] == ["embed.weight"]
    state = (tmp_path / "o/resume").rglob("*.safetensors")
    assert not any(b"embed_tokens" in path.read_bytes() or b"embed.weight" in path.read_bytes() for path in state)


# ---------------------------------------------------------------- 5. a selection score


@torch.no_grad()
def measure_perplexity(llama, documents, micro_tokens=4096, rank=0, world_size=1):
    """Of the supervised tokens of each document, (D,) fp32."""
    found = torch.zeros(len(documents))
    for part in data.micro_batches(np.arange(len(documents)), documents.lengths, 1, micro_tokens)[0]:
        _, losses = llama(*(torch.from_numpy(a) for a in documents.pack(part)))
        for d, of_document in zip(part, losses.split(documents.target_counts[part].tolist())):
            found[d] = of_document.double().mean().exp()
    return found


PERPLEXITY = score.Score("perplexity", "perplexity", measure_perplexity, worth=lambda values: values)


def test_a_new_score_selects_the_rows_with_the_highest_perplexity(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "SCORE", PERPLEXITY)
    flags = ("--select", "iterit", "--score-type", "ifd", "--ratio", "6")
    go(bench, tmp_path / "o", *flags, stages=("s1",))
    chosen = json.loads((tmp_path / "o/order.jsonl").read_text().splitlines()[0])["ids"]
    llama = load_model(bench / "m")
    documents = tokenize_files([bench / "s1.jsonl"], bench / "m", "phased", 2048, shown=False)
    losses = {}
    for d in range(len(documents)):
        tokens, positions, cu_seqlens, targets = (torch.from_numpy(a) for a in documents.pack(np.array([d])))
        losses[documents.ids[d]] = F.cross_entropy(llama(tokens, positions, cu_seqlens), targets).item()
    hardest = sorted(losses, key=losses.get, reverse=True)[:6]
    assert set(chosen) == set(hardest)


def test_the_tour_names_every_exercise():
    text = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    asked = text[text.index("## Exercises") :]
    for n, words in enumerate(("template", "z-loss", "schedule", "embeddings", "score"), 1):
        assert words in asked.split(f"\n{n}. **")[1].split("**")[0]
