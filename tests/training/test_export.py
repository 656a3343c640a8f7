from transformers import PreTrainedTokenizerFast

from pipeline.training.export import agree_with_tokenizer
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
