#!/bin/sh
# Runs test programs one after another and prints the count. A program that dies counts as one failure.
# A test that skips itself says why on its own line, and is counted as skipped.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none
export WINNOW="${WINNOW:-${BUILD:-build}/winnow}"
passed=0 failed=0 skipped=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for program in "$@"; do
  start=$(date +%s)
  "$program" >"$log" 2>&1
  code=$?
  p=$(grep -c '^\[       OK \]' "$log")
  # cmocka lists skipped and failed tests twice: once as they end, once at the end of all
  s=$(grep '^\[  SKIPPED \] [^0-9]' "$log" | sort -u | wc -l)
  f=$(grep '^\[  FAILED  \] [^0-9]' "$log" | sort -u | wc -l)
  [ "$code" != 0 ] && [ "$f" = 0 ] && f=1
  passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
  printf '%-44s %3d passed %3d failed %3d skipped  %4d s\n' "${program#"${BUILD:-build}"/tests/}" "$p" "$f" "$s" "$(($(date +%s) - start))"
  if [ "$f" != 0 ]; then sed 's/^/    /' "$log"; fi
  if [ "$s" != 0 ]; then grep -i 'skip' "$log" | sed 's/^/    /'; fi
done
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
