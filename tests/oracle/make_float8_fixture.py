"""Makes tests/fixtures/float8.safetensors with torch (2.11): what its float8 types, and DeepSeek's converters written with
them, make of every code, of every BF16 value, of chosen and random FP32 values and of whole matrices.

  python make_float8_fixture.py

Quantities that must agree bit for bit are stored as integers. NaN is compared as NaN.
"""
import pathlib
from fractions import Fraction

import torch
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "float8.safetensors"
BLOCK = 128
E4M3 = torch.float8_e4m3fn


def bits(x):
    return x.contiguous().view(torch.int32)


def encode(x):
    """Saturating: the release clamps before it converts (torch alone makes NaN of what is too large)."""
    return x.clamp(-448.0, 448.0).to(E4M3).view(torch.uint8)


def next_to(x, direction):
    return torch.nextafter(x, torch.full_like(x, direction))


def chosen_floats(generator):
    values = torch.arange(128, dtype=torch.uint8).view(E4M3).float()[:127]
    halves = (values[1:] + values[:-1]) / 2
    chosen = [values, halves, next_to(halves, torch.inf), next_to(halves, -torch.inf), next_to(values, torch.inf)]
    chosen.append(torch.tensor([448.0, 456.0, 463.99997, 464.0, 464.00003, 480.0, 3.4e38, torch.inf, torch.nan]))
    any_bits = torch.randint(-2**31, 2**31, (4096,), generator=generator, dtype=torch.int64).to(torch.int32)
    near = torch.randn(4096, generator=generator) * 2.0 ** torch.randint(-14, 9, (4096,), generator=generator)
    one = torch.cat(chosen)
    return torch.cat([one, -one, any_bits.view(torch.float32), near])


def scale_of(amax):
    """The smallest power of two that is no less than max(amax, 1e-4) / 448, in exact arithmetic."""
    floor = torch.tensor(1e-4, dtype=torch.float32).item()
    ratio, k = Fraction(max(amax, floor)) / 448, -140
    while Fraction(2) ** k < ratio:
        k += 1
    return 2.0**k


def spread(scales, shape):
    return scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def blocks(n):
    return -(-n // BLOCK)


def dequantise_case(shape, generator, arbitrary):
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.int64).to(torch.uint8)
    grid = (blocks(shape[0]), blocks(shape[1]))
    scales = 2.0 ** torch.randint(-30, 20, grid, generator=generator).float()
    if arbitrary:  # V3's own scales are no powers of two; the ends make subnormal and infinite products
        scales = torch.rand(grid, generator=generator) * 1e-3
        scales.view(-1)[0] = 1e-39
        scales.view(-1)[-1] = 3e38
    product = codes.view(E4M3).float() * spread(scales, shape)
    return {"codes": codes, "scales": scales, "f32": bits(product), "bf16": product.to(torch.bfloat16)}


def quantise_case(shape, generator, deviation, edit=None):
    x = torch.randn(shape, generator=generator) * deviation
    if edit:
        edit(x)
    grid = torch.empty(blocks(shape[0]), blocks(shape[1]))
    for r in range(grid.shape[0]):
        for c in range(grid.shape[1]):
            block = x[r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK]
            grid[r, c] = scale_of(block.abs().max().item())
    return {"x": x, "codes": encode(x / spread(grid, shape)), "scales": grid}


def main():
    generator = torch.Generator().manual_seed(8)
    every = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    bf16 = torch.arange(65536, dtype=torch.int64).to(torch.int16).view(torch.bfloat16)
    floats = chosen_floats(generator)
    amax = torch.cat([448.0 * 2.0 ** torch.arange(-24, 100).float(), torch.rand(500, generator=generator) * 10])
    amax = torch.cat([amax, next_to(amax, torch.inf), next_to(amax, 0.0), torch.tensor([0.0, 1e-45, 1e-4, 3.4028235e38])])
    out = {
        "e4m3.values": bits(every.view(E4M3).float()),
        "e8m0.values": bits(every.view(torch.float8_e8m0fnu).float()),
        "bf16.codes": encode(bf16.float()),
        "floats": bits(floats),
        "floats.codes": encode(floats),
        "amax": amax,
        "amax.scales": torch.tensor([scale_of(a) for a in amax.tolist()]),
    }

    def near_448(x):
        x[0, 0], x[0, -1], x[-1, 0] = 448.00003, -896.0, 0.0

    cases = [dequantise_case((130, 150), generator, False), dequantise_case((257, 3), generator, True),
             dequantise_case((5, 300), generator, True), dequantise_case((1, 1), generator, False)]
    cases += [quantise_case((130, 150), generator, 0.02), quantise_case((3, 257), generator, 1.0, near_448),
              quantise_case((4, 130), generator, 1e30), quantise_case((129, 2), generator, 1e-6),
              quantise_case((2, 2), generator, 1.0, lambda x: x.zero_()), quantise_case((2, 3), generator, 1e-41)]
    for number, case in enumerate(cases):
        out.update({f"case{number}.{name}": tensor for name, tensor in case.items()})
    save_file(out, OUT)


if __name__ == "__main__":
    main()
