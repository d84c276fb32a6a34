"""Phased instruction fine-tuning: train on stage 1, go on from the result with stage 2, then stage 3.

    torchrun train.py --stages s1 s2 s3

Without arguments it trains the bundled demo. `phased_training` is the algorithm, `batch_gradients` its step;
parts/checkpoints/saver.py saves. Above them: arguments, data and model; below them: the start of a run.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from parts.cli import handle_signals_and_parent

if __name__ == "__main__":
    handle_signals_and_parent()  # before torch, whose import takes seconds

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

import data
import generate
import score
from data import TEMPLATES, Documents
from model import (
    UNTIED_HEAD_NOTE,
    Config,
    Transformer,
    find_weight_files,
    hf_name,
    load_weights,
    read_config,
    save_model,
    weights_dtype,
)
from parts import memory_plan, options
from parts.adamw import StochasticAdamW, random_key
from parts.checkpoints.lock import Lock, lock_folder
from parts.checkpoints.run_log import RunLog, check_foreign_files, check_same_run, describe_run, print_stages
from parts.checkpoints.saver import Saver
from parts.checkpoints.state import check_optimizer, newest_state, read_state, restore_state
from parts.checkpoints.weights import check_weights
from parts.cli import (
    InputError,
    StopRequest,
    WorkError,
    dataclass_from_args,
    exit_process,
    format_list,
    print_list,
    progress,
    run_program,
    strip_control_chars,
)
from parts.distributed import (
    DistributedEnv,
    broadcast,
    check_shared,
    compute_dtype,
    first_rank_works,
    gradient_norm,
    init_distributed,
    is_first_rank,
    local_part,
    rendezvous,
    reshard,
    wait_for_first_rank,
)
from parts.files import (
    atomic_write,
    fsync_path,
    read_json_object,
    recover_folder,
    remove_path,
    replace_folder,
    sha256,
    temporary_path,
)
from parts.memory import free_memory, memory_in_use
from parts.options import Computation, Optimization, Output, Weights
from parts.report.held_out import print_answers_command, write_eval_matrix
from parts.text.tokenizers import copy_tokenizer, load_tokenizer, tokenizer_files
from score import Selection, SelectionOptions

DEMO = Path(__file__).resolve().parent / "demo"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return options.parse_args(argv, list(TEMPLATES), DEMO)


# ---------------------------------------------------------------- data


@dataclass
class Stage:
    name: str  # stage1, stage2, …
    source: str  # as given to --stages
    documents: Documents  # replayed ones at the end
    replayed: int
    epochs: int
    lr: float
    batch_size: int
    rows: int  # that an epoch trains on
    ifd: list[float]  # of each document, where --scores gives it

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    @property
    def expected_tokens(self) -> int:
        """That all epochs train on; of a selection, that has yet to be made, as its rows are on average."""
        return round(self.documents.lengths.mean() * self.rows) * self.epochs

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def read_data(args: argparse.Namespace, first: bool) -> tuple[list[Stage], dict[str, Documents], dict[str, str]]:
    """All stages, the held-out documents by name, and a sha256 of every file. All bad rows in one InputError."""
    names, cache = dict.fromkeys([*args.stages, *args.eval, *args.scores]), args.out / "cache"
    folders = [Path("."), DEMO] if args.model == DEMO / "model" else [Path(".")]
    documents, hashes = data.read_documents(
        names, folders, args.model, args.template, args.max_len, cache, keep=not args.dry_run, shown=first
    )
    used = {name: documents[name] for name in [*args.stages, *args.eval]}
    data.check_bad_rows(used, args.skip_bad_rows)
    given = score.read_precomputed_ifd({Path(name): documents[name] for name in args.scores})
    stages = []
    for k, name in enumerate(args.stages):
        rng = np.random.default_rng([args.seed, k])
        earlier = [documents[n] for n in args.stages[:k] if args.replay]
        replay = [data.subset(d, rng.permutation(len(d))[: round(args.replay * len(d))]) for d in earlier]
        source, all_rows = min(name, os.path.relpath(name), key=len), data.concat([documents[name], *replay])
        rows, ifd = len(all_rows), []
        if args.select != "none":
            ifd = score.match_precomputed_ifd(all_rows, given, source) if args.scores else []
            usable = ~np.isnan(ifd) if ifd else score.has_prompt_and_answer(all_rows)
            if not usable.any():
                raise InputError(f"{source}: nothing to choose from, no row has both a prompt and an answer")
            rows = min(score.rows_to_choose(args.ratio, rows), int(usable.sum()))
        replayed = sum(map(len, replay))
        stage = (f"stage{k + 1}", source, all_rows, replayed, args.epochs[k], args.lr[k], args.batch_size[k], rows, ifd)
        stages.append(Stage(*stage))
    return stages, {name: documents[name] for name in args.eval}, hashes


# ---------------------------------------------------------------- the model and what is trained of it


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_meta_model(config: Config, weights: Weights, dtype: torch.dtype) -> Transformer:
    """The model as it is trained, on meta: without memory. `dtype` is that of the computation; beside adapters (LoRA)
    the frozen weights have it, too."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype if weights.lora else DTYPES[weights.weights])
        if weights.lora:
            model.add_lora(weights.lora, weights.lora_alpha, weights.lora_targets)
    model.compute_dtype = dtype
    return model


def build_model(
    folder: Path, config: Config, weights: Weights, computation: Computation, ranks: DistributedEnv
) -> Transformer:
    """The model of an HF folder, sharded over the ranks (FSDP2). Each rank reads its part."""
    dtype = compute_dtype(computation.dtype)
    model = build_meta_model(config, weights, dtype)
    files = find_weight_files(model, folder)
    for block in model.layers:
        block.activation_checkpointing = computation.checkpoint_activations
        if computation.compile:
            block.compute = torch.compile(block.compute, dynamic=True)
    if ranks.world_size > 1:  # a rank alone would only make copies
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in [*model.layers, model]:
            fully_shard(part, mesh=ranks.mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "logits_at")  # for --sample
    elif ranks.device.type == "cpu":
        model.embed.sparse = True  # its gradient only at the words that occur
    model.to_empty(device=ranks.device)
    load_weights(model, files)
    model.init_lora(weights.seed)
    return model


def trained_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """Which parameters are trained, by name: the adapters where there are some (LoRA), else all. Step, optimizer,
    clipping, saved state, memory plan and MFU ask here.

    To freeze some, leave them out of `chosen` (or freeze them before): what is not trained gets no gradient.
    """
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if model.lora_modules():
        chosen = {name: p for name, p in chosen.items() if "lora" in name}
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    return chosen


def make_optimizer(trained: dict[str, nn.Parameter], optimization: Optimization) -> torch.optim.Optimizer:
    """Any optimizer of torch that can step on sharded parameters may stand here: its whole state is saved and resumed.
    The rate is set at every step: a group that wants another has a factor, "lr_scale"."""
    decayed = [p for p in trained.values() if p.dim() > 1]
    others = [p for p in trained.values() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": optimization.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups, settings = [g for g in groups if g["params"]], {"betas": tuple(optimization.betas), "eps": 1e-8}
    if any(p.dtype == torch.bfloat16 for p in trained.values()):  # --weights bf16
        return StochasticAdamW(groups, **settings, seed=optimization.seed)
    return torch.optim.AdamW(groups, lr=0.0, **settings, fused=True)


def stage_optimizer(trained: dict[str, nn.Parameter], optimization: Optimization, stage: int) -> torch.optim.Optimizer:
    """A fresh optimizer for stage 0, 1, …; with --weights bf16 it rounds by other draws than those of other stages."""
    optimizer = make_optimizer(trained, replace(optimization, seed=random_key(optimization.seed, stage)))
    check_optimizer(optimizer, trained)
    return optimizer


def check_gradients(
    model: Transformer, trained: dict[str, nn.Parameter], documents: Documents, ranks: DistributedEnv
) -> None:
    """Raise ValueError where the loss does not depend on a trained parameter, which then would never move. Two tokens
    show it: the first that is supervised, and the one before it."""
    at = int(documents.loss_mask[1:].argmax())
    two = Documents(documents.tokens[at : at + 2], np.array([False, True]), np.array([0, 2]), [""], [""], [])
    loss, _ = model(*(torch.from_numpy(a).to(ranks.device) for a in two.pack(np.array([0]))))
    loss.backward()
    missing = [name for name, p in trained.items() if p.grad is None]
    for p in trained.values():
        p.grad = None
    if missing:
        raise ValueError(f"trained, but of no effect on the loss: {', '.join(missing)}")


# ---------------------------------------------------------------- a step


def batch_gradients(
    model: Transformer,
    trained: dict[str, nn.Parameter],
    documents: Documents,
    batch: np.ndarray,
    micro_tokens: int,
    ranks: DistributedEnv,
    between: Callable[[], None],
) -> float:
    """Leaves in every `p.grad` the gradient of the mean loss over the supervised tokens of the whole batch (sharded, if
    p is), and returns that loss. It does not depend on how the batch is cut into micro-batches or dealt to ranks, up to
    floating-point order. `between` is called before every micro-batch, on all ranks alike; it may save what is, and
    raise.
    """
    supervised = int(documents.target_counts[batch].sum())
    total = torch.zeros((), device=ranks.device)
    for p in trained.values():  # kept from step to step: allocated again, they would fragment a CPU's memory
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    for part in data.micro_batches(batch, documents.lengths, ranks.world_size, micro_tokens)[ranks.rank]:
        between()
        loss, _ = model(*(torch.from_numpy(a).to(ranks.device) for a in documents.pack(part)))  # summed over tokens
        (loss * (ranks.world_size / supervised)).backward()  # FSDP takes the mean over ranks
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / supervised


def clip_gradients(trained: dict[str, nn.Parameter], most: float, ranks: DistributedEnv) -> float:
    """Shorten the gradient to a norm of `most` (0: leave it); returns the norm that it had."""
    gradients = [local_part(p.grad)[0] for p in trained.values()]
    norm = gradient_norm(gradients, ranks)
    if most and norm > most:
        torch._foreach_mul_(gradients, most / norm)
    return norm


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup_ratio: float) -> float:
    """The rate of step 0, 1, … of `steps`: up in a line to `peak`, then down to 0 (cosine, linear) or constant."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]


@torch.no_grad()
def held_out_loss(
    model: Transformer,
    documents: Documents,
    micro_tokens: int,
    ranks: DistributedEnv,
    between: Callable[[], None],
    name: str,
) -> float:
    """Mean loss over all supervised tokens; `between` as in `batch_gradients`, `name` is shown with the progress."""
    total = torch.zeros((), device=ranks.device, dtype=torch.float64)
    everything = np.arange(len(documents))
    parts = data.micro_batches(everything, documents.lengths, ranks.world_size, micro_tokens)[ranks.rank]
    with progress(len(parts), f"held-out loss, {name}", "micro-batch", shown=ranks.rank == 0) as bar:
        for part in parts:
            between()
            _, losses = model(*(torch.from_numpy(a).to(ranks.device) for a in documents.pack(part)))
            total += losses.double().sum()
            bar.update()
    reshard(model)
    dist.all_reduce(total)
    return total.item() / int(documents.target_counts.sum())


# ---------------------------------------------------------------- the algorithm


@dataclass
class Progress:
    """How far a run is, as its saved state holds it. Counts what is finished: stage 1, step 0 begins the second
    stage."""

    stage: int = 0
    step: int = 0  # of the stage
    global_step: int = 0
    skipped: int = 0  # steps left out because they were not finite
    last_eval_step: int = -1  # the global step at which the held-out loss was measured last
    metrics_size: int = 0  # of metrics.jsonl, in bytes
    order_size: int = 0  # of order.jsonl
    selection: Selection = field(default_factory=Selection)  # of this stage


@dataclass(frozen=True)
class Run:
    """What the functions below work with; every rank has one. `saver` has the Progress and the optimizer."""

    output: Output
    ranks: DistributedEnv
    model: Transformer
    trained: dict[str, nn.Parameter]
    held_out: dict[str, Documents]
    micro_tokens: int
    log: RunLog
    saver: Saver
    flops: memory_plan.Flops  # of training
    peak_flops: float | None  # of all ranks, a second


def phased_training(stages: list[Stage], optimization: Optimization, selection: SelectionOptions, run: Run) -> None:
    """Train on each stage in turn, from the weights that the one before it left (Phased IFT, section 3)."""
    model, trained, saver, done = run.model, run.trained, run.saver, run.saver.done
    for k in range(done.stage, len(stages)):
        stage = stages[k]
        if done.step == 0 and optimization.optimizer_state == "reset":  # the paper: every stage is a run of its own
            saver.optimizer = stage_optimizer(trained, optimization, k)
        later = sum(s.expected_tokens for s in stages[k + 1 :])
        tokens_left = later + stage.expected_tokens * (stage.steps - done.step) // stage.steps
        run.log.begin(stage.name, stage.steps, done.step, tokens_left)
        for epoch in range(done.step // stage.steps_per_epoch, stage.epochs):
            rows = np.arange(len(stage.documents))
            if selection.select != "none":
                rows = select_rows(run, stage, epoch, selection)  # IterIT
            batches = data.epoch_batches(stage.documents, rows, stage.batch_size, optimization.seed, k, epoch)
            for batch in batches[done.step - epoch * stage.steps_per_epoch :]:
                if done.global_step == 0 or ((every := run.output.eval_every) and done.global_step % every == 0):
                    evaluate(run, stage.name if done.global_step else "start")
                started, how = time.perf_counter(), (run.micro_tokens, run.ranks, saver.safe_point)
                loss = batch_gradients(model, trained, stage.documents, batch, *how)
                norm = clip_gradients(trained, optimization.clip, run.ranks)
                step, steps = done.step, stage.steps
                if optimization.optimizer_state == "keep":
                    step, steps = done.global_step, sum(s.steps for s in stages)
                lr = learning_rate(step, steps, stage.lr, optimization.schedule, optimization.warmup_ratio)
                if finite := math.isfinite(loss) and math.isfinite(norm):
                    for group in saver.optimizer.param_groups:
                        group["lr"] = lr * group.get("lr_scale", 1.0)
                    saver.optimizer.step()
                else:
                    skip_step(run, stage, batch, loss, norm, optimization.skip_nonfinite)
                numbers = {"loss": loss, "lr": lr, "grad_norm": norm}
                count_step(run, stage, epoch, batch, numbers, time.perf_counter() - started, skipped=not finite)
                saver.safe_point(after_step=True)
        finish_stage(run, stage, last=stage is stages[-1])


def select_rows(run: Run, stage: Stage, epoch: int, options: SelectionOptions) -> np.ndarray:
    """IterIT: the documents that an epoch trains on, best first; chosen now if they have not been."""
    selection, started = run.saver.done.selection, time.perf_counter()
    if selection.epoch == epoch or (selection.epoch >= 0 and options.select == "static"):
        return np.array(selection.chosen)
    if selection.scoring < 0:
        selection.ifd = list(stage.ifd)
    given, tokenizer = epoch == 0 and bool(stage.ifd), load_tokenizer(run.output.model)
    scoring = score.select_epoch_rows(
        selection, options, run.model, stage.documents, tokenizer, epoch, stage.rows, run.ranks, run.micro_tokens
    )
    with progress(0, f"{stage.name} IFD", "row", shown=run.ranks.rank == 0) as bar:
        for scored, bar.total in scoring:
            bar.update(scored - bar.n)
            run.saver.safe_point()
    scored, seconds = 0 if given else len(selection.candidates), time.perf_counter() - started
    row = {"stage": stage.name, "epoch": epoch + 1, "scored": scored, "chosen": len(selection.chosen)}
    run.log.write(row | {"seconds": round(seconds, 4)})
    if run.ranks.rank == 0:
        file = run.output.out / stage.name / f"selection-epoch{epoch}.jsonl"
        score.write_selection(file, stage.documents, selection)
    at = f"{stage.name}, epoch {epoch + 1}: {scored:,} rows scored in {seconds:.1f} s"
    run.log.info(f"{at}, {score.describe_selection(selection)}")
    return np.array(selection.chosen)


def evaluate(run: Run, label: str) -> str:
    """Log the held-out losses, unless they are known for this step. Returns them in words."""
    done = run.saver.done
    if done.last_eval_step == done.global_step:
        return ""
    losses = {
        name: held_out_loss(run.model, documents, run.micro_tokens, run.ranks, run.saver.safe_point, name)
        for name, documents in run.held_out.items()
    }
    for name, loss in losses.items():
        run.log.write({"stage": label, "global_step": done.global_step, "eval": name, "eval_loss": loss})
        if label == "start":
            run.log.info(f"start: held-out loss {loss:.4f} ({name})")
    done.last_eval_step = done.global_step
    return "".join(f", held-out loss {loss:.4f} ({name})" for name, loss in losses.items())


def skip_step(run: Run, stage: Stage, batch: np.ndarray, loss: float, norm: float, most: int) -> None:
    """Leave out a step that is not finite and name its rows, or save and raise WorkError when `most` have been."""
    done, rows = run.saver.done, [f"{stage.documents.ids[d]} ({stage.documents.source[d]})" for d in batch]
    what = f"{stage.name}, step {done.step + 1}: the loss is {loss}, the gradient's norm {norm}"
    if done.skipped < most:
        done.skipped += 1
        run.log.info(
            strip_control_chars(
                format_list(f"{what}: skipped ({done.skipped} of {most}). The rows of this batch:", rows, 10)
            )
        )
        return
    run.saver.save()
    if run.ranks.rank > 0:
        raise WorkError("")  # the first rank says it
    raise WorkError(
        f"{what}. The weights before this step are kept in {run.output.out / 'resume'}. "
        + format_list("The rows of this batch:", rows)
        + "\nLook at these rows and at the learning rate; --skip-nonfinite N goes on, skipping up to N such steps."
    )


def count_step(
    run: Run, stage: Stage, epoch: int, batch: np.ndarray, numbers: dict, seconds: float, skipped: bool
) -> None:
    """Count a step and log it; `numbers` are loss, lr and grad_norm."""
    done, lengths = run.saver.done, stage.documents.lengths[batch]
    done.step += 1
    done.global_step += 1
    supervised = int(stage.documents.target_counts[batch].sum())
    rate = run.flops.of_batch(lengths, supervised) / max(seconds, 1e-6)
    row = {"stage": stage.name, "step": done.step, "global_step": done.global_step, "epoch": epoch + 1, **numbers}
    row |= {"documents": len(batch), "tokens": int(lengths.sum()), "supervised": supervised}
    row |= {"mfu": round(rate / run.peak_flops, 4) if run.peak_flops else None}
    row |= {"memory_bytes": memory_in_use(run.ranks.device)}
    run.log.step(row, [stage.documents.ids[d] for d in batch], seconds, skipped)


def finish_stage(run: Run, stage: Stage, last: bool) -> None:
    """Save (the rest may take long, and is done again after a kill), measure, sample, export, count it."""
    run.saver.save()
    held_out, folder, samples = evaluate(run, stage.name), run.output.out / stage.name, None
    if run.output.sample:
        tokenizer = load_tokenizer(run.output.model)
        answering = generate.answer_samples(run.model, tokenizer, run.output.template, run.output.sample)
        with progress(0, f"{stage.name} samples", "answer", shown=run.ranks.rank == 0) as bar:
            for samples in answering:
                bar.total = len(samples)
                bar.update()
                run.saver.safe_point()
        reshard(run.model)
    export(folder, run.model, run.output, run.ranks, samples)
    done = run.saver.done
    done.stage, done.step, done.selection = done.stage + 1, 0, Selection()
    run.log.info(f"{stage.name} ({stage.source}): {stage.steps} steps, {run.log.end()}{held_out} -> {folder}")
    for row in (samples or [])[:5]:
        run.log.info(
            f"  {strip_control_chars(row['instruction'])[:100]!r} -> {strip_control_chars(row['output'])[:160]!r}"
        )
    if last:
        if done.skipped:
            run.log.info(
                f"{done.skipped} of {done.global_step} steps were skipped: their loss or gradient is not finite."
            )
        if run.held_out and run.ranks.rank == 0:
            write_eval_matrix(run.output.out)
            if run.output.model.resolve() == DEMO / "model":
                print_answers_command(run.output.out, run.output.model)
        run.saver.optimizer.state.clear()
        run.saver.save()


def export(folder: Path, model: Transformer, output: Output, ranks: DistributedEnv, samples: list[dict] | None) -> None:
    """Write a stage's HF folder: weights, config, tokenizer, generation settings, template, samples. All or nothing:
    it is on disk before it takes the place of an older one, as `replace_folder` does it."""
    new = temporary_path(folder)
    try:
        if ranks.rank == 0:
            remove_path(new)
        dist.barrier()
        save_model(model, new, DTYPES.get(output.save_dtype) or weights_dtype(model, output.model), output.model)
        if ranks.rank == 0:
            template = TEMPLATES[output.template]
            tokenizer = load_tokenizer(output.model)
            stop_ids = data.stop_ids(template, tokenizer)
            copy_tokenizer(output.model, new, data.chat_template(template, tokenizer), stop_ids)
            atomic_write(new / "template.json", json.dumps({"template": output.template}))
            if samples is not None:
                atomic_write(new / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False))
            for path in folder.glob("selection-epoch*.jsonl"):
                shutil.copyfile(path, new / path.name)
            fsync_path(new, inside=True)
            replace_folder(folder)
    except (OSError, WorkError) as e:
        if ranks.rank == 0:
            with suppress(OSError):
                remove_path(new)
        raise WorkError(f"{folder} could not be written ({e}): make room and give the same command again") from None
    dist.barrier()


# ---------------------------------------------------------------- the start


def check_folder(args: argparse.Namespace) -> None:
    """Refuse an --out that is not this run's to write."""
    inputs = [args.model, *map(Path, [*args.stages, *args.eval, *args.scores]), *([args.sample] if args.sample else [])]
    written = [f"stage{k + 1}" for k in range(len(args.stages))]
    check_foreign_files(args.out, [*written, "resume", "metrics.jsonl", "order.jsonl", "held_out.json"], inputs)


def print_plan(args: argparse.Namespace, config: Config, stages: list[Stage], worlds: list[int]) -> None:
    """The memory that a rank needs, for each number of ranks: as asked, and with other weights."""
    cuda, planned = args.plan_gpu is not None or torch.cuda.is_available(), {}
    dtype = compute_dtype("bf16" if args.plan_gpu is not None and args.dtype == "auto" else args.dtype)
    for way, weights in options.unsupported_combinations(dataclass_from_args(Weights, args)).items():
        model = build_meta_model(config, weights, dtype)
        trained, planned[way] = set(trained_parameters(model)), {}
        for world in worlds:
            found = [data.largest_micro_batch(s.documents, s.batch_size, world, args.micro_tokens) for s in stages]
            most = (max(numbers) for numbers in zip(*found))  # tokens, supervised
            how = (world // args.replicas, dtype, *most, args.checkpoint_activations, cuda, args.replicas)
            planned[way][world] = memory_plan.memory_plan(model, trained, *how)
    free = args.plan_gpu * 2**30 if args.plan_gpu is not None else free_memory(torch.device("cuda" if cuda else "cpu"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks that share a CPU's memory; `free` is the share of one
    memory_plan.print_memory_plan(planned, {w: free * (1 if cuda else here / w) for w in worlds})


def check_everything(
    args: argparse.Namespace, config: Config, template_notes: list[str]
) -> tuple[list[Stage], dict[str, Documents]]:
    """What can be wrong is found before the first weight is read; the plan is printed, run.json written. A dry run
    writes nothing."""
    print("\n".join(template_notes))
    model = build_meta_model(config, dataclass_from_args(Weights, args), compute_dtype(args.dtype))
    stages, held_out, hashes = read_data(args, first=True)
    everything = [*(s.documents for s in stages), *held_out.values()]
    highest = max(int(d.tokens.max()) for d in everything)
    if args.sample:
        asked = generate.read_prompts(args.sample)
        generate.print_later_turns(asked)
        highest = max(highest, *generate.render_prompts(asked, load_tokenizer(args.model), args.template))
    data.check_vocabulary(highest, model.config.vocab_size, args.model)
    data.stop_ids(TEMPLATES[args.template], load_tokenizer(args.model))
    hashes |= {str(path): sha256(path) for path in [args.model / "config.json", *tokenizer_files(args.model)]}
    description = describe_run(vars(args), {"torch": torch.__version__, "numpy": np.__version__}, hashes)
    description["skipped_rows"] = [line for documents in everything for line in documents.bad]
    defaults = vars(parse_args(["--stages", *args.stages, "--lr", "5e-4"]))
    before = check_same_run(args.out / "run.json", description, options.RESUMABLE_ARGS, defaults)
    worlds = options.world_sizes(args)
    print_stages(stages, chosen=args.select != "none")
    longest = max(int(d.lengths.max()) for d in everything)
    if args.max_len > config.max_positions and (longest > config.max_positions or args.max_len != defaults["max_len"]):
        print(
            f"--max-len {args.max_len} is above the {config.max_positions:,} positions that {args.model} knows; the "
            f"longest row has {longest:,} tokens",
            file=sys.stderr,
        )
    print_list("rows that cannot be used are left out (run.json lists them all)", description["skipped_rows"])
    data.print_unencodable(everything)
    total, trained = sum(p.numel() for p in model.parameters()), trained_parameters(model)
    learned = sum(p.numel() for p in trained.values())
    of = "" if learned == total else f", {learned:,} of them trained"
    name, dtype = min(str(args.model), os.path.relpath(args.model), key=len), compute_dtype(args.dtype)
    print(f"{name}: {total:,} parameters{of}, {dtype} computation.")
    if config.untied_head:
        print(UNTIED_HEAD_NOTE)
    if not args.dry_run or list(args.model.glob("*.safetensors")):  # a plan needs no weights
        find_weight_files(model, args.model)
    if args.dry_run:
        print_plan(args, config, stages, worlds)
    else:
        description["weights"] = before.get("weights")
        atomic_write(args.out / "run.json", json.dumps(description, indent=1))
    return stages, held_out


def resume_run(
    args: argparse.Namespace,
    ranks: DistributedEnv,
    model: Transformer,
    held_out: dict[str, Documents],
    stop: StopRequest,
    lock: Lock | None,
) -> Run:
    """A run that goes on from the newest whole state in --out, or begins. What killed processes left is put right."""
    output, optimization, found = dataclass_from_args(Output, args), dataclass_from_args(Optimization, args), None
    stop.deferred = True
    if ranks.rank == 0:
        for k in range(len(args.stages)):
            recover_folder(args.out / f"stage{k + 1}")
        found = newest_state(args.out / "resume")
    found, done, trained = broadcast(found), Progress(), trained_parameters(model)
    if found:
        state, tensors = read_state(found)
        selection = Selection(**state["progress"].pop("selection"))
        done = Progress(**state["progress"], selection=selection)
    optimizer = stage_optimizer(trained, optimization, done.stage if args.optimizer_state == "reset" else 0)
    if found:
        restore_state(tensors, state["optimizer"], trained, optimizer)
    log = RunLog(args.out if ranks.rank == 0 else None, done.metrics_size, done.order_size)
    if found:
        at = f"stage {done.stage + 1}, step {done.step}" if done.stage < len(args.stages) else "all stages done"
        log.info(f"Going on from {found}: {at}.")
    how = (args.save_every, ranks, model, trained, optimizer, done, log, stop, lock)
    flops, peak = (
        memory_plan.training_flops(model, set(trained)),
        memory_plan.peak_flops(ranks.device, model.compute_dtype),
    )
    peak = peak * ranks.world_size if peak else None
    saver = Saver(args.out / "resume", *how)
    return Run(output, ranks, model, trained, held_out, args.micro_tokens, log, saver, flops, peak)


def train(
    args: argparse.Namespace,
    stages: list[Stage],
    held_out: dict[str, Documents],
    ranks: DistributedEnv,
    stop: StopRequest,
    lock: Lock | None,
) -> None:
    """On every rank: build the model, go on from where the run is, train."""
    try:
        model = build_model(
            args.model,
            read_config(args.model),
            dataclass_from_args(Weights, args),
            dataclass_from_args(Computation, args),
            ranks,
        )
        check_weights({hf_name(name): p for name, p in model.named_parameters()}, args.model, args.out)
        check_gradients(model, trained_parameters(model), stages[0].documents, ranks)
        run = resume_run(args, ranks, model, held_out, stop, lock)
        with closing(run.log):
            phased_training(
                stages, dataclass_from_args(Optimization, args), dataclass_from_args(SelectionOptions, args), run
            )
    except torch.OutOfMemoryError as e:
        ways = f"--micro-tokens {args.micro_tokens // 2}, --checkpoint-activations, --weights bf16 or --lora 16"
        raise WorkError(f"out of GPU memory: try {ways}; --dry-run says what they need ({e})") from None


def choose_template(args: argparse.Namespace) -> list[str]:
    """Set `args.template` where it was not given: a run that goes on keeps its own. Returns what to say of it."""
    arguments = read_json_object(args.out / "run.json").get("arguments", {})
    before = arguments.get("template") if isinstance(arguments, dict) else None
    if args.template is None and before in list(TEMPLATES):
        args.template = before
        return [f"Template {before}: that of the run in {args.out}."]
    args.template, notes = data.choose_template(args.model, load_tokenizer(args.model), args.template)
    return notes


def start(args: argparse.Namespace) -> None:
    stop, config, lock = handle_signals_and_parent(), read_config(args.model), None
    template_notes = choose_template(args)
    if args.dry_run:
        if is_first_rank():
            check_folder(args)
            check_everything(args, config, template_notes)
        return
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    store = rendezvous()
    with ExitStack() as stack:
        if is_first_rank():
            with first_rank_works(store):
                check_folder(args)
                lock = stack.enter_context(lock_folder(args.out))
                stages, held_out = check_everything(args, config, template_notes)
        else:
            wait_for_first_rank(store)
        with init_distributed(args.replicas, store) as ranks:
            check_shared(args.out / "lock")
            if ranks.rank > 0:  # from what the first has cached
                stages, held_out, _ = read_data(args, first=False)
            train(args, stages, held_out, ranks, stop, lock)
        if is_first_rank():
            data.clear_cache(args.out / "cache")  # a run that ended well needs it no more


def main(argv: list[str] | None = None) -> int:
    return run_program("train.py", start, parse_args(argv))


if __name__ == "__main__":
    exit_process(main())
