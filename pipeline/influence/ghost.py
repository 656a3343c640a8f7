"""`ghost`: true gradients of every unit, layer by layer, out of the training's own backward (Eq. 3 of arXiv
2510.16007)."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers import PreTrainedModel

from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch, Span
from pipeline.influence.adam import adam_factors, saturation
from pipeline.influence.estimator import SampleGradients
from pipeline.influence.hooks import hooks
from pipeline.influence.scores import unit_sketches
from pipeline.influence.sketch import CountSketch, gradient_visitor, hashed, seed_of
from pipeline.models.experts import Experts, Router
from pipeline.models.heads import LogitPath, logit_path
from pipeline.models.layer import AnswerHead, Layer
from pipeline.models.layers import layers_of
from pipeline.models.second_moments import SecondMoments
from pipeline.tasks.causal_lm import Visitor


@dataclass
class Weight:
    """How the gradient of a weight matrix, (inputs, outputs), is kept."""

    layer: Layer
    """One of those that share the weight."""
    shape: tuple[int, int]
    """Of a unit's gradient as it is kept."""
    place: slice | Tensor
    """Where it goes in the unit's sketch,"""
    signs_KG: Tensor | None = None
    """and with which signs, where several weights share the places."""
    inputs: CountSketch | None = None
    outputs: CountSketch | None = None
    input_scale_D: Tensor | None = None
    output_scale_O: Tensor | None = None

    def sketch_inputs(self, input_ND: Tensor) -> Tensor:
        """In the geometry of the optimizer, sketched."""
        return hashed(self.inputs, input_ND, self.input_scale_D)

    def sketch_outputs(self, gradient_NO: Tensor) -> Tensor:
        """Output gradients likewise."""
        return hashed(self.outputs, gradient_NO, self.output_scale_O)

    def put(self, sketches_UM: Tensor, parts_UKG: Tensor) -> None:
        """Add gradients of this weight to the units' sketches."""
        if isinstance(self.place, slice):
            sketches_UM[:, self.place] += parts_UKG.flatten(1)
        else:
            assert self.signs_KG is not None
            signed_UP = (parts_UKG * self.signs_KG).flatten(1).to(sketches_UM.dtype)
            sketches_UM.scatter_add_(1, self.place.expand_as(signed_UP), signed_UP)


class Ghost:
    """Sketches the gradients of all linear layers and the word embedding:

        M_u = over all weights, sum over t in u of a_t (outer) b_t ,  b_t = d (sum of token losses) / d output_t ,

    as one vector a unit. Exact (no sketch), each weight has its own places, and <M_u, M_z> is the inner product of two
    gradients. Sketched, a_t and b_t are hashed to `hidden_width` numbers, the vocabulary's side to `logit_width`, and
    all weights' products to hidden_width x logit_width places in all, with random signs: unbiased, and no larger for a
    deeper model.

    A weight that is both head and word embedding is one weight: both parts are added before any product. Position
    embeddings (one gradient for all sequences), biases, norms and all that is frozen are left out
    (`models.layers.layers_of`).

    `adam_state`: every layer's input and output gradient are scaled by `adam.adam_factors`, and a unit's
    self-influence saturates as Adam's coming step does (`adam.saturation`).
    """

    accepts: ClassVar[frozenset[str]] = frozenset(
        {"sequence_classification", "adam_state", "running", "validation", "threshold", "top"}
    )
    because: ClassVar[Mapping[str, str]] = {
        "document": "the gradient at a position is that of all later losses of its sequence, of other documents too",
        "score_first": "it scores by the training backward itself",
    }
    after_backward: ClassVar[bool] = True

    def __init__(
        self, config: InfluenceConfig, model: PreTrainedModel, seed: int, device: torch.device, timed: Stopwatch
    ) -> None:
        found, chosen = layers_of(model), config.widths
        self.timed = timed
        self.saturates = config.include_self
        self.answers = isinstance(found.head, AnswerHead)
        self.cap: float | None = None if self.answers else getattr(model.config, "final_logit_softcapping", None)
        self.path: LogitPath | None = None
        """From the head's output to the logits: known after the first forward."""
        self.head, self.words, self.linear = found.head, found.words, found.linear
        self.weights: dict[str, Weight] = {}
        self.newest = 0.0
        """`SecondMoments.newest`, 0 before the first `precondition`."""
        widths = (chosen.hidden_width, chosen.logit_width) if chosen else None
        self.size = 0 if widths is None else widths[0] * widths[1]
        self._places: dict[tuple[str, tuple[int, int]], tuple[Tensor, Tensor]] = {}
        for layer in (*([self.words] if self.words.trained else []), *self.linear.values()):
            matrices = layer.matrices.values() if isinstance(layer, Experts) else (layer,)
            for matrix in matrices:
                if matrix.weight not in self.weights:
                    self.weights[matrix.weight] = self._kept(matrix, widths, seed, device)

    def _kept(self, layer: Layer, widths: tuple[int, int] | None, seed: int, device: torch.device) -> Weight:
        name, inputs, outputs = layer.weight, layer.inputs, layer.outputs
        if widths is None:
            place = slice(self.size, self.size + inputs * outputs)
            self.size = place.stop
            return Weight(layer, (inputs, outputs), place)
        wide = layer is self.words or layer.name == self.head.name
        shape = (min(inputs, widths[0]), min(outputs, widths[1] if wide else min(widths)))
        parameter = name.partition("[")[0]  # all experts of a parameter share its places: their hashes differ
        if (parameter, shape) not in self._places:
            generator = torch.Generator().manual_seed(seed_of(seed, f"{parameter}/place"))
            index = torch.randperm(self.size, generator=generator)[: shape[0] * shape[1]].clone()  # not the rest
            signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
            self._places[parameter, shape] = index.to(device), signs.to(device)
        weight = Weight(layer, shape, *self._places[parameter, shape])
        # An expert's matrix is hashed also where it would fit, or it would meet another's in the same places.
        if shape[0] < inputs or name != parameter:
            weight.inputs = CountSketch(inputs, shape[0], seed_of(seed, f"{name}/inputs"), device)
        if shape[1] < outputs:
            weight.outputs = CountSketch(outputs, shape[1], seed_of(seed, f"{name}/outputs"), device)
        return weight

    def watch(self, batch: Batch, norms: bool = False) -> "GhostWatch":
        return GhostWatch(self, batch)

    def precondition(self, second: SecondMoments) -> None:
        self.newest = second.newest
        for weight in self.weights.values():
            weight.output_scale_O, weight.input_scale_D = adam_factors(*weight.layer.means(second.means))

    def learn(self, statistics_C: Tensor) -> None:
        raise AssertionError("gathers no statistics")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class GhostWatch:
    """One micro-batch, through its forward and backward.

    Inputs are sketched in the forward and their products with the output gradients made when the backward passes by,
    so what is kept from one to the other is a sketch of each input. Recomputation under activation checkpointing is
    not seen: hooks are on the first forward's tensors.

    Gradients arrive multiplied with whatever is in the loss (weights, world size, accumulation, loss scale). That
    factor is read off the gradient at the losses, so that nothing here knows its parts; all tokens of a rank must share
    it, or have 0.
    """

    norms: Mapping[str, Tensor] = {}

    def __init__(self, how: Ghost, batch: Batch) -> None:
        self._how, self._batch = how, batch
        self._losses_BT: Tensor | None = None
        self._step_tokens: float | None = None
        self._factor: Tensor | None = None
        self._sketches: Tensor | None = None
        self._head_inputs: Tensor | None = None
        self._head_output: Tensor | None = None
        self._logits_NV: Tensor | None = None
        self._tokens = 0
        self._ends: list[GradientEdge] = []
        """How far a backward must come for all that is scored."""
        self._embedded_rows: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> Self:
        linear = [(layer.module, partial(self._passed_kind(layer), layer)) for layer in self._how.linear.values()]
        words = [(self._how.words.module, self._passed_words)] if self._how.words.trained else []
        self._hooks = hooks(after=[*words, *linear])
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def before_losses(self, logits_BTV: Tensor) -> None:
        if not self._how.head.trained:
            return
        assert self._head_output is not None, "the head was not called inside the `with`"
        self._logits_NV = logits_BTV.detach().flatten(0, -2)
        if self._how.path is None:
            self._how.path = logit_path(*self._ends_of_path(self._head_output), self._how.cap)
        if self._how.answers:
            self._logits_NV = self._batch.placed(self._logits_NV)
        self._path = self._how.path or LogitPath()
        self._head_output = None
        if self._how.saturates:  # before a backward takes the logits' place
            self._own_logits_N1 = self._logits_NV.gather(1, self._targets_N()[:, None])

    def _ends_of_path(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The head's output, and the logits that it became: of a classifier those of labelled texts."""
        assert self._logits_NV is not None
        if not self._how.answers:
            return output.flatten(0, -2), self._logits_NV
        labelled_BT = self._batch.labels_BT != IGNORE
        return output[labelled_BT if output.dim() == 3 else labelled_BT.any(1)], self._logits_NV[labelled_BT.any(1)]

    @property
    def visit(self) -> Visitor:
        if not self._how.head.trained:
            return lambda gradient_nV, _: gradient_nV.new_zeros(len(gradient_nV), 0)
        weight = self._how.weights[self._how.head.weight]
        return self._visit if self._path != LogitPath() else gradient_visitor(weight.outputs, weight.output_scale_O)

    def _visit(self, gradient_nV: Tensor, labelled_n: Tensor) -> Tensor:
        assert self._logits_NV is not None
        first, self._tokens = self._tokens, self._tokens + len(gradient_nV)
        output_nV = self._path.to_output(gradient_nV, self._logits_NV[first : self._tokens])
        return self._how.weights[self._how.head.weight].sketch_outputs(output_nV)

    def before_backward(self, losses_BT: Tensor, step_tokens: float | None) -> None:
        self._losses_BT, self._step_tokens, self._logits_NV = losses_BT.detach(), step_tokens, None
        if losses_BT.requires_grad:
            losses_BT.register_hook(self._read_factor)

    def backward_to_inputs(self, losses_BT: Tensor) -> None:
        """Only as far as the word embeddings, or where these are frozen as the layers."""
        ends = [get_gradient_edge(losses_BT), *self._ends]
        torch.autograd.grad(losses_BT.sum(), ends, allow_unused=True)

    def take(self, logit_sketch_NG: Tensor) -> SampleGradients:
        """The head's part comes from the logit gradients of the forward, which need no backward."""
        sketches = self._sketches
        assert sketches is not None, "no backward came by since `before_backward`"
        assert self._factor is not None
        sketches /= self._factor  # the head's part, below, has none
        saturation_U = self._saturation()
        if self._how.head.trained:
            assert self._head_inputs is not None
            self._add(sketches, self._how.weights[self._how.head.weight], self._head_inputs, logit_sketch_NG)
        return SampleGradients(sketches, saturation_U)

    def _saturation(self) -> Tensor:
        """What `adam.saturation` leaves out of each unit's self-influence, (U,); 0 before the first `precondition`, and
        where the self-influence does not count.

        Of the rows of the words that a unit reads or is to predict, in the word embedding and in the head (of their sum
        where it is one weight). The head's row is taken to have its gradient at the word's own labels alone, where the
        logit gradient is exp(-loss) - 1. What is frozen of the two has no such row.
        """
        how, batch, losses_BT = self._how, self._batch, self._losses_BT
        assert losses_BT is not None
        saturation_U = losses_BT.new_zeros(len(batch.units))
        if not (how.newest and how.saturates and self._step_tokens):
            return saturation_U
        lengths = [stop - start for start, stop in batch.spans]
        units_N = torch.cat([batch.labels_BT.new_full((length,), unit) for unit, length in enumerate(lengths)])
        parts: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        if how.head.trained:
            assert self._head_inputs is not None
            feedback_N = torch.expm1(-losses_BT.flatten()).where(batch.labels_BT.flatten() != IGNORE, 0.0)
            feedback_N1 = self._path.to_output(feedback_N[:, None], self._own_logits_N1)
            parts[how.head.weight].append((self._targets_N(), self._head_inputs * feedback_N1))
        if how.words.trained:
            assert self._embedded_rows is not None
            parts[how.words.weight].append(self._embedded_rows)
        for name, pairs in parts.items():
            weight = how.weights[name]
            scale_V = weight.output_scale_O
            assert scale_V is not None
            words_M, rows_MK = (torch.cat(several) for several in zip(*pairs, strict=True))
            units_M = units_N.repeat(len(pairs))
            # Any one of a word's positions in a unit stands for its row.
            places_M, stands = units_M * len(scale_V) + words_M, words_M.new_zeros(len(batch.units) * len(scale_V))
            stands[places_M] = torch.arange(len(places_M), device=places_M.device)
            summed_MK = torch.zeros_like(rows_MK).index_add_(0, stands[places_M], rows_MK)
            squares_M = summed_MK.square().sum(1) * scale_V[words_M] ** 2
            taken_M = saturation(squares_M, scale_V[words_M], weight.layer.inputs, self._step_tokens, how.newest)
            saturation_U.index_add_(0, units_M, taken_M.to(saturation_U.dtype))
        return saturation_U

    def _targets_N(self) -> Tensor:
        labels_N = self._batch.labels_BT.flatten()
        return labels_N.where(labels_N != IGNORE, 0)

    def _hook(self, layer: Layer, output: Tensor, came_back: Callable[[Tensor], None]) -> None:
        """Have the gradient at the output of a layer, whose weight is trained, come by."""
        if not output.requires_grad:
            raise ValueError(
                f"{layer.name} ran without a graph, so estimator 'ghost' would see no gradient of it: activation "
                'checkpointing does that in its reentrant kind. Give it {"use_reentrant": False}, or choose lai'
            )
        output.register_hook(came_back)
        if layer is self._how.words or not self._how.words.trained:
            self._ends.append(get_gradient_edge(output))

    @torch.no_grad()
    def _passed_words(self, args: tuple[Any, ...], output: Tensor) -> None:
        words = self._how.words
        self._hook(words, output, partial(self._came_back_to_words, words.input_rows(args)))

    def _passed_kind(self, layer: Layer) -> Callable[..., None]:
        if isinstance(layer, Experts):
            return self._passed_experts
        return self._passed_router if isinstance(layer, Router) else self._passed

    @torch.no_grad()
    def _passed_router(self, layer: Router, args: tuple[Any, ...], output: Any) -> None:
        self._passed(layer, args, layer.output_of(args, output))

    @torch.no_grad()
    def _passed_experts(self, layer: Experts, args: tuple[Any, ...], output: Tensor) -> None:
        self._hook(layer, output, partial(self._came_back_to_experts, layer, args))

    @torch.no_grad()
    def _passed(self, layer: Layer, args: tuple[Any, ...], output: Tensor) -> None:
        with self._how.timed("layer gradients"):
            rows_ND = self._of_positions(layer, layer.input_rows(args))
            if len(rows_ND) != self._batch.labels_BT.numel():
                raise ValueError(
                    f"{layer.name} reads {len(rows_ND)} rows where the batch has {self._batch.labels_BT.numel()}, so "
                    "no unit's gradient could be told; choose influence.estimator lli, loss, random or none"
                )
            sketched_NK = self._how.weights[layer.weight].sketch_inputs(rows_ND)
        if layer.name == self._how.head.name:
            self._head_inputs, self._head_output = sketched_NK, output.detach()
        else:
            self._hook(layer, output, partial(self._came_back, layer, sketched_NK))

    def _of_positions(self, layer: Layer, rows_RD: Tensor) -> Tensor:
        return self._batch.placed(rows_RD, isinstance(layer, AnswerHead)) if self._how.answers else rows_RD

    @torch.no_grad()
    def _read_factor(self, gradient_BT: Tensor) -> None:
        factor = gradient_BT.abs().max()
        self._factor = torch.where(factor > 0, factor, torch.ones_like(factor))
        self._sketches = gradient_BT.new_zeros(len(self._batch.units), self._how.size)

    @torch.no_grad()
    def _came_back(self, layer: Layer, inputs_NK: Tensor, gradient: Tensor) -> None:
        if self._sketches is None or self._factor is None:  # a backward that nobody watches
            return
        with self._how.timed("layer gradients"):
            weight = self._how.weights[layer.weight]
            feedback_NG = weight.sketch_outputs(self._of_positions(layer, layer.output_rows(gradient)))
            self._add(self._sketches, weight, inputs_NK, feedback_NG)

    @torch.no_grad()
    def _came_back_to_experts(self, layer: Experts, args: tuple[Any, ...], gradient: Tensor) -> None:
        if self._sketches is None or self._factor is None:
            return
        with self._how.timed("layer gradients"):
            for name, position_n, input_nD, gradient_nO in layer.routed(args, gradient):
                weight = self._how.weights[name]
                inputs_nK, feedback_nG = weight.sketch_inputs(input_nD), weight.sketch_outputs(gradient_nO)
                bounds = torch.tensor(self._batch.spans, device=position_n.device)
                rows = [(start, stop) for start, stop in torch.searchsorted(position_n, bounds).tolist()]  # ascending
                self._add(self._sketches, weight, inputs_nK, feedback_nG, rows)

    @torch.no_grad()
    def _came_back_to_words(self, words_N: Tensor, gradient: Tensor) -> None:
        """Its one-hot inputs make the product a sum of rows by word."""
        if self._sketches is None or self._factor is None:
            return
        with self._how.timed("layer gradients"):
            weight = self._how.weights[self._how.words.weight]
            rows_NK = weight.sketch_inputs(self._how.words.row_gradients(words_N, gradient))
            self._embedded_rows = words_N, rows_NK / self._factor
            columns_N, signs_N = weight.outputs.of(words_N) if weight.outputs else (words_N, None)
            scale_N = weight.output_scale_O[words_N] if weight.output_scale_O is not None else None
            for scale in (signs_N, scale_N):
                if scale is not None:
                    rows_NK = rows_NK * scale.to(rows_NK.dtype)[:, None]
            parts_UKG = rows_NK.new_zeros(len(self._sketches), *weight.shape)
            for part_KG, (start, stop) in zip(parts_UKG, self._batch.spans, strict=True):
                part_KG.index_add_(1, columns_N[start:stop], rows_NK[start:stop].T)
            weight.put(self._sketches, parts_UKG)

    def _add(
        self,
        sketches: Tensor,
        weight: Weight,
        inputs_NK: Tensor,
        feedback_NG: Tensor,
        rows: Sequence[Span] | None = None,
    ) -> None:
        """`rows`: first and one-past-last of each unit's, where they are not all positions."""
        feedback_NG = feedback_NG.to(inputs_NK.dtype)
        weight.put(sketches, unit_sketches(inputs_NK, feedback_NG, rows or self._batch.spans))
