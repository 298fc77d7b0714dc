#!/bin/sh
# Text -> datasets of the demo. Windows are 512 tokens; 70% of the training windows are copy documents: a passage of 96 to 160 tokens, other text, and
# the passage again, so that a model can only do well on the second copy by attending hundreds of tokens back. Held out: copy documents of
# unseen files, the second copy's tokens (but the first 8) scored apart.
#   data.sh OUT_DIR TOKENIZER   ->   OUT_DIR/train.bin, OUT_DIR/valid.bin, ...
set -eu
out=$1 tokenizer=$2
winnow=${WINNOW:-build/winnow}
packed=$out/packed-with.json
[ -s "$out/valid.idx" ] && cmp -s "$tokenizer" "$packed" && exit 0
rm -f "$packed"
copies="--copy-tokens 512 --copy-passage 96:160 --copy-distance 256:415 --copy-skip 8"
# shellcheck disable=SC2086
"$winnow" --quiet data pack --out "$out/train" --tokenizer "$tokenizer" --copies 0.7 $copies --seed 1 --files-from "$out/text/train.list"
# shellcheck disable=SC2086
"$winnow" --quiet data pack --out "$out/valid" --tokenizer "$tokenizer" --copies 1.0 $copies --seed 2 --files-from "$out/text/valid.list"
cp "$tokenizer" "$packed"
