"""Every kernel beside the plain form that it stands in for: on the GPU where there is one, else interpreted."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.data.batch import IGNORE
from pipeline.influence.sketch import CountSketch
from pipeline.tasks import causal_lm
from pipeline.tasks.causal_lm import token_losses

pytest.importorskip("triton", reason="Triton is a part of Linux builds of torch only")

from pipeline.kernels import losses, sketch  # import Triton

CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "dim", "width"), [(5, 700, 64), (9, 64, 64), (1, 10, 300), (17, 1000, 300), (8, 513, 512)]
)
def test_sketch_of_rows_is_the_plain_one(rows, dim, width, dtype):
    """Catches a turn through the buckets that is left out, and a width or a number of rows that fills no program."""
    x, scale = random(rows, dim).to(dtype), random(dim, seed=1).abs()
    plain, made = (CountSketch(dim, width, 7, device) for device in (CPU, DEVICE))
    for scale_D, times, out in ((None, 1.0, None), (scale, 1.7, random(rows, width, seed=2)), (None, 1.7, None)):
        own = None if out is None else out.clone().to(DEVICE)
        found = sketch.add_sketch(
            x.to(DEVICE), made.hashing(None if scale_D is None else scale_D.to(DEVICE)), times, own
        )
        factor = times if scale_D is None else times * scale_D
        expected = plain(x.float(), None if out is None else out.clone(), factor)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
        assert own is None or found is own


def test_sketch_of_rows_that_are_not_next_to_each_other():
    """Catches a stride that is taken for the width."""
    made, x = CountSketch(20, 8, 7, DEVICE), random(6, 40).to(DEVICE)
    for part in (x[:, 10:30], x[::2, :20], random(20, 6).to(DEVICE).T):
        found = sketch.add_sketch(part, made.hashing())
        torch.testing.assert_close(found.cpu(), CountSketch(20, 8, 7, CPU)(part.cpu()), rtol=1e-5, atol=1e-5)


@pytest.fixture
def fused(monkeypatch):
    """Kernels chosen on the CPU too."""
    monkeypatch.setattr(causal_lm, "usable", lambda tensor: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("vocabulary", "width"), [(97, 16), (300, 300), (1000, 96), (50, 200), (5000, 8192)])
def test_losses_gradient_and_sketch_are_those_of_autograd(vocabulary, width, scaled, dtype, fused):
    """Catches a sum that is not brought to the largest logit, a label's own part left out, and rows without a label."""
    logits = (4 * random(2, 3, vocabulary)).to(dtype)
    logits[0, 1] += 200.0  # a largest logit that comes late, and sums that would overflow
    logits[1, 0, : vocabulary // 2] = float("-inf")
    labels = torch.randint(vocabulary // 2, vocabulary, (2, 3), generator=torch.Generator().manual_seed(3))
    labels[1, 1] = IGNORE
    scale = random(vocabulary, seed=5).abs() if scaled else None
    factors = random(2, 3, seed=4)

    reference = logits.float().requires_grad_()
    expected = F.cross_entropy(reference.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE)
    (unweighted,) = torch.autograd.grad(expected.sum(), reference, retain_graph=True)
    (weighted,) = torch.autograd.grad((expected * factors.flatten()).sum(), reference)
    plain = CountSketch(vocabulary, width, 7, CPU)
    made = CountSketch(vocabulary, width, 7, DEVICE)

    leaf = logits.to(DEVICE).requires_grad_()
    visitor = causal_lm.SketchVisitor(fail, made.hashing(None if scale is None else scale.to(DEVICE)))
    found, found_sketch = token_losses(leaf * 1, labels.to(DEVICE), visitor)
    without, nothing = token_losses(leaf * 1, labels.to(DEVICE))
    assert nothing is None
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for made_losses in (found, without):
        torch.testing.assert_close(made_losses.flatten().cpu(), expected.detach(), rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad((made_losses * factors.to(DEVICE)).sum(), leaf, retain_graph=True)
        torch.testing.assert_close(gradient.float().cpu(), weighted, **tolerance)
    expected_sketch = plain(unweighted.flatten(0, 1), None, scale)
    torch.testing.assert_close(found_sketch.cpu(), expected_sketch, rtol=1e-4, atol=1e-5)
    assert (found_sketch[4] == 0).all()


def fail(*_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the gradients were made whole")


def test_a_second_backward_through_logits_that_are_gone_raises(fused):
    """Catches the gradient of a gradient taken for one of logits."""
    leaf = random(1, 4, 9).to(DEVICE).requires_grad_()
    found, _ = token_losses(leaf * 1, torch.zeros(1, 4, dtype=torch.long, device=DEVICE))
    found.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_an_operation_that_kept_the_logits_for_its_own_backward_raises(fused):
    """Catches a tanh before the loss whose gradient would be wrong without a word."""
    leaf = random(1, 4, 9).to(DEVICE).requires_grad_()
    found, _ = token_losses(leaf.tanh(), torch.zeros(1, 4, dtype=torch.long, device=DEVICE))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_logits_that_are_not_finite_give_losses_that_are_not(fused):
    """Catches a broken model whose loss looks whole."""
    logits = random(3, 9)
    logits[0, 4], logits[1, 2] = float("nan"), float("inf")
    found = losses.losses_and_sketch(logits.to(DEVICE), torch.zeros(3, dtype=torch.long, device=DEVICE), IGNORE, None)[
        0
    ]
    assert found.isfinite().tolist() == [False, False, True]
