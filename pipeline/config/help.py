"""`--help`: a line for every key, and all that there is to say of a section or key on asking."""

import argparse
import shutil
import textwrap
from collections.abc import Sequence

from jsonargparse import ArgumentParser

ALL = "all"
"""Topic of every key with all that there is to say of it."""

_COMMON = ("help", "config", "print_config", "print_completion")
_KEY_WIDTH = 40


def asked_for(arguments: Sequence[str]) -> str | None:
    """The topic of a `--help` among the arguments, "" for one without; None where there is none."""
    for option, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if option in ("-h", "--help"):
            return "" if following.startswith("-") else following
    return None


def help_on(parser: ArgumentParser, topic: str) -> str:
    """Of a section, a key or `ALL` all that there is to say; of "" every key in a line, cut to the terminal's width.
    The parser is of no use for anything else after it. Raises ValueError where there is no such topic."""
    if topic == ALL:
        return parser.format_help()
    sections = _sections(parser)
    if not topic:
        return _overview(parser, sections)
    meant = [
        action
        for name, (_, actions) in sections.items()
        for action in actions
        if name == topic or action.dest == topic or action.dest.startswith(f"{topic}.")
    ]
    if not meant:
        raise ValueError(f"--help {topic}: there is no such section or key; sections are {', '.join(sections)}")
    for action in parser._actions:
        if action not in meant:
            action.help = argparse.SUPPRESS
    return parser.format_help()


def _sections(parser: ArgumentParser) -> dict[str, tuple[str, list[argparse.Action]]]:
    """By name: title and keys of each that has any. The keys of no section are those of `run`."""
    found = {}
    for group in parser._action_groups:
        keys = [
            action
            for action in group._group_actions
            if action.default is not argparse.SUPPRESS and action.dest not in _COMMON
        ]
        if keys:
            found[getattr(group, "dest", None) or "run"] = (str(group.title), keys)
    return found


def _overview(parser: ArgumentParser, sections: dict[str, tuple[str, list[argparse.Action]]]) -> str:
    width = shutil.get_terminal_size((100, 24)).columns
    how = (
        f"Keys stand in a YAML file for --config, or on the command line, which wins; --print_config prints what comes "
        f"out. --help SECTION or --help KEY says all of it, --help {ALL} of all. Sections: {', '.join(sections)}."
    )
    lines = [f"usage: {(parser.usage or '') % {'prog': parser.prog}}", "", *textwrap.wrap(how, width - 1)]
    for name, (title, actions) in sections.items():
        lines += ["", f"{title} ({name})"]
        for action in actions:
            key = f"  --{action.dest} {_default(action)}".rstrip()
            line = f"{key:{_KEY_WIDTH}} {' '.join((action.help or '').split())}"
            lines.append(line if len(line) < width else f"{line[: width - 4].rstrip()} ...")
    return "\n".join([*lines, *(["", parser.epilog] if parser.epilog else []), ""])


def _default(action: argparse.Action) -> str:
    """What a key is where nobody sets it, as it is written; empty where that is nothing, or takes more than a word."""
    if action.required:
        return "(needed)"
    if action.default is None or isinstance(action.default, dict | list):
        return ""
    return str(action.default).lower() if isinstance(action.default, bool) else str(action.default)
