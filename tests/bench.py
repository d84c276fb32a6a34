"""Speed and memory, side by side with transformers on this machine, in one run. By hand: python tests/bench.py

Every contender runs in a process of its own, in turn, for several rounds; ratios are of medians over the rounds. Both
sides compute in the same precision, on the same batches of real rows.
"""

import argparse
import json
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
sys.path.insert(0, str(ROOT))

SIZES = {
    "25M": dict(hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6),
    "125M": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4),
}
ROWS, BATCH = 400, 16


def raw_config(size: str, vocab: int) -> dict:
    return dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=vocab, max_position_embeddings=2048,
                rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, torch_dtype="float32", **SIZES[size])


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------- one contender, in its own process


def ours(folder: Path, dtype: str, steps: int) -> dict:
    import train
    from data import epoch_batches

    args = train.parse_args(["--model", str(folder), "--stages", str(folder / "rows.jsonl"), "--skip-bad-rows",
                             "--out", str(folder / "out"), "--dtype", dtype])
    documents = train.read_data(args, progress=False)[0][0].documents
    base = peak_memory()
    machine = train.join_machine(args)
    config = train.model_file.read_config(folder)
    model = train.build_model(args, machine, config, read_weights=True)
    optimizer = train.make_optimizer(args, model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
    seconds, rates, supervised, tokens, flops = [], [], 0, 0, 0.0
    for batch in epoch_batches(len(documents), BATCH, 0, 0, 0)[:steps + 1]:
        start = time.perf_counter()
        train.train_step(model, machine, documents, batch, args.micro_tokens, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        if len(seconds) > 1:  # the first one warms up
            supervised += int(documents.target_counts[batch].sum())
            tokens += int(documents.lengths[batch].sum())
            flops += train.batch_flops(config, matrices, documents.lengths[batch], int(documents.target_counts[batch].sum()))
            parts = len(train.data.micro_batches(batch, documents.lengths, 1, args.micro_tokens)[0])
            peak = peak_memory() - base
            rates.append(matmul_rate(config, tokens // len(rates + [0]) // parts, supervised // len(rates + [0]) // parts, machine.dtype))
    total = sum(seconds[1:])
    return {"supervised_per_second": supervised / total, "tokens_per_second": tokens / total, "memory": peak,
            "of_matmul_rate": flops / total / statistics.median(rates)}


def matmul_rate(config, tokens: int, supervised: int, dtype) -> float:
    """Flops per second of the bare matrix products of a step: every shape, forward and both gradients."""
    import torch

    heads, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = [(tokens, config.dim, heads, 2), (tokens, config.dim, keys, 2), (tokens, config.dim, config.hidden_dim, 3)]
    flops = seconds = 0.0
    for t, a, b, count in [*((t, a, b, c * config.n_layers) for t, a, b, c in shapes),
                           (supervised, config.dim, config.vocab_size, 1)]:
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
    import torch
    import transformers
    from data import TEMPLATES, load_tokenizer, read_rows, render, epoch_batches

    rows, _ = read_rows(folder / "rows.jsonl")
    tokenizer = load_tokenizer(folder)
    rendered = [render(r.turns, TEMPLATES["phased"], tokenizer) for r in rows]
    base = peak_memory()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seconds, supervised = [], 0
    batches = epoch_batches(len(rows), BATCH, 0, 0, 0)
    for batch in batches[:steps + (way != "fixed")]:
        documents = [(rendered[d][0][:2048], rendered[d][1][:2048]) for d in batch]
        count = sum(sum(s[1:]) for _, s in documents)
        width = 2048 if way == "fixed" else max(len(t) for t, _ in documents)
        parts = [documents[i:i + 2] for i in range(0, BATCH, 2)] if way == "fixed" else [documents]  # 16 x 2048 needs 40 GB
        start = time.perf_counter()
        for part in parts:
            if way == "packed":
                inputs = {"input_ids": torch.tensor([[t for d in part for t in d[0]]]),
                          "position_ids": torch.tensor([[i for d in part for i in range(len(d[0]))]]),
                          "labels": torch.tensor([[t if s and i else -100 for d in part for i, (t, s) in enumerate(zip(*d))]])}
            else:
                pad = lambda d, key, fill: list(d[key]) + [fill] * (width - len(d[0]))
                inputs = {"input_ids": torch.tensor([pad(d, 0, 0) for d in part]),
                          "attention_mask": torch.tensor([[1] * len(d[0]) + [0] * (width - len(d[0])) for d in part]),
                          "labels": torch.tensor([[t if s else -100 for t, s in zip(pad(d, 0, 0), pad(d, 1, False))] for d in part])}
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                loss = model(**inputs, use_cache=False, num_items_in_batch=count).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        if way == "fixed" or len(seconds) > 1:
            supervised += count
    return {"supervised_per_second": supervised / sum(seconds[way != "fixed":]), "memory": peak_memory() - base}


# ---------------------------------------------------------------- all of them


def contender(folder: Path, name: str, dtype: str, steps: int) -> dict:
    out = subprocess.run([sys.executable, __file__, "--contender", name, "--folder", str(folder), "--dtypes", dtype,
                          "--steps", str(steps)], capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{name} failed:\n{out.stderr[-3000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def make_folder(folder: Path, size: str, vocab: int = 32000) -> None:
    import torch
    from model import Transformer, init_weights, parse_config, save_model

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
    median = lambda name, key: statistics.median(r[key] for r in results[name])
    speed = median("ours", "supervised_per_second")
    print(f"\n{size}, {dtype}, batch of {BATCH} documents, medians of {rounds} rounds of {steps} steps")
    for name in names:
        print(f"  {name:8} {median(name, 'supervised_per_second'):9,.0f} supervised tokens/s, peak memory "
              f"{median(name, 'memory') / 2**30:6.2f} GiB; ours is {speed / median(name, 'supervised_per_second'):6.2f} times "
              f"as fast in {median('ours', 'memory') / median(name, 'memory'):.2f} of the memory")
    print(f"  ours reaches {100 * median('ours', 'of_matmul_rate'):.0f} % of the machine's {dtype} matmul rate at these shapes",
          flush=True)


def first_step() -> None:
    """Seconds from the command to the first step of the demo."""
    times = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", str(ROOT / "train.py"), "--out", out], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
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
    print(f"\nfrom `torchrun train.py` to the first step of the demo: {statistics.median(times):.1f} s "
          f"(`import torch`, which torchrun and train.py both do: {statistics.median(imports):.1f} s)", flush=True)


def vocabulary(folder: Path) -> None:
    """Peak memory with 32,000 and 128,000 words; the difference in units of what embedding and head must cost."""
    memory = {}
    for vocab in (32000, 128000):
        (folder / str(vocab)).mkdir()
        make_folder(folder / str(vocab), "25M", vocab)
        memory[vocab] = contender(folder / str(vocab), "ours", "fp32", 3)["memory"]
    extra = memory[128000] - memory[32000]
    must = 16 * 2 * 96000 * SIZES["25M"]["hidden_size"]  # weights, gradients and two moments in fp32; embedding and head
    print(f"\n128,000 words instead of 32,000: {extra / 2**20:,.0f} MiB more; weights, gradients and moments of embedding and "
          f"head: {must / 2**20:,.0f} MiB", flush=True)


def linear(folder: Path) -> None:
    """Seconds a token as the batch grows from 16 documents on: the same if cost is linear in tokens."""
    import train
    import numpy as np

    args = train.parse_args(["--model", str(folder), "--stages", str(folder / "rows.jsonl"), "--out", str(folder / "out")])
    documents = train.read_data(args, progress=False)[0][0].documents
    machine = train.join_machine(args)
    model = train.build_model(args, machine, train.model_file.read_config(folder), read_weights=True)
    per_token = {}
    for size in (16, 64, 256):
        times = []
        for i in range(3):
            batch = np.arange(i * 16, i * 16 + size)
            start = time.perf_counter()
            train.train_step(model, machine, documents, batch, args.micro_tokens, 1.0)
            times.append((time.perf_counter() - start) / documents.lengths[batch].sum())
        per_token[size] = statistics.median(times)
    print("\nmicroseconds a token in batches of 16, 64, 256 documents: " + ", ".join(f"{1e6 * t:.0f}" for t in per_token.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        measure = ours if args.contender == "ours" else lambda *a: theirs(*a, way=args.contender)
        print(json.dumps(measure(args.folder, args.dtypes[0], args.steps)))
        return
    if not SHARED.is_dir():
        sys.exit(f"needs the real rows and tokenizers of {SHARED}")
    print(f"{os.cpu_count()} cores; ratios are of medians, both sides in the same precision")
    with tempfile.TemporaryDirectory() as temporary:
        for size in args.sizes:
            folder = Path(temporary) / size
            make_folder(folder, size)
            for dtype in args.dtypes:
                compare(size, dtype, args.rounds, args.steps, size == "25M", folder)
        first_step()
        if "25M" in args.sizes:
            vocabulary(Path(temporary))
            linear(Path(temporary) / "25M")


if __name__ == "__main__":
    main()
