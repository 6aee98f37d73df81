"""What the scripts that make goldens have in common: prompts that float32 can decide, and the files."""
import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["USE_HUB_KERNELS"] = "0"

import safetensors.torch as st
import torch
import transformers
from transformers import DynamicCache

HERE = os.path.dirname(os.path.abspath(__file__))
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
STEPS = 40  # greedy tokens per prompt
MARGIN = 0.02  # least gap between the two best logits of a greedy step
DIFFERENT = 8  # least number of different ids among the greedy ones


def bf16(generator, *shape, std=1.0, mean=0.0):
    return (mean + std * torch.randn(*shape, generator=generator)).to(torch.bfloat16)


def e2m1(codes):
    """[.., in / 2] bytes -> [.., in]: the low nibble is the even element."""
    return E2M1[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()]


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


def try_prompt(model, golden, length, seed, margins):
    """One prompt's expectations, or None where a tie is too near for float32 to decide."""
    generator = torch.Generator().manual_seed(seed)
    # Never the end-of-turn ids, nor the tokenizer's other control tokens where one goes with the checkpoint.
    prompt = torch.randint(0, golden.get("texts", min(golden["config"]["vocab_size"], 3056)), (length,), generator=generator).tolist()
    if margins:
        margins.least = float("inf")
    ids, rows = generate(model, prompt)
    best = rows.topk(2, dim=-1).values
    if (best[:, 0] - best[:, 1]).min() < MARGIN or len(set(ids)) < DIFFERENT or set(ids) & set(golden.get("eos", [])):
        return None
    whole = model(torch.tensor([prompt + ids[:-1]]), use_cache=False).logits[0]
    if margins and not margins.decide():
        return None
    assert relative(rows, whole[length - 1:]) < 2e-5, "the oracle disagrees with itself"
    if length <= 64:
        positions = list(range(length - 1))
    else:
        positions = sorted({0, 1, 63, 127, 128, 129, length // 2, length - 2, *range(4090, min(length - 1, 4100))} & set(range(length - 1)))
    positions += range(length - 1, length - 1 + STEPS)
    # A vocabulary of thousands makes large files.
    positions = positions[::golden.get("every", 1)]
    router = f"router margin {margins.least:.1e}, " if margins else ""
    print(f"  prompt of {length}, seed {seed}: {router}logit margin {(best[:, 0] - best[:, 1]).min():.3f}, {len(set(ids))} different ids")
    return {"prompt": prompt, "greedy": ids, "positions": positions}, whole[positions]


def expectations(name, model, golden, margins=None):
    """Prompts of the golden's lengths, with what the model makes of them. `margins` watches the routers of one that has them."""
    cases, logits = [], []
    for index, length in enumerate(golden["prompts"]):
        for attempt in range(400):
            found = try_prompt(model, golden, length, 1000 * index + attempt, margins)
            if found:
                break
        assert found, f"{name}: no prompt of {length} without near ties"
        cases.append(found[0])
        logits.append(found[1])
    return cases, logits


def distance(model, cases, logits):
    """How far the longest case of another model is from these logits."""
    case = max(range(len(cases)), key=lambda i: len(cases[i]["prompt"]))
    ids = cases[case]["prompt"] + cases[case]["greedy"][:-1]
    got = model(torch.tensor([ids]), use_cache=False).logits[0][cases[case]["positions"]]
    return relative(got, logits[case])


def must_tell(report):
    """A golden must be able to tell wrong readings of the model."""
    for what, far in report.items():
        print(f"  {what}: relative L2 {far:.1e}")
        assert far > 1e-3, f"{what} would go unnoticed"


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


def start():
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
