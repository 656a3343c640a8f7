"""Reports of real runs, read as a person and a machine would."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.config.cli import to_yaml
from pipeline.record import ledger
from pipeline.report import main
from tests.launcher import ROOT, environment
from tests.runs import ADAM, config_of, deepspeed_json, run

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def grid(ranks, corpus, tiny_model, tmp_path_factory):
    """Two arms at two seeds: two epochs of 32 sequences, a quarter of them noise, held out before, half way, after."""
    directory = tmp_path_factory.mktemp("grid")
    deepspeed = deepspeed_json(directory / "ds.json", 0, optimizer=ADAM)
    options = {
        "max_steps": 16,
        "data__prepared_dir": directory / "data",
        "data__seed": 0,
        "data__max_sequences": 32,
        "data__planted_noise": 0.25,
        "data__eval_files": corpus / "documents.jsonl",
        "data__max_eval_sequences": 9,
        "influence__include_self": False,
        "policy__rule": "rate",
        "policy__rate": 0.25,
        "observe__eval_every_steps": 8,
    }
    for seed in (0, 1):
        for estimator in ("none", "lai"):
            arm = {"seed": seed, "influence__estimator": estimator}
            run_dir = directory / f"{estimator}-{seed}"
            ranks(run, config_of(corpus, run_dir, tiny_model("llama"), deepspeed, **options, **arm))
    return directory


RUNS = ("none-0", "none-1", "lai-0", "lai-1")


def reported(grid, *names, output=None):
    """(tables, page) of a report on these runs."""
    output = output or grid / "out" / "page.html"
    main([*(str(grid / name) for name in names), "--output", str(output)])
    return json.loads(output.with_suffix(".json").read_text()), output.read_text()


def figures_in(page):
    return re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)


def test_the_page_needs_nothing_but_itself(grid):
    """Catches figures that stay behind on the machine that drew them."""
    _, page = reported(grid, *RUNS)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    names = [name for name, _ in figures_in(page)]
    assert all(base64.b64decode(data).startswith(PNG) for _, data in figures_in(page))
    assert {"difference to none by arm", "noise AUC by arm", "score bands", "participation"} <= set(names)
    assert {"trajectories of single samples", "removal rates by subset", "noise AUC over the run"} <= set(names)
    assert names.count("score bands") == 2


def test_the_comparison_says_what_the_summaries_say(grid):
    """Catches figures before training for those after, arms paired across seeds, and a spread of n instead of n - 1."""
    none, lai = reported(grid, *RUNS)[0]["arms"]
    assert (none["arm"], lai["arm"]) == ("none", "lai")
    assert none["seeds"] == lai["seeds"] == [0, 1]
    summaries = {name: json.loads((grid / name / "summary.json").read_text()) for name in RUNS}
    for length, step in (("half", "8"), ("full", "16")):
        for metric in ("perplexity", "bits_per_byte"):
            of = {name: summary["evaluations"][step]["all"][metric] for name, summary in summaries.items()}
            gaps = [of["lai-0"] - of["none-0"], of["lai-1"] - of["none-1"]]
            found = lai[f"{length}.{metric}"]
            assert found["mean"] == pytest.approx((of["lai-0"] + of["lai-1"]) / 2)
            assert found["spread"] == pytest.approx(abs(of["lai-0"] - of["lai-1"]) / 2**0.5)
            assert found["difference"]["mean"] == pytest.approx(sum(gaps) / 2)
            assert found["difference"]["spread"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2**0.5)
            assert found["difference"]["beyond_spread"] == (abs(sum(gaps) / 2) > abs(gaps[0] - gaps[1]) / 2**0.5)
    assert none["removed"]["mean"] == 0
    assert lai["removed"]["mean"] == 16
    assert none["noise_auc"] is None
    assert 0 <= lai["noise_auc"]["mean"] <= 1


def test_tables_of_a_run_say_what_its_ledger_says(grid):
    content, page = reported(grid, "lai-1")
    [tables] = content["runs"]
    rows = ledger.read(grid / "lai-1").to_pandas()
    assert (tables["steps"], tables["units"], tables["removed"]) == (16, 64, (~rows["kept"]).sum())
    assert sum(row["units"] for row in tables["participation"]) == 32
    assert sum(row["seen"] * row["units"] for row in tables["participation"]) == 64
    for row in tables["removals"]:
        own = rows[rows["subset"] == row["subset"]]
        assert (row["units"], row["removed"]) == (len(own), (~own["kept"]).sum())
    noise = {row["kind"]: row for row in tables["noise"] if row["part"] == "all"}
    planted = rows[rows["subset"].str.startswith("planted/")]
    assert noise["all kinds"]["units"] == len(planted) == 16
    assert noise["all kinds"]["recall"] == pytest.approx((~planted["kept"]).mean())
    assert noise["all kinds"]["precision"] == pytest.approx((~planted["kept"]).sum() / (~rows["kept"]).sum())
    assert len(tables["trajectories"]) == 12
    assert [pair["epochs"] for pair in tables["agreement_between_epochs"]] == [[0, 1]]
    lowest = tables["importance"]["lowest"][0]
    own = rows[rows["sample_id"] == lowest["sample_id"]]
    places = rows.groupby(["step", "micro_step"])["score"].rank()[own.index]
    assert lowest["importance"] == pytest.approx(((places - 0.5) / 4).mean())
    assert "Not measured: there is no fidelity.json" in page


def test_a_run_that_scored_nothing_and_one_that_saw_each_sample_once_say_so(grid, ranks, corpus, tiny_model, tmp_path):
    page = reported(grid, "none-0")[1]
    assert "Nothing was scored in this run." in page
    assert "Everything: nothing was removed." in page
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    ranks(run, config_of(corpus, tmp_path / "once", tiny_model("llama"), deepspeed, max_steps=2))
    content, page = reported(tmp_path, "once")
    assert "Every unit was seen once" in page
    assert "Every sample was scored once, so there is nothing to follow." in page
    assert content["runs"][0]["noise"] == content["runs"][0]["trajectories"] == []
    assert content["arms"][0]["full.perplexity"] is None


def test_fidelity_is_shown_over_checkpoints_where_it_was_measured(grid, tmp_path):
    shutil.copytree(grid / "lai-0", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "model"))
    usual = {"precondition": "none", "sketch": "256x1024", "reference": "ip_adam", "own_term": "out"}
    usual |= {"pearson_std": 0.1, "pearson_min": 0.2, "spearman_mean": 0.5, "sign_agreement": 0.9}
    rows = [
        {"checkpoint": f"step-{step}", "estimator": name, "pearson_mean": 0.6, **usual}
        for step in (8, 16)
        for name in ("lai", "<lli>")
    ]
    others = [
        row | change for row in rows for change in ({"reference": "ip"}, {"own_term": "in"}, {"pearson_mean": None})
    ]
    (tmp_path / "run" / "fidelity.json").write_text(json.dumps({"rows": [*rows, *others]}))
    (tmp_path / "run" / "fidelity.png").write_bytes(b"its figure")
    content, page = reported(tmp_path, "run")
    assert content["runs"][0]["fidelity"] == rows
    assert ("fidelity over checkpoints", base64.b64encode(b"its figure").decode()) in figures_in(page)
    assert "lai, sketch 256x1024, reference ip_adam, self-influence out" in page
    assert "&lt;lli&gt;" in page
    (tmp_path / "run" / "fidelity.json").write_text("[")
    with pytest.raises(SystemExit):
        reported(tmp_path, "run")


def test_an_incomplete_run_is_named_and_left_out_of_the_comparison(grid, tmp_path, capsys):
    """Catches a half-trained model compared with whole ones."""
    for name in ("none-0", "lai-0", "lai-1"):
        shutil.copytree(grid / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints", "model"))
    (tmp_path / "lai-1" / "summary.json").unlink()
    ledger.Ledger(tmp_path / "lai-1", 7)
    content, page = reported(tmp_path, "none-0", "lai-0", "lai-1")
    [warning] = content["warnings"]
    assert "lai-1 is incomplete: its ledger ends at step 7 of 16" in warning
    assert warning in page
    assert "its ledger ends at step 7 of 16" in capsys.readouterr().out
    assert [row["seeds"] for row in content["arms"]] == [[0], [0]]
    assert len(content["runs"]) == 3


def test_runs_that_do_not_compare_are_pointed_out(grid, tmp_path):
    shutil.copytree(grid / "lai-0", tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints", "model"))
    config = tmp_path / "other" / "config.yaml"
    config.write_text(config.read_text().replace("planted_noise: 0.25", "planted_noise: 0.5"))
    content, _ = reported(tmp_path, "other", grid / "none-0")
    assert content["warnings"] == [
        "the runs differ in data.planted_noise (0.5, 0.25), so their arms do not compare"
    ]  # fmt: skip


def test_the_console_shows_the_arms_and_the_page_lies_beside_the_runs(grid, capsys):
    main([str(grid / "none-0"), str(grid / "lai-0")])
    out = capsys.readouterr().out
    assert "lai" in out
    assert str(grid / "report.html") in out
    assert json.loads((grid / "report.json").read_text())["runs"]
    main([str(grid / "lai-0") + "/"])
    assert (grid / "lai-0" / "report.html").is_file()


@pytest.mark.faults
def test_the_script_runs_every_arm_at_every_seed_on_one_dataset_and_goes_on_where_it_stopped(
    grid, corpus, tiny_model, tmp_path
):
    """Catches arms on data of their own, overrides that get lost, and finished runs that are run again."""
    config = config_of(
        corpus, tmp_path / "base", tiny_model("llama"), grid / "ds.json", max_steps=2, policy__rule="rate"
    )
    (tmp_path / "base.yaml").write_text(to_yaml(config))
    out = tmp_path / "out"
    command = ["bash", "launch/arms.sh", tmp_path / "base.yaml", out, "none lai,policy.flag=highest", "5 6"]
    # The second seed's data would be refused if it were its own; the sequence length is an override for all.
    for _ in range(2):
        done = subprocess.run(
            [*command, "--data.sequence_length", "8"], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is done") == 4
    runs = json.loads((out / "report.json").read_text())["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [("none", 5), ("lai", 5), ("none", 6), ("lai", 6)]
    for run_dir in out.glob("*/seed-*"):
        settings = yaml.safe_load((run_dir / "config.yaml").read_text())
        assert settings["data"]["prepared_dir"] == str(out / "data")
        assert settings["data"]["sequence_length"] == 8
        assert (settings["policy"]["flag"] == "highest") == (settings["influence"]["estimator"] == "lai")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no run directory"),
        (["empty"], "empty: its ledger has no rows yet"),
        (["lai-0", "copy"], "are the same arm (lai) with the same seed"),
        (["lai-0", "--output", "page.pdf"], "does not end in .html"),
    ],
)
def test_what_cannot_be_reported_ends_with_the_message_alone(grid, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("lai-0", "copy", "empty"):
        Path(name, "ledger").mkdir(parents=True)
        for file in ("config.yaml", "summary.json", "ledger/steps-00000001-00000016.parquet"):
            if name != "empty" or file == "config.yaml":
                shutil.copy(grid / "lai-0" / file, Path(name, file))
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("report.html").exists()
