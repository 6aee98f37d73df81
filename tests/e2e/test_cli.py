"""`ctxserve render` and `ctxserve parse`."""

import json

from conftest import DEMO_TOKENIZER
from harmony import SEQUENCES, final
from server import run

REQUEST = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|end|>"}],
    "reasoning_effort": "high",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
}


def test_render_prints_ids_and_text():
    done = run("render", stdin=json.dumps(REQUEST))
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["text"].startswith("<|start|>system<|message|>") and out["text"].endswith("<|start|>assistant")
    assert "Reasoning: high" in out["text"] and "Be brief." in out["text"] and "namespace functions" in out["text"]
    assert all(isinstance(token, int) for token in out["token_ids"])


def test_render_and_the_server_agree(demo):
    status, _, body = demo.post("/tokenize", {"model": "demo", **REQUEST})
    assert status == 200, body
    assert body["tokens"] == json.loads(run("render", stdin=json.dumps(REQUEST)).stdout)["token_ids"]


def test_render_reads_a_file_and_refuses_what_the_api_refuses(tmp_path):
    path = tmp_path / "request.json"
    path.write_text(json.dumps(REQUEST))
    assert run("render", path).stdout == run("render", "--input", path).stdout != ""
    path.write_text(json.dumps({"messages": [{"role": "wizard", "content": "x"}]}))
    done = run("render", path)
    assert done.returncode == 1 and "messages[0].role" in done.stderr and done.stdout == "", done.stderr


def test_parse_continues_after_a_bad_line():
    lines = [json.dumps({"segments": final("a")}), "{", json.dumps({"segments": [{"control": "<|nonsense|>"}]}), json.dumps({"segments": final("b")})]
    done = run("parse", "--format", "harmony", stdin="\n".join(lines) + "\n")
    out = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and len(out) == 4
    assert (out[0]["content"], out[3]["content"]) == ("a", "b")
    assert out[1]["line"] == 2 and out[2]["line"] == 3 and "<|nonsense|>" in out[2]["error"]


def test_parse_names_the_recovery_and_only_where_there_was_one():
    done = run("parse", "--model", DEMO_TOKENIZER, stdin="".join(json.dumps({"segments": s}) + "\n" for s in SEQUENCES.values()))
    out = dict(zip(SEQUENCES, map(json.loads, done.stdout.splitlines()), strict=True))
    assert set(out["final"]) == {"content", "reasoning", "tool_calls", "finish_reason", "recovery"}
    for clean in ("final", "reasoning then final", "call", "preamble then call", "unicode"):
        assert out[clean]["recovery"] == [], (clean, out[clean])
    for odd in ("plain text", "missing end", "doubled channel", "misspelt channel"):
        assert out[odd]["recovery"], (odd, out[odd])


def test_help_and_version():
    for args in (["--help"], ["serve", "--help"], ["--version"], ["parse", "--help"]):
        done = run(*args)
        assert done.returncode == 0 and done.stdout and not done.stderr, args
    help_text = run("serve", "--help").stdout
    for flag in ("--served-model-name", "--max-model-len", "--kv-cache-dtype", "--cpu-precision", "--config"):
        assert flag in help_text
