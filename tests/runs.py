"""Real runs for tests: configs over a small real corpus, DeepSpeed JSONs, and what came out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import cli
from pipeline.config.schema import Config
from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import Batch
from pipeline.influence.micro_batch import MicroBatch
from pipeline.influence.scorer import ControlScorer, SketchScorer
from pipeline.influence.table import scorer_of
from pipeline.models.second_moments import SecondMoments
from pipeline.train import parse, train

C = TypeVar("C", bound=Config)
CPU = torch.device("cpu")
LEARNING_RATE = 0.5


def deepspeed_json(path: Path, stage: int = 2, micro: int = 2, accumulation: int = 1, **settings: Any) -> Path:
    """Plain SGD without clipping unless told otherwise: the applied update is then the gradient, and no optimizer
    hides a wrong factor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        **settings,
    }
    path.write_text(json.dumps(content))
    return path


ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}}


def config_of(
    corpus: Path,
    run_dir: Path,
    model: Path,
    deepspeed: Path,
    kind: type[C] = Config,  # type: ignore[assignment]
    **overrides: Any,
) -> C:
    """The config of a short run; overrides with `__` for dots: `policy__rate=0.5`. `kind`: with the keys of another
    command than pipeline.train, as that command reads them."""
    options = {
        "run_dir": run_dir,
        "deepspeed_config": deepspeed,
        "model.name_or_path": model,
        "model.tokenizer": corpus / "tokenizer",
        "data.prepared_dir": corpus / "prepared",
        "data.train_files": corpus / "documents.jsonl",
        "data.sequence_length": 16,
        "data.allow_overlap": True,  # one small corpus for everything
        "seed": 3,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    return parse("pipeline.train", arguments) if kind is Config else cli.parse("pipeline", arguments, kind)


def plain_scorer(
    influence: InfluenceConfig, model: Any, seed: int, second: SecondMoments | None = None
) -> ControlScorer | SketchScorer:
    """The scorer of one plain process, in the geometry of `second`."""
    scorer = scorer_of(influence, model, seed, CPU, Stopwatch(CPU), lambda tensor: tensor)
    if second:
        scorer.precondition(second)
    return scorer


def forward_scores(scorer: ControlScorer | SketchScorer, model: Any, *batches: Batch) -> list[torch.Tensor]:
    """What it scores in forwards alone, all batches together; (U,) each."""
    for batch in batches:
        watched = MicroBatch(scorer, batch, Stopwatch(CPU))
        with torch.no_grad():
            watched.forward(model)
        watched.add()
    return [scored.scores_U for scored in scorer.scores()]


def ghost_scores(
    influence: InfluenceConfig,
    model: Any,
    batch: Batch,
    seed: int,
    second: SecondMoments | None = None,
    step_tokens: float | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """What one plain process scores in its backward, of the loss times `factor`; (U,)."""
    scorer = plain_scorer(influence, model, seed, second)
    watched = MicroBatch(scorer, batch, Stopwatch(CPU))
    losses = watched.forward(model)
    watched.before_backward(step_tokens)
    (losses.sum() * factor).backward()
    model.zero_grad()
    watched.add()
    return scorer.scores()[0].scores_U


def run(config: Config) -> None:
    """The main job, on a rank of the pair."""
    train(config)


def refusal_of(function: Callable[..., Any], *args: Any) -> str:
    """On a rank: what a command that ends with exit code 2 tells its user."""
    with pytest.raises(SystemExit) as end:
        function(*args)
    assert end.value.code == 2
    return str(end.value.__context__)


def weights(model_dir: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).named_parameters())


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)
