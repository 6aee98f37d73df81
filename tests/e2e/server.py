"""Starts the ctxserve binary and talks to it. Every wait is bounded."""

import http.client
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time

from openai import OpenAI

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("CTXSERVE_BIN", ROOT / "target" / "release" / "ctxserve"))
START_SECONDS = 120
STOP_SECONDS = 60
READY = re.compile(r"ready on http://([^ ]+:(\d+))")


def environment(extra=None):
    """The test's environment without anything that would change the server's answers."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "VLLM_", "CTXSERVE_", "RUST_LOG"))}
    return {**keep, "HF_HUB_OFFLINE": "1", **(extra or {})}


def run(*args, stdin=None, env=None, timeout=60):
    """Runs the binary to its end."""
    return subprocess.run(
        [BINARY, *map(str, args)], input=stdin, capture_output=True, text=True, timeout=timeout, env=environment(env)
    )


class Server:
    """A running server on a free port."""

    def __init__(self, *args, env=None, port=0):
        self.process = subprocess.Popen(
            [BINARY, *map(str, args), "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(env),
        )
        self.log = []
        ready = queue.Queue()
        self.reader = threading.Thread(target=self._read, args=(ready,), daemon=True)
        self.reader.start()
        try:
            self.port = ready.get(timeout=START_SECONDS)
        except queue.Empty:
            self.process.kill()
            raise AssertionError("not ready in time:\n" + "".join(self.log)) from None
        if self.port is None:
            raise AssertionError("ended before it was ready:\n" + "".join(self.log))
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self, ready):
        for line in self.process.stderr:
            self.log.append(line)
            if match := READY.search(line):
                ready.put(int(match.group(2)))
        ready.put(None)

    def client(self, api_key="none", timeout=120):
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=timeout)

    def request(self, method, path, body=None, headers=None, timeout=120):
        """One plain HTTP request: status, headers, body (JSON if it is)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = json.dumps(body) if isinstance(body, (dict, list)) else body
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            raw = response.read()
            try:
                parsed = json.loads(raw)
            except ValueError:
                parsed = raw.decode()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, parsed
        finally:
            connection.close()

    def get(self, path, **kwargs):
        return self.request("GET", path, **kwargs)

    def post(self, path, body, **kwargs):
        return self.request("POST", path, body, **kwargs)

    def open_stream(self, path, body):
        """Begins a request and leaves its response unread: connection, response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def metric(self, name):
        """The sum of a metric's samples."""
        _, _, text = self.get("/metrics")
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if re.match(re.escape(name) + r"(\{|\s)", line)
        ]
        assert values, f"{name} is not in /metrics"
        return sum(values)

    def wait(self, condition, what, seconds=60):
        """Polls until the condition holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return
            time.sleep(0.02)
        raise AssertionError(f"{what}: not within {seconds} s\n" + "".join(self.log[-20:]))

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def exit_code(self, seconds=STOP_SECONDS):
        code = self.process.wait(seconds)
        self.reader.join(10)
        return code

    def stop(self):
        if self.process.poll() is None:
            self.signal()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Replay(Server):
    """A server whose answers are scripted, one line a request, in turn."""

    def __init__(self, answers, *args, env=None, port=0):
        self.file = tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8")
        for answer in answers:
            self.file.write(json.dumps({"segments": answer} if isinstance(answer, list) else answer) + "\n")
        self.file.flush()
        super().__init__("--model", f"replay:{self.file.name}", *args, env=env, port=port)

    def stop(self):
        super().stop()
        self.file.close()


def parse(answers):
    """What `ctxserve parse` makes of the same sequences."""
    lines = "".join(json.dumps({"segments": answer} if isinstance(answer, list) else answer) + "\n" for answer in answers)
    done = run("parse", stdin=lines)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
