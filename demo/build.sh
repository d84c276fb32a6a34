#!/usr/bin/env bash
# Makes demo/ anew: generates text and instructions, pre-trains the tiny Llama with train.py (40 minutes on two cores).
set -euo pipefail
cd "$(dirname "$0")/.."
python demo/make.py --out demo/build
python train.py --model demo/build/init --stages demo/build/text{1,2,3}.jsonl \
    --eval demo/build/text_eval.jsonl --eval-every 200 \
    --batch-size 32 --lr 3e-3 2e-3 2e-3 --save-dtype bf16 --out demo/build/pretrained
rm -rf demo/model
cp -r demo/build/pretrained/stage3 demo/model
cp demo/build/{s1,s2,s3,prompts}.jsonl demo/
