#!/bin/sh
# Tokens per second of each stage, and the share of this machine's own matrix-product rate: 30 steps of the demo's jobs, the median of the last 20.
# Makes the demo's datasets where they are absent. Prints a CSV; docs/performance.md keeps what was measured.
set -eu
winnow=${WINNOW:-build/winnow}
here=configs/jobs/demo
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p checkpoints/demo
sh "$here/corpus.sh" checkpoints/demo/text
WINNOW=$winnow sh "$here/data.sh" checkpoints/demo checkpoints/demo-base/tokenizer.json
common="training.steps=30 metrics.layers_every=0 checkpoint.interval=0"
run() { # stage, job, further overrides
  stage=$1 job=$2
  shift 2
  # shellcheck disable=SC2086
  "$winnow" --quiet "$stage" "$here/$job" "run_dir=$work/$stage" $common "$@"
}
median() { # column of speed.csv
  awk -F, -v column="$2" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == column) c = i; next } $1 > 10 { print $c }' "$work/$1/metrics/speed.csv" |
    sort -g | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}
run warmup warmup.yaml
run adapt adapt.yaml "init=$work/warmup/checkpoints/step-000030"
run pretrain control.yaml
echo "stage,step_ms,tokens_per_s,gflops,share_of_sgemm_pct"
for stage in warmup adapt pretrain; do
  echo "$stage,$(median $stage step_ms),$(median $stage tokens_per_s),$(median $stage tflops | awk '{ print $1 * 1000 }'),$(median $stage mfu_pct)"
done
