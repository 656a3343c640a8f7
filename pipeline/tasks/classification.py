"""Logits of whole texts -> their losses and analytic gradients. Pure tensors, no ranks."""

from torch import Tensor

from pipeline.data.batch import IGNORE
from pipeline.tasks.causal_lm import Visitor, token_losses


def answer_losses(logits_BC: Tensor, labels_BT: Tensor, visit: Visitor | None = None) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of every text, in nats, and what `visit` makes of its gradient with respect to the logits, each at
    the labelled position of the text and 0 at the others; at most one position of a text has a label.

    loss_b = logsumexp(logits_b) - logits_b[label_b], g_b = softmax(logits_b) - onehot(label_b): those of `token_losses`
    for texts of one token. Returns (losses_BT, feedback_NG) as it does.
    """
    labelled_BT = labels_BT != IGNORE
    losses_B1, feedback_BG = token_losses(logits_BC[:, None], labels_BT.amax(1, keepdim=True), visit)
    losses_BT = losses_B1.expand_as(labelled_BT).where(labelled_BT, 0.0)
    if feedback_BG is None:
        return losses_BT, None
    feedback_BTG = feedback_BG[:, None].expand(-1, labels_BT.shape[1], -1)
    return losses_BT, feedback_BTG.where(labelled_BT[..., None], 0.0).flatten(0, 1)


def losses_of(logits: Tensor, labels_BT: Tensor, visit: Visitor | None = None) -> tuple[Tensor, Tensor | None]:
    """`token_losses` of logits of every position, (B, T, V), `answer_losses` of those of whole texts, (B, C)."""
    return (token_losses if logits.dim() == 3 else answer_losses)(logits, labels_BT, visit)
