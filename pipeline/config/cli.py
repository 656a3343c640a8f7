"""The command line: YAML plus dotted overrides to a checked config, and back."""

import errno
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml
from jsonargparse import set_parsing_settings

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.differences import flat
from pipeline.config.help import asked_for, help_on
from pipeline.config.launcher import say
from pipeline.config.once import say_once
from pipeline.config.schema import Config
from pipeline.config.writing import FULL, NotWritten

set_parsing_settings(docstring_parse_attribute_docstrings=True, add_print_completion_argument=True)

C = TypeVar("C", bound=Config)
Rules = Callable[[C, dict[str, Any]], None]
"""Takes a config and its DeepSpeed settings; raises ValueError where they do not go together."""

GONE: Mapping[str, str] = {
    "influence.sketch.inputs": "is called influence.sketch.input_width",
    "influence.sketch.gradients": "is called influence.sketch.logit_width",
    "influence.sketch.layers": "is called influence.sketch.hidden_width",
    "influence.layer_weights": "is gone: weighing layers did not help (pipeline/evidence/RESULTS.md)",
    "influence.layer_decay": "is gone with influence.layer_weights",
    "benchmark.sweep": "is gone: pipeline.benchmark --plan counts any size",
}
"""Keys of earlier versions, and what became of them."""


def parse(
    prog: str,
    argv: Sequence[str] | None = None,
    kind: type[C] = Config,  # type: ignore[assignment]
    rules: Rules | None = None,
    epilog: str = "",
    fill: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None,
) -> C:
    """The config, of `kind`, of command `prog` from its arguments (default: the command line's); `epilog` ends its
    --help. `fill`: from what is given, flat with dots, to values for keys that are not; each is said.

    Unknown keys, values that cannot work and what `rules` refuse end the process with a message and exit code 2. The
    `--local_rank` that DeepSpeed's launcher appends is accepted; the rank itself comes from the environment.
    """
    parser = _parser(prog, kind, epilog)
    given = sys.argv[1:] if argv is None else argv
    arguments = [a for a in given if not a.startswith(("--local_rank", "--local-rank"))]
    if (topic := asked_for(arguments)) is not None:
        try:
            print(help_on(parser, topic), end="")
        except ValueError as error:
            parser.error(str(error))
        sys.exit(0)
    for file, keys in _twice(arguments):
        parser.error(f"{file} has {', '.join(keys)} twice, of which only the last would count; keep one of them")
    for key in _keys(arguments):
        if what := next((what for gone, what in GONE.items() if key == gone or key.startswith(f"{gone}.")), None):
            parser.error(f"{key} {what}")
    for key, value in (fill(_given(arguments)) if fill else {}).items():
        say(f"{prog}: {key} is not set: it is {value}")
        arguments.append(f"--{key}={value}")
    namespace = parser.parse_args(arguments)
    try:
        sections = parser.instantiate(namespace)
        config = kind(**{field.name: sections[field.name] for field in fields(kind)})
        settings = read_deepspeed_config(config)
        if rules:
            rules(config, settings)
        return config
    except ValueError as error:
        parser.error(str(error))


class _Parser(jsonargparse.ArgumentParser):
    """Whose refusals are said once a host."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        with redirect_stderr(io.StringIO()) as told, suppress(SystemExit):
            super().error(message, ex)
        say_once(told.getvalue().rstrip())
        sys.exit(2)


def _parser(prog: str, kind: type[Config], epilog: str = "") -> jsonargparse.ArgumentParser:
    program = Path(sys.argv[0]).name
    parser = _Parser(
        prog=program if program.startswith("lai-") else f"python -m {prog}",  # what shells complete
        usage="%(prog)s --config FILE.yaml [--section.key value ...]",
        epilog=epilog,
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below; later options override it.")
    parser.add_class_arguments(kind)
    return parser


def _keys(arguments: Sequence[str]) -> Iterator[str]:
    """All keys that the arguments and their config files name."""
    yield from (option.partition("=")[0].removeprefix("--") for option in arguments)
    for _, root in _files(arguments):
        yield from _names(root)


def _given(arguments: Sequence[str]) -> dict[str, Any]:
    """What the arguments and their config files say, by dotted keys; later ones win."""
    given: dict[str, Any] = {}
    for file, _ in _files(arguments):
        with suppress(yaml.YAMLError):  # the parser's to refuse
            given |= flat("", yaml.safe_load(file.read_text()))
    for option, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = option.partition("=")
        if name.startswith("--"):
            given[name.removeprefix("--")] = value if equals else following
    return given


def _twice(arguments: Sequence[str]) -> Iterator[tuple[Path, list[str]]]:
    """Config files that have a key twice, of which YAML itself would take the last, and these keys."""
    for file, root in _files(arguments):
        names = list(_names(root))
        if again := sorted({name for name in names if names.count(name) > 1}):
            yield file, again


def _names(node: yaml.Node, prefix: str = "") -> Iterator[str]:
    """The dotted name of every key in there, sections too."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{prefix}{key.value}"
        yield name
        yield from _names(value, f"{name}.")


def _files(arguments: Sequence[str]) -> Iterator[tuple[Path, yaml.Node]]:
    """The config files that can be read; the others are the parser's to refuse."""
    for option, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = option.partition("=")
        file = Path(value or following)
        if name == "--config" and file.is_file():
            with suppress(yaml.YAMLError, UnicodeDecodeError):
                if root := yaml.compose(file.read_text(), yaml.SafeLoader):
                    yield file, root


@contextmanager
def exit_on_user_error(prog: str) -> Iterator[None]:
    """End the process with the message and exit code 2 where the input is at fault; other errors keep their trace."""
    try:
        with exit_on_refused_file(prog):
            yield
    except ValueError as error:
        say_once(f"{prog}: error: {error}")
        sys.exit(2)


@contextmanager
def exit_on_refused_file(prog: str) -> Iterator[None]:
    """End the process with the message where the operating system refuses a file or directory: exit code 2, or 1 where
    a run could not write what it made; other errors keep their trace."""
    try:
        yield
    except NotWritten as error:
        say_once(f"{prog}: error: {error}")
        sys.exit(1)
    except OSError as error:
        if error.filename is None or error.errno not in _REFUSED:
            raise
        files = " and ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
        say_once(f"{prog}: error: {files}: {error.strerror}; {_REFUSED[error.errno]}")
        sys.exit(2)


_DENIED = "this user may not read or write there: change its owner or its mode, or name another place"
_NO_PLACE = "there is something else in the way of this directory: name another place, or move that away"
_REFUSED = {
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "the file system is mounted for reading only: name another place",
    errno.ENOTDIR: _NO_PLACE,
    errno.EEXIST: _NO_PLACE,
    errno.ENAMETOOLONG: "name a shorter path",
    **dict.fromkeys(FULL, "make room, or name another place"),
}
"""What the operating system refuses a user, and what to do."""


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `--config` reads back to an equal one."""
    parser = _parser("pipeline", type(config))
    return parser.dump(parser.parse_object(to_dict(config)))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of plain values."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return to_dict(value) if is_dataclass(value) else value
