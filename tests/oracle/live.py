"""Runs transformers on a Hugging Face directory and compares a dump of `winnow forward` with it.

    live.py MODEL_DIR DUMP --tokens 1,2,3|FILE [--attention dense|sparse] [--documents 0,17,40] [--grads base|indexer]
    live.py MODEL_DIR DUMP --case CASE.json

logits, hidden, attn, index scores and selections come from transformers in float32; KL, and gradients where the dump
has them, from reference.py in float64. A row that selects other keys is listed with the gap between its k-th and
(k+1)-th score: a gap near rounding is a tie, anything else is a fault. Needs BF16 or F32 weights.
"""
import argparse
import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

import hf
import reference as ref
from compare import compare


def numbers(text):
    path = pathlib.Path(text)
    text = path.read_text() if path.is_file() else text
    return [int(t) for t in text.replace(",", " ").split()]


def theirs(model_dir, tokens, documents, sparse, grads, has_kl):
    _, out = hf.dump(model_dir, tokens, documents, sparse)
    got = {"logits": out.logits}
    got |= {f"hidden.{i}": t for i, t in enumerate(out.hidden)}
    got |= {f"attn.{i}": t for i, t in enumerate(out.attn)}
    got |= {f"index_scores.{i}": t for i, t in enumerate(out.index_scores)}
    config = json.loads((pathlib.Path(model_dir) / "config.json").read_text())
    k = min(config.get("index_topk", 0), len(tokens))
    got |= {f"topk.{i}": hf.ascending(t, k) for i, t in enumerate(out.picked)}
    if has_kl or grads:
        w = {}
        for file in sorted(pathlib.Path(model_dir).glob("model*.safetensors")):
            w |= load_torch(file)
        w = ref.with_dtype(w, torch.float64, requires_grad=True)
        own = ref.forward(config, w, tokens, documents, sparse)
        got |= {f"kl.{i}": t.reshape(1) for i, t in enumerate(own.kl)}
        if grads:
            loss = ref.token_loss(own.logits, tokens) if grads == "base" else sum(own.kl)
            got |= {f"grad.{n}": g for n, g in ref.gradients(loss, w).items()}
    return {n: t.detach().to(t.dtype if t.dtype == torch.int32 else torch.float32).numpy() for n, t in got.items()}


def explain_selection(mine, other):
    for name in sorted(n for n in mine if n.startswith("topk.") and n in other and mine[n].shape == other[n].shape):
        scores = other[name.replace("topk", "index_scores")]
        for t in np.flatnonzero((mine[name] != other[name]).any(axis=1)):
            k = mine[name].shape[1]
            rank = np.sort(scores[t])[::-1]
            gap = rank[k - 1] - rank[k] if k < rank.size else np.nan
            print(f"{name} row {t}: {sorted(set(mine[name][t]) - set(other[name][t]))} here, "
                  f"{sorted(set(other[name][t]) - set(mine[name][t]))} in transformers, gap {gap:.2e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("dump")
    parser.add_argument("--case", help="take tokens, documents and attention from this case.json")
    parser.add_argument("--tokens")
    parser.add_argument("--documents", default="0")
    parser.add_argument("--attention", choices=("dense", "sparse"), default="dense")
    parser.add_argument("--grads", choices=("base", "indexer"))
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    if not args.case and not args.tokens:
        parser.error("give --tokens or --case")
    case = json.loads(pathlib.Path(args.case).read_text()) if args.case else {
        "tokens": numbers(args.tokens), "documents": numbers(args.documents), "attention": args.attention}
    torch.set_num_threads(1)
    mine = load_file(args.dump)
    other = theirs(args.model_dir, case["tokens"], case["documents"], case["attention"] == "sparse", args.grads, "kl.0" in mine)
    failed = compare(mine, other, args.tolerance)
    explain_selection(mine, other)
    print(f"{failed} tensors differ" if failed else "ok")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
