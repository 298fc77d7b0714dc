#!/bin/sh
# Runs fuzz targets one after another and prints the count: each for FUZZ_RUNS inputs in all, split over FUZZ_JOBS
# processes that begin at the committed inputs with the seeds 1, 2 and so on. A crash, a leak, an input that takes over
# 10 s or 2 GiB is a failure; what made it is kept in $BUILD/fuzz/findings.
: "${BUILD:=build}" "${FUZZ_RUNS:=1000000}" "${FUZZ_JOBS:=1}"
here=$(dirname "$0")
mkdir -p "$BUILD/fuzz/findings"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
for target in "$@"; do
  more=""
  [ "$target" = config ] && more=configs/models
  [ "$target" = job ] && more=configs/jobs
  start=$(date +%s) job=1 bad=0
  while [ "$job" -le "$FUZZ_JOBS" ]; do
    mkdir -p "$work/$target.$job"
    # shellcheck disable=SC2086
    {
      "$BUILD/fuzz/$target" -seed="$job" -runs=$((FUZZ_RUNS / FUZZ_JOBS)) -timeout=10 -rss_limit_mb=2048 -max_len=4096 \
        -dict="$here/$target.dict" -artifact_prefix="$BUILD/fuzz/findings/$target-" \
        "$work/$target.$job" "$here/corpus/$target" $more >"$work/$target.$job.log" 2>&1
      echo $? >"$work/$target.$job.code"
    } &
    job=$((job + 1))
  done
  wait
  for code in "$work/$target".*.code; do
    [ "$(cat "$code")" = 0 ] && continue
    bad=1
    tail -n 40 "${code%code}log"
  done
  if [ "$bad" = 0 ]; then passed=$((passed + 1)) word=passed; else failed=$((failed + 1)) word=FAILED; fi
  runs=$(sed -n 's/^Done \([0-9]*\) runs.*/\1/p' "$work/$target".*.log | awk '{ n += $1 } END { printf "%d", n }')
  printf 'fuzz/%-14s %s  %d inputs  %4d s\n' "$target" "$word" "$runs" "$(($(date +%s) - start))"
done
printf '%d passed, %d failed, 0 skipped\n' "$passed" "$failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
