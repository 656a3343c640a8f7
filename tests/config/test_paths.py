import os

from pipeline.config.schema import Config, ModelConfig
from pipeline.config.schema_data import DataConfig


def test_a_tilde_is_the_home_directory_in_every_key_that_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lists = {key: ["~/a.txt", "builtin"] for key in ("train_files", "eval_files", "planted_foreign_files")}
    data = DataConfig(prepared_dir="~/p", planted_noise=0.1, reference_files="~/r.txt", **lists)
    config = Config(
        "~/run", "~/ds.json", ModelConfig("~/model", "~/tokenizer"), data, resume="~/run/checkpoints/step-1"
    )
    assert "~" not in repr(config)
    assert config.data.train_files == [f"{tmp_path}/a.txt", "builtin"]
    assert config.run_dir == os.path.expanduser("~/run")
    assert ModelConfig("a~b").name_or_path == "a~b"
