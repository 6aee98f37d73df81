"""Thirty cases, five for each of six tools, as gpt-oss's own compatibility test has them: a tool is called with arguments that fit
its schema, and reasoning comes with it. Here a script makes the calls, so what is tested is the way from the model to the agent."""

import asyncio
import json
import pathlib

import agents
import jsonschema
import pytest
from openai import AsyncOpenAI

from harmony import analysis, call, final
from server import Replay

DATA = json.loads((pathlib.Path(__file__).parent / "compatibility.json").read_text("utf-8"))
CASES = DATA["cases"]
ANSWER = "That is all."


def tools(calls):
    def tool(name, one):
        async def invoke(_, arguments):
            calls.append((name, arguments))
            return f"{name} has run"

        return agents.FunctionTool(
            name=name, description=one["description"], params_json_schema=one["parameters"], on_invoke_tool=invoke, strict_json_schema=False
        )

    return [tool(name, one) for name, one in DATA["tools"].items()]


async def ask(client, kind, question, stream):
    calls = []
    agent = agents.Agent(name="a", instructions="Use your tools.", model=kind(model="m", openai_client=client), tools=tools(calls))
    if stream:
        result = agents.Runner.run_streamed(agent, question, max_turns=10)
        async for _ in result.stream_events():
            pass
    else:
        result = await agents.Runner.run(agent, question, max_turns=10)
    return calls, result


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", [agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel], ids=["chat", "responses"])
def test_every_case(kind, stream):
    """OAI-02, OAI-13, OAI-19, RSP-01: each call arrives as it was written, once, with its reasoning."""
    agents.set_tracing_disabled(True)
    script = [part for name, _, arguments in CASES for part in (analysis("I need a tool.") + call(name, arguments), final(ANSWER))]

    async def all_of_them(url):
        client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        return [await ask(client, kind, question, stream) for _, question, _ in CASES]

    with Replay(script, "--served-model-name", "m") as server:
        results = asyncio.run(all_of_them(f"{server.url}/v1"))
    ran = 0
    for (name, question, arguments), (calls, result) in zip(CASES, results, strict=True):
        (called, got), = calls
        assert called == name and (got == arguments or not arguments.strip("{} \n")), (question, got)
        jsonschema.validate(json.loads(got or "{}"), DATA["tools"][name]["parameters"])
        assert result.final_output == ANSWER
        items = [item for item in result.new_items if item.type == "reasoning_item"]
        assert items, question
        ran += 1
    assert ran == 30
