#!/bin/sh
# Shows that the tests catch what they are there for. Every tests/faults/NAME.patch puts one fault into a copy of the
# tree, and the test program that its header names must then fail; before that, it must pass without the fault.
#   run.sh [NAME ...]     all faults when none is named
# A patch that does not apply, a copy that does not build and a test that does not end in TEST_S seconds count as missed.
# CFLAGS, JOBS and TEST_S may be set. Nothing outside a temporary directory is written.
set -u
cd "$(dirname "$0")/../.." || exit 1
JOBS=${JOBS:-2}
TEST_S=${TEST_S:-120}
CFLAGS=${CFLAGS:--O1 -march=native}
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none WINNOW=build/winnow
unset BUILD MAKEFLAGS MFLAGS
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM HUP
mkdir "$work/clean" "$work/tmp"
export TMPDIR="$work/tmp"

field() { sed -n "s/^$2: *//p;/^--- /q" "$1" | head -n 1; }

# the programs that `$1`, a test's name, needs
targets() {
  printf 'build/tests/%s ' "$1"
  case $1 in e2e/*) printf 'build/winnow ' ;; esac
}

# builds the tests named in "$@" in the current directory
build() {
  wanted=
  for name in "$@"; do wanted="$wanted $(targets "$name")"; done
  # shellcheck disable=SC2086
  make -j"$JOBS" NVCC= CFLAGS="$CFLAGS" $wanted >"$work/build.log" 2>&1
}

# Runs the test `$1` up to its first failure. Prints "passed", "out of time", or the name of what failed.
run_test() {
  { timeout -k 5 "$TEST_S" "build/tests/$1" 2>&1; echo "exit code $?"; } | awk '
    sub(/^\[ RUN      \] /, "") { running = $0 }
    sub(/^\[  FAILED  \] /, "") { found = 1; print; exit }
    /^exit code / { found = 1; print $3 == 0 ? "passed" : $3 == 124 || $3 == 137 ? "out of time" : running != "" ? running : "start"; exit }
    END { if (!found) print "out of time" }'
}

faults="$*"
[ -n "$faults" ] || faults=$(ls tests/faults/*.patch | sed 's,.*/,,;s,\.patch$,,')
tests=
for fault in $faults; do
  patch=tests/faults/$fault.patch
  [ -f "$patch" ] || { echo "$patch is absent" >&2; exit 1; }
  test=$(field "$patch" test)
  [ -f "tests/$test.c" ] || { echo "$patch: its header names the test '$test', which is absent" >&2; exit 1; }
  case " $tests " in *" $test "*) ;; *) tests="$tests $test" ;; esac
done

git ls-files | tar -cf - -T - | tar -xf - -C "$work/clean" || exit 1
cp -R tests/faults "$work/faults" # the copy's own may be older than what is being tried
printf 'building without faults: %s\n' "$tests"
# shellcheck disable=SC2086
(cd "$work/clean" && build $tests) || { cat "$work/build.log"; exit 1; }
for test in $tests; do
  first=$(cd "$work/clean" && run_test "$test")
  [ "$first" = passed ] || { echo "$test fails without any fault: $first" >&2; exit 1; }
done

caught=0 missed=0
printf '%-34s %-28s %-6s %5s  %s\n' fault test caught s 'first to fail'
for fault in $faults; do
  start=$(date +%s)
  patch=$work/faults/$fault.patch
  test=$(field "$patch" test)
  rm -rf "$work/tree"
  cp -a "$work/clean" "$work/tree" || exit 1
  if ! patch -d "$work/tree" -p1 -s -f --no-backup-if-mismatch <"$patch" >"$work/patch.log" 2>&1; then
    verdict=no first="the patch does not apply"
    cat "$work/patch.log"
  elif ! (cd "$work/tree" && build "$test"); then
    verdict=no first="does not build"
    grep -E 'error|warning' "$work/build.log" | head -n 5
  else
    first=$(cd "$work/tree" && run_test "$test")
    case $first in passed | "out of time") verdict=no ;; *) verdict=yes ;; esac
  fi
  if [ $verdict = yes ]; then caught=$((caught + 1)); else missed=$((missed + 1)); fi
  printf '%-34s %-28s %-6s %5d  %s\n' "$fault" "$test" "$verdict" "$(($(date +%s) - start))" "$first"
done
printf '%d caught, %d missed\n' "$caught" "$missed"
[ "$missed" = 0 ] && [ "$caught" -gt 0 ]
