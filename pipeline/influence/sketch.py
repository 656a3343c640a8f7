"""Seeded random maps that keep inner products in expectation. Pure tensors."""

import zlib

import torch
from torch import Tensor

from pipeline.kernels.available import Hashing, usable
from pipeline.tasks.causal_lm import SketchVisitor, Visitor


def seed_of(seed: int, what: str) -> int:
    """A seed for `what` that depends on nothing but the run's and its name."""
    return zlib.crc32(f"{seed}/{what}".encode())


_AT_ONCE = 2**24
"""Up to how many products lie in memory so that one kernel adds them up: as many numbers as a chunk of logit gradients
has. On an accelerator a kernel for each turn through the buckets would take longer to launch than to run;
turns of more than 2**21 numbers have one each."""


_AT_ONCE_CPU = 2**15
"""A CPU launches for next to nothing, and would wait for its memory: as many as its cache holds."""


_WORTH_IT = 8
"""Turns added up by one kernel, at least: of fewer the memory that is moved costs more than launching a kernel each."""


class CountSketch:
    """A seeded random map from `dim` to `width` numbers that keeps inner products in expectation.

    y[b] = sum over i with (i + offset) mod width = b of s_i x_i, with random signs s and a random offset, so that the
    sketches of several layers that are added up fill all buckets. Unbiased: E[y . y'] = x . x' over seeds;
    variance = sum over i != j in one bucket of (x_i^2 x'_j^2 + x_i x'_i x_j x'_j): about (|x|^2 |x'|^2 + (x . x')^2) /
    width where energy is spread over the buckets, so the standard error falls like 1 / sqrt(width). Coordinates are
    dealt to buckets in turn, not at random: that reads x once, in order, and keeps the most frequent tokens of a
    vocabulary, which come first in those of byte-pair encodings, in buckets of their own. Exact up to signs where
    dim <= width.

    The map depends on (seed, dim, width) only, never on the device or the rank, and drawing it leaves torch's global
    generator alone.
    """

    def __init__(self, dim: int, width: int, seed: int, device: torch.device) -> None:
        self.width = width
        generator = torch.Generator().manual_seed(seed)
        self._signs_D = (torch.randint(0, 2, (dim,), generator=generator) * 2.0 - 1.0).to(device)
        self._offset = int(torch.randint(0, width, (), generator=generator))

    def __call__(self, x_ND: Tensor, out_NW: Tensor | None = None, scale: float | Tensor | None = None) -> Tensor:
        """(N, dim) -> (N, width), in float32 (float64 stays), of x or x times `scale`, one number or `dim`; added to
        `out_NW` where that is given."""
        if usable(x_ND):
            from pipeline.kernels.sketch import add_sketch  # imports Triton

            times, scale_D = (1.0, scale) if isinstance(scale, Tensor) else (1.0 if scale is None else scale, None)
            return add_sketch(x_ND, self.hashing(scale_D), times, out_NW)
        dtype = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        if out_NW is None:
            out_NW = torch.zeros(len(x_ND), self.width, dtype=dtype, device=x_ND.device)
        signs_D = self._signs_D.to(dtype)
        if scale is not None:
            signs_D = signs_D * scale  # not x, which is read once like this
        # Whole turns through the buckets, and what is left before and behind them.
        first = (self.width - self._offset) % self.width
        turns = max(0, (len(signs_D) - first) // self.width)
        behind = first + turns * self.width
        most = _AT_ONCE_CPU if x_ND.device.type == "cpu" else _AT_ONCE
        once = min(turns, most // max(1, out_NW.numel()))
        # Product, sum and addition are three kernels themselves, and move a little more than a kernel for each turn.
        once = once if once >= _WORTH_IT else 1
        for start in range(0, turns, once):
            count = min(once, turns - start)
            part = slice(first + start * self.width, first + (start + count) * self.width)
            if count == 1:
                out_NW.addcmul_(x_ND[:, part], signs_D[part])
            else:
                out_NW += (x_ND[:, part] * signs_D[part]).unflatten(1, (count, self.width)).sum(1)
        if first:
            size = min(first, len(signs_D))
            out_NW[:, self._offset : self._offset + size].addcmul_(x_ND[:, :size], signs_D[:size])
        if behind < len(signs_D):
            out_NW[:, : len(signs_D) - behind].addcmul_(x_ND[:, behind:], signs_D[behind:])
        return out_NW

    def hashing(self, scale_D: Tensor | None = None) -> Hashing:
        """Of `scale_D` times a vector, for the kernels."""
        return Hashing(self._signs_D, self._offset, self.width, scale_D)

    def of(self, coordinates_N: Tensor) -> tuple[Tensor, Tensor]:
        """Bucket and sign of each coordinate: what the sketch makes of that basis vector."""
        return (coordinates_N + self._offset) % self.width, self._signs_D[coordinates_N]


def hashed(sketch: CountSketch | None, x_ND: Tensor, scale_D: Tensor | None) -> Tensor:
    """x times the scale through the sketch; without one, that itself; in float32 at least."""
    if sketch:
        return sketch(x_ND, scale=scale_D)
    x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    return x_ND if scale_D is None else x_ND * scale_D.to(x_ND.dtype)


def gradient_visitor(sketch: CountSketch | None, scale_V: Tensor | None) -> Visitor:
    """What makes `hashed` of logit gradients: while the logits are read, where there is a sketch and a kernel."""

    def visit(gradient_nV: Tensor, labelled_n: Tensor) -> Tensor:
        return hashed(sketch, gradient_nV, scale_V)

    return SketchVisitor(visit, sketch.hashing(scale_V)) if sketch else visit
