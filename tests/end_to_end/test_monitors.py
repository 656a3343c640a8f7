"""DeepSpeed's monitors get what TensorBoard gets."""

import csv
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.train import train
from tests.runs import ADAM, config_of, deepspeed_json


def test_a_csv_monitor_of_the_json_gets_the_scalars_of_tensorboard(ranks, corpus, tiny_model, tmp_path):
    """Catches figures that every rank writes, that are written twice, or beside another step than DeepSpeed's own."""
    deepspeed = deepspeed_json(
        tmp_path / "ds.json",
        optimizer=ADAM,
        csv_monitor={"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"},
    )
    config = config_of(corpus, tmp_path / "run", tiny_model("gpt2"), deepspeed, max_steps=3, policy__rule="rate")
    ranks(train, config)
    board = EventAccumulator(str(Path(config.run_dir, "tensorboard"))).Reload()
    for tag in ("train/loss", "influence/removed_total", "kept/by_subset/os"):
        with open(tmp_path / "csv" / "job" / f"{tag.replace('/', '_')}.csv") as file:
            head, *rows = csv.reader(file)
        assert head == ["step", tag.split("/")[-1]]
        # Two ranks of two sequences: 4, 8, 12 samples.
        shown = board.Scalars(tag)
        assert [int(samples) for samples, _ in rows] == [4 * event.step for event in shown]
        assert [float(value) for _, value in rows] == pytest.approx([event.value for event in shown], rel=1e-6)
    own = (tmp_path / "csv" / "job" / "Train_Samples_lr.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in own[1:]] == [4, 8, 12]
