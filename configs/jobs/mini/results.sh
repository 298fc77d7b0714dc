#!/bin/sh
# What the pair's runs wrote, small enough to keep: tables thinned to every N-th measured row (the last one always), pictures, and one table of all
# evaluations.
#   results.sh OUT_DIR DEST_DIR [EVERY]   ->   DEST_DIR/{base,warmup,adapt,control}/*.csv, DEST_DIR/eval.csv, DEST_DIR/*.svg
set -eu
out=$1
dest=$2
every=${3:-10}
winnow=${WINNOW:-build/winnow}
for run in base warmup adapt control; do
  mkdir -p "$dest/$run"
  for table in train speed eval layers events; do
    from=$out/$run/metrics/$table.csv
    [ -s "$from" ] && [ "$(wc -l <"$from")" -gt 1 ] || continue
    case $table in train | speed) n=$every ;; *) n=1 ;; esac
    awk -v n="$n" 'NR == 1 || (NR - 2) % n == 0 { print; shown = NR } { row = $0 } END { if (shown != NR) print row }' "$from" >"$dest/$run/$table.csv"
  done
  "$winnow" --quiet report "$out/$run"
  for picture in "$out/$run"/report/*.svg; do
    [ -s "$picture" ] && cp "$picture" "$dest/$run-$(basename "$picture")"
  done
done
# one row an evaluation: which model, on which held-out set, under which selection
echo "model,set,selection,tokens,loss,loss_scored,mass_at_k,mass_best,recall_at_k" >"$dest/eval.csv"
for model in base adapted control; do
  for set in valid valid-256 valid-1000 valid-2000 valid-4000 valid-7000; do
    awk -F, -v OFS=, -v model="$model" -v set="$set" '
      NR == 1 { for (i = 1; i <= NF; i++) c[$i] = i; next }
      { print model, set, $c["selection"], $c["tokens"], $c["loss"], $c["loss_scored"], $c["mass_at_k"], $c["mass_best"], $c["recall_at_k"] }' \
      "$out/eval/$model.$set.csv" >>"$dest/eval.csv"
  done
done
