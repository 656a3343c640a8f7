"""Before the first step: is the model one for the estimator, and how much of it is scored?"""

from collections import Counter
from typing import Any

from transformers import PreTrainedModel

from pipeline.config.answers import Answers
from pipeline.config.schema import Config
from pipeline.engine import collectives
from pipeline.influence.check_model import check_model, reads_padding, refuse_seeing_ahead, refuse_unknown_answers
from pipeline.influence.table import CONTROLS, ESTIMATORS
from pipeline.models.dropout import noisy_forward
from pipeline.models.layer import shape_of
from pipeline.models.layers import head_of, layers_of
from pipeline.models.load import small_twin

LARGEST = 500_000_000
"""Parameters of a model that is checked itself; of a larger one, or a partitioned one, a small twin is."""


def check_before_training(config: Config, model: PreTrainedModel, answers: Answers | None = None) -> None:
    """Refuse a model that is not causal, or whose true gradients `ghost` would not see (`influence.check_model`);
    print whether dropout is active. Collective: rank 0 looks, all ranks raise or none does."""
    if said := collectives.on_rank_0(lambda: _look(config, model, answers)):
        print(said, flush=True)


def _look(config: Config, model: PreTrainedModel, answers: Answers | None) -> str:
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    large = partitioned or sum(parameter.numel() for parameter in model.parameters()) > LARGEST
    looked_at = small_twin(config.model, model, answers) if large else model
    if answers is None:  # a classifier may see all of a text
        refuse_seeing_ahead(looked_at)
    if answers and config.influence.estimator in ESTIMATORS:
        head = head_of(looked_at)
        lli = config.influence.estimator == "lli"
        refuse_unknown_answers(looked_at, {head.name: head} if lli else layers_of(looked_at).linear)
    if config.influence.estimator == "ghost" and config.influence.check_model:
        check_model(looked_at)
    said = [reads_padding(looked_at)] if answers else []
    return "\n".join(filter(None, [*said, noisy_forward(model)]))


def scored_share(config: Config, model: PreTrainedModel) -> str:
    """Which share of the trained parameters is scored, in a sentence; empty for what scores no weight."""
    name = config.influence.estimator
    if name in CONTROLS:
        return ""
    sizes = {n: numbers_of(p) for n, p in model.named_parameters() if p.requires_grad}
    if name == "lli":
        return f"lli reads the LM head's input; the model trains {sum(sizes.values()):,} parameters"
    layers = layers_of(model)
    scored = layers.weights if name != "lai" else layers.linear_weights
    left = Counter[str]()
    for parameter, size in sizes.items():
        if parameter not in scored:
            left[layers.left_out.get(parameter, "word embedding")] += size
    every = sum(sizes.values())
    parts = ", ".join(f"{rule} {size / every:.1%}" for rule, size in left.most_common())
    share = sum(sizes[parameter] for parameter in scored if parameter in sizes) / every
    frozen = sum(numbers_of(p) for p in model.parameters() if not p.requires_grad)
    return (
        f"{name} scores {share:.1%} of {every:,} trained parameters"
        + (f" ({frozen:,} are frozen)" if frozen else "")
        + (f"; left out: {parts}" if parts else "")
    )


def numbers_of(parameter: Any) -> int:
    """How many a parameter has, whatever part of it is here."""
    numbers = 1
    for size in shape_of(parameter):
        numbers *= size
    return numbers
