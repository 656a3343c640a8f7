"""Before the first step: do the gradients that `ghost` sees belong to this model?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch, Unit, next_token_labels
from pipeline.influence.ghost import Ghost, Weight
from pipeline.influence.micro_batch import MicroBatch
from pipeline.influence.reference import OfBatch
from pipeline.influence.scorer import SketchScorer
from pipeline.influence.sketch import CountSketch, seed_of
from pipeline.models.layer import AnswerHead, Layer, shape_of
from pipeline.models.layers import head_of

TOLERANCE = 1e-3
_SEQUENCES, _TOKENS, _WIDTH = 2, 16, 4


def gradient_errors(model: PreTrainedModel, seed: int = 0) -> dict[str, float]:
    """For every weight that `ghost` claims to score, how far its gradient, as the hooks of one forward and backward of
    two short random sequences see it, is from autograd's, relative to the latter; both through the same random
    projections to 4 x 4 numbers. Leaves no gradient. Weights without any gradient are left out.

    Wants the model whole, on one device. Raises ValueError where a weight is none that `layers_of` knows.
    """
    device, config = model.device, InfluenceConfig(estimator="ghost", sketch="none", include_self=False)
    timed = Stopwatch(device)
    ghost = _Apart(config, model, seed, device, timed)
    scorer = SketchScorer(config, ghost, OfBatch(), seed, device, timed, lambda tensor: tensor)
    watched = MicroBatch(scorer, _short(model, seed), timed)
    with _projected_gradients(model, ghost) as expected, torch.random.fork_rng():
        losses_BT = watched.forward(model)
        watched.before_backward(None)
        losses_BT.sum().backward()
    seen_M = watched.gradients().sketch_UM.sum(0)
    errors = {}
    for name, weight in ghost.weights.items():
        if name in expected and float(expected[name].norm()) > 0:
            assert isinstance(weight.place, slice)
            difference = seen_M[weight.place].double() - expected[name].flatten().double()
            errors[name] = float(difference.norm() / expected[name].double().norm())
    return errors


def check_model(model: PreTrainedModel, seed: int = 0) -> None:
    """Raises ValueError, naming them, where weights that `ghost` scores have other gradients than it sees."""
    wrong = {name: error for name, error in gradient_errors(model, seed).items() if not error <= TOLERANCE}
    if wrong:
        shown = ", ".join(f"{name} ({error:.1%} off)" for name, error in list(wrong.items())[:4])
        raise ValueError(
            f"estimator 'ghost' does not see the true gradients of {len(wrong)} weights of {type(model).__name__}: "
            f"{shown}. Its modules use these weights in a way that is not known here: choose lai, residual or lli, or, "
            "to score all the same, influence.check_model false"
        )


@torch.no_grad()
def refuse_seeing_ahead(model: PreTrainedModel, seed: int = 0) -> None:
    """Raises ValueError where another last token changes what is predicted before it: then the model sees the tokens
    that it is to predict."""
    ids_BT, training = _short(model, seed).input_ids_BT, model.training
    other_BT = ids_BT.clone()
    other_BT[:, -1] = (ids_BT[:, -1] + 1) % int(ids_BT.max() + 1)
    model.eval()
    first, second = (model(input_ids=ids, use_cache=False).logits[:, :-1].float() for ids in (ids_BT, other_BT))
    model.train(training)
    if float((first - second).abs().max()) > 1e-3 * float(first.abs().max()):
        raise ValueError(
            f"{type(model).__name__} is not causal: it sees the tokens that it is to predict. An encoder needs "
            "is_decoder true in its config.json; or choose another model"
        )


class _Apart(Ghost):
    """Every weight's gradient in places of its own, projected to a few numbers."""

    def _kept(self, layer: Layer, widths: tuple[int, int] | None, seed: int, device: torch.device) -> Weight:
        place = slice(self.size, self.size + _WIDTH * _WIDTH)
        self.size = place.stop
        inputs, outputs = (
            CountSketch(size, _WIDTH, seed_of(seed, f"{layer.weight}/{side}"), device)
            for side, size in (("inputs", layer.inputs), ("outputs", layer.outputs))
        )
        return Weight(layer, (_WIDTH, _WIDTH), place, None, inputs, outputs)


def _short(model: PreTrainedModel, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = shape_of(model.get_input_embeddings().weight)[0]
    ids_BT = torch.randint(0, vocabulary, (_SEQUENCES, _TOKENS), generator=generator).to(model.device)
    units = [Unit(row, row, (row * _TOKENS, (row + 1) * _TOKENS), [row], "-") for row in range(_SEQUENCES)]
    labels_BT = next_token_labels(ids_BT)
    if isinstance(head_of(model), AnswerHead):  # both texts answered with the first class, at their ends
        labels_BT = torch.full_like(ids_BT, IGNORE)
        labels_BT[:, -1] = 0
        ids_BT[ids_BT == model.config.pad_token_id] += 1  # or they would end before it
    return Batch(ids_BT, labels_BT, units)


@contextmanager
def _projected_gradients(model: PreTrainedModel, ghost: Ghost) -> Iterator[dict[str, Tensor]]:
    """Autograd's gradient of every weight of `ghost`, projected as it does; each is freed as soon as it is there."""
    found: dict[str, Tensor] = {}

    def project(name: str, gradient: Tensor) -> None:
        weight = ghost.weights[name]
        gradient_OD = gradient if not weight.layer.transposed else gradient.T
        assert weight.inputs is not None
        assert weight.outputs is not None
        found[name] = weight.outputs(weight.inputs(gradient_OD).T.contiguous()).clone()

    def taken(name: str, parameter: Any) -> None:
        if name in ghost.weights:
            project(name, parameter.grad)
        for index in range(len(parameter.grad)) if f"{name}[0]" in ghost.weights else ():
            project(f"{name}[{index}]", parameter.grad[index])
        parameter.grad = None

    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: taken(name, p))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
