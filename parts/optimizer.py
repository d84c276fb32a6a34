"""The optimizer, gradient clipping, the learning rate."""

import math

import torch
from torch import nn

from parts.adamw import StochasticAdamW
from parts.distributed import DistributedEnv, gradient_norm, local_part
from parts.options import Optimization


def make_optimizer(trained: dict[str, nn.Parameter], optimization: Optimization) -> torch.optim.Optimizer:
    """AdamW, without weight decay for norms and biases. Any optimizer of torch that can step on sharded parameters can
    be used here: its complete state is saved and resumed. The learning rate of a group is set at every step, multiplied
    by its "lr_scale" if it has one. Weights in bf16 need stochastic rounding."""
    decayed = [p for p in trained.values() if p.dim() > 1]
    others = [p for p in trained.values() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": optimization.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups, settings = [g for g in groups if g["params"]], {"betas": tuple(optimization.betas), "eps": 1e-8}
    if any(p.dtype == torch.bfloat16 for p in trained.values()):  # --param-dtype bf16
        return StochasticAdamW(groups, **settings, seed=optimization.seed)
    return torch.optim.AdamW(groups, lr=0.0, **settings, fused=True)


def clip_gradients(trained: dict[str, nn.Parameter], max_norm: float, ranks: DistributedEnv) -> float:
    """Scale the gradients to a norm of at most `max_norm` (0: do not); returns their norm before."""
    gradients = [local_part(p.grad)[0] for p in trained.values()]
    norm = gradient_norm(gradients, ranks)
    if max_norm and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup_ratio: float) -> float:
    """The learning rate of step 0, 1, … of `steps`: linear warmup to `peak`, then cosine or linear decay to 0, or
    constant."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = (step - warmup) / max(1, steps - warmup)  # from 0 to 1
    return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * decay)), "linear": 1 - decay, "constant": 1.0}[schedule]
