#!/usr/bin/env python3
"""Writes the golden checkpoints and what Hugging Face transformers computes from them.

    python3 tests/golden/make_goldens.py [NAME ...]

Each checkpoint is random from a fixed seed. The oracle is `GptOssForCausalLM`, float32, CPU, eager attention and
eager experts, with the weights dequantised here: transformers' own checkpoint loading takes no part, so that a wrong
file layout cannot hide. README.md says what each checkpoint is for and what the expected files hold.
"""
import copy
import math
import shutil
import sys

from common import E2M1, HERE, bf16, distance, e2m1, expectations, must_tell, start, write_checkpoint, write_expected

import numpy
import torch
from transformers import GptOssConfig, GptOssForCausalLM

ROUTER_MARGIN = 3e-5  # least gap between the last chosen expert's logit and the next, at every position
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def base(**changes):
    """A small gpt-oss with the real head_dim, window and rotary parameters; `rope_parameters` as transformers 5 has it."""
    config = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 4,
        "attention_bias": True, "tie_word_embeddings": False, "sliding_window": 128, "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "hidden_act": "silu",
        "layer_types": None,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                            "truncate": False, "original_max_position_embeddings": 4096},
    }
    rope = changes.pop("rope", None)
    config.update(changes)
    if rope is not None:
        config["rope_parameters"] = rope
    if config["layer_types"] is None:
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [kinds[layer % 2] for layer in range(config["num_hidden_layers"])]
    return config


GOLDENS = {
    "mxfp4": dict(config=base(), seed=1, prompts=[5, 40, 200, 300], norms=torch.bfloat16),
    "sharded": dict(
        config=base(hidden_size=96, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                    num_local_experts=12, vocab_size=640, max_position_embeddings=2048,
                    layer_types=["full_attention", "sliding_attention", "sliding_attention"],
                    rope={"rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
                          "truncate": False, "original_max_position_embeddings": 256}),
        seed=2, prompts=[3, 150, 400], norms=torch.float32, shards=3),
    "long": dict(
        config=base(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32),
        seed=3, prompts=[4300], norms=torch.bfloat16),
    "unusual": dict(
        config=base(hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
                    head_dim=32, num_local_experts=5, num_experts_per_tok=2, attention_bias=False, tie_word_embeddings=True,
                    sliding_window=40, layer_types=["sliding_attention"] * 2, max_position_embeddings=512, swiglu_limit=3.0,
                    rope={"rope_type": "default", "rope_theta": 10000.0}),
        seed=4, prompts=[7, 90], norms=torch.bfloat16),
    "truncated": dict(
        config=base(num_hidden_layers=3, num_key_value_heads=1, intermediate_size=96, max_position_embeddings=1024,
                    layer_types=["full_attention"] * 3,
                    rope={"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                          "truncate": True, "original_max_position_embeddings": 256}),
        seed=5, prompts=[60, 330], norms=torch.bfloat16),
    # Written by transformers itself.
    "saved": dict(config=base(vocab_size=320, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
                              num_experts_per_tok=3),
                  seed=8, prompts=[20, 160], norms=torch.bfloat16),
    # As wide as the demo tokenizer's vocabulary, so that it can be served.
    "served": dict(config=base(vocab_size=3072, num_hidden_layers=2), seed=6, prompts=[30, 180], norms=torch.bfloat16,
                   eos=[3058, 3057, 3064]),
    # As mlx-lm writes them: experts split, the router in 8 bits.
    "mlx": dict(config=base(vocab_size=3072, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                            num_local_experts=6, num_experts_per_tok=2),
                seed=9, prompts=[12, 150], norms=torch.bfloat16, mlx="affine", eos=[3058, 3057, 3064], every=6),
    "mlx_mxfp4": dict(config=base(vocab_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                                  intermediate_size=96, num_local_experts=6, num_experts_per_tok=2),
                      seed=10, prompts=[12, 150], norms=torch.bfloat16, mlx="mxfp4"),
}


def expert_blocks(generator, experts, rows, cols):
    blocks = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 124, (experts, rows, cols // 32), dtype=torch.uint8, generator=generator)
    return blocks, scales


def dequantise(blocks, scales):
    """[E, out, in/32, 16] -> [E, out, in]."""
    return (e2m1(blocks) * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2)


def make_weights(config, seed, norms):
    """Stored tensors of the MXFP4 layout, by name."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    q_width, kv_width = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))

    def norm():
        return bf16(generator, hidden, std=0.2, mean=1.0).to(norms)

    # A tied head would let a large embedding predict its own token for ever.
    std = 0.2 if config["tie_word_embeddings"] else 1.0
    tensors = {"model.embed_tokens.weight": bf16(generator, config["vocab_size"], hidden, std=std)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}input_layernorm.weight"] = norm()
        linears = (("q", q_width, hidden), ("k", kv_width, hidden), ("v", kv_width, hidden), ("o", hidden, q_width))
        for name, rows, cols in linears:
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = bf16(generator, rows, cols, std=cols ** -0.5)
            if config["attention_bias"]:
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = bf16(generator, rows, std=0.3)
        tensors[f"{prefix}self_attn.sinks"] = bf16(generator, config["num_attention_heads"], std=1.5, mean=1.0)
        tensors[f"{prefix}post_attention_layernorm.weight"] = norm()
        tensors[f"{prefix}mlp.router.weight"] = bf16(generator, experts, hidden, std=hidden ** -0.5)
        tensors[f"{prefix}mlp.router.bias"] = bf16(generator, experts, std=0.3)
        for name, rows, cols, bias in (("gate_up_proj", 2 * inner, hidden, 2.5), ("down_proj", hidden, inner, 0.3)):
            path = f"{prefix}mlp.experts.{name}"
            tensors[f"{path}_blocks"], tensors[f"{path}_scales"] = expert_blocks(generator, experts, rows, cols)
            tensors[f"{path}_bias"] = bf16(generator, experts, rows, std=bias)
    tensors["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = bf16(generator, config["vocab_size"], hidden, std=0.3)
    return tensors


def dense(tensors):
    """The same weights with the experts as BF16 [E, in, out]."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            values = dequantise(tensor, tensors[name.replace("_blocks", "_scales")])
            stored = values.transpose(1, 2).contiguous().to(torch.bfloat16)
            assert torch.equal(stored.float(), values.transpose(1, 2)), "E2M1 times a power of two is exact in BF16"
            out[name.removesuffix("_blocks")] = stored
        elif not name.endswith("_scales"):
            out[name] = tensor
    return out


def mlx_words(codes, bits):
    """[.., in] codes -> [.., in * bits / 32] words, the first in the lowest bits."""
    per_word = 32 // bits
    words = codes.unflatten(-1, (-1, per_word)) << (bits * torch.arange(per_word))
    return torch.from_numpy(words.sum(-1).numpy().astype(numpy.uint32))


def mlx_module(generator, shape, mode, std):
    """A quantised module: what mlx-lm stores, and the weights that it means."""
    rows, cols = shape[:-1], shape[-1]
    if mode == "mxfp4":
        codes = torch.randint(0, 16, shape, generator=generator)
        # Codes have a standard deviation of about 3.
        middle = 127 + round(math.log2(std / 3))
        scales = torch.randint(middle - 1, middle + 2, (*rows, cols // 32), dtype=torch.uint8, generator=generator)
        values = E2M1[codes].unflatten(-1, (-1, 32)) * torch.exp2(scales.float() - 127).unsqueeze(-1)
        return {"weight": mlx_words(codes, 4), "scales": scales}, values.flatten(-2)
    bits = 8 if mode == "router" else 4
    most = 2 ** bits - 1
    codes = torch.randint(0, most + 1, shape, generator=generator)
    # Of either sign, as MLX's quantiser has them.
    signs = torch.randint(0, 2, (*rows, cols // 64), generator=generator) * 2 - 1
    size = 1 + 0.3 * torch.rand(*rows, cols // 64, generator=generator)
    scales = (signs * size * std * math.sqrt(12) / most).to(torch.bfloat16)
    biases = (-scales.float() * most / 2 + 0.1 * std * torch.randn(*rows, cols // 64, generator=generator)).to(torch.bfloat16)
    values = scales.float().unsqueeze(-1) * codes.unflatten(-1, (-1, 64)) + biases.float().unsqueeze(-1)
    return {"weight": mlx_words(codes, bits), "scales": scales, "biases": biases}, values.flatten(-2)


def to_mlx(config, tensors, mode, seed):
    """Quantises weights of [`make_weights`] anew: the checkpoint's tensors, and the same as dense float32 weights."""
    generator = torch.Generator().manual_seed(seed)
    stored, meant, skipped = {}, {}, []

    def module(path, shape, mode, std):
        parts, values = mlx_module(generator, shape, mode, std)
        stored.update({f"{path}.{leaf}": tensor for leaf, tensor in parts.items()})
        return values

    for name, tensor in dense(tensors).items():
        path = name.removesuffix(".weight")
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            experts, cols, rows = tensor.shape
            std = cols ** -0.5
            if name.endswith("down_proj"):
                values = module(name, (experts, rows, cols), mode, std)
            else:
                parent = name.removesuffix("gate_up_proj")
                halves = [module(f"{parent}{half}_proj", (experts, rows // 2, cols), mode, std) for half in ("gate", "up")]
                values = torch.stack(halves, dim=2).flatten(1, 2)
            meant[name] = values.transpose(1, 2).contiguous()
        elif name.endswith("gate_up_proj_bias"):
            parent = name.removesuffix("gate_up_proj_bias")
            stored[f"{parent}gate_proj.bias"], stored[f"{parent}up_proj.bias"] = (tensor[:, i::2].contiguous() for i in (0, 1))
            meant[name] = tensor
        elif name.endswith("down_proj_bias"):
            stored[name.replace("_bias", ".bias")] = meant[name] = tensor
        elif name.endswith(".weight") and tensor.dim() == 2 and not (mode == "mxfp4" and "o_proj" in name):
            std = {"model.embed_tokens": 1.0, "lm_head": 0.3}.get(path, tensor.shape[1] ** -0.5)
            meant[name] = module(path, tuple(tensor.shape), "router" if "router" in name else mode, std)
        else:
            stored[name] = meant[name] = tensor
            skipped += [path] if "o_proj.weight" in name else []
    section = {"group_size": 64, "bits": 4} if mode == "affine" else {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    for layer in range(config["num_hidden_layers"]):
        section[f"model.layers.{layer}.mlp.router"] = {"group_size": 64, "bits": 8}
    section.update({path: False for path in skipped})
    return stored, meant, {"quantization": section, "quantization_config": section}


def oracle(config, tensors):
    """The float32 eager Hugging Face model with exactly these weights."""
    model = GptOssForCausalLM._from_config(GptOssConfig(**copy.deepcopy(config)), attn_implementation="eager",
                                           experts_implementation="eager", dtype=torch.float32)
    state = {name: tensor.float() for name, tensor in dense(tensors).items()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.eval()
    assert model.config._attn_implementation == "eager" and model.config._experts_implementation == "eager"
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model


class Margins:
    """Least router margin seen since `least` was last set."""

    def __init__(self, model, top_k):
        self.least, self.top_k = float("inf"), top_k
        for layer in model.model.layers:
            layer.mlp.router.register_forward_hook(self.look)

    def decide(self):
        return self.least >= ROUTER_MARGIN

    def look(self, _module, _inputs, outputs):
        best = outputs[0].topk(self.top_k + 1, dim=-1).values
        self.least = min(self.least, (best[:, -2] - best[:, -1]).min().item())


def sensitivity(golden, tensors, cases, logits):
    """How far a wrong reading of the model would be from these logits: a golden must be able to tell."""
    def far(config, weights):
        return distance(oracle(config, weights), cases, logits)

    def changed(**changes):
        config = copy.deepcopy(golden["config"])
        config.update(changes)
        return config

    config, rope = golden["config"], golden["config"]["rope_parameters"]
    report = {"no sinks": far(config, {n: torch.full_like(t, -1e4) if n.endswith("sinks") else t for n, t in tensors.items()})}
    if "sliding_attention" in config["layer_types"]:
        report["window + 1"] = far(changed(sliding_window=config["sliding_window"] + 1), tensors)
    if rope["rope_type"] == "yarn":
        report["other rounding of YaRN's bounds"] = far(changed(rope_parameters={**rope, "truncate": not rope["truncate"]}), tensors)
        report["plain RoPE"] = far(changed(rope_parameters={"rope_type": "default", "rope_theta": rope["rope_theta"]}), tensors)
    report["no clamp"] = far(changed(swiglu_limit=1e6), tensors)
    must_tell(report)


def hf_config(config, eos, quantised, spelling):
    """`config.json` in one of the spellings."""
    config = copy.deepcopy(config)
    rope = config.pop("rope_parameters")
    out = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", **config}
    if spelling == "5":
        out.update(rope_parameters=rope, dtype="bfloat16", transformers_version="5.3.0")
    elif spelling == "4":
        theta = rope.pop("rope_theta")
        out.update(rope_theta=theta, torch_dtype="bfloat16", experts_per_token=config["num_experts_per_tok"],
                   initial_context_length=rope["original_max_position_embeddings"], rope_scaling=rope)
    elif spelling == "flat":
        out["num_experts"], out["experts_per_token"] = out.pop("num_local_experts"), out.pop("num_experts_per_tok")
        del out["layer_types"]  # alternating, a sliding layer first
        out.update(rope_theta=rope["rope_theta"], rope_scaling_factor=rope["factor"], rope_ntk_alpha=rope["beta_slow"],
                   rope_ntk_beta=rope["beta_fast"], initial_context_length=rope["original_max_position_embeddings"])
    out["eos_token_id"] = eos[0] if eos else 2
    if quantised:
        out["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}
    return out


SPELLING = {"mlx": "4", "mlx_mxfp4": "4", "mxfp4": "4", "sharded": "5", "long": "flat", "unusual": "5", "truncated": "4", "served": "4"}


def make(name):
    print(name)
    golden = GOLDENS[name]
    tensors = make_weights(golden["config"], golden["seed"], golden["norms"])
    if "mlx" in golden:
        stored, tensors, quantization = to_mlx(golden["config"], tensors, golden["mlx"], golden["seed"])
    model = oracle(golden["config"], tensors)
    cases, logits = expectations(name, model, golden, Margins(model, golden["config"]["num_experts_per_tok"]))
    sensitivity(golden, tensors, cases, logits)
    eos = golden.get("eos")
    if name == "saved":
        shutil.rmtree(f"{HERE}/{name}", ignore_errors=True)
        model.save_pretrained(f"{HERE}/{name}")
        write_expected(name, cases, logits)
        return
    if "mlx" in golden:
        config = hf_config(golden["config"], eos, False, SPELLING[name]) | quantization
        write_checkpoint(name, config, stored, eos=eos)
        write_expected(name, cases, logits)
        return
    config = hf_config(golden["config"], eos, True, SPELLING[name])
    write_checkpoint(name, config, tensors, golden.get("shards", 1), eos)
    write_expected(name, cases, logits)
    if name == "mxfp4":
        # The same weights, dense: held to the expectations of the packed ones.
        write_checkpoint("dense", hf_config(golden["config"], eos, False, "5"), dense(tensors))


if __name__ == "__main__":
    start()
    for chosen in sys.argv[1:] or GOLDENS:
        make(chosen)
