"""Do the fixtures notice the faults that other implementations shipped? Each is put into a copy of reference.py.

Prints, per fault, the cases that notice it, and the largest deviation in units of what float32 rounding can explain
there (1e-4 of each tensor's largest value). A fault that no case notices ends this with 1.
"""
import json
import pathlib
import sys
import types

import torch
from safetensors.torch import load_file

HERE = pathlib.Path(__file__).resolve().parent
FAULTS = [
    ("indexer rope interleaved", "rope_half_split(q[..., :rope], cos, sin), q[..., rope:]], dim=-1)\n    k = torch.cat([rope_half_split(k",
     "rope_interleaved(q[..., :rope], cos, sin), q[..., rope:]], dim=-1)\n    k = torch.cat([rope_interleaved(k"),
    ("indexer rope on the last dimensions",
     "q[..., :rope], cos, sin), q[..., rope:]], dim=-1)\n    k = torch.cat([rope_half_split(k[..., :rope], cos, sin), k[..., rope:]], dim=-1)",
     "q[..., -rope:], cos, sin), q[..., :-rope]], dim=-1)\n    k = torch.cat([rope_half_split(k[..., -rope:], cos, sin), k[..., :-rope]], dim=-1)"),
    ("attention rope half-split on queries and keys", "x[..., 0::2], x[..., 1::2]", "x[..., :x.shape[-1] // 2], x[..., x.shape[-1] // 2:]"),
    ("no YaRN angles", "inv = 1.0 / (yarn[", "inv = inv if yarn else 1.0 / (yarn["),
    ("no mscale^2 in the attention's scale", "** 2 if yarn", "** 0 if yarn"),
    ("mscale^2 in the indexer's scale too", "k) * dim ** -0.5", "k) * dim ** -0.5 * softmax_scale(config) * (config['qk_nope_head_dim'] + rope) ** 0.5"),
    ("cos and sin never scaled", "attention_factor = mscale(", "attention_factor = 1.0 or mscale("),
    ("no index_head_dim^-0.5", "k) * dim ** -0.5", "k)"),
    ("no index_n_heads^-0.5", ".T) * heads ** -0.5", ".T)"),
    ("no ReLU", "weight, F.relu(z)", "weight, z"),
    ("k_norm without bias", 'w[prefix + "k_norm.bias"], LATENT_EPS', "None, LATENT_EPS"),
    ("k_norm eps 1e-5", 'w[prefix + "k_norm.bias"], LATENT_EPS', 'w[prefix + "k_norm.bias"], 1e-5'),
    ("q_a norm takes rms_norm_eps", 'w[prefix + "q_a_layernorm.weight"], LATENT_EPS', 'w[prefix + "q_a_layernorm.weight"], config["rms_norm_eps"]'),
    ("kv_a norm takes rms_norm_eps", 'w[prefix + "kv_a_layernorm.weight"], LATENT_EPS', 'w[prefix + "kv_a_layernorm.weight"], config["rms_norm_eps"]'),
    ("block norms take 1e-6", 'eps = config["rms_norm_eps"]', "eps = 1e-6"),
    ("raw q latent into the indexer", "qr.detach(), w,", '(x @ w[prefix + "q_a_proj.weight"].T).detach(), w,'),
    ("router bias ignored", "scores + w[prefix + ROUTER_BIAS]", "scores"),
    ("router bias in the weights too", "weight = scores.gather", "weight = (scores + w[prefix + ROUTER_BIAS]).gather"),
    ("group score is the maximum", "topk(2, dim=-1)", "topk(1, dim=-1)"),
    ("masked groups get 0, not -inf", "masked_fill(~allowed, -math.inf)", "masked_fill(~allowed, 0.0)"),
    ("no group limit", "masked_fill(~allowed, -math.inf)", "masked_fill(~allowed, -math.inf) if groups < 0 else biased"),
    ("norm_topk_prob taken as true", 'if config["norm_topk_prob"]:', "if True:"),
    ("routed_scaling_factor ignored", 'weight * config["routed_scaling_factor"]', "weight"),
    ("documents ignored", "& (doc[:, None] == doc[None, :])", ""),
    ("KL over all rows", "/ rows.sum()", "/ len(rows)"),
    ("sparse KL over all visible keys", "scores, attended, visible, out)", "scores, visible, visible, out)"),
    ("p of one head", "p.mean(0)", "p[0]"),
    ("epsilon 1e-6 in the student", "F.log_softmax(scores.masked_fill(~over, -math.inf), dim=-1)",
     "torch.log(F.softmax(scores.masked_fill(~over, -math.inf), dim=-1) + 1e-6)"),
    ("indexer trains on the base's x", "index_scores(x.detach()", "index_scores(x"),
    ("p not detached", "p, scores, over = p.detach()[rows]", "p, scores, over = p[rows]"),
    ("selection one key short", "min(topk, n_tokens)", "min(topk, n_tokens) - 1"),
]


def load_case(folder):
    weights = {}
    for file in sorted((folder / "model").glob("*.safetensors")):
        weights |= load_file(file)
    return (json.loads((folder / "case.json").read_text()), json.loads((folder / "model" / "config.json").read_text()),
            weights, load_file(folder / "expected.safetensors"))


def deviation(ref, case, config, weights, expected):
    """Largest difference from the expected dump, in units of 1e-4 of each tensor's size."""
    w = ref.with_dtype(weights, torch.float64, requires_grad=True)
    out = ref.forward(config, w, case["tokens"], case["documents"], case["attention"] == "sparse")
    got = {"logits": out.logits, **{f"kl.{i}": t.reshape(1) for i, t in enumerate(out.kl)}}
    for kind in ("hidden", "attn", "index_scores", "topk"):
        got |= {f"{kind}.{i}": t for i, t in enumerate(getattr(out, kind))}
    got |= {f"grad.base.{n}": g for n, g in ref.gradients(ref.token_loss(out.logits, case["tokens"]), w).items()}
    if out.kl:
        got |= {f"grad.indexer.{n}": g for n, g in ref.gradients(sum(out.kl), w).items()}
    assert got.keys() == expected.keys()
    worst = 0.0
    for name, want in expected.items():
        have = got[name].detach().double()
        if have.shape != want.shape or not torch.equal(torch.isfinite(have), torch.isfinite(want)):
            return float("inf")
        if want.dtype == torch.int32 and not torch.equal(have.to(torch.int32), want):
            return float("inf")
        finite = torch.isfinite(want)
        unit = 1e-4 * want[finite].abs().max().clamp(min=1e-3).item()
        worst = max(worst, (have - want.double())[finite].abs().max().item() / unit)
    return worst


def module(source, label):
    ref = types.ModuleType("reference_" + label.replace(" ", "_"))
    sys.modules[ref.__name__] = ref   # dataclasses look their module up
    exec(compile(source, label, "exec"), ref.__dict__)
    return ref


def main():
    torch.set_num_threads(1)
    source = (HERE / "reference.py").read_text()
    cases = [load_case(f) for f in sorted((HERE.parent / "fixtures" / "oracle").iterdir()) if f.is_dir()]
    unnoticed = 0
    for label, old, new in [("none", "", "")] + FAULTS:
        assert not old or source.count(old) == 1, label
        ref = module(source.replace(old, new) if old else source, label)
        found = {c[0]["name"]: deviation(ref, *c) for c in cases}
        noticed = [n for n, d in found.items() if d > 1]
        print(f"{label}: {len(noticed)} of {len(cases)} (worst {max(found.values()):.3g}) {' '.join(noticed) if len(noticed) < 4 else ''}")
        unnoticed += (not noticed) != (label == "none")
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
