"""generate.py: compared with transformers' generate; prompts of all test sets; samples; interruptions."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, Forked, hf_model, run_forked
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import generate
from generate import Options
from model import load_model
from parts import decoding
from parts.api.store import Store
from parts.cli import InputError, strip_control_chars
from parts.files import write_lines
from parts.text import templates
from parts.text.rows import Turn, read_rows, row_turns
from parts.text.testsets import parse_prompt, read_prompts
from parts.text.tokenizers import SentencePieceTokenizer

KINDS = {
    "llama": dict(),
    "gqa": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16),
    "tied": dict(tie_word_embeddings=True),
    "mistral": dict(kind="mistral", sliding_window=24),
    "llama3": dict(
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=10000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "dynamic": dict(
        max_position_embeddings=48, rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    ),
}


def make(folder, kind):
    changes = dict(vocab_size=32000, max_position_embeddings=1024, scale=0.25, eos_token_id=None) | KINDS[kind]
    hf = hf_model(changes.pop("kind", "llama"), **changes)
    hf.save_pretrained(folder)
    return hf, load_model(folder)


def collect(model, prompts, stop=(), n=64, limits=None, **options):
    answers, reasons = [[] for _ in prompts], {}
    for i, token, reason in generate.decode(model, prompts, set(stop), Options(n, **options), limits):
        if token is None:
            assert i not in reasons
            reasons[i] = reason
        else:
            assert i not in reasons
            answers[i].append(token)
    assert sorted(reasons) == list(range(len(prompts)))
    return answers, reasons


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dynamic"])
def test_greedy_answers_are_those_of_transformers_at_any_batch_size(kind, shared, tmp_path):
    hf, model = make(tmp_path, kind)
    tokenizer = SentencePieceTokenizer(shared / "tokenizers" / "llama2.model", {})
    rows, _ = read_rows(shared / "alpaca_scored_stage3.jsonl")
    prompts = [templates.render(r.turns[:1], templates.TEMPLATES["phased"], tokenizer)[0] for r in rows[:16]]
    expected = []
    with torch.no_grad():
        for p in prompts:
            out = hf.generate(torch.tensor([p]), max_new_tokens=32, do_sample=False, pad_token_id=0, eos_token_id=None)
            expected.append(out[0, len(p) :].tolist())
    # Two tokens may tie to the last bit of fp32: then, and only then, may the answers part.
    for batch_size in (1, 7, 32):
        answers, _ = collect(model, prompts, n=32, batch_size=batch_size)
        for p, ours, theirs in zip(prompts, answers, expected):
            if ours != theirs:
                at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
                with torch.no_grad():
                    logits = hf(torch.tensor([p + ours[:at]])).logits[0, -1]
                assert abs(logits[ours[at]] - logits[theirs[at]]) < 1e-4, (kind, batch_size, at)
        assert sum(a == b for a, b in zip(answers, expected)) >= 15


def test_prompts_longer_than_the_trained_context_keep_dynamic_rope(tmp_path):
    hf, model = make(tmp_path, "dynamic")
    tokens = torch.randint(1, 32000, (90,), generator=torch.Generator().manual_seed(0))
    cache = decoding.KVCache(model.config, 1, 100, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        ours = decoding.prefill(model, cache, [tokens.tolist()], [0])
    with torch.no_grad():
        assert torch.allclose(ours[0], hf(tokens[None]).logits[0, -1], atol=1e-3)


def test_every_stop_token_ends_an_answer_and_frees_its_slot(tmp_path):
    _, model = make(tmp_path, "gqa")
    prompts = [np.random.default_rng(i).integers(1, 32000, 3 + 5 * i % 40).tolist() for i in range(40)]
    free, _ = collect(model, prompts, n=30, batch_size=7)
    stop = {a[k] for k, a in zip((3, 10, 0), free)}  # tokens that do come
    answers, reasons = collect(model, prompts, stop, n=30, batch_size=7)
    for i, whole in enumerate(free):
        cut = next((k for k, t in enumerate(whole) if t in stop), None)
        assert answers[i] == whole[:cut] and reasons[i] == ("length" if cut is None else "stop")
    assert "stop" in reasons.values() and "length" in reasons.values()


def test_answers_end_at_the_context(tmp_path):
    _, model = make(tmp_path, "llama")
    prompts = [[5] * 1000, [7] * 1023, [9] * 4]
    answers, reasons = collect(model, prompts, n=100)
    assert [len(a) for a in answers] == [24, 1, 100] and set(reasons.values()) == {"length"}


def test_a_sample_depends_on_seed_and_prompt_only(tmp_path):
    _, model = make(tmp_path, "gqa")
    prompts = [np.random.default_rng(i).integers(1, 32000, 4 + i).tolist() for i in range(20)]
    options = dict(n=12, temperature=0.9, top_k=50, top_p=0.95)
    one, _ = collect(model, prompts, batch_size=1, **options)
    many, _ = collect(model, prompts, batch_size=16, **options)
    few, _ = collect(model, prompts[7:9], batch_size=2, **options)
    other, _ = collect(model, prompts, batch_size=16, seed=1, **options)
    assert one == many and few == one[7:9] and other != one


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 3), st.integers(0, 12), st.floats(0.05, 1))
def test_samples_come_from_the_distribution_of_transformers(seed, temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 2
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    p = TopPLogitsWarper(top_p)(None, warped).softmax(1)[0].double() if top_p < 1 else warped.softmax(1)[0].double()
    chances = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    ours = decoding.sample(logits.expand(4000, -1), Options(1, temperature, top_k, top_p), chances)
    shares = torch.bincount(ours, minlength=12) / 4000
    assert (shares - p).abs().max() < 1e-3


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "name, count, first",
    [
        ("vicuna.jsonl", 80, "How can I improve my time management skills?"),
        ("wizardlm.jsonl", 218, "If a car travels 120 miles"),
        ("sinstruct.jsonl", 252, "The sentence you are given might be too wordy"),
        ("alpaca_eval.json", 805, "What are the names of some famous"),
    ],
)
def test_the_test_sets_are_read_in_their_own_formats(name, count, first, shared):
    prompts = read_prompts(shared / "testsets" / name)
    assert len(prompts) == count and prompts[0].turns[-1][1].startswith(first)
    if name == "alpaca_eval.json":
        assert {p.dataset for p in prompts} == {"helpful_base", "koala", "oasst", "selfinstruct", "vicuna"}
    if name == "sinstruct.jsonl":
        assert prompts[0].turns[0][1].endswith("please let me know.") and prompts[0].id == "user_oriented_task_0"


@pytest.mark.parametrize(
    "row, turns",
    [
        ({"instruction": "a", "input": "b"}, [Turn("user", "a\nb")]),
        ({"instruction": "a", "input": " ", "output": "c"}, [Turn("user", "a")]),
        ({"prompt": "p"}, [Turn("user", "p")]),
        ({"text": "p"}, [Turn("user", "p")]),
        ({"data": ["q", "a"]}, [Turn("user", "q")]),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
            [Turn("system", "s"), Turn("user", "u")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "1"},
                    {"from": "gpt", "value": "2"},
                    {"from": "human", "value": "3"},
                ]
            },
            [Turn("user", "1"), Turn("assistant", "2"), Turn("user", "3")],
        ),
    ],
)
def test_every_row_format_is_a_prompt(row, turns):
    assert parse_prompt(row, "f:1", "f", 0).turns == turns


def test_a_prompt_is_token_for_token_what_training_rendered(shared):
    tokenizer = SentencePieceTokenizer(shared / "tokenizers" / "llama2.model", {})
    row = {"instruction": "Translate.", "input": "  bonjour \n", "output": "hello"}
    trained, loss_mask = templates.render(row_turns(row, "alpaca"), templates.TEMPLATES["phased"], tokenizer)
    asked = templates.render(parse_prompt(row, "f:1", "f", 0).turns, templates.TEMPLATES["phased"], tokenizer)[0]
    assert asked == trained[: loss_mask.index(True)]


def test_bad_prompts_are_listed_with_their_place(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n{"odd": 1}\nnot json\n[1]\n')
    with pytest.raises(InputError) as e:
        read_prompts(tmp_path / "x.jsonl")
    assert all(f"x.jsonl:{k}" in str(e.value) for k in (2, 3, 4, 5)) and "x.jsonl:1:" not in str(e.value)
    (tmp_path / "y").write_text("one\n\ntwo {\n")
    assert [p.turns for p in read_prompts(tmp_path / "y")] == [[Turn("user", "one")], [Turn("user", "two {")]]


# ---------------------------------------------------------------- the program


DEMO = ROOT / "demo" / "model"


def run(*arguments, model=DEMO, **options):
    return run_forked(generate.main, "--model", model, *arguments, **options)


def test_killed_and_started_again_it_answers_only_what_is_missing(tmp_path):
    prompts = [json.loads(x) for x in (ROOT / "demo" / "prompts.jsonl").read_text().splitlines()][:150]
    prompts[20]["instruction"] = "word " * 3000
    write_lines(tmp_path / "p.jsonl", prompts)
    arguments = ["--prompts", tmp_path / "p.jsonl", "--max-new-tokens", "24", "--dtype", "fp32", "--batch-size", "8"]
    done = run(*arguments, "--out", tmp_path / "a.json")
    whole = json.loads((tmp_path / "a.json").read_text())
    assert [r["id"] for r in whole] == [p["id"] for p in prompts] and not list(tmp_path.glob("*.partial.*"))
    assert whole[20]["finish_reason"] == "error" and "context" in whole[20]["error"] and "p.jsonl:21" in done.stdout
    question, answer = {"id", "dataset", "instruction", "expected"}, {"output", "generator", "finish_reason"}
    assert set(whole[0]) == question | answer | {"prompt_tokens", "output_tokens"}

    partial = tmp_path / "b.json.partial.0.jsonl"
    process = Forked(generate.main, ["--model", DEMO, *arguments, "--out", tmp_path / "b.json"], ".")
    process.wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 40).kill()
    partial.write_bytes(partial.read_bytes()[:-7])  # torn
    kept = partial.read_bytes().count(b"\n")
    done = run(*arguments, "--out", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == whole and f"{149 - kept} answers made now" in done.stdout


def test_ranks_share_the_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"Start with {i}, add 1 to it.\n" for i in range(9)))
    arguments = ["--prompts", tmp_path / "p.txt", "--max-new-tokens", "8", "--dtype", "fp32"]
    run(*arguments, "--out", tmp_path / "a")
    run(*arguments, "--out", tmp_path / "b", ranks=2)
    assert json.loads((tmp_path / "a").read_text()) == json.loads((tmp_path / "b").read_text())


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(tmp_path):
    hf_model(vocab_size=60, max_position_embeddings=512).save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, tmp_path / "m" / name)
    (tmp_path / "p.txt").write_text("Start with 3, add 1 to it.\n")
    done = run("--prompts", tmp_path / "p.txt", "--out", tmp_path / "e", model=tmp_path / "m", expect=2)
    assert "do not belong together" in done.stderr


def test_one_prompt_and_a_chat_in_the_terminal(tmp_path):
    assert run("--prompt", "Start with 3, add 1 to it.", "--max-new-tokens", "5").stdout.strip()

    def typed(argv):
        sys.stdin = io.StringIO("hello\nand again\n\n")
        return generate.main(argv)

    done = run_forked(typed, "--model", DEMO, "--chat", "--max-new-tokens", "5")
    assert done.stdout.count("> ") == 3
    assert strip_control_chars("a\x1b[31mb\nc\u202e") == "a[31mb\nc"
    assert "needs --out" in run("--prompts", "x", expect=2).stderr
    assert "x: " in run("--prompts", "x", "--out", tmp_path / "o", expect=2).stderr


def test_the_compiled_step_gives_the_same_answers(tmp_path):
    _, model = make(tmp_path, "mistral")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 32000, n).tolist() for n in (5, 30, 90, 12, 60)]
    limits = [40, 20, 60, 50, 30]
    assert collect(model, prompts, limits=limits, batch_size=2, compile=True) == collect(
        model, prompts, limits=limits, batch_size=2
    )


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_recorded_step_gives_the_same_answers(kind, tmp_path, monkeypatch):
    _, model = make(tmp_path, kind)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 32000, n).tolist() for n in (5, 30, 90, 12, 60)]
    given = {"limits": [40, 20, 60, 50, 30], "batch_size": 3, "temperature": 0.8}
    expected, new_tokens = collect(model, prompts, **given), []
    record = decoding.RecordedLogits.record

    def watched(self, model, inputs):
        new_tokens.append(record(self, model, inputs))
        return new_tokens[-1]

    monkeypatch.setattr(decoding.RecordedLogits, "record", watched)
    monkeypatch.setattr(decoding.RecordedLogits, "FROM_STEP", 5)
    assert collect(model.requires_grad_(False), prompts, **given) == expected
    assert [type(m) for m in new_tokens] == [torch.jit.ScriptFunction] * 2  # with and without a mask


def test_a_model_that_asks_for_values_is_not_recorded(tmp_path, monkeypatch):
    """A recording would keep the way that Python took for its first token."""
    _, model = make(tmp_path, "llama")
    forward = type(model.norm).forward

    def changed(self, x):
        return forward(self, x) * (1 if x.sum() > 0 else -1)

    monkeypatch.setattr(type(model.norm), "forward", changed)
    monkeypatch.setattr(decoding.RecordedLogits, "FROM_STEP", 0)
    prompts = [[5, 6, 7], [9, 10]]
    expected = collect(model, prompts, n=30, batch_size=2)
    assert collect(model.requires_grad_(False), prompts, n=30, batch_size=2) == expected


def test_answers_of_other_weights_or_options_are_not_taken_for_its_own(tmp_path):
    shutil.copytree(DEMO, tmp_path / "m")
    prompts = "".join(f"Start with {i}, add 1 to it.\n" for i in range(12))
    (tmp_path / "p.txt").write_text(prompts)
    arguments = ["--prompts", tmp_path / "p.txt", "--max-new-tokens", "6", "--dtype", "fp32", "--batch-size", "1"]
    out, partial = (
        tmp_path / "ans[1].json",
        tmp_path / "ans[1].json.partial.0.jsonl",
    )  # a name that means more to a glob

    def some(n):
        process = Forked(generate.main, ["--model", tmp_path / "m", *arguments, "--out", out], ".")
        process.wait_until(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= n).kill()

    some(4)
    kept = partial.read_bytes().count(b"\n")
    done = run(*arguments, "--out", out, model=tmp_path / "m")
    assert f"{12 - kept} answers made now" in done.stdout and not partial.exists()
    some(4)
    assert "12 answers made now" in run(*arguments, "--top-p", "0.9", "--out", out, model=tmp_path / "m").stdout
    some(4)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    assert "12 answers made now" in run(*arguments, "--out", out, model=tmp_path / "m").stdout


def test_two_processes_do_not_write_one_file_and_prompts_are_not_overwritten(tmp_path):
    (tmp_path / "p.txt").write_text("Start with 1, add 1 to it.\n" * 2)
    held = Store(tmp_path / "a.json.partial.0.jsonl")
    done = run("--prompts", tmp_path / "p.txt", "--out", tmp_path / "a.json", expect=2)
    assert "in use" in done.stderr and held.path.exists()
    done = run("--prompts", tmp_path / "p.txt", "--out", tmp_path / "p.txt", expect=2)
    assert "is read" in done.stderr and "add 1" in (tmp_path / "p.txt").read_text()
