"""What the command line of a run is checked against, before there is any process group."""

from typing import Any

from pipeline.config.schema import Config
from pipeline.engine.json_check import check_deepspeed_json
from pipeline.influence.table import check_config
from pipeline.models.load import check_attention


def check_run(config: Config, settings: dict[str, Any]) -> None:
    """Raises ValueError where the DeepSpeed JSON cannot be used, or does not go with the config, or where the model
    cannot have the attention that is asked for."""
    check_config(config, settings)
    check_attention(config.model)
    check_deepspeed_json(config, settings)
