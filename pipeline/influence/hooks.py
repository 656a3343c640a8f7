"""The inputs of a model's linear layers, sketched as they flow by. Hooks live exactly as long as a `with`."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from math import sqrt

import torch
from torch import Tensor, nn

from pipeline.influence.sketch import CountSketch, seed_of
from pipeline.models.layers import layer_shape


class LayerInputs:
    """Collects keys_NK for the N = B T positions of one forward:

    with `width` None, the inputs of all layers concatenated (exact); else their sum after an independent sketch each,
    so that keys . keys' estimates sum over layers of a . a' and no activation is stored.

    Consecutive layers that read the same tensor (q, k and v; gate and up) share one product, scaled by the root of
    their number (of the sum of their weights), so each of them counts. Hooks read activations only, never parameters
    (under ZeRO-3 these are empty between uses), keep nothing on the modules, and are gone before the backward, so that
    recomputation under activation checkpointing is not recorded again. Sketches are seeded by (seed, layer name).
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        width: int | None,
        seed: int,
        device: torch.device,
        timed: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._layers, self._width, self._timed = layers, width, timed
        self.names = list(layers)
        self._sketches: dict[str, CountSketch] = {}
        if width is not None:
            for name, layer in layers.items():
                self._sketches[name] = CountSketch(layer_shape(layer)[0], width, seed_of(seed, name), device)
        self.scales: dict[str, Tensor] = {}
        """What multiplies a layer's input, (D,), by its name; 1 where there is none."""
        self.weights: dict[str, float] = {}
        """What multiplies a layer's products a . a', by its name; 1 where there is none."""
        self.measured = True
        """Whether `norms` and `mean_squares` are wanted of the next forward: they read every input once more."""
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "LayerInputs":
        self._keys: list[Tensor] = []
        self._mean_squares: dict[str, Tensor] = {}
        self._shared: Tensor | None = None
        self._readers: list[str] = []
        self._hooks = [
            # Before the engine's own hooks: ZeRO-3's hand every module a tensor object of its own.
            layer.register_forward_pre_hook(lambda _module, args, name=name: self._read(name, args[0]), prepend=True)
            for name, layer in self._layers.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if error[0] is None:
            self._flush()
        self._shared = None

    def take_keys(self) -> Tensor:
        """keys_NK of the forward inside the last `with`, handed over: a second call finds none."""
        keys, self._keys = self._keys, []
        assert keys, "no layer of the model was called inside the `with`"
        return keys[0] if self._width is not None else torch.cat(keys, dim=1)

    def norms(self) -> dict[str, Tensor]:
        """Root mean square over tokens of each layer's input norm |a|."""
        return {name: square.sqrt() for name, square in self._mean_squares.items()}

    def mean_squares(self) -> Tensor:
        """Mean over tokens of |a|^2, in the order of `names`; 0 for a layer that was not called."""
        none = torch.zeros_like(next(iter(self._mean_squares.values())))
        return torch.stack([self._mean_squares.get(name, none) for name in self.names])

    def _read(self, name: str, input_BTD: Tensor) -> None:
        # Layers with scales of their own share nothing.
        if input_BTD is not self._shared or name in self.scales:
            self._flush()
            self._shared = input_BTD
        self._readers.append(name)

    @torch.no_grad()
    def _flush(self) -> None:
        """Add the product that `_readers` share."""
        if self._shared is None:
            return
        with self._timed():
            name, input_ND = self._readers[0], self._shared.detach().flatten(0, -2)
            if self.measured:
                norm = torch.linalg.vector_norm(input_ND, dtype=_at_least_float32(input_ND))
                self._mean_squares |= dict.fromkeys(self._readers, norm.square() / len(input_ND))
            scale = sqrt(sum(self.weights.get(reader, 1.0) for reader in self._readers)) * self.scales.get(name, 1.0)
            if self._width is None:
                self._keys.append(input_ND.to(_at_least_float32(input_ND)) * scale)
            else:
                if not self._keys:
                    self._keys.append(input_ND.new_zeros(len(input_ND), self._width, dtype=_at_least_float32(input_ND)))
                self._sketches[name](input_ND, self._keys[0], scale)
        self._shared, self._readers = None, []


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
