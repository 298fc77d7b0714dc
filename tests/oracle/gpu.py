"""Compares a dump that `winnow forward --device cuda` wrote with transformers in BF16 on the same GPU.

    gpu.py MODEL_DIR DUMP --tokens 1,2,3|FILE [--attention dense|sparse]

Two programs in BF16 differ by its rounding. Asked is: the cosine of the logits above 0.9999; and, layer by layer from the
dump's own input of that layer, every pick that the two disagree on within BF16 rounding of the row's threshold. Scores
and threshold are those of the same layer in FP32; the rounding of a row is the largest error that transformers' BF16
scores have in it, twice, since both programs round.
"""
import argparse
import pathlib
import sys

import numpy as np
import torch
from safetensors.numpy import load_file

import hf

LEAST_COSINE = 0.9999
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(text):
    path = pathlib.Path(text)
    text = path.read_text() if path.is_file() else text
    return [int(t) for t in text.replace(",", " ").split()]


def cosine(a, b):
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def forced(model, hidden):
    """Every layer starts from the given input instead of its predecessor's output."""
    def replace(i):
        def hook(module, args, kwargs):
            own = hidden[i].to(model.device, model.dtype)[None]
            return ((own,) + args[1:], kwargs) if args else (args, kwargs | {"hidden_states": own})
        return hook
    return [layer.register_forward_pre_hook(replace(i), with_kwargs=True) for i, layer in enumerate(model.model.layers)]


def scores_from(model_dir, dtype, tokens, hidden):
    model = hf.load(model_dir, dtype=dtype).to(DEVICE)
    hooks = forced(model, hidden)
    with torch.no_grad():
        out = hf.run(model, tokens, [0])
    for hook in hooks:
        hook.remove()
    return [s.float().cpu().numpy() for s in out.index_scores]


def worst_pick(mine, rounded, exact, k):
    """(rows that differ, picks that differ, the largest distance of one from the threshold over the row's rounding)."""
    rows, picks, worst = 0, 0, 0.0
    for t in range(exact.shape[0]):
        visible = np.isfinite(exact[t])
        if visible.sum() <= k:
            assert set(mine[t]) - {-1} == set(np.flatnonzero(visible)), f"row {t} does not take all it sees"
            continue
        assert all(visible[i] for i in mine[t]), f"row {t} picks a key it cannot see"
        apart = set(mine[t]) ^ set(np.argsort(-rounded[t], kind="stable")[:k])
        if not apart:
            continue
        threshold = np.sort(exact[t][visible])[::-1][k - 1]
        rounding = 2 * np.abs(rounded[t][visible] - exact[t][visible]).max()
        rows, picks = rows + 1, picks + len(apart) // 2
        worst = max(worst, max(abs(exact[t][i] - threshold) for i in apart) / rounding)
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
    model = hf.load(args.model_dir, as_v3=not sparse, dtype=torch.bfloat16).to(DEVICE)
    with torch.no_grad():
        out = hf.run(model, tokens, [0])
    failed = 0
    c = cosine(mine["logits"], out.logits.float().cpu().numpy())
    failed += not c > LEAST_COSINE
    print(f"logits: cosine {c:.7f}")
    for i, h in enumerate(out.hidden):
        print(f"hidden.{i}: cosine {cosine(mine[f'hidden.{i}'], h.float().cpu().numpy()):.7f}")
    if sparse:
        hidden = [torch.from_numpy(mine[f"hidden.{i}"]) for i in range(len(out.hidden) - 1)]
        rounded = scores_from(args.model_dir, torch.bfloat16, tokens, hidden)
        exact = scores_from(args.model_dir, torch.float32, tokens, hidden)
        for i, (r, e) in enumerate(zip(rounded, exact)):
            visible = np.isfinite(e)
            own = mine[f"index_scores.{i}"]
            size = np.linalg.norm(e[visible])
            rows, picks, worst = worst_pick(mine[f"topk.{i}"], r, e, mine[f"topk.{i}"].shape[1])
            failed += not worst <= 1
            print(f"layer {i}: scores off by {np.linalg.norm(own[visible] - e[visible]) / size:.2e} (transformers "
                  f"{np.linalg.norm(r[visible] - e[visible]) / size:.2e}); {picks} picks of {rows} rows differ, the farthest "
                  f"{worst:.3f} roundings from the threshold")
    print("failed" if failed else "ok")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
