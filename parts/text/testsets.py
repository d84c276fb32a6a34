"""Prompts: the rows of test sets in their own formats, of data files, and plain text."""

from dataclasses import dataclass, field
from pathlib import Path

from parts.cli import InputError, raise_if_any
from parts.files import json_values, read_text
from parts.text.rows import (
    FORMATS,
    UNSUPPORTED,
    Turn,
    check_characters,
    check_fields,
    check_file_type,
    check_turns,
    field_text,
    row_turns,
    system_turn,
)


@dataclass
class Prompt:
    id: str
    dataset: str
    instruction: str  # as in the answers file
    turns: list[Turn]  # ends with a user turn
    expected: str | None = None
    source: str = ""
    tokens: list[int] = field(default_factory=list)  # rendered
    later_turns: int = 0  # number of further questions in the row, which depend on earlier answers
    key: str = ""  # the key of an answer: a hash of tokens, weights, template and options


def parse_prompt(raw, where: str, dataset: str, number: int) -> Prompt:
    """A prompt from a row of any supported test set or data format. Raises InputError."""
    if isinstance(raw, str):
        raw = {"prompt": raw}
    if not isinstance(raw, dict):
        raise InputError(f"{where}: a prompt must be an object or a text")
    later = 0
    if isinstance(raw.get("turns"), list) and raw["turns"]:  # vicuna, MT-bench
        turns, later = user_turns(raw, raw["turns"][0]), len(raw["turns"]) - 1
    elif "instances" in raw:  # self-instruct
        instances = raw["instances"]
        if not (isinstance(instances, list) and instances and isinstance(instances[0], dict)):
            raise InputError(f"{where}: instances must be a list of objects")
        turns = row_turns({**raw, "input": instances[0].get("input"), "output": ""}, "alpaca")
    elif "instruction" in raw:  # AlpacaEval, Alpaca
        turns = row_turns({"output": "", **raw}, "alpaca")
    elif "Instruction" in raw:  # wizardlm
        turns = user_turns(raw, raw["Instruction"])
    else:
        form = next((name for name in ("phased", "messages", "sharegpt") if FORMATS[name][0] in raw), None)
        if form:
            turns = row_turns(raw, form)
        else:
            text = raw.get("prompt", raw.get("text"))
            if text is None:
                raise InputError(f"{where}: no known prompt format; its keys are {', '.join(raw)[:80] or 'none'}")
            turns = user_turns(raw, text)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise InputError(f"{where}: a prompt's text is missing")
    check_turns([*turns, Turn("assistant", "x")])
    check_characters(raw)
    name = next((raw[k] for k in ("id", "question_id", "idx") if isinstance(raw.get(k), (str, int))), number)
    expected = raw["expected"] if isinstance(raw.get("expected"), str) else None
    return Prompt(
        str(name), str(raw.get("dataset", dataset)), turns[-1].text, turns, expected, where, later_turns=later
    )


def user_turns(raw: dict, text) -> list[Turn]:
    """One question as turns, after the row's system text if it has one."""
    check_fields(raw, (*UNSUPPORTED, "history", "input", "messages", "conversations", "data"))
    return [*system_turn(raw), Turn("user", field_text(text))]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON or JSONL file, or of a plain text file with one per line. Raises InputError listing all bad
    rows."""
    check_file_type(path)
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        values = list(json_values(text))
    else:
        lines = (line.removesuffix("\r") for line in text.split("\n"))
        values = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    prompts, bad = [], []
    for number, (line, value) in enumerate(values):
        try:
            if isinstance(value, InputError):
                raise InputError(f"{path}:{line}: {value}")
            prompts.append(parse_prompt(value, f"{path}:{line}", path.stem, number))
        except InputError as e:
            bad.append(str(e) if str(e).startswith(str(path)) else f"{path}:{line}: {e}")
    raise_if_any(bad, "prompts cannot be used")
    if not prompts:
        raise InputError(f"{path}: no prompts")
    return prompts


def exceeds_context(tokens: int, context: float) -> str:
    """An error message for a prompt that fills the context; "" if there is space for an answer."""
    return f"the prompt has {tokens} tokens, the model's context is {context}" if tokens >= context else ""
