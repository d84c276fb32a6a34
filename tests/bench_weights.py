"""What it costs to hold weights in bf16: the study behind --weights bf16. By hand: tests/bench.py --parts weights

A model of 25 M parameters is trained for a while in fp32 on one half of the real rows. From there every way takes 300
steps of few tokens on the other half: at an ordinary rate, and at the paper's, whose updates lie far below half a step
of bf16. All compute in bf16. Compared is the loss on held-out rows at the end with that of fp32 weights: as a ratio,
and by how much of the fall in loss is had.
"""

import itertools
import json
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from parts.checkpoints.config import read_config

import data
import train
from model import save_model
from parts.adamw import StochasticAdamW, stochastic_round_
from parts.cli import dataclass_from_args
from parts.distributed import init_distributed

RATES, STEPS, BATCH, LONGEST, HELD_OUT = (2e-4, 5e-6), 300, 4, 128, 100


class Alternative(torch.optim.Optimizer):
    """AdamW for bf16 weights, written plainly, with the other ways to keep what a step changes.

    `rounding` of weights is "nearest", "stochastic" or "compensated" (nearest, what it cut off is kept in bf16: Kahan);
    moments are fp32, or bf16 and rounded as the weights are (stochastically for "compensated").
    """

    def __init__(self, groups, betas, eps, rounding: str, moments: torch.dtype, seed: int):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.rounding, self.moments, self.generator = rounding, moments, torch.Generator().manual_seed(seed)

    def rounded(self, x: torch.Tensor, rounding: str) -> torch.Tensor:
        if rounding == "nearest":
            return x
        return stochastic_round_(x, torch.randint(2**16, x.shape, dtype=torch.int32, generator=self.generator))

    @torch.no_grad()
    def step(self) -> None:
        for group, p in ((g, p) for g in self.param_groups for p in g["params"]):
            (beta1, beta2), lr, state = group["betas"], group["lr"], self.state[p]
            if not state:
                m, v = (torch.zeros_like(p, dtype=self.moments) for _ in range(2))
                state.update(step=0, m=m, v=v, lost=torch.zeros_like(p))
            state["step"] += 1
            w, g, m, v = (t.float() for t in (p, p.grad, state["m"], state["v"]))
            m, v = m.lerp(g, 1 - beta1), v * beta2 + (1 - beta2) * g * g
            root = (v / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
            w = w * (1 - lr * group["weight_decay"]) - lr / (1 - beta1 ** state["step"]) * m / root
            if self.rounding == "compensated":
                w += state["lost"]
                p.copy_(w)
                state["lost"].copy_(w - p.float())
            else:
                p.copy_(self.rounded(w, self.rounding))
            for moment, x in ((state["m"], m), (state["v"], v)):
                moment.copy_(x if self.moments == torch.float32 else self.rounded(x, self.rounding))


BF16, FP32 = torch.bfloat16, torch.float32
WAYS = {  # bytes a parameter, and how the rounding is done; None: by what train.py takes
    "fp32 weights": (16, None),
    "bf16, stochastic": (8, None),
    "bf16, nearest": (8, ("nearest", BF16)),
    "bf16, stochastic, fp32 moments": (12, ("stochastic", FP32)),
    "bf16, compensated": (10, ("compensated", BF16)),
}


def read_halves(folder: Path, rows: Path) -> tuple[data.Documents, data.Documents, data.Documents]:
    """Tokenised: rows to pre-train on, others to train on, and a few held out."""
    lines = [line for line in rows.read_bytes().splitlines(keepends=True) if json.loads(line)["data"][1].strip()]
    (folder / "rows.jsonl").write_bytes(b"".join(lines))
    where = [folder], folder, "phased", LONGEST, folder / "cache"
    documents = data.read_documents(["rows.jsonl"], *where, keep=False)[0]["rows.jsonl"]
    half = len(documents) // 2
    parts = (
        np.arange(half),
        np.arange(half, len(documents) - HELD_OUT),
        np.arange(len(documents) - HELD_OUT, len(documents)),
    )
    return tuple(data.subset(documents, part) for part in parts)


def one_run(
    folder: Path, way: str, rate: float, steps: int, batch_size: int, documents, held_out, seed: int, save_to=None
):
    """Train from the model in `folder`: the held-out loss before and after, and seconds a step."""
    where = ["--model", str(folder), "--stages", str(folder / "rows.jsonl"), "--out", str(folder / "out")]
    kind = ["--weights", "fp32" if way == "fp32 weights" else "bf16", "--seed", str(seed)]
    args = train.parse_args([*where, *kind, "--dtype", "bf16", "--lr", str(rate)])
    with init_distributed() as ranks:
        options = (dataclass_from_args(kind, args) for kind in (train.Weights, train.Computation))
        model = train.build_model(folder, read_config(folder), *options, ranks)
        trained, optimization = train.trained_parameters(model), dataclass_from_args(train.Optimization, args)
        optimizer, chosen = train.make_optimizer(trained, optimization), WAYS[way][1]
        assert isinstance(optimizer, StochasticAdamW) == way.startswith("bf16")
        if chosen:
            optimizer = Alternative(optimizer.param_groups, tuple(args.betas), 1e-8, *chosen, seed)
        before = train.held_out_loss(model, held_out, 4096, ranks, int, "")
        epochs = (data.epoch_batches(documents, np.arange(len(documents)), batch_size, seed, 0, e) for e in range(99))
        start = time.perf_counter()
        for step, batch in zip(range(steps), itertools.chain.from_iterable(epochs)):
            train.batch_gradients(model, trained, documents, batch, 2048, ranks, int)
            train.clip_gradients(trained, 1.0, ranks)
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, steps, rate, "cosine", 0.1)
            optimizer.step()
        seconds = (time.perf_counter() - start) / steps
        after = train.held_out_loss(model, held_out, 4096, ranks, int, "")
        if save_to:
            save_model(model, save_to)
    return before, after, seconds


def study(folder: Path, rows: Path, seeds: list[int], pretraining: int = 200) -> None:
    """The whole study, a line a run. `folder` holds a random model of 25 M and its tokenizer; the pre-trained model and
    results.jsonl appear there, and the same command goes on from them."""
    first, second, held_out = read_halves(folder, rows)
    base, results = folder / "base", folder / "results.jsonl"
    if not (base / "tokenizer.model").exists():
        before, after, _ = one_run(folder, "fp32 weights", 1e-3, pretraining, 8, first, held_out, 0, save_to=base)
        shutil.copyfile(folder / "tokenizer.model", base / "tokenizer.model")
        print(f"{pretraining} steps in fp32 first: held-out loss {before:.3f} -> {after:.3f}", flush=True)
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(seed, rate, way): losses for seed, rate, way, losses in found}
    # What train.py offers, and what it is compared with, before the remedies.
    for run in sorted(itertools.product(seeds, RATES, WAYS), key=lambda run: list(WAYS).index(run[2]) > 2):
        seed, rate, way = run
        if run not in known:
            *known[run], seconds = one_run(base, way, rate, STEPS, BATCH, second, held_out, seed)
            with results.open("a") as file:
                file.write(json.dumps([*run, known[run]]) + "\n")
            print(f"seed {seed}, lr {rate:g}, {way}: {known[run]}, {seconds:.2f} s a step", flush=True)
    print(f"\nweights in bf16, 25 M, {STEPS} steps, against fp32 weights: means over {len(seeds)} seeds (from, to)")
    for rate, way in itertools.product(RATES, WAYS):
        runs = [(known[seed, rate, "fp32 weights"], known[seed, rate, way]) for seed in seeds]
        ratios = [end / goal for (_, goal), (_, end) in runs]
        falls = [(begin - end) / (begin - goal) for (begin, goal), (_, end) in runs]
        print(
            f"  lr {rate:g}, {way:30} {WAYS[way][0]:2} bytes: held-out loss {statistics.mean(ratios):.5f} "
            f"({min(ratios):.5f}, {max(ratios):.5f}), fall {statistics.mean(falls):.3f} ({min(falls):.3f}, "
            f"{max(falls):.3f}); fp32's {statistics.mean(begin - goal for (begin, goal), _ in runs):.4f}",
            flush=True,
        )
