"""The examples of README.md, as they are written."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from server import ROOT, Server

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
CURL = [body for kind, body in BLOCKS if kind == "sh" and "curl" in body]
PYTHON = [body for kind, body in BLOCKS if kind == "python"]
PORT = "8000"


@pytest.fixture(scope="module")
def port():
    """The README's port if it is free, else another, put in its place."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(PORT)))
            wanted = int(PORT)
        except OSError:
            wanted = 0
    with Server("--model", "demo", port=wanted) as server:
        yield str(server.port)


def execute(command, body, port):
    body = body.replace(f"localhost:{PORT}", f"localhost:{port}")
    env = {**os.environ, "NO_PROXY": "localhost"}
    return subprocess.run([*command, body], capture_output=True, text=True, timeout=120, env=env)


def test_there_are_examples():
    assert CURL and PYTHON


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("body", CURL)
def test_curl(port, body):
    done = execute(["bash", "-euo", "pipefail", "-c"], body, port)
    assert done.returncode == 0, done.stderr
    assert '"error"' not in done.stdout and done.stdout.strip(), done.stdout


@pytest.mark.parametrize("body", PYTHON)
def test_python(port, body):
    done = execute([sys.executable, "-c"], body, port)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_two_commands_are_there():
    shell = "".join(body for kind, body in BLOCKS if kind == "sh")
    assert "cargo run --release -- --model demo" in shell and "tests/run" in shell
