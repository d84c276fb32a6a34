"""parts/kernels.py: each memory-saving version has the values and gradients of its plain formula, and only those
asked."""

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from parts import kernels

relaxed = settings(max_examples=40, deadline=None)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def tensors(draw, dtype, *shapes):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def check(ours, plain, inputs, needed, tolerance=None):
    """Values and the gradients of the inputs that need one are equal; no other input has a gradient."""
    dtype = inputs[0].dtype
    # Reference: the plain formula in fp64 on the same numbers; a version may err as far as its dtype does.
    tolerance = tolerance or {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2}[dtype]
    found = []
    for function, wide in ((ours, False), (plain, True)):
        given_ = [x.double() if wide else x.clone() for x in inputs]
        for x, need in zip(given_, needed):
            x.requires_grad_(need)
        value = function(*given_)
        value = value[0] if isinstance(value, tuple) else value
        if any(needed):
            weight = torch.arange(value.numel()).reshape(value.shape) % 3 + 2  # exact in every dtype
            (value * weight).sum().backward()
        found.append([value.detach(), *(x.grad for x in given_)])
    assert found[0][0].dtype in (dtype, kernels.at_least_fp32(inputs[0]))
    for a, b, need in zip(*found, [True, *needed]):
        if not need:
            assert a is None
            continue
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, atol=tolerance * scale, rtol=tolerance)


def some(n):
    return st.lists(st.booleans(), min_size=n, max_size=n)


@relaxed
@given(st.data())
def test_rms_norm_equals_the_plain_version(data):
    T, C, dtype = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 33)), data.draw(dtypes)
    x, weight = tensors(data.draw, dtype, (T, C), (C,))
    eps = data.draw(st.sampled_from([1e-6, 1e-2]))
    check(lambda x, w: kernels.rms_norm(x, w, eps), lambda x, w: kernels.plain_rms_norm(x, w, eps), [x, weight],
          data.draw(some(2)))  # fmt: skip


@relaxed
@given(st.data())
def test_rotate_equals_the_plain_version(data):
    T, heads, half, dtype = (data.draw(s) for s in (st.integers(0, 9), st.integers(1, 4), st.integers(1, 9), dtypes))
    x, angles = tensors(data.draw, dtype, (T, heads, 2 * half), (T, 1, half))
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    check(kernels.rotate, kernels.plain_rotate, [x, cos, sin], [data.draw(st.booleans()), False, False])


def test_rotating_equals_multiplying_by_a_complex_number():
    x, angles = torch.randn(5, 2, 8), torch.randn(5, 1, 4)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(kernels.rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1))


@relaxed
@given(st.data())
def test_varlen_attention_equals_the_plain_version(data):
    draw = data.draw
    lengths = draw(st.lists(st.integers(1, 20), max_size=5))
    groups, repeat, hd, dtype = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([2, 5, 8])),
        draw(dtypes),
    )
    sliding_window, T = draw(st.one_of(st.none(), st.integers(1, 25))), sum(lengths)
    inputs = tensors(draw, dtype, (T, groups * repeat, hd), (T, groups, hd), (T, groups, hd))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    before = kernels.QUERY_BLOCK, kernels.SDPA_MIN_TOKENS
    kernels.QUERY_BLOCK, kernels.SDPA_MIN_TOKENS = (
        draw(st.sampled_from([3, 8, 512])),
        draw(st.sampled_from([2, 6, 384])),
    )
    try:
        longest = max(lengths, default=0)
        check(
            lambda q, k, v: kernels.varlen_attention(q, k, v, cu_seqlens, longest, sliding_window),
            lambda q, k, v: kernels.plain_varlen_attention(q, k, v, cu_seqlens, sliding_window),
            inputs,
            draw(some(3)),
        )
    finally:
        kernels.QUERY_BLOCK, kernels.SDPA_MIN_TOKENS = before


def capped(x, linear):
    return 2 * torch.tanh(linear(x) / 2)


def reweighted(losses, log_z, at):
    """A weight that depends on the position, one that depends on the loss, and a z-loss."""
    return losses * (at % 3) + losses * (1 - (-losses).exp()) + 0.1 * log_z.square()


@relaxed
@given(st.data())
def test_cross_entropy_equals_the_plain_version(data):
    N, C, V, dtype = (data.draw(s) for s in (st.integers(0, 9), st.integers(1, 17), st.integers(1, 33), dtypes))
    x, weight = tensors(data.draw, dtype, (N, C), (V, C))
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    most, kernels.MAX_LOGITS = kernels.MAX_LOGITS, data.draw(st.sampled_from([1, 3 * V, 2**24]))
    changed = data.draw(st.booleans())
    functions = {"head": capped, "training_loss": reweighted} if changed else {}
    try:
        ours, plain = (
            partial(f, targets=targets, **functions) for f in (kernels.cross_entropy, kernels.plain_cross_entropy)
        )
        check(ours, plain, [x, weight], data.draw(some(2)))
        _, losses = kernels.cross_entropy(x, weight, targets)
    finally:
        kernels.MAX_LOGITS = most
    expected = F.cross_entropy((x @ weight.T).double(), targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=1e-3)


def test_a_head_whose_last_operation_needs_its_result_is_an_error():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kernels.cross_entropy(x, weight, torch.tensor([0, 1, 2]), lambda x, linear: linear(x).tanh())


def test_the_measured_losses_are_not_differentiable():
    """Their gradients are not saved, so a weighted sum of them must be an error, not a wrong gradient."""
    x = torch.randn(3, 4, requires_grad=True)
    _, losses = kernels.cross_entropy(x, torch.randn(5, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="does not require grad"):
        (losses * torch.tensor([1.0, 0.0, 1.0])).sum().backward()


def test_a_second_derivative_is_an_error():
    x = torch.randn(3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(kernels.rms_norm(x, torch.ones(4), 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


def test_less_is_saved_for_the_backward_pass():
    kept = {}
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    down = torch.randn(32, 32, requires_grad=True)
    q = torch.randn(64, 4, 8, requires_grad=True)
    cu_seqlens, targets = torch.tensor([0, 64], dtype=torch.int32), torch.arange(64) % 32
    for name, inputs in {
        "rms_norm": (x, weight, 1e-5), "cross_entropy": (x, down, targets),
        "varlen_attention": (q, q, q, cu_seqlens),
    }.items():  # fmt: skip
        for version in (name, "plain_" + name):
            held = weakref.WeakSet()  # what is freed with a graph inside the forward pass is not kept

            class Held:
                def __init__(self, t, held=held):
                    self.t = t
                    held.add(self)

            more = ((64, None) if version == "varlen_attention" else (None,)) if name == "varlen_attention" else ()
            with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.t):
                value = getattr(kernels, version)(*inputs, *more)  # noqa: F841 (it holds the graph)
            kept[version] = sum({h.t.data_ptr(): h.t.numel() for h in held}.values())
        assert kept[name] < kept["plain_" + name], (name, kept)
