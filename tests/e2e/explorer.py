"""A repository explorer that talks to the server as FastContext's client does: its requests, its loop, its tools."""

import fnmatch
import json
import pathlib
import re

LAST_TURN = "Max number of turns reached. Please provide the final answer based on the information you have gathered."

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "Read",
            "description": "Reads a file, with line numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "offset": {"type": "integer", "description": "First line, from 1"},
                    "limit": {"type": "integer"},
                },
                "required": ["path"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "Glob",
            "description": "Finds files by pattern.",
            "parameters": {
                "type": "object",
                "properties": {"pattern": {"type": "string"}, "directory": {"type": "string"}},
                "required": ["pattern"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "Grep",
            "description": "Searches file contents.",
            "parameters": {
                "type": "object",
                "properties": {
                    "pattern": {"type": "string"},
                    "path": {"type": "string"},
                    "output_mode": {"type": "string", "enum": ["content", "files_with_matches", "count"]},
                    "-A": {"type": "integer"},
                    "-i": {"type": "boolean"},
                },
                "required": ["pattern"],
            },
        },
    },
]


class Explorer:
    """One exploration of a directory."""

    def __init__(self, client, model, root, max_turns=4, streaming=False, **extra):
        self.client, self.model, self.root = client, model, pathlib.Path(root)
        self.max_turns, self.streaming, self.extra = max_turns, streaming, extra
        listing = "\n".join(sorted(path.name for path in self.root.iterdir()))
        self.messages = [{"role": "system", "content": f"You explore code.\nWorkspace Path: {root}\n```\n{listing}\n```"}]
        self.usage = []

    def ask(self, query):
        """The final answer's text."""
        self.messages.append({"role": "user", "content": query})
        for _ in range(self.max_turns):
            content, calls = self.turn()
            if not calls:
                return content
        self.messages.append({"role": "user", "content": LAST_TURN})
        content, calls = self.turn()
        return f"No final answer after {self.max_turns} turns." if calls else content

    def turn(self, **more):
        request = {
            "model": self.model,
            "messages": self.messages,
            "tools": TOOLS,
            "max_completion_tokens": 4096,
            "temperature": 0.7,
            "top_p": 0.95,
            **self.extra,
            **more,
        }
        content, calls = (self.streamed if self.streaming else self.whole)(request)
        message = {"role": "assistant"}
        if content is not None:
            message["content"] = content
        if calls:
            message["tool_calls"] = [
                {"id": i, "type": "function", "function": {"arguments": arguments, "name": name}}
                for i, name, arguments in calls
            ]
            message["tool_call_id"] = calls[0][0]
        self.messages.append(message)
        for i, name, arguments in calls:
            self.messages.append({"role": "tool", "content": self.run(name, arguments), "tool_call_id": i})
        return content, calls

    def whole(self, request):
        answer = self.client.chat.completions.create(**request)
        assert len(answer.choices) == 1 and answer.usage is not None
        self.usage.append(answer.usage)
        message = answer.choices[0].message
        assert message.role == "assistant"
        calls = [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or []]
        assert (answer.choices[0].finish_reason == "tool_calls") == bool(calls)
        return message.content, calls

    def streamed(self, request):
        content, calls = None, []
        for chunk in self.client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
            if not chunk.choices:
                self.usage.append(chunk.usage)
                continue
            delta = chunk.choices[0].delta
            if delta.content:
                content = (content or "") + delta.content
            for piece in delta.tool_calls or []:
                if piece.index == len(calls):
                    calls.append((piece.id, piece.function.name, ""))
                i, name, arguments = calls[piece.index]
                calls[piece.index] = (i, name, arguments + (piece.function.arguments or ""))
        return content, calls

    def run(self, name, arguments):
        """A tool's result, or what its error tells the model."""
        tool = {"Read": self.read, "Glob": self.glob, "Grep": self.grep}.get(name)
        if tool is None:
            return f"Tool `{name}` not found."
        try:
            return tool(json.loads(arguments))
        except (ValueError, KeyError, TypeError):
            return f"Tool `{name}` arguments are invalid."

    def inside(self, path):
        path = (self.root / path).resolve()
        return path if path.is_relative_to(self.root.resolve()) else None

    def read(self, arguments):
        path = self.inside(arguments["path"])
        if path is None or not path.is_file():
            return "<system-reminder>The file is outside the workspace or does not exist.</system-reminder>"
        lines = path.read_text().splitlines()
        first = arguments.get("offset", 1)
        shown = lines[first - 1 :][: arguments.get("limit", 2000)]
        rows = [f"{number}|{line}" for number, line in enumerate(shown, first)]
        return "\n".join([f"```{path}:{first}-{first + len(shown) - 1}", *rows, "```"])

    def files(self, directory=None):
        base = self.inside(directory) if directory else self.root
        return sorted(path for path in base.rglob("*") if path.is_file())

    def glob(self, arguments):
        found = [str(p) for p in self.files(arguments.get("directory")) if fnmatch.fnmatch(p.name, arguments["pattern"])]
        return "\n".join(found) or "No files found"

    def grep(self, arguments):
        pattern = re.compile(arguments["pattern"], re.IGNORECASE if arguments.get("-i") else 0)
        rows = []
        for path in self.files(arguments.get("path")):
            lines = path.read_text().splitlines()
            hits = [number for number, line in enumerate(lines, 1) if pattern.search(line)]
            if hits and arguments.get("output_mode") == "files_with_matches":
                rows.append(str(path))
            elif arguments.get("output_mode") != "files_with_matches":
                more = arguments.get("-A", 0)
                shown = sorted({n for hit in hits for n in range(hit, min(hit + more, len(lines)) + 1)})
                rows += [f"{path}:{number}:{lines[number - 1]}" for number in shown]
        return "\n".join(rows) or "No matches found"


def citations(answer, root):
    """Files and lines that a final answer cites and that exist."""
    block = re.search(r"<final_answer>(.*?)</final_answer>", answer, re.DOTALL).group(1)
    found = [re.match(r"(.+?):(\d+(?:-\d+)?)\s*(.*)", line) for line in block.strip().splitlines()]
    return [(m.group(1), m.group(2)) for m in found if m and pathlib.Path(m.group(1)).is_file()]
