"""The figures of pipeline.benchmark on one screen."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.cost.measure import PLAIN
from pipeline.cost.work import PHASES


def print_tables(found: dict[str, Any]) -> None:
    """The figures on one screen."""
    setting, plain = found["setting"], found["plain"]
    title = (
        f"{setting['model']}: {setting['parameters'] / 1e6:.1f} M parameters, {setting['ranks']} ranks x "
        f"{setting['micro_batch']} x {setting['sequence_length']:,} tokens, ZeRO {setting['zero_stage']}, "
        f"{setting['precision']}, {setting['device']}, {found['pairs']} pairs"
    )
    every = {PLAIN: plain, **found["estimators"]}
    times = _table(title, ("step s", "ratio", "quartiles", "CPU time ratio", "tokens/s"))
    costs = _table(
        "memory, operations (GFLOP; elements of other operators), scoring's bytes on the wire per micro-batch",
        ("peak GB", "ratio", "GFLOP", "ratio", "other ratio", "launches", "MB"),
    )
    parts = _table("seconds a step by part of scoring (rank 0, mean), the longest first", ())
    parts.add_column("")
    for name, row in every.items():
        seconds, rate = f"{row['step_seconds_median']:.3f}", f"{row['tokens_per_second']:.0f}"
        memory, flops = f"{row['peak_memory_bytes'] / 1e9:.3f}", f"{sum(row['gflop'].values()):.1f}"
        launches = f"{sum(row['launches'].values()):,}"
        if name == PLAIN:
            times.add_row(name, seconds, "", "", "", rate)
            costs.add_row(name, memory, "", flops, "", "", launches)
        else:
            low, high = row["step_time_ratio_quartiles"]
            ratio, cpu = f"{row['step_time_ratio_median']:.3f}", f"{row['cpu_time_ratio_median']:.3f}"
            times.add_row(name, seconds, ratio, f"{low:.3f}-{high:.3f}", cpu, rate)
            ratios = [f"{row[key]:.3f}" for key in ("peak_memory_ratio", "scoring_flop_ratio", "scoring_other_ratio")]
            wire = f"{row['bytes_per_micro_batch'] / 1e6:.2f}"
            costs.add_row(name, memory, ratios[0], flops, *ratios[1:], launches, wire)
        longest = sorted(row["seconds_by_part"].items(), key=lambda part: -part[1])
        parts.add_row(name, ", ".join(f"{part} {value:.3f}" for part, value in longest))
    console = Console()
    for shown in (times, costs, parts):
        console.print(shown)
    phases = ", ".join(f"{phase} {plain['gflop'][phase]:.1f}" for phase in PHASES)
    console.print(f"GFLOP of a plain step and rank: {phases}", highlight=False)
    if plain["model_flops_utilization"] is not None:
        console.print(f"model FLOPs utilization, plain: {plain['model_flops_utilization']:.1%}", highlight=False)


def print_plan(found: dict[str, Any]) -> None:
    """The figures of `plan` on one screen, with what they assume."""
    setting, plain, lasting = found["setting"], found["plain"], found["states_bytes"]
    sizes = _table("", (*lasting, "buffers, at most"))
    places = [" (host)" if what in found["on_host"] else "" for what in lasting]
    gigabytes = [f"{size / 1e9:,.3f}" for size in (*lasting.values(), found["buffer_bytes"])]
    sizes.add_row("", *map("".join, zip(gigabytes, (*places, ""), strict=True)))
    costs = _table("", ("kept", "peak", "ratio", "TFLOP", "ratio", "other ratio", "MB"))
    times = _table("", ("products", "other", "update", "wire", "step", "ratio", "launches"))
    for name, row in {PLAIN: plain, **found["estimators"]}.items():
        memory = [f"{row[key] / 1e9:,.3f}" for key in ("activation_bytes", "peak_memory_bytes")]
        flops, launches = f"{sum(row['gflop'].values()) / 1e3:,.3f}", f"{sum(row['launches'].values()):,}"
        seconds = row["seconds"] if name == PLAIN else row["scoring_seconds"]
        parts = [
            f"{seconds[key] * 1e3:,.3f}" if key in seconds else "" for key in ("products", "other", "update", "wire")
        ]
        if name == PLAIN:
            costs.add_row(name, *memory, "", flops)
            times.add_row(name, *parts, f"{row['step_seconds'] * 1e3:,.3f}", "", launches)
        else:
            ratios = [f"{row['peak_memory_ratio']:.3f}", flops, f"{row['scoring_flop_ratio']:.6f}"]
            wire = f"{row['bytes_per_micro_batch'] / 1e6:.2f}"
            costs.add_row(name, *memory, *ratios, f"{row['scoring_other_ratio']:.3f}", wire)
            added = f"{sum(seconds.values()) * 1e3:,.3f}"
            times.add_row(name, *parts, added, f"{row['step_time_ratio']:.4f}", launches)
    console = Console(highlight=False)
    console.print(
        f"{setting['model']}: {setting['parameters'] / 1e6:,.1f} M parameters, {setting['ranks']} ranks x "
        f"{setting['gradient_accumulation_steps']} x {setting['micro_batch']} x {setting['sequence_length']:,} tokens, "
        f"ZeRO {setting['zero_stage']}, {setting['precision']}"
        + (", activation checkpointing" if setting["activation_checkpointing"] else "")
    )
    for heading, shown in (
        ("GB a rank that last from step to step", sizes),
        (
            "GB a rank, kept for the backward and at the peak of all; operations a step\n"
            "(other: elements of what is no matrix product); scoring's MB on the wire",
            costs,
        ),
        (
            "predicted milliseconds a step: of plain steps, and what scoring adds; operators that a\n"
            "step launches without kernels of ours",
            times,
        ),
    ):
        console.print(f"\n{heading}", shown, sep="\n", end="")
    handed = ", ".join(f"{kind} {size / 1e9:,.3f} GB" for kind, size in plain["wire_bytes"].items())
    speeds = found["speeds"]
    console.print(f"\na rank hands over in a plain step: {handed or 'nothing'}")
    console.print(
        f"at {speeds['low'] / 1e12:,.1f} TFLOP/s in 16 bits, {speeds['full'] / 1e12:,.1f} in float32, "
        f"{speeds['memory'] / 1e9:,.0f} GB/s of memory, {speeds['network'] / 1e9:,.0f} GB/s a rank on the wire",
        *found["assumptions"],
        sep="\n- ",
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    # Narrow enough for 80 characters: headers break between words, names and numbers do not.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    return table
