"""The command line: YAML plus dotted overrides to a checked config, and back."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml
from jsonargparse import set_parsing_settings

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.differences import flat
from pipeline.config.schema import Config

set_parsing_settings(docstring_parse_attribute_docstrings=True)

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
) -> C:
    """The config, of `kind`, of command `prog` from its arguments (default: the command line's); `epilog` ends its
    --help.

    Unknown keys, values that cannot work and what `rules` refuse end the process with a message and exit code 2. The
    `--local_rank` that DeepSpeed's launcher appends is accepted; the rank itself comes from the environment.
    """
    parser = _parser(prog, kind, epilog)
    given = sys.argv[1:] if argv is None else argv
    arguments = [a for a in given if not a.startswith(("--local_rank", "--local-rank"))]
    for key in _keys(arguments):
        if what := next((what for gone, what in GONE.items() if key == gone or key.startswith(f"{gone}.")), None):
            parser.error(f"{key} {what}")
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


def _parser(prog: str, kind: type[Config], epilog: str = "") -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m {prog}", usage="%(prog)s --config FILE.yaml [--section.key value ...]", epilog=epilog
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below; later options override it.")
    parser.add_class_arguments(kind)
    return parser


def _keys(arguments: Sequence[str]) -> Iterator[str]:
    """All keys that the arguments and their config files name; what cannot be read is the parser's to refuse."""
    for option, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = option.partition("=")
        yield name.removeprefix("--")
        file = Path(value or following)
        if name == "--config" and file.is_file():
            try:
                yield from flat("", yaml.safe_load(file.read_text()) or {})
            except (yaml.YAMLError, UnicodeDecodeError):
                return


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
    parser = _parser("pipeline", type(config))
    return parser.dump(parser.parse_object(to_dict(config)))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of plain values."""
    return {
        field.name: to_dict(value) if is_dataclass(value := getattr(config, field.name)) else value
        for field in fields(config)
    }
