"""The best guess of every layer's gradient that a forward alone can make: logit gradients brought back to the residual
stream."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.schema import SketchConfig
from pipeline.data.batch import Span
from pipeline.influence.adam import adam_factors
from pipeline.influence.hooks import LayerInputs
from pipeline.influence.scores import unit_moments
from pipeline.influence.sketch import CountSketch, hashed, seed_of
from pipeline.models.heads import final_norm, head_layer
from pipeline.models.layers import is_conv1d
from pipeline.models.second_moments import Means


class ResidualMoments:
    """Per-unit moments of two parts, as one vector a unit:

        head and word embedding: sum over t of  h_t (outer) g_t  +  e_t (outer) onehot(token_t)
        all other linear layers: sum over t of  (their inputs)_t (outer) e_t

    with h_t the head's input, g_t = softmax - onehot the logit gradient, and e_t = gamma * (W_U^T g_t) / sigma_t the
    gradient at the residual stream: through the head W_U (V, D) and the gain gamma and scale sigma_t of the final norm,
    the rest of its Jacobian and all blocks left out. Exact where the model is a head on its embedding.

    Sketched, h_t and e_t are hashed to `layers` numbers, g_t to `gradients`, the inputs, summed, to `inputs`; bringing
    g_t back costs V x layers a token and hashing the head V x D a forward. Hooks live as long as a forward, in which
    ZeRO-3 has the head's weight whole.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, Any],
        sketch: SketchConfig | None,
        seed: int,
        device: torch.device,
        timed: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._timed = timed
        name, self._head = head_layer(model)
        self._words, self._norm = model.get_input_embeddings(), final_norm(model)
        self._body = {layer: module for layer, module in layers.items() if layer != name}
        self.inputs = LayerInputs(self._body, sketch.inputs if sketch else None, seed, device, timed)
        names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
        self._name = {layer: names[id(module.weight)] for layer, module in self._body.items()}
        self._of_head, self._of_words = names[id(self._head.weight)], names[id(self._words.weight)]
        self._tied = self._of_head == self._of_words
        self._h = self._e = self._g = self._x = None
        if sketch:
            vocabulary, width = self._head.out_features, self._head.in_features

            def seeded(what: str, full: int, kept: int) -> CountSketch | None:
                return CountSketch(full, kept, seed_of(seed, what), device) if kept < full else None

            self._h, self._g = seeded("h", width, sketch.layers), seeded("g", vocabulary, sketch.gradients)
            # One weight, one hash; two weights that share the places, two.
            self._e, self._x = self._h, self._g
            if not self._tied:
                self._e, self._x = seeded("e", width, sketch.layers), seeded("x", vocabulary, sketch.gradients)
        self._head_V: Tensor | None = None
        self._head_D: Tensor | None = None
        self._words_V: Tensor | None = None
        self._words_D: Tensor | None = None
        self._tokens = 0

    def precondition(self, means: Means) -> None:
        """Adam's geometry, as far as it separates here: head and embedding by their factors (`influence.adam_factors`);
        e_t, for all layers alike, by the embedding's column factors; the others' inputs by their own column factors
        times mean(v)^(-1/4), which puts layers on one scale."""
        self._head_V, self._head_D = adam_factors(*means[self._of_head])
        self._words_V, self._words_D = adam_factors(*means[self._of_words])
        for layer, module in self._body.items():
            rows, columns = reversed(means[self._name[layer]]) if is_conv1d(module) else means[self._name[layer]]
            _, scale_D = adam_factors(rows, columns)
            mean = rows.mean()
            self.inputs.scales[layer] = scale_D * torch.where(mean > 0, mean, 1.0) ** -0.25

    def __enter__(self) -> "ResidualMoments":
        self.inputs.__enter__()
        self._hooks = [
            # Before the engine's own hooks, which give gathered weights back.
            self._words.register_forward_hook(self._embedded, prepend=True),
            self._norm.register_forward_hook(self._normed, prepend=True),
            self._head.register_forward_hook(self._unembedded, prepend=True),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self.inputs.__exit__(*error)

    def visit(self, gradient_nV: Tensor) -> Tensor:
        """(n, G + K): g_t, and e_t, of the next n tokens of the forward."""
        first, self._tokens = self._tokens, self._tokens + len(gradient_nV)
        scale_n1 = self._inverse_sigma_N1[first : self._tokens]
        residual_nK = (gradient_nV @ self._projection_VK.to(gradient_nV.dtype)) * scale_n1
        return torch.cat([hashed(self._g, gradient_nV, self._head_V), residual_nK], dim=1)

    def take_moments(self, feedback: Tensor, spans: list[Span]) -> Tensor:
        """(U, numbers of both parts)."""
        widths = [feedback.shape[1] - self._projection_VK.shape[1], self._projection_VK.shape[1]]
        feedback_NG, residual_NK = feedback.split(widths, dim=1)
        body = unit_moments(self.inputs.take_keys().to(feedback.dtype), residual_NK, spans)
        ends_UKG = unit_moments(self._head_keys_NK.to(feedback.dtype), feedback_NG, spans)
        keys_NK = residual_NK
        if self._words_V is not None:
            keys_NK = keys_NK * self._words_V[self._ids_N, None].to(keys_NK.dtype)
        columns_N = self._ids_N
        if self._x:
            columns_N, signs_N = self._x.of(columns_N)
            keys_NK = keys_NK * signs_N.to(keys_NK.dtype)[:, None]
        # Exact and untied, the two have nothing to do with each other.
        words_UKG = ends_UKG if self._tied or self._g else torch.zeros_like(ends_UKG)
        for moment_KG, (start, stop) in zip(words_UKG, spans, strict=True):
            moment_KG.index_add_(1, columns_N[start:stop], keys_NK[start:stop].T)
        parts = [ends_UKG, body] if words_UKG is ends_UKG else [ends_UKG, words_UKG, body]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    @torch.no_grad()
    def _embedded(self, _: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
        self._ids_N = args[0].flatten()

    @torch.no_grad()
    def _normed(self, norm: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
        with self._timed():
            input_ND = _at_least_float32(args[0].detach().flatten(0, -2))
            epsilon = getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-6))
            if isinstance(norm, nn.LayerNorm):  # RMSNorm does not centre
                input_ND = input_ND - input_ND.mean(1, keepdim=True)
            self._inverse_sigma_N1 = (input_ND.square().mean(1, keepdim=True) + epsilon).rsqrt()
            self._gain_D = norm.weight.detach().clone()  # the weight itself may lie among all others, or be given back

    @torch.no_grad()
    def _unembedded(self, head: nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> None:
        with self._timed():
            self._head_keys_NK = hashed(self._h, args[0].detach().flatten(0, -2), self._head_D)
            weight_VD = _at_least_float32(head.weight.detach()) * self._gain_D
            self._projection_VK = hashed(self._e, weight_VD, self._words_D)
            self._tokens = 0


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
