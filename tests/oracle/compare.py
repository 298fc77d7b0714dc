"""Largest absolute difference per tensor of two dumps: compare.py A.safetensors B.safetensors

Infinities must be in the same places and integers be equal. Ends with 1 if names or shapes differ, or if a
difference passes --tolerance times max(1, largest value of that tensor in B).
"""
import argparse
import sys

import numpy as np
from safetensors.numpy import load_file


def read(path, grads):
    """A dump by name. An expected.safetensors has both kinds of gradient; `grads` picks the one a dump would hold."""
    out = {}
    for name, value in load_file(path).items():
        kind = next((k for k in ("base", "indexer") if name.startswith(f"grad.{k}.")), None)
        if kind is None:
            out[name] = value
        elif kind == grads:
            out["grad." + name[len(f"grad.{kind}."):]] = value
    return out


def difference(a, b):
    """(largest absolute difference, its coordinate, largest finite |b|)"""
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(a - b))
    gap = np.where(np.isnan(gap), np.inf, gap)
    size = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    at = np.unravel_index(gap.argmax(), gap.shape) if gap.size else ()
    return (gap[at] if gap.size else 0.0), tuple(int(i) for i in at), size


def compare(a, b, tolerance):
    """Prints the table; the number of tensors that fail."""
    failed = 0
    for name in sorted(a.keys() | b.keys()):
        if name not in b and name.startswith("grad.") and not a[name].any():
            print(f"{name:70} only in A, all zero: fine for a buffer such as the router's bias")
        elif name not in a or name not in b:
            print(f"{name:70} only in {'A' if name in a else 'B'}")
            failed += 1
        elif a[name].shape != b[name].shape:
            print(f"{name:70} shapes {a[name].shape} and {b[name].shape}")
            failed += 1
        else:
            gap, at, size = difference(a[name], b[name])
            limit = 0 if a[name].dtype.kind == "i" else tolerance * max(1.0, size)
            bad = gap > limit
            failed += bad
            print(f"{name:70} {gap:.3e} of {size:.3e}" + (f"  at {at}" if gap else "") + ("  FAIL" if bad else ""))
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--grads", choices=("base", "indexer"), help="compare the fixtures' grad.base.X or grad.indexer.X as grad.X")
    parser.add_argument("--tolerance", type=float, default=np.inf)
    args = parser.parse_args()
    failed = compare(read(args.a, args.grads), read(args.b, args.grads), args.tolerance)
    print(f"{failed} tensors differ" if failed else "ok")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
