import shutil
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast

from pipeline import train
from pipeline.config.schema import Config
from pipeline.engine import collectives
from pipeline.training import export
from pipeline.training.export import agree_with_tokenizer
from tests.runs import config_of, deepspeed_json
from tests.tiny_models import tiny


def test_an_exported_model_ends_where_its_tokenizer_does(tmp_path):
    """Catches a generation config of another tokenizer, and a list of ends that is cut to one."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
    model = tiny("llama")
    model.generation_config.eos_token_id = [2, 7]
    agree_with_tokenizer(model, tokenizer)
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    assert (saved.config.bos_token_id, saved.config.eos_token_id) == (1, 2)
    assert (saved.generation_config.bos_token_id, saved.generation_config.eos_token_id) == (1, [2, 7])
    model.generation_config.eos_token_id = 0
    agree_with_tokenizer(model, tokenizer)
    assert model.generation_config.eos_token_id == 2


def beats_heard(config: Config) -> dict[str, int]:
    """On a rank: how often it hears from rank 0 while that is slow to publish a checkpoint, and to write the model."""
    heard, broadcast, publish, copytree = Counter[str](), collectives.broadcast, train.publish, shutil.copytree
    where = "elsewhere"

    def slow(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def later(*args: Any, **options: Any) -> Any:
            nonlocal where
            where = name
            time.sleep(0.5)
            where = "elsewhere"
            return work(*args, **options)

        return later

    def counted(value: Any) -> Any:
        heard[found := broadcast(where)] += 1
        assert isinstance(found, str)
        return broadcast(value)

    beat, collectives.BEAT = collectives.BEAT, 0.05
    collectives.broadcast = counted
    train.publish, export.shutil.copytree = slow("publish", publish), slow("model", copytree)
    try:
        train.train(config)
    finally:
        collectives.BEAT, collectives.broadcast = beat, broadcast
        train.publish, export.shutil.copytree = publish, copytree
    return heard


def test_ranks_hear_from_rank_0_while_it_writes_alone(ranks, corpus, tiny_model, tmp_path):
    """Catches ranks that wait in one collective, which times out, for a checkpoint of terabytes to be removed, or for a
    model to be written."""
    deepspeed = deepspeed_json(tmp_path / "ds.json")
    config = config_of(corpus, tmp_path / "run", tiny_model("llama"), deepspeed, max_steps=1)
    for heard in ranks(beats_heard, config):
        assert heard["publish"] >= 4
        assert heard["model"] >= 4
