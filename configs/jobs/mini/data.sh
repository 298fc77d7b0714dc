#!/bin/sh
# Archive -> datasets of `mini`: a byte-level BPE of 8,192 tokens, learned here (half the tokens of a vocabulary of bytes, so twice the text within
# 8,192 positions); training windows of which 30% hold a passage that comes back 256 to 8,000 tokens later; held-out files plain, and as copies at
# five ranges of distance, the second copy's tokens (but the first 8) scored apart.
#   data.sh TEXT.tar.xz OUT_DIR
set -eu
archive=$1
out=$2
winnow=${WINNOW:-build/winnow}
[ -s "$out/valid-7000.idx" ] && exit 0
mkdir -p "$out/text"
tar xJf "$archive" -C "$out/text"
text=$(cd "$out/text" && pwd)
find "$text" -type f | LC_ALL=C sort >"$out/all.list"
awk 'NR % 50 == 7' "$out/all.list" >"$out/valid.list"
awk 'NR % 50 != 7' "$out/all.list" >"$out/train.list"
awk 'NR % 5 == 1' "$out/train.list" >"$out/vocabulary.list"
"$winnow" --quiet data train-tokenizer --vocab 8192 --out "$out/tokenizer.json" --files-from "$out/vocabulary.list"
"$winnow" --quiet data pack --out "$out/train" --tokenizer "$out/tokenizer.json" --copies 0.3 --copy-tokens 8192 --copy-passage 96:160 \
  --copy-distance 256:8000 --copy-skip 8 --seed 1 --files-from "$out/train.list"
"$winnow" --quiet data pack --out "$out/valid" --tokenizer "$out/tokenizer.json" --files-from "$out/valid.list"
for from in 256 1000 2000 4000 7000; do
  to=$((from * 2)) && [ "$to" -gt 8000 ] && to=8000
  "$winnow" --quiet data pack --out "$out/valid-$from" --tokenizer "$out/tokenizer.json" --copies 1.0 --copy-tokens 8192 --copy-passage 96:160 \
    --copy-distance "$from:$to" --copy-skip 8 --seed 2 --files-from "$out/valid.list"
done
