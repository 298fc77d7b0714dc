#!/bin/sh
# The whole pair on one GPU, or on RANKS of them: data, base, warm-up, adapt, dense control, and evaluation under all six selections. Stops by itself
# after LIMIT_S seconds with everything saved; run again, it goes on where it stopped. Ends with 0 once all is done.
#   [RANKS=2] pair.sh TEXT.tar.xz OUT_DIR [LIMIT_S]
set -eu
archive=$1
out=$2
limit=${3:-540}
here=$(dirname "$0")
winnow=${WINNOW:-build/winnow}
launch=${RANKS:+mpirun -np $RANKS}
start=$(date +%s)
left() { echo $((limit - $(date +%s) + start)); }
data="data.train=$out/train data.valid=$out/valid"
sh "$here/data.sh" "$archive" "$out"
last() { find "$out/$1/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | LC_ALL=C sort | tail -n 1; }
job() { # stage, job, run, init (may be empty): a signal shortly before the limit saves and ends with 10
  seconds=$(($(left) - 15))
  [ "$seconds" -gt 5 ] || exit 10
  # shellcheck disable=SC2086
  timeout -s INT "$seconds" $launch "$winnow" "$1" "$here/$2.yaml" "run_dir=$out/$3" ${4:+"init=$4"} $data || exit $?
}
job pretrain pretrain base ""
job warmup warmup warmup "$(last base)"
job adapt adapt adapt "$(last warmup)"
job pretrain control control "$(last base)"
mkdir -p "$out/eval"
evaluate() { # name, model, selections
  for set in valid valid-256 valid-1000 valid-2000 valid-4000 valid-7000; do
    [ -s "$out/eval/$1.$set.csv" ] && continue
    [ "$(left)" -gt 40 ] || exit 10
    rm -f "$out/eval/part.csv"
    "$winnow" --quiet eval "$2" --data "$out/$set" --seq-len 8192 --topk 512 --sample-rows 64 --selection "$3" --seqs 24 \
      --csv "$out/eval/part.csv" >/dev/null
    mv "$out/eval/part.csv" "$out/eval/$1.$set.csv"
  done
}
evaluate base "$(last warmup)" dense,indexer,best,recent,sink,random
evaluate adapted "$(last adapt)" indexer
evaluate control "$(last control)" dense
echo "done: $out/eval"
