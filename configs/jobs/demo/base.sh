#!/bin/sh
# Makes the demo's base again: text, vocabulary, dataset, and 200 million tokens of dense training from random weights. The vocabulary is learnt from
# Python's documentation alone, which the demo is about; the base reads further manuals too, since 200 million tokens of the one would be learnt by heart.
#   base.sh OUT_DIR [key=value ...]   ->   checkpoints/demo-base (BF16 weights, tokenizer.json)
set -eu
out=$1
shift
here=$(dirname "$0")
winnow=${WINNOW:-build/winnow}
data=$out/base-data
mkdir -p "$data/text"
sh "$here/corpus.sh" "$out/text"
sh "$here/base-corpus.sh" "$out/base-text"
[ -s "$out/tokenizer.json" ] ||
  "$winnow" --quiet data train-tokenizer --vocab 1024 --out "$out/tokenizer.json" --files-from "$out/text/train.list"
cat "$out/text/train.list" "$out/base-text/train.list" >"$data/text/train.list"
cp "$out/text/valid.list" "$data/text/"
WINNOW=$winnow sh "$here/data.sh" "$data" "$out/tokenizer.json"
"$winnow" pretrain "$here/base.yaml" "run_dir=$out/base" "data.train=$data/train" "data.valid=$data/valid" "$@"
last=$(find "$out/base/checkpoints" -maxdepth 1 -name 'step-*' | LC_ALL=C sort | tail -n 1)
rm -rf checkpoints/demo-base
mkdir -p checkpoints/demo-base
cp "$last"/config.json "$last"/model*.safetensors* "$out/tokenizer.json" checkpoints/demo-base/
echo "base: checkpoints/demo-base (from $last)"
