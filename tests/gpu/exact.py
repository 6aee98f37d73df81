#!/usr/bin/env python3
"""Holds the logits of the CUDA backend against transformers in float32.

    exact.py CHECKPOINT DUMP_LOGITS [--kv bf16 fp8] [--lengths 1 17 129 1000] [--decode 8] [--batch 64]

The checkpoint may be a gpt-oss in MXFP4 or BF16, or a dense model in NVFP4 (ModelOpt's) or BF16. The yardstick is transformers' own bfloat16 run of the same prompts: the relative L2 distance to float32 may be a tenth
larger, and the greedy token must agree wherever the margin of the float32 logits exceeds twice the bfloat16 error. The same sequences are also computed
together in one batch, and in small chunks. Needs torch, transformers and a GPU; prints every figure.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nvfp4(path, config, device):
    """A model with what ModelOpt's NVFP4 stands for, in float32, and all else as it is stored."""
    del config.quantization_config
    state = {}
    for name in sorted(name for name in os.listdir(path) if name.endswith(".safetensors")):
        state.update(load_file(os.path.join(path, name)))
    for name in [name for name in state if name.endswith(".weight_scale")]:
        weight = name[:-len("_scale")]
        codes, scales = state[weight].to(device), state.pop(name).to(device).float()
        values = E2M1.to(device)[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()].unflatten(-1, (-1, 16))
        state[weight] = (values * scales.unsqueeze(-1)).flatten(-2) * state.pop(name + "_2").to(device)
        state.pop(weight[:-len("weight")] + "input_scale", None)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict({name: tensor.to(device).float() for name, tensor in state.items()}, strict=True)
    return model.eval()


def opened(path, device):
    """The model with the weights that the checkpoint stands for: bfloat16, or float32 where those are not all exact in bfloat16."""
    extra = {}
    with open(os.path.join(path, "config.json")) as file:
        quantised = json.load(file).get("quantization_config")
    if quantised and quantised.get("quant_method") == "modelopt":
        return nvfp4(path, AutoConfig.from_pretrained(path), device)
    if quantised:
        from transformers import Mxfp4Config

        extra["quantization_config"] = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager", device_map=None if device == "cpu" else device, **extra).eval()


def references(path, sequences, device):
    """Logits of transformers in float32 and in bfloat16."""
    model = opened(path, device)

    def run():
        rows = []
        with torch.no_grad():
            for sequence in sequences:
                ids = torch.tensor([sequence["tokens"]], device=device)
                logits = model(ids, logits_to_keep=len(sequence["tokens"]) - sequence["from"] + 1).logits[0]
                rows.append(logits.float().cpu().numpy())
        return numpy.concatenate(rows)

    def turn(dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)

    if next(model.parameters()).dtype == torch.float32:
        exact = run()
        turn(torch.bfloat16)
        rounded = run()
    else:
        rounded = run()
        turn(torch.float32)
        exact = run()
    del model
    torch.cuda.empty_cache()
    return exact, rounded


def ours(binary, path, sequences, vocab, *flags):
    with tempfile.TemporaryDirectory() as folder:
        prompts, output = os.path.join(folder, "in.json"), os.path.join(folder, "out.f32")
        with open(prompts, "w") as file:
            json.dump(sequences, file)
        command = [binary, "--model", path, "--input", prompts, "--output", output, *flags]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return numpy.fromfile(output, dtype=numpy.float32).reshape(-1, vocab)


def distances(rows, exact):
    exact = exact.astype(numpy.float64)
    return numpy.linalg.norm(rows - exact, axis=1) / numpy.linalg.norm(exact, axis=1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("binary")
    parser.add_argument("--kv", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1, 17, 129, 1000, 2500])
    parser.add_argument("--decode", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda", help="of transformers, and of dump-logits")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with open(os.path.join(options.checkpoint, "config.json")) as file:
        vocab = json.load(file)["vocab_size"]
    random = numpy.random.default_rng(options.seed)
    sequences = [{"tokens": random.integers(0, vocab, n + options.decode).tolist(), "from": n} for n in options.lengths]
    exact, rounded = references(options.checkpoint, sequences, options.device)
    bound = distances(rounded, exact)
    print(f"transformers bf16: mean {bound.mean():.3e}, worst {bound.max():.3e} over {len(exact)} rows")
    top = numpy.partition(exact, -2, axis=1)[:, -2:]
    decided = (top[:, 1] - top[:, 0]) > 2 * numpy.abs(rounded - exact).max(axis=1)
    good = True
    alone = {}
    probe = min(2, len(sequences) - 1)
    for kv in options.kv:
        for name, flags in (("alone", []), ("chunks of 100", ["--chunk", "100"]), ("together", ["--batch", str(len(sequences))])):
            rows = ours(options.binary, options.checkpoint, sequences, vocab, "--device", options.device, "--kv", kv, *flags)
            found = distances(rows, exact)
            wrong = int((rows.argmax(axis=1) != exact.argmax(axis=1))[decided].sum())
            held = kv != "bf16" or (found.mean() <= 1.1 * bound.mean() and wrong == 0)
            good &= held and bool(numpy.isfinite(rows).all())
            print(f"{kv} KV, {name}: mean {found.mean():.3e} ({found.mean() / bound.mean():.2f} of bf16's), worst {found.max():.3e}, "
                  f"{wrong} of {int(decided.sum())} decided greedy tokens differ{'' if held else '  <-- FAILED'}")
            alone.setdefault(kv, rows)
            print(f"    against alone: worst {distances(rows, alone[kv]).max():.3e}")
        # One sequence among many others.
        crowd = [{"tokens": random.integers(0, vocab, 40 + 3 * i).tolist(), "from": 33 + 3 * i} for i in range(options.batch - 1)]
        crowd.insert(options.batch // 2, sequences[probe])
        rows = ours(options.binary, options.checkpoint, crowd, vocab, "--device", options.device, "--kv", kv, "--batch", str(options.batch))
        first = sum(len(s["tokens"]) - s["from"] + 1 for s in crowd[:options.batch // 2])
        count = options.decode + 1
        mine = alone[kv][probe * count:(probe + 1) * count]
        print(f"{kv} KV, in a batch of {options.batch}: worst {distances(rows[first:first + count], mine).max():.3e} from alone")
    print("exact: passed" if good else "exact: FAILED")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
