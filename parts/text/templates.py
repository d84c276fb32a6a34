"""Chat templates: how the turns of a conversation become tokens, in training and generation.

The tokens of a prompt in generation are a prefix of the same document's tokens in training. A template is also exported
as Jinja (`chat_template`), so that other tools prompt an exported model in the same way.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from parts.cli import InputError
from parts.files import read_json_object, read_text
from parts.text.rows import Turn


@dataclass(frozen=True)
class Template:
    """The pieces of a conversation. Each piece is tokenized separately; {} is replaced by the turn's text; a piece
    between ‹ and › is one special token, which only a template can produce. Only `answer` is supervised."""

    first: tuple[str, ...]  # the first user turn
    later: tuple[str, ...]  # further user turns
    header: tuple[str, ...]  # before an answer: a prompt for generation ends here
    answer: tuple[str, ...]
    system: tuple[str, ...] = ()  # a turn of its own, or else …
    system_text: str = "{}\n"  # … text in front of the first user turn's
    begin: tuple[str, ...] = ("‹bos›",)
    prefix_every_text: bool = False  # every text gets a prefix space, like the first of a document

    def __post_init__(self):
        for name in ("begin", "system", "first", "later", "header", "answer"):
            pieces = getattr(self, name)
            whole = "".join(pieces)
            if not isinstance(pieces, tuple):
                raise ValueError(f"{name} must be a tuple of pieces, is {pieces!r}: a comma is missing")
            if any(c in piece for piece in pieces for c in "‹›" if not re.fullmatch("‹[^‹›]+›", piece)):
                raise ValueError(f"{name}: a special token must be a separate piece: {pieces!r}")
            if whole.count("{}") != (1 if name in ("first", "later", "answer") else bool(whole and name == "system")):
                raise ValueError(f"{name}: {{}} must occur once, in place of the turn's text: {pieces!r}")
        if not self.answer[-1].startswith("‹") or self.system_text.count("{}") != 1:
            raise ValueError("an answer must end with a special token, and system_text must contain {} once")


LLAMA3_TURN = ("‹<|start_header_id|>›", "user", "‹<|end_header_id|>›", "\n\n{}", "‹<|eot_id|>›")
MISTRAL_USER = ("‹[INST]›", "{}", "‹[/INST]›")
CHATML_USER = ("‹<|im_start|>›", "user\n{}", "‹<|im_end|>›", "\n")

TEMPLATES = {
    # Phased IFT's training format, in the pieces that its code tokenizes.
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


# Strings in the chat template of a model that was trained with one of our templates; the first match is used.
MARKERS = {
    "llama3": ("<|start_header_id|>",),
    "chatml": ("<|im_start|>",),
    "mistral-v7": ("[SYSTEM_PROMPT]", "[INST]"),
    "llama2": ("[INST]", "<<SYS>>"),
    "mistral": ("[INST]",),
    "alpaca": ("Below is an instruction", "### Response:"),
}


def read_chat_template(folder: Path) -> str:
    """The Jinja chat template of a model folder, "" if it has none."""
    file = folder / "chat_template.jinja"
    if file.exists() and (text := read_text(file)).strip():
        return text
    template = read_json_object(folder / "tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):  # several, each {"name", "template"}
        template = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), "")
    return template if isinstance(template, str) else ""


def choose_template(folder: Path, tokenizer, given: str | None) -> tuple[str, list[str]]:
    """The name of the template for a model folder, and lines that explain the choice and differences to its own.

    In this order: `given` by the user; the folder's template.json (an export of this project); the one that the
    folder's chat template resembles; `phased`. Raises InputError.
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
        differs = (exported or own or "unknown to this program") if jinja and (exported or own) != name else ""
        notes = [f"The model folder's own chat template ({differs}) is replaced by {name}."] if differs else []
        return name, [f"Template {name}: given by {why}.", *notes]
    if not own and not jinja:
        return "phased", ["Template phased: the model folder has no chat template."]
    if not own:
        why = "the model folder's chat template is unknown to this program and is replaced (see --template)"
        return "phased", [f"Warning: template phased: {why}."]
    marks = " and ".join(MARKERS.get(own, ("[INST], here a control token",)))
    notes = [f"Template {own}: the model folder's chat template contains {marks}."]
    if added := default_system_text(jinja):
        notes.append(
            f"Warning: that chat template adds the text {added[:60]!r}… to prompts without a system turn or with "
            f"tools; {own} adds none. If the model needs it, give rows and prompts a system turn."
        )
    return own, notes


def default_system_text(jinja: str) -> str:
    """The sentence that a chat template adds to a conversation, "" if it adds none: a literal of at least four words
    that is not an error message."""
    jinja = re.sub(r"raise_exception\(.*?\)\s*[-%}]", "", jinja, flags=re.DOTALL)
    outside = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "\n", jinja, flags=re.DOTALL)  # literal text of the template
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
    token = (tokenizer.eos_ids or [None])[0] if name == "eos" else added.get(name)
    if token is None:
        raise InputError(
            f"the template needs the token {name}, which this tokenizer does not have: choose another "
            f"--template ({', '.join(TEMPLATES)})"
        )
    return token


def stop_ids(template: Template, tokenizer) -> list[int]:
    """The ids that end an answer: the template's end of turn and every EOS of the tokenizer."""
    template = fit_template(template, tokenizer)
    return list(dict.fromkeys([special_id(template.answer[-1][1:-1], tokenizer), *tokenizer.eos_ids]))


@lru_cache(maxsize=64)
def fit_template(template: Template, tokenizer) -> Template:
    """Adapt a template to a tokenizer: names of its special tokens in literals become these tokens (in Mistral's later
    vocabularies [INST] is one), and a missing BOS is omitted. Raises InputError if another token is missing."""
    names = sorted(tokenizer.specials, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else re.compile("(?!)")
    # If the tokenizer adds a prefix space to a document's first text only, add it to the other texts.
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
    """Tokens of a conversation, and which of them are supervised. All tokens of turns are made by this function.

    A conversation that ends with a user turn is a prompt: its tokens end with the header of the answer. A single turn
    of role "text" is plain text between BOS and EOS, supervised from its first token.
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

    They tokenize the text between two special tokens as one string, `render` tokenizes each piece separately. If the
    tokenizer adds a space before every text (SentencePiece), the Jinja template has that space between the pieces.
    docs/data.md lists the cases in which tokens of earlier answers may differ.
    """
    template = fit_template(template, tokenizer)

    def is_text(piece: str) -> bool:
        return not piece.startswith("‹")

    def emit(pieces: tuple[str, ...], text: str = "''", after: tuple[str, ...] = ()) -> str:
        """`after`: the pieces before these."""
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
