"""Rank 0 prepares; where it cannot, no rank waits for it."""

from dataclasses import replace

from pipeline.config.schema import Config
from pipeline.engine import collectives
from pipeline.training import model_check, preparing
from tests.runs import config_of, deepspeed_json, refusal_of, run


def test_what_rank_0_refuses_ends_all_ranks_and_the_remedies_work(ranks, corpus, tiny_model, tmp_path):
    """Catches ranks that wait until a dataset appears that nobody prepares, or for a rank 0 that has ended: of data
    that cannot be prepared, of data that was prepared from something else, and of a checkpoint that is not there."""

    def config(**overrides):
        deepspeed = deepspeed_json(tmp_path / "ds.json")
        options = {"max_steps": 1, "data__prepared_dir": tmp_path / "prepared"} | overrides
        return config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, **options)

    for refusal in ranks(refusal_of, run, config(data__text_field="body")):
        assert "no document in" in refusal
        assert "name the right field (data.text_field)" in refusal
    ranks(preparing.prepare_on_rank_0, config())
    for refusal in ranks(refusal_of, run, config(data__sequence_length=8)):
        assert "sequence_length: 16 -> 8" in refusal
        assert "or choose another data.prepared_dir" in refusal
    another = tmp_path / "another"
    ranks(preparing.prepare_on_rank_0, config(data__sequence_length=8, data__prepared_dir=another))
    for refusal in ranks(refusal_of, run, config(resume=tmp_path / "run" / "checkpoints" / "step-9")):
        assert "name another checkpoint, or auto" in refusal


def seen_by_rank_0_alone(config: Config) -> str:
    preparing.PATIENCE = 0
    if collectives.rank():
        config = replace(config, data=replace(config.data, prepared_dir=f"{config.data.prepared_dir}.not here"))
    try:
        preparing.prepare_on_rank_0(config)
    except ValueError as error:
        return str(error)
    finally:
        preparing.PATIENCE = 60
    return ""


def test_a_directory_that_another_host_cannot_see_is_refused_on_all_ranks(ranks, corpus, tiny_model, tmp_path):
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    for refusal in ranks(seen_by_rank_0_alone, config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed)):
        assert "rank 1 on" in refusal
        assert "cannot see it. Name a directory on a file system that all hosts share" in refusal


def look_at(config: Config, error: Exception) -> str:
    def fails(*_: object) -> str:
        raise error

    look, model_check._look = model_check._look, fails
    try:
        model_check.check_before_training(config, None)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    finally:
        model_check._look = look
    return ""


def test_a_model_that_cannot_be_looked_at_is_told_to_all_ranks(ranks, corpus, tiny_model, tmp_path):
    """Catches an error of transformers' own on rank 0, for which the others wait."""
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed_json(tmp_path / "ds.json"))
    first, second = ranks(look_at, config, IndexError("index out of range"))
    assert first == "IndexError: index out of range"
    assert second == "ValueError: rank 0 failed: IndexError: index out of range"
