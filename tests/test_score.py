"""score.py: stages, selection, IFD."""

import json
import math
import os
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from api_helpers import lines, run
from conftest import SHARED, hf_model, run_forked
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import score
from parts import diversity
from parts.files import write_lines
from parts.text import templates
from parts.text.rows import read_rows
from parts.text.tokenizers import load_tokenizer

# ---------------------------------------------------------------- stages


def scored(path, scores, key="score"):
    write_lines(path, [{"id": str(i), key: s, "data": [f"q{i}", f"a{i}"], "extra": i} for i, s in enumerate(scores)])
    return path


def test_stages_keep_the_rows_as_they_are_and_split_at_the_bounds(tmp_path, capsys):
    scored(tmp_path / "x.jsonl", ["1", "1.5\n", 2, 3.4999, "3.5", 5, 1.49])
    assert score.main(["stages", str(tmp_path / "x.jsonl"), "--out-dir", str(tmp_path / "s")]) == 0
    ids = [[r["id"] for r in lines(tmp_path / "s" / f"s{k}.jsonl")] for k in (1, 2, 3)]
    assert ids == [["0", "6"], ["1", "2", "3"], ["4", "5"]]
    assert lines(tmp_path / "s" / "s2.jsonl")[0] == {"id": "1", "score": "1.5\n", "data": ["q1", "a1"], "extra": 1}
    assert "1 to 1.49" in capsys.readouterr().out
    assert score.main(["stages", str(tmp_path / "x.jsonl"), "--out-dir", str(tmp_path / "r"), "--reverse"]) == 0
    assert [r["id"] for r in lines(tmp_path / "r" / "s1.jsonl")] == ["4", "5"]


def test_random_stages_have_the_same_sizes_and_another_seed_other_rows(tmp_path):
    scored(tmp_path / "x.jsonl", np.linspace(1, 5, 200).tolist())
    chosen = {}
    for seed in ("0", "0", "1"):
        score.main(["stages", str(tmp_path / "x.jsonl"), "--out-dir", str(tmp_path / seed), "--random", "--seed", seed])
        chosen[seed] = [{r["id"] for r in lines(tmp_path / seed / f"s{k}.jsonl")} for k in (1, 2, 3)]
    score.main(["stages", str(tmp_path / "x.jsonl"), "--out-dir", str(tmp_path / "by")])
    sizes = [len(lines(tmp_path / "by" / f"s{k}.jsonl")) for k in (1, 2, 3)]
    assert [len(s) for s in chosen["0"]] == [len(s) for s in chosen["1"]] == sizes and chosen["0"] != chosen["1"]
    assert set.union(*chosen["0"]) == {str(i) for i in range(200)}


@settings(max_examples=200)
@given(st.lists(st.integers(0, 8), min_size=5, max_size=60), st.integers(1, 5))
def test_equal_stages_hold_every_row_once_in_rising_order_and_split_few_ties(values, parts):
    scores = np.array(values, float)
    groups = score.split_equally(scores, parts)
    assert len(groups) == parts and all(len(g) for g in groups)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(values)))
    for a, b in pairwise(groups):
        assert scores[a].max() <= scores[b].min()
    split = sum(scores[a].max() == scores[b].min() for a, b in pairwise(groups))
    if len(set(values)) == len(values):
        assert split == 0 and max(map(len, groups)) - min(map(len, groups)) <= 1


def test_bad_scores_and_empty_stages_are_clear_errors(tmp_path, capsys):
    scored(tmp_path / "x.jsonl", [1, None, 4], "ifd")

    def run_(*more):
        code = score.main(["stages", str(tmp_path / "x.jsonl"), "--out-dir", str(tmp_path / "s"), *more])
        return code, capsys.readouterr().err

    code, err = run_("--score-key", "ifd")
    assert code == 2 and "x.jsonl:2" in err
    code, err = run_("--score-key", "ifd", "--allow-unscored")
    assert code == 2 and "stage 2 would be empty" in err
    code, err = run_("--score-key", "nothing")
    assert code == 2 and "3 of 3" in err
    scored(tmp_path / "x.jsonl", [1, "very", 4], "ifd")
    code, err = run_("--score-key", "ifd")
    assert code == 2 and "x.jsonl:2: ifd 'very'" in err


def test_the_published_file_reads_as_it_is(shared, tmp_path):
    source, split = shared / "alpaca_scored_stage3.jsonl", ["--bounds", "4", "4.5", "--skip-bad-rows"]
    run(score, os.environ, "stages", source, "--out-dir", tmp_path, *split)
    rows = [lines(tmp_path / f"s{k}.jsonl") for k in (1, 2, 3)]
    assert sum(map(len, rows)) == 3995
    assert all(float(r["score"]) < 4 for r in rows[0]) and all(float(r["score"]) >= 4.5 for r in rows[2])


# ---------------------------------------------------------------- selection


def reference_choice(scores, texts, budget, decay):
    """IterIT's selection as one would write it with scikit-learn: every weight of every row summed again at every
    pick."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    matrix = TfidfVectorizer(ngram_range=(1, 3)).fit_transform(texts).tocsc()
    scores, chosen = np.array(scores, float), []
    rows = matrix.tocsr()
    for _ in range(budget):
        values = scores * np.asarray(matrix.sum(axis=1)).ravel()
        values[chosen] = -1
        best = int(np.nanargmax(values))
        chosen.append(best)
        for term in rows[best].indices:
            matrix.data[matrix.indptr[term] : matrix.indptr[term + 1]] *= decay
    return chosen


WORDS = ["The", "cat", "sat", "on", "a", "mat", "Ünïcode", "naïve", "42", "x_y", "don't", "日本語", "über-all", "I"]
words = st.lists(st.sampled_from(WORDS), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(words.map(" ".join), min_size=1, max_size=12))
@example(["the cat", "", "a", "cat the cat the cat"])
def test_tf_idf_is_scikit_learns(texts):
    from sklearn.feature_extraction.text import TfidfVectorizer

    ours = diversity.tf_idf(texts)
    try:
        matrix = TfidfVectorizer(ngram_range=(1, 3)).fit_transform(texts).toarray()
    except ValueError:  # no words at all
        assert len(ours.terms) == 0
        return
    for r in range(len(texts)):
        span = slice(ours.offsets[r], ours.offsets[r + 1])
        assert len(set(ours.terms[span])) == span.stop - span.start
        np.testing.assert_allclose(np.sort(ours.weights[span]), np.sort(matrix[r][matrix[r] > 0]), rtol=0, atol=1e-9)
    dense = np.zeros((len(texts), ours.n_terms))
    for r in range(len(texts)):
        span = slice(ours.offsets[r], ours.offsets[r + 1])
        dense[r, ours.terms[span]] = ours.weights[span]
    np.testing.assert_allclose(dense @ dense.T, matrix @ matrix.T, atol=1e-9)  # the same terms in common


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(words.map(" ".join), st.floats(0.01, 0.99)), min_size=2, max_size=14),
    st.sampled_from([0.1, 0.5, 0.0]),
)
def test_the_choice_is_that_of_summing_again_at_every_pick(rows, decay):
    texts, scores = ["some word " + t for t, _ in rows], np.array([s for _, s in rows])
    ours = diversity.pick_diverse(scores, diversity.tf_idf(texts), len(rows), decay)
    assert sorted(ours) == list(range(len(rows)))
    # Value by value rather than index by index: near-ties may fall either way in the last bit.
    matrix, left = diversity.tf_idf(texts), set(range(len(rows)))
    weights = np.zeros((len(rows), matrix.n_terms))
    for r in range(len(rows)):
        weights[r, matrix.terms[matrix.offsets[r] : matrix.offsets[r + 1]]] = matrix.weights[
            matrix.offsets[r] : matrix.offsets[r + 1]
        ]
    for pick in ours:
        values = scores * weights.sum(1)
        assert values[pick] >= max(values[r] for r in left) - 1e-12
        if all(abs(values[pick] - values[r]) > 1e-12 for r in left - {pick}) is False:
            same = [r for r in left if texts[r] == texts[pick] and scores[r] == scores[pick]]
            assert pick == min(same)  # exact ties: the lowest index
        left.remove(pick)
        weights[:, weights[pick] > 0] *= decay


def test_the_choice_on_real_rows_is_scikit_learns(shared):
    rows, _ = read_rows(shared / "alpaca_scored_stage3.jsonl")
    rows = rows[:1500]
    scores = np.random.default_rng(0).uniform(0.1, 0.99, len(rows))
    scores[::17] = np.nan
    texts = [r.turns[1][1] for r in rows]
    assert diversity.pick_diverse(scores, diversity.tf_idf(texts), 75, 0.1) == reference_choice(scores, texts, 75, 0.1)


def test_select_takes_what_is_too_hard_last_leaves_out_what_is_unscored_and_says_so(tmp_path, capsys):
    values = [0.5, 1.0, 0.9, None, 1.7, 0.8]
    scored(tmp_path / "x.jsonl", values, "ifd")

    def pick(*more):
        score.main(["select", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "o.jsonl"), *more])
        return [r.get("id") for r in lines(tmp_path / "o.jsonl")], capsys.readouterr().out

    for by in ("score", "diversity"):
        ids, out = pick("--ratio", "6", "--by", by)
        assert set(ids[:3]) == {"2", "5", "0"} and ids[3:] == ["1", "4"], by
        assert "2 chosen at IFD 1 or above" in out and "1 rows fewer" in out and "1 without ifd" in out
    ids, out = pick("--ratio", "0.34")
    assert set(ids) == {"2", "5"} and len(lines(tmp_path / "o.jsonl")[0]) == 4 and "chosen at IFD" not in out
    assert set(pick("--ratio", "3", "--by", "random")[0]) <= set("012345")
    write_lines(tmp_path / "x.jsonl", [{"instruction": "q", "output": "a" * n} for n in (3, 9, 5)])
    pick("--by", "length", "--ratio", "2")
    assert [len(r["output"]) for r in lines(tmp_path / "o.jsonl")] == [9, 5]


def test_the_key_follows_the_file_and_nothing_chosen_is_an_error_that_writes_nothing(tmp_path, capsys):
    out = tmp_path / "o.jsonl"

    def pick(command, *more):
        target = ["--out", str(out)] if command == "select" else ["--out-dir", str(tmp_path), "--equal", "2"]
        code = score.main([command, str(tmp_path / "x.jsonl"), *target, *more])
        return code, capsys.readouterr().err

    scored(tmp_path / "x.jsonl", [1, 5, None, 3])  # of difficulty
    for more in (("--by", "score"), ()):
        assert pick("select", "--ratio", "2", *more) == (0, "")
        assert {r["id"] for r in lines(out)} == {"1", "3"}
        out.unlink()
    code, err = pick("select", "--score-key", "scoer")
    assert code == 2 and "as scoer" in err and "id, score, data, extra" in err and not out.exists()
    scored(tmp_path / "x.jsonl", [0.5, 0.9, 0.7], "ifd")
    assert pick("stages") == (0, "") and lines(tmp_path / "s1.jsonl")[0]["id"] == "0"
    (tmp_path / "x.jsonl").write_text(json.dumps({"score": 2, "ifd": 0.3, "instruction": "q", "output": "a"}) + "\n")
    assert pick("select") == (0, "") and "ifd" in lines(out)[0]
    out.unlink()
    for key in ("score", "ifd"):
        scored(tmp_path / "x.jsonl", [None, None], key)
        for by in ("score", "diversity"):
            code, err = pick("select", "--by", by)
            assert code == 2 and "nothing can be chosen" in err and not out.exists()


# ---------------------------------------------------------------- IFD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model with the real Llama-2 tokenizer, and 60 real rows with some that cannot be scored."""
    if not SHARED.is_dir():
        pytest.skip("needs the real tokenizers and rows of ../shared/data, which are not here")
    path = tmp_path_factory.mktemp("ifd")
    hf_model(vocab_size=32000, max_position_embeddings=2048, scale=0.15).save_pretrained(path / "m")
    shutil.copyfile(SHARED / "tokenizers" / "llama2.model", path / "m" / "tokenizer.model")
    rows = [json.loads(line) for line in (SHARED / "alpaca_scored_stage3.jsonl").read_text().splitlines()[:60]]
    rows[5]["data"][1] = "  "
    write_lines(path / "x.jsonl", rows)
    return path


def reference_ifd(folder, rows, max_len=2048):
    """One row at a time with transformers: prompt and answer, then BOS and answer."""
    import transformers

    hf = transformers.AutoModelForCausalLM.from_pretrained(folder / "m", dtype=torch.float32)
    tokenizer = load_tokenizer(folder / "m")
    out = {}
    for row in rows:
        tokens, loss_mask = templates.render(row.turns, templates.TEMPLATES["phased"], tokenizer)
        tokens, loss_mask = tokens[:max_len], loss_mask[:max_len]
        answer = [t for t, s in zip(tokens, loss_mask) if s]
        if not answer:
            continue
        losses = []
        for prompt in ([t for t, s in zip(tokens, loss_mask) if not s], [tokenizer.bos_id]):
            labels = torch.tensor([[-100] * len(prompt) + answer])
            with torch.no_grad():
                losses.append(hf(torch.tensor([prompt + answer]), labels=labels).loss.double())
        out[row.source] = math.exp(losses[0]) / math.exp(losses[1])
    return out


def test_ifd_is_that_of_transformers_on_real_rows(folder, tmp_path):
    files = [folder / "x.jsonl", "--model", folder / "m", "--out", tmp_path / "o.jsonl"]
    done = run(score, os.environ, "ifd", *files, "--max-len", "300", "--dtype", "fp32")
    rows, expected = lines(tmp_path / "o.jsonl"), reference_ifd(folder, read_rows(folder / "x.jsonl")[0], 300)
    assert len(rows) == 60 and len(expected) == 59
    for i, row in enumerate(rows):
        if i == 5:
            assert row["ifd"] is None and "empty" in row["ifd_reason"]
        else:
            assert row["ifd"] == pytest.approx(expected[f"{folder / 'x.jsonl'}:{i + 1}"], rel=1e-4)
        assert {k: v for k, v in row.items() if k not in ("ifd", "ifd_reason")} == json.loads(
            (folder / "x.jsonl").read_text().splitlines()[i]
        )
    assert "median" in done.stdout and "rows/s" in done.stdout


def test_ifd_does_not_depend_on_ranks_or_budget_and_goes_on_after_a_kill(folder, tmp_path):
    def arguments(name):
        return ["ifd", folder / "x.jsonl", "--model", folder / "m", "--out", tmp_path / name, "--dtype", "fp32"]

    run(score, os.environ, *arguments("a"))
    run(score, os.environ, *arguments("c"), "--micro-tokens", "100")
    run_forked(score.main, *arguments("b"), ranks=2)
    one, two, small = ([r["ifd"] for r in lines(tmp_path / name)] for name in "abc")
    for other in (two, small):
        for x, y in zip(one, other):
            assert (x is None) == (y is None) and (x is None or x == pytest.approx(y, rel=1e-5))
    partial = tmp_path / "a.partial.jsonl"
    kept = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(kept[:30]) + kept[30][:11])
    (tmp_path / "a").unlink()
    done = run(score, os.environ, *arguments("a"))
    assert [r["ifd"] for r in lines(tmp_path / "a")] == one and "29 scored now" in done.stdout


def test_ifd_of_rows_that_cannot_have_one_is_an_error_that_says_why(folder, tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"text": f"plain {i}"} for i in range(3)])
    more = ["--model", folder / "m", "--out", tmp_path / "o.jsonl", "--dtype", "fp32"]
    done = run(score, os.environ, "ifd", tmp_path / "x.jsonl", *more, expect=2)
    assert "none of 3 rows has an IFD" in done.stderr and "there is no prompt" in done.stdout + done.stderr
    assert not (tmp_path / "o.jsonl").exists()


def test_documents_without_prompt_or_prediction_have_no_ifd():
    from model import Transformer, init_weights
    from parts.checkpoints.config import parse_config

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    model = Transformer(parse_config(dict(model_type="llama", **sizes)))
    init_weights(model, 0)
    tokens = np.array([1, 5, 6, 2] + [1, 7, 8, 9, 2] + [3, 4], np.int32)
    supervised = np.array([0, 1, 1, 1] + [0, 0, 0, 1, 1] + [1, 0], bool)  # no prompt; ordinary; nothing to predict
    documents = data.Documents(tokens, supervised, np.array([0, 4, 9, 11]), ["a", "b", "c"], ["", "", ""], [])
    scores = score.measure_ifd(model, documents)
    assert scores.dtype == torch.float32 and scores.isnan().tolist() == [True, False, True]
