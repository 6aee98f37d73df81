"""schemathesis on the server's own OpenAPI document: requests that break it are refused, those that keep it are answered,
and no answer is other than the document says."""

import re
import subprocess
import sys

import pytest

from harmony import SEQUENCES
from server import Replay

CASES = re.compile(r"(\d+) generated")


def run(server, mode, tmp_path, *more):
    """Runs it with a fixed seed; the number of requests that it made."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--url", server.url]
    fixed = ["--mode", mode, "--seed", "20261122", "--phases", "coverage,fuzzing", "--max-examples", "15"]
    done = subprocess.run(
        [*command, *fixed, "--generation-database", "none", "--continue-on-failure", *more],
        capture_output=True, text=True, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert server.get("/health")[0] == 200
    return int(CASES.search(done.stdout)[1])


@pytest.fixture(scope="module")
def server():
    with Replay(list(SEQUENCES.values()), "--max-model-len", "512") as server:
        yield server


def test_what_breaks_the_document_is_refused(server, tmp_path):
    """OAI-07, OAI-11."""
    assert run(server, "negative", tmp_path) > 1000


def test_what_keeps_it_is_answered_as_it_says(server, tmp_path):
    """OAI-07. Whether such a request is accepted is not judged: a document cannot say that a result needs an earlier call, that
    prompt and answer must fit together, nor that 1.0 is no integer here."""
    assert run(server, "positive", tmp_path, "--exclude-checks", "positive_data_acceptance") > 100
