#!/bin/sh
# The demo's table and its claims, from what warm-up, adapt and eval wrote.
#   summary.sh OUT_DIR   ->   OUT_DIR/summary.csv; exit 1 when a claim does not hold
set -eu
out=$1
# kl of the first and last step of a run, mean over layers
kl() { awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "indexer_kl") c = i } NR == 2 { first = $c } { last = $c } END { print first "," last }' "$1"; }
warm_kl=$(kl "$out/warmup/metrics/train.csv")
adapt_kl=$(kl "$out/adapt/metrics/train.csv")

echo "model,selection,loss,loss_scored,kl_first,kl_last,mass_at_k,mass_best,recall_at_k" >"$out/summary.csv"
rows() { # model, eval table, the selection that the KL columns belong to, those columns
  awk -F, -v OFS=, -v model="$1" -v with_kl="$3" -v kl="$4" '
    NR == 1 { for (i = 1; i <= NF; i++) c[$i] = i; next }
    { sel = $c["selection"]; own = sel == "indexer"
      print model, sel, $c["loss"], $c["loss_scored"], (sel == with_kl ? kl : ","), \
            (own ? $c["mass_at_k"] : ""), (own ? $c["mass_best"] : ""), (own ? $c["recall_at_k"] : "") }' "$2" >>"$out/summary.csv"
}
rows base "$out/eval/base.csv" indexer "$warm_kl"
rows adapted "$out/eval/adapted.csv" indexer "$adapt_kl"
rows control "$out/eval/control.csv" none ","

awk -F, 'NR == 1 { printf "%-8s %-9s %8s %11s %9s %9s %9s %9s %11s\n", $1, $2, $3, $4, $5, $6, $7, $8, $9; next }
  function cell(x, w) { return x == "" ? sprintf("%*s", w, "-") : sprintf("%*.4f", w, x) }
  { printf "%-8s %-9s %s %s %s %s %s %s %s\n", $1, $2, cell($3, 8), cell($4, 11), cell($5, 9), cell($6, 9), cell($7, 9), cell($8, 9), cell($9, 11) }' "$out/summary.csv"

# Standard errors are of the mean paired difference of loss_scored over windows. A claim is about two figures, x and y, that must be numbers above 0:
# what is missing counts as 0, and in mawk a NaN passes most comparisons.
awk -F, '
  function figure(x) { return x ~ /^[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?$/ && x + 0 > 0 }
  function claim(holds, x, y, text) {
    holds = holds && figure(x) && figure(y)
    printf "%s  %s\n", (holds ? "holds " : "FAILS "), text
    if (!holds) failed = 1
  }
  FILENAME ~ /sequences\.csv$/ { if ($1 != "selection" && $5 > 0) { s[$1, $2] = $6 / $5; if ($2 + 1 > n) n = $2 + 1 } next }
  $1 != "model" { key = $1 " " $2; loss[key] = $3; scored[key] = $4; mass[key] = $7; best[key] = $8 }
  function z(other,   i, d, sum, sq, m, seen) {
    for (i = 0; i < n; i++) if ((other, i) in s) { d = s[other, i] - s["indexer", i]; sum += d; sq += d * d; seen++ }
    if (seen < 2) return 0
    m = sum / seen
    sq = sq / seen - m * m
    return sq > 0 ? m / sqrt(sq / (seen - 1)) : 0
  }
  END {
    dense = scored["base dense"]; picked = scored["base indexer"]; recent = scored["base recent"]; sink = scored["base sink"]
    claim(recent - dense >= 0.05, recent, dense, \
          sprintf("the text discriminates: the recent window costs %.4f nats of loss_scored over dense (at least 0.05)", recent - dense))
    held = mass["base indexer"]; most = best["base indexer"]
    claim(held >= 0.9 * most, held, most, \
          sprintf("the trained indexer captures %.3f of the best possible attention mass (at least 0.9)", most > 0 ? held / most : 0))
    claim(z("recent") > 3, picked, recent, sprintf("its loss_scored is below the window\047s by %.1f standard errors (more than 3)", z("recent")))
    claim(z("sink") > 3, picked, sink, sprintf("and below window and sink\047s by %.1f (more than 3)", z("sink")))
    a = loss["adapted indexer"]; c = loss["control dense"]
    claim(a - c <= 0.02, a, c, sprintf("adapted loss minus the dense control\047s: %+.4f nats (within 0.02)", a - c))
    a = scored["adapted indexer"]; c = scored["control dense"]
    claim(a - c <= 0.02, a, c, sprintf("adapted loss_scored minus the dense control\047s: %+.4f nats (within 0.02)", a - c))
    exit failed
  }' "$out/eval/base.sequences.csv" "$out/summary.csv"
