"""Text completions, tokens and the small routes."""

import openai
import pytest


@pytest.fixture(scope="module")
def client(demo):
    return demo.client()


def complete(client, prompt, **more):
    request = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
    return client.completions.create(**request)


def ids(demo, text):
    status, _, body = demo.post("/tokenize", {"model": "demo", "prompt": text, "add_special_tokens": False})
    assert status == 200, body
    return body["tokens"]


def test_prompts_of_every_shape(client, demo):
    first, second = ids(demo, "Hello there"), ids(demo, "Good morning")
    by_text = complete(client, "Hello there")
    by_ids = complete(client, first)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_ids.usage.prompt_tokens == len(first)
    for prompts in (["Hello there", "Good morning"], [first, second]):
        both = complete(client, prompts)
        assert [c.index for c in both.choices] == [0, 1]
        assert both.choices[0].text == by_text.choices[0].text
        assert both.usage.prompt_tokens == len(first) + len(second)


def test_token_ids_come_back_when_asked_for(client, demo):
    prompt = ids(demo, "Hello there")
    answer = complete(client, prompt, extra_body={"return_token_ids": True, "ignore_eos": True})
    choice = answer.choices[0].model_extra
    assert choice["prompt_token_ids"] == prompt and len(choice["token_ids"]) == 8
    _, _, body = demo.post("/detokenize", {"model": "demo", "tokens": choice["token_ids"]})
    assert body["prompt"].startswith(answer.choices[0].text[:1])


def test_echo_of_the_harness(client, demo):
    """What Context-1's harness sends: ids in, stop ids, ids out."""
    prompt = ids(demo, "Search")
    free = complete(client, prompt, max_tokens=6, extra_body={"return_token_ids": True, "ignore_eos": True})
    generated = free.choices[0].model_extra["token_ids"]
    stop = generated[3]
    answer = complete(
        client,
        prompt,
        max_tokens=6,
        extra_body={"return_token_ids": True, "ignore_eos": True, "stop_token_ids": [stop]},
    )
    got = answer.choices[0].model_extra["token_ids"]
    assert got == generated[: generated.index(stop) + 1]
    assert answer.choices[0].finish_reason == "stop"


def test_streamed_text_equals_whole_text(client):
    """OAI-16."""
    whole = complete(client, "Once", max_tokens=30, extra_body={"ignore_eos": True})
    chunks = list(complete(client, "Once", max_tokens=30, stream=True, extra_body={"ignore_eos": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text


def test_logprobs_of_a_completion(client):
    answer = complete(client, "Once", logprobs=2)
    logprobs = answer.choices[0].logprobs
    counts = {len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.text_offset)}
    assert counts == {answer.usage.completion_tokens}
    assert all(value <= 0 for value in logprobs.token_logprobs)


def test_a_client_that_sends_nonsense(client, demo):
    """OAI-07, OAI-10."""
    for prompt in ([], [[]], [10**8]):
        with pytest.raises(openai.BadRequestError):
            complete(client, prompt)
    for body in ("{", "[]", '"x"', "", "\0"):
        status, _, answer = demo.post("/v1/completions", body)
        assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}, answer


def test_tokenize_and_detokenize_are_inverse(demo):
    for text in ("Hello, world!", "naïve 日本語 👩‍👩‍👧", "  spaces\n\ttabs", "<|end|>"):
        status, _, body = demo.post("/tokenize", {"model": "demo", "prompt": text, "add_special_tokens": False})
        assert status == 200 and body["count"] == len(body["tokens"]) and body["max_model_len"] > 0
        status, _, back = demo.post("/detokenize", {"model": "demo", "tokens": body["tokens"]})
        assert (status, back["prompt"]) == (200, text)


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["demo"]
    assert models[0].model_extra["max_model_len"] > 0
    assert client.models.retrieve("demo").id == "demo"


def test_small_routes(demo):
    assert demo.get("/health")[0] == 200
    assert "version" in demo.get("/version")[2]
    status, headers, _ = demo.get("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    before = demo.metric("vllm:generation_tokens_total")
    demo.client().completions.create(model="demo", prompt="x", max_tokens=3, extra_body={"ignore_eos": True})
    demo.wait(lambda: demo.metric("vllm:generation_tokens_total") == before + 3, "tokens are counted")
    assert demo.metric("vllm:num_requests_running") == 0


def test_unknown_paths_and_methods(demo):
    """OAI-07."""
    for method, path, expected in (("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405)):
        status, _, body = demo.request(method, path)
        assert status == expected and body["error"]["type"] == "invalid_request_error"
