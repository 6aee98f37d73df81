#!/usr/bin/env python3
"""Writes the golden checkpoints of Qwen3 and what Hugging Face transformers computes from them.

    python3 tests/golden/make_qwen3_goldens.py [NAME ...]

As make_goldens.py, with `Qwen3ForCausalLM`.
"""
import copy
import sys

from common import bf16, distance, e2m1, expectations, must_tell, start, write_checkpoint, write_expected

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def base(**changes):
    """A small Qwen3 with the heads and rotary base of the 4B; `rope_parameters` as transformers 5 has it."""
    config = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 128,
        "num_attention_heads": 4, "num_key_value_heads": 1, "attention_bias": False, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "hidden_act": "silu", "use_sliding_window": False,
        "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
    }
    return config | changes


GOLDENS = {
    "qwen3": dict(config=base(), seed=21, prompts=[9, 60, 300]),
    "qwen3_untied": dict(
        config=base(hidden_size=96, intermediate_size=160, num_hidden_layers=3, head_dim=32, num_attention_heads=6, num_key_value_heads=3,
                    attention_bias=True, tie_word_embeddings=False, rms_norm_eps=1e-5, max_position_embeddings=64,
                    rope_parameters={"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0,
                                     "original_max_position_embeddings": 64}),
        seed=22, prompts=[5, 210], norms=torch.float32, shards=2),
    # Widths that are odd multiples of 16.
    "qwen3_nvfp4": dict(
        config=base(hidden_size=80, intermediate_size=112, num_hidden_layers=3, head_dim=32, num_attention_heads=6, num_key_value_heads=3),
        seed=23, prompts=[9, 200], nvfp4="modelopt"),
    "qwen3_nvfp4_packed": dict(
        config=base(hidden_size=64, intermediate_size=96, head_dim=64, num_attention_heads=2, num_key_value_heads=1,
                    tie_word_embeddings=False, vocab_size=256),
        seed=24, prompts=[9, 200], nvfp4="compressed-tensors"),
    # For a small tokenizer of Qwen's kind, whose control tokens begin at 640, so that it can be served.
    "qwen3_served": dict(
        config=base(vocab_size=672, head_dim=64, num_attention_heads=4, num_key_value_heads=2), seed=25, prompts=[30, 180],
        nvfp4="modelopt", texts=640, eos=[642, 640]),
}


def linears(config):
    """Name, rows and columns of every linear module of a layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    return [("self_attn.q_proj", q, hidden), ("self_attn.k_proj", kv, hidden), ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner)]


def make_weights(config, seed, norms):
    """Dense weights by name."""
    generator = torch.Generator().manual_seed(seed)
    hidden = config["hidden_size"]

    def norm(width=hidden):
        return bf16(generator, width, std=0.2, mean=1.0).to(norms)

    # A tied head would let a large embedding predict its own token for ever.
    std = 0.2 if config["tie_word_embeddings"] else 1.0
    tensors = {"model.embed_tokens.weight": bf16(generator, config["vocab_size"], hidden, std=std)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = norm()
        for name in ("q_norm", "k_norm"):
            # Larger than those of layers: attention is to favour some positions.
            tensors[f"{prefix}self_attn.{name}.weight"] = (1.5 * norm(config["head_dim"]).float()).to(torch.bfloat16).to(norms)
        for name, rows, cols in linears(config):
            tensors[f"{prefix}{name}.weight"] = bf16(generator, rows, cols, std=2 * cols ** -0.5)
            if config["attention_bias"] and name.startswith("self_attn"):
                tensors[f"{prefix}{name}.bias"] = bf16(generator, rows, std=0.3)
    tensors["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = bf16(generator, config["vocab_size"], hidden, std=0.3)
    return tensors


def to_nvfp4(config, tensors, tool, seed):
    """Random NVFP4 in place of the linear modules: the checkpoint's tensors, and the same as dense float32 weights. Every module
    has factors of its own, those that are fused too."""
    generator = torch.Generator().manual_seed(seed)
    stored, meant = dict(tensors), dict(tensors)
    for layer in range(config["num_hidden_layers"]):
        for name, rows, cols in linears(config):
            path = f"model.layers.{layer}.{name}"
            codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator)
            scales = torch.exp2(torch.rand(rows, cols // 16, generator=generator) * 6 + 2).to(torch.float8_e4m3fn)
            # Codes have a standard deviation of about 3, scales a middle of 32.
            weight, inputs = (torch.rand(2, generator=generator) + 0.5) * torch.tensor([2 * cols ** -0.5 / 100, 1e-3])
            del stored[f"{path}.weight"]
            if tool == "modelopt":
                stored |= {f"{path}.weight": codes, f"{path}.weight_scale": scales,
                           f"{path}.weight_scale_2": weight.clone(), f"{path}.input_scale": inputs.clone()}
            else:
                stored |= {f"{path}.weight_packed": codes, f"{path}.weight_scale": scales,
                           f"{path}.weight_global_scale": (1 / weight).reshape(1), f"{path}.input_global_scale": (1 / inputs).reshape(1)}
                weight = 1 / (1 / weight)
            values = e2m1(codes).unflatten(-1, (-1, 16)) * scales.float().unsqueeze(-1)
            meant[f"{path}.weight"] = values.flatten(-2) * weight
    return stored, meant


def oracle(config, tensors):
    """The float32 eager Hugging Face model with exactly these weights."""
    model = Qwen3ForCausalLM._from_config(Qwen3Config(**copy.deepcopy(config)), attn_implementation="eager", dtype=torch.float32)
    state = {name: tensor.float() for name, tensor in tensors.items()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.eval()
    assert model.config._attn_implementation == "eager"
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model


def sensitivity(config, tensors, cases, logits):
    """How far wrong readings of the model are from these logits."""
    def far(tensors, **changes):
        return distance(oracle(config | changes, tensors), cases, logits)

    def swapped(name):
        return name.replace("gate_proj", "?").replace("up_proj", "gate_proj").replace("?", "up_proj")

    rope = config["rope_parameters"]
    ones = {n: torch.ones_like(t) if "q_norm" in n or "k_norm" in n else t for n, t in tensors.items()}
    must_tell({
        "norms of heads without weights": far(ones),
        "gate and up swapped": far({swapped(n): t for n, t in tensors.items()}),
        "another rotary base": far(tensors, rope_parameters=rope | {"rope_theta": rope["rope_theta"] / 5}),
    } | ({"plain RoPE": far(tensors, rope_parameters={"rope_type": "default", "rope_theta": rope["rope_theta"]}),
          "YaRN's bounds not rounded": far(tensors, rope_parameters=rope | {"truncate": False})} if rope["rope_type"] == "yarn" else {}))


def hf_config(config, spelling, tool):
    """`config.json` in one of the spellings."""
    config = copy.deepcopy(config)
    rope = config.pop("rope_parameters")
    out = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **config, "max_window_layers": config["num_hidden_layers"]}
    if spelling == "5":
        out |= {"rope_parameters": rope, "dtype": "bfloat16", "transformers_version": "5.3.0",
                "layer_types": ["full_attention"] * config["num_hidden_layers"]}
    else:
        out |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": "bfloat16", "transformers_version": "4.51.0"}
    out["eos_token_id"] = 2
    kind = {"num_bits": 4, "type": "float", "group_size": 16}
    if tool == "modelopt":
        out["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "config_groups": {
            "group_0": {"weights": kind, "input_activations": kind, "targets": ["Linear"]}}}
    elif tool == "compressed-tensors":
        out["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"], "config_groups": {
                "group_0": {"weights": kind | {"strategy": "tensor_group", "symmetric": True},
                            "input_activations": kind | {"strategy": "tensor_group", "dynamic": "local"}, "targets": ["Linear"]}}}
    return out


SPELLING = {"qwen3": "4", "qwen3_untied": "5", "qwen3_nvfp4": "4", "qwen3_nvfp4_packed": "5", "qwen3_served": "4"}


def make(name):
    print(name)
    golden = GOLDENS[name]
    config, tool = golden["config"], golden.get("nvfp4")
    stored = tensors = make_weights(config, golden["seed"], golden.get("norms", torch.bfloat16))
    if tool:
        stored, tensors = to_nvfp4(config, tensors, tool, golden["seed"])
    cases, logits = expectations(name, oracle(config, tensors), golden)
    sensitivity(config, tensors, cases, logits)
    write_checkpoint(name, hf_config(config, SPELLING[name], tool), stored, golden.get("shards", 1), golden.get("eos"))
    write_expected(name, cases, logits)


if __name__ == "__main__":
    start()
    for chosen in sys.argv[1:] or GOLDENS:
        make(chosen)
