"""The frozen model that `rho` compares with."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from pipeline.config.answers import Answers
from pipeline.config.schema import Config, ModelConfig
from pipeline.models.load import load_model


def load_reference_model(
    config: Config, deepspeed_config: dict[str, Any], answers: Answers | None = None
) -> PreTrainedModel:
    """`influence.reference_model`, loaded as the model itself is. Raises ValueError where there is none, or where its
    tokenizer is not the one that the data were prepared with."""
    name = config.influence.reference_model
    assert name is not None
    refuse_other_tokenizer(name, Path(config.data.prepared_dir, "tokenizer"))
    try:
        return load_model(ModelConfig(name_or_path=name), config.seed, deepspeed_config, answers)
    except ValueError as error:
        raise ValueError(str(error).replace("model.name_or_path", "influence.reference_model")) from error


def refuse_other_tokenizer(name: str, prepared: Path) -> None:
    """Raises ValueError where the tokenizer of model `name` gives tokens other ids than the one in `prepared`."""
    own = AutoTokenizer.from_pretrained(prepared).get_vocab()
    try:
        other = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"influence.reference_model: no tokenizer could be loaded from '{name}' ({error}), so whether it is that "
            "of the data cannot be told; save it there (pipeline.train writes it into RUN_DIR/model)"
        ) from error
    differing = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    if differing:
        raise ValueError(
            f"influence.reference_model: '{name}' has another tokenizer than the data were prepared with: "
            f"{len(differing)} of {len(own)} tokens differ ({', '.join(map(repr, differing[:3]))}). Token by token "
            "losses would not compare; train one with this tokenizer"
        )
