#!/bin/sh
# Debian packages, downloaded and unpacked into OUT_DIR without installing anything.
#   unpack.sh OUT_DIR PACKAGE...
set -eu
out=$1
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work" # apt's own user writes there
cd "$work"
if ! apt-get download -qq "$@" 2>/dev/null; then
  if [ "$(id -u)" = 0 ]; then apt-get update -qq; else sudo apt-get update -qq; fi
  apt-get download -qq "$@" || { echo "unpack.sh: cannot download $*; is this Debian 12?" >&2; exit 1; }
fi
for package in *.deb; do dpkg -x "$package" "$out"; done
