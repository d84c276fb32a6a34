"""The command line of train.py, and the dataclasses that its arguments are passed in."""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parts.cli import (
    EXIT_CODES,
    HelpFormatter,
    InputError,
    fraction,
    fraction_or_count,
    nonneg_float,
    nonneg_int,
    positive_int,
)

MAX_LEN = 2048  # tokens of a row; default of --max-len
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_parser(templates: list[str], demo: Path) -> argparse.ArgumentParser:
    """The flags of train.py, by purpose. `demo` is the folder with the default model and stages."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a Llama or Mistral model in stages of rising difficulty (Phased IFT).",
        formatter_class=HelpFormatter,
        epilog=EXIT_CODES,
    )
    add = parser.add_argument_group("data").add_argument
    demo_stages = [str(demo / f"s{k}.jsonl") for k in (1, 2, 3)]
    stages_help = (
        "one data file, or folder of *.jsonl files, per stage; s1 finds s1.jsonl (without --model also in demo/)"
    )
    add("--stages", nargs="+", default=demo_stages, metavar="F", help=stages_help)
    eval_help = "held-out data to measure the loss on (default: none; for the demo, its own)"
    add("--eval", nargs="+", metavar="F", help=eval_help)
    template_help = "chat template (default: the one that the model folder's own resembles, else phased)"
    add("--template", choices=templates, help=template_help)
    add("--max-len", type=positive_int, default=MAX_LEN, help="tokens; longer rows are cut at the end")
    replay_help = "fraction of every earlier stage's rows added to a stage (default: 0; in the demo 0.1)"
    add("--replay", type=fraction, metavar="X", help=replay_help)
    add("--skip-bad-rows", action="store_true", help="skip unusable rows instead of stopping")

    add = parser.add_argument_group("model and output").add_argument
    model_help = "HF folder: config.json, safetensors, tokenizer (default: demo/model)"
    add("--model", type=Path, metavar="DIR", help=model_help)
    out_help = "output folder of stage1/ stage2/ …; the same command again resumes"
    add("--out", type=Path, default=Path("out"), metavar="DIR", help=out_help)
    dtype_help = "dtype of the exported weights; same: as in --model"
    add("--save-dtype", choices=["same", "bf16", "fp32"], default="same", help=dtype_help)

    title = "optimization (one value, or one per stage for --epochs --lr --batch-size)"
    add = parser.add_argument_group(title).add_argument
    add("--epochs", nargs="+", type=positive_int, default=[1], metavar="N", help="passes over the stage")
    add(
        "--lr",
        nargs="+",
        type=nonneg_float,
        metavar="X",
        help="peak learning rate of AdamW (required; for the demo 5e-4)",
    )
    batch_help = "documents per optimizer step, over all ranks"
    add("--batch-size", nargs="+", type=positive_int, default=[16], metavar="N", help=batch_help)
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="learning rate after warm-up")
    add("--warmup-ratio", type=fraction, default=0.1, help="fraction of the steps with a rising learning rate")
    add("--weight-decay", type=nonneg_float, default=0.1, help="of matrices, not of norms and biases")
    add("--betas", nargs=2, type=fraction, default=[0.9, 0.95], metavar="B", help="of AdamW")
    add("--max-grad-norm", "--clip", type=nonneg_float, default=1.0, help="clip the gradient norm to this value")
    state_help = "reset: new optimizer and schedule per stage (the paper); keep: one of each over all stages"
    add("--optimizer-state", choices=["reset", "keep"], default="reset", help=state_help)
    add("--seed", type=nonneg_int, default=0, help="random seed of row order, replayed rows, adapters and rounding")

    title = "weights: all in fp32 (16 bytes per parameter in training), all in bf16 (8), or only adapters (LoRA)"
    add = parser.add_argument_group(title).add_argument
    weights_help = "dtype of weights, gradients and AdamW's moments; bf16 uses stochastic rounding after every step"
    add("--param-dtype", "--weights", choices=["fp32", "bf16"], default="fp32", help=weights_help)
    lora_help = "freeze the weights and train adapters of rank R; stageN/ is merged, stageN/adapter/ has the adapters"
    add("--lora", type=positive_int, metavar="R", help=lora_help)
    add("--lora-alpha", type=nonneg_float, metavar="X", help="adapters are scaled by X / R (default: 2 R)")
    targets_help = "matrices that get adapters"
    add("--lora-targets", nargs="+", choices=TARGETS, default=TARGETS, metavar="NAME", help=targets_help)

    title = "selection (IterIT): train only on the best rows of a stage"
    add = parser.add_argument_group(title).add_argument
    select_help = "iterit: score rows with the current model and select before every epoch; static: select once"
    add("--select", choices=["none", "iterit", "static"], default="none", help=select_help)
    add(
        "--ratio",
        type=fraction_or_count,
        default=0.05,
        help="rows per epoch: below 1 a fraction of the rows, from 1 on a number",
    )
    update_help = "before later epochs, score the best X times as many rows again"
    add("--update-ratio", type=float, default=3.0, metavar="X", help=update_help)
    add("--score-type", choices=["both", "ifd"], default="both", help="IFD times diversity, or IFD alone")
    decay_help = "factor on the weights of a chosen row's terms in other rows"
    add("--diversity-decay", type=float, default=0.1, metavar="X", help=decay_help)
    scores_help = "output of score.py ifd, used instead of scoring before the first epoch"
    add("--scores", nargs="+", default=[], metavar="F", help=scores_help)

    add = parser.add_argument_group("numerics (can change the result)").add_argument
    dtype_help = "dtype of the computation; auto: bf16 if the device supports it"
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help=dtype_help)
    add("--deterministic", action="store_true", help="bit-identical runs on CUDA too; slower")

    title = "machine (changes speed and memory, and the result only by rounding)"
    add = parser.add_argument_group(title).add_argument
    add(
        "--micro-batch-tokens",
        "--micro-tokens",
        type=positive_int,
        default=2048,
        help="tokens per forward and backward pass",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="recompute activations: less memory, a third more computation",
    )
    add("--compile", action="store_true", help="torch.compile the blocks")
    replicas_help = "HSDP: shard within each of this many groups of ranks (such as nodes), replicate across them"
    add("--replicas", type=positive_int, default=1, help=replicas_help)

    add = parser.add_argument_group("running").add_argument
    save_help = "steps between saved states (default: 10 minutes); the end of a stage is always saved"
    add("--save-every", type=positive_int, metavar="N", help=save_help)
    add("--eval-every", type=positive_int, metavar="N", help="steps between measurements on --eval")
    sample_help = "prompts to answer after every stage: stageN/samples.json, the first few are printed"
    add("--sample-prompts", "--sample", type=Path, metavar="F", help=sample_help)
    skip_help = "skip up to N steps whose loss or gradient is not finite, instead of stopping at the first"
    add("--skip-nonfinite", type=nonneg_int, default=0, metavar="N", help=skip_help)
    add("--dry-run", action="store_true", help="read data and config, print the plan and exit")
    add("--plan-world-size", type=positive_int, metavar="N", help="with --dry-run: also plan the memory for N ranks")
    gpu_help = "with --dry-run: plan for GPUs with X GiB free, on any machine"
    add("--plan-gpu", type=nonneg_float, metavar="X", help=gpu_help)
    add("--debug", action="store_true", help="show tracebacks")

    return parser


def parse_args(argv: list[str] | None, templates: list[str], demo: Path) -> argparse.Namespace:
    """Check the arguments of train.py together, and fill in defaults that depend on other arguments."""
    parser = make_parser(templates, demo)
    args = parser.parse_args(argv)
    is_demo = args.model is None or args.model.resolve() == demo / "model"
    if args.lr is None and not is_demo:
        parser.error(
            "--lr is required for this --model; common values are 5e-6 (Phased IFT) to 2e-5 (Alpaca, IterIT) at 7 B"
        )
    args.lr = args.lr or [5e-4]
    for name in ("epochs", "lr", "batch_size"):
        values, n = getattr(args, name), len(args.stages)
        if len(values) not in (1, n):
            parser.error(
                f"--{name.replace('_', '-')} has {len(values)} values for {n} stages: give one, or one per stage"
            )
        setattr(args, name, values * n if len(values) == 1 else values)
    if args.select != "none" and args.replay:
        parser.error("--select cannot be combined with --replay: it chooses from a stage's own rows")
    if args.scores and args.select == "none":
        parser.error("--scores needs --select")
    if not (1 <= args.update_ratio < math.inf and 0 <= args.diversity_decay <= 1):
        parser.error("--update-ratio must be at least 1 and finite, --diversity-decay from 0 to 1")
    if not args.dry_run and (args.plan_gpu is not None or args.plan_world_size):
        parser.error("--plan-gpu and --plan-world-size need --dry-run")
    if args.replay is None:  # without replay a model as small as the demo's quickly forgets earlier stages
        args.replay = 0.1 if args.model is None and args.select == "none" else 0.0
    if args.eval is None:
        whole_demo = args.model is None and args.stages == parser.get_default("stages")
        args.eval = ["held_out_easy", "held_out_medium", "held_out_hard"] if whole_demo else []
    args.model = args.model or demo / "model"
    if args.lora and args.param_dtype == "bf16":
        parser.error(
            "--lora cannot be combined with --param-dtype bf16: frozen weights have the dtype of the computation"
        )
    if not args.lora and (args.lora_alpha is not None or args.lora_targets != TARGETS):
        parser.error("--lora-alpha and --lora-targets need --lora")
    if args.lora_alpha == 0:
        parser.error("--lora-alpha must not be 0: the adapters would have no effect")
    if args.lora and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora
    return args


def world_sizes(args: argparse.Namespace) -> list[int]:
    """The numbers of ranks to plan for: this run's and --plan-world-size. Raises InputError if --replicas does not
    divide --plan-world-size; if it does not divide this run's number, only --plan-world-size is planned."""
    here, planned = int(os.environ.get("WORLD_SIZE", 1)), args.plan_world_size
    wanted = planned or here
    if wanted % args.replicas:
        advice = "" if planned or not args.dry_run else ": --plan-world-size N plans for N ranks"
        raise InputError(f"--replicas {args.replicas} does not divide {wanted} rank{'s' * (wanted > 1)}{advice}")
    return [n for n in dict.fromkeys([here, wanted]) if n % args.replicas == 0]


# Arguments that change the result only by rounding, or not at all: a run may be resumed with other values.
RESUMABLE_ARGS = {
    "out",
    "save_every",
    "sample_prompts",
    "skip_nonfinite",
    "micro_batch_tokens",
    "checkpoint_activations",
    "compile",
    "replicas",
}
RESUMABLE_ARGS |= {"dry_run", "plan_world_size", "plan_gpu", "debug"}


@dataclass(frozen=True)
class Optimization:
    weight_decay: float
    betas: list[float]
    max_grad_norm: float  # gradients are clipped to this norm; 0: no clipping
    schedule: str  # cosine, linear or constant
    warmup_ratio: float
    optimizer_state: str  # keep: one optimizer and schedule over all stages; reset: new ones per stage (the paper)
    skip_nonfinite: int  # steps
    seed: int


@dataclass(frozen=True)
class Weights:
    """The dtype of the weights, and which of them are trained."""

    param_dtype: str = "fp32"  # or bf16; with LoRA frozen weights have the dtype of the computation, adapters fp32
    lora: int | None = None  # rank of the adapters; None: all weights are trained
    lora_alpha: float | None = None  # adapters are scaled by lora_alpha / lora
    lora_targets: Sequence[str] = tuple(TARGETS)
    seed: int = 0  # of the adapters


def memory_variants(chosen: Weights) -> dict[str, Weights]:
    """Ways to store and train weights, by their flags: the chosen one, then by decreasing memory."""
    lora = chosen if chosen.lora else Weights(lora=16, lora_alpha=32.0)
    variants = {"--param-dtype fp32": Weights(), "--param-dtype bf16": Weights("bf16"), f"--lora {lora.lora}": lora}
    chosen_flags = f"--lora {lora.lora}" if chosen.lora else f"--param-dtype {chosen.param_dtype}"
    return {chosen_flags: chosen} | variants


@dataclass(frozen=True)
class Computation:
    """How the computation is done: the dtype can change the result, the others only its rounding."""

    dtype: str  # auto, bf16 or fp32
    micro_batch_tokens: int
    checkpoint_activations: bool
    compile: bool


@dataclass(frozen=True)
class Output:
    out: Path
    model: Path  # its tokenizer is exported with the weights
    template: str
    save_dtype: str
    save_every: int | None  # steps; None: ten minutes
    eval_every: int | None
    sample_prompts: Path | None  # prompts
