from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.baselines.flattened import flattened_grams
from pipeline.config.schema_influence import InfluenceConfig
from pipeline.data.batch import IGNORE, Batch, Unit
from pipeline.evidence.fidelity_scores import scores_of
from pipeline.evidence.references import (
    SGD,
    Adam,
    FirstOrderEffect,
    StepEffect,
    inner_products,
    sample_gradients,
    trainable,
)
from pipeline.evidence.shapley import exact_shapley, permutation_shapley, row_sums
from tests.runs import plain_scorer
from tests.tiny_models import VOCABULARY, tiny


def batch_of(samples: int, tokens: int = 8, seed: int = 0, vocabulary: int = VOCABULARY) -> Batch:
    """Random tokens; the last sequence has labels in its first half only."""
    ids = torch.randint(0, vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = ids[:, 1:]
    labels[-1, tokens // 2 :] = IGNORE
    units = [Unit(row, row, (row * tokens, (row + 1) * tokens), [row], "-") for row in range(samples)]
    return Batch(ids, labels, units)


def model_of(kind: str) -> nn.Module:
    """Its weights large enough that samples differ."""
    model = tiny(kind).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def random_game(players: int, targets: int, seed: int = 0):
    """Every coalition has a worth of its own: no structure that would hide a wrong weight."""
    worth = torch.randn(2**players, targets, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    places = 2 ** torch.arange(players)
    return lambda coalition: worth[int((coalition * places).sum())]


def test_exact_values_are_those_of_the_glove_game():
    """One left glove, two right ones: 2/3, 1/6, 1/6. Catches a wrong weight of the coalition sizes."""

    def pairs(coalition):
        return torch.tensor([float(coalition[0] and (coalition[1] or coalition[2]))], dtype=torch.float64)

    torch.testing.assert_close(exact_shapley(pairs, 3)[:, 0].tolist(), [2 / 3, 1 / 6, 1 / 6])


def test_permutations_agree_with_all_subsets_within_their_standard_errors():
    """Catches gains written to the place in the order instead of the player, and errors over orders, not pairs."""
    exact = exact_shapley(random_game(6, 4), 6)
    found = permutation_shapley(random_game(6, 4), 6, seed=1, permutations=4000, standard_error=0)
    assert found.permutations == 4000
    deviations = (row_sums(found.effects_nZ, True) - row_sums(exact, True)) / found.errors_Rn[0]
    assert deviations.abs().max() < 4
    assert deviations.abs().max() > 0.1
    torch.testing.assert_close(found.effects_nZ, exact, atol=0.15, rtol=0)


def test_permutations_stop_once_every_reading_is_as_precise_as_asked():
    """Catches a rule that looks at the first reading only, and one that looks at the mean error."""

    def read(effects):
        return torch.stack([row_sums(effects, True), row_sums(effects, False)])

    found = permutation_shapley(random_game(5, 5), 5, 2, permutations=100_000, standard_error=0.1, read=read)
    assert 16 < found.permutations < 100_000
    spread = torch.stack([row_sums(found.effects_nZ, own) for own in (True, False)]).std(1)
    ratios = found.errors_Rn.amax(1) / spread
    assert ratios.max() <= 0.1
    assert ratios.max() > 0.09
    again = permutation_shapley(random_game(5, 5), 5, 2, permutations=100_000, standard_error=0.1, read=read)
    assert torch.equal(again.effects_nZ, found.effects_nZ)


@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_values_add_up_to_the_effect_of_the_whole_step(kind):
    """Efficiency, exact for any number of permutations; and the whole effect is that of a real optimizer step."""
    model, batch = model_of(kind), batch_of(5)
    gradients = sample_gradients(model, batch)
    game = StepEffect(model, batch, gradients, SGD(0.3))
    found = permutation_shapley(game, 5, 0, permutations=6, standard_error=0)
    everyone = game(torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(found.effects_nZ.sum(0), everyone)
    torch.testing.assert_close(exact_shapley(game, 5).sum(0), everyone)

    before = {name: parameter.clone() for name, parameter in trainable(model).items()}

    def losses():
        logits = model(input_ids=batch.input_ids_BT).logits
        return F.cross_entropy(logits.transpose(1, 2), batch.labels_BT, ignore_index=IGNORE, reduction="none")

    tokens = (batch.labels_BT != IGNORE).sum()
    old = losses()
    (old.sum() / tokens).backward()
    torch.optim.SGD(model.parameters(), lr=0.3).step()
    torch.testing.assert_close(everyone, (old - losses()).detach().sum(1) / tokens)
    assert not torch.equal(next(iter(before.values())), next(iter(trainable(model).values())))


def test_playing_the_game_leaves_the_model_as_it_was():
    model, batch = model_of("gpt_neo"), batch_of(3)
    before = [parameter.clone() for parameter in model.parameters()]
    StepEffect(model, batch, sample_gradients(model, batch), SGD(0.3))(torch.tensor([True, False, True]))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs(decoupled):
    """Catches a missing bias correction, eps inside of the root, and decay of the wrong kind."""
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.3}
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)([weights], **settings)
    zero = torch.zeros_like(weights)
    moments = {"exp_avg": zero, "exp_avg_sq": zero, "step": 0}
    for _ in range(3):
        gradient = torch.randn(50, generator=generator, dtype=torch.float64)
        adam = Adam(
            0.1, (0.8, 0.9), 1e-2, 0.3, decoupled, moments["exp_avg"], moments["exp_avg_sq"], int(moments["step"])
        )
        expected = adam(weights.detach().clone(), gradient)
        weights.grad = gradient
        optimizer.step()
        torch.testing.assert_close(weights.detach(), expected)
        moments = {key: value.clone() for key, value in optimizer.state[weights].items()}


@pytest.mark.parametrize("kind", ["gpt_neo", "llama_tied", "gpt2"])
def test_per_sample_gradients_are_those_of_a_loop_of_autograd(kind):
    """Catches a mean over tokens, samples that leak into each other, and tied weights taken twice."""
    model, batch = model_of(kind), batch_of(3)
    got = sample_gradients(model, batch)
    for row in range(3):
        logits = model(input_ids=batch.input_ids_BT[row : row + 1]).logits[0]
        loss = F.cross_entropy(logits, batch.labels_BT[row], ignore_index=IGNORE, reduction="sum")
        model.zero_grad()
        loss.backward()
        expected = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
        )
        torch.testing.assert_close(got[row], expected)


def test_inner_products_are_shapley_values_of_a_small_sgd_step():
    """Catches the sign, a denominator that is not the whole batch's, and self-influence on one side only."""
    model, batch = model_of("gpt2"), batch_of(4)
    gradients = sample_gradients(model, batch)
    tokens = (batch.labels_BT != IGNORE).sum()
    rate = 1e-6
    effects = exact_shapley(StepEffect(model, batch, gradients, SGD(rate)), 4)
    expected = inner_products(gradients) * rate / tokens**2
    torch.testing.assert_close(effects, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def adam_of(model: nn.Module, rate: float, betas: tuple[float, float], step: int) -> Adam:
    size = sum(parameter.numel() for parameter in trainable(model).values())
    generator = torch.Generator().manual_seed(5)
    squares = torch.rand(size, generator=generator, dtype=torch.float64).add_(0.01)
    mean = torch.randn(size, generator=generator, dtype=torch.float64) * 0.01
    return Adam(rate, betas, 1e-8, 0.1, True, mean, squares * (1 - betas[1] ** step), step)


def test_inner_products_in_adams_geometry_are_shapley_values_of_a_small_adam_step_with_v_fixed():
    """Catches v to the wrong power, momentum counted as somebody's, and nobody's step taken for no step."""
    model, batch = model_of("gpt2"), batch_of(4)
    gradients = sample_gradients(model, batch)
    tokens = (batch.labels_BT != IGNORE).sum()
    adam = adam_of(model, 1e-6, (0.9, 1 - 1e-9), 10**10)
    effects = exact_shapley(StepEffect(model, batch, gradients, adam), 4)
    expected = inner_products(gradients, adam.denominator_P) * 1e-6 * (1 - 0.9) / tokens**2
    torch.testing.assert_close(effects, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("step", [1, 7])
def test_first_order_effects_are_those_of_a_small_step_whatever_adam_makes_of_the_gradient(step):
    """Catches v of before the update in its place, and momentum counted as somebody's."""
    model, batch = model_of("gpt2"), batch_of(4)
    gradients = sample_gradients(model, batch)
    tokens = (batch.labels_BT != IGNORE).sum()
    adam = adam_of(model, 1e-7, (0.9, 0.8), step)
    adam = replace(adam, exp_avg_sq_P=adam.exp_avg_sq_P * 1e-4)  # so that the coming gradient is much of it
    found = exact_shapley(FirstOrderEffect(model, batch, gradients, adam), 4)
    expected = exact_shapley(StepEffect(model, batch, gradients, adam), 4)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()))
    frozen = inner_products(gradients, adam.denominator_P) * 1e-7 * (1 - 0.9) / (1 - 0.9 ** (step + 1)) / tokens**2
    assert not torch.allclose(found, frozen, rtol=0.1, atol=0.1 * float(expected.abs().max()))
    plain = exact_shapley(FirstOrderEffect(model, batch, gradients, SGD(0.1)), 4)
    torch.testing.assert_close(plain, inner_products(gradients) * 0.1 / tokens**2)


def test_another_batch_can_be_the_target():
    model, batch, other = model_of("gpt2"), batch_of(3), batch_of(2, seed=9)
    gradients, theirs = sample_gradients(model, batch), sample_gradients(model, other)
    tokens = (batch.labels_BT != IGNORE).sum() * (other.labels_BT != IGNORE).sum()
    effects = exact_shapley(StepEffect(model, batch, gradients, SGD(1e-6), target=other), 3)
    expected = gradients @ theirs.T * 1e-6 / tokens
    assert effects.shape == (3, 2)
    torch.testing.assert_close(effects, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


class OneLayer(nn.Module):
    """A fixed embedding and one linear layer: the parameters' gradient is Eq. 4's own outer product."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(12, 5).requires_grad_(False)
        self.head = nn.Linear(5, 12, bias=False)
        for weight in (self.embedding.weight, self.head.weight):
            weight.data = torch.randn(weight.shape, generator=generator)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("tokens", [1, 6])
def test_of_one_linear_layer_lli_is_the_gradient_inner_product_and_flattened_only_of_one_token(include_self, tokens):
    """Catches scores in another order than the reference's, and self-influence that one
    side takes out and the other leaves in."""
    model, batch = OneLayer(), batch_of(6, tokens, vocabulary=12)
    if tokens == 1:  # no next token to be the label
        batch.labels_BT[:, 0] = torch.arange(6)
    expected = row_sums(inner_products(sample_gradients(model, batch)), include_self)
    config = InfluenceConfig(estimator="lli", sketch="none", include_self=include_self)
    scores = scores_of(plain_scorer(config, model, 0), model, batch)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    flattened = row_sums(flattened_grams(model, batch)["ghost_flattened"], include_self).double()
    close = torch.allclose(flattened, expected, rtol=1e-3, atol=1e-3)
    assert close == (tokens == 1)
