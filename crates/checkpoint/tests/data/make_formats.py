#!/usr/bin/env python3
"""Writes small checkpoints with the tools whose formats are read, and what those tools decode them to.

    python3 make_formats.py nvfp4      (torch, safetensors, nvidia-modelopt, compressed-tensors)
    python3 make_formats.py mlx        (mlx, numpy, safetensors)

modelopt.safetensors, compressed.safetensors, mlx.safetensors    as stored
NAME.values.safetensors                                          logical tensors in float32
"""
import sys
from pathlib import Path

HERE = Path(__file__).parent
LAYER = "model.layers.0."


def nvfp4():
    import torch
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(16)

    def random(rows, cols, scale):
        weight = torch.randn(rows, cols, generator=generator) * scale
        weight[0, :16] = 0  # a block without a value
        weight[1, :16] *= 2**-14  # a block far below the others
        return weight.to(torch.bfloat16)

    modules = {"self_attn.q_proj": (6, 64, 0.02), "self_attn.k_proj": (4, 64, 0.05), "mlp.down_proj": (3, 32, 3.0)}
    weights = {LAYER + name: random(*shape) for name, shape in modules.items()}
    plain = {"model.embed_tokens.weight": random(5, 64, 1.0), "model.norm.weight": random(2, 32, 1.0)[1]}

    stored, values = dict(plain), {name: tensor.float() for name, tensor in plain.items()}
    # As exported: projections of one input share their factor.
    factors = {name: NVFP4QTensor.get_weights_scaling_factor_2(weight) for name, weight in weights.items()}
    shared = max(factor for name, factor in factors.items() if "self_attn" in name)
    for name, weight in weights.items():
        factor = shared if "self_attn" in name else factors[name]
        packed, scale, _ = NVFP4QTensor.quantize(weight, 16, None, factor)
        stored[name + ".weight"] = packed._quantized_data
        stored[name + ".weight_scale"] = scale
        stored[name + ".weight_scale_2"] = factor.clone()
        stored[name + ".input_scale"] = torch.tensor(0.0125)
        values[name + ".weight"] = packed.dequantize(torch.float32, scale=scale, double_scale=factor, block_sizes={-1: 16})
        values[name + ".source"] = weight
    save_file(stored, HERE / "modelopt.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in values.items()}, HERE / "modelopt.values.safetensors")

    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored, values = dict(plain), {name: tensor.float() for name, tensor in plain.items()}
    for name, weight in weights.items():
        weight = weight.float()
        factor = (448 * 6 / weight.abs().max()).reshape(1)
        amax = weight.abs().reshape(weight.shape[0], -1, 16).amax(-1)
        scale = (factor * amax / 6).to(torch.float8_e4m3fn).float()
        scale[scale == 0] = 0.125
        state = {"weight": weight, "weight_scale": scale, "weight_global_scale": factor}
        state = NVFP4PackedCompressor.compress(state, scheme)
        back = NVFP4PackedCompressor.decompress(dict(state), scheme)
        stored |= {f"{name}.{leaf}": tensor.detach().contiguous() for leaf, tensor in state.items()}
        stored[name + ".input_global_scale"] = torch.tensor([80.0])
        values[name + ".weight"] = back["weight"].float()
    save_file(stored, HERE / "compressed.safetensors")
    save_file({name: tensor.detach().contiguous() for name, tensor in values.items()}, HERE / "compressed.values.safetensors")


def mlx():
    import mlx.core as mx
    import numpy as np
    from safetensors.numpy import save_file

    mx.random.seed(4)
    experts, hidden, inner = 2, 64, 16
    stored, values = {}, {}

    def quantised(name, shape, **how):
        """A module in MLX's storage, and as MLX decodes it."""
        weight = mx.random.normal(shape).astype(mx.bfloat16)
        parts = dict(zip(["weight", "scales", "biases"], mx.quantize(weight, **how)))
        stored.update({f"{name}.{leaf}": tensor for leaf, tensor in parts.items()})
        wide = {leaf: t.astype(mx.float32) if t.dtype == mx.bfloat16 else t for leaf, t in parts.items()}
        found = mx.dequantize(wide["weight"], wide["scales"], wide.get("biases"), dtype=mx.float32, **how)
        return np.array(found)

    def floats(name, shape):
        stored[name] = mx.random.normal(shape).astype(mx.bfloat16)
        return np.array(stored[name].astype(mx.float32))

    four, eight = {"group_size": 64, "bits": 4}, {"group_size": 32, "bits": 8}
    micro = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    values["model.embed_tokens.weight"] = quantised("model.embed_tokens", (7, hidden), **four)
    values[LAYER + "self_attn.q_proj.weight"] = quantised(LAYER + "self_attn.q_proj", (6, hidden), **micro)
    values[LAYER + "self_attn.q_proj.bias"] = floats(LAYER + "self_attn.q_proj.bias", (6,))
    values[LAYER + "self_attn.o_proj.weight"] = floats(LAYER + "self_attn.o_proj.weight", (hidden, 6))
    values[LAYER + "mlp.router.weight"] = quantised(LAYER + "mlp.router", (experts, hidden), **eight)
    values[LAYER + "mlp.router.bias"] = floats(LAYER + "mlp.router.bias", (experts,))
    for kind, stack in [(four, LAYER + "mlp.experts."), (micro, "model.layers.1.mlp.experts.")]:
        gate = quantised(stack + "gate_proj", (experts, inner, hidden), **kind)
        up = quantised(stack + "up_proj", (experts, inner, hidden), **kind)
        values[stack + "gate_up_proj"] = np.stack([gate, up], 2).reshape(experts, 2 * inner, hidden)
        bias = [floats(f"{stack}{half}_proj.bias", (experts, inner)) for half in ["gate", "up"]]
        values[stack + "gate_up_proj_bias"] = np.stack(bias, 2).reshape(experts, 2 * inner)
        how = eight if kind is four else micro
        values[stack + "down_proj"] = quantised(stack + "down_proj", (experts, 10, 32), **how)
        values[stack + "down_proj_bias"] = floats(stack + "down_proj.bias", (experts, 10))
    mx.save_safetensors(str(HERE / "mlx.safetensors"), stored, metadata={"format": "mlx"})
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, HERE / "mlx.values.safetensors")


{"nvfp4": nvfp4, "mlx": mlx}[sys.argv[1]]()
