#!/bin/sh
# How fast weights are imported, against `cat` of the same files, page cache warm, both in turn in one run:
#   tests/import_speed.sh MODEL_DIR [ROUNDS]
# Prints a CSV of rounds in GB of file a second, then best and median. For a directory of some size:
#   winnow pretrain configs/jobs/tiny/pretrain.yaml model=configs/models/small checkpoint.dtype=bf16 training.steps=1 ...
#   winnow convert CHECKPOINT DIR --to fp8
set -eu
winnow=${WINNOW:-build/winnow}
model=$1 rounds=${2:-15}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bytes=$(cat "$model"/*.safetensors | wc -c)
echo "round,cat_gb_s,import_gb_s,share_pct"
round=1
while [ "$round" -le "$rounds" ]; do
  start=$(date +%s%N)
  cat "$model"/*.safetensors >/dev/null
  end=$(date +%s%N)
  "$winnow" forward "$model" --tokens 1 --dump "$work/dump.safetensors" 2>"$work/said"
  # "reading weights: 0.50 GB in 0.12 s (4.17 GB/s)"
  awk -v round="$round" -v bytes="$bytes" -v ns=$((end - start)) '/^reading weights: / {
    sub(/.*\(/, ""); cat = bytes / ns; printf "%d,%.2f,%.2f,%.0f\n", round, cat, $1, 100 * $1 / cat }' "$work/said"
  round=$((round + 1))
done | tee "$work/rounds"
for column in 2 3 4; do
  cut -d, -f$column "$work/rounds" | sort -g >"$work/column"
  tail -n 1 "$work/column"
  sed -n "$(((rounds + 1) / 2))p" "$work/column"
done | tr '\n' ' ' | awk '{ printf "best,%s,%s,%s\nmedian,%s,%s,%s\n", $1, $3, $5, $2, $4, $6 }'
