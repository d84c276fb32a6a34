"""Changes of CONTRIBUTING.md, made as a reader would make them: each has its effect everywhere or nowhere."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Forked, close, go, metrics, same, training, weights
from safetensors.torch import load_file, save_file

import data
import score
import train
from data import subset, tokenize_files
from model import Transformer, VarlenAttention, load_model
from parts import decoding
from parts.distributed import DistributedEnv, init_distributed
from parts.keyed_random import keyed_uniform, random_key, token_keys

ALONE = DistributedEnv(0, 1, torch.device("cpu"), None)


def documents_of(bench, name="s1"):
    return tokenize_files([bench / f"{name}.jsonl"], bench / "m", "phased", 2048, shown=False)


def inputs_of(documents, rows):
    return [torch.from_numpy(a) for a in documents.pack(np.array(rows))]


def with_changes(*changes):
    """train.py with attributes replaced: (owner, name, value)."""

    def main(argv):
        for owner, name, value in changes:
            setattr(owner, name, value)
        return train.main(argv)

    return main


# ---------------------------------------------------------------- one function from hidden state to logits


def capped(self, x, linear):
    """Gemma 2's soft-capping."""
    return 0.5 * torch.tanh(linear(x) / 0.5)


def test_capped_logits_apply_to_training_loss_held_out_loss_ifd_and_generation(bench, monkeypatch):
    llama, documents = load_model(bench / "m"), documents_of(bench)
    batch, trained = np.arange(8), dict(llama.named_parameters())
    inputs = inputs_of(documents, batch)
    uncapped = llama(*inputs[:3])
    plain_ifd = score.measure_ifd(llama, documents)
    monkeypatch.setattr(Transformer, "head_logits", capped)

    def mean_loss(documents, rows):
        *inputs, targets = inputs_of(documents, rows)
        return F.cross_entropy(llama(*inputs), targets)

    logits = llama(*inputs[:3])
    torch.testing.assert_close(logits, 0.5 * torch.tanh(uncapped / 0.5))
    wanted = F.cross_entropy(logits, inputs[3])
    gradients = torch.autograd.grad(wanted, list(trained.values()))
    with init_distributed():
        loss = train.batch_gradients(llama, trained, documents, batch, 64, ALONE, lambda: None)
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        for p, gradient in zip(trained.values(), gradients):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)
        held_out = train.held_out_loss(llama, documents, 64, ALONE, lambda: False, "")
        assert held_out == pytest.approx(mean_loss(documents, np.arange(len(documents))).item(), rel=1e-5)
    ifd = score.measure_ifd(llama, documents)
    assert not torch.allclose(ifd, plain_ifd, rtol=1e-2)
    tokens, targets = inputs_of(documents, [0])[0], inputs_of(documents, [0])[3]
    answer = targets[targets != -100]
    alone = torch.cat([tokens[:1], answer])
    by_itself = llama(alone, torch.arange(len(alone)), torch.tensor([0, len(alone)], dtype=torch.int32))
    ratio = (mean_loss(documents, [0]) - F.cross_entropy(by_itself[:-1], answer)).exp()
    assert ifd[0].item() == pytest.approx(ratio.item(), rel=1e-4)
    with torch.no_grad():
        cu_seqlens = inputs[2]
        lengths = cu_seqlens.diff().repeat_interleave(cu_seqlens.diff())
        attention = [VarlenAttention(cu_seqlens, int(lengths.max()), None)] * len(llama.layers)
        torch.testing.assert_close(llama.logits_at(inputs[0], inputs[1], lengths, attention, slice(None)), logits)


# ---------------------------------------------------------------- training loss and measured loss


def focal(losses, log_z, at):
    return (1 - (-losses).exp()).square() * losses


def test_a_reweighted_training_loss_changes_the_gradient_and_no_measured_loss(bench, tmp_path):
    more = ["--eval", "s2", "--select", "static", "--ratio", "12", "--batch-size", "12"]
    go(bench, tmp_path / "a", *more, stages=("s1",))
    changed = with_changes((train, "training_loss", focal))
    go(bench, tmp_path / "b", *more, "--micro-tokens", "100", main=changed, stages=("s1",))
    before, after = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    (chosen, start, step), (chosen_, start_, step_) = before[:3], after[:3]
    close([start, chosen], [start_, chosen_])
    assert "eval_loss" in start and step_["loss"] == pytest.approx(step["loss"], rel=1e-5)
    ifd = [(tmp_path / name / "stage1/selection-epoch0.jsonl").read_text() for name in "ab"]
    ifd = [{row["id"]: row["ifd"] for row in map(json.loads, text.splitlines())} for text in ifd]
    assert ifd[0] == pytest.approx(ifd[1], rel=1e-5)

    documents, llama = documents_of(bench), load_model(bench / "m")
    ids = json.loads((tmp_path / "b/order.jsonl").read_text().splitlines()[0])["ids"]
    *inputs, targets = inputs_of(documents, [list(documents.ids).index(i) for i in ids])
    losses = F.cross_entropy(llama(*inputs), targets, reduction="none")[targets != -100]
    focal(losses, None, None).mean().backward()
    norm = torch.stack([p.grad.norm() for p in llama.parameters()]).norm()
    assert step_["grad_norm"] == pytest.approx(norm.item(), rel=1e-3) != step["grad_norm"]


# ---------------------------------------------------------------- train and eval mode


def test_the_model_is_in_train_mode_only_for_gradients(bench, tmp_path):
    assert not load_model(bench / "m").training
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Say abc."}) + "\n")
    log, embed_tokens = tmp_path / "modes", Transformer.embed_tokens

    def logged(self, tokens, lengths, keys):
        with open(log, "a") as file:
            file.write(f"{all(m.training for m in self.modules())} {torch.is_grad_enabled()} {keys is not None}\n")
        return embed_tokens(self, tokens, lengths, keys)

    more = ["--eval", "s2", "--eval-every", "2", "--select", "iterit", "--sample", str(tmp_path / "p.jsonl")]
    main = with_changes((Transformer, "embed_tokens", logged))
    go(bench, tmp_path / "o", *more, "--ratio", "24", "--checkpoint-activations", main=main, stages=("s1",))
    modes = log.read_text().splitlines()
    assert set(modes) == {"True True True", "False False False"} and modes.count("True True True") == 4  # and the check


# ---------------------------------------------------------------- randomness in the model


embed_tokens = Transformer.embed_tokens


def neftune(self, tokens, lengths, keys):
    """NEFTune (arXiv 2310.05914): uniform noise of scale alpha / sqrt(L C) on the embeddings, in training."""
    x = embed_tokens(self, tokens, lengths, keys)
    if self.training:
        noise = 2 * keyed_uniform(keys, x.shape[1]) - 1
        x = x + (50 * noise / (lengths * x.shape[1]).sqrt()[:, None]).to(x.dtype)
    return x


def test_noise_does_not_depend_on_micro_batches_ranks_or_kills(bench, tmp_path):
    more, main = ["--eval", "s2", "--save-every", "1"], with_changes((Transformer, "embed_tokens", neftune))
    go(bench, tmp_path / "plain", *more, stages=("s1", "s2"))
    go(bench, tmp_path / "a", *more, "--micro-tokens", "1", main=main, stages=("s1", "s2"))
    go(bench, tmp_path / "b", *more, "--micro-tokens", str(10**6), main=main, stages=("s1", "s2"))
    go(bench, tmp_path / "c", *more, main=main, ranks=2, stages=("s1", "s2"))
    close(metrics(tmp_path / "a"), metrics(tmp_path / "b"))
    close(metrics(tmp_path / "c"), metrics(tmp_path / "b"))
    Forked(main, training(tmp_path / "d", *more, stages=("s1", "s2")), bench).wait_until(
        (tmp_path / "d" / "resume" / "000-00000003").exists
    ).kill()
    go(bench, tmp_path / "d", *more, main=main, stages=("s1", "s2"))
    go(bench, tmp_path / "e", *more, main=main, stages=("s1", "s2"))
    assert metrics(tmp_path / "d") == metrics(tmp_path / "e")
    assert same(weights(tmp_path / "d", "stage2"), weights(tmp_path / "e", "stage2"))
    plain, noisy = metrics(tmp_path / "plain"), metrics(tmp_path / "b")
    assert plain[0] == noisy[0]  # held-out loss at the start
    assert noisy[1]["loss"] != pytest.approx(plain[1]["loss"], rel=1e-3)


def test_keyed_numbers_are_uniform_and_depend_only_on_the_token():
    lengths = torch.tensor([300, 1, 200])
    positions = torch.cat([torch.arange(n) for n in lengths])
    keys = token_keys(torch.tensor([random_key(0, 5, d) for d in (3, 9, 4)]), positions, lengths)
    drawn = keyed_uniform(keys, 64)
    alone = keyed_uniform(token_keys(torch.tensor([random_key(0, 5, 4)]), torch.arange(200), torch.tensor([200])), 64)
    assert torch.equal(drawn[301:], alone)
    assert drawn.min() >= 0 and drawn.max() < 1 and len(drawn.unique()) > 0.99 * drawn.numel()
    counts = torch.histc(drawn, bins=16, min=0, max=1)
    expected = drawn.numel() / 16
    assert ((counts - expected).square() / expected).sum() < 45  # chi square of 15 degrees: 1 in 10,000
    z = drawn - drawn.mean()
    for other in (z.roll(1, 0), z.roll(1, 1), keyed_uniform(keys + 1, 64) - 0.5):
        assert abs((z * other).mean() / z.var()) < 0.02


# ---------------------------------------------------------------- more state


update_weights, finish_run = train.update_weights, train.finish_run


def copy_weights(trained):
    return {f"ema/{name}": p.detach().clone() for name, p in trained.items()}


def update_and_average(state, lr):
    """EMA: an exponential moving average of the weights."""
    update_weights(state, lr)
    for name, p in state.trained.items():
        state.more[f"ema/{name}"].lerp_(p.detach(), 0.1)


AVERAGED = [(train, "more_state", copy_weights), (train, "update_weights", update_and_average)]


def test_an_average_of_the_weights_survives_a_kill(bench, tmp_path):
    def write_and_finish(run):
        average = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in run.state.more.items()}
        save_file(average, run.output.out / f"ema{run.ranks.rank}.safetensors")
        finish_run(run)

    main = with_changes(*AVERAGED, (train, "finish_run", write_and_finish))
    more, stages = ["--save-every", "1"], ("s1", "s2")
    for ranks in (None, 2):
        a, b = tmp_path / f"a{ranks}", tmp_path / f"b{ranks}"
        go(bench, a, *more, main=main, stages=stages, ranks=ranks)
        run = Forked(main, training(b, *more, stages=stages), bench, ranks)
        run.wait_until((b / "resume" / "000-00000003").exists).kill()
        assert "Resuming" in go(bench, b, *more, main=main, stages=stages, ranks=ranks).stdout
        whole, again = load_file(a / "ema0.safetensors"), load_file(b / "ema0.safetensors")
        assert same(whole, again)
    name = "ema/embed.weight"
    assert not torch.equal(whole[name], weights(a, "stage2")["model.embed_tokens.weight"])
    done = go(bench, tmp_path / "bNone", *more, stages=stages, code=2)
    assert "do not belong to" in done.stderr and name in done.stderr


def swap_average(state):
    for name, p in state.trained.items():
        average = state.more[f"ema/{name}"]
        weight = p.detach().clone()
        p.data.copy_(average)
        average.copy_(weight)


def with_average(function):
    """train.evaluate or train.answer_samples, with the weights exchanged for their average."""

    def exchanged(run, *rest):
        swap_average(run.state)
        result = function(run, *rest)
        swap_average(run.state)
        return result

    return exchanged


@pytest.mark.parametrize("module, name, call", [
    (train, "held_out_loss", 3), (train, "held_out_loss", 4), (decoding, "decode_step", 3),
])  # fmt: skip
def test_weights_exchanged_for_a_measurement_are_not_saved(module, name, call, bench, tmp_path):
    """A signal during a measurement ends it, and the state is saved after the weights are exchanged back."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Say abc."}) + "\n")
    flags, stages = ["--eval", "s2", "s3", "--sample-prompts", str(tmp_path / "p.jsonl")], ("s1", "s2")
    measurements = [(train, f, with_average(getattr(train, f))) for f in ("evaluate", "answer_samples")]
    calls, function = [], getattr(module, name)

    def with_signal(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    go(bench, tmp_path / "a", *flags, stages=stages, main=with_changes(*AVERAGED, *measurements))
    interrupted = with_changes(*AVERAGED, *measurements, (module, name, with_signal))
    assert "state saved" in go(bench, tmp_path / "b", *flags, stages=stages, main=interrupted, code=130).stderr
    go(bench, tmp_path / "b", *flags, stages=stages, main=with_changes(*AVERAGED, *measurements))
    assert same(weights(tmp_path / "b", "stage2"), weights(tmp_path / "a", "stage2"))
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")


@pytest.mark.parametrize("call", [3, 4])
def test_weights_exchanged_for_all_of_a_stages_end_are_not_saved(call, bench, tmp_path):
    """The exchange spans evaluation, samples and export; a signal in the evaluation stops the run without a save."""
    runs, evaluate, export, held_out_loss, calls = [], train.evaluate, train.export, train.held_out_loss, []

    def exchange_and_evaluate(run, label):
        if label != "start":
            swap_average(run.state)
            runs.append(run)
        return evaluate(run, label)

    def export_and_exchange_back(*args):
        export(*args)
        swap_average(runs[-1].state)

    def with_signal(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return held_out_loss(*args, **kwargs)

    flags, stages = ["--eval", "s2", "s3"], ("s1", "s2")
    ends = [(train, "evaluate", exchange_and_evaluate), (train, "export", export_and_exchange_back)]
    go(bench, tmp_path / "a", *flags, stages=stages, main=with_changes(*AVERAGED, *ends))
    interrupted = with_changes(*AVERAGED, *ends, (train, "held_out_loss", with_signal))
    assert "state saved" in go(bench, tmp_path / "b", *flags, stages=stages, main=interrupted, code=130).stderr
    go(bench, tmp_path / "b", *flags, stages=stages, main=with_changes(*AVERAGED, *ends))
    assert same(weights(tmp_path / "b", "stage2"), weights(tmp_path / "a", "stage2"))
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")


# ---------------------------------------------------------------- overlapping stages


def test_overlapping_stages_select_from_their_own_rows_only(bench, tmp_path):
    def overlapping(k, of_stages, replay, seed):
        """The first fifth of the next stage."""
        return [subset(d, np.arange(len(d) // 5)) for d in of_stages[k + 1 : k + 2]]

    main = with_changes((data, "rows_of_other_stages", overlapping))
    flags = ["--select", "iterit", "--ratio", "9", "--epochs", "2", "--batch-size", "5"]
    go(bench, tmp_path / "o", *flags, main=main, stages=("s1", "s2", "s3"))
    order = [json.loads(line) for line in (tmp_path / "o/order.jsonl").read_text().splitlines()]
    for k, mixed_in in ((1, 4), (2, 5), (3, 0)):
        steps = [row for row in order if row["stage"] == f"stage{k}"]
        for epoch in (0, 1):
            rows = (tmp_path / f"o/stage{k}/selection-epoch{epoch}.jsonl").read_text().splitlines()
            chosen = [row["id"] for row in map(json.loads, rows) if row["chosen"]]
            assert len(chosen) == 9 and all(json.loads(row)["id"].startswith(f"s{k}-") for row in rows)
            seen = [i for row in steps if row["epoch"] == epoch + 1 for i in row["ids"]]
            assert sorted(seen) == sorted([*chosen, *(f"s{k + 1}-{i}" for i in range(mixed_in))])
        assert len(steps) == 2 * -(-(9 + mixed_in) // 5)
    go(bench, tmp_path / "p", "--batch-size", "5", main=main, stages=("s1", "s2"))
    order = [json.loads(line) for line in (tmp_path / "p/order.jsonl").read_text().splitlines()]
    assert sum(len(row["ids"]) for row in order if row["stage"] == "stage1") == 30 + 4
