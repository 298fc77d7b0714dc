"""A plain T x T form of the model, written from its equations, differentiable throughout.

transformers gives logits, hidden states and selections, but runs its indexer without gradients and
has no KL. This form fills that gap: it is first checked against transformers on the same weights
(see make_fixtures.py), and only then are its KL and its gradients believed.

Nothing is fused, tiled or absorbed. Weights are a dict of tensors under the released checkpoint's
names, in the dtype the whole computation is to have (float64 for fixtures). Rotary angles, cosines
and sines are float32 whatever that dtype is, as transformers computes them.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

LATENT_EPS = 1e-6  # q_a_layernorm, kv_a_layernorm and the indexer's k_norm ignore rms_norm_eps
INDEXER = ".self_attn.indexer."
ROUTER_BIAS = "e_score_correction_bias"  # moved by a rule, not by a gradient


@dataclass
class Output:
    logits: torch.Tensor = None
    hidden: list = field(default_factory=list)         # L+1 of [T, D]
    attn: list = field(default_factory=list)           # L of [T, D]
    index_scores: list = field(default_factory=list)   # L of [T, T]
    topk: list = field(default_factory=list)           # L of [T, k] int64
    kl: list = field(default_factory=list)             # L scalars
    kl_uniform: list = field(default_factory=list)     # L floats
    select_margin: float = math.inf   # smallest k-th minus (k+1)-th score of a row that prunes
    router_margin: float = math.inf   # smallest chosen minus unchosen, experts and groups
    relu_margin: float = math.inf     # smallest |q.k| on a visible pair: the distance to ReLU's kink


def visible_mask(n_tokens, documents):
    """[T, T] bool: row t sees the keys s <= t of its own document."""
    row = torch.arange(n_tokens)
    doc = torch.bucketize(row, torch.tensor(documents), right=True)
    return (row[:, None] >= row[None, :]) & (doc[:, None] == doc[None, :])


def rope_config(config):
    """(rope_theta, YaRN's parameters or None) of a config.json of the released form."""
    scaling = config.get("rope_scaling")
    return config["rope_theta"], scaling if scaling and scaling.get("type") == "yarn" else None


def mscale(factor, m):
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def rope_tables(config, n_tokens):
    """cos and sin [T, rope/2] float32. Positions count through the packed sequence."""
    base, yarn = rope_config(config)
    dim = config["qk_rope_head_dim"]
    pair = torch.arange(dim // 2, dtype=torch.float32)
    period = base ** (2 * pair / dim)
    inv = 1.0 / period
    attention_factor = 1.0
    if yarn:
        def turns_to_pair(turns):
            return dim * math.log(yarn["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))
        low = max(math.floor(turns_to_pair(yarn["beta_fast"])), 0)
        high = min(math.ceil(turns_to_pair(yarn["beta_slow"])), dim - 1)
        if low == high:
            high += 0.001
        ramp = ((pair - low) / (high - low)).clamp(0, 1)
        # in this order of roundings the angles equal transformers' bit for bit; inv / factor may be one ulp away
        inv = 1.0 / (yarn["factor"] * period) * ramp + inv * (1 - ramp)
        # 1 for every released model, because there mscale == mscale_all_dim
        attention_factor = mscale(yarn["factor"], yarn["mscale"]) / mscale(yarn["factor"], yarn["mscale_all_dim"])
    angle = torch.arange(n_tokens, dtype=torch.float32)[:, None] * inv[None, :]
    return angle.cos() * attention_factor, angle.sin() * attention_factor


def softmax_scale(config):
    """The attention's scale. YaRN's mscale^2 belongs here and nowhere in the indexer."""
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    yarn = rope_config(config)[1]
    return scale * mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2 if yarn else scale


def rotate(a, b, cos, sin):
    return a * cos - b * sin, a * sin + b * cos


def rope_interleaved(x, cos, sin):
    """Pairs (2j, 2j+1): the attention's layout. x [T, H, rope]."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.stack(rotate(x[..., 0::2], x[..., 1::2], cos, sin), dim=-1).flatten(-2)


def rope_half_split(x, cos, sin):
    """Pairs (j, j + rope/2): the indexer's layout. x [T, H, rope]."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    half = x.shape[-1] // 2
    return torch.cat(rotate(x[..., :half], x[..., half:], cos, sin), dim=-1)


def rms_norm(x, weight, eps):
    return weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def swiglu_mlp(x, w, prefix):
    return (F.silu(x @ w[prefix + "gate_proj.weight"].T) * (x @ w[prefix + "up_proj.weight"].T)) @ w[prefix + "down_proj.weight"].T


def route(x, w, prefix, config, out):
    """Chosen experts [T, K] and their weights [T, K]."""
    scores = torch.sigmoid(x @ w[prefix + "weight"].T)
    biased = (scores + w[prefix + ROUTER_BIAS]).detach()
    n_tokens, n_experts = scores.shape
    groups, keep_groups, top = config["n_group"], config["topk_group"], config["num_experts_per_tok"]
    per_group = biased.view(n_tokens, groups, -1)
    group_rank = per_group.topk(2, dim=-1).values.sum(-1).sort(-1, descending=True)
    if keep_groups < groups:
        gap = group_rank.values[:, keep_groups - 1] - group_rank.values[:, keep_groups]
        out.router_margin = min(out.router_margin, gap.min().item())
    allowed = torch.zeros(n_tokens, groups, dtype=torch.bool).scatter(1, group_rank.indices[:, :keep_groups], True)
    allowed = allowed[..., None].expand_as(per_group).reshape(n_tokens, n_experts)
    rank = biased.masked_fill(~allowed, -math.inf).sort(-1, descending=True)
    if top < n_experts:
        out.router_margin = min(out.router_margin, (rank.values[:, top - 1] - rank.values[:, top]).min().item())
    chosen = rank.indices[:, :top]
    weight = scores.gather(1, chosen)
    if config["norm_topk_prob"]:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return chosen, weight * config["routed_scaling_factor"]


def moe(x, w, prefix, config, out):
    chosen, weight = route(x, w, prefix + "gate.", config, out)
    y = swiglu_mlp(x, w, prefix + "shared_experts.")
    for e in range(config["n_routed_experts"]):
        share = (weight * (chosen == e)).sum(-1, keepdim=True)
        y = y + share * swiglu_mlp(x, w, f"{prefix}experts.{e}.")
    return y


def index_scores(x, qr, w, prefix, config, cos, sin, visible, out):
    """I [T, T], -inf where not visible. x and qr must come detached."""
    n_tokens, heads, dim, rope = x.shape[0], config["index_n_heads"], config["index_head_dim"], config["qk_rope_head_dim"]
    q = (qr @ w[prefix + "wq_b.weight"].T).view(n_tokens, heads, dim)
    k = F.layer_norm(x @ w[prefix + "wk.weight"].T, (dim,), w[prefix + "k_norm.weight"], w[prefix + "k_norm.bias"], LATENT_EPS)
    k = k[:, None]
    q = torch.cat([rope_half_split(q[..., :rope], cos, sin), q[..., rope:]], dim=-1)
    k = torch.cat([rope_half_split(k[..., :rope], cos, sin), k[..., rope:]], dim=-1)[:, 0]
    z = torch.einsum("thd,sd->ths", q, k) * dim ** -0.5
    out.relu_margin = min(out.relu_margin, z.detach().abs().transpose(1, 2)[visible].min().item())
    weight = (x @ w[prefix + "weights_proj.weight"].T) * heads ** -0.5
    return torch.einsum("th,ths->ts", weight, F.relu(z)).masked_fill(~visible, -math.inf)


def select(scores, visible, topk, out):
    """The k best visible keys of each row: ([T, k] ascending, -1 at the end; [T, T] bool). Lowest index wins a tie."""
    n_tokens = scores.shape[0]
    k = min(topk, n_tokens)
    rank = scores.detach().sort(stable=True, dim=-1, descending=True)
    if k < n_tokens:
        prunes = visible.sum(-1) > k
        if prunes.any():
            gap = rank.values[prunes, k - 1] - rank.values[prunes, k]
            out.select_margin = min(out.select_margin, gap.min().item())
    picked = torch.zeros_like(visible).scatter(1, rank.indices[:, :k], True) & visible
    ascending = torch.where(picked, torch.arange(n_tokens), n_tokens).sort(-1).values[:, :k]
    return torch.where(ascending == n_tokens, -1, ascending), picked


def indexer_kl(p, scores, over, visible, out):
    """Mean over the rows that see at least two keys of KL(p || softmax(I)), both over the keys in `over`."""
    rows = visible.sum(-1) >= 2
    p, scores, over = p.detach()[rows], scores[rows], over[rows]
    log_q = F.log_softmax(scores.masked_fill(~over, -math.inf), dim=-1)
    kl = (torch.xlogy(p, p) - p * log_q.masked_fill(~over, 0.0)).sum() / rows.sum()
    out.kl.append(kl)
    uniform = torch.xlogy(p, p).sum(-1) + over.sum(-1).to(p.dtype).log()
    out.kl_uniform.append(uniform.mean().item())


def attention(x, w, prefix, config, cos, sin, visible, sparse, out):
    n_tokens, heads = x.shape[0], config["num_attention_heads"]
    nope, rope, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
    if config["q_lora_rank"] is None:
        q = (x @ w[prefix + "q_proj.weight"].T).view(n_tokens, heads, nope + rope)
    else:
        qr = rms_norm(x @ w[prefix + "q_a_proj.weight"].T, w[prefix + "q_a_layernorm.weight"], LATENT_EPS)
        q = (qr @ w[prefix + "q_b_proj.weight"].T).view(n_tokens, heads, nope + rope)
    kv = x @ w[prefix + "kv_a_proj_with_mqa.weight"].T
    latent = rms_norm(kv[:, :rank], w[prefix + "kv_a_layernorm.weight"], LATENT_EPS)
    up = (latent @ w[prefix + "kv_b_proj.weight"].T).view(n_tokens, heads, -1)
    k_rope = rope_interleaved(kv[:, None, rank:], cos, sin).expand(-1, heads, -1)
    q = torch.cat([q[..., :nope], rope_interleaved(q[..., nope:], cos, sin)], dim=-1)
    k = torch.cat([up[..., :nope], k_rope], dim=-1)

    attended = visible
    if prefix + "indexer.wk.weight" in w:
        scores = index_scores(x.detach(), qr.detach(), w, prefix + "indexer.", config, cos, sin, visible, out)
        chosen, picked = select(scores, visible, config["index_topk"], out)
        attended = picked if sparse else visible
    s = torch.einsum("thd,shd->hts", q, k) * softmax_scale(config)
    p = s.masked_fill(~attended, -math.inf).softmax(-1)
    if prefix + "indexer.wk.weight" in w:
        out.index_scores.append(scores)
        out.topk.append(chosen)
        indexer_kl(p.mean(0), scores, attended, visible, out)
    o = torch.einsum("hts,shd->thd", p, up[..., nope:]).reshape(n_tokens, -1)
    return o @ w[prefix + "o_proj.weight"].T


def forward(config, w, tokens, documents, sparse):
    """Everything `winnow forward` dumps, as an Output whose tensors carry gradients."""
    out = Output()
    tokens = torch.as_tensor(tokens)
    visible = visible_mask(len(tokens), documents)
    cos, sin = rope_tables(config, len(tokens))
    h = w["model.embed_tokens.weight"][tokens]
    eps = config["rms_norm_eps"]
    for n in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{n}."
        out.hidden.append(h)
        x = rms_norm(h, w[prefix + "input_layernorm.weight"], eps)
        a = attention(x, w, prefix + "self_attn.", config, cos, sin, visible, sparse, out)
        out.attn.append(a)
        h = h + a
        x = rms_norm(h, w[prefix + "post_attention_layernorm.weight"], eps)
        dense_mlp = n < config["first_k_dense_replace"]
        h = h + (swiglu_mlp(x, w, prefix + "mlp.") if dense_mlp else moe(x, w, prefix + "mlp.", config, out))
    out.hidden.append(h)
    out.logits = rms_norm(h, w["model.norm.weight"], eps) @ w["lm_head.weight"].T
    return out


def token_loss(logits, tokens):
    """Mean over all T-1 predictions, those that cross into the next document included."""
    return F.cross_entropy(logits[:-1], torch.as_tensor(tokens)[1:])


def gradients(loss, w):
    """d loss / d w for every parameter, zeros where the loss does not reach; the router's bias is no parameter."""
    names = [n for n in w if not n.endswith(ROUTER_BIAS)]
    grads = torch.autograd.grad(loss, [w[n] for n in names], allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(w[n]) if g is None else g for n, g in zip(names, grads)}


def with_dtype(w, dtype, requires_grad=False):
    return {n: t.detach().to(dtype, copy=True).requires_grad_(requires_grad and not n.endswith(ROUTER_BIAS)) for n, t in w.items()}
