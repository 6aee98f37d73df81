"""Python clients, retries and telemetry off: the tool loop streamed and whole, with a restart in it, and errors that their users see."""

import asyncio
import json

import pytest
from openai import AsyncOpenAI, OpenAI

from scenario import TOO_LONG, TOOL, TURNS, Loop, full, is_too_long, told

KEY = "none"


def client(url, kind=OpenAI):
    return kind(base_url=url, api_key=KEY, max_retries=0, timeout=120)


class ChatSdk:
    """openai-python, chat completions."""

    def ask(self, url, prompt):
        client(url).chat.completions.create(model="m", messages=[{"role": "user", "content": prompt}], max_tokens=5)

    def loop(self, url, search, stream):
        sdk, messages = client(url), [{"role": "user", "content": "Search."}]
        tools = [{"type": "function", "function": TOOL}]
        for _ in range(TURNS + 1):
            asked = {"model": "m", "messages": messages, "tools": tools}
            if stream:
                with sdk.chat.completions.stream(**asked) as events:
                    for _ in events:
                        pass
                    message = events.get_final_completion().choices[0].message
            else:
                message = sdk.chat.completions.create(**asked).choices[0].message
            if not message.tool_calls:
                return message.content
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                found = search(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": found})


class ResponsesSdk:
    """openai-python, responses that go on from the one before."""

    def ask(self, url, prompt):
        client(url).responses.create(model="m", input=prompt, max_output_tokens=5)

    def loop(self, url, search, stream):
        sdk, items = client(url), [{"role": "user", "content": "Search."}]
        for _ in range(TURNS + 1):
            asked = {"model": "m", "input": items, "tools": [{"type": "function", "strict": False, **TOOL}], "store": False}
            if stream:
                with sdk.responses.stream(**asked) as events:
                    for _ in events:
                        pass
                    response = events.get_final_response()
            else:
                response = sdk.responses.create(**asked)
            items = [*items, *(item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in response.output)]
            calls = [item for item in response.output if item.type == "function_call"]
            if not calls:
                return response.output_text
            for call in calls:
                found = search(**json.loads(call.arguments))
                items.append({"type": "function_call_output", "call_id": call.call_id, "output": found})


class AgentsSdk:
    """OpenAI Agents SDK."""

    def __init__(self, model):
        self.model = model

    def agent(self, url, tools):
        import agents

        agents.set_tracing_disabled(True)
        model = getattr(agents, self.model)(model="m", openai_client=client(url, AsyncOpenAI))
        settings = agents.ModelSettings(max_tokens=200)
        return agents.Agent(name="a", instructions="Search.", model=model, tools=tools, model_settings=settings)

    def ask(self, url, prompt):
        from agents import Runner

        Runner.run_sync(self.agent(url, []), prompt)

    def loop(self, url, search, stream):
        from agents import Runner, function_tool

        def look(query: str) -> str:
            """Searches."""
            return search(query)

        agent = self.agent(url, [function_tool(look, name_override="search", strict_mode=False)])
        if not stream:
            return Runner.run_sync(agent, "Search.", max_turns=TURNS + 1).final_output

        async def streamed():
            result = Runner.run_streamed(agent, "Search.", max_turns=TURNS + 1)
            async for _ in result.stream_events():
                pass
            return result.final_output

        return asyncio.run(streamed())


class LangChain:
    """langchain-openai."""

    def __init__(self, responses):
        self.responses = responses

    def model(self, url):
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(
            base_url=url, api_key=KEY, model="m", max_retries=0, use_responses_api=self.responses, max_tokens=200
        )

    def ask(self, url, prompt):
        self.model(url).invoke(prompt)

    def loop(self, url, search, stream):
        from langchain_core.messages import HumanMessage, ToolMessage

        model, messages = self.model(url).bind_tools([{"type": "function", "function": TOOL}]), [HumanMessage("Search.")]
        for _ in range(TURNS + 1):
            if stream:
                answer = None
                for chunk in model.stream(messages):
                    answer = chunk if answer is None else answer + chunk
            else:
                answer = model.invoke(messages)
            messages.append(answer)
            assert not answer.invalid_tool_calls
            if not answer.tool_calls:
                return answer.text if isinstance(answer.text, str) else answer.text()
            for call in answer.tool_calls:
                messages.append(ToolMessage(search(**call["args"]), tool_call_id=call["id"]))


class LiteLlm:
    """LiteLLM's client."""

    def complete(self, url, messages, **more):
        import litellm

        litellm.telemetry = False
        return litellm.completion(
            model="openai/m", messages=messages, api_base=url, api_key=KEY, num_retries=0, max_retries=0, max_tokens=200, **more
        )

    def ask(self, url, prompt):
        self.complete(url, [{"role": "user", "content": prompt}])

    def loop(self, url, search, stream):
        import litellm

        messages, tools = [{"role": "user", "content": "Search."}], [{"type": "function", "function": TOOL}]
        for _ in range(TURNS + 1):
            answer = self.complete(url, messages, tools=tools, stream=stream)
            if stream:
                answer = litellm.stream_chunk_builder(list(answer), messages=messages)
            message = answer.choices[0].message
            assert message.tool_calls is None or message.reasoning_content
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                return message.content
            for call in message.tool_calls:
                found = search(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": found})


CLIENTS = {
    "openai-python chat": ChatSdk(),
    "openai-python responses": ResponsesSdk(),
    "agents chat": AgentsSdk("OpenAIChatCompletionsModel"),
    "agents responses": AgentsSdk("OpenAIResponsesModel"),
    "langchain chat": LangChain(False),
    "langchain responses": LangChain(True),
    "litellm": LiteLlm(),
}


@pytest.fixture(params=CLIENTS)
def tried(request):
    return CLIENTS[request.param]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_tool_loop_of_twenty_turns(tried, stream):
    """OAI-19, OAI-01, OAI-03, HAR-04, RSP-01: with odd headers among the calls, and a restart of the server after ten."""
    with Loop(restart_at=10) as loop:
        loop.check(tried.loop(loop.url, loop.search, stream))


def test_a_prompt_that_is_too_long(tried):
    """OAI-08, OAI-19: the code and the words that clients look for reach their users."""
    with Loop() as loop, pytest.raises(Exception) as raised:
        tried.ask(loop.url, TOO_LONG)
    assert is_too_long(raised.value), told(raised.value)


def test_a_full_queue(tried):
    """OPS-16, OAI-19."""
    with full() as url, pytest.raises(Exception) as raised:
        tried.ask(url, "Hello")
    assert "RateLimit" in told(raised.value), told(raised.value)


def test_there_are_as_many_as_are_meant():
    assert len(CLIENTS) == 7
