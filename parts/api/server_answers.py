"""generate.py --server: prompts as questions to a server, and its replies as rows of an answers file."""

import re
from dataclasses import replace

from parts.api.options import ApiOptions
from parts.api.questions import Question, question_key, reason_of
from parts.api.replies import without_thoughts
from parts.cli import print_list, valid_unicode
from parts.text.testsets import Prompt, exceeds_context

# Text that the tokenizers of chat servers may encode as a special token.
LOOKS_SPECIAL = re.compile(r"<\|[\w-]{1,40}\|>|</?s>|<(?:unk|pad|bos|eos)>|\[/?INST\]|<</?SYS>>")


def make_questions(
    prompts: list[Prompt],
    options: ApiOptions,
    seed: int,
    completions: str | None,
    context: float,
    texts: list[str],
    specials: list[str],
) -> tuple[list[Question], dict[str, dict]]:
    """A question for each prompt, and by key the answers of prompts that cannot be asked. Sets `key` of the prompts.

    `completions`: None to send chat messages; "ids" to send `prompt.tokens`; "text" to send the prompt's text of
    `texts`: then no turn may contain one of the `specials`, which a server would encode as that token.
    """
    questions, failed, warnings = [], {}, []
    for i, p in enumerate(prompts):
        asked = {"ids": p.tokens, "text": texts[i] if texts else None}.get(completions)
        error = exceeds_context(len(p.tokens), context)
        if completions == "text":
            held = next((name for name in specials if any(name in turn.text for turn in p.turns)), None)
            if held:
                error = error or f"the text holds {held}, a special token to a server (send --completions ids)"
        elif asked is None and (special := LOOKS_SPECIAL.search("\n".join(turn.text for turn in p.turns))):
            warnings.append(f"{p.source}: {special[0]}")
        question = question_of(p, options, seed, asked, context - len(p.tokens))
        p.key = question.key
        if error:
            failed[p.key] = not_answered(error)
        else:
            questions.append(question)
    print_list("prompts hold what a chat server may take for a special token (--completions cannot)", warnings)
    return questions, failed


def question_of(p: Prompt, options: ApiOptions, seed: int, asked: str | list[int] | None, room: float) -> Question:
    """`asked`: None for chat messages, else the prompt to be completed, with `room` for so many tokens. As with the
    local engine, the seed of a sample depends on `seed` and the prompt alone."""
    messages = [{"role": turn.role, "content": valid_unicode(turn.text)} for turn in p.turns]
    max_tokens = min(options.max_tokens, room)
    digest = question_key(options, messages if asked is None else asked, max_tokens, seed)
    question = Question(digest[:32], p.source, messages, int(digest[32:40], 16) >> 1)
    return question if asked is None else replace(question, prompt=asked, max_tokens=max_tokens)


def not_answered(error: str) -> dict:
    return {"output": "", "output_tokens": 0, "finish_reason": "error", "error": error}


def answer_of(records: list[dict]) -> dict:
    """The fields of an answers file: the reply without its thoughts, and the server's token counts, which include the
    thoughts and usually the token that ends the answer."""
    record = next((r for r in records if r.get("value") is not None), None)
    if record is None:
        return not_answered(reason_of(records))
    tokens = {"prompt_tokens": record["usage"]["prompt_tokens"], "output_tokens": record["usage"]["completion_tokens"]}
    answer = {"output": without_thoughts(record["reply"]), **tokens}
    return answer | {"finish_reason": record.get("finish_reason") or "stop"}


class Pieces:
    """Takes the place of a tokenizer to `render` a conversation as text, with special tokens by name. `adds_bos`:
    whether the server puts a BOS in front of text itself."""

    def __init__(self, tokenizer, adds_bos: bool):
        self.adds_bos = adds_bos
        names = {i: name for name, i in tokenizer.specials.items()}
        self.bos_id = names.get(tokenizer.bos_id)
        self.eos_ids = [names[i] for i in tokenizer.eos_ids if i in names]
        self.specials = {name: name for name in tokenizer.specials}
        self.text_tokens, self.prefix_space = {}, tokenizer.prefix_space

    def encode(self, text: str, first: bool = True) -> list[str]:
        return [text]

    def text(self, rendered: list[str]) -> str:
        rendered = rendered[self.adds_bos and rendered[:1] == [self.bos_id] :]
        if self.prefix_space == "always":  # a server puts it in front of a text behind a special token only
            joints = zip(["", *rendered], rendered)
            special = self.specials.keys()
            rendered = [" " * (a not in special and b not in special and a != "") + b for a, b in joints]
        return "".join(rendered)
