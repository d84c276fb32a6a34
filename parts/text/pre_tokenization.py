"""Pre-tokenization patterns of published tokenizers, for Python's `re`, which lacks their Unicode classes."""

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import cache

import numpy as np

from parts.cli import InputError

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Letters and numbers that Unicode 14 to 16 added. The reference tokenizers use Unicode 16; Python 3.10 has 13.
ADDED_SINCE_UNICODE_13 = {
    "L": "870-887 889-88E 8B5 8C8-8C9 C5D CDD 170D 171F 1B4C 1C89-1C8A 2C2F 2C5F 9FFD-9FFF A7C0-A7C1 A7CB-A7CD "
    "A7D0-A7D1 A7D3 A7D5-A7DC A7F2-A7F4 10570-1057A 1057C-1058A 1058C-10592 10594-10595 10597-105A1 105A3-105B1 "
    "105B3-105B9 105BB-105BC 105C0-105F3 10780-10785 10787-107B0 107B2-107BA 10D4A-10D65 10D6F-10D85 10EC2-10EC4 "
    "10F70-10F81 11071-11072 11075 1123F-11240 11380-11389 1138B 1138E 11390-113B5 113B7 113D1 113D3 11740-11746 "
    "11AB0-11ABF 11BC0-11BE0 11F02 11F04-11F10 11F12-11F33 12F90-12FF0 1342F 13441-13446 13460-143FA 16100-1611D "
    "16A70-16ABE 16D40-16D6C 18CFF 1AFF0-1AFF3 1AFF5-1AFFB 1AFFD-1AFFE 1B11F-1B122 1B132 1B155 1DF00-1DF1E "
    "1DF25-1DF2A 1E030-1E06D 1E290-1E2AD 1E4D0-1E4EB 1E5D0-1E5ED 1E5F0 1E7E0-1E7E6 1E7E8-1E7EB 1E7ED-1E7EE "
    "1E7F0-1E7FE 2A6DE-2A6DF 2B735-2B739 2EBF0-2EE5D 31350-323AF",
    "N": "10D40-10D49 116D0-116E3 11BF0-11BF9 11F50-11F59 16130-16139 16AC0-16AC9 16D70-16D79 1CCF0-1CCF9 1D2C0-1D2D3 "
    "1E4F0-1E4F9 1E5F1-1E5FA",
}
WHITE_SPACE = "9-D 20 85 A0 1680 2000-200A 2028-2029 202F 205F 3000"  # Unicode's; Python's \s contains four more


@cache
def character_class(name: str, negated: bool) -> str:
    """The inside of a regular-expression class for `\\p{name}` (a Unicode category such as L or Nd) or for `\\s`."""
    member = np.zeros(sys.maxunicode + 1, bool)
    added = WHITE_SPACE if name == "s" else ADDED_SINCE_UNICODE_13.get(name, "")
    for item in added.split():
        first, _, last = item.partition("-")
        member[int(first, 16) : int(last or first, 16) + 1] = True
    if name != "s":
        member |= np.array([unicodedata.category(chr(i)).startswith(name) for i in range(len(member))])
    edges = np.flatnonzero(np.diff(np.r_[False, member != negated, False].astype(np.int8)))
    return "".join(f"\\U{a:08x}-\\U{b - 1:08x}" for a, b in edges.reshape(-1, 2))


def compile_pattern(pattern: str) -> re.Pattern:
    """Compile a tokenizer's pattern with Python's `re`, expanding the Unicode classes that `re` lacks."""
    if re.search(r"\\[wWbB]|&&|\\[pP]\{\^|\(\?[a-z]*m|\[\[:", pattern):
        raise InputError(f"pre-tokenization pattern not supported, Python's re would read it otherwise: {pattern}")
    out, inside = [], False
    for token in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        if token[:2] in ("\\p", "\\P", "\\s", "\\S"):
            spelled = character_class(token[3:-1] or "s", token[1].isupper())
            token = spelled if inside else f"[{spelled}]"
        elif token in "[]":
            inside = token == "["
        out.append(token)
    try:
        return re.compile("".join(out), re.MULTILINE)  # ^ and $ at every line, as in the reference
    except re.error as e:
        raise InputError(f"pre-tokenization pattern not understood ({e}): {pattern}") from None


def make_splitter(pattern: str, keep_between: bool) -> Callable[[str, bool], list[str]]:
    """A function of `BPETokenizer.pre_tokenizers` that returns the non-empty matches of `pattern` in a text, in order,
    with or without the text between them."""
    compiled = compile_pattern(pattern)

    def split(text: str, first: bool) -> list[str]:
        words, end = [], 0
        for match in compiled.finditer(text):
            if keep_between:
                words.append(text[end : match.start()])
            words.append(match.group())
            end = match.end()
        if keep_between:
            words.append(text[end:])
        return [word for word in words if word]

    return split
