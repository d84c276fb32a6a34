"""A model of Llama-2-7B's shape on one GPU: training against the device's peak and the memory plan, transformers
beside it, decoding against the bandwidth of memory. By hand: tests/bench.py --parts cuda (under eight minutes, H100)

Weights are random and made on the GPU; rows are real. Every contender has a process of its own.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import generate
import train
from model import Transformer
from parts import memory_plan
from parts.checkpoints import config as config_file
from parts.checkpoints.config import parse_config
from parts.cli import dataclass_from_args, print_table
from parts.distributed import init_distributed
from parts.flops import Flops, peak_flops, training_flops
from parts.memory import memory_in_use

RAW = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=32000, hidden_size=4096,
           intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, max_position_embeddings=4096,
           rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16")  # fmt: skip
SMALL = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4)  # to try the script
BATCH, MICRO, STEPS = 32, 8192, 4
PROMPT, NEW = 128, 128  # tokens; so long that all steps read 256 places of the cache, and one shape is compiled


def make_folder(folder: Path, shared: Path, small: bool) -> None:
    """config.json, the real tokenizer, 400 real rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RAW | (SMALL if small else {})))
    (folder / "tokenizer.model").write_bytes((shared / "tokenizers" / "llama2.model").read_bytes())
    lines = (shared / "alpaca_scored_stage3.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rows.jsonl").write_bytes(b"".join([x for x in lines if json.loads(x)["data"][1].strip()][:400]))


@torch.no_grad()
def fill(model: Transformer, files=None) -> None:
    for p in model.parameters():
        p.fill_(1.0) if p.dim() == 1 else p.normal_(0, 0.02)


# ---------------------------------------------------------------- contenders


def training(folder: Path, flags: list[str]) -> dict:
    """train.py's own step."""
    where = ["--model", folder, "--stages", folder / "rows.jsonl", "--out", folder / "out", "--lr", "1e-5"]
    args = train.parse_args([*map(str, where), "--micro-tokens", str(MICRO), "--dtype", "bf16", *flags])
    train.find_weight_files, train.load_weights = lambda *a: {}, fill
    documents = train.read_data(args, first=False)[0][0].documents
    config = config_file.read_config(folder)
    kinds = (dataclass_from_args(kind, args) for kind in (train.Weights, train.Computation))
    with init_distributed() as ranks:
        model = train.build_model(folder, config, *kinds, ranks)
        trained = train.trained_parameters(model)
        optimizer = train.make_optimizer(trained, dataclass_from_args(train.Optimization, args))
        for group in optimizer.param_groups:
            group["lr"] = 1e-5

        def step(batch: np.ndarray) -> None:
            train.batch_gradients(model, trained, documents, batch, MICRO, ranks, int)
            train.clip_gradients(trained, 1.0, ranks)
            optimizer.step()

        seconds = timed(step, documents, ranks.device)
        flops = training_flops(model, set(trained))
        most = data.largest_micro_batch([SimpleNamespace(documents=documents, batch_size=BATCH)], 1, MICRO)
        cuda = ranks.device.type == "cuda"
        plan = memory_plan.memory_plan(model, set(trained), 1, torch.bfloat16, *most, args.checkpoint_activations, cuda)
        return measured(documents, seconds, flops, ranks.device) | {"plan": sum(plan.values())}


def batches(documents: data.Documents) -> list[np.ndarray]:
    return data.epoch_batches(documents, np.arange(len(documents)), BATCH, 0, 0, 0)[: STEPS + 2]


def timed(step, documents: data.Documents, device: torch.device) -> list[float]:
    """Seconds of each step but the first two, which compile and warm up."""
    seconds = []
    for batch in batches(documents):
        start = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def measured(documents: data.Documents, seconds: list[float], flops: Flops, device: torch.device) -> dict:
    tokens = rates = 0.0
    for batch in batches(documents)[2:]:
        lengths = documents.lengths[batch]
        tokens += lengths.sum()
        rates += flops.of_batch(lengths, int(documents.target_counts[batch].sum()))
    peak = peak_flops(device, torch.bfloat16)
    found = {"tokens_per_second": tokens / sum(seconds), "peak_memory": memory_in_use(device)}
    return found | {"mfu": rates / sum(seconds) / peak if peak else None}


def theirs(folder: Path, flags: list[str]) -> dict:
    """transformers: the same batches as packed rows with position ids, bf16 weights, torch's fused AdamW."""
    import transformers

    where = ["--model", folder, "--stages", folder / "rows.jsonl", "--out", folder / "out", "--lr", "1e-5"]
    args = train.parse_args([*map(str, where)])
    documents = train.read_data(args, first=False)[0][0].documents
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = transformers.LlamaConfig(**json.loads((folder / "config.json").read_text()))
    with torch.device(device):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    fill(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)

    def step(batch: np.ndarray) -> None:
        supervised = int(documents.target_counts[batch].sum())
        for part in data.micro_batches(batch, documents.lengths, 1, MICRO)[0]:
            tokens, positions, _, targets = (torch.from_numpy(a).to(device) for a in documents.pack(part))
            logits = model(tokens[None], position_ids=positions[None], use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
            (loss / supervised).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with torch.device("meta"):
        ours = Transformer(parse_config(json.loads((folder / "config.json").read_text())))
    flops = training_flops(ours, {name for name, _ in ours.named_parameters()})
    return measured(documents, timed(step, documents, device), flops, device)


def decoding(folder: Path, flags: list[str]) -> dict:
    """Tokens a second at several batch sizes, and what the bandwidth allows at 1: the weights read once a token."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = Transformer(parse_config(json.loads((folder / "config.json").read_text()))).to(torch.bfloat16)
    model.to_empty(device=device)
    fill(model)
    model.compute_dtype = torch.bfloat16
    prompts, out = [list(range(5, 5 + PROMPT))] * 128, {}
    with torch.no_grad():
        for size in (1, 32, 128):
            options = generate.Options(max_new_tokens=NEW, batch_size=size, compile="compiled" in flags)
            rates = []
            for _ in range(3):  # the first compiles
                made = 0
                for _, token, _ in generate.decode(model, prompts[:size], set(), options):
                    made += token is not None
                    if token is not None and made == size:  # the prompts are read, each has its first token
                        start = time.perf_counter()
                rates.append((made - size) / (time.perf_counter() - start))
            out[str(size)] = statistics.median(rates[1:])
    weights = sum(p.nbytes for p in model.layers.parameters()) + model.head.weight.nbytes
    return out | {"limit": bandwidth(device) / weights, "peak_memory": memory_in_use(device)}


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of 4 GiB (on a CPU 256 MiB) reads and writes."""
    a = torch.empty(2**32 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    b, seconds = torch.empty_like(a), []
    for _ in range(6):
        start = time.perf_counter()
        b.copy_(a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * len(a) / statistics.median(seconds[1:])


# ---------------------------------------------------------------- the table

CHECKPOINTED = "--checkpoint-activations"
CONTENDERS = {
    "LoRA 16": (training, ["--lora", "16", CHECKPOINTED]),
    "LoRA 16, compiled": (training, ["--lora", "16", CHECKPOINTED, "--compile"]),
    "bf16 weights": (training, ["--weights", "bf16", CHECKPOINTED]),
    "bf16 weights, compiled": (training, ["--weights", "bf16", CHECKPOINTED, "--compile"]),
    "transformers, packed rows, bf16": (theirs, []),
    "decoding": (decoding, []),
    "decoding, compiled": (decoding, ["compiled"]),
}


def bench_cuda(folder: Path, shared: Path, small: bool) -> None:
    make_folder(folder, shared, small)
    trained, decoded = [], []
    for name, (work, _) in CONTENDERS.items():
        bench = Path(__file__).with_name("bench.py")
        command = [sys.executable, bench, "--contender", f"cuda {name}", "--folder", folder]
        done = subprocess.run([str(a) for a in command], capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: failed: {done.stderr.strip()[-600:]}", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {json.dumps(found)}", flush=True)
        peak = f"{found['peak_memory'] / 2**30:.1f}"
        if work is decoding:
            rates = [f"{found[size]:,.0f}" for size in ("1", "32", "128")]
            decoded.append((name, *rates, f"{found['limit']:,.0f}", f"{found['1'] / found['limit']:.0%}", peak))
        else:
            mfu = "–" if found["mfu"] is None else f"{found['mfu']:.1%}"
            plan = "–"
            if "plan" in found:
                plan = f"{found['plan'] / 2**30:.1f} ({found['peak_memory'] / found['plan'] - 1:+.0%})"
            trained.append((name, f"{found['tokens_per_second']:,.0f}", mfu, peak, plan))
    print_table(("training, Llama-2 7B", "tokens/s", "MFU", "peak GiB", "planned GiB (peak is more by)"), trained)
    print_table(("", "batch 1, tokens/s", "32", "128", "limit at 1", "of it", "peak GiB"), decoded)


def contend(name: str, folder: Path) -> None:
    work, flags = CONTENDERS[name]
    print(json.dumps(work(folder, flags)))
