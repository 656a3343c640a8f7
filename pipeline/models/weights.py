"""Whether a model's weights are all there: nothing made up, nothing left lying, in one sentence where they are not."""

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GgufConfig

from pipeline.config.answers import Answers
from pipeline.config.paths import pretrained
from pipeline.config.schema import ModelConfig
from pipeline.models.classifier import classifying, is_of_head, kind_of

POINTERS = {
    b"version https://git-lfs.github.com/spec/": "`git lfs pull`",
    b"version https://hawser.github.com/spec/": "`git lfs pull`",
    b"# xet version ": "`git xet checkout`",
    b"/annex/objects/": "`git annex get`",
}


def check_weights(config: ModelConfig, answers: Answers | None = None) -> None:
    """Raises ValueError where the model's files were never fetched, are cut or corrupt, have other shapes than its
    config says, or hold too few weights or too many. Compares names and shapes on the meta device, which takes seconds
    and no memory, and is the same on every rank at every ZeRO stage."""
    name, options = pretrained(config.name_or_path)
    refuse_pointers(name)
    with one_sentence(config):
        loaded: Any = kind_of(answers).from_pretrained(
            name,
            device_map="meta",
            output_loading_info=True,
            **dequantized(options),
            **classifying(config, answers),
        )
    model, found = loaded
    if answers:
        found = _of_body(config, found, model.base_model_prefix)
    refuse_incomplete(config, found)


def dequantized(options: dict[str, Any]) -> dict[str, Any]:
    """`options` of `from_pretrained` for weights that are trained: a GGUF file's may else stay packed."""
    return options | {"quantization_config": GgufConfig(dequantize=True)} if options else {}


def refuse_pointers(directory: str) -> None:
    """Raises ValueError where files of a local model were never fetched."""
    for path in sorted(Path(directory).glob("*")) if Path(directory).is_dir() else []:
        if path.is_file():
            with open(path, "rb") as file:
                head = file.read(64)
            for start, command in POINTERS.items():
                if head.startswith(start):
                    raise ValueError(
                        f"model.name_or_path: {path} is a pointer, not the file: it was never fetched. Fetch it with "
                        f"{command}"
                    )


@contextmanager
def one_sentence(config: ModelConfig) -> Iterator[None]:
    """Raises ValueError, in one sentence, in the place of what transformers, safetensors and torch raise about weights
    that cannot be read or do not fit."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0].removesuffix(".") if str(error) else "it ends too soon"
        raise ValueError(
            f"model.name_or_path: the weights of '{config.name_or_path}' are cut or corrupt ({reason}); fetch "
            "them again"
        ) from error
    except OSError as error:
        if error.errno is None:  # transformers' own words: nothing there
            raise
        raise ValueError(
            f"model.name_or_path: the weights of '{config.name_or_path}' cannot be read ({error}); they are cut, or "
            "not yours to read"
        ) from error
    except RuntimeError as error:
        # torch's own message where a file is no archive, and transformers' where a shape is another.
        if "ignore_mismatched_sizes" in str(error) or "size mismatch" in str(error):
            raise ValueError(
                f"model.name_or_path: weights of '{config.name_or_path}' have other shapes than its config.json says "
                "(the table above names them); give the config that belongs to them"
            ) from error
        if "PytorchStreamReader" in str(error) or "unexpected EOF" in str(error):
            raise ValueError(
                f"model.name_or_path: the weights of '{config.name_or_path}' are cut or corrupt "
                f"({str(error).splitlines()[0]}); fetch them again"
            ) from error
        raise


def _of_body(config: ModelConfig, found: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The loading info without the heads, of which one is made anew and another left behind; says so."""
    new = [name for name in found["missing_keys"] if is_of_head(name, prefix)]
    old = [name for name in found["unexpected_keys"] if is_of_head(name, prefix)]
    if new or old:
        parts = [f"{_names(new)} made anew, at random" * bool(new), f"{_names(old)} left behind" * bool(old)]
        print(f"{config.name_or_path}, as a classifier: {'; '.join(filter(None, parts))}", flush=True)
    return {key: [name for name in names if not is_of_head(name, prefix)] for key, names in found.items()
            if key in ("missing_keys", "unexpected_keys")}  # fmt: skip


def refuse_incomplete(config: ModelConfig, found: dict[str, Any]) -> None:
    """Raises ValueError, naming them, where weights are missing, which transformers draws at random, or have no place
    in the model; says so where `model.allow_missing` allows it. `found`: transformers' loading info, which leaves out
    weights tied to others."""
    wrong = [
        f"{what}: {_names(names)}"
        for what, names in (
            ("missing, so random", found["missing_keys"]),
            ("without a place in the model", found["unexpected_keys"]),
        )
        if names
    ]
    if not wrong:
        return
    if config.allow_missing:
        return print(f"{config.name_or_path}: weights {'; '.join(wrong)} (model.allow_missing)", flush=True)
    raise ValueError(
        f"model.name_or_path: not all weights of '{config.name_or_path}' fit its model; {'; '.join(wrong)}. Give the "
        "whole checkpoint of a causal LM; where it is meant, set model.allow_missing to true"
    )


def _names(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
