"""Ledgers with one thing wrong each, and runs that differ by a little."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from pipeline.config.cli import to_yaml
from pipeline.config.schema_influence import PolicyConfig
from pipeline.data.prepared import ensure_prepared, load_split
from pipeline.data.samples import Samples
from pipeline.evidence.invariance import compare
from pipeline.evidence.ledger_check import check_ledger
from pipeline.record import ledger
from pipeline.verify import main
from tests.launcher import ROOT, environment
from tests.runs import ADAM, config_of, deepspeed_json

SEED = 4  # with which some of the first sequences hold two documents
SEQUENCES, ACCUMULATION = 4, 2  # of a micro-batch; micro-batches of a step


@pytest.fixture(scope="module")
def prepared(corpus: Path, tiny_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("verify")
    config = config_of(corpus, directory / "run", tiny_model("llama"), deepspeed_json(directory / "ds.json"))
    ensure_prepared(config)
    return corpus / "prepared"


def rows_of(prepared: Path, unit: str, steps: int = 4) -> list[dict[str, Any]]:
    """What a sound run of `steps` steps records, a row a unit, every third dropped."""
    samples = Samples(load_split(prepared, "train"), SEED, unit)
    units = samples.units(0, steps * ACCUMULATION * SEQUENCES)
    return [
        {
            "step": u.position // (ACCUMULATION * SEQUENCES) + 1,
            "micro_step": u.position // SEQUENCES % ACCUMULATION,
            "rank": u.position % SEQUENCES // 2,
            "epoch": 0,
            "position": u.position,
            "sample_id": u.sample_id,
            "document_ids": u.document_ids,
            "subset": u.subset,
            "tokens": 15,
            "loss": 2.0,
            "score": 0.5,
            "kept": number % 3 > 0,
            "reason": "",
            "weight": float(number % 3 > 0),
        }
        for number, u in enumerate(units)
    ]


def write_run(run_dir: Path, rows: list[dict[str, Any]], prepared: Path, unit: str = "sequence") -> Path:
    """A run directory with these rows, a part for every two steps, checkpoint included."""
    book = ledger.Ledger(run_dir, 0)
    for step in sorted({row["step"] for row in rows}):
        part = [row for row in rows if row["step"] == step]
        book.append(ledger.table({name: [row[name] for row in part] for name in ledger.SCHEMA.names}))
        if step % 2 == 0:
            book.commit(step)
    settings = {"seed": SEED, "data": {"prepared_dir": str(prepared)}, "influence": {"unit": unit}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "latest").write_text(f"step-{rows[-1]['step']}")
    return run_dir


@pytest.mark.parametrize("where", ["prepared", "gone"])
@pytest.mark.parametrize("unit", ["sequence", "document"])
def test_a_sound_ledger_is_described(prepared, tmp_path, unit, where):
    """Catches a checker that takes several documents of one position for a repetition."""
    rows = rows_of(prepared, unit)
    assert (len(rows) > 32) == (unit == "document")
    run_dir = write_run(tmp_path / "run", rows, prepared if where == "prepared" else tmp_path / "gone", unit)
    summary, violations = check_ledger(run_dir)
    assert violations == []
    removed = sum(not row["kept"] for row in rows)
    assert summary.startswith(f"{len(rows)} units at positions 0..31, 4 steps, {removed} removed (order ")
    assert ("not recomputed" in summary) == (where == "gone")


def drop(rows, *positions):
    return [row for row in rows if row["position"] not in positions]


def change(rows, position, **values):
    return [row | values if row["position"] == position else row for row in rows]


def swap(rows, first, second):
    rows[first], rows[second] = rows[second], rows[first]
    return rows


def shift(rows, position):
    """Left out and closed up, as if a sample had been skipped."""
    kept = [dict(row) for row in rows]
    for here, later in zip(kept[position:], rows[position + 1 :], strict=False):
        here |= {name: later[name] for name in ("sample_id", "document_ids")}
    return kept[:-1]


FAULTS = {
    "gap": (lambda rows: drop(rows, 9, 10), "positions 9..10 are missing before position 11 (step 2, micro-step 0, "),
    "short first": (lambda rows: drop(rows, 0), "positions 0..0 are missing before position 1 (step 1, micro-step 0, "),
    "repeated": (
        lambda rows: rows[:6] + rows[5:],
        "position 5 (step 1, micro-step 1, steps-00000001-00000002.parquet) was scored before",
    ),
    "repeated instead": (
        lambda rows: [*rows[:6], rows[5] | {"rank": 1}, *rows[7:]],
        "position 5 (step 1, micro-step 1, steps-00000001-00000002.parquet) was scored before",
    ),
    "swapped": (lambda rows: swap(rows, 16, 17), "position 16 (step 3, micro-step 0, steps-00000003-00000004.parquet) "
                "comes after position 17"),
    "wrong sample": (lambda rows: change(rows, 20, sample_id=1), "position 20 (step 3, micro-step 1, "
                     "steps-00000003-00000004.parquet) holds sample 1 of epoch 0"),
    "wrong epoch": (lambda rows: change(rows, 31, epoch=1), "holds sample {} of epoch 1"),
    "skipped sample": (lambda rows: shift(rows, 12), "position 12 (step 2, micro-step 1, "),
    "kept without weight": (lambda rows: change(rows, 3, kept=True, weight=0.0), "position 3 (step 1, micro-step 0, "
                            "steps-00000001-00000002.parquet) has kept True at weight 0.0"),
    "dropped with weight": (lambda rows: change(rows, 4, kept=False, weight=0.5), "has kept False at weight 0.5"),
    "missing step": (lambda rows: [row for row in rows if row["step"] != 3], "step 3 is missing"),
    "short micro-batch": (lambda rows: drop(rows, 31), "step 4, micro-step 1 has 3 sequences, others 4"),
    "missing micro-step": (lambda rows: drop(rows, 24, 25, 26, 27), "step 4 has micro-steps [1], not 0..1 as others"),
    "steps of another part": (lambda rows: change(rows, 8, step=1), "step 1, micro-step 0 has 5 sequences, others 4"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(prepared, tmp_path, fault):
    inject, message = FAULTS[fault]
    rows = rows_of(prepared, "sequence")
    message = message.format(rows[31]["sample_id"])
    _, violations = check_ledger(write_run(tmp_path / "run", inject(rows), prepared))
    assert any(message in violation for violation in violations), violations


def test_faults_that_need_no_dataset_are_found_without_it(prepared, tmp_path):
    rows = rows_of(prepared, "sequence")
    again = change(rows, 20, sample_id=rows[2]["sample_id"])
    _, violations = check_ledger(write_run(tmp_path / "run", again, tmp_path / "gone"))
    assert len(violations) == 1
    assert violations[0].startswith("position 20 (step 3, micro-step 1, ")
    assert f"has sample {rows[2]['sample_id']} again in epoch 0" in violations[0]


def test_a_lost_and_a_repeated_document_of_a_position_are_found(prepared, tmp_path):
    rows = rows_of(prepared, "document")
    index = next(i for i, row in enumerate(rows) if i and row["position"] == rows[i - 1]["position"])
    lost = check_ledger(write_run(tmp_path / "lost", rows[:index] + rows[index + 1 :], prepared, "document"))
    assert len(lost[1]) == 1
    assert (
        f"should hold sample {rows[index]['sample_id']} of epoch 0, documents {rows[index]['document_ids']}"
        in (lost[1][0])
    )
    again = check_ledger(write_run(tmp_path / "again", rows[:index] + rows[index - 1 :], prepared, "document"))
    assert any("was scored before: documents" in violation for violation in again[1])


def test_what_is_no_part_is_not_counted_and_what_is_broken_is_named(prepared, tmp_path):
    run_dir = write_run(tmp_path / "run", rows_of(prepared, "sequence"), prepared)
    last = run_dir / "ledger" / "steps-00000003-00000004.parquet"
    (run_dir / "ledger" / "rows.partial").write_bytes(last.read_bytes())
    assert check_ledger(run_dir)[1] == []
    last.rename(last.with_name("steps-00000003-00000005.parquet"))
    assert check_ledger(run_dir)[1] == ["steps-00000003-00000005.parquet holds steps 3 to 4"]
    last.with_name("steps-00000003-00000005.parquet").write_bytes(b"PAR1 torn")
    torn = check_ledger(run_dir)[1]
    assert torn[0].startswith("steps-00000003-00000005.parquet cannot be read: ")
    assert torn[1] == "the newest checkpoint is of step 4, the ledger ends at step 2"


def test_rows_that_no_checkpoint_covers_are_lost_only_if_the_checkpoint_is_newer(prepared, tmp_path):
    run_dir = write_run(tmp_path / "run", rows_of(prepared, "sequence"), prepared)
    (run_dir / "checkpoints" / "latest").write_text("step-2")
    summary, violations = check_ledger(run_dir)
    assert violations == []
    assert "the newest checkpoint is of step 2: a resume scores later steps again" in summary
    (run_dir / "checkpoints" / "latest").write_text("step-5")
    assert check_ledger(run_dir)[1] == ["the newest checkpoint is of step 5, the ledger ends at step 4"]


def test_exit_codes_of_the_ledger_command(prepared, tmp_path, capsys):
    rows = rows_of(prepared, "sequence")
    good, bad = write_run(tmp_path / "good", rows, prepared), write_run(tmp_path / "bad", drop(rows, 9), prepared)
    for directories, code in (([good], 0), ([good, bad], 1), ([tmp_path / "none"], 2), ([prepared], 2)):
        with pytest.raises(SystemExit) as ended:
            main(["ledger", *map(str, directories)])
        assert ended.value.code == code
    output = capsys.readouterr()
    assert f"{good}: OK: 32 units at positions 0..31, 4 steps, 11 removed" in output.out
    assert f"{bad}: VIOLATED: 31 units" in output.out
    assert f"{tmp_path / 'none'} is no run directory" in output.err


# Comparing runs

RATE = PolicyConfig(rule="rate", rate=0.25)
SCORES = [-2.0, -1.0, 1.0, 10.0]


def scored(steps: list[list[float]], kept: list[list[bool]], loss: float = 2.0, reason: str = "") -> pa.Table:
    rows = [(step, unit) for step in range(len(steps)) for unit in range(len(steps[step]))]
    return ledger.table(
        {
            "step": [step + 1 for step, _ in rows],
            "micro_step": 0,
            "rank": 0,
            "epoch": 0,
            "position": list(range(len(rows))),
            "sample_id": list(range(len(rows))),
            "document_ids": [[number] for number in range(len(rows))],
            "subset": "-",
            "tokens": 8,
            "loss": loss,
            "score": [steps[step][unit] for step, unit in rows],
            "kept": [kept[step][unit] for step, unit in rows],
            "reason": reason,
            "weight": [float(kept[step][unit]) for step, unit in rows],
        }
    )


ONE_DROPPED = [False, True, True, True]


def test_equal_runs_agree(prepared):
    run = scored([SCORES, SCORES], [ONE_DROPPED] * 2)
    found = compare(run, run, RATE, 1e-4)
    assert (found.loss, found.score, found.differing, found.close, found.steps) == (0, 0, 0, 0, 2)
    assert not found.violations


@pytest.mark.parametrize(("off", "caught"), [(0.5e-4, False), (2e-4, True)])
def test_scores_and_losses_are_measured_by_the_largest_of_their_micro_batch(off, caught):
    """The first step's scores are a hundred times larger: catches a scale taken over the whole run."""
    steps, kept = [[100 * score for score in SCORES], SCORES], [ONE_DROPPED] * 2
    moved = [steps[0], [*SCORES[:2], 1.0 + 10.0 * off, 10.0]]
    found = compare(scored(steps, kept), scored(moved, kept), RATE, 1e-4)
    assert found.score == pytest.approx(off, rel=1e-2)
    assert [violation.split(":")[0] for violation in found.violations] == (
        ["step 2, micro-step 0, position 6"] if caught else []
    )
    found = compare(scored(steps, kept), scored(steps, kept, loss=2.0 * (1 + off)), RATE, 1e-4)
    assert found.loss == pytest.approx(off, rel=1e-2)
    assert bool(found.violations) == caught


@pytest.mark.parametrize("policy", [RATE, PolicyConfig(rule="threshold", threshold=-1.5)])
def test_a_decision_that_differs_away_from_the_boundary_is_refused(policy):
    first = scored([SCORES, SCORES], [ONE_DROPPED] * 2)
    other = scored([SCORES, SCORES], [[True, False, True, True], ONE_DROPPED])
    found = compare(first, other, policy, 1e-4)
    assert (found.differing, found.close, found.steps) == (2, 0, 1)
    assert found.violations == [
        "step 1, micro-step 0, position 0: kept False and True at score -2, boundary -1.5",
        "step 1, micro-step 0, position 1: kept True and False at score -1, boundary -1.5",
    ]


@pytest.mark.parametrize("policy", [RATE, PolicyConfig(rule="threshold", threshold=-1.0)])
def test_a_decision_at_the_boundary_may_differ_and_ends_the_comparison(policy):
    """What follows is another run: catches a checker that compares it on."""
    near = [-1.0003, -0.9998, 1.0, 10.0]
    first = scored([near, SCORES], [ONE_DROPPED] * 2)
    swapped = scored([[-0.9998, -1.0003, 1.0, 10.0], [7.0] * 4], [[True, False, True, True], [True] * 4])
    found = compare(first, swapped, policy, 1e-4)
    assert not found.violations
    assert (found.differing, found.close, found.steps) == (2, 2, 1)


def test_boundaries_of_reweighting_a_cut_short_threshold_and_warmup():
    first, other = scored([SCORES], [ONE_DROPPED]), scored([SCORES], [[True] * 4])
    assert "boundary 0" in compare(first, other, PolicyConfig(action="reweight"), 1e-4).violations[0]
    cut = scored([SCORES], [ONE_DROPPED], reason="max_drop_fraction")
    assert "boundary -1.5" in compare(cut, other, PolicyConfig(threshold=5.0), 1e-4).violations[0]
    at_threshold = scored([[0.0, *SCORES[1:]]], [[True] * 4])
    assert compare(at_threshold, at_threshold, PolicyConfig(), 1e-4).close == 1
    assert compare(at_threshold, at_threshold, PolicyConfig(warmup_steps=1), 1e-4).close == 0


def test_what_a_whole_step_decides_has_one_boundary_and_one_scale():
    """Two micro-batches; on their own, nothing would have been kept in the first and nothing dropped in the second."""
    run = scored([SCORES], [[False, False, True, True]])
    run = run.set_column(1, "micro_step", pa.array([0, 0, 1, 1], pa.int32()))
    other = run.set_column(run.schema.get_field_index("kept"), "kept", pa.array([False, True, False, True]))
    assert "boundary 0" in compare(run, other, RATE, 1e-4, "step").violations[0]
    assert "boundary nan" in compare(run, other, RATE, 1e-4, "micro_step").violations[0]


def test_other_units_and_missing_scores_are_refused():
    run = scored([SCORES], [ONE_DROPPED])
    assert compare(run, run.slice(1), RATE, 1e-4).violations == ["other units were scored, or in another order"]
    missing = scored([[float("nan"), *SCORES[1:]]], [ONE_DROPPED])
    assert compare(missing, missing, RATE, 1e-4).violations == []
    assert "score -2 and nan" in compare(run, missing, RATE, 1e-4).violations[0]


def invariance(file: Path, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.verify", "invariance", "--config", str(file), *options],
        cwd=ROOT,
        env=environment() | {"TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=400,
    )


def job(corpus: Path, tmp_path: Path, model: Path, **overrides: Any) -> Path:
    deepspeed = deepspeed_json(tmp_path / "ds.json", 2, micro=4, accumulation=2, optimizer=ADAM)
    options = {"influence__include_self": False, "influence__precondition": "adam_ema", "policy__rule": "rate"}
    config = config_of(corpus, tmp_path / "run", model, deepspeed, **options | overrides)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    return tmp_path / "run.yaml"


@pytest.mark.faults
def test_invariance_of_a_real_run_on_other_ranks(corpus, tiny_model, tmp_path):
    """Real launches; nothing is left behind, and the config's own run directory is not touched."""
    (tmp_path / "tmp").mkdir()
    file = job(corpus, tmp_path, tiny_model("llama"), policy__rate=0.3)
    result = invariance(file, tmp_path / "tmp", "--steps", "2", "--only", "rank")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 ranks, ZeRO 2, deepspeed: 32 units, " in result.stdout
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith(("1 rank", "4 ranks"))]
    assert [line[-3::2] for line in lines] == [["0", "2"]] * 2
    assert all(float(line[2]) < 1e-5 and float(line[3]) < 1e-4 for line in lines)
    assert "OK: all agree" in result.stdout
    assert not list((tmp_path / "tmp").glob("invariance-*"))
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_invariance_refuses_a_run_that_drops_nothing_and_one_that_does_not_start(corpus, tiny_model, tmp_path):
    (tmp_path / "tmp").mkdir()
    file = job(corpus, tmp_path, tiny_model("llama"))
    nothing = invariance(file, tmp_path / "tmp", "--steps", "1", "--policy.rate", "0")
    assert nothing.returncode == 2
    assert "nothing was dropped in 1 steps" in nothing.stderr
    assert not list((tmp_path / "tmp").glob("invariance-*"))
    broken = invariance(file, tmp_path / "tmp", "--steps", "1", "--model.name_or_path", str(tmp_path / "none"))
    assert broken.returncode == 2
    assert "model.name_or_path: no model could be loaded" in broken.stderr
