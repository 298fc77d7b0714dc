#!/bin/sh
# The demo's text: the reStructuredText sources of Python's documentation, from Debian's python3.11-doc (PSF licence), without its licence and
# copyright pages. One file in twenty, by a checksum of its name, is held out. Unpacked into OUT_DIR without installing anything.
#   corpus.sh OUT_DIR   ->   OUT_DIR/train.list, OUT_DIR/valid.list
set -eu
out=$1
package=python3.11-doc
[ -s "$out/train.list" ] && [ -s "$out/valid.list" ] && exit 0
rm -rf "$out"
mkdir -p "$out/deb"
out=$(cd "$out" && pwd)
cd "$out/deb"
if ! apt-get download -qq "$package" 2>/dev/null; then
  if [ "$(id -u)" = 0 ]; then apt-get update -qq; else sudo apt-get update -qq; fi
  apt-get download -qq "$package" || { echo "corpus.sh: cannot download Debian's $package; is this Debian 12?" >&2; exit 1; }
fi
dpkg -x "$package"_*.deb "$out/unpacked"
cd "$out"
rm -rf deb
find unpacked/usr/share/doc -path '*_sources*' -name '*.rst.txt' ! -name license.rst.txt ! -name copyright.rst.txt | LC_ALL=C sort >all.list
: >train.part
: >valid.part
while read -r file; do
  sum=$(printf '%s' "${file#*_sources/}" | cksum | cut -d ' ' -f 1)
  if [ $((sum % 20)) = 7 ]; then echo "$out/$file" >>valid.part; else echo "$out/$file" >>train.part; fi
done <all.list
rm all.list
mv train.part train.list
mv valid.part valid.list
echo "corpus: $(wc -l <train.list) files to train on, $(wc -l <valid.list) held out"
