"""Layer-aware influence in moment form: moments, scores, sketches. Pure tensors: no ranks, no model, no DeepSpeed.

For token t with layer inputs h_t (all layers', concatenated) and logit gradient g_t, the influence of unit u on the
loss of a reference is, from Eq. 4 of arXiv 2510.16007 with the sum over tokens that the paper leaves silent,

    S_u = sum over z in reference, t in u, t' in z of (h_t . h_t') (g_t . g_t')  =  <M_u, M>
    M_u = sum over t in u of h_t (outer) g_t ,   M = sum over z in reference of M_z

because the sum over token pairs of a product of two inner products is the inner product of two sums of outer
products: linear in tokens, no token-pair matrix, and one (K, G) matrix to sum over ranks.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Span = tuple[int, int]
"""First and one-past-last position of a unit, in the flattened (B T) positions of a micro-batch."""


def unit_moments(keys_NK: Tensor, feedback_NG: Tensor, spans: list[Span]) -> Tensor:
    """The moment of every unit, M_u = sum over t in u of keys_t (outer) feedback_t, as (U, K, G)."""
    moments_UKG = keys_NK.new_zeros(len(spans), keys_NK.shape[1], feedback_NG.shape[1])
    for moment_KG, (start, stop) in zip(moments_UKG, spans, strict=True):
        torch.mm(keys_NK[start:stop].T, feedback_NG[start:stop], out=moment_KG)
    return moments_UKG


def influence_scores(moments_UKG: Tensor, reference_KG: Tensor, own: float) -> Tensor:
    """S_u = <M_u, M - own M_u>; shape (U,), float64. `own` is how often the unit's own moment is in the reference and
    shall not count: 0 leaves it in.

    The one owner of the sign: **positive helps**. A step along the unit's own gradient then lowers the reference's
    loss. Eq. 4 carries a leading minus while the paper's text drops "negative influence"; we return the plus, so
    that the paper's rule (drop below 0) drops what opposes the reference. Units: squared activations, times the
    square of a probability; only comparisons within one micro-batch mean something.
    """
    # Summed in float64: own terms dwarf the others, and K G float32 products lose four digits on some devices.
    return torch.stack(
        [
            (moment_KG * (reference_KG - own * moment_KG if own else reference_KG)).sum(dtype=torch.float64)
            for moment_KG in moments_UKG
        ]
    )


def adam_factors(rows_O: Tensor, columns_D: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of a layer's output gradient and input that put <a b^T, a' b'^T> into the geometry of Adam's step.

    Adam divides a gradient by the root of its second moment v, so the consistent inner product is
    sum of g g' / sqrt(v). With v ~ r c^T / mean(v), r its row means and c its column means, it separates:
    b r^(-1/4) and a (c / mean)^(-1/4), on both sides. Rows and columns that were never used (v = 0) count as if they
    had a millionth of the mean, so no factor exceeds 32 times that of the mean. A v that is 0 everywhere scales by 1.
    """
    mean = rows_O.mean()
    if mean <= 0:
        return torch.ones_like(rows_O), torch.ones_like(columns_D)
    floor = _NEVER_USED * mean
    return rows_O.clamp(min=floor) ** -0.25, (columns_D.clamp(min=floor) / mean) ** -0.25


_NEVER_USED = 1e-6


Means = Mapping[str, tuple[Tensor, Tensor]]
"""Row means and column means, as torch stores it, of the second moment of every weight matrix, by its name."""


@dataclass(frozen=True)
class SecondMoments:
    """Adam's after some updates, bias-corrected: v / (1 - beta^updates)."""

    means: Means
    beta: float
    updates: int

    @property
    def newest(self) -> float:
        """Share of the coming update's squared gradient in its own second moment: (1 - b2) / (1 - b2^(updates + 1))."""
        return (1 - self.beta) / (1 - self.beta ** (self.updates + 1))


def saturation(squares_R: Tensor, row_scale_R: Tensor, columns: int, tokens: float, newest: float) -> Tensor:
    """What Adam's coming step leaves out of the own terms of single rows of a weight; shape (R,), 0 or more but for a
    few percent.

    Adam divides by the second moment *after* the update, v' = (1 - a) v + a g^2 with a = `newest`. For most weights
    that is v. But the row of a word that is hardly ever read has next to no v, and the sample that reads it makes its
    own g^2 most of v': however large its gradient, Adam's step there is bounded, and an own term of g^2 / sqrt(v) is
    not. With q = `squares_R` the squared norm of a row's gradient of summed losses in the geometry of `adam_factors`,
    s = `row_scale_R` = r^(-1/4) of it, and `tokens` to divide by before Adam sees it, the row's own term is to be

        q sqrt(r / r') = q (1 - a + a q s^2 / (columns tokens^2))^(-1/2) ,

    as if nobody else had a gradient there; returned is q less that. Ours. The reference `shapley_adam_limit` of
    pipeline.fidelity measures what it is worth.
    """
    grown_R = 1 - newest + newest * squares_R * row_scale_R**2 / (columns * tokens**2)
    return squares_R * (1 - grown_R.rsqrt())


def seed_of(seed: int, what: str) -> int:
    """A seed for `what` that depends on nothing but the run's and its name."""
    return zlib.crc32(f"{seed}/{what}".encode())


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
        dtype = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        if out_NW is None:
            out_NW = torch.zeros(len(x_ND), self.width, dtype=dtype, device=x_ND.device)
        signs_D = self._signs_D.to(dtype)
        if scale is not None:
            signs_D = signs_D * scale  # not x, which is read once like this
        first, bucket = 0, self._offset
        while first < len(signs_D):
            count = min(self.width - bucket, len(signs_D) - first)
            part = slice(first, first + count)
            out_NW[:, bucket : bucket + count].addcmul_(x_ND[:, part], signs_D[part])
            first, bucket = first + count, 0
        return out_NW

    def of(self, coordinates_N: Tensor) -> tuple[Tensor, Tensor]:
        """Bucket and sign of each coordinate: what the sketch makes of that basis vector."""
        return (coordinates_N + self._offset) % self.width, self._signs_D[coordinates_N]


def hashed(sketch: CountSketch | None, x_ND: Tensor, scale_D: Tensor | None) -> Tensor:
    """x times the scale through the sketch; without one, that itself; in float32 at least."""
    if sketch:
        return sketch(x_ND, scale=scale_D)
    x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    return x_ND if scale_D is None else x_ND * scale_D.to(x_ND.dtype)


class RunningMean:
    """An exponential mean over global micro-batches of each one's mean over its tokens, bias-corrected:

    m <- decay m + (1 - decay) (sum over tokens) / tokens, `mean_C` = m / (1 - decay^n). Sums are gathered by `add`,
    handed over for the ranks' sum by `take`, and come back to `update`: what is scored is scored with the means of the
    micro-batches before it.
    """

    def __init__(self, size: int, decay: float, device: torch.device) -> None:
        self.decay, self.updates = decay, 0
        self.raw_C = torch.zeros(size, device=device)
        self._sum_C = torch.zeros(size, device=device)

    @property
    def mean_C(self) -> Tensor | None:
        """None before the first update."""
        return self.raw_C / (1 - self.decay**self.updates) if self.updates else None

    def add(self, sum_C: Tensor) -> None:
        """Gather the sum over some tokens of this rank."""
        self._sum_C += sum_C

    def take(self) -> Tensor:
        """What was gathered since the last call."""
        sum_C, self._sum_C = self._sum_C, torch.zeros_like(self._sum_C)
        return sum_C

    def update(self, sum_C: Tensor, tokens: float) -> None:
        """Take in a global micro-batch. One without tokens, or whose sum is not finite, is none."""
        if tokens > 0 and sum_C.isfinite().all():
            self.load(self.raw_C * self.decay + sum_C * ((1 - self.decay) / tokens), self.updates + 1)

    def load(self, raw_C: Tensor, updates: int) -> None:
        """Go on from a saved `raw_C` after `updates` updates."""
        self.raw_C, self.updates = raw_C.to(self.raw_C.device), updates


class SquaredGradient(RunningMean):
    """D: the running mean, per logit coordinate, of squared logit gradients (Appendix E), and the scale made of it.

    The scale of each side is (D + eps^2)^-power. Power 1/2 is the paper's, which multiplies both sides by Adam's whole
    denominator; 1/4 on each side makes their product g g' / sqrt(v), Adam's own step. Before the first micro-batch the
    scale is 1: with the D of those before it, no softmax has to be formed twice.
    """

    EPS = 1e-8

    def __init__(self, vocabulary: int, decay: float, power: float, device: torch.device) -> None:
        super().__init__(vocabulary, decay, device)
        self.power = power

    @property
    def scale_V(self) -> Tensor | None:
        """None before the first update."""
        return None if self.mean_C is None else (self.mean_C + self.EPS**2).pow(-self.power)
