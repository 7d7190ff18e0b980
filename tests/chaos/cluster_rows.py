"""The rows on real Ray: workers that are killed, and nodes that join and leave."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import faults
from chaos_study import Plan, Recording, chaos_study, notes
from rows import Case, Row, tally_row
from under_fire import Fault, end_of, survive, undisturbed

from evomerge.journal import read
from evomerge.study_listener import StudyListener
from evomerge.trial import Trial


def cluster_cases(long: bool) -> Mapping[str, Case]:
    """Return the rows on Ray; the short table has none, starting Ray takes too long."""
    if not long:
        return {}
    return {"ray": partial(ray_kills, 60, 20, 3), "elastic": partial(elastic, 120)}


def ray_kills(trials: int, worker_kills: int, driver_kills: int, folder: Path) -> Row:
    """Kill actors of a real ``RayPool``, and the driver whose Ray it is."""
    plan = Plan("cma", 1, trials, "ray", 3, seconds=0.4)
    turns: list[Fault] = ["worker"] * worker_kills
    for number in range(driver_kills):
        turns.insert((number + 1) * len(turns) // (driver_kills + 1), "driver")
    tally = survive(plan, turns, folder, 4)
    load = f"cma, {trials} trials, 3 actors"
    return tally_row("RayPool: SIGKILL of actors and driver", load, tally, len(turns))


def elastic(trials: int, folder: Path) -> Row:
    """Run a search while nodes of its cluster come and go."""
    began = time.monotonic()
    plan = Plan("nsga2", 1, trials, "ray", 4, seconds=1.0)
    reference = undisturbed(Plan("nsga2", 1, trials), folder / "calm")
    directory = folder / "elastic"
    code = faults.in_process(_on_a_cluster, plan, directory, limit_seconds=500.0)
    told = json.loads((notes(directory) / "ended.json").read_text()) if code == 0 else {}
    end = end_of(directory, told["digest"], told["told"]) if told else None
    scan = read(directory)
    tells = [record for record in scan.records if record["ev"] == "tell"]
    by = Counter(re.sub(r"^ray-(\d+)\..*", r"\1", record["worker"]) for record in tells)
    generations = {record["worker"] for record in tells if not record["worker"].endswith(".1")}
    started = (notes(directory) / "starts.log").read_text().split()
    found = (
        f"nodes +2 −2 in mid-search; trials by worker "
        f"{', '.join(f'{worker}: {count}' for worker, count in sorted(by.items()))}; "
        f"{len(generations)} workers that came later; {len(started) - len(set(started))} cut short "
        f"and begun again; {'identical' if end == reference else 'ANOTHER END'}"
    )
    holds = end == reference and len(by) == 4 and bool(generations)
    load = f"nsga2, {trials} trials, 4 workers, ray.cluster_utils.Cluster"
    return Row("nodes join and leave", load, found, holds, time.monotonic() - began)


class _Changes(StudyListener):
    """Changes the cluster at some trials, while the driver waits and the workers go on."""

    def __init__(self, cluster: Any, first: Any, trials: int) -> None:
        self._cluster = cluster
        self._nodes = [first]
        self._steps = [
            (int(0.2 * trials), "join"), (int(0.4 * trials), "leave"),
            (int(0.55 * trials), "join"), (int(0.75 * trials), "leave"),
        ]  # fmt: skip

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        while self._steps and trial.number >= self._steps[0][0]:
            if self._steps.pop(0)[1] == "join":
                self._nodes.append(self._cluster.add_node(num_cpus=2))
            else:
                self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)


def _on_a_cluster(plan: Plan, directory: Path) -> None:
    """Be a driver on a cluster of two CPUs that grows to four, loses two and gets two."""
    place = notes(directory)
    place.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=place / "driver.log", force=True)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ev", dir="/tmp") as folder:
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": folder},
        )
        try:
            first = cluster.add_node(num_cpus=2)
            os.environ["RAY_ADDRESS"] = cluster.address
            searchers: list[Recording] = []
            changes = _Changes(cluster, first, plan.trials)
            chaos_study(plan, directory, searchers.append, (changes,)).run()
            told = {"digest": searchers[0].digest, "told": searchers[0].told}
            (place / "ended.json").write_text(json.dumps(told))
        finally:
            cluster.shutdown()
