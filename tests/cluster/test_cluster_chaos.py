"""A short, seeded set of the chaos benchmark on a cluster of two nodes, and nothing is lost. Nodes that die are in
`test_cluster_elastic`, damaged checkpoints in `test_cluster_main_job`.

The long one is `python -m benchmarks.chaos`, which also says what a trial is and what must hold of it.
"""

import pytest
from chaos_harness.faults import FAULTS

from benchmarks import chaos

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(1200)]

SEED = 5
SHORT = (
    "kill-driver",
    "kill-supervisor",
    "kill-storage",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def place(folder):
    with chaos.place("cluster", folder) as there:
        yield there


@pytest.fixture(scope="module")
def reference(place, folder):
    """An uninterrupted run, which must be without fault in the eyes of the same judge."""
    return chaos.reference(place, folder)


@pytest.mark.parametrize("kind", SHORT)
def test_nothing_is_lost_by(kind, place, reference, folder):
    row = chaos.run_trial(FAULTS[kind], SEED, place, reference, folder)
    assert row is not None, "the fault came too late each time"
    assert row.verdict.survived, "\n".join([f"{row.struck}, {row.moment}", *row.verdict.lines(), f"logs: {row.logs}"])
