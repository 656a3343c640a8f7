"""`adam_ema`, Appendix E of arXiv 2510.16007: logit gradients scaled by a running mean of their squares."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.influence.estimator import SampleGradients
from pipeline.influence.lai import Lai, LaiWatch
from pipeline.models.second_moments import SecondMoments

EPS = 1e-8


class AppendixE:
    """`lai` or `lli` with the logit gradient on both sides times (D + eps^2)^-power.

    D is, per logit coordinate, an exponential mean over global micro-batches of each one's mean over its tokens of
    squared logit gradients, bias-corrected: m <- decay m + (1 - decay) (sum over tokens) / tokens, D = m / (1 -
    decay^n). Power 1/2 is the paper's, which multiplies both sides by Adam's whole denominator; 1/4 on each side makes
    their product g g' / sqrt(v), Adam's own step. A micro-batch is scored with the D of those before it, so that no
    softmax has to be formed twice; before the first the scale is 1.
    """

    accepts: ClassVar[frozenset[str]] = Lai.accepts
    because: ClassVar[Mapping[str, str]] = {}
    after_backward: ClassVar[bool] = False

    def __init__(self, lai: Lai, decay: float, power: float, device: torch.device) -> None:
        self.lai, self._decay, self._power = lai, decay, power
        self._raw_V, self._updates = torch.zeros(lai.head.outputs, device=device), 0

    def watch(self, batch: Batch, norms: bool = False) -> "AppendixEWatch":
        return AppendixEWatch(self.lai.watch(batch, norms), batch, torch.zeros_like(self._raw_V))

    def learn(self, statistics_C: Tensor) -> None:
        """One micro-batch without tokens, or whose sum is not finite, is none."""
        sum_V, tokens = statistics_C[:-1], float(statistics_C[-1])
        if tokens > 0 and sum_V.isfinite().all():
            self._go_on(self._raw_V * self._decay + sum_V * ((1 - self._decay) / tokens), self._updates + 1)

    def precondition(self, second: SecondMoments) -> None:
        raise AssertionError("goes by its own mean, not by the optimizer's")

    def state_dict(self) -> dict[str, Any]:
        return {"raw": self._raw_V.cpu(), "updates": self._updates} if self._updates else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._go_on(state["raw"].to(self._raw_V.device), state["updates"])

    def _go_on(self, raw_V: Tensor, updates: int) -> None:
        self._raw_V, self._updates = raw_V, updates
        self.lai.logit_scale_V = (raw_V / (1 - self._decay**updates) + EPS**2).pow(-self._power)


class AppendixEWatch:
    """One micro-batch: LAI's, and the sum over its tokens of squared logit gradients."""

    def __init__(self, lai: LaiWatch, batch: Batch, squares_V: Tensor) -> None:
        self._lai, self._batch, self._squares_V = lai, batch, squares_V

    def __enter__(self) -> Self:
        self._lai.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._lai.__exit__(*error)

    @property
    def norms(self) -> Mapping[str, Tensor]:
        return self._lai.norms

    def visit(self, gradient_nV: Tensor, labelled_n: Tensor) -> Tensor:
        self._squares_V += labelled_n.to(gradient_nV) @ gradient_nV.square()
        return self._lai.visit(gradient_nV, labelled_n)

    def before_losses(self, logits_BTV: Tensor) -> None: ...

    def before_backward(self, losses_BT: Tensor, step_tokens: float | None) -> None: ...

    def backward_to_inputs(self, losses_BT: Tensor) -> None: ...

    def take(self, logit_sketch_NG: Tensor) -> SampleGradients:
        gradients = self._lai.take(logit_sketch_NG)
        tokens = self._batch.tokens_U.sum().to(gradients.sketch_UM)[None]
        return gradients._replace(statistics_C=torch.cat([self._squares_V.to(tokens), tokens]))
