"""A launcher's environment that is not whole is refused: every process would train on its own."""

import pytest

from pipeline.config.launcher import MPI_RANKS, MPI_WORLDS, check_environment, expected_world

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in (*NAMES, *MPI_RANKS, *MPI_WORLDS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, "LOCAL_RANK is not set, so this process would train"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "MASTER_ADDR is not set"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "RANK is not set, so this process would train alone"),
        ({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "ranks count from 0 to 3"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK='one', which is no whole number"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, "WORLD_SIZE=4 and OMPI_COMM"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "WORLD_SIZE": "4"}, "WORLD_SIZE=4 and SLURM_STEP"),
    ],
)
def test_half_an_environment_is_refused_before_anybody_waits(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
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
