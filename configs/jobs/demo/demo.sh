#!/bin/sh
# The whole job on real text: warm-up, adapt and a dense control from the committed base, then one table (also OUT_DIR/summary.csv) and the claims it
# must bear out. A claim that does not hold fails the demo. Run again, it resumes what is unfinished.
#   demo.sh OUT_DIR
set -eu
out=$1
here=$(dirname "$0")
winnow=${WINNOW:-build/winnow}
base=checkpoints/demo-base
start=$(date +%s)
mkdir -p "$out"
say() { printf '[%3d s] %s\n' $(($(date +%s) - start)) "$*"; }

# runs of another base are no runs of this one: they begin anew
made_of=$(cksum <"$base/model-00001-of-00001.safetensors")
if [ -d "$out/warmup" ] && [ "$(cat "$out/base.cksum" 2>/dev/null)" != "$made_of" ]; then
  say "its runs are of another base, and go"
  rm -rf "$out/warmup" "$out/adapt" "$out/control"
fi
echo "$made_of" >"$out/base.cksum"

say "text and datasets"
sh "$here/corpus.sh" "$out/text"
WINNOW=$winnow sh "$here/data.sh" "$out" "$base/tokenizer.json"

data="data.train=$out/train data.valid=$out/valid"
say "warm-up: the indexer learns from the frozen base's dense attention"
# shellcheck disable=SC2086
"$winnow" warmup "$here/warmup.yaml" "init=$base" "run_dir=$out/warmup" $data
warm=$(find "$out/warmup/checkpoints" -maxdepth 1 -name 'step-*' | LC_ALL=C sort | tail -n 1)
say "adapt: sparse attention, 32 keys a row"
# shellcheck disable=SC2086
"$winnow" adapt "$here/adapt.yaml" "init=$warm" "run_dir=$out/adapt" $data
say "control: the same further steps, dense"
# shellcheck disable=SC2086
"$winnow" pretrain "$here/control.yaml" "init=$base" "run_dir=$out/control" $data
adapted=$(find "$out/adapt/checkpoints" -maxdepth 1 -name 'step-*' | LC_ALL=C sort | tail -n 1)
control=$(find "$out/control/checkpoints" -maxdepth 1 -name 'step-*' | LC_ALL=C sort | tail -n 1)

rm -rf "$out/eval"
mkdir -p "$out/eval"
evaluate() { # name, model, selections, sampled rows a window
  say "evaluate $1: $3"
  "$winnow" --quiet eval "$2" --data "$out/valid" --seq-len 512 --topk 32 --sample-rows "$4" --selection "$3" \
    --seqs 256 --csv "$out/eval/$1.csv" --sequences "$out/eval/$1.sequences.csv" >/dev/null
}
evaluate base "$warm" dense,best,indexer,recent,sink,random 64
evaluate adapted "$adapted" indexer 64
evaluate control "$control" dense 0

"$winnow" --quiet report "$out/warmup"
"$winnow" --quiet report "$out/adapt"
say "results"
sh "$here/summary.sh" "$out"
say "done: $out/summary.csv, plots in $out/warmup/report and $out/adapt/report"
