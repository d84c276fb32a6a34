"""model.py against transformers, and with damaged or malicious folders."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, hf_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import model as M
from model import Transformer, load_model, save_model
from parts import kernels
from parts.checkpoints import config as config_file
from parts.checkpoints import weights as W
from parts.checkpoints.config import parse_config
from parts.cli import InputError


def documents(lengths, vocab=97, seed=0):
    tokens = torch.randint(0, vocab, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def hf_logits(hf, tokens, lengths):
    return torch.cat([hf(t[None]).logits[0] for t in tokens.split(lengths)])


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SWITCHES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 20}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 7}),
]


@pytest.mark.parametrize("kind, changes", SWITCHES)
def test_logits_and_gradients_equal_transformers(kind, changes, tmp_path):
    hf = hf_model(kind, **changes)
    hf.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    lengths = [5, 1, 60, 23]
    tokens, positions, cu_seqlens = documents(lengths)
    expected = hf_logits(hf, tokens, lengths)
    logits = ours(tokens, positions, cu_seqlens)
    assert expected.abs().max() > 1  # else the next line says nothing
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)

    targets = torch.randint(0, 97, tokens.shape)
    targets[::3] = -100
    F.cross_entropy(expected, targets, reduction="sum").backward()
    loss, losses = ours(tokens, positions, cu_seqlens, targets)
    loss.backward()
    torch.testing.assert_close(losses.sum(), loss)
    torch.testing.assert_close(loss, F.cross_entropy(expected, targets, reduction="sum"), rtol=1e-5, atol=0)
    theirs = {name: p.grad for name, p in hf.named_parameters()}
    for name, p in ours.named_parameters():
        g = theirs[M.hf_name(name)]
        assert (p.grad - g).norm() <= 1e-3 * g.norm(), name


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_combination_of_config_settings_agrees_with_transformers(tmp_path_factory, data):
    draw = data.draw
    kind = draw(st.sampled_from(["llama", "mistral"]))
    groups, repeat, hd = (
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([6, 8, 16])),
    )
    changes = dict(
        num_key_value_heads=groups,
        num_attention_heads=groups * repeat,
        head_dim=hd,
        hidden_size=12 * groups * repeat,
        intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
    )
    theta = draw(st.sampled_from([1e2, 1e4, 1e6]))
    changes["rope_parameters"] = draw(
        st.sampled_from([{"rope_type": "default"}, {"rope_type": "linear", "factor": 3.0}, LLAMA3_ROPE])
    ) | {"rope_theta": theta}
    if kind == "mistral":
        changes["sliding_window"] = draw(st.one_of(st.none(), st.integers(1, 40)))
    else:
        changes |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    # With larger weights fp32 itself is less accurate.
    hf = hf_model(kind, seed=draw(st.integers(0, 99)), scale=0.2, **changes)
    folder = tmp_path_factory.mktemp("m")
    hf.save_pretrained(folder)
    tokens, positions, cu_seqlens = documents(lengths)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(folder)(tokens, positions, cu_seqlens), hf_logits(hf, tokens, lengths), atol=1e-4, rtol=1e-4
        )


def test_dynamic_rope_scales_each_document_as_if_alone(tmp_path):
    changes = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    hf_model(**changes).save_pretrained(tmp_path)
    lengths = [100, 64, 65, 30]  # the model was made for 64
    tokens, positions, cu_seqlens = documents(lengths)
    # transformers remembers the longest sequence it has seen: a fresh model for each document
    expected = torch.cat([hf_model(**changes)(t[None]).logits[0] for t in tokens.split(lengths)])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(tokens, positions, cu_seqlens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sliding_window", [None, 100, 600])
def test_documents_longer_than_a_block_agree_with_transformers(sliding_window, tmp_path):
    hf = hf_model("mistral", sliding_window=sliding_window, max_position_embeddings=2048, num_hidden_layers=1)
    hf.save_pretrained(tmp_path)
    lengths = [kernels.QUERY_BLOCK + 188, 3, kernels.QUERY_BLOCK, kernels.QUERY_BLOCK + 1]
    tokens, positions, cu_seqlens = documents(lengths)
    ours = load_model(tmp_path)
    logits, expected = ours(tokens, positions, cu_seqlens), hf_logits(hf, tokens, lengths)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    logits.square().mean().backward()
    expected.square().mean().backward()
    g = hf.model.layers[0].self_attn.q_proj.weight.grad
    assert (ours.layers[0].attention.q.weight.grad - g).norm() <= 1e-3 * g.norm()


def test_documents_do_not_attend_to_each_other(tmp_path):
    hf_model().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    tokens, positions, cu_seqlens = documents([9, 12, 7])
    changed = tokens.clone()
    changed[:9] = (changed[:9] + 1) % 97
    changed[21:] = (changed[21:] + 5) % 97
    with torch.no_grad():
        a, b = model(tokens, positions, cu_seqlens), model(changed, positions, cu_seqlens)
    assert torch.equal(a[9:21], b[9:21]) and not torch.equal(a[:9], b[:9])


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    hf_model().save_pretrained(tmp_path)
    batch, targets = documents([9, 12, 7]), torch.randint(0, 97, (28,))
    grads, saved = [], []
    for checkpointed in (False, True):
        model, kept = load_model(tmp_path), []
        for block in model.layers:
            block.activation_checkpointing = checkpointed

        def keep(t, kept=kept):
            kept.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(*batch, targets)[0].backward()
        grads.append([p.grad for p in model.parameters()])
        saved.append(sum(kept))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert saved[1] < saved[0] / 2


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
def test_transformers_loads_an_export_with_the_same_logits(shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(W, "SHARD_BYTES", shard_bytes)
    hf = hf_model(attention_bias=True)
    hf.save_pretrained(tmp_path / "a")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    files = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes > 10**6 else len(files) > 3
    assert all(
        (tmp_path / "b" / f).stat().st_size < shard_bytes + 4000 or len(load_file(tmp_path / "b" / f)) == 1
        for f in files
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", attn_implementation="eager")
    tokens = documents([20])[0][None]
    assert torch.equal(again(tokens).logits, hf(tokens).logits)
    torch.testing.assert_close(load_model(tmp_path / "b")(*documents([20])), hf(tokens).logits[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_of_any_float_type_load(dtype, tmp_path):
    hf_model().save_pretrained(tmp_path)
    stored = {k: v.to(dtype) for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors")
    model = load_model(tmp_path, dtype=torch.float32)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, stored[M.hf_name(name)].float()), name


@pytest.mark.parametrize(
    "config, count",
    [
        (dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32), 6_738_415_616),
        (dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40), 13_015_864_320),
        (
            dict(
                hidden_size=8192,
                intermediate_size=28672,
                num_hidden_layers=80,
                num_attention_heads=64,
                num_key_value_heads=8,
            ),
            68_976_648_192,
        ),
        (
            dict(
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
            ),
            8_030_261_248,
        ),
        (
            dict(
                hidden_size=8192,
                intermediate_size=28672,
                num_hidden_layers=80,
                num_attention_heads=64,
                num_key_value_heads=8,
                vocab_size=128256,
            ),
            70_553_706_496,
        ),
        (
            dict(
                model_type="mistral",
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            ),
            7_241_732_096,
        ),
        (
            dict(
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=64,
                vocab_size=128256,
                tie_word_embeddings=True,
            ),
            1_235_814_400,
        ),
        (
            dict(
                hidden_size=2048,
                intermediate_size=5632,
                num_hidden_layers=22,
                num_attention_heads=32,
                num_key_value_heads=4,
            ),
            1_100_048_384,
        ),
    ],
    ids=["llama2-7b", "llama2-13b", "llama2-70b", "llama3-8b", "llama3-70b", "mistral-7b", "llama3.2-1b", "tinyllama"],
)
def test_parameter_counts_of_published_models(config, count):
    with torch.device("meta"):
        model = Transformer(parse_config({"model_type": "llama", "vocab_size": 32000, **config}))
    assert sum(p.numel() for p in model.parameters()) == count


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    raw = dict(
        model_type="llama",
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = Transformer(parse_config(raw))
    model.to_empty(device="cpu")
    M.init_weights(model, 0)
    save_model(model, tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    peaks = []
    for load in ("", f"model.load_model({str(tmp_path)!r})"):
        code = f"import resource, model\n{load}\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(out.stdout))
    assert size > 3e8 and peaks[1] - peaks[0] < 1.2 * size, f"{(peaks[1] - peaks[0]) / size:.2f} times the weights"


def test_each_rank_reads_only_the_slices_it_owns(tmp_path, monkeypatch):
    rank = 2  # one only: DTensor remembers the slices of a mesh for as long as the process lives
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    uneven = dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=51, head_dim=10)
    hf_model(**uneven).save_pretrained(tmp_path)
    whole = {name: p.detach() for name, p in load_model(tmp_path).named_parameters()}
    read, real = [], M.read_slice
    monkeypatch.setattr(
        M,
        "read_slice",
        lambda path, key, target, offset: read.append(target.numel()) or real(path, key, target, offset),
    )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        with torch.device("meta"):
            model = Transformer(config_file.read_config(tmp_path))
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        model.to_empty(device="cpu")
        M.load_weights(model, M.find_weight_files(model, tmp_path))
        for name, p in model.named_parameters():
            chunks = whole[name].chunk(4)
            mine = chunks[rank] if rank < len(chunks) else whole[name][:0]
            assert torch.equal(p.to_local(), mine), name
    finally:
        dist.destroy_process_group()
    assert sum(read) <= 0.3 * sum(w.numel() for w in whole.values())


@pytest.fixture
def folder(tmp_path):
    hf_model().save_pretrained(tmp_path)
    return tmp_path


def refused(folder, *words):
    with pytest.raises(InputError) as e:
        load_model(folder)
    for word in words:
        assert word in str(e.value), str(e.value)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 3)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 5)
    tensors["lm_head.weight"] = torch.zeros(97, 48, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    refused(
        folder,
        "missing: model.norm.weight (48,)",
        "surplus: model.layers.7.mlp.up_proj.weight (2, 3)",
        "wrong shape: model.layers.0.mlp.up_proj.weight is (4, 5)",
        "not of floats: lm_head.weight",
    )


def test_old_rotary_buffers_and_a_repeated_tied_head_are_allowed(tmp_path):
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    load_model(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_that_differs_from_its_tied_embedding_is_used(shards, tmp_path, capsys):
    hf_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    untied = hf_model(tie_word_embeddings=False, seed=1)
    tensors = {k: v.clone() for k, v in untied.state_dict().items()}
    if shards == 1:
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        (tmp_path / "model.safetensors").unlink()
        files = {k: f"model-0000{1 + (k == 'lm_head.weight')}-of-00002.safetensors" for k in tensors}
        for file in set(files.values()):
            save_file({k: v for k, v in tensors.items() if files[k] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    ours = load_model(tmp_path)
    assert "a different head" in capsys.readouterr().out
    tokens, positions, cu_seqlens = documents([9, 4])
    expected = hf_logits(untied, tokens, [9, 4])
    torch.testing.assert_close(ours(tokens, positions, cu_seqlens), expected, atol=1e-4, rtol=1e-5)
    save_model(ours, tmp_path / "export")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(again.lm_head.weight, tensors["lm_head.weight"])


def test_settings_that_only_transformers_supports_are_errors(folder):
    config = json.loads((folder / "config.json").read_text())
    for changes, word in [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e5}}}, "full_attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | changes))
        refused(folder, word)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter")


def test_pickled_weights_are_refused_with_advice(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(folder, "save_pretrained")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 7])
def test_an_index_cannot_point_outside_the_folder(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(folder, "index.json")


def test_a_missing_shard_is_an_error_that_names_it(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )
    refused(folder, "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_an_error_that_names_it(folder, keep):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    refused(folder, "model.safetensors", "truncated")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"vocab_size": 1e3}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": None, "num_attention_heads": 7, "num_key_value_heads": 7}, "multiple"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"model_type": "qwen2"}, "model_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": "x"}}, "factor"),
        ({"rope_parameters": None, "rope_theta": -5}, "rope_theta"),
        ({"rope_parameters": [1]}, "rope"),
        ({"intermediate_size": 999}, "wrong shape"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
    ],
)
def test_absurd_or_unsupported_configs_are_errors(folder, change, word):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    refused(folder, word)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\ufffe"])
def test_a_config_that_is_not_a_json_object_is_an_error(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_old_and_new_rope_keys_give_the_same_config():
    base = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
    }
    new = parse_config(base | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}})
    for key in ("rope_type", "type"):
        old = parse_config(base | {"rope_theta": 7.0, "rope_scaling": {key: "linear", "factor": 2.0}})
        assert (
            (old.rope_theta, old.rope_scaling)
            == (new.rope_theta, new.rope_scaling)
            == (7.0, {"rope_type": "linear", "factor": 2.0})
        )


def test_dynamic_rope_needs_a_head_dim_above_two_and_only_mistral_has_a_window():
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=9)
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(InputError, match="head_dim above 2"):
            parse_config(dict(model_type="llama", **sizes, **{key: {"rope_type": "dynamic", "factor": 2.0}}))
    windows = {
        kind: parse_config(dict(model_type=kind, num_key_value_heads=4, sliding_window=7, **sizes)).sliding_window
        for kind in config_file.MODEL_DEFAULTS
    }
    assert windows == {"llama": None, "mistral": 7}


def test_every_matrix_is_called_as_a_module_and_dropout_in_it_has_the_right_gradient(monkeypatch):
    """A change of Linear.forward applies to all matrices, also if the forward pass is computed twice."""
    sizes = dict(vocab_size=7, hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=3)
    config = parse_config({"model_type": "llama", **sizes})
    model = Transformer(config).double()
    M.init_weights(model, 0)
    called, forward = set(), M.Linear.forward
    names = {module: name for name, module in model.named_modules() if isinstance(module, M.Linear)}

    def dropping(self, x):
        called.add(names[self])
        return F.dropout(forward(self, x), 0.3)

    monkeypatch.setattr(M.Linear, "forward", dropping)
    tokens = torch.arange(12) % 7
    inputs = (tokens, torch.arange(12), torch.tensor([0, 12], dtype=torch.int32), tokens.roll(-1))
    weight = model.layers[0].mlp.down.weight
    for block in model.layers:
        block.activation_checkpointing = True

    def loss():
        torch.manual_seed(0)
        return model(*inputs)[0]

    loss().backward()
    assert called == set(names.values())
    step = torch.zeros_like(weight)
    step[1, 2] = 1e-5
    found = []
    for sign in (1, -2):
        weight.data += sign * step
        found.append(loss().item())
    weight.data += step
    assert abs((found[0] - found[1]) / 2e-5 - weight.grad[1, 2].item()) < 1e-6 * max(1, abs(weight.grad[1, 2].item()))
