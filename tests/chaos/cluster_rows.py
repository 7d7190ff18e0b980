"""The rows on real Ray: workers that are killed, and nodes that join and leave."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import faults
from chaos_study import Plan, Recording, chaos_study, notes
from rows import Case, Row, _tally
from under_fire import Fault, end_of, survive, undisturbed

from evomerge.journal import JOURNAL, read


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
    return _tally("RayPool: SIGKILL of actors and driver", f"cma, {trials} trials, 3 actors", tally)


def elastic(trials: int, folder: Path) -> Row:
    """Run a search while nodes of its cluster come and go."""
    began = time.monotonic()
    plan = Plan("nsga2", 1, trials, "ray", 4, seconds=0.5)
    reference = undisturbed(Plan("nsga2", 1, trials), folder / "calm")
    directory = folder / "elastic"
    length = (folder / "calm" / JOURNAL).stat().st_size
    code = faults.in_process(_on_a_cluster, plan, directory, length, limit_seconds=500.0)
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


def _on_a_cluster(plan: Plan, directory: Path, length: int) -> None:
    """Be a driver on a cluster of two CPUs that grows to four, loses two and gets two."""
    place = notes(directory)
    place.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=place / "driver.log", force=True)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ev", dir="/tmp") as folder:  # noqa: S108
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": folder},
        )
        try:
            first = cluster.add_node(num_cpus=2)
            os.environ["RAY_ADDRESS"] = cluster.address
            path = directory / JOURNAL

            def change() -> None:
                second = None
                for step, share in enumerate((0.2, 0.4, 0.55, 0.75)):
                    while not path.exists() or path.stat().st_size < share * length:
                        time.sleep(0.05)
                    match step:
                        case 0:
                            second = cluster.add_node(num_cpus=2)
                        case 1:
                            cluster.remove_node(first, allow_graceful=False)
                        case 2:
                            cluster.add_node(num_cpus=2)
                        case 3:
                            cluster.remove_node(second, allow_graceful=False)

            watcher = threading.Thread(target=change, daemon=True)
            watcher.start()
            searchers: list[Recording] = []
            chaos_study(plan, directory, searchers.append).run()
            watcher.join(60)
            told = {"digest": searchers[0].digest, "told": searchers[0].told}
            (place / "ended.json").write_text(json.dumps(told))
        finally:
            cluster.shutdown()
