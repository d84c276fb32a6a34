"""AdamW (arXiv 1711.05101) for weights stored in bf16, without an fp32 copy: 8 bytes per parameter with the gradient.

bf16 has 8 significant bits. Rounding to nearest would discard every update below half of the last bit. Stochastic
rounding (arXiv 2010.06192) rounds up with a probability proportional to the discarded part: its expected error is zero.
"""

import torch
from torch import Tensor

from parts.distributed import local_part
from parts.keyed_random import random_key

CHUNK_NUMEL = {"cpu": 2**18, "cuda": 2**23}  # elements per update; on a CPU they fit into the caches
MAX_FP32 = torch.finfo(torch.float32).max


def stochastic_round_(x: Tensor, random_bits: Tensor) -> Tensor:
    """Round fp32 numbers, in place, to one of the two neighboring bf16 numbers: away from zero with a probability
    equal to the discarded part, in steps of 2^-16. `random_bits` (int32) are uniform in 0 to 65535. Numbers that bf16
    represents exactly, inf and NaN do not change."""
    nonfinite = x.clamp(-MAX_FP32, MAX_FP32)
    nonfinite = torch.sub(x, nonfinite, out=nonfinite)  # 0 for finite numbers; adding bits would change inf and NaN
    x.view(torch.int32).add_(random_bits).bitwise_and_(-65536)
    return x.add_(nonfinite)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW with weights and both moments in bf16, plain or sharded, computed in fp32, CHUNK_NUMEL elements at a time.

    The random bits depend on the seed, the step (part of the state), the parameter's index and the position in it:
    resuming needs no generator state, and the number of ranks does not change the result. One random table is generated
    per step. Each chunk reads it from an offset of its own and XORs it with a key of its own, so the bits of any two
    elements are independent.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, seed: int):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0, "step": 0})
        self.seed = seed

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] += 1
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        device, step_key = parameters[0][1].device, (self.seed, self.param_groups[0]["step"])
        numel = CHUNK_NUMEL[device.type]
        generator = torch.Generator(device).manual_seed(random_key(*step_key))
        table = torch.randint(2**16, (2, 2 * numel), dtype=torch.int32, device=device, generator=generator)
        for index, (group, p) in enumerate(parameters):
            state = self.state[p]
            if not state:
                state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            local, offset = local_part(p)
            tensors = [local_part(t)[0].view(-1) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
            first = offset[0] * local[:1].numel() if offset else 0  # position of the shard in the full tensor
            end = first + local.numel()
            for chunk in range(first - first % numel, end, numel):  # positions in the full tensor
                start, stop = max(chunk, first), min(chunk + numel, end)
                key = random_key(*step_key, index, chunk)
                columns = slice(key % numel + start - chunk, key % numel + stop - chunk)
                random_bits = [row[columns] ^ (key >> shift & 0xFFFF) for row, shift in zip(table, (24, 40))]
                self.update(group, [t[start - first : stop - first] for t in tensors], random_bits)

    def update(self, group: dict, chunk: list[Tensor], random_bits: list[Tensor]) -> None:
        """Update a chunk of weight, gradient and moments as torch.optim.AdamW does, then round it."""
        weight, _, exp_avg, exp_avg_sq = chunk
        w, g, m, v = (t.float() for t in chunk)
        (beta1, beta2), lr, step = group["betas"], group["lr"], group["step"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = torch.sqrt(v, out=g).mul_((1 - beta2**step) ** -0.5).add_(group["eps"])
        w.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, root, value=-lr / (1 - beta1**step))
        weight.copy_(stochastic_round_(w, random_bits[0]))
        exp_avg.copy_(stochastic_round_(m, random_bits[1]))
        exp_avg_sq.copy_(stochastic_round_(v, random_bits[1]))
