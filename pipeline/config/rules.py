"""What values a key may have. Raises ValueError, naming the key, what was found and what to do."""

from collections.abc import Mapping


def at_least_one(values: Mapping[str, int | None], least: int = 1) -> None:
    """Counts; None is not set."""
    for key, number in values.items():
        if number is not None and number < least:
            raise ValueError(f"{key} must be {least} or more, not {number}")


def not_negative(values: Mapping[str, float | None]) -> None:
    for key, number in values.items():
        if number is not None and number < 0:
            raise ValueError(f"{key} must be 0 or more, not {number}")


def positive(values: Mapping[str, float | None]) -> None:
    for key, number in values.items():
        if number is not None and number <= 0:
            raise ValueError(f"{key} must be more than 0, not {number}")


def fractions(values: Mapping[str, float]) -> None:
    for key, fraction in values.items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"{key} is a fraction from 0 to 1, not {fraction}")


def decays(values: Mapping[str, float]) -> None:
    for key, decay in values.items():
        if not 0 <= decay < 1:
            raise ValueError(f"{key} must lie in [0, 1), not {decay}")


def of_causal_lm_alone(task: str, command: str) -> None:
    if task != "causal_lm":
        raise ValueError(
            f"task.kind '{task}' is not for {command}, which counts and compares tokens of packed text: leave it out, "
            "or use pipeline.train, whose TensorBoard and summary have the seconds of a step and its scoring"
        )
