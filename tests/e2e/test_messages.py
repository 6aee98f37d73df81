"""Anthropic's Messages API, driven by the anthropic package."""

import asyncio
import json

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

import hermes
from harmony import SEQUENCES, analysis, call, final
from server import Replay, Server

ASK = [{"role": "user", "content": "Look it up."}]
SEARCH = {
    "name": "search",
    "description": "Searches.",
    "input_schema": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
}


def connect(server, api_key="none", **more):
    return Anthropic(base_url=server.url, api_key=api_key, max_retries=0, timeout=120, **more)


def create(client, messages=ASK, model="replay", max_tokens=1024, **more):
    return client.messages.create(model=model, max_tokens=max_tokens, messages=messages, **more)


def stream(client, messages=ASK, model="replay", max_tokens=1024, **more):
    """The same through the SDK's own gathering of a stream."""
    with client.messages.stream(model=model, max_tokens=max_tokens, messages=messages, **more) as events:
        for _ in events:
            pass
        return events.get_final_message()


def settled(message):
    """What two answers of one content have in common."""
    blocks = [block.to_dict() for block in message.content]
    for block in blocks:
        if block["type"] == "tool_use":
            assert block.pop("id")
        block.pop("parsed_output", None)
    usage = message.usage.to_dict()
    # The second of them finds the first one's prompt.
    usage["input_tokens"] += usage.pop("cache_read_input_tokens")
    return blocks, message.stop_reason, message.stop_sequence, usage


def test_whole_and_streamed_answers_agree_on_whatever_models_write():
    """OAI-02 for this API: every sequence survives both ways with one content."""
    with Replay([answer for answer in SEQUENCES.values() for _ in range(2)]) as server:
        client = connect(server)
        for name in SEQUENCES:
            whole, streamed = create(client, tools=[SEARCH]), stream(client, tools=[SEARCH])
            assert settled(whole) == settled(streamed), name
            assert whole.type == "message" and whole.role == "assistant" and whole.model == "replay"
            shown = json.dumps([block.to_dict() for block in whole.content])
            if name != "markup spelled as text":
                assert "<|" not in shown, name


def test_text_thinking_and_calls_have_their_blocks():
    answer = analysis("I need to look.") + call("search", '{"query": "paris", "n": 1.50}')
    with Replay([answer, answer, final("Paris.")]) as server:
        client = connect(server)
        for message in (create(client, tools=[SEARCH]), stream(client, tools=[SEARCH])):
            thinking, use = message.content
            assert thinking.type == "thinking" and thinking.thinking == "I need to look." and thinking.signature
            assert use.type == "tool_use" and use.name == "search" and use.input == {"query": "paris", "n": 1.5}
            assert message.stop_reason == "tool_use" and message.usage.output_tokens_details.thinking_tokens > 0
        message = create(client)
        assert [block.text for block in message.content] == ["Paris."] and message.stop_reason == "end_turn"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["harmony", "hermes"])
def test_a_tool_loop_of_twenty_turns(streaming, form):
    """Every turn's blocks go back as they came, with the result, and each prompt holds the one before it."""
    if form == "harmony":
        turns = [analysis(f"Step {n}.") + call("search", json.dumps({"query": f"q{n}"})) for n in range(20)]
        turns, flags = [*turns, final("Found.")], []
    else:
        turns = [hermes.answer(f"Step {n}.", hermes.call("search", {"query": f"q{n}"})) for n in range(20)]
        turns, flags = [*turns, hermes.answer("Found.")], hermes.FLAGS
    with Replay(turns, *flags, "--max-model-len", "16k") as server:
        client = connect(server)
        ask = stream if streaming else create
        messages = list(ASK)
        prompts, ids = [], set()
        for n in range(20):
            message = ask(client, messages, tools=[SEARCH], system="Use the tool.")
            counted = client.messages.count_tokens(
                model="replay", messages=messages, tools=[SEARCH], system="Use the tool."
            )
            prompts.append(message.usage.input_tokens + message.usage.cache_read_input_tokens)
            assert counted.input_tokens == prompts[-1]
            assert message.stop_reason == "tool_use"
            use = message.content[-1]
            assert use.input == {"query": f"q{n}"} and use.id not in ids
            ids.add(use.id)
            result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": f"nothing {n}"}]}
            messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        message = ask(client, messages, tools=[SEARCH], system="Use the tool.")
        assert message.content[-1].text == "Found." and message.stop_reason == "end_turn"
        assert prompts == sorted(set(prompts))


def test_the_sdks_own_tool_runner():
    turns = [call("weather", '{"city": "Oslo"}'), final("Cold.")]
    with Replay(turns) as server:
        asked = []

        @anthropic.beta_tool
        def weather(city: str) -> str:
            """Says the weather of a city."""
            asked.append(city)
            return "-3"

        runner = connect(server).beta.messages.tool_runner(
            model="replay", max_tokens=512, messages=ASK, tools=[weather]
        )
        last = runner.until_done()
        assert asked == ["Oslo"] and last.content[-1].text == "Cold."


def test_arguments_that_are_no_json_are_not_lost():
    broken = call("search", "query: a")
    whole = call("search", '{"query": "one two three"}')
    with Replay([broken, broken, broken, whole, final("ok"), call("search", '{"query": "ha', end=None)]) as server:
        client = connect(server)
        eager = {**SEARCH, "eager_input_streaming": True}
        for ask in (create, stream):
            message = ask(client, tools=[SEARCH])
            assert message.content[0].input == {"INVALID_JSON": "query: a"}
        for expected in ("query: a", '{"query": "one two three"}'):
            events = create(client, tools=[eager], stream=True)
            parts = [event.delta.partial_json for event in events if event.type == "content_block_delta"]
            assert "".join(parts) == expected
        assert len(parts) > 1, "an eager tool's arguments come as they are written"
        back = [
            *ASK,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": message.content[0].id, "is_error": True}]},
        ]
        assert create(client, back, tools=[SEARCH]).content[0].text == "ok"
        cut = create(client, tools=[SEARCH])
        assert cut.content[0].input == {"INVALID_JSON": '{"query": "ha'}


def test_stop_sequences_and_limits():
    with Replay([final("one two three")] * 4) as server:
        client = connect(server)
        for ask in (create, stream):
            message = ask(client, stop_sequences=["zzz", " three"])
            assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " three")
            assert message.content[0].text == "one two"
        for ask in (create, stream):
            message = ask(client, max_tokens=4)
            assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 4


def test_forced_tools_and_structured_outputs_hold_on_random_weights(qwen):
    """What is asked for is all that the model can say."""
    client = connect(qwen)
    schema = {
        "type": "object",
        "properties": {"query": {"enum": ["a", "b"]}, "deep": {"type": "boolean"}},
        "required": ["query", "deep"],
        "additionalProperties": False,
    }
    tool = {"name": "find", "description": "d", "input_schema": schema, "strict": True}
    more = {"model": "golden", "max_tokens": 400, "thinking": {"type": "disabled"}}

    def finished(**asked):
        """An answer that is not cut: thinking is free, and random weights may think to the limit."""
        for _ in range(8):
            message = create(client, **more, **asked)
            if message.stop_reason != "max_tokens":
                return message
        pytest.skip("the random weights thought to the limit eight times")

    for choice in ({"type": "any"}, {"type": "tool", "name": "find"}):
        message = finished(tools=[tool], tool_choice={**choice, "disable_parallel_tool_use": True})
        uses = [block for block in message.content if block.type == "tool_use"]
        assert len(uses) == 1 and uses[0].name == "find" and message.stop_reason == "tool_use"
        assert uses[0].input["query"] in ("a", "b") and isinstance(uses[0].input["deep"], bool)
    message = finished(output_config={"format": {"type": "json_schema", "schema": schema}})
    found = json.loads("".join(block.text for block in message.content if block.type == "text"))
    assert found["query"] in ("a", "b") and isinstance(found["deep"], bool)


def test_errors_are_the_sdks():
    with Server("--model", "demo", "--api-key", "secret", "--max-model-len", "2048") as server:
        client = connect(server, api_key="secret")
        assert create(client, model="demo", max_tokens=1).usage.output_tokens == 1
        bearer = Anthropic(base_url=server.url, auth_token="secret", max_retries=0)
        assert create(bearer, model="demo", max_tokens=1).stop_reason == "max_tokens"

        with pytest.raises(anthropic.AuthenticationError) as caught:
            create(connect(server, api_key="wrong"), model="demo")
        assert caught.value.body["error"]["type"] == "authentication_error"
        assert caught.value.request_id == caught.value.body["request_id"]
        with pytest.raises(anthropic.NotFoundError, match="claude-sonnet"):
            create(client, model="claude-sonnet")
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 2048 maximum"):
            create(client, [{"role": "user", "content": "word " * 4000}], model="demo")
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
        with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]"):
            create(client, [{"role": "user", "content": [image]}], model="demo")
        with pytest.raises(anthropic.BadRequestError, match="last message"):
            create(client, [*ASK, {"role": "assistant", "content": "The answer is ("}], model="demo")
        large = [{"role": "user", "content": "x" * (33 << 20)}]
        with pytest.raises(anthropic.APIStatusError) as caught:
            create(client, large, model="demo")
        assert caught.value.status_code == 413 and caught.value.body["error"]["type"] == "request_too_large"
        assert create(client, model="demo", max_tokens=1), "the server goes on"


def test_a_full_queue_is_a_rate_limit():
    with Server("--model", "demo", "--max-num-seqs", 1, "--max-num-queued-reqs", 1, "--max-model-len", "16k") as server:
        body = {"model": "demo", "prompt": "x", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
        running = [server.open_stream("/v1/completions", body) for _ in range(2)]
        with pytest.raises(anthropic.RateLimitError) as caught:
            create(connect(server), model="demo")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for connection, _ in running:
            connection.close()


def test_a_stream_that_is_closed_stops_the_model():
    """OPS-13 for this API."""
    pieces = final("x y " * 4000)
    with Replay([pieces, pieces], "--max-model-len", "32k") as server:
        with connect(server).messages.stream(model="replay", max_tokens=20_000, messages=ASK) as events:
            assert next(iter(events.text_stream))
        server.wait(lambda: server.metric("vllm:num_requests_running") == 0, "the request ends")


def test_the_asynchronous_client():
    async def ask(url):
        client = AsyncAnthropic(base_url=url, api_key="none", max_retries=0)
        async with client.messages.stream(model="replay", max_tokens=64, messages=ASK) as events:
            return [part async for part in events.text_stream], await events.get_final_message()

    with Replay([final("one two three")]) as server:
        parts, message = asyncio.run(ask(server.url))
        assert "".join(parts) == message.content[0].text == "one two three"


def test_requests_as_claude_code_sends_them():
    """Blocks with cache marks, a billing line, service tools, a beta query, thinking that comes back."""
    turns = [analysis("Read it.") + call("Read", '{"file_path": "/a.py"}'), final("Done.")]
    with Replay(turns) as server:
        mark = {"cache_control": {"type": "ephemeral"}}
        body = {
            "model": "replay",
            "max_tokens": 32_000,
            "stream": True,
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1f2e;"},
                {"type": "text", "text": "You are a coding agent.", **mark},
            ],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "<system-reminder>x</system-reminder>"}, {"type": "text", "text": "Read a.py", **mark}]}],
            "tools": [
                {"name": "Read", "description": "Reads.", "input_schema": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": {"file_path": {"type": "string"}}, "required": ["file_path"], "additionalProperties": False}},
                {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
            ],
            "metadata": {"user_id": "user_1"},
            "thinking": {"type": "enabled", "budget_tokens": 31_999},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        }
        headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14", "x-api-key": "none"}
        connection_headers = {"Content-Type": "application/json", **headers}
        status, got, raw = server.request("POST", "/v1/messages?beta=true", body, headers=connection_headers)
        assert status == 200 and got["content-type"] == "text/event-stream" and got["request-id"]
        events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: ")]
        names = [line[7:] for line in raw.splitlines() if line.startswith("event: ")]
        assert names == [event["type"] for event in events]
        assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
        assert "[DONE]" not in raw
        blocks = [e["content_block"] for e in events if e["type"] == "content_block_start"]
        assert [block["type"] for block in blocks] == ["thinking", "tool_use"]
        signature = next(e["delta"]["signature"] for e in events if e.get("delta", {}).get("type") == "signature_delta")
        back = [
            {"type": "thinking", "thinking": "Read it.", "signature": signature},
            {"type": "tool_use", "id": blocks[1]["id"], "name": "Read", "input": {"file_path": "/a.py"}},
        ]
        result = {"type": "tool_result", "tool_use_id": blocks[1]["id"], "content": "print(1)", "is_error": False, **mark}
        body["messages"] += [{"role": "assistant", "content": back}, {"role": "user", "content": [result]}]
        status, _, raw = server.request("POST", "/v1/messages?beta=true", body, headers=connection_headers)
        said = [json.loads(line[6:]) for line in raw.splitlines() if '"text_delta"' in line]
        assert status == 200 and "".join(event["delta"]["text"] for event in said) == "Done."
        assert any("skipped a tool" in line for line in server.log)
