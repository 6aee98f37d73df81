"""Scripted answers through the whole server: tools, reasoning, and what models write when they err."""

import json

import pytest

from harmony import CALL, END, RETURN, SEQUENCES, analysis, call, final, text, then
from server import Replay, parse

ASK = [{"role": "user", "content": "Look it up."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Searches.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        },
    }
]


def whole(client, **more):
    answer = client.chat.completions.create(model="replay", messages=ASK, tools=TOOLS, **more)
    message = answer.choices[0].message
    return {
        "content": message.content,
        "reasoning": message.model_extra.get("reasoning_content"),
        "tool_calls": [(c.function.name, c.function.arguments) for c in message.tool_calls or []],
        "finish_reason": answer.choices[0].finish_reason,
    }, answer


def streamed(client, **more):
    got = {"content": None, "reasoning": None, "tool_calls": [], "finish_reason": None}
    seen_ids = set()
    for chunk in client.chat.completions.create(model="replay", messages=ASK, tools=TOOLS, stream=True, **more):
        choice = chunk.choices[0]
        delta = choice.delta
        if delta.content:
            got["content"] = (got["content"] or "") + delta.content
        extra = delta.model_extra or {}
        assert extra.get("reasoning") == extra.get("reasoning_content")
        if extra.get("reasoning_content"):
            got["reasoning"] = (got["reasoning"] or "") + extra["reasoning_content"]
        for piece in delta.tool_calls or []:
            if piece.index == len(got["tool_calls"]):
                assert piece.id and piece.type == "function" and piece.function.name
                assert piece.id not in seen_ids
                seen_ids.add(piece.id)
                got["tool_calls"].append((piece.function.name, ""))
            else:
                assert piece.index == len(got["tool_calls"]) - 1 and piece.id is None and piece.function.name is None
            name, arguments = got["tool_calls"][piece.index]
            got["tool_calls"][piece.index] = (name, arguments + (piece.function.arguments or ""))
        if choice.finish_reason:
            assert got["finish_reason"] is None, "one finish reason per choice"
            got["finish_reason"] = choice.finish_reason
    return got


def blank_is_none(message):
    return {**message, "content": message["content"] or None, "reasoning": message["reasoning"] or None}


@pytest.fixture(scope="module")
def odd():
    """Every sequence twice: once for a whole answer, once for a stream."""
    answers = [answer for answer in SEQUENCES.values() for _ in range(2)]
    with Replay(answers) as server:
        yield server


def test_every_sequence_reads_alike_whole_streamed_and_parsed(odd):
    """HAR-01, HAR-02, HAR-04, HAR-10, OAI-01, OAI-02, OAI-03."""
    client = odd.client()
    parsed = parse(list(SEQUENCES.values()))
    for name, expected in zip(SEQUENCES, parsed, strict=True):
        expected = blank_is_none(
            {
                "content": expected["content"],
                "reasoning": expected["reasoning"],
                "tool_calls": [(c["name"], c["arguments"]) for c in expected["tool_calls"]],
                "finish_reason": expected["finish_reason"],
            }
        )
        got, _ = whole(client)
        assert blank_is_none(got) == expected, name
        assert blank_is_none(streamed(client)) == expected, name


def test_no_markup_is_shown(odd):
    """HAR-03."""
    for name, message in zip(SEQUENCES, parse(list(SEQUENCES.values())), strict=True):
        if name != "markup spelled as text":
            assert "<|" not in json.dumps(message), (name, message)


def test_recoveries_are_counted(odd):
    """HAR-05."""
    assert odd.metric("ctxserve:parser_recoveries_total") > 0


def test_recoveries_are_logged_with_their_ids_at_debug_level():
    """HAR-05."""
    odd_answer = [text("no header"), RETURN]
    for level, logged in (("debug", True), ("info", False)):
        with Replay([odd_answer], "--log-level", level) as server:
            whole(server.client())
            server.stop()
            lines = [line for line in server.log if "recovered" in line]
            assert bool(lines) == logged and all("ids=" in line for line in lines), server.log


def test_a_tool_loop():
    """OAI-03, OAI-13, OAI-19: with openai-python."""
    script = [analysis("I must look.") + call("search", '{"query": "x"}'), final("Found.")]
    with Replay(script, "--served-model-name", "m") as server:
        client = server.client()
        first = client.chat.completions.create(model="m", messages=ASK, tools=TOOLS)
        message = first.choices[0].message
        assert first.choices[0].finish_reason == "tool_calls"
        assert message.model_extra["reasoning"] == message.model_extra["reasoning_content"] == "I must look."
        assert json.loads(message.tool_calls[0].function.arguments) == {"query": "x"}
        history = [
            *ASK,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "a result"},
        ]
        second = client.chat.completions.create(model="m", messages=history, tools=TOOLS)
        assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("Found.", "stop")


def test_parallel_calls_and_their_limit():
    """HAR-09."""
    both = call("search", '{"query": "a"}', end=END) + then(call("search", '{"query": "b"}'))
    with Replay([both]) as server:
        client = server.client()
        got, answer = whole(client)
        assert [arguments for _, arguments in got["tool_calls"]] == ['{"query": "a"}', '{"query": "b"}']
        assert len({c.id for c in answer.choices[0].message.tool_calls}) == 2
        one, _ = whole(client, parallel_tool_calls=False)
        assert [arguments for _, arguments in one["tool_calls"]] == ['{"query": "a"}']


def test_tool_choice_none_leaves_no_calls():
    with Replay([call("search", '{"query": "a"}')]) as server:
        got, _ = whole(server.client(), tool_choice="none")
        # The header of a call is not legal then, whatever the model wants to say.
        assert got["tool_calls"] == [] and got["finish_reason"] in ("stop", "length")
        assert "search" not in json.dumps(got) or got["reasoning"]


def test_stop_strings_see_content_only():
    """OAI-12."""
    script = [analysis("STOP here? no") + final("one STOP two")]
    with Replay(script) as server:
        got, _ = whole(server.client(), stop=["STOP"])
        assert (got["content"], got["reasoning"], got["finish_reason"]) == ("one ", "STOP here? no", "stop")
        assert streamed(server.client(), stop=["STOP"])["content"] == "one "


def test_usage_counts_reasoning_and_the_stop_token():
    """OAI-06."""
    with Replay([analysis("think") + final("answer")]) as server:
        _, answer = whole(server.client())
        usage = answer.usage
        assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_max_tokens_cuts_a_script():
    with Replay([final("a long answer that is cut somewhere")]) as server:
        got, answer = whole(server.client(), max_tokens=5)
        assert got["finish_reason"] == "length" and answer.usage.completion_tokens == 5


def test_choices_take_their_lines_in_order():
    with Replay([final("a"), final("b"), final("c")]) as server:
        answer = server.client().chat.completions.create(model="replay", messages=ASK, n=3)
        assert [c.message.content for c in answer.choices] == ["a", "b", "c"]


def test_completions_show_the_raw_text():
    with Replay([[text("plain "), text("text"), RETURN]]) as server:
        answer = server.client().completions.create(model="replay", prompt="x", max_tokens=50)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("plain text", "stop")


def test_token_ids_in_a_script():
    done = parse([{"token_ids": [1, 2, 3]}])
    with Replay([{"token_ids": [1, 2, 3]}]) as server:
        got, _ = whole(server.client())
        assert got["finish_reason"] == done[0]["finish_reason"] == "length"
        assert (got["content"] or None) == (done[0]["content"] or None)


def test_a_call_without_a_stop_token_is_cut():
    """OAI-03."""
    with Replay([call("search", '{"query": "x', end=None), call("search", "{}", end=CALL)]) as server:
        client = server.client()
        assert whole(client)[0]["finish_reason"] == "length"
        assert whole(client)[0]["finish_reason"] == "tool_calls"
