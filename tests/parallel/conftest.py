"""Groups of processes that the tests of a test process share."""

from collections.abc import Iterator

import pytest

from tests.parallel.processes import Processes


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Processes]:
    """Two processes over gloo."""
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Processes]:
    """Four processes over gloo."""
    with Processes(4) as processes:
        yield processes
