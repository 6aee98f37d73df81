"""Requests that have brought other servers down, over HTTP, beside a canary whose answer must never change.

The table is tests/security/matrix.jsonl; tests/security/matrix.py runs it against any server with the OpenAI API. What no
table can say is here: sockets, many requests, listeners, files.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import threading

import pytest

from conftest import DEMO_TOKENIZER, GOLDEN
from harmony import call, final
from server import ROOT, Replay, Server, run

sys.path.insert(0, str(ROOT / "tests" / "security"))
import matrix  # noqa: E402

SMALL = ["--max-model-len", 256, "--max-num-seqs", 8]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}


def width(server):
    """The width of the logits, as the server itself says it."""
    _, _, body = server.post("/detokenize", {"tokens": [2**32 - 1]})
    return int(re.search(r"vocabulary of (\d+)", body["error"]["message"]).group(1))


def resident(server):
    """Resident memory, bytes."""
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) * 1024


def series(server):
    """Names and labels of every metric."""
    _, _, text = server.get("/metrics")
    return {line.rsplit(" ", 1)[0] for line in text.splitlines() if line and not line.startswith("#")}


def alive(server, model):
    """It is well, idle, and answers."""
    assert server.get("/health")[0] == 200
    server.wait(lambda: server.metric("vllm:num_requests_running") == 0, "nothing runs")
    server.wait(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, "no page is held")
    assert server.post(TEXT, {"model": model, "prompt": "hi", "max_tokens": 1})[0] == 200


@pytest.fixture(scope="module")
def small():
    with Server("--model", "demo", *SMALL) as server:
        yield server


@pytest.fixture(scope="module")
def scripted():
    with Replay([final("The same words as ever.")], *SMALL, "--served-model-name", "m") as server:
        yield server


def test_the_matrix_on_a_script(scripted):
    """OPS-17: every row of the matrix, on a scripted model."""
    check(scripted, "m")


def test_the_matrix_on_the_demo(small):
    """OPS-17: every row of the matrix, on a model that computes."""
    check(small, "demo")


def check(server, model):
    client = matrix.Client(server.url, model)
    before = series(server)
    skipped = []
    problems, counts = matrix.run(client, width(server), log=skipped.append)
    assert not problems, f"{len(problems)} of {sum(counts.values())}\n" + "\n".join(problems[:40])
    assert all(counts.values()), counts
    for line in skipped:
        # Routes that come later may be missing, the ones that there are may not.
        assert not any(f" {route}," in line for route in (CHAT, TEXT, "/tokenize", "/detokenize")), line
        print(line)
    more = {line for line in series(server) - before if "parser_recoveries" not in line}
    assert not more, more
    alive(server, model)


def test_the_matrix_names_every_class():
    """Each class of the matrix has rows or a test here that names it."""
    text = matrix.ROWS.read_text() + pathlib.Path(__file__).read_text()
    for number in (
        "CVE-2026-34756 CVE-2026-73559 CVE-2026-114051 PYSEC-2026-4350 CVE-2026-71486 CVE-2025-48956 CVE-2026-115911 "
        "CVE-2026-115918 GHSA-69j4-grxj-j64p CVE-2026-5760 CVE-2026-44222 Rapid-MLX#731 CVE-2026-55574 CVE-2025-71379 "
        "CVE-2026-25048 CVE-2025-58446 CVE-2025-32381 CVE-2026-105757 GHSA-vrq3-r879-7m65 CVE-2025-9141 CVE-2026-93840 "
        "CVE-2026-105922 CVE-2026-116180 PYSEC-2026-4325 CVE-2026-105754 CVE-2026-105756 CVE-2026-105755 CVE-2025-62164 "
        "CVE-2026-22773 CVE-2026-65119 CVE-2026-15969 CVE-2025-29783 CVE-2026-34159 CVE-2026-21869 CVE-2026-43632"
    ).split():
        # This list is text of the file too.
        assert text.count(number) > 1 or number in matrix.ROWS.read_text(), number


def exchange(server, data, seconds=60):
    """Sends bytes and returns what comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        got = b""
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                got += piece
        return got


def head(path="/health", more="", method="GET"):
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{more}\r\n".encode()


def test_heads_that_are_too_large(small):
    """security: header size, CVE-2025-48956. Many headers, long ones, long paths: 431 or 414, and nothing is kept."""
    assert exchange(small, head()).startswith(b"HTTP/1.1 200")
    assert exchange(small, head(more="".join(f"x-{i}: y\r\n" for i in range(200)))).startswith(b"HTTP/1.1 200")
    for more in (
        "".join(f"x-{i}: y\r\n" for i in range(10_000)),
        "".join(f"x-{i}: y\r\n" for i in range(260)),
        f"x-long: {'y' * (2 << 20)}\r\n",
    ):
        assert exchange(small, head(more=more)).startswith(b"HTTP/1.1 431"), len(more)
    assert exchange(small, head(path="/" + "a" * (2 << 20)))[:12] in (b"HTTP/1.1 414", b"HTTP/1.1 431")
    for broken in (b"\x00" * 64, b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00" + b"\xff" * 512, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        assert not exchange(small, broken).startswith(b"HTTP/1.1 2")
    alive(small, "demo")


def test_bodies_that_do_not_end():
    """security: body size. A body of 1 GiB, one without end, one that does not come: 413 or 408, in bounded memory."""
    with Server("--model", "demo", *SMALL, "--max-body-bytes", "1MiB", "--body-timeout", 1) as server:
        before = resident(server)
        declared = head(CHAT, "Content-Type: application/json\r\nContent-Length: 1073741824\r\n", "POST")
        # Half of the connection is closed, so that the server need not wait for the rest.
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(declared)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(64).startswith(b"HTTP/1.1 413")
        chunked = head(CHAT, "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n", "POST")
        endless = chunked + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 64
        assert exchange(server, endless + b"0\r\n\r\n").startswith(b"HTTP/1.1 413")
        assert exchange(server, chunked + b"5\r\n{\"mod").startswith(b"HTTP/1.1 408")
        short = head(CHAT, "Content-Type: application/json\r\nContent-Length: 100\r\n", "POST")
        assert exchange(server, short + b"{").startswith(b"HTTP/1.1 408")
        both = head(CHAT, "Content-Type: application/json\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n", "POST")
        assert exchange(server, both + b"2\r\n{}\r\n0\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert exchange(server, chunked + b"ffffffffffffffffff\r\n").startswith(b"HTTP/1.1 400")
        assert resident(server) - before < 64 << 20
        alive(server, "demo")


def test_slow_heads_are_closed():
    """security: slowloris. Heads that never end hold no place for longer than they may."""
    with Server("--model", "demo", *SMALL, "--header-timeout", 1, "--max-connections", 20) as server:
        slow = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(20)]
        for connection in slow:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nx-")
        # All places are taken; the next request is served once they are freed.
        assert server.get("/health", timeout=60)[0] == 200
        for connection in slow:
            answer = connection.recv(64)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 408"), answer
            connection.close()
        alive(server, "demo")


def test_an_answer_may_not_take_for_ever():
    """security: wall time per request. An answer that takes too long ends with an error, and its pages are free."""
    with Server("--model", "demo", "--max-model-len", "16k", "--request-timeout", 1) as server:
        body = {"model": "demo", "prompt": "hi", "max_tokens": 16_000, "ignore_eos": True}
        status, _, answer = server.post(TEXT, body)
        assert (status, answer["error"]["code"]) == (503, "request_timeout"), answer
        connection, response = server.open_stream(TEXT, {**body, "stream": True})
        text = response.read().decode()
        connection.close()
        assert "request_timeout" in text and text.rstrip().endswith("[DONE]"), text[-200:]
        alive(server, "demo")


def test_limits_are_flags():
    """security: C1, one table of limits. What a flag sets is what routes hold to."""
    with Replay([final("ok")], "--max-n", 2, "--max-stop-strings", 1, "--max-logprobs", 3, "--max-tools", 1, "--max-messages", 2, "--max-json-depth", 16, "--max-prompts", 2, "--max-schema-bytes", 100, "--max-grammar-bytes", 10, "--served-model-name", "m") as server:
        long = {"type": "object", "properties": {"a" * 100: {}}}
        for route, more, param in (
            (CHAT, {"n": 3}, "n"),
            (TEXT, {"n": 3}, "n"),
            (CHAT, {"stop": ["a", "b"]}, "stop"),
            (CHAT, {"logprobs": True, "top_logprobs": 4}, "top_logprobs"),
            (TEXT, {"logprobs": 4}, "logprobs"),
            (CHAT, {"tools": [TOOL, TOOL]}, "tools"),
            (CHAT, {"messages": ASK * 3}, "messages"),
            (TEXT, {"prompt": ["a", "b", "c"]}, "prompt"),
            (TEXT, {"guided_json": long}, "guided_json"),
            (TEXT, {"guided_regex": "a" * 11}, "guided_regex"),
        ):
            base = {"messages": ASK} if route == CHAT else {"prompt": "hi"}
            status, _, body = server.post(route, {"model": "m", **base, **more})
            assert (status, body["error"]["param"]) == (400, param), (more, body)
        assert server.post(CHAT, '{"a":' + "[" * 16 + "]" * 16 + "}")[0] == 400
        assert server.post(CHAT, {"model": "m", "messages": ASK, "n": 2, "stop": "x", "tools": [TOOL]})[0] == 200


CONTROL = [
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>", "<|endoftext|>",
    "<|startoftext|>", "<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>",
    "<tool_response>", "</tool_response>", "<|vision_start|>", "<|image_pad|>", "<|fim_prefix|>", "<|reserved_200000|>",
]


@pytest.mark.parametrize("name", ["demo", "qwen"])
def test_control_tokens_in_every_string(name, request):
    """security: token injection, CVE-2026-44222, GHSA-hpv8-x276-m59f. HAR-19: no string of a client becomes a control token."""
    server = request.getfixturevalue(name)
    model = server.client().models.list().data[0].id

    def ids(body):
        status, _, answer = server.post("/tokenize", {"model": model, **body})
        assert status == 200, answer
        return answer["tokens"]

    added = json.loads((DEMO_TOKENIZER if name == "demo" else ROOT / "crates/chat/tests/data/qwen/tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in added["added_tokens"]}
    spelled = sorted(set(CONTROL) | set(special.values()))
    for text in spelled:
        assert not set(ids({"prompt": text})) & set(special), text
    every = "".join(spelled)

    def conversation(mark):
        call_id = "c1"
        return {
            "messages": [
                {"role": "system", "content": mark},
                {"role": "developer", "content": [{"type": "text", "text": mark}]},
                {"role": "user", "content": mark, **({"name": mark} if name == "demo" else {})},
                {"role": "assistant", "content": mark, "reasoning_content": mark, "tool_calls": [
                    {"id": call_id, "type": "function", "function": {"name": "run", "arguments": json.dumps({mark: mark})}}]},
                {"role": "tool", "tool_call_id": call_id, "content": mark},
                {"role": "user", "content": mark},
            ],
            "tools": [{"type": "function", "function": {"name": "run", "description": mark, "parameters": {
                "type": "object", "description": mark, "properties": {"a": {"type": "string", "description": mark, "enum": [mark], "default": mark}}}}}],
        }

    def controls(body):
        return [token for token in ids(body) if token in special]

    if name == "qwen":
        # This template takes no developer.
        plain, hostile = conversation("x"), conversation(every)
        for body in (plain, hostile):
            body["messages"] = [m for m in body["messages"] if m["role"] != "developer"]
    else:
        plain, hostile = conversation("x"), conversation(every)
    assert controls(hostile) == controls(plain)
    for text in spelled:
        body = conversation(text)
        body["messages"] = [m for m in body["messages"] if name == "demo" or m["role"] != "developer"]
        assert controls(body) == controls(plain), text


def test_labels_do_not_grow(scripted):
    """security: label explosion, PYSEC-2026-4325. No method, path, model, user or id of a client becomes a series."""
    before, memory = series(scripted), resident(scripted)
    connection = http.client.HTTPConnection("127.0.0.1", scripted.port, timeout=60)
    for number in range(3000):
        kind = number % 5
        method, path, body = "POST", CHAT, {"messages": ASK, "max_tokens": 1}
        headers = {"Content-Type": "application/json"}
        if kind == 0:
            method, body = f"M{number:x}", None
        elif kind == 1:
            path, body = f"/v1/{number:x}/x", None
        elif kind == 2:
            body = {**body, "model": f"m{number}"}
        elif kind == 3:
            path = f"/v1/models/m{number}"
            method, body = "GET", None
        else:
            headers |= {"X-Request-Id": f"id-{number}", "User-Agent": f"agent-{number}"}
            body = {**body, "user": f"u{number}", "cache_salt": f"s{number}", "model": "m"}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        connection.getresponse().read()
    connection.close()
    assert series(scripted) == before
    assert resident(scripted) - memory < 64 << 20
    alive(scripted, "m")


def test_many_schemas_are_not_all_kept(scripted):
    """security: unbounded grammar cache, CVE-2025-32381, CVE-2025-29770. Schemas that no two requests share fill neither memory nor disk."""
    files = set(os.listdir(f"/proc/{scripted.process.pid}/fd"))

    def ask(number):
        schema = {"type": "object", "properties": {f"p{number}-{i}": {"type": "string"} for i in range(20)}}
        return scripted.post(TEXT, {"model": "m", "prompt": "x", "max_tokens": 1, "guided_json": schema})[0]

    assert {ask(number) for number in range(150)} == {200}
    filled = resident(scripted)
    assert {ask(number) for number in range(150, 700)} == {200}
    # The first 150 filled the cache of 64; what comes after takes their places.
    assert resident(scripted) - filled < 96 << 20
    assert len(os.listdir(f"/proc/{scripted.process.pid}/fd")) <= len(files) + 4
    alive(scripted, "m")


def test_one_id_for_two_requests(small):
    """security: id collision, CVE-2026-105755, PYSEC-2026-4198. Two requests with one X-Request-Id are two requests."""
    def ask(seed):
        body = {"model": "demo", "prompt": "hi", "max_tokens": 64, "seed": seed, "ignore_eos": True, "return_token_ids": True}
        status, headers, answer = small.post(TEXT, body, headers={"X-Request-Id": "the-same"})
        assert (status, headers["x-request-id"]) == (200, "the-same")
        return answer["id"], answer["choices"][0]["token_ids"]

    alone = [ask(seed)[1] for seed in (1, 2)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, [1, 2] * 8))
    assert [ids for _, ids in together] == alone * 8
    assert len({name for name, _ in together}) == 16


def test_valid_after_invalid_in_one_batch(small):
    """security: grammar error kills engine, CVE-2026-105757, GHSA-85xf-c7hm-whqw, OPS-17. Bad grammars beside good requests."""
    good = {"model": "demo", "prompt": "hi", "max_tokens": 24, "temperature": 0}
    alone = small.post(TEXT, good)[2]["choices"][0]["text"]
    bad = [{"guided_regex": "("}, {"guided_json": {"enum": []}}, {"guided_grammar": "start: missing"}, {"structured_outputs": {"choice": []}}, {"guided_json": {"type": "integer", "minimum": 3, "maximum": 2}}]

    def ask(extra):
        status, _, body = small.post(TEXT, {**good, **extra})
        return status, body["choices"][0]["text"] if status == 200 else None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [extra for wrong in bad * 4 for extra in ({}, wrong)]))
    assert answers[::2] == [(200, alone)] * 20
    # 503: too many are being compiled.
    assert all(status in (400, 503) for status, _ in answers[1::2]), answers
    alive(small, "demo")


def test_arguments_are_not_evaluated():
    """security: evaluated arguments, CVE-2025-9141, C7, HER-06. What looks like code comes back as it was written."""
    code = ['__import__("os").system("touch /tmp/x")', "{'a': 1 if True else 2}", "[i for i in range(3)]", '{"a": "{{ 7*7 }}"}']
    with Replay([call("run", text) for text in code], "--served-model-name", "m") as server:
        for text in code:
            _, _, body = server.post(CHAT, {"model": "m", "messages": ASK, "tools": [TOOL]})
            assert body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == text


@pytest.fixture
def trap():
    """A listener that counts who comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        came = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    came.append(listener.accept()[1])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x", came


def test_nothing_is_fetched(small, trap):
    """security: images, CVE-2026-22773, CVE-2026-115915, CVE-2026-105758, PYSEC-2026-4184. No URL of a request is ever opened."""
    url, came = trap
    kinds = [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "input_image", "image_url": url}, {"type": "video_url", "video_url": {"url": url}},
        {"type": "audio_url", "audio_url": {"url": url}}, {"type": "file", "file": {"file_url": url}}, {"type": "text", "text": url},
    ]
    for kind in kinds:
        messages = [{"role": "user", "content": [kind]}]
        for route in (CHAT, "/tokenize"):
            status, _, body = small.post(route, {"model": "demo", "messages": messages, "max_tokens": 1})
            assert status == (200 if kind["type"] == "text" else 400), body
    for schema in ({"$ref": url}, {"$schema": url, "$id": url, "type": "string"}):
        assert small.post(TEXT, {"model": "demo", "prompt": "x", "max_tokens": 1, "guided_json": schema})[0] in (200, 400)
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))):
        small.wait(lambda: came, "the trap works")
    assert len(came) == 1


def test_only_the_http_port_listens(small):
    """security: pickle and ZMQ, CVE-2025-29783, CVE-2025-32444, CVE-2026-3059, C8; RPC, CVE-2026-34159. One socket listens: HTTP's."""
    mine = set()
    for entry in os.listdir(f"/proc/{small.process.pid}/fd"):
        with contextlib.suppress(OSError):
            if match := re.match(r"socket:\[(\d+)\]", os.readlink(f"/proc/{small.process.pid}/fd/{entry}")):
                mine.add(match.group(1))
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        with contextlib.suppress(OSError):
            for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                state = fields[3]
                if fields[9] in mine and (state == "0A" or table.startswith("udp")):
                    listening.append(int(fields[1].rsplit(":", 1)[1], 16))
    assert listening == [small.port]


def test_there_are_no_administrative_routes(small):
    """security: administrative routes, CVE-2026-15969, CVE-2026-86793; forged cache keys, CVE-2026-105754. They do not exist."""
    for path in (
        "/v1/load_lora_adapter", "/load_lora_adapter", "/load_lora_adapter_from_tensors", "/update_weights_from_disk", "/update_weights_from_tensor",
        "/v1/rerank", "/rerank", "/sleep", "/wake_up", "/collective_rpc", "/invocations", "/inference/v1/generate", "/start_profile",
        "/server_info", "/slots/0?action=restore", "/props", "/lora-adapters", "/admin", "/v1/models/../../etc/passwd", "/%2e%2e/etc/passwd",
    ):
        status, _, body = small.post(path, {"path": "/etc/passwd", "model_path": "../../etc", "command": "id"})
        assert status in (404, 405) and "root:" not in str(body), (path, status, body)


def test_tokenizing_while_the_model_is_busy_and_ends():
    """security: use after free, CVE-2026-43632, CVE-2026-43631. Tokenising goes on while answers run and the server stops."""
    with Server("--model", "demo", *SMALL) as server:
        text = "tokens " * 2000
        expected = server.post("/tokenize", {"model": "demo", "prompt": text})[2]["tokens"]
        answers = []

        def loop():
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    status, _, body = server.post("/tokenize", {"model": "demo", "prompt": text})
                    if status != 200:
                        return
                    answers.append(body["tokens"] == expected)

        threads = [threading.Thread(target=loop) for _ in range(4)]
        for thread in threads:
            thread.start()
        server.wait(lambda: len(answers) > 40, "tokenised often")
        server.stop()
        for thread in threads:
            thread.join(60)
        assert all(answers) and server.process.returncode == 0


def browser(server, path, method="GET", host=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"localhost:{server.port}")
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.putheader("Content-Length", "0")
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, body


def test_pages_of_other_sites_are_kept_out(small):
    """security: CORS and browsers. Closed by default; on loopback a foreign Host or Origin is 403 (DNS rebinding)."""
    evil = "https://evil.example"
    for path, method in (("/v1/models", "GET"), (CHAT, "POST"), ("/metrics", "GET")):
        status, headers, _ = browser(small, path, method, Origin=evil)
        assert status == 403 and not any("access-control" in name for name in headers), path
        status, _, body = browser(small, path, method, host="evil.example:8000", Origin="http://evil.example:8000")
        assert status == 403 and json.loads(body)["error"]["code"] == "forbidden_host", path
        assert browser(small, path, method, host="evil.example")[0] == 403
    status, headers, _ = browser(small, CHAT, "OPTIONS", Origin=evil, Access_Control_Request_Method="POST")
    assert status in (403, 405) and not any("access-control" in name for name in headers)
    for origin in ("http://localhost:3000", f"http://127.0.0.1:{small.port}"):
        assert browser(small, "/v1/models", Origin=origin)[0] == 200
    assert browser(small, "/v1/models", host="[::1]:80")[0] == 200
    assert browser(small, "/health", host="evil.example")[0] == 200


def test_origins_can_be_let_in():
    """security: CORS. A preflight is answered without a key, the request itself is not, and only to origins that were named."""
    app = "https://app.example.com"
    flags = ["--allowed-origins", json.dumps([app]), "--allow-credentials", "--api-key", "k", "--allowed-hosts", "api.example.com"]
    with Replay([final("ok")], *flags) as server:
        ask = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,x-stainless-os"}
        status, headers, _ = browser(server, CHAT, "OPTIONS", Origin=app, **ask)
        assert status == 200 and headers["access-control-allow-origin"] == app, headers
        assert headers["access-control-allow-credentials"] == "true"
        assert "x-stainless-os" in headers["access-control-allow-headers"] and "POST" in headers["access-control-allow-methods"]
        _, headers, _ = browser(server, CHAT, "OPTIONS", Origin="https://evil.example", **ask)
        assert headers.get("access-control-allow-origin") != "https://evil.example"
        status, headers, _ = browser(server, "/v1/models", Origin=app)
        assert status == 401 and headers["access-control-allow-origin"] == app
        for header in ({"Authorization": "Bearer k"}, {"X-Api-Key": "k"}):
            status, headers, _ = browser(server, "/v1/models", host="api.example.com", Origin=app, **header)
            assert status == 200 and headers["access-control-allow-origin"] == app
    done = run("serve", "--model", "demo", "--allowed-origins", '["*"]', "--allow-credentials")
    assert done.returncode != 0 and "--allow-credentials" in done.stderr, done.stderr


def test_every_route_needs_a_key(tmp_path):
    """security: C9, default deny. With keys, every route but the probes needs one, in either header; files hold keys too."""
    keys = tmp_path / "keys"
    keys.write_text("# of the tests\nfrom-file-1\nfrom-file-2\n")
    with Replay([final("ok")], "--api-key-file", keys, "--api-key", "from-flag") as server:
        for method, path in [
            *(("POST", path) for path in matrix.BASES),
            *(("GET", path) for path in ("/v1/models", "/v1/models/m", "/version", "/load", "/metrics", "/nowhere", "/openapi.json", "/", "/Health", "/health/", "//health", "/health/../metrics")),
            ("POST", "/health"), ("POST", "/ping"), ("BREW", "/metrics"), ("OPTIONS", CHAT),
        ]:
            status, _, body = server.request(method, path, {} if method == "POST" else None)
            assert status == 401, (method, path, status, body)
        for path in ("/health", "/ping"):
            assert server.get(path)[0] == 200
        for key in ("from-flag", "from-file-1", "from-file-2"):
            for headers in ({"Authorization": f"Bearer {key}"}, {"X-Api-Key": key}, {"Authorization": "Bearer wrong", "x-api-key": key}):
                assert server.get("/v1/models", headers=headers)[0] == 200
        for headers in ({"Authorization": "Bearer "}, {"X-Api-Key": ""}, {"Authorization": "Bearer from-flagx"}, {"X-Api-Key": "from-fla"}, {"Authorization": "Basic from-flag"}):
            assert server.get("/v1/models", headers=headers)[0] == 401
        assert not any("from-f" in line and "from-file" not in str(keys) for line in server.log)
        assert not any(word in "".join(server.log) for word in ("from-flag", "from-file-1"))
    with Replay([final("ok")], "--api-key", "k", "--metrics-without-key") as server:
        assert server.get("/metrics")[0] == 200 and server.get("/version")[0] == 401


def test_code_beside_a_model_is_not_read(tmp_path):
    """security: code from a model, CVE-2026-65119, C7. Scripts, pickles and `auto_map` beside a checkpoint: nothing opens them."""
    copy = tmp_path / "model"
    shutil.copytree(GOLDEN, copy)
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_evil.Tokenizer", None]}}))
    # Whoever opened one of these to read it would wait for ever.
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "pytorch_model.bin", "model.pt", "model.pkl", "adapter_model.bin", "setup.py", "__init__.py"):
        os.mkfifo(copy / name)
    with Server(copy, "--tokenizer", DEMO_TOKENIZER, "--trust-remote-code") as server:
        model = server.client().models.list().data[0].id
        assert server.client().completions.create(model=model, prompt="hi", max_tokens=2).usage.completion_tokens
        assert any("--trust-remote-code" in line for line in server.log)
    (copy / "model.safetensors").unlink()
    done = run("serve", copy, "--tokenizer", DEMO_TOKENIZER)
    assert done.returncode != 0 and "only safetensors" in done.stderr, done.stderr


def test_huge_orphans_do_not_stall(scripted):
    """security: orphan tool result, raullenchai/Rapid-MLX#731. A history as long as it may be is answered, and so are others."""
    turn = [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}]
    messages = ASK + turn + [{"role": "function", "name": "f", "content": ""}] * 16_000
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(scripted.post, CHAT, {"model": "m", "messages": messages})
        assert scripted.get("/health")[0] == 200
        assert slow.result()[0] == 400
    alive(scripted, "m")


def test_parsers_take_linear_time():
    """security: ReDoS in parsers, CVE-2025-71379. Answers of nested and unclosed markup are read as fast as they are written."""
    hostile = [
        [{"control": "<|channel|>"}, {"text": "final"}, {"control": "<|message|>"}, {"text": "<tool_call>" * 4000 + "{" * 4000}],
        [{"control": "<|channel|>"}] * 4000,
        [{"text": " to=functions." * 4000}, {"control": "<|message|>"}, {"text": '{"a":' * 4000}],
    ]
    with Replay(hostile, "--served-model-name", "m") as server:
        for _ in hostile:
            status, _, body = server.post(CHAT, {"model": "m", "messages": ASK, "tools": [TOOL], "max_tokens": 20_000})
            assert status == 200, body
        alive(server, "m")
