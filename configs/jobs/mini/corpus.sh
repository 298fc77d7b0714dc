#!/bin/sh
# The text of `mini`: 134 MB of Linux 6.1, its documentation and C sources, from Debian's linux-source-6.1 (GPL-2; packed for training here, never
# committed). Written as one archive of about 20 MB that travels to a machine with a GPU.
#   corpus.sh OUT.tar.xz
set -eu
out=$(realpath -m "$1")
unpack=$(realpath "$(dirname "$0")/../../unpack.sh")
package=linux-source-6.1
[ -s "$out" ] && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
sh "$unpack" unpacked "$package"
tar xf unpacked/usr/src/"$package".tar.xz
cd "$package"
find Documentation block crypto fs kernel lib mm net security -type f \( -name '*.[ch]' -o -name '*.rst' -o -name '*.txt' \) | LC_ALL=C sort >../list
mkdir -p "$(dirname "$out")"
tar c --owner=0 --group=0 --mtime=@0 -T ../list | xz -T0 -9 >"$out.part"
mv "$out.part" "$out"
echo "corpus: $(wc -l <../list) files, $(wc -c <"$out") bytes packed"
