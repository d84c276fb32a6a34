"""Tokenizers: SentencePiece, byte-level BPE, and what a model folder says of its special tokens.

Text never becomes a special token: `encode` makes none, whatever the text holds.
"""

import base64
import heapq
import json
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from parts.program import InputError, read_json_object, write_file


class SentencePieceTokenizer:
    """Llama-1/2, Mistral, TinyLlama: a `tokenizer.model`. Encodes as sentencepiece does, with its dummy prefix.

    `added` are special tokens that the folder declares beside the model, {text: id}. Control pieces cannot come out of
    text by themselves; a declared special that the model holds as a user-defined symbol could, and is kept from it.
    """

    def __init__(self, path: Path, added: dict[str, int]):
        try:
            self.sp = SentencePieceProcessor()
            self.sp.LoadFromSerializedProto(path.read_bytes())  # it cannot open every path that Python can
        except (RuntimeError, OSError) as e:
            raise InputError(f"{path}: not a SentencePiece model ({e})") from None
        n = self.sp.get_piece_size()
        self.specials = {self.sp.id_to_piece(i): i for i in range(n) if self.sp.is_control(i)} | added
        self.vocab_size = max([n, *(i + 1 for i in self.specials.values())])
        self.bos_id = self.sp.bos_id() if self.sp.bos_id() >= 0 else None
        self.eos_ids = [self.sp.eos_id()] if self.sp.eos_id() >= 0 else []
        reachable = [t for t, i in self.specials.items() if len(t) > 1 and i in self.sp.encode(t)]
        self.reachable = re.compile("(?=" + "|".join(map(re.escape, reachable)) + ")") if reachable else None

    def encode(self, text: str) -> list[int]:
        if not self.reachable or not self.reachable.search(text):
            return self.sp.encode(text)
        # Cut inside each such string, so that no part of the text holds the symbol. Parts after the first go on inside
        # a line: a character that merges with nothing takes the dummy prefix for them, and is dropped again.
        cuts = [m.start() + 1 for m in self.reachable.finditer(text)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        spare = "\ue000"
        extra = len(self.sp.encode(spare))
        return self.sp.encode(parts[0]) + [i for part in parts[1:] for i in self.sp.encode(spare + part)[extra:]]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out."""
        special, n = set(self.specials.values()), self.sp.get_piece_size()
        return self.sp.decode([int(i) for i in ids if int(i) not in special and int(i) < n])


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Letters and numbers that Unicode 14 to 16 added. The reference tokenizers know Unicode 16; Python 3.10 knows 13.
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
WHITE_SPACE = "9-D 20 85 A0 1680 2000-200A 2028-2029 202F 205F 3000"  # Unicode's; Python's \s holds four more


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
    """Compile a tokenizer's pattern with Python's `re`, spelling out the Unicode classes which `re` lacks."""
    out, inside = [], False
    for token in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        if token[:2] in ("\\p", "\\P", "\\s", "\\S"):
            spelled = character_class(token[3:-1] or "s", token[1].isupper())
            token = spelled if inside else f"[{spelled}]"
        elif token in "[]":
            inside = token == "["
        out.append(token)
    try:
        return re.compile("".join(out))
    except re.error as e:
        raise InputError(f"pre-tokenization pattern not understood ({e}): {pattern}") from None


class BytePairTokenizer:
    """Byte-level BPE, as in Llama-3 (tiktoken ranks) and in HF tokenizer.json files of the GPT-2 kind.

    vocab: {bytes: id}. merges: {(left, right): rank}, or None where the rank of a merge is the id of what it makes
    (tiktoken). steps: functions that cut a string into strings, applied one after the other before merging.
    """

    def __init__(
        self,
        vocab: dict[bytes, int],
        merges: dict[tuple[bytes, bytes], int] | None,
        steps: list[Callable[[str], list[str]]],
        specials: dict[str, int],
        whole_words: bool = True,
        normal_form: str | None = None,
        text_tokens: dict[str, int] | None = None,
    ):
        self.vocab, self.merges, self.steps, self.specials = vocab, merges, steps, specials
        self.whole_words, self.normal_form = whole_words, normal_form  # whole_words: a word in vocab is not merged
        missing = [b for b in range(256) if bytes([b]) not in vocab]
        if missing:
            raise InputError(f"not a byte-level vocabulary: no token for the byte {missing[0]}")
        self.text_tokens = text_tokens or {}  # added tokens that are not special: ordinary text does make them
        self.text_pattern = "|".join(map(re.escape, sorted(self.text_tokens, key=len, reverse=True)))
        self.pieces = {i: piece for piece, i in vocab.items()} | {i: t.encode() for t, i in self.text_tokens.items()}
        self.vocab_size = max([*self.pieces, *specials.values()]) + 1
        self.bos_id, self.eos_ids = None, []
        self.merge_cached = lru_cache(maxsize=2**16)(self.merge)

    def encode(self, text: str) -> list[int]:
        if not self.text_tokens:
            return self.encode_plain(text)
        ids = []
        for part in re.split(f"({self.text_pattern})", text):
            ids += [self.text_tokens[part]] if part in self.text_tokens else self.encode_plain(part)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        if self.normal_form:
            text = unicodedata.normalize(self.normal_form, text)
        words = [text] if text else []
        for step in self.steps:
            words = [w for word in words for w in step(word)]
        ids = []
        for word in words:
            ids += self.merge_cached(word.encode("utf-8"))
        return ids

    def merge(self, word: bytes) -> list[int]:
        """Merge the pair of lowest rank, leftmost first, until none is left. O(n log n): a heap over a linked list."""
        if self.whole_words and word in self.vocab:
            return [self.vocab[word]]
        parts = [word[i : i + 1] for i in range(len(word))]
        after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
        heap = []

        def offer(i: int, j: int) -> None:
            left, right = parts[i], parts[j]
            rank = self.vocab.get(left + right) if self.merges is None else self.merges.get((left, right))
            if rank is not None:
                heapq.heappush(heap, (rank, i, left, right))

        for i in range(len(parts) - 1):
            offer(i, i + 1)
        while heap:
            _, i, left, right = heapq.heappop(heap)
            j = after[i]
            if parts[i] != left or j == len(parts) or parts[j] != right:
                continue  # one of the two has been merged with another neighbour since
            parts[i], parts[j] = left + right, b""
            after[i] = k = after[j]
            if k < len(parts):
                before[k] = i
                offer(i, k)
            if before[i] >= 0:
                offer(before[i], i)
        return [self.vocab[p] for p in parts if p]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out, bytes that are not UTF-8 replaced."""
        special = set(self.specials.values())
        return b"".join(self.pieces.get(int(i), b"") for i in ids if int(i) not in special).decode("utf-8", "replace")


def cut(pattern: re.Pattern, keep_between: bool, text: str) -> list[str]:
    """The matches of `pattern` in `text`, in order, with or without the text between them."""
    out, end = [], 0
    for m in pattern.finditer(text):
        if keep_between and m.start() > end:
            out.append(text[end : m.start()])
        if m.end() > m.start():
            out.append(m.group())
        end = m.end()
    if keep_between and end < len(text):
        out.append(text[end:])
    return out


def read_tiktoken(path: Path) -> BytePairTokenizer:
    """Llama-3's ranks: a line "base64 rank" a token. Its 256 special tokens follow; names as in Llama 3.1 and later."""
    try:
        lines = path.read_text(encoding="ascii").split("\n")
        vocab = {base64.b64decode(line.split()[0], validate=True): int(line.split()[1]) for line in lines if line}
    except (ValueError, IndexError) as e:
        raise InputError(f"{path}: not a file of tiktoken ranks ({e})") from None
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise InputError(f"{path}: the ranks are not 0 to {len(vocab) - 1}, each once")
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }
    names = [named[i] for i in sorted(named)] + [f"reserved_special_token_{i}" for i in range(256 - len(named))]
    rest = iter(names[len(named) :])
    ordered = [named.get(i) or next(rest) for i in range(256)]
    specials = {f"<|{name}|>": len(vocab) + i for i, name in enumerate(ordered)}
    tokenizer = BytePairTokenizer(vocab, None, [partial(cut, compile_pattern(LLAMA3_PATTERN), False)], specials)
    tokenizer.bos_id, tokenizer.eos_ids = specials["<|begin_of_text|>"], [specials["<|end_of_text|>"]]
    return tokenizer


def byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: every byte as one printable letter, {letter: byte}; bytes without one follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def read_tokenizer_json(path: Path) -> BytePairTokenizer:
    """An HF tokenizer.json of the byte-level kind. What would tokenize differently and is not supported is an error."""
    letters = byte_letters()

    def to_bytes(text: str) -> bytes:
        return bytes(letters[c] for c in text)

    def unsupported(what):
        raise InputError(f"{path}: not supported: {json.dumps(what)[:200]}")

    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        model, added = spec["model"], spec.get("added_tokens") or []
        specials = {a["content"]: a["id"] for a in added if a.get("special")}
        text_tokens = {a["content"]: a["id"] for a in added if not a.get("special")}
        apart = {*specials, *(t for t in text_tokens if not letters.keys() >= set(t)), model.get("unk_token")}
        vocab = {to_bytes(t): i for t, i in model["vocab"].items() if t not in apart}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        merges = {(to_bytes(a), to_bytes(b)): rank for rank, (a, b) in enumerate(merges)}
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(key):
                unsupported({key: model[key]})
        for a in added:
            if not a.get("special") and (a.get("single_word") or a.get("lstrip") or a.get("rstrip")):
                unsupported(a)
        normalizer = (spec.get("normalizer") or {}).get("type")
        if normalizer not in (None, "NFC", "NFD", "NFKC", "NFKD"):
            unsupported(spec["normalizer"])
        pre = spec.get("pre_tokenizer") or {}
        steps = []
        for step in pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]:
            match step:
                case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
                    steps.append(partial(cut, compile_pattern(pattern), True))
                case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"String": text}}:
                    steps.append(partial(cut, re.compile(re.escape(text)), True))
                case {"type": "Split", "behavior": "Removed", "invert": True, "pattern": {"Regex": pattern}}:
                    steps.append(partial(cut, compile_pattern(pattern), False))
                case {"type": "Digits", "individual_digits": bool(alone)}:
                    steps.append(partial(cut, compile_pattern(r"\p{N}" if alone else r"\p{N}+"), True))
                case {"type": "ByteLevel", "add_prefix_space": bool(prefix)}:
                    if prefix:
                        steps.append(lambda word: [word if word.startswith(" ") else " " + word])
                    if step.get("use_regex", True):
                        steps.append(partial(cut, compile_pattern(GPT2_PATTERN), True))
                case _:
                    unsupported(step)
        if '"ByteLevel"' not in json.dumps(pre):
            unsupported(pre)
        if any(a + b not in vocab for a, b in merges):
            raise InputError(f"{path}: a merge makes a token that is not in the vocabulary")
        return BytePairTokenizer(
            vocab, merges, steps, specials, bool(model.get("ignore_merges")), normalizer, text_tokens
        )
    except KeyError as e:
        raise InputError(
            f"{path}: not a byte-level BPE ({e}); for a SentencePiece tokenizer put its tokenizer.model into the folder"
        ) from None
    except (TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise InputError(f"{path}: not a tokenizer.json of a byte-level BPE ({e})") from None


TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder that say how it tokenizes, config.json aside."""
    return [path for path in sorted(folder.iterdir()) if path.name in TOKENIZER_FILES or path.suffix == ".tiktoken"]


def load_tokenizer(folder: str | Path) -> SentencePieceTokenizer | BytePairTokenizer:
    """The tokenizer of a model folder, by what lies there: tokenizer.model (SentencePiece, or Llama-3's ranks under
    the same name), *.tiktoken, or a byte-level tokenizer.json. Has encode(text), decode(ids), bos_id (or None), eos_ids
    (the template's first, then all at which an answer may end), specials {text: id}, vocab_size. Raises InputError.
    """
    folder = Path(folder)
    config, settings = read_json_object(folder / "config.json"), read_json_object(folder / "tokenizer_config.json")
    generation = read_json_object(folder / "generation_config.json")
    try:
        added = {str(k): int(v) for k, v in read_json_object(folder / "added_tokens.json").items()}
        for i, token in settings.get("added_tokens_decoder", {}).items():
            if token.get("special", True):
                added[token["content"]] = int(i)
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise InputError(f"{folder}: added tokens not understood ({e!r})") from None
    model, ranks = folder / "tokenizer.model", sorted(folder.glob("*.tiktoken"))
    if model.exists():
        with open(model, "rb") as f:
            is_ranks = re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", f.read(200)) is not None
        tokenizer = read_tiktoken(model) if is_ranks else SentencePieceTokenizer(model, added)
    elif ranks:
        tokenizer = read_tiktoken(ranks[0])
    elif (folder / "tokenizer.json").exists():
        tokenizer = read_tokenizer_json(folder / "tokenizer.json")
        tokenizer.specials = added | tokenizer.specials
    else:
        raise InputError(f"{folder} has no tokenizer: neither tokenizer.model nor tokenizer.json nor *.tiktoken")

    def ids(value, key) -> list[int]:
        """Ids from a token's text, an {"content": text} object, an id or a list of ids; those that exist."""
        value = value.get("content") if isinstance(value, dict) else value
        items = value if isinstance(value, list) else [value]
        items = [tokenizer.specials.get(i) if isinstance(i, str) else i for i in items]
        if any(type(i) not in (int, type(None)) for i in items):
            raise InputError(f"{folder}: {key} = {value!r} is not a token")
        return [i for i in items if i is not None]

    bos = ids(settings.get("bos_token"), "bos_token") or ids(config.get("bos_token_id"), "bos_token_id")
    if bos and tokenizer.bos_id is None:
        tokenizer.bos_id = bos[0]
    eos = ids(settings.get("eos_token"), "eos_token") + tokenizer.eos_ids
    eos += ids(config.get("eos_token_id"), "eos_token_id") + ids(generation.get("eos_token_id"), "eos_token_id")
    tokenizer.eos_ids = list(dict.fromkeys(eos))
    return tokenizer


def copy_tokenizer(source: Path, folder: Path, chat_template: str, stop_ids: list[int]) -> None:
    """Copy a model's tokenizer files and say in them how the copy is prompted and where its answers end."""
    for path in tokenizer_files(source):
        shutil.copyfile(path, folder / path.name)
    tokenizer = load_tokenizer(source)
    texts = {i: t for t, i in tokenizer.specials.items()}
    settings = read_json_object(source / "tokenizer_config.json") | {"chat_template": chat_template}
    if isinstance(tokenizer, SentencePieceTokenizer):
        settings.setdefault("tokenizer_class", "LlamaTokenizer")
        settings["legacy"] = True  # transformers' name for a space before every piece, as we encode
    # Whether engines put a BOS in front of plain text; where it is not said, transformers 4 does and 5 does not.
    settings["add_bos_token"] = tokenizer.bos_id is not None and chat_template.startswith("{{ bos_token }}")
    settings.setdefault("bos_token", texts.get(tokenizer.bos_id))
    settings.setdefault("eos_token", texts.get((tokenizer.eos_ids or [None])[0]))
    generation = read_json_object(source / "generation_config.json")
    generation |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": stop_ids}
    for file, content in {"tokenizer_config.json": settings, "generation_config.json": generation}.items():
        write_file(folder / file, json.dumps(content, indent=1, ensure_ascii=False))
