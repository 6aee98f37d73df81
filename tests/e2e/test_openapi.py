"""What the server says of its API is true of its answers: whole, streamed and refused."""

import json

import jsonschema
import pytest

from harmony import SEQUENCES
from server import Replay

ASK = [{"role": "user", "content": "Look it up."}]
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"

CHATS = [
    {},
    {"tools": TOOLS},
    {"n": 2, "logprobs": True, "top_logprobs": 2},
    {"return_token_ids": True, "max_tokens": 5},
    {"stop": ["e", "a"], "include_reasoning": False},
    {"model": "replay", "tool_choice": "none", "tools": TOOLS, "parallel_tool_calls": False},
    {"stop_token_ids": [70]},
]
TEXTS = [
    {"prompt": "a"},
    {"prompt": ["a", "b"], "logprobs": 2, "max_tokens": 40},
    {"prompt": [[70, 71], [72]], "echo": True, "return_token_ids": True, "stop": "e"},
    {"prompt": [70, 71], "n": 2, "stop_token_ids": [70]},
]
# Path, body, status.
REFUSED = [
    (CHAT, {}, 400),
    (CHAT, {"messages": ASK, "temperature": 9}, 400),
    (CHAT, {"messages": ASK, "model": "other"}, 404),
    (CHAT, "{", 400),
    (TEXT, {"prompt": "a", "suffix": "b"}, 400),
    (TEXT, {"prompt": "word " * 200_000}, 400),
    ("/tokenize", {}, 400),
    ("/detokenize", {"tokens": "a"}, 400),
]


class Document:
    """A server and what it says of itself."""

    def __init__(self, server):
        self.server = server
        status, _, self.text = server.get("/openapi.json")
        assert status == 200
        self.checked = 0

    def schema(self, part):
        return jsonschema.Draft202012Validator({**part, "components": self.text["components"]})

    def operation(self, method, path):
        return self.text["paths"][path][method.lower()]

    def content(self, method, path, status):
        response = self.operation(method, path)["responses"][str(status)]
        if "$ref" in response:
            response = self.text["components"]["responses"][response["$ref"].rsplit("/", 1)[1]]
        return response["content"]

    def takes(self, path, body):
        """Whether the document lets a body through."""
        return self.schema(self.operation("POST", path)["requestBody"]["content"]["application/json"]["schema"]).is_valid(body)

    def check(self, method, path, body=None, at=None):
        status, headers, answer = self.server.request(method, at or path, body)
        content = self.content(method, path, status)
        if not content:
            assert "content-type" not in headers and not answer, (path, status, answer)
            self.checked += 1
            return status
        kind = headers["content-type"].split(";")[0]
        assert kind in content, (path, status, kind)
        if kind == "application/json":
            self.schema(content[kind]["schema"]).validate(answer)
        elif kind == "text/event-stream":
            frames = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
            validator = self.schema(content[kind]["x-event-schema"])
            if path != MESSAGES:
                assert frames[-1] == "[DONE]"
                validator.validate(frames.pop())
            for frame in frames:
                validator.validate(json.loads(frame))
        self.checked += 1
        return status


@pytest.fixture(scope="module")
def document():
    with Replay(list(SEQUENCES.values())) as server:
        yield Document(server)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_answers_are_as_told(document, path):
    """Every odd answer, whole and streamed, with every kind of option."""
    cases = [{"messages": ASK, **more} for more in CHATS] if path == CHAT else TEXTS
    before = document.checked
    for body in cases:
        for stream in ({}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}):
            asked = {**body, **stream}
            assert document.takes(path, asked), asked
            for _ in range(len(SEQUENCES) // 2):
                assert document.check("POST", path, asked) == 200
    assert document.checked - before >= len(cases) * 3 * 15


def test_continuous_usage_is_as_told(document):
    asked = {"messages": ASK, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    assert document.takes(CHAT, asked) and document.check("POST", CHAT, asked) == 200


def test_refusals_are_as_told(document):
    for path, body, status in REFUSED:
        assert document.check("POST", path, body) == status, (path, body)


def test_other_routes_are_as_told(document):
    told = {(method.upper(), path) for path, methods in document.text["paths"].items() for method in methods}
    told = {(method, path) for method, path in told if method in ("GET", "POST")}
    tokens = [70, 71]
    bodies = {
        ("POST", "/tokenize"): [
            {"prompt": "a", "return_token_strs": True},
            {"messages": ASK, "tools": TOOLS, "add_generation_prompt": False},
        ],
        ("POST", "/detokenize"): [{"tokens": tokens}],
        ("POST", COUNT): [{"messages": ASK, "system": "Search."}],
        ("POST", "/ping"): [None],
    }
    generating = {("POST", CHAT), ("POST", TEXT), ("POST", MESSAGES)}
    for method, path in sorted(one for one in told - generating if not one[1].startswith(RESPONSES)):
        for body in bodies.get((method, path), [None]):
            if body is not None:
                assert document.takes(path, body), body
            status = document.check(method, path, body, at=path.replace("{name}", "replay"))
            assert status == 200, (method, path)
    assert document.check("GET", "/v1/models/{name}", at="/v1/models/none") == 404


def test_messages_are_as_told(document):
    """Every odd answer as Anthropic's API has it, whole and streamed, and what is refused."""
    tools = [{"name": "search", "input_schema": {"type": "object"}}, {"type": "web_search_20250305", "name": "web_search"}]
    asked = {"messages": ASK, "max_tokens": 500}
    for more in ({}, {"tools": tools, "tool_choice": {"type": "auto"}, "system": [{"type": "text", "text": "Search."}]}):
        for stream in (False, True):
            body = {**asked, **more, "stream": stream}
            assert document.takes(MESSAGES, body), body
            for _ in SEQUENCES:
                assert document.check("POST", MESSAGES, body) == 200
    for wrong in (
        {"max_tokens": None},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"tool_choice": {"type": "required"}},
        {"thinking": {"type": "on"}},
        {"stop_sequences": [""]},
        {"output_config": {"effort": "huge"}},
        {"thread": {"type": "create"}},
        {"container": "c"},
    ):
        body = {**asked, **wrong}
        assert not document.takes(MESSAGES, body) and document.check("POST", MESSAGES, body) == 400, wrong


def test_responses_are_as_told(document):
    """Every odd answer as a response, whole and streamed; then what can be done with a stored one."""
    tools = [{"type": "function", "name": "search", "parameters": {"type": "object"}}]
    for more in ({}, {"tools": tools, "instructions": "Search.", "reasoning": {"effort": "low"}}, {"top_logprobs": 1}):
        for stream in (False, True):
            asked = {"input": "Look it up.", **more, "stream": stream}
            assert document.takes(RESPONSES, asked), asked
            for _ in SEQUENCES:
                assert document.check("POST", RESPONSES, asked) == 200
    made = document.server.post(RESPONSES, {"input": "Look it up.", "background": True})[2]
    one = f"{RESPONSES}/{made['id']}"
    paths = [
        ("GET", "/{id}", one, 200),
        ("POST", "/{id}/cancel", f"{one}/cancel", 200),
        ("GET", "/{id}/input_items", f"{one}/input_items?limit=1", 200),
        ("DELETE", "/{id}", one, 200),
        ("GET", "/{id}", one, 404),
        ("GET", "/{id}/input_items", f"{one}/input_items", 404),
        ("POST", "/{id}/cancel", f"{one}/cancel", 404),
        ("POST", "/compact", f"{RESPONSES}/compact", 400),
        ("POST", "", RESPONSES, 400),
    ]
    for method, path, at, status in paths:
        assert document.check(method, RESPONSES + path, at=at) == status, (method, at)


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 2.1},
        {"n": 0},
        {"n": 129},
        {"max_tokens": 1.5},
        {"stop": ["a"] * 17},
        {"stop_token_ids": [10**9]},
        {"logit_bias": {"x": 1}},
        {"messages": []},
        {"messages": [{"role": "king", "content": "a"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "web_search"}]},
        {"tool_choice": "sometimes"},
        {"reasoning_effort": "huge"},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"top_logprobs": 21, "logprobs": True},
        {"response_format": {"type": "xml"}},
        {"audio": {"voice": "x"}},
        {"priority": 3},
        {"model": "other"},
    ],
)
def test_what_is_refused_is_not_told_to_be_taken(document, more):
    """OAI-11: bounds and unserved fields are in the document."""
    body = {"messages": ASK, **more}
    assert not document.takes(CHAT, body) and document.server.post(CHAT, body)[0] in (400, 404)
