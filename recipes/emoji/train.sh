#!/usr/bin/env bash
# The recipe of the model in the box: tokenizer, then model, each resumable by the same command.
#
#   recipes/emoji/train.sh DATA RUNS
#
# DATA is what make_dataset.py built, RUNS a folder for the two runs. One GPU is enough; the time
# limits below suit an H100. Settings can be changed from outside, e.g. CODES=2048.
set -euo pipefail

data=$1 runs=$2
codes=${CODES:-4096}
tokenizer_minutes=${TOKENIZER_MINUTES:-7}
model_minutes=${MODEL_MINUTES:-14}
dropout=${DROPOUT:-0.1}
seed=${SEED:-0}
aim=${AIM:-aim}

# Emoji hold letters, flags and clock faces, so nothing is mirrored.
$aim train tokenizer "$data/train" --val-data "$data/val" --out "$runs/tokenizer" \
    --size 128 --no-flip --seed "$seed" \
    --codebook-size "$codes" --channels 64 --channel-multipliers 1,2,2,2 --z-channels 128 \
    --batch-size 128 --learning-rate 3e-4 --warmup-steps 200 --weight-decay 0.01 \
    --schedule cosine --steps 40000 --max-minutes "$tokenizer_minutes" \
    --discriminator-start 0.5 --discriminator-weight 0.3 \
    --log-every 100 --eval-every 1000 --sample-every 1000 --save-every 2000

$aim train model "$data/train" --val-data "$data/val" --out "$runs/model" \
    --tokenizer "$runs/tokenizer/tokenizer.safetensors" \
    --size 128 --no-flip --seed "$seed" --variants 16 \
    --d-model 384 --layers 12 --adaln-groups 4 --dropout "$dropout" \
    --batch-size 128 --learning-rate 1e-3 --warmup-steps 500 --weight-decay 0.05 \
    --schedule cosine --steps 200000 --max-minutes "$model_minutes" ${MODEL_FLAGS:-} \
    --log-every 200 --eval-every 2000 --sample-every 4000 --save-every 4000 \
    --sample-count 32
