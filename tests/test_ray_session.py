"""Joining a cluster that is slow to answer, or that is none; a Ray that only pretends."""

from __future__ import annotations

import time
from typing import Any

import pytest

from evomerge import ray_session
from evomerge.errors import SetupError


class Ray:
    """Fails to start as often as it is told."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.asked: list[dict[str, Any]] = []

    def init(self, **options: Any) -> None:
        self.asked.append(options)
        if len(self.asked) <= self.failures:
            raise ConnectionError("Failed to connect") from RuntimeError("a process has gone")


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def test_a_cluster_is_joined_at_a_later_try(pauses: list[float]) -> None:
    ray = Ray(failures=2)
    ray_session.begin(ray, "10.0.0.1:6379", 4)
    assert [one["address"] for one in ray.asked] == ["10.0.0.1:6379"] * 3
    assert "num_cpus" not in ray.asked[0]
    assert pauses == [2.0, 5.0]


def test_a_cluster_that_stays_away_is_an_error_with_its_cause() -> None:
    with pytest.raises(SetupError) as caught:
        ray_session.begin(Ray(failures=9), "10.0.0.1:6379", 4)
    assert str(caught.value) == (
        "could not reach Ray at 10.0.0.1:6379: ConnectionError: Failed to connect "
        "(RuntimeError: a process has gone)"
    )


def test_a_ray_of_our_own_is_tried_once(pauses: list[float]) -> None:
    ray = Ray(failures=1)
    with pytest.raises(SetupError, match="could not start Ray on this machine"):
        ray_session.begin(ray, None, 4)
    assert ray.asked[0]["num_cpus"] == 4
    assert pauses == []


def test_the_door_for_jobs_is_no_cluster_to_join() -> None:
    ray = Ray(failures=0)
    with pytest.raises(SetupError, match="a door for jobs \\(use `evomerge submit`"):
        ray_session.begin(ray, "http://127.0.0.1:8265", 4)
    assert ray.asked == []
