#!/usr/bin/env bash
# From instructions to a report, without a key or a GPU: IFD scores, stages of rising difficulty, phased and one-off
# training with the same number of steps, answers, verdicts, out/demo/report.html. After a kill, run it again to resume.
#     demo/run.sh [FOLDER]      (under two minutes on two cores)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${1:-out/demo}
mkdir -p "$out"
step() { echo "== $*" >&2; "$@"; }

# With 1,584 rows, phased (three stages of 528) and one-off training both take 99 steps of 16 rows.
sed -n 1,1584p demo/scored.jsonl > "$out/instructions.jsonl"
[ -e "$out/ifd.jsonl" ] || step $python score.py ifd "$out/instructions.jsonl" --model demo/model --out "$out/ifd.jsonl"
step $python score.py stages "$out/ifd.jsonl" --score-key ifd --equal 3 --out-dir "$out"
step $python train.py --model demo/model --stages "$out"/s1 "$out"/s2 "$out"/s3 --out "$out/phased"
step $python train.py --model demo/model --stages "$out/instructions" --out "$out/one-off"
answers() { [ -e "$out/$3" ] || step $python generate.py --model "$out/$1" --name "$2" --prompts demo/validation.jsonl --out "$out/$3"; }
answers one-off/stage1 one-off one-off.json
for k in 1 2 3; do answers phased/stage$k phased/stage$k phased$k.json; done
step $python judge.py compare "$out"/one-off.json "$out"/phased{1,2,3}.json --judge exact --out "$out/verdicts.jsonl"
step $python judge.py report "$out/verdicts.jsonl" --html "$out/report.html" --metrics "$out"/{phased,one-off}/metrics.jsonl
