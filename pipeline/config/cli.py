"""The command line: YAML plus dotted overrides to a checked config, and back."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import jsonargparse
from jsonargparse import set_parsing_settings

from pipeline.config.schema import Config

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _parser(prog: str, epilog: str = "") -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m {prog}", usage="%(prog)s --config FILE.yaml [--section.key value ...]", epilog=epilog
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below; later options override it.")
    parser.add_class_arguments(Config)
    return parser


def parse(prog: str, argv: Sequence[str] | None = None, epilog: str = "") -> Config:
    """The config of command `prog` from its arguments (default: the command line's); `epilog` ends its --help.

    Unknown keys and values that cannot work end the process with a message and exit code 2. The `--local_rank` that
    DeepSpeed's launcher appends is accepted; the rank itself comes from the environment.
    """
    parser = _parser(prog, epilog)
    arguments = sys.argv[1:] if argv is None else argv
    namespace = parser.parse_args([a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))])
    try:
        sections = parser.instantiate(namespace)
        return Config(**{field.name: sections[field.name] for field in fields(Config)})
    except ValueError as error:
        parser.error(str(error))


@contextmanager
def exit_on_user_error(prog: str) -> Iterator[None]:
    """End the process with the message and exit code 2 where the input is at fault; other errors keep their trace."""
    try:
        yield
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `--config` reads back to an equal one."""
    parser = _parser("pipeline")
    return parser.dump(parser.parse_object(to_dict(config)))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of plain values."""
    return {
        field.name: to_dict(value) if is_dataclass(value := getattr(config, field.name)) else value
        for field in fields(config)
    }
