"""Compares a dump that `winnow forward --device cuda` wrote with transformers in BF16 on the same GPU.

    gpu.py MODEL_DIR DUMP --tokens 1,2,3|FILE [--attention dense|sparse]

Two programs in BF16 differ by its rounding, so what is asked is: the cosine of the logits above 0.9999, and every pick
that the two disagree on within BF16 rounding of the row's threshold. The threshold is transformers' k-th score; its
rounding is 2^-7 of the root mean square of the row's scores (a score sums products of BF16 numbers with weights).
"""
import argparse
import pathlib
import sys

import numpy as np
import torch
from safetensors.numpy import load_file

import hf

LEAST_COSINE = 0.9999
ROUNDING = 2.0 ** -7


def numbers(text):
    path = pathlib.Path(text)
    text = path.read_text() if path.is_file() else text
    return [int(t) for t in text.replace(",", " ").split()]


def cosine(a, b):
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def worst_pick(mine, scores, k):
    """(rows that differ, picks that differ, the largest distance of one from the threshold over the row's rounding)."""
    rows, picks, worst = 0, 0, 0.0
    for t in range(scores.shape[0]):
        visible = np.isfinite(scores[t])
        if visible.sum() <= k:
            assert set(mine[t]) - {-1} == set(np.flatnonzero(visible)), f"row {t} does not take all it sees"
            continue
        theirs = set(np.argsort(-scores[t], kind="stable")[:k])
        apart = set(mine[t]) ^ theirs
        assert all(visible[i] for i in mine[t]), f"row {t} picks a key it cannot see"
        if not apart:
            continue
        threshold = np.sort(scores[t][visible])[::-1][k - 1]
        rounding = ROUNDING * np.sqrt(np.mean(scores[t][visible] ** 2))
        rows, picks = rows + 1, picks + len(apart) // 2
        worst = max(worst, max(abs(scores[t][i] - threshold) for i in apart) / rounding)
    return rows, picks, worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("dump")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--attention", choices=("dense", "sparse"), default="dense")
    args = parser.parse_args()
    tokens = numbers(args.tokens)
    mine = load_file(args.dump)
    sparse = args.attention == "sparse"
    model = hf.load(args.model_dir, as_v3=not sparse, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        out = hf.run(model, tokens, [0])
    failed = 0
    c = cosine(mine["logits"], out.logits.float().cpu().numpy())
    failed += not c > LEAST_COSINE
    print(f"logits: cosine {c:.7f}")
    for i, h in enumerate(out.hidden):
        print(f"hidden.{i}: cosine {cosine(mine[f'hidden.{i}'], h.float().cpu().numpy()):.7f}")
    for i, s in enumerate(out.index_scores):
        scores = s.float().cpu().numpy()
        k = mine[f"topk.{i}"].shape[1]
        rows, picks, worst = worst_pick(mine[f"topk.{i}"], scores, k)
        failed += not worst <= 1
        print(f"layer {i}: {picks} picks of {rows} rows differ, the farthest {worst:.3f} roundings from the threshold")
    print("failed" if failed else "ok")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
