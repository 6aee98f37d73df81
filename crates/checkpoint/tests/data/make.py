#!/usr/bin/env python3
"""Writes one packed expert layer and the same layer as transformers dequantises it.

    python3 make.py        (torch, safetensors, transformers)

packed.safetensors   gate_up_proj / down_proj as _blocks and _scales, random codes, scales 2^-9 .. 2^6
dense.safetensors    the same weights by transformers' convert_moe_packed_tensors: bfloat16 [E, in, out]
"""
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

EXPERTS, HIDDEN, INTERMEDIATE = 3, 64, 64  # square down_proj, as in gpt-oss
PREFIX = "model.layers.0.mlp.experts."

generator = torch.Generator().manual_seed(20)
packed, dense = {}, {}
for name, out, width in [("gate_up_proj", 2 * INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)]:
    blocks = torch.randint(0, 256, (EXPERTS, out, width // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 134, (EXPERTS, out, width // 32), dtype=torch.uint8, generator=generator)
    packed[PREFIX + name + "_blocks"], packed[PREFIX + name + "_scales"] = blocks, scales
    dense[PREFIX + name] = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16).contiguous()

here = Path(__file__).parent
save_file(packed, here / "packed.safetensors", metadata={"format": "pt"})
save_file(dense, here / "dense.safetensors", metadata={"format": "pt"})
