"""Floating-point operations of training, and what a device can compute in a second."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

PEAK_FLOPS = {  # dense bf16, from the vendors' data sheets; the first key that is part of a device's name counts
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of this rank's device: from PEAK_FLOPS for GPUs in bf16 (None if unknown), measured on CPUs."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [flops for key, flops in PEAK_FLOPS.items() if key in name]
        return known[0] if known and dtype == torch.bfloat16 else None
    a = torch.randn(1024, 1024).to(dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward and backward together."""

    per_token: float  # matrix products of the blocks
    per_pair: float  # per pair of a query and a key that it attends to
    per_supervised: float  # output head
    sliding_window: int | None
    peak: float | None = None  # FLOP/s of all ranks together, if known

    def of_batch(self, lengths: np.ndarray, supervised: int) -> float:
        """The operations for documents of these lengths. Attention counts the causal (windowed) pairs; recomputed
        activations do not count."""
        n = lengths.astype(np.float64)
        w = np.minimum(n, self.sliding_window or math.inf)
        pairs = (n * w - w * (w - 1) / 2).sum()
        return self.per_token * n.sum() + self.per_pair * pairs + self.per_supervised * supervised

    def utilization(self, lengths: np.ndarray, supervised: int, seconds: float) -> float | None:
        """MFU: the fraction of `peak` that a batch used which took `seconds`."""
        return round(self.of_batch(lengths, supervised) / max(seconds, 1e-6) / self.peak, 4) if self.peak else None


ORDER_IN_BLOCK = {"attention_norm": 0, "q": 1, "k": 1, "v": 1, "o": 2, "mlp_norm": 3, "gate": 4, "up": 4, "down": 5}


def computation_order(name: str, n_layers: int) -> tuple[int, int, bool]:
    """A sort key for parameters by their first use in the forward pass: block, position in it, whether it is LoRA's B,
    which follows A."""
    if not name.startswith("layers."):
        return (-1 if name == "embed.weight" else n_layers, 0, False)
    block, *_, module, kind = name.removeprefix("layers.").split(".")
    return (int(block), ORDER_IN_BLOCK.get(module, 0), kind == "lora_B")


def training_flops(model: torch.nn.Module, trained: set[str], peak: float | None = None) -> Flops:
    """A matrix product costs 2 operations per matrix entry in the forward pass, 2 for the gradient of its input if a
    parameter before it is trained, and 2 for the gradient of the matrix if it is trained itself."""
    c = model.config
    first_trained = min((computation_order(name, c.n_layers) for name in trained), default=(c.n_layers, 0, False))
    per_token = 0.0
    for name, p in model.named_parameters():
        if name.startswith("layers.") and p.dim() > 1:
            needs_input_gradient = computation_order(name, c.n_layers) > first_trained
            per_token += (2 + 2 * needs_input_gradient + 2 * (name in trained)) * p.numel()
    attention_backwards = sum((k, ORDER_IN_BLOCK["o"], False) > first_trained for k in range(c.n_layers))
    head = "embed.weight" if c.tied else "head.weight"
    head_gradients = 2 * bool(trained - {head}) + 2 * (head in trained)
    return Flops(
        per_token=per_token,
        per_pair=(4 * c.n_layers + 8 * attention_backwards) * c.n_heads * c.head_dim,
        per_supervised=(2 + head_gradients) * c.dim * c.vocab_size,
        sliding_window=c.sliding_window,
        peak=peak,
    )
