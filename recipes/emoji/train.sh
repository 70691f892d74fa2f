#!/usr/bin/env bash
# The recipe of the model in the box: tokenizer, then model, each resumable by the same command.
#
#   recipes/emoji/train.sh DATA RUNS
#
# DATA is what make_dataset.py built, RUNS a folder for the two runs. The defaults are what the
# model in the box was trained with, on two H100s: AIM="torchrun --nproc-per-node 2 -m aim_cli".
# More minutes make a better model; every setting can be changed from outside.
set -euo pipefail

data=$1 runs=$2
tokenizer_minutes=${TOKENIZER_MINUTES:-2.2}
model_minutes=${MODEL_MINUTES:-3.45}
model_flags=${MODEL_FLAGS---compile}
aim=${AIM:-aim}

# Emoji hold letters, flags and clock faces, so nothing is mirrored.
$aim train tokenizer "$data/train" --val-data "$data/val" --out "$runs/tokenizer" \
    --size 128 --no-flip --seed 0 \
    --codebook-size 2048 --channels 64 --channel-multipliers 1,2,2,2 --z-channels 128 \
    --batch-size 128 --learning-rate 4e-4 --warmup-steps 100 --weight-decay 0.01 \
    --schedule cosine --steps 40000 --max-minutes "$tokenizer_minutes" --ema-decay 0.995 \
    --discriminator-start 0.6 --discriminator-weight 0.3 \
    --log-every 100 --eval-every 600 --sample-every 100000 --save-every 100000

$aim train model "$data/train" --val-data "$data/val" --out "$runs/model" \
    --tokenizer "$runs/tokenizer/tokenizer.safetensors" \
    --size 128 --no-flip --seed 0 --variants 8 \
    --d-model 384 --layers 12 --d-state 64 --adaln-groups 4 --dropout 0.05 \
    --batch-size 128 --learning-rate 1.5e-3 --warmup-steps 300 --weight-decay 0.05 \
    --schedule cosine --steps 200000 --max-minutes "$model_minutes" --ema-decay 0.998 \
    --log-every 200 --eval-every 1500 --sample-every 100000 --save-every 100000 \
    --sample-count 32 $model_flags
