"""The end of a run: the model as a Hugging Face directory, and the summary."""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline import engine, ledger, removal
from pipeline.checkpoint import Progress
from pipeline.config import Config
from pipeline.observe import Recorder


def finish(
    ds_engine: engine.DeepSpeedEngine, config: Config, progress: Progress, recorder: Recorder | None
) -> dict[str, Any] | None:
    """Write RUN_DIR/model, from any ZeRO stage, and RUN_DIR/summary.json; the summary, on rank 0. Collective."""
    weights = engine.full_state_dict(ds_engine)
    if recorder is None:
        return None
    run_dir = Path(config.run_dir)
    ds_engine.module.save_pretrained(run_dir / "model", state_dict=weights)
    shutil.copytree(Path(config.data.prepared_dir, "tokenizer"), run_dir / "model", dirs_exist_ok=True)
    units = ledger.counts_by_subset(ledger.read(run_dir))
    summary = {
        "run_dir": config.run_dir,
        "steps": progress.step,
        "sequences": progress.position,
        "evaluation_before": progress.evaluations.get(0),
        "evaluation_after": progress.evaluations.get(progress.step),
        "evaluations": progress.evaluations,
        "units_by_subset": units,
        "standing_out": removal.standing_out(units),
        "scoring_fraction": recorder.close(),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary
