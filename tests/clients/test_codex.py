"""The Codex CLI, which speaks nothing but `/v1/responses`, against a scripted model. Skipped where `codex` is not installed."""

import json
import os
import shutil
import subprocess

import pytest

from harmony import analysis, call, final
from server import Replay

CODEX = os.environ.get("CODEX_BIN") or shutil.which("codex")
TURNS = 20
CONFIG = """
model = "replay"
model_provider = "local"
[model_providers.local]
name = "local"
base_url = "{url}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""


@pytest.mark.skipif(CODEX is None, reason="the Codex CLI is not installed (npm install @openai/codex, or set CODEX_BIN)")
def test_codex_finishes_a_loop_of_twenty_turns(tmp_path):
    """RSP-01, RSP-05: streamed, with its own tools among others that are not run here, and its own way of sending items back."""
    work = tmp_path / "work"
    work.mkdir()
    command = json.dumps({"cmd": "echo result"})
    script = [analysis(f"Thought {n}.") + call("exec_command", command) for n in range(TURNS)]
    with Replay([*script, analysis("Enough.") + final("All done here.")], "--max-model-len", "131072") as server:
        (tmp_path / "config.toml").write_text(CONFIG.format(url=server.url))
        done = subprocess.run(
            [CODEX, "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json", "Find it."],
            cwd=work,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CODEX_HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        items = [event["item"] for event in events if event["type"] == "item.completed"]
        runs = [item for item in items if item["type"] == "command_execution"]
        assert [run["aggregated_output"] for run in runs] == ["result\n"] * TURNS
        assert [item["text"] for item in items if item["type"] == "agent_message"] == ["All done here."]
        usage = next(event["usage"] for event in events if event["type"] == "turn.completed")
        assert usage["reasoning_output_tokens"] > 0
        assert any("skipping tools" in line for line in server.log)
