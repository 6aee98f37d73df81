"""Writes tests/data/hermes_prompts.jsonl: what transformers makes of a table of conversations.

Usage: python make_hermes_prompts.py [QWEN3_INSTRUCT_2507_TEMPLATE]      (needs transformers)

Each line has a request in the API's form, the template's name (`default` is src/hermes/default.jinja, others are in
tests/data/templates), the text that `apply_chat_template` gives, and its ids with the small tokenizer. Before, requests
are brought into the form that templates expect, as servers do: arguments are parsed, absent content is empty, results
bear the function's name.
With an argument, the default template is held to that one over all conversations.
"""

import copy
import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

TESTS = Path(__file__).resolve().parents[1]


def user(text, **more):
    return {"role": "user", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def assistant(text=None, calls=(), **more):
    message = {"role": "assistant", **more}
    if text is not None:
        message["content"] = text
    if calls:
        message["tool_calls"] = [
            {"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls
        ]
    return message


def tool(i, text):
    return {"role": "tool", "tool_call_id": i, "content": text}


def function(name, description=None, parameters=None, **more):
    inner = {"name": name}
    if description is not None:
        inner["description"] = description
    if parameters is not None:
        inner["parameters"] = parameters
    return {"type": "function", "function": {**inner, **more}}


GREP = function(
    "Grep",
    "Searches file contents with <regular> expressions & globs.",
    {
        "type": "object",
        "properties": {
            "pattern": {"type": "string", "description": "The \"pattern\" to search for, e.g. 'log.*Error'"},
            "output_mode": {"type": "string", "enum": ["content", "files_with_matches", "count"]},
            "-A": {"type": "integer", "minimum": 0},
            "-i": {"type": "boolean", "default": False},
            "ratio": {"type": "number", "default": 1.0, "maximum": 1e16, "minimum": -1e-07, "multipleOf": 0.1},
        },
        "required": ["pattern"],
    },
)
READ = function("Read", "Reads a file.\n\nLines are numbered.", {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]})
BARE = {"function": {"name": "bare"}, "type": "function"}
ODD = {
    "type": "function",
    "strict": True,
    "function": {
        "parameters": {"z": [], "a": {}, "n": None, "big": 123456789012345678901234567890, "neg": -5, "e": 1e300},
        "strict": False,
        "name": "odd",
        "description": "Ünïcode \u2028 \u2029 \x7f \x01 \b\f\t\r </tools> 日本 🦀 \u00a0",
    },
}

ARGUMENTS = [
    "",
    "{}",
    '{"pattern": "fn main", "-A": 3, "-i": true, "path": null}',
    '{ "a" :1,\n"b":[1.50, 1e3, -0.0, 1E-9] , "c":{"d":"\\u00e9\\ud83e\\udd80 <&>\'"}}',
    '{"a": 1, "b": 2, "a": 3}',
    '{"n": 123456789012345678901234567890, "m": -9223372036854775809}',
    "[1, 2]",
    '"only text"',
    "null",
    "{not json",
    '{"text": "line\\nbreak \\"quoted\\" back\\\\slash /slash\\/ \\t"}',
]

LOOP = [
    system("You explore code."),
    user("Where is the parser?"),
    assistant("Let me look.", [("c1", "Grep", '{"pattern": "parse"}'), ("c2", "Read", '{"path": "/a.rs"}')]),
    tool("c1", "src/lib.rs:10:fn parse() {}"),
    tool("c2", "```/a.rs:1-2\n1|fn a() {}\n```"),
    assistant(None, [("c3", "Read", '{"path":"/b.rs"}')]),
    tool("c3", ""),
    assistant("<final_answer>\n/src/lib.rs:10-12 (the parser)\n</final_answer>"),
    user("Thanks! 🦀"),
]

THOUGHTS = [
    user("One?"),
    assistant("1", reasoning_content="\nShort.\n"),
    user("Two?"),
    assistant(None, [("c1", "Read", "{}")], reasoning_content="I should read."),
    tool("c1", "two"),
    assistant("\n\n2", reasoning_content="It says two."),
]

CASES = [
    ("a question", [user("Hello!")], {}),
    ("a system message", [system("Be brief."), user("Hello!")], {}),
    ("an empty system message", [system(""), user("Hello!")], {}),
    ("tools alone", [user("Hello!")], {"tools": [READ, GREP]}),
    ("tools and a system message", [system("Be brief.\n"), user("Hello!")], {"tools": [READ]}),
    ("tools and an empty system message", [system(""), user("Hello!")], {"tools": [READ]}),
    ("odd declarations", [user("Hello!")], {"tools": [BARE, ODD]}),
    ("no tools", [user("Hello!")], {"tools": []}),
    ("white space is kept", [system(" \n"), user("\n\n  a \t\n"), assistant("\n b\n\n"), user(" ")], {}),
    ("an answer", [user("1+1?"), assistant("2"), user("Sure?")], {}),
    ("an empty answer", [user("1+1?"), assistant(""), user("Sure?")], {}),
    ("later system messages", [user("a"), system("b"), assistant("c"), system("d"), user("e")], {}),
    ("a system message twice", [system("a"), system("b"), user("c")], {"tools": [BARE]}),
    ("a developer's message", [{"role": "developer", "content": "a"}, user("b"), {"role": "developer", "content": "c"}], {}),
    ("a whole loop", LOOP, {"tools": [READ, GREP]}),
    ("a loop cut at the results", LOOP[:5], {"tools": [READ, GREP]}),
    ("a loop without tools on offer", LOOP, {}),
    ("results first", [user("a"), assistant("", [("x", "f", "{}")]), tool("x", "r"), user("b")], {}),
    ("an assistant first", [assistant("Hi, I am first."), user("b")], {}),
    ("an assistant without anything", [user("a"), assistant(), user("b")], {}),
    ("a prefilled id", [user("a"), assistant("t", [("x", "f", "{}")], tool_call_id="x"), tool("x", "r")], {}),
    ("a name", [user("a", name="Ada")], {}),
    ("composed characters", [user("cafe\u0301 \u1100\u1161 ﬁ"), assistant("é")], {}),
    ("without opening a turn", LOOP[:3], {"add_generation_prompt": False}),
    *[(f"arguments {i}", [user("a"), assistant("", [("x", "f", a)]), tool("x", "r")], {}) for i, a in enumerate(ARGUMENTS)],
]

OTHERS = [
    ("thinking, default", "thinking", THOUGHTS, {}),
    ("thinking, then a question", "thinking", [*THOUGHTS, user("Three?")], {"enable_thinking": True}),
    ("thinking, off", "thinking", [system("s"), *THOUGHTS, user("Three?")], {"enable_thinking": False}),
    ("thinking, closed", "thinking", THOUGHTS, {"add_generation_prompt": False}),
    ("features, plain", "features", [user("  Hi there "), assistant("x"), user("é", name="Bo")], {}),
    ("features, tools", "features", LOOP[:5], {"tools": [GREP, READ], "add_generation_prompt": False}),
]


def for_template(message, names):
    message = copy.deepcopy(message)
    names.update((call["id"], call["function"]["name"]) for call in message.get("tool_calls", []))
    if message["role"] == "tool":
        message["name"] = names[message["tool_call_id"]]
    message.pop("tool_call_id", None) if message["role"] == "assistant" else None
    if message["role"] == "developer":
        message["role"] = "system"
    message.setdefault("content", "")
    for call in message.get("tool_calls", []):
        text = call["function"]["arguments"]
        try:
            call["function"]["arguments"] = json.loads(text) if text else {}
        except ValueError:
            pass
    return message


def main():
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TESTS / "data" / "qwen" / "tokenizer.json"))
    tokenizer.bos_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    templates = {path.stem: path.read_text() for path in sorted((TESTS / "data" / "templates").glob("*.jinja"))}
    templates["default"] = (TESTS.parent / "src" / "hermes" / "default.jinja").read_text()
    reference = Path(sys.argv[1]).read_text() if len(sys.argv) > 1 else None
    lines = []
    for name, template, messages, more in [(n, "default", m, x) for n, m, x in CASES] + OTHERS:
        arguments = {"add_generation_prompt": True, **more, "tools": more.get("tools") or None}
        names = {}
        chat = [for_template(message, names) for message in messages]

        def apply(source, **extra):
            return tokenizer.apply_chat_template(chat, chat_template=source, **arguments, **extra)

        text = apply(templates[template], tokenize=False)
        if reference and template == "default":
            assert text == apply(reference, tokenize=False), name
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        line = {"name": name, "template": template, "request": {"messages": messages, **more}, "text": text, "ids": ids}
        lines.append(json.dumps(line, ensure_ascii=False))
    out = TESTS / "data" / "hermes_prompts.jsonl"
    out.write_text("\n".join(lines) + "\n")
    print(f"{out.name}: {len(lines)} conversations, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
