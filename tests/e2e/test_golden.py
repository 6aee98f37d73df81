"""A checkpoint from disk: the reference's greedy ids, alone and among strangers."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import DEMO_TOKENIZER, GOLDEN, MLX, QWEN, QWEN_TOKENIZER
from server import Server, run


def cases(golden):
    return json.loads((golden / "expected.json").read_text())["cases"]


CASES = cases(GOLDEN)


def greedy(client, prompt, count, **more):
    answer = client.completions.create(
        model="golden",
        prompt=prompt,
        max_tokens=count,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
        **more,
    )
    return answer.choices[0].model_extra["token_ids"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['prompt'])} tokens")
def test_greedy_ids_are_the_reference_s(golden, case):
    assert greedy(golden.client(), case["prompt"], len(case["greedy"])) == case["greedy"]


@pytest.mark.parametrize("case", cases(QWEN), ids=lambda case: f"{len(case['prompt'])} tokens")
def test_those_of_qwen3_in_nvfp4_too(qwen, case):
    assert greedy(qwen.client(), case["prompt"], len(case["greedy"])) == case["greedy"]


def test_qwen3_speaks_hermes_unless_told_otherwise(qwen):
    assert any("hermes" in line for line in qwen.log), qwen.log
    answer = qwen.client().chat.completions.create(
        model="golden",
        messages=[{"role": "user", "content": "where is it?"}],
        max_tokens=8,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    # `<|im_start|>`, as the tokenizer of these tests numbers it, opens the question and the answer.
    assert answer.model_extra["prompt_token_ids"].count(641) == 2
    assert answer.usage.completion_tokens == 8 and answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("case", cases(MLX), ids=lambda case: f"{len(case['prompt'])} tokens")
def test_those_of_an_mlx_checkpoint_too(mlx, case):
    assert greedy(mlx.client(), case["prompt"], len(case["greedy"])) == case["greedy"]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_whatever_the_prefill_chunk(chunk):
    with Server(
        GOLDEN, "--tokenizer", DEMO_TOKENIZER, "--served-model-name", "golden", "--max-num-batched-tokens", chunk
    ) as server:
        for case in CASES:
            assert greedy(server.client(), case["prompt"], 12) == case["greedy"][:12]


@pytest.mark.parametrize("name", ["golden", "qwen"])
def test_among_sixteen_strangers(name, request):
    """OPS-27: on the CPU."""
    client = request.getfixturevalue(name).client()
    path = {"golden": GOLDEN, "qwen": QWEN}[name]
    vocabulary, known = json.loads((path / "expected.json").read_text())["vocab"], cases(path)

    def stranger(k):
        prompt = [(k * 131 + i * 17) % (vocabulary - 100) for i in range(20 + 11 * k)]
        return client.completions.create(
            model="golden", prompt=prompt, max_tokens=60, temperature=1.0, seed=k, extra_body={"ignore_eos": True}
        )

    with ThreadPoolExecutor(24) as pool:
        strangers = [pool.submit(stranger, k) for k in range(16)]
        mine = [pool.submit(greedy, client, case["prompt"], 40) for case in known for _ in range(4)]
        got = [future.result() for future in mine]
        assert all(future.result().usage.completion_tokens == 60 for future in strangers)
    assert got == [case["greedy"] for case in known for _ in range(4)]


def test_its_files_name_the_end_of_a_turn(golden):
    """The server stops on the ids of generation_config.json."""
    stop = json.loads((GOLDEN / "generation_config.json").read_text())["eos_token_id"][0]
    answer = golden.client().completions.create(
        model="golden",
        prompt=CASES[0]["prompt"],
        max_tokens=5,
        temperature=0,
        logit_bias={str(stop): 100},
        extra_body={"return_token_ids": True},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra["token_ids"] == [stop]


def test_int8_serves_too():
    with Server(
        GOLDEN, "--tokenizer", DEMO_TOKENIZER, "--served-model-name", "golden", "--cpu-precision", "int8"
    ) as server:
        assert len(greedy(server.client(), CASES[0]["prompt"], 10)) == 10


def test_activations_are_quantised_on_request():
    """Rounded inputs give other logits, and after a while other tokens."""
    with Server(
        QWEN, "--tokenizer", QWEN_TOKENIZER, "--served-model-name", "golden", "--activation-quant", "nvfp4"
    ) as server:
        answers = [greedy(server.client(), case["prompt"], len(case["greedy"])) for case in cases(QWEN)]
        assert "NVFP4 activations" in "".join(server.log)
    assert all(len(answer) == len(case["greedy"]) for answer, case in zip(answers, cases(QWEN)))
    assert answers != [case["greedy"] for case in cases(QWEN)]


def test_activations_of_other_weights_are_not():
    done = run("serve", GOLDEN, "--tokenizer", DEMO_TOKENIZER, "--port", 0, "--activation-quant", "nvfp4")
    assert done.returncode != 0 and "stored as mxfp4" in done.stderr, done.stderr
