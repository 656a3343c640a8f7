import pytest
import torch
import torch.nn.functional as F

from pipeline.data.batch import IGNORE
from pipeline.tasks import causal_lm as loss_module
from pipeline.tasks.causal_lm import token_losses
from pipeline.tasks.weighted_mean import weighted_mean


@pytest.fixture
def logits_and_labels():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 7, 11, generator=generator)).requires_grad_()
    labels = torch.randint(0, 11, (2, 7), generator=generator)
    labels[:, -1] = IGNORE
    labels[0, 2] = IGNORE
    return logits, labels


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_token_losses_and_gradient_equal_autograd_through_cross_entropy(logits_and_labels, chunk_tokens, monkeypatch):
    logits, labels = logits_and_labels
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES_CPU", 4 * 11 * chunk_tokens)
    weights = torch.rand(2, 7, generator=torch.Generator().manual_seed(1))
    losses, gradients = token_losses(logits, labels, lambda gradient, _: gradient)
    (ours,) = torch.autograd.grad((losses * weights).sum(), logits)

    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE)
    (theirs,) = torch.autograd.grad((expected * weights.flatten()).sum(), logits, retain_graph=True)
    (unweighted,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(losses.flatten(), expected)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients, unweighted.flatten(0, 1))
    assert (gradients.view(2, 7, 11)[labels == IGNORE] == 0).all()


def test_visiting_the_gradient_changes_neither_loss_nor_backward(logits_and_labels):
    """Catches a visitor that overwrites what the loss is made of."""
    logits, labels = logits_and_labels
    plain, none = token_losses(logits, labels)
    visited, _ = token_losses(logits, labels, lambda gradient, _: gradient.mul_(7))
    assert none is None
    assert torch.equal(plain, visited)
    gradients = [torch.autograd.grad(losses.sum(), logits)[0] for losses in (plain, visited)]
    assert torch.equal(*gradients)


def test_bfloat16_logits_are_reduced_in_float32(logits_and_labels):
    logits, labels = logits_and_labels
    losses, _ = token_losses(logits.bfloat16(), labels)
    assert losses.dtype == torch.float32
    expected, _ = token_losses(logits.bfloat16().float(), labels)
    assert torch.equal(losses, expected)


def test_dropped_tokens_are_not_in_the_denominator():
    losses, weights = torch.tensor([1.0, 2.0, 30.0]), torch.tensor([1.0, 1.0, 0.0])
    assert weighted_mean(losses, weights, denominator=2, world_size=1) == 1.5


def test_a_micro_batch_without_kept_tokens_gives_a_zero_loss_with_a_graph():
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = weighted_mean(losses, torch.zeros(2), denominator=0, world_size=2)
    loss.backward()
    assert loss == 0
    assert torch.equal(losses.grad, torch.zeros(2))
