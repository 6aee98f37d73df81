#!/usr/bin/env python3
"""Runs the requests of matrix.jsonl against a server with the OpenAI API, beside a canary.

    tests/security/matrix.py http://127.0.0.1:8000 --model demo
    tests/security/matrix.py http://other:9000 --model m --api-key k --lenient --logits 151936

Every request has to get the status and the `error.param` of its row, in the OpenAI envelope, while another request is
answered over and over and must always get the same text, and /health must stay 200. With --lenient any 4xx will do where a
row wants a 4xx: that is for other servers, which word their errors differently. Nothing but Python's own library is needed.

A row is a JSON object:

    class, ids     the row of the security matrix, and the published flaws of that class
    routes         paths; a route that the server lacks is skipped, and said so
    fields         what to set in an ordinary request of the route: `n`, or a path such as `messages[0].content`
    values         JSON values, or one of the forms below; each field is tried with each value
    with           further fields of the request
    status         what must come: a number, or a list of numbers
    param          `error.param`; "$field" is the field, a trailing * allows any ending, absent is not looked at

    {"$list": [x, 5]}  {"$text": ["ab", 5]}      five of them
    {"$nest": ["[", "]", 900, "1"]}              so many levels, around the last if it is there
    {"$raw": "1e999"}                            JSON text as it stands
    {"$quoted": {"$nest": ["(", ")", 900]}}      the text of another form as a string
    {"$object": [[{"$width": 0}, 1.5]]}          an object whose keys are forms
    {"$width": -1}  {"$context": 1}              the width of the logits, the longest context, and so much more
"""

import argparse
import copy
import http.client
import json
import pathlib
import re
import sys
import threading
import urllib.parse

ROWS = pathlib.Path(__file__).with_name("matrix.jsonl")
CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
HELLO = [{"role": "user", "content": "hi"}]
BASES = {
    CHAT: {"messages": HELLO, "max_tokens": 4},
    TEXT: {"prompt": "hi", "max_tokens": 4},
    TOKENIZE: {"prompt": "hi"},
    DETOKENIZE: {"tokens": [1]},
    RESPONSES: {"input": "hi", "max_output_tokens": 16},
    MESSAGES: {"messages": HELLO, "max_tokens": 4},
}
CANARY = {"prompt": "The canary sings", "max_tokens": 12, "temperature": 0}


class Client:
    """Plain requests to one server."""

    def __init__(self, url, model, api_key=None, timeout=120):
        place = urllib.parse.urlsplit(url)
        self.host, self.port, self.timeout = place.hostname, place.port or 80, timeout
        self.model, self.headers = model, {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def send(self, method, path, body=None):
        """Status and body, parsed if it is JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        try:
            connection.request(method, path, body, self.headers)
            response = connection.getresponse()
            raw = response.read()
        finally:
            connection.close()
        try:
            return response.status, json.loads(raw)
        except ValueError:
            return response.status, raw.decode(errors="replace")

    def post(self, path, body):
        return self.send("POST", path, body if isinstance(body, (str, bytes)) else json.dumps(body))


class Facts:
    """What the forms of values need to know of a server."""

    def __init__(self, width, context):
        self.width, self.context = width, context

    def value(self, value):
        """The JSON text of a value."""
        if isinstance(value, dict) and len(value) == 1:
            (form, of), = value.items()
            if form == "$list":
                return "[" + ",".join([self.value(of[0])] * of[1]) + "]"
            if form == "$text":
                return json.dumps(of[0] * of[1])
            if form == "$nest":
                return of[0] * of[2] + "".join(of[3:]) + of[1] * of[2]
            if form == "$raw":
                return of
            if form == "$quoted":
                return json.dumps(self.value(of))
            if form == "$object":
                keys = [self.value(key) for key, _ in of]
                return None if None in keys else "{" + ",".join(f'"{key}":{self.value(item)}' for key, (_, item) in zip(keys, of)) + "}"
            if form in ("$width", "$context"):
                known = self.width if form == "$width" else self.context
                return None if known is None else str(known + of)
        if isinstance(value, dict):
            parts = {key: self.value(item) for key, item in value.items()}
            if None in parts.values():
                return None
            return "{" + ",".join(f"{json.dumps(key)}:{text}" for key, text in parts.items()) + "}"
        if isinstance(value, list):
            parts = [self.value(item) for item in value]
            return None if None in parts else "[" + ",".join(parts) + "]"
        return json.dumps(value)


def rows(path=ROWS):
    """The rows of a file, comments (lines that begin with //) left out."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip() and not line.startswith("//")]


def with_field(body, path, value):
    """The body with one field set, which may be inside lists and objects."""
    body = copy.deepcopy(body)
    steps = [int(number) if number else name for name, number in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path)]
    place = body
    for step, after in zip(steps, steps[1:]):
        if isinstance(place, dict) and step not in place:
            place[step] = [] if isinstance(after, int) else {}
        place = place[step]
    if isinstance(place, list) and steps[-1] == len(place):
        place.append(value)
    else:
        place[steps[-1]] = value
    return body


def requests(row, facts, model):
    """Route, field, what was tried (short) and body of every request that a row stands for."""
    mark = "\x01value\x01"
    for route in row["routes"]:
        for field in row["fields"]:
            for value in row["values"]:
                text = facts.value(value)
                more = facts.value(row.get("with", {}))
                if text is None or more is None:
                    continue
                base = {"model": model, **BASES[route], **json.loads(more)}
                body = json.dumps(with_field(base, field, mark)).replace(json.dumps(mark), text)
                yield route, field, text if len(text) <= 60 else f"{text[:57]}...", body


def judge(row, field, status, answer, lenient=False):
    """What is wrong with an answer, or None."""
    wanted = row["status"] if isinstance(row["status"], list) else [row["status"]]
    refused = 400 <= status < 500
    if status not in wanted and not (lenient and refused and any(400 <= want < 500 for want in wanted)):
        return f"status {status}, not {wanted}: {str(answer)[:200]}"
    if lenient or status < 400:
        return None
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict) or "message" not in error:
        return f"no error envelope: {str(answer)[:200]}"
    param = row.get("param")
    if param is None or "param" not in error:
        return None
    param = param.replace("$field", field)
    found = error["param"] or ""
    fits = found.startswith(param[:-1]) if param.endswith("*") else found == param
    return None if fits else f"param {found!r}, not {param!r}: {error['message'][:200]}"


class Canary:
    """A request that is repeated while others are sent; its text must never change."""

    def __init__(self, client):
        self.client, self.problems, self.sung = client, [], 0
        self.alone = self._sing()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _sing(self):
        status, answer = self.client.post(TEXT, {"model": self.client.model, **CANARY})
        if status != 200:
            return f"status {status}: {str(answer)[:200]}"
        return answer["choices"][0]["text"]

    def _run(self):
        while not self.stop.wait(0.2):
            try:
                text = self._sing()
            except OSError as error:
                text = repr(error)
            self.sung += 1
            if text != self.alone:
                self.problems.append(f"the canary said {text!r}, alone it said {self.alone!r}")
                return

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(self.client.timeout)


def served(client, log=print):
    """Routes that answer an ordinary request."""
    found = []
    for route, base in BASES.items():
        status, answer = client.post(route, {"model": client.model, **base})
        if status == 200:
            found.append(route)
        else:
            log(f"skipped: {route}, which answers an ordinary request with {status}: {str(answer)[:120]}")
    return found


def run(client, width=None, lenient=False, log=print, path=ROWS):
    """Sends everything. Returns the problems, and how many requests were sent for each class."""
    _, models = client.send("GET", "/v1/models")
    context = next((m.get("max_model_len") for m in models["data"] if m["id"] == client.model), None)
    facts, routes, problems, counts = Facts(width, context), served(client, log), [], {}
    if width is None:
        log("skipped: values that need the width of the logits (--logits)")
    with Canary(client) as canary:
        for row in rows(path):
            count = 0
            for route, field, shown, body in requests(row, facts, client.model):
                if route not in routes:
                    continue
                count += 1
                where = f"{row['class']}: {route} {field}={shown}"
                try:
                    status, answer = client.post(route, body)
                except OSError as error:
                    problems.append(f"{where}: {error!r}")
                    continue
                if wrong := judge(row, field, status, answer, lenient):
                    problems.append(f"{where}: {wrong}")
            counts[row["class"]] = counts.get(row["class"], 0) + count
            health, _ = client.send("GET", "/health")
            if health != 200:
                problems.append(f"{row['class']}: /health is {health} afterwards")
    problems.extend(canary.problems)
    if canary.sung == 0:
        problems.append("the canary was never heard")
    return problems, counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key")
    parser.add_argument("--logits", type=int, help="width of the logits, which ids are checked against")
    parser.add_argument("--lenient", action="store_true")
    args = parser.parse_args()
    client = Client(args.url, args.model, args.api_key)
    problems, counts = run(client, args.logits, args.lenient)
    for name, count in counts.items():
        print(f"{count:5} requests: {name}")
    for problem in problems:
        print(f"WRONG {problem}")
    print(f"{len(problems)} wrong of {sum(counts.values())}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
