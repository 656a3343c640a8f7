"""`checkpoint.best_of` and `checkpoint.every_minutes` in real runs of two ranks."""

from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.engine import collectives, due
from pipeline.engine.checkpoints import best_checkpoint, damage_of
from pipeline.train import train
from tests.runs import ADAM, config_of, deepspeed_json, refusal_of


def job(corpus: Path, directory: Path, model: Path, name: str = "run", **overrides: Any) -> Config:
    """The rate rises until the model is worse than it was."""
    rising = {"warmup_min_lr": 1e-3, "warmup_max_lr": 1.0, "warmup_num_steps": 12, "warmup_type": "linear"}
    settings = {"optimizer": ADAM, "scheduler": {"type": "WarmupLR", "params": rising}}
    options = {
        "max_steps": 12,
        "checkpoint__every_steps": 7,
        "checkpoint__keep": 1,
        "checkpoint__best_of": "all",
        "observe__eval_every_steps": 2,
        "data__prepared_dir": directory / "prepared",
        "data__eval_fraction": 0.2,
    } | overrides
    options = {key: value for key, value in options.items() if value is not None}
    return config_of(corpus, directory / name, model, deepspeed_json(directory / "ds.json", **settings), **options)


def both(config: Config) -> dict[str, Any] | None:
    return train(config)


def saved(config: Config) -> list[str]:
    return sorted(path.name for path in Path(config.run_dir, "checkpoints").glob("step-*"))


def best_step(summary: dict[str, Any], of: str = "all") -> int:
    losses = {
        step: (figures["all"] if of == "all" else figures["subsets"][of])["loss"]
        for step, figures in summary["evaluations"].items()
    }
    return min((step for step in losses if step), key=lambda step: losses[step])


def test_the_best_checkpoint_stays_beside_the_newest(ranks, corpus, tiny_model, tmp_path):
    """Twice: in one go, and in two, of which the second finds the best of the first still there."""
    config = job(corpus, tmp_path, tiny_model("llama"))
    summary, _ = ranks(both, config)
    best = best_step(summary)
    assert 0 < best < 12, summary["evaluations"]
    assert best % 7  # or every_steps would have written it
    assert saved(config) == sorted([f"step-{best}", "step-12"])
    assert best_checkpoint(config.run_dir) == Path(config.run_dir, "checkpoints", f"step-{best}")
    assert summary["best_checkpoint"].endswith(f"step-{best}")
    assert damage_of(best_checkpoint(config.run_dir)) is None

    parts = {"name": "parts", "resume": "auto"}
    ranks(until, job(corpus, tmp_path, tiny_model("llama"), **parts), best + 1)
    again = job(corpus, tmp_path, tiny_model("llama"), **parts)
    evaluations = ranks(both, again)[0]["evaluations"]
    assert {step: evaluations[step] for step in summary["evaluations"]} == summary["evaluations"]
    assert saved(again) == saved(config)


def until(config: Config, end: int) -> None:
    train(config, end)


def test_the_best_of_a_subset(ranks, corpus, tiny_model, tmp_path):
    config = job(corpus, tmp_path, tiny_model("llama"), checkpoint__best_of="argparse")
    summary, _ = ranks(both, config)
    assert best_checkpoint(config.run_dir).name == f"step-{best_step(summary, 'argparse')}"


def test_without_it_no_checkpoint_is_called_the_best(ranks, corpus, tiny_model, tmp_path):
    """Also of a run that once had one."""
    config = job(corpus, tmp_path, tiny_model("llama"), max_steps=4)
    ranks(both, config)
    assert best_checkpoint(config.run_dir)
    later = job(corpus, tmp_path, tiny_model("llama"), max_steps=6, checkpoint__best_of=None, resume="auto")
    assert ranks(both, later)[0]["best_checkpoint"] is None
    assert saved(later) == ["step-6"]


def test_the_best_of_an_unknown_subset_is_refused_and_each_remedy_works(ranks, corpus, tiny_model, tmp_path):
    config = job(corpus, tmp_path, tiny_model("llama"), checkpoint__best_of="Argparse", max_steps=2)
    for told in ranks(refusal_of, train, config):
        assert "'Argparse' is no subset of the held-out text; choose all, or one of argparse, os, statistics" in told
    for best_of in ("all", "os"):
        ranks(both, job(corpus, tmp_path, tiny_model("llama"), checkpoint__best_of=best_of, max_steps=2))


def with_clock(config: Config) -> None:
    """Rank 0's clock moves 20 seconds at every look, the other's not at all."""
    ticks = iter(range(0, 100_000, 20))
    original = due.clock
    due.clock = (lambda: float(next(ticks))) if collectives.rank() == 0 else (lambda: 0.0)
    try:
        train(config)
    finally:
        due.clock = original


def test_minutes_by_rank_0s_clock_write_checkpoints_of_both_ranks(ranks, corpus, tiny_model, tmp_path):
    """A look when it starts, one at each step, one more at each checkpoint: due after steps 3, 6, 9."""
    config = job(
        corpus,
        tmp_path,
        tiny_model("llama"),
        max_steps=10,
        checkpoint__best_of=None,
        checkpoint__every_steps=100,
        checkpoint__every_minutes=1.0,
        checkpoint__keep=9,
        observe__eval_every_steps=None,
    )
    ranks(with_clock, config)
    assert saved(config) == ["step-10", "step-3", "step-6", "step-9"]
    assert all(damage_of(Path(config.run_dir, "checkpoints", name)) is None for name in saved(config))
