"""Byte-pair encoding as Hugging Face's `tokenizers` and tiktoken compute it, and the files that describe it.

A text is normalized and split into words, and each word into symbols of one character. Then the pair of symbols with
the lowest merge rank is merged, leftmost first, until no pair can be merged. There are two kinds of vocabulary:

- byte-level (GPT-2, Llama-3, SmolLM2): a symbol is a byte, written as the character of that number (latin-1);
- character-level (Llama-2, Mistral, TinyLlama as transformers saves them): spaces are "▁", and a character that is not
  in the vocabulary becomes its UTF-8 bytes, "<0xE2>" and so on.
"""

import base64
import heapq
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

from parts.cli import InputError
from parts.text.pre_tokenization import GPT2_PATTERN, LLAMA3_PATTERN, make_splitter

UNKNOWN = "\U0010ffff unknown"  # represents unk_token among the symbols; no text of one character equals it


class AddedTokens:
    """Strings that become one token wherever they occur in a text. The name of a special token remains plain text."""

    def __init__(self, ids: dict[str, int | None]):
        """`ids`: {string: id, or None for the name of a special token}."""
        ids = {name: i for name, i in ids.items() if name}
        names = sorted(ids, key=len, reverse=True)  # `tokenizers` prefers the leftmost match, then the longest
        found = any(i is not None for i in ids.values())
        self.ids, self.pattern = ids, re.compile("|".join(map(re.escape, names))) if found else None

    def split(self, text: str) -> Iterator[str | int]:
        """The ids of the added tokens in `text` and the texts between them, in order; no text is empty."""
        end = 0
        for match in self.pattern.finditer(text) if self.pattern else ():
            token = self.ids[match.group()]
            if token is not None:
                if match.start() > end:
                    yield text[end : match.start()]
                yield token
                end = match.end()
        if end < len(text):
            yield text[end:]


class BPETokenizer:
    """A byte-pair encoder. `encode` never produces special tokens, whatever the text contains.

    vocab: {symbols: id}. merges: {(left, right): rank}, or None if the rank of a merge is the id of the merged token
    (tiktoken). normalize: applied to a text first. pre_tokenizers: functions (text, whether it begins the document) ->
    words, applied in order. specials, text_tokens: {text: id} of the added tokens that text cannot and can produce;
    `normalized`: those that are matched after normalization. ignore_merges: a word in vocab is one token.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: dict[tuple[str, str], int] | None,
        pre_tokenizers: list[Callable[[str, bool], list[str]]],
        specials: dict[str, int],
        text_tokens: dict[str, int] | None = None,
        *,
        byte_level: bool = True,
        byte_fallback: bool = False,
        normalize: Callable[[str], str] = str,
        normalized: set[str] = frozenset(),
        ignore_merges: bool = False,
        unknown: int | None = None,
        fuse_unknown: bool = False,
        strip_first_space: bool = False,
        prefix_space: str = "",
    ):
        self.merges, self.pre_tokenizers = merges, pre_tokenizers
        self.specials, self.text_tokens = specials, text_tokens or {}
        self.byte_level, self.normalize, self.ignore_merges = byte_level, normalize, ignore_merges
        self.byte_fallback, self.fuse_unknown, self.strip_first_space = byte_fallback, fuse_unknown, strip_first_space
        self.prefix_space = prefix_space  # before every text ("always"), a document's first ("first"), or none ("")
        self.vocab = vocab if unknown is None else vocab | {UNKNOWN: unknown}
        self.alphabet = frozenset(piece for piece in vocab if len(piece) == 1)
        self.missing_bytes = bytes(b for b in range(256) if chr(b) not in vocab) if byte_level else b""
        added = dict.fromkeys(specials) | self.text_tokens
        self.added = AddedTokens({name: i for name, i in added.items() if name not in normalized})
        self.added_normalized = AddedTokens({normalize(name): i for name, i in added.items() if name in normalized})
        to_bytes = piece_bytes_of_byte_level if byte_level else piece_bytes_of_characters
        self.pieces = {i: to_bytes(piece) for piece, i in vocab.items()}
        for name, i in self.text_tokens.items():
            name = normalize(name) if name in normalized else name
            self.pieces[i] = name.encode() if byte_level else to_bytes(name)
        self.vocab_size = max([*self.pieces, *specials.values()], default=0) + 1
        self.bos_id, self.eos_ids = None, []
        self.encode_word_cached = lru_cache(maxsize=2**16)(self.encode_word)

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Token ids. `first`: the text begins a document; some vocabularies then add a space before it."""
        ids = []
        for i, part in enumerate(self.added.split(text)):
            if isinstance(part, int):
                ids.append(part)
                continue
            for j, piece in enumerate(self.added_normalized.split(self.normalize(part))):
                if isinstance(piece, int):
                    ids.append(piece)
                    continue
                for word in self.pre_tokenize(piece, first and i == j == 0):
                    ids += self.encode_word_cached(word) if len(word) < 256 else self.encode_word(word)
        return ids

    def pre_tokenize(self, text: str, first: bool) -> list[str]:
        words = [text]
        for split in self.pre_tokenizers:
            words = [w for i, word in enumerate(words) for w in split(word, first and i == 0)]
        return [word.encode().decode("latin-1") for word in words] if self.byte_level else words

    def symbols(self, word: str) -> list[str]:
        """The initial symbols of a word. Characters that are not in the vocabulary become bytes, else the unknown
        token, else nothing, as in `tokenizers`."""
        if self.alphabet.issuperset(word):
            return list(word)
        out, unknown = [], 0
        for character in word:
            if character in self.alphabet:
                out += [UNKNOWN] * unknown + [character]
                unknown = 0
            elif self.byte_fallback and self.vocab.keys() >= set(spelled := byte_fallback_tokens(character)):
                out += spelled
            elif UNKNOWN in self.vocab:
                unknown = 1 if self.fuse_unknown else unknown + 1
        return out + [UNKNOWN] * unknown

    def encode_word(self, word: str) -> list[int]:
        """Merge the pair of lowest rank, leftmost first, until none is left. O(n log n): a heap over a linked list."""
        if self.ignore_merges and word in self.vocab:
            return [self.vocab[word]]
        parts = self.symbols(word)
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
                continue  # one of the two has been merged with its other neighbor
            parts[i], parts[j] = left + right, ""
            after[i] = k = after[j]
            if k < len(parts):
                before[k] = i
                offer(i, k)
            if before[i] >= 0:
                offer(before[i], i)
        return [self.vocab[p] for p in parts if p]

    def loses(self, text: str) -> bool:
        """Whether `encode` drops characters of the text or replaces them by the unknown token."""
        if self.byte_level:
            content = self.normalize(text).encode() if self.missing_bytes else b""
            return len(content.translate(None, self.missing_bytes)) < len(content)
        missing = set("".join(self.pre_tokenize(self.normalize(text), True))) - self.alphabet
        return any(not (self.byte_fallback and self.vocab.keys() >= set(byte_fallback_tokens(c))) for c in missing)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out, bytes that are not UTF-8 replaced."""
        special = set(self.specials.values())
        content = b"".join(self.pieces.get(int(i), b"") for i in ids if int(i) not in special)
        text = content.decode("utf-8", "replace")
        return text[1:] if self.strip_first_space and text.startswith(" ") else text


def byte_fallback_tokens(character: str) -> list[str]:
    """The tokens of a character's UTF-8 bytes in a character-level vocabulary."""
    return [f"<0x{b:02X}>" for b in character.encode()]


def piece_bytes_of_byte_level(piece: str) -> bytes:
    try:
        return piece.encode("latin-1")
    except UnicodeEncodeError:  # a token that no text produces
        return piece.encode()


def piece_bytes_of_characters(piece: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


# ---------------------------------------------------------------- tiktoken


def read_tiktoken(path: Path) -> BPETokenizer:
    """Llama-3's ranks: one line "base64 rank" per token. 256 special tokens follow, with Llama 3.1's names."""
    try:
        lines = [line.split() for line in path.read_text(encoding="ascii").split("\n") if line]
        vocab = {base64.b64decode(piece, validate=True).decode("latin-1"): int(rank) for piece, rank in lines}
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
    reserved = iter(f"reserved_special_token_{i}" for i in range(256))
    specials = {f"<|{named.get(i) or next(reserved)}|>": len(vocab) + i for i in range(256)}
    tokenizer = BPETokenizer(vocab, None, [make_splitter(LLAMA3_PATTERN, keep_between=False)], specials)
    tokenizer.bos_id, tokenizer.eos_ids = specials["<|begin_of_text|>"], [specials["<|end_of_text|>"]]
    return tokenizer


def tiktoken_as_json(tokenizer: BPETokenizer) -> dict:
    """A tokenizer.json equivalent to Llama-3's ranks, for tools that cannot read a file of ranks."""
    letters = {byte: letter for letter, byte in byte_letters().items()}
    merges = sorted(possible_merges(tokenizer.vocab), key=lambda pair: tokenizer.vocab["".join(pair)])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    return bpe_json(
        vocab={piece.translate(letters): rank for piece, rank in tokenizer.vocab.items()},
        merges=[(left.translate(letters), right.translate(letters)) for left, right in merges],
        added_tokens=[(name, i, True) for name, i in tokenizer.specials.items()],
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
        decoder=byte_level | {"use_regex": True},
        ignore_merges=True,
    )


# ---------------------------------------------------------------- tokenizer.json


def read_tokenizer_json(path: Path, declared: dict[str, tuple[int, bool]]) -> BPETokenizer:
    """Load an HF tokenizer.json with a BPE model of either kind. Raises InputError for unsupported settings that would
    change the tokens. `declared`: {text: (id, is special)}, added by tokenizer_config.json and similar files; these
    override tokenizer.json."""
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        return parse_tokenizer_json(spec, declared)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    except KeyError as e:
        raise InputError(f"{path}: not a tokenizer.json of a BPE model: {e} is missing") from None
    except (TypeError, AttributeError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: not a tokenizer.json of a BPE model ({e})") from None


def parse_tokenizer_json(spec: dict, declared: dict[str, tuple[int, bool]]) -> BPETokenizer:
    model, pre_tokenizer = spec["model"], spec.get("pre_tokenizer") or {}
    byte_level = "ByteLevel" in json.dumps(pre_tokenizer)
    normalize, prepends = read_normalizer(spec.get("normalizer"))
    pre_tokenizers, scheme = read_pre_tokenizer(pre_tokenizer)
    specials, text_tokens, normalized = read_added_tokens(spec.get("added_tokens") or [], declared)
    vocab, merges, unknown = read_bpe_model(model, specials, byte_level)
    if prepends and scheme == "first":
        raise InputError("not supported: a Prepend normalizer together with a Metaspace of the scheme 'first'")
    if not byte_level and not prepends and not scheme:
        raise InputError(
            "neither byte-level nor of the SentencePiece kind: it has no ByteLevel or Metaspace pre-tokenizer and "
            "no Prepend normalizer. If the model has a tokenizer.model, put that into the folder"
        )
    ignore_merges = bool(model.get("ignore_merges"))
    if not byte_level and not ignore_merges and "▁" in vocab and not any("▁" in t.lstrip("▁") for t in vocab):
        # Merges never cross word boundaries: split there, so that words can be cached.
        pre_tokenizers.append(lambda text, first: re.findall("▁*[^▁]+|▁+", text))
    decoder = json.dumps(spec.get("decoder") or {})
    return BPETokenizer(
        vocab,
        merges,
        pre_tokenizers,
        specials,
        text_tokens,
        byte_level=byte_level,
        byte_fallback=bool(model.get("byte_fallback")) and not byte_level,
        normalize=normalize,
        normalized=normalized,
        ignore_merges=ignore_merges,
        unknown=unknown,
        fuse_unknown=bool(model.get("fuse_unk")),
        strip_first_space='"Strip"' in decoder or ('"Metaspace"' in decoder and '"never"' not in decoder),
        prefix_space="always" if prepends else {"never": ""}.get(scheme, scheme),
    )


def read_bpe_model(
    model: dict, specials: dict[str, int], byte_level: bool
) -> tuple[dict[str, int], dict[tuple[str, str], int], int | None]:
    """The vocabulary without the pieces that no text may produce, the merges with their ranks, and the id of the
    unknown token, from the "model" of a tokenizer.json. Pieces of a byte-level vocabulary are returned as bytes."""
    vocab, merges = model["vocab"], model["merges"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    if model.get("type", "BPE") != "BPE":
        raise InputError(f"a {model['type']} model is not supported, only BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise unsupported({key: model[key]})
    unknown = model.get("unk_token")
    unknown_id = None if unknown is None else vocab.get(unknown, specials.get(unknown))
    if unknown is not None and unknown_id is None:
        raise InputError(f"unk_token {unknown!r} is not in the vocabulary")
    vocab = {t: i for t, i in vocab.items() if t not in specials and t != unknown}
    if byte_level:
        table = {ord(letter): byte for letter, byte in byte_letters().items()}
        vocab = {t.translate(table): i for t, i in vocab.items() if table.keys() >= set(map(ord, t))}
        merges = [(a.translate(table), b.translate(table)) for a, b in merges]
    missing = next((f"{a} {b}" for a, b in merges if a + b not in vocab), None)
    if missing:
        raise InputError(f"the merge {missing!r} produces a token that is not in the vocabulary")
    return vocab, {pair: rank for rank, pair in enumerate(merges)}, unknown_id


def unsupported(what) -> InputError:
    return InputError(f"not supported: {json.dumps(what)[:200]}")


def byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: every byte as one printable character, {character: byte}; others are mapped from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def read_added_tokens(
    added: list[dict], declared: dict[str, tuple[int, bool]]
) -> tuple[dict[str, int], dict[str, int], set[str]]:
    """Special tokens and text tokens, {text: id}, and the texts of those that are matched after normalization."""
    specials, text_tokens, normalized = {}, {}, set()
    listed = {a["content"]: (int(a["id"]), bool(a.get("special"))) for a in added}
    for text, (i, special) in (declared | listed).items():
        is_special = special or declared.get(text, (i, False))[1]
        (specials if is_special else text_tokens)[text] = i
    for a in added:
        if a["content"] in text_tokens and (a.get("single_word") or a.get("lstrip") or a.get("rstrip")):
            raise unsupported(a)
        if a.get("normalized"):
            normalized.add(a["content"])
    return specials, text_tokens, normalized


def read_normalizer(spec: dict | None) -> tuple[Callable[[str], str], bool]:
    """A normalizer as a function, and whether it adds a prefix to every text."""
    functions, prepends = [], False
    for part in [] if not spec else spec["normalizers"] if spec.get("type") == "Sequence" else [spec]:
        match part:
            case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" as form}:
                functions.append(partial(unicodedata.normalize, form))
            case {"type": "Prepend", "prepend": str(prefix)}:
                functions.append(lambda text, prefix=prefix: prefix + text if text else text)
                prepends = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
                functions.append(lambda text, old=old, new=new: text.replace(old, new))
            case _:
                raise unsupported(part)

    def normalize(text: str) -> str:
        for function in functions:
            text = function(text)
        return text

    return normalize, prepends


def read_pre_tokenizer(spec: dict) -> tuple[list[Callable[[str, bool], list[str]]], str]:
    """The functions that split a text into words, and when they add a space before it: "always", "first", "never" or
    "" (none of them does)."""
    pre_tokenizers, scheme = [], ""
    parts = spec["pretokenizers"] if spec.get("type") == "Sequence" else [spec] if spec else []
    for k, part in enumerate(parts):
        match part:
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
                pre_tokenizers.append(make_splitter(pattern, True))
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"String": text}}:
                pre_tokenizers.append(make_splitter(re.escape(text), True))
            case {"type": "Split", "behavior": "Removed", "invert": True, "pattern": {"Regex": pattern}}:
                pre_tokenizers.append(make_splitter(pattern, False))
            case {"type": "Digits", "individual_digits": bool(alone)}:
                pre_tokenizers.append(make_splitter(r"\p{N}" if alone else r"\p{N}+", True))
            case {"type": "ByteLevel", "add_prefix_space": bool(prefix)} if k == len(parts) - 1:
                if prefix:
                    scheme = "always"
                    pre_tokenizers.append(lambda text, first: [text if text.startswith(" ") else " " + text])
                if part.get("use_regex", True):
                    pre_tokenizers.append(make_splitter(GPT2_PATTERN, True))
            case {"type": "Metaspace", "replacement": "▁"}:
                scheme = part.get("prepend_scheme", "always") if part.get("add_prefix_space", True) else "never"
                if scheme not in ("always", "first", "never"):
                    raise unsupported(part)
                pre_tokenizers.append(partial(metaspace_words, scheme=scheme, split=part.get("split", True)))
            case _:
                raise unsupported(part)
    return pre_tokenizers, scheme


def metaspace_words(text: str, first: bool, scheme: str, split: bool) -> list[str]:
    """`tokenizers`' Metaspace: spaces become "▁", with one added in front if there is none."""
    text = text.replace(" ", "▁")
    if (scheme == "always" or (scheme == "first" and first)) and not text.startswith("▁"):
        text = "▁" + text
    return re.findall("▁[^▁]*|[^▁]+", text) if split else [text]


# ---------------------------------------------------------------- writing a tokenizer.json


def possible_merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that together are a piece of `vocab`."""
    splits = [(piece[:k], piece[k:]) for piece in vocab for k in range(1, len(piece))]
    return [(left, right) for left, right in splits if left in vocab and right in vocab]


def bpe_json(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    added_tokens: list[tuple[str, int, bool]],
    normalizer: dict | None,
    pre_tokenizer: dict | None,
    decoder: dict,
    **model,
) -> dict:
    """The content of a tokenizer.json. `added_tokens`: text, id, whether special; `model`: settings of the BPE model
    that differ from the defaults."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    defaults = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags, "special": special} for text, i, special in added_tokens],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": defaults | model | {"vocab": vocab, "merges": [list(pair) for pair in merges]},
    }
