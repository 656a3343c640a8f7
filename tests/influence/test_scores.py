import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.influence import sketch
from pipeline.influence.scores import influence_scores, unit_sketches
from pipeline.influence.sketch import CountSketch, hashed
from tests.reference.influence import quadruple_loop


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 4),
    tokens=st.integers(1, 4),
    widths=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    vocabulary=st.integers(2, 5),
    include_self=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sketch_form_equals_the_quadruple_loop_of_eq_4(samples, tokens, widths, vocabulary, include_self, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(samples, tokens, d, generator=generator, dtype=torch.float64) for d in widths]
    gradients = torch.randn(samples, tokens, vocabulary, generator=generator, dtype=torch.float64)
    spans = [(j * tokens, (j + 1) * tokens) for j in range(samples)]
    sketches = unit_sketches(torch.cat(inputs, dim=2).flatten(0, 1), gradients.flatten(0, 1), spans)
    scores = influence_scores(sketches, sketches.sum(0), own=0.0 if include_self else 1.0)
    expected = quadruple_loop(inputs, gradients, include_self)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_positive_helps_a_step_along_the_unit_lowers_the_reference_loss():
    """Catches the minus of Eq. 4: one linear layer, where a unit's gradient is its sketch."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (6,), generator=generator)

    def losses(w):
        return torch.nn.functional.cross_entropy(x @ w.T, labels, reduction="none")

    gradients = ((x @ weight.T).softmax(1) - torch.nn.functional.one_hot(labels, 5)).detach()
    sketches = unit_sketches(x, gradients, [(i, i + 1) for i in range(6)])
    scores = influence_scores(sketches, sketches.sum(0), own=0.0)
    for i in range(6):
        (gradient,) = torch.autograd.grad(losses(weight)[i], weight)
        fall = (losses(weight).sum() - losses(weight - 1e-6 * gradient).sum()) / 1e-6
        assert scores[i].item() == pytest.approx(fall.item(), rel=1e-3)
    assert (scores > 0).any()
    assert (scores < 0).any()


def test_sketched_inner_product_is_unbiased_and_its_error_is_the_stated_one():
    """Catches missing signs (biased) and a hash that ignores the width."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 300, generator=generator)
    exact = float(x[0] @ x[1])
    for width in (16, 64):
        estimates = []
        for seed in range(2000):
            y = CountSketch(300, width, seed, torch.device("cpu"))(x)
            estimates.append(float(y[0] @ y[1]))
        estimates = torch.tensor(estimates, dtype=torch.float64)
        square, product = x.double().square(), (x[0] * x[1]).double()
        cross = square[0].sum() * square[1].sum() - (square[0] * square[1]).sum()
        cross += product.sum() ** 2 - product.square().sum()
        buckets = -(-300 // width)
        variance = float(cross) * (buckets - 1) / 299
        assert abs(estimates.mean() - exact) < 4 * (variance / len(estimates)) ** 0.5
        # Width 16 and 64 leave slots empty, so the stated variance (full buckets) is a slight overestimate.
        assert 0.75 * variance < estimates.var() < 1.15 * variance


def test_sketch_as_wide_as_its_input_is_exact():
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    y = CountSketch(10, 16, 3, torch.device("cpu"))(x)
    torch.testing.assert_close(y @ y.T, x @ x.T)


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_on_the_way_is_one_before(width, dtype):
    """Catches a scale by bucket instead of by coordinate, one taken in low precision, and one that stays."""
    generator = torch.Generator().manual_seed(2)
    x, scale = torch.randn(5, 8, generator=generator).to(dtype), torch.rand(8, generator=generator) * 10
    made = CountSketch(8, width, 7, torch.device("cpu"))
    expected = made(x.float() * scale)
    torch.testing.assert_close(hashed(made, x, scale), expected)
    torch.testing.assert_close(hashed(None, x, scale), x.float() * scale)
    torch.testing.assert_close(made(x, torch.ones(5, width), scale * 2), 1 + 2 * expected)
    torch.testing.assert_close(hashed(made, x, None), made(x.float()))


def test_sketch_does_not_advance_the_models_generator():
    state = torch.get_rng_state()
    CountSketch(100, 10, 0, torch.device("cpu"))(torch.zeros(3, 100))
    assert torch.equal(state, torch.get_rng_state())


@settings(deadline=None)
@given(
    rows=st.integers(0, 3),
    dim=st.integers(1, 60),
    width=st.integers(1, 9),
    seed=st.integers(0, 9),
    at_once=st.sampled_from([1, 90, 2**24]),
)
def test_sketch_is_the_sum_over_coordinates_in_whatever_portions_it_is_added_up(rows, dim, width, seed, at_once):
    """Catches a turn through the buckets that is left out, taken twice or put elsewhere where the width does not
    divide, in the form of CPUs and in that of accelerators."""
    device = torch.device("cpu")
    x, scale = torch.randn(rows, dim, dtype=torch.float64), torch.randn(dim, dtype=torch.float64)
    made = CountSketch(dim, width, seed, device)
    expected = torch.ones(rows, width, dtype=torch.float64)
    for i, (bucket, sign) in enumerate(zip(*made.of(torch.arange(dim)), strict=True)):
        expected[:, bucket] += sign * x[:, i] * scale[i]
    before, sketch._AT_ONCE_CPU = sketch._AT_ONCE_CPU, at_once
    try:
        found = made(x, torch.ones(rows, width, dtype=torch.float64), scale)
    finally:
        sketch._AT_ONCE_CPU = before
    torch.testing.assert_close(found, expected)


class Launches(TorchDispatchMode):
    """How many kernels an accelerator would have to launch: calls that are no views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("rows", "dim", "width", "most"),
    [(333, 50257, 2048, 5), (1024, 3072, 512, 7), (1024, 3072, 128, 5), (1024, 8192, 512, 5), (1024, 8192, 128, 5)],
)
def test_sketch_takes_few_kernels_on_an_accelerator(rows, dim, width, most):
    """Catches a kernel for every turn through the buckets, up to 65 of them."""
    meta = torch.device("meta")
    made, x, out = CountSketch(dim, width, 3, meta), *(torch.empty(rows, n, device=meta) for n in (dim, width))
    with Launches() as launches:
        made(x, out)
    assert launches.count <= most
