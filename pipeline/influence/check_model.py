"""Before the first step: does this model compute, and answer, where scores look for it?"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch, Unit, next_token_labels
from pipeline.influence.ghost import Ghost, Weight
from pipeline.influence.hooks import hooks
from pipeline.influence.layer_inputs import LayerInputs
from pipeline.influence.micro_batch import MicroBatch, forward_logits
from pipeline.influence.reference import OfBatch
from pipeline.influence.scorer import SketchScorer
from pipeline.influence.sketch import CountSketch, seed_of
from pipeline.models.layer import AnswerHead, Layer
from pipeline.models.layers import head_of, words_of

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


@torch.no_grad()
def refuse_unknown_answers(model: PreTrainedModel, layers: Mapping[str, Layer], seed: int = 0) -> None:
    """Raises ValueError where a classifier's logits are not its last layer's output at the end of a text, or once a
    text, or where a layer's rows are not the positions of one text after the other."""
    batch, training, head, seen = _short(model, seed), model.training, head_of(model), list[Tensor]()
    other = replace(batch, input_ids_BT=batch.input_ids_BT.clone())
    other.input_ids_BT[1] = batch.input_ids_BT[0]
    inputs, sums = LayerInputs(layers, None, seed, model.device, answers=True), list[Tensor]()
    model.eval()
    for each in (batch, other):
        watch = inputs.watch(batch=each)
        with watch, hooks(after=[(head.module, lambda args, output: seen.append(output))]):
            logits_BC = forward_logits(model, each)
        sums.append(watch.take(each.labels_BT.numel())[:_TOKENS].sum(0))
        at_end = seen[-1][each.labels_BT != IGNORE] if seen[-1].dim() == 3 else seen[-1]
        if at_end.shape != logits_BC.shape or _apart(at_end, logits_BC):
            raise ValueError(
                f"{type(model).__name__} does not answer with its last linear layer at the end of a text, or once a "
                "text, so no layer's part in an answer could be told: choose influence.estimator loss, random or none"
            )
    model.train(training)
    if _apart(*sums):
        raise ValueError(
            f"linear layers of {type(model).__name__} mix texts of a batch, or take them in another order, so no "
            "text's part could be told: choose influence.estimator loss, random or none"
        )


@torch.no_grad()
def reads_padding(model: PreTrainedModel, seed: int = 0) -> str:
    """A sentence where a classifier's answer depends on the padding behind a text; else empty."""
    batch, training = _short(model, seed), model.training
    whole = torch.ones_like(batch.input_ids_BT)
    ids_BT = torch.cat([batch.input_ids_BT, torch.full_like(whole, model.config.pad_token_id)], dim=1)
    model.eval()
    alone_BC = model(input_ids=batch.input_ids_BT, attention_mask=whole).logits
    padded_BC = model(input_ids=ids_BT, attention_mask=torch.cat([whole, torch.zeros_like(whole)], dim=1)).logits
    model.train(training)
    if not _apart(padded_BC, alone_BC):
        return ""
    return (
        f"{type(model).__name__} reads padding: its answers, and scores, depend on how long the other texts of a "
        "micro-batch are"
    )


def _apart(left: Tensor, right: Tensor) -> bool:
    return float((left - right).abs().max()) > TOLERANCE * float(right.abs().max())


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
    vocabulary = words_of(model).outputs
    ids_BT = torch.randint(0, vocabulary, (_SEQUENCES, _TOKENS), generator=generator).to(model.device)
    units = [Unit(row, row, (row * _TOKENS, (row + 1) * _TOKENS), [row], "-") for row in range(_SEQUENCES)]
    labels_BT = next_token_labels(ids_BT)
    if isinstance(head_of(model), AnswerHead):  # both texts answered with the first class, at their ends
        labels_BT = torch.full_like(ids_BT, IGNORE)
        labels_BT[:, -1] = 0
        padding_BT = ids_BT == model.config.pad_token_id  # or they would end before it
        ids_BT = torch.where(padding_BT, (ids_BT + 1) % vocabulary, ids_BT)
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
