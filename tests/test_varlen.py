"""The CUDA branches, run on a CPU: stand-ins for varlen_attn with the signatures that it has in torch 2.10 and
later, computed in fp64 over an explicit mask, and the installed one itself on such a kernel."""

import inspect
import json
import multiprocessing
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, close, go, hf_model, metrics, run_forked, weights
from test_generate import collect
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

import generate
from model import load_model
from parts import decoding, kernels

# ---------------------------------------------------------------- the reference, and the signatures


def visible(cu_q: Tensor, cu_k: Tensor, left: int, right: int) -> Tensor:
    """(T_q, T_k) bool: FlashAttention's windows (-1 is without bound), inside each document."""

    def places(cu):
        n = cu.diff().long()
        return torch.arange(len(n)).repeat_interleave(n), torch.cat([torch.arange(int(x)) for x in n])

    (document, at), (of, behind) = places(cu_q), places(cu_k)
    back = at[:, None] - behind
    seen = (document[:, None] == of) & (back <= (left if left >= 0 else 2**40))
    return seen & (-back <= (right if right >= 0 else 2**40))


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q, max_k, left: int, right: int
) -> Tensor:
    """In fp64, rounded to the dtype of q at the end. Asserts what FlashAttention requires."""
    assert q.dtype in kernels.VARLEN_DTYPES and q.dtype == k.dtype == v.dtype
    assert q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]
    assert q.shape[2] <= 256 and q.shape[2] % 8 == 0 and q.shape[1] % k.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for cu, longest, tokens in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == len(tokens) and type(longest) is int
        assert longest == int(cu.diff().max())
    p, _, _, v = probabilities(q, k, v, cu_q, cu_k, left, right)
    return torch.einsum("hqk,khd->qhd", p, v).to(q.dtype)


def probabilities(q, k, v, cu_q, cu_k, left, right) -> list[Tensor]:
    """(H, T_q, T_k) in fp64; and q, k, v in fp64, with keys repeated per query head."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    p = scores.masked_fill(~visible(cu_q, cu_k, left, right), float("-inf")).softmax(-1)
    return [p, q, k, v]


def same_heads(query, key):
    assert query.shape[1] == key.shape[1], "Expect query and key/value to have the same number of heads"


# As docs.pytorch.org has it for 2.10.
def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    same_heads(query, key)
    right = 0 if is_causal else -1
    return attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, -1, right)


# As docs.pytorch.org had it for main between 2.10 and 2.12. Of 2.11 we know that it has this and perhaps enable_gqa.
def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    same_heads(query, key)
    assert type(window_size) is tuple
    return attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *window_size)


# As docs.pytorch.org has it for 2.12, and the source of 2.13.
def torch_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert type(window_size) is tuple and seqused_k is None and block_table is None
    return attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *window_size)


def flash_forward(
    query, key, value, cu_q, cu_k, max_q, max_k, dropout, is_causal, return_debug_mask, *, scale=None, **more
):
    """aten::_flash_attention_forward for CPUs: under the installed varlen_attn."""
    left, right = more["window_size_left"], more["window_size_right"]
    assert dropout == 0 and scale is None and is_causal == ((left, right) == (-1, 0))
    out = attention(query, key, value, cu_q, cu_k, max_q, max_k, left, right)
    lse = torch.zeros(query.shape[1], len(query))
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(()), torch.zeros(())


def flash_backward(grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, *more, **options):
    """aten::_flash_attention_backward for CPUs, by the formula: below autograd there is none."""
    left, right = options["window_size_left"], options["window_size_right"]
    p, q, k, v = probabilities(query, key, value, cu_q, cu_k, left, right)
    dp = torch.einsum("qhd,khd->hqk", grad.double(), v)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / query.shape[2] ** 0.5
    dq, dk = torch.einsum("hqk,khd->qhd", ds, k), torch.einsum("hqk,qhd->khd", ds, q)
    dv = torch.einsum("hqk,qhd->khd", p, grad.double())
    dk, dv = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (dk, dv))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


VERSIONS = ["2.10", "2.11", "2.13", "installed"]
INSTALLED = inspect.signature(varlen_attn)


@pytest.fixture(params=VERSIONS)
def cuda(request, monkeypatch):
    """Has this process, and those forked from it, take the CUDA branches, with a stand-in that takes fp32 as well, so
    that what comes out may be compared closely. Gives the number of calls."""
    calls = multiprocessing.Value("i", 0)
    stand_in = {"2.10": torch_2_10, "2.11": torch_2_11, "2.13": torch_2_13, "installed": varlen_attn}[request.param]
    bound = INSTALLED if request.param == "installed" else inspect.signature(stand_in)

    def counted(*args, **options):
        with calls.get_lock():
            calls.value += 1
        bound.bind(*args, **options)
        return stand_in(*args, **options)

    monkeypatch.setattr(kernels, "on_cuda", lambda x: True)
    monkeypatch.setattr(kernels, "varlen_attn", counted)
    monkeypatch.setattr(kernels, "VARLEN_OPTIONS", bound.parameters)
    monkeypatch.setattr(kernels, "VARLEN_DTYPES", (torch.bfloat16, torch.float16, torch.float32))
    calls.version = request.param
    if request.param != "installed":
        yield calls
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_forward, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        yield calls


newest = pytest.mark.parametrize("cuda", ["installed"], indirect=True)


def test_the_stand_in_has_the_signature_of_the_installed_torch():
    version = tuple(int(x) for x in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
    if version >= (2, 12):
        assert list(inspect.signature(torch_2_13).parameters) == list(INSTALLED.parameters)
        for name, p in inspect.signature(torch_2_13).parameters.items():
            assert (p.kind, p.default) == (INSTALLED.parameters[name].kind, INSTALLED.parameters[name].default)


# ---------------------------------------------------------------- attention and norm


def run_attention(lengths, heads, groups, hd, sliding_window, dtype=torch.float32):
    torch.manual_seed(sum(lengths))
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    q, k, v = (torch.randn(sum(lengths), n, hd).to(dtype).requires_grad_() for n in (heads, groups, groups))
    out = kernels.varlen_attention(q, k, v, cu, max(lengths), sliding_window)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    return [x.float() for x in (out.detach(), q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("sliding_window", [None, 1, 2, 5, 600])
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[1], [7, 1, 33, 5], [515, 3]])
def test_attention_and_its_gradients_equal_the_cpus(lengths, heads, groups, sliding_window, cuda, monkeypatch):
    ours = run_attention(lengths, heads, groups, 16, sliding_window)
    assert cuda.value == (0 if cuda.version == "2.10" and sliding_window else 1)
    monkeypatch.setattr(kernels, "on_cuda", lambda x: False)
    for a, b in zip(ours, run_attention(lengths, heads, groups, 16, sliding_window)):
        assert (a - b).abs().max() < 2e-5


@newest
def test_inputs_that_flash_attention_does_not_support_use_the_loop(cuda, monkeypatch):
    for hd, dtype in ((12, torch.float32), (264, torch.float32), (16, torch.float64)):
        run_attention([5, 9], 2, 1, hd, None, dtype)
    monkeypatch.setattr(kernels, "VARLEN_DTYPES", (torch.bfloat16, torch.float16))
    run_attention([5, 9], 2, 1, 16, None, torch.float32)
    assert cuda.value == 0
    for dtype in (torch.bfloat16, torch.float16):
        narrow, wide = (run_attention([5, 9], 2, 1, 16, 4, d) for d in (dtype, torch.float64))
        assert all((a - b).abs().max() < 0.1 for a, b in zip(narrow, wide))
    assert cuda.value == 2


def test_the_norm_and_its_gradients_equal_the_cpus(monkeypatch):
    def run():
        torch.manual_seed(0)
        x, weight = torch.randn(9, 24).requires_grad_(), torch.randn(24).requires_grad_()
        y = kernels.rms_norm(x, weight, 1e-5)
        y.square().sum().backward()
        return y.detach(), x.grad, weight.grad

    ours = run()
    monkeypatch.setattr(kernels, "on_cuda", lambda x: True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, run()))


# ---------------------------------------------------------------- every caller


@newest
def test_attention_compiles_without_graph_breaks_or_recompilation_per_length(cuda):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    kernels.varlen_attn, counted = varlen_attn, kernels.varlen_attn  # a lock cannot be traced
    try:
        step = torch.compile(kernels.varlen_attention, backend=backend, fullgraph=True)
        for lengths in ([5, 3], [4, 9, 2], [11, 6], [13, 1, 1], [8, 21]):
            cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
            q, k, v = (torch.randn(sum(lengths), n, 16) for n in (4, 2, 2))
            whole = step(q, k, v, cu, max(lengths), 9)
            assert torch.allclose(whole, kernels.plain_varlen_attention(q, k, v, cu, 9), atol=1e-5)
    finally:
        kernels.varlen_attn = counted
    assert len(graphs) <= 4  # sizes become symbols, not a graph each


@pytest.mark.parametrize("cuda", ["2.10", "installed"], indirect=True)
def test_training_ifd_held_out_loss_and_samples_equal_the_cpus(cuda, bench, tmp_path, monkeypatch):
    shutil.copytree(bench, tmp_path / "bench")
    bench, sizes = tmp_path / "bench", json.loads((bench / "m" / "config.json").read_text())
    sizes = dict(vocab_size=sizes["vocab_size"], max_position_embeddings=256, head_dim=16)
    hf_model(scale=0.05, **sizes).save_pretrained(bench / "m")
    (tmp_path / "p.txt").write_text("Say abc.\nSay xyzzy.\n")
    more = ["--select", "iterit", "--ratio", "0.5", "--epochs", "2", "--eval", "s2.jsonl"]
    more += ["--sample", str(tmp_path / "p.txt"), "--micro-tokens", "300"]
    go(bench, tmp_path / "cuda", *more, stages=("s1", "s3"))
    counted = cuda.value
    monkeypatch.setattr(kernels, "on_cuda", lambda x: False)
    go(bench, tmp_path / "cpu", *more, stages=("s1", "s3"))
    assert counted > 100 and cuda.value == counted
    close(metrics(tmp_path / "cuda"), metrics(tmp_path / "cpu"))
    a, b = (weights(tmp_path / name, "stage2") for name in ("cuda", "cpu"))
    assert all((a[k] - b[k]).abs().max() < 1e-4 for k in a)
    chosen = [(tmp_path / name / "stage1" / "selection-epoch1.jsonl").read_text() for name in ("cuda", "cpu")]
    ids = [[json.loads(x)["id"] for x in text.splitlines() if json.loads(x).get("chosen")] for text in chosen]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("kind", [dict(), dict(kind="mistral", sliding_window=9)])
def test_answers_equal_the_cpus(kind, cuda, tmp_path, monkeypatch):
    sizes = dict(vocab_size=500, max_position_embeddings=256, head_dim=16, eos_token_id=None)
    hf_model(**sizes, **kind).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    prompts = [np.random.default_rng(i).integers(3, 500, n).tolist() for i, n in enumerate((1, 40, 7, 13, 90))]
    ours = [collect(model, prompts, n=30, batch_size=n, temperature=t) for n, t in ((2, 0.0), (5, 0.7))]
    assert (cuda.value == 0) == (cuda.version == "2.10" and "kind" in kind)
    monkeypatch.setattr(kernels, "on_cuda", lambda x: False)
    assert ours == [collect(model, prompts, n=30, batch_size=n, temperature=t) for n, t in ((2, 0.0), (5, 0.7))]


def test_a_cuda_graph_of_the_decode_step_may_write_into_the_cache(tmp_path, monkeypatch):
    """torch makes CUDA graphs only of functions that write to tensors with static addresses."""
    import torch._functorch.config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    hf_model(vocab_size=500).save_pretrained(tmp_path)
    model, shapes, fixed = load_model(tmp_path), [], []
    cache = decoding.KVCache(model.config, 2, 64, torch.float32, torch.device("cpu"))

    def inner(graph, inputs, **options):
        shapes.append({i: x.shape for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)})
        fixed.append(set(options["static_input_idxs"]))
        return compile_fx_inner(graph, inputs, **options)

    def compiled(step, dynamic, mode, compile=torch.compile):
        return compile(step, dynamic=dynamic, backend=lambda graph, inputs: compile_fx(graph, inputs, inner))

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)  # of an earlier run's graph
    with torch.no_grad():
        decoding.compiled_step(cache)(
            model, cache, torch.tensor([3, 4]), torch.tensor([5, 6]), 64, True, decoding.token_logits
        )
    written = {i for i, shape in shapes[0].items() if shape == cache.k.shape}
    assert len(shapes) == 1 and len(written) == 2 and written <= fixed[0]


@newest
def test_generate_runs_in_bf16_through_the_branch(cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "VARLEN_DTYPES", (torch.bfloat16, torch.float16))
    (tmp_path / "p.txt").write_text("".join(f"Start with {i}, add 1 to it.\n" for i in range(5)))
    files = ["--prompts", tmp_path / "p.txt", "--out", tmp_path / "a", "--max-new-tokens", "4"]
    run_forked(generate.main, "--model", ROOT / "demo" / "model", *files, "--dtype", "bf16")
    assert cuda.value > 0 and len(json.loads((tmp_path / "a").read_text())) == 5
