"""The transformer: its blocks, building and sharding it, loading and saving Hugging Face folders.

One class covers the Llama and Mistral layouts. Its input is a packed sequence of documents without padding: `tokens`
(T,), `positions` (T,) restarting at 0 in every document, `cu_seqlens` (D+1,) with their start offsets.

Sizes in shape comments: T tokens, D documents, C dim, H query heads, G key/value heads, hd head_dim, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from parts.checkpoints.config import UNTIED_HEAD_NOTE, Config, read_config
from parts.checkpoints.weights import find_tensors, read_slice, save_weights, stored_dtype, write_tensors
from parts.distributed import DistributedEnv, compute_dtype, full_tensor, is_first_rank, local_part, shard_model
from parts.files import atomic_write
from parts.kernels import TrainingLoss, cross_entropy, plain_loss, rms_norm, rotate, swiglu, varlen_attention
from parts.keyed_random import token_keys
from parts.options import Computation, Weights

# ---------------------------------------------------------------- the transformer


def rope_tables(config: Config, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The factors that `rotate` multiplies by, fp32: (cos, cos) and (-sin, sin) of the rotary angles, each (T, 1, hd).

    `lengths` (T,) is the length of each token's document.
    The scalings are those of transformers' modeling_rope_utils. `dynamic` depends on the sequence length: here on the
    length of each document, as if it were alone in its batch.
    """
    hd, scaling = config.head_dim, config.rope_scaling or {"rope_type": "default"}
    exponents = torch.arange(0, hd, 2, device=positions.device, dtype=torch.int64).float() / hd  # (hd/2,)
    frequencies = 1.0 / config.rope_theta**exponents
    if scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    elif scaling["rope_type"] == "dynamic":
        factor, limit = scaling["factor"], config.max_positions
        stretch = (factor * lengths.clamp(min=limit) / limit - (factor - 1)) ** (hd / (hd - 2))  # (T,)
        frequencies = 1.0 / (config.rope_theta * stretch.float()[:, None]) ** exponents  # (T, hd/2)
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()  # (T, hd/2)
    return torch.cat((cos, cos), 1)[:, None], torch.cat((-sin, sin), 1)[:, None]


class Linear(nn.Linear):
    """Computes in the dtype of its input, not of its weights. May have an adapter: W + scale * B A."""

    def __init__(self, n_in: int, n_out: int, bias: bool):
        super().__init__(n_in, n_out, bias)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scale = 0.0

    def add_lora(self, rank: int, alpha: float) -> None:
        """LoRA (arXiv 2106.09685): in W + alpha / rank * B A only A (rank, in) and B (out, rank) are trained, both in
        fp32."""
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, dtype=torch.float32, device=self.weight.device))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        adapted = None
        if self.lora_A is not None:  # first, so that `recompute` need not compute the large product again
            adapted = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return y if adapted is None else torch.add(y, adapted, alpha=self.scale)


def recompute(function: Callable, *inputs):
    """function(*inputs), keeping only the inputs for the backward pass, which recomputes the function with the same
    random numbers."""
    return checkpoint(function, *inputs, use_reentrant=False) if torch.is_grad_enabled() else function(*inputs)


class RMSNorm(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.eps = c.norm_eps
        self.weight = nn.Parameter(torch.ones(c.dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q = Linear(c.dim, c.n_heads * c.head_dim, bias=c.attention_bias)
        self.k = Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.attention_bias)
        self.v = Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.attention_bias)
        self.o = Linear(c.n_heads * c.head_dim, c.dim, bias=c.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Callable) -> Tensor:
        """`attention` takes q (T, H, hd), k and v (T, G, hd) to (T, H, hd): it applies the mask."""
        q, k, v = (linear(x).unflatten(1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        return self.o(attention(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate = Linear(c.dim, c.hidden_dim, bias=c.mlp_bias)
        self.up = Linear(c.dim, c.hidden_dim, bias=c.mlp_bias)
        self.down = Linear(c.hidden_dim, c.dim, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return recompute(self.down_of, self.gate(x), self.up(x))

    def down_of(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down(swiglu(gate, up))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attention_norm = RMSNorm(c)
        self.attention = Attention(c)
        self.mlp_norm = RMSNorm(c)
        self.mlp = MLP(c)
        self.activation_checkpointing = False  # keep only the block's input for backward, recompute the rest

    def forward(self, *inputs) -> Tensor:
        return recompute(self.compute, *inputs) if self.activation_checkpointing else self.compute(*inputs)

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Callable) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, attention)
        return x + self.mlp(self.mlp_norm(x))


@dataclass(frozen=True)
class VarlenAttention:
    """The attention of training, IFD and prefill: causal, within each document of a packed sequence."""

    cu_seqlens: Tensor  # (D+1,) int32
    longest: int  # tokens
    sliding_window: int | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, self.cu_seqlens, self.longest, self.sliding_window)


class Transformer(nn.Module):
    """Llama or Mistral. Build it under `torch.device("meta")`, then `load_weights` or `init_weights`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.compute_dtype = None  # None: the dtype of the weights
        self.recording = None  # the traced decode step, which generate.py makes once for a frozen model
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:  # (V, C)
        return self.embed.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        targets: Tensor | None = None,
        training_loss: TrainingLoss = plain_loss,
        keys: Tensor | None = None,
    ):
        """Logits (T, V) without `targets`. With them the sum of `training_loss` at the N positions where `targets`
        (T,) is not -100, differentiable, and the cross-entropy at each of them (N,), for measuring only; both fp32.

        `keys` (D,) int64, given in training, are the keys of the random numbers (see `embed_tokens`)."""
        lengths = cu_seqlens.diff()
        within = VarlenAttention(cu_seqlens, int(lengths.max()), self.config.sliding_window)
        keys = None if keys is None else token_keys(keys, positions, lengths)
        x = self.hidden(tokens, positions, lengths.repeat_interleave(lengths), [within] * len(self.layers), keys)
        if targets is None:
            return self.logits(x)
        supervised = (targets != -100).nonzero().squeeze(1)  # (N,)
        x, targets = self.norm(x.index_select(0, supervised)), targets[supervised]
        return cross_entropy(x, self.head_weight, targets, self.head_logits, training_loss)

    def hidden(
        self, tokens: Tensor, positions: Tensor, lengths: Tensor, attentions: list[Callable], keys: Tensor | None = None
    ) -> Tensor:
        """The output of the last block, (T, C). `lengths` (T,): the length of each token's sequence; `attentions`: one
        per block; `keys` as in `embed_tokens`."""
        x = self.embed_tokens(tokens, lengths, keys)
        cos, sin = (t.to(x.dtype) for t in rope_tables(self.config, positions, lengths))
        for layer, attention in zip(self.layers, attentions):
            x = layer(x, cos, sin, attention)
        return x

    def embed_tokens(self, tokens: Tensor, lengths: Tensor, keys: Tensor | None) -> Tensor:
        """The embeddings (T, C). Noise or dropout, under `if self.training:`, takes its random numbers from
        `keyed_uniform(keys, …)`: `keys` (T,) depend on seed, step, document and position only, so that micro-batches,
        ranks and restarts do not change the result."""
        x = F.embedding(tokens, self.embed.weight, sparse=self.embed.sparse)
        return x.to(self.compute_dtype or x.dtype)

    def logits_at(self, tokens: Tensor, positions: Tensor, lengths: Tensor, attentions: list[Callable], rows) -> Tensor:
        """The fp32 logits (n, V) that generation needs, at the tokens indexed by `rows`."""
        return self.logits(self.hidden(tokens, positions, lengths, attentions)[rows]).float()

    def logits(self, x: Tensor) -> Tensor:
        """Logits (n, V) from the output of the last block (n, C)."""
        return self.head_logits(self.norm(x), lambda x: F.linear(x, self.head_weight.to(x.dtype)))

    def head_logits(self, x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits (n, V) from the normalized x (n, C); `linear` multiplies by the head's weight. Loss, IFD and
        generation all use this function, so logit soft-capping goes here."""
        return linear(x)

    # ---- adapters (LoRA)

    def add_lora(self, rank: int, alpha: float, targets: Sequence[str]) -> None:
        """Add an adapter to every Linear whose Hugging Face name (q_proj, …) is in `targets`. Then call `init_lora`."""
        self.recording = None
        for name, module in self.named_modules():
            if isinstance(module, Linear) and HF_NAMES[name.rpartition(".")[2]] in targets:
                module.add_lora(rank, alpha)

    def lora_modules(self) -> dict[str, Linear]:
        """The matrices that have an adapter, by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Linear) and m.lora_A is not None}

    @torch.no_grad()
    def init_lora(self, seed: int) -> None:
        """Initialize adapters as peft does: A kaiming-uniform (a = sqrt 5), B zero. Independent of the ranks."""
        generator = torch.Generator().manual_seed(seed)
        for linear in self.lora_modules().values():
            linear.lora_B.zero_()
            everything = nn.init.kaiming_uniform_(torch.empty(linear.lora_A.shape), a=math.sqrt(5), generator=generator)
            local, offset = local_part(linear.lora_A.detach())
            local.copy_(everything[offset[0] : offset[0] + len(local)])


# ---------------------------------------------------------------- loading and saving

# Our module names and Hugging Face's names in files; layer numbers and .weight/.bias are the same.
HF_NAMES = {
    "embed": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "mlp": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


def hf_name(name: str) -> str:
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))


def hf_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """The parameters that an HF folder contains: all except the adapters."""
    return {name: p for name, p in model.named_parameters() if not name.endswith((".lora_A", ".lora_B"))}


def find_weight_files(model: Transformer, folder: str | Path) -> dict[str, Path]:
    """The file of each parameter of `model` (built on meta), by name. Reads only headers. Raises InputError."""
    shapes = {hf_name(name): tuple(p.shape) for name, p in hf_parameters(model).items()}
    # An export of a tied model may repeat the embedding as a head.
    files = find_tensors(Path(folder), shapes, surplus={"lm_head.weight"} if model.config.tied else set())
    return {name: files[hf_name(name)] for name in hf_parameters(model)}


def weights_dtype(model: Transformer, folder: str | Path) -> torch.dtype:
    """The dtype of a folder's weights; fp32 if it is neither bf16 nor fp16."""
    name, file = next(iter(find_weight_files(model, folder).items()))
    stored = stored_dtype(file, hf_name(name))
    return stored if stored in (torch.bfloat16, torch.float16) else torch.float32


def load_weights(model: Transformer, files: dict[str, Path]) -> None:
    """Fill the parameters, plain or sharded, from the files of `find_weight_files`; each rank reads its own slices."""
    for name, p in hf_parameters(model).items():
        local, offset = local_part(p.detach())
        read_slice(files[name], hf_name(name), local, offset)


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """Load an HF folder (config.json and safetensors of any float dtype), with weights as `dtype`, in eval mode.

    All headers are checked against config.json before memory is allocated; the peak is little more than the weights.
    Raises InputError.
    """
    config = read_config(folder)
    if config.untied_head and is_first_rank():
        print(f"{folder}: {UNTIED_HEAD_NOTE}")
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    files = find_weight_files(model, folder)
    load_weights(model.to_empty(device=device), files)
    return model.eval()


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_meta_model(config: Config, weights: Weights, dtype: torch.dtype) -> Transformer:
    """The model for training, on the meta device. `dtype` is the dtype of the computation; with adapters (LoRA) the
    frozen weights have it, too."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype if weights.lora else DTYPES[weights.param_dtype])
        if weights.lora:
            model.add_lora(weights.lora, weights.lora_alpha, weights.lora_targets)
    model.compute_dtype = dtype
    return model.eval()  # except in gradient steps


def build_model(
    folder: Path, config: Config, weights: Weights, computation: Computation, ranks: DistributedEnv
) -> Transformer:
    """Load an HF folder as a model sharded over the ranks (FSDP2). Each rank reads its part."""
    dtype = compute_dtype(computation.dtype)
    model = build_meta_model(config, weights, dtype)
    files = find_weight_files(model, folder)
    for block in model.layers:
        block.activation_checkpointing = computation.checkpoint_activations
        if computation.compile:
            block.compute = torch.compile(block.compute, dynamic=True)
    if ranks.world_size > 1:  # with one rank FSDP would only make copies
        shard_model(model, model.layers, dtype, ranks.mesh)
        register_fsdp_forward_method(model, "logits_at")  # for --sample-prompts
    elif ranks.device.type == "cpu":
        model.embed.sparse = True  # gradient only at the tokens that occur
    model.to_empty(device=ranks.device)
    load_weights(model, files)
    model.init_lora(weights.seed)
    return model


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Random weights to pre-train from: normal(0, 0.02), residual outputs scaled by 1/sqrt(2 L) (GPT-2), norms one."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            residual = name.endswith(("o.weight", "down.weight"))
            p.normal_(0, 0.02 / math.sqrt(2 * model.config.n_layers) if residual else 0.02, generator=generator)


def save_model(model: Transformer, folder: str | Path, dtype: torch.dtype | None = None, base: str | Path = "") -> None:
    """Write an HF folder: safetensors as `dtype` (default: that of the parameters) and config.json. Every rank must
    call, rank 0 writes; every file is written atomically. Raises WorkError.

    Adapters are merged into their weights, and also saved separately in adapter/, with `base` as the base model's path.
    """
    folder, tensors = Path(folder), {hf_name(name): p for name, p in hf_parameters(model).items()}
    dtype = dtype or next(iter(tensors.values())).dtype
    adapted = {f"{hf_name(name)}.weight": linear for name, linear in model.lora_modules().items()}

    def merged(name: str, weight: Tensor) -> Tensor:
        if name not in adapted:
            return weight
        linear = adapted[name]
        return weight.float() + linear.scale * full_tensor(linear.lora_B) @ full_tensor(linear.lora_A)

    save_weights(folder, tensors, dtype, merged)
    if not dist.is_initialized() or dist.get_rank() == 0:
        config = {**model.config.raw, "torch_dtype": str(dtype).removeprefix("torch.")}
        config.pop("dtype", None)  # transformers 5 writes this key instead; keep only one of them
        atomic_write(folder / "config.json", json.dumps(config, indent=1))
    if adapted:
        save_lora(model.lora_modules(), folder / "adapter", base)


def save_lora(adapted: dict[str, Linear], folder: Path, base: str | Path) -> None:
    """Save adapters in peft's layout. Every rank must call, rank 0 writes."""
    tensors = {
        f"base_model.model.{hf_name(name)}.{part}.weight": full_tensor(getattr(linear, part)).cpu()
        for name, linear in adapted.items()
        for part in ("lora_A", "lora_B")
    }
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    first, targets = next(iter(adapted.values())), {hf_name(name).rpartition(".")[2] for name in adapted}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()),
        "bias": "none",
    }
    config |= {"r": len(first.lora_A), "lora_alpha": first.scale * len(first.lora_A), "lora_dropout": 0.0}
    config |= {"target_modules": sorted(targets), "inference_mode": True}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    atomic_write(folder / "adapter_config.json", json.dumps(config, indent=1))
