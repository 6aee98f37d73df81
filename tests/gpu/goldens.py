#!/usr/bin/env python3
"""Holds the CUDA backend against the goldens' float32 logits: goldens.py DUMP_LOGITS [GOLDEN_DIR]

The goldens with MXFP4 experts. Prints the relative L2 distance and how many greedy tokens agree. There is no bfloat16 run beside these goldens: the bound is that of
bfloat16 weights and activations in so few layers.
"""
import json
import os
import subprocess
import sys
import tempfile

import numpy

LIMIT = 3e-2


def main():
    binary = sys.argv[1]
    root = sys.argv[2] if len(sys.argv) > 2 else os.path.join(os.path.dirname(__file__), "..", "golden")
    good = True
    for name in ("mxfp4", "sharded", "unusual", "truncated", "served", "long"):
        with open(os.path.join(root, name, "expected.json")) as file:
            known = json.load(file)
        logits = numpy.fromfile(os.path.join(root, name, "expected.f32"), dtype=numpy.float32).reshape(-1, known["vocab"])
        sequences, rows = [], 0
        for case in known["cases"]:
            sequences.append({"tokens": (case["prompt"] + case["greedy"])[:-1], "from": len(case["prompt"])})
        for flags in ([], ["--chunk", "64"], ["--kv", "fp8"]):
            with tempfile.TemporaryDirectory() as folder:
                prompts, output = os.path.join(folder, "in"), os.path.join(folder, "out")
                with open(prompts, "w") as file:
                    json.dump(sequences, file)
                command = [binary, "--model", os.path.join(root, name), "--input", prompts, "--output", output, *flags]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{name} {flags}: {done.stderr.strip()[-300:]}")
                    good = False
                    continue
                found = numpy.fromfile(output, dtype=numpy.float32).reshape(-1, known["vocab"])
            worst, same, count, at, expected_at = 0.0, 0, 0, 0, 0
            for case in known["cases"]:
                mine = found[at:at + len(case["greedy"])]
                at += len(case["greedy"])
                same += int((mine.argmax(axis=1) == numpy.array(case["greedy"])).sum())
                count += len(case["greedy"])
                for position in case["positions"]:
                    row = logits[expected_at]
                    expected_at += 1
                    step = position + 1 - len(case["prompt"])
                    if step >= 0:
                        worst = max(worst, float(numpy.linalg.norm(mine[step] - row) / numpy.linalg.norm(row)))
            held = worst <= LIMIT or "fp8" in flags
            good &= held and same > 0.9 * count
            print(f"{name} {' '.join(flags) or 'alone'}: worst relative L2 {worst:.3e}, {same} of {count} greedy ids equal"
                  f"{'' if held else '  <-- FAILED'}")
    print("goldens: passed" if good else "goldens: FAILED")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
