"""Layer-aware influence under DeepSpeed: every sample of every training step scored, harmful ones dropped.

The step, on every rank (training/one_pass.py; the others differ in the order):

    watched   = MicroBatch(scorer, batch)                        hooks sketch every linear layer's input
    losses    = watched.forward(ds_engine)                       softmax - onehot, sketched, is the logit gradient
    watched.add(); scored = scorer.scores()                      sketches M_u, one all-reduce M, S_u = <M_u, M>
    units     = UnitTable.gather(scored)                         every rank sees every unit
    decision  = decide(units, policy)                            the same decision everywhere
    ds_engine.backward(weighted_mean(losses, decision.weights))  mean over the kept tokens of all ranks
    ds_engine.step()                                             plain DeepSpeed, unpatched
    recorder.step(outcome)                                       ledger, TensorBoard

In a loop of your own:

    from pipeline import InfluenceConfig, InfluenceEngine, PolicyConfig
    engine = InfluenceEngine(ds_engine, InfluenceConfig(), PolicyConfig())
    outcome = engine.train_step(micro_batches)

Shapes are suffixes of names. B: samples of a rank's micro-batch; T: positions of a sequence; N = B T; n: some of the N;
U: units (sequences, or documents in them); D: width of a layer's input; K: sketched input width; V: vocabulary;
G: sketched gradient width; M: numbers of a gradient sketch; C: columns; S: subsets. Under ZeRO these are logical sizes,
never shards.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.schema_influence import InfluenceConfig, PolicyConfig, SketchConfig
    from pipeline.influence.check_model import check_model
    from pipeline.training.influence_engine import InfluenceEngine

__all__ = ["InfluenceConfig", "InfluenceEngine", "PolicyConfig", "SketchConfig", "check_model"]


def __getattr__(name: str) -> Any:
    """The library's names, imported when asked for: commands that only read files do not wait for DeepSpeed."""
    if name == "InfluenceEngine":
        from pipeline.training.influence_engine import InfluenceEngine

        return InfluenceEngine
    if name == "check_model":
        from pipeline.influence.check_model import check_model

        return check_model
    if name in __all__:
        from pipeline.config import schema_influence

        return getattr(schema_influence, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
