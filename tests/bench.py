"""Speed and memory, side by side with transformers on this machine, in one run. By hand: python tests/bench.py

Every contender runs in a process of its own, in turn, for several rounds; ratios are of medians over the rounds. Both
sides compute in the same precision, on the same batches of real rows.
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
SMOLLM2 = ROOT / "tests" / ".cache" / "smollm2"  # which tests/test_real_model.py puts there
sys.path.insert(0, str(ROOT))

SIZES = {
    "25M": dict(
        hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6
    ),
    "125M": dict(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4
    ),
}
ROWS, BATCH = 400, 16


def raw_config(size: str, vocab: int) -> dict:
    return dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        torch_dtype="float32",
        **SIZES[size],
    )


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------- one contender, in its own process


def build(folder: Path, dtype: str, ranks, more: list[str]):
    """train.py's documents, model, trained parameters and optimizer, at a rate of 1e-4; `more` flags."""
    import train
    from parts.checkpoints.config import read_config
    from parts.cli import dataclass_from_args

    where = ["--model", str(folder), "--stages", str(folder / "rows.jsonl"), "--out", str(folder / "out")]
    args = train.parse_args([*where, "--skip-bad-rows", "--dtype", dtype, "--lr", "1e-4", *more])
    documents = train.read_data(args, first=False)[0][0].documents
    base = peak_memory()
    model = train.build_model(
        folder,
        read_config(folder),
        *(dataclass_from_args(kind, args) for kind in (train.Weights, train.Computation)),
        ranks,
    )
    trained = train.trained_parameters(model)
    optimizer = train.make_optimizer(trained, dataclass_from_args(train.Optimization, args))
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    return documents, model, trained, optimizer, base


def ours(folder: Path, dtype: str, steps: int, more: list[str]) -> dict:
    import numpy as np

    import train
    from data import epoch_batches, micro_batches
    from parts.distributed import init_distributed
    from parts.flops import training_flops

    with init_distributed() as ranks:
        documents, model, trained, optimizer, base = build(folder, dtype, ranks, more)
        of = training_flops(model, set(trained))
        seconds, supervised, tokens, flops = [], 0, 0, 0.0
        for batch in epoch_batches(None, np.arange(len(documents)), BATCH, 0, 0, 0)[: steps + 1]:
            start = time.perf_counter()
            train.batch_gradients(model, trained, documents, batch, 2048, ranks, int)
            train.clip_gradients(trained, 1.0, ranks)
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            if len(seconds) > 1:  # the first one warms up
                lengths, count = documents.lengths[batch], int(documents.target_counts[batch].sum())
                supervised, tokens, flops = (
                    supervised + count,
                    tokens + int(lengths.sum()),
                    flops + of.of_batch(lengths, count),
                )
    total, peak = sum(seconds[1:]), peak_memory() - base
    parts = len(micro_batches(batch, documents.lengths, 1, 2048)[0])
    shape = tokens // steps // parts, supervised // steps // parts
    rates = [matmul_rate(model.config, *shape, model.compute_dtype) for _ in range(3)]
    return {
        "supervised_per_second": supervised / total,
        "tokens_per_second": tokens / total,
        "memory": peak,
        "of_matmul_rate": flops / total / statistics.median(rates),
    }


def matmul_rate(config, tokens: int, supervised: int, dtype) -> float:
    """Flops per second of the bare matrix products of a step: every shape, forward and both gradients."""
    import torch

    heads, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = [(tokens, config.dim, heads, 2), (tokens, config.dim, keys, 2), (tokens, config.dim, config.hidden_dim, 3)]
    flops = seconds = 0.0
    for t, a, b, count in [
        *((t, a, b, c * config.n_layers) for t, a, b, c in shapes),
        (supervised, config.dim, config.vocab_size, 1),
    ]:
        x, w, g = (torch.randn(*s).to(dtype) for s in ((t, a), (b, a), (t, b)))
        times = []
        for _ in range(7):
            start = time.perf_counter()
            x @ w.T, g @ w, g.T @ x
            times.append(time.perf_counter() - start)
        flops += 6 * t * a * b * count
        seconds += statistics.median(times) * count
    return flops / seconds


def theirs(folder: Path, dtype: str, steps: int, way: str) -> dict:
    """transformers' LlamaForCausalLM and AdamW in a plain loop; `way` is fixed, dynamic or packed."""
    import numpy as np
    import torch
    import transformers

    from data import epoch_batches
    from parts.text.rows import read_rows
    from parts.text.templates import TEMPLATES, render
    from parts.text.tokenizers import load_tokenizer

    rows, _ = read_rows(folder / "rows.jsonl")
    tokenizer = load_tokenizer(folder)
    rendered = [render(r.turns, TEMPLATES["phased"], tokenizer) for r in rows]
    base = peak_memory()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seconds, loss_mask = [], 0
    batches = epoch_batches(None, np.arange(len(rows)), BATCH, 0, 0, 0)
    for batch in batches[: steps + (way != "fixed")]:
        documents = [(rendered[d][0][:2048], rendered[d][1][:2048]) for d in batch]
        count = sum(sum(s[1:]) for _, s in documents)
        width = 2048 if way == "fixed" else max(len(t) for t, _ in documents)
        parts = (
            [documents[i : i + 2] for i in range(0, BATCH, 2)] if way == "fixed" else [documents]
        )  # 16 x 2048 needs 40 GB
        start = time.perf_counter()
        for part in parts:
            if way == "packed":
                inputs = {
                    "input_ids": torch.tensor([[t for d in part for t in d[0]]]),
                    "position_ids": torch.tensor([[i for d in part for i in range(len(d[0]))]]),
                    "labels": torch.tensor(
                        [[t if s and i else -100 for d in part for i, (t, s) in enumerate(zip(*d))]]
                    ),
                }
            else:
                inputs = {
                    "input_ids": torch.tensor([t + [0] * (width - len(t)) for t, _ in part]),
                    "attention_mask": torch.tensor([[1] * len(d[0]) + [0] * (width - len(d[0])) for d in part]),
                    "labels": torch.tensor(
                        [[x if y else -100 for x, y in zip(t, s)] + [-100] * (width - len(t)) for t, s in part]
                    ),
                }
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                loss = model(**inputs, use_cache=False, num_items_in_batch=count).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        if way == "fixed" or len(seconds) > 1:
            loss_mask += count
    return {"supervised_per_second": loss_mask / sum(seconds[way != "fixed" :]), "memory": peak_memory() - base}


# ---------------------------------------------------------------- all of them


def contender(folder: Path, name: str, dtype: str, steps: int) -> dict:
    out = subprocess.run(
        [
            sys.executable,
            __file__,
            "--contender",
            name,
            "--folder",
            str(folder),
            "--dtypes",
            dtype,
            "--steps",
            str(steps),
        ],
        capture_output=True,
        text=True,
    )
    if out.returncode:
        sys.exit(f"{name} failed:\n{out.stderr[-3000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def make_folder(folder: Path, size: str, vocab: int = 32000) -> None:
    from model import Transformer, init_weights, save_model
    from parts.checkpoints.config import parse_config

    model = Transformer(parse_config(raw_config(size, vocab)))
    init_weights(model, 0)
    save_model(model, folder)
    shutil.copyfile(SHARED / "tokenizers" / "llama2.model", folder / "tokenizer.model")
    lines = (SHARED / "alpaca_scored_stage3.jsonl").read_bytes().splitlines(keepends=True)
    good = [line for line in lines if json.loads(line)["data"][1].strip()]
    (folder / "rows.jsonl").write_bytes(b"".join(good[:ROWS]))


def compare(size: str, dtype: str, rounds: int, steps: int, fixed: bool, folder: Path) -> None:
    names = ["ours", "dynamic", "packed"] + ["fixed"] * fixed
    results = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            results[name].append(contender(folder, name, dtype, 1 if name == "fixed" else steps))

    def median(name, key):
        return statistics.median(r[key] for r in results[name])

    speed = median("ours", "supervised_per_second")
    print(f"\n{size}, {dtype}, batch of {BATCH} documents, medians of {rounds} rounds of {steps} steps")
    for name in names:
        print(
            f"  {name:8} {median(name, 'supervised_per_second'):9,.0f} supervised tokens/s, peak memory "
            f"{median(name, 'memory') / 2**30:6.2f} GiB; ours is "
            f"{speed / median(name, 'supervised_per_second'):6.2f} times "
            f"as fast in {median('ours', 'memory') / median(name, 'memory'):.2f} of the memory"
        )
    print(
        f"  ours reaches {100 * median('ours', 'of_matmul_rate'):.0f} % of the machine's {dtype} matmul "
        f"rate at these shapes",
        flush=True,
    )


def lora(size: str, dtype: str, rounds: int, steps: int, folder: Path) -> None:
    """Speed and memory of LoRA and of weights in bf16 beside training in full, one after the other in every round."""
    names = ["ours", "ours --lora 16", "ours --param-dtype bf16"]
    results = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            results[name].append(contender(folder, name, dtype, steps))
    print(f"\n{size}, {dtype}, batch of {BATCH} documents, medians of {rounds} rounds of {steps} steps")
    for name in names:
        speed, used = ([r[key] for r in results[name]] for key in ("tokens_per_second", "memory"))
        ratios = [a / b["tokens_per_second"] for a, b in zip(speed, results["ours"])]
        print(
            f"  {name:20} {statistics.median(speed):7,.0f} tokens/s, {statistics.median(ratios):.2f} times in full "
            f"(from {min(ratios):.2f} to {max(ratios):.2f}); peak memory {statistics.median(used) / 2**30:.2f} GiB, "
            f"{statistics.median(used) / statistics.median(r['memory'] for r in results['ours']):.2f} of it; "
            f"{statistics.median(r['of_matmul_rate'] for r in results[name]):.0%} of the matmul rate",
            flush=True,
        )


def first_step() -> None:
    """Seconds from the command to the first step of the demo."""
    times = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            run = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", str(ROOT / "train.py"), "--out", out],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            metrics = Path(out) / "metrics.jsonl"
            while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.02)
            times.append(time.perf_counter() - start)
            run.terminate()
            run.wait()
    imports = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        imports.append(time.perf_counter() - start)
    print(
        f"\nfrom `torchrun train.py` to the first step of the demo: {statistics.median(times):.1f} s "
        f"(`import torch`, which torchrun and train.py both do: {statistics.median(imports):.1f} s)",
        flush=True,
    )


def vocabulary(folder: Path) -> None:
    """Peak memory with 32,000 and 128,000 words; the difference in units of what embedding and head must cost."""
    memory = {}
    for vocab in (32000, 128000):
        (folder / str(vocab)).mkdir()
        make_folder(folder / str(vocab), "25M", vocab)
        memory[vocab] = contender(folder / str(vocab), "ours", "fp32", 3)["memory"]
    extra = memory[128000] - memory[32000]
    must = (
        16 * 2 * 96000 * SIZES["25M"]["hidden_size"]
    )  # weights, gradients and two moments in fp32; embedding and head
    print(
        f"\n128,000 words instead of 32,000: {extra / 2**20:,.0f} MiB more; weights, gradients and moments "
        f"of embedding and "
        f"head: {must / 2**20:,.0f} MiB",
        flush=True,
    )


def linear(folder: Path) -> None:
    """Seconds a token as the batch grows from 16 documents on: the same if cost is linear in tokens."""
    import numpy as np

    import train
    from parts.distributed import init_distributed

    per_token = {}
    with init_distributed() as ranks:
        documents, model, trained, _, _ = build(folder, "auto", ranks, [])
        for size in (16, 64, 256):
            times = []
            for i in range(3):
                batch = np.arange(i * 16, i * 16 + size)
                start = time.perf_counter()
                train.batch_gradients(model, trained, documents, batch, 2048, ranks, int)
                times.append((time.perf_counter() - start) / documents.lengths[batch].sum())
            per_token[size] = statistics.median(times)
    print(
        "\nmicroseconds a token in batches of 16, 64, 256 documents: "
        + ", ".join(f"{1e6 * t:.0f}" for t in per_token.values())
    )


def memory(size: str, dtypes: list[str], folder: Path) -> None:
    """What train.py's plan says against the peak that its metrics.jsonl shows, on one rank and two."""
    make_folder(folder, size)
    rows = (folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "few.jsonl").write_bytes(b"".join(rows[:48]))
    print(f"\nmemory plan against the measured peak of a rank, {size}, GiB", flush=True)
    for ranks in (1, 2):
        for dtype in dtypes:
            for more in ([], ["--checkpoint-activations"], ["--lora", "16"], ["--weights", "bf16"]):
                out = folder / f"{ranks}{dtype}{' '.join(more)}"
                launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
                command = [
                    sys.executable,
                    *launch,
                    ROOT / "train.py",
                    "--model",
                    folder,
                    "--stages",
                    folder / "few.jsonl",
                ]
                command += ["--out", out, "--dtype", dtype, "--lr", "1e-5", "--save-every", "99", *more]
                plan = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True).stdout
                planned = float(next(line for line in plan.splitlines() if line.startswith("together")).split()[1])
                subprocess.run(command, capture_output=True, check=True)
                steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                found = steps[-1]["memory_bytes"] / 2**30
                print(
                    f"  {ranks} ranks, {dtype}, {' '.join(more) or 'all kept':24}: planned {planned:5.2f}, "
                    f"measured {found:5.2f}, {100 * (planned / found - 1):+.0f} %",
                    flush=True,
                )
                shutil.rmtree(out)


# ---------------------------------------------------------------- score.py


def bench_select() -> None:
    """The greedy choice among 52,000 rows: the real answers, repeated with words changed."""
    import random

    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    from parts.diversity import pick_diverse, tf_idf

    lines = (SHARED / "alpaca_scored_stage3.jsonl").read_text().splitlines()
    real = [json.loads(line)["data"][1] for line in lines]
    vocabulary, rng, texts = [w for t in real for w in t.split()], random.Random(0), []
    while len(texts) < 52000:
        texts += [" ".join(rng.choice(vocabulary) if rng.random() < 0.3 else w for w in t.split()) for t in real]
    texts = texts[:52000]
    scores = np.random.default_rng(0).uniform(0.1, 0.99, len(texts))
    base, start = peak_memory(), time.perf_counter()
    matrix = tf_idf(texts)
    ours_fit = time.perf_counter() - start
    start = time.perf_counter()
    chosen = pick_diverse(scores, matrix, 2600, 0.1)
    ours_choice, memory = time.perf_counter() - start, peak_memory() - base
    start = time.perf_counter()
    theirs = TfidfVectorizer(ngram_range=(1, 3)).fit_transform(texts)
    their_fit = time.perf_counter() - start
    columns, picks, picked = theirs.tocsc(), 50, []
    start = time.perf_counter()
    for _ in range(picks):
        values = scores * np.asarray(columns.sum(axis=1)).ravel()
        values[picked] = -1
        picked.append(int(np.argmax(values)))
        for term in theirs[picked[-1]].indices:
            columns.data[columns.indptr[term] : columns.indptr[term + 1]] *= 0.1
    their_choice = (time.perf_counter() - start) * 2600 / picks
    assert picked == chosen[:picks]
    print(
        f"\nselect, 2,600 of 52,000 rows: TF-IDF {ours_fit:.1f} s (scikit-learn {their_fit:.1f} s), choice "
        f"{ours_choice:.2f} s (summing again: {their_choice:.0f} s, from {picks} picks): choice "
        f"{their_choice / ours_choice:.0f} times, all "
        f"{(their_fit + their_choice) / (ours_fit + ours_choice):.1f} times as "
        f"fast; {memory / 2**30:.2f} GiB more memory",
        flush=True,
    )


def bench_ifd(folder: Path) -> None:
    """IFD of 500 rows, 25 M parameters, against two padded transformers forwards for every 8 rows."""
    import torch
    import transformers

    from data import tokenize_files
    from model import load_model
    from parts.distributed import compute_dtype, tune_malloc
    from parts.text.rows import read_rows
    from parts.text.templates import TEMPLATES, render
    from parts.text.tokenizers import load_tokenizer
    from score import measure_ifd

    tune_malloc()

    lines = (SHARED / "alpaca_scored_stage3.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ifd.jsonl").write_bytes(b"".join([x for x in lines if json.loads(x)["data"][1].strip()][:500]))
    documents = tokenize_files([folder / "ifd.jsonl"], folder, "phased", 2048, False)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs = []
    for row in read_rows(folder / "ifd.jsonl")[0]:
        tokens, loss_mask = render(row.turns, TEMPLATES["phased"], tokenizer)
        answer = [t for t, s in zip(tokens, loss_mask) if s]
        pairs.append(((tokens, len(tokens) - len(answer)), ([tokenizer.bos_id, *answer], 1)))

    @torch.no_grad()
    def padded() -> list[float]:
        out = []
        for a in range(0, len(pairs), 8):
            means = []
            for side in (0, 1):
                batch = [p[side] for p in pairs[a : a + 8]]
                width = max(len(t) for t, _ in batch)
                ids = torch.tensor([t + [0] * (width - len(t)) for t, _ in batch])
                mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t, _ in batch])
                logits = hf(ids, attention_mask=mask).logits
                for (t, start), row in zip(batch, logits):
                    means.append(
                        torch.nn.functional.cross_entropy(row[start - 1 : len(t) - 1], torch.tensor(t[start:])).item()
                    )
            half = len(means) // 2
            out += [math.exp(x - y) for x, y in zip(means[:half], means[half:])]
        return out

    defaults = load_model(folder, compute_dtype("auto"))
    ours, default, theirs = [], [], []
    for _ in range(3):
        start = time.perf_counter()
        mine = measure_ifd(model, documents)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        measure_ifd(defaults, documents)
        default.append(time.perf_counter() - start)
        start = time.perf_counter()
        reference = padded()
        theirs.append(time.perf_counter() - start)
    assert torch.allclose(mine, torch.tensor(reference), rtol=1e-3)
    a, b, c = (statistics.median(x) for x in (ours, theirs, default))
    print(
        f"\nifd of 500 rows, 25 M: {500 / a:.1f} rows/s in fp32, {500 / c:.1f} as --dtype auto; two padded "
        f"forwards for "
        f"8 rows in fp32: {500 / b:.1f}; {b / a:.1f} and {b / c:.1f} times",
        flush=True,
    )


def bench_iterit(folder: Path) -> None:
    """IterIT in train.py, 25 M, 2,000 real rows: scoring and choosing against a bare forward pass, and "
    "against an epoch's training."""
    import numpy as np
    import torch

    import data
    import score
    from model import load_model
    from parts.distributed import compute_dtype, tune_malloc
    from parts.text.tokenizers import load_tokenizer

    tune_malloc()
    lines = (SHARED / "alpaca_scored_stage3.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rows.jsonl").write_bytes(b"".join([x for x in lines if json.loads(x)["data"][1].strip()][:2000]))
    ratios = []
    for k in range(3):
        out = folder / f"iterit{k}"
        subprocess.run(
            [
                sys.executable,
                ROOT / "train.py",
                "--model",
                folder,
                "--stages",
                folder / "rows.jsonl",
                "--out",
                out,
                "--select",
                "iterit",
                "--epochs",
                "3",
                "--batch-size",
                "32",
                "--lr",
                "2e-5",
            ],
            check=True,
            capture_output=True,
        )
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for epoch in (2, 3):
            chose = next(r["seconds"] for r in rows if r["epoch"] == epoch and "chosen" in r)
            ratios.append(chose / sum(r["seconds"] for r in rows if r["epoch"] == epoch and "loss" in r))
    where = [folder], folder, "phased", 2048, folder / "iterit0" / "cache"
    documents = data.read_documents(["rows.jsonl"], *where, keep=False)[0]["rows.jsonl"]
    documents = data.subset(documents, np.arange(768))
    answers = [
        documents.tokens[a:b][documents.loss_mask[a:b]] for a, b in zip(documents.offsets[:-1], documents.offsets[1:])
    ]
    alone = data.Documents(
        np.concatenate([np.append(np.int32(1), a) for a in answers]),
        np.concatenate([np.arange(len(a) + 1) > 0 for a in answers]),
        np.cumsum([0, *(len(a) + 1 for a in answers)]),
        documents.ids,
        documents.source,
        [],
    )
    both, model = data.concat([documents, alone]), load_model(folder, compute_dtype("auto"))

    @torch.no_grad()
    def bare() -> None:
        for part in data.micro_batches(np.arange(len(both)), both.lengths, 1, 2048)[0]:
            model(*(torch.from_numpy(x) for x in both.pack(part)))

    def ours() -> None:
        found = [
            score.measure_ifd(model, data.subset(documents, np.arange(a, min(a + 256, len(documents)))), 2048)
            for a in range(0, len(documents), 256)
        ]
        tokenizer = load_tokenizer(folder)
        score.choose_rows(
            score.IFD.worth(torch.cat(found).numpy()), [tokenizer.decode(a.tolist()) for a in answers], 100
        )

    times = {bare: [], ours: []}
    for _ in range(3):
        for work in times:
            start = time.perf_counter()
            work()
            times[work].append(time.perf_counter() - start)
    first = statistics.median(times[ours]) / statistics.median(times[bare])
    print(
        f"\niterit, 25 M, 2,000 rows, --ratio 0.05 --update-ratio 3: before epochs 1 and 2 scoring and choosing take "
        f"{statistics.median(ratios):.2f} of the epoch's training; before epoch 0 {first:.2f} times a bare "
        f"forward pass",
        flush=True,
    )


BARE_CLIENT = """
import asyncio, json, sys, time
port, prompts = int(sys.argv[1]), json.load(open(sys.argv[2]))
async def worker(waiting):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for prompt in waiting:
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": 16}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\\r\\nhost: x\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(body)
        writer.write(head + body)
        head = await reader.readuntil(b"\\r\\n\\r\\n")
        await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\\r")[0]))
async def main():
    waiting, start = iter(prompts), time.perf_counter()
    await asyncio.gather(*(worker(waiting) for _ in range(64)))
    print(len(prompts) / (time.perf_counter() - start))
asyncio.run(main())
"""


def bench_api(folder: Path) -> None:
    """Requests a second with 64 in flight and a latency of 200 ms: score.py, bare sockets, the ideal."""
    import re

    rows = [json.loads(line) for line in (SHARED / "alpaca_scored_stage3.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["data"][1].strip()] * 2
    (folder / "api.jsonl").write_text(
        "".join(json.dumps(r | {"data": [f"{i} {r['data'][0]}", "x"]}) + "\n" for i, r in enumerate(rows))
    )
    (folder / "prompts.json").write_text(json.dumps([r["data"][0] + "x" * 1000 for r in rows]))
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "fake_api.py", '{"latency": 0.2}'], stdout=subprocess.PIPE, text=True
    )
    port = server.stdout.readline().strip()
    env = os.environ | {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "none"}
    try:
        out = subprocess.run(
            [sys.executable, ROOT / "score.py", "difficulty", folder / "api.jsonl", "--out", folder / "scored.jsonl"],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        bare = subprocess.run(
            [sys.executable, "-c", BARE_CLIENT, port, folder / "prompts.json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    finally:
        server.kill()
    ours, bare, ideal = float(re.search(r"([\d.,]+) rows/s", out)[1]), float(bare), 64 / 0.2
    print(
        f"\ndifficulty, 64 in flight, 200 ms: {ours:.0f} rows/s, {100 * ours / ideal:.0f} % of the ideal {ideal:.0f}; "
        f"bare sockets on this machine: {bare:.0f}",
        flush=True,
    )


# ---------------------------------------------------------------- generate.py


def bench_generate(folder: Path) -> None:
    """125 M, bf16: batch 1 against the memory's bandwidth; 200 prompts whose answers end where the real ones do."""
    import torch
    import transformers

    from generate import Options, decode
    from model import load_model
    from parts.text.rows import read_rows
    from parts.text.templates import TEMPLATES, render
    from parts.text.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder)
    rows = [
        (render(r.turns[:1], TEMPLATES["phased"], tokenizer)[0], len(tokenizer.encode(r.turns[1][1])))
        for r in read_rows(SHARED / "alpaca_scored_stage3.jsonl")[0]
    ]
    rows = [(p, min(n, 128)) for p, n in rows if 20 <= len(p) <= 200][:200]
    model = load_model(folder, torch.bfloat16).requires_grad_(False)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    read = 2 * (sum(p.numel() for p in model.parameters()) - model.embed.weight.numel())
    memory = torch.ones(2**29, dtype=torch.float32)

    def bandwidth() -> float:
        start = time.perf_counter()
        memory.sum()
        return memory.nbytes / (time.perf_counter() - start)

    def ours(prompts, limits, batch_size) -> float:
        start = time.perf_counter()
        options = Options(batch_size=batch_size)
        made = sum(t is not None for _, t, _ in decode(model, prompts, set(), options, limits))
        return made / (time.perf_counter() - start)

    class StopAt(transformers.StoppingCriteria):
        def __init__(self, width, limits):
            self.width, self.limits = width, torch.tensor(limits)

        def __call__(self, ids, scores, **_):
            return ids.shape[1] - self.width >= self.limits

    @torch.inference_mode()
    def theirs(prompts, limits, batch_size) -> float:
        start = time.perf_counter()
        for a in range(0, len(prompts), batch_size):
            part, stops = prompts[a : a + batch_size], limits[a : a + batch_size]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            hf.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(stops),
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                stopping_criteria=transformers.StoppingCriteriaList([StopAt(width, stops)]),
            )
        return sum(limits) / (time.perf_counter() - start)

    prompts, limits = [p for p, _ in rows], [n for _, n in rows]
    peak = memory_of_generation(folder, prompts, limits)
    single = next(p for p in prompts if len(p) >= 50)
    speeds = {
        "ours, batch 1": [],
        "theirs, batch 1": [],
        "bandwidth": [],
        "ours, 200": [],
        "theirs, 200 in 32s": [],
        "theirs, one by one": [],
    }
    for _ in range(3):
        speeds["bandwidth"].append(max(bandwidth() for _ in range(4)))
        speeds["ours, batch 1"].append(ours([single], [128], 1))
        speeds["theirs, batch 1"].append(theirs([single], [64], 1))
        speeds["ours, 200"].append(ours(prompts, limits, 128))
        speeds["theirs, 200 in 32s"].append(theirs(prompts, limits, 32))
        speeds["theirs, one by one"].append(theirs(prompts[:10], limits[:10], 1))
    m = {k: statistics.median(v) for k, v in speeds.items()}
    cache = 2 * 2 * 12 * 4 * 64 * (len(single) + 64)
    limit = m["bandwidth"] / (read + cache)
    print(
        f"\ngenerate, 125 M, bf16: batch 1 {m['ours, batch 1']:.0f} tokens/s, {m['ours, batch 1'] / limit:.0%} of the "
        f"limit of {limit:.0f} by {m['bandwidth'] / 1e9:.0f} GB/s (transformers "
        f"{m['theirs, batch 1']:.0f}); 200 prompts, "
        f"real lengths of answers: {m['ours, 200']:.0f} tokens/s, {m['ours, 200'] / m['theirs, 200 in 32s']:.1f} times "
        f"transformers in batches of 32, {m['ours, 200'] / m['theirs, one by one']:.1f} times one by one; peak memory "
        f"{peak:.2f} times weights and cache",
        flush=True,
    )


MEMORY = """
import json, os, sys, torch
os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}  # as generate.py's run does
sys.path.insert(0, sys.argv[1])
from generate import Options, decode
from parts.kv_cache import KVCache
from model import load_model
from parts.distributed import keep_memory
keep_memory()
prompts, limits = json.load(open(sys.argv[3]))
torch.randn(64, 64, dtype=torch.bfloat16) @ torch.randn(64, 64, dtype=torch.bfloat16)
def peak():  # ru_maxrss begins with the parent's
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
model = load_model(sys.argv[2], torch.bfloat16)
for _ in decode(model, prompts, set(), Options(), limits): pass
capacity = max(len(p) + n for p, n in zip(prompts, limits))
used = peak() - before
cache = KVCache(model.config, 128, capacity, torch.bfloat16, torch.device("cpu"))
print(used / (sum(2 * p.numel() for p in model.parameters()) + cache.k.nbytes + cache.v.nbytes))
"""


def memory_of_generation(folder: Path, prompts: list, limits: list) -> float:
    """Peak memory of loading and answering in a process of its own, over the bytes of weights and cache."""
    (folder / "prompts.json").write_text(json.dumps([prompts, limits]))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, ROOT, folder, folder / "prompts.json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


PARTS = ["train", "lora", "weights", "memory", "select", "ifd", "api", "iterit", "generate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=[*PARTS, "cuda", "real"])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of --parts weights")
    parser.add_argument("--shared", type=Path, default=SHARED, help="of --parts real and cuda: the real data")
    parser.add_argument("--model", type=Path, default=SMOLLM2, help="of --parts real: the folder of SmolLM2-135M")
    parser.add_argument("--small", action="store_true", help="of --parts cuda: a tiny model, to try the script")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="of --parts weights: keeps its results; the same command goes on")
    args = parser.parse_args()
    if args.contender:
        name, *more = args.contender.split()  # ours may be followed by flags of train.py
        if name == "cuda":
            from bench_cuda import contend

            return contend(" ".join(more), args.folder)
        how = (args.folder, args.dtypes[0], args.steps)
        print(json.dumps(ours(*how, more) if name == "ours" else theirs(*how, name)))
        return
    if not args.shared.is_dir():
        sys.exit(f"needs the real rows and tokenizers of {args.shared}")
    if "real" in args.parts:
        from bench_real import bench_real

        with tempfile.TemporaryDirectory() as temporary:
            bench_real(args.model, args.shared, Path(temporary))
        args.parts = [part for part in args.parts if part != "real"]
        if not args.parts:
            return
    if "cuda" in args.parts:
        from bench_cuda import bench_cuda

        with tempfile.TemporaryDirectory() as temporary:
            bench_cuda(Path(temporary), args.shared, args.small)
        args.parts = [part for part in args.parts if part != "cuda"]
        if not args.parts:
            return
    print(f"{os.cpu_count()} cores; ratios are of medians, both sides in the same precision")
    with tempfile.TemporaryDirectory() as temporary:
        if "train" in args.parts:
            for size in args.sizes:
                make_folder(Path(temporary) / size, size)
                for dtype in args.dtypes:
                    compare(size, dtype, args.rounds, args.steps, size == "25M", Path(temporary) / size)
            first_step()
            if "25M" in args.sizes:
                vocabulary(Path(temporary))
                linear(Path(temporary) / "25M")
        if "lora" in args.parts and "125M" in args.sizes:
            make_folder(Path(temporary) / "lora", "125M")
            for dtype in args.dtypes:
                lora("125M", dtype, args.rounds, args.steps, Path(temporary) / "lora")
        if "weights" in args.parts:
            from bench_weights import study

            folder = args.folder or Path(temporary) / "weights"
            if not (folder / "config.json").exists():
                make_folder(folder, "25M")
            study(folder, SHARED / "alpaca_scored_stage3.jsonl", args.seeds)
        if "memory" in args.parts:
            for size in args.sizes:
                memory(size, args.dtypes, Path(temporary) / f"memory {size}")
        if "select" in args.parts:
            bench_select()
        if "ifd" in args.parts:
            make_folder(Path(temporary) / "ifd", "25M")
            bench_ifd(Path(temporary) / "ifd")
        if "api" in args.parts:
            bench_api(Path(temporary))
        if "iterit" in args.parts:
            make_folder(Path(temporary) / "iterit", "25M")
            bench_iterit(Path(temporary) / "iterit")
        if "generate" in args.parts:
            make_folder(Path(temporary) / "generate", "125M")
            bench_generate(Path(temporary) / "generate")


if __name__ == "__main__":
    main()
