"""DeepSpeed's JSON with one thing wrong each: refused by name with the remedy, and the remedy done."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.deepspeed_json import read_deepspeed_config
from pipeline.engine.json_check import check_deepspeed_json, notes
from pipeline.engine.schedule import rate_at
from pipeline.train import parse
from tests.runs import ADAM, deepspeed_json

ROOT = Path(__file__).parents[2]


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": ADAM["params"] | params}}


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2} | settings}


@pytest.fixture
def config_with(tmp_path):
    """The arguments of a run of ten steps under such a JSON."""

    def make(settings: dict[str, Any], text: str = "", steps: int = 10) -> list[str]:
        path = deepspeed_json(tmp_path / "ds.json", **settings)
        if text:
            path.write_text(text)
        options = {
            "run_dir": tmp_path / "run",
            "deepspeed_config": path,
            "model.name_or_path": "m",
            "data.prepared_dir": tmp_path / "data",
            "max_steps": steps,
        }
        return [f"--{key}={value}" for key, value in options.items()]

    return make


REFUSED = [
    (
        {"gradient_acumulation_steps": 4},
        "did you mean gradient_accumulation_steps?",
        {"gradient_accumulation_steps": 4},
    ),
    ({"prescale_gradient": True}, "did you mean prescale_gradients?", {"prescale_gradients": True}),
    (
        zero(overlap_com=True),
        "zero_optimization.overlap_com is no key of DeepSpeed's; did you mean overlap_comm?",
        zero(),
    ),
    (zero(offload_optimizer={"devise": "cpu"}), "zero_optimization.offload_optimizer.devise is no", zero()),
    (zero(offload_optimizer={"device": "gpu"}), 'offload_optimizer.device cannot be "gpu"', zero()),
    (zero(stage=4), "zero_optimization.stage must be 0, 1, 2 or 3, not 4", zero(stage=3)),
    (zero(stage=True), "zero_optimization.stage must be 0, 1, 2 or 3, not true", zero(stage=1)),
    (zero(stage="2"), 'zero_optimization.stage must be a number without quotes, not "2"', zero(stage=2)),
    (zero(reduce_bucket_size="5e8"), "reduce_bucket_size must be a number without", zero(reduce_bucket_size=500)),
    (zero(overlap_comm="true"), "must be true or false without quotes", zero(overlap_comm=True)),
    ({"zero_optimization": None}, "zero_optimization is null; leave it out", zero()),
    ({"zero_optimization": 2}, "zero_optimization must be an object", zero()),
    ({"bf16": None}, "bf16 is null", {"bf16": {"enabled": False}}),
    ({"bf16": {"enable": True}}, "bf16.enable is no key of DeepSpeed's; did you mean enabled?", {}),
    ({"fp16": {"enabled": False, "loss_scal": 1}}, "did you mean loss_scale?", {}),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "cannot be simultaneously enabled", {}),
    ({"activation_checkpointing": {"partition_activation": True}}, "did you mean partition_activations?", {}),
    ({"activation_checkpointing": None}, "activation_checkpointing is null", {}),
    ({"torch_autocast": {"enabled": True, "dtyp": "bfloat16"}}, "torch_autocast.dtyp is no key", {}),
    ({"gradient_clipping": "1.0"}, "gradient_clipping must be a number without quotes", {"gradient_clipping": 1.0}),
    ({"gradient_clipping": -1}, "gradient_clipping must be a number, 0 (none) or more", {"gradient_clipping": 0}),
    ({"gradient_accumulation_steps": True}, "must be a whole number of at least 1, not true", {}),
    ({"train_micro_batch_size_per_gpu": "4"}, "train_micro_batch_size_per_gpu must be a number without quotes", {}),
    ({"optimizer": None}, "optimizer is null", adam()),
    ({"optimizer": {"type": "AdamW", "params": None}}, "optimizer.params must be an object", adam()),
    ({"optimizer": {"type": "AdamW", "parms": {"lr": 0.1}}}, "optimizer.parms is no key", adam()),
    ({"optimizer": {"type": "AdamV", "params": {"lr": 0.1}}}, "did you mean Adam?", adam()),
    ({"optimizer": {"type": "AdamW", "params": {}}}, "optimizer.params.lr, the learning rate, is missing", adam()),
    (adam(beta=[0.9, 0.9]), "optimizer.params.beta is no setting of AdamW; did you mean betas?", adam()),
    (adam(betas=[0.9, 1.0]), "betas must be two numbers from 0 to below 1", adam()),
    (adam(lr="1e-3"), "optimizer.params.lr must be a number without quotes", adam()),
    (adam(lr=-1), "optimizer.params.lr must be a number of at least 0", adam()),
    (adam(max_grad_norm=1.0), "say it as gradient_clipping", {"gradient_clipping": 1.0}),
    (adam(torch_adam=1), "optimizer.params.torch_adam must be true or false", adam()),
    ({"scheduler": None}, "scheduler is null", {}),
    (scheduler("WarmupLr"), "did you mean WarmupLR?", scheduler("WarmupLR")),
    (scheduler("WarmupCosineLR"), 'total_num_steps ("auto": max_steps) is missing', {}),
    (
        scheduler("WarmupLR", warmup_steps=3),
        "did you mean warmup_num_steps?",
        scheduler("WarmupLR", warmup_num_steps=3),
    ),
    (scheduler("WarmupLR", warmup_max_lr="1e-3"), "warmup_max_lr must be a number without quotes", {}),
    (scheduler("WarmupLR", warmup_type="linaer"), "warmup_type must be log or linear", {}),
    (scheduler("WarmupLR", warmup_num_steps=2.5), "warmup_num_steps must be a whole number", {}),
    (scheduler("WarmupLR", warmup_min_lr=0.1, warmup_max_lr=0.01), "is above warmup_max_lr", {}),
    (
        scheduler("WarmupDecayLR", total_num_steps=5),
        "total_num_steps 5 is less than max_steps 10: the last 5 steps",
        scheduler("WarmupDecayLR", total_num_steps="auto"),
    ),
    (
        scheduler("WarmupDecayLR", total_num_steps=50, warmup_num_steps=60),
        "warmup_num_steps 60 is not less than total_num_steps 50",
        scheduler("WarmupDecayLR", total_num_steps=50, warmup_num_steps=6),
    ),
    (
        {"tensor_parallel": {"autotp_size": 2}},
        "tensor_parallel.autotp_size 2 lets ranks share",
        {"tensor_parallel": {}},
    ),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size 2 lets ranks share samples or layers", {}),
    ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, "expert_parallel.enabled true lets ranks share", {}),
    ({"compile": {"deepcompile": True}}, "compile is for engine.compile(), which is not called here", {}),
    ({"compression_training": {}}, "compression library has been removed", {}),
    (
        {"communication_data_type": "fp8"},
        'communication_data_type cannot be "fp8"',
        {"communication_data_type": "bf16"},
    ),
]


@pytest.mark.parametrize(("wrong", "message", "right"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_what_deepspeed_ignores_or_cannot_use_is_refused_by_name_and_the_remedy_is_accepted(
    config_with, capsys, wrong, message, right
):
    """Before any process group: catches keys that DeepSpeed reads past, and values that it takes for others."""
    with pytest.raises(SystemExit) as stopped:
        parse("pipeline.train", config_with(wrong))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert parse("pipeline.train", config_with(right))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold an object"),
        ("{", "is not JSON"),
        ('{"gradient_clipping": 1, "gradient_clipping": 2}', "has gradient_clipping twice"),
        ('{"gradient_clipping": NaN}', "NaN is no number there"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(config_with, capsys, text, message):
    with pytest.raises(SystemExit):
        parse("pipeline.train", config_with({}, text))
    assert message in capsys.readouterr().err


ACCEPTED: list[dict[str, Any]] = [
    {"tensorboard": {"enabled": True, "job_name": "1"}},
    {"data_types": {"grad_accum_dtype": None}},
    {"optimizer": {"type": "Muon", "params": {"lr": 0.1, "momentum": 0.9}}},
    {"optimizer": {"type": "RMSprop", "params": {"lr": 0.1, "alpha": 0.9}}},
    {"checkpoint": {"tag_validation": "Warn", "use_node_local_storage": False}},
    {"wall_clock_breakdown": True, "flops_profiler": {"enabled": False, "profile_step": 2}},
    {"sequence_parallel_size": 1, "seq_parallel_communication_data_type": "bf16"},
    scheduler("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.2),
    scheduler("LRRangeTest", lr_range_test_min_lr=[0.1]),
    zero(offload_param=None, stage3_max_live_parameters=1e9),
    {"bfloat16": {"enabled": True}},
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_what_deepspeed_knows_is_accepted(config_with, settings):
    """Catches a list of keys that somebody forgot to keep up with DeepSpeed's."""
    assert parse("pipeline.train", config_with(settings))


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        (
            scheduler("WarmupCosineLR", total_num_steps="auto", warmup_num_steps=3),
            10,
            "the first 2 steps train at rate 0",
        ),
        (scheduler("WarmupLR", warmup_num_steps=3), 10, "set warmup_min_lr above 0 in"),
        (
            scheduler("WarmupLR", warmup_num_steps=30, warmup_max_lr=0.5),
            10,
            "30) is longer than the run (max_steps 10)",
        ),
        (scheduler("WarmupLR", warmup_min_lr=0.1, warmup_max_lr=0.2), 9999, "warmup_max_lr 0.2 is the rate; optimizer"),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            10,
            "set model.activation_checkpointing instead",
        ),
    ],
)
def test_what_has_no_effect_is_said(config_with, settings, steps, message):
    config = parse("pipeline.train", config_with(settings, steps=steps))
    assert any(message in note for note in notes(config, read_deepspeed_config(config)))


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_no_shipped_schedule_trains_a_step_at_rate_0(config_with, file):
    """The first step of a WarmupCosineLR by DeepSpeed's own count is one, and so is the last of a cosine down to 0."""
    config = parse("pipeline.train", [*config_with({}, steps=700), f"--deepspeed_config={file}"])
    settings = read_deepspeed_config(config)
    check_deepspeed_json(config, settings)
    assert notes(config, settings) == []
    assert all(rate_at(settings, step) > 0 for step in (1, 2, 699, 700))
    peak = json.loads(file.read_text())["optimizer"]["params"]["lr"]
    assert max(rate_at(settings, step) for step in (1, 21, 501)) == pytest.approx(peak, rel=1e-3)
