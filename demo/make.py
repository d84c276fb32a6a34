"""Make the demo: text for pre-training, a tokenizer, a tiny Llama with random weights, and instructions scored from 1
to 5.

    python demo/make.py --out demo/build

A task applies one to three operations to a word, a number, a list, two numbers or a person. The text states tasks with
their results ("if you take the word kamot, reverse it, then repeat it, you get tomak; tomaktomak."), so that a
pre-trained model can do all the operations; it has never seen an instruction ("Take the word kamot, reverse it, then
repeat it."). The difficulty of a task is a sum of several factors that mix in every stage: the number of operations,
the hardest operation, the length or rarity of the start value, distracting words, and a demand on the form of the
answer. The score is the rank of the difficulty plus a grader's noise, with shares of 59, 28 and 13 % as in the paper.
demo/build.sh runs all steps.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Transformer, init_weights, save_model
from parts.checkpoints.config import parse_config
from parts.files import write_lines

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

# ---------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operation:
    statement: str  # its form in the text when it is stated alone
    phrases: tuple[str, ...]  # its forms after "if you …" and in an instruction
    result_kind: str
    hardness: float
    apply: Callable


def swap_ends(w: str) -> str:
    return w[-1] + w[1:-1] + w[0] if len(w) > 1 else w


def number_in_words(n: int) -> str:
    ones = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    ones = (ones + "seventeen eighteen nineteen").split()
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    return ones[n] if n < 20 else tens[n // 10 - 2] + ("-" + ones[n % 10] if n % 10 else "")


COLOURS = ("red", "blue", "green", "white", "black", "brown", "yellow", "purple")
TRADES = ("baker", "smith", "weaver", "hunter", "farmer", "teacher", "singer", "potter")

# fmt: off
OPERATIONS = {  # by the kind of value they apply to
    "word": [
        Operation("{} backwards is", ("reverse it", "write it backwards", "spell it from the end"), "word", 0.9,
                  lambda w: w[::-1]),
        Operation("{} in capitals is", ("write it in capitals", "put it in upper case"), "word", 0.3, str.upper),
        Operation("{} without its first letter is", ("drop its first letter", "leave out the first letter"), "word",
                  0.2, lambda w: w[1:]),
        Operation("{} without its last letter is", ("drop its last letter", "leave out the last letter"), "word", 0.2,
                  lambda w: w[:-1]),
        Operation("{} written twice is", ("repeat it", "write it twice"), "word", 0.3, lambda w: w + w),
        Operation("{} with its first letter at the end is",
                  ("move its first letter to the end", "put the first letter last"), "word", 0.6,
                  lambda w: w[1:] + w[0]),
        Operation("{} with its ends swapped is", ("swap its first and last letters", "swap the two ends"), "word", 1.0,
                  swap_ends),
        Operation("{} without its vowels is", ("leave out its vowels", "keep only the consonants"), "word", 1.0,
                  lambda w: "".join(c for c in w if c not in "aeiouAEIOU")),
        Operation("{} spelled with dashes is", ("put dashes between its letters", "spell it with dashes"), "word", 0.6,
                  "-".join),
        Operation("the first letter of {} is", ("take its first letter", "keep only the first letter"), "word", 0.0,
                  lambda w: w[0]),
        Operation("the last letter of {} is", ("take its last letter", "keep only the last letter"), "word", 0.1,
                  lambda w: w[-1]),
        Operation("the number of letters in {} is", ("count its letters", "say how many letters it has"), "number", 0.6,
                  len),
    ],
    "number": [
        Operation("one more than {} is", ("add one", "add 1 to it"), "number", 0.1, lambda n: n + 1),
        Operation("one less than {} is", ("take away one", "subtract 1 from it"), "number", 0.2, lambda n: n - 1),
        Operation("ten more than {} is", ("add ten", "add 10 to it"), "number", 0.2, lambda n: n + 10),
        Operation("twice {} is", ("double it", "multiply it by 2"), "number", 0.6, lambda n: 2 * n),
        Operation("{} in words is", ("write it in words", "spell it out"), "text", 0.6, number_in_words),
        Operation("the last digit of {} is", ("take its last digit", "keep only the last digit"), "number", 0.0,
                  lambda n: n % 10),
        Operation("nine less {} is", ("take nine minus it", "subtract it from 9"), "number", 0.9, lambda n: 9 - n),
    ],
    "pair": [
        Operation("the larger of {} is", ("pick the larger one", "keep the larger number"), "number", 0.4, max),
        Operation("the smaller of {} is", ("pick the smaller one", "keep the smaller number"), "number", 0.4, min),
        Operation("the sum of {} is", ("add them up", "take their sum"), "number", 1.2, sum),
    ],
    "list": [
        Operation("the first of {} is", ("take the first item", "pick the first"), "word", 0.0, lambda s: s[0]),
        Operation("the last of {} is", ("take the last item", "pick the last"), "word", 0.2, lambda s: s[-1]),
        Operation("the second of {} is", ("take the second item", "pick the second"), "word", 0.4, lambda s: s[1]),
        Operation("{} in reverse order is", ("turn the list around", "reverse the order"), "list", 0.7,
                  lambda s: s[::-1]),
        Operation("{} without the first is", ("drop the first item", "leave out the first item"), "list", 0.3,
                  lambda s: s[1:]),
        Operation("{} without the last is", ("drop the last item", "leave out the last item"), "list", 0.3,
                  lambda s: s[:-1]),
        Operation("{} in alphabetical order is", ("sort the items", "put them in alphabetical order"), "list", 1.2,
                  sorted),
        Operation("{} joined is", ("join the items", "write them as one word"), "word", 0.5, "".join),
        Operation("the number of items in {} is", ("count the items", "say how many items there are"), "number", 0.3,
                  len),
    ],
    "person": [],  # filled by `World` with the facts about people
    "text": [],  # no operation applies to text
}
DISTRACTIONS = (
    "which my aunt wrote on a wall", "as found in an old letter", "which nobody asked about before",
    "while it rains outside", "as the teacher said on Monday", "which was printed in small type", "though it is late",
    "just as the children did", "which came up twice last week", "with the window open", "as on page 9 of the book",
    "whatever the others think",
)
# fmt: on
DISTRACTION_HARDNESS = 0.7  # added for each distraction

OPENINGS = {
    "word": ("take the word {}", "start with the word {}", "look at the word {}"),
    "number": ("take the number {}", "start with the number {}", "begin with {}"),
    "pair": ("take the numbers {}", "look at the numbers {}"),
    "list": ("take the list {}", "start with the items {}", "look at the list {}"),
    "person": ("think of {}", "look up {}"),
}


@dataclass(frozen=True)
class Form:
    """A form of the answer that an instruction asks for."""

    phrase: str  # "" for the default form: the results in order
    hardness: float
    share: float
    write: Callable  # (start, results) -> the answer


FORMS = [
    Form("", 0.0, 0.46, lambda start, results: "; ".join(results)),
    Form("put every result in brackets", 0.4, 0.11, lambda start, results: " ".join(f"[{r}]" for r in results)),
    Form(
        "number the results", 0.5, 0.10, lambda start, results: "; ".join(f"{i} {r}" for i, r in enumerate(results, 1))
    ),
    Form("begin with what was given", 0.5, 0.10, lambda start, results: "; ".join([start, *results])),
    Form("say done at the end", 0.3, 0.10, lambda start, results: "; ".join([*results, "done"])),
    Form("give only the last result", 1.3, 0.13, lambda start, results: results[-1]),
]


def format_value(value) -> str:
    if isinstance(value, tuple):
        return f"{value[0]} and {value[1]}"
    return " ".join(value) if isinstance(value, list) else str(value)


def is_small(value) -> bool:
    """Whether a value is small enough for every operation and for a short text."""
    if isinstance(value, int):
        return 0 <= value < 100
    return 2 <= len(value) <= 5 if isinstance(value, list) else 1 <= len(value) <= 14


def make_word(rng: random.Random, min_length: int = 3, max_length: int = 7) -> str:
    """A made-up word of consonants and vowels in turn."""
    letters = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4))
    return letters[rng.randint(0, 1) :][: rng.randint(min_length, max_length)]


class World:
    """People and facts about them, shared by text and instructions. Some people occur much more often than others."""

    def __init__(self, seed: int, people: int = 60):
        rng = random.Random(seed)
        towns = [make_word(rng, 4, 6) for _ in range(12)]
        self.people = list(dict.fromkeys(make_word(rng, 4, 6).capitalize() for _ in range(2 * people)))[:people]
        self.weights = [1 / (i + 4) for i in range(people)]
        self.facts = {p: (rng.choice(towns), rng.choice(COLOURS), rng.choice(TRADES)) for p in self.people}
        questions = [
            ("the town of {} is", ("name the town", "say which town is home"), "word"),
            ("the colour of {} is", ("name the favourite colour", "say which colour is liked best"), "word"),
            ("the trade of {} is", ("name the trade", "say what the work is"), "word"),
        ]
        lookups = [Operation(*q, 0.2, lambda p, i=i: self.facts[p][i]) for i, q in enumerate(questions)]
        self.operations = OPERATIONS | {"person": lookups}

    def draw_start(self, rng: random.Random) -> tuple[str, object, float]:
        """The start of a task: a kind, a value of this kind, and the difficulty that the value adds."""
        kind = rng.choices(("word", "number", "pair", "list", "person"), (5, 2, 1, 4, 2))[0]
        if kind == "word":
            value = make_word(rng)
            return kind, value, 0.12 * (len(value) - 3)
        if kind == "number":
            value = rng.randrange(100)
            return kind, value, 0.3 * (value > 9)
        if kind == "pair":
            return kind, (rng.randrange(50), rng.randrange(50)), 0.3
        if kind == "list":
            value = [make_word(rng, 2, 4) for _ in range(rng.randint(3, 5))]
            return kind, value, 0.2 * (len(value) - 3)
        i = rng.choices(range(len(self.people)), self.weights)[0]
        return kind, self.people[i], 1.0 * i / len(self.people)


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    kind: str
    start: str
    phrases: tuple[str, ...]  # one per operation
    operations: tuple[str, ...]  # their statements, which identify them
    distractions: tuple[str, ...]
    form: Form
    opening: str
    answer: str
    difficulty: float

    @property
    def twin(self) -> tuple:
        """Equal for near duplicates: tasks with the same operations on the same start value."""
        return self.start, self.operations

    def body(self) -> str:
        start = self.opening.format(self.start)
        return ", ".join([start, *self.distractions, self.phrases[0], *(f"then {p}" for p in self.phrases[1:])])

    def statement(self) -> str:
        """The form of the task in the text, up to the answer."""
        return f"if you {self.body()}{', and ' + self.form.phrase if self.form.phrase else ''}, you get"

    def instruction(self) -> str:
        body = self.body()
        form = f" {self.form.phrase[0].upper()}{self.form.phrase[1:]}." if self.form.phrase else ""
        return f"{body[0].upper()}{body[1:]}.{form}"


def draw_chain(rng: random.Random, operations: dict, kind: str, value, steps: int) -> list[tuple]:
    """`steps` operations in sequence, as (value before, operation, value after); [] if one does not fit."""
    links = []
    for i in range(steps):
        # Counting letters or items is only drawn as the last operation: the others would all be sums.
        may_count = i == steps - 1 or kind in ("number", "pair")
        choices = [o for o in operations[kind] if may_count or o.result_kind not in ("number", "text")]
        if not choices:
            return []
        operation = rng.choice(choices)
        try:
            after = operation.apply(value)
        except IndexError:  # the value is too short
            return []
        if after in ("", []) or not is_small(after) or after == value:
            return []
        links.append((format_value(value), operation, format_value(after)))
        kind, value = operation.result_kind, after
    return links


def make_task(rng: random.Random, world: World, max_steps: int = 3) -> Task:
    while True:
        steps = min(max_steps, rng.choices((1, 2, 3), (42, 36, 22))[0])
        kind, value, start_difficulty = world.draw_start(rng)
        links = draw_chain(rng, world.operations, kind, value, steps)
        form = rng.choices(FORMS, [f.share for f in FORMS])[0]
        if not links or (steps == 3 and form.phrase.startswith("give only")):
            continue
        distractions = tuple(rng.sample(DISTRACTIONS, rng.choices((0, 1, 2), (60, 28, 12))[0]))
        results = [after for _, _, after in links]
        difficulty = 0.45 * (steps - 1) + start_difficulty + 1.3 * max(o.hardness for _, o, _ in links)
        hardness = form.hardness * (steps > 1 or not form.phrase.startswith("give only"))
        difficulty += DISTRACTION_HARDNESS * len(distractions) + hardness
        start, phrases = format_value(value), tuple(rng.choice(o.phrases) for _, o, _ in links)
        operations, opening = tuple(o.statement for _, o, _ in links), rng.choice(OPENINGS[kind])
        answer = form.write(start, results)
        return Task(kind, start, phrases, operations, distractions, form, opening, answer, difficulty)


def fact_row(rng: random.Random, world: World) -> str:
    """At least six statements; some continue from the result of the previous one."""
    facts = []
    while len(facts) < 6:
        kind, value, _ = world.draw_start(rng)
        for before, operation, after in draw_chain(rng, world.operations, kind, value, rng.choice((1, 1, 2, 3))):
            facts.append(f"{operation.statement.format(before)} {after}.")
    return " ".join(facts)


def story_row(rng: random.Random, world: World, max_steps: int = 3) -> str:
    """Four tasks with their answers."""
    tasks = [make_task(rng, world, max_steps) for _ in range(4)]
    return " ".join(f"{task.statement()} {task.answer}." for task in tasks)


# ---------------------------------------------------------------- instructions and their scores

SHARES = (0.59, 0.28, 0.13)  # of the stages, as of Alpaca's in Phased IFT
BOUNDS = (1.0, 1.5, 3.5, 5.0)  # of the scores of each stage


def rank_to_scores(values: list[float]) -> list[float]:
    """Scores from 1 to 5 in the order of `values`, such that each stage has its share."""
    order = sorted(range(len(values)), key=values.__getitem__)
    scores = [0.0] * len(values)
    ends = [round(sum(SHARES[:k]) * len(values)) for k in range(4)]
    for k in range(3):
        low, high = BOUNDS[k], BOUNDS[k + 1]
        for rank in range(ends[k], ends[k + 1]):
            position = (rank - ends[k]) / (ends[k + 1] - ends[k] - (k == 2))  # in the stage, from 0 to 1
            scores[order[rank]] = min(round(low + (high - low) * position, 2), high if k == 2 else high - 0.01)
    return scores


def plain_words(world: World) -> set[str]:
    """All English words in the demo."""
    phrases = [*COLOURS, *TRADES, *DISTRACTIONS, *map(number_in_words, range(100)), *(f.phrase for f in FORMS)]
    phrases += [phrase for ops in world.operations.values() for o in ops for phrase in (o.statement, *o.phrases)]
    phrases += [opening for openings in OPENINGS.values() for opening in openings]
    words = set(re.findall("[a-z]+", " ".join(phrases), re.IGNORECASE)) - {"a", "e", "i", "o", "u"}
    return words | {w.capitalize() for w in words} | {"if", "you", "get", "and", "then", "done", "User", "Assistant"}


def write_tokenizer(folder: Path, plain: set[str]) -> int:
    """Write a tokenizer.json as Llama 3 has: bytes, and each English word as one token; made-up words are tokenized by
    letter. Returns the size of the vocabulary."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's byte-level alphabet keeps
    spare = iter(range(256, 512))
    letters = [chr(b) if b in alphabet else chr(next(spare)) for b in range(256)]
    words = [space + w for w in sorted(plain) for space in ("", "\u0120") if len(w) > 1]
    vocab = {t: i for i, t in enumerate([*letters, *words])}
    specials = {name: len(vocab) + i for i, name in enumerate(("<|begin_of_text|>", "<|end_of_text|>"))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos, eos = specials
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags} for t, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": single,
                           "special_tokens": {bos: {"id": bos, "ids": [specials[bos]], "tokens": [bos]}}},
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocab, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return len(vocab) + 2


def make_tasks(rng: random.Random, world: World, count: int) -> list[Task]:
    """Tasks of which no two are near duplicates."""
    tasks, seen = [], set()
    while len(tasks) < count:
        task = make_task(rng, world)
        if task.twin not in seen:
            seen.add(task.twin)
            tasks.append(task)
    return tasks


def write_instructions(out: Path, tasks: list[Task], scores: list[float], true_scores: list[float]) -> None:
    """Write scored.jsonl and its three stages."""
    rows = [
        {"id": f"r{i}", "score": score, "true": true, "data": [task.instruction(), task.answer]}
        for i, (task, score, true) in enumerate(zip(tasks, scores, true_scores))
    ]
    write_lines(out / "scored.jsonl", rows)
    for k in range(3):
        write_lines(out / f"s{k + 1}.jsonl", [row for row in rows if in_stage(row, k)])


def in_stage(row: dict, k: int) -> bool:
    """Whether the score of a row is within the bounds of stage k, counted from 0."""
    return BOUNDS[k] <= row["score"] and (k == 2 or row["score"] < BOUNDS[k + 1])


def held_out_rows(name: str, tasks: list[Task], scores: list[float], fifths: list[int]) -> list[dict]:
    return [
        {
            "id": f"{name[0]}{i}",
            "dataset": f"fifth {fifth}",
            "score": score,
            "instruction": task.instruction(),
            "output": task.answer,
            "expected": task.answer,
            "told": task.statement(),
        }
        for i, (task, score, fifth) in enumerate(zip(tasks, scores, fifths))
    ]


def write_text(out: Path, rng: random.Random, world: World, count: int) -> None:
    """Write the text for pre-training in two stages, and 200 rows for evaluation."""
    half = count // 2
    text = [fact_row(rng, world) if i % 2 else story_row(rng, world, 1 + i % 3) for i in range(half)]
    write_lines(out / "text1.jsonl", [{"text": t} for t in text])
    write_lines(out / "text2.jsonl", [{"text": story_row(rng, world)} for _ in range(count - half)])
    write_lines(out / "text_eval.jsonl", [{"text": story_row(rng, world)} for _ in range(200)])


def write_model(folder: Path, world: World, seed: int) -> None:
    """Write a tokenizer and a model with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, plain_words(world))
    model = Transformer(
        parse_config({**CONFIG, "bos_token_id": size - 2, "eos_token_id": size - 1, "vocab_size": size})
    )
    init_weights(model, seed)
    save_model(model, folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size} tokens in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text-rows", type=int, default=100_000, help="rows of text for pre-training")
    parser.add_argument("--rows", type=int, default=1600, help="instructions")
    parser.add_argument(
        "--prompts", type=int, default=1000, help="held-out prompts; half as many more are for validation"
    )
    parser.add_argument("--noise", type=float, default=0.5, help="of the grader, in the unit of the difficulty")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, world = random.Random(args.seed), World(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    n = args.rows + args.prompts + args.prompts // 2
    tasks = make_tasks(rng, world, n)
    difficulty = [task.difficulty for task in tasks]
    true_scores, fifths = rank_to_scores(difficulty), [0] * n
    for rank, i in enumerate(sorted(range(n), key=difficulty.__getitem__)):
        fifths[i] = 5 * rank // n + 1
    scores = rank_to_scores([d + rng.gauss(0, args.noise) for d in difficulty[: args.rows]])
    write_instructions(args.out, tasks[: args.rows], scores, true_scores[: args.rows])
    prompts, validation = slice(args.rows, args.rows + args.prompts), slice(args.rows + args.prompts, n)
    write_lines(
        args.out / "prompts.jsonl", held_out_rows("prompts", tasks[prompts], true_scores[prompts], fifths[prompts])
    )
    rows = held_out_rows("validation", tasks[validation], true_scores[validation], fifths[validation])
    write_lines(args.out / "validation.jsonl", rows)
    for k, name in enumerate(("easy", "medium", "hard")):
        write_lines(args.out / f"held_out_{name}.jsonl", [row for row in rows if in_stage(row, k)][:48])

    write_text(args.out, random.Random(args.seed + 1), world, args.text_rows)  # the same for any --rows and --prompts
    write_model(args.out / "init", world, args.seed)
    for path in sorted(args.out.glob("*.jsonl")):
        content = path.read_bytes()
        print(f"{path}: {len(content.splitlines()):,} rows, {len(content):,} bytes")


if __name__ == "__main__":
    main()
