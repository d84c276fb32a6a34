"""Tokenizers of model folders: SentencePiece and byte-pair encoding, and the folder's special tokens.

`encode` never produces special tokens, whatever the text contains.
"""

import json
import random
import re
import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from parts.cli import InputError
from parts.files import atomic_write, read_json_object, stage_advice
from parts.text.bpe import (
    AddedTokens,
    BPETokenizer,
    bpe_json,
    parse_tokenizer_json,
    possible_merges,
    read_tiktoken,
    read_tokenizer_json,
    tiktoken_as_json,
)


class SentencePieceTokenizer:
    """Llama-1/2, Mistral, TinyLlama: a `tokenizer.model`. Encodes as sentencepiece does, with its dummy prefix.

    `specials` and `text_tokens`, {text: id}, are added tokens that the folder declares in addition to the model: those
    that text cannot produce, and those that it can. SentencePiece never encodes text as control pieces. It would for a
    declared special token that is a user-defined symbol of the model: `encode` prevents this.
    """

    def __init__(self, path: Path, specials: dict[str, int], text_tokens: dict[str, int] | None = None):
        try:
            self.sp = SentencePieceProcessor()
            self.sp.LoadFromSerializedProto(path.read_bytes())  # it cannot open all paths that Python can
        except (RuntimeError, OSError) as e:
            raise InputError(f"{path}: not a SentencePiece model ({e})") from None
        n = self.sp.get_piece_size()
        self.specials = {self.sp.id_to_piece(i): i for i in range(n) if self.sp.is_control(i)} | specials
        known = {t: i for t, i in (text_tokens or {}).items() if t not in self.specials}
        self.text_tokens = {t: i for t, i in known.items() if i >= n or self.sp.id_to_piece(i) != t}
        self.added = AddedTokens(dict.fromkeys(self.specials) | self.text_tokens)
        self.vocab_size = max([n, *(i + 1 for i in [*self.specials.values(), *self.text_tokens.values()])])
        self.bos_id = self.sp.bos_id() if self.sp.bos_id() >= 0 else None
        self.eos_ids = [self.sp.eos_id()] if self.sp.eos_id() >= 0 else []
        self.prefix_space = "always" if self.sp.normalize("a") == "▁a" else ""
        reachable = [t for t, i in self.specials.items() if len(t) > 1 and i in self.sp.encode(t)]
        self.reachable = re.compile("(?=" + "|".join(map(re.escape, reachable)) + ")") if reachable else None

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Token ids. `first` makes no difference here: sentencepiece adds its prefix to every text."""
        ids = []
        for part in self.added.split(text):
            ids += [part] if isinstance(part, int) else self.encode_plain(part)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        if not self.reachable or not self.reachable.search(text):
            return self.sp.encode(text)
        # Split each such string, so that no part of the text contains the symbol. Parts after the first need no dummy
        # prefix: prepend a character that merges with nothing, and drop its token.
        cuts = [m.start() + 1 for m in self.reachable.finditer(text)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        spare = "\ue000"
        extra = len(self.sp.encode(spare))
        return self.sp.encode(parts[0]) + [i for part in parts[1:] for i in self.sp.encode(spare + part)[extra:]]

    def loses(self, text: str) -> bool:
        """Whether `encode` replaces characters by the unknown token."""
        return self.sp.unk_id() in self.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without special tokens."""
        special, n = set(self.specials.values()), self.sp.get_piece_size()
        names, text, run = {i: t for t, i in self.text_tokens.items()}, "", []
        for i in [*map(int, ids), None]:
            if i is None or i in names:
                text += self.sp.decode(run) + names.get(i, "")
                run = []
            elif i not in special and i < n:
                run.append(i)
        return text


TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
CHAT_TEMPLATE = "chat_template.jinja"


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder that define its tokenizer, except config.json."""
    names = (*TOKENIZER_FILES, CHAT_TEMPLATE)
    return [path for path in sorted(folder.iterdir()) if path.name in names or path.suffix == ".tiktoken"]


NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
LISTED_TOKENS = ("additional_special_tokens", "extra_special_tokens")


def declared_tokens(folder: Path, settings: dict) -> dict[str, tuple[int, bool]]:
    """The added tokens that the tokenizer's configuration files declare, {text: (id, is special)}. Raises InputError.

    added_tokens.json does not mark special tokens: its tokens are special if special_tokens_map.json or
    tokenizer_config.json use them as such.
    """
    try:
        used = set()
        for source in (settings, read_json_object(folder / "special_tokens_map.json")):
            values = [source.get(key) for key in NAMED_TOKENS]
            for key in LISTED_TOKENS:
                several = source.get(key) or []
                values += several.values() if isinstance(several, dict) else several
            used |= {value.get("content") if isinstance(value, dict) else value for value in values}
        plain = {str(t): int(i) for t, i in read_json_object(folder / "added_tokens.json").items()}
        decoder = settings.get("added_tokens_decoder") or {}
        for t in decoder.values():
            if not t.get("special", True) and (t.get("single_word") or t.get("lstrip") or t.get("rstrip")):
                raise InputError(f"{folder / 'tokenizer_config.json'}: not supported: {json.dumps(t)[:200]}")
        marked = {t["content"]: (int(i), bool(t.get("special", True))) for i, t in decoder.items()}
        tokens = {text: (i, False) for text, i in plain.items()} | marked
        if any(not isinstance(text, str) or i < 0 for text, (i, _) in tokens.items()):
            raise ValueError("a token is not a string, or its id is negative")
        return {text: (i, special or text in used) for text, (i, special) in tokens.items()}
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        files = "tokenizer_config.json, special_tokens_map.json or added_tokens.json"
        raise InputError(f"{folder}: the added tokens of {files} are not understood ({e!r})") from None


def load_tokenizer(folder: str | Path) -> SentencePieceTokenizer | BPETokenizer:
    """Load the tokenizer of a model folder from tokenizer.model (SentencePiece, or Llama-3's ranks under the same
    name), *.tiktoken, or a tokenizer.json with a BPE model.

    It has encode(text, first), decode(ids), loses(text), bos_id (or None), eos_ids (the template's first, then all that
    may end an answer), specials and text_tokens {text: id} (the added tokens that text cannot and can produce),
    vocab_size. Raises InputError.
    """
    folder = Path(folder)
    config, settings = read_json_object(folder / "config.json"), read_json_object(folder / "tokenizer_config.json")
    generation = read_json_object(folder / "generation_config.json")
    declared = declared_tokens(folder, settings)
    model, ranks = folder / "tokenizer.model", sorted(folder.glob("*.tiktoken"))
    if model.exists():
        with open(model, "rb") as f:
            is_ranks = re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", f.read(200)) is not None
        ranks = [model] if is_ranks else []
    if ranks:
        tokenizer = read_tiktoken(ranks[0])
    elif model.exists():
        added = [{t: i for t, (i, special) in declared.items() if special == kind} for kind in (True, False)]
        tokenizer = SentencePieceTokenizer(model, *added)
    elif (folder / "tokenizer.json").exists():
        tokenizer = read_tokenizer_json(folder / "tokenizer.json", declared)
    else:
        raise InputError(
            f"{folder} has no tokenizer: neither tokenizer.model nor tokenizer.json nor *.tiktoken"
            + stage_advice(folder)
        )

    def ids(value, key) -> list[int]:
        """The existing ids for a token's text, an {"content": text} object, an id or a list of ids."""
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


def sentencepiece_as_json(tokenizer: SentencePieceTokenizer) -> dict | None:
    """A tokenizer.json equivalent to `tokenizer`, for tools that do not read SentencePiece models (transformers 5 would
    rebuild the merges and split runs of spaces differently).

    None if the model cannot be expressed that way: it is not a BPE model, or normalizes text. This is tested by
    comparing both on texts made of the model's own pieces. User-defined symbols become added tokens, after which other
    tools add a space that sentencepiece does not.
    """
    sp, n = tokenizer.sp, tokenizer.sp.get_piece_size()
    vocab = {sp.id_to_piece(i): i for i in range(n)}
    plain = {p: i for p, i in vocab.items() if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))}
    merges = possible_merges(plain)
    merged = {left + right for left, right in merges}
    symbols = {piece: i for piece, i in plain.items() if len(piece) > 1 and piece not in merged}
    # Ordered by score as in sentencepiece; runs of spaces, which have equal scores, are merged from the left.
    merges.sort(key=lambda m: (-sp.get_score(plain[m[0] + m[1]]), -len(m[0] + m[1]), plain[m[0]], plain[m[1]]))
    added = [(text, i, True) for text, i in tokenizer.specials.items()]
    added += [(text, i, False) for text, i in (symbols | tokenizer.text_tokens).items()]
    prefix = [{"type": "Prepend", "prepend": "▁"}] if tokenizer.prefix_space else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if tokenizer.prefix_space else []
    spec = bpe_json(
        vocab=vocab,
        merges=merges,
        added_tokens=sorted(added, key=lambda token: token[1]),
        normalizer={"type": "Sequence", "normalizers": [*prefix, replace]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        unk_token=sp.id_to_piece(sp.unk_id()),
        fuse_unk=True,
        byte_fallback=any(sp.is_byte(i) for i in range(n)),
    )
    return spec if encodes_alike(spec, tokenizer, [piece for piece in plain if piece not in symbols]) else None


def encodes_alike(spec: dict, tokenizer: SentencePieceTokenizer, pieces: list[str]) -> bool:
    """Whether a tokenizer.json gives the ids of `tokenizer`, for random texts made of `pieces` and for runs of
    characters."""
    try:
        converted = parse_tokenizer_json(spec, {})
    except InputError:
        return False
    rng, texts = random.Random(0), [piece.replace("▁", " ") for piece in pieces]
    probes = ["".join(rng.choices(texts, k=8)) for _ in range(min(2000, tokenizer.sp.get_piece_size()))]
    probes += [f"a{c * k}b" for c in " \n-=" for k in range(40)] + ["é \u00a0ﬁ Ⅷ 日本\t\0\U0001f600 \ue000"]
    return all(converted.encode(probe) == tokenizer.encode(probe) for probe in probes)


def bos_in_front(bos: str | None, bos_id: int | None) -> dict:
    """The post-processor of a tokenizer.json that adds the BOS, if there is one, before a text."""
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    special = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": 0}}]
    tokens = {} if bos is None else {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    single, pair = [*special, sequences[0]], [*special, *sequences]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def copy_tokenizer(source: Path, folder: Path, chat_template: str, stop_ids: list[int]) -> None:
    """Copy a model's tokenizer files, and set the chat template and the end-of-answer tokens in the copy."""
    for path in tokenizer_files(source):
        if path.name != CHAT_TEMPLATE:  # our template is in tokenizer_config.json
            shutil.copyfile(path, folder / path.name)
    tokenizer = load_tokenizer(source)
    texts = {i: t for t, i in tokenizer.specials.items()}
    settings = read_json_object(source / "tokenizer_config.json") | {"chat_template": chat_template}
    # Whether engines add a BOS before plain text; without this key, transformers 4 does and 5 does not.
    adds_bos = tokenizer.bos_id is not None and chat_template.startswith("{{ bos_token }}")
    settings["add_bos_token"] = adds_bos
    settings.setdefault("bos_token", texts.get(tokenizer.bos_id))
    settings.setdefault("eos_token", texts.get((tokenizer.eos_ids or [None])[0]))
    spec = read_json_object(source / "tokenizer.json")
    if isinstance(tokenizer, SentencePieceTokenizer):
        settings["legacy"] = True  # transformers' name for adding a space before every piece, as `encode` does
        spec = sentencepiece_as_json(tokenizer)
    elif tokenizer.merges is None:
        spec = tiktoken_as_json(tokenizer)
    if spec:
        for token in [*spec["added_tokens"], *settings.get("added_tokens_decoder", {}).values()]:
            if token["content"] in tokenizer.specials or token["content"] in chat_template:
                token["normalized"] = False  # else transformers looks for it as "▁name" only
        spec["post_processor"] = bos_in_front(texts[tokenizer.bos_id] if adds_bos else None, tokenizer.bos_id)
        atomic_write(folder / "tokenizer.json", json.dumps(spec, ensure_ascii=False))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers then uses the file unchanged
    elif isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.json").unlink(missing_ok=True)  # it may encode differently
        settings.setdefault("tokenizer_class", "LlamaTokenizer")
    generation = read_json_object(source / "generation_config.json")
    generation |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": stop_ids}
    for file, content in {"tokenizer_config.json": settings, "generation_config.json": generation}.items():
        atomic_write(folder / file, json.dumps(content, indent=1, ensure_ascii=False))
