"""Makes the demo: text to pre-train on, a tokenizer, a random tiny Llama, and instructions scored from 1 to 5.

    python demo/make.py --out demo/build

A task takes a word, a number, a list, two numbers or a person through one to three operations. The text tells of tasks
("if you take the word kamot, reverse it, then repeat it, you get tomak; tomaktomak."), so that a model pre-trained on
it can do all that is asked of it later; an instruction ("Take the word kamot, reverse it, then repeat it.") it has
never seen. How difficult a task is, is the sum of several things that mix in every stage: the number of operations,
how hard the hardest is, how long or rare the thing is that they begin with, words that distract, and a wish for the
form of the answer. The score is its rank with a grader's noise, cut as in the paper into 59, 28 and 13 %.
demo/build.sh runs the whole recipe.
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

# ---------------------------------------------------------------- what can be done with what


@dataclass(frozen=True)
class Operation:
    stated: str  # how the text states it alone
    asked: tuple[str, ...]  # after "if you …" and in an instruction
    gives: str  # kind of the result
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
OPERATIONS = {  # by the kind of what they are done with
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
    "person": [],  # filled by `World`: what is known of them
    "text": [],  # nothing more is asked of it
}
DISTRACTIONS = (
    "which my aunt wrote on a wall", "as found in an old letter", "which nobody asked about before",
    "while it rains outside", "as the teacher said on Monday", "which was printed in small type", "though it is late",
    "just as the children did", "which came up twice last week", "with the window open", "as on page 9 of the book",
    "whatever the others think",
)
# fmt: on
DISTRACTED = 0.7  # how much harder one makes a task

OPENINGS = {
    "word": ("take the word {}", "start with the word {}", "look at the word {}"),
    "number": ("take the number {}", "start with the number {}", "begin with {}"),
    "pair": ("take the numbers {}", "look at the numbers {}"),
    "list": ("take the list {}", "start with the items {}", "look at the list {}"),
    "person": ("think of {}", "look up {}"),
}


@dataclass(frozen=True)
class Form:
    asked: str  # "" for the ordinary form: results one after the other
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


def show(value) -> str:
    if isinstance(value, tuple):
        return f"{value[0]} and {value[1]}"
    return " ".join(value) if isinstance(value, list) else str(value)


def fits(value) -> bool:
    """Values stay small enough that every operation makes sense and the text stays short."""
    if isinstance(value, int):
        return 0 <= value < 100
    return 2 <= len(value) <= 5 if isinstance(value, list) else 1 <= len(value) <= 14


def word(rng: random.Random, shortest: int = 3, longest: int = 7) -> str:
    """A made-up word that can be spoken."""
    letters = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4))
    return letters[rng.randint(0, 1) :][: rng.randint(shortest, longest)]


class World:
    """People and what is known of them: the same in the text and in the instructions. Few are spoken of often."""

    def __init__(self, seed: int, people: int = 60):
        rng = random.Random(seed)
        self.kinds = (5, 2, 1, 4, 2)  # how often a task begins with a word, a number, two, a list, a person
        self.towns = [word(rng, 4, 6) for _ in range(12)]
        self.people = list(dict.fromkeys(word(rng, 4, 6).capitalize() for _ in range(2 * people)))[:people]
        self.weights = [1 / (i + 4) for i in range(people)]
        self.facts = {p: (rng.choice(self.towns), rng.choice(COLOURS), rng.choice(TRADES)) for p in self.people}
        asked = [("the town of {} is", ("name the town", "say which town is home"), "word"),
                 ("the colour of {} is", ("name the favourite colour", "say which colour is liked best"), "word"),
                 ("the trade of {} is", ("name the trade", "say what the work is"), "word")]  # fmt: skip
        known = [Operation(*a, 0.2, lambda p, i=i: self.facts[p][i]) for i, a in enumerate(asked)]
        self.operations = OPERATIONS | {"person": known}

    def start(self, rng: random.Random) -> tuple[str, object, float]:
        """A kind, a value of it, and how hard the value makes the task."""
        kind = rng.choices(("word", "number", "pair", "list", "person"), self.kinds)[0]
        if kind == "word":
            value = word(rng)
            return kind, value, 0.12 * (len(value) - 3)
        if kind == "number":
            value = rng.randrange(100)
            return kind, value, 0.3 * (value > 9)
        if kind == "pair":
            return kind, (rng.randrange(50), rng.randrange(50)), 0.3
        if kind == "list":
            value = [word(rng, 2, 4) for _ in range(rng.randint(3, 5))]
            return kind, value, 0.2 * (len(value) - 3)
        i = rng.choices(range(len(self.people)), self.weights)[0]
        return kind, self.people[i], 1.0 * i / len(self.people)


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    kind: str
    start: str
    asked: tuple[str, ...]  # one phrase an operation
    operations: tuple[str, ...]  # which they are, whatever the phrase
    distractions: tuple[str, ...]
    form: Form
    opening: str
    answer: str
    difficulty: float

    @property
    def twin(self) -> tuple:
        """Two tasks with the same are near twins: the same operations on the same thing."""
        return self.start, self.operations

    def body(self) -> str:
        start = self.opening.format(self.start)
        return ", ".join([start, *self.distractions, self.asked[0], *(f"then {a}" for a in self.asked[1:])])

    def told(self) -> str:
        """As the text tells of it, up to the answer."""
        return f"if you {self.body()}{', and ' + self.form.asked if self.form.asked else ''}, you get"

    def instruction(self) -> str:
        body = self.body()
        form = f" {self.form.asked[0].upper()}{self.form.asked[1:]}." if self.form.asked else ""
        return f"{body[0].upper()}{body[1:]}.{form}"


def chain(rng: random.Random, operations: dict, kind: str, value, steps: int) -> list[tuple]:
    """`steps` operations one after the other: (value before, operation, value after), or [] where one does not fit."""
    links = []
    for i in range(steps):
        # Counting ends a chain: what follows would only be sums.
        counts = i == steps - 1 or kind in ("number", "pair")
        choices = [o for o in operations[kind] if counts or o.gives not in ("number", "text")]
        if not choices:
            return []
        operation = rng.choice(choices)
        try:
            after = operation.apply(value)
        except IndexError:  # nothing left of it
            return []
        if after in ("", []) or not fits(after) or after == value:
            return []
        links.append((show(value), operation, show(after)))
        kind, value = operation.gives, after
    return links


def make_task(rng: random.Random, world: World, longest: int = 3) -> Task:
    while True:
        steps = min(longest, rng.choices((1, 2, 3), (42, 36, 22))[0])
        kind, value, of_start = world.start(rng)
        links = chain(rng, world.operations, kind, value, steps)
        form = rng.choices(FORMS, [f.share for f in FORMS])[0]
        if not links or (steps == 3 and form.asked.startswith("give only")):
            continue
        distractions = tuple(rng.sample(DISTRACTIONS, rng.choices((0, 1, 2), (60, 28, 12))[0]))
        results = [after for _, _, after in links]
        difficulty = 0.45 * (steps - 1) + of_start + 1.3 * max(o.hardness for _, o, _ in links)
        difficulty += DISTRACTED * len(distractions) + form.hardness * (
            steps > 1 or not form.asked.startswith("give only")
        )
        return Task(
            kind,
            show(value),
            tuple(rng.choice(o.asked) for _, o, _ in links),
            tuple(o.stated for _, o, _ in links),
            distractions,
            form,
            rng.choice(OPENINGS[kind]),
            form.write(show(value), results),
            difficulty,
        )


def fact_row(rng: random.Random, world: World) -> str:
    """A few statements, some going on from the last one's result."""
    facts = []
    while len(facts) < 6:
        kind, value, _ = world.start(rng)
        for before, operation, after in chain(rng, world.operations, kind, value, rng.choice((1, 1, 2, 3))):
            facts.append(f"{operation.stated.format(before)} {after}.")
    return " ".join(facts)


def story_row(rng: random.Random, world: World, longest: int = 3) -> str:
    """Four tasks and what comes of them."""
    tasks = [make_task(rng, world, longest) for _ in range(4)]
    return " ".join(f"{task.told()} {task.answer}." for task in tasks)


# ---------------------------------------------------------------- instructions and their scores

SHARES = (0.59, 0.28, 0.13)  # of the stages: Phased IFT's, for Alpaca
BOUNDS = (1.0, 1.5, 3.5, 5.0)  # its scores


def rank_to_scores(values: list[float]) -> list[float]:
    """Scores from 1 to 5 in the order of `values`, so that the paper's bounds cut the paper's shares."""
    order = sorted(range(len(values)), key=values.__getitem__)
    scores = [0.0] * len(values)
    ends = [round(sum(SHARES[:k]) * len(values)) for k in range(4)]
    for k in range(3):
        low, high = BOUNDS[k], BOUNDS[k + 1]
        for place in range(ends[k], ends[k + 1]):
            within = (place - ends[k]) / (ends[k + 1] - ends[k] - (k == 2))
            scores[order[place]] = min(round(low + (high - low) * within, 2), high if k == 2 else high - 0.01)
    return scores


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def plain_words(world: World) -> set[str]:
    """Every word of plain English that the demo uses."""
    known = [o for kind in world.operations.values() for o in kind]
    phrases = [*COLOURS, *TRADES, *DISTRACTIONS, *map(number_in_words, range(100)), *(f.asked for f in FORMS)]
    phrases += [phrase for o in known for phrase in (o.stated, *o.asked)]
    phrases += [o for openings in OPENINGS.values() for o in openings]
    words = set(re.findall("[a-z]+", " ".join(phrases), re.IGNORECASE)) - {"a", "e", "i", "o", "u"}
    return words | {w.capitalize() for w in words} | {"if", "you", "get", "and", "then", "done", "User", "Assistant"}


def write_tokenizer(folder: Path, plain: set[str]) -> int:
    """A tokenizer.json in Llama 3's form: bytes, and the words of plain English as whole tokens. Made-up words stay
    letter by letter. Gives the size of the vocabulary."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
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
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
    return len(vocab) + 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text-rows", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=1600, help="instructions")
    parser.add_argument(
        "--prompts", type=int, default=1000, help="held-out prompts, and half as many to choose rates by"
    )
    parser.add_argument("--noise", type=float, default=0.5, help="of the grader, in the unit of the difficulty")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, out, world = random.Random(args.seed), args.out, World(args.seed)
    folder = out / "init"
    folder.mkdir(parents=True, exist_ok=True)

    n, tasks, seen = args.rows + args.prompts + args.prompts // 2, [], set()
    while len(tasks) < n:
        task = make_task(rng, world)
        if task.twin not in seen:
            seen.add(task.twin)
            tasks.append(task)
    true = rank_to_scores([t.difficulty for t in tasks])
    fifth = {i: 5 * place // n + 1 for place, i in enumerate(sorted(range(n), key=lambda i: tasks[i].difficulty))}
    score = rank_to_scores([t.difficulty + rng.gauss(0, args.noise) for t in tasks[: args.rows]])
    rows = [
        {"id": f"r{i}", "score": score[i], "true": true[i], "data": [t.instruction(), t.answer]}
        for i, t in enumerate(tasks[: args.rows])
    ]
    write_rows(out / "scored.jsonl", rows)
    for k, (low, high) in enumerate(((1, 1.5), (1.5, 3.5), (3.5, 6)), 1):
        write_rows(out / f"s{k}.jsonl", [row for row in rows if low <= row["score"] < high])
    for name, a, b in (("prompts", args.rows, args.rows + args.prompts), ("validation", args.rows + args.prompts, n)):
        write_rows(
            out / f"{name}.jsonl",
            [
                {
                    "id": f"{name[0]}{i - a}",
                    "dataset": f"fifth {fifth[i]}",
                    "score": true[i],
                    "instruction": t.instruction(),
                    "output": t.answer,
                    "expected": t.answer,
                    "told": t.told(),
                }
                for i, t in enumerate(tasks)
                if a <= i < b
            ],
        )
    validation = [json.loads(line) for line in (out / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, (low, high) in {"easy": (1, 1.5), "medium": (1.5, 3.5), "hard": (3.5, 6)}.items():
        of_stage = [row for row in validation if low <= row["score"] < high]
        write_rows(out / f"held_out_{name}.jsonl", of_stage[:48])

    rng, half = random.Random(args.seed + 1), args.text_rows // 2  # the text stays the same whatever is asked later
    text = [fact_row(rng, world) if i % 2 else story_row(rng, world, 1 + i % 3) for i in range(half)]
    write_rows(out / "text1.jsonl", [{"text": t} for t in text])
    write_rows(out / "text2.jsonl", [{"text": story_row(rng, world)} for i in range(args.text_rows - half)])
    write_rows(out / "text_eval.jsonl", [{"text": story_row(rng, world)} for _ in range(200)])

    size = write_tokenizer(folder, plain_words(world))
    model = Transformer(
        parse_config({**CONFIG, "bos_token_id": size - 2, "eos_token_id": size - 1, "vocab_size": size})
    )
    init_weights(model, args.seed)
    save_model(model, folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size} tokens in {folder}")
    for path in sorted(out.glob("*.jsonl")):
        content = path.read_bytes()
        print(f"{path}: {len(content.splitlines()):,} rows, {len(content):,} bytes")


if __name__ == "__main__":
    main()
