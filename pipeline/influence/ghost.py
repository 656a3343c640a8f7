"""Moments of true gradients, layer by layer, out of the training's own backward. Hooks live as long as a forward."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.data.batch import IGNORE, Span
from pipeline.influence.adam import adam_factors, saturation
from pipeline.influence.sketch import CountSketch, hashed, seed_of
from pipeline.models.layers import is_conv1d, layer_shape
from pipeline.models.second_moments import SecondMoments


@dataclass
class Weight:
    """A weight matrix in the orientation (D inputs, O outputs), and how its gradients are kept."""

    transposed: bool
    """Stored as (O, D), as all but GPT-2's Conv1D are."""
    dim: int
    """D."""
    shape: tuple[int, int]
    """Of a unit's gradient as it is kept."""
    place: slice | Tensor
    """Where it goes in the unit's moment,"""
    signs_KG: Tensor | None = None
    """and with which signs, where several weights share the places."""
    inputs: CountSketch | None = None
    outputs: CountSketch | None = None
    input_scale_D: Tensor | None = None
    output_scale_O: Tensor | None = None

    def keys(self, input_ND: Tensor) -> Tensor:
        """Layer inputs in the geometry of the optimizer, sketched."""
        return hashed(self.inputs, input_ND, self.input_scale_D)

    def feedback(self, gradient_NO: Tensor) -> Tensor:
        """Output gradients likewise."""
        return hashed(self.outputs, gradient_NO, self.output_scale_O)


class LayerGradients:
    """Per-unit moments of the gradients of all linear layers and the word embedding (Eq. 3 of arXiv 2510.16007):

        M_u = over all weights, sum over t in u of a_t (outer) b_t ,  b_t = d (sum of token losses) / d output_t ,

    as one vector a unit. Exact (`widths` None), each weight has its own places, and <M_u, M_z> is the inner product of
    two gradients. Sketched, a_t and b_t are hashed to `widths[0]` numbers, the vocabulary's side to `widths[1]`, and
    all weights' products to widths[0] * widths[1] places in all, with random signs: unbiased, and no larger for a
    deeper model.

    A weight that is both head and word embedding is one weight: both parts are added before any product. Position
    embeddings (one gradient for all sequences), biases and norms are left out. Inputs are sketched in the forward and
    their products with the output gradients made when the backward passes by, so what is kept from one to the other is
    a sketch of each input. Recomputation under activation checkpointing is not seen: hooks are on the first forward's
    tensors.

    Gradients arrive multiplied with whatever is in the loss (weights, world size, accumulation, loss scale). That
    factor is read off the gradient at the losses, `watch`, so that nothing here knows its parts; all tokens of a rank
    must share it, or have 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, Any],
        head: str,
        widths: tuple[int, int] | None,
        seed: int,
        device: torch.device,
        timed: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._timed, self._head = timed, head
        self._layers = layers
        self._newest = 0.0
        words = model.get_input_embeddings()
        self._embeddings = {name: module for name, module in model.named_modules() if module is words}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        modules = {**self._embeddings, **layers}
        # Tied modules have the same name here.
        self._name = {module: names[id(found.weight)] for module, found in modules.items()}
        self._weights: dict[str, Weight] = {}
        self.size = 0 if widths is None else widths[0] * widths[1]
        for module, found in modules.items():
            name, transposed = self._name[module], not is_conv1d(found)
            inputs, outputs = layer_shape(found)
            if name in self._weights:
                continue
            if widths is None:
                place = slice(self.size, self.size + inputs * outputs)
                self._weights[name] = Weight(transposed, inputs, (inputs, outputs), place)
                self.size = place.stop
                continue
            wide = module in self._embeddings or module == head
            shape = (min(inputs, widths[0]), min(outputs, widths[1] if wide else min(widths)))
            generator = torch.Generator().manual_seed(seed_of(seed, f"{name}/place"))
            index = torch.randperm(self.size, generator=generator)[: shape[0] * shape[1]].clone()  # not the rest
            signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
            self._weights[name] = Weight(transposed, inputs, shape, index.to(device), signs.to(device))
            if shape[0] < inputs:
                self._weights[name].inputs = CountSketch(inputs, shape[0], seed_of(seed, f"{name}/inputs"), device)
            if shape[1] < outputs:
                self._weights[name].outputs = CountSketch(outputs, shape[1], seed_of(seed, f"{name}/outputs"), device)

    def precondition(self, moments: SecondMoments) -> None:
        """Score in Adam's geometry from now on: see `influence.adam_factors`, and `own_saturation`."""
        self._newest = moments.newest
        for name, weight in self._weights.items():
            rows, columns = moments.means[name] if weight.transposed else reversed(moments.means[name])
            weight.output_scale_O, weight.input_scale_D = adam_factors(rows, columns)

    def logit_scale(self) -> Tensor | None:
        """What multiplies the head's output gradients, (V,), None before the first `precondition`."""
        return self._weights[self._name[self._head]].output_scale_O

    def logit_sketch(self) -> CountSketch | None:
        """What hashes the head's output gradients."""
        return self._weights[self._name[self._head]].outputs

    def __enter__(self) -> "LayerGradients":
        self._arrived: list[tuple[str, Tensor]] = []
        self._head_keys: Tensor | None = None
        self._factor: Tensor | None = None
        self._hooks = [
            # Before the engine's own hooks, which hand on tensors of their own.
            module.register_forward_hook(partial(self._passed, name), prepend=True)
            for name, module in {**self._embeddings, **self._layers}.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def watch(self, losses_BT: Tensor, spans: list[Span]) -> None:
        """Before the backward: the losses that it starts from, and the positions of the units whose moments to keep."""
        self._spans = spans
        self._moments: Tensor | None = None
        if losses_BT.requires_grad:
            losses_BT.register_hook(self._read_factor)

    def take_moments(self, feedback_NG: Tensor) -> Tensor:
        """(U, size) after the backward, with `feedback_NG` the scaled and sketched logit gradients, which need none."""
        moments, self._moments = self._moments, None
        assert moments is not None, "no backward came by since `watch`"
        assert self._head_keys is not None
        self._add(moments, self._name[self._head], self._head_keys, feedback_NG)
        self._head_keys = None
        return moments

    def own_saturation(self, labels_BT: Tensor, losses_BT: Tensor, tokens: float) -> Tensor:
        """What `influence.saturation` leaves out of each unit's own term, (U,); 0 before the first `precondition`. To
        be asked between the backward and `take_moments`.

        Of the rows of the words that a unit reads or is to predict, in the word embedding and in the head (of their sum
        where it is one weight). The head's row is taken to have its gradient at the word's own labels alone, where the
        logit gradient is exp(-loss) - 1. `tokens`: all labelled tokens of the optimizer step.
        """
        saturation_U = losses_BT.new_zeros(len(self._spans))
        if not self._newest:
            return saturation_U
        assert self._head_keys is not None
        lengths = [stop - start for start, stop in self._spans]
        units_N = torch.cat([labels_BT.new_full((length,), unit) for unit, length in enumerate(lengths)])
        labelled_N = labels_BT.flatten() != IGNORE
        labels_N = labels_BT.flatten().where(labelled_N, 0)
        feedback_N = torch.expm1(-losses_BT.flatten()).where(labelled_N, 0.0)
        parts: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        parts[self._name[self._head]].append((labels_N, self._head_keys * feedback_N[:, None]))
        for module in self._embeddings:
            parts[self._name[module]].append(self._embedded_keys)
        for name, pairs in parts.items():
            scale_V = self._weights[name].output_scale_O
            assert scale_V is not None
            words_M, keys_MK = (torch.cat(several) for several in zip(*pairs, strict=True))
            units_M = units_N.repeat(len(pairs))
            # Any one of a word's positions in a unit stands for its row.
            places_M, stands = units_M * len(scale_V) + words_M, words_M.new_zeros(len(self._spans) * len(scale_V))
            stands[places_M] = torch.arange(len(places_M), device=places_M.device)
            rows_MK = torch.zeros_like(keys_MK).index_add_(0, stands[places_M], keys_MK)
            squares_M = rows_MK.square().sum(1) * scale_V[words_M] ** 2
            taken_M = saturation(squares_M, scale_V[words_M], self._weights[name].dim, tokens, self._newest)
            saturation_U.index_add_(0, units_M, taken_M.to(saturation_U.dtype))
        return saturation_U

    @torch.no_grad()
    def _passed(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        with self._timed():
            weight = self._weights[self._name[name]]
            if name in self._embeddings:
                kept, self.embedded = args[0].flatten(), output
            else:
                kept = weight.keys(args[0].detach().flatten(0, -2))
                if name == self._head:
                    self._head_keys = kept
                    return
        if output.requires_grad:
            output.register_hook(partial(self._came_back, name, kept))

    @torch.no_grad()
    def _read_factor(self, gradient_BT: Tensor) -> None:
        factor = gradient_BT.abs().max()
        self._factor = torch.where(factor > 0, factor, torch.ones_like(factor))
        self._moments = gradient_BT.new_zeros(len(self._spans), self.size)

    @torch.no_grad()
    def _came_back(self, name: str, kept: Tensor, gradient: Tensor) -> None:
        moments, factor = self._moments, self._factor
        if moments is None or factor is None:  # a backward that nobody watches
            return
        with self._timed():
            weight = self._weights[self._name[name]]
            gradient_NO = gradient.flatten(0, -2)
            if name not in self._embeddings:
                self._add(moments, self._name[name], kept, weight.feedback(gradient_NO) / factor)
                return
            keys_NK = hashed(weight.inputs, gradient_NO, weight.input_scale_D) / factor
            self._embedded_keys = kept, keys_NK
            columns_N, signs_N = weight.outputs.of(kept) if weight.outputs else (kept, None)
            scale_N = weight.output_scale_O[kept] if weight.output_scale_O is not None else None
            for scale in (signs_N, scale_N):
                if scale is not None:
                    keys_NK = keys_NK * scale.to(keys_NK.dtype)[:, None]
            for moment, (start, stop) in zip(moments, self._spans, strict=True):
                part_KG = keys_NK.new_zeros(weight.shape)
                part_KG.index_add_(1, columns_N[start:stop], keys_NK[start:stop].T)
                self._put(moment, weight, part_KG)

    def _add(self, moments: Tensor, name: str, keys_NK: Tensor, feedback_NG: Tensor) -> None:
        weight = self._weights[name]
        for moment, (start, stop) in zip(moments, self._spans, strict=True):
            self._put(moment, weight, keys_NK[start:stop].T @ feedback_NG[start:stop].to(keys_NK.dtype))

    @staticmethod
    def _put(moment: Tensor, weight: Weight, part_KG: Tensor) -> None:
        if isinstance(weight.place, slice):
            moment[weight.place] += part_KG.flatten()
        else:
            assert weight.signs_KG is not None
            moment.index_add_(0, weight.place, (part_KG * weight.signs_KG).flatten().to(moment.dtype))
