import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from pipeline.config.cli import to_yaml
from pipeline.config.schema_influence import SketchConfig
from pipeline.data.prepared import load_split
from pipeline.data.samples import Samples
from pipeline.engine import checkpoint_files
from pipeline.engine.checkpoints import checkpoints_of
from pipeline.evidence import references
from pipeline.evidence.config import ESTIMATORS, LOOKAHEAD, ON_TARGET, FidelityRun
from pipeline.evidence.correlation import pearson, spearman
from pipeline.evidence.fidelity_scores import measure
from pipeline.evidence.on_target import lookahead_scores
from pipeline.evidence.references import adam_step
from pipeline.fidelity import main
from pipeline.models.load import load_model
from pipeline.models.second_moments import second_moments
from pipeline.record import ledger
from pipeline.tasks.causal_lm import token_losses
from tests.runs import ADAM, config_of, deepspeed_json, run

CPU = torch.device("cpu")
STEPS = 3


@pytest.fixture(scope="module")
def adam_run(ranks, corpus, tiny_model, tmp_path_factory):
    """Two ranks, AdamW, a checkpoint at every step, by stage and rate."""
    made = {}

    def at(stage, rate=1e-3):
        if (stage, rate) not in made:
            directory = tmp_path_factory.mktemp(f"zero{stage}")
            optimizer = ADAM | {"params": ADAM["params"] | {"lr": rate}}
            made[stage, rate] = config_of(
                corpus,
                directory / "run",
                tiny_model("llama"),
                deepspeed_json(directory / "ds.json", stage, optimizer=optimizer),
                FidelityRun,
                max_steps=STEPS,
                checkpoint__every_steps=1,
                checkpoint__keep=2,
                policy__action="observe",
                influence__sketch__input_width=32,
                influence__sketch__logit_width=64,
                influence__sketch__hidden_width=16,
                fidelity__batch_size=5,
                fidelity__batches=2,
                fidelity__permutations=4,
                fidelity__estimators=json.dumps([name for name in ESTIMATORS if name != LOOKAHEAD]),
                fidelity__references='["ip","ip_adam","shapley_sgd","shapley_adam","shapley_adam_limit"]',
            )
            ranks(run, made[stage, rate])
        return made[stage, rate]

    return at


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_adams_moments_of_a_checkpoint_are_those_of_one_process(adam_run, corpus, stage):
    """Catches shards in a wrong order, ZeRO-3's padding, flat shapes, and names shifted against the moments."""
    config = adam_run(stage)
    model = load_model(config.model, config.seed)
    samples = Samples(load_split(corpus / "prepared", "train"), config.seed, "sequence")
    settings = {key: value for key, value in ADAM["params"].items() if key != "torch_adam"}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    for step in range(STEPS):
        batch = samples.batch(step * 4, 4, CPU)
        losses, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
        optimizer.zero_grad()
        (losses.sum() / (batch.labels_BT != -100).sum()).backward()
        optimizer.step()
    checkpoint = checkpoints_of(config.run_dir)[f"step-{STEPS}"]
    found = checkpoint_files.checkpoint_adam(checkpoint)
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert int(found[name]["step"]) == STEPS
        for key in checkpoint_files.MOMENTS:
            expected = optimizer.state[parameter][key]
            torch.testing.assert_close(found[name][key], expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    assert not list(checkpoint.glob("universal-*"))
    assert checkpoint_files.checkpoint_position(checkpoint) == STEPS * 4


@pytest.mark.parametrize("torch_adam", [True, False])
def test_adams_moments_of_a_checkpoint_in_bf16_without_zero(ranks, corpus, tiny_model, tmp_path, torch_adam):
    """Catches one flat state for all parameters cut at the wrong places. Values are those of float32, about."""
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(
            tmp_path / "ds.json",
            0,
            bf16={"enabled": True},
            optimizer={"type": "AdamW", "params": ADAM["params"] | {"torch_adam": torch_adam}},
        ),
        max_steps=1,
        checkpoint__every_steps=1,
        influence__estimator="none",
    )
    ranks(run, config)
    model = load_model(config.model, config.seed).float()
    batch = Samples(load_split(corpus / "prepared", "train"), config.seed, "sequence").batch(0, 4, CPU)
    losses, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
    (losses.sum() / (batch.labels_BT != -100).sum()).backward()
    checkpoint = checkpoints_of(config.run_dir)["step-1"]
    assert checkpoint_files.checkpoint_learning_rate(checkpoint) == pytest.approx(1e-3)
    found = checkpoint_files.checkpoint_adam(checkpoint)
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        expected = parameter.grad.square() * (1 - 0.95)
        assert (found[name]["exp_avg_sq"] - expected).abs().max() < 0.1 * expected.max(), name


@pytest.mark.slow
def test_a_run_is_measured_at_its_checkpoints(adam_run):
    """Every estimator, reference and self-influence once a checkpoint; what is known must come out: `ip` is itself, the
    controls know nothing of it, a small SGD step's Shapley values are the inner products."""
    config = adam_run(3)
    report = measure(config)
    assert json.loads((Path(config.run_dir) / "fidelity.json").read_text()) == report
    rows = report["rows"]
    keys = ("checkpoint", "estimator", "precondition", "sketch", "reference", "own_term")
    found = {tuple(row[key] for key in keys): row for row in rows}
    assert len(found) == len(rows)
    one_form = {"ip", "ghost_flattened", "lai_flattened", "logit_gradient_norm", "loss", "random"}
    one_form |= {name for name in ESTIMATORS if name.startswith("residual_last")}
    # And the first-order references, against the others.
    forms = 2 * (len(ESTIMATORS) - 1) - len(one_form) + 2
    assert len(rows) == 2 * forms * 5 * 2
    assert {row["checkpoint"] for row in rows} == {"step-2", "step-3"}
    assert {row["sketch"] for row in rows} == {"none", "32x64", "16x64"}
    numbers = {"pearson_mean", "pearson_std", "pearson_min", "spearman_mean", "sign_agreement", "batches"}
    assert all(numbers | set(keys) == row.keys() for row in rows)
    for own_term in ("in", "out"):
        itself = found["step-3", "ip", "none", "none", "ip", own_term]
        assert itself["pearson_min"] == pytest.approx(1)
        assert itself["sign_agreement"] == 1
        assert itself["batches"] == 2
        # All but biases, norms and positions; this model has norms only.
        assert found["step-3", "ghost", "none", "none", "ip", own_term]["pearson_min"] > 0.99
        # Two blocks are all of this model's.
        assert found["step-3", "residual_last_2", "none", "none", "ip", own_term]["pearson_min"] > 0.99
        small_step = found["step-3", "ip", "none", "none", "shapley_sgd", own_term]
        assert small_step["pearson_mean"] > 0.95
        assert small_step["batches"] == 1
    reached = {
        (name, reference, own_term): found["step-3", name, "adam_state", "none", reference, own_term]["pearson_mean"]
        for name in ("ghost", "residual_last_2")
        for reference in ("ip_adam", "shapley_adam_limit")
        for own_term in ("in", "out")
    }
    for reference in ("ip_adam", "shapley_adam_limit"):
        whole = reached["residual_last_2", reference, "out"]
        assert reached["ghost", reference, "out"] == pytest.approx(whole, abs=1e-3)
    # Only ghost's self-influence knows what Adam's step makes of them (tests/influence/test_ghost.py: rightly).
    assert abs(reached["ghost", "ip_adam", "in"] - reached["residual_last_2", "ip_adam", "in"]) > 0.1
    assert {entry["permutations"] for entry in report["shapley"]} == {4}
    assert matplotlib.image.imread(Path(config.run_dir) / "fidelity.png").ndim == 3


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_shapley_values_are_of_a_step_at_the_checkpoints_own_learning_rate(
    ranks, corpus, tiny_model, tmp_path, monkeypatch, stage
):
    """Catches the schedule's peak at every checkpoint, and a rate that is written down but not stepped with."""
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 4, "warmup_type": "linear"}}
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", stage, optimizer=ADAM, scheduler=schedule),
        FidelityRun,
        max_steps=4,
        checkpoint__every_steps=2,
        influence__estimator="none",
        fidelity__batch_size=3,
        fidelity__batches=1,
        fidelity__permutations=2,
        fidelity__references='["shapley_sgd","shapley_adam"]',
        fidelity__estimators='["random"]',
        fidelity__checkpoints='["start","step-2","step-4"]',
    )
    ranks(run, config)
    stepped = []
    original = references.StepEffect

    def step_effect(model, batch, gradients, rule):
        stepped.append(rule.learning_rate)
        return original(model, batch, gradients, rule)

    monkeypatch.setattr(references, "StepEffect", step_effect)
    found = [(row["checkpoint"], row["learning_rate"]) for row in measure(config)["shapley"]]
    # DeepSpeed's schedule takes steps 1 and 2 at 0, and each one after at a quarter of the peak more.
    expected = {"start": 1e-3, "step-2": 0.25e-3, "step-4": 0.75e-3}
    assert found == [(name, pytest.approx(rate)) for name, rate in expected.items() for _ in range(2)]
    assert stepped == [rate for _, rate in found]


def test_sketches_are_held_against_the_exact_form_of_their_own_estimator(adam_run, tmp_path):
    """Catches the exact scores of another estimator, or with self-influence in where it is out."""
    config = replace(adam_run(3), run_dir=str(tmp_path / "new"))
    config = replace(config, influence=replace(config.influence, sketch=SketchConfig(32, 150, 16)))
    chosen = {"estimators": ["lli", "ghost", "random"], "references": ["exact"], "checkpoints": None}
    rows = measure(replace(config, fidelity=replace(config.fidelity, **chosen)))["rows"]
    assert [(row["estimator"], row["own_term"]) for row in rows] == [
        (name, own) for name in ("lli", "ghost") for own in ("in", "out")
    ]
    assert all(0.9 < row["pearson_mean"] < 1 for row in rows)
    assert {row["reference"] for row in rows} == {"exact"}
    config = replace(config, influence=replace(config.influence, sketch=SketchConfig(10**3, 10**3, 10**3)))
    whole = measure(replace(config, fidelity=replace(config.fidelity, **chosen | {"estimators": ["lli"]})))["rows"]
    assert [row["pearson_min"] for row in whole] == pytest.approx([1, 1])


def test_scores_against_a_target_are_held_against_what_samples_do_to_its_loss(adam_run, corpus, tmp_path):
    """Catches values on the batch's own loss, a target that the scorer never held, and self-influence in either."""
    config = adam_run(0, rate=1e-4)  # at which a real step has next to no curvature
    data = replace(
        config.data, reference_files=str(corpus / "documents.jsonl"), prepared_dir=str(tmp_path / "data"),
        allow_overlap=True,
    )  # fmt: skip
    chosen = {
        "target_sequences": 7,
        "estimators": None,
        "references": ["ip", "ip_adam", "shapley_adam", "shapley_adam_limit"],
        "checkpoints": ["step-3"],
        "batches": 1,
        "permutations": 20,
    }
    influence = replace(config.influence, estimator="oracle", oracle_subsets="*")  # of the run, and not measured
    config = replace(config, data=data, influence=influence, fidelity=replace(config.fidelity, **chosen))
    rows = measure(config)["rows"]
    assert {row["own_term"] for row in rows} == {"target"}
    named = {name.split("/")[0] for name in ON_TARGET} | {"ip_adam", "shapley_adam_limit"}
    assert {row["estimator"] for row in rows} == named
    found = {
        (row["estimator"], row["precondition"], row["reference"]): row["pearson_mean"]
        for row in rows
        if row["sketch"] == "none"
    }
    assert found["ghost", "none", "ip"] > 0.99  # this model has norms beside
    assert found["ghost", "adam_state", "ip_adam"] > 0.98
    assert found["shapley_adam_limit", "none", "shapley_adam"] > 0.99
    assert found["lookahead", "none", "shapley_adam"] > 0.8  # after three steps Adam's moments are mostly the target's
    assert found["lai", "none", "ip"] < 0.97  # else any five numbers would do

    # By hand: the gradient of the target's mean loss, with each sequence's own.
    model = load_model(config.model, config.seed).double()
    checkpoint_files.load_weights(model, checkpoints_of(config.run_dir)["step-3"])
    held = Samples(load_split(data.prepared_dir, "reference"), config.seed, "sequence").batch(0, 7, CPU)
    read = Samples(load_split(data.prepared_dir, "train"), config.seed, "sequence")
    batch = read.batch(4 * STEPS + 8 * 5, 5, CPU)  # behind what the run read and what running means warm up on
    target, values = gradient_of(model, held), []
    for row in range(5):
        values.append(float(gradient_of(model, batch, row) @ target))
    effects, _ = references.reference_values(config, model, batch, None, 1e-3, 0, references.target_at(model, [held]))
    np.testing.assert_allclose(effects["ip", True], values, rtol=1e-6)


def gradient_of(model, batch, row=None):
    """Of the summed loss of all sequences, or of one."""
    losses, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
    parts = torch.autograd.grad((losses if row is None else losses[row]).sum(), list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def test_lookahead_is_measured_as_training_scores_with_it(ranks, corpus, tiny_model, tmp_path):
    """Catches another rate, clipping or fraction, sums in place of means, and moments of another step."""
    config = config_of(
        corpus,
        tmp_path / "run",
        tiny_model("llama"),
        deepspeed_json(tmp_path / "ds.json", 0, optimizer=ADAM, gradient_clipping=0.1),
        FidelityRun,
        max_steps=2,
        checkpoint__every_steps=1,
        influence__estimator="lookahead",
        influence__reference="validation",
        influence__validation_sequences=6,
        influence__lookahead_step=0.5,
        policy__rule="top",
        policy__pool=2,
        data__reference_files=corpus / "documents.jsonl",
        data__prepared_dir=tmp_path / "data",
    )
    ranks(run, config)
    rows = ledger.read(Path(config.run_dir)).to_pandas()
    scored = rows[rows["step"] == 2]["score"].to_numpy()
    checkpoint = checkpoints_of(config.run_dir)["step-1"]
    model = load_model(config.model, config.seed).eval()
    checkpoint_files.load_weights(model, checkpoint)
    moments, rate = checkpoint_files.checkpoint_adam(checkpoint), checkpoint_files.checkpoint_learning_rate(checkpoint)
    splits = {name: Samples(load_split(config.data.prepared_dir, name), config.seed, "sequence") for name in
              ("train", "reference")}  # fmt: skip
    target = [splits["reference"].batch(6, 4, CPU), splits["reference"].batch(10, 2, CPU)]
    batch = splits["train"].batch(len(scored), len(scored), CPU)
    adam = adam_step(config, model, moments, rate)
    (measured,) = lookahead_scores(config, model, adam, target, [batch])
    np.testing.assert_allclose(measured.numpy(), scored, rtol=0, atol=2e-3 * np.abs(scored).max())


def test_a_run_without_checkpoints_is_measured_at_its_start_by_the_command(adam_run, tmp_path, capsys):
    """Before Adam's first update there is no geometry to measure in."""
    config = replace(adam_run(3), run_dir=str(tmp_path / "new"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    main(["--config", str(tmp_path / "config.yaml"), "--fidelity.estimators=[lli,random]", "--fidelity.exact=false"])
    rows = json.loads((tmp_path / "new" / "fidelity.json").read_text())["rows"]
    assert {row["checkpoint"] for row in rows} == {"start"}
    assert {row["reference"] for row in rows} == {"ip", "shapley_sgd", "shapley_adam", "shapley_adam_limit"}
    assert {(row["estimator"], row["sketch"]) for row in rows} == {
        ("lli", "32x64"),
        ("random", "none"),
        ("shapley_adam_limit", "none"),  # the first-order references are held against the others, too
    }
    assert "random" in capsys.readouterr().out


def test_a_checkpoint_that_is_not_there_is_named(adam_run):
    config = adam_run(3)
    with pytest.raises(ValueError, match=r"no whole checkpoint step-9 .* it has step-2, step-3"):
        measure(replace(config, fidelity=replace(config.fidelity, checkpoints=["step-9"])))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"fidelity__estimators": "[lai,magic]"}, "fidelity.estimators: 'magic' is none of"),
        ({"fidelity__estimators": "[lookahead]"}, "'lookahead' scores against a validation set: set fidelity.target"),
        (
            {"fidelity__estimators": "[lai,ip]", "fidelity__target_sequences": 4},
            "'ip' is not measured against fidelity.target_sequences; leave it out, or choose among lai, ",
        ),
        ({"fidelity__target_sequences": 4}, "fidelity.target_sequences needs data.reference_files, which is not set"),
        ({"fidelity__references": "[]"}, "fidelity.references is empty"),
        ({"fidelity__references": "[exact]", "fidelity__exact": "false"}, "set fidelity.exact to true"),
        ({"fidelity__batch_size": 2}, "fidelity.batch_size must be"),
        ({"fidelity__standard_error": -1}, "fidelity.standard_error must be"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(corpus, tmp_path, capsys, option, message):
    with pytest.raises(SystemExit):
        config_of(corpus, tmp_path / "run", tmp_path, deepspeed_json(tmp_path / "ds.json"), FidelityRun, **option)
    assert message in capsys.readouterr().err


def test_correlations_are_the_known_ones():
    """Catches ranks of ties by their order, and a constant side that counts as agreement."""
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 100.0])
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert spearman(x, y) == pytest.approx(1)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.866, abs=1e-3)
    assert np.isnan(pearson(x, np.ones(4)))


def test_second_moments_are_means_of_the_bias_corrected_ones():
    square = torch.tensor([[1.0, 3.0, 5.0], [0.0, 0.0, 3.0]])
    state = {"exp_avg": square, "exp_avg_sq": square * (1 - 0.9**4), "step": torch.tensor(4)}
    found = second_moments({"w": state, "b": {**state, "exp_avg_sq": square[0]}}, 0.9, CPU)
    assert (list(found.means), found.updates) == (["w"], 4)
    assert found.newest == pytest.approx(0.1 / (1 - 0.9**5))
    rows, columns = found.means["w"]
    torch.testing.assert_close(rows, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(columns, torch.tensor([0.5, 1.5, 4.0]))
