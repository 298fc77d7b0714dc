#!/bin/sh
# Makes the demo's base again: text, vocabulary, datasets, and 25 million tokens of dense training from random weights.
#   base.sh OUT_DIR   ->   checkpoints/demo-base (BF16 weights, tokenizer.json)
set -eu
out=$1
here=$(dirname "$0")
winnow=${WINNOW:-build/winnow}
mkdir -p "$out"
sh "$here/corpus.sh" "$out/text"
[ -s "$out/tokenizer.json" ] ||
  "$winnow" --quiet data train-tokenizer --vocab 1024 --out "$out/tokenizer.json" --files-from "$out/text/train.list"
sh "$here/data.sh" "$out" "$out/tokenizer.json"
"$winnow" pretrain "$here/base.yaml" "run_dir=$out/base" "data.train=$out/train" "data.valid=$out/valid"
last=$(find "$out/base/checkpoints" -maxdepth 1 -name 'step-*' | LC_ALL=C sort | tail -n 1)
rm -rf checkpoints/demo-base
mkdir -p checkpoints/demo-base
cp "$last"/config.json "$last"/model*.safetensors* "$out/tokenizer.json" checkpoints/demo-base/
echo "base: checkpoints/demo-base (from $last)"
