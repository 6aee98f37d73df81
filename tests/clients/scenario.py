"""What every client goes through: a tool loop of 20 turns, a restart within it, a prompt that is too long, a full queue."""

import contextlib
import json

from harmony import CALL, CHANNEL, CONSTRAIN, MESSAGE, analysis, call, final, text
from server import Replay, Server

TURNS = 20
ANSWER = f"Found after {TURNS} searches."
TOOL = {
    "name": "search",
    "description": "Searches.",
    "parameters": {
        "type": "object",
        "properties": {"query": {"type": "string"}},
        "required": ["query"],
        "additionalProperties": False,
    },
}


def query(turn):
    return f"q{turn} é 日"


def turn(number):
    """A call with reasoning in front of it; every fourth one as models write it when they err."""
    arguments = json.dumps({"query": query(number)}, ensure_ascii=False)
    odd = {
        1: [CHANNEL, text("analysis to=functions.search code"), MESSAGE, text(arguments), CALL],
        5: [CHANNEL, text("commentary to=functions.search "), CONSTRAIN, text("json"), MESSAGE, text(arguments), CALL],
        9: [CHANNEL, text("commentary"), CHANNEL, text("commentary to=functions.search json"), MESSAGE, text(arguments), CALL],
        13: [text(" to=functions.functions.search"), CHANNEL, text("commentary"), MESSAGE, text(arguments + " ]"), CALL],
    }
    return analysis(f"Search number {number}.") + odd.get(number, call("search", arguments))


SCRIPT = [turn(number) for number in range(TURNS)] + [final(ANSWER)]


class Loop:
    """A server that plays the script, and the tool that its calls are for."""

    def __init__(self, restart_at=None):
        self.server = Replay(SCRIPT, "--served-model-name", "m")
        self.restart_at = restart_at
        self.queries = []

    @property
    def url(self):
        return f"{self.server.url}/v1"

    def search(self, query):
        """The tool. In the middle of the loop the server may go and come back at the same place."""
        self.queries.append(query)
        done = len(self.queries)
        if done == self.restart_at:
            port = self.server.port
            self.server.stop()
            self.server = Replay(SCRIPT[done:], "--served-model-name", "m", port=port)
        return f"result {done}"

    def check(self, said):
        assert self.queries == [query(number) for number in range(TURNS)]
        assert said == ANSWER

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.stop()


@contextlib.contextmanager
def full():
    """A server whose queue is full."""
    long = {"model": "m", "prompt": "Hello", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
    limits = ["--max-num-seqs", 1, "--max-num-queued-reqs", 1, "--max-model-len", "16k"]
    with Server("--model", "demo", "--served-model-name", "m", *limits) as server:
        streams = [server.open_stream("/v1/completions", long) for _ in range(2)]
        try:
            yield f"{server.url}/v1"
        finally:
            for connection, _ in streams:
                connection.close()


TOO_LONG = "word " * 100_000


def is_too_long(error):
    """Whether a client lets its user see why."""
    return "context_length_exceeded" in told(error) and "This model's maximum context length is" in told(error)


def told(error):
    """What an error and those it comes from say."""
    words = []
    while error is not None:
        known = [getattr(error, name, None) for name in ("status_code", "code", "body")]
        words.append(f"{type(error).__name__}: {error} {known}")
        error = error.__cause__ or error.__context__
    return "\n".join(words)
