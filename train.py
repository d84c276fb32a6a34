"""Phased instruction fine-tuning: train on stage 1, continue from the result with stage 2, then stage 3.

    torchrun train.py --stages s1 s2 s3

Without arguments it trains the bundled demo. `phased_training` is the algorithm, `train_step` its step;
parts/checkpoints/saver.py saves.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from parts.cli import handle_signals_and_parent

if __name__ == "__main__":
    handle_signals_and_parent()  # before torch, whose import takes seconds

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import generate
import score
from data import Documents, Stage
from model import (
    DTYPES,
    Transformer,
    build_meta_model,
    build_model,
    find_weight_files,
    hf_name,
    save_model,
    weights_dtype,
)
from parts import options
from parts.checkpoints.config import UNTIED_HEAD_NOTE, Config, read_config
from parts.checkpoints.export import atomic_folder, write_stage_metadata
from parts.checkpoints.lock import Lock, lock_folder
from parts.checkpoints.run_log import LOG_FILES, RunLog, check_foreign_files, check_same_run, describe_run, print_stages
from parts.checkpoints.saver import Saver
from parts.checkpoints.state import TrainingState, check_optimizer, newest_state, read_state, restore_training
from parts.checkpoints.weights import check_weights
from parts.cli import (
    StopRequest,
    WorkError,
    dataclass_from_args,
    exit_process,
    format_list,
    progress,
    run_program,
    strip_control_chars,
)
from parts.distributed import (
    DistributedEnv,
    broadcast,
    check_shared,
    compute_dtype,
    first_rank_first,
    init_distributed,
    is_first_rank,
    rendezvous,
    reshard,
    resolve_dtype,
)
from parts.files import atomic_write, read_json_object, recover_folder, sha256
from parts.flops import Flops, peak_flops, training_flops
from parts.keyed_random import random_key
from parts.memory import memory_in_use, oom_advice
from parts.optimizer import clip_gradients, learning_rate, make_optimizer
from parts.options import Computation, Optimization, Output, Weights
from parts.report.held_out import print_answers_command, write_eval_matrix
from parts.run_plan import print_memory_plans, print_plan
from parts.selection import Selection, SelectionOptions, describe_selection, write_selection
from parts.text.templates import TEMPLATES, chat_template, choose_template, stop_ids
from parts.text.tokenizers import copy_tokenizer, load_tokenizer, tokenizer_files

DEMO = Path(__file__).resolve().parent / "demo"

# ---------------------------------------------------------------- what is trained, and how


def trained_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """The trained parameters by name: the adapters if the model has any (LoRA), else all parameters. The training step,
    optimizer, clipping, saved state, memory plan and MFU all use this function.

    To freeze parameters, remove them from `chosen` (or freeze them before): frozen parameters get no gradient.
    """
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if model.lora_modules():
        chosen = {name: p for name, p in chosen.items() if "lora" in name}
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    return chosen


def stage_optimizer(trained: dict[str, nn.Parameter], optimization: Optimization, stage: int) -> torch.optim.Optimizer:
    """A new optimizer for stage 0, 1, …; with --param-dtype bf16 each stage has its own random numbers for rounding."""
    optimizer = make_optimizer(trained, replace(optimization, seed=random_key(optimization.seed, stage)))
    check_optimizer(optimizer, trained)
    return optimizer


def check_gradients(
    model: Transformer, trained: dict[str, nn.Parameter], documents: Documents, ranks: DistributedEnv
) -> None:
    """Raise ValueError if the training loss does not depend on a trained parameter, which would then never change.
    Tested on the shortest document."""
    add_gradients(model, documents, documents.lengths.argmin(keepdims=True), 0, ranks, scale=1.0)
    missing = [name for name, p in trained.items() if p.grad is None]
    for p in trained.values():
        p.grad = None
    if missing:
        raise ValueError(f"these trained parameters do not affect the loss: {', '.join(missing)}")


# ---------------------------------------------------------------- a step


def training_loss(losses: Tensor, log_z: Tensor, at: Tensor) -> Tensor:
    """The loss that is differentiated, for each of n supervised tokens (n,): here their cross-entropy, `losses`.

    A re-weighted loss, or one with more terms, goes here. Logged losses, held-out losses and IFD remain plain
    cross-entropy. `log_z` is the logarithm of the softmax's normalizer. `at` (int64) contains the indices of these
    tokens among the micro-batch's supervised tokens, in the order of its documents. The sum is divided by the batch's
    number of supervised tokens, whatever their weights.
    """
    return losses


def batch_gradients(
    model: Transformer,
    trained: dict[str, nn.Parameter],
    documents: Documents,
    batch: np.ndarray,
    micro_batch_tokens: int,
    ranks: DistributedEnv,
    on_micro_batch: Callable[[], None],
    key: int = 0,
) -> float:
    """Set every `p.grad` to the gradient of the mean `training_loss` over the supervised tokens of the batch (sharded
    if p is sharded). Returns their mean cross-entropy.

    Neither depends on how the batch is divided into micro-batches or among ranks, up to floating-point order.
    `on_micro_batch` is called before every micro-batch on every rank; it may save the state, and raise. `key` is the
    key of the step, from which random numbers in the model are made.
    """
    supervised = int(documents.target_counts[batch].sum())
    total = torch.zeros((), device=ranks.device)
    for p in trained.values():  # kept from step to step: allocated again, they would fragment a CPU's memory
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    scale = ranks.world_size / supervised  # FSDP takes the mean over ranks
    for part in data.micro_batches(batch, documents.lengths, ranks.world_size, micro_batch_tokens)[ranks.rank]:
        on_micro_batch()
        total += add_gradients(model, documents, part, key, ranks, scale)
    dist.all_reduce(total)
    return total.item() / supervised


def add_gradients(
    model: Transformer, documents: Documents, part: np.ndarray, key: int, ranks: DistributedEnv, scale: float
) -> Tensor:
    """Add the gradients of a micro-batch's summed training loss, times `scale`; returns its summed cross-entropy. The
    model is in train mode only here: held-out loss, scores and samples are computed in eval mode."""
    model.train()
    inputs = (torch.from_numpy(a).to(ranks.device) for a in documents.pack(part))
    keys = torch.tensor([random_key(key, int(d)) for d in part] or [0]).to(ranks.device)
    loss, losses = model(*inputs, training_loss, keys)
    (loss * scale).backward()
    model.eval()
    return losses.sum()


@torch.no_grad()
def held_out_loss(
    model: Transformer,
    documents: Documents,
    micro_batch_tokens: int,
    ranks: DistributedEnv,
    any_rank_asked_to_stop: Callable[[], bool],
    name: str,
) -> float | None:
    """Mean cross-entropy over all supervised tokens; None as soon as `any_rank_asked_to_stop()`, which every rank
    calls before every micro-batch. `name` is shown with the progress."""
    total = torch.zeros((), device=ranks.device, dtype=torch.float64)
    everything = np.arange(len(documents))
    parts = data.micro_batches(everything, documents.lengths, ranks.world_size, micro_batch_tokens)[ranks.rank]
    with progress(len(parts), f"held-out loss, {name}", "micro-batch", shown=ranks.rank == 0) as bar:
        for part in parts:
            if any_rank_asked_to_stop():
                reshard(model)
                return None
            _, losses = model(*(torch.from_numpy(a).to(ranks.device) for a in documents.pack(part)))
            total += losses.double().sum()
            bar.update()
    reshard(model)
    dist.all_reduce(total)
    return total.item() / int(documents.target_counts.sum())


# ---------------------------------------------------------------- the algorithm


@dataclass
class Progress:
    """How far a run is, as stored in its saved state. Counts finished stages and steps: stage 1, step 0 is the start of
    the second stage."""

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
    """The objects that the functions below share; every rank has its own."""

    model: Transformer
    state: TrainingState  # what is saved: weights, optimizer, Progress
    saver: Saver
    log: RunLog
    held_out: dict[str, Documents]
    output: Output
    micro_batch_tokens: int
    flops: Flops  # of training
    ranks: DistributedEnv

    @property
    def progress(self) -> Progress:
        return self.state.progress


def phased_training(stages: list[Stage], optimization: Optimization, selection: SelectionOptions, run: Run) -> None:
    """Train on each stage in turn, starting from the weights of the previous stage (Phased IFT, section 3)."""
    state = run.state
    for k in range(run.progress.stage, len(stages)):
        stage = stages[k]
        if run.progress.step == 0 and optimization.optimizer_state == "reset":  # as in the paper
            state.optimizer = stage_optimizer(state.trained, optimization, k)
        later = sum(s.expected_tokens for s in stages[k + 1 :])
        tokens_left = later + stage.expected_tokens * (stage.steps - run.progress.step) // stage.steps
        run.log.begin(stage.name, stage.steps, run.progress.step, tokens_left)
        for epoch in range(run.progress.step // stage.steps_per_epoch, stage.epochs):
            rows = epoch_rows(run, stage, epoch, selection)
            batches = data.epoch_batches(stage.documents, rows, stage.batch_size, optimization.seed, k, epoch)
            for batch in batches[run.progress.step - epoch * stage.steps_per_epoch :]:
                evaluate_if_due(run, stage)
                step, steps = run.progress.step, stage.steps
                if optimization.optimizer_state == "keep":
                    step, steps = run.progress.global_step, sum(s.steps for s in stages)
                lr = learning_rate(step, steps, stage.lr, optimization.schedule, optimization.warmup_ratio)
                train_step(run, stage, epoch, batch, lr, optimization)
                run.saver.safe_point(after_step=True)
        finish_stage(run, stage)
        if k == len(stages) - 1:
            finish_run(run)


def train_step(run: Run, stage: Stage, epoch: int, batch: np.ndarray, lr: float, optimization: Optimization) -> None:
    """Compute the batch's gradients, clip them, update the weights; count and log the step."""
    state, started = run.state, time.perf_counter()
    key = random_key(optimization.seed, run.progress.global_step)
    loss = batch_gradients(
        run.model, state.trained, stage.documents, batch, run.micro_batch_tokens, run.ranks, run.saver.safe_point, key
    )
    norm = clip_gradients(state.trained, optimization.max_grad_norm, run.ranks)
    if finite := math.isfinite(loss) and math.isfinite(norm):
        update_weights(state, lr)
    else:
        skip_step(run, stage, batch, loss, norm, optimization.skip_nonfinite)
    run.progress.step += 1
    run.progress.global_step += 1
    numbers = {"loss": loss, "lr": lr, "grad_norm": norm}
    log_step(run, stage, epoch, batch, numbers, time.perf_counter() - started, skipped=not finite)


def update_weights(state: TrainingState, lr: float) -> None:
    """The optimizer's step. Update tensors that follow the weights, such as their average, here, in `state.more`."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    state.optimizer.step()


def more_state(trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """`TrainingState.more` at the start of a run, by name: tensors that are saved and restored with the weights and the
    optimizer. None by default; for an average of the weights, return an fp32 copy of each (a bf16 copy would hardly
    change)."""
    return {}


def epoch_rows(run: Run, stage: Stage, epoch: int, options: SelectionOptions) -> np.ndarray:
    """The documents that an epoch trains on: all, or with --select the selected ones of the stage itself, best first,
    and all rows of other stages."""
    if options.select == "none":
        return np.arange(len(stage.documents))
    selection = run.progress.selection
    if not (selection.epoch == epoch or (selection.epoch >= 0 and options.select == "static")):
        select_rows(run, stage, epoch, options)
    return np.concatenate([selection.chosen, np.arange(len(stage.own), len(stage.documents))]).astype(np.int64)


def select_rows(run: Run, stage: Stage, epoch: int, options: SelectionOptions) -> None:
    """IterIT: select rows with the current model, and log the selection."""
    selection, started = run.progress.selection, time.perf_counter()
    if selection.scoring_epoch < 0:
        selection.scores = list(stage.scores)
    has_scores, tokenizer = epoch == 0 and bool(stage.scores), load_tokenizer(run.output.model)
    count = stage.rows - stage.mixed_in
    scoring = score.select_epoch_rows(
        selection, options, run.model, stage.own, tokenizer, epoch, count, run.ranks, run.micro_batch_tokens
    )
    with progress(0, f"{stage.name} {score.SELECTION_SCORE.name}", "row", shown=run.ranks.rank == 0) as bar:
        for n_scored, n_candidates in scoring:
            bar.total = n_candidates
            bar.update(n_scored - bar.n)
            run.saver.safe_point()
    scored, seconds = 0 if has_scores else len(selection.candidates), time.perf_counter() - started
    row = {"stage": stage.name, "epoch": epoch + 1, "scored": scored, "chosen": len(selection.chosen)}
    run.log.write(row | {"seconds": round(seconds, 4)})
    if run.ranks.rank == 0:
        path = run.output.out / stage.name / f"selection-epoch{epoch}.jsonl"
        write_selection(path, stage.own.ids, stage.own.source, selection, score.SELECTION_SCORE)
    at = f"{stage.name}, epoch {epoch + 1}: {scored:,} rows scored in {seconds:.1f} s"
    run.log.info(f"{at}, {describe_selection(selection, score.SELECTION_SCORE)}")


def evaluate_if_due(run: Run, stage: Stage) -> None:
    """Evaluate before the first step, and with --eval-every N before every N-th step."""
    step, every = run.progress.global_step, run.output.eval_every
    if step == 0 or (every and step % every == 0):
        evaluate(run, stage.name if step else "start")


def evaluate(run: Run, label: str) -> str:
    """Measure and log the held-out losses, unless done for this step already. Returns them as text for the summary.

    Saves no state, so that the weights may be exchanged around it for others, such as their average. A signal ends it
    without a result; then the next safe point saves.
    """
    step = run.progress.global_step
    if run.progress.last_eval_step == step:
        return ""
    losses = {}
    for name, documents in run.held_out.items():
        losses[name] = held_out_loss(
            run.model, documents, run.micro_batch_tokens, run.ranks, run.saver.any_rank_asked_to_stop, name
        )
        if losses[name] is None:
            return ""
    for name, loss in losses.items():
        run.log.write({"stage": label, "global_step": step, "eval": name, "eval_loss": loss})
        if label == "start":
            run.log.info(f"start: held-out loss {loss:.4f} ({name})")
    run.progress.last_eval_step = step
    listed = ", ".join(f"{loss:.4f} ({name})" for name, loss in losses.items())
    return f", held-out loss {listed}" if losses else ""


def skip_step(run: Run, stage: Stage, batch: np.ndarray, loss: float, norm: float, max_skipped: int) -> None:
    """Skip a step that is not finite and list its rows; after `max_skipped` such steps, save and raise WorkError."""
    rows = [f"{stage.documents.ids[d]} ({stage.documents.source[d]})" for d in batch]
    problem = f"{stage.name}, step {run.progress.step + 1}: the loss is {loss}, the gradient's norm {norm}"
    heading = "The rows of this batch:"
    if run.progress.skipped < max_skipped:
        run.progress.skipped += 1
        count = f"skipped ({run.progress.skipped} of {max_skipped})"
        run.log.info(strip_control_chars(format_list(f"{problem}: {count}. {heading}", rows, 10)))
        return
    run.saver.save()
    if run.ranks.rank > 0:
        raise WorkError("")  # the first rank reports it
    raise WorkError(
        f"{problem}. The weights before this step are kept in {run.output.out / 'resume'}. "
        f"{format_list(heading, rows)}\n"
        "Look at these rows and at the learning rate; --skip-nonfinite N skips up to N such steps."
    )


def log_step(
    run: Run, stage: Stage, epoch: int, batch: np.ndarray, numbers: dict[str, float], seconds: float, skipped: bool
) -> None:
    """The step's rows of metrics.jsonl and order.jsonl; `numbers` are loss, lr and grad_norm."""
    lengths, supervised = stage.documents.lengths[batch], int(stage.documents.target_counts[batch].sum())
    row = {"stage": stage.name, "step": run.progress.step, "global_step": run.progress.global_step}
    row |= {"epoch": epoch + 1, **numbers}
    row |= {"documents": len(batch), "tokens": int(lengths.sum()), "supervised": supervised}
    row |= {"mfu": run.flops.utilization(lengths, supervised, seconds)}
    row |= {"memory_bytes": memory_in_use(run.ranks.device)}
    run.log.step(row, [stage.documents.ids[d] for d in batch], seconds, skipped)


def finish_stage(run: Run, stage: Stage) -> None:
    """Save the state, evaluate, sample and export, then mark the stage as finished. The mark is in memory until the
    state is saved again: a run that is killed before then continues from the state at the start of this function."""
    run.saver.save()
    held_out, samples = evaluate(run, stage.name), answer_samples(run, stage)
    run.saver.stop_point()  # a signal ends them early
    folder = run.output.out / stage.name
    export(folder, run.model, run.output, run.ranks, samples)
    run.progress.stage, run.progress.step, run.progress.selection = run.progress.stage + 1, 0, Selection()
    run.log.info(f"{stage.name} ({stage.source}): {stage.steps} steps, {run.log.end()}{held_out} -> {folder}")
    for row in (samples or [])[:5]:
        prompt, answer = strip_control_chars(row["instruction"])[:100], strip_control_chars(row["output"])[:160]
        run.log.info(f"  {prompt!r} -> {answer!r}")


def answer_samples(run: Run, stage: Stage) -> list[dict] | None:
    """The answers to --sample-prompts; None without that flag. Saves no state, and a signal ends it, as `evaluate`."""
    if not run.output.sample_prompts or run.saver.any_rank_asked_to_stop():
        return None
    samples, tokenizer = [], load_tokenizer(run.output.model)
    answering = generate.answer_samples(run.model, tokenizer, run.output.template, run.output.sample_prompts)
    with progress(0, f"{stage.name} samples", "answer", shown=run.ranks.rank == 0) as bar:
        for samples in answering:
            bar.total = len(samples)
            bar.update()
            if run.saver.any_rank_asked_to_stop():
                break
    reshard(run.model)
    return samples


def finish_run(run: Run) -> None:
    """Report skipped steps, write held_out.json, save the state without the optimizer."""
    skipped, steps = run.progress.skipped, run.progress.global_step
    if skipped:
        run.log.info(f"{skipped} of {steps} steps were skipped: their loss or gradient is not finite.")
    if run.held_out and run.ranks.rank == 0:
        write_eval_matrix(run.output.out)
        if run.output.model.resolve() == DEMO / "model":
            print_answers_command(run.output.out, run.output.model)
    run.state.optimizer.state.clear()
    run.saver.save()


def export(folder: Path, model: Transformer, output: Output, ranks: DistributedEnv, samples: list[dict] | None) -> None:
    """Write a stage's HF folder: weights, config, tokenizer, generation settings, template, samples."""
    with atomic_folder(folder, ranks.rank) as new:
        save_model(model, new, DTYPES.get(output.save_dtype) or weights_dtype(model, output.model), output.model)
        if ranks.rank == 0:
            template, tokenizer = TEMPLATES[output.template], load_tokenizer(output.model)
            copy_tokenizer(output.model, new, chat_template(template, tokenizer), stop_ids(template, tokenizer))
            write_stage_metadata(folder, new, output.template, samples)


# ---------------------------------------------------------------- the start


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return options.parse_args(argv, list(TEMPLATES), DEMO)


def read_data(args: argparse.Namespace, first: bool) -> tuple[list[Stage], dict[str, Documents], dict[str, str]]:
    """All stages, the held-out documents by name, and a sha256 of every file. All bad rows in one InputError."""
    names, cache = dict.fromkeys([*args.stages, *args.eval, *args.scores]), args.out / "cache"
    folders = [Path("."), DEMO] if args.model == DEMO / "model" else [Path(".")]
    documents, hashes = data.read_documents(
        names, folders, args.model, args.template, args.max_len, cache, keep=not args.dry_run, shown=first
    )
    used = {name: documents[name] for name in [*args.stages, *args.eval]}
    data.check_bad_rows(used, args.skip_bad_rows)
    precomputed = score.read_precomputed_scores({Path(name): documents[name] for name in args.scores})
    stage_documents, stages = [documents[name] for name in args.stages], []
    for k, (own, name) in enumerate(zip(stage_documents, args.stages)):
        source = min(name, os.path.relpath(name), key=len)
        stage = data.make_stage(
            name=f"stage{k + 1}",
            source=source,
            own=own,
            others=data.rows_of_other_stages(k, stage_documents, args.replay, args.seed),
            epochs=args.epochs[k],
            lr=args.lr[k],
            batch_size=args.batch_size[k],
            ratio=None if args.select == "none" else args.ratio,
            scores=score.match_precomputed_scores(own, precomputed, source) if args.scores else [],
        )
        stages.append(stage)
    return stages, {name: documents[name] for name in args.eval}, hashes


def set_template(args: argparse.Namespace) -> None:
    """Set `args.template` if it was not given, and print it. A resumed run keeps its template."""
    arguments = read_json_object(args.out / "run.json").get("arguments", {})
    before = arguments.get("template") if isinstance(arguments, dict) else None
    if args.template is None and before in list(TEMPLATES):
        args.template, notes = before, [f"Template {before}: that of the run in {args.out}."]
    else:
        args.template, notes = choose_template(args.model, load_tokenizer(args.model), args.template)
    if is_first_rank():
        print("\n".join(notes))


def validate(args: argparse.Namespace, model: Transformer) -> tuple[list[Stage], dict[str, Documents], dict[str, str]]:
    """Check arguments, config and data before any weight is read. Returns the result of `read_data`, with a sha256 of
    every file read."""
    inputs = [
        args.model,
        *map(Path, [*args.stages, *args.eval, *args.scores]),
        *([args.sample_prompts] if args.sample_prompts else []),
    ]
    check_foreign_files(args.out, [*(f"stage{k + 1}" for k in range(len(args.stages))), "resume", *LOG_FILES], inputs)
    stages, held_out, hashes = read_data(args, first=True)
    tokenizer = load_tokenizer(args.model)
    highest = max(int(documents.tokens.max()) for documents in [*(s.documents for s in stages), *held_out.values()])
    if args.sample_prompts:
        prompts = generate.read_prompts(args.sample_prompts)
        generate.print_later_turns(prompts)
        highest = max(highest, *generate.render_prompts(prompts, tokenizer, args.template))
    data.check_vocabulary(highest, model.config.vocab_size, args.model)
    stop_ids(TEMPLATES[args.template], tokenizer)
    if not args.dry_run or list(args.model.glob("*.safetensors")):  # a plan needs no weights
        find_weight_files(model, args.model)
    hashes |= {str(path): sha256(path) for path in [args.model / "config.json", *tokenizer_files(args.model)]}
    return stages, held_out, hashes


def prepare(args: argparse.Namespace, config: Config) -> tuple[list[Stage], dict[str, Documents]]:
    """On the first rank: validate, print the plan, record the run in run.json. A dry run writes nothing."""
    weights = dataclass_from_args(Weights, args)
    model = build_meta_model(config, weights, compute_dtype(args.dtype))
    stages, held_out, hashes = validate(args, model)
    documents = [*(stage.documents for stage in stages), *held_out.values()]
    arguments = vars(args) | {"dtype": resolve_dtype(args.dtype)}  # "auto" may mean another dtype where a run resumes
    run = describe_run(arguments, {"torch": torch.__version__, "numpy": np.__version__}, hashes)
    run["skipped_rows"] = [line for d in documents for line in d.bad]
    defaults = vars(parse_args(["--stages", *args.stages, "--lr", "5e-4"]))
    before = check_same_run(args.out / "run.json", run, options.RESUMABLE_ARGS, defaults)
    options.world_sizes(args)  # raises InputError if --replicas does not divide them
    print_stages(stages, chosen=args.select != "none")
    n_trained = sum(p.numel() for p in trained_parameters(model).values())
    print_plan(args, model, n_trained, max(int(d.lengths.max()) for d in documents), run["skipped_rows"])
    data.print_unencodable(documents)
    if config.untied_head:
        print(UNTIED_HEAD_NOTE)
    if args.dry_run:
        variants = options.memory_variants(weights)
        largest = partial(data.largest_micro_batch, stages, micro_batch_tokens=args.micro_batch_tokens)
        print_memory_plans(args, variants, partial(build_meta_model, config), trained_parameters, largest)
    else:
        atomic_write(args.out / "run.json", json.dumps(run | {"weights": before.get("weights")}, indent=1))
    return stages, held_out


def resume(state: TrainingState, folder: Path, optimization: Optimization, ranks: DistributedEnv) -> str | None:
    """Restore the newest undamaged state of the folder; returns its name, None if there is none."""
    path = broadcast(newest_state(folder) if ranks.rank == 0 else None)
    if not path:
        return None
    saved, tensors = read_state(path)
    selection = Selection(**saved["progress"].pop("selection"))
    state.progress = Progress(**saved["progress"], selection=selection)
    if optimization.optimizer_state == "reset":
        state.optimizer = stage_optimizer(state.trained, optimization, state.progress.stage)
    restore_training(state, tensors, saved["optimizer"])
    return str(path)


def train(
    args: argparse.Namespace,
    stages: list[Stage],
    held_out: dict[str, Documents],
    ranks: DistributedEnv,
    stop: StopRequest,
    lock: Lock | None,
) -> None:
    """On every rank: build the model, resume if there is a saved state, train."""
    weights, computation = dataclass_from_args(Weights, args), dataclass_from_args(Computation, args)
    optimization = dataclass_from_args(Optimization, args)
    model = build_model(args.model, read_config(args.model), weights, computation, ranks)
    check_weights({hf_name(name): p for name, p in model.named_parameters()}, args.model, args.out)
    trained = trained_parameters(model)
    check_gradients(model, trained, stages[0].documents, ranks)
    stop.deferred = True
    if ranks.rank == 0:
        for stage in stages:
            recover_folder(args.out / stage.name)
    state = TrainingState(trained, stage_optimizer(trained, optimization, 0), Progress(), more_state(trained))
    resumed = resume(state, args.out / "resume", optimization, ranks)
    reached = state.progress
    log = RunLog(args.out if ranks.rank == 0 else None, reached.metrics_size, reached.order_size)
    if resumed:
        at = f"stage {reached.stage + 1}, step {reached.step}" if reached.stage < len(stages) else "all stages done"
        log.info(f"Resuming from {resumed}: {at}.")
    peak = peak_flops(ranks.device, model.compute_dtype)
    run = Run(
        model=model,
        state=state,
        saver=Saver(args.out / "resume", args.save_every, ranks, model, state, log, stop, lock),
        log=log,
        held_out=held_out,
        output=dataclass_from_args(Output, args),
        micro_batch_tokens=args.micro_batch_tokens,
        flops=training_flops(model, set(trained), peak * ranks.world_size if peak else None),
        ranks=ranks,
    )
    with closing(log):
        phased_training(stages, optimization, dataclass_from_args(SelectionOptions, args), run)


def start(args: argparse.Namespace) -> None:
    stop, config, lock = handle_signals_and_parent(), read_config(args.model), None
    set_template(args)
    if args.dry_run:
        if is_first_rank():
            prepare(args, config)
        return
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    store = rendezvous()
    with ExitStack() as stack:
        with first_rank_first(store) as is_first:
            if is_first:
                lock = stack.enter_context(lock_folder(args.out))
                stages, held_out = prepare(args, config)
        with init_distributed(args.replicas, store) as ranks, oom_advice(args.micro_batch_tokens):
            check_shared(args.out / "lock")
            if ranks.rank > 0:  # from the cache that the first has written
                stages, held_out, _ = read_data(args, first=False)
            train(args, stages, held_out, ranks, stop, lock)
        if is_first_rank():
            data.clear_cache(args.out / "cache")  # not needed after a successful run


def main(argv: list[str] | None = None) -> int:
    return run_program("train.py", start, parse_args(argv))


if __name__ == "__main__":
    exit_process(main())
