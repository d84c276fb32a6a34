"""Fields of rows: used, or an error that names them; none is ignored."""

import json

import pytest
from conftest import ROOT

import data
from parts.cli import InputError
from parts.text.rows import Turn, messages_of, read_rows
from parts.text.templates import TEMPLATES, render
from parts.text.testsets import read_prompts
from parts.text.tokenizers import load_tokenizer
from score import answer_text

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ALPACA = {"instruction": "q", "output": "a"}


def read(tmp_path, *rows):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(path)


def turns_of(tmp_path, row) -> list[Turn]:
    rows, bad = read(tmp_path, row)
    assert not bad, bad
    return rows[0].turns


def with_message(**fields):
    return {"messages": [CHAT[0], CHAT[1] | fields]}


@pytest.mark.parametrize(
    "row, turns",
    [
        (ALPACA | {"system": "s"}, ["s", "q", "a"]),
        (ALPACA | {"system_prompt": "s", "system": ""}, ["s", "q", "a"]),
        ({"messages": CHAT, "system": "s"}, ["s", "q", "a"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, "sqa"),
        ({"data": ["q", "a"], "system": "s"}, "sqa"),
        ({"messages": [{"role": "system", "content": "s"}, *CHAT], "system": "s"}, "sqa"),
        ({"messages": [{"role": "developer", "content": "s"}, *CHAT]}, "sqa"),
        ({"conversations": CHAT}, "qa"),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "qa"),
        (ALPACA | {"history": [["1", "2"], ["3", "4"]]}, "1234qa"),
        (ALPACA | {"history": [["1", "2"]], "system": "s"}, "s12qa"),
        (with_message(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), ["q", "ab"]),
        (with_message(tool_calls=[], reasoning_content=None, refusal=None, name="x") | {"tools": []}, "qa"),
        (ALPACA | {"text": "a rendering", "source": "x", "category": 3}, "qa"),
    ],
)
def test_supported_fields_of_a_row_are_used(row, turns, tmp_path):
    assert [turn.text for turn in turns_of(tmp_path, row)] == list(turns)


@pytest.mark.parametrize(
    "row, word",
    [
        (with_message(tool_calls=[{"id": "1"}]), "tool_calls"),
        (with_message(reasoning_content="hm"), "reasoning_content"),
        (with_message(thinking="hm"), "thinking"),
        (with_message(train_detail=[1]), "train_detail"),
        (with_message(weight=0.5), "weight"),
        (with_message(weight="0"), "weight"),
        (with_message(weight=0), "nothing to train on"),
        (with_message(content=[{"type": "image_url"}]), "image_url"),
        (with_message(content={"text": "a"}), "not a string"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": CHAT, "images": ["a.png"]}, "images"),
        ({"messages": CHAT, "rejected": "x"}, "rejected"),
        ({"messages": CHAT, "history": [["1", "2"]]}, "history"),
        ({"messages": CHAT, "conversations": CHAT}, "two formats"),
        ({"messages": [{"role": "system", "content": "s"}, *CHAT], "system": "other"}, "two system texts"),
        ({"messages": [CHAT[1], *CHAT]}, "begins with the assistant"),
        ({"messages": [{"role": "tool", "content": "x"}, *CHAT]}, "tool"),
        (ALPACA | {"system": "s", "system_prompt": "t"}, "differ"),
        (ALPACA | {"system": 3}, "system"),
        (ALPACA | {"history": [["1"]]}, "history"),
        (ALPACA | {"history": [["1", 2]]}, "not a string"),
        (ALPACA | {"weight": 2}, "weight"),
        (ALPACA | {"loss": 0}, "loss"),
        (ALPACA | {"train": False}, "train"),
        ({"messages": [CHAT[0] | {"image": "x"}, CHAT[1]]}, "image"),
        (with_message(tools=[1]), "tools"),
        (with_message(history=[1]), "history"),
        ({"text": "t", "system": "s"}, "system"),
    ],
)
def test_unsupported_fields_are_errors_with_name_and_line(row, word, tmp_path):
    filler = {"text": "t"} if set(row) & {"text"} else ALPACA if "instruction" in row else {"messages": CHAT}
    rows, bad = read(tmp_path, filler, row)
    assert len(rows) == 1 and len(bad) == 1 and ":2: " in bad[0] and word in bad[0], bad


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}])
def test_an_answer_without_weight_is_context_and_carries_no_loss(mark, tmp_path):
    talk = [CHAT[0], CHAT[1] | {"content": "WRONG"} | mark, CHAT[0], CHAT[1] | {"content": "right", "weight": 1}]
    rows, _ = read(tmp_path, {"messages": talk})
    tokenizer = load_tokenizer(ROOT / "demo" / "model")
    tokens, loss_mask = render(rows[0].turns, TEMPLATES["phased"], tokenizer)
    learnt = [token for token, learn in zip(tokens, loss_mask) if learn]
    assert tokenizer.decode(learnt) == "right" and "WRONG" in tokenizer.decode(tokens)
    assert answer_text(rows[0]) == "right"
    again, _ = read(tmp_path, {"messages": messages_of(rows[0].turns)})
    assert again[0].turns == rows[0].turns


def test_rows_with_unencodable_characters_are_counted(small_smollm2, tmp_path, capsys):
    path = tmp_path / "f.jsonl"
    rows = [{"data": ["q", answer]} for answer in ("a", "b\x04c", "é", "\x13\x14")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = data.tokenize_files([path], small_smollm2, "chatml", 64, shown=False)
    assert documents.unencodable == 2
    data.print_unencodable([documents, documents])
    assert capsys.readouterr().out.startswith("4 rows contain characters")
    assert data.concat([documents, documents]).unencodable == 4


# ---------------------------------------------------------------- prompts


def prompts(tmp_path, text):
    path = tmp_path / "p"
    path.write_bytes(text.encode())
    return read_prompts(path)


def test_plain_text_prompts_are_split_at_newlines_only(tmp_path):
    found = prompts(tmp_path, "one\u2028still one\x0cstill\x85\r\n\r\ntwo\x1d\n")
    assert [p.instruction for p in found] == ["one\u2028still one\x0cstill\x85", "two\x1d"]


def test_further_questions_of_a_prompt_are_counted_and_fields_are_used(tmp_path):
    found = prompts(tmp_path, json.dumps({"question_id": 81, "turns": ["q1", "q2", "q3"], "system": "s"}))
    assert found[0].turns == [Turn("system", "s"), Turn("user", "q1")] and found[0].later_turns == 2
    for row in (
        {"prompt": "q", "tools": [1]},
        {"instruction": "i", "tools": [1], "instances": [{"input": "x"}]},
        {"messages": [CHAT[0] | {"tool_calls": [1]}]},
        {"prompt": "q", "system": 1},
    ):
        with pytest.raises(InputError, match=r"p:1: .*(tools|tool_calls|system)"):
            prompts(tmp_path, json.dumps(row))
    assert prompts(tmp_path, json.dumps(ALPACA | {"history": [["1", "2"]]}))[0].turns[0] == Turn("user", "1")
