"""What a run of train.py will do, printed before it begins: stages, rows left out, size of the model, memory."""

import argparse
import os
import sys
from collections.abc import Callable

import torch

from parts import options
from parts.cli import print_list
from parts.distributed import compute_dtype
from parts.memory import free_memory
from parts.memory_plan import memory_plan, print_memory_plan
from parts.options import Weights


def print_plan(
    args: argparse.Namespace, model: torch.nn.Module, learned: int, longest: int, skipped: list[str]
) -> None:
    """The size of the `model` and how much of it is `learned`; `longest`: tokens of the longest row, `skipped`: the bad
    rows that are left out."""
    known = model.config.max_positions
    if args.max_len > known and (longest > known or args.max_len != options.MAX_LEN):
        print(
            f"--max-len {args.max_len} is above the {known:,} positions that {args.model} knows; the longest row has "
            f"{longest:,} tokens",
            file=sys.stderr,
        )
    print_list("unusable rows are skipped (run.json lists them all)", skipped)
    total = sum(p.numel() for p in model.parameters())
    of = "" if learned == total else f", {learned:,} of them trained"
    name = min(str(args.model), os.path.relpath(args.model), key=len)
    print(f"{name}: {total:,} parameters{of}, {model.compute_dtype} computation.")


def print_memory(
    args: argparse.Namespace,
    ways: dict[str, Weights],
    build_meta_model: Callable[[Weights, torch.dtype], torch.nn.Module],
    trained_parameters: Callable[[torch.nn.Module], dict],
    largest: Callable[[int], tuple[int, int]],
) -> None:
    """The memory that a rank needs, for each number of ranks and each of some `ways` to hold the weights. `largest`:
    tokens and supervised tokens of the largest micro-batch for that number of ranks."""
    cuda, plans, world_sizes = args.plan_gpu is not None or torch.cuda.is_available(), {}, options.world_sizes(args)
    dtype = compute_dtype("bf16" if args.plan_gpu is not None and args.dtype == "auto" else args.dtype)
    for way, weights in ways.items():
        model, plans[way] = build_meta_model(weights, dtype), {}
        for world_size in world_sizes:
            tokens, supervised = largest(world_size)
            plans[way][world_size] = memory_plan(
                model,
                trained=set(trained_parameters(model)),
                shards=world_size // args.replicas,
                dtype=dtype,
                tokens=tokens,
                supervised=supervised,
                checkpointed=args.checkpoint_activations,
                cuda=cuda,
                replicas=args.replicas,
            )
    free = args.plan_gpu * 2**30 if args.plan_gpu is not None else free_memory(torch.device("cuda" if cuda else "cpu"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks that share a CPU's memory; `free` is the share of one
    print_memory_plan(plans, {w: free * (1 if cuda else here / w) for w in world_sizes})
