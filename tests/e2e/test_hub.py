"""A repository from a hub on loopback: downloaded, served, and served again without the hub."""

import hashlib
import http.server
import json
import threading

import pytest

from conftest import DEMO_TOKENIZER, GOLDEN
from server import Server, run

COMMIT = "89abcdef" * 5
CASE = json.loads((GOLDEN / "expected.json").read_text())["cases"][0]


@pytest.fixture
def hub():
    files = {name: (GOLDEN / name).read_bytes() for name in ("config.json", "generation_config.json", "model.safetensors")}
    files["tokenizer.json"] = DEMO_TOKENIZER.read_bytes()
    files["pytorch_model.bin"] = b"never asked for"
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/api/models/owner/name/revision/main":
                listing = {"sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(json.dumps(listing).encode(), {})
            name = self.path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
            if name not in files:
                return self.send_error(404)
            return self.answer(files[name], {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"'})

        def answer(self, body, headers):
            self.send_response(200)
            for header, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.asked = asked
    yield server
    server.shutdown()


def greedy(server):
    answer = server.client().completions.create(
        model="owner/name",
        prompt=CASE["prompt"],
        max_tokens=8,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return answer.choices[0].model_extra["token_ids"]


def test_a_repository_is_downloaded_once_and_served(hub, tmp_path):
    """OPS-01."""
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    with Server("owner/name", env=env) as server:
        assert greedy(server) == CASE["greedy"][:8]
    assert not any("pytorch_model" in path for path in hub.asked)
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
    count = len(hub.asked)
    with Server("owner/name", env={**env, "HF_HUB_OFFLINE": "1"}) as server:
        assert greedy(server) == CASE["greedy"][:8]
    assert len(hub.asked) == count


def test_tools_fetch_the_tokenizer_alone(hub, tmp_path):
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    line = json.dumps({"segments": [{"text": "plain"}]})
    done = run("parse", "--model", "owner/name", stdin=line, env=env)
    assert done.returncode == 0 and json.loads(done.stdout)["content"] == "plain", done.stderr
    assert not any("safetensors" in path for path in hub.asked)


def test_a_repository_that_is_not_there(hub, tmp_path):
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = run("serve", "owner/other", "--port", 0, env=env)
    assert done.returncode == 1 and "owner/other" in done.stderr and "404" in done.stderr, done.stderr
