#!/usr/bin/env bash
# Rebuild demo/: text and instructions, and a tiny Llama pre-trained on the text with train.py (an hour and a quarter on
# two idle cores).
set -euo pipefail
cd "$(dirname "$0")/.."
python demo/make.py --out demo/build
python train.py --model demo/build/init --stages demo/build/text{1,2}.jsonl \
    --eval demo/build/text_eval.jsonl --eval-every 250 \
    --batch-size 32 --micro-batch-tokens 8192 --lr 3e-3 2e-3 --save-dtype bf16 --out demo/build/pretrained
rm -rf demo/model
cp -r demo/build/pretrained/stage2 demo/model
cp demo/build/{s1,s2,s3,scored,prompts,validation,held_out_easy,held_out_medium,held_out_hard}.jsonl demo/
