"""Fits an indexer to its dense teacher, so that a fixture can test gradients where softmax(I) - p cancels.

At random weights softmax(I) - p is as large as p itself, and a wrong epsilon, a missing term or a
clipped logarithm hides in it. Near convergence it does not.
"""
import torch

import reference as ref

GOAL = 0.03   # of the uniform's KL: below the 5% that the case promises, far above float32 rounding


def fit(config, w, tokens, documents, sparse, steps=1500, lr=0.02):
    """w with its indexer tensors trained by Adam in float64 until each layer's KL is under GOAL, rounded to float32.

    The fit is on all visible keys even for a sparse case, as stage 1 precedes stage 2; a sparse case goes on
    with its own KL afterwards. Training a layer's indexer moves deeper layers only through the selection.
    """
    w64 = ref.with_dtype(w, torch.float64)
    trained = [n for n in w64 if ref.INDEXER in n]
    for n in trained:
        w64[n].requires_grad_(True)
    for stage_sparse in (False, True) if sparse else (False,):
        optimizer = torch.optim.Adam([w64[n] for n in trained], lr=lr)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            out = ref.forward(config, w64, tokens, documents, stage_sparse)
            if max(k.item() / u for k, u in zip(out.kl, out.kl_uniform)) < GOAL:
                break
            loss = sum(out.kl)
            optimizer.zero_grad()
            for n, g in zip(trained, torch.autograd.grad(loss, [w64[n] for n in trained])):
                w64[n].grad = g
            optimizer.step()
    return {n: t.detach().float() for n, t in w64.items()}
