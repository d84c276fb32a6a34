"""data.py against sentencepiece, tiktoken, tokenizers and transformers, and with real rows."""

import base64
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

import data
from parts.checkpoints.config import read_config
from parts.cli import InputError
from parts.files import sha256
from parts.text import bpe, templates
from parts.text.bpe import BPETokenizer, read_tiktoken
from parts.text.pre_tokenization import LLAMA3_PATTERN, compile_pattern
from parts.text.rows import Turn, read_rows
from parts.text.templates import TEMPLATES, render
from parts.text.testsets import read_prompts
from parts.text.tokenizers import SentencePieceTokenizer, load_tokenizer

relaxed = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
UGLY = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "a\u0301",
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "日本語",
    "שלום",
    "مرحبا",
    "\u202e",
    "\x00",
    "\x1c",
    "\x7f",
    "\ufeff",
    "\u2028",
    "\u0085",
    "\u00a0",
    "ſ",
    "K",
    "İ",
    "'S",
    "'ſ",
    "½",
    "²",
    "\U000323af",
    "\U0001e4f0",
    "</s>",
    "<s>",
    "<0x0A>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "[INST]",
    "▁",
    "▁▁",
    "\ue000",
    "don't",
    "I'LL",
    "1234567",
    "x" * 60,
]
texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(UGLY)), max_size=12).map("".join)


def real_texts(shared):
    lines = (shared / "alpaca_scored_stage3.jsonl").read_text(encoding="utf-8").splitlines()
    return [text for line in lines for text in json.loads(line)["data"]]


# ---------------------------------------------------------------- SentencePiece


@pytest.fixture(params=["llama2.model", "mistral_v1.model"])
def piece_pair(request, shared):
    path = shared / "tokenizers" / request.param
    return SentencePieceTokenizer(path, {}), sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_sentencepiece_ids_equal_the_librarys_on_real_rows(piece_pair, shared):
    ours, theirs = piece_pair
    for text in real_texts(shared):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)


@relaxed
@given(text=texts)
def test_sentencepiece_text_never_becomes_a_special_token(piece_pair, text):
    ours, theirs = piece_pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert not set(ids) & set(ours.specials.values())


@pytest.fixture(scope="module")
def symbol_folder(tmp_path_factory):
    """A SentencePiece model with a template's special token as a user-defined symbol, as in Yi's."""
    folder = tmp_path_factory.mktemp("symbols")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the im_start mat <|>"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>", "QQ"],
    )
    symbols = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    decoder = {str(symbols.piece_to_id(t)): {"content": t, "special": True} for t in ("<|im_start|>", "<|im_end|>")}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder | {"400": {"content": "<pad>"}}})
    )
    return folder


@relaxed
@given(
    parts=st.lists(
        st.sampled_from(["<|im_start|>", "<|im_end|>", "the", " cat", "QQ", "<", "|im_end|>", " ", "é", "\n"])
    )
)
def test_text_never_becomes_a_user_defined_symbol_that_is_special(symbol_folder, parts):
    tokenizer, text = load_tokenizer(symbol_folder), "".join(parts)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.specials.values())
    assert tokenizer.decode(ids) == text
    start = tokenizer.specials["<|im_start|>"]
    assert start in render([Turn("user", text)], TEMPLATES["chatml"], tokenizer)[0]
    assert tokenizer.decode([start, 400, *ids]) == text


# ---------------------------------------------------------------- byte-level BPE


@pytest.fixture(scope="module")
def llama3(request):
    from conftest import SHARED

    if not SHARED.is_dir():
        pytest.skip("needs the real tokenizers and rows of ../shared/data, which are not here")
    path = SHARED / "tokenizers" / "llama3.tiktoken"
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in path.read_text().splitlines())}
    return read_tiktoken(path), tiktoken.Encoding(
        "l3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )


def test_llama3_ids_equal_tiktokens_on_real_rows(llama3, shared):
    ours, theirs = llama3
    for text in real_texts(shared):
        assert ours.encode(text) == theirs.encode_ordinary(text)


@relaxed
@given(text=texts)
def test_llama3_ids_equal_tiktokens_on_any_text(llama3, text):
    ours, theirs = llama3
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("name", ["L", "N"])
def test_unicode_classes_equal_tiktokens_at_every_code_point(name):
    everything = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    theirs = tiktoken.Encoding(
        "x", pat_str=rf"\p{{{name}}}", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    expected = set(bytes(theirs.encode_ordinary(everything)).decode())
    ours = set(re.findall(compile_pattern(rf"\p{{{name}}}"), everything))
    assert {f"{ord(c):x}" for c in ours ^ expected} == set()
    assert re.findall(compile_pattern(rf"[^\p{{{name}}}]"), "aé1½ ٣") == re.findall(
        compile_pattern(rf"\P{{{name}}}"), "aé1½ ٣"
    )


@pytest.mark.parametrize("unit", ["a", " ", "\n", "é", "1", "ab", "👩"])
def test_a_long_repetition_is_encoded_in_subquadratic_time(llama3, unit):
    ours, theirs = llama3
    text = unit * (100_000 // len(unit))
    operations = {}
    for size in (len(text) // 4, len(text)):
        asked = [0]

        class Counting(dict):
            def get(self, *key, asked=asked):
                asked[0] += 1
                return dict.get(self, *key)

        counted = BPETokenizer(Counting(ours.vocab), None, ours.pre_tokenizers, {})
        assert counted.encode(text[:size]) == theirs.encode_ordinary(text[:size])
        operations[size] = asked[0]
    assert operations[len(text)] < 4.5 * operations[len(text) // 4] + 100


ByteLevel, Split, Sequence, Digits = (getattr(pre_tokenizers, n) for n in ("ByteLevel", "Split", "Sequence", "Digits"))
PRE_TOKENIZERS = {
    "gpt2": (ByteLevel(add_prefix_space=False), None, []),
    "prefix space": (ByteLevel(add_prefix_space=True), None, []),
    "smollm": (Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), None, []),
    "llama3": (
        Sequence([Split(Regex(LLAMA3_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
        None,
        [],
    ),
    "nfc, added text tokens": (ByteLevel(add_prefix_space=False), normalizers.NFC(), ["  ", "QQ", "<tool>"]),
    "deepseek": (
        Sequence(
            [
                Split(Regex("[\r\n]"), "isolated"),
                Split(Regex(r"\s?\p{L}+"), "isolated"),
                Split(Regex(r"\s?\p{P}+"), "isolated"),
                Digits(individual_digits=False),
                ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        None,
        [],
    ),
    "removed, inverted": (
        Sequence(
            [Split(Regex(LLAMA3_PATTERN), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
        None,
        [],
    ),
}


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def json_pair(request, tmp_path_factory):
    pre, normalizer, added = PRE_TOKENIZERS[request.param]
    theirs = tokenizers.Tokenizer(models.BPE(ignore_merges=request.param == "llama3"))
    theirs.pre_tokenizer = pre
    if normalizer:
        theirs.normalizer = normalizer
    corpus = [(ROOT / f).read_text(encoding="utf-8") for f in ("data.py", "model.py")]
    theirs.train_from_iterator(
        corpus * 2 + ["日本語 שלום don't 12 345"] * 5,
        trainers.BpeTrainer(
            vocab_size=900, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=ByteLevel.alphabet()
        ),
    )
    theirs.add_tokens(added)
    theirs.encode_special_tokens = True  # text that looks like a special token stays text
    folder = tmp_path_factory.mktemp("json")
    theirs.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder), theirs


def test_tokenizer_json_ids_equal_tokenizers_on_real_rows(json_pair, shared):
    ours, theirs = json_pair
    for text in real_texts(shared)[::4]:
        assert ours.encode(text) == theirs.encode(text).ids


@relaxed
@given(
    text=st.one_of(
        texts, st.lists(st.sampled_from(["QQ", " ", "   ", "<tool>", "a", "<|endoftext|>", "1"])).map("".join)
    )
)
def test_tokenizer_json_ids_equal_tokenizers_on_any_text(json_pair, text):
    ours, theirs = json_pair
    assert ours.encode(text) == theirs.encode(text).ids
    assert not set(ours.encode(text)) & set(ours.specials.values())


def test_real_llama3_as_tokenizer_json_gives_the_same_ids(llama3, shared, tmp_path):
    ours, theirs = llama3
    letters = {b: c for c, b in bpe.byte_letters().items()}

    def text(piece):
        return "".join(letters[b] for b in piece)

    merges = []
    for piece, rank in sorted(theirs._mergeable_ranks.items(), key=lambda x: x[1]):
        if len(piece) > 1:  # the last merge that makes it: what its bytes become with lower ranks only
            parts = [bytes([b]) for b in piece]
            while len(parts) > 2:
                ranks = [theirs._mergeable_ranks.get(a + b, rank) for a, b in pairwise(parts)]
                i = min(range(len(ranks)), key=ranks.__getitem__)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            merges.append([text(parts[0]), text(parts[1])])
    spec = {
        "added_tokens": [{"id": 128009, "content": "<|eot_id|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "merges": merges,
            "vocab": {text(p): r for p, r in theirs._mergeable_ranks.items()},
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    again = load_tokenizer(tmp_path)
    for row in real_texts(shared)[::10]:
        assert again.encode(row) == ours.encode(row)
    assert again.specials == {"<|eot_id|>": 128009}


@pytest.mark.parametrize(
    "spec, word",
    [
        ({}, "'model' is missing"),
        ([], "not a tokenizer.json"),
        ({"model": {"vocab": {"▁a": 0}, "merges": []}}, "tokenizer.model"),
        ({"model": {"vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"model": {"vocab": {}, "merges": []}, "normalizer": {"type": "Precompiled"}}, "Precompiled"),
        ({"model": {"vocab": {"<unk>": 0}, "merges": [], "type": "Unigram"}}, "Unigram"),
        ({"model": {"vocab": {}, "merges": [], "unk_token": "<unk>"}}, "unk_token"),
        ({"model": {"vocab": {}, "merges": [], "dropout": 0.1}}, "dropout"),
    ],
)
def test_a_tokenizer_json_that_would_tokenize_differently_is_refused(spec, word, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=word) as raised:
        load_tokenizer(tmp_path)
    assert str(raised.value).startswith(str(tmp_path / "tokenizer.json"))


def test_the_tokenizer_is_chosen_by_the_files_of_the_folder(shared, tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    run = tmp_path / "run"
    for k in (1, 2):
        (run / f"stage{k}").mkdir(parents=True)
        (run / f"stage{k}" / "config.json").write_text("{}")
    for read in (load_tokenizer, read_config):
        with pytest.raises(InputError, match=re.escape(f"The models of this run are {run}/stage1, {run}/stage2")):
            read(run)
    ranks = (shared / "tokenizers" / "llama3.tiktoken").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(ranks)  # Meta ships the ranks under this name
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128008, 128009]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == 128000 and tokenizer.eos_ids == [128001, 128008, 128009]
    assert tokenizer.specials["<|eot_id|>"] == 128009 and tokenizer.specials["<|start_header_id|>"] == 128006
    assert len(tokenizer.specials) == 256 and sorted(tokenizer.specials.values()) == list(range(128000, 128256))
    (tmp_path / "tokenizer.model").write_bytes((shared / "tokenizers" / "llama2.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids[0], tokenizer.vocab_size) == (1, 2, 32000)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00garbage")
    with pytest.raises(InputError, match="SentencePiece"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- templates

TURNS = [
    Turn("user", "What is 2 + 2?"),
    Turn("assistant", "Four.</s>"),
    Turn("user", "{} and ‹eos›?"),
    Turn("assistant", "\n Five {}"),
]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """256 bytes, no merges, and the special tokens of every template."""
    specials = {
        t: 300 + i
        for i, t in enumerate(
            [
                "<s>",
                "</s>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|eot_id|>",
                "<|im_start|>",
                "<|im_end|>",
                "[INST]",
                "[/INST]",
                "[SYSTEM_PROMPT]",
                "[/SYSTEM_PROMPT]",
            ]
        )
    }
    tokenizer = BPETokenizer({chr(i): i for i in range(256)}, {}, [], specials)
    tokenizer.bos_id, tokenizer.eos_ids = 300, [301]
    return tokenizer


def spell(tokenizer, ids):
    names = {i: t for t, i in tokenizer.specials.items()}
    return b"".join(names[i].encode() if i in names else bytes([i]) for i in ids).decode()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [[], [Turn("system", "Be brief.")]])
def test_a_prompt_is_a_prefix_of_its_training_document(name, system, byte_tokenizer):
    turns = system + TURNS
    document, loss_mask = render(turns, TEMPLATES[name], byte_tokenizer)
    for end in range(len(system) + 1, len(turns), 2):
        prompt, _ = render(turns[:end], TEMPLATES[name], byte_tokenizer)
        assert document[: len(prompt)] == prompt
        assert loss_mask[len(prompt)] and not loss_mask[len(prompt) - 1]
    answers = [text for role, text, _ in turns if role == "assistant"]
    learnt = spell(byte_tokenizer, [t for t, s in zip(document, loss_mask) if s])
    end_of_turn = TEMPLATES[name].answer[-1].strip("‹›").replace("eos", "</s>")
    pad = " " if name == "llama2" else ""
    assert learnt == "".join(a + pad + end_of_turn for a in answers)
    assert templates.stop_ids(TEMPLATES[name], byte_tokenizer)[0] == document[-1]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "turns", [TURNS, TURNS[:3], [Turn("system", "Be brief."), *TURNS], [Turn("system", "{'"), TURNS[0]]]
)
def test_the_exported_chat_template_renders_the_same_tokens(name, turns, byte_tokenizer):
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers compiles it
    text = environment.from_string(templates.chat_template(TEMPLATES[name], byte_tokenizer)).render(
        messages=[{"role": r, "content": t} for r, t, _ in turns],
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=turns[-1][0] == "user",
    )
    assert text == spell(byte_tokenizer, render(turns, TEMPLATES[name], byte_tokenizer)[0])


def test_the_phased_template_equals_the_papers_token_for_token(piece_pair):
    ours, theirs = piece_pair
    tokens, loss_mask = render([Turn("user", "Hi there"), Turn("assistant", "Hello!")], TEMPLATES["phased"], ours)
    pieces = [[1], theirs.encode("User: Hi there"), [2], theirs.encode("\nAssistant: "), theirs.encode("Hello!"), [2]]
    assert tokens == [t for piece in pieces for t in piece]
    assert loss_mask == [False] * (len(tokens) - len(pieces[4]) - 1) + [True] * (len(pieces[4]) + 1)


def test_plain_text_is_supervised_from_its_first_token(piece_pair):
    ours, theirs = piece_pair
    tokens, loss_mask = render([Turn("text", "Once upon")], TEMPLATES["phased"], ours)
    assert tokens == [1, *theirs.encode("Once upon"), 2] and loss_mask == [False] + [True] * (len(tokens) - 1)


def test_a_missing_token_of_a_template_is_an_error(piece_pair):
    with pytest.raises(InputError, match="start_header_id"):
        render([Turn("user", "x")], TEMPLATES["llama3"], piece_pair[0])


# ---------------------------------------------------------------- rows

GOOD_ROWS = {
    "phased": {"id": 5, "score": "3.5\n\n", "data": ["q", "a"]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
}


@pytest.mark.parametrize("form", GOOD_ROWS)
@pytest.mark.parametrize("as_array", [False, True])
def test_every_row_format_gives_the_same_turns(form, as_array, tmp_path):
    rows = [GOOD_ROWS[form]] * 3
    text = json.dumps(rows, indent=2) if as_array else "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "f.json").write_text("\ufeff" + text, encoding="utf-8")
    got, bad = read_rows(tmp_path / "f.json")
    assert bad == [] and [r.turns for r in got] == [[Turn("user", "q"), Turn("assistant", "a")]] * 3
    assert got[0].score == (3.5 if form == "phased" else None) and got[0].raw == rows[0]
    lines = text.split("\n")
    for row in got:
        line = int(row.source.rsplit(":", 1)[1])
        assert lines[line - 1].strip().startswith("{")


def test_the_input_is_appended_to_the_instruction_and_text_is_one_turn(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Add.", "input": "1 2", "output": "3"}))
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "once"}))
    assert read_rows(tmp_path / "a.jsonl")[0][0].turns[0] == Turn("user", "Add.\n1 2")
    assert read_rows(tmp_path / "t.jsonl")[0][0].turns == [Turn("text", "once")]


@pytest.mark.parametrize(
    "line, what",
    [
        ("{", "not JSON"),
        ("[1", "not JSON"),
        ("3", "JSON object"),
        ("null", "JSON object"),
        ("{}", "no known row format"),
        ('{"instruction": "q", "input": ""}', "instruction without an output"),
        ('{"data": "q"}', "list"),
        ('{"data": []}', "turns must"),
        ('{"data": ["q"]}', "turns must"),
        ('{"data": ["q", 3]}', "string"),
        ('{"data": ["q", " \\n"]}', "white space"),
        ('{"data": ["q", "a", "q"]}', "turns must"),
        ('{"data": ["q", "\\ud800"]}', "surrogate"),
        ('{"data": ["q", "a"], "score": "hard"}', "not a finite number"),
        ('{"data": ["q", "a"], "score": NaN}', "finite"),
        ('{"data": ["q", "a"], "score": [4]}', "not a finite number"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "tool"),
        ('{"messages": [3]}', "list of objects"),
        ('{"messages": [{"role": [], "content": "x"}]}', "not known"),
        ('{"text": ""}', "empty"),
        ("[" * 100_000, "not JSON"),
        ('{"data": ["q", "a"], "score": ' + "9" * 5000 + "}", ""),
    ],
)
def test_bad_rows_are_reported_with_file_and_line(line, what, tmp_path):
    path = tmp_path / "f.jsonl"
    form = next((f for f in ("messages", "text") if f'"{f}"' in line), "phased")
    filler = json.dumps(GOOD_ROWS.get(form, {"text": "once"})) + "\n"
    path.write_text(filler + "\n" + line + "\n" + filler)
    rows, bad = read_rows(path)
    assert len(rows) == 2 and len(bad) == 1 and bad[0].startswith(f"{path}:3: ") and what in bad[0], bad


def test_mixed_formats_and_broken_arrays_are_errors_with_a_line(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, GOOD_ROWS.values())))
    rows, bad = read_rows(path)
    assert len(rows) == 1 and len(bad) == 3 and bad[0].startswith(f"{path}:2: a row of the format 'alpaca'")
    path.write_text('[\n{"text": "a"},\n{"text": "b"}\n{"text": "c"}]')
    rows, bad = read_rows(path)
    assert len(rows) == 2 and bad[0].startswith(f"{path}:4: ") and "comma" in bad[0]


def test_a_byte_that_is_not_utf8_spoils_its_row_only_and_another_encoding_the_file(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b"}\n')
    rows, bad = read_rows(path)
    assert len(rows) == 2 and bad == [f"{path}:2: not UTF-8 text (byte 0xe9)"]
    path.write_bytes('{"text": "a"}'.encode("utf-16"))
    with pytest.raises(InputError, match=":1: not UTF-8"):
        read_rows(path)


def test_a_table_is_one_error_that_names_the_file(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("instruction,output\nq,a\n")
    for read in (read_rows, read_prompts):
        with pytest.raises(InputError, match=r"f\.csv: \.csv files cannot be read: convert it to JSONL"):
            read(path)


def test_the_conversion_in_the_docs_makes_one_file_of_a_table_and_a_chat(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text('instruction,input,output\n"Say, twice:","a\nb",c\nq,,\n')
    (tmp_path / "chat.jsonl").write_text(json.dumps(GOOD_ROWS["messages"]) + "\n")
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.DOTALL)[1], {})
    rows, bad = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 2 and not bad and rows[0].turns[0].text == "Say, twice:\na\nb"


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=5)),
    lambda v: (
        st.lists(v, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "data",
                    "messages",
                    "conversations",
                    "instruction",
                    "input",
                    "output",
                    "text",
                    "role",
                    "content",
                    "from",
                    "value",
                    "score",
                    "id",
                ]
            ),
            v,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@relaxed
@given(values=st.lists(values, max_size=4))
def test_no_json_row_raises_an_unexpected_error(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, values)))
    rows, bad = read_rows(path)
    assert len(rows) + len(bad) == len(values) or (values and isinstance(values[0], list))


# ---------------------------------------------------------------- documents


def write_rows(path, answers):
    path.write_text("".join(json.dumps({"id": f"r{i}", "data": ["Say it.", a]}) + "\n" for i, a in enumerate(answers)))


@pytest.fixture
def folder(shared, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.model").write_bytes((shared / "tokenizers" / "llama2.model").read_bytes())
    return tmp_path / "m"


def load(path, folder, max_len=64):
    cache = folder.parent / "cache"
    return data.load_documents([path], [sha256(path)], folder, "phased", max_len, cache, keep=True, shown=False)


def test_tokenizing_many_rows_equals_tokenizing_each_row(folder, shared):
    path = shared / "alpaca_scored_stage3.jsonl"  # 4,000 rows: more than one process is used where there are cores
    documents, tokenizer = load(path, folder, max_len=2048), load_tokenizer(folder)
    rows, _ = read_rows(path)
    assert len(documents) == len(rows) == 3995 and len(documents.bad) == 5 and "white space" in documents.bad[0]
    for d in range(0, len(rows), 97):
        tokens, loss_mask = render(rows[d].turns, TEMPLATES["phased"], tokenizer)
        span = slice(documents.offsets[d], documents.offsets[d + 1])
        assert documents.tokens[span].tolist() == tokens and documents.loss_mask[span].tolist() == loss_mask
        assert documents.ids[d] == rows[d].id and documents.source[d] == rows[d].source


def test_long_rows_are_truncated_at_the_end_and_counted(folder):
    write_rows(folder.parent / "r.jsonl", ["short", "one two three four five " * 30, "x"])
    whole, cut = load(folder.parent / "r.jsonl", folder, 2048), load(folder.parent / "r.jsonl", folder, 40)
    assert cut.truncated == 1 and cut.truncated_tokens == whole.lengths[1] - 40 and cut.lengths[1] == 40
    assert (
        cut.tokens[cut.offsets[1] : cut.offsets[2]].tolist()
        == whole.tokens[whole.offsets[1] : whole.offsets[1] + 40].tolist()
    )
    nothing = load(folder.parent / "r.jsonl", folder, 5)
    assert len(nothing) == 0 and len(nothing.bad) == 3 and "r.jsonl:1: nothing supervised" in nothing.bad[0]


def test_the_token_cache_is_used_unless_something_changed(folder, monkeypatch):
    path, done = folder.parent / "r.jsonl", []
    real = data.tokenize_files
    monkeypatch.setattr(data, "tokenize_files", lambda *a: done.append(a) or real(*a))
    data.cached_tokenizer.cache_clear()
    write_rows(path, ["one", "two", " "])
    first, second = load(path, folder), load(path, folder)
    assert len(done) == 1 and list(second.ids) == list(first.ids) == ["r0", "r1"] and second.bad == first.bad != []
    assert np.array_equal(first.tokens, second.tokens) and np.array_equal(first.offsets, second.offsets)
    load(path, folder, max_len=20)
    write_rows(path, ["one", "three"])
    load(path, folder)
    (folder / "tokenizer_config.json").write_text("{}")
    load(path, folder)
    assert len(done) == 4
    for cached in (folder.parent / "cache").iterdir():
        cached.write_bytes(cached.read_bytes()[:200])
    assert list(load(path, folder).ids) == ["r0", "r1"] and len(done) == 5


@st.composite
def some_documents(draw):
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=20))
    n = sum(lengths)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return data.Documents(
        rng.integers(0, 50, n).astype(np.int32),
        rng.random(n) < 0.5,
        np.cumsum([0, *lengths]),
        [f"r{i}" for i in range(len(lengths))],
        [f"f:{i}" for i in range(len(lengths))],
        [],
    )


@relaxed
@given(documents=some_documents(), seed=st.integers(0, 9))
def test_targets_are_the_next_supervised_token_of_the_same_document(documents, seed):
    chosen = np.random.default_rng(seed).permutation(len(documents))[:7]
    tokens, positions, cu_seqlens, targets = documents.pack(chosen)
    expected = []
    for d in chosen:
        t, s = (
            a[documents.offsets[d] : documents.offsets[d + 1]].tolist() for a in (documents.tokens, documents.loss_mask)
        )
        expected += [(t[i], t[i + 1] if i + 1 < len(t) and s[i + 1] else -100, i) for i in range(len(t))]
    assert list(zip(tokens.tolist(), targets.tolist(), positions.tolist())) == expected
    assert cu_seqlens.tolist() == [0, *np.cumsum(documents.lengths[chosen])] and cu_seqlens.dtype == np.int32
    assert int(documents.target_counts[chosen].sum()) == (targets != -100).sum()
    again = data.concat([data.subset(documents, chosen), documents])
    assert again.pack(np.arange(len(chosen)))[3].tolist() == targets.tolist() and len(again) == len(chosen) + len(
        documents
    )
    assert again.ids[: len(chosen)] == [f"r{d}" for d in chosen]


@relaxed
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), ranks=st.integers(1, 9), budget=st.integers(1, 800)
)
def test_micro_batches_contain_every_document_once_within_the_budget(lengths, ranks, budget):
    lengths = np.array(lengths)
    chosen = np.flatnonzero(lengths % 3 > 0) if (lengths % 3 > 0).any() else np.arange(len(lengths))
    dealt = data.micro_batches(chosen, lengths, ranks, budget)
    assert len(dealt) == ranks and len({len(r) for r in dealt}) == 1
    assert sorted(d for r in dealt for m in r for d in m) == sorted(chosen)
    loads = [int(lengths[m].sum()) for r in dealt for m in r if len(m)]
    assert max(loads) <= max(budget, lengths[chosen].max())
    per_rank = [sum(int(lengths[m].sum()) for m in r) for r in dealt]
    assert max(per_rank) - min(per_rank) <= len(dealt[0]) * lengths[chosen].max()


def test_an_epoch_contains_every_document_once_in_its_own_order():
    orders = [
        np.concatenate(data.epoch_batches(None, np.arange(50), 7, seed, stage, epoch))
        for seed in (0, 1)
        for stage in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert len({tuple(o) for o in orders}) == 8
    assert [len(b) for b in data.epoch_batches(None, np.arange(50), 7, 0, 0, 0)] == [7] * 7 + [1]
    assert np.array_equal(orders[0], np.concatenate(data.epoch_batches(None, np.arange(50), 7, 0, 0, 0)))


@pytest.mark.parametrize("changes", [
    {"first": "User: {}"}, {"first": ("User: {}‹eos›",)}, {"answer": ("{}", "‹eos›", "\n")}, {"first": ("User:",)},
    {"answer": ("{} {}", "‹eos›")}, {"header": ("{}",)}, {"system_text": "nothing"}, {"later": ("‹eos› {}",)},
])  # fmt: skip
def test_an_invalid_template_is_an_error(changes):
    good = dict(first=("User: {}", "‹eos›"), later=("User: {}", "‹eos›"), header=("A: ",), answer=("{}", "‹eos›"))
    templates.Template(**good)
    with pytest.raises(ValueError):
        templates.Template(**(good | changes))
