#!/usr/bin/env python3
"""Holds the logits of the CUDA backend against transformers in float32.

    exact.py CHECKPOINT DUMP_LOGITS [--kv bf16 fp8] [--lengths 1 17 129 1000] [--decode 8] [--batch 64]

The yardstick is transformers' own bfloat16 run of the same prompts: the relative L2 distance to float32 may be a tenth
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
from transformers import AutoModelForCausalLM


def references(path, sequences):
    """Logits of transformers in float32 and in bfloat16."""
    extra = {}
    with open(os.path.join(path, "config.json")) as file:
        if "quantization_config" in json.load(file):
            from transformers import Mxfp4Config

            extra["quantization_config"] = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="eager", device_map="cuda", **extra).eval()

    def run():
        rows = []
        with torch.no_grad():
            for sequence in sequences:
                ids = torch.tensor([sequence["tokens"]], device="cuda")
                logits = model(ids, logits_to_keep=len(sequence["tokens"]) - sequence["from"] + 1).logits[0]
                rows.append(logits.float().cpu().numpy())
        return numpy.concatenate(rows)

    rounded = run()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
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
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with open(os.path.join(options.checkpoint, "config.json")) as file:
        vocab = json.load(file)["vocab_size"]
    random = numpy.random.default_rng(options.seed)
    sequences = [{"tokens": random.integers(0, vocab, n + options.decode).tolist(), "from": n} for n in options.lengths]
    exact, rounded = references(options.checkpoint, sequences)
    bound = distances(rounded, exact)
    print(f"transformers bf16: mean {bound.mean():.3e}, worst {bound.max():.3e} over {len(exact)} rows")
    top = numpy.partition(exact, -2, axis=1)[:, -2:]
    decided = (top[:, 1] - top[:, 0]) > 2 * numpy.abs(rounded - exact).max(axis=1)
    good = True
    alone = {}
    for kv in options.kv:
        for name, flags in (("alone", []), ("chunks of 100", ["--chunk", "100"]), ("together", ["--batch", str(len(sequences))])):
            rows = ours(options.binary, options.checkpoint, sequences, vocab, "--kv", kv, *flags)
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
        crowd.insert(options.batch // 2, sequences[2])
        rows = ours(options.binary, options.checkpoint, crowd, vocab, "--kv", kv, "--batch", str(options.batch))
        first = sum(len(s["tokens"]) - s["from"] + 1 for s in crowd[:options.batch // 2])
        count = options.decode + 1
        mine = alone[kv][2 * count:3 * count]
        print(f"{kv} KV, in a batch of {options.batch}: worst {distances(rows[first:first + count], mine).max():.3e} from alone")
    print("exact: passed" if good else "exact: FAILED")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
