"""What train.py prints before a run: size of the model, rows left out, the memory plan."""

import argparse
import os
import sys
from collections.abc import Callable

import torch

from parts import options
from parts.cli import print_list, print_table
from parts.distributed import compute_dtype
from parts.memory import free_memory
from parts.memory_plan import memory_plan
from parts.options import Weights


def print_plan(
    args: argparse.Namespace, model: torch.nn.Module, n_trained: int, longest: int, skipped: list[str]
) -> None:
    """Print the number of parameters, of which `n_trained` are trained. `longest`: tokens of the longest row;
    `skipped`: the bad rows that are left out."""
    positions = model.config.max_positions
    if args.max_len > positions and (longest > positions or args.max_len != options.MAX_LEN):
        print(
            f"--max-len {args.max_len} is above the {positions:,} positions that {args.model} knows; "
            f"the longest row has {longest:,} tokens",
            file=sys.stderr,
        )
    print_list("unusable rows are skipped (run.json lists them all)", skipped)
    total = sum(p.numel() for p in model.parameters())
    trained = "" if n_trained == total else f", {n_trained:,} of them trained"
    name = min(str(args.model), os.path.relpath(args.model), key=len)
    print(f"{name}: {total:,} parameters{trained}, {model.compute_dtype} computation.")


def print_memory_plans(
    args: argparse.Namespace,
    variants: dict[str, Weights],
    build_meta_model: Callable[[Weights, torch.dtype], torch.nn.Module],
    trained_parameters: Callable[[torch.nn.Module], dict],
    largest_micro_batch: Callable[[int], tuple[int, int]],
) -> None:
    """Print the memory plan for each number of ranks and each variant of the weights. `largest_micro_batch`: its tokens
    and supervised tokens for a number of ranks."""
    cuda, world_sizes = args.plan_gpu is not None or torch.cuda.is_available(), options.world_sizes(args)
    dtype = compute_dtype("bf16" if args.plan_gpu is not None and args.dtype == "auto" else args.dtype)
    plans = {}
    for flags, weights in variants.items():
        model, plans[flags] = build_meta_model(weights, dtype), {}
        for world_size in world_sizes:
            tokens, supervised = largest_micro_batch(world_size)
            plans[flags][world_size] = memory_plan(
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
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # they share a CPU's memory; `free` is the share of one
    print_memory_plan(plans, {n: free * (1 if cuda else local_ranks / n) for n in world_sizes})


def print_memory_plan(plans: dict[str, dict[int, dict[str, float]]], free: dict[int, float]) -> None:
    """Print plans by flags, the chosen ones first, and by number of ranks; then which other flags fit if the chosen
    ones do not. `free`: bytes on each rank, by number of ranks."""
    chosen, *others = plans
    total = {flags: {n: sum(plan.values()) for n, plan in by_ranks.items()} for flags, by_ranks in plans.items()}

    def gib(numbers) -> list[str]:
        return [f"{n / 2**30:,.2f}" for n in numbers]

    uses = next(iter(plans[chosen].values()))
    rows = [(use, *gib(plan[use] for plan in plans[chosen].values())) for use in uses]
    rows += [("together", *gib(total[chosen].values()))]
    rows += [(f"with {flags}", *gib(total[flags].values())) for flags in others]
    print_table(("GiB per rank, estimated", *(f"{n} rank{'s' * (n > 1)}" for n in free)), rows)
    for n, has in free.items():
        if total[chosen][n] <= has:
            continue
        fits = next((flags for flags in others if total[flags][n] <= has), None)
        advice = "no way fits: try --checkpoint-activations, fewer --micro-batch-tokens, more ranks"
        where = f"the {has / 2**30:,.1f} GiB free on each of {n} rank{'s' * (n > 1)}"
        print(f"{chosen} does not fit into {where}; {f'{fits} fits' if fits else advice}.")
