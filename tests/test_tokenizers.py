"""Tokenizers of published model folders, against `tokenizers`, sentencepiece and transformers."""

import json
import random
import shutil

import pytest
import sentencepiece
import tokenizers
import transformers
from conftest import SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer

from parts.cli import InputError
from parts.text.bpe import read_tokenizer_json
from parts.text.tokenizers import copy_tokenizer, load_tokenizer, sentencepiece_as_json

relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
STRANGE = ["", " ", "  ", " " * 17, "\n", "\r\n", "\t", "\x00", "\x04", "\x1c", "\x7f", "\u00a0", "\u2028", "\ufeff"]
STRANGE += [
    "é",
    "a\u0301",
    "日本語",
    "👩‍👩‍👧‍👦",
    "\U000e0001",
    "ÿ",
    "½",
    "▁",
    "<0x0A>",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_end|>",
]
STRANGE += [
    "<repo_name>",
    "don't",
    "1234567",
    "def f(x):\n\treturn  x",
    "x" * 60,
    "====",
    "-----",
    "QQ",
    "<tool>",
    " QQ ",
]
texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(STRANGE)), max_size=12).map("".join)
LONG = ["a" * 100_000, " " * 100_000, "日" * 30_000, "a b" * 33_000, "=" * 50_000]


def real_texts(shared):
    """Instructions, inputs, answers and prompts of real rows."""
    rows = json.loads((shared / "alpaca_random_9k.json").read_text(encoding="utf-8"))
    found = [row[key] for row in rows for key in ("instruction", "input", "output")]
    found += [row["instruction"] for row in json.loads((shared / "testsets" / "alpaca_eval.json").read_text())]
    for line in (shared / "alpaca_scored_stage3.jsonl").read_text(encoding="utf-8").splitlines():
        found += json.loads(line)["data"]
    return found


def oracle(folder):
    """A folder's tokenizer.json in `tokenizers`; names of special tokens in a text remain text."""
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return theirs


def assert_alike(ours, theirs, text):
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids, text
    assert not set(ids) & set(ours.specials.values())
    assert ours.decode(ids) == theirs.decode(ids) or "\ufffd" in theirs.decode(ids), text


# ---------------------------------------------------------------- a byte-level vocabulary with gaps


@pytest.fixture(scope="module")
def smollm2_pair(small_smollm2):
    return load_tokenizer(small_smollm2), oracle(small_smollm2)


def test_smollm2_encodes_every_real_text_as_tokenizers_does(smollm2_pair, shared):
    ours, theirs = smollm2_pair
    for text in real_texts(shared)[::2]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@relaxed
@given(text=texts)
def test_smollm2_encodes_any_text_as_tokenizers_does(smollm2_pair, text):
    assert_alike(*smollm2_pair, text)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_a_byte_outside_the_vocabulary_is_dropped_or_becomes_the_unknown_token(unknown, tmp_path):
    letters = list("abcdefghijklmnopqrstuvwxyzĠ")
    vocab = {c: i for i, c in enumerate([*(["<unk>"] if unknown else []), *letters, "ab"])}
    theirs = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], unk_token=unknown))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = load_tokenizer(tmp_path), oracle(tmp_path)
    for text in ("ab a1b", "1", "", "123ab4", "é", "abba"):
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert ours.loses(text) == any(c not in "abcdefghijklmnopqrstuvwxyz " for c in text)
    merged = [vocab["a"], 0, 0, vocab["b"]] if unknown else [vocab["ab"]]  # the neighbours of a dropped byte merge
    assert ours.encode("aéb") == theirs.encode("aéb").ids == merged


# ---------------------------------------------------------------- tokenizer.json of the SentencePiece kind


@pytest.fixture(scope="module", params=["llama2 legacy", "llama2", "mistral_v1 legacy", "mistral_v1", "prepend"])
def json_of_pieces(request, tmp_path_factory):
    """What transformers saves for a SentencePiece model, with text tokens added; "prepend": as in version 4."""
    if not SHARED.is_dir():
        pytest.skip("needs the real tokenizers and rows of ../shared/data, which are not here")
    source, folder = tmp_path_factory.mktemp("sp"), tmp_path_factory.mktemp("json")
    name = request.param.split()[0].replace("prepend", "llama2")
    shutil.copyfile(SHARED / "tokenizers" / f"{name}.model", source / "tokenizer.model")
    theirs = LlamaTokenizer.from_pretrained(source, legacy="legacy" in request.param)
    theirs.add_tokens(["QQ", AddedToken("<tool>", normalized=False)])
    theirs.save_pretrained(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    if request.param == "prepend":
        parts = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        spec |= {"normalizer": {"type": "Sequence", "normalizers": parts}, "pre_tokenizer": None}
        spec["model"]["unk_token"] = "<unk>"
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert not (folder / "tokenizer.model").exists()
    return load_tokenizer(folder), oracle(folder)


def test_sentencepiece_json_encodes_real_texts_as_tokenizers_does(json_of_pieces, shared):
    for text in real_texts(shared)[::15]:
        assert_alike(*json_of_pieces, text)


@relaxed
@given(text=texts)
def test_sentencepiece_json_encodes_any_text_as_tokenizers_does(json_of_pieces, text):
    assert_alike(*json_of_pieces, text)


@pytest.mark.parametrize("text", LONG)
def test_long_texts_are_encoded_as_tokenizers_does(json_of_pieces, text):
    ours, theirs = json_of_pieces
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_words_are_not_split_if_a_merge_could_cross_the_split(tmp_path):
    vocab = {c: i for i, c in enumerate(["▁", "a", "b", "▁b", "a▁", "a▁b", "▁a"])}
    merges = [("a", "▁"), ("▁", "b"), ("a▁", "b"), ("▁", "a")]
    theirs = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = load_tokenizer(tmp_path), oracle(tmp_path)
    rng = random.Random(0)
    for text in ("".join(rng.choices("ab ", k=8)) for _ in range(200)):
        assert ours.encode(text) == theirs.encode(text).ids, text


# ---------------------------------------------------------------- added tokens that are not special


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_added_tokens_that_are_not_special_are_encoded_from_text(kind, shared, tmp_path):
    added = {"<tool>": 32000, "QQ": 32001, "<|im_start|>": 32002}
    special = {"<|im_start|>"}
    if kind == "sentencepiece":
        shutil.copyfile(shared / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    else:
        theirs = tokenizers.Tokenizer(models.BPE())
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        theirs.train_from_iterator(["a b"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
        theirs.save(str(tmp_path / "tokenizer.json"))
    decoder = {str(i): {"content": text, "special": text in special} for text, i in added.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    ours = load_tokenizer(tmp_path)
    plain = ours.encode("a")
    assert ours.encode("a<tool>QQ") == [*plain, 32000, 32001]
    assert ours.decode(ours.encode("a <tool> bQQ c")) == "a <tool> bQQ c"
    assert 32002 not in ours.encode("a<|im_start|>b") and ours.specials["<|im_start|>"] == 32002
    assert ours.text_tokens == {"<tool>": 32000, "QQ": 32001}


def test_tokens_of_added_tokens_json_are_special_if_the_folder_uses_them_as_such(shared, tmp_path):
    shutil.copyfile(shared / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 32000, "<|im_end|>": 32001, "[PAD]": 32002}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|im_end|>"]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))
    ours = load_tokenizer(tmp_path)
    assert ours.text_tokens == {"<tool>": 32000}
    assert ours.specials["<|im_end|>"] == 32001 and ours.specials["[PAD]"] == 32002


# ---------------------------------------------------------------- what an export carries


@pytest.mark.parametrize("name", ["llama2", "mistral_v1"])
def test_transformers_encodes_an_exported_sentencepiece_folder_as_sentencepiece_does(name, shared, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "export"
    source.mkdir()
    folder.mkdir()
    shutil.copyfile(shared / "tokenizers" / f"{name}.model", source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text(json.dumps({"legacy": False, "tokenizer_class": "LlamaTokenizer"}))
    copy_tokenizer(source, folder, "", [2])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    rng = random.Random(0)
    units = ["a", "=", "--", " ", "  ", " " * 16, "...", "1", "ha", "\n", "\t", "é", "日本", "//", "▁"]
    mixed = ["".join(rng.choices(units, k=12)) for _ in range(2000)]
    runs = [c * n for c in "= -#.0a\n" for n in range(1, 60)]
    for text in [*real_texts(shared)[::5], *mixed, *runs]:
        assert theirs.encode(text, add_special_tokens=False) == (sp.encode(text) if text else []), text


def test_a_model_that_a_tokenizer_json_cannot_express_is_exported_without_one(tmp_path):
    for kind in ("unigram", "bpe"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat", "a cat and the hat"] * 40),
            model_prefix=str(tmp_path / "tokenizer"),
            model_type=kind,
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
            normalization_rule_name="identity" if kind == "unigram" else "nfkc",
        )
        assert sentencepiece_as_json(load_tokenizer(tmp_path)) is None


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(
        '{"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}, "normalizer": {"type": "Prepend", "prepend": "▁"}}'
    )
    with pytest.raises(InputError) as raised:
        read_tokenizer_json(path, {})
    assert str(raised.value).startswith(f"{path}: the merge 'a b'")
