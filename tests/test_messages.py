"""MESSAGES.md held against the sources and the tests."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS / "MESSAGES.md").read_text()
MESSAGES = re.findall(r"`` (.+?) ``", PAGE)


def text_of(node: ast.AST) -> str:
    """A string of the sources, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def sources() -> Iterator[ast.AST]:
    for path in sorted((TESTS.parent / "pipeline").rglob("*.py")):
        yield from ast.walk(ast.parse(path.read_text()))


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def test_each_message_of_the_page_is_in_the_sources():
    """Catches a message that was rewritten, and a row that was not."""
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    texts = {on_one_line(text_of(node)) for node in sources() if isinstance(node, kinds)}
    assert [message for message in MESSAGES if not any(message in text for text in texts)] == []


def test_each_refusal_of_the_sources_has_a_row():
    """Catches a message that nobody tried to follow. Those that pass another's words on have none of their own."""
    refusals = [
        on_one_line(text_of(node.exc.args[0]))
        for node in sources()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        if node.exc.func.id in ("ValueError", "FloatingPointError") and node.exc.args
    ]
    own = [text for text in refusals if re.search("[a-z]", text)]
    assert len(own) > 100
    assert [text for text in own if not any(text.startswith(message) for message in MESSAGES)] == []


def test_each_test_of_the_page_exists():
    named = re.findall(r"([\w/]+\.py)::(\w+)", PAGE)
    assert len(named) > 100
    there = {file: (TESTS / file).read_text() for file, _ in named}
    assert [f"{file}::{name}" for file, name in named if f"def {name}(" not in there[file]] == []
