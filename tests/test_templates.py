"""Templates: the choice by the model folder, and the export for transformers, which gives the same tokens."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tokenizers
import transformers
from conftest import ROOT, SHARED
from tokenizers import Regex, models, pre_tokenizers

import data
from parts.text import templates
from parts.text.bpe import byte_letters, tiktoken_as_json
from parts.text.pre_tokenization import LLAMA3_PATTERN
from parts.text.rows import Turn, messages_of
from parts.text.templates import TEMPLATES, render
from parts.text.tokenizers import copy_tokenizer, load_tokenizer, sentencepiece_as_json

SYSTEM = Turn("system", "Be brief.\nUse  numbers.")
TALK = [Turn("user", "What is 2 + 2?\n"), Turn("assistant", "Four,\n  I think."), Turn("user", "And 3 + 3?")]
CASES = {"first prompt": TALK[:1], "with a system turn": [SYSTEM, *TALK[:1]], "second turn": [SYSTEM, *TALK]}


def declare(folder: Path, texts: list[str], first_id: int) -> None:
    """Add special tokens to a folder, as fine-tuned models with another chat format have."""
    decoder = {str(first_id + i): {"content": text, "special": True} for i, text in enumerate(texts)}
    settings = {"added_tokens_decoder": decoder, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def llama3_json(folder: Path) -> None:
    """A byte-level tokenizer.json with Llama-3's pattern and special tokens, no merges."""
    theirs = tokenizers.Tokenizer(models.BPE(vocab=byte_letters(), merges=[]))
    parts = [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")]
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    theirs.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *CHAT_TOKENS])
    theirs.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


TOKENIZERS = ["smollm2", "llama2.model", "mistral_v1.model", "llama2.json", "llama2-legacy.json", "llama3.json"]
TOKENIZERS += ["llama3.tiktoken", "dolphin.model", "mistral_v3.model", "mistral_v7.model", "mistral_v3.json"]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, request):
    """A function that returns the folder with the files of a tokenizer."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        if name == "smollm2":
            source = request.getfixturevalue("smollm2")
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copyfile(source / file, folder / file)
        elif name == "llama3.json":
            llama3_json(folder)
        elif name in ("llama3.tiktoken", "dolphin.model") and not SHARED.is_dir():
            pytest.skip("needs the real tokenizers of ../shared/data, which are not here")
        elif name == "llama3.tiktoken":
            shutil.copyfile(SHARED / "tokenizers" / name, folder / name)
        elif name == "dolphin.model":  # tokens that transformers would look for after normalization only
            shutil.copyfile(SHARED / "tokenizers" / "mistral_v1.model", folder / "tokenizer.model")
            decoder = {"32000": {"content": "<|im_end|>", "special": True, "normalized": True}}
            decoder["32001"] = {"content": "<|im_start|>", "special": False, "normalized": True}
            settings = {"added_tokens_decoder": decoder, "bos_token": "<s>", "eos_token": "<|im_end|>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        else:
            stem, kind = name.split(".")
            version = stem.removeprefix("mistral_")
            if version in ("v3", "v7"):
                file = next(request.getfixturevalue("mistral_tokenizers").glob(f"*.{version}"))
            elif not SHARED.is_dir():
                pytest.skip("needs the real tokenizers of ../shared/data, which are not here")
            else:
                file = SHARED / "tokenizers" / f"{stem.removesuffix('-legacy')}.model"
            shutil.copyfile(file, folder / "tokenizer.model")
            declare(folder, CHAT_TOKENS, 32768 if version in ("v3", "v7") else 32000)
            if kind == "json":
                theirs = transformers.LlamaTokenizer.from_pretrained(folder, legacy=stem.endswith("-legacy"))
                theirs.save_pretrained(folder)
                (folder / "tokenizer.model").unlink()
        return folder

    made = {}
    return lambda name: made.setdefault(name, None) or made.__setitem__(name, make(name)) or made[name]


@cache
def as_json(convert: Callable, source: Path) -> str:
    return json.dumps(convert(load_tokenizer(source)))


@pytest.fixture
def converted_once(monkeypatch):
    """A function: exports of a folder convert its vocabulary to JSON once, which takes seconds, not per template."""

    def of(source: Path) -> None:
        for convert in (sentencepiece_as_json, tiktoken_as_json):
            monkeypatch.setattr(
                "parts.text.tokenizers." + convert.__name__,
                lambda _, convert=convert: json.loads(as_json(convert, source)),
            )

    return of


def exported(source: Path, name: str, folder: Path):
    """transformers' tokenizer of an export with a template, and ours. Raises InputError where the template cannot be
    used."""
    ours, template = load_tokenizer(source), TEMPLATES[name]
    stop = templates.stop_ids(template, ours)
    copy_tokenizer(source, folder, templates.chat_template(template, ours), stop)
    return transformers.AutoTokenizer.from_pretrained(folder), ours


def exceptions() -> set[tuple[str, str]]:
    """(template, case) pairs that docs/data.md lists, with the tokenizers they are listed for."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = text[text.index("<!-- exceptions -->") :].split("\n\n")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()[3:]]
    return {(name, template, case) for template, names, case in rows for name in names.replace("`", "").split(", ")}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_transformers_renders_an_export_to_the_same_tokens(tokenizer, folder_of, converted_once, tmp_path):
    converted_once(folder_of(tokenizer))
    differ = set()
    for name in TEMPLATES:
        folder = tmp_path / name
        folder.mkdir()
        try:
            theirs, ours = exported(folder_of(tokenizer), name, folder)
        except data.InputError:
            continue  # a token of the template is not among this tokenizer's
        for case, turns in CASES.items():
            rendered = theirs.apply_chat_template(messages_of(turns), add_generation_prompt=True)["input_ids"]
            if rendered != render(turns, TEMPLATES[name], ours)[0]:
                differ.add((tokenizer, name, case))
    assert differ == {row for row in exceptions() if row[0] == tokenizer}


@pytest.mark.parametrize("version", ["v2", "v3", "v7"])
def test_mistrals_later_templates_equal_mistral_common(version, mistral_tokenizers, tmp_path):
    """Control tokens around texts that sentencepiece encodes one by one, as InstructTokenizerV3 and V7 do."""
    import sentencepiece

    shutil.copyfile(next(mistral_tokenizers.glob(f"*.{version}")), tmp_path / "tokenizer.model")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    begin, end, start, stop = (sp.piece_to_id(t) for t in ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"))
    name, question = ("mistral-v7" if version == "v7" else "mistral-v3"), TALK[0].text
    if version == "v7":
        expected = [1, start, *sp.encode(SYSTEM.text), stop, begin, *sp.encode(question), end]
    else:
        expected = [1, begin, *sp.encode(f"{SYSTEM.text}\n\n{question}"), end]
    expected += [*sp.encode(TALK[1].text), 2, begin, *sp.encode(TALK[2].text), end]
    assert render([SYSTEM, *TALK], TEMPLATES[name], load_tokenizer(tmp_path))[0] == expected
    tokens = render([Turn("user", "[INST] x [/INST]")], TEMPLATES["mistral"], load_tokenizer(tmp_path))[0]
    assert tokens.count(begin) == tokens.count(end) == 1  # the template's, not those of the text


# ---------------------------------------------------------------- the choice of a template

LLAMA2_JINJA = "{{ bos_token + '[INST] <<SYS>>\\n' + messages[0]['content'] + '[/INST]' }}"
LLAMA3_JINJA = (
    "{{ '<|start_header_id|>' + m['role'] }}{% if not tools %}{{ raise_exception('This is no tool at all') }}"
)
SMOLLM2_JINJA = "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}"


def chosen(folder, given=None):
    return templates.choose_template(folder, load_tokenizer(folder), given)


@pytest.mark.parametrize(
    "tokenizer, jinja, expected, warned",
    [
        ("llama2.model", LLAMA2_JINJA, "llama2", False),
        ("llama2.model", "{{ '[INST] ' + x + ' [/INST]' }}", "mistral", False),
        ("mistral_v3.model", "{{ '[INST] ' + x + '[/INST]' }}", "mistral-v3", False),
        ("mistral_v7.model", "{{ '[SYSTEM_PROMPT]' + s + '[INST]' }}", "mistral-v7", False),
        ("llama3.json", LLAMA3_JINJA, "llama3", False),
        ("llama2.model", SMOLLM2_JINJA, "chatml", True),
        ("llama2.model", "{{ '<|user|>' + x }}", "phased", True),
        ("llama2.model", "<|im_start|>system\nYou are a helpful assistant named X.<|im_end|>", "chatml", True),
        ("llama2.model", "{# not <|im_start|> #}{{ '[INST] ' + x + ' [/INST]' }}", "mistral", False),
        ("llama2.model", "", "phased", False),
    ],
)
def test_the_chat_template_of_the_folder_is_recognized(tokenizer, jinja, expected, warned, folder_of, tmp_path):
    shutil.copytree(folder_of(tokenizer), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(jinja)
    name, notes = chosen(tmp_path)
    assert name == expected and expected in notes[0]
    assert any("Warning" in note for note in notes) == warned
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for held in (
        jinja,
        {"default": jinja},
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": jinja}],
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": held}))
        assert chosen(tmp_path)[0] == expected
    (tmp_path / "template.json").write_text('{"template": "alpaca"}')
    assert chosen(tmp_path)[0] == "alpaca"
    name, notes = chosen(tmp_path, "llama2")
    assert name == "llama2" and (not jinja or any("replaced" in note for note in notes))
    (tmp_path / "template.json").write_text('{"template": "none of ours"}')
    with pytest.raises(data.InputError, match=r"template\.json"):
        chosen(tmp_path)


def test_smollm2_gets_chatml_and_its_default_system_text_is_reported(smollm2):
    name, notes = chosen(smollm2)
    assert name == "chatml" and "<|im_start|>" in notes[0]
    assert "Warning" in notes[1] and "You are a helpful AI assistant named SmolLM" in notes[1]
