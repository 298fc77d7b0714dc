"""Training steps of transformers on the shape of configs/models/small, to stand beside Winnow's in one run.

    small_speed.py [--seq 16384] [--steps 8] [--model dense|sparse]

BF16 weights, SDPA attention where the model has it, fused AdamW, random tokens; prints the median step of those after
the second and tokens a second. A model whose activations do not fit the GPU computes them again (gradient checkpointing).
"""
import argparse
import gc
import json
import pathlib
import statistics
import time

import torch
from transformers import DeepseekV3Config, DeepseekV32Config
from transformers import AutoModelForCausalLM

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs/models/small/config.json"
INDEXER = {"index_n_heads": 16, "index_head_dim": 128, "index_topk": 1024}


def build(kind):
    raw = json.loads(CONFIG.read_text())
    for key in ("model_type", "architectures", "torch_dtype"):
        raw.pop(key, None)
    config = DeepseekV3Config(**raw) if kind == "dense" else DeepseekV32Config(**raw, **INDEXER)
    config.use_cache = False
    attention = "sdpa" if kind == "dense" else "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.cuda().train()


def step(model, optimizer, length):
    tokens = torch.randint(0, 8192, (1, length), device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(kind, length, steps, again):
    torch.manual_seed(1)
    model = build(kind)
    if again:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return statistics.median([step(model, optimizer, length) for _ in range(steps)][2:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--model", choices=("dense", "sparse"), default="dense")
    args = parser.parse_args()
    note = ""
    try:
        median = measure(args.model, args.seq, args.steps, False)
    except torch.OutOfMemoryError:
        note = ", activations computed again"
    if note:  # outside the handler, which holds what has to be freed
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        median = measure(args.model, args.seq, args.steps, True)
    print(f"transformers, {args.model}{note}, {args.seq} tokens: {median * 1e3:.1f} ms a step, {args.seq / median:.0f} tokens/s, "
          f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
