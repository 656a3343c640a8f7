"""What all ranks must have in common when a run starts."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from pipeline.config.schema import Config


def startup_identity(config: Config) -> dict[str, str]:
    """What all ranks must have in common when a run starts: config, DeepSpeed JSON, this package's code, versions."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    texts = {
        "config": repr(config),
        "deepspeed_config": Path(config.deepspeed_config).read_text(),
        "code": "".join(path.read_text() for path in sources),
    }
    digests = {name: hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for name, text in texts.items()}
    return digests | {name: version(name) for name in ("torch", "deepspeed", "transformers")}
