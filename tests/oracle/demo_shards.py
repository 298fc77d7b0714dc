"""What DeepSeek's demo converter makes of model directories: names, dtypes, shapes and digests of every tensor of every
shard, for 1, 2 and 4 shards. Written from the description of its format alone, with numpy and no other code of ours.

    demo_shards.py OUT.json                    the committed tests/fixtures/demo_shards.json
    demo_shards.py DIR --check N --in SOURCE   the N shards in DIR against those that the rules here make of SOURCE

The sources are not stored: every tensor's bytes are a function of its name (contents()), which
tests/support/conversion.h has too.
"""
import argparse
import json
import pathlib
import struct

import numpy as np

U64 = np.uint64
WIDTH = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


# ---- contents ----

def splitmix(x):
    with np.errstate(over="ignore"):
        x = x + U64(0x9E3779B97F4A7C15)
        x = (x ^ x >> U64(30)) * U64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> U64(27)) * U64(0x94D049BB133111EB)
        return x ^ x >> U64(31)


def contents(name, dtype, shape, powers):
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    n = int(np.prod(shape))
    with np.errstate(over="ignore"):
        h = splitmix(U64(seed) + np.arange(n, dtype=U64))
    scale = name.endswith("_scale_inv")
    sign = np.zeros(n, U64) if scale else h >> U64(63)
    exponent = U64(118) + (h >> U64(32) & U64(7))
    if dtype == "F32":
        bits = (sign << U64(31) | exponent << U64(23) | h & U64(0x7FFFFF)).astype("<u4")
        if scale and powers:
            bits &= np.uint32(0xFF800000)
    elif dtype == "BF16":
        bits = (sign << U64(15) | exponent << U64(7) | h & U64(0x7F)).astype("<u2")
    else:
        bits = np.where(h & U64(0x7F) == U64(0x7F), h ^ U64(1), h).astype(np.uint8)
    return bits.reshape(shape)


def digest(array):
    """Sum over bytes of (byte + 1) * splitmix64(position), modulo 2^64."""
    data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).astype(U64)
    with np.errstate(over="ignore"):
        return int(((data + U64(1)) * splitmix(np.arange(data.size, dtype=U64))).sum())


# ---- sources: what a released directory of these sizes holds ----

COMMON = dict(vocab_size=20, num_hidden_layers=2, first_k_dense_replace=1, n_shared_experts=1, mtp=1)
CASES = {
    "bf16": dict(COMMON, hidden_size=40, intermediate_size=28, moe_intermediate_size=12, num_attention_heads=4,
                 n_routed_experts=8, q_lora_rank=18, kv_lora_rank=14, nope=6, rope=4, v=5, index=(3, 10), fp8=False, powers=True),
    "fp8": dict(COMMON, hidden_size=136, intermediate_size=512, moe_intermediate_size=512, num_attention_heads=4,
                n_routed_experts=4, q_lora_rank=72, kv_lora_rank=40, nope=128, rope=128, v=128, index=(2, 160), fp8=True, powers=True),
    "fp8_dense": dict(COMMON, hidden_size=130, intermediate_size=1024, moe_intermediate_size=512, num_attention_heads=4,
                      n_routed_experts=8, q_lora_rank=129, kv_lora_rank=16, nope=128, rope=128, v=128, index=None, fp8=True, powers=False),
}


def model_tensors(c):
    """(name, shape, kind) of every weight; kind: "fp8" where the release has FP8, "f32", else "bf16"."""
    d, heads = c["hidden_size"], c["num_attention_heads"]
    out = [("model.embed_tokens.weight", (c["vocab_size"], d), "bf16")]

    def add(prefix, name, shape, kind="bf16"):
        out.append((f"{prefix}.{name}", shape, kind))

    def mlp(prefix, inner):
        add(prefix, "gate_proj.weight", (inner, d), "fp8")
        add(prefix, "up_proj.weight", (inner, d), "fp8")
        add(prefix, "down_proj.weight", (d, inner), "fp8")

    layers = c["num_hidden_layers"]
    for i in range(layers + c["mtp"]):
        p = f"model.layers.{i}"
        add(p, "input_layernorm.weight", (d,))
        add(p, "post_attention_layernorm.weight", (d,))
        a = f"{p}.self_attn"
        add(a, "q_a_proj.weight", (c["q_lora_rank"], d), "fp8")
        add(a, "q_a_layernorm.weight", (c["q_lora_rank"],))
        add(a, "q_b_proj.weight", (heads * (c["nope"] + c["rope"]), c["q_lora_rank"]), "fp8")
        add(a, "kv_a_proj_with_mqa.weight", (c["kv_lora_rank"] + c["rope"], d), "fp8")
        add(a, "kv_a_layernorm.weight", (c["kv_lora_rank"],))
        add(a, "kv_b_proj.weight", (heads * (c["nope"] + c["v"]), c["kv_lora_rank"]), "fp8")
        add(a, "o_proj.weight", (d, heads * c["v"]), "fp8")
        if c["index"]:
            h, w = c["index"]
            add(a, "indexer.wq_b.weight", (h * w, c["q_lora_rank"]), "fp8")
            add(a, "indexer.wk.weight", (w, d), "fp8")
            add(a, "indexer.k_norm.weight", (w,), "f32")
            add(a, "indexer.k_norm.bias", (w,), "f32")
            add(a, "indexer.weights_proj.weight", (h, d))
        if i < c["first_k_dense_replace"]:
            mlp(f"{p}.mlp", c["intermediate_size"])
        else:
            add(p, "mlp.gate.weight", (c["n_routed_experts"], d))
            add(p, "mlp.gate.e_score_correction_bias", (c["n_routed_experts"],), "f32")
            mlp(f"{p}.mlp.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"])
            for e in range(c["n_routed_experts"]):
                mlp(f"{p}.mlp.experts.{e}", c["moe_intermediate_size"])
        if i >= layers:
            add(p, "enorm.weight", (d,))
            add(p, "hnorm.weight", (d,))
            add(p, "eh_proj.weight", (d, 2 * d))
            add(p, "embed_tokens.weight", (c["vocab_size"], d))
            add(p, "shared_head.norm.weight", (d,))
            add(p, "shared_head.head.weight", (c["vocab_size"], d))
    add("model", "norm.weight", (d,))
    out.append(("lm_head.weight", (c["vocab_size"], d), "bf16"))
    return out


def source_tensors(c):
    """{name: (dtype, array of stored bits)}"""
    out = {}
    for name, shape, kind in model_tensors(c):
        if kind == "fp8" and c["fp8"]:
            out[name] = ("F8_E4M3", contents(name, "F8_E4M3", shape, False))
            blocks = tuple(-(-n // 128) for n in shape)
            out[name + "_scale_inv"] = ("F32", contents(name + "_scale_inv", "F32", blocks, c["powers"]))
        else:
            dtype = "F32" if kind == "f32" else "BF16"
            out[name] = (dtype, contents(name, dtype, shape, False))
    return out


# ---- the converter ----

RENAMED = {  # second-last part of a name: (name in the demo, dimension that is split)
    "embed_tokens": ("embed", 0), "input_layernorm": ("attn_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0), "q_a_proj": ("wq_a", None), "q_a_layernorm": ("q_norm", None), "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None), "kv_a_layernorm": ("kv_norm", None), "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1), "gate": ("gate", None), "gate_proj": ("w1", 0), "down_proj": ("w2", 1), "up_proj": ("w3", 0),
    "norm": ("norm", None), "lm_head": ("head", 0), "wq_b": ("wq_b", None), "wk": ("wk", None),
    "k_norm": ("k_norm", None), "weights_proj": ("weights_proj", None),
}


def convert(tensors, n_layers, n_experts, mp):
    """[{demo name: (dtype, array)}] by shard."""
    shards = [{} for _ in range(mp)]
    for name, (dtype, array) in tensors.items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= n_layers:
            continue
        parts = name.split(".")
        if parts[0] == "model":
            parts = parts[1:]
        parts = [{"self_attn": "attn", "mlp": "ffn", "weight_scale_inv": "scale", "e_score_correction_bias": "bias"}.get(p, p)
                 for p in parts]
        parts[-2], dim = RENAMED[parts[-2]]
        demo = ".".join(parts)
        for rank, shard in enumerate(shards):
            part = array
            if "experts" in parts:
                expert = int(parts[parts.index("experts") + 1])
                if expert // (n_experts // mp) != rank:
                    continue
            elif dim is not None:
                assert array.shape[dim] % mp == 0, name
                size = array.shape[dim] // mp
                part = array[rank * size:(rank + 1) * size] if dim == 0 else array[:, rank * size:(rank + 1) * size]
            shard[demo] = (dtype, part)
    return shards


def describe(shards):
    return [{name: [dtype, list(a.shape), f"{digest(a):016x}"] for name, (dtype, a) in sorted(s.items())} for s in shards]


# ---- files ----

def read_safetensors(path):
    raw = pathlib.Path(path).read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + length])
    header.pop("__metadata__", None)
    types = {4: "<u4", 2: "<u2", 1: np.uint8}
    return {n: (t["dtype"], np.frombuffer(raw[8 + length:][slice(*t["data_offsets"])], types[WIDTH[t["dtype"]]]).reshape(t["shape"]))
            for n, t in header.items()}


def check(out, source, mp):
    config = json.loads((source / "config.json").read_text())
    files = sorted(source.glob("*.safetensors"))
    tensors = {n: t for f in files for n, t in read_safetensors(f).items()}
    wanted = describe(convert(tensors, config["num_hidden_layers"], config["n_routed_experts"], mp))
    for rank in range(mp):
        got = describe([read_safetensors(out / f"model{rank}-mp{mp}.safetensors")])[0]
        wrong = sorted(n for n in wanted[rank].keys() | got.keys() if wanted[rank].get(n) != got.get(n))
        if wrong:
            raise SystemExit(f"shard {rank} of {mp}: {len(wrong)} tensors differ: {wrong[:5]}")
    print("ok")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--check", type=int, metavar="N", help="compare the N shards in OUT with what is made of --in")
    parser.add_argument("--in", dest="source", type=pathlib.Path)
    args = parser.parse_args()
    if args.check:
        return check(args.out, args.source, args.check)
    cases = {}
    for name, c in CASES.items():
        tensors = source_tensors(c)
        cases[name] = {str(mp): describe(convert(tensors, c["num_hidden_layers"], c["n_routed_experts"], mp)) for mp in (1, 2, 4)}
    lines = [f'"{name}": {{\n' + ",\n".join(f'"{mp}": {json.dumps(s, separators=(",", ":"))}' for mp, s in by.items()) + "}"
             for name, by in cases.items()]
    args.out.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
