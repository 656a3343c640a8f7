"""What ptxas makes of the kernels for an H100 (sm_90), which needs no card. In a process of its own: elsewhere in these
tests Triton interprets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, sys, tempfile, subprocess
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.kernels import losses, sketch

BUCKETS, VOCABULARY = 2048, 50257
rows = max(1, losses.HELD // BUCKETS)
LOSSES = {
    "logits": "*bf16", "stride": "i32", "labels": "*i64", "signs": "*fp32", "scale": "*fp32", "lse": "*fp32",
    "losses": "*fp32", "sketch": "*fp32", "rows": "i32", "vocabulary": "i32", "width": "i32", "offset": "i32",
    "ignore": "i32",
}
KERNELS = {
    "sketch": (sketch.add_sketch_kernel, 4, {
        "x": "*bf16", "x_stride": "i32", "signs": "*fp32", "scale": "*fp32", "out": "*fp32", "times": "fp32",
        "rows": "i32", "dim": "i32", "width": "i32", "offset": "i32",
    }, dict(TURNS=3, SCALED=True, ADDED=True, ROWS=sketch.ROWS, BUCKETS=sketch.BUCKETS)),
    "losses": (losses.losses_kernel, 8, LOSSES, dict(
        TURNS=-(-VOCABULARY // BUCKETS), SKETCHED=True, SCALED=True, ROWS=rows, BUCKETS=BUCKETS,
    )),
    "losses alone": (losses.losses_kernel, 8, LOSSES, dict(
        TURNS=-(-VOCABULARY // losses.BLOCK), SKETCHED=False, SCALED=False, ROWS=1, BUCKETS=losses.BLOCK,
    )),
    "gradient": (losses.gradient_kernel, 8, {
        "logits": "*bf16", "stride": "i32", "labels": "*i64", "lse": "*fp32", "factors": "*fp32", "vocabulary": "i32",
        "ignore": "i32",
    }, dict(BLOCK=losses.BLOCK)),
}
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
said = {}
for name, (kernel, warps, signature, constants) in KERNELS.items():
    signature = signature | {key: "constexpr" for key in constants}
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said[name] = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def usage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Registers a thread, bytes of stack and of local memory, by kernel."""
    script = tmp_path_factory.mktemp("compiled") / "compiled.py"
    script.write_text(COMPILE)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {
        name: {what.lower(): int(number) for what, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        for name, text in json.loads(done.stdout.splitlines()[-1]).items()
    }


# Two programs of 256 threads share a multiprocessor's 65,536 registers up to 128 each. `losses` holds four rows of
# buckets, fills that, and puts 6 registers aside: half the rows would spill nothing and read the signs twice as often.
@pytest.mark.parametrize(("kernel", "aside"), [("sketch", 0), ("losses", 32), ("losses alone", 0), ("gradient", 0)])
def test_a_kernel_spills_next_to_nothing_and_leaves_room_for_a_second_program(usage, kernel, aside):
    assert usage[kernel]["stack"] + usage[kernel]["local"] <= aside, f"registers spilled to memory: {usage}"
    assert usage[kernel]["reg"] <= 128, usage
