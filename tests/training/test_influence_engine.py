"""`InfluenceEngine` in a loop that is not ours, on two real ranks, against slow references and plain autograd."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import InfluenceConfig, InfluenceEngine, PolicyConfig, SketchConfig
from pipeline.data.batch import Batch
from pipeline.data.rows import Rows
from tests.reference.influence import token_pair_sketches
from tests.tiny_models import VOCABULARY, larger

WORLD, SIZE, ACCUMULATION = 2, 2, 2
LEARNING_RATE = 0.5
NOT_LABELLED = -100
NO_UNIT = -1

WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "score_first": {"passes": "score_first"},
    "ghost": {"estimator": "ghost"},
}
DROP = PolicyConfig(rule="rate", rate=0.4)


def settings(way: str, stage: int) -> dict[str, Any]:
    """Plain SGD without clipping: the applied update is the gradient."""
    return {
        "train_micro_batch_size_per_gpu": SIZE,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        **({} if way == "one" else {"managed_gradient_accumulation": False}),
    }


# Somebody's own loop. Of ours it uses InfluenceEngine and its two configs.


def sequence(position: int, shape: str) -> dict[str, Any]:
    """Of a length, with labels and with units that are functions of its position."""
    random = np.random.default_rng(position)
    length = int(random.integers(8, 15))
    ids = torch.tensor(random.integers(1, VOCABULARY, length))
    labels = ids.clone()
    labels[: position % 4] = NOT_LABELLED  # a prompt
    row = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if shape == "units":
        # Two or three, and what belongs to none at the end.
        row["unit_ids"] = torch.tensor([0] * 3 + [7] * (length - 6) + [(7, 1)[position % 2]] * 3)
        row["labels"][-1] = NOT_LABELLED
        row["unit_ids"][-1] = NO_UNIT
    if shape == "stretched":
        row["position_ids"] = torch.arange(length) * (1 + position % 3)
    return row


def padded(rows: list[dict[str, Any]], length: int) -> dict[str, Any]:
    """A batch, padded at the right."""
    values = {"labels": NOT_LABELLED, "unit_ids": NO_UNIT}
    return {
        name: torch.stack([F.pad(row[name], (0, length - len(row[name])), value=values.get(name, 0)) for row in rows])
        for name in rows[0]
    }


def load(rank: int, steps: int, shape: str, first: int = 0) -> Iterator[list[dict[str, Any]]]:
    """A rank's micro-batches of each step. Every batch is as long as its longest sequence, so ranks and micro-batches
    differ; `equal`: all have one length. Rank 1 is short of a sequence in every first micro-batch."""
    for step in range(first, first + steps):
        micro_batches = []
        for m in range(ACCUMULATION):
            start = ((step * ACCUMULATION + m) * WORLD + rank) * SIZE
            positions = range(start, start + SIZE - (rank == 1 and m == 0))
            rows = [sequence(position, shape) for position in positions]
            length = 20 if shape == "equal" else max(len(row["input_ids"]) for row in rows)
            micro_batches.append({**padded(rows, length), "metadata": [f"row {position}" for position in positions]})
        yield micro_batches


def start(way: str, stage: int, influence: InfluenceConfig, policy: PolicyConfig, reference: Any = None) -> Any:
    ds_engine, *_ = deepspeed.initialize(model=larger("llama"), config=settings(way, stage))
    return ds_engine, InfluenceEngine(ds_engine, influence, policy, seed=3, reference=reference)


def foreign_loop(
    way: str,
    stage: int,
    influence: InfluenceConfig,
    policy: PolicyConfig = DROP,
    shape: str = "ragged",
    reference: Any = None,
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Two steps: what happened to every sequence, and the weights."""
    ds_engine, engine = start(way, stage, influence, policy, reference)
    rank = torch.distributed.get_rank()
    tables = [engine.train_step(micro_batches).table() for micro_batches in load(rank, 2, shape)]
    named = dict(ds_engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=stage == 3):
        return pd.concat(tables, ignore_index=True), {name: p.detach().clone() for name, p in named.items()}


# What they should be.


def units_of(step: int, m: int, shape: str) -> list[tuple[Tensor, Tensor]]:
    """Token ids, and what is to be predicted at each position, of every unit of a global micro-batch, by position."""
    found = []
    for rank in range(WORLD):
        batch = list(load(rank, step + 1, shape))[step][m]
        units_BT = batch.get("unit_ids", torch.zeros_like(batch["input_ids"]))
        for ids, labels, units in zip(batch["input_ids"], batch["labels"], units_BT, strict=True):
            following = torch.cat([labels[1:], labels.new_full((1,), NOT_LABELLED)])
            runs = [int(unit) for unit in units.unique_consecutive() if unit != NO_UNIT]
            found += [(ids, following.where(units == unit, NOT_LABELLED)) for unit in runs]
    return found


def stacked(units: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    length = max(len(ids) for ids, _ in units)
    ids_UT, labels_UT = (
        torch.stack([F.pad(unit[which], (0, length - len(unit[which])), value=value) for unit in units])
        for which, value in ((0, 0), (1, NOT_LABELLED))
    )
    return ids_UT, labels_UT


def losses_of(model: Any, units: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over each unit's labelled tokens."""
    ids_UT, labels_UT = stacked(units)
    logits_UVT = model(input_ids=ids_UT).logits.transpose(1, 2)
    return F.cross_entropy(logits_UVT, labels_UT, ignore_index=NOT_LABELLED, reduction="none").sum(1)


def gradient_sketches(way: str, model: Any, units: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Every unit's, whole: of all token pairs, or (ghost) its gradient of all weight matrices."""
    if way != "ghost":
        return token_pair_sketches(model, Batch(*stacked(units), []))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    losses_U = losses_of(model, units)
    gradients = [torch.autograd.grad(loss, matrices, retain_graph=True) for loss in losses_U]
    return torch.stack([torch.cat([part.flatten() for part in parts]).double() for parts in gradients])


def plain_loss(way: str, model: Any, micro: list[list[tuple[Tensor, Tensor]]], weights: list[Tensor]) -> Tensor:
    """Of one process, which has all ranks' units: the mean over micro-batches of each one's mean over its kept tokens;
    ghost: the sum over kept tokens, over the number of all that are labelled."""
    sums = [(losses_of(model, units) * weight).sum() for units, weight in zip(micro, weights, strict=True)]
    tokens = [(stacked(units)[1] != NOT_LABELLED).sum(1) for units in micro]
    if way == "ghost":
        return torch.stack(sums).sum() / torch.cat(tokens).sum()
    kept = [(count * weight).sum() for count, weight in zip(tokens, weights, strict=True)]
    return torch.stack([total / count for total, count in zip(sums, kept, strict=True)]).mean()


def check_against_plain_training(
    way: str, table: pd.DataFrame, weights: dict[str, Tensor], shape: str, reference: Callable[[Any], Tensor] | None
) -> None:
    """Scores of every step, and the weights after the last, given what was decided. `reference`: the sketch that units
    are compared with, if it is not their own micro-batch's."""
    model = larger("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(2):
        micro = [units_of(step, m, shape) for m in range(ACCUMULATION)]
        decided = []
        for m, units in enumerate(micro):
            rows = table[(table["step"] == step + 1) & (table["micro_step"] == m)]
            sketch_UM = gradient_sketches(way, model, units)
            scores = sketch_UM @ (reference(model) if reference else sketch_UM.sum(0))
            np.testing.assert_allclose(rows["score"], scores, rtol=0, atol=1e-4 * float(scores.abs().max()))
            decided.append(torch.tensor(rows["weight"].to_numpy(), dtype=torch.float32))
        plain_loss(way, model, micro, decided).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(dict(larger("llama").named_parameters()), weights) > 1e-2
    assert largest_difference(dict(model.named_parameters()), weights) < 1e-5


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).detach().abs().max()) for name in left)


def the_same_on_both(answers: list[tuple[pd.DataFrame, dict[str, Tensor]]]) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """What both ranks found: every unit and decision alike, and the same weights."""
    (table, weights), (other, other_weights) = answers
    pd.testing.assert_frame_equal(table.drop(columns="metadata"), other.drop(columns="metadata"), check_exact=True)
    assert largest_difference(weights, other_weights) == 0
    return table, weights


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("way", list(WAYS))
def test_scores_decisions_and_the_update_are_those_of_one_plain_process(ranks, way, stage):
    """With lengths that differ between ranks and micro-batches, and a rank that is short of a sequence. Catches padding
    that is scored or counted, labels shifted twice, a mean over ranks of means, and sequences that lose their labels
    or weights on the way to another rank."""
    influence = InfluenceConfig(sketch="none", **WAYS[way])
    table, weights = the_same_on_both(ranks(foreign_loop, way, stage, influence))
    assert (~table["kept"]).sum() >= 4
    assert table[["step", "micro_step", "rank", "position"]].to_numpy().tolist() == [
        [step, m, rank, (((step - 1) * 2 + m) * 2 + rank) * 2 + row]
        for step in (1, 2)
        for m in range(2)
        for rank in range(2)
        for row in range(1 if (rank, m) == (1, 0) else 2)
    ]
    check_against_plain_training(way, table, weights, "ragged", None)


@pytest.mark.parametrize("way", list(WAYS))
def test_padding_changes_nothing(ranks, way):
    """Batches as long as their longest sequence, against all of one length. Catches a gather of unequal shapes, and a
    sketch or a denominator that counts positions."""
    influence = InfluenceConfig(sketch=SketchConfig(64, 128, 16), **WAYS[way])
    (table, weights), (equal, equal_weights) = (
        the_same_on_both(ranks(foreign_loop, way, 2, influence, DROP, shape)) for shape in ("ragged", "equal")
    )
    assert (~table["kept"]).sum() >= 4
    assert (table["kept"] == equal["kept"]).all()
    for column in ("score", "loss"):
        np.testing.assert_allclose(table[column], equal[column], rtol=0, atol=1e-5 * equal[column].abs().max())
    assert largest_difference(weights, equal_weights) < 1e-6


@pytest.mark.parametrize("way", ["one", "score_first"])
def test_units_of_a_row_are_scored_and_dropped_each_by_itself(ranks, way):
    """Catches a row that goes as a whole, a unit that takes its neighbour's tokens, and ids that mean the same unit in
    two rows."""
    influence = InfluenceConfig(sketch="none", unit="document", **WAYS[way])
    table, weights = the_same_on_both(ranks(foreign_loop, way, 2, influence, DROP, "units"))
    per_row = table.groupby(["step", "position"])["kept"]
    assert set(per_row.count()) == {2, 3}
    assert per_row.mean().loc[lambda share: (share > 0) & (share < 1)].count() > 0
    check_against_plain_training(way, table, weights, "units", None)


def test_what_else_the_model_is_called_with_goes_along_to_another_rank(ranks):
    """Position ids that are not the usual ones. Catches an exchange of ids and labels alone."""
    found = {}
    for way, shape in (("one", "stretched"), ("score_first", "stretched"), ("one", "ragged")):
        influence = InfluenceConfig(sketch="none", **WAYS[way])
        found[way, shape] = the_same_on_both(ranks(foreign_loop, way, 2, influence, DROP, shape))
    (one, weights), (first, first_weights), (_, unstretched) = found.values()
    assert (one["kept"] == first["kept"]).all()
    assert not one["kept"].all()
    assert largest_difference(weights, first_weights) < 1e-5
    assert largest_difference(weights, unstretched) > 1e-3


def test_metadata_comes_back_with_its_own_sequence(ranks):
    """On the rank that read it. Catches metadata by row of the batch instead of by position."""
    for rank, (table, _) in enumerate(ranks(foreign_loop, "one", 0, InfluenceConfig())):
        own = table["rank"] == rank
        assert table["metadata"][own].tolist() == [f"row {position}" for position in table["position"][own]]
        assert table["metadata"][~own].isna().all()


HELD_OUT = [{name: values.tolist() for name, values in sequence(position, "").items()} for position in range(100, 105)]


@pytest.mark.parametrize(("way", "stage"), [("one", 2), ("ghost", 3)])
def test_a_validation_set_is_a_list_of_dicts(ranks, way, stage):
    """Five sequences of several lengths over two ranks, two at a time. Catches labelled padding, a sequence that both
    ranks count, the blank of the rank that has one less, and a reference that stays as it was before an update."""
    influence = InfluenceConfig(sketch="none", reference="validation", validation_sequences=5, **WAYS[way])
    table, weights = the_same_on_both(ranks(foreign_loop, way, stage, influence, DROP, "ragged", HELD_OUT))
    assert (~table["kept"]).sum() >= 4
    rows = [{name: torch.tensor(values) for name, values in row.items()} for row in HELD_OUT]
    following = [torch.cat([row["labels"][1:], torch.tensor([NOT_LABELLED])]) for row in rows]
    units = [(row["input_ids"], labels) for row, labels in zip(rows, following, strict=True)]
    check_against_plain_training(
        way, table, weights, "ragged", lambda model: gradient_sketches(way, model, units).sum(0)
    )


def test_a_reference_without_labels_has_those_of_its_ids_less_what_is_masked():
    """Catches padding of the user's own that is predicted."""
    rows = [
        {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [8, 9], "attention_mask": [1, 1]},
    ]
    found = {}
    for position in range(2):
        batch = Rows(rows, seed=0).batch_at([position], torch.device("cpu"))
        found[int(batch.input_ids_BT[0, 0])] = batch.labels_BT[0].tolist()
    assert found == {5: [6, 7, NOT_LABELLED, NOT_LABELLED], 8: [9, NOT_LABELLED]}
    together = Rows(rows, seed=0).batch_at([0, 1], torch.device("cpu"))
    assert sorted(together.labels_BT.tolist()) == [[6, 7, NOT_LABELLED, NOT_LABELLED], [9] + [NOT_LABELLED] * 3]


def interrupted_loops(directory: Path, stage: int, influence: InfluenceConfig) -> list[list[pd.DataFrame]]:
    """Steps 3 and 4 of a loop: unbroken, interrupted after the second, and interrupted by somebody who saves
    DeepSpeed's state only."""
    rank = torch.distributed.get_rank()

    def steps(engine: InfluenceEngine, first: int) -> list[pd.DataFrame]:
        return [engine.train_step(batches).table() for batches in load(rank, 2, "ragged", first)]

    ds_engine, engine = start("one", stage, influence, DROP)
    steps(engine, 0)
    ds_engine.save_checkpoint(str(directory), tag="middle")
    torch.save(engine.state_dict(), directory / f"influence-{rank}.pt")
    found = [steps(engine, 2)]
    for remembers in (True, False):
        ds_engine, engine = start("one", stage, influence, DROP)
        ds_engine.load_checkpoint(str(directory), tag="middle")
        if remembers:
            # What one rank saved is good for every rank.
            state = torch.load(directory / f"influence-{1 - rank}.pt", weights_only=True)
            assert engine.load_state_dict(state) == []
        found.append(steps(engine, 2))
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_an_interrupted_loop_goes_on_as_an_unbroken_one(ranks, tmp_path, stage):
    """Catches a running reference that begins anew, a step count that begins at 1 (and with it the policy's draws), and
    a state that only the rank that saved it can use."""
    influence = InfluenceConfig(reference="running", sketch=SketchConfig(64, 128))
    unbroken, resumed, forgetful = (
        pd.concat(tables) for tables in ranks(interrupted_loops, tmp_path, stage, influence)[0]
    )
    assert (~unbroken["kept"]).any()
    pd.testing.assert_frame_equal(unbroken, resumed, check_exact=True)
    assert forgetful["step"].tolist() != unbroken["step"].tolist()
    assert not np.allclose(forgetful["score"], unbroken["score"], rtol=1e-2)


def messages(way: str, influence: InfluenceConfig, shape: str, wrong: list[dict[str, Any]]) -> list[str]:
    """What a rank is told about steps in which these are wrong; then a step in which nothing is."""
    _, engine = start(way, 2, influence, DROP)
    (right,) = load(torch.distributed.get_rank(), 1, shape)
    found = []
    for change in wrong:
        step = [{name: value for name, value in {**batch, **change}.items() if value is not None} for batch in right]
        with pytest.raises(ValueError) as error:  # noqa: PT011
            engine.train_step(step)
        found.append(str(error.value))
    with pytest.raises(ValueError, match=r"takes the micro-batches of one optimizer step, 2 of them .*, not 1"):
        engine.train_step(right[:1])
    assert engine.train_step(right).step == 1
    return found


def of(*rows: list[int], **others: Any) -> dict[str, Any]:
    """A batch of these ids, and of these alone where nothing else is said."""
    bare = dict.fromkeys(("labels", "attention_mask", "metadata", "unit_ids"))
    return {**bare, "input_ids": torch.tensor(rows), **others}


def test_wrong_batches_are_refused_before_anything_is_scored(ranks):
    """With the key and what was found; the engine then goes on. Catches labels that broadcast, metadata of the next
    rank's sequences, and sequences that no rank has room for."""
    two = [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]
    wrong = {
        "3 sequences, more than the 2 of .*train_micro_batch_size_per_gpu": of(*two, two[0]),
        r"labels has shape \(2, 4\), input_ids \(2, 5\)": of(*two, labels=torch.ones(2, 4)),
        r"input_ids of shape \(B, T\), not \(5,\)": {"input_ids": torch.tensor(two[0])},
        r"position_ids has shape \(5,\)": of(*two, position_ids=torch.arange(5)),
        "metadata has 5 objects for 2 sequences": of(*two, metadata=list("abcde")),
        "unit 'document' and unit_ids .* go together": of(*two, unit_ids=torch.zeros(2, 5)),
    }
    _refused(ranks, "one", InfluenceConfig(), "ragged", wrong)


def test_wrong_units_are_refused(ranks):
    """Catches labelled tokens that nobody would train, and a unit that is two."""
    two = [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]
    wrong = {
        "a labelled position of row 1 belongs to no unit": of(*two, unit_ids=[[0] * 5, [0] * 3 + [NO_UNIT] * 2]),
        "a unit of row 0 comes in several pieces": of(*two, unit_ids=[[0, 0, 1, 0, 0], [0] * 5]),
        r"unit_ids has shape \(2, 4\), input_ids \(2, 5\)": of(*two, unit_ids=torch.zeros(2, 4)),
        "unit 'document' and unit_ids .* go together": of(*two),
    }
    _refused(ranks, "one", InfluenceConfig(unit="document"), "units", wrong)


@pytest.mark.parametrize("way", ["score_first", "ghost"])
def test_tensors_that_cannot_go_to_another_rank_are_refused(ranks, way):
    """A mask of (B, 1, T, T), say. Catches a gather that fails in the middle of a step, on some ranks only."""
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    batch = of([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], labels=torch.ones(2, 5, dtype=torch.long), attention_mask=mask)
    _refused(ranks, way, InfluenceConfig(**WAYS[way]), "ragged", {r"attention_mask has shape \(2, 1, 5, 5\)": batch})


def _refused(ranks: Any, way: str, influence: InfluenceConfig, shape: str, wrong: dict[str, dict[str, Any]]) -> None:
    for found in ranks(messages, way, influence, shape, list(wrong.values())):
        for message, expected in zip(found, wrong, strict=True):
            assert re.search(expected, message), message


def refusal(way: str, influence: InfluenceConfig, reference: Any = None) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        start(way, 2, influence, DROP, reference)
    return str(error.value)


@pytest.mark.parametrize(
    ("way", "influence", "reference", "message"),
    [
        ("one", {"estimator": "ghost"}, None, '"managed_gradient_accumulation": false'),
        ("one", {"passes": "score_first"}, None, '"managed_gradient_accumulation": false'),
        ("ghost", {"estimator": "lai"}, None, "leaves the accumulation to DeepSpeed"),
        ("one", {"reference": "validation"}, None, "a `reference` to score against go together"),
        ("one", {}, HELD_OUT, "a `reference` to score against go together"),
        ("one", {"reference": "validation"}, [], "the reference holds no sequence"),
        ("one", {"precondition": "adam_state"}, None, "the DeepSpeed JSON has optimizer 'SGD'"),
    ],
)
def test_what_does_not_go_together_is_refused(ranks, way, influence, reference, message):
    for found in ranks(refusal, way, InfluenceConfig(**influence), reference):
        assert message in found


def compiled_refusals() -> list[str]:
    """Of a model compiled as a whole, by DeepSpeed, in a part, and after the first step."""
    model, found = larger("llama"), []
    ds_engine, *_ = deepspeed.initialize(model=torch.compile(model, backend="eager"), config=settings("one", 0))
    found.append(_refusal(lambda: InfluenceEngine(ds_engine)))
    ds_engine, *_ = deepspeed.initialize(model=model, config=settings("one", 0))
    ds_engine.compile(backend="eager")
    found.append(_refusal(lambda: InfluenceEngine(ds_engine)))
    ds_engine, engine = start("one", 0, InfluenceConfig(), DROP)
    [first, second] = load(torch.distributed.get_rank(), 2, "ragged")
    engine.train_step(first)
    ds_engine.module.model.layers[1].compile(backend="eager")
    found.append(_refusal(lambda: engine.train_step(second)))
    return found


def _refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=r"torch\.compile|data parallelism") as refused:
        call()
    return str(refused.value)


def test_a_compiled_model_is_refused_whenever_it_was_compiled(ranks):
    """Catches layers that no hook sees, and an assertion in the middle of a forward in place of a reason."""
    for whole, by_deepspeed, part in ranks(compiled_refusals):
        assert whole == by_deepspeed
        assert whole.startswith("the model is compiled, and the hooks that watch its layers do not go with")
        assert part.startswith("the model is compiled at model.layers.1, and")


def shared_samples_refusal() -> str:
    ds_engine, *_ = deepspeed.initialize(model=larger("llama"), config=settings("one", 0))
    InfluenceEngine(ds_engine)
    ds_engine.dp_world_size = 1  # as of two ranks with one sequence between them
    return _refusal(lambda: InfluenceEngine(ds_engine))


def test_an_engine_whose_ranks_share_samples_is_refused(ranks):
    """Catches a reference in which every sample counts twice."""
    assert all("samples of their own for 1 of 2 ranks" in refusal for refusal in ranks(shared_samples_refusal))
