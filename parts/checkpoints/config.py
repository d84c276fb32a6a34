"""Reads and checks the config.json of a Llama or Mistral folder."""

from dataclasses import dataclass, replace
from pathlib import Path

from parts.checkpoints.weights import tensors_differ
from parts.cli import InputError
from parts.files import read_json_object, stage_advice


@dataclass(frozen=True)
class Config:
    """The settings of config.json that define the computation. `raw` is the complete file, used when saving."""

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
    sliding_window: int | None  # Mistral: a token sees itself and the window - 1 tokens before it
    tied: bool  # the output head is the embedding
    attention_bias: bool
    mlp_bias: bool
    raw: dict
    untied_head: bool = False  # config.json ties the head, but the files contain a different one: it is not tied


def read_config(folder: str | Path) -> Config:
    """Read and check `folder`/config.json. Raises InputError, naming every key that cannot be used."""
    path = Path(folder) / "config.json"
    if not path.exists():
        advice = stage_advice(path.parent)
        raise InputError(f"{path} not found: --model must be a Hugging Face folder with config.json{advice}")
    raw = read_json_object(path)
    try:
        config = parse_config(raw)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    if (path.parent / "adapter_config.json").exists():
        raise InputError(
            f"{folder} contains a LoRA adapter (adapter_config.json), which transformers would add to the weights. "
            "Merge it first (peft's merge_and_unload), or move it out of the folder"
        )
    if config.tied and tensors_differ(path.parent, "lm_head.weight", "model.embed_tokens.weight"):
        return replace(config, tied=False, untied_head=True, raw=raw | {"tie_word_embeddings": False})
    return config


UNTIED_HEAD_NOTE = (
    "config.json ties the output head to the embedding, but the files contain a different head, which is used."
)


ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelDefaults:
    """Properties of a model_type: transformers' default values, and which keys it uses."""

    kv_heads: int | None  # None: equal to the number of heads
    max_positions: int
    windowed: bool  # by sliding_window
    biased: bool  # by attention_bias and mlp_bias


MODEL_DEFAULTS = {"llama": ModelDefaults(None, 2048, False, True), "mistral": ModelDefaults(8, 131072, True, False)}


def parse_config(raw: dict) -> Config:
    """A Config from the dictionary of a config.json, with transformers' defaults for missing keys.

    Unsupported settings that would change the computation are errors. Sizes have bounds, so that an invalid file is
    rejected before the model is built.
    """
    if not isinstance(raw, dict):
        raise InputError("is not a JSON object")
    kind, errors = raw.get("model_type"), []
    if not isinstance(kind, str) or kind not in MODEL_DEFAULTS:
        raise InputError(f"model_type must be {' or '.join(map(repr, MODEL_DEFAULTS))}, is {kind!r}")
    defaults = MODEL_DEFAULTS[kind]

    def integer(key, default=None, high=2**20):
        return read_number(raw, key, default, int, 1, high, errors)

    dim = integer("hidden_size")
    n_heads = integer("num_attention_heads", high=2**14)
    kv_heads = n_heads if "num_key_value_heads" in raw else defaults.kv_heads or n_heads
    n_kv_heads = integer("num_key_value_heads", kv_heads, high=2**14)
    head_dim = integer("head_dim", max(1, dim // n_heads), high=2**14)
    check_heads(raw, dim, n_heads, n_kv_heads, head_dim, errors)
    check_supported(raw, errors)
    rope_theta, rope_scaling = parse_rope(raw, errors)
    if head_dim == 2 and rope_scaling and rope_scaling["rope_type"] == "dynamic":
        errors.append("dynamic rope scaling needs a head_dim above 2")
    windowed = defaults.windowed and raw.get("sliding_window", 4096) is not None
    config = Config(
        dim=dim,
        hidden_dim=integer("intermediate_size"),
        n_layers=integer("num_hidden_layers", high=2**12),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=integer("vocab_size", high=2**24),
        norm_eps=read_number(raw, "rms_norm_eps", 1e-6, float, 1e-30, 1.0, errors),
        max_positions=integer("max_position_embeddings", defaults.max_positions, high=2**40),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=integer("sliding_window", 4096, high=2**40) if windowed else None,
        tied=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=defaults.biased and bool(raw.get("attention_bias", False)),
        mlp_bias=defaults.biased and bool(raw.get("mlp_bias", False)),
        raw=raw,
    )
    if errors:
        raise InputError("; ".join(errors))
    return config


def check_heads(raw: dict, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, errors: list[str]) -> None:
    if raw.get("head_dim") is None and dim % n_heads:
        errors.append(
            f"hidden_size {dim} is not a multiple of num_attention_heads {n_heads}, and head_dim is not given"
        )
    if head_dim % 2:
        errors.append(f"head_dim must be even for rotary embeddings, is {head_dim}")
    if n_heads % n_kv_heads:
        errors.append(f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_kv_heads}")


def check_supported(raw: dict, errors: list[str]) -> None:
    for key, supported in {"hidden_act": "silu", "attention_dropout": 0, "quantization_config": None}.items():
        if raw.get(key) not in (None, supported):
            errors.append(f"{key} = {str(raw[key])[:60]!r} is not supported (only {supported!r})")
    if len(set(map(str, raw.get("layer_types") or []))) > 1:
        errors.append("layer_types: layers of different kinds are not supported")


def read_number(source: dict, key: str, default, kind: type, low, high, errors: list[str]):
    """source[key], or `default` if it is missing or null; adds to `errors` unless it is a number from low to high."""
    value = default if source.get(key) is None else source[key]
    kinds = (int,) if kind is int else (int, float)
    if type(value) not in kinds or not low <= value <= high:
        noun = "a whole number" if kind is int else "a number"
        errors.append(f"{key} must be {noun} from {low:,} to {high:,}, is {value!r}")
        return kind(1)
    return kind(value)


def parse_rope(raw: dict, errors: list[str]) -> tuple[float, dict | None]:
    """RoPE theta and scaling; newer files have both under rope_parameters, older ones in separate keys."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"rope_scaling must be an object, is {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise InputError(f"rope scaling {kind!r} is not supported (only {', '.join(ROPE_TYPES)})")
    for source in (raw, rope):
        if source.get("partial_rotary_factor") not in (None, 1):
            errors.append(f"partial_rotary_factor = {source['partial_rotary_factor']!r} is not supported (only 1)")
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        errors.append(f"rope_parameters for each kind of layer ({', '.join(nested)[:60]}) are not supported")
    theta = read_number(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0, float, 1e-30, 1e30, errors)
    scaling = {key: read_number(rope, key, None, float, 1e-30, 1e30, errors) for key in ROPE_TYPES[kind]}
    return theta, {"rope_type": kind, **scaling} if scaling else None
