"""Answers in the hermes format, written as segments, and the flags of a server that speaks it."""

import json

from server import ROOT

# A small tokenizer of Qwen3's kind.
TOKENIZER = ROOT / "crates" / "chat" / "tests" / "data" / "qwen"
FLAGS = ["--tokenizer", TOKENIZER, "--chat-format", "hermes", "--tool-call-parser", "hermes", "--enable-auto-tool-choice"]


def control(name):
    return {"control": name}


def text(value):
    return {"text": value}


END = control("<|im_end|>")
CALL, CALL_END = control("<tool_call>"), control("</tool_call>")


def call(name, arguments):
    """One call, its arguments as Python writes JSON."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return [CALL, text(f"\n{body}\n"), CALL_END]


def answer(*parts):
    """Text and calls of a turn, a line break before each call."""
    segments = []
    for part in parts:
        if isinstance(part, str):
            segments.append(text(part))
        else:
            segments += ([text("\n")] if segments else []) + part
    return [*segments, END]


def raw(value):
    return [CALL, text(value), CALL_END, END]


# Well-formed answers and the odd ones that models write; each must survive the whole server.
SEQUENCES = {
    "text": answer("Paris."),
    "call": answer(call("search", {"query": "paris"})),
    "text then call": answer("Let me see.", call("search", {"query": "x"})),
    "two calls": answer(call("search", {"query": "a"}), call("search", {"query": "b"})),
    "call then text": [*call("search", {}), text("\nDone."), END],
    "nested": answer(call("search", {"query": {"a": [1, {"b": '}</tool_call>"{'}], "c": None, "-A": 2.5}})),
    "unicode": answer("né 👩‍👩‍👧", call("search", {"query": "日本 \n\t\\"})),
    "tags spelt out": [text('<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'), END],
    "no closing tag": [CALL, text('{"name": "search", "arguments": {"query": "a"}}'), END],
    "no closing tag, two calls": [CALL, text('{"name": "search", "arguments": {}}\n'), *call("search", {}), END],
    "a brace too few": raw('{"name": "search", "arguments": {"query": "a"}\n'),
    "a brace too many": raw('{"name": "search", "arguments": {"query": "a"}}}\n'),
    "line break in a string": raw('{"name": "search", "arguments": {"query": "a\nb"}}'),
    "python quotes": raw("{\"name\": \"search\", \"arguments\": {'query': 'a'}}"),
    "no arguments": raw('{"name": "search"}'),
    "arguments in a string": raw('{"name": "search", "arguments": "{\\"query\\": 1}"}'),
    "arguments first": raw('{"arguments": {"query": 1}, "name": "search"}'),
    "prose": [text("Write "), CALL, text(" before it."), END],
    "no JSON": raw("search(query)"),
    "empty": [END],
    "cut in text": [text("Half a sent")],
    "cut in a head": [text("Look.\n"), CALL, text('\n{"name": "sea')],
    "cut in arguments": [CALL, text('\n{"name": "search", "arguments": {"query": "ha')],
    "thinking": [control("<think>"), text("\nHm.\n"), control("</think>"), text("\n\nYes."), END],
    "thinking then call": [control("<think>"), text("\nHm.\n"), control("</think>"), text("\n\n"), *call("search", {}), END],
    "call while thinking": [control("<think>"), text("\nHm.\n"), *call("search", {}), END],
    "cut character": [{"bytes": "f09f98"}, END],
    "control token in text": [text("a"), control("<|vision_start|>"), text("b"), END],
    "end of text": [text("a"), control("<|endoftext|>")],
}
