from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("evomerge.testing_pool")

from evomerge.pool import Pool, SerialPool  # noqa: E402 - after the assert rewrite
from evomerge.ray_pool import RayPool  # noqa: E402
from evomerge.testing_pool import (  # noqa: E402
    PoolConformance,
    ProcessPoolConformance,
    ToyFactory,
)
from evomerge.trial import WorkerFactory  # noqa: E402


class TestSerialPool(PoolConformance):
    def make_pool(self, factory: WorkerFactory) -> Pool:
        return SerialPool(factory)


@pytest.fixture(scope="module")
def ray_started() -> Iterator[None]:
    """One Ray for all tests of this module; a pool leaves a Ray alone that it did not start."""
    first = RayPool(ToyFactory(), workers=2)
    first._owned = False
    yield
    first._owned = True
    first._closed = False
    first.close()


@pytest.mark.usefixtures("ray_started")
class TestRayPool(ProcessPoolConformance):
    def make_pool(self, factory: WorkerFactory) -> Pool:
        return RayPool(factory, workers=2)
