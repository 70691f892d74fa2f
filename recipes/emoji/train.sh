#!/usr/bin/env bash
# The recipe of the model in the box: tokenizer, then model, each resumable by the same command.
#
#   recipes/emoji/train.sh DATA RUNS
#
# DATA is what make_dataset.py built, RUNS a folder for the two runs. The defaults are what the
# model in the box was trained with, on one H100. What is exported of the model is its best by
# held-out bits, two thirds of the way; several GPUs take AIM="torchrun --nproc-per-node 2 -m aim_cli".
set -euo pipefail

data=$1 runs=$2
tokenizer_minutes=${TOKENIZER_MINUTES:-12}
model_minutes=${MODEL_MINUTES:-8.5}
tokenizer_flags=${TOKENIZER_FLAGS---compile}
aim=${AIM:-aim}

# Emoji hold letters, flags and clock faces, so nothing is mirrored.
$aim train tokenizer "$data/train" --val-data "$data/val" --out "$runs/tokenizer" \
    --size 128 --no-flip --seed 0 \
    --codebook-size 4096 --channels 64 --channel-multipliers 1,2,2,2 --z-channels 128 \
    --batch-size 128 --learning-rate 4e-4 --warmup-steps 200 --weight-decay 0.01 \
    --schedule cosine --steps 200000 --max-minutes "$tokenizer_minutes" --ema-decay 0.998 \
    --discriminator-start 0.85 --discriminator-weight 0.15 \
    --log-every 100 --eval-every 1000 --sample-every 100000 --save-every 100000 $tokenizer_flags

$aim train model "$data/train" --val-data "$data/val" --out "$runs/model" \
    --tokenizer "$runs/tokenizer/tokenizer.safetensors" \
    --size 128 --no-flip --seed 0 --variants 24 \
    --d-model 384 --layers 12 --d-state 64 --adaln-groups 4 --class-dropout 0.1 --dropout 0.1 \
    --batch-size 256 --learning-rate 2e-3 --warmup-steps 500 --weight-decay 0.1 \
    --schedule cosine --steps 200000 --max-minutes "$model_minutes" --ema-decay 0.998 \
    --log-every 200 --eval-every 500 --sample-every 100000 --save-every 100000
