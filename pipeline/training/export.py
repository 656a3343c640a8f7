"""The end of a run: the model as a Hugging Face directory, and the summary."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config.schema import Config
from pipeline.engine import collectives, deepspeed_engine
from pipeline.engine.checkpoints import Progress, best_checkpoint
from pipeline.record import ledger, subset_rates
from pipeline.record.comparison import comparison
from pipeline.record.model_card import model_card
from pipeline.record.recorder import Recorder
from pipeline.training.influence_engine import InfluenceEngine
from pipeline.training.opening import policy_in_words


def finish(
    ds_engine: deepspeed_engine.DeepSpeedEngine,
    config: Config,
    engine: InfluenceEngine,
    progress: Progress,
    recorder: Recorder | None,
) -> dict[str, Any] | None:
    """Write RUN_DIR/model, from any ZeRO stage, and RUN_DIR/summary.json; the summary, on rank 0. Collective."""
    weights = deepspeed_engine.full_state_dict(ds_engine)
    return collectives.on_rank_0(lambda: _write(ds_engine, config, engine, progress, recorder, weights))


def _write(
    ds_engine: deepspeed_engine.DeepSpeedEngine,
    config: Config,
    engine: InfluenceEngine,
    progress: Progress,
    recorder: Recorder | None,
    weights: dict[str, Tensor],
) -> dict[str, Any]:
    assert recorder is not None
    run_dir, rows = Path(config.run_dir), ledger.read(Path(config.run_dir))
    card = model_card(config, rows, engine.step, progress.evaluations, policy_in_words(config))
    save_model(ds_engine.module, config, run_dir / "model", card, weights)
    if config.model.peft:
        print(
            f"{run_dir / 'model'} holds the adapter alone. It goes with {config.model.name_or_path}: "
            "peft.PeftModel.from_pretrained(base, DIR) puts them together, merge_and_unload() makes one model of both, "
            "and here --model.peft DIR goes on from it",
            flush=True,
        )
    units = ledger.counts_by_subset(rows, config.influence.unit)
    summary = {
        "run_dir": config.run_dir,
        "steps": engine.step,
        "sequences": engine.position,
        "evaluation_before": progress.evaluations.get(0),
        "evaluation_after": progress.evaluations.get(engine.step),
        "evaluations": progress.evaluations,
        "compared_with": comparison(config),
        "units_by_subset": units,
        "standing_out": subset_rates.standing_out(units, independent=config.influence.unit != "token"),
        "scoring_fraction": recorder.close(),
        "best_checkpoint": (best := best_checkpoint(run_dir)) and str(best),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


def save_model(
    model: Any, config: Config, directory: Path, card: str, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a Hugging Face directory: the model, with `weights` in place of its own where they are given, the run's
    tokenizer, and `card`."""
    tokenizer = Path(config.data.prepared_dir, "tokenizer")
    agree_with_tokenizer(model, AutoTokenizer.from_pretrained(tokenizer))
    model.save_pretrained(directory, state_dict=weights)
    shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    (directory / "README.md").write_text(card, encoding="utf-8")


def agree_with_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model's config and generation config the bos, eos and pad of the tokenizer that it was trained with:
    text would else begin or end at another's. Several ends of text stay where the tokenizer's is one of them."""
    configs = [model.config, model.config.get_text_config(decoder=True), getattr(model, "generation_config", None)]
    for settings in (settings for settings in configs if settings is not None):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token, old = getattr(tokenizer, name), getattr(settings, name, None)
            if token is not None and token != old and not (isinstance(old, list) and token in old):
                setattr(settings, name, token)
