"""Other kernels on this GPU, timed as `winnow bench` times ours: FlashAttention 4's dense attention (forward, backward, deterministic backward) and the
dense indexer KL of cuDNN's front end (attention scores, index scores, gradients; both T x T score matrices are stored).

    python3 other_kernels.py [--lengths 8192,16384,32768] [--heads 128] [--operations forward,backward,dense_kl] [--repeats 11]

Needs a Hopper GPU, torch, and the packages flash-attn-4, nvidia-cudnn-frontend and nvidia-cutlass-dsl[cu13]; what is absent is left out with a line.
Prints operation, T, heads, milliseconds (median of the repeats after 3 to warm up) and TFLOP/s, counted as src/model/flops.h counts. V3.1 width: heads of 192/128,
latent form 576, indexer 64 x 128, BF16, causal, random data.
"""
import argparse
import statistics
import traceback

import torch

NOPE_ROPE, VALUE, LATENT, INDEX_HEADS, INDEX_DIM = 192, 128, 576, 64, 128
REPEATS = 11


def median_ms(run):
    times = []
    for i in range(REPEATS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def row(operation, length, heads, ms, flop):
    print(f"{operation},{length},{heads},{ms:.4g},{flop / ms / 1e9:.4g}", flush=True)


def random(*shape, grad=False):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)


def product():
    a, b = random(8192, 8192), random(8192, 8192)
    row("cublas product", 8192, 0, median_ms(lambda: a @ b), 2 * 8192**3)


def attention(length, heads, backward):
    from flash_attn.cute.interface import flash_attn_func

    pairs = length * (length + 1) / 2
    q, k = random(1, length, heads, NOPE_ROPE, grad=backward), random(1, length, heads, NOPE_ROPE, grad=backward)
    v = random(1, length, heads, VALUE, grad=backward)

    def run(deterministic=False):
        out = flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
        return out[0] if isinstance(out, tuple) else out

    if not backward:
        row("FlashAttention 4 forward", length, heads, median_ms(run), 2 * pairs * heads * (NOPE_ROPE + VALUE))
        return
    do = random(1, length, heads, VALUE)
    for name, deterministic in (("backward", False), ("backward deterministic", True)):
        out = run(deterministic)
        ms = median_ms(lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True))
        row("FlashAttention 4 " + name, length, heads, ms, 2 * pairs * heads * (3 * NOPE_ROPE + 2 * VALUE))


def dense_kl(length, heads):
    from cudnn.deepseek_sparse_attention import DSA

    pairs = length * (length + 1) / 2
    q, k = random(1, length, heads, LATENT), random(1, length, 1, LATENT)
    lse = torch.full((1, length, heads), 8.0, device="cuda")
    index_q, index_k, weights = random(1, length, INDEX_HEADS, INDEX_DIM), random(1, length, 1, INDEX_DIM), random(1, length, INDEX_HEADS)
    scores = [torch.empty(1, length, length, device="cuda") for _ in range(2)]
    norms = [torch.empty(1, length, device="cuda") for _ in range(2)]
    one = torch.ones(1, device="cuda")

    def target():
        return DSA.dense_attn_score_recompute_wrapper(q, k, lse, NOPE_ROPE**-0.5, out=scores[0], denom_out=norms[0])

    def index():
        return DSA.dense_indexer_score_recompute_wrapper(index_q, index_k, weights, out=scores[1], denom_out=norms[1], sm_scale=INDEX_DIM**-0.5)

    def gradients():
        return DSA.dense_indexer_backward_wrapper(
            index_q, weights, index_k[:, :, 0].contiguous(), scores[0], norms[0], scores[1], norms[1], one, sm_scale=INDEX_DIM**-0.5)

    parts = (("target", target, 2 * pairs * heads * NOPE_ROPE), ("index scores", index, 2 * pairs * INDEX_HEADS * INDEX_DIM),
             ("gradients", gradients, 3 * 2 * pairs * INDEX_HEADS * INDEX_DIM))
    total = 0
    for name, run, flop in parts:
        ms = median_ms(run)
        total += ms
        row("cuDNN front end dense KL: " + name, length, heads, ms, flop)
    row("cuDNN front end dense KL: whole", length, heads, total, sum(flop for _, _, flop in parts))


OPERATIONS = {
    "forward": lambda length, heads: attention(length, heads, False),
    "backward": lambda length, heads: attention(length, heads, True),
    "dense_kl": dense_kl,
}


def main():
    global REPEATS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="8192,16384,32768")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--operations", default=",".join(OPERATIONS))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_args()
    REPEATS = args.repeats
    print("operation,T,heads,ms,TFLOP/s")
    product()
    for name in args.operations.split(","):
        for length in (int(x) for x in args.lengths.split(",")):
            try:
                OPERATIONS[name](length, args.heads)
            except Exception as error:  # a package that is absent, or a shape that a package refuses, leaves its rows out
                traceback.print_exc(limit=-3)
                print(f"left out: {name} at {length}: {type(error).__name__}: {str(error)[:200]}")
            torch.cuda.empty_cache()
    product()


if __name__ == "__main__":
    main()
