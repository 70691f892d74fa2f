#!/usr/bin/env bash
# The paper's training of a model on ImageNet-1k, resumable by the same command.
#
#   recipes/imagenet/train.sh SIZE DATA TOKENIZER RUN
#
# SIZE is B, L, XL or 1B, whose settings are beside this file; DATA holds a folder per class;
# TOKENIZER is the published VQ-16 or one of your own; RUN is the folder of the run. One GPU a
# process: AIM="torchrun --nproc-per-node 8 -m aim_cli" for eight of them. Every setting of the
# files can be changed from outside, and options that follow RUN are passed on.
set -euo pipefail

size=$1 data=$2 tokenizer=$3 run=$4
shift 4
here=$(dirname "$0")
. "$here/$size.env"
aim=${AIM:-aim}
images=${IMAGES:-1281167}
# The rate is the paper's for 2048 images a step, and in proportion for others.
rate=${RATE:-$(python3 -c "print(8e-4 * $BATCH / 2048)")}

$aim train model "$data" --out "$run" --tokenizer "$tokenizer" --preset "$size" \
    --size 256 --resize-factor 1.125 --flip --crops "${CROPS:-ten-crop}" --seed 0 \
    --batch-size "$BATCH" --steps "$((EPOCHS * images / BATCH))" \
    --learning-rate "$rate" --schedule constant --warmup-steps "${WARMUP:-5000}" \
    --weight-decay 0.05 --grad-clip 1 --ema-decay "${EMA:-0.9999}" --class-dropout 0.1 \
    --dropout "${DROPOUT:-0}" --log-every 100 --eval-every 10000 --sample-every 10000 \
    --save-every 5000 "$@"
