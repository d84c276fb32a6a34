#!/usr/bin/env bash
# The paper's table, from raw Alpaca to the report: difficulty by an LLM, stages, four arms trained with the paper's
# values, answers to the test sets, verdicts against one-off in both orders, and the table beside the paper's numbers.
#
#     MODEL=Llama-2-7b-hf ALPACA=alpaca_data.json PROMPTS=testsets OUT=out/paper NPROC=8 \
#         recipes/phased_alpaca.sh [--dry-run] [flags of train.py, which override those below]
#
# --dry-run prints rows, tokens, dollars, GPU hours and disk space of all steps, and runs none. If the script is killed,
# or the budget or disk is used up, the same command continues. A finished step runs again only if its command or data
# changed.
#
# MODEL    HF folder; phased_alpaca.py contains the settings for the paper's six models and for others
# PROMPTS  folder with the test sets, one file each: vicuna koala self-instruct wizardlm oasst anthropic
# NPROC    number of GPUs of this machine (1)
# LAUNCH   instead of NPROC, for several nodes: the command before train.py and generate.py: "srun … torchrun …"
# GPUS GPU number and type of the GPUs (H100), for the plan
# ORDERS   further arms: other orders of the stages; the paper has "2-1-3 1-3-2 3-1-2 2-3-1 3-2-1"
# API      flags of score.py difficulty and of judge.py compare: "--batch --budget 900" (dollars for each of the two)
# ANSWERS  flags of generate.py: "--max-new-tokens 1024"
# SERVE    for a model that does not fit on one GPU (70B): the command of an engine, to which the HF folder is appended,
#          for example "vllm serve --tensor-parallel-size 8"; SERVE_URL is its address (http://127.0.0.1:8000/v1)
# API_MODEL (gpt-4-0613, the paper's), OUT (out/phased-alpaca), PYTHON
set -euo pipefail
for name in MODEL ALPACA PROMPTS; do [ -n "${!name:-}" ] || { echo "$0: set $name; see $0" >&2; exit 2; }; done
root=$(cd "$(dirname "$0")/.." && pwd) python=${PYTHON:-python} out=${OUT:-out/phased-alpaca} nproc=${NPROC:-1}
read -ra api <<< "--api-model ${API_MODEL:-gpt-4-0613} ${API:-}"
read -ra orders <<< "${ORDERS:-}"
for order in ${orders[@]+"${orders[@]}"}; do
    [[ $order =~ ^[123](-[123])+$ ]] || { echo "$0: ORDERS: $order is not an order such as 2-1-3" >&2; exit 2; }
done
launcher=$python
[ "$nproc" = 1 ] || launcher="$python -m torch.distributed.run --nproc-per-node $nproc"
read -ra launch <<< "${LAUNCH:-$launcher}"
test_sets=()
for file in "$PROMPTS"/*.json "$PROMPTS"/*.jsonl "$PROMPTS"/*.txt; do [ ! -e "$file" ] || test_sets+=("$file"); done
[ ${#test_sets[@]} -gt 0 ] || { echo "$0: $PROMPTS has no .json, .jsonl or .txt" >&2; exit 2; }
dry_run='' given=()
for word in "$@"; do
    case $word in
        --dry-run) dry_run=1 ;;
        --model* | --stages* | --out* | --select* | --replay*) echo "$0: $word cannot be changed here" >&2; exit 2 ;;
        *) given+=("$word") ;;
    esac
done

helper() { PYTHONPATH=$root "$python" "$root/recipes/phased_alpaca.py" "$@"; }
read -ra usual_training <<< "$(helper usual "$MODEL")"
read -ra answers <<< "${ANSWERS:-}"
# The paper's values (its section 4 and its scripts), then flags that change only speed and memory.
training=(--model "$MODEL" --epochs 2 --lr 5e-6 --batch-size 128 --max-len 2048 --schedule cosine --warmup-ratio 0.1
    --weight-decay 0.1 --betas 0.9 0.95 --max-grad-norm 1.0 --seed 3517 --dtype bf16 --skip-bad-rows
    ${usual_training[@]+"${usual_training[@]}"} ${given[@]+"${given[@]}"})
arms=(one-off phased random stage3 ${orders[@]+"${orders[@]}"})
if [ -n "$dry_run" ] || [ ! -e "$out/scored.jsonl.done" ]; then
    helper plan --alpaca "$ALPACA" --prompts "${test_sets[@]}" --arms "${arms[@]}" --gpus "${GPUS:-$nproc}" \
        --gpu "${GPU:-H100}" --api="${api[*]}" --answers="${answers[*]}" -- "${training[@]}"
fi
[ -z "$dry_run" ] || exit 0
mkdir -p "$out/answers"

# once RESULT FILE… -- COMMAND…: run the command, unless it succeeded before with the same words and contents
once() {
    local result=$1 files=() words
    shift
    while [ "$1" != -- ]; do files+=("$1"); shift; done
    shift
    words="$* $(cat "${files[@]}" | sha256sum)"
    [ ! -e "$result" ] || [ "$(cat "$result.done" 2> /dev/null)" != "$words" ] || return 0
    echo "== $*" >&2
    "$@"
    echo "$words" > "$result.done"
}
together() { cat "${@:2}" > "$1.new" && mv "$1.new" "$1"; }
answer() { # --model FOLDER FLAGS…: of generate.py
    [ -n "${SERVE:-}" ] || { "${launch[@]}" "$root/generate.py" "$@"; return; }
    local url=${SERVE_URL:-http://127.0.0.1:8000/v1}
    $SERVE "$2" &
    engine=$!
    trap 'kill $engine 2> /dev/null || true' EXIT
    until "$python" -c "import sys, httpx; sys.exit(httpx.get('$url/models').status_code != 200)" 2> /dev/null; do
        kill -0 $engine || { echo "$0: SERVE has ended" >&2; return 1; }
        sleep 2
    done
    OPENAI_BASE_URL=$url OPENAI_API_KEY='' "$python" "$root/generate.py" --server "$2" --completions "$@"
    kill $engine && wait $engine 2> /dev/null || true
    trap - EXIT
}
arm() { # NAME STAGE…: train, answer
    local name=$1 stages=("${@:2}")
    local last=$out/$name/stage${#stages[@]}
    once "$last" "${stages[@]}" -- \
        "${launch[@]}" "$root/train.py" --stages "${stages[@]}" --out "$out/$name" "${training[@]}"
    once "$out/answers/$name.json" "$last.done" "${test_sets[@]}" -- answer --model "$last" --name "$name" \
        --prompts "${test_sets[@]}" --out "$out/answers/$name.json" ${answers[@]+"${answers[@]}"}
}

scored=$out/scored.jsonl s=$out/stages/s r=$out/random-stages/s
once "$scored" "$ALPACA" -- "$python" "$root/score.py" difficulty "$ALPACA" --out "$scored" --skip-bad-rows "${api[@]}"
split=("$python" "$root/score.py" stages "$scored" --bounds 1.5 3.5 --allow-unscored)
once "${s}3.jsonl" "$scored" -- "${split[@]}" --out-dir "$out/stages"
once "${r}3.jsonl" "$scored" -- "${split[@]}" --out-dir "$out/random-stages" --random --seed 3517
once "$out/all.jsonl" "$s"{1,2,3}.jsonl -- together "$out/all.jsonl" "$s"{1,2,3}.jsonl
arm one-off "$out/all.jsonl"
arm phased "$s"{1,2,3}.jsonl
arm random "$r"{1,2,3}.jsonl
arm stage3 "${s}3.jsonl"
for order in ${orders[@]+"${orders[@]}"}; do
    IFS=- read -ra stages <<< "$order"
    stages=("${stages[@]/#/$s}")
    arm "$order" "${stages[@]/%/.jsonl}"
done

given_answers=("${arms[@]/#/$out/answers/}")
given_answers=("${given_answers[@]/%/.json}")
once "$out/verdicts.jsonl" "${given_answers[@]}" -- \
    "$python" "$root/judge.py" compare "${given_answers[@]}" --out "$out/verdicts.jsonl" "${api[@]}"
metrics=("${arms[@]/#/$out/}")
"$python" "$root/judge.py" report "$out/verdicts.jsonl" --html "$out/report.html" --json "$out/report.json" \
    --csv "$out/report.csv" --scored "$scored" --metrics "${metrics[@]/%//metrics.jsonl}"
helper table "$MODEL" "$out/report.json" | tee "$out/table.txt"
