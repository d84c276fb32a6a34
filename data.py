"""From rows to batches: templates, documents, micro-batches. Numpy only, no torch.

A row of a data file is a list of turns (parts/text/rows.py); `render` turns these into tokens and says which of
them are supervised; the result is a document. Documents of a file lie end to end in flat arrays (`Documents`).
"""

import hashlib
import heapq
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from parts.cli import InputError, ignore_terminal_signals, progress, raise_if_any
from parts.files import read_json_object, read_text, sha256
from parts.text.memmap import StringArray, map_arrays, save_arrays
from parts.text.rows import SKIP_ADVICE, Row, Turn, find_files, read_rows
from parts.text.tokenizers import load_tokenizer, tokenizer_files

# ---------------------------------------------------------------- templates


@dataclass(frozen=True)
class Template:
    """The pieces of a conversation. Each piece is tokenized by itself; {} stands for the turn's text; a piece between
    ‹ and › is one special token, which nothing but a template can make. Only `answer` is supervised."""

    first: tuple[str, ...]  # the first user turn
    later: tuple[str, ...]  # further user turns
    header: tuple[str, ...]  # opens an answer: a prompt for generation ends here
    answer: tuple[str, ...]
    system: tuple[str, ...] = ()  # a turn of its own, or else …
    system_text: str = "{}\n"  # … text in front of the first user turn's
    begin: tuple[str, ...] = ("‹bos›",)
    prefix_every_text: bool = False  # every text is tokenized like the first of a document, with its prefix space

    def __post_init__(self):
        for name in ("begin", "system", "first", "later", "header", "answer"):
            pieces = getattr(self, name)
            whole = "".join(pieces)
            if not isinstance(pieces, tuple):
                raise ValueError(f"{name} must be a tuple of pieces, is {pieces!r}: a comma is missing")
            if any(c in piece for piece in pieces for c in "‹›" if not re.fullmatch("‹[^‹›]+›", piece)):
                raise ValueError(f"{name}: a special token is a piece by itself: {pieces!r}")
            if whole.count("{}") != (1 if name in ("first", "later", "answer") else bool(whole and name == "system")):
                raise ValueError(f"{name}: {{}} must stand once where the turn's text goes: {pieces!r}")
        if not self.answer[-1].startswith("‹") or self.system_text.count("{}") != 1:
            raise ValueError("an answer must end in a special token, and system_text hold {} once")


LLAMA3_TURN = ("‹<|start_header_id|>›", "user", "‹<|end_header_id|>›", "\n\n{}", "‹<|eot_id|>›")
MISTRAL_USER = ("‹[INST]›", "{}", "‹[/INST]›")
CHATML_USER = ("‹<|im_start|>›", "user\n{}", "‹<|im_end|>›", "\n")

TEMPLATES = {
    # Phased IFT's own training format, piece by piece as its code tokenizes it.
    "phased": Template(
        first=("User: {}", "‹eos›"), later=("\nUser: {}", "‹eos›"), header=("\nAssistant: ",), answer=("{}", "‹eos›")
    ),
    "alpaca": Template(
        first=(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\n{}\n\n### Response:\n",
        ),
        later=("\n\n### Instruction:\n{}\n\n### Response:\n",),
        header=(),
        answer=("{}", "‹eos›"),
        system_text="{}\n\n",
    ),
    "llama2": Template(
        first=("[INST] {} [/INST]",),
        later=("‹bos›", "[INST] {} [/INST]"),
        header=(),
        answer=("{} ", "‹eos›"),
        system_text="<<SYS>>\n{}\n<</SYS>>\n\n",
    ),
    "llama3": Template(
        first=LLAMA3_TURN,
        later=LLAMA3_TURN,
        system=(LLAMA3_TURN[0], "system", *LLAMA3_TURN[2:]),
        header=(LLAMA3_TURN[0], "assistant", LLAMA3_TURN[2], "\n\n"),
        answer=("{}", "‹<|eot_id|>›"),
    ),
    "mistral": Template(
        first=("[INST] {} [/INST]",),
        later=("[INST] {} [/INST]",),
        header=(),
        answer=("{}", "‹eos›"),
        system_text="{}\n\n",
    ),
    # Mistral's formats since its tokenizers have control tokens (mistral-common's InstructTokenizerV3 and V7).
    "mistral-v3": Template(
        first=MISTRAL_USER,
        later=MISTRAL_USER,
        header=(),
        answer=("{}", "‹eos›"),
        system_text="{}\n\n",
        prefix_every_text=True,
    ),
    "mistral-v7": Template(
        first=MISTRAL_USER,
        later=MISTRAL_USER,
        system=("‹[SYSTEM_PROMPT]›", "{}", "‹[/SYSTEM_PROMPT]›"),
        header=(),
        answer=("{}", "‹eos›"),
        prefix_every_text=True,
    ),
    "chatml": Template(
        begin=(),
        first=CHATML_USER,
        later=("\n", *CHATML_USER),
        system=(CHATML_USER[0], "system\n{}", *CHATML_USER[2:]),
        header=(CHATML_USER[0], "assistant\n"),
        answer=("{}", "‹<|im_end|>›"),
    ),
}


# What a chat template contains if the model was trained with one of ours; the first that fits decides.
MARKERS = {
    "llama3": ("<|start_header_id|>",),
    "chatml": ("<|im_start|>",),
    "mistral-v7": ("[SYSTEM_PROMPT]", "[INST]"),
    "llama2": ("[INST]", "<<SYS>>"),
    "mistral": ("[INST]",),
    "alpaca": ("Below is an instruction", "### Response:"),
}


def read_chat_template(folder: Path) -> str:
    """The Jinja chat template of a model folder, "" where it has none."""
    file = folder / "chat_template.jinja"
    if file.exists() and (text := read_text(file)).strip():
        return text
    found = read_json_object(folder / "tokenizer_config.json").get("chat_template") or ""
    if isinstance(found, list):  # several, each {"name", "template"}
        found = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), "")
    return found if isinstance(found, str) else ""


def choose_template(folder: Path, tokenizer, given: str | None) -> tuple[str, list[str]]:
    """The name of the template for a model folder, and lines that say why and what differs from the folder's own.

    `given` by the user, else that of an export of ours (template.json), else the one that its chat template resembles,
    else `phased`. Raises InputError.
    """
    jinja = re.sub(r"\{#.*?#\}", "", read_chat_template(folder), flags=re.DOTALL)  # without comments
    own = next((name for name, marks in MARKERS.items() if all(mark in jinja for mark in marks)), None)
    if own == "mistral" and "[INST]" in tokenizer.specials:
        own = "mistral-v3"
    exported = read_json_object(folder / "template.json").get("template")
    if exported is not None and exported not in list(TEMPLATES):
        raise InputError(f"{folder / 'template.json'}: unknown template {exported!r} (known: {', '.join(TEMPLATES)})")
    if given or exported:
        name, why = (given, "--template") if given else (exported, "template.json of the model folder")
        differs = (exported or own or "one that none of ours resembles") if jinja and (exported or own) != name else ""
        notes = [f"The model folder's own chat template ({differs}) is replaced by {name}."] if differs else []
        return name, [f"Template {name}: given by {why}.", *notes]
    if not own and not jinja:
        return "phased", ["Template phased: the model folder has no chat template."]
    if not own:
        why = "the model folder's chat template resembles none of ours and is replaced (see --template)"
        return "phased", [f"Warning: template phased: {why}."]
    marks = " and ".join(MARKERS.get(own, ("[INST], here a control token",)))
    notes = [f"Template {own}: the model folder's chat template contains {marks}."]
    if added := default_system_text(jinja):
        notes.append(
            f"Warning: that chat template holds a text of its own, {added[:60]!r}…, for prompts without a system turn "
            f"or with tools; {own} adds none. Where the model should have one, give rows and prompts a system turn."
        )
    return own, notes


def default_system_text(jinja: str) -> str:
    """A sentence that a chat template adds by itself, "" where it adds none: a literal of at least four words that is
    no error message."""
    jinja = re.sub(r"raise_exception\(.*?\)\s*[-%}]", "", jinja, flags=re.DOTALL)
    outside = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "\n", jinja, flags=re.DOTALL)  # is put in as it stands
    for literal in [*re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", jinja), (outside,)]:
        text = re.sub(r"<\|.*?\|>|\\n|\[/?\w+\]", "\n", "".join(literal))
        sentence = next((line for line in text.split("\n") if len(re.findall(r"[A-Za-z]{2,}", line)) >= 4), "")
        if sentence:
            return sentence.strip()
    return ""


def special_id(name: str, tokenizer) -> int | None:
    """The id of a template's special token. A missing BOS is None: some tokenizers have none."""
    if name == "bos":
        return tokenizer.bos_id
    added = tokenizer.text_tokens | tokenizer.specials
    found = (tokenizer.eos_ids or [None])[0] if name == "eos" else added.get(name)
    if found is None:
        raise InputError(
            f"the template needs the token {name}, which this tokenizer does not have: choose another "
            f"--template ({', '.join(TEMPLATES)})"
        )
    return found


def stop_ids(template: Template, tokenizer) -> list[int]:
    """The ids that end an answer: the template's end of turn and every EOS of the tokenizer."""
    template = fit_template(template, tokenizer)
    return list(dict.fromkeys([special_id(template.answer[-1][1:-1], tokenizer), *tokenizer.eos_ids]))


@lru_cache(maxsize=64)
def fit_template(template: Template, tokenizer) -> Template:
    """The template in the pieces of one tokenizer: what a literal holds of its special tokens' names becomes the tokens
    (in Mistral's later vocabularies [INST] is one), and a BOS that it lacks is left out. Raises InputError where it
    lacks another token."""
    names = sorted(tokenizer.specials, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else re.compile("(?!)")
    # Where the prefix space stands in front of a document's first text only, the others need it spelled out.
    space = " " if template.prefix_every_text and tokenizer.prefix_space == "first" else ""

    def fit(pieces: tuple[str, ...]) -> tuple[str, ...]:
        out = []
        for piece in pieces:
            if piece == "‹bos›" and tokenizer.bos_id is None:
                continue
            parts = [piece] if piece.startswith("‹") else [part for part in pattern.split(piece) if part]
            for part in parts:
                is_name = part in tokenizer.specials
                out.append(f"‹{part}›" if is_name else part if part.startswith("‹") else space + part)
                if out[-1].startswith("‹"):
                    special_id(out[-1][1:-1], tokenizer)
        return tuple(out)

    names = ("begin", "system", "first", "later", "header", "answer")
    return replace(template, **{name: fit(getattr(template, name)) for name in names})


def render(turns: list[Turn], template: Template, tokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them are supervised. The one function that makes tokens from turns.

    A conversation that ends in a user turn is a prompt: it ends in the header, ready for an answer. A single turn of
    role "text" is plain text between BOS and EOS, supervised from its first token.
    """
    template = fit_template(template, tokenizer)
    tokens, loss_mask = [], []

    def add(pieces: tuple[str, ...], text: str, learn: bool, first: bool = False) -> None:
        for piece in pieces:
            if piece.startswith("‹"):
                token = special_id(piece[1:-1], tokenizer)
                ids = [] if token is None else [token]
            else:
                ids = tokenizer.encode(piece.replace("{}", text), first or not tokens)
            tokens.extend(ids)
            loss_mask.extend([learn] * len(ids))

    if turns[0].role == "text":
        add(("‹bos›",), "", False)
        add(("{}", "‹eos›"), turns[0].text, True, first=True)
        return tokens, loss_mask
    add(template.begin, "", False)
    in_front, first = "", True
    for turn in turns:
        if turn.role == "system" and template.system:
            add(template.system, turn.text, False)
        elif turn.role == "system":
            in_front = template.system_text.replace("{}", turn.text)
        elif turn.role == "user":
            add(template.first if first else template.later, in_front + turn.text if first else turn.text, False)
            add(template.header, "", False)
            first = False
        else:
            add(template.answer, turn.text, turn.trained)
    return tokens, loss_mask


def chat_template(template: Template, tokenizer) -> str:
    """The template as Jinja, for tokenizer_config.json, so that other tools prompt the model with the same tokens.

    They tokenize the text between two special tokens at once, we each piece by itself. Where the tokenizer puts a space
    in front of every text (SentencePiece), that space stands between the pieces here. docs/data.md lists where tokens
    of earlier answers may still differ.
    """
    template = fit_template(template, tokenizer)

    def is_text(piece: str) -> bool:
        return not piece.startswith("‹")

    def emit(pieces: tuple[str, ...], text: str = "''", after: tuple[str, ...] = ()) -> str:
        """`after`: the pieces in front of these."""
        terms = []
        for before, piece in zip((*after[-1:], *pieces) if after else ("‹›", *pieces), pieces):
            if is_text(before) and is_text(piece) and tokenizer.prefix_space == "always":
                terms.append("' '")
            if piece in ("‹bos›", "‹eos›"):
                terms.append(f"{piece[1:-1]}_token")
            else:
                parts = [json.dumps(p) for p in piece.strip("‹›").split("{}")]
                terms.append(f" + {text} + ".join(parts))
        return "{{ " + " + ".join(terms) + " }}" if terms else ""

    system = "messages[0]['content']"
    in_front = f" + {system} + ".join(json.dumps(p) for p in template.system_text.split("{}"))
    return (
        emit(template.begin)
        + "{% if messages[0]['role'] == 'system' %}"
        + (
            emit(template.system, system) + "{% set front = '' %}"
            if template.system
            else f"{{% set front = {in_front} %}}"
        )
        + "{% set turns = messages[1:] %}{% else %}{% set front = '' %}{% set turns = messages %}{% endif %}"
        + "{% for m in turns %}{% if m['role'] == 'user' and loop.first %}"
        + emit(template.first, "front + m['content']")
        + "{% elif m['role'] == 'user' %}"
        + emit(template.later, "m['content']")
        + "{% elif m['role'] == 'assistant' %}"
        + emit(template.header + template.answer, "m['content']", after=template.first)
        + "{% else %}{{ raise_exception('only system, user and assistant turns') }}"
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + emit(template.header, after=template.first)
        + "{% endif %}"
    )


# ---------------------------------------------------------------- documents


@dataclass
class Documents:
    """Tokenised rows, end to end."""

    tokens: np.ndarray  # (N,) int32
    loss_mask: np.ndarray  # (N,) bool: this token is a target
    offsets: np.ndarray  # (D+1,) int64: document d is tokens[starts[d]:starts[d+1]]
    ids: Sequence[str]
    source: Sequence[str]  # file:line
    bad: list[str]  # rows that could not be used, "file:line: why"
    truncated: int = 0  # rows cut to max_len …
    truncated_tokens: int = 0  # … and the tokens that cost
    unencodable: int = 0  # rows with characters that the tokenizer cannot represent

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(D,) in tokens."""
        return np.diff(self.offsets)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """(D,) how many tokens of each are predicted: all supervised ones but the first."""
        return np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int64) - self.loss_mask[self.offsets[:-1]]

    def pack(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The model's input: tokens, positions (T,) int64, cu_seqlens (D+1,) int32, targets (T,) int64 of the chosen
        documents, end to end. The target of a token is the next one of its document where that is supervised, else
        -100.

        Of no documents: one token without a target, so that a rank with nothing to do still takes part in every
        gathering of weights.
        """
        if not len(chosen):
            return np.array([0]), np.array([0]), np.array([0, 1], np.int32), np.array([-100])
        pieces = [slice(self.offsets[d], self.offsets[d + 1]) for d in chosen]
        tokens = np.concatenate([self.tokens[p] for p in pieces]).astype(np.int64)
        supervised = np.concatenate([self.loss_mask[p] for p in pieces])
        cu_seqlens = np.cumsum([0, *self.lengths[chosen]]).astype(np.int32)
        supervised[cu_seqlens[:-1]] = False  # a document's first token has no token before it
        targets = np.append(np.where(supervised, tokens, -100)[1:], -100)
        positions = np.concatenate([np.arange(n) for n in self.lengths[chosen]])
        return tokens, positions, cu_seqlens, targets


def concat(parts: list[Documents]) -> Documents:
    """Several Documents as one, in order."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum(np.concatenate([[0], *(p.lengths for p in parts)]))
    return Documents(
        np.concatenate([p.tokens for p in parts]),
        np.concatenate([p.loss_mask for p in parts]),
        starts.astype(np.int64),
        [i for p in parts for i in p.ids],
        [w for p in parts for w in p.source],
        [b for p in parts for b in p.bad],
        sum(p.truncated for p in parts),
        sum(p.truncated_tokens for p in parts),
        sum(p.unencodable for p in parts),
    )


def subset(documents: Documents, chosen: np.ndarray) -> Documents:
    """Only the chosen documents, in the order given."""
    pieces = [slice(documents.offsets[d], documents.offsets[d + 1]) for d in chosen]
    return Documents(
        np.concatenate([np.zeros(0, np.int32), *(documents.tokens[p] for p in pieces)]),
        np.concatenate([np.zeros(0, bool), *(documents.loss_mask[p] for p in pieces)]),
        np.cumsum([0, *documents.lengths[chosen]]).astype(np.int64),
        [documents.ids[d] for d in chosen],
        [documents.source[d] for d in chosen],
        [],
    )


cached_tokenizer = lru_cache(maxsize=1)(load_tokenizer)  # so that a worker process loads it once


def tokenize_rows(rows: list[Row], folder: Path, template: str, max_len: int) -> list[tuple]:
    """(tokens int32, supervised bool, tokens cut off, whether characters are lost) for each row; the work of one
    process."""
    tokenizer = cached_tokenizer(folder)
    out = []
    for row in rows:
        tokens, loss_mask = render(row.turns, TEMPLATES[template], tokenizer)
        cut = max(0, len(tokens) - max_len)
        lossy = any(tokenizer.loses(turn.text) for turn in row.turns)
        out.append((np.array(tokens[:max_len], np.int32), np.array(loss_mask[:max_len], bool), cut, lossy))
    return out


def tokenize_files(paths: list[Path], folder: Path, template: str, max_len: int, shown: bool) -> Documents:
    """Read, check, render and truncate every row of some files, on all cores where they are long; `shown`: with a
    bar."""
    found = [read_rows(path) for path in paths]
    rows, bad = [row for good, _ in found for row in good], [line for _, lines in found for line in lines]
    chunks = [rows[i : i + 200] for i in range(0, len(rows), 200)]
    work = partial(tokenize_rows, folder=folder.resolve(), template=template, max_len=max_len)
    cached_tokenizer(folder.resolve())  # loaded before the fork, shared after it
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    many = len(chunks) > 20 and cores > 1 and sys.platform == "linux"
    pool = get_context("fork").Pool(min(cores, len(chunks)), initializer=ignore_terminal_signals) if many else None
    done = []
    try:
        with progress(len(rows), f"tokenize {paths[0].name}", "row", shown=shown) as bar:
            for part in pool.imap(work, chunks) if pool else map(work, chunks):
                done += part
                bar.update(len(part))
    finally:
        if pool:
            pool.terminate()
    kept = []
    for row, (tokens, supervised, cut, lossy) in zip(rows, done):
        if supervised[1:].any():
            kept.append((row, tokens, supervised, cut, lossy))
        else:
            total = len(tokens) + cut
            bad.append(f"{row.source}: nothing supervised is left of its {total} tokens within --max-len {max_len}")
    return Documents(
        tokens=np.concatenate([np.zeros(0, np.int32), *(k[1] for k in kept)]),
        loss_mask=np.concatenate([np.zeros(0, bool), *(k[2] for k in kept)]),
        offsets=np.cumsum([0, *(len(k[1]) for k in kept)]).astype(np.int64),
        ids=StringArray.of([k[0].id for k in kept]),
        source=StringArray.of([k[0].source for k in kept]),
        bad=bad,
        truncated=sum(k[3] > 0 for k in kept),
        truncated_tokens=sum(k[3] for k in kept),
        unencodable=sum(k[4] for k in kept),
    )


def load_documents(
    paths: list[Path],
    hashes: list[str],
    folder: Path,
    template: str,
    max_len: int,
    cache: Path,
    keep: bool,
    shown: bool,
) -> Documents:
    """`tokenize_files`, or its result of an earlier time, mapped from `cache`; keyed by all that it depends on.

    `hashes` are of the files. `keep`: write what is not there, or damaged.
    """
    code = [Path(__file__), *sorted((Path(__file__).parent / "parts" / "text").glob("*.py"))]
    sources = [*code, *folder.glob("config.json"), *tokenizer_files(folder)]
    about = json.dumps([list(map(str, paths)), template, max_len, hashes, [sha256(p) for p in sources]])
    file = cache / (hashlib.sha256(about.encode()).hexdigest()[:32] + ".arrays")
    found = map_arrays(file)
    if found is None:
        documents = tokenize_files(paths, folder, template, max_len, shown)
        if not keep:
            return documents
        arrays = {"tokens": documents.tokens, "loss_mask": documents.loss_mask, "offsets": documents.offsets}
        for name in ("ids", "source"):
            texts = getattr(documents, name)
            arrays |= {f"{name} content": texts.content, f"{name} offsets": texts.offsets}
        rest = {name: getattr(documents, name) for name in ("bad", "truncated", "truncated_tokens", "unencodable")}
        save_arrays(file, arrays, rest)
        found = map_arrays(file)
    arrays, rest = found
    ids, source = (StringArray(arrays[f"{name} content"], arrays[f"{name} offsets"]) for name in ("ids", "source"))
    return Documents(arrays["tokens"], arrays["loss_mask"], arrays["offsets"], ids, source, **rest)


def clear_cache(folder: Path) -> None:
    """Remove what `load_documents` keeps, and the folder if nothing else is in it."""
    for path in folder.glob("*.arrays*"):
        path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def read_documents(
    names: list[str],
    folders: list[Path],
    model: Path,
    template: str,
    max_len: int,
    cache: Path,
    keep: bool = True,
    shown: bool = False,
) -> tuple[dict[str, Documents], dict[str, str]]:
    """The documents of every name (a file, or a folder of files), and a sha256 of every file read."""
    files = {name: find_files(name, folders) for name in names}
    hashes = {str(path): sha256(path) for paths in files.values() for path in paths}
    documents = {
        name: load_documents(paths, [hashes[str(p)] for p in paths], model, template, max_len, cache, keep, shown)
        for name, paths in files.items()
    }
    return documents, hashes


def check_bad_rows(documents: dict[str, Documents], skip_bad_rows: bool) -> None:
    """Raise one InputError that lists the bad rows of all files, unless they may be left out and others remain."""
    bad = [line for d in documents.values() for line in d.bad]
    empty = [f"{name}: no rows that can be used" for name, d in documents.items() if not len(d)]
    if not skip_bad_rows:
        raise_if_any(bad, "rows cannot be used", SKIP_ADVICE)
    raise_if_any(empty, "files are of no use")


def print_unencodable(documents: list[Documents]) -> None:
    """Say how many rows hold characters that the tokenizer cannot represent."""
    lossy = sum(d.unencodable for d in documents)
    if lossy:
        print(f"{lossy:,} rows hold characters that the tokenizer drops or turns into its unknown token.")


def check_vocabulary(highest: int, vocab_size: int, folder: Path) -> None:
    """Raise InputError unless the highest token that was made is one of the model's."""
    if highest >= vocab_size:
        raise InputError(
            f"the tokenizer in {folder} makes token {highest}, the model's vocabulary ends at {vocab_size - 1}: "
            "they do not belong together"
        )


# ---------------------------------------------------------------- batches


def epoch_batches(
    documents: Documents, rows: np.ndarray, batch_size: int, seed: int, stage: int, epoch: int
) -> list[np.ndarray]:
    """The documents numbered `rows` in this epoch's random order, cut into batches of document numbers; the last may be
    smaller. Called again after a kill: the same arguments must give the same batches."""
    order = rows[np.random.default_rng([seed, stage, epoch]).permutation(len(rows))]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def micro_batches(
    chosen: np.ndarray, lengths: np.ndarray, world_size: int, micro_tokens: int
) -> list[list[np.ndarray]]:
    """Deal a batch to ranks: per rank a list of micro-batches of at most that many tokens (a longer document goes
    alone).

    Every rank gets the same number of micro-batches, of nearly the same number of tokens; some may be empty. Longest
    first, each to the bin with the fewest tokens, with nearly as few bins as keep to it.
    """
    order = chosen[np.argsort(-lengths[chosen], kind="stable")]
    limit = max(micro_tokens, int(lengths[order[0]]))
    alone = int((lengths[order] > limit / 2).sum())  # no two of these share a bin
    per_rank = max(1, -(-alone // world_size), -(-int(lengths[order].sum()) // (limit * world_size)))
    while True:
        bins = [[] for _ in range(per_rank * world_size)]
        loads = [(0, i) for i in range(len(bins))]
        for d in order:
            load, i = loads[0]
            bins[i].append(d)
            heapq.heapreplace(loads, (load + int(lengths[d]), i))
        if max(loads)[0] <= limit:
            return [[np.array(b, np.int64) for b in bins[r::world_size]] for r in range(world_size)]
        per_rank += 1 + per_rank // 16


def largest_micro_batch(documents: Documents, batch_size: int, world_size: int, micro_tokens: int) -> tuple[int, int]:
    """Most tokens and supervised tokens of a micro-batch, among a hundred batches in an order of no meaning."""
    everything, tokens, loss_mask = np.arange(len(documents)), [], []
    for batch in epoch_batches(documents, everything, batch_size, 0, 0, 0)[:100]:
        for rank in micro_batches(batch, documents.lengths, world_size, micro_tokens):
            tokens += [int(documents.lengths[part].sum()) for part in rank]
            loss_mask += [int(documents.target_counts[part].sum()) for part in rank]
    return max(tokens), max(loss_mask)
