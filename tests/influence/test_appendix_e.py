"""The running mean of squared logit gradients, against loops over tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch, Unit, next_token_labels
from pipeline.influence.appendix_e import AppendixE
from pipeline.influence.micro_batch import MicroBatch
from pipeline.influence.table import make
from tests.reference.influence import token_pair_sketches
from tests.runs import forward_scores, plain_scorer
from tests.tiny_models import VOCABULARY, larger, tiny

CPU = torch.device("cpu")
SAMPLES, TOKENS, DECAY = 3, 8, 0.9


def influence(**options) -> InfluenceConfig:
    return InfluenceConfig(precondition="adam_ema", adam_decay=DECAY, adam_power=0.25, sketch="none", **options)


def appendix_e() -> AppendixE:
    estimator = make(influence(), tiny("llama"), 0, CPU, Stopwatch(CPU))
    assert isinstance(estimator, AppendixE)
    return estimator


def batch_of(seed: int) -> Batch:
    ids = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(seed))
    labels = next_token_labels(ids)
    labels[0, 2 + seed :] = IGNORE  # so that micro-batches have tokens in other numbers
    units = [Unit(i, i, (i * TOKENS, (i + 1) * TOKENS), [i], "-") for i in range(SAMPLES)]
    return Batch(ids, labels, units)


def test_it_is_the_bias_corrected_mean_over_tokens():
    """Catches a forgotten bias correction, a mean over micro-batches of sums instead of means, and a micro-batch
    without tokens, or whose sum is not finite, that counts."""
    estimator = appendix_e()
    squares = [torch.rand(VOCABULARY) * 4, torch.rand(VOCABULARY) * 30]
    squares[0][1] = 0.0
    tokens = [4.0, 10.0]
    assert estimator.lai.logit_scale_V is None
    for square, count in zip(squares, tokens, strict=True):
        estimator.learn(torch.cat([square, torch.tensor([count])]))
        estimator.learn(torch.cat([square * torch.inf, torch.tensor([count])]))
        estimator.learn(torch.zeros(VOCABULARY + 1))
    corrected = (DECAY * (1 - DECAY) * squares[0] / 4 + (1 - DECAY) * squares[1] / 10) / (1 - DECAY**2)
    torch.testing.assert_close(estimator.lai.logit_scale_V, (corrected + 1e-16).pow(-0.25))


def test_what_it_learnt_is_saved_and_goes_on():
    whole, saved, resumed = appendix_e(), appendix_e(), appendix_e()
    first, second = (torch.rand(VOCABULARY + 1) + 1 for _ in range(2))
    whole.learn(first)
    saved.learn(first)
    resumed.load_state_dict(saved.state_dict())
    assert torch.equal(resumed.lai.logit_scale_V, whole.lai.logit_scale_V)
    for estimator in (whole, resumed):
        estimator.learn(second)
    assert torch.equal(resumed.lai.logit_scale_V, whole.lai.logit_scale_V)
    fresh = appendix_e()
    fresh.load_state_dict(appendix_e().state_dict())
    assert fresh.lai.logit_scale_V is None


def mean_square(model, batches: list[Batch]) -> Tensor:
    """Of the logit gradients, over all labelled tokens, (V,)."""
    rows = []
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids_BT).logits.double()
        gradients = logits.softmax(2) - F.one_hot(batch.labels_BT.clamp(min=0), VOCABULARY)
        rows.append(gradients[batch.labels_BT != IGNORE])
    return torch.cat(rows).square().mean(0)


@pytest.mark.parametrize("together", [1, 2])
def test_a_micro_batch_is_scored_with_the_mean_of_those_before_it(together):
    """`together`: as many micro-batches are one, as with `influence.scope: step`. Catches a micro-batch scored with its
    own, and statistics of one micro-batch only."""
    model = larger("llama")
    batches = [batch_of(seed) for seed in range(3 * together)]
    groups = [batches[start : start + together] for start in range(0, len(batches), together)]
    scorer = plain_scorer(influence(include_self=False), model, 0)
    raw = torch.zeros(VOCABULARY, dtype=torch.float64)
    for number, group in enumerate(groups):
        scale = (raw / (1 - DECAY**number) + 1e-16).pow(-0.25) if number else torch.ones(VOCABULARY)
        sketches = [token_pair_sketches(model, batch).unflatten(1, (-1, VOCABULARY)) * scale for batch in group]
        flat = torch.cat(sketches).flatten(1)
        pairs = flat @ flat.T
        expected = (pairs - pairs.diag().diag()).sum(1)
        got = torch.cat(forward_scores(scorer, model, *group))
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
        raw = DECAY * raw + (1 - DECAY) * mean_square(model, group)


def test_it_learns_nothing_from_a_validation_set():
    model, scorer = larger("llama"), None
    found = []
    for times in (1, 3):
        scorer = plain_scorer(influence(reference="validation"), model, 0)
        for _ in range(times):
            watched = MicroBatch(scorer, batch_of(5), Stopwatch(CPU))
            with torch.no_grad():
                watched.forward(model)
            watched.add()
            scorer.hold_validation()
        found.append([forward_scores(scorer, model, batch_of(seed))[0] for seed in range(2)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.allclose(found[0][0], found[0][1])
