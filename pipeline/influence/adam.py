"""The geometry of Adam's step: factors of inputs and output gradients, and saturation. Pure tensors."""

import torch
from torch import Tensor


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


def saturation(squares_R: Tensor, row_scale_R: Tensor, columns: int, tokens: float, newest: float) -> Tensor:
    """What Adam's coming step leaves out of the self-influences of single rows of a weight; shape (R,), 0 or more but
    for a few percent.

    Adam divides by the second moment *after* the update, v' = (1 - a) v + a g^2 with a = `newest`. For most weights
    that is v. But the row of a word that is hardly ever read has next to no v, and the sample that reads it makes its
    own g^2 most of v': however large its gradient, Adam's step there is bounded, and a self-influence of g^2 / sqrt(v)
    is not. With q = `squares_R` the squared norm of a row's gradient of summed losses in the geometry of
    `adam_factors`, s = `row_scale_R` = r^(-1/4) of it, and `tokens` to divide by before Adam sees it, the row's
    self-influence is to be

        q sqrt(r / r') = q (1 - a + a q s^2 / (columns tokens^2))^(-1/2) ,

    as if nobody else had a gradient there; returned is q less that. Ours. The reference `shapley_adam_limit` of
    pipeline.fidelity measures what it is worth.
    """
    grown_R = 1 - newest + newest * squares_R * row_scale_R**2 / (columns * tokens**2)
    return squares_R * (1 - grown_R.rsqrt())
