"""A launcher's environment that is not whole is refused: every process would train on its own."""

import pytest

from pipeline.config.launcher import MPI_RANKS, MPI_WORLDS, check_environment, expected_world

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in (*NAMES, *MPI_RANKS, *MPI_WORLDS):
        monkeypatch.delenv(name, raising=False)


WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "message", "remedies"),
    [
        (
            {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"},
            "LOCAL_RANK is not set, so this process would train alone. Export LOCAL_RANK",
            [{"LOCAL_RANK": "0"}],
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
            "MASTER_ADDR is not set, .* Export the name of rank 0's host",
            [{"MASTER_ADDR": "a"}],
        ),
        ({"RANK": "0"}, "WORLD_SIZE is not set: export how many", [{"WORLD_SIZE": "1"}]),
        (
            {"WORLD_SIZE": "4"},
            "RANK is not set, so this process would train alone. Export RANK, .* or unset WORLD_SIZE",
            [WHOLE, {"WORLD_SIZE": ""}],
        ),
        (
            {"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a"},
            "ranks count from 0 to 3",
            [{"RANK": "3"}],
        ),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK='one', which is no whole number; export the right one", [WHOLE]),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "4"},
            "WORLD_SIZE=4 and OMPI_COMM.*: unset what an earlier launcher left",
            [{"WORLD_SIZE": ""}],
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "WORLD_SIZE": "4"},
            "WORLD_SIZE=4 and SLURM_STEP.*: unset what an earlier launcher left",
            [{"WORLD_SIZE": ""}],
        ),
    ],
)
def test_half_an_environment_is_refused_before_anybody_waits_and_each_remedy_makes_it_whole(
    monkeypatch, environment, message, remedies
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_environment()
    for remedy in remedies:
        with monkeypatch.context() as mended:
            for name, value in remedy.items():
                mended.setenv(name, value) if value else mended.delenv(name)
            check_environment()


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 4),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, 2),
    ],
)
def test_whole_environments_are_accepted(monkeypatch, environment, world):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_environment()
    assert expected_world() == world
