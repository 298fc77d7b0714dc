"""What `winnow convert` exports, in transformers: the directory loads strictly in DeepseekV32ForCausalLM or
DeepseekV3ForCausalLM, its tensors are torch's own roundings of the source, and logits and picks of `winnow forward` on
it are those of transformers on it, in float32.

    export.py --winnow build/winnow [CASE ...]     live: converts, loads, runs both, compares
    export.py --fixtures                           tests/fixtures/export/: what the exports must give, without winnow

Sources are the models of tests/fixtures/oracle. Forms: v32 and v3 (BF16), and fp8, whose expected values are those of
torch's FP8 with scales of 128 x 128 blocks, taken back to BF16 (transformers itself runs FP8 on GPUs only).
"""
import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

import hf
import live
from compare import compare

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
CASES = {"v32_sparse_large": ("v32", "v3"), "v32_sparse_docs": ("v32", "fp8"), "v32_sparse_wide": ("v32", "fp8", "v3"),
         "v3_dense_yarn_docs": ("v3", "fp8"), "v3_dense_whole_queries": ("v3", "fp8")}
TOLERANCE = 2e-4   # of max(1, the largest logit)
BLOCK = 128


def source(case):
    model = FIXTURES / "oracle" / case / "model"
    weights = {}
    for file in sorted(model.glob("*.safetensors")):
        weights |= load_file(file)
    return json.loads((model / "config.json").read_text()), weights


def is_fp8(name):
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight", ".wq_b.weight", ".wk.weight")) and not \
        name.endswith(("weights_proj.weight", "eh_proj.weight"))


def is_f32(name):
    return ".indexer.k_norm." in name or name.endswith("e_score_correction_bias")


def through_fp8(w):
    out = torch.empty_like(w)
    for r in range(0, w.shape[0], BLOCK):
        for c in range(0, w.shape[1], BLOCK):
            block = w[r:r + BLOCK, c:c + BLOCK]
            quotient = (block.abs().max().clamp(min=1e-4) / 448.0).view(torch.int32)
            exponent = (quotient >> 23) + ((quotient & 0x7FFFFF) != 0)
            scale = (exponent << 23).to(torch.int32).view(torch.float32)
            out[r:r + BLOCK, c:c + BLOCK] = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return out


def rounded(config, weights, form):
    """(config, weights) of the export as values, by torch: BF16, through FP8 where the form has that."""
    config = dict(config, torch_dtype="bfloat16")
    out = {}
    for name, w in weights.items():
        if form == "v3" and ".indexer." in name:
            continue
        w = through_fp8(w.float()) if form == "fp8" and is_fp8(name) else w.float()
        out[name] = w if is_f32(name) else w.to(torch.bfloat16)
    if form == "v3":
        config = {k: v for k, v in config.items() if not k.startswith("index_")}
        config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    return config, out


def write(directory, config, weights):
    (directory / "config.json").write_text(json.dumps(config))
    save_file({n: w.contiguous() for n, w in weights.items()}, directory / "model.safetensors", metadata={"format": "pt"})


def theirs(directory, case, sparse):
    """Logits and picks of transformers, in float32 on the directory's weights, loaded strictly by hf.load."""
    settings = json.loads((FIXTURES / "oracle" / case / "case.json").read_text())
    got = live.theirs(directory, settings["tokens"], settings["documents"], sparse, None, False)
    return {n: t for n, t in got.items() if n == "logits" or n.startswith(("topk.", "index_scores."))}, settings


def margin(got):
    """The least gap between the last score that is picked and the first that is not."""
    least = np.inf
    for name in got:
        if name.startswith("topk."):
            scores = np.sort(got[name.replace("topk", "index_scores")], axis=1)[:, ::-1]
            k = got[name].shape[1]
            if k < scores.shape[1]:
                with np.errstate(invalid="ignore"):
                    gap = scores[:, k - 1] - scores[:, k]
                least = min(least, gap[np.isfinite(gap)].min(initial=np.inf))
    return least


def make_fixtures():
    out = FIXTURES / "export"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for case, forms in CASES.items():
        for form in forms:
            with tempfile.TemporaryDirectory() as temporary:
                directory = pathlib.Path(temporary)
                config, weights = rounded(*source(case), form)
                write(directory, config, weights)
                sparse = "index_topk" in config
                got, _ = theirs(directory, case, sparse)
            if margin(got) < 1e-5:
                raise SystemExit(f"{case} as {form}: picks {margin(got):.1e} apart; choose another case")
            keep = {n: torch.from_numpy(t) for n, t in got.items() if not n.startswith("index_scores")}
            save_file(keep, out / f"{case}.{form}.safetensors")
            print(f"{case} as {form}: {', '.join(sorted(keep))}; picks {margin(got):.1e} apart")


def run(winnow, *words):
    done = subprocess.run([winnow, "--quiet", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"winnow {' '.join(map(str, words))} ended with {done.returncode}: {done.stderr}")


def check_tensors(directory, config, weights, form):
    wanted = rounded(config, weights, form)[1]
    got = {}
    for file in sorted(directory.glob("*.safetensors")):
        got |= load_file(file)
    if got.keys() != wanted.keys():
        raise SystemExit(f"{directory}: names differ: {sorted(got.keys() ^ wanted.keys())[:5]}")
    wrong = [n for n in got if got[n].dtype != wanted[n].dtype or not torch.equal(got[n], wanted[n])]
    if wrong:
        raise SystemExit(f"{directory}: {len(wrong)} tensors are not torch's: {wrong[:5]}")


def check_fp8_load(fp8, bf16):
    """transformers' own reading of the FP8 directory, strict too: without a GPU it dequantises, to what --to bf16 gives."""
    try:
        import accelerate  # noqa: F401  transformers wants it for FP8
    except ImportError:
        print("accelerate is absent: transformers cannot read FP8 here")
        return
    theirs, ours = (dict(hf.load(d, dtype=torch.bfloat16).named_parameters()) for d in (fp8, bf16))
    wrong = [n for n in theirs.keys() | ours.keys() if n not in theirs or n not in ours or not torch.equal(theirs[n], ours[n])]
    if wrong:
        raise SystemExit(f"{fp8}: transformers reads {len(wrong)} tensors as something else: {sorted(wrong)[:5]}")
    print(f"transformers dequantises the FP8 directory to the same {len(ours)} parameters")


def check_live(winnow, case, form):
    model = FIXTURES / "oracle" / case / "model"
    with tempfile.TemporaryDirectory() as temporary:
        export, again, dump = (pathlib.Path(temporary) / n for n in ("export", "again", "dump.safetensors"))
        run(winnow, "convert", model, export, "--to", form, "--shard-bytes", 20000)
        ran = export
        if form == "fp8":
            run(winnow, "convert", export, again, "--to", "bf16")
            ran = again
            check_fp8_load(export, again)
        check_tensors(ran, *source(case), form)
        sparse = "index_topk" in json.loads((export / "config.json").read_text())
        got, settings = theirs(ran, case, sparse)
        run(winnow, "forward", export, "--tokens", ",".join(map(str, settings["tokens"])), "--documents",
            ",".join(map(str, settings["documents"])), "--attention", "sparse" if sparse else "dense", "--dump", dump,
            "--device", "cpu")
        mine = load_numpy(dump)
    print(f"-- {case} as {form}")
    return compare({n: mine[n] for n in got if n in mine}, got, TOLERANCE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--winnow", type=pathlib.Path)
    parser.add_argument("--fixtures", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.fixtures:
        make_fixtures()
    if args.winnow:
        failed = sum(check_live(args.winnow.resolve(), case, form) for case in args.cases or CASES for form in CASES[case])
        print(f"{failed} tensors differ" if failed else "ok")
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
