"""A real pre-trained model, SmolLM2-135M-Instruct, and real rows: against transformers at every point where it computes
the same."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import Forked, run_forked, same, weights

import data
import generate
import score
import train
from model import hf_name, load_model
from parts.text.rows import Turn, messages_of
from parts.text.templates import TEMPLATES, render
from parts.text.testsets import read_prompts
from parts.text.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Three stages of 8 real rows each, short ones."""
    from conftest import SHARED

    if not SHARED.is_dir():
        pytest.skip("needs the real rows of ../shared/data, which are not here")
    folder = tmp_path_factory.mktemp("rows")
    found = json.loads((SHARED / "alpaca_random_9k.json").read_text(encoding="utf-8"))
    short = [row for row in found if 40 < len(row["output"]) < 300][:24]
    for k in range(3):
        (folder / f"s{k + 1}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short[8 * k : 8 * k + 8]))
    return folder


def hf(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.model.embed_tokens.padding_idx = None  # else that token's row gets no gradient
    return model


def documents_of(path, folder):
    return data.tokenize_files([path], folder, "chatml", 2048, shown=False)


def batch_of(documents, rows):
    return [torch.from_numpy(a) for a in documents.pack(np.array(rows))]


def hf_losses(model, documents, d):
    """The loss of each supervised token of a document, by transformers."""
    tokens, _, _, targets = batch_of(documents, [d])
    logits = model(input_ids=tokens[None]).logits[0]
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)[targets != -100]


def test_logits_and_losses_of_real_rows_are_those_of_transformers(smollm2, stages):
    ours, theirs = load_model(smollm2), hf(smollm2)
    documents = documents_of(stages / "s1.jsonl", smollm2)
    tokens, positions, cu_seqlens, targets = batch_of(documents, [0, 1, 2, 3])
    with torch.no_grad():
        logits = ours(tokens, positions, cu_seqlens)
        _, losses = ours(tokens, positions, cu_seqlens, targets)
        expected = torch.cat(
            [theirs(input_ids=t[None]).logits[0] for t in tokens.tensor_split(cu_seqlens[1:-1].long())]
        )
        expected_losses = torch.cat([hf_losses(theirs, documents, d) for d in range(4)])
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(losses, expected_losses, atol=1e-4, rtol=1e-4)


def test_gradients_of_a_real_row_are_those_of_transformers(small_smollm2, stages):
    ours, theirs = load_model(small_smollm2), hf(small_smollm2)
    documents = documents_of(stages / "s2.jsonl", small_smollm2)
    ours(*batch_of(documents, [0]))[0].backward()
    hf_losses(theirs, documents, 0).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        grad = expected[hf_name(name)].grad
        assert (p.grad - grad).norm() <= 1e-3 * grad.norm(), name


def test_greedy_answers_to_real_prompts_are_those_of_transformers(smollm2, shared):
    ours, theirs, tokenizer = load_model(smollm2), hf(smollm2), load_tokenizer(smollm2)
    prompts = [p.turns for p in read_prompts(shared / "testsets" / "vicuna.jsonl")[:3]]
    answers = generate.generate(ours, tokenizer, prompts, "chatml", generate.Options(max_new_tokens=24))
    for turns, answer in zip(prompts, answers):
        ids = torch.tensor([render(turns, TEMPLATES["chatml"], tokenizer)[0]])
        with torch.no_grad():
            made = theirs.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)[0, ids.shape[1] :].tolist()
        assert answer == [token for token in made if token not in tokenizer.eos_ids]


def test_ifd_of_real_rows_is_that_of_transformers(smollm2, stages):
    ours, theirs, documents = load_model(smollm2), hf(smollm2), documents_of(stages / "s3.jsonl", smollm2)
    few = data.subset(documents, np.arange(4))
    found = score.measure_ifd(ours, few)
    for d in range(4):
        tokens, _, _, targets = batch_of(few, [d])
        supervised = torch.nonzero(targets != -100).squeeze(1) + 1
        alone = torch.cat([tokens[:1], tokens[supervised]])
        with torch.no_grad():
            given = hf_losses(theirs, few, d).mean()
            by_itself = F.cross_entropy(theirs(input_ids=alone[None]).logits[0, :-1], alone[1:])
        assert found[d].item() == pytest.approx((given - by_itself).exp().item(), rel=1e-4)


def training(model, stages, out, *more, count=3):
    files = [str(stages / f"s{k + 1}.jsonl") for k in range(count)]
    defaults = ["--lr", "1e-4", "--batch-size", "4", "--dtype", "fp32", "--micro-tokens", "512", "--seed", "3"]
    return ["--model", str(model), "--stages", *files, "--out", str(out), *defaults, *more]


def losses_of(out):
    return [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.fixture(scope="module")
def trained(small_smollm2, stages, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    run_forked(train.main, *training(small_smollm2, stages, out), cwd=out, expect=0)
    return out


def test_three_stages_have_the_losses_of_a_plain_loop_in_transformers(small_smollm2, stages, trained):
    model, expected = hf(small_smollm2), []
    for k in range(3):
        documents = documents_of(stages / f"s{k + 1}.jsonl", small_smollm2)
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}]
        groups += [{"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
        for step, batch in enumerate(data.epoch_batches(documents, np.arange(8), 4, 3, k, 0)):
            loss = sum(hf_losses(model, documents, d).sum() for d in batch) / documents.target_counts[batch].sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, 2, 1e-4, "cosine", 0.1)
            optimizer.step()
            expected.append(loss.item())
    assert losses_of(trained) == pytest.approx(expected, rel=2e-4)
    again = transformers.AutoModelForCausalLM.from_pretrained(trained / "stage3", dtype=torch.float32)
    exported = dict(again.named_parameters())
    for name, p in model.named_parameters():
        assert (exported[name] - p).abs().max() <= p.abs().max() / 128, name  # bf16 in the file


@pytest.mark.parametrize("more", [["--lora", "4"], ["--weights", "bf16"]])  # two steps, killed after the first
def test_a_killed_run_with_adapters_or_bf16_weights_goes_on_to_the_same_bits(small_smollm2, stages, tmp_path, more):
    argv = training(small_smollm2, stages, tmp_path / "straight", *more, count=1)
    run_forked(train.main, *argv, cwd=tmp_path, expect=0)
    argv = training(small_smollm2, stages, tmp_path / "killed", *more, "--save-every", "1", count=1)
    first = tmp_path / "killed" / "resume" / "000-00000001"
    Forked(train.main, argv, tmp_path).wait_until(first.exists).kill()
    assert first.exists() and not (tmp_path / "killed" / "stage1").exists()
    run_forked(train.main, *argv, cwd=tmp_path, expect=0)
    assert same(weights(tmp_path / "killed", "stage1"), weights(tmp_path / "straight", "stage1"))
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "straight")
    if "--lora" in more:
        config = json.loads((tmp_path / "killed" / "stage1" / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(small_smollm2.resolve())  # read from any folder


def test_transformers_answers_with_an_export_as_generate_does(trained):
    folder = trained / "stage3"
    theirs = transformers.pipeline("text-generation", model=str(folder), dtype=torch.float32, device="cpu")
    turns = [Turn("system", "Be brief."), Turn("user", "Name a colour.")]
    made = theirs(messages_of(turns), max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"]
    ours, tokenizer = load_model(folder), load_tokenizer(folder)
    answer = generate.generate(ours, tokenizer, [turns], "chatml", generate.Options(max_new_tokens=12))[0]
    assert tokenizer.decode(answer).strip() == made.strip()
