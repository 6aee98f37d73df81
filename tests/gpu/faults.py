#!/usr/bin/env python3
"""Makes the GPU of a server fail and looks at what clients and the shell see: faults.py CTXSERVE [MODEL_DIR]

CTXSERVE must be built with `--features fault-injection`. Without a GPU this says so and passes; CTXSERVE_REQUIRE_GPU=1 makes that a failure.
"""
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "crates" / "chat" / "assets" / "demo-tokenizer.json"
READY = re.compile(r"ready on http://[^ ]+:(\d+)")
NO_GPU = re.compile(r"no NVIDIA driver|no CUDA device|no CUDA kernels|needs 13\.0|compute capability|driver version|initialisation")
START_SECONDS, END_SECONDS, STREAMS, TOKENS = 120, 10, 4, 600


class Server:
    def __init__(self, binary, model, *flags, inject=None):
        keep = {name: value for name, value in os.environ.items() if not name.startswith("CTXSERVE_")}
        env = {**keep, "HF_HUB_OFFLINE": "1", **({"CTXSERVE_INJECT": inject} if inject else {})}
        command = [binary, "serve", "--model", str(model), "--tokenizer", str(TOKENIZER), "--device", "cuda", "--host",
                   "127.0.0.1", "--port", "0", "--max-model-len", "2048", "--max-num-seqs", "16", *flags]
        if "--kv-cache-memory-bytes" not in flags:
            command += ["--kv-cache-memory-bytes", "256M"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
        self.log, self.port, self.ready, self.ended = [], None, threading.Event(), None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            if match := READY.search(line):
                self.port = int(match.group(1))
                self.ready.set()
        self.process.wait()
        self.ended = time.monotonic()
        self.ready.set()

    def starts(self):
        """Whether it gets ready; false if it ends before."""
        if not self.ready.wait(START_SECONDS):
            self.process.kill()
            raise AssertionError("neither ready nor ended:\n" + self.text())
        return self.port is not None

    def text(self):
        return "".join(self.log)

    def get(self, path):
        """A status, or "refused" where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return "refused"
        finally:
            connection.close()

    def wait(self, seconds):
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still there after {seconds} s:\n" + self.text()) from None


class Stream(threading.Thread):
    """One streaming request: its frames, its error, and when the error came."""

    def __init__(self, port, number, tokens=TOKENS):
        super().__init__(daemon=True)
        self.port, self.number, self.tokens = port, number, tokens
        self.status, self.frames, self.error, self.at, self.broken = None, 0, None, None, None
        self.start()

    def run(self):
        body = {"model": "m", "messages": [{"role": "user", "content": f"Count to {self.number + 9}."}], "stream": True,
                "max_tokens": self.tokens, "temperature": 1.0, "seed": self.number, "ignore_eos": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            self.status = response.status
            if response.status != 200:
                self.error = json.loads(response.read())["error"]
                self.at = time.monotonic()
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                frame = json.loads(line[6:])
                if "error" in frame:
                    self.error, self.at = frame["error"], time.monotonic()
                else:
                    self.frames += 1
        except (OSError, http.client.HTTPException) as broken:
            self.broken = repr(broken)
        finally:
            connection.close()


def check(holds, what):
    if not holds:
        raise AssertionError(what)


def sound(binary, model):
    """Nothing is injected: the self-test runs, requests are answered, the end is clean."""
    server = Server(binary, model, "--served-model-name", "m")
    if not server.starts():
        if NO_GPU.search(server.text()):
            return None
        raise AssertionError("did not start:\n" + server.text())
    said = re.search(r"self-test: \d+ cases in \d+ ms", server.text())
    check(said, "no self-test in the log:\n" + server.text())
    stream = Stream(server.port, 0, 40)
    stream.join(60)
    check(stream.status == 200 and not stream.error and stream.frames > 0, f"{stream.status}, {stream.error}, {stream.broken}")
    check(server.get("/health") == 200, "not healthy")
    server.process.send_signal(signal.SIGTERM)
    code = server.wait(END_SECONDS)
    check(code == 0, f"exit code {code}:\n{server.text()}")
    return f"{said.group(0)}; {stream.frames} frames; exit code 0 after SIGTERM"


def step(binary, model, inject, cause):
    """A step fails while streams run."""
    server = Server(binary, model, "--served-model-name", "m", inject=inject)
    check(server.starts(), "did not start:\n" + server.text())
    check("fail on purpose" in server.text(), "this binary injects no faults; build it with --features fault-injection")
    check(server.get("/health") == 200, "not healthy before")
    streams = [Stream(server.port, number) for number in range(STREAMS)]
    for stream in streams:
        stream.join(60)
    check(all(stream.at for stream in streams), f"streams without an error: {[(s.status, s.frames, s.broken) for s in streams]}")
    first, seen = min(stream.at for stream in streams), []
    while server.ended is None and time.monotonic() < first + END_SECONDS:
        seen.append(server.get("/health"))
        time.sleep(0.02)
    code = server.wait(max(0.1, first + END_SECONDS - time.monotonic()))
    seconds = time.monotonic() - first
    time.sleep(0.2)  # for the end of the log
    codes = {stream.error.get("code") for stream in streams}
    frames = [stream.frames for stream in streams]
    check(codes == {"engine_fault"}, f"error codes {codes}: {[s.error for s in streams]}")
    check(max(frames) > 0, f"no stream had begun: {frames}")
    check(set(seen) <= {503, "refused"}, f"/health after the fault: {seen}")
    check(code not in (0, None), f"exit code {code}")
    check(code > 0, f"ended by signal {-code}:\n{server.text()}")
    check(seconds < END_SECONDS, f"{seconds:.1f} s from the fault to the end")
    last = server.log[-1].strip()
    check(re.search(cause, last), f"the last line does not name the cause: {last}")
    check("panick" not in server.text(), "a panic:\n" + server.text())
    health = sorted({str(status) for status in seen}) or ["it had ended already"]
    return f"{frames} frames, then {streams[0].error['message']!r}; /health {', '.join(health)}; exit code {code} in {seconds:.2f} s; {last}"


def start(binary, model, inject, flags, cause):
    """It cannot start."""
    began = time.monotonic()
    server = Server(binary, model, *flags, inject=inject)
    check(not server.starts(), f"it started; was it built with --features fault-injection?\n{server.text()}")
    code = server.wait(END_SECONDS)
    time.sleep(0.2)  # for the end of the log
    last = server.log[-1].strip() if server.log else ""
    check(code > 0, f"exit code {code}:\n{server.text()}")
    check("panick" not in server.text(), "a panic:\n" + server.text())
    check(re.search(cause, last), f"the last line does not name the cause: {last}")
    return f"exit code {code} in {time.monotonic() - began:.2f} s; {last}"


def main():
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    model = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "tests" / "golden" / "served").resolve()
    failed = False
    cases = [
        ("sound", lambda: sound(binary, model)),
        ("trap in a step", lambda: step(binary, model, "trap:40", r"CUDA error \d+")),
        ("page out of range", lambda: step(binary, model, "page:40", r"page")),
        ("trap in the first token", lambda: start(binary, model, "trap:1", [], r"CUDA error \d+")),
        ("no memory for the KV cache", lambda: start(binary, model, "memory", ["--skip-self-test"], r"\d+ bytes .* \d+ are free")),
        ("no memory for the self-test", lambda: start(binary, model, "memory", [], r"self-test.*\d+ bytes")),
        ("a KV cache beyond the device", lambda: start(binary, model, None, ["--kv-cache-memory-bytes", "9000G"], r"[\d.]+ GiB are free")),
        ("a share too small for the weights", lambda: start(binary, model, None, ["--gpu-memory-utilization", "0.001"], r"--gpu-memory-utilization")),
    ]
    for name, case in cases:
        try:
            found = case()
        except AssertionError as error:
            print(f"{name}: FAILED: {error}", flush=True)
            failed = True
            continue
        if found is None:
            required = os.environ.get("CTXSERVE_REQUIRE_GPU") == "1"
            print(f"faults: {'FAILED' if required else 'skipped'}: there is no GPU, or this build has no kernels")
            sys.exit(int(required))
        print(f"{name}: {found}", flush=True)
    print("faults: FAILED" if failed else "faults: passed")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
