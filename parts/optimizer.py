"""What follows the gradient: clipping, the learning rate, the optimizer."""

import math

import torch
from torch import nn

from parts.adamw import StochasticAdamW
from parts.distributed import DistributedEnv, gradient_norm, local_part
from parts.options import Optimization


def make_optimizer(trained: dict[str, nn.Parameter], optimization: Optimization) -> torch.optim.Optimizer:
    """Any optimizer of torch that can step on sharded parameters may stand here: its whole state is saved and resumed.
    The rate is set at every step: a group that wants another has a factor, "lr_scale". Weights in bf16 need one that
    rounds stochastically."""
    decayed = [p for p in trained.values() if p.dim() > 1]
    others = [p for p in trained.values() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": optimization.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups, settings = [g for g in groups if g["params"]], {"betas": tuple(optimization.betas), "eps": 1e-8}
    if any(p.dtype == torch.bfloat16 for p in trained.values()):  # --param-dtype bf16
        return StochasticAdamW(groups, **settings, seed=optimization.seed)
    return torch.optim.AdamW(groups, lr=0.0, **settings, fused=True)


def clip_gradients(trained: dict[str, nn.Parameter], most: float, ranks: DistributedEnv) -> float:
    """Shorten the gradient to a norm of `most` (0: leave it); returns the norm that it had."""
    gradients = [local_part(p.grad)[0] for p in trained.values()]
    norm = gradient_norm(gradients, ranks)
    if most and norm > most:
        torch._foreach_mul_(gradients, most / norm)
    return norm


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup_ratio: float) -> float:
    """The rate of step 0, 1, … of `steps`: up in a line to `peak`, then down to 0 (cosine, linear) or constant."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
