#!/bin/sh
# The demo's text: the reStructuredText sources of Python's documentation, from Debian's python3.11-doc (PSF licence), without its licence and
# copyright pages. One file in twenty, by a checksum of its name, is held out.
#   corpus.sh OUT_DIR   ->   OUT_DIR/train.list, OUT_DIR/valid.list
set -eu
out=$1
[ -s "$out/train.list" ] && [ -s "$out/valid.list" ] && exit 0
rm -rf "$out"
sh "$(dirname "$0")/../../unpack.sh" "$out/unpacked" python3.11-doc
cd "$out"
out=$(pwd)
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
