"""The real SmolLM2-135M against transformers and against its bare matrix products, in one process, in alternation.

By hand: `python tests/bench.py --parts real`. Prints the table of docs/performance.md: medians of REPEATS runs, with
the load average beside each, since other processes on the machine change the figures more than the code does.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import Documents, tokenize_files
from generate import Options, decode
from model import Linear, load_model
from parts.distributed import compute_dtype, tune_malloc
from parts.kernels import varlen_attention
from score import measure_ifd

REPEATS = 5
ROWS = 16  # of a training step
NEW_TOKENS = 48


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(ways: dict[str, Callable], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each way, measured in turn; each has one run before that does not count."""
    for way in ways.values():
        way()
    times = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeats)]
    return {name: statistics.median(t[name] for t in times) for name in ways}


def report(task: str, unit: str, amount: float, found: dict[str, float]) -> None:
    """One row of the table: rates of all ways, and the first one's against each of the others."""
    (_, ours), *others = found.items()
    rates = ", ".join(f"{name} {amount / s:,.1f}" for name, s in found.items())
    ratios = ", ".join(f"{s / ours:.2f} × {name}" for name, s in others)
    print(f"| {task} | {rates} {unit} | {ratios} | {os.getloadavg()[0]:.1f} |", flush=True)


def real_rows(shared: Path, folder: Path, model_folder: Path, count: int) -> Documents:
    """The first `count` usable rows of the published stage 3, tokenised with the model's own template."""
    lines = (shared / "alpaca_scored_stage3.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rows.jsonl").write_bytes(b"".join([x for x in lines if json.loads(x)["data"][1].strip()][:count]))
    return tokenize_files([folder / "rows.jsonl"], model_folder, "chatml", 512, False)


def bench_decode(model, theirs, documents: Documents, batch_size: int) -> None:
    """Greedy answers of NEW_TOKENS tokens to prompts of equal length, the least favourable case for slots."""
    width = 48
    starts = documents.offsets[:-1][documents.lengths >= width][:batch_size]
    prompts = [documents.tokens[a : a + width].tolist() for a in starts]
    options = Options(max_new_tokens=NEW_TOKENS, batch_size=batch_size)
    weights = [m.weight for m in model.modules() if isinstance(m, Linear)] + [model.head_weight]
    inputs = {w.shape[1]: torch.randn(batch_size, w.shape[1], dtype=w.dtype) for w in weights}

    def products() -> None:
        torch.backends.mkldnn.set_flags(_enabled=batch_size > 1)  # as decode does
        for _ in range(NEW_TOKENS):
            for w in weights:
                F.linear(inputs[w.shape[1]], w)
        torch.backends.mkldnn.set_flags(_enabled=True)

    def transformers_generate() -> None:
        given = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        ids = torch.tensor(prompts)
        theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, **given)

    ways = {
        "ours": lambda: list(decode(model, prompts, set(), options)),
        "transformers": transformers_generate,
        "the bare products": products,
    }
    report(f"answers, batch {batch_size}", "tokens/s", batch_size * NEW_TOKENS, alternate(ways))


def padded(documents: Documents, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels of the chosen documents, as transformers takes them."""
    width = int(documents.lengths[chosen].max())
    ids, mask, labels = (torch.full((len(chosen), width), fill) for fill in (0, 0, -100))
    for row, d in enumerate(chosen):
        at, n = slice(documents.offsets[d], documents.offsets[d + 1]), int(documents.lengths[d])
        tokens = torch.from_numpy(documents.tokens[at].astype(np.int64))
        ids[row, :n], mask[row, :n] = tokens, 1
        labels[row, :n] = torch.where(torch.from_numpy(documents.loss_mask[at]), tokens, -100)
    return ids, mask, labels


def bench_train(model, theirs, documents: Documents, dtype: torch.dtype) -> None:
    """Forward and backward of one batch of real rows; fp32 weights, computed in `dtype`."""
    chosen = np.arange(ROWS)
    flat = [torch.from_numpy(x) for x in documents.pack(chosen)]
    ids, mask, labels = padded(documents, chosen)

    def transformers_step() -> None:
        theirs.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            theirs(ids, attention_mask=mask, labels=labels).loss.backward()

    def transformers_padding_free() -> None:  # what TRL's padding_free does: positions that restart, no mask
        theirs.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            tokens, positions, _, targets = flat
            theirs(
                tokens[None], position_ids=positions[None], labels=targets[None], shift_labels=targets[None]
            ).loss.backward()

    def our_step() -> None:
        model.zero_grad()
        model(*flat)[0].backward()

    tokens = int(documents.lengths[chosen].sum())
    ways = {"ours": our_step, "transformers, padded": transformers_step}
    ways["transformers, padding-free"] = transformers_padding_free
    report(f"training, {ROWS} rows", "tokens/s", tokens, alternate(ways))


def bench_ifd(model, theirs, documents: Documents, bos: int) -> None:
    """IFD of all documents against two padded passes of transformers over rows sorted by length, 8 at a time."""
    order = np.argsort(documents.lengths)

    @torch.no_grad()
    def two_passes() -> list[float]:
        scores = []
        for a in range(0, len(order), 8):
            ids, mask, labels = padded(documents, order[a : a + 8])
            given = row_losses(theirs, ids, mask, labels)
            answers = [row[row != -100] for row in labels]
            width = 1 + max(map(len, answers))
            alone, seen = torch.full((len(answers), width), bos), torch.zeros(len(answers), width, dtype=torch.int64)
            targets = torch.full((len(answers), width), -100)
            for i, answer in enumerate(answers):
                alone[i, 1 : len(answer) + 1], seen[i, : len(answer) + 1] = answer, 1
                targets[i, 1 : len(answer) + 1] = answer
            by_itself = row_losses(theirs, alone, seen, targets)
            scores += [math.exp(x - y) for x, y in zip(given, by_itself)]
        return scores

    mine, reference = measure_ifd(model, documents), two_passes()
    same = torch.allclose(mine[order.tolist()], torch.tensor(reference), rtol=0.1)  # bf16 moves each loss by a percent
    ways = {"ours": lambda: measure_ifd(model, documents), "transformers": two_passes}
    tokens = int(documents.lengths.sum() + documents.target_counts.sum())
    report(f"IFD{'' if same else ' (values differ)'}", "tokens/s", tokens, alternate(ways, 3))


def row_losses(theirs, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> list[float]:
    logits = theirs(ids, attention_mask=mask).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).tolist()


def bench_attention(lengths: list[int], heads: int, groups: int, head_dim: int, dtype: torch.dtype) -> None:
    """Attention of one document, forward and backward, against the seven products of its causal half."""
    for n in lengths:
        q, k, v = (torch.randn(n, h, head_dim, dtype=dtype, requires_grad=True) for h in (heads, groups, groups))
        cu_seqlens, grad = torch.tensor([0, n], dtype=torch.int32), torch.randn(n, heads, head_dim, dtype=dtype)
        block, rows = 128, heads // groups * 128
        x, key = torch.randn(groups, rows, head_dim, dtype=dtype), torch.randn(groups, block, head_dim, dtype=dtype)
        tiles = math.ceil(n / block)

        def products(x=x, key=key, tiles=tiles) -> None:
            for _ in range(tiles * (tiles + 1) // 2):
                p = x @ key.mT
                x @ key.mT, x @ key.mT, p @ key, p @ key, p.mT @ x, p.mT @ x

        def ours(q=q, k=k, v=v, cu_seqlens=cu_seqlens, grad=grad, n=n) -> None:
            varlen_attention(q, k, v, cu_seqlens, n, None).backward(grad)

        found = alternate({"ours": ours, "the bare products": products}, 3 if n < 16384 else 1)
        report(f"attention, {n:,} tokens", "tokens/s", n, found)


def bench_real(model_folder: Path, shared: Path, folder: Path) -> None:
    import transformers

    tune_malloc()
    dtype = compute_dtype("auto")
    documents = real_rows(shared, folder, model_folder, 16)
    print(f"\nSmolLM2-135M, {dtype}, {torch.get_num_threads()} threads, transformers {transformers.__version__}\n")
    print("| task | rates | ours against | load |\n| --- | --- | --- | --- |")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).eval()
    model = load_model(model_folder, dtype).requires_grad_(False)
    for batch_size in (1, 4, 16):
        bench_decode(model, theirs, documents, batch_size)
    tokens = documents.tokens[documents.offsets[0]]
    bench_ifd(model, theirs, documents, int(tokens))
    del model, theirs
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    model = load_model(model_folder)
    model.compute_dtype = dtype
    config = model.config
    bench_train(model, theirs, documents, dtype)
    bench_attention([512, 2048, 8192, 32768], config.n_heads, config.n_kv_heads, config.head_dim, dtype)
