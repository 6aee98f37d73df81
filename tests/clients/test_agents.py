"""OpenAI's Agents SDK with all that it asks of `/v1/responses`, against a scripted model."""

import asyncio
import json

import agents
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from harmony import analysis, call, final
from server import Replay

TURNS = 20


class Found(BaseModel):
    found: str


async def run(server, stream, structured, store):
    asked = []

    @agents.function_tool
    def search(query: str) -> str:
        """Searches."""
        asked.append(query)
        return f"result for {query}"

    agent = agents.Agent(
        name="searcher",
        instructions="You search.",
        # One of them is run elsewhere.
        tools=[search, agents.WebSearchTool()],
        model=agents.OpenAIResponsesModel("replay", AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)),
        output_type=Found if structured else None,
        model_settings=agents.ModelSettings(
            store=store, response_include=["reasoning.encrypted_content"], top_logprobs=1, truncation="auto", metadata={"a": "b"}
        ),
    )
    if stream:
        result = agents.Runner.run_streamed(agent, "Find it.", max_turns=TURNS + 2)
        async for _ in result.stream_events():
            pass
    else:
        result = await agents.Runner.run(agent, "Find it.", max_turns=TURNS + 2)
    # What the SDK makes of it goes back as the next conversation's beginning.
    again = await agents.Runner.run(agent, result.to_input_list() + [{"role": "user", "content": "Again."}], max_turns=TURNS + 2)
    return result, again, asked


@pytest.mark.parametrize("stream, structured, store", [(True, False, False), (True, True, True), (False, True, False)])
def test_an_agent_finishes_loops_of_twenty_turns(stream, structured, store):
    """RSP-01, RSP-05, RSP-09, HAR-14: streamed and not, with a schema for the answer beside the tools on each turn."""
    script = [analysis(f"Thought {n}.") + call("search", json.dumps({"query": f"q{n}"})) for n in range(TURNS)]
    end = json.dumps({"found": "it"}) if structured else "Found it."
    with Replay([*script, analysis("Enough.") + final(end)], "--max-model-len", "131072") as server:
        result, again, asked = asyncio.run(run(server, stream, structured, store))
    assert result.final_output == again.final_output == (Found(found="it") if structured else "Found it.")
    assert asked == [f"q{n}" for n in range(TURNS)] * 2
    assert len(result.raw_responses) == TURNS + 1
