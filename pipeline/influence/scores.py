"""Layer-aware influence: gradient sketches and scores. Pure tensors: no ranks, no model, no DeepSpeed.

For token t with layer inputs h_t (all layers', concatenated) and logit gradient g_t, the influence of unit u on the
loss of a reference is, from Eq. 4 of arXiv 2510.16007 with the sum over tokens that the paper leaves silent,

    S_u = sum over z in reference, t in u, t' in z of (h_t . h_t') (g_t . g_t')  =  <M_u, M>
    M_u = sum over t in u of h_t (outer) g_t ,   M = sum over z in reference of M_z

because the sum over token pairs of a product of two inner products is the inner product of two sums of outer
products: linear in tokens, no token-pair matrix, and one (K, G) matrix to sum over ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.data.batch import Span


def unit_sketches(inputs_NK: Tensor, feedback_NG: Tensor, spans: Sequence[Span]) -> Tensor:
    """The gradient sketch of every unit, M_u = sum over t in u of inputs_t (outer) feedback_t, as (U, K, G)."""
    alike = _of_one_length(spans)
    if alike:  # one product
        inputs_nK, feedback_nG = inputs_NK[: alike * len(spans)], feedback_NG[: alike * len(spans)]
        return inputs_nK.unflatten(0, (-1, alike)).mT @ feedback_nG.unflatten(0, (-1, alike))
    sketches_UKG = inputs_NK.new_zeros(len(spans), inputs_NK.shape[1], feedback_NG.shape[1])
    for sketch_KG, (start, stop) in zip(sketches_UKG, spans, strict=True):
        torch.mm(inputs_NK[start:stop].T, feedback_NG[start:stop], out=sketch_KG)
    return sketches_UKG


def text_sketches(inputs_NK: Tensor, feedback_NG: Tensor, attended_BT: Tensor) -> Tensor:
    """The gradient sketch of every text of a classifier, as (B, K, G): one logit gradient g serves all its positions,
    so Eq. 4's sum over token pairs is M_b = (sum over unpadded t of inputs_t) (outer) g_b. `feedback_NG` has g at one
    position of each text."""
    inputs_BTK, feedback_BTG = (rows.unflatten(0, attended_BT.shape) for rows in (inputs_NK, feedback_NG))
    summed_BK = inputs_BTK.where(attended_BT[..., None], 0.0).sum(1)
    return summed_BK[:, :, None] * feedback_BTG.sum(1)[:, None, :]


def _of_one_length(spans: Sequence[Span]) -> int:
    """The length of spans that follow one another and are all as long; 0 where they are not so."""
    length = spans[0][1] if spans else 0
    return (
        length
        if list(spans) == [(start, start + length) for start in range(0, length * len(spans), length or 1)]
        else 0
    )


def influence_scores(sketches_UM: Tensor, reference_M: Tensor, own: float) -> Tensor:
    """S_u = <M_u, M - own M_u>; shape (U,), float64. `own` is how often the unit's own sketch is in the reference and
    shall not count: 0 leaves it in.

    The one owner of the sign: **positive helps**. A step along the unit's own gradient then lowers the reference's
    loss. Eq. 4 carries a leading minus while the paper's text drops "negative influence"; we return the plus, so
    that the paper's rule (drop below 0) drops what opposes the reference. Units: squared activations, times the
    square of a probability; only comparisons within one micro-batch mean something.
    """
    # Summed in float64: self-influence dwarfs the rest, and K G float32 products lose four digits on some devices.
    return torch.stack(
        [
            (sketch_M * (reference_M - own * sketch_M if own else reference_M)).sum(dtype=torch.float64)
            for sketch_M in sketches_UM
        ]
    )
