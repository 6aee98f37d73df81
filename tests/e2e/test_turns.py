"""Histories that repeat the server's own turns: the prompt repeats the ids that the model generated."""

import pytest

import harmony
import hermes
from server import Replay

TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
THOUGHTS = ["I must look.", "Once more, né.", "Now I know."]
ARGUMENTS = ['{"query":"a", "top":1}', '{ "query": "日本" }']


def odd(segments):
    """The same text, every character a token of its own, as no tokenizer would cut it."""
    cut = []
    for segment in segments:
        cut += [{"text": c} for c in segment["text"]] if "text" in segment else [segment]
    return cut


def harmony_answers():
    calls = [harmony.analysis(t) + harmony.call("search", a) for t, a in zip(THOUGHTS, ARGUMENTS)]
    return [*calls, harmony.analysis(THOUGHTS[2]) + harmony.final("It is there.")]


def hermes_answers():
    def thinking(text):
        return [hermes.control("<think>"), hermes.text(f"\n{text}\n"), hermes.control("</think>"), hermes.text("\n\n")]

    def call(arguments):
        return [hermes.CALL, hermes.text(f'\n{{"name": "search", "arguments": {arguments}}}\n'), hermes.CALL_END, hermes.END]

    calls = [thinking(t) + call(a) for t, a in zip(THOUGHTS, ARGUMENTS)]
    return [*calls, [*thinking(THOUGHTS[2]), hermes.text("It is there."), hermes.END]]


TEMPLATE = hermes.TOKENIZER.parent / "templates" / "thinking.jinja"
FORMATS = {
    "harmony": (harmony_answers(), []),
    "hermes": (hermes_answers(), [*hermes.FLAGS, "--chat-template", TEMPLATE]),
}


def ask(client, messages, stream):
    """Prompt ids, answer ids, and the message as openai-python holds it."""
    fields = {"model": "replay", "messages": messages, "tools": TOOLS, "extra_body": {"return_token_ids": True}}
    if not stream:
        answer = client.chat.completions.create(**fields)
        return answer.prompt_token_ids, answer.choices[0].token_ids, answer.choices[0].message.model_dump(exclude_none=True)
    prompt, ids, message = None, [], {"role": "assistant", "content": "", "tool_calls": []}
    for chunk in client.chat.completions.create(**fields, stream=True):
        prompt = prompt or chunk.prompt_token_ids
        choice = chunk.choices[0]
        ids += getattr(choice, "token_ids", None) or []
        message["content"] += choice.delta.content or ""
        for piece in choice.delta.tool_calls or []:
            if piece.id:
                message["tool_calls"].append({"id": piece.id, "type": "function", "function": {"name": piece.function.name, "arguments": ""}})
            message["tool_calls"][-1]["function"]["arguments"] += piece.function.arguments or ""
    return prompt, ids, {key: value for key, value in message.items() if value}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("keeps", ["all", "calls"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_loop_goes_on_token_for_token(name, keeps, stream):
    """HAR-07, HAR-15: in a tool loop each prompt begins with the one before and its answer, whatever the client keeps."""
    answers, flags = FORMATS[name]
    with Replay([odd(answer) for answer in answers], *flags) as server:
        client = server.client()
        messages, before = [{"role": "user", "content": "Where?"}], []
        for step in range(3):
            prompt, ids, message = ask(client, messages, stream)
            assert prompt[: len(before)] == before
            assert len(prompt) > len(before)
            before = prompt + ids
            if keeps == "calls":
                message = {key: message[key] for key in ("role", "content", "tool_calls") if key in message}
            messages.append(message)
            for call in message.get("tool_calls", []):
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": f"result {step}"})
        assert messages[-1]["content"] == "It is there."
        assert server.metric("ctxserve:history_turns_total") == 3
        _, _, text = server.get("/metrics")
        assert 'form="canonical"} 0' in text and 'form="replayed"} 3' in text


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_of_a_turn_leaks_to_another_key(name):
    """HAR-07: ids of calls that one key was told mean nothing to another; changed calls mean nothing to anyone."""
    answers, flags = FORMATS[name]
    with Replay([odd(answer) for answer in answers], *flags, "--api-key", "one", "two") as server:
        start = [{"role": "user", "content": "Where?"}]
        prompt, ids, message = ask(server.client("one"), start, False)
        kept = {key: message[key] for key in ("role", "tool_calls")}
        call = kept["tool_calls"][0]

        def history(arguments):
            changed = {**call, "function": {**call["function"], "arguments": arguments}}
            turn = {**kept, "tool_calls": [changed]}
            return [*start, turn, {"role": "tool", "tool_call_id": call["id"], "content": "result"}]

        def counted(key, messages):
            headers = {"Authorization": f"Bearer {key}"}
            status, _, body = server.post("/tokenize", {"messages": messages, "tools": TOOLS}, headers=headers)
            assert status == 200, body
            return body["tokens"]

        same, other = history(call["function"]["arguments"]), history('{"query": "b"}')
        assert counted("one", same)[: len(prompt + ids)] == prompt + ids
        foreign = counted("two", same)
        assert foreign[: len(prompt + ids)] != prompt + ids
        for key, messages in [("two", same), ("two", other), ("one", other)]:
            tokens = {"tokens": counted(key, messages)}
            text = server.post("/detokenize", tokens, headers={"Authorization": "Bearer one"})[2]["prompt"]
            assert "search" in text and THOUGHTS[0] not in text
