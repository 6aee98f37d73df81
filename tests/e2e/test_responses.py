"""`/v1/responses` through OpenAI's own client: shapes, streams, tool loops, what is stored."""

import json

import openai
import pytest
from pydantic import BaseModel

from harmony import analysis, call, final, text as segment, then, CHANNEL, END, MESSAGE
from server import Replay, Server

SEARCH = {
    "type": "function",
    "name": "search",
    "description": "Searches.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    "strict": False,
}
# What coding agents list beside their functions.
OTHERS = [{"type": "web_search"}, {"type": "local_shell"}, {"type": "custom", "name": "apply_patch"}]
SEALED = ["reasoning.encrypted_content"]


def consume(stream):
    """The final response of a raw stream. RSP-02, RSP-03, RSP-04: numbers without gaps, one added and one done event an item, ids alike."""
    added, done, last = {}, {}, None
    for number, event in enumerate(stream):
        assert event.sequence_number == number, event
        if event.type == "response.output_item.added":
            assert event.output_index == len(added)
            added[event.output_index] = event.item.id
        elif event.type == "response.output_item.done":
            done[event.output_index] = event.item
        elif hasattr(event, "item_id"):
            assert event.item_id == added[event.output_index]
        last = event
    assert last.type in ("response.completed", "response.incomplete", "response.failed")
    assert [item.id for item in last.response.output] == list(added.values())
    assert last.response.output == [done[index] for index in sorted(added)]
    return last.response


def test_a_whole_answer_has_the_sdks_types():
    with Replay([analysis("The capital.") + final("Paris.")]) as server:
        response = server.client().responses.create(model="replay", input="Capital of France?", include=SEALED)
        assert (response.object, response.status, response.output_text) == ("response", "completed", "Paris.")
        reasoning, message = response.output
        assert (reasoning.type, reasoning.content[0].type, reasoning.content[0].text) == ("reasoning", "reasoning_text", "The capital.")
        assert reasoning.encrypted_content and reasoning.summary == []
        assert (message.role, message.status, message.content[0].annotations) == ("assistant", "completed", [])
        usage = response.usage
        assert usage.input_tokens_details.cached_tokens >= 0
        assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_a_stream_adds_up():
    """RSP-02, RSP-03, RSP-04: also a preamble before a call, and the SDK's own accumulation."""
    preamble = [CHANNEL, segment("commentary"), MESSAGE, segment("Let me see."), END]
    answer = analysis("I need to look.") + preamble + then(call("search", '{"query": "x"}'))
    with Replay([answer, analysis("Hm.") + final("Grüße 🦀")]) as server:
        client = server.client()
        response = consume(client.responses.create(model="replay", input="hi", tools=[SEARCH], stream=True))
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        assert response.output[1].phase == "commentary"
        assert json.loads(response.output[2].arguments) == {"query": "x"}
        with client.responses.stream(model="replay", input="hi") as stream:
            said = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            assert said == stream.get_final_response().output_text == "Grüße 🦀"


def turns(count):
    answers = [analysis(f"Thought {n}.") + call("search", json.dumps({"query": f"q{n}"})) for n in range(count)]
    return [*answers, analysis("Enough.") + final("Found it.")]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_tool_loop_of_twenty_turns(stored, stream):
    """RSP-01: as agents do it, with what is stored here or with everything sent again, sealed reasoning included. RSP-07, RSP-09."""
    with Replay(turns(20), "--max-model-len", "65536") as server:
        client = server.client()
        added = [{"role": "user", "content": "Find it."}]
        history, previous, counts = [], None, []
        for turn in range(21):
            asked = {"model": "replay", "tools": [SEARCH, *OTHERS], "instructions": "You search.", "include": SEALED}
            if stored:
                asked |= {"input": added, "previous_response_id": previous}
            else:
                asked |= {"input": history + added, "store": False}
            response = client.responses.create(**asked, stream=True) if stream else client.responses.create(**asked)
            response = consume(response) if stream else response
            assert response.status == "completed"
            counts.append(response.usage.input_tokens)
            history += added + [item.model_dump(exclude_none=True) for item in response.output]
            # As Codex replays reasoning: what is sealed, without the text.
            for item in history:
                if item.get("type") == "reasoning":
                    item.pop("content", None)
            calls = [item for item in response.output if item.type == "function_call"]
            assert len(calls) == (turn < 20)
            previous = response.id
            added = [{"type": "function_call_output", "call_id": c.call_id, "output": f"result {turn}"} for c in calls]
        assert response.output_text == "Found it."
        assert counts == sorted(set(counts)), "each turn's prompt holds the earlier ones"


def test_structured_answers_parse():
    class City(BaseModel):
        name: str
        country: str

    with Server("--model", "demo") as server:
        response = server.client().responses.parse(
            model="demo", input="Name a city.", text_format=City, max_output_tokens=400, temperature=0
        )
        if response.status == "completed":
            assert isinstance(response.output_parsed, City)
        else:
            assert response.incomplete_details.reason == "max_output_tokens"


def test_what_is_stored_comes_back_and_goes():
    """RSP-07, RSP-08: retrieve, list, continue, delete; an unknown response is a 404."""
    with Replay([analysis("a") + final("one"), final("two")]) as server:
        client = server.client()
        first = client.responses.create(model="replay", input="hi", instructions="Old.", metadata={"k": "v"})
        assert client.responses.retrieve(first.id) == first
        items = client.responses.input_items.list(first.id)
        assert [item.content[0].text for item in items] == ["hi"]
        second = client.responses.create(model="replay", input="more", previous_response_id=first.id)
        assert second.previous_response_id == first.id and second.instructions is None
        assert second.usage.input_tokens > first.usage.input_tokens
        client.responses.delete(first.id)
        for gone in (first.id, "resp_none"):
            with pytest.raises(openai.NotFoundError) as caught:
                client.responses.retrieve(gone)
            with pytest.raises(openai.NotFoundError) as caught:
                client.responses.create(model="replay", input="more", previous_response_id=gone)
            assert caught.value.param == "previous_response_id"
        counted = client.responses.input_tokens.count(model="replay", input="more", previous_response_id=second.id)
        assert counted.input_tokens > second.usage.input_tokens
        unkept = client.responses.create(model="replay", input="hi", store=False)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(unkept.id)
        with pytest.raises(openai.BadRequestError):
            client.responses.cancel(second.id)


def test_a_background_response_is_polled_followed_and_cancelled():
    long = final("word " * 4000)
    with Replay([final("done"), long, final("streamed"), long], "--max-model-len", "32768") as server:
        client = server.client()
        response = client.responses.create(model="replay", input="hi", background=True)
        assert response.status in ("queued", "in_progress")
        server.wait(lambda: client.responses.retrieve(response.id).status == "completed", "the response")
        assert client.responses.retrieve(response.id).output_text == "done"
        running = client.responses.create(model="replay", input="hi", background=True)
        cancelled = client.responses.cancel(running.id)
        assert cancelled.status in ("cancelled", "completed")
        assert client.responses.cancel(running.id) == cancelled
        events = list(client.responses.create(model="replay", input="hi", background=True, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[1].type == "response.queued" and events[-1].response.output_text == "streamed"
        again = list(client.responses.retrieve(events[0].response.id, stream=True, starting_after=2))
        assert again == events[3:]
        # A listener that leaves ends nothing.
        stream = client.responses.create(model="replay", input="hi", background=True, stream=True)
        left = next(iter(stream)).response.id
        stream.close()
        server.wait(lambda: client.responses.retrieve(left).status == "completed", "the response")


def test_another_keys_responses_do_not_exist():
    with Replay([final("mine")], "--api-key", "one", "two") as server:
        mine, other = server.client(api_key="one"), server.client(api_key="two")
        response = mine.responses.create(model="replay", input="hi")
        item = response.output[0].id
        for attempt in (
            lambda: other.responses.retrieve(response.id),
            lambda: other.responses.delete(response.id),
            lambda: other.responses.cancel(response.id),
            lambda: other.responses.input_items.list(response.id),
            lambda: other.responses.create(model="replay", input="x", previous_response_id=response.id),
            lambda: other.responses.create(model="replay", input=[{"type": "item_reference", "id": item}]),
        ):
            with pytest.raises(openai.NotFoundError):
                attempt()
        assert mine.responses.retrieve(response.id) == response
        assert mine.responses.create(model="replay", input=[{"type": "item_reference", "id": item}]).status == "completed"
