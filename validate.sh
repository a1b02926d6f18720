#!/usr/bin/env bash
# Scores a trained network on a labelled split, by default the last run of train.sh on the generated data set.
#   CHECK_DIR=logs/rocks DATASET_PATH=~/rocks/val bash validate.sh
# Flags of validate.py go last and win:  bash validate.sh -t best --plots
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

CHECK_DIR="${CHECK_DIR:-}"        # run folder; empty: the one in logs/ with the newest checkpoint
DATASET_PATH="${DATASET_PATH:-${DATASET:-$root/data/sample}/val}" # split folder with images/ and gt/

checkpoint=(-cd "$CHECK_DIR")
for flag in "$@"; do
    case "$flag" in -c | -cd | -check | -m | --check-* | --model | --model=*) checkpoint=() ;; esac
done
if [ -z "$CHECK_DIR" ] && [ ${#checkpoint[@]} -gt 0 ]; then
    newest=""
    while IFS= read -r file; do
        if [ -z "$newest" ] || [ "$file" -nt "$newest" ]; then newest="$file"; fi
    done < <(find "$root/logs" -name "*.pth" -type f 2>/dev/null)
    if [ -z "$newest" ]; then
        echo "validate.sh: found no checkpoint (*.pth) in $root/logs. Train first (bash train.sh), or name a run folder:" \
            "CHECK_DIR=/path/to/run bash validate.sh" >&2
        exit 1
    fi
    checkpoint=(-cd "$(dirname "$newest")")
    echo "validate.sh: scoring $newest on $DATASET_PATH" >&2
fi
python="$(bash "$root/setup.sh")"
exec "$python" "$root/validate.py" -d "$DATASET_PATH" -log "$root/logs" ${checkpoint[@]+"${checkpoint[@]}"} "$@"
