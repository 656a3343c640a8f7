"""What a scorer keeps from call to call, what it hands to other ranks, and what of it a resumed run takes up again."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema_influence import InfluenceConfig, SketchConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import Batch, Unit, next_token_labels
from pipeline.influence.micro_batch import MicroBatch, forward_losses
from pipeline.influence.table import scorer_of
from pipeline.models.second_moments import SecondMoments
from tests.reference.influence import token_pair_sketches
from tests.runs import forward_scores, ghost_scores, plain_scorer
from tests.tiny_models import VOCABULARY, larger, tiny

CPU = torch.device("cpu")
SAMPLES, TOKENS = 3, 8
SKETCH = SketchConfig(16, 64, 8)
RUNNING = InfluenceConfig(reference="running", running_decay=0.6, sketch=SKETCH)


def batch_of(seed: int) -> Batch:
    ids = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(seed))
    units = [Unit(i, i, (i * TOKENS, (i + 1) * TOKENS), [i], "-") for i in range(SAMPLES)]
    return Batch(ids, next_token_labels(ids), units)


@pytest.fixture(scope="module")
def model():
    return larger("llama")


def second_of(model) -> SecondMoments:
    generator = torch.Generator().manual_seed(4)
    squares = {name: torch.rand(p.shape, generator=generator) ** 4 for name, p in model.named_parameters()}
    means = {name: (v.mean(1), v.mean(0)) for name, v in squares.items() if v.dim() == 2}
    return SecondMoments(means, 0.95, 7)


def scored(scorer, model, *seeds: int) -> list[Tensor]:
    """One micro-batch after the other."""
    return [forward_scores(scorer, model, batch_of(seed))[0] for seed in seeds]


def added(scorer, model, *seeds: int) -> None:
    """Micro-batches that wait to be scored together."""
    for seed in seeds:
        watched = MicroBatch(scorer, batch_of(seed), Stopwatch(CPU))
        with torch.set_grad_enabled(scorer.after_backward):
            watched.forward(model)
        watched.before_backward(None)
        watched.backward_to_inputs()
        watched.add()


def through_a_file(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=False)


# What is saved


@pytest.mark.parametrize(
    "influence",
    [
        RUNNING,
        replace(RUNNING, estimator="residual", precondition="adam_state"),
        replace(RUNNING, precondition="adam_ema"),
        replace(RUNNING, reference="batch"),
        replace(RUNNING, reference="validation"),
        replace(RUNNING, reference="validation", estimator="lli", precondition="adam_ema"),
    ],
)
def test_a_scorer_goes_on_as_the_one_that_was_saved(model, tmp_path, influence):
    unbroken, resumed = (plain_scorer(influence, model, 3) for _ in range(2))
    if influence.precondition == "adam_state":
        unbroken.precondition(second_of(model))
    if influence.reference == "validation":
        added(unbroken, model, 9)
        unbroken.hold_validation()
    scored(unbroken, model, 0, 1)
    assert resumed.load_state_dict(through_a_file(unbroken.state_dict(), tmp_path)) == []
    assert resumed.preconditioned == (influence.precondition == "adam_state")
    assert resumed.holds_validation == (influence.reference == "validation")
    for got, expected in zip(scored(resumed, model, 2, 3), scored(unbroken, model, 2, 3), strict=True):
        assert torch.equal(got, expected)


def test_a_key_that_was_added_since_says_nothing_of_what_was_saved_before(model):
    """Catches a run that forgets all at an update that adds a key."""
    unbroken = plain_scorer(replace(RUNNING, precondition="adam_ema"), model, 3)
    scored(unbroken, model, 0, 1)
    state = unbroken.state_dict()
    older = {}
    for name, (keys, content) in state.items():
        assert len(keys) > 1
        older[name] = (
            {key: value for key, value in keys.items() if not key.endswith(("adam_power", "adam_decay"))},
            content,
        )
        assert len(older[name][0]) == len(keys) - 1
    resumed = plain_scorer(replace(RUNNING, precondition="adam_ema"), model, 3)
    assert resumed.load_state_dict(older) == []
    assert torch.equal(scored(resumed, model, 2)[0], scored(unbroken, model, 2)[0])
    # And a part that was added has nothing to take up.
    fresh = plain_scorer(RUNNING, model, 3)
    assert fresh.load_state_dict({}) == []
    assert torch.equal(scored(fresh, model, 2)[0], scored(plain_scorer(RUNNING, model, 3), model, 2)[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sketch": SketchConfig(16, 32, 8)}, "influence.sketch 16 x 64 x 8 -> 16 x 32 x 8"),
        ({"sketch": "none"}, "influence.sketch 16 x 64 x 8 -> none"),
        ({"estimator": "lli"}, "influence.estimator lai -> lli"),
        ({"reference": "validation"}, "influence.reference running -> validation"),
        ({"precondition": "adam_state"}, "influence.precondition none -> adam_state"),
        ({"running_decay": 0.5}, "influence.running_decay 0.6 -> 0.5"),
        ({"seed": 4}, "seed 3 -> 4"),
    ],
)
def test_what_was_gathered_under_other_keys_is_dropped_and_the_key_is_named(model, change, named):
    """Catches a running mean of other widths, or of another geometry, that scores go on against."""
    saved = plain_scorer(RUNNING, model, 3)
    scored(saved, model, 0, 1)
    change = dict(change)
    seed = change.pop("seed", 3)
    influence = replace(RUNNING, **change)
    resumed, fresh = (plain_scorer(influence, model, seed) for _ in range(2))
    [sentence] = resumed.load_state_dict(saved.state_dict())
    assert sentence == f"what the reference had gathered is dropped ({named}) and gathered anew"
    if influence.reference == "validation":
        assert not resumed.holds_validation
        return
    assert torch.equal(scored(resumed, model, 2)[0], scored(fresh, model, 2)[0])
    # The next save is of the new keys.
    again = plain_scorer(influence, model, seed)
    assert again.load_state_dict(resumed.state_dict()) == []
    assert torch.equal(scored(again, model, 3)[0], scored(resumed, model, 3)[0])


def test_several_keys_that_differ_are_one_sentence_and_nothing_gathered_is_none(model):
    saved = plain_scorer(RUNNING, model, 3)
    other = plain_scorer(replace(RUNNING, running_decay=0.5, sketch="none"), model, 3)
    assert other.load_state_dict(saved.state_dict()) == []  # nothing was scored yet
    scored(saved, model, 0)
    [sentence] = other.load_state_dict(saved.state_dict())
    assert "influence.running_decay 0.6 -> 0.5" in sentence
    assert "influence.sketch 16 x 64 x 8 -> none" in sentence


def test_adams_second_moments_survive_a_changed_sketch(model, tmp_path):
    """They are of the optimizer, not of the sketch: catches a resumed run whose scores lose their geometry until the
    next reading."""
    state = replace(RUNNING, precondition="adam_state")
    saved = plain_scorer(state, model, 3, second_of(model))
    scored(saved, model, 0, 1)
    wider = replace(state, sketch=SketchConfig(24, 128, 12))
    resumed = plain_scorer(wider, model, 3)
    [sentence] = resumed.load_state_dict(through_a_file(saved.state_dict(), tmp_path))
    assert "influence.sketch 16 x 64 x 8 -> 24 x 128 x 12" in sentence
    assert resumed.preconditioned
    got = scored(resumed, model, 2)[0]
    assert torch.equal(got, scored(plain_scorer(wider, model, 3, second_of(model)), model, 2)[0])
    assert not torch.allclose(got, scored(plain_scorer(wider, model, 3), model, 2)[0], rtol=0.1)
    # Where nothing asks for them any more, they are left.
    plain = plain_scorer(replace(wider, precondition="none"), model, 3)
    plain.load_state_dict(saved.state_dict())
    assert not plain.preconditioned


def test_the_mean_of_squared_logit_gradients_survives_a_changed_sketch_but_not_another_decay(model):
    """It is over the vocabulary, whatever the sketch."""
    ema = replace(RUNNING, reference="batch", precondition="adam_ema")
    saved = plain_scorer(ema, model, 3)
    scored(saved, model, 0, 1)
    wider, slower = replace(ema, sketch=SketchConfig(24, 128, 12)), replace(ema, adam_decay=0.99)
    resumed, whole = (plain_scorer(wider, model, 3) for _ in range(2))
    assert resumed.load_state_dict(saved.state_dict()) == []
    scored(whole, model, 0, 1)
    assert torch.equal(scored(resumed, model, 2)[0], scored(whole, model, 2)[0])
    other = plain_scorer(slower, model, 3)
    [sentence] = other.load_state_dict(saved.state_dict())
    assert sentence == (
        "what the estimator had gathered is dropped (influence.adam_decay 0.95 -> 0.99) and gathered anew"
    )
    assert torch.equal(scored(other, model, 2)[0], scored(plain_scorer(slower, model, 3), model, 2)[0])


@pytest.mark.parametrize("name", ["loss", "random", "none"])
def test_controls_keep_nothing(model, name):
    scorer = plain_scorer(InfluenceConfig(estimator=name), model, 3)
    scored(scorer, model, 0)
    assert scorer.state_dict() == {}
    sketched = plain_scorer(RUNNING, model, 3)
    scored(sketched, model, 0)
    assert scorer.load_state_dict(sketched.state_dict()) == []


# What is handed to other ranks


def reduced_numbers(influence: InfluenceConfig, model) -> list[int]:
    """How many numbers each all-reduce of two micro-batches takes, and before it that of a validation set."""
    reduced: list[int] = []

    def all_reduce(tensor: Tensor) -> Tensor:
        reduced.append(tensor.numel())
        return tensor

    scorer = scorer_of(influence, model, 3, CPU, Stopwatch(CPU), all_reduce)
    if influence.reference == "validation":
        added(scorer, model, 5)
        scorer.hold_validation()
    added(scorer, model, 0, 1)
    scorer.scores()
    return reduced


@pytest.mark.parametrize("sketch", [SKETCH, SketchConfig(10**3, 10**3, 10**3), "none"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize("name", ["lai", "lli", "residual", "ghost"])
def test_one_all_reduce_of_a_sketch_a_micro_batch_and_none_against_a_validation_set(name, kind, sketch):
    """Of the sketch's numbers, whatever the model."""
    model, influence = tiny(kind), InfluenceConfig(estimator=name, sketch=sketch)
    [both] = reduced_numbers(influence, model)
    if sketch == SKETCH:
        widths = {"ghost": SKETCH.hidden_width, "residual": SKETCH.hidden_width}.get(name, SKETCH.input_width)
        body = SKETCH.input_width * SKETCH.hidden_width if name == "residual" else 0
        assert both == 2 * (widths * SKETCH.logit_width + body)
    assert reduced_numbers(replace(influence, reference="validation"), model) == [both // 2]


def test_with_appendix_e_its_statistics_travel_too(model):
    ema = replace(RUNNING, precondition="adam_ema")
    assert reduced_numbers(ema, model) == [2 * 16 * 64 + VOCABULARY + 1]
    assert reduced_numbers(replace(ema, reference="validation"), model) == [16 * 64, VOCABULARY + 1]


# What units are compared with


@pytest.mark.parametrize("include_self", [True, False])
def test_the_running_mean_is_bias_corrected_and_knows_how_much_of_a_unit_is_in_it(model, include_self):
    """Against loops over the calls so far. Catches weights that do not add up to 1, and a unit's own sketch taken out
    whole where only its share is in."""
    scorer = plain_scorer(replace(RUNNING, sketch="none", include_self=include_self), model, 3)
    sums: list[Tensor] = []
    for seed in range(4):
        sketches = token_pair_sketches(model, batch_of(seed))
        sums.append(sketches.sum(0))
        shares = torch.tensor([0.6**age for age in reversed(range(len(sums)))], dtype=torch.float64)
        shares = shares / shares.sum()
        mean = sum(share * part for share, part in zip(shares, sums, strict=True))
        own = 0.0 if include_self else shares[-1]
        expected = torch.stack([sketch @ (mean - own * sketch) for sketch in sketches])
        [got] = scored(scorer, model, seed)
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


# Micro-batches


@pytest.mark.parametrize("name", ["lai", "residual", "ghost"])
def test_what_is_scored_together_is_compared_with_all_of_it_and_with_its_own_alone(model, name):
    """Catches scores of one micro-batch given to another."""
    influence = InfluenceConfig(estimator=name, sketch=SKETCH)
    batches = [batch_of(0), batch_of(1)]
    scorer = plain_scorer(influence, model, 3)
    added(scorer, model, 0, 1)
    together = scorer.scores()
    both = Batch(
        torch.cat([batch.input_ids_BT for batch in batches]),
        torch.cat([batch.labels_BT for batch in batches]),
        [Unit(i, i, (i * TOKENS, (i + 1) * TOKENS), [i], "-") for i in range(2 * SAMPLES)],
    )
    whole = ghost_scores(influence, model, both, 3)
    torch.testing.assert_close(torch.cat([part.scores_U for part in together]), whole, rtol=1e-3, atol=0)
    for part, batch in zip(together, batches, strict=True):
        alone = ghost_scores(influence, model, batch, 3)
        torch.testing.assert_close(part.micro_scores_U, alone, rtol=1e-3, atol=0)
    # And both are let go of.
    added(scorer, model, 1)
    [last] = scorer.scores()
    torch.testing.assert_close(last.scores_U, alone, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["lai", "lli", "residual", "ghost", "loss", "random", "none"])
def test_a_sample_that_is_not_finite_has_no_loss_and_spoils_nobody_elses_score(model, name):
    """Against the batch without it. Catches NaN * 0."""
    influence = InfluenceConfig(estimator=name, sketch="none")
    broken, sound = batch_of(0), batch_of(0)
    sound.labels_BT[1] = -100

    def spoilt(**inputs):
        out = model(**inputs)
        out.logits = out.logits.clone()
        out.logits[1, 2] = torch.nan
        return out

    found = []
    for batch, forward in ((broken, spoilt), (sound, model)):
        scorer = plain_scorer(influence, model, 3)
        watched = MicroBatch(scorer, batch, Stopwatch(CPU))
        losses = watched.forward(forward)
        watched.before_backward(None)
        if scorer.after_backward:
            # A backward is of what is finite only (`training.corrective`).
            losses.nan_to_num(0.0)[[0, 2]].sum().backward()
            model.zero_grad()
        watched.add()
        found += scorer.scores()
    assert found[0].losses_U.isfinite().tolist() == [True, False, True]
    if name != "none":
        torch.testing.assert_close(found[0].scores_U[[0, 2]], found[1].scores_U[[0, 2]], rtol=1e-4, atol=1e-8)


class Waits(TorchDispatchMode):
    """How often the host would wait for an accelerator: for a number, or for how many there are of something."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket
        chosen = args[1] if name in (torch.ops.aten.index, torch.ops.aten.index_put_) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in chosen)
        numbers = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
        self.count += by_mask or name in numbers
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["lai", "lli", "residual", "ghost"])
def test_scoring_does_not_wait_for_the_device(model, name):
    """From the forward to the scores, which are then gathered in one go. Catches numbers that are read on the way. (Of
    the first micro-batch some are, to know the model by.)"""

    with Waits() as plain:
        forward_losses(model, batch_of(1)).sum().backward()
    scorer = plain_scorer(InfluenceConfig(estimator=name, sketch=SKETCH), model, 3)
    for seed in (0, 1):
        with Waits() as scored:
            watched = MicroBatch(scorer, batch_of(seed), Stopwatch(CPU))
            losses = watched.forward(model)
            watched.before_backward(float(losses.numel()))
            losses.sum().backward()
            watched.add()
            scorer.scores()
    assert scored.count == plain.count


def test_a_row_counts_where_all_of_its_units_do():
    """Catches units that are taken for rows where a row has several."""
    units = [Unit(i, i, (start, stop), [i], "-") for i, (start, stop) in enumerate([(0, 3), (3, 8), (8, 16), (16, 20)])]
    batch = replace(batch_of(0), units=[*units, Unit(4, 4, (20, 24), [4], "-")])
    for true in ([1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 0, 0, 1], [0, 0, 1, 1, 0]):
        expected = [true[0] and true[1]] * 2 + [true[2]] + [true[3] and true[4]] * 2
        assert batch.whole_rows(torch.tensor(true) > 0).tolist() == [each > 0 for each in expected]
