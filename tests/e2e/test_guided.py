"""Constrained decoding end to end: models with random weights, and scripts, under grammars, through the openai package."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from conftest import DEMO_TOKENIZER, QWEN_TOKENIZER
from harmony import analysis, call, final, then
from server import Replay

ASK = [{"role": "user", "content": "Plan a trip."}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
FLAGS = {
    "type": "object",
    "properties": {"flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    "required": ["flags"],
    "additionalProperties": False,
}
VERDICT = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


def tools(strict):
    schemas = {"get_weather": WEATHER, "set_flags": FLAGS}
    return [
        {"type": "function", "function": {"name": name, "description": "d", "parameters": schema, "strict": strict}}
        for name, schema in schemas.items()
    ]


def ids(path):
    return {token["content"]: token["id"] for token in json.loads(path.read_text())["added_tokens"]}


HARMONY, HERMES = ids(DEMO_TOKENIZER), ids(QWEN_TOKENIZER)

# A model with random weights hardly ever ends its reasoning by itself. The bias does not reach what a mask forbids.
BIAS = {
    "golden": {str(HARMONY["<|end|>"]): 9},
    "qwen": {str(HERMES["</think>"]): 7, str(HERMES["<|im_end|>"]): 3},
}


def check(tool_call):
    arguments = json.loads(tool_call.function.arguments)
    if tool_call.function.name == "get_weather":
        assert set(arguments) == {"city", "days", "unit"}, arguments
        assert len(arguments["city"]) <= 6 and arguments["days"] in range(1, 10) and arguments["unit"] in "CF"
    else:
        assert tool_call.function.name == "set_flags" and set(arguments) == {"flags"}, tool_call
        assert len(arguments["flags"]) <= 3 and all(isinstance(flag, bool) for flag in arguments["flags"])


def ask(server, name, **more):
    return server.client().chat.completions.create(
        model="golden", messages=ASK, temperature=1.0, max_tokens=400, logit_bias=BIAS[name], **more
    )


@pytest.fixture(params=["golden", "qwen"])
def model(request):
    return request.param, request.getfixturevalue(request.param)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "set_flags"}}])
def test_forced_calls_of_random_weights_are_valid_every_time(model, choice):
    """HAR-11."""
    name, server = model
    whole = 0
    for seed in range(3):
        for answer in ask(server, name, tools=tools(False), tool_choice=choice, n=8, seed=seed * 100).choices:
            calls = answer.message.tool_calls or []
            if answer.finish_reason == "length":
                continue
            whole += 1
            assert answer.finish_reason == "tool_calls" and calls, answer
            for tool_call in calls:
                check(tool_call)
            if isinstance(choice, dict):
                assert [c.function.name for c in calls] == ["set_flags"]
    assert whole > 8, f"only {whole} of 24 came to an end"


def test_strict_functions_and_a_schema_in_one_request(model):
    """HAR-12, HAR-13, HAR-14, HER-05."""
    name, server = model
    answer_format = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": VERDICT}}
    answers = ask(server, name, tools=tools(True), response_format=answer_format, n=20, seed=1).choices
    kinds = {"tool_calls": 0, "stop": 0, "length": 0}
    for answer in answers:
        kinds[answer.finish_reason] += 1
        if answer.finish_reason == "tool_calls":
            for tool_call in answer.message.tool_calls:
                check(tool_call)
        elif answer.finish_reason == "stop":
            verdict = json.loads(answer.message.content)
            assert isinstance(verdict["ok"], bool) and verdict["n"] in range(100) and len(verdict) == 2
    assert kinds["stop"] + kinds["tool_calls"] > 8, kinds


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[a-f]{3}-[0-9]{2}"}, "[a-f]{3}-[0-9]{2}"),
        ({"choice": ["red", "dark green"]}, "red|dark green"),
        ({"grammar": 'start: "<" inner ">"\ninner: "a" | "b" inner'}, "<b*a>"),
        ({"json": {"enum": ["one", 2]}}, r'\s{0,8}("one"|2)\s{0,8}'),
        ({"json_object": True}, r"(?s)\s{0,8}\{.*\}\s{0,8}"),
    ],
)
def test_structured_outputs(model, constraint, pattern):
    """HAR-13: the text for the user alone is constrained, streamed or not."""
    name, server = model
    more = {"extra_body": {"structured_outputs": constraint}, "seed": 3}
    for answer in ask(server, name, n=6, **more).choices:
        if answer.finish_reason == "stop":
            assert re.fullmatch(pattern, answer.message.content), answer.message
    if "json_object" in constraint:
        return
    parts, reason = [], None
    for chunk in ask(server, name, stream=True, **more):
        parts.append(chunk.choices[0].delta.content or "")
        reason = chunk.choices[0].finish_reason or reason
    if reason == "stop":
        assert re.fullmatch(pattern, "".join(parts))


def test_completions_take_constraints_too(golden):
    answer = golden.client().completions.create(
        model="golden",
        prompt="Answer:",
        max_tokens=100,
        temperature=1.0,
        n=8,
        extra_body={"structured_outputs": {"regex": "[0-9]{2}:[0-9]{2}"}},
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and re.fullmatch("[0-9]{2}:[0-9]{2}", choice.text), choice


def test_constrained_and_free_requests_share_steps(golden):
    """Greedy text is what it is alone, whoever decodes beside it under a grammar."""
    def greedy():
        answer = golden.client().completions.create(
            model="golden", prompt="Once", max_tokens=60, temperature=0, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    alone = greedy()

    with ThreadPoolExecutor(6) as pool:
        guided = [
            pool.submit(ask, golden, "golden", tools=tools(False), tool_choice="required", seed=i) for i in range(4)
        ]
        assert {future.result() for future in [pool.submit(greedy) for _ in range(3)]} == {alone}
        for future in guided:
            for tool_call in future.result().choices[0].message.tool_calls or []:
                check(tool_call)


def test_a_model_that_does_as_it_is_told_is_not_changed():
    """HAR-11: analysis and preamble come through as they were."""
    script = [analysis("I must look.") + call("get_weather", '{"city": "Bern", "days": 2, "unit": "C"}')]
    with Replay(script) as server:
        answer = server.client().chat.completions.create(
            model="replay", messages=ASK, tools=tools(True), tool_choice="required"
        )
    message = answer.choices[0].message
    assert message.model_extra["reasoning_content"] == "I must look."
    assert message.tool_calls[0].function.arguments == '{"city": "Bern", "days": 2, "unit": "C"}'
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_format_leaves_tools_callable():
    """HAR-14."""
    verdict = final('{"ok": true, "n": 7}')
    wants_tool = analysis("A tool.") + call("set_flags", '{"flags": [true]}')
    answer_format = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT}}
    with Replay([analysis("Easy.") + verdict, wants_tool]) as server:
        client = server.client()
        got = [
            client.chat.completions.create(
                model="replay", messages=ASK, tools=tools(False), response_format=answer_format
            ).choices[0]
            for _ in range(2)
        ]
    assert json.loads(got[0].message.content) == {"ok": True, "n": 7} and got[0].finish_reason == "stop"
    assert got[1].message.tool_calls[0].function.arguments == '{"flags": [true]}'


def test_what_a_script_wants_to_say_otherwise_is_not_said():
    """HAR-12: an undeclared function and bad arguments cannot be sampled."""
    wrong = [call("rm", '{"path": "/"}'), call("set_flags", '{"flags": 7}'), then(final("no"))]
    with Replay(wrong) as server:
        for _ in wrong:
            answer = server.client().chat.completions.create(
                model="replay", messages=ASK, tools=tools(True), max_tokens=80
            )
            for tool_call in answer.choices[0].message.tool_calls or []:
                assert tool_call.function.name in {"get_weather", "set_flags"}
                if answer.choices[0].finish_reason == "tool_calls":
                    check(tool_call)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": tools(False), "tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs.regex"),
        ({"extra_body": {"structured_outputs": {"regex": "(" * 30_000}}}, "structured_outputs.regex"),
        ({"extra_body": {"structured_outputs": {"choice": []}}}, "structured_outputs.choice"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "int"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": 5}}}]},
            "tools[0].function.parameters",
        ),
    ],
)
def test_bad_constraints_are_the_client_s_error(golden, fields, param):
    """OPS-17: a 400 that names the field, and the server goes on."""
    with pytest.raises(openai.BadRequestError) as error:
        golden.client().chat.completions.create(model="golden", messages=ASK, max_tokens=5, **fields)
    assert error.value.body["param"] == param
    assert golden.get("/health")[0] == 200


def test_hostile_grammars_stall_nobody(golden):
    """OPS-17 and the security matrix: slow or huge grammars cost their own request only."""
    hostile = [
        {"regex": "((a{0,99}){0,99}){0,99}"},
        {"regex": "(.*a){40}"},
        {"json": {"enum": [f"member {i}" for i in range(8000)]}},
        {"grammar": "start: start start | \"x\""},
        {"json": {"allOf": [{"$ref": "#"}]}},
    ]
    for constraint in hostile:
        status, _, body = golden.post(
            "/v1/chat/completions",
            {"model": "golden", "messages": ASK, "max_tokens": 20, "structured_outputs": constraint},
            timeout=60,
        )
        assert status in (200, 400), (status, body)
    answer = golden.client().completions.create(model="golden", prompt="a", max_tokens=3)
    assert answer.choices[0].finish_reason in ("length", "stop")
