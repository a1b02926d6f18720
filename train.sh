#!/usr/bin/env bash
# Trains on a data set, by default on a generated one. Variables are taken from the environment:
#   DATASET=~/rocks CLASS_LIST="64 128" EPOCHS=100 bash train.sh
# Flags of train.py go last and win:  bash train.sh --epochs 1 --device cpu
# The same command again goes on from where the run stopped.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

DATASET="${DATASET:-}"            # root that holds train/ and val/; empty: data/sample, generated once
CLASS_LIST="${CLASS_LIST:-}"      # mask labels to learn, as in "64 128"; empty: found in the masks
MODEL="${MODEL:-plain-unet}"
ENCODER="${ENCODER:-plain-16}"
BATCH="${BATCH:-4}"
EPOCHS="${EPOCHS:-20}"
AUGM="${AUGM:-safe}"              # none safe light medium hard one vessel histology aerial
IMAGE_SIZE="${IMAGE_SIZE:-192}"   # images are resized to this
EXP_NAME="${EXP_NAME:-}"          # run folder in logs/; empty: named after network and data set

python="$(bash "$root/setup.sh")"
options=(--image-size "$IMAGE_SIZE")
if [ -n "$CLASS_LIST" ]; then options+=(--class-list "$CLASS_LIST"); fi
if [ -n "$EXP_NAME" ]; then options+=(--exp-name "$EXP_NAME"); fi
if [ -z "$DATASET" ]; then
    DATASET="$root/data/sample"
    if [ ! -d "$DATASET/train" ]; then PYTHONPATH="$root" "$python" -m dataset_utils.make_sample -o "$DATASET"; fi
fi
exec "$python" "$root/train.py" -d "$DATASET" -m "$MODEL" --encoder "$ENCODER" -b "$BATCH" -e "$EPOCHS" -a "$AUGM" \
    "${options[@]}" --baselines -log "$root/logs" "$@"
