#!/usr/bin/env python3
"""Writes the golden checkpoints and what Hugging Face transformers computes from them.

    python3 tests/golden/make_goldens.py [NAME ...]

Each checkpoint is random from a fixed seed. The oracle is `GptOssForCausalLM`, float32, CPU, eager attention and
eager experts, with the weights dequantised here: transformers' own checkpoint loading takes no part, so that a wrong
file layout cannot hide. README.md says what each checkpoint is for and what the expected files hold.
"""
import copy
import json
import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["USE_HUB_KERNELS"] = "0"

import safetensors.torch as st
import torch
import transformers
from transformers import DynamicCache, GptOssConfig, GptOssForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
STEPS = 40  # greedy tokens per prompt
MARGIN = 0.02  # least gap between the two best logits of a greedy step
DIFFERENT = 8  # least number of different ids among the greedy ones
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


# Prompt lengths; `near` asks for logits at every position of the prompt, otherwise at a few.
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
}


def bf16(generator, *shape, std=1.0, mean=0.0):
    return (mean + std * torch.randn(*shape, generator=generator)).to(torch.bfloat16)


def expert_blocks(generator, experts, rows, cols):
    blocks = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 124, (experts, rows, cols // 32), dtype=torch.uint8, generator=generator)
    return blocks, scales


def dequantise(blocks, scales):
    """[E, out, in/32, 16] -> [E, out, in]: the low nibble is the even element."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    values = E2M1[codes] * torch.exp2(scales.float() - 127).unsqueeze(-1)
    return values.flatten(-2)


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

    def look(self, _module, _inputs, outputs):
        best = outputs[0].topk(self.top_k + 1, dim=-1).values
        self.least = min(self.least, (best[:, -2] - best[:, -1]).min().item())


def generate(model, prompt):
    """Greedy ids, and the logits each was picked from, with the KV cache."""
    cache, ids, rows = DynamicCache(config=model.config), [], []
    step = torch.tensor([prompt])
    for _ in range(STEPS):
        logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
        rows.append(logits)
        ids.append(int(logits.argmax()))
        step = torch.tensor([[ids[-1]]])
    return ids, torch.stack(rows)


def relative(a, b):
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


def try_prompt(model, margins, golden, length, seed):
    """One prompt's expectations, or None where a tie is too near for float32 to decide."""
    generator = torch.Generator().manual_seed(seed)
    # Never the end-of-turn ids, nor the tokenizer's other control tokens where one goes with the checkpoint.
    prompt = torch.randint(0, min(golden["config"]["vocab_size"], 3056), (length,), generator=generator).tolist()
    margins.least = float("inf")
    ids, rows = generate(model, prompt)
    best = rows.topk(2, dim=-1).values
    if (best[:, 0] - best[:, 1]).min() < MARGIN or len(set(ids)) < DIFFERENT or set(ids) & set(golden.get("eos", [])):
        return None
    whole = model(torch.tensor([prompt + ids[:-1]]), use_cache=False).logits[0]
    if margins.least < ROUTER_MARGIN:
        return None
    assert relative(rows, whole[length - 1:]) < 2e-5, "the oracle disagrees with itself"
    if length <= 64:
        positions = list(range(length - 1))
    else:
        positions = sorted({0, 1, 63, 127, 128, 129, length // 2, length - 2, *range(4090, min(length - 1, 4100))} & set(range(length - 1)))
    positions += range(length - 1, length - 1 + STEPS)
    print(f"  prompt of {length}, seed {seed}: router margin {margins.least:.1e}, "
          f"logit margin {(best[:, 0] - best[:, 1]).min():.3f}, {len(set(ids))} different ids")
    return {"prompt": prompt, "greedy": ids, "positions": positions}, whole[positions]


def expectations(name, model, golden):
    cases, logits, margins = [], [], Margins(model, golden["config"]["num_experts_per_tok"])
    for index, length in enumerate(golden["prompts"]):
        for attempt in range(400):
            found = try_prompt(model, margins, golden, length, 1000 * index + attempt)
            if found:
                break
        assert found, f"{name}: no prompt of {length} without near ties"
        cases.append(found[0])
        logits.append(found[1])
    return cases, logits


def sensitivity(golden, tensors, cases, logits):
    """How far a wrong reading of the model would be from these logits: a golden must be able to tell."""
    def far(config, weights):
        model = oracle(config, weights)
        case = max(range(len(cases)), key=lambda i: len(cases[i]["prompt"]))
        ids = cases[case]["prompt"] + cases[case]["greedy"][:-1]
        got = model(torch.tensor([ids]), use_cache=False).logits[0][cases[case]["positions"]]
        return relative(got, logits[case])

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
    for what, distance in report.items():
        print(f"  {what}: relative L2 {distance:.1e}")
        assert distance > 1e-3, f"{what} would go unnoticed"


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


def write_json(path, value):
    with open(path, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def write_checkpoint(name, config, tensors, shards=1, eos=None):
    target = os.path.join(HERE, name)
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target)
    write_json(f"{target}/config.json", config)
    if eos:
        write_json(f"{target}/generation_config.json", {"eos_token_id": eos, "do_sample": True})
    if shards == 1:
        st.save_file(tensors, f"{target}/model.safetensors", metadata={"format": "pt"})
    else:
        files = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(sorted(tensors))}
        for file in sorted(set(files.values())):
            st.save_file({n: t for n, t in tensors.items() if files[n] == file}, f"{target}/{file}", metadata={"format": "pt"})
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        write_json(f"{target}/model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": files})


def write_expected(name, cases, logits):
    """expected.json: prompts, ids, positions. expected.f32: the logits at those positions, little-endian, row after row."""
    with open(f"{HERE}/{name}/expected.json", "w") as file:
        json.dump({"vocab": logits[0].shape[-1], "cases": cases}, file)
        file.write("\n")
    torch.cat(logits).contiguous().numpy().astype("<f4").tofile(f"{HERE}/{name}/expected.f32")


SPELLING = {"mxfp4": "4", "sharded": "5", "long": "flat", "unusual": "5", "truncated": "4", "served": "4"}


def make(name):
    print(name)
    golden = GOLDENS[name]
    tensors = make_weights(golden["config"], golden["seed"], golden["norms"])
    model = oracle(golden["config"], tensors)
    cases, logits = expectations(name, model, golden)
    sensitivity(golden, tensors, cases, logits)
    eos = golden.get("eos")
    if name == "saved":
        shutil.rmtree(f"{HERE}/{name}", ignore_errors=True)
        model.save_pretrained(f"{HERE}/{name}")
        write_expected(name, cases, logits)
        return
    config = hf_config(golden["config"], eos, True, SPELLING[name])
    write_checkpoint(name, config, tensors, golden.get("shards", 1), eos)
    write_expected(name, cases, logits)
    if name == "mxfp4":
        # The same weights, dense: held to the expectations of the packed ones.
        write_checkpoint("dense", hf_config(golden["config"], eos, False, "5"), dense(tensors))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for chosen in sys.argv[1:] or GOLDENS:
        make(chosen)
