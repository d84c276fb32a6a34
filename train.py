"""Phased instruction fine-tuning: train on stage 1, go on from the result with stage 2, then stage 3.

    torchrun train.py --stages s1 s2 s3

Without arguments it trains the bundled demo. `phased_training` is the algorithm, `batch_gradients` its step, `Run` what
survives a kill. Above them stand the arguments, the data and the model; below them the start.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

import data
import generate
import score
from data import TEMPLATES, Documents
from model import Config, Transformer, find_weights, hf_name, load_weights, read_config, save_model, weights_dtype
from parts import cost, options
from parts.adamw import StochasticAdamW
from parts.distributed import (
    Ranks,
    all_reduce,
    broadcast,
    check_shared,
    compute_dtype,
    gradient_norm,
    is_first_rank,
    join_ranks,
    reshard,
)
from parts.memory import free_memory, memory_in_use
from parts.options import Computation, Optimization, Output, Weights
from parts.program import (
    InputError,
    Interrupted,
    Stop,
    WorkError,
    aside,
    catch_signals,
    from_arguments,
    leave,
    listed,
    print_listed,
    print_table,
    printable,
    progress,
    read_json_object,
    remove,
    run_program,
    sha256,
    write_file,
)
from parts.record import GrowingFile, StepLog, check_same_run, describe_run, refuse_foreign, write_forgetting
from parts.state import check_optimizer, newest_state, read_state, restore_state, save_training
from parts.store import lock_folder
from parts.tokenizers import copy_tokenizer, load_tokenizer, tokenizer_files
from parts.weights import checksum, local_part, refuse_nan
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
    data.refuse_bad_rows(used, args.skip_bad_rows)
    given = score.given_ifd({Path(name): documents[name] for name in args.scores})
    stages = []
    for k, name in enumerate(args.stages):
        rng = np.random.default_rng([args.seed, k])
        earlier = [documents[n] for n in args.stages[:k] if args.replay]
        replay = [data.take(d, rng.permutation(len(d))[: round(args.replay * len(d))]) for d in earlier]
        source, all_rows = min(name, os.path.relpath(name), key=len), data.join([documents[name], *replay])
        rows, ifd = len(all_rows), []
        if args.select != "none":
            ifd = score.matching_ifd(all_rows, given, source) if args.scores else []
            usable = ~np.isnan(ifd) if ifd else score.scorable(all_rows)
            if not usable.any():
                raise InputError(f"{source}: nothing to choose from, no row has both a prompt and an answer")
            rows = min(score.count_of(args.ratio, rows), int(usable.sum()))
        replayed = sum(map(len, replay))
        stage = (f"stage{k + 1}", source, all_rows, replayed, args.epochs[k], args.lr[k], args.batch_size[k], rows, ifd)
        stages.append(Stage(*stage))
    return stages, {name: documents[name] for name in args.eval}, hashes


def print_stages(stages: list[Stage], chosen: bool) -> None:
    table = []
    for s in stages:
        numbers = [s.replayed, s.documents.lengths.sum(), s.documents.target_counts.sum(), s.documents.lengths.max()]
        numbers += [s.documents.truncated, s.documents.lost_tokens, s.epochs, s.batch_size, s.steps]
        rows = f"{s.rows:,} of {len(s.documents):,}" if chosen else f"{len(s.documents):,}"
        table.append((f"{s.name} {s.source}", rows, *(f"{n:,}" for n in numbers), f"{s.lr:g}"))
    what = "stage, rows, replayed, tokens, supervised, longest, truncated, tokens cut, epochs, batch, steps, lr"
    print_table(tuple(what.split(", ")), table)


# ---------------------------------------------------------------- the model and what is trained of it


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def outline(config: Config, weights: Weights, dtype: torch.dtype) -> Transformer:
    """The model as it is trained, on meta: without memory. `dtype` is that of the computation; beside adapters (LoRA)
    the frozen weights have it, too."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype if weights.lora else DTYPES[weights.weights])
        if weights.lora:
            model.add_adapters(weights.lora, weights.lora_alpha, weights.lora_targets)
    model.compute_dtype = dtype
    return model


def build_model(folder: Path, config: Config, weights: Weights, computation: Computation, ranks: Ranks) -> Transformer:
    """The model of an HF folder, sharded over the ranks (FSDP2). Each rank reads its part."""
    dtype = compute_dtype(computation.dtype)
    model = outline(config, weights, dtype)
    files = find_weights(model, folder)
    for block in model.layers:
        block.checkpointed = computation.checkpoint_activations
        if computation.compile:
            block.compute = torch.compile(block.compute, dynamic=True)
    if ranks.world_size > 1:  # a rank alone would only make copies
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in [*model.layers, model]:
            fully_shard(part, mesh=ranks.mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "next_logits")  # for --sample
    elif ranks.device.type == "cpu":
        model.embed.sparse = True  # its gradient only at the words that occur
    model.to_empty(device=ranks.device)
    load_weights(model, files)
    model.init_adapters(weights.seed)
    return model


def trained_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """Which parameters are trained, by name: the adapters where there are some (LoRA), else all. Step, optimizer,
    clipping, saved state, memory plan and MFU ask here.

    To freeze some, leave them out of `chosen` (or freeze them before): what is not trained gets no gradient.
    """
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if model.adapted():
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


def check_reached(model: Transformer, trained: dict[str, nn.Parameter], documents: Documents, ranks: Ranks) -> None:
    """Raise ValueError where the loss does not depend on a trained parameter, which then would never move."""
    loss, _ = model(*(torch.from_numpy(a).to(ranks.device) for a in documents.flat(np.array([0]))))
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
    ranks: Ranks,
    between: Callable[[], None],
) -> float:
    """Leaves in every `p.grad` the gradient of the mean loss over the supervised tokens of the whole batch (sharded, if
    p is), and returns that loss. It does not depend on how the batch is cut into micro-batches or dealt to ranks, up to
    floating-point order. `between` is called before every micro-batch, on all ranks alike; it may save what is, and
    raise.
    """
    supervised = int(documents.target_counts[batch].sum())
    total = torch.zeros((), device=ranks.device)
    for p in trained.values():  # kept from step to step: made anew, they would scatter a CPU's memory
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    for part in data.micro_batches(batch, documents.lengths, ranks.world_size, micro_tokens)[ranks.rank]:
        between()
        loss, _ = model(*(torch.from_numpy(a).to(ranks.device) for a in documents.flat(part)))  # summed over tokens
        (loss * (ranks.world_size / supervised)).backward()  # FSDP takes the mean over ranks
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / supervised


def clip_gradients(trained: dict[str, nn.Parameter], most: float, ranks: Ranks) -> float:
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
    model: Transformer, documents: Documents, micro_tokens: int, ranks: Ranks, between: Callable[[], None]
) -> float:
    """Mean loss over all supervised tokens; `between` as in `batch_gradients`."""
    total = torch.zeros((), device=ranks.device, dtype=torch.float64)
    everything = np.arange(len(documents))
    for part in data.micro_batches(everything, documents.lengths, ranks.world_size, micro_tokens)[ranks.rank]:
        between()
        _, losses = model(*(torch.from_numpy(a).to(ranks.device) for a in documents.flat(part)))
        total += losses.double().sum()
    reshard(model)
    dist.all_reduce(total)
    return total.item() / int(documents.target_counts.sum())


# ---------------------------------------------------------------- the algorithm


def phased_training(
    stages: list[Stage],
    model: Transformer,
    trained: dict[str, nn.Parameter],
    optimization: Optimization,
    selection: SelectionOptions,
    run: "Run",
) -> None:
    """Train on each stage in turn, from the weights that the one before it left (Phased IFT, section 3)."""
    done = run.done
    for k in range(done.stage, len(stages)):
        stage = stages[k]
        if done.step == 0 and optimization.optimizer_state == "reset":  # the paper: every stage is a run of its own
            run.optimizer = make_optimizer(trained, optimization)
            check_optimizer(run.optimizer, trained)
        run.log.begin(stage.name, stage.steps, done.step)
        for epoch in range(done.step // stage.steps_per_epoch, stage.epochs):
            rows = np.arange(len(stage.documents))
            if selection.select != "none":
                rows = run.select(stage, epoch, selection)  # IterIT
            batches = data.epoch_batches(stage.documents, rows, stage.batch_size, optimization.seed, k, epoch)
            for batch in batches[done.step - epoch * stage.steps_per_epoch :]:
                run.evaluate_if_due(stage)
                started, how = time.perf_counter(), (run.micro_tokens, run.ranks, run.save_if_due)
                loss = batch_gradients(model, trained, stage.documents, batch, *how)
                norm = clip_gradients(trained, optimization.clip, run.ranks)
                step, steps = done.step, stage.steps
                if optimization.optimizer_state == "keep":
                    step, steps = done.global_step, sum(s.steps for s in stages)
                lr = learning_rate(step, steps, stage.lr, optimization.schedule, optimization.warmup_ratio)
                if math.isfinite(loss) and math.isfinite(norm):
                    for group in run.optimizer.param_groups:
                        group["lr"] = lr * group.get("lr_scale", 1.0)
                    run.optimizer.step()
                else:
                    run.skip_step(stage, batch, loss, norm, optimization.skip_nonfinite)
                run.finish_step(stage, epoch, batch, loss, lr, norm, time.perf_counter() - started)
        run.finish_stage(stage, last=stage is stages[-1])


# ---------------------------------------------------------------- what survives a kill


@dataclass
class Progress:
    """How far a run is, as its saved state holds it. Counts what is finished: stage 1, step 0 begins the second
    stage."""

    stage: int = 0
    step: int = 0  # of the stage
    global_step: int = 0
    skipped: int = 0  # steps left out because they were not finite
    evaluated: int = -1  # the global step at which the held-out loss was measured last
    metrics_size: int = 0  # of metrics.jsonl, in bytes
    order_size: int = 0  # of order.jsonl
    selection: Selection = field(default_factory=Selection)  # of this stage


class Run:
    """A run of training: its progress, saving and stopping. Every rank has one and calls the same methods; the first
    rank writes and speaks."""

    def __init__(
        self,
        output: Output,
        ranks: Ranks,
        model: Transformer,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        held_out: dict[str, Documents],
        micro_tokens: int,
        stages: int,
        stop: Stop,
    ):
        self.output, self.ranks, self.held_out, self.micro_tokens = output, ranks, held_out, micro_tokens
        self.model, self.trained, self.optimizer = model, trained, optimizer
        self.done, self.stop, self.last_saved = Progress(), stop, time.monotonic()
        stop.patient = True
        found = broadcast(newest_state(output.out / "resume") if ranks.rank == 0 else None)
        if found:
            state, tensors = read_state(found)
            selection = Selection(**state["progress"].pop("selection"))
            self.done = Progress(**state["progress"], selection=selection)
            restore_state(tensors, state["optimizer"], trained, optimizer)
        self.log = StepLog(output.out / "metrics.jsonl" if ranks.rank == 0 else None, self.done.metrics_size)
        self.order = GrowingFile(output.out / "order.jsonl", self.done.order_size) if ranks.rank == 0 else None
        if found:
            at = f"stage {self.done.stage + 1}, step {self.done.step}"
            self.log.say(f"Going on from {found}: {'all stages done' if self.done.stage == stages else at}.")
        self.flops = cost.training_flops(model, set(trained))
        peak = cost.peak_flops(ranks.device, model.compute_dtype)
        self.peak = peak * ranks.world_size if peak else None

    def save(self) -> None:
        reshard(self.model)
        self.done.metrics_size, self.done.order_size = self.log.size, self.order.size if self.order else 0
        name, progress = f"{self.done.stage:03}-{self.done.step:08}", asdict(self.done)
        save_training(self.output.out / "resume", name, self.ranks, self.trained, self.optimizer, progress)
        self.last_saved = time.monotonic()

    def save_if_due(self, after_step: bool = False) -> None:
        """Save when the time (`after_step`: or the step) has come. When any rank was told to stop, save and end."""
        every = self.output.save_every
        late = every is None and time.monotonic() - self.last_saved > 600
        stop, due = all_reduce([self.stop.asked, late])
        if stop or due or (after_step and every and self.done.global_step % every == 0):
            self.save()
        if stop:
            raise Interrupted(f"state saved in {self.output.out / 'resume'}; the same command goes on")

    def select(self, stage: Stage, epoch: int, options: SelectionOptions) -> np.ndarray:
        """IterIT: the documents that an epoch trains on, best first; chosen now if they have not been."""
        selection, started = self.done.selection, time.perf_counter()
        if selection.epoch == epoch or (selection.epoch >= 0 and options.select == "static"):
            return np.array(selection.chosen)
        if selection.scoring < 0:
            selection.ifd = list(stage.ifd)
        given, tokenizer = epoch == 0 and bool(stage.ifd), load_tokenizer(self.output.model)
        scoring = score.renew(
            selection, options, self.model, stage.documents, tokenizer, epoch, stage.rows, self.ranks, self.micro_tokens
        )
        with progress(0, f"{stage.name} IFD", "row", shown=self.ranks.rank == 0) as bar:
            for scored, bar.total in scoring:
                bar.update(scored - bar.n)
                self.save_if_due()
        scored, seconds = 0 if given else len(selection.candidates), time.perf_counter() - started
        ifd = np.array(selection.ifd)[selection.chosen]
        row = {"stage": stage.name, "epoch": epoch + 1, "scored": scored, "chosen": len(ifd)}
        self.log.write(row | {"seconds": round(seconds, 4)})
        if self.ranks.rank == 0:
            file = self.output.out / stage.name / f"selection-epoch{epoch}.jsonl"
            score.write_selection(file, stage.documents, selection)
        hard = int((ifd >= 1).sum())
        more = f"; {hard:,} of them at 1 or above, since no better were left" if hard else ""
        self.log.say(
            f"{stage.name}, epoch {epoch + 1}: {scored:,} rows scored in {seconds:.1f} s, {len(ifd):,} of "
            f"{len(selection.candidates):,} chosen, IFD {ifd.min():.3f} to {ifd.max():.3f}{more}"
        )
        return np.array(selection.chosen)

    def evaluate_if_due(self, stage: Stage) -> None:
        """Before a step: at the run's start, and every `eval_every` steps."""
        step, every = self.done.global_step, self.output.eval_every
        if step == 0 or (every and step % every == 0):
            self.evaluate("start" if step == 0 else stage.name)

    def evaluate(self, label: str) -> str:
        """Log the held-out losses, unless they are known for this step. Returns them in words."""
        if self.done.evaluated == self.done.global_step:
            return ""
        losses = {
            name: held_out_loss(self.model, documents, self.micro_tokens, self.ranks, self.save_if_due)
            for name, documents in self.held_out.items()
        }
        for name, loss in losses.items():
            row = {"stage": label, "global_step": self.done.global_step, "eval": name, "eval_loss": loss}
            self.log.write(row)
            if label == "start":
                self.log.say(f"start: held-out loss {loss:.4f} ({name})")
        self.done.evaluated = self.done.global_step
        return "".join(f", held-out loss {loss:.4f} ({name})" for name, loss in losses.items())

    def skip_step(self, stage: Stage, batch: np.ndarray, loss: float, norm: float, most: int) -> None:
        """Leave out a step that is not finite, or save and raise WorkError when `most` have been."""
        if self.done.skipped < most:
            self.done.skipped += 1
            return
        self.save()
        rows = [f"{stage.documents.ids[d]} ({stage.documents.where[d]})" for d in batch]
        if self.ranks.rank > 0:
            raise WorkError("")  # the first rank says it
        raise WorkError(
            f"{stage.name}, step {self.done.step + 1}: the loss is {loss}, the gradient's norm {norm}. The weights "
            f"before this step are kept in {self.output.out / 'resume'}. "
            + listed("The rows of this batch:", rows)
            + "\nLook at these rows and at the learning rate; --skip-nonfinite N goes on, skipping up to N such steps."
        )

    def finish_step(
        self, stage: Stage, epoch: int, batch: np.ndarray, loss: float, lr: float, norm: float, seconds: float
    ) -> None:
        """Count it, log it, save if due."""
        self.done.step += 1
        self.done.global_step += 1
        done, lengths = self.done, stage.documents.lengths[batch]
        supervised, tokens = int(stage.documents.target_counts[batch].sum()), int(lengths.sum())
        flops = self.flops.of_batch(lengths, supervised)
        row = {"stage": stage.name, "step": done.step, "global_step": done.global_step, "epoch": epoch + 1}
        row |= {"loss": loss, "lr": lr, "grad_norm": norm, "documents": len(batch), "tokens": tokens}
        row |= {"supervised": supervised, "seconds": round(seconds, 4)}
        row |= {"mfu": round(flops / seconds / self.peak, 4) if self.peak else None}
        self.log.step(row | {"memory_bytes": memory_in_use(self.ranks.device)})
        if self.order:
            ids = [stage.documents.ids[d] for d in batch]
            self.order.write({"stage": stage.name, "step": done.step, "epoch": epoch + 1, "ids": ids})
        self.save_if_due(after_step=True)

    def finish_stage(self, stage: Stage, last: bool) -> None:
        """Save (the rest may take long, and is done again after a kill), measure, sample, export, count it."""
        self.save()
        held_out, folder, samples = self.evaluate(stage.name), self.output.out / stage.name, None
        if self.output.sample:
            tokenizer = load_tokenizer(self.output.model)
            answering = generate.answer_samples(self.model, tokenizer, self.output.template, self.output.sample)
            for samples in answering:  # noqa: B007 (the last is all)
                self.save_if_due()
            reshard(self.model)
        export(folder, self.model, self.output, self.ranks, samples)
        self.done.stage, self.done.step, self.done.selection = self.done.stage + 1, 0, Selection()
        self.log.say(f"{stage.name} ({stage.source}): {stage.steps} steps, {self.log.end()}{held_out} -> {folder}")
        for row in (samples or [])[:5]:
            self.log.say(f"  {printable(row['instruction'])[:100]!r} -> {printable(row['output'])[:160]!r}")
        if last:
            self.optimizer.state.clear()
            self.save()
            if self.held_out and self.ranks.rank == 0:
                write_forgetting(self.output.out)


def export(folder: Path, model: Transformer, output: Output, ranks: Ranks, samples: list[dict] | None) -> None:
    """Write a stage's HF folder: weights, config, tokenizer, generation settings, template, samples. All or nothing."""
    new = aside(folder)
    try:
        if ranks.rank == 0:
            remove(new)
        dist.barrier()
        save_model(model, new, DTYPES.get(output.save_dtype) or weights_dtype(model, output.model), output.model)
        if ranks.rank == 0:
            template = TEMPLATES[output.template]
            tokenizer = load_tokenizer(output.model)
            stop_ids = data.stop_ids(template, tokenizer)
            copy_tokenizer(output.model, new, data.chat_template(template, tokenizer), stop_ids)
            write_file(new / "template.json", json.dumps({"template": output.template}))
            if samples is not None:
                write_file(new / "samples.json", json.dumps(samples, indent=1, ensure_ascii=False))
            for path in folder.glob("selection-epoch*.jsonl"):
                shutil.copyfile(path, new / path.name)
            remove(folder)
            os.replace(new, folder)
    except (OSError, WorkError) as e:
        if ranks.rank == 0:
            remove(new)
        raise WorkError(f"{folder} could not be written ({e}): make room and give the same command again") from None
    dist.barrier()


# ---------------------------------------------------------------- the start


def claim_folder(args: argparse.Namespace):
    """Refuse an --out that is not this run's to write; else hold its lock, which goes with the process."""
    inputs = [args.model, *map(Path, [*args.stages, *args.eval, *args.scores]), *([args.sample] if args.sample else [])]
    written = [f"stage{k + 1}" for k in range(len(args.stages))]
    refuse_foreign(args.out, [*written, "resume", "metrics.jsonl", "order.jsonl", "held_out.json"], inputs)
    return None if args.dry_run else lock_folder(args.out)


def print_plan(args: argparse.Namespace, config: Config, stages: list[Stage], worlds: list[int]) -> None:
    """The memory that a rank needs, for each number of ranks: as asked, and with other weights."""
    cuda, planned = args.plan_gpu is not None or torch.cuda.is_available(), {}
    dtype = compute_dtype("bf16" if args.plan_gpu is not None and args.dtype == "auto" else args.dtype)
    for way, weights in options.other_ways(from_arguments(Weights, args)).items():
        model = outline(config, weights, dtype)
        trained, planned[way] = set(trained_parameters(model)), {}
        for world in worlds:
            found = [data.largest_micro_batch(s.documents, s.batch_size, world, args.micro_tokens) for s in stages]
            most = (max(numbers) for numbers in zip(*found))  # tokens, supervised
            how = (world // args.replicas, dtype, *most, args.checkpoint_activations, cuda)
            planned[way][world] = cost.memory_plan(model, trained, *how)
    free = args.plan_gpu * 2**30 if args.plan_gpu is not None else free_memory(torch.device("cuda" if cuda else "cpu"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks that share a CPU's memory; `free` is the share of one
    cost.print_memory(planned, {w: free * (1 if cuda else here / w) for w in worlds})


def check_everything(args: argparse.Namespace, config: Config) -> tuple[list[Stage], dict[str, Documents]]:
    """What can be wrong is found before the first weight is read; the plan is printed, run.json written. A dry run
    writes nothing."""
    model = outline(config, from_arguments(Weights, args), compute_dtype(args.dtype))
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
    before = check_same_run(args.out / "run.json", description, options.FREE, defaults)
    worlds = [int(os.environ.get("WORLD_SIZE", 1)), *([args.plan_world_size] if args.plan_world_size else [])]
    if uneven := [str(world) for world in worlds if world % args.replicas]:
        raise InputError(f"--replicas {args.replicas} does not divide {' and '.join(uneven)} ranks")
    print_stages(stages, chosen=args.select != "none")
    print_listed("rows that cannot be used are left out (run.json lists them all)", description["skipped_rows"])
    data.print_lossy(everything)
    total, trained = sum(p.numel() for p in model.parameters()), trained_parameters(model)
    learned = sum(p.numel() for p in trained.values())
    of = "" if learned == total else f", {learned:,} of them trained"
    name, dtype = min(str(args.model), os.path.relpath(args.model), key=len), compute_dtype(args.dtype)
    print(f"{name}: {total:,} parameters{of}, {dtype} computation.")
    if not args.dry_run or list(args.model.glob("*.safetensors")):  # a plan needs no weights
        find_weights(model, args.model)
    if args.dry_run:
        print_plan(args, config, stages, worlds)
    else:
        description["weights"] = before.get("weights")
        write_file(args.out / "run.json", json.dumps(description, indent=1))
    return stages, held_out


def check_weights(model: Transformer, folder: Path, out: Path) -> None:
    """Raise InputError, on every rank, where the weights just loaded hold NaN or are not those that the run began
    with."""
    parameters, path = dict(model.named_parameters()), out / "run.json"
    refuse_nan({hf_name(name): p for name, p in parameters.items()}, folder)
    found, description = checksum(parameters), broadcast(read_json_object(path))
    if description["weights"] not in (None, found):
        raise InputError(f"the weights in {folder} are not those with which the run in {out} began: give another --out")
    if dist.get_rank() == 0:
        write_file(path, json.dumps(description | {"weights": found}, indent=1))


def choose_template(args: argparse.Namespace) -> list[str]:
    """Set `args.template` where it was not given: a run that goes on keeps its own. Returns what to say of it."""
    arguments = read_json_object(args.out / "run.json").get("arguments", {})
    before = arguments.get("template") if isinstance(arguments, dict) else None
    if args.template is None and before in TEMPLATES:
        args.template = before
        return [f"Template {before}: that of the run in {args.out}."]
    args.template, notes = data.choose_template(args.model, load_tokenizer(args.model), args.template)
    return notes


def start(args: argparse.Namespace) -> None:
    config = read_config(args.model)
    template_notes = choose_template(args)
    weights = from_arguments(Weights, args)
    if is_first_rank():  # the others wait for it to join them, then take what it has cached
        with catch_signals():
            lock = claim_folder(args)
            print("\n".join(template_notes))
            stages, held_out = check_everything(args, config)
    if args.dry_run:
        return
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    optimization, output = from_arguments(Optimization, args), from_arguments(Output, args)
    with join_ranks(args.replicas) as ranks, catch_signals() as stop:
        check_shared(args.out / "lock")
        if ranks.rank > 0:
            stages, held_out, _ = read_data(args, first=False)
        try:
            model = build_model(args.model, config, weights, from_arguments(Computation, args), ranks)
            check_weights(model, args.model, args.out)
            trained = trained_parameters(model)
            check_reached(model, trained, stages[0].documents, ranks)
            optimizer = make_optimizer(trained, optimization)
            check_optimizer(optimizer, trained)
            run = Run(output, ranks, model, trained, optimizer, held_out, args.micro_tokens, len(stages), stop)
            phased_training(stages, model, trained, optimization, from_arguments(SelectionOptions, args), run)
        except torch.OutOfMemoryError as e:
            ways = f"--micro-tokens {args.micro_tokens // 2}, --checkpoint-activations, --weights bf16 or --lora 16"
            raise WorkError(f"out of GPU memory: try {ways}; --dry-run says what they need ({e})") from None
    if is_first_rank():
        lock.close()
        data.clear_cache(args.out / "cache")  # a run that ended well needs it no more


def main(argv: list[str] | None = None) -> int:
    return run_program("train.py", start, parse_args(argv))


if __name__ == "__main__":
    leave(main())
