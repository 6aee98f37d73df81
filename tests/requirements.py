#!/usr/bin/env python3
"""Which test holds which numbered requirement: writes tests/REQUIREMENTS.md, or with --check says what is wrong with it.

A test holds a requirement if it names its id: in Rust in the comment directly above the test (or as `her_01_` in its name),
in Python in its docstring; a script of tests/gpu in that of the module. tests/requirements.toml has a table for each id:
`text`, and `open` (why no test holds it) or `except` (what of it the tests do not hold).
"""

import ast
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "requirements.toml"
PAGE = ROOT / "tests" / "REQUIREMENTS.md"

GROUPS = {
    "HAR": "Harmony: parsing, forced tools, history",
    "RSP": "The Responses API",
    "OAI": "Chat and text completions",
    "HER": "Qwen3 and the hermes format",
    "OPS": "Operation",
    "KRN": "Kernels and numbers",
}
IDENTIFIER = re.compile(rf"\b({'|'.join(GROUPS)})-(\d\d)\b")
IN_A_NAME = re.compile(rf"(?:^|_)({'|'.join(group.lower() for group in GROUPS)})_(\d\d)(?=_|$)")
ATTRIBUTE = re.compile(r"#\[(?:\w+::)*test\b")
FUNCTION = re.compile(r"(?:pub(?:\([^)]*\))? )?(?:async )?fn (\w+)")


def ids(comment, name=""):
    found = IDENTIFIER.findall(comment) + IN_A_NAME.findall(name)
    return sorted({f"{group.upper()}-{number}" for group, number in found})


def rust_tests(text):
    """Each test function of a Rust file with the comment above it."""
    comment, attributes = [], []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("//"):
            comment.append(line.lstrip("/ "))
        elif line.startswith("#["):
            attributes.append(line)
        elif match := FUNCTION.match(line):
            if any(ATTRIBUTE.match(attribute) for attribute in attributes):
                yield match[1], "\n".join(comment)
            comment, attributes = [], []
        else:
            comment, attributes = [], []


def python_tests(text, script=False):
    """Each test function of a Python file with its docstring; of a script, the file itself with the module's."""
    tree = ast.parse(text)
    if script:
        yield "", ast.get_docstring(tree) or ""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
            yield node.name, ast.get_docstring(node) or ""


def scan(root=ROOT):
    """Of each id the tests that name it, as (path, name), in order."""
    holders = {}
    sources = [(path, rust_tests(path.read_text("utf-8"))) for path in sorted(root.glob("crates/**/*.rs"))]
    for path in sorted((root / "tests").glob("**/*.py")):
        sources.append((path, python_tests(path.read_text("utf-8"), script=path.parent.name == "gpu")))
    for path, tests in sources:
        for name, comment in tests:
            for identifier in ids(comment, name):
                holders.setdefault(identifier, []).append((path.relative_to(root).as_posix(), name))
    return holders


def mistakes(table, holders):
    """What is wrong with the table, given who holds what."""
    found = [f"{name} is named by {path} and is not in the table" for name in sorted(holders.keys() - table.keys())
             for path, _ in holders[name][:1]]  # fmt: skip
    for name, row in table.items():
        held = name in holders
        unknown = row.keys() - {"text", "open", "except"}
        if unknown or not IDENTIFIER.fullmatch(name) or not row.get("text"):
            found.append(f"{name} needs a text and may have 'open' or 'except', nothing else")
        if not held and not row.get("open"):
            found.append(f"{name} is held by no test and has no reason ('open')")
        if held and "open" in row:
            path, test = holders[name][0]
            found.append(f"{name} has a reason for not being held, and {path} {test} holds it")
        if not held and "except" in row:
            found.append(f"{name} has an exception and is held by no test")
    return found


def page(table, holders):
    """The text of REQUIREMENTS.md."""
    parts = sum("except" in row for row in table.values())
    held = sum(name in holders for name in table) - parts
    lines = [
        "# Requirements",
        "",
        "What a server of these models owes its users, and which test holds each line. Written by `tests/requirements.py` from",
        "the ids that tests name and from `tests/requirements.toml`; do not edit it by hand.",
        "",
        f"{len(table)} lines: {held} held, {parts} held in part, {len(table) - held - parts} not held.",
    ]
    for group, title in GROUPS.items():
        lines += ["", f"## {group}: {title}", ""]
        for name in sorted(name for name in table if name.startswith(group)):
            row = table[name]
            lines.append(f"- **{name}** {row['text']}")
            if name in holders:
                lines.append("  - Held in part by:" if "except" in row else "  - Held by:")
                files = {}
                for path, test in holders[name]:
                    files.setdefault(path, []).append(test)
                for path, tests in files.items():
                    names = ", ".join(f"`{test}`" for test in tests if test)
                    lines.append(f"    - `{path}`" + (f": {names}" if names else ""))
                if "except" in row:
                    lines.append(f"  - Not held: {row['except']}")
            else:
                lines.append(f"  - Not held: {row.get('open')}")
    return "\n".join(lines) + "\n"


def main(arguments):
    table, holders = tomllib.loads(TABLE.read_text("utf-8")), scan()
    wrong = mistakes(table, holders)
    wanted = page(table, holders)
    if arguments == ["--check"]:
        if not PAGE.is_file() or PAGE.read_text("utf-8") != wanted:
            wrong.append("tests/REQUIREMENTS.md is out of date; run tests/requirements.py")
    elif arguments:
        wrong.append(f"unknown arguments {arguments}; there is --check")
    else:
        PAGE.write_text(wanted, "utf-8")
    for what in wrong:
        print(f"requirements: {what}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
