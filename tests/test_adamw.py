"""--param-dtype bf16: rounding, the optimizer against torch's, saving and resuming."""

import numpy as np
import pytest
import torch
from conftest import Forked, close, go, metrics, run_forked, same, training, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Shard, distribute_tensor

import train
from parts import adamw, memory_plan
from parts.adamw import StochasticAdamW, stochastic_round_
from parts.checkpoints.config import parse_config
from parts.distributed import gradient_norm
from parts.options import Weights

ALL_RANDOM_BITS = torch.arange(2**16, dtype=torch.int32)
BF16 = ["--weights", "bf16", "--eval", "s2", "--save-every", "1"]


@pytest.fixture(scope="module")
def reference(bench):
    """A run without kills and signals."""
    go(bench, bench / "bf16", *BF16)
    return bench / "bf16"


def patterns(*numbers):
    return torch.tensor(numbers, dtype=torch.int64).to(torch.int32).view(torch.float32)


# ---------------------------------------------------------------- the rounding


@settings(max_examples=300, deadline=None)
@given(st.integers(-(2**31), 2**31 - 1))
def test_stochastic_rounding_is_unbiased_and_returns_a_neighbour(pattern):
    """For any fp32 number, also subnormal ones, over all random bits."""
    x = patterns(pattern)
    found = stochastic_round_(x.expand(2**16).clone(), ALL_RANDOM_BITS)
    assert torch.equal(found.bfloat16().float().nan_to_num(7), found.nan_to_num(7))  # all are exact in bf16
    if not x.isfinite():
        assert torch.equal(found.isnan(), x.isnan().expand(2**16)) and (x.isnan() or (found == x).all())
        return
    down = patterns(pattern - pattern % 2**16)  # towards zero
    up = patterns((pattern - pattern % 2**16 + 2**16 + 2**31) % 2**32 - 2**31) if pattern % 2**16 else down
    assert set(found.tolist()) <= {down.item(), up.item()}
    if up.isfinite():  # beyond the largest number of bf16 the other neighbour is inf
        assert found.double().mean().item() == pytest.approx(x.double().item(), rel=1e-12, abs=0)
    assert (found == up).sum() == (pattern % 2**16 or 2**16)


@pytest.mark.parametrize(
    "pattern", [0x7FFFFFFF, 0x7FC00000, -0x400000, -1, 0x7F800000, -0x800000, 0, -(2**31), 1, 0x8000]
)
def test_rounding_of_special_numbers_is_unbiased(pattern):
    x = patterns(pattern)
    found = stochastic_round_(x.expand(2**16).clone(), ALL_RANDOM_BITS)
    if x.isfinite():
        assert found.double().mean().item() == x.double().item()
    else:
        assert (found.isnan().all() and x.isnan().all()) or (found == x).all()


# ---------------------------------------------------------------- the optimizer


def stepped(p, grads, seed=0, first_step=0, lr=1e-3, decay=0.1):
    optimizer = StochasticAdamW([{"params": [p], "weight_decay": decay}], (0.9, 0.95), 1e-8, seed)
    for group in optimizer.param_groups:
        group["lr"], group["step"] = lr, first_step
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return optimizer.state[p]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 300), st.sampled_from([1, 64, 100, 2**16]), st.floats(1e-6, 1e-1))
def test_a_step_equals_torch_adamw_up_to_rounding(seed, size, at_once, lr):
    """Three steps; before each step the reference gets the rounded values."""
    torch.manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(size).bfloat16())
    grads = [torch.randn(size).bfloat16() for _ in range(3)]
    reference = torch.nn.Parameter(p.detach().float())
    exact = torch.optim.AdamW([reference], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours = StochasticAdamW([{"params": [p], "weight_decay": 0.1}], (0.9, 0.95), 1e-8, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(adamw.CHUNK_NUMEL, "cpu", at_once)
        for grad in grads:
            p.grad, reference.grad = grad, grad.float()
            ours.param_groups[0]["lr"] = lr
            exact.step()
            ours.step()
            moments = [(ours.state[p][key], exact.state[reference][key]) for key in ("exp_avg", "exp_avg_sq")]
            for rounded, wanted in [(p, reference), *moments]:
                assert rounded.dtype == torch.bfloat16
                spacing = 2.0 ** (wanted.detach().abs().clamp(min=1e-30).log2().floor() - 7)  # of bf16 numbers
                assert ((rounded.float() - wanted).abs() <= 1.001 * spacing).all()
                wanted.data.copy_(rounded.detach())


def test_updates_below_the_resolution_of_bf16_accumulate_on_average():
    p = torch.nn.Parameter(torch.full((400_000,), 0.75).bfloat16())  # numbers beside it are 2^-8 away
    stepped(p, [torch.ones_like(p)] * 20, lr=1e-5, decay=0.0)
    moved = (0.75 - p.detach().double()).mean().item()
    deviation = 2**-8 * (20 * 1e-5 / 2**-8) ** 0.5 / 400_000**0.5
    assert moved == pytest.approx(20 * 1e-5, abs=4 * deviation) and deviation < 2e-6
    p = torch.nn.Parameter(torch.full((400_000,), 0.75).bfloat16())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "stochastic_round_", lambda x, bits: x)
        stepped(p, [torch.ones_like(p)] * 20, lr=1e-5, decay=0.0)
    assert (p == 0.75).all()  # rounded to the nearest nothing ever moves


def test_random_bits_depend_only_on_seed_step_parameter_and_position():
    def moved(**more):
        p = torch.nn.Parameter(torch.full((600_000,), 0.75).bfloat16())
        stepped(p, [torch.ones_like(p)], **({"lr": 1e-3, "decay": 0.0} | more))
        return p.detach() != 0.75

    one = moved()
    assert torch.equal(one, moved()) and 0.2 < one.double().mean() < 0.3
    n = adamw.CHUNK_NUMEL["cpu"]
    for other in (moved(seed=1), moved(first_step=1), torch.cat((one[n:], one[:n])), torch.cat((one[1:], one[:1]))):
        together, alone = (one & other).double().mean(), one.double().mean() * other.double().mean()
        assert together.item() == pytest.approx(alone.item(), rel=0.05)


def sharded_step(out):
    """Steps on several ranks; the first one saves the full parameter."""

    def main(argv):
        adamw.CHUNK_NUMEL["cpu"] = 64
        with train.init_distributed() as ranks:
            torch.manual_seed(0)
            whole, grad = torch.randn(37, 5).bfloat16(), torch.randn(37, 5).bfloat16()
            p = torch.nn.Parameter(distribute_tensor(whole, ranks.mesh, [Shard(0)]))
            stepped(p, [distribute_tensor(grad, ranks.mesh, [Shard(0)])] * 3)
            found = p.detach().full_tensor()
            if ranks.rank == 0:
                save_file({"p": found}, out)
        return 0

    return main


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_parameters_get_the_same_update(ranks, tmp_path, monkeypatch):
    run_forked(sharded_step(tmp_path / "p"), ranks=ranks)
    monkeypatch.setitem(adamw.CHUNK_NUMEL, "cpu", 64)
    torch.manual_seed(0)
    p, grad = torch.nn.Parameter(torch.randn(37, 5).bfloat16()), torch.randn(37, 5).bfloat16()
    stepped(p, [grad] * 3)
    assert torch.equal(load_file(tmp_path / "p")["p"], p.detach())


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize("ranks, again, more", [(None, None, []), (2, 2, ["--optimizer-state", "keep"]), (2, None, [])])
def test_a_killed_run_resumes_exactly(ranks, again, more, bench, reference, tmp_path):
    if more or ranks != again:
        go(bench, tmp_path / "a", *BF16, *more, ranks=ranks)
    whole = tmp_path / "a" if (tmp_path / "a").exists() else reference
    run = Forked(train.main, training(tmp_path / "b", *BF16, *more), bench, ranks)
    run.wait_until((tmp_path / "b" / "resume" / "001-00000002").exists).kill()
    assert "Resuming" in go(bench, tmp_path / "b", *BF16, *more, ranks=again).stdout
    if ranks == again:
        assert same(weights(tmp_path / "b"), weights(whole)) and metrics(tmp_path / "b") == metrics(whole)
    for ours, theirs in zip(metrics(tmp_path / "b"), metrics(whole), strict=True):
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=2e-3)


def test_the_number_of_ranks_does_not_change_the_result(bench, reference, tmp_path):
    go(bench, tmp_path / "o", *BF16, ranks=2)
    for ours, theirs in zip(metrics(tmp_path / "o"), metrics(reference), strict=True):
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=2e-3)
    equal = [(weights(tmp_path / "o")[n] == w).double().mean().item() for n, w in weights(reference).items()]
    assert np.mean(equal) > 0.7  # gradients summed in another order are rounded elsewhere at times


def test_weights_and_state_are_bf16_and_the_export_is_unchanged(bench, reference, tmp_path):
    state = load_file(sorted((reference / "resume").iterdir())[0] / "rank00000.safetensors")
    assert {name.rpartition("/")[0] for name in state} == {"weight", "optimizer/exp_avg", "optimizer/exp_avg_sq"}
    assert all(t.dtype == torch.bfloat16 for t in state.values())
    assert all(w.dtype == torch.float32 and torch.equal(w, w.bfloat16().float()) for w in weights(reference).values())
    more = ["--save-dtype", "bf16", "--checkpoint-activations", "--replay", "0.5", "--dtype", "bf16"]
    go(bench, tmp_path / "o", *BF16, *more, stages=("s1", "s2"))
    assert all(w.dtype == torch.bfloat16 for w in weights(tmp_path / "o", "stage2").values())
    go(bench, tmp_path / "p", *BF16, "--select", "iterit", "--ratio", "12", stages=("s1",))
    assert "--param-dtype was 'bf16', is 'fp32'" in go(bench, reference, *BF16[2:], code=2).stderr


def test_bf16_weights_learn_like_fp32_weights(bench, reference, tmp_path):
    go(bench, tmp_path / "o", *BF16[2:])
    losses = [[row["eval_loss"] for row in metrics(out) if "eval_loss" in row] for out in (reference, tmp_path / "o")]
    assert losses[1][0] - losses[1][-1] > 0.2
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize("killed", [False, True])
def test_every_step_of_a_run_uses_other_random_bits(killed, bench, tmp_path):
    def main(argv):
        real = adamw.torch.randint

        def randint(*a, generator, **kw):
            with open(tmp_path / "drawn", "a") as file:
                file.write(f"{generator.initial_seed()}\n")
            return real(*a, generator=generator, **kw)

        adamw.torch.randint = randint
        return train.main(argv)

    arguments = training(tmp_path / "o", *BF16, stages=("s1", "s1", "s2"))
    if killed:
        run = Forked(main, arguments, bench)
        run.wait_until((tmp_path / "o" / "resume" / "001-00000002").exists).kill()
    run_forked(main, *arguments, cwd=bench)
    drawn = (tmp_path / "drawn").read_text().split()
    assert len(set(drawn)) == 4 + 4 + 3
    assert killed or len(drawn) == 11  # a step that is taken again after a kill draws what it drew before


def test_the_norm_of_a_bf16_gradient_is_exact():
    torch.manual_seed(0)
    gradients = [torch.randn(n).bfloat16() for n in (3, 5000, 2**20 + 7)]
    with train.init_distributed() as ranks:
        found = gradient_norm(gradients, ranks)
    assert found == pytest.approx(torch.cat(gradients).double().norm().item(), rel=1e-5)


def test_the_memory_plan_of_a_7b_model_fits_an_80_gb_gpu():
    raw = dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    config = parse_config(raw | dict(num_attention_heads=32))
    needs = {}
    for way in ("fp32", "bf16"):
        model = train.build_meta_model(config, Weights(way), torch.bfloat16)
        trained = set(train.trained_parameters(model))
        needs[way] = memory_plan.memory_plan(model, trained, 1, torch.bfloat16, 4096, 4096, True, True)
    gib = {way: sum(plan.values()) / 2**30 for way, plan in needs.items()}
    assert 8 * 6_738_415_616 / 2**30 < gib["bf16"] <= 66 and gib["fp32"] > 100, needs


def test_the_tolerance_detects_another_rounding_seed(bench, reference, tmp_path):
    """Only the seed of the rounding differs."""

    def main(argv):
        real = adamw.random_key
        adamw.random_key = lambda *numbers: real(1, *numbers)
        return train.main(argv)

    go(bench, tmp_path / "o", *BF16, main=main)
    assert not same(weights(tmp_path / "o"), weights(reference))
    with pytest.raises(AssertionError):
        close(metrics(tmp_path / "o"), metrics(reference))
