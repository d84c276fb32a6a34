"""Rows of data files: JSONL or one JSON array, one of five formats per file. Every bad row is reported.

A row of any format becomes an id, a list of turns and an optional score. A field that changes the meaning of a row is
either used or rejected by name, never ignored (docs/data.md has the table).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from parts.cli import InputError, print_list, raise_if_any
from parts.files import json_values, read_text


class Turn(NamedTuple):
    role: str  # system, user or assistant; a row of plain text is one turn of the role text
    text: str
    trained: bool = True  # of an answer: its tokens carry loss; False: it is context only


@dataclass
class Row:
    id: str
    turns: list[Turn]
    score: float | None
    source: str  # file:line
    raw: dict  # the row as it was read


ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
}
FORMATS = {  # the keys that identify a format
    "phased": ("data",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
# Unsupported fields that change the meaning of a row: an error unless empty.
REASONING = ("reasoning_content", "reasoning", "thinking")
UNSUPPORTED = (
    "tools",
    "functions",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "images",
    "image",
    "videos",
    "video",
)
UNSUPPORTED += (
    "audios",
    "audio",
    "refusal",
    "chosen",
    "rejected",
    "train_detail",
    "loss_mask",
    "loss_weight",
    *REASONING,
)
UNSUPPORTED_IN_TURN = (*UNSUPPORTED, "system", "system_prompt", "history")
TRAINED_KEYS = ("weight", "loss", "train")  # of a message: OpenAI's, ms-swift's and axolotl's name for the same


def check_fields(source: dict, names: tuple[str, ...]) -> None:
    """Raise InputError for the first of these fields that is not empty."""
    for name in names:
        if source.get(name) not in (None, "", [], {}, False):
            raise InputError(f"the field {name} is not supported, and its content would be lost. Remove it, or the row")


def field_text(content) -> str:
    """The text of a turn: a string, or a list of {"type": "text", "text": …} parts, which are joined."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise InputError(f"a content part of the type {str(kind)[:40]!r} is not supported, only text")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise InputError("a turn's text is not a string")
    return content


def is_trained(message: dict) -> bool:
    for key in TRAINED_KEYS:
        if message.get(key) not in (None, 0, 1):
            raise InputError(f"{key} must be 0 or 1, is {message[key]!r:.40}")
    return all(message.get(key) in (None, 1) for key in TRAINED_KEYS)


def chat_turn(message: dict) -> Turn:
    """A turn from a message with role and content, or with from and value."""
    role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"the role {str(role)[:40]!r} is not known (known: {', '.join(ROLES)})")
    check_fields(message, UNSUPPORTED_IN_TURN)
    return Turn(ROLES[role], field_text(content), is_trained(message))


def system_turn(raw: dict) -> list[Turn]:
    """A row's field `system` or `system_prompt` as a list of one turn; empty if both are missing."""
    texts = [raw[key] for key in ("system", "system_prompt") if raw.get(key) is not None]
    if any(not isinstance(text, str) for text in texts):
        raise InputError("system must be text")
    texts = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(texts) > 1:
        raise InputError("system and system_prompt differ")
    return [Turn("system", text) for text in texts]


def row_turns(raw: dict, form: str) -> list[Turn]:
    """The turns of a row of a known format; raises InputError."""
    check_fields(raw, UNSUPPORTED)
    for key in TRAINED_KEYS:
        if raw.get(key) not in (None, 1):
            raise InputError(f"{key} of a whole row is not supported, only of a message (0 or 1)")
    system = system_turn(raw)
    if form == "phased":
        if not isinstance(raw["data"], list):
            raise InputError("data must be a list of texts")
        turns = [Turn("user" if i % 2 == 0 else "assistant", field_text(text)) for i, text in enumerate(raw["data"])]
    elif form == "alpaca":
        given, extra, history = raw["instruction"], raw.get("input") or "", raw.get("history") or []
        if not isinstance(given, str) or not isinstance(extra, str):
            raise InputError("instruction and input must be text")
        if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
            raise InputError("history must be a list of [instruction, answer] pairs")
        turns = [Turn(role, field_text(text)) for pair in history for role, text in zip(("user", "assistant"), pair)]
        turns.append(Turn("user", f"{given}\n{extra}" if extra.strip() else given))
        turns.append(Turn("assistant", field_text(raw["output"])))
    elif form == "text":
        turns = [Turn("text", field_text(raw["text"]))]
        if system:
            raise InputError("plain text has no place for a system text")
    else:
        key = FORMATS[form][0]
        if not isinstance(raw[key], list) or not all(isinstance(message, dict) for message in raw[key]):
            raise InputError(f"{key} must be a list of objects with role and content, or from and value")
        turns = [chat_turn(message) for message in raw[key]]
    if form != "alpaca":
        check_fields(raw, ("history",))
    if system and turns and turns[0].role == "system":
        if turns[0].text != system[0].text:
            raise InputError("two system texts: one in the conversation and one in a field of the row")
        system = []
    return [*system, *turns]


def messages_of(turns: list[Turn]) -> list[dict]:
    """Turns as messages of the OpenAI format."""
    return [{"role": t.role, "content": t.text} | ({} if t.trained else {"weight": 0}) for t in turns]


def check_turns(turns: list[Turn]) -> None:
    """Raise InputError unless this is text, or [system] user assistant user assistant … without empty answers."""
    roles = [turn.role for turn in turns]
    if roles == ["text"]:
        if not turns[0].text.strip():
            raise InputError("the text is empty")
        return
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if roles[:1] == ["assistant"]:
        raise InputError("it begins with the assistant, which templates do not support: remove that turn, or the row")
    if len(roles) < 2 or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise InputError(
            f"turns must be user, assistant, user, assistant, … and end with an answer; they are: "
            f"{', '.join(roles[:8]) or 'none'}{' …' if len(roles) > 8 else ''}"
        )
    answers = [turn for turn in turns if turn.role == "assistant"]
    if any(not answer.text.strip() for answer in answers):
        raise InputError("an answer is empty or only white space")
    if not any(answer.trained for answer in answers):
        raise InputError("every answer has weight 0: there is nothing to train on")


def check_characters(raw) -> None:
    """Raise InputError if a string in a value read from JSON cannot be written again as UTF-8."""
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        code = ord(e.object[e.start])
        if 0xDC80 <= code <= 0xDCFF:  # what read_text makes of a byte that is not UTF-8
            raise InputError(f"not UTF-8 text (byte {code - 0xDC00:#04x})") from None
        raise InputError("contains an unpaired surrogate (invalid Unicode)") from None


def finite_number(value, name: str) -> float:
    """A score as float; published files contain strings, some with trailing newlines. Raises InputError."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name} {value!r:.40} is not a finite number")
    return number


def parse_row(raw, form: str | None, where: str) -> tuple[Row, str]:
    """A checked Row and its format; `form` is the file's format if known already. Raises InputError."""
    if not isinstance(raw, dict):
        raise InputError(f"a row must be a JSON object, this is {json.dumps(raw)[:40]}")
    check_characters(raw)
    formats = [name for name, keys in FORMATS.items() if all(key in raw for key in keys)]
    if not formats:
        what = "an instruction without an output" if "instruction" in raw else "no known row format"
        raise InputError(f"{what}; its keys are {', '.join(raw)[:80] or 'none'}")
    if form and form not in formats:
        raise InputError(f"a row of the format '{formats[0]}' in a file of the format '{form}': give it another file")
    chat_formats = [name for name in formats if name != "text"]
    if len(chat_formats) > 1:
        raise InputError(f"a row of two formats, {' and '.join(chat_formats)}: remove the fields of one")
    form = form or formats[0]
    turns = row_turns(raw, form)
    check_turns(turns)
    score = None if raw.get("score") is None else finite_number(raw["score"], "score")
    return Row(where if raw.get("id") is None else str(raw["id"]), turns, score, where, raw), form


def check_file_type(path: Path) -> None:
    """Raise InputError for a table or an archive, each line of which would be an error, or a prompt."""
    if path.suffix.lower() in (".csv", ".tsv", ".xlsx", ".parquet", ".arrow", ".gz", ".zst", ".zip"):
        raise InputError(f"{path}: {path.suffix} files cannot be read: convert it to JSONL, UTF-8 (docs/data.md)")


def each_row(path: str | Path) -> Iterator[tuple[str, object, Row | None, str]]:
    """(file:line, raw value, its Row or None, error or None) of each row of a JSONL or JSON file.

    Raises InputError when the file itself cannot be read.
    """
    check_file_type(Path(path))
    text = read_text(Path(path), errors="surrogateescape")
    if "\udc80" <= text[:1] <= "\udcff":
        read_text(Path(path))  # raises: UTF-16 or binary from the first byte on
    form = None
    for line, value in json_values(text):
        where = f"{path}:{line}"
        try:
            if isinstance(value, InputError):
                raise value
            row, form = parse_row(value, form, where)
            yield where, value, row, ""
        except InputError as e:
            yield where, value, None, str(e)


def read_rows(path: str | Path) -> tuple[list[Row], list[str]]:
    """The good rows of a JSONL or JSON file, and a line "file:line: error" for each bad one."""
    rows, bad = [], []
    for where, _, row, problem in each_row(path):
        if row:
            rows.append(row)
        else:
            bad.append(f"{where}: {problem}")
    return rows, bad


SKIP_ADVICE = "Correct them, or skip them with --skip-bad-rows."


def read_good_rows(path: Path, skip_bad: bool) -> list[Row]:
    """The rows of a file. Raises InputError for bad rows, or skips them and lists them on stdout."""
    rows, bad = read_rows(path)
    if not skip_bad:
        raise_if_any(bad, "rows cannot be used", SKIP_ADVICE)
    print_list("unusable rows are skipped", bad)
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def has_exact_answer(answer: str, expected: str) -> bool:
    """Whether an answer equals the expected one, ignoring case and white space."""
    return " ".join(answer.lower().split()) == " ".join(expected.lower().split())


def find_files(name: str, folders: list[Path]) -> list[Path]:
    """The files of a stage: `name` itself, `name` with .jsonl or .json appended, or the data files of a folder."""
    for folder in folders:
        paths = [p for p in (folder / name, folder / f"{name}.jsonl", folder / f"{name}.json") if p.is_file()]
        inside = sorted([*(folder / name).glob("*.jsonl"), *(folder / name).glob("*.json")])
        if len(paths) + bool(inside) > 1:
            many = ", ".join([*map(str, paths), *([f"{folder / name}/"] if inside else [])])
            raise InputError(f"{name} is ambiguous ({many}): give the full file name, or rename one")
        if paths or inside:
            return paths or inside
    tried = ", ".join(str(folder / f"{name}[.jsonl]") for folder in folders)
    raise InputError(f"{name}: no such file, and no folder with *.jsonl files (looked for {tried})")
