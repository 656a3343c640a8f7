"""Which parameters of a model are trained."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from pipeline.models.adapters import without_numbers


def freeze_all_but(model: nn.Module, patterns: Iterable[str]) -> None:
    """Parameters whose names match one of `patterns` (fnmatch) are trained, all others get no gradient. A tied weight
    goes by any of its names. Raises ValueError, with near names, where a pattern matches none."""
    named = dict(model.named_parameters(remove_duplicate=False))
    trained: set[int] = set()
    for pattern in patterns:
        matched = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
        if not matched:
            known = dict.fromkeys(without_numbers(name) for name in named)
            near = difflib.get_close_matches(without_numbers(pattern), known, n=4, cutoff=0) or list(known)[:4]
            raise ValueError(
                f"model.trainable: no parameter's name matches '{pattern}' (* stands for any characters); near it are "
                f"{', '.join(near)}"
            )
        trained |= {id(parameter) for parameter in matched}
    for parameter in named.values():
        parameter.requires_grad_(id(parameter) in trained)


def freeze_alike(twin: nn.Module, model: nn.Module) -> None:
    """Of `twin`, a model of fewer blocks, train what is trained in any block of `model`."""
    trained = {without_numbers(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(without_numbers(name) in trained)
