"""The start of a run of train.py: its data read and checked, the plan printed, run.json written.

`read_data` says what a stage consists of; `prepare` is everything that the first rank does before the others begin.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
import generate
import score
from data import TEMPLATES, Documents
from model import UNTIED_HEAD_NOTE, Config, Transformer, find_weight_files
from parts import memory_plan, options
from parts.checkpoints.run_log import LOG_FILES, check_foreign_files, check_same_run, describe_run, print_stages
from parts.cli import InputError, dataclass_from_args, print_list
from parts.distributed import compute_dtype, is_first_rank
from parts.files import atomic_write, read_json_object, sha256
from parts.memory import free_memory
from parts.options import Weights
from parts.text.tokenizers import load_tokenizer, tokenizer_files

DEMO = Path(__file__).resolve().parent / "demo"
BuildModel = Callable[[Config, Weights, torch.dtype], Transformer]  # on meta
Trained = Callable[[Transformer], dict[str, nn.Parameter]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return options.parse_args(argv, list(TEMPLATES), DEMO)


# ---------------------------------------------------------------- data


@dataclass
class Stage:
    name: str  # stage1, stage2, …
    source: str  # as given to --stages
    own: Documents  # which --select chooses from
    documents: Documents  # these, and behind them rows of other stages
    epochs: int
    lr: float
    batch_size: int
    rows: int  # that an epoch trains on
    scores: list[float]  # of its own documents, where --scores gives them

    @property
    def mixed_in(self) -> int:
        return len(self.documents) - len(self.own)

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
    given = score.read_precomputed_scores({Path(name): documents[name] for name in args.scores})
    of_stages = [documents[name] for name in args.stages]
    stages = [make_stage(args, k, of_stages, given) for k in range(len(of_stages))]
    return stages, {name: documents[name] for name in args.eval}, hashes


def make_stage(args: argparse.Namespace, k: int, of_stages: list[Documents], given: dict[str, float]) -> Stage:
    """Stage k = 0, 1, … of those whose documents are `of_stages`; `given` are the scores of --scores."""
    source, own = min(args.stages[k], os.path.relpath(args.stages[k]), key=len), of_stages[k]
    documents = data.concat([own, *rows_of_other_stages(k, of_stages, args.replay, args.seed)])
    rows, scores = len(own), []
    if args.select != "none":
        scores = score.match_precomputed_scores(own, given, source) if args.scores else []
        usable = ~np.isnan(scores) if scores else score.has_prompt_and_answer(own)
        if not usable.any():
            raise InputError(f"{source}: nothing to choose from, no row has both a prompt and an answer")
        rows = min(score.rows_to_choose(args.ratio, rows), int(usable.sum()))
    return Stage(
        name=f"stage{k + 1}",
        source=source,
        own=own,
        documents=documents,
        epochs=args.epochs[k],
        lr=args.lr[k],
        batch_size=args.batch_size[k],
        rows=rows + len(documents) - len(own),
        scores=scores,
    )


def rows_of_other_stages(k: int, of_stages: list[Documents], replay: float, seed: int) -> list[Documents]:
    """What stage k trains on beside its own rows: a share of every earlier stage (--replay). Stages that overlap would
    take rows of the next one, too. With --select they are neither scored nor left out: every epoch has all of them."""
    rng = np.random.default_rng([seed, k])
    earlier = of_stages[:k] if replay else []
    return [data.subset(d, rng.permutation(len(d))[: round(replay * len(d))]) for d in earlier]


# ---------------------------------------------------------------- checks and plan


def choose_template(args: argparse.Namespace) -> None:
    """Set `args.template` where it was not given, and print which: a run that goes on keeps its own."""
    arguments = read_json_object(args.out / "run.json").get("arguments", {})
    before = arguments.get("template") if isinstance(arguments, dict) else None
    if args.template is None and before in list(TEMPLATES):
        args.template, notes = before, [f"Template {before}: that of the run in {args.out}."]
    else:
        args.template, notes = data.choose_template(args.model, load_tokenizer(args.model), args.template)
    if is_first_rank():
        print("\n".join(notes))


def validate(args: argparse.Namespace, model: Transformer) -> tuple[list[Stage], dict[str, Documents], dict[str, str]]:
    """What can be wrong is found before the first weight is read. Returns stages, held-out documents, and a sha256 of
    every file that was read."""
    stages, held_out, hashes = read_data(args, first=True)
    tokenizer = load_tokenizer(args.model)
    highest = max(int(documents.tokens.max()) for documents in [*(s.documents for s in stages), *held_out.values()])
    if args.sample:
        prompts = generate.read_prompts(args.sample)
        generate.print_later_turns(prompts)
        highest = max(highest, *generate.render_prompts(prompts, tokenizer, args.template))
    data.check_vocabulary(highest, model.config.vocab_size, args.model)
    data.stop_ids(TEMPLATES[args.template], tokenizer)
    if not args.dry_run or list(args.model.glob("*.safetensors")):  # a plan needs no weights
        find_weight_files(model, args.model)
    hashes |= {str(path): sha256(path) for path in [args.model / "config.json", *tokenizer_files(args.model)]}
    return stages, held_out, hashes


def print_plan(
    args: argparse.Namespace, stages: list[Stage], documents: list[Documents], model: Transformer, trained: Trained
) -> None:
    """The stages, what of the rows is left out, and the size of the model."""
    config = model.config
    print_stages(stages, chosen=args.select != "none")
    longest = max(int(d.lengths.max()) for d in documents)
    if args.max_len > config.max_positions and (longest > config.max_positions or args.max_len != options.MAX_LEN):
        print(
            f"--max-len {args.max_len} is above the {config.max_positions:,} positions that {args.model} knows; the "
            f"longest row has {longest:,} tokens",
            file=sys.stderr,
        )
    skipped = [line for d in documents for line in d.bad]
    print_list("rows that cannot be used are left out (run.json lists them all)", skipped)
    data.print_unencodable(documents)
    total, learned = (sum(p.numel() for p in ps) for ps in (model.parameters(), trained(model).values()))
    of = "" if learned == total else f", {learned:,} of them trained"
    name = min(str(args.model), os.path.relpath(args.model), key=len)
    print(f"{name}: {total:,} parameters{of}, {model.compute_dtype} computation.")
    if config.untied_head:
        print(UNTIED_HEAD_NOTE)


def print_memory(
    args: argparse.Namespace, config: Config, stages: list[Stage], build_meta_model: BuildModel, trained: Trained
) -> None:
    """The memory that a rank needs, for each number of ranks: as asked, and with other weights."""
    cuda, plans, world_sizes = args.plan_gpu is not None or torch.cuda.is_available(), {}, options.world_sizes(args)
    dtype = compute_dtype("bf16" if args.plan_gpu is not None and args.dtype == "auto" else args.dtype)
    for way, weights in options.unsupported_combinations(dataclass_from_args(Weights, args)).items():
        model, plans[way] = build_meta_model(config, weights, dtype), {}
        for world_size in world_sizes:
            sizes = [data.largest_micro_batch(s.documents, s.batch_size, world_size, args.micro_tokens) for s in stages]
            plans[way][world_size] = memory_plan.memory_plan(
                model,
                trained=set(trained(model)),
                shards=world_size // args.replicas,
                dtype=dtype,
                tokens=max(tokens for tokens, _ in sizes),
                supervised=max(supervised for _, supervised in sizes),
                checkpointed=args.checkpoint_activations,
                cuda=cuda,
                replicas=args.replicas,
            )
    free = args.plan_gpu * 2**30 if args.plan_gpu is not None else free_memory(torch.device("cuda" if cuda else "cpu"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks that share a CPU's memory; `free` is the share of one
    memory_plan.print_memory_plan(plans, {w: free * (1 if cuda else here / w) for w in world_sizes})


def prepare(
    args: argparse.Namespace, config: Config, build_meta_model: BuildModel, trained: Trained
) -> tuple[list[Stage], dict[str, Documents]]:
    """On the first rank: validate, print the plan, record the run in run.json. Returns stages and held-out documents. A
    dry run writes nothing."""
    model = build_meta_model(config, dataclass_from_args(Weights, args), compute_dtype(args.dtype))
    stages, held_out, hashes = validate(args, model)
    documents = [*(stage.documents for stage in stages), *held_out.values()]
    run = describe_run(vars(args), {"torch": torch.__version__, "numpy": np.__version__}, hashes)
    run["skipped_rows"] = [line for d in documents for line in d.bad]
    defaults = vars(parse_args(["--stages", *args.stages, "--lr", "5e-4"]))
    before = check_same_run(args.out / "run.json", run, options.RESUMABLE_ARGS, defaults)
    options.world_sizes(args)  # which raises where --replicas does not divide them
    print_plan(args, stages, documents, model, trained)
    if args.dry_run:
        print_memory(args, config, stages, build_meta_model, trained)
    else:
        atomic_write(args.out / "run.json", json.dumps(run | {"weights": before.get("weights")}, indent=1))
    return stages, held_out


def check_out_folder(args: argparse.Namespace) -> None:
    """Raise InputError for an --out that is not this run's to write."""
    inputs = [args.model, *map(Path, [*args.stages, *args.eval, *args.scores]), *([args.sample] if args.sample else [])]
    written = [*(f"stage{k + 1}" for k in range(len(args.stages))), "resume", *LOG_FILES]
    check_foreign_files(args.out, written, inputs)
