"""From watched micro-batches to the scores of this rank's units. Knows no ranks: it is handed their sum."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.config.schema_influence import InfluenceConfig
from pipeline.config.timing import Stopwatch
from pipeline.data.batch import IGNORE, Batch
from pipeline.influence.controls import Unwatched
from pipeline.influence.estimator import Control, Estimator, EstimatorWatch, SampleGradients, Watch
from pipeline.influence.reference import OfBatch, Running, Validation
from pipeline.influence.scores import influence_scores
from pipeline.models.second_moments import SecondMoments

AllReduce = Callable[[Tensor], Tensor]
"""The sum over all ranks; collective."""


@dataclass(frozen=True)
class Scored:
    """This rank's units of one micro-batch: the positions of their sequences, scores against all that is decided
    together and against the micro-batch alone, losses (sums over labelled tokens, nats), how many tokens these are.

    Positive helps; NaN is no score. A unit that is not finite has NaN as its loss, and so have the others of its
    sequence.
    """

    positions_U: Tensor
    scores_U: Tensor
    micro_scores_U: Tensor
    losses_U: Tensor
    tokens_U: Tensor
    by_token_n2: Tensor | None = None
    """Score and loss of every labelled token, in order; with `influence.unit: token`."""


class Scorer(Protocol):
    """Takes in watched micro-batches, and scores all since the last call of `scores` together."""

    after_backward: bool
    reads_second_moments: bool
    compares: bool
    """Whether units are scored against all that was added with them."""

    def watch(self, batch: Batch, norms: bool = False) -> Watch:
        """Of one micro-batch, for one forward."""

    def add(self, batch: Batch, watch: Any, losses_BT: Tensor, logit_sketch_NG: Tensor | None) -> None:
        """Take in what was watched, with the detached losses of its forward and what `watch.visit` made."""

    def scores(self) -> list[Scored]:
        """Of every micro-batch added since the last call. Collective where sketches are compared."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> list[str]: ...


class ControlScorer:
    """Scores units by their tokens' own scores, the mean over labelled tokens: nothing is compared, nothing is kept.

    `control` is None where scores come with the losses, through `add_scored` (`lookahead`). `by_token`: the tokens' own
    scores are wanted too.
    """

    after_backward = False
    compares = False
    reads_second_moments = False

    def __init__(self, control: Control | None, by_token: bool = False) -> None:
        self._control, self._by_token = control, by_token
        self._scored: list[Scored] = []

    def watch(self, batch: Batch, norms: bool = False) -> Unwatched:
        return Unwatched()

    @torch.no_grad()
    def add(self, batch: Batch, watch: Unwatched, losses_BT: Tensor, logit_sketch_NG: Tensor | None) -> None:
        assert self._control is not None
        self.add_scored(batch, losses_BT, self._control.token_scores(batch, losses_BT))

    def add_scored(self, batch: Batch, losses_BT: Tensor, scores_BT: Tensor) -> None:
        """Take in a micro-batch's losses and token scores, (B, T)."""
        losses_U, tokens_U = batch.sum_per_unit(losses_BT), batch.tokens_U
        labelled_BT = batch.labels_BT != IGNORE
        # A score of NaN, which is none, stays NaN also in a unit without labels.
        scores_U = batch.sum_per_unit(scores_BT * labelled_BT) / tokens_U.clamp(min=1)
        losses_U = losses_U.where(batch.whole_rows(losses_U.isfinite()), torch.nan)
        by_token_n2 = torch.stack([scores_BT, losses_BT], dim=-1)[labelled_BT].float() if self._by_token else None
        self._scored.append(Scored(batch.positions_U, scores_U, scores_U, losses_U, tokens_U, by_token_n2))

    def scores(self) -> list[Scored]:
        scored, self._scored = self._scored, []
        return scored

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        return []


class _Pending(NamedTuple):
    """A micro-batch of this rank that is not yet scored."""

    gradients: SampleGradients
    positions_U: Tensor
    losses_U: Tensor
    tokens_U: Tensor


class SketchScorer:
    """Scores by the inner products of an estimator's gradient sketches with a reference: one all-reduce of `size`
    numbers a micro-batch, and of what the estimator learns from; none of sketches against a validation set."""

    def __init__(
        self,
        config: InfluenceConfig,
        estimator: Estimator,
        reference: OfBatch | Running | Validation,
        seed: int,
        device: torch.device,
        timed: Stopwatch,
        all_reduce: AllReduce,
    ) -> None:
        self._config, self._estimator, self._reference = config, estimator, reference
        self._seed, self._device, self._timed, self._all_reduce = seed, device, timed, all_reduce
        self.after_backward, self.compares = estimator.after_backward, reference.of_what_is_scored
        self.reads_second_moments = config.precondition == "adam_state"
        self._second: SecondMoments | None = None
        self._pending: list[_Pending] = []

    @property
    def preconditioned(self) -> bool:
        """Whether second moments were ever taken in."""
        return self._second is not None

    def precondition(self, second: SecondMoments) -> None:
        """Score in the geometry of these second moments of the optimizer until the next call."""
        self._second = second
        self._estimator.precondition(second)

    def watch(self, batch: Batch, norms: bool = False) -> EstimatorWatch:
        return self._estimator.watch(batch, norms)

    @torch.no_grad()
    def add(self, batch: Batch, watch: EstimatorWatch, losses_BT: Tensor, logit_sketch_NG: Tensor | None) -> None:
        """4 bytes a number of every unit's sketch are kept until `scores`."""
        assert logit_sketch_NG is not None
        losses_U = batch.sum_per_unit(losses_BT)
        with self._timed("gradient sketches"):
            gradients = watch.take(logit_sketch_NG)
            sketch_UM = gradients.sketch_UM
            finite_U = batch.whole_rows(batch.whole_rows(losses_U.isfinite()) & sketch_UM.sum(1).isfinite())
            # One sample that is not finite must not make all scores so.
            gradients = gradients._replace(
                sketch_UM=sketch_UM.where(finite_U[:, None], 0.0),
                saturation_U=gradients.saturation_U.where(finite_U, 0.0),
            )
        losses_U = losses_U.where(finite_U, torch.nan)
        self._pending.append(_Pending(gradients, batch.positions_U, losses_U, batch.tokens_U))

    @torch.no_grad()
    def scores(self) -> list[Scored]:
        pending, self._pending = self._pending, []
        micro = self._summed(pending)
        with self._timed("scores"):
            together, share = self._reference.against(micro)
            kept, removed = (share, 0.0) if self._config.include_self else (0.0, share)
            scored = []
            for part, micro_M in zip(pending, micro, strict=True):
                sketch_UM, taken_U = part.gradients.sketch_UM, kept * part.gradients.saturation_U
                scores_U = influence_scores(sketch_UM, together, removed) - taken_U
                micro_U, alone = scores_U, self._reference.alone(micro_M)
                if alone is not None and len(micro) > 1:
                    micro_U = influence_scores(sketch_UM, alone, removed) - taken_U
                scored.append(Scored(part.positions_U, scores_U, micro_U, part.losses_U, part.tokens_U))
            return scored

    def _summed(self, pending: list[_Pending]) -> list[Tensor]:
        """The sketch of each micro-batch, on all ranks together, where the reference is made of them. Collective."""
        with self._timed("scores"):
            local = [part.gradients.sketch_UM.sum(0) for part in pending]
            statistics = [part.gradients.statistics_C for part in pending if part.gradients.statistics_C is not None]
            learnt = [torch.stack(statistics).sum(0)] if statistics else []
            shared = [*(local if self._reference.of_what_is_scored else []), *learnt]
        if shared:
            with self._timed("reduce"):
                shared = list(self._all_reduce(torch.cat(shared)).split([part.numel() for part in shared]))
        if learnt:
            self._estimator.learn(shared.pop())
        return shared or local

    @property
    def holds_validation(self) -> bool:
        """Whether there is a validation set to score against."""
        return isinstance(self._reference, Validation) and self._reference.held_M is not None

    @torch.no_grad()
    def hold_validation(self) -> None:
        """What was added since `scores` becomes the reference, until this is called again. Collective. The estimator
        learns nothing from it."""
        assert isinstance(self._reference, Validation)
        pending, self._pending = self._pending, []
        local = torch.stack([part.gradients.sketch_UM.sum(0) for part in pending]).sum(0)
        with self._timed("reduce"):
            self._reference.held_M = self._all_reduce(local)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to score as this one would; the same on every rank."""
        held = {"reference": self._reference.state_dict(), "estimator": self._estimator.state_dict()}
        state: dict[str, Any] = {name: (self._depends_on(name), content) for name, content in held.items()}
        if self._second:
            means = {name: (rows.cpu(), columns.cpu()) for name, (rows, columns) in self._second.means.items()}
            state["second_moments"] = means, self._second.beta, self._second.updates
        return state

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Go on from a saved state. What was gathered under other keys has no bearing and is gathered anew: returns a
        sentence for each such thing. A key that was added since says nothing of what was saved before."""
        dropped = []
        for name, own in (("reference", self._reference), ("estimator", self._estimator)):
            saved, content = state.get(name, ({}, {}))
            here = self._depends_on(name)
            differing = [f"{key} {saved[key]} -> {here[key]}" for key in here if saved.get(key, here[key]) != here[key]]
            if differing and content:
                dropped.append(f"what the {name} had gathered is dropped ({', '.join(differing)}) and gathered anew")
            elif content:
                own.load_state_dict(content)
        if "second_moments" in state and self.reads_second_moments:
            means, *decay = state["second_moments"]
            move = {name: (rows.to(self._device), columns.to(self._device)) for name, (rows, columns) in means.items()}
            self.precondition(SecondMoments(move, *decay))
        return dropped

    def _depends_on(self, name: str) -> dict[str, Any]:
        """The keys, with their values, that decide what the state of `name` means."""
        config = self._config
        if name == "estimator":
            return {f"influence.{key}": getattr(config, key) for key in ("precondition", "adam_decay")}
        power = ("adam_power",) if config.precondition == "adam_ema" else ()
        keys = ("estimator", "reference", "precondition", *power, *self._reference.keys)
        widths = vars(config.widths) if config.widths else {"": "none"}
        return {
            "seed": self._seed,
            **{f"influence.{key}": getattr(config, key) for key in keys},
            "influence.sketch": " x ".join(map(str, widths.values())),
        }
