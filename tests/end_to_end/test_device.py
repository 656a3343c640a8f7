"""The same figures on the accelerator as on the CPU; without an accelerator the CPU is compared with itself."""

import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.config.schema_influence import InfluenceConfig, SketchConfig
from pipeline.config.timing import Stopwatch
from pipeline.cost.memory import PeakMemory
from pipeline.cost.random_tokens import RandomTokens
from pipeline.cost.work import Work
from pipeline.influence.micro_batch import MicroBatch, forward_logits
from pipeline.influence.table import scorer_of
from pipeline.kernels.available import usable
from pipeline.models.load import DrawnOnCpu
from tests.tiny_models import VOCABULARY, tiny

CPU = torch.device("cpu")
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else CPU


class Watching:
    """A tiny model on a device, and what scores its micro-batches."""

    def __init__(self, name: str, device: torch.device, sketched: bool, dtype: torch.dtype) -> None:
        self.model, self.timed = tiny("gpt_neo").train().to(device, dtype), Stopwatch(device)
        config = InfluenceConfig(estimator=name, sketch=SketchConfig(8, 32, 8) if sketched else "none")
        self.scorer = scorer_of(config, self.model, 3, device, self.timed, lambda tensor: tensor)
        self.batch = RandomTokens(VOCABULARY, 16, 0).batch_at([0, 1, 2, 3], device)

    def scores(self) -> Tensor:
        """Of one micro-batch, on the device."""
        watched = MicroBatch(self.scorer, self.batch, self.timed)
        losses_BT = watched.forward(self.model)
        watched.before_backward(float(losses_BT.numel()))
        losses_BT.sum().backward()
        watched.add()
        [found] = self.scorer.scores()
        return found.scores_U


def scored(name: str, device: torch.device, sketched: bool, dtype: torch.dtype) -> tuple[Tensor, Work, set[str]]:
    """Scores, what they took, and the timed parts."""
    watching = Watching(name, device, sketched, dtype)
    with Work(watching.model) as work:
        found = watching.scores().cpu()
    return found, work, set(watching.timed.read())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("sketched", [True, False])
@pytest.mark.parametrize("name", ["lai", "lli", "residual", "ghost"])
def test_scores_and_their_cost_are_those_of_the_cpu(name, sketched, dtype, tolerance):
    expected, work, parts = scored(name, CPU, sketched, torch.float32)
    found, own_work, own_parts = scored(name, DEVICE, sketched, dtype)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert own_parts == parts - ({"logit gradient"} if in_one_kernel(name, sketched) else set())
    assert own_work.flops == work.flops, "other kernels, the same products"


def in_one_kernel(name: str, sketched: bool) -> bool:
    """Whether the logit gradient's sketch is made with the losses, so that it has no time of its own."""
    return usable(torch.zeros(1, device=DEVICE)) and sketched and name != "residual"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tells of CUDA's waits only")
@pytest.mark.parametrize("name", ["lai", "lli", "residual", "ghost"])
def test_scoring_never_waits_for_the_device(name):
    """Catches a number that is read on the CPU between forward and scores. The model itself waits, in its masks."""
    watching = Watching(name, DEVICE, True, torch.bfloat16)
    watching.scores()  # the first looks at how the model makes its logits
    assert waits(watching.scores) == waits(lambda: forward_logits(watching.model, watching.batch))


def waits(work: Callable[[], object]) -> Counter[tuple[str, int]]:
    """The lines that wait for the device, and how often each does."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter((one.filename, one.lineno) for one in caught if "synchronizing" in str(one.message))


def test_random_weights_of_any_device_are_those_of_the_cpu():
    """Catches ZeRO-3, which makes weights on the accelerator, beginning at other weights than ZeRO-1."""
    drawn = []
    for device in (CPU, DEVICE):
        torch.manual_seed(3)
        with DrawnOnCpu():
            values = [torch.empty(3, 5, device=device).normal_(0, 0.02), torch.empty(4, device=device).uniform_(-1, 1)]
        assert values[0].device.type == device.type
        drawn.append(torch.cat([value.flatten().cpu() for value in values]))
    torch.manual_seed(3)
    plain = torch.cat([torch.empty(3, 5).normal_(0, 0.02).flatten(), torch.empty(4).uniform_(-1, 1)])
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] == plain).all()


def test_peak_memory_of_a_step_that_came_and_went():
    size = 200 * 2**20
    peaks = []
    for numbers in (1, size):
        with PeakMemory(DEVICE) as memory:
            torch.ones(numbers, dtype=torch.uint8, device=DEVICE)
        peaks.append(memory.peak)
    assert 0.9 * size < peaks[1] - peaks[0] < 1.1 * size
