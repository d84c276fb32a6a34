"""generate.py --server: prompts become questions to a server, and its replies rows of an answers file."""

import re
from dataclasses import replace

from parts.api.options import ApiOptions
from parts.api.questions import Question, failure_reason, question_key
from parts.api.replies import strip_thoughts
from parts.cli import print_list, valid_unicode
from parts.text.testsets import Prompt, exceeds_context

# Text that a chat server's tokenizer may encode as a special token.
SPECIAL_TOKEN_TEXT = re.compile(r"<\|[\w-]{1,40}\|>|</?s>|<(?:unk|pad|bos|eos)>|\[/?INST\]|<</?SYS>>")


def make_questions(
    prompts: list[Prompt],
    options: ApiOptions,
    seed: int,
    completions: str | None,
    context: float,
    texts: list[str],
    specials: list[str],
) -> tuple[list[Question], dict[str, dict]]:
    """Questions for the prompts, and by key the answers of prompts that cannot be sent. Sets `key` of the prompts.

    `completions`: None to send chat messages; "ids" to send `prompt.tokens`; "text" to send the prompt's text in
    `texts`; then no turn may contain one of the `specials`, which a server would encode as that token.
    """
    questions, failed, warnings = [], {}, []
    for i, p in enumerate(prompts):
        asked = {"ids": p.tokens, "text": texts[i] if texts else None}.get(completions)
        error = exceeds_context(len(p.tokens), context)
        if completions == "text":
            special = next((name for name in specials if any(name in turn.text for turn in p.turns)), None)
            if special:
                error = error or f"the text contains {special}, a special token to a server (send --completions ids)"
        elif asked is None and (special := SPECIAL_TOKEN_TEXT.search("\n".join(turn.text for turn in p.turns))):
            warnings.append(f"{p.source}: {special[0]}")
        question = build_question(p, options, seed, asked, context - len(p.tokens))
        p.key = question.key
        if error:
            failed[p.key] = failed_answer(error)
        else:
            questions.append(question)
    print_list("prompts contain text that a chat server may encode as a special token (use --completions)", warnings)
    return questions, failed


def build_question(p: Prompt, options: ApiOptions, seed: int, asked: str | list[int] | None, room: float) -> Question:
    """A question from a prompt. `asked`: None for chat messages, else the prompt to complete, with `room` for so many
    tokens. As in local generation, the seed of a sample depends only on `seed` and the prompt."""
    messages = [{"role": turn.role, "content": valid_unicode(turn.text)} for turn in p.turns]
    max_tokens = min(options.max_tokens, room)
    digest = question_key(options, messages if asked is None else asked, max_tokens, seed)
    question = Question(digest[:32], p.source, messages, int(digest[32:40], 16) >> 1)
    return question if asked is None else replace(question, prompt=asked, max_tokens=max_tokens)


def failed_answer(error: str) -> dict:
    return {"output": "", "output_tokens": 0, "finish_reason": "error", "error": error}


def build_answer(records: list[dict]) -> dict:
    """The fields of an answers file: the reply without thoughts, and the server's token counts, which include the
    thoughts and usually the end token."""
    record = next((r for r in records if r.get("value") is not None), None)
    if record is None:
        return failed_answer(failure_reason(records))
    tokens = {"prompt_tokens": record["usage"]["prompt_tokens"], "output_tokens": record["usage"]["completion_tokens"]}
    answer = {"output": strip_thoughts(record["reply"]), **tokens}
    return answer | {"finish_reason": record.get("finish_reason") or "stop"}


class TextTokenizer:
    """Replaces a tokenizer in `render` to get a conversation as text, with special tokens by name. `adds_bos`: whether
    the server itself prepends a BOS to text."""

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
        if self.prefix_space == "always":  # a server adds this space only to a text after a special token
            joints = zip(["", *rendered], rendered)
            special = self.specials.keys()
            rendered = [" " * (a not in special and b not in special and a != "") + b for a, b in joints]
        return "".join(rendered)
