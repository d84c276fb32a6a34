"""The transformer: configuration, attention over documents, loading and saving Hugging Face folders.

One class covers the Llama and Mistral layouts. Its input is a run of documents laid end to end, never a padded
rectangle: `tokens` (T,), `positions` (T,) restarting at 0 in every document, `cu_seqlens` (D+1,) where they begin.

Sizes in shape comments: T tokens, D documents, C dim, H query heads, G key/value heads, hd head_dim, V vocabulary.
"""

import json
import math
import os
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint


class CheckpointError(ValueError):
    """A model folder that cannot be used; the message says which file, what is wrong, what to do."""


# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """What config.json says about the computation. `raw` keeps the whole file, so that saving loses nothing."""

    dim: int  # C
    hidden_dim: int  # of the MLP
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # G
    head_dim: int  # hd, need not be dim / n_heads
    vocab_size: int  # V
    norm_eps: float
    max_positions: int
    rope_theta: float
    rope_scaling: dict | None  # {"rope_type": "linear" | "dynamic" | "llama3", "factor": ..., ...}
    window: int | None  # Mistral: a token sees itself and the window - 1 tokens before it
    tied: bool  # the output head is the embedding
    attention_bias: bool
    mlp_bias: bool
    raw: dict


def read_config(folder: str | Path) -> Config:
    """Read and check `folder`/config.json. Raises CheckpointError, naming every key that cannot be used."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} not found: --model wants a Hugging Face folder with config.json") from None
    except (ValueError, RecursionError, OSError) as e:
        raise CheckpointError(f"{path}: cannot be read as JSON: {e}") from None
    try:
        return parse_config(raw)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None


ROPE_TYPES = {"default": (), "linear": ("factor",), "dynamic": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def parse_config(raw: dict) -> Config:
    """A Config from the dictionary of a config.json, with transformers' defaults for keys that are absent.

    Anything that would change the computation and is not supported is an error. Sizes are bounded, so that an absurd
    file is refused before anything is built.
    """
    if not isinstance(raw, dict):
        raise CheckpointError("is not a JSON object")
    wrong = []

    def integer(key, default=None, low=1, high=2**20):
        value = default if raw.get(key) is None else raw[key]
        if type(value) is not int or not low <= value <= high:
            wrong.append(f"{key} must be a whole number from {low} to {high:,}, is {value!r}")
            return low
        return value

    def number(where, key, default=None, low=0.0):
        value = default if where.get(key) is None else where[key]
        if type(value) not in (int, float) or not math.isfinite(value) or value <= low:
            wrong.append(f"{key} must be a finite number above {low}, is {value!r}")
            return 1.0
        return float(value)

    kind = raw.get("model_type")
    if kind not in ("llama", "mistral"):
        raise CheckpointError(f"model_type must be 'llama' or 'mistral', is {kind!r}")
    llama = kind == "llama"
    dim = integer("hidden_size")
    n_heads = integer("num_attention_heads", high=2**14)
    n_kv_heads = integer("num_key_value_heads", n_heads if llama or "num_key_value_heads" in raw else 8, high=2**14)
    if raw.get("head_dim") is None and dim % n_heads:
        wrong.append(f"hidden_size {dim} is not a multiple of num_attention_heads {n_heads}, and head_dim is not given")
    head_dim = integer("head_dim", max(1, dim // n_heads), high=2**14)
    if head_dim % 2:
        wrong.append(f"head_dim must be even for rotary embeddings, is {head_dim}")
    if n_heads % n_kv_heads:
        wrong.append(f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_kv_heads}")
    for key, supported in {"hidden_act": "silu", "attention_dropout": 0, "quantization_config": None}.items():
        if raw.get(key) not in (None, supported):
            wrong.append(f"{key} = {str(raw[key])[:60]!r} is not supported (only {supported!r})")

    # Newer files keep theta and scaling together under rope_parameters, older ones apart.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"rope_scaling must be an object, is {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise CheckpointError(f"rope scaling {rope_type!r} is not supported (only {', '.join(ROPE_TYPES)})")
    if rope.get("partial_rotary_factor") not in (None, 1):
        wrong.append(f"partial_rotary_factor = {rope['partial_rotary_factor']!r} is not supported (only 1)")
    scaling = {key: number(rope, key) for key in ROPE_TYPES[rope_type]}

    config = Config(
        dim=dim,
        hidden_dim=integer("intermediate_size"),
        n_layers=integer("num_hidden_layers", high=2**12),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=integer("vocab_size", high=2**24),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        max_positions=integer("max_position_embeddings", 2048 if llama else 131072, high=2**40),
        rope_theta=number(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0),
        rope_scaling={"rope_type": rope_type, **scaling} if scaling else None,
        window=None if llama or raw.get("sliding_window", 4096) is None else integer("sliding_window", 4096, high=2**40),
        tied=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=llama and bool(raw.get("attention_bias", False)),
        mlp_bias=llama and bool(raw.get("mlp_bias", False)),
        raw=raw,
    )
    if wrong:
        raise CheckpointError("; ".join(wrong))
    return config


# ---------------------------------------------------------------- the transformer


def rope_tables(config: Config, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, fp32, each (T, hd/2); `lengths` (D,) are the documents' token counts.

    Scalings as in transformers' modeling_rope_utils. `dynamic` depends on the length of the sequence: here on that of
    each document, as if it were alone in its batch.
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
        share = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = share * frequencies + (1 - share) * frequencies / scaling["factor"]
    elif scaling["rope_type"] == "dynamic":
        factor, limit = scaling["factor"], config.max_positions
        stretch = (factor * lengths.clamp(min=limit) / limit - (factor - 1)) ** (hd / (hd - 2))  # (D,)
        frequencies = 1.0 / (config.rope_theta * stretch.float()[:, None]) ** exponents  # (D, hd/2)
        frequencies = frequencies.repeat_interleave(lengths, dim=0)  # (T, hd/2)
    angles = positions[:, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (T, heads, hd), pairing dimension i with i + hd/2 as Hugging Face's weights expect."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, hd/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


VARLEN_OPTIONS = signature(varlen_attn).parameters  # torch 2.10 has neither window_size nor enable_gqa


def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int | None) -> Tensor:
    """Causal attention inside each document: q (T, H, hd), k and v (T, G, hd) -> (T, H, hd), the dtype of q."""
    if q.is_cuda and q.dtype != torch.float32 and (window is None or "window_size" in VARLEN_OPTIONS):
        if "window_size" in VARLEN_OPTIONS:
            options = {"window_size": (-1 if window is None else window - 1, 0)}
        else:
            options = {"is_causal": True}
        if "enable_gqa" in VARLEN_OPTIONS:
            options["enable_gqa"] = True
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    return attend_each(q, k, v, cu_seqlens, window)


SHORT = 512  # tokens; below, a dense product beats the CPU's flash kernel 2 to 3 times and costs little memory


@torch.compiler.disable  # a Python loop whose length changes with every batch: left out of compiled graphs
def attend_each(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """`attend` as a loop over the documents: a dense product for short ones, scaled_dot_product_attention for long."""
    lengths = cu_seqlens.diff().tolist()
    G, R = k.shape[1], q.shape[1] // k.shape[1]  # R query heads share a key/value head, which is never repeated
    scale = q.shape[2] ** -0.5
    out = []
    for q1, k1, v1 in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        n = len(q1)
        q1 = q1.unflatten(1, (G, R)).permute(1, 2, 0, 3)  # (G, R, n, hd)
        k1, v1 = k1.transpose(0, 1), v1.transpose(0, 1)  # (G, n, hd)
        if n <= SHORT:
            hidden = torch.zeros(n, n, dtype=q.dtype, device=q.device).masked_fill(~visible(0, n, 0, window, q.device), -math.inf)
            scores = torch.baddbmm(hidden.repeat(R, 1), q1.flatten(1, 2) * scale, k1.mT)  # (G, R n, n)
            o = (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v1).unflatten(1, (R, n))
        else:
            k1, v1 = (x.unsqueeze(1).expand(G, R, n, -1) for x in (k1, v1))  # stride 0
            if window is None or n <= window:
                o = F.scaled_dot_product_attention(q1, k1, v1, is_causal=True)
            else:  # blocks of queries, each against the keys its window reaches: cost grows with n, not n * n
                blocks = []
                for a in range(0, n, window):
                    b, first = min(a + window, n), max(0, a - window + 1)
                    blocks.append(F.scaled_dot_product_attention(
                        q1[:, :, a:b], k1[:, :, first:b], v1[:, :, first:b], attn_mask=visible(a, b, first, window, q.device)))
                o = torch.cat(blocks, dim=2)
        out.append(o.permute(2, 0, 1, 3).flatten(1, 2))  # (n, H, hd)
    return torch.cat(out)


def visible(a: int, b: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys first..b the queries a..b may see: (b - a, b - first) bool."""
    behind = torch.arange(a, b, device=device)[:, None] - torch.arange(first, b, device=device)
    return (behind >= 0) & (behind < (window or b))


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.q = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.attention_bias)
        self.k = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.attention_bias)
        self.v = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.attention_bias)
        self.o = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=c.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        hd = self.config.head_dim
        q = rotate(self.q(x).unflatten(1, (-1, hd)), cos, sin)  # (T, H, hd)
        k = rotate(self.k(x).unflatten(1, (-1, hd)), cos, sin)  # (T, G, hd)
        v = self.v(x).unflatten(1, (-1, hd))
        return self.o(attend(q, k, v, cu_seqlens, longest, self.config.window).flatten(1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate = nn.Linear(c.dim, c.hidden_dim, bias=c.mlp_bias)
        self.up = nn.Linear(c.dim, c.hidden_dim, bias=c.mlp_bias)
        self.down = nn.Linear(c.hidden_dim, c.dim, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = nn.RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)
        self.checkpointed = False  # keep only the block's input for the backward pass, compute the rest again

    def forward(self, *inputs) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.compute(*inputs)

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cu_seqlens, longest)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Llama or Mistral. Build it under `torch.device("meta")`, then `load_weights` or `init_weights`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, targets: Tensor | None = None,
                reduction: str = "sum") -> Tensor:
        """Logits (T, V) without `targets`; with them the loss at the N positions where `targets` (T,) is not -100.

        reduction "sum" gives its fp32 sum, differentiable; "none" the N losses in fp32, for measuring only.
        """
        lengths = cu_seqlens.diff()
        longest = int(lengths.max())
        cos, sin = rope_tables(self.config, positions, lengths)
        x = F.embedding(tokens, self.embed.weight)  # (T, C)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, cu_seqlens, longest)
        weight = self.embed.weight if self.head is None else self.head.weight
        if targets is None:
            return F.linear(self.norm(x), weight)
        supervised = (targets != -100).nonzero().squeeze(1)  # (N,)
        x, targets = self.norm(x.index_select(0, supervised)), targets[supervised]
        if reduction == "none":
            return token_losses(x.detach(), weight.detach(), targets)
        return SumOfLosses.apply(x, weight, targets)


# ---------------------------------------------------------------- output head and loss

LOGITS_AT_ONCE = 2**24  # numbers; 64 MiB in fp32, whatever the vocabulary


def head_chunks(x: Tensor, weight: Tensor, targets: Tensor):
    """(rows, fp32 logits of these rows, their targets) for chunks of x (N, C) small enough to hold all logits."""
    step = max(1, LOGITS_AT_ONCE // weight.shape[0])
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield rows, F.linear(x[rows], weight).float(), targets[rows, None]


def token_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row of x (N, C) under the head `weight` (V, C): (N,) fp32, not differentiable."""
    losses = x.new_empty(len(x), dtype=torch.float32)
    for rows, logits, target in head_chunks(x, weight, targets):
        losses[rows] = logits.logsumexp(1) - logits.gather(1, target).squeeze(1)
    return losses


class SumOfLosses(torch.autograd.Function):
    """Sum of cross-entropies, its gradient computed in the same pass over the logits, which are then forgotten."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss = x.new_zeros((), dtype=torch.float32)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for rows, logits, target in head_chunks(x, weight, targets):
            lse = logits.logsumexp(1, keepdim=True)
            loss += (lse - logits.gather(1, target)).sum()
            # d loss / d logits = softmax - one-hot
            p = logits.sub_(lse).exp_().scatter_add_(1, target, -torch.ones_like(lse)).to(x.dtype)
            dx[rows] = p @ weight
            dw += p.T @ x[rows]
        ctx.save_for_backward(dx, dw.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dw * grad.to(dw.dtype), None


# ---------------------------------------------------------------- loading and saving

# Our names, and Hugging Face's in files; numbers and .weight/.bias are the same.
HF_NAMES = {
    "embed": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "head": "lm_head",
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attention": "self_attn",
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
    "mlp": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
}


def hf_name(name: str) -> str:
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SHARD_BYTES = 5 * 10**9
READ_BYTES = 2**24  # of a tensor at a time: pages of a mapped file count as memory until it is closed


def open_tensors(path: Path):
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: damaged, truncated or unreadable ({e}); copy or download it again") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an HF folder: the single file, or the shards that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        if any(p.suffix in (".bin", ".pth", ".pt") for p in folder.glob("*")):
            raise CheckpointError(
                f"{folder} has only pickled weights (.bin or .pth), which can run code when loaded. Convert them once, "
                "where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)")
        raise CheckpointError(f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [n for n in names if Path(n).name != n or n in ("", ".", "..") or "\\" in n]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{index}: not an index with a weight_map of names ({e!r})") from None
    if outside:
        raise CheckpointError(f"{index}: names a file outside the folder: {outside[0]!r}")
    return [folder / name for name in sorted(names)]


def find_weights(model: Transformer, folder: str | Path) -> dict[str, Path]:
    """Where each parameter of `model` (built on meta) lies: {its name: file}. Reads only the files' headers.

    Raises one CheckpointError that lists every tensor that is missing, surplus, of another shape or not of floats.
    """
    expected = {hf_name(name): (name, tuple(p.shape)) for name, p in model.named_parameters()}
    found, wrong = {}, []
    for path in weight_files(Path(folder)):
        with open_tensors(path) as f:
            for key in f.keys():
                piece = f.get_slice(key)
                shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
                if key not in expected:
                    # Old exports also hold the rotary frequencies; tied ones may repeat the embedding as a head.
                    if not (key.endswith("rotary_emb.inv_freq") or key == "lm_head.weight" and model.config.tied):
                        wrong.append(f"surplus: {key} {shape}")
                elif expected[key][0] in found:
                    wrong.append(f"twice: {key}, in {found[expected[key][0]].name} and {path.name}")
                elif shape != expected[key][1]:
                    wrong.append(f"wrong shape: {key} is {shape}, config.json asks for {expected[key][1]}")
                elif dtype not in DTYPES:
                    wrong.append(f"not of floats: {key} is {dtype}")
                if key in expected:
                    found[expected[key][0]] = path
    wrong += [f"missing: {key} {shape}" for key, (name, shape) in expected.items() if name not in found]
    if wrong:
        more = [f"… and {len(wrong) - 40} more"] if len(wrong) > 40 else []
        raise CheckpointError("\n  ".join([f"{folder}: the weights do not fit config.json:", *wrong[:40], *more]))
    return found


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The part of a tensor that this rank owns, and its offset in the whole; all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


@torch.no_grad()
def read_slice(path: Path, key: str, target: Tensor, offset: tuple[int, ...]) -> None:
    """Fill `target` with the part at `offset` of tensor `key`, converting its dtype, a few rows at a time."""
    step = max(1, READ_BYTES // max(1, target[:1].numel() * 8)) if target.dim() else 1
    for a in range(0, len(target), step):
        rows = target[a:a + step]
        with open_tensors(path) as f:
            index = tuple(slice(o + (a if i == 0 else 0), o + (a if i == 0 else 0) + n)
                          for i, (o, n) in enumerate(zip(offset, rows.shape)))
            rows.copy_(f.get_slice(key)[index])


def load_weights(model: Transformer, files: dict[str, Path]) -> None:
    """Fill the model's parameters, plain or sharded, from `find_weights`' files; each rank reads its own slices."""
    for name, p in model.named_parameters():
        local, offset = local_part(p.detach())
        read_slice(files[name], hf_name(name), local, offset)


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """The model of an HF folder (config.json and safetensors of any float dtype), its weights as `dtype`.

    Nothing is allocated before all headers are checked against config.json; memory stays near that of the weights.
    Raises CheckpointError.
    """
    with torch.device("meta"):
        model = Transformer(read_config(folder)).to(dtype)
    files = find_weights(model, folder)
    model.to_empty(device=device)
    load_weights(model, files)
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


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


@torch.no_grad()
def save_model(model: Transformer, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write an HF folder: config.json and safetensors in shards of at most 5 GB (with an index if several).

    A sharded model is gathered shard by shard and written by rank 0; every rank must call. `dtype` defaults to that of
    the parameters. Every file appears complete or not at all. Raises OSError or SafetensorError when writing fails.
    """
    folder = Path(folder)
    parameters = list(model.named_parameters())
    dtype = dtype or parameters[0][1].dtype
    shards, size = [[]], 0
    for name, p in parameters:
        nbytes = p.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((hf_name(name), p))
        size += nbytes
    writer = not dist.is_initialized() or dist.get_rank() == 0
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, p in shard:
            whole = p.full_tensor() if isinstance(p, DTensor) else p.detach()
            if writer:
                tensors[name] = whole.to("cpu", dtype).contiguous()
                weight_map[name] = file
        if writer:
            aside = folder / (file + ".tmp")
            save_file(tensors, aside, metadata={"format": "pt"})
            aside.chmod(0o644)  # safetensors makes files that only their owner reads
            os.replace(aside, folder / file)
    if writer:
        if len(shards) > 1:
            (folder / "model.safetensors").unlink(missing_ok=True)  # of an earlier save: readers would prefer it
            total = sum(p.numel() for _, p in parameters) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
        config = {**model.config.raw, "torch_dtype": str(dtype).removeprefix("torch.")}
        config.pop("dtype", None)  # transformers 5 writes this instead; one of the two must go
        write_text(folder / "config.json", json.dumps(config, indent=1))
