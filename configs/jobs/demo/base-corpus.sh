#!/bin/sh
# What the demo's base reads beside Python's documentation: the reStructuredText sources of further manuals in Debian 12, all under
# permissive licences: SQLAlchemy, pytest, Twisted (MIT), pandas, Numba, IPython, Sphinx (BSD), LLVM, Clang (Apache 2.0 with LLVM's
# exceptions), OpenStack's Neutron, Nova and Cinder (Apache 2.0). Left out: pages of at most 1 KiB, which hold a name and a directive, and LLVM's tables of one
# GPU's instructions, which have the same few lines thousands of times.
#   base-corpus.sh OUT_DIR   ->   OUT_DIR/train.list
set -eu
out=$1
[ -s "$out/train.list" ] && exit 0
rm -rf "$out"
sh "$(dirname "$0")/../../unpack.sh" "$out/unpacked" python-sqlalchemy-doc python-pytest-doc twisted-doc python-pandas-doc numba-doc python-ipython-doc \
  sphinx-doc llvm-16-doc clang-16-doc neutron-doc nova-doc cinder-doc
cd "$out"
find "$(pwd)/unpacked/usr/share/doc" -type f \( -path '*/_sources/*.rst.txt' -o -path '*/rst/*.rst' \) -size +1k ! -path '*/_sources/AMDGPU/*' |
  LC_ALL=C sort >train.part
mv train.part train.list
echo "further text: $(wc -l <train.list) files"
