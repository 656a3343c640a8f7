"""The inputs of a model's linear layers, sketched as they flow by."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import sqrt
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.influence.hooks import hooks
from pipeline.influence.sketch import CountSketch, seed_of
from pipeline.models.layer import AnswerHead, Layer


class LayerInputs:
    """How the inputs of `layers` become inputs_NK for the N = B T positions of a forward:

    with `width` None, the inputs of all layers concatenated (exact); else their sum after an independent sketch each,
    so that the products of two sums estimate the sum over layers of a . a' and no activation is stored. Sketches are
    seeded by (seed, layer name).

    `answers`: of a classifier, some of whose layers read one row a sequence (`Batch.placed`); `positions` then says
    what the other rows count.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        width: int | None,
        seed: int,
        device: torch.device,
        timed: Callable[[], AbstractContextManager] = nullcontext,
        answers: bool = False,
        positions: str = "sum",
    ) -> None:
        self.layers, self.width, self.timed, self.answers, self.positions = layers, width, timed, answers, positions
        self.sketches: dict[str, CountSketch] = {}
        if width is not None:
            for name, layer in layers.items():
                self.sketches[name] = CountSketch(layer.inputs, width, seed_of(seed, name), device)
        self.scales: dict[str, Tensor] = {}
        """What multiplies a layer's input, (D,), by its name; 1 where there is none."""

    def watch(self, norms: bool = False, batch: Batch | None = None) -> "WatchedInputs":
        """For one forward. `norms`: they are asked for afterwards, which reads every input once more. `batch`: what a
        classifier reads."""
        assert batch or not self.answers
        return WatchedInputs(self, norms, batch)


class WatchedInputs:
    """The layer inputs of the one forward inside its `with`.

    Consecutive layers that read the same tensor (q, k and v; gate and up) share one product, scaled by the root of
    their number, so each of them counts. Hooks read activations only, never parameters (under ZeRO-3 these are empty
    between uses), and are gone before the backward, so that recomputation under activation checkpointing is not
    recorded again.
    """

    def __init__(self, how: LayerInputs, norms: bool, batch: Batch | None) -> None:
        self._how, self._batch, self._measured = how, batch, norms
        self._inputs: list[Tensor] = []
        self._shared: Tensor | None = None
        self._readers: list[str] = []
        self.norms: dict[str, Tensor] = {}
        """Root mean square over tokens of each layer's input norm |a|, where it was asked for."""

    def __enter__(self) -> Self:
        layers = self._how.layers
        self._hooks = hooks(before=[(layer.module, partial(self._read, name)) for name, layer in layers.items()])
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        if error[0] is None:
            self._flush()
        self._shared = None

    def take(self, positions: int) -> Tensor:
        """inputs_NK, handed over: a second call finds none. Raises ValueError where they are not of N `positions`."""
        inputs, self._inputs = self._inputs, []
        assert inputs, "no layer of the model was called inside the `with`"
        if len(inputs[0]) != positions:
            raise ValueError(
                f"linear layers of this model read {len(inputs[0])} rows where the batch has {positions}, so no unit "
                "could be told; choose influence.estimator loss, random or none"
            )
        return inputs[0] if self._how.width is not None else torch.cat(inputs, dim=1)

    def _read(self, name: str, args: tuple[Any, ...]) -> None:
        # Layers with scales of their own share nothing.
        if args[0] is not self._shared or name in self._how.scales:
            self._flush()
            self._shared = args[0]
        self._readers.append(name)

    @torch.no_grad()
    def _flush(self) -> None:
        """Add the product that `_readers` share."""
        if self._shared is None:
            return
        how, name = self._how, self._readers[0]
        with how.timed():
            input_ND = how.layers[name].input_rows((self._shared,))
            if how.answers and self._batch:
                head, rows = isinstance(how.layers[name], AnswerHead), len(input_ND)
                input_ND = self._batch.placed(input_ND, head)
                if how.positions != "sum" and not head and rows == len(input_ND):
                    input_ND = input_ND * self._batch.position_weights(how.positions).to(input_ND.dtype)
            dtype = torch.promote_types(input_ND.dtype, torch.float32)
            if self._measured:
                norm = torch.linalg.vector_norm(input_ND, dtype=dtype)
                self.norms |= dict.fromkeys(self._readers, (norm.square() / len(input_ND)).sqrt())
            scale = sqrt(float(len(self._readers))) * how.scales.get(name, 1.0)
            if self._inputs and len(self._inputs[0]) != len(input_ND):
                raise ValueError(
                    f"{name} reads {len(input_ND)} rows where other layers read {len(self._inputs[0])}: they are not "
                    "the positions of the batch, so no unit could be told; choose influence.estimator lli, loss or none"
                )
            if how.width is None:
                self._inputs.append(input_ND.to(dtype) * scale)
            else:
                if not self._inputs:
                    self._inputs.append(input_ND.new_zeros(len(input_ND), how.width, dtype=dtype))
                how.sketches[name](input_ND, self._inputs[0], scale)
        self._shared, self._readers = None, []
