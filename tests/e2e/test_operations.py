"""Keys, limits, disconnects, signals and wrong starts."""

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from server import Server, run

LONG = {"model": "demo", "prompt": "Hello", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
CONTEXT = ["--max-model-len", "16k"]


def test_keys():
    with Server("--model", "demo", "--api-key", "key-of-one", "key-of-two") as server:
        for key in ("key-of-one", "key-of-two"):
            assert server.client(api_key=key).models.list().data
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").models.list()
        for path in ("/v1/models", "/metrics", "/version"):
            status, _, body = server.get(path)
            assert status == 401 and body["error"]["type"] == "invalid_request_error", path
        assert server.post("/tokenize", {"prompt": "x"})[0] == 401
        assert server.get("/health")[0] == 200
        assert "key-of" not in "".join(server.log)


def test_a_key_from_the_environment():
    for name in ("VLLM_API_KEY", "CTXSERVE_API_KEY"):
        with Server("--model", "demo", env={name: "k"}) as server:
            assert server.get("/v1/models")[0] == 401
            assert server.client(api_key="k").models.list().data


def test_a_full_queue_is_429_with_retry_after():
    """OPS-16."""
    with Server("--model", "demo", "--max-num-seqs", 1, "--max-num-queued-reqs", 1, *CONTEXT) as server:
        first = server.open_stream("/v1/completions", LONG)
        second = server.open_stream("/v1/completions", LONG)
        assert first[1].status == second[1].status == 200
        status, headers, body = server.post("/v1/completions", {**LONG, "stream": False})
        assert status == 429 and int(headers["retry-after"]) >= 1, (status, headers, body)
        assert body["error"]["type"] == "rate_limit_error" or body["error"]["code"], body
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="demo", prompt="x")
        for connection, _ in (first, second):
            connection.close()
        server.wait(lambda: server.metric("vllm:num_requests_running") == 0, "disconnected requests end")
        assert server.client().completions.create(model="demo", prompt="x", max_tokens=1)


def test_a_disconnect_frees_everything():
    """OPS-13."""
    with Server("--model", "demo", *CONTEXT) as server:
        for stream in (True, False):
            streams = [server.open_stream("/v1/completions", LONG) for _ in range(3)] if stream else []
            if not stream:
                with ThreadPoolExecutor(1) as pool:
                    with pytest.raises(openai.APITimeoutError):
                        pool.submit(
                            server.client(timeout=1).completions.create,
                            model="demo",
                            prompt="Hello",
                            max_tokens=100_000,
                            extra_body={"ignore_eos": True},
                        ).result()
            else:
                server.wait(lambda: server.metric("vllm:num_requests_running") == 3, "three run")
                assert server.metric("vllm:kv_cache_usage_perc") > 0
            for connection, response in streams:
                response.close()
                connection.close()
            server.wait(lambda: server.metric("vllm:num_requests_running") == 0, "none run")
            server.wait(lambda: server.metric("vllm:kv_cache_usage_perc") == 0, "no page is held")


def test_sigterm_drains():
    """OPS-21."""
    with Server("--model", "demo", "--shutdown-timeout", 60, *CONTEXT) as server:
        body = {**LONG, "max_tokens": 1500}
        connection, response = server.open_stream("/v1/completions", body)
        assert response.status == 200
        response.read1(64)
        server.signal(signal.SIGTERM)
        server.wait(lambda: any("drain" in line or "shutting down" in line for line in server.log), "it drains")
        try:
            refused = server.post("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 1}, timeout=30)
            assert refused[0] == 503, refused
            assert server.get("/health", timeout=30)[0] == 503
        except OSError:
            # The stream ended first, and the server with it.
            pass
        rest = response.read().decode()
        connection.close()
        assert rest.rstrip().endswith("data: [DONE]"), rest[-300:]
        assert '"finish_reason":"length"' in rest
        assert server.exit_code() == 0


def test_a_drain_has_an_end():
    """OPS-21."""
    with Server("--model", "demo", "--shutdown-timeout", 0.2, *CONTEXT) as server:
        connection, response = server.open_stream("/v1/completions", LONG)
        response.read1(64)
        server.signal(signal.SIGINT)
        rest = response.read().decode()
        connection.close()
        assert rest.rstrip().endswith("data: [DONE]"), rest[-300:]
        assert server.exit_code() == 0


def test_a_second_signal_stops_at_once():
    """OPS-21."""
    with Server("--model", "demo", "--shutdown-timeout", 600, *CONTEXT) as server:
        connection, response = server.open_stream("/v1/completions", {**LONG, "n": 4})
        response.read1(64)
        server.signal(signal.SIGTERM)
        server.wait(lambda: any("shutting down" in line for line in server.log), "the first signal arrives")
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 130
        connection.close()


def test_no_model_means_the_demo_and_says_so():
    with Server() as server:
        assert [model.id for model in server.client().models.list().data] == ["demo"]
        assert any("no model named" in line for line in server.log)


def test_json_logs_have_one_line_a_request():
    with Server("--model", "demo", "--log-format", "json") as server:
        server.client().completions.create(model="demo", prompt="a secret prompt", max_tokens=3)
        server.stop()
        lines = [json.loads(line) for line in server.log]
        requests = [line for line in lines if "completion" in json.dumps(line) and "3" in json.dumps(line)]
        assert requests and not any("a secret prompt" in json.dumps(line) for line in lines)


def test_a_config_file_and_the_flags_that_win(tmp_path):
    config = tmp_path / "serve.toml"
    config.write_text('model = "demo"\nserved_model_name = ["from-file"]\nmax-model-len = 2048\n')
    with Server("--config", config) as server:
        model = server.client().models.list().data[0]
        assert (model.id, model.model_extra["max_model_len"]) == ("from-file", 2048)
    with Server("--config", config, "--served-model-name", "a", "b", "--max_model_len=1k") as server:
        models = server.client().models.list().data
        assert [model.id for model in models] == ["a", "b"]
        assert models[0].model_extra["max_model_len"] == 1000


def test_the_card_s_flags_serve_the_demo():
    with Server(
        "serve", "demo", "--trust-remote-code", "--dtype", "auto", "--gpu-memory-utilization", "0.9",
        "--max-num-batched-tokens", "64000", "--kv-cache-dtype", "fp8", "--enable-auto-tool-choice",
        "--tool-call-parser", "openai", "--tensor-parallel-size", "1", "--attention-backend", "flashinfer",
        "--enable-chunked-prefill", "--max-num-seqs", "16",
    ) as server:  # fmt: skip
        log = "".join(server.log)
        for flag in ("--trust-remote-code", "--attention-backend"):
            assert flag in log, flag
        assert server.client().completions.create(model="demo", prompt="x", max_tokens=2)


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        (["--max-modle-len", "5"], ["--max-modle-len", "--max-model-len"], 2),
        (["--context-length", "5"], ["SGLang", "--max-model-len"], 2),
        (["--tensor-parallel-size", "2"], ["--tensor-parallel-size", "one device"], 2),
        (["--device", "cuda"], ["--device cuda: "], 1),
        (["--model", "demo", "--tool-call-parser", "hermes"], ["hermes", "harmony"], 2),
        (["--model", "/no/such/model"], ["/no/such/model"], 1),
        (["--model", "no-such-profile"], ["no-such-profile", "context-1-mxfp4"], 1),
        (["--model", "owner/name"], ["owner/name", "HF_HUB_OFFLINE"], 1),
        (["--model", "replay:/no/such/file"], ["/no/such/file"], 1),
        (["--config", "/no/such/file"], ["/no/such/file"], 2),
        (["--host", "no.such.host.invalid"], ["no.such.host.invalid"], 1),
        (["--max-model-len", "10M"], ["--max-model-len", "positions"], 1),
        (["--chat-format", "hermes"], ["hermes"], 1),
        (["--override-generation-config", '{"temprature": 1}'], ["temprature"], 1),
        (["--kv-cache-memory-bytes", "1KiB", "--max-model-len", "4096"], ["KV cache"], 1),
    ],
)
def test_wrong_starts_say_why(args, words, code, tmp_path):
    """OPS-05, OPS-09."""
    done = run("serve", "--port", "0", *args, env={"HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert "panicked" not in done.stderr and "RUST_BACKTRACE" not in done.stderr


def test_a_taken_port_is_refused_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", "demo", "--host", "127.0.0.1", "--port", port)
        assert done.returncode == 1 and str(port) in done.stderr and "in use" in done.stderr, done.stderr
        assert "device:" not in done.stderr


def test_many_at_once_are_all_answered():
    with Server("--model", "demo", "--max-num-seqs", 8) as server:
        client = server.client()

        def ask(seed):
            return client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "Hi"}], seed=seed, max_tokens=30
            ).choices[0]

        alone = [ask(seed) for seed in range(16)]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(ask, range(16)))
        assert [c.message.content for c in together] == [c.message.content for c in alone]
        server.wait(lambda: server.metric("vllm:num_requests_running") == 0, "all done")
