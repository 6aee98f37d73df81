#!/usr/bin/env python3
"""The MXFP4 encoding of src/convert/mxfp4.rs once more, in numpy, and what its exponent rule gains.

    python3 make_convert.py            writes the goldens (numpy, ml_dtypes, safetensors)
    python3 make_convert.py measure    prints the table of the module's documentation

convert.safetensors          one expert layer in bfloat16, [E, in, out]: heavy tails, zeros, blocks far apart, exact ties
convert.mxfp4.safetensors    the same layer as _blocks and _scales
"""
import sys
from pathlib import Path

import numpy as np

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
BOUNDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)


def nearest(x):
    """Indices of the nearest magnitudes; a bound between two belongs to the even one."""
    a = np.abs(x)
    up = np.arange(7) % 2 == 1
    return (np.where(up, a[..., None] >= BOUNDS, a[..., None] > BOUNDS)).sum(-1).astype(np.uint8)


def lost(blocks, exponent):
    """Sums of squares lost in units of the scale: eight running sums, then in pairs. Codes beside them."""
    scaled = blocks * np.exp2(-exponent.astype(np.float32))[..., None]
    index = nearest(scaled)
    rest = (np.abs(scaled) - VALUES[index]) ** 2
    a, b, c, d = np.moveaxis(rest.reshape(*rest.shape[:-1], 4, 8), -2, 0)
    sums = ((a + b) + c) + d
    s = [sums[..., i] for i in range(8)]
    total = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
    return total, index | (scaled < 0).astype(np.uint8) << 3


def unclipped(amax):
    """ceil(log2(amax / 6)), at least -127."""
    mantissa, power = np.frexp(amax)
    return np.maximum(power - 1 - 2 + (mantissa * 2 > 1.5), -127)


def encode(weight):
    """[.., in] to codes [.., in / 32, 16] and scales [.., in / 32]."""
    blocks = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, 32)
    amax = np.abs(blocks).max(-1)
    high = unclipped(amax)
    low = np.maximum(high - 1, -127)
    (high_lost, high_codes), (low_lost, low_codes) = lost(blocks, high), lost(blocks, low)
    lower = (low < high) & (low_lost * np.float32(0.25) < high_lost) & (amax > 0)
    codes = np.where(lower[..., None], low_codes, high_codes)
    scales = np.where(amax > 0, np.where(lower, low, high) + 127, 0).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def measure():
    random, count = np.random.default_rng(1), 400_000
    shape = (count, 32)
    kinds = {
        "Gaussian": random.standard_normal(shape),
        "Laplace": random.laplace(size=shape),
        "Student's t, 4 degrees": random.standard_t(4, shape),
        "Student's t, 2 degrees": random.standard_t(2, shape),
        "Gaussian, blocks of different width": random.standard_normal(shape) * np.exp(random.standard_normal((count, 1)) / 2),
    }
    for name, blocks in kinds.items():
        blocks = blocks.astype(np.float32)
        amax = np.abs(blocks).max(-1)
        floor, ceil = np.floor(np.log2(amax)) - 2, unclipped(amax)
        rounded = np.round(np.log2(amax / 6))
        total = lambda exponent: (lost(blocks, exponent)[0].astype(np.float64) * 4.0**exponent)
        best = lambda *exponents: np.min([total(exponent) for exponent in exponents], 0)
        all_of = (blocks.astype(np.float64) ** 2).sum()
        rules = [total(floor), total(ceil), total(rounded), best(ceil, ceil - 1), best(*(ceil + i for i in range(-3, 3)))]
        print(f"{name:36}", *(f"{np.sqrt(rule.sum() / all_of):.4f}" for rule in rules))


def goldens():
    import ml_dtypes
    from safetensors.numpy import save_file

    random, here = np.random.default_rng(20), Path(__file__).parent
    experts, hidden, inner = 2, 64, 32
    dense, packed = {}, {}
    for name, out, width in [("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)]:
        weight = random.standard_t(3, (experts, out, width)) * np.exp(random.standard_normal((experts, out, 1)) * 3)
        weight[0, 0] = 0
        weight[0, 1, ::2] = 0
        weight[0, 2] = random.integers(-24, 25, width) / 4  # bounds and values at one scale
        weight[0, 3] = random.integers(-24, 25, width) * 2.0**-128
        weight[0, 4] *= 1e-30
        weight[0, 5] *= 1e30
        weight[1, 0, 0] *= 1e6
        weight = weight.astype(ml_dtypes.bfloat16)
        name = "model.layers.0.mlp.experts." + name
        dense[name] = np.ascontiguousarray(weight.transpose(0, 2, 1))
        packed[name + "_blocks"], packed[name + "_scales"] = encode(weight.astype(np.float32))
    save_file(dense, here / "convert.safetensors", metadata={"format": "pt"})
    save_file(packed, here / "convert.mxfp4.safetensors", metadata={"format": "pt"})


measure() if "measure" in sys.argv else goldens()
