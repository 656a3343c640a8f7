"""What the benchmark counts, on tiny models: no timed assertion anywhere."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.baselines.exact_ghost import ExactGhost, inner_products
from pipeline.benchmark import run
from pipeline.config.timing import Stopwatch
from pipeline.cost import memory as memory_module
from pipeline.cost import work as work_module
from pipeline.cost.config import BenchmarkRun
from pipeline.cost.measure import measure, variants
from pipeline.cost.memory import PeakMemory, bytes_held
from pipeline.cost.random_tokens import RandomTokens
from pipeline.cost.tables import print_tables
from pipeline.cost.work import FORMULAS, Work
from pipeline.influence.micro_batch import MicroBatch
from pipeline.influence.sketch import CountSketch
from pipeline.tasks.causal_lm import token_losses
from tests.distributed import Ranks
from tests.runs import ADAM, config_of, deepspeed_json
from tests.seams import around_forward
from tests.tiny_models import VOCABULARY, tiny

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LENGTH = 16


def bench(
    tmp_path: Path,
    model: Path,
    stage: int = 1,
    micro: int = 2,
    accumulation: int = 1,
    sketch: bool = True,
    **options: Any,
) -> BenchmarkRun:
    """The config of two measured rounds; of the corpus it names nothing exists."""
    settings = deepspeed_json(tmp_path / f"ds{micro}{accumulation}.json", stage, micro, accumulation, optimizer=ADAM)
    widths = {f"influence__sketch__{name}_width": size for name, size in {"input": 8, "logit": 32, "hidden": 4}.items()}
    options = {"benchmark__pairs": 2, "benchmark__warmup": 1} | (widths if sketch else {}) | options
    return config_of(tmp_path / "none", tmp_path / "run", model, settings, kind=BenchmarkRun, **options)


def test_two_ranks_write_what_lai_costs(ranks, tiny_model, tmp_path, capsys):
    found, other = ranks(run, bench(tmp_path, tiny_model("gpt_neo")))
    assert json.loads((tmp_path / "run" / "benchmark.json").read_text()) == found
    top = {"step_time_ratio_median", "step_time_ratio_quartiles", "peak_memory_ratio", "bytes_per_micro_batch"}
    assert top <= found.keys()
    assert found["estimator"] == "lai"
    low, high = found["step_time_ratio_quartiles"]
    assert 0 < low <= found["step_time_ratio_median"] <= high
    assert len(found["step_seconds"]["plain"]) == len(found["step_seconds"]["lai"]) == 2
    assert found["step_seconds"] == other["step_seconds"], "each step's time is its slowest rank's"
    parts = found["estimators"]["lai"]["seconds_by_part"]
    assert {
        "layer inputs",
        "logit gradient",
        "gradient sketches",
        "reduce",
        "scores",
        "decide",
        "ledger, TensorBoard",
    } == parts.keys()
    assert found["plain"]["model_flops_utilization"] is None
    print_tables(found)
    shown = capsys.readouterr().out
    assert "backward" in shown
    assert "…" not in shown, "every column has its place on 80 characters"


def test_score_first_runs_half_the_backward_where_half_is_dropped(ranks, tiny_model, tmp_path):
    """Catches a backward of what was dropped, and a plain step that drops too."""
    half = {"policy__rule": "rate", "policy__rate": 0.5, "benchmark__pairs": 1, "influence__passes": "score_first"}
    found, _ = ranks(run, bench(tmp_path, tiny_model("gpt_neo"), **half))
    plain, scored = found["plain"]["gflop"], found["estimators"]["lai"]["gflop"]
    assert scored["backward"] == pytest.approx(plain["backward"] / 2)
    assert scored["forward"] == pytest.approx(1.5 * plain["forward"], rel=0.15)


def seen(config: BenchmarkRun) -> list[list[int]]:
    """The tokens of every forward of a run."""
    batches: list[list[int]] = []

    def see(arguments: dict[str, Any], output: Any) -> Any:
        batches.append(arguments["input_ids"].flatten().tolist())
        return output

    with around_forward(see):
        measure(config)
    return batches


def test_plain_and_scored_steps_see_the_same_tokens(ranks, tiny_model, tmp_path):
    """Catches steps that draw on, and ranks that read the same."""
    config = bench(tmp_path, tiny_model("gpt_neo"), benchmark__estimators='["lai","lli"]')
    first, second = ranks(seen, config)
    for own in (first, second):
        assert own[0::3] == own[1::3] == own[2::3]
        assert (
            len({tuple(tokens) for tokens in own[0::3]}) == 9
        )  # one warm-up, two measured, five for memory, one counted
    assert all(tokens not in second for tokens in first)


def bytes_of_lai(config: BenchmarkRun) -> tuple[float, dict[str, int], dict[str, int]]:
    found = measure(config)
    return found["bytes_per_micro_batch"], found["plain"]["wire_bytes"], found["estimators"]["lai"]["wire_bytes"]


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 1), (4, 1), (2, 3)])
def test_lai_hands_over_one_sketch_a_micro_batch_whatever_the_batch(ranks, tiny_model, tmp_path, micro, accumulation):
    config = bench(tmp_path, tiny_model("gpt_neo"), 1, micro, accumulation)
    for scoring, plain, scored in ranks(bytes_of_lai, config):
        assert scoring == 4 * 8 * 32
        # One row of eight numbers a unit, and how many rows there are: in plain training as well.
        assert scored["all_gather"] == plain["all_gather"] > accumulation * (micro * 8 * 8 + 8)


def test_and_whatever_the_number_of_ranks(tiny_model, tmp_path):
    three = Ranks(3)
    try:
        found = three(bytes_of_lai, bench(tmp_path, tiny_model("gpt_neo"), 0, benchmark__pairs=1))
    finally:
        three.stop()
    assert [scoring for scoring, *_ in found] == [4 * 8 * 32] * 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_of_the_formulas(ranks, tiny_model, tmp_path, checkpointing):
    """Catches phases mixed up, recomputation taken for model work, and scoring that is not seen."""
    config = bench(
        tmp_path,
        tiny_model("gpt_neo"),
        2,
        sketch=False,
        influence__sketch="none",
        model__activation_checkpointing=checkpointing,
    )
    found, _ = ranks(measure, config)
    tokens, width, layers = 2 * LENGTH, 16, 2
    linear = layers * (4 * width * width + 2 * width * 4 * width)
    head = width * VOCABULARY
    attention = layers * 2 * 2 * tokens * LENGTH * width
    forward = 2 * tokens * (linear + head) + attention
    plain = found["plain"]["gflop"]
    assert plain["forward"] * 1e9 == pytest.approx(forward)
    assert plain["optimizer"] == 0
    again = plain["backward"] * 1e9 - 2 * forward
    # Blocks are recomputed, up to what the backward needs of them; the head is not.
    assert 0.6 * (forward - 2 * tokens * head) < again <= forward - 2 * tokens * head if checkpointing else again == 0
    # q, k and v share one product; then the attention's output, c_fc and c_proj, and the head.
    inputs = layers * (width + width + width + 4 * width) + width
    assert found["estimators"]["lai"]["scoring_gflop"] * 1e9 == pytest.approx(2 * tokens * inputs * VOCABULARY)


def test_a_sketch_passes_over_its_input_once():
    """And over its output once, to fill it with zeros."""
    sketch, model = CountSketch(64, 16, 0, CPU), torch.nn.Linear(1, 1)
    x_ND = torch.randn(10, 64)
    with Work(model) as work:
        sketch(x_ND)
    assert work.elements == {"forward": 10 * 64 + 10 * 16}
    # The zeros and each slice; the first is cut in two where it starts behind bucket 0. On CUDA all are one kernel.
    assert work.launches == {"forward": 1 + 64 // 16 + (sketch.hashing().offset > 0)}
    assert not work.flops


@pytest.mark.parametrize("backward", [False, True])
def test_attention_whose_heads_share_keys_counts_as_if_each_had_its_own(monkeypatch, backward):
    """Catches torch's own formulas, up to 2.11: a model of grouped queries was an AssertionError on an accelerator."""

    def as_in_2_11(*shapes: tuple[int, ...]) -> int:
        assert len({shape[1] for shape in shapes}) == 1
        return sum(prod(shape) for shape in shapes)

    monkeypatch.setattr(work_module, "sdpa_flop_count", as_in_2_11)
    monkeypatch.setattr(work_module, "sdpa_backward_flop_count", as_in_2_11)
    query, output = torch.ones(2, 6, 5, 4), torch.ones(2, 6, 5, 4)
    shared, repeated = torch.ones(2, 3, 7, 4), torch.ones(2, 6, 7, 4)
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    of_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    counts = [
        FORMULAS[of_backward](output, query, key, key, None) if backward else FORMULAS[attention](query, key, key, None)
        for key in (shared, repeated)
    ]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("stage", [1, 3])
def test_several_estimators_beside_the_same_plain_steps(ranks, tiny_model, tmp_path, capsys, stage):
    names = ["none", "bare", "lai", "lai/adam_state", "residual", "ghost", "ghost/adam_state", "ghost_exact"]
    config = bench(tmp_path, tiny_model("llama"), stage, benchmark__estimators=json.dumps(names), benchmark__pairs=1)
    found, _ = ranks(measure, config)
    rows = found["estimators"]
    assert list(rows) == names
    assert found["estimator"] == "none"
    assert rows["none"]["bytes_per_micro_batch"] == rows["none"]["scoring_gflop"] == 0
    assert rows["bare"]["bytes_per_micro_batch"] < rows["bare"]["scoring_gflop"] == 0  # sends no losses
    assert rows["bare"]["gflop"] == found["plain"]["gflop"]
    assert rows["lai/adam_state"]["bytes_per_micro_batch"] > rows["lai"]["bytes_per_micro_batch"] == 4 * 8 * 32
    assert rows["ghost"]["bytes_per_micro_batch"] >= 4 * 4 * 32
    assert rows["lai"]["held_bytes"] > rows["none"]["held_bytes"] == 0
    print_tables(found)
    assert "…" not in capsys.readouterr().out
    # At these sizes the token pairs of a micro-batch are dearer than anything sketched.
    assert rows["ghost_exact"]["scoring_gflop"] > rows["ghost"]["scoring_gflop"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark__estimators": '["lia"]'}, "'lia' is none of"),
        ({"benchmark__estimators": '["ghost/adam"]'}, "no 'adam'"),
        ({"benchmark__estimators": '["ghost/adam_ema"]'}, "adam_ema"),
        ({"influence__estimator": "none"}, "scores nothing"),
        ({"benchmark__estimators": '["rho"]'}, "costs one forward of its reference model more"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(tiny_model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        variants(bench(tmp_path, tiny_model("gpt_neo"), **options))


def refusal(config: BenchmarkRun) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        measure(config)
    return str(error.value)


def test_what_the_engine_or_the_model_cannot_do_is_refused(ranks, tiny_model, tmp_path):
    config = bench(tmp_path, tiny_model("gpt_neo"), 1, 2, 2, benchmark__estimators='["ghost"]')
    assert "gradient_accumulation_steps" in ranks(refusal, config)[0]
    config = bench(tmp_path, tiny_model("gpt_neo"), data__sequence_length=65)
    assert "65 is more than the 64" in ranks(refusal, config)[0]


@pytest.mark.parametrize("tokens", [4, 40])
def test_products_of_gradients_by_pairs_and_whole_are_the_same(tokens):
    generator = torch.Generator().manual_seed(0)
    input_BTD, gradient_BTO = (torch.randn(3, tokens, n, generator=generator, dtype=torch.float64) for n in (20, 30))
    gradients = torch.einsum("btd,bto->bdo", input_BTD, gradient_BTO).flatten(1)
    assert torch.allclose(inner_products(input_BTD, gradient_BTO), gradients @ gradients.sum(0))


def test_exact_ghost_is_the_inner_product_of_the_gradients_of_all_linear_layers():
    model = tiny("llama").double().train()
    batch = RandomTokens(VOCABULARY, LENGTH, 0).batch_at([0, 1, 2], CPU)
    losses_BT, _ = token_losses(model(input_ids=batch.input_ids_BT).logits, batch.labels_BT)
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    rows = [torch.autograd.grad(losses_T.sum(), weights, retain_graph=True) for losses_T in losses_BT]
    scorer = ExactGhost(model, Stopwatch(CPU))
    watched = MicroBatch(scorer, batch, Stopwatch(CPU))
    losses_BT = watched.forward(model)
    watched.before_backward(None)
    losses_BT.sum().backward()
    watched.add()
    [scored] = scorer.scores()
    gradients_BP = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert torch.allclose(scored.scores_U, gradients_BP @ gradients_BP.sum(0), rtol=1e-9)
    assert scored.tokens_U.tolist() == [LENGTH - 1] * 3


@pytest.mark.parametrize("resettable", [True, False])
def test_peak_memory_sees_what_came_and_went_inside_only(monkeypatch, tmp_path, resettable):
    if not resettable:
        monkeypatch.setattr(memory_module, "_CLEAR", tmp_path / "none" / "clear_refs")
    size = 200 * 2**20
    torch.ones(2 * size, dtype=torch.uint8)
    peaks = []
    for numbers in (1, size):
        with PeakMemory(CPU) as memory:
            for _ in range(20):
                torch.ones(numbers, dtype=torch.uint8)
        peaks.append(memory.peak)
    assert 0.9 * size < peaks[1] - peaks[0] < 1.1 * size


def test_bytes_held_are_those_of_tensors_outside_of_modules():
    sketch = CountSketch(64, 16, 0, CPU)
    assert bytes_held(sketch, sketch, torch.nn.Linear(4, 4)) == 64 * 4
