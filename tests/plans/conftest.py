"""One pool of ranks for all plans: a rank drops one model and plan and takes the next, and torch is imported once a worker."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from trireme.ranks.pool import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    with closing(RankPool()) as pool:
        yield pool
