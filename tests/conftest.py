import argparse
import functools
import inspect
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ranks and launchers must find the same ninja, or each rebuilds the op of the other.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels on CPU tensors; read where they are defined

from tests.distributed import Ranks
from tests.tiny_models import VOCABULARY, save_tiny


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """A pair of gloo ranks that lives as long as the session."""
    pair = Ranks(2)
    yield pair
    pair.stop()


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    """A rank alone."""
    alone = Ranks(1)
    yield alone
    alone.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real documents and models, where the checkout has them beside it."""
    directory = Path(__file__).parents[2] / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"no real data at {directory}")
    return directory


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real documents (docstrings of the standard library, in three subsets), a byte-level tokenizer of the tiny
    models' vocabulary, and a place for the prepared dataset."""
    directory = tmp_path_factory.mktemp("corpus")
    documents = []
    for subset, module in {"os": os, "argparse": argparse, "statistics": statistics}.items():
        for name, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) else None
            if text and len(text) > 40:
                documents.append({"text": text, "meta": {"pile_set_name": subset, "name": name}})
    (directory / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([document["text"] for document in documents], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(directory / "tokenizer")
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny model to continue from, by kind."""

    @functools.cache
    def saved(kind: str) -> Path:
        return save_tiny(kind, tmp_path_factory.mktemp(kind))

    return saved


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns `tmp_path / "run"`."""
    program = (
        "import sys, time\nfrom pipeline.config.ownership import owned\n"
        "with owned(sys.argv[1], 'run_dir'):\n    print('mine', flush=True)\n    time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
