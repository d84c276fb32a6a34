"""AdamW for weights held in bf16 (arXiv 1711.05101), without an fp32 copy: 8 bytes a parameter with the gradient.

bf16 keeps 8 bits of a number: an update below half of its last place would be lost by rounding to the nearest, every
time. Rounded stochastically, up as often as the part cut off is large, it counts on average (arXiv 2010.06192).
"""

import torch
from torch import Tensor

from parts.distributed import local_part
from parts.keyed_random import random_key

CHUNK = {"cpu": 2**18, "cuda": 2**23}  # numbers; on a CPU what its caches hold, and enough for several cores
LARGEST = torch.finfo(torch.float32).max


def stochastic_round_(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 numbers, in place, to one of their two neighbours in bf16: away from zero with the probability of the part
    cut off, in steps of 2^-16. `bits` (int32) are random from 0 to 65535. What bf16 holds, inf and NaN stay."""
    endless = x.clamp(-LARGEST, LARGEST)
    endless = torch.sub(x, endless, out=endless)  # 0, or inf and NaN, in whose bits one cannot add
    x.view(torch.int32).add_(bits).bitwise_and_(-65536)
    return x.add_(endless)


class StochasticAdamW(torch.optim.Optimizer):
    """Weights and both moments bf16, plain or sharded; computed in fp32, CHUNK numbers at a time.

    Rounding depends on the seed, the step (which is in the state), the parameter's number and the place in it: a
    resumed run needs no random state, and the number of ranks changes nothing. Random
    bits are cheap: one table a step, from which each stretch of CHUNK numbers takes as many, from a place of its own
    on, XOR a key of its own: so the draws of any two numbers are independent.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, seed: int):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0, "step": 0})
        self.seed = seed

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] += 1
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        device, now = parameters[0][1].device, (self.seed, self.param_groups[0]["step"])
        length = CHUNK[device.type]
        generator = torch.Generator(device).manual_seed(random_key(*now))
        table = torch.randint(2**16, (2, 2 * length), dtype=torch.int32, device=device, generator=generator)
        for number, (group, p) in enumerate(parameters):
            state = self.state[p]
            if not state:
                state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            local, offset = local_part(p)
            held = (local, *(local_part(t)[0] for t in (p.grad, state["exp_avg"], state["exp_avg_sq"])))
            held = [t.view(-1) for t in held]
            first = offset[0] * local[:1].numel() if offset else 0  # this rank's rows begin here in the whole
            for a in range(first - first % length, first + local.numel(), length):
                key = random_key(*now, number, a)
                here = slice(max(a, first), min(a + length, first + local.numel()))  # of the stretch, this rank's
                drawn = slice(key % length + here.start - a, key % length + here.stop - a)
                bits = [t[drawn] ^ (key >> shift & 0xFFFF) for t, shift in zip(table, (24, 40))]
                self.update(group, [t[here.start - first : here.stop - first] for t in held], bits)

    def update(self, group: dict, held: list[Tensor], bits: list[Tensor]) -> None:
        """One stretch of weight, gradient and moments, as torch.optim.AdamW computes it; then they are rounded."""
        w, g, m, v = (t.float() for t in held)
        (beta1, beta2), lr, step = group["betas"], group["lr"], group["step"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = torch.sqrt(v, out=g).mul_((1 - beta2**step) ** -0.5).add_(group["eps"])
        w.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, root, value=-lr / (1 - beta1**step))
        weight, _, exp_avg, exp_avg_sq = held
        weight.copy_(stochastic_round_(w, bits[0]))
        exp_avg.copy_(stochastic_round_(m, bits[1]))
        exp_avg_sq.copy_(stochastic_round_(v, bits[1]))
