"""The keys of pipeline.benchmark, beside the run's."""

from dataclasses import dataclass

from pipeline.config.rules import at_least_one, fractions, of_causal_lm_alone, positive
from pipeline.config.schema import Config


@dataclass(frozen=True)
class BenchmarkConfig:
    pairs: int = 20
    """Plain steps that are measured, and scored steps of each estimator beside them."""
    warmup: int = 3
    """Steps of each kind before those, left out."""
    estimators: list[str] | None = None
    """What is measured, against the same plain steps: `ESTIMATOR` or `ESTIMATOR/PRECONDITION`, as in
    `lai,ghost/adam_state`; `ghost_exact` is ghost as others compute it, `bare` a loop of DeepSpeed's and
    torch's own parts, to see what our plain step costs. The first one's figures stand at the top of
    benchmark.json. Default: `influence.estimator` with `influence.precondition`."""
    peak_tflops: float | None = None
    """What the device can do at most in the precision of training, in 10^12 floating-point operations a second, for
    the model FLOPs utilization. Default: not known; `--plan` then takes 989 (an H100's bf16), in fp32 `fp32_tflops`."""
    ranks: int = 8
    """--plan: ranks to count for."""
    fp32_tflops: float = 67.0
    """--plan: what the device can do at most in float32, in which scoring multiplies whatever the precision of
    training, in 10^12 operations a second. This and the next two defaults: an H100's data sheet, 400 Gbit/s a GPU."""
    memory_gb_per_second: float = 3350.0
    """--plan: memory bandwidth of the device, in 10^9 bytes a second."""
    network_gb_per_second: float = 50.0
    """--plan: what a rank can send, in 10^9 bytes a second."""
    utilization: float = 0.5
    """--plan: fraction of these peaks that is reached, 0 to 1."""

    def __post_init__(self) -> None:
        at_least_one({f"benchmark.{name}": getattr(self, name) for name in ("pairs", "warmup", "ranks")})
        fractions({"benchmark.utilization": self.utilization})
        speeds = ("peak_tflops", "fp32_tflops", "memory_gb_per_second", "network_gb_per_second", "utilization")
        positive({f"benchmark.{name}": getattr(self, name) for name in speeds})


@dataclass(frozen=True)
class BenchmarkRun(Config):
    """A run, and what is measured of its cost."""

    benchmark: BenchmarkConfig = BenchmarkConfig()
    """What pipeline.benchmark measures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        of_causal_lm_alone(self.task.kind, "pipeline.benchmark")
