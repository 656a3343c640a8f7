"""Hub corpora by configuration, split and revision, and prepared data that stay those of their commit."""

import datasets
import pytest

from pipeline.config.differences import changes
from pipeline.data import hub
from pipeline.data.corpus import read_documents, resolve
from pipeline.data.fingerprint import Known, fingerprint
from pipeline.data.hub import HubCorpus, hub_corpus
from tests.corpora import make_config, remade


@pytest.mark.parametrize(
    ("source", "corpus"),
    [
        ("o/n", HubCorpus("o/n", None, "train", None)),
        ("o/n:test", HubCorpus("o/n", None, "test", None)),
        ("o/n:en:test[:5%]", HubCorpus("o/n", "en", "test[:5%]", None)),
        ("o/n:en:test", HubCorpus("o/n", "en", "test", None)),
        ("o/n@v1.0", HubCorpus("o/n", None, "train", "v1.0")),
        ("o/n:20220301.en:train@refs/pr/1", HubCorpus("o/n", "20220301.en", "train", "refs/pr/1")),
        ("o/n:a:b:c", None),
        ("no_owner", None),
    ],
)
def test_every_form_names_what_it_says(source, corpus):
    assert hub_corpus(source) == corpus
    if corpus:
        assert resolve(source) == [source]


def test_what_is_streamed_is_the_commit_that_is_in_the_fingerprint(tmp_path, monkeypatch):
    """Catches a corpus that moves between the fingerprint and the reading, and one that is forgotten by a restart."""
    commits = {"o/n:en:test": "abc", "o/n": "def"}
    monkeypatch.setattr("pipeline.data.fingerprint.commit_of", commits.get)
    monkeypatch.setattr(hub, "commit_of", commits.get)
    calls = []
    fake = lambda *names, **arguments: calls.append((names, arguments)) or iter([{"text": "one"}])  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", fake)
    config = make_config(tmp_path, "train", "o/n:en:test")
    list(read_documents(config.data.train_files, config.data, "train"))
    assert calls == [(("o/n", "en"), {"split": "test", "streaming": True, "revision": "abc"})]
    made = fingerprint(config, None)
    assert made["train_files"] == [{"hub": "o/n:en:test", "revision": "abc"}]
    commits["o/n:en:test"] = "moved"
    assert "revision: 'abc' -> 'moved'" in changes(made, fingerprint(config, None))
    assert changes(made, fingerprint(config, None, Known({}, made))) == ""
    assert "hub" in changes(made, fingerprint(remade(config, train_files="o/n"), None, Known({}, made)))
