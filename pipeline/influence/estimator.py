"""What an estimator is. One file each; `table.py` says which there are."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.models.second_moments import SecondMoments
from pipeline.tasks.causal_lm import Visitor


class SampleGradients(NamedTuple):
    """What is known of one micro-batch's units once it was watched."""

    sketch_UM: Tensor
    """Of every unit's gradient, as the estimator guesses it: scores are inner products of these."""
    saturation_U: Tensor
    """What Adam's coming step leaves out of self-influences; 0 where nothing is known of it."""
    statistics_C: Tensor | None = None
    """Numbers that `Estimator.learn` wants summed over all that is scored together, on all ranks."""


class Watch(Protocol):
    """One micro-batch: its hooks live as long as the `with` around the forward, what it knows dies with it."""

    @property
    def visit(self) -> Visitor | None:
        """What `token_losses` is to make of the logit gradients; called inside the `with`."""

    @property
    def norms(self) -> Mapping[str, Tensor]:
        """Root mean square norm of each layer's input, where it was asked for."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...

    def before_losses(self, logits_BTV: Tensor) -> None:
        """With what the forward ended in, inside the `with`, before `visit`."""

    def before_backward(self, losses_BT: Tensor, step_tokens: float | None) -> None:
        """With the losses that a backward is to start from, for estimators that score after it. `step_tokens`: all
        labelled tokens of the optimizer step that it is part of; None where it only gives a reference."""

    def backward_to_inputs(self, losses_BT: Tensor) -> None:
        """The backward where no weight shall have a gradient of it; nothing for estimators that need none."""


class EstimatorWatch(Watch, Protocol):
    def take(self, logit_sketch_NG: Tensor) -> SampleGradients:
        """At the end, with what `visit` made of the logit gradients, detached; once."""


class Scorable(Protocol):
    """What all that scores has in common: the rules of the config read it."""

    accepts: ClassVar[frozenset[str]]
    """Values of `influence.precondition`, `.reference`, `.unit`, `.passes`, `policy.rule` and `task.kind` that it goes
    with, beside none, batch, sequence, one, rate and causal_lm, which all but `lookahead` go with."""
    because: ClassVar[Mapping[str, str]]
    """Why it does not go with a value, where there is more to say than that it does not."""
    after_backward: ClassVar[bool]
    """Whether it scores in the training's own backward; what is dropped is then taken out of the gradient again."""


class Estimator(Scorable, Protocol):
    """Guesses every unit's gradient from one forward, or (`after_backward`) from its backward too."""

    def watch(self, batch: Batch, norms: bool = False) -> EstimatorWatch:
        """`norms`: those of the layers' inputs are asked for afterwards."""

    def precondition(self, second: SecondMoments) -> None:
        """Score in the geometry of these second moments of the optimizer until the next call (`adam_state`)."""

    def learn(self, statistics_C: Tensor) -> None:
        """Take in `SampleGradients.statistics_C`, summed; what is scored next is scored with it."""

    def state_dict(self) -> dict[str, Any]:
        """What it has learnt."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Control(Scorable, Protocol):
    """Scores every token by itself: no gradients. A unit's score is the mean over its labelled tokens."""

    def token_scores(self, batch: Batch, losses_BT: Tensor) -> Tensor:
        """(B, T), of the detached losses of a forward; positive is kept longest, NaN is no score."""
