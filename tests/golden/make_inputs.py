#!/usr/bin/env python3
"""Writes the largest magnitude that each linear module of a Qwen3 golden meets in its inputs, as transformers computes it.

    python3 tests/golden/make_inputs.py

The prompts are those of expected.json, each alone, without what was generated.
"""
import json

from common import HERE, start, write_json
from make_qwen3_goldens import GOLDENS, make_weights, oracle, to_nvfp4

import torch


def inputs(name):
    golden = GOLDENS[name]
    config = golden["config"]
    tensors = make_weights(config, golden["seed"], torch.bfloat16)
    if "nvfp4" in golden:
        tensors = to_nvfp4(config, tensors, golden["nvfp4"], golden["seed"])[1]
    model, most = oracle(config, tensors), {}

    def watch(module):
        def hook(_, args):
            most[module] = max(most.get(module, 0.0), args[0].abs().max().item())
        return hook

    for module, layer in model.named_modules():
        if module.endswith("_proj"):
            layer.register_forward_pre_hook(watch(module))
    with open(f"{HERE}/{name}/expected.json") as file:
        prompts = [case["prompt"] for case in json.load(file)["cases"]]
    for prompt in prompts:
        model(torch.tensor([prompt]), use_cache=False)
    return most


if __name__ == "__main__":
    start()
    for chosen in ("qwen3", "qwen3_served"):
        write_json(f"{HERE}/{chosen}/inputs.json", inputs(chosen))
