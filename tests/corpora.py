"""Small made-up corpora for tests, and configs that prepare them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.schema import Config, ModelConfig
from pipeline.config.schema_data import DataConfig

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "optimizer": {"type": "AdamW", "params": {}}
}  # fmt: skip
WORDS = ["the", "quick", "brown", "fox", "Ärzte zählen", "12345", "Schäfchen", "🐑", "f(x):\n\t", "return", "x"]


def make_config(directory: Path, tokenizer: str, train_files: str | list[str], seed: int = 0, **data: Any) -> Config:
    vocabulary = 50_257 if tokenizer.endswith("gpt2") else 300
    model_json = {"model_type": "gpt2", "vocab_size": vocabulary, "n_positions": 64, "n_embd": 8, "n_head": 1}
    model_json |= {"bos_token_id": None, "eos_token_id": None}
    (directory / "model.json").write_text(json.dumps(model_json))
    (directory / "ds.json").write_text(json.dumps(DEEPSPEED))
    data = {"sequence_length": 32, "prepared_dir": str(directory / "prepared"), "train_files": train_files} | data
    model = ModelConfig(str(directory / "model.json"), tokenizer)
    return Config(str(directory / "run"), str(directory / "ds.json"), model, DataConfig(**data), seed=seed)


def text_of(index: int) -> str:
    return " ".join(np.random.default_rng(index).choice(WORDS, 1 + index % 40))


def write(path: Path, documents: int, bad: int = 0, first: int = 0) -> str:
    lines = [
        json.dumps({"text": text_of(index), "meta": {"pile_set_name": f"s{index % 3}"}})
        for index in range(first, first + documents)
    ]
    path.write_text("\n".join(lines + ["{"] * bad) + "\n")
    return str(path)


def remade(config: Config, tokenizer: str | None = None, seed: int = 0, **data: Any) -> Config:
    settings = {key: getattr(config.data, key) for key in DataConfig.__dataclass_fields__}
    model = ModelConfig(config.model.name_or_path, tokenizer or config.model.tokenizer)
    return Config(config.run_dir, config.deepspeed_config, model, DataConfig(**(settings | data)), seed=seed)
