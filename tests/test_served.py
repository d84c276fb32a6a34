"""generate.py --server: an OpenAI-compatible server answers the prompts, with the same answers file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hf_server
import pytest
from api_helpers import KEY, kill_after, lines, paid, run
from conftest import ROOT, go

import generate
from parts.api.server_answers import SPECIAL_TOKEN_TEXT, TextTokenizer
from parts.files import write_lines
from parts.text import templates
from parts.text.tokenizers import copy_tokenizer, load_tokenizer

DEMO = ROOT / "demo" / "model"


def write_prompts(folder, rows) -> Path:
    write_lines(folder / "p.jsonl", rows)
    return folder / "p.jsonl"


def many(n):
    return [{"prompt": f"Start with {i}, add 1 to it."} for i in range(n)]


def arguments(folder, *more):
    return ["--server", "m", "--prompts", folder / "p.jsonl", "--out", folder / "a.json", *more]


def requests(folder):
    return [r["request"] for r in lines(folder / "server.log")]


def answers(folder):
    return json.loads((folder / "a.json").read_text())


def test_chat_messages_give_the_same_answers_file_as_local_generation(api, tmp_path):
    turns = [("system", "Be brief."), ("user", "1?"), ("assistant", "2"), ("user", "3?")]
    chat = {"id": "c", "messages": [{"role": r, "content": t} for r, t in turns]}
    write_prompts(tmp_path, [{"id": 7, "instruction": "Sum.", "input": "1 2", "expected": "3"}, chat])
    env = api(reply="3", finish="length", charge={"prompt_tokens": 21, "completion_tokens": 5})
    more = ["--temperature", "0.7", "--top-p", "0.9", "--top-k", "40", "--max-new-tokens", "9", "--seed", "3"]
    done = run(generate, env, *arguments(tmp_path, *more))
    first, second = answers(tmp_path)
    question = {"id": "7", "dataset": "p", "instruction": "Sum.\n1 2", "expected": "3"}
    answer = {"output": "3", "generator": "m", "prompt_tokens": 21, "output_tokens": 5, "finish_reason": "length"}
    assert first == question | answer
    assert second["instruction"] == "3?" and "100%" in done.stdout
    one, two = sorted(requests(tmp_path), key=lambda r: len(r["messages"]))
    assert one["messages"] == [{"role": "user", "content": "Sum.\n1 2"}] and two["messages"] == chat["messages"]
    sampling = {"model": "m", "temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 9}
    assert sampling.items() <= one.items() and one["seed"] != two["seed"]
    run(generate, env, *arguments(tmp_path, *more))
    assert len(requests(tmp_path)) == 2  # nothing is asked twice
    run(generate, env, *arguments(tmp_path, *more[:-1], "4"))
    assert len(requests(tmp_path)) == 4  # another seed


@pytest.mark.parametrize("template", ["phased", "llama2", "mistral", "alpaca"])
def test_completions_send_the_prompts_of_local_generation(template, api, bench, tmp_path):
    talk = {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]}
    trap = {"prompt": "Say </s> and <s>."}
    write_prompts(tmp_path, [*many(3), talk, trap])
    shutil.copytree(bench / "m", tmp_path / "m")
    (tmp_path / "m" / "template.json").write_text(json.dumps({"template": template}))
    tokenizer = load_tokenizer(bench / "m")
    prompts = generate.read_prompts(tmp_path / "p.jsonl")
    wanted = [templates.render(p.turns, templates.TEMPLATES[template], tokenizer)[0] for p in prompts]
    done = run(generate, api(), *arguments(tmp_path, "--completions", "--model", tmp_path / "m"))
    assert sorted(r["prompt"] for r in requests(tmp_path)) == sorted(wanted)
    assert not any("stop_token_ids" in r or "messages" in r for r in requests(tmp_path))
    assert [r["prompt_tokens"] for r in answers(tmp_path)] == [len(t) for t in wanted]
    assert "another number" not in done.stdout + done.stderr

    (tmp_path / "server.log").unlink()
    more = ["--completions", "text", "--model", tmp_path / "m"]
    done = run(generate, api(), *arguments(tmp_path, *more))
    sent = [r["prompt"] for r in requests(tmp_path)]
    assert len(sent) == 4 and not any("Say" in text or text.startswith("<s>") for text in sent)
    assert answers(tmp_path)[4]["finish_reason"] == "error" and "<s>" in answers(tmp_path)[4]["error"]
    assert "p.jsonl:5" in done.stdout and "another number of tokens" in done.stdout  # this server counts bytes

    from transformers import AutoTokenizer  # what a server with it makes of the text

    theirs = AutoTokenizer.from_pretrained(exported(bench / "m", tmp_path, template))
    for prompt, tokens in zip(prompts[:3], wanted):
        for adds_bos in (True, False):
            pieces = TextTokenizer(tokenizer, adds_bos)
            text = pieces.text(templates.render(prompt.turns, templates.TEMPLATES[template], pieces)[0])
            assert text.startswith("<s>") != adds_bos and (not adds_bos or text in sent)
            assert theirs(text, add_special_tokens=adds_bos)["input_ids"] == tokens


def exported(model, folder, template):
    """A copy of the folder `model` as train.py exports it."""
    shutil.copytree(
        model, folder / "x", ignore=shutil.ignore_patterns("tokenizer_config.json", "generation_config.json")
    )
    (folder / "x" / "template.json").write_text(json.dumps({"template": template}))
    stop = templates.stop_ids(templates.TEMPLATES[template], load_tokenizer(model))
    copy_tokenizer(
        model, folder / "x", templates.chat_template(templates.TEMPLATES[template], load_tokenizer(model)), stop
    )
    return folder / "x"


def test_a_stop_token_that_is_not_eos_is_sent_to_the_server(api, tmp_path):
    shutil.copytree(DEMO, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    added = {"1999": {"content": "<|im_start|>", "special": True}, "1998": {"content": "<|im_end|>", "special": True}}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    write_prompts(tmp_path, many(1))
    run(generate, api(), *arguments(tmp_path, "--completions", "--model", tmp_path / "m", "--template", "chatml"))
    assert requests(tmp_path)[0]["stop_token_ids"][0] == 1998


def test_answers_end_at_the_context_and_prompts_that_fill_it_are_not_sent(api, tmp_path):
    context = json.loads((DEMO / "config.json").read_text())["max_position_embeddings"]
    rows = [{"prompt": "a " * (context // 2 - 22)}, {"prompt": "a " * context}, *many(30)]
    write_prompts(tmp_path, rows)
    run(generate, api(), *arguments(tmp_path, "--completions", "--model", DEMO, "--max-new-tokens", "100"))
    for r in requests(tmp_path):
        assert r["max_tokens"] == min(100, context - len(r["prompt"])) > 0
    assert min(r["max_tokens"] for r in requests(tmp_path)) < 40 and len(requests(tmp_path)) == 31
    assert "context is" in answers(tmp_path)[1]["error"]


def test_after_a_kill_nothing_is_paid_twice(api, tmp_path):
    write_prompts(tmp_path, many(120) + many(5))  # five of them twice
    env = api(latency=0.02)
    command = [sys.executable, ROOT / "generate.py", *arguments(tmp_path, "--concurrency", "4")]
    process = subprocess.Popen([str(c) for c in command], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept = tmp_path / "a.json.partial.jsonl"
    kill_after(process, kept, 30)
    assert not (tmp_path / "a.json").exists()
    run(generate, env, *arguments(tmp_path))
    assert len(answers(tmp_path)) == 125 and sum(paid(tmp_path).values()) <= 124 and len(paid(tmp_path)) == 120
    assert [r["output"] for r in answers(tmp_path)[120:]] == [r["output"] for r in answers(tmp_path)[:5]]
    assert KEY not in kept.read_text() + (tmp_path / "a.json").read_text()
    own = ["--model", DEMO, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "a.json", "--max-new-tokens", "1"]
    run(generate, os.environ, *own)
    assert kept.exists()  # our engine does not throw away what was paid for


def test_refusals_empty_answers_and_rejected_parameters(api, tmp_path):
    write_prompts(tmp_path, [{"prompt": "flag this"}, *many(30)])
    env = api(refuse="flag", reply="", reject=["top_k", "seed", "max_tokens"])
    done = run(generate, env, *arguments(tmp_path, "--top-k", "5"))
    refused, *others = answers(tmp_path)
    assert refused["finish_reason"] == "error" and "content filter" in refused["error"] and "p.jsonl:1" in done.stdout
    assert {(r["output"], r["finish_reason"]) for r in others} == {("", "stop")}
    assert "without max_tokens, seed, top_k" in done.stdout
    assert all("max_completion_tokens" in r and "top_k" not in r for r in requests(tmp_path))
    write_prompts(tmp_path, [{"prompt": "flag this"}, *many(3)])
    assert "--ask-refused" in run(generate, env, *arguments(tmp_path, "--top-k", "5"), expect=1).stderr


def test_the_error_of_a_server_that_accepts_text_only_is_shown(api, tmp_path):
    write_prompts(tmp_path, many(30))
    done = run(generate, api(text_only=True), *arguments(tmp_path, "--completions", "--model", DEMO), expect=1)
    assert "prompt must be a string" in done.stderr and sum(paid(tmp_path).values()) == 0


def test_token_counts_are_compared_only_if_the_server_states_them(api, tmp_path):
    write_prompts(tmp_path, many(3))
    done = run(generate, api(usage=False), *arguments(tmp_path, "--completions", "text", "--model", DEMO))
    assert "another number" not in done.stdout and len(answers(tmp_path)) == 3


def test_budget_batch_and_dry_run_work_as_for_scoring(api, tmp_path):
    write_prompts(tmp_path, many(40))
    done = run(generate, api(), *arguments(tmp_path, "--dry-run", "--price-in", "1", "--price-out", "2"))
    assert "40 questions" in done.stdout and "$" in done.stdout and not (tmp_path / "a.json").exists()
    prices = ["--price-in", "1000", "--price-out", "1000"]
    done = run(generate, api(), *arguments(tmp_path, *prices, "--budget", "0.6", "--concurrency", "2"), expect=1)
    assert "budget" in done.stderr and 0 < sum(paid(tmp_path).values()) < 40
    for more in ([], ["--completions", "--model", DEMO]):
        run(generate, api(), *arguments(tmp_path, "--batch", "--batch-poll", "0.1", *more))
        assert len(answers(tmp_path)) == 40


def test_text_that_looks_like_a_special_token_is_reported(api, tmp_path):
    write_prompts(tmp_path, [*many(2), {"prompt": "What is <|eot_id|>?"}])
    done = run(generate, api(), *arguments(tmp_path))
    assert "p.jsonl:3: <|eot_id|>" in done.stdout and "p.jsonl:1" not in done.stdout
    for text in ("</s>", "<s>", "[INST]", "<|im_end|>", "<<SYS>>", "<unk>"):
        assert SPECIAL_TOKEN_TEXT.search(f"a {text}b")
    assert not SPECIAL_TOKEN_TEXT.search("a < s > b <html> [1] </style> <|a b|>")


@pytest.fixture(scope="module")
def trained(bench, tmp_path_factory):
    """A tiny model with a SentencePiece tokenizer that answers with letters."""
    out = tmp_path_factory.mktemp("trained")
    go(bench, out, "--epochs", "20", "--lr", "3e-3", stages=["s1", "s2"])
    return out / "stage2"


@pytest.mark.parametrize("template", ["phased", "mistral", "alpaca"])
def test_answers_equal_those_of_transformers_token_for_token(template, trained, tmp_path):
    """Greedy, fp32, an exported folder: by token ids always; by chat messages and by text where special tokens, or
    nothing, stand between the pieces that we tokenize one by one; and in a conversation by token ids alone."""
    folder = exported(trained, tmp_path, template)
    talk = {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]}
    say = [{"prompt": f"Say {word}."} for word in ("abe", "dof", "kim", "zup", "hallo", "nadir", "quorum", "wo")]
    write_prompts(tmp_path, [*say, talk])
    more = ["--prompts", tmp_path / "p.jsonl", "--max-new-tokens", "16"]
    run(generate, os.environ, "--model", folder, "--dtype", "fp32", *more, "--out", tmp_path / "own.json")
    own = json.loads((tmp_path / "own.json").read_text())
    server = hf_server.start(folder)
    env = os.environ | {"OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_address[1]}/v1", "OPENAI_API_KEY": "x"}
    model = ["--model", folder, "--completions"]
    for name, way in {"chat": [], "ids": model, "text": [*model, "text"]}.items():
        done = run(generate, env, "--server", "x", *way, *more, "--out", tmp_path / f"{name}.json")
        served = json.loads((tmp_path / f"{name}.json").read_text())
        alike = [answer_fields(a, 0) == answer_fields(b, b["finish_reason"] == "stop") for a, b in zip(own, served)]
        assert all(alike), name
        assert "another number of tokens" not in done.stdout
    server.shutdown()
    server.server_close()
    assert len({a["output"] for a in own}) >= 3


def answer_fields(row, ending):
    """The fields to compare; the number of tokens without the end token, which servers count."""
    return row["output"], row["output_tokens"] - ending, row["prompt_tokens"], row["finish_reason"]


@pytest.mark.parametrize(
    "more",
    [
        ["--server", "m", "--prompt", "x"],
        ["--server", "m", "--batch-size", "4"],
        ["--server", "m", "--model", DEMO],
        ["--server", "m", "--completions"],
        ["--server", "m", "--template", "phased"],
        ["--completions", "--model", DEMO],
        ["--model", DEMO, "--dry-run"],
        ["--model", DEMO, "--budget", "3"],
        [],
    ],
)
def test_incompatible_flags_are_usage_errors(more, tmp_path, capsys):
    write_prompts(tmp_path, many(1))
    given = [] if "--prompt" in more else ["--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "a.json")]
    with pytest.raises(SystemExit):
        generate.parse_args([*map(str, more), *given])
    assert "--server" in capsys.readouterr().err
