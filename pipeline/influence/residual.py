"""`residual`: the best guess of every layer's gradient that a forward alone can make, logit gradients brought back to
the residual stream."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import Batch
from pipeline.influence.adam import adam_factors
from pipeline.influence.estimator import SampleGradients
from pipeline.influence.hooks import hooks
from pipeline.influence.layer_inputs import LayerInputs
from pipeline.influence.scores import unit_sketches
from pipeline.influence.sketch import CountSketch, hashed, seed_of
from pipeline.models.heads import LogitPath, NormRule, final_norm, logit_path, norm_rule
from pipeline.models.layers import layers_of
from pipeline.models.second_moments import SecondMoments


class Residual:
    """Sketches of two parts, as one vector a unit:

        head and word embedding: sum over t of  h_t (outer) g_t  +  e_t (outer) onehot(token_t)  (of those trained)
        all other linear layers: sum over t of  (their inputs)_t (outer) e_t

    with h_t the head's input, g_t = softmax - onehot the logit gradient, and e_t = gamma * (W_U^T g_t) / sigma_t the
    gradient at the residual stream: through the head W_U (V, D) and the gain gamma and scale sigma_t of the final norm,
    the rest of its Jacobian and all blocks left out. Exact where the model is a head on its embedding. Ours.

    Sketched, h_t and e_t are hashed to `hidden_width` numbers, g_t to `logit_width`, the inputs, summed, to
    `input_width`; bringing g_t back costs V x hidden_width a token and hashing the head V x D a forward.

    `adam_state` is Adam's geometry as far as it separates here: head and embedding by their factors
    (`adam.adam_factors`); e_t, for all layers alike, by the embedding's column factors, if it is trained; the others'
    inputs by their own column factors times mean(v)^(-1/4), which puts layers on one scale.
    """

    accepts: ClassVar[frozenset[str]] = frozenset(
        {"adam_state", "running", "validation", "document", "score_first", "threshold", "top"}
    )
    because: ClassVar[Mapping[str, str]] = {}
    after_backward: ClassVar[bool] = False

    def __init__(
        self, config: InfluenceConfig, model: PreTrainedModel, seed: int, device: torch.device, timed: Stopwatch
    ) -> None:
        found, widths = layers_of(model), config.widths
        self.timed = timed
        self.head, self.words, self.norm = found.head, found.words, final_norm(model)
        self.cap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.path: LogitPath | None = None
        """From the head's output to the logits: known after the first forward, as is"""
        self.rule: NormRule | None = None
        """what the final norm does."""
        self.tied = self.head.weight == self.words.weight
        self.inputs = LayerInputs(
            found.body, widths.input_width if widths else None, seed, device, lambda: timed("layer inputs")
        )
        self.sketch_h: CountSketch | None = None
        self.sketch_e: CountSketch | None = None
        self.sketch_g: CountSketch | None = None
        self.sketch_x: CountSketch | None = None
        if widths:
            vocabulary, width = self.head.outputs, self.head.inputs

            def seeded(what: str, full: int, kept: int) -> CountSketch | None:
                return CountSketch(full, kept, seed_of(seed, what), device) if kept < full else None

            self.sketch_h = seeded("h", width, widths.hidden_width)
            self.sketch_g = seeded("g", vocabulary, widths.logit_width)
            # One weight, one hash; two weights that share the places, two.
            self.sketch_e, self.sketch_x = self.sketch_h, self.sketch_g
            if not self.tied:
                self.sketch_e = seeded("e", width, widths.hidden_width)
                self.sketch_x = seeded("x", vocabulary, widths.logit_width)
        self.head_scale_V: Tensor | None = None
        self.head_scale_D: Tensor | None = None
        self.words_scale_V: Tensor | None = None
        self.words_scale_D: Tensor | None = None

    def watch(self, batch: Batch, norms: bool = False) -> "ResidualWatch":
        return ResidualWatch(self, batch, norms)

    def precondition(self, second: SecondMoments) -> None:
        if self.head.trained:
            self.head_scale_V, self.head_scale_D = adam_factors(*self.head.means(second.means))
        if self.words.trained:
            self.words_scale_V, self.words_scale_D = adam_factors(*self.words.means(second.means))
        for name, layer in self.inputs.layers.items():
            outputs_O, inputs_D = layer.means(second.means)
            _, scale_D = adam_factors(outputs_O, inputs_D)
            mean = outputs_O.mean()
            self.inputs.scales[name] = scale_D * torch.where(mean > 0, mean, 1.0) ** -0.25

    def learn(self, statistics_C: Tensor) -> None:
        raise AssertionError("gathers no statistics")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ResidualWatch:
    """One micro-batch. In its forward ZeRO-3 has the head's weight whole."""

    def __init__(self, how: Residual, batch: Batch, norms: bool) -> None:
        self._how, self._batch, self._inputs = how, batch, how.inputs.watch(norms)
        self._tokens = 0
        self._gain_D: Tensor | float | None = None

    def __enter__(self) -> Self:
        self._inputs.__enter__()
        how = self._how
        modules = ((how.words.module, self._embedded), (how.norm, self._normed), (how.head.module, self._unembedded))
        self._hooks = hooks(after=modules)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._inputs.__exit__(*error)

    @property
    def norms(self) -> Mapping[str, Tensor]:
        return self._inputs.norms

    def visit(self, gradient_nV: Tensor, labelled_n: Tensor) -> Tensor:
        """(n, G + K): g_t, and e_t, of the next n tokens of the forward."""
        first, self._tokens = self._tokens, self._tokens + len(gradient_nV)
        gradient_nV = self._path.to_output(gradient_nV, self._logits_NV[first : self._tokens])
        scale_n1 = self._inverse_sigma_N1[first : self._tokens]
        residual_nK = (gradient_nV @ self._projection_VK.to(gradient_nV.dtype)) * scale_n1
        return torch.cat([hashed(self._how.sketch_g, gradient_nV, self._how.head_scale_V), residual_nK], dim=1)

    def before_losses(self, logits_BTV: Tensor) -> None:
        self._logits_NV = logits_BTV.detach().flatten(0, -2)
        if self._how.path is None:
            self._how.path = logit_path(self._head_output.flatten(0, -2), self._logits_NV, self._how.cap)
        self._path = self._how.path or LogitPath()
        del self._head_output

    def before_backward(self, losses_BT: Tensor, step_tokens: float | None) -> None: ...

    def backward_to_inputs(self, losses_BT: Tensor) -> None: ...

    def take(self, logit_sketch_NG: Tensor) -> SampleGradients:
        how, spans, feedback = self._how, self._batch.spans, logit_sketch_NG
        widths = [feedback.shape[1] - self._projection_VK.shape[1], self._projection_VK.shape[1]]
        feedback_NG, residual_NK = feedback.split(widths, dim=1)
        ends_UKG = unit_sketches(self._head_inputs_NK.to(feedback.dtype), feedback_NG, spans)
        if not how.head.trained:
            ends_UKG = torch.zeros_like(ends_UKG)
        rows_NK = how.words.row_gradients(self._ids_N, residual_NK)
        if how.words_scale_V is not None:
            rows_NK = rows_NK * how.words_scale_V[self._ids_N, None].to(rows_NK.dtype)
        columns_N = self._ids_N
        if how.sketch_x:
            columns_N, signs_N = how.sketch_x.of(columns_N)
            rows_NK = rows_NK * signs_N.to(rows_NK.dtype)[:, None]
        # Exact and untied, the two have nothing to do with each other.
        words_UKG = ends_UKG if how.tied or how.sketch_g else torch.zeros_like(ends_UKG)
        for sketch_KG, (start, stop) in zip(words_UKG, spans, strict=True) if how.words.trained else ():
            sketch_KG.index_add_(1, columns_N[start:stop], rows_NK[start:stop].T)
        parts = [ends_UKG] if words_UKG is ends_UKG else [ends_UKG, words_UKG]
        if how.inputs.layers:
            inputs_NK = self._inputs.take(len(feedback)).to(feedback.dtype)
            parts.append(unit_sketches(inputs_NK, residual_NK, spans))
        sketch_UM = torch.cat([part.flatten(1) for part in parts], dim=1)
        return SampleGradients(sketch_UM, sketch_UM.new_zeros(len(sketch_UM), dtype=torch.float64))

    @torch.no_grad()
    def _embedded(self, args: tuple[Any, ...], _: Tensor) -> None:
        self._ids_N = self._how.words.input_rows(args)

    @torch.no_grad()
    def _normed(self, args: tuple[Any, ...], output: Tensor) -> None:
        norm: Any = self._how.norm
        with self._how.timed("layer inputs"):
            input_ND = _at_least_float32(args[0].detach().flatten(0, -2))
            how = self._how
            if output.shape[-1] != how.head.inputs:
                raise ValueError(
                    f"the LM head reads {how.head.inputs} numbers and the norm before it makes {output.shape[-1]}: "
                    "estimator 'residual' knows no way between them; choose another estimator"
                )
            if how.rule is None:
                how.rule = norm_rule(norm, input_ND, output.detach().flatten(0, -2))
            rule = how.rule or NormRule(isinstance(norm, nn.LayerNorm), 1e-6, "none")  # nothing is finite
            self._inverse_sigma_N1 = rule.inverse_sigma(input_ND)
            self._gain_D = rule.gain_of(norm)

    @torch.no_grad()
    def _unembedded(self, args: tuple[Any, ...], output: Tensor) -> None:
        self._head_output = output.detach()
        if self._gain_D is None:
            raise ValueError(
                f"{type(self._how.norm).__name__}, taken for the norm before the LM head, does not run before it, so "
                "estimator 'residual' knows no way back from the head; choose another estimator"
            )
        how, head = self._how, self._how.head
        with how.timed("layer inputs"):
            self._head_inputs_NK = hashed(how.sketch_h, head.input_rows(args), how.head_scale_D)
            weight: Any = head.module.weight
            weight_VD = _at_least_float32(weight.detach()) * self._gain_D
            self._projection_VK = hashed(how.sketch_e, weight_VD, how.words_scale_D)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
