"""`lai` and `lli`: layer inputs with the logit gradient (Eq. 4 of arXiv 2510.16007); a forward, no backward."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import Batch
from pipeline.influence.adam import adam_factors
from pipeline.influence.estimator import SampleGradients
from pipeline.influence.layer_inputs import LayerInputs
from pipeline.influence.scores import text_sketches, unit_sketches
from pipeline.influence.sketch import CountSketch, gradient_visitor, seed_of
from pipeline.models.layer import AnswerHead, Layer
from pipeline.models.layers import head_of, layers_of
from pipeline.models.second_moments import SecondMoments
from pipeline.tasks.causal_lm import Visitor


class Lai:
    """Sketches M_u = sum over t in u of h_t (outer) g_t: h_t the inputs of all linear layers, g_t = softmax - onehot
    the logit gradient, which stands in for every layer's own output gradient (scores.py). A layer whose weight is
    frozen takes no part; the logit gradient does also where the head is. Of a classifier, whose one logit gradient
    serves all positions of a text: `scores.text_sketches`.

    `adam_state`: inputs are scaled by the column factors of their own layer, g_t by the head's row factors
    (`adam.adam_factors`).
    """

    accepts: ClassVar[frozenset[str]] = frozenset(
        {
            "sequence_classification",
            "adam_ema",
            "adam_state",
            "running",
            "validation",
            "document",
            "score_first",
            "threshold",
            "top",
        }
    )
    because: ClassVar[Mapping[str, str]] = {}
    after_backward: ClassVar[bool] = False

    def __init__(
        self, config: InfluenceConfig, model: PreTrainedModel, seed: int, device: torch.device, timed: Stopwatch
    ) -> None:
        self.head, layers, widths = head_of(model), self._layers(model), config.widths
        self.answers = isinstance(self.head, AnswerHead)
        width = widths.input_width if widths else None
        self.inputs = LayerInputs(
            layers, width, seed, device, lambda: timed("layer inputs"), self.answers, config.positions
        )
        self.logits: CountSketch | None = None
        if widths and widths.logit_width < self.head.outputs:
            self.logits = CountSketch(self.head.outputs, widths.logit_width, seed_of(seed, "logits"), device)
        self.logit_scale_V: Tensor | None = None

    @staticmethod
    def _layers(model: PreTrainedModel) -> Mapping[str, Layer]:
        layers = layers_of(model).linear
        if not layers:
            raise ValueError(
                "estimator 'lai' scores by the inputs of trained linear layers, and there are none; choose ghost, or "
                "train one (model.trainable)"
            )
        return layers

    def watch(self, batch: Batch, norms: bool = False) -> "LaiWatch":
        return LaiWatch(self, batch, norms)

    def precondition(self, second: SecondMoments) -> None:
        for name, layer in self.inputs.layers.items():
            output_scale, self.inputs.scales[name] = adam_factors(*layer.means(second.means))
            if name == self.head.name:
                self.logit_scale_V = output_scale

    def learn(self, statistics_C: Tensor) -> None:
        raise AssertionError("gathers no statistics")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Lli(Lai):
    """The same with the LM head's input only."""

    @staticmethod
    def _layers(model: PreTrainedModel) -> Mapping[str, Layer]:
        head = head_of(model)
        if not head.trained:
            raise ValueError(
                f"estimator 'lli' scores by the LM head's input, and {head.weight} is frozen; choose lai or ghost, or "
                "train it (model.trainable)"
            )
        return {head.name: head}


class LaiWatch:
    """One micro-batch."""

    def __init__(self, how: Lai, batch: Batch, norms: bool) -> None:
        self._how, self._batch, self._inputs = how, batch, how.inputs.watch(norms, batch)

    def __enter__(self) -> Self:
        self._inputs.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._inputs.__exit__(*error)

    @property
    def norms(self) -> Mapping[str, Tensor]:
        return self._inputs.norms

    @property
    def visit(self) -> Visitor:
        return gradient_visitor(self._how.logits, self._how.logit_scale_V)

    def before_losses(self, logits_BTV: Tensor) -> None: ...

    def before_backward(self, losses_BT: Tensor, step_tokens: float | None) -> None: ...

    def backward_to_inputs(self, losses_BT: Tensor) -> None: ...

    def take(self, logit_sketch_NG: Tensor) -> SampleGradients:
        inputs_NK = self._inputs.take(len(logit_sketch_NG))
        if self._how.answers:
            sketches = text_sketches(inputs_NK, logit_sketch_NG, self._batch.attended_BT)
        else:
            sketches = unit_sketches(inputs_NK, logit_sketch_NG, self._batch.spans)
        return SampleGradients(sketches.flatten(1), sketches.new_zeros(len(sketches), dtype=torch.float64))
