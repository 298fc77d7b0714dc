"""Runs transformers' own modelling code on a Hugging Face directory and catches what `winnow forward` dumps.

Two precisions. `single` is transformers untouched, float32, eager attention. `double` runs the same
code with the float32 casts written into it (norms, softmax, router, indexer) turned to float64, so
that the rounding error of the first can be measured and gradients compared closely.
"""
import contextlib
import json
import logging
import math
import pathlib
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v32 import modeling_deepseek_v32
from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite
from transformers.utils import logging as hf_logging

from reference import visible_mask


class Watch(TorchFunctionMode):
    """Records the tensor the indexer ranks, which transformers does not return; keeps float64 through `.float()`."""

    def __init__(self):
        super().__init__()
        self.in_indexer = False
        self.ranked = []   # (scores [T, T], chosen [T, k]) of each layer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.topk and self.in_indexer:
            self.ranked.append((args[0][0].detach().clone(), result.indices[0].detach().clone()))
        return result


class DoubleTorch:
    """The torch module with float64 in float32's place. `torch.float`, which the rotary angles use, stays."""
    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def double_precision():
    modules = (modeling_deepseek_v3, modeling_deepseek_v32, modeling_glm4_moe_lite)
    try:
        for m in modules:
            m.torch = DoubleTorch()
        yield
    finally:
        for m in modules:
            m.torch = torch


def load(model_dir, as_v3=False, double=False, dtype=torch.float32, **overrides):
    """The model in eval mode. as_v3: the dense class on a V3.2 directory, whose indexer tensors it then leaves unread."""
    raw = json.loads((pathlib.Path(model_dir) / "config.json").read_text())
    if as_v3:
        from transformers import DeepseekV3Config
        for key in ("model_type", "architectures", "index_n_heads", "index_head_dim", "index_topk"):
            raw.pop(key, None)
        config = DeepseekV3Config(**raw)
    else:
        config = AutoConfig.from_pretrained(model_dir)
    for key, value in overrides.items():
        setattr(config, key, value)
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()   # the unread indexer tensors would be listed one by one
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model, info = AutoModelForCausalLM.from_pretrained(
        model_dir, config=config, dtype=dtype, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True)
    extra = tuple(f"model.layers.{n}." for n in range(config.num_hidden_layers, config.num_hidden_layers + 8))   # prediction layers
    unread = [n for n in info["unexpected_keys"] if not (as_v3 and ".indexer." in n) and not n.startswith(extra)]
    problems = {k: v for k, v in info.items() if v and k != "unexpected_keys"}
    if unread or problems:
        raise SystemExit(f"{model_dir}: transformers could not place every tensor: unexpected {sorted(unread)}, {problems}")
    return (model.double() if double else model).eval()


def run(model, tokens, documents, position_ids=None):
    """One forward pass. The mask is explicit and four-dimensional, which both classes take as it is."""
    n = len(tokens)
    visible = visible_mask(n, documents).to(model.device)
    mask = torch.zeros(n, n, dtype=model.dtype, device=model.device).masked_fill(~visible, torch.finfo(model.dtype).min)[None, None]
    out = SimpleNamespace(hidden=[], attn=[], index_scores=[], picked=[], logits=None)
    hooks, watch = [], Watch()

    def enter(*_):
        watch.in_indexer = True

    def leave(*_):
        watch.in_indexer = False

    def keep_input(module, args, kwargs):
        out.hidden.append((args[0] if args else kwargs["hidden_states"])[0].detach().clone())
    for layer in model.model.layers:
        hooks.append(layer.register_forward_pre_hook(keep_input, with_kwargs=True))
        hooks.append(layer.self_attn.register_forward_hook(lambda m, a, o: out.attn.append(o[0][0].detach().clone())))
        if hasattr(layer.self_attn, "indexer"):
            hooks.append(layer.self_attn.indexer.register_forward_pre_hook(enter))
            hooks.append(layer.self_attn.indexer.register_forward_hook(leave))
    hooks.append(model.model.norm.register_forward_pre_hook(keep_input, with_kwargs=True))
    try:
        with watch, double_precision() if model.dtype == torch.float64 else contextlib.nullcontext():
            out.logits = model(input_ids=torch.as_tensor(tokens, device=model.device)[None], attention_mask=mask,
                               position_ids=None if position_ids is None else position_ids[None], use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    for scores, chosen in watch.ranked:
        out.index_scores.append(scores.masked_fill(~visible, -math.inf))
        # transformers fills short rows with masked keys and masks them again afterwards: they are not selected
        out.picked.append(torch.zeros_like(visible).scatter(1, chosen, True) & visible)
    return out


def dump(model_dir, tokens, documents, sparse, double=False):
    """(model, what `winnow forward` dumps). Dense attention beside an indexer is the V3 class on the same weights; the
    V3.2 class with index_topk = T, so that nothing is pruned, then gives that pass's index scores, and must agree."""
    k = getattr(AutoConfig.from_pretrained(model_dir), "index_topk", None)
    if sparse or k is None:
        model = load(model_dir, double=double)
        return model, run(model, tokens, documents)
    model = load(model_dir, as_v3=True, double=double)
    out = run(model, tokens, documents)
    unpruned = run(load(model_dir, double=double, index_topk=len(tokens)), tokens, documents)
    off = (out.logits - unpruned.logits).abs().max().item()
    if off > 1e-5 * out.logits.abs().max().item():
        raise SystemExit(f"{model_dir}: transformers' V3 and unpruned V3.2 logits are {off} apart")
    out.index_scores = unpruned.index_scores
    for s in out.index_scores:
        best = s.topk(min(k, len(tokens)), dim=-1).indices
        out.picked.append(torch.zeros_like(s, dtype=torch.bool).scatter(1, best, True) & torch.isfinite(s))
    return model, out


def ascending(picked, k):
    """[T, T] bool to [T, k] int32, ascending, -1 at the end."""
    n = picked.shape[0]
    index = torch.where(picked, torch.arange(n), n).sort(-1).values[:, :k]
    return torch.where(index == n, -1, index).to(torch.int32)


def parameter_gradients(model, loss, names):
    """Gradients under the released checkpoint's names; the fused expert tensors are taken apart again."""
    fused = dict(model.named_parameters())
    grads = dict(zip(fused, torch.autograd.grad(loss, list(fused.values()), allow_unused=True)))
    out = {}
    for name in names:
        if ".mlp.experts." in name:
            prefix, e, kind, _ = name.rsplit(".", 3)
            g = grads[f"{prefix}.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"][int(e)]
            out[name] = g if kind == "down_proj" else g.chunk(2, 0)[kind == "up_proj"]
        else:
            out[name] = grads[name]
    return out
