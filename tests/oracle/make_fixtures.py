"""Makes tests/fixtures/oracle/<case>/: see README.md for what the files hold and how to run this.

Per case: draw random weights until no discrete choice (top-k, router, ReLU) hangs on rounding; write
the model; run transformers on the written directory; check our own form (reference.py) against it;
take the KL and all gradients from that form in float64.
"""
import argparse
import json
import math
import pathlib
import platform
import shutil

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

import hf
import kl_near
import reference as ref

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "oracle"
MARGIN = 1e-4        # k-th against (k+1)-th index score; chosen against unchosen expert and group
RELU_MARGIN = 1e-5   # |q.k| on visible pairs: nearer to the kink, float32 and float64 may differ in a whole gradient term
NOISE_FACTOR = 30    # margins must also exceed this many times the float32 error of index scores and router


def yarn(original, factor=40, fast=32, slow=1, mscale=1.0, mscale_all_dim=1.0):
    return {"beta_fast": fast, "beta_slow": slow, "factor": factor, "mscale": mscale, "mscale_all_dim": mscale_all_dim,
            "original_max_position_embeddings": original, "type": "yarn"}


def make_config(v32, hidden, heads, q_lora, kv_lora, nope, rope, v, layers=2, first_dense=1, inter=14, moe_inter=6, experts=8,
                shared=1, top=2, groups=1, topk_group=1, norm_topk=True, scale=2.5, vocab=37, eps=1e-6, theta=10000,
                scaling=None, index=None):
    longest = int(scaling["factor"] * scaling["original_max_position_embeddings"]) if scaling else 4096
    config = {
        "architectures": ["DeepseekV32ForCausalLM" if v32 else "DeepseekV3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": first_dense,
        "hidden_act": "silu", "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": inter,
        "kv_lora_rank": kv_lora, "max_position_embeddings": longest, "model_type": "deepseek_v32" if v32 else "deepseek_v3",
        "moe_intermediate_size": moe_inter, "moe_layer_freq": 1, "n_group": groups, "n_routed_experts": experts,
        "n_shared_experts": shared, "norm_topk_prob": norm_topk, "num_attention_heads": heads, "num_experts_per_tok": top,
        "num_hidden_layers": layers, "num_key_value_heads": heads, "num_nextn_predict_layers": 0, "q_lora_rank": q_lora,
        "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "rms_norm_eps": eps, "rope_scaling": scaling, "rope_theta": theta,
        "routed_scaling_factor": scale, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": topk_group,
        "topk_method": "noaux_tc", "torch_dtype": "float32", "use_cache": True, "v_head_dim": v, "vocab_size": vocab,
    }
    if v32:
        config |= dict(zip(("index_n_heads", "index_head_dim", "index_topk"), index))
    return config


def as_glm(config):
    """The same model as GLM-4.7-Flash's config.json has it."""
    return config | {"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "partial_rotary_factor": 1.0,
                     "eos_token_id": [1, 2], "mlp_layer_types": ["dense"] * config["first_k_dense_replace"]
                     + ["sparse"] * (config["num_hidden_layers"] - config["first_k_dense_replace"])}


# gain: a linear layer's standard deviation times sqrt(inputs). embed: of the embedding. The indexer's queries and
# weights keep their gain in the small regime, or its scores would not be MARGIN apart; its key does not, so that
# k_norm's 1e-6 can be told from 1e-5.
SMALL = {"gain": 0.35, "embed": 0.05, "head": 0.5, "index": 1.2, "key": 0.02}
MEDIUM = {"gain": 0.9, "embed": 0.7, "head": 1.0, "index": 1.2, "key": 1.2}
LARGE = {"gain": 1.7, "embed": 2.0, "head": 2.0, "index": 2.0, "key": 2.0}

CASES = {
    "v3_dense_small": dict(
        config=make_config(False, 40, 3, 24, 12, 7, 4, 5, experts=6, top=2, scale=1.8),
        regime=SMALL, T=24, documents=[0], attention="dense",
        checks="base without an indexer, small weights, no YaRN, one router group"),
    "v3_dense_yarn_docs": dict(
        config=make_config(False, 33, 5, 20, 13, 5, 6, 7, groups=4, topk_group=2, top=3, scaling=yarn(64), vocab=41),
        regime=LARGE, T=33, documents=[0, 9, 10, 25], attention="dense",
        checks="base without an indexer, large weights, YaRN, 4 router groups, 4 documents, one of a single token"),
    "v3_dense_whole_queries": dict(
        config=make_config(False, 32, 3, None, 12, 7, 6, 5, groups=1, topk_group=1, experts=8, top=3, moe_inter=5, shared=2, scale=2.446,
                           eps=1e-5, theta=50000, vocab=31),
        regime=MEDIUM, T=30, documents=[0, 13], attention="dense",
        checks="Moonlight's form: q_lora_rank null, one router group, 2 shared experts, eps 1e-5, theta 50000; 2 documents"),
    "v3_dense_glm4_lite": dict(
        config=as_glm(make_config(False, 16, 2, 12, 8, 192, 64, 256, groups=1, topk_group=1, experts=6, top=2, moe_inter=5, inter=9, scale=1.8,
                                  eps=1e-5, theta=1000000, vocab=23)),
        regime=MEDIUM, T=20, documents=[0], attention="dense",
        checks="GLM-4.7-Flash's form: glm4_moe_lite, heads of 192 + 64 and 256, one router group, eps 1e-5, theta 1e6"),
    "v32_sparse_wide": dict(
        config=make_config(True, 16, 2, 12, 8, 192, 64, 256, layers=1, first_dense=0, groups=1, topk_group=1, experts=6, top=2, moe_inter=5,
                           scale=1.8, eps=1e-5, theta=1000000, vocab=23, index=(4, 64, 6)),
        regime=MEDIUM, T=24, documents=[0], attention="sparse",
        checks="what GLM-4.7-Flash becomes: heads of 192 + 64 and 256 with an indexer, one router group, eps 1e-5, theta 1e6"),
    "v32_sparse_large": dict(
        config=make_config(True, 56, 3, 24, 12, 7, 6, 5, groups=2, topk_group=1, experts=6, top=2, moe_inter=5, inter=9, scaling=yarn(64),
                           index=(4, 10, 8), vocab=31),
        regime=LARGE, T=40, documents=[0], attention="sparse", shards=3,
        checks="top-k prunes, large weights, YaRN, 2 router groups, sharded files"),
    "v32_sparse_small_eps": dict(
        config=make_config(True, 40, 1, 20, 12, 12, 4, 7, experts=6, top=2, moe_inter=5, norm_topk=False, scale=0.7, eps=1e-3, index=(5, 9, 5)),
        regime=SMALL, T=29, documents=[0], attention="sparse",
        checks="rms_norm_eps 1e-3 (latent norms stay at 1e-6), small weights, no YaRN, norm_topk_prob false, one attention head"),
    "v32_sparse_docs": dict(
        config=make_config(True, 32, 3, 20, 14, 5, 8, 7, groups=4, topk_group=2, top=2, scaling=yarn(32, fast=8, mscale=0.7, mscale_all_dim=0.7),
                           theta=500, index=(4, 12, 6), moe_inter=5, shared=2, vocab=31),
        regime=MEDIUM, T=48, documents=[0, 1, 17, 40], attention="sparse",
        checks="top-k within documents, one of a single token, YaRN with mscale 0.7 and another theta, 4 router groups, 2 shared experts"),
    "v32_sparse_short": dict(
        config=make_config(True, 24, 5, 20, 12, 7, 4, 5, layers=2, first_dense=0, groups=2, topk_group=1, experts=6, top=2, index=(2, 4, 16),
                           scaling=yarn(16)),
        regime=MEDIUM, T=11, documents=[0], attention="sparse",
        checks="T below index_topk, so nothing is pruned; no dense MLP layer; index_head_dim equals the rope dimensions"),
    "v32_dense": dict(
        config=make_config(True, 36, 3, 20, 12, 5, 6, 7, groups=2, topk_group=1, experts=8, top=3, moe_inter=4, scaling=yarn(64), index=(4, 11, 8)),
        regime=MEDIUM, T=32, documents=[0], attention="dense",
        checks="stage 1: dense output beside an indexer, KL over all visible keys, YaRN"),
    "v32_dense_docs": dict(
        config=make_config(True, 24, 5, 20, 12, 7, 4, 5, layers=3, experts=5, top=2, moe_inter=4, index=(5, 8, 4), scale=1.5),
        regime=LARGE, T=37, documents=[0, 5, 23], attention="dense",
        checks="stage 1 with 3 documents, large weights, no YaRN, 3 layers"),
    "v32_sparse_long": dict(
        config=make_config(True, 24, 3, 20, 12, 5, 8, 7, layers=3, first_dense=2, groups=4, topk_group=3, top=4, moe_inter=4, inter=11, vocab=29,
                           scaling=yarn(24, fast=16, slow=0.5), theta=1000, index=(5, 13, 16)),
        regime=MEDIUM, T=64, documents=[0], attention="sparse",
        checks="the longest: 64 tokens, top 16, 3 layers, YaRN far beyond the original length"),
    "v32_sparse_yarn_ratio": dict(
        config=make_config(True, 24, 3, 20, 12, 5, 6, 7, layers=1, first_dense=1, scaling=yarn(64, mscale=1.0, mscale_all_dim=0.5), index=(4, 8, 6)),
        regime=MEDIUM, T=24, documents=[0], attention="sparse",
        checks="mscale differs from mscale_all_dim: cosines and sines of attention and indexer carry the ratio; no MoE layer. "
               "No released model does this; skip the case where such a configuration is refused"),
    "v32_dense_near": dict(
        config=make_config(True, 24, 3, 20, 12, 7, 4, 5, experts=4, top=2, moe_inter=5, scaling=yarn(64), index=(5, 12, 6)),
        regime=LARGE | {"index": 1.0, "key": 1.0}, T=28, documents=[0, 11], attention="dense", fit=True,
        checks="stage 1 near convergence: every layer's KL below 5% of the uniform's, where softmax - p cancels; 2 documents"),
    "v32_sparse_near": dict(
        config=make_config(True, 24, 3, 20, 12, 7, 4, 5, experts=4, top=2, moe_inter=5, scaling=yarn(64), index=(5, 12, 6)),
        regime=LARGE | {"index": 1.0, "key": 1.0}, T=28, documents=[0, 11], attention="sparse", fit=True,
        checks="stage 2 near convergence: every layer's KL on the selected set below 5% of the uniform's; 2 documents"),
}


def random_weights(config, regime, rng):
    """Every tensor random, norms, biases and scales too: a default that starts at 0 or 1 hides a missing term."""
    w = {}

    def linear(name, out_dim, in_dim, gain=regime["gain"]):
        w[name + ".weight"] = rng.standard_normal((out_dim, in_dim)) * gain / math.sqrt(in_dim)

    def norm(name, dim):
        w[name + ".weight"] = rng.uniform(0.4, 1.6, dim)

    def mlp(name, inter):
        linear(name + ".gate_proj", inter, hidden)
        linear(name + ".up_proj", inter, hidden)
        linear(name + ".down_proj", hidden, inter)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    w["model.embed_tokens.weight"] = rng.standard_normal((config["vocab_size"], hidden)) * regime["embed"]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        attn = layer + ".self_attn"
        norm(layer + ".input_layernorm", hidden)
        if config["q_lora_rank"] is None:
            linear(attn + ".q_proj", heads * (nope + rope), hidden)
        else:
            linear(attn + ".q_a_proj", config["q_lora_rank"], hidden)
            norm(attn + ".q_a_layernorm", config["q_lora_rank"])
            linear(attn + ".q_b_proj", heads * (nope + rope), config["q_lora_rank"])
        linear(attn + ".kv_a_proj_with_mqa", config["kv_lora_rank"] + rope, hidden)
        norm(attn + ".kv_a_layernorm", config["kv_lora_rank"])
        linear(attn + ".kv_b_proj", heads * (nope + v), config["kv_lora_rank"])
        linear(attn + ".o_proj", hidden, heads * v)
        if "index_topk" in config:
            indexer, dim = attn + ".indexer", config["index_head_dim"]
            linear(indexer + ".wq_b", config["index_n_heads"] * dim, config["q_lora_rank"], regime["index"])
            linear(indexer + ".wk", dim, hidden, regime["key"])
            norm(indexer + ".k_norm", dim)
            w[indexer + ".k_norm.bias"] = rng.standard_normal(dim) * 0.3
            linear(indexer + ".weights_proj", config["index_n_heads"], hidden, regime["index"])
        norm(layer + ".post_attention_layernorm", hidden)
        if n < config["first_k_dense_replace"]:
            mlp(layer + ".mlp", config["intermediate_size"])
        else:
            linear(layer + ".mlp.gate", config["n_routed_experts"], hidden, 1.0)
            # wide, and mostly negative: a masked group replaced by 0 instead of -inf would win
            w[layer + ".mlp.gate.e_score_correction_bias"] = rng.uniform(-1.2, 0.2, config["n_routed_experts"])
            for e in range(config["n_routed_experts"]):
                mlp(f"{layer}.mlp.experts.{e}", config["moe_intermediate_size"])
            mlp(layer + ".mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])
    norm("model.norm", hidden)
    linear("lm_head", config["vocab_size"], hidden, regime["head"])
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in w.items()}


def save_model(folder, config, w, shards):
    """The released layout: one file, or shards with their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(w, folder / "model.safetensors", metadata={"format": "pt"})
        return
    total = sum(t.numel() * 4 for t in w.values())
    files, where, seen = [{} for _ in range(shards)], {}, 0
    for name, t in w.items():
        i = min(seen * shards // total, shards - 1)
        files[i][name] = t
        where[name] = f"model-{i + 1:05d}-of-{shards:06d}.safetensors"
        seen += t.numel() * 4
    for i, part in enumerate(files):
        save_file(part, folder / f"model-{i + 1:05d}-of-{shards:06d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def draw(name, case, first_seed):
    """The first seed whose discrete choices all stand clear of rounding: (seed, weights, tokens)."""
    config, sparse = case["config"], case["attention"] == "sparse"
    for seed in range(first_seed, first_seed + 5000):
        rng = np.random.default_rng(seed)
        w = random_weights(config, case["regime"], rng)
        tokens = rng.integers(0, config["vocab_size"], case["T"]).tolist()
        if case.get("fit"):
            w = kl_near.fit(config, w, tokens, case["documents"], sparse)
        with torch.no_grad():
            o64 = ref.forward(config, ref.with_dtype(w, torch.float64), tokens, case["documents"], sparse)
            if min(o64.select_margin, o64.router_margin) < MARGIN or o64.relu_margin < RELU_MARGIN:
                continue
            o32 = ref.forward(config, w, tokens, case["documents"], sparse)
        noise = max([diff(a, b) for a, b in zip(o32.index_scores, o64.index_scores)], default=0.0)
        if min(o64.select_margin, o64.router_margin) < NOISE_FACTOR * noise:
            continue
        if case.get("fit") and max(k.item() / u for k, u in zip(o64.kl, o64.kl_uniform)) > 0.05:
            continue
        return seed, w, tokens
    raise SystemExit(f"{name}: no acceptable seed; make the case smaller or its margins wider")


def diff(a, b):
    """Largest absolute difference; infinities must be in the same places."""
    a, b = a.detach().double(), b.detach().double()
    finite = torch.isfinite(a)
    assert torch.equal(finite, torch.isfinite(b)), "infinities differ"
    return (a - b)[finite].abs().max().item() if finite.any() else 0.0


def check_documents_alone(model, tokens, documents, out):
    """The mask holds in attention and indexer alike: a document run alone, at its own positions, gives the same rows."""
    ends = documents[1:] + [len(tokens)]
    for a, b in zip(documents, ends) if len(documents) > 1 else ():
        alone = hf.run(model, tokens[a:b], [0], position_ids=torch.arange(a, b))
        tolerance = 1e-4 if model.dtype == torch.float32 else 1e-10
        assert diff(alone.logits, out.logits[a:b]) <= tolerance * out.logits.abs().max().item(), f"document {a}..{b}"


def make(name, case, first_seed, root):
    config, documents, sparse = case["config"], case["documents"], case["attention"] == "sparse"
    seed, w, tokens = draw(name, case, first_seed)
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    save_model(folder / "model", config, w, case.get("shards", 1))

    model32, single = hf.dump(folder / "model", tokens, documents, sparse, double=False)
    model64, double = hf.dump(folder / "model", tokens, documents, sparse, double=True)
    check_documents_alone(model32, tokens, documents, single)
    check_documents_alone(model64, tokens, documents, double)
    w64 = ref.with_dtype(w, torch.float64, requires_grad=True)
    own = ref.forward(config, w64, tokens, documents, sparse)

    # 1. our form is transformers' form: the same code in float64 leaves no room for a difference that matters
    k = min(config.get("index_topk", 0), len(tokens))
    error = {}
    for kind in ("logits", "hidden", "attn", "index_scores"):
        mine, hf64, hf32 = (getattr(o, kind) for o in (own, double, single))
        mine, hf64, hf32 = ([v] if kind == "logits" else v for v in (mine, hf64, hf32))
        assert len(mine) == len(hf64) == len(hf32)
        size = max([v[torch.isfinite(v)].abs().max().item() for v in mine], default=1.0)
        for a, b in zip(mine, hf64):
            assert diff(a, b) <= 1e-10 * max(size, 1.0), f"{name} {kind}: {diff(a, b)}"
        error[kind] = max([diff(a, b) for a, b in zip(hf32, hf64)], default=0.0)
        assert error[kind] <= 1e-5 * max(size, 1.0), f"{name} {kind}: float32 is {error[kind]} off at size {size}"
    for a, b, c in zip(own.topk, double.picked, single.picked):
        assert torch.equal(a.to(torch.int32), hf.ascending(b, k)) and torch.equal(b, c), f"{name}: selections differ"

    # 2. gradients of the token loss, also through transformers' own code
    loss = ref.token_loss(own.logits, tokens)
    base = ref.gradients(loss, w64)
    trained = [n for n in base if ref.INDEXER not in n]
    theirs = hf.parameter_gradients(model64, ref.token_loss(double.logits, tokens), trained)
    size = max(g.abs().max().item() for g in base.values())
    for n in trained:
        g = torch.zeros_like(base[n]) if theirs[n] is None else theirs[n]
        assert diff(g, base[n]) <= 1e-9 * size, f"{name} grad {n}: {diff(g, base[n])}"

    # 3. what the file holds
    expected = {"logits": single.logits}
    expected |= {f"hidden.{i}": t for i, t in enumerate(single.hidden)}
    expected |= {f"attn.{i}": t for i, t in enumerate(single.attn)}
    expected |= {f"grad.base.{n}": g for n, g in base.items()}
    note = {"loss": loss.item()}
    if k:
        expected |= {f"index_scores.{i}": t for i, t in enumerate(single.index_scores)}
        expected |= {f"topk.{i}": hf.ascending(t, k) for i, t in enumerate(single.picked)}
        expected |= {f"kl.{i}": t.reshape(1) for i, t in enumerate(own.kl)}
        indexer = ref.gradients(sum(own.kl), w64)
        leaked = [n for n in indexer if (indexer[n].abs().max() > 0) != (ref.INDEXER in n)]
        leaked += [n for n in base if ref.INDEXER in n and base[n].abs().max() > 0]
        assert not leaked, f"{name}: gradients that reach too far, or not at all: {leaked}"
        expected |= {f"grad.indexer.{n}": g for n, g in indexer.items()}
        note |= {"kl_uniform": own.kl_uniform, "select_margin": finite(own.select_margin), "relu_margin": own.relu_margin}
    expected = {n: (t if t.dtype == torch.int32 else t.float()).detach().contiguous() for n, t in expected.items()}
    save_file(expected, folder / "expected.safetensors")
    note |= {"router_margin": finite(own.router_margin), "float32_error": error,
             "max_abs": {"logits": single.logits.abs().max().item(), "hidden": max(t.abs().max().item() for t in single.hidden)}}
    about = {"name": name, "checks": case["checks"], "attention": case["attention"], "tokens": tokens, "documents": documents,
             "has_indexer": bool(k), "seed": seed, "measured": note,
             "made_with": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "python": platform.python_version()}}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    (folder / "case.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    kl = " ".join(f"{t.item():.4g}/{u:.4g}" for t, u in zip(own.kl, own.kl_uniform))
    print(f"{name}: seed {seed}, {size / 1e3:.0f} kB, loss {loss.item():.4f}, kl/uniform {kl or '-'}, logits error {error['logits']:.1e}", flush=True)


def finite(x):
    return x if math.isfinite(x) else None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", help="cases to make (default: all): " + ", ".join(CASES))
    parser.add_argument("--out", type=pathlib.Path, default=FIXTURES)
    parser.add_argument("--seed", type=int, default=0, help="where each case's search for a seed begins")
    args = parser.parse_args()
    torch.set_num_threads(1)   # one thread: sums, and so the files, do not depend on the machine's cores
    torch.use_deterministic_algorithms(True)
    for name in args.case or CASES:
        make(name, CASES[name], args.seed, args.out)


if __name__ == "__main__":
    main()
