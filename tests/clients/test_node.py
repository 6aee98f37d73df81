"""JavaScript clients: what `test_python.py` asks of the Python ones. Skipped where there is no Node."""

import json
import pathlib
import shutil
import subprocess

import pytest

from scenario import TOO_LONG, Loop, full, is_too_long
from server import ROOT

HOME = ROOT / "target" / "clients-node"
SCRIPT = pathlib.Path(__file__).parent / "node" / "clients.mjs"
SECONDS = 120

CLIENTS = [
    "openai-node chat",
    "openai-node responses",
    "ai-sdk chat",
    "ai-sdk responses",
    "ai-sdk compatible",
    "agents-js chat",
    "agents-js responses",
]

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="there is no node"),
    pytest.mark.skipif(not (HOME / "node_modules").is_dir(), reason=f"{HOME} has no packages; tests/run clients installs them"),
]


class Refused(Exception):
    """What a client told its user."""


def drive(client, action, url, *more, tool=None, prompt=None):
    """Runs a client; its searches go to `tool`."""
    shutil.copy(SCRIPT, HOME)
    command = ["node", HOME / SCRIPT.name, client, action, url, *more]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HOME) as process:
        try:
            if prompt is not None:
                process.stdin.write(json.dumps(prompt) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                said = json.loads(line)
                if "error" in said:
                    raise Refused(said["error"])
                if "said" in said:
                    return said["said"]
                process.stdin.write(json.dumps({"result": tool(said["query"])}) + "\n")
                process.stdin.flush()
            raise AssertionError(f"{client} ended without a word: {process.stderr.read()[-2000:]}")
        finally:
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.mark.parametrize("stream", ["whole", "streamed"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_tool_loop_of_twenty_turns(client, stream):
    """OAI-19, OAI-01, OAI-03, HAR-04, RSP-01: with odd headers among the calls, and a restart of the server after ten."""
    # This one sends ids of items that the server has stored, which a restart forgets.
    with Loop(restart_at=None if client == "ai-sdk responses" else 10) as loop:
        loop.check(drive(client, "loop", loop.url, stream, tool=loop.search))


@pytest.mark.parametrize("client", CLIENTS)
def test_a_prompt_that_is_too_long(client):
    """OAI-08, OAI-19: the code and the words that clients look for reach their users."""
    with Loop() as loop, pytest.raises(Refused) as raised:
        drive(client, "ask", loop.url, prompt=TOO_LONG)
    assert is_too_long(raised.value), raised.value


@pytest.mark.parametrize("client", CLIENTS)
def test_a_full_queue(client):
    """OPS-16, OAI-19."""
    with full() as url, pytest.raises(Refused) as raised:
        drive(client, "ask", url, prompt="Hello")
    assert "429" in str(raised.value), raised.value
