"""`observe.compare_with`: what removing changed, at the end of a run."""

import json
import re
from pathlib import Path

import pytest

from pipeline.record.summary import print_summary
from pipeline.train import parse
from tests.runs import config_of, deepspeed_json, refusal_of, run


@pytest.fixture
def plain(one_rank, corpus, tiny_model, tmp_path) -> Path:
    """A finished run that scored nothing."""
    deepspeed = deepspeed_json(tmp_path / "ds.json", 0)
    options = {"data__eval_files": corpus / "documents.jsonl", "data__prepared_dir": tmp_path / "prepared"}
    one_rank(run, config_of(corpus, tmp_path / "plain", tiny_model("gpt_neo"), deepspeed, max_steps=2, **options,
                            influence__estimator="none"))  # fmt: skip
    return tmp_path / "plain"


def test_the_end_table_says_how_much_more_than_the_other_runs_figures(
    plain, one_rank, corpus, tiny_model, tmp_path, capsys
):
    options = {"data__eval_files": corpus / "documents.jsonl", "data__prepared_dir": tmp_path / "prepared"}
    config = config_of(
        corpus, tmp_path / "run", tiny_model("gpt_neo"), tmp_path / "ds.json", max_steps=2, **options,
        policy__rule="rate", policy__rate=0.5, observe__compare_with=plain,
    )  # fmt: skip
    one_rank(run, config)
    own, other = (json.loads((directory / "summary.json").read_text()) for directory in (tmp_path / "run", plain))
    assert own["compared_with"] == {"run_dir": str(plain), "evaluation": other["evaluation_after"]}
    difference = own["evaluation_after"]["all"]["bits_per_byte"] - other["evaluation_after"]["all"]["bits_per_byte"]
    assert difference != 0
    print_summary(own)
    shown = re.sub(r"[│┃┏━┳┓┡╇┩├┼┤└┴┘─]+", " ", capsys.readouterr().out)
    assert "less plain" in shown
    assert f"{difference:+.3f}" in next(line for line in shown.splitlines() if line.split()[:1] == ["all"])


def test_what_cannot_be_compared_with_is_refused_and_each_remedy_works(
    plain, one_rank, corpus, tiny_model, tmp_path, capsys
):
    """Catches figures of other text, or of another tokenizer, beside each other."""
    held_out = {"data__eval_files": corpus / "documents.jsonl"}

    def config(**overrides):
        return config_of(
            corpus, tmp_path / "run", tiny_model("gpt_neo"), tmp_path / "ds.json", max_steps=1, **overrides
        )

    with pytest.raises(SystemExit):
        config(observe__compare_with=plain)
    assert "observe.compare_with compares held-out figures" in capsys.readouterr().err
    nowhere = config(observe__compare_with=tmp_path / "nowhere", data__prepared_dir=tmp_path / "prepared", **held_out)
    [told] = one_rank(refusal_of, run, nowhere)
    assert "nowhere has no summary.json, so it is no finished run; name a run that ended" in told
    longer = {"data__prepared_dir": tmp_path / "longer", "data__sequence_length": 24}
    [told] = one_rank(refusal_of, run, config(observe__compare_with=plain, **longer, **held_out))
    assert "was evaluated on other text (sequence_length differ), so figures do not compare" in told
    one_rank(run, config(observe__compare_with=plain, data__prepared_dir=tmp_path / "prepared", **held_out))
    assert parse("pipeline.train", ["--config", str(tmp_path / "run" / "config.yaml")]).observe.compare_with == str(
        plain
    )
