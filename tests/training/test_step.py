"""Deciding after the backward, and references beyond the batch, on two real ranks against one plain process."""

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.config.schema import Config
from pipeline.data.batch import IGNORE, Batch
from pipeline.data.prepared import ensure_prepared, load_split
from pipeline.data.samples import Samples
from pipeline.engine.adam_state import second_moments
from pipeline.engine.deepspeed_engine import initialize
from pipeline.models.dropout import refuse_dropout
from pipeline.models.load import load_model
from pipeline.models.second_moments import SecondMoments
from pipeline.record import ledger
from pipeline.tasks.causal_lm import token_losses
from pipeline.train import train
from pipeline.training.influence_engine import InfluenceEngine
from tests.reference.influence import token_pair_sketches
from tests.runs import ADAM, LEARNING_RATE, config_of, deepspeed_json, ghost_scores, largest_difference, run, weights
from tests.seams import around_forward, before_backward, on_rank

CPU = torch.device("cpu")
BF16 = {"bf16": {"enabled": True}}
FUSED = BF16 | {"optimizer": {"type": "AdamW", "params": ADAM["params"] | {"torch_adam": False}}}


def ghost(corpus: Path, tmp_path: Path, model: Path, stage: int, **options: Any) -> Config:
    keys = ("micro", "accumulation", "optimizer", "bf16", "data_types")
    deepspeed = {key: options.pop(key) for key in keys if key in options}
    options = {"influence__estimator": "ghost", "influence__include_self": False} | options
    return config_of(
        corpus, tmp_path / "run", model, deepspeed_json(tmp_path / "ds.json", stage, **deepspeed), **options
    )


def close_to_largest(got: Any, expected: Any, tolerance: float = 1e-4) -> bool:
    got, expected = torch.as_tensor(got).double(), torch.as_tensor(expected).double()
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())


def samples_of(config: Config, split: str = "train") -> Samples:
    return Samples(load_split(config.data.prepared_dir, split), config.seed, config.influence.unit)


def plain_training(config: Config, rows: Any) -> dict[str, Tensor]:
    """One process, autograd and SGD: the kept tokens' summed gradient over all labelled tokens of the step."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(1, config.max_steps + 1):
        part = rows.filter(pc.field("step") == step).to_pylist()
        batch = samples_of(config).batch_at([row["position"] for row in part], CPU)
        losses, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
        kept = torch.tensor([row["weight"] for row in part])
        ((losses.sum(1) * kept).sum() / (batch.labels_BT != IGNORE).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
@pytest.mark.parametrize("scope", ["micro_step", "step"])
def test_the_corrective_pass_leaves_the_gradient_of_what_was_kept(ranks, corpus, tiny_model, tmp_path, stage, scope):
    """Catches a correction with another denominator, one that replaces the gradient, and ranks that miss one."""
    config = ghost(
        corpus,
        tmp_path,
        tiny_model("gpt_neo"),
        stage,
        accumulation=2,
        max_steps=2,
        policy__rule="rate",
        policy__rate=0.4,
        influence__scope=scope,
    )
    ranks(run, config)
    rows = ledger.read(tmp_path / "run")
    dropped = rows.filter(~pc.field("kept"))
    assert len(dropped) > 3
    before, after = weights(tiny_model("gpt_neo")), weights(tmp_path / "run" / "model")
    assert largest_difference(before, after) > 1e-2
    assert largest_difference(plain_training(config, rows), after) < 1e-5


@pytest.mark.parametrize("stage", [0, 3])
def test_reweighting_after_the_backward(ranks, corpus, tiny_model, tmp_path, stage):
    config = ghost(corpus, tmp_path, tiny_model("llama"), stage, max_steps=2, policy__action="reweight")
    ranks(run, config)
    rows = ledger.read(tmp_path / "run")
    assert len(set(rows["weight"].to_pylist())) > 4
    assert largest_difference(plain_training(config, rows), weights(tmp_path / "run" / "model")) < 1e-5


def count_backwards(config: Config) -> int:
    """How many backwards a rank runs."""
    losses: list[Tensor] = []
    with before_backward(losses.append):
        train(config)
    return len(losses)


def test_nobody_pays_for_a_correction_where_nothing_is_flagged(ranks, corpus, tiny_model, tmp_path):
    common = {"accumulation": 2, "max_steps": 2, "policy__rule": "rate"}
    config = ghost(corpus, tmp_path / "none", tiny_model("llama"), 2, policy__rate=0.0, **common)
    assert ranks(count_backwards, config) == [4, 4]
    rows = ledger.read(tmp_path / "none" / "run")
    assert largest_difference(plain_training(config, rows), weights(tmp_path / "none" / "run" / "model")) < 1e-5
    # One flagged sequence in the world: both ranks run one more.
    config = ghost(corpus, tmp_path / "one", tiny_model("llama"), 2, policy__rate=0.25, **common)
    assert ranks(count_backwards, config) == [6, 6]


def per_sample_gradients(model: Any, batch: Batch) -> Tensor:
    """(B, P), of the weight matrices but positions'."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and not name.endswith("wpe.weight")]
    rows = []
    for ids, labels in zip(batch.input_ids_BT, batch.labels_BT, strict=True):
        losses, _ = token_losses(model(input_ids=ids[None]).logits, labels[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), matrices)]).double())
    return torch.stack(rows)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_ghost_scores_in_the_ledger_are_inner_products_of_true_gradients(
    ranks, corpus, tiny_model, tmp_path, stage, checkpointing
):
    """Over the global batch. Catches hooks that ZeRO-3 blinds, and the factors of ranks and accumulation in a score."""
    config = ghost(
        corpus,
        tmp_path,
        tiny_model("gpt_neo"),
        stage,
        accumulation=2,
        max_steps=1,
        influence__sketch="none",
        policy__action="observe",
        model__activation_checkpointing=checkpointing,
    )
    ranks(run, config)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("gpt_neo"))
    for m, part in enumerate(ledger.read(tmp_path / "run")["score"].to_numpy().reshape(2, 4)):
        gradients = per_sample_gradients(model, samples_of(config).batch(4 * m, 4, CPU))
        pairs = gradients @ gradients.T
        assert close_to_largest(part, (pairs - pairs.diag().diag()).sum(1))


def moments_after(config: Config, steps: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What a rank reads from its engine after so many steps."""
    ensure_prepared(config)
    settings = read_deepspeed_config(config) | {"managed_gradient_accumulation": False}
    ds_engine = initialize(load_model(config.model, config.seed, settings), settings)
    engine = InfluenceEngine(ds_engine, config.influence, config.policy, config.seed)
    where = (torch.distributed.get_rank(), 2, engine.size, engine.micro_batches, CPU)
    for _ in range(steps):
        engine.train_step(samples_of(config).micro_batches(engine.position, *where))
    second = second_moments(ds_engine)
    assert second is not None
    return dict(second.means)


@pytest.mark.parametrize(
    ("stage", "precision", "tolerance"),
    [
        *((stage, {}, 1e-4) for stage in range(4)),
        (0, BF16, 0.1),  # float32 copies, one for each parameter,
        pytest.param(0, FUSED, 0.1, marks=pytest.mark.slow),  # or flat; DeepSpeed builds its op for two minutes
        (1, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, 0.1),  # DeepSpeed has an optimizer for just that
    ],
)
@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_second_moments_are_those_of_one_processs_adam(
    ranks, corpus, tiny_model, tmp_path, kind, stage, precision, tolerance
):
    """Catches slices at the wrong offset, padding, a sum over ranks that all hold the same, and the bias correction."""
    config = ghost(
        corpus,
        tmp_path,
        tiny_model(kind),
        stage,
        **{"optimizer": ADAM} | precision,
        influence__precondition="adam_state",
        policy__action="observe",
    )
    found, other = ranks(moments_after, config, 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for step in range(3):
        batch = samples_of(config).batch(4 * step, 4, CPU)
        losses, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
        (losses.sum() / (batch.labels_BT != IGNORE).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    assert found.keys() == expected.keys() == other.keys()
    for name, parameter in expected.items():
        second = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.95**3)
        for got, again, mean in zip(found[name], other[name], (second.mean(1), second.mean(0)), strict=True):
            assert close_to_largest(got, mean, tolerance), name
            assert torch.equal(got, again)


def test_own_terms_saturate_by_all_tokens_of_the_optimizer_step(ranks, corpus, tiny_model, tmp_path):
    """Two ranks and two micro-batches a step against one process. Catches the tokens of one rank or micro-batch."""
    standing_still = {"type": "AdamW", "params": ADAM["params"] | {"lr": 0.0, "weight_decay": 0.0}}
    config = ghost(
        corpus,
        tmp_path,
        tiny_model("llama"),
        2,
        accumulation=2,
        optimizer=standing_still,
        max_steps=2,
        influence__precondition="adam_state",
        influence__adam_every_steps=1,
        influence__include_self=True,
        influence__sketch="none",
        policy__action="observe",
    )
    ranks(run, config)
    found = torch.tensor(ledger.read(tmp_path / "run")["score"].to_numpy().reshape(4, 4)[2:])
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).train()
    first, *second = [samples_of(config).batch(*part, CPU) for part in ((0, 8), (8, 4), (12, 4))]
    losses, _ = token_losses(model(input_ids=first.input_ids_BT).logits, first.labels_BT)
    (losses.sum() / (first.labels_BT != IGNORE).sum()).backward()
    means = {n: (p.grad.square().mean(1), p.grad.square().mean(0)) for n, p in model.named_parameters() if p.dim() == 2}
    tokens = sum(float((batch.labels_BT != IGNORE).sum()) for batch in second)

    def expected(step_tokens: float) -> Tensor:
        moments = SecondMoments(means, 0.95, 1)
        scored = [ghost_scores(config.influence, model, part, config.seed, moments, step_tokens) for part in second]
        return torch.stack(scored)

    right, wrong = ((found - expected(count)).abs().max() for count in (tokens, tokens / 2))
    assert right < 0.02 * wrong
    assert close_to_largest(found, expected(tokens), 1e-3)


@pytest.mark.slow
def test_adam_state_scores_alike_at_all_stages_and_after_a_resume(ranks, corpus, tiny_model, tmp_path):
    """Catches factors that a resumed run forgets, or reads at another step than the unbroken one."""
    scores = {}
    for stage, estimator in [*((z, "ghost") for z in range(4)), *((z, e) for e in ("lai", "residual") for z in (1, 3))]:
        place = tmp_path / f"{estimator}-{stage}"
        common = {
            "optimizer": ADAM,
            "max_steps": 6,
            "influence__estimator": estimator,
            "influence__precondition": "adam_state",
            "influence__adam_every_steps": 4,
            "influence__include_self": True,
            "policy__rule": "rate",
            "policy__rate": 0.25,
        }
        config = ghost(corpus, place, tiny_model("llama"), stage, **common)
        ranks(run, config)
        scores[estimator, stage] = ledger.read(place / "run")["score"].to_numpy()
    plain = ghost(
        corpus,
        tmp_path / "plain",
        tiny_model("llama"),
        3,
        **common | {"influence__estimator": "lai", "influence__precondition": "none"},
    )
    ranks(run, plain)
    for (estimator, stage), found in scores.items():
        assert close_to_largest(found, scores[estimator, 1], 1e-3), (estimator, stage)
    unscaled = ledger.read(tmp_path / "plain" / "run")["score"].to_numpy()
    assert close_to_largest(unscaled[:4], scores["lai", 3][:4])  # before the first update
    assert not close_to_largest(unscaled[4:8], scores["lai", 3][4:8], 1e-2)


def stop_and_resume(config: Config, other: Config) -> None:
    train(config, until=3)
    train(other)


@pytest.mark.parametrize("reference", [pytest.param("batch", marks=pytest.mark.slow), "running", "validation"])
def test_a_resumed_run_scores_as_an_unbroken_one(ranks, corpus, tiny_model, tmp_path, reference):
    files = {"data__reference_files": corpus / "documents.jsonl", "data__prepared_dir": corpus / "prepared_reference"}
    common = {
        "optimizer": ADAM,
        "max_steps": 5,
        "influence__precondition": "adam_state",
        "influence__adam_every_steps": 4,
        "influence__reference": reference,
        "influence__validation_sequences": 3,
        "influence__validation_every_steps": 2,
        "policy__rule": "rate",
        "policy__rate": 0.25,
        **files,
    }
    whole = ghost(corpus, tmp_path / "whole", tiny_model("llama"), 2, **common)
    ranks(run, whole)
    broken = ghost(corpus, tmp_path / "broken", tiny_model("llama"), 2, **common)
    resumed = ghost(corpus, tmp_path / "broken", tiny_model("llama"), 2, **common, resume="auto")
    ranks(stop_and_resume, broken, resumed)
    assert ledger.read(tmp_path / "whole" / "run").equals(ledger.read(tmp_path / "broken" / "run"))


@pytest.mark.parametrize("reference", ["running", "validation"])
def test_a_run_resumed_with_another_estimator_gathers_its_memory_anew(ranks, corpus, tiny_model, tmp_path, reference):
    """Catches moments of another size, and factors of a preconditioning that is no longer asked for."""
    common = {
        "optimizer": ADAM,
        "max_steps": 5,
        "influence__reference": reference,
        "influence__validation_every_steps": 4,
        "policy__action": "observe",
        "data__reference_files": corpus / "documents.jsonl",
        "data__prepared_dir": corpus / "prepared_reference",
    }
    before = ghost(corpus, tmp_path, tiny_model("llama"), 2, **common, influence__precondition="adam_state")
    after = ghost(corpus, tmp_path, tiny_model("llama"), 2, **common, influence__estimator="lai", resume="auto")
    ranks(stop_and_resume, before, after)
    rows = ledger.read(tmp_path / "run")
    assert len(rows) == 20
    assert rows["score"].null_count == 0


def reference_scores(config: Config, decay: float) -> list[Tensor]:
    """By loops over steps and samples, with every moment whole, at the weights of the start."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path)
    moment = per_sample_gradients if config.influence.estimator == "ghost" else token_pair_sketches
    held, scores = None, []
    for step in range(config.max_steps):
        moments = moment(model, samples_of(config).batch(4 * step, 4, CPU))
        if config.influence.reference == "validation":
            chosen = samples_of(config, "reference").batch(config.influence.validation_sequences * step, 3, CPU)
            scores.append(moments @ moment(model, chosen).sum(0))
            continue
        sums = held = [*(held or []), moments.sum(0)]
        shares = torch.tensor([decay**age for age in range(len(sums))][::-1], dtype=torch.float64)
        shares = shares / shares.sum()
        running = sum(share * part for share, part in zip(shares, sums, strict=True))
        own = 0.0 if config.influence.include_self else shares[-1]
        scores.append(torch.stack([m @ (running - own * m) for m in moments]))
    return scores


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("estimator", ["lai", "ghost"])
@pytest.mark.parametrize("reference", ["running", "validation"])
def test_references_beyond_the_batch_are_those_of_loops(
    ranks, corpus, tiny_model, tmp_path, estimator, reference, stage
):
    """Two ranks share three validation sequences. Catches a rank's own share taken for the whole, and a wrong decay."""
    config = ghost(
        corpus,
        tmp_path,
        tiny_model("llama"),
        stage,
        optimizer={"type": "SGD", "params": {"lr": 0.0}},
        max_steps=3,
        influence__estimator=estimator,
        influence__reference=reference,
        influence__running_decay=0.7,
        influence__validation_sequences=3,
        influence__sketch="none",
        policy__action="observe",
        data__reference_files=corpus / "documents.jsonl",
        data__prepared_dir=corpus / "prepared_reference",
    )
    ranks(run, config)
    got = ledger.read(tmp_path / "run")["score"].to_numpy().reshape(3, 4)
    for part, expected in zip(got, reference_scores(config, 0.7), strict=True):
        assert close_to_largest(part, expected)


def test_a_validation_moment_leaves_no_gradient_and_no_cache(ranks, corpus, tiny_model, tmp_path):
    """Scored against a validation set or not, an observed ghost run trains bit for bit the same."""
    files = {"data__reference_files": corpus / "documents.jsonl", "data__prepared_dir": corpus / "prepared_reference"}
    common = {"optimizer": ADAM, "max_steps": 3, "policy__action": "observe", **files}
    for reference in ("batch", "validation"):
        ranks(
            run, ghost(corpus, tmp_path / reference, tiny_model("llama"), 3, influence__reference=reference, **common)
        )
    models = [weights(tmp_path / reference / "run" / "model") for reference in ("batch", "validation")]
    assert largest_difference(*models) == 0


def plain_falls(config: Config, rate: float) -> Tensor:
    """By how much each sequence's summed loss falls in one SGD step on all of them."""
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    batch, found = samples_of(config).batch(0, 4, CPU), []
    for _ in range(2):
        losses, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
        found.append(losses.detach().sum(1))
        (losses.sum() / (batch.labels_BT != IGNORE).sum()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    return found[0] - found[1]


@pytest.mark.parametrize(("estimator", "rate", "least"), [("lai", 1e-2, -1.0), ("ghost", 1e-3, 0.999)])
def test_the_audit_correlates_scores_with_how_losses_really_fell(
    ranks, corpus, tiny_model, tmp_path, estimator, rate, least
):
    """On a small plain SGD step the true inner products must be right; other scores get falls that float32 tells well.
    Catches losses after taken as before, a sign, and the units of one rank only."""
    options = {
        "max_steps": 2,
        "influence__estimator": estimator,
        "influence__include_self": True,
        "influence__sketch": "none",
        "policy__action": "observe",
        "optimizer": {"type": "SGD", "params": {"lr": rate}},
    }
    audited = ghost(corpus, tmp_path / "audited", tiny_model("llama"), 2, **options, observe__audit_every_steps=1)
    ranks(run, audited)
    ranks(run, ghost(corpus, tmp_path / "plain", tiny_model("llama"), 2, **options))
    board = EventAccumulator(str(tmp_path / "audited" / "run" / "tensorboard")).Reload()
    events = board.Scalars("influence/audit_pearson")
    assert [event.step for event in events] == [1, 2]
    scores = torch.from_numpy(ledger.read(tmp_path / "audited" / "run")["score"].to_numpy()[:4].copy())
    expected = torch.corrcoef(torch.stack([scores, plain_falls(audited, rate).double()]))[0, 1]
    assert abs(events[0].value - float(expected)) < 1e-3
    assert events[0].value >= least
    models = [weights(tmp_path / name / "run" / "model") for name in ("audited", "plain")]
    assert largest_difference(*models) == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_a_sample_that_is_not_finite_is_kept_out_of_the_backward(ranks, corpus, tiny_model, tmp_path, stage):
    """Catches a correction of NaN by NaN."""
    config = ghost(corpus, tmp_path, tiny_model("llama"), stage, max_steps=2, policy__rule="rate", policy__rate=0.25)
    ranks(run_with_a_nan, config)
    rows = ledger.read(tmp_path / "run").to_pylist()
    broken = [row for row in rows if row["reason"] == "non_finite"]
    assert [(row["step"], row["rank"], row["kept"]) for row in broken] == [(1, 1, False)]
    assert sum(row["reason"] == "rate" for row in rows) >= 1
    assert all(w.isfinite().all() for w in weights(tmp_path / "run" / "model").values())


def run_with_a_nan(config: Config) -> None:
    """Rank 1's first forward gives one position of its first sequence logits that are no numbers."""
    calls: list[int] = []

    def break_once(_: Any, output: Any) -> Any:
        calls.append(1)
        if len(calls) == 1 and on_rank(1):
            first_BT1 = torch.zeros_like(output.logits[..., :1])
            first_BT1[0] = torch.nan
            output.logits = output.logits + first_BT1
        return output

    with around_forward(break_once):
        train(config)


def test_bf16_drops_and_comes_near_plain_autograd(ranks, corpus, tiny_model, tmp_path):
    config = ghost(
        corpus,
        tmp_path,
        tiny_model("gpt_neo"),
        2,
        bf16={"enabled": True},
        max_steps=1,
        policy__rule="rate",
        policy__rate=0.25,
    )
    ranks(run, config)
    rows = ledger.read(tmp_path / "run")
    assert rows["kept"].to_pylist().count(False) == 1
    before, after = weights(tiny_model("gpt_neo")), weights(tmp_path / "run" / "model")
    expected = plain_training(config, rows)
    assert largest_difference(expected, after) < 0.1 * largest_difference(expected, before)


def test_dropout_is_refused_by_name(corpus, tiny_model, tmp_path):
    config = ghost(corpus, tmp_path, tiny_model("gpt_neo_with_dropout"), 0)
    model = load_model(config.model, config.seed)
    with pytest.raises(ValueError, match=r"resid_dropout 0\.1.*Set model\.dropout to 0"):
        refuse_dropout(model)
    refuse_dropout(load_model(ghost(corpus, tmp_path, tiny_model("llama"), 0).model, 0))
