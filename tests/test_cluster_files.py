"""The files that start clusters: valid for those who read them, and fit for what evomerge asks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # Ray's own dependency
import pytest
import yaml

from evomerge import jobs
from evomerge.config import PoolSection

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER, MANIFEST = ROOT / "ray_cluster.yaml", ROOT / "experiments/cluster/rayjob.yaml"

#: In place of those in the file, as it says.
OWN_MACHINES = """
max_workers: 3
provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3, 10.0.0.4]}
auth: {ssh_user: me, ssh_private_key: ~/.ssh/id_ed25519}
"""


@pytest.fixture
def launcher() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(LAUNCHER.read_text())
    return data


@pytest.fixture
def documents() -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all(MANIFEST.read_text())}


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the file as ``ray up`` sees it, checked by Ray's own schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    ready: dict[str, Any] = prepare_config(config)
    validate_config(ready)
    return ready


class TestLauncher:
    def test_ray_accepts_it(self, launcher: dict[str, Any]) -> None:
        ready = prepared(launcher)
        assert ready["available_node_types"]["head"]["max_workers"] == 0
        launcher["max_wokers"] = 4
        with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
            prepared(launcher)

    def test_ray_accepts_it_for_ones_own_machines(self, launcher: dict[str, Any]) -> None:
        for name in ("provider", "auth", "head_node_type", "available_node_types"):
            del launcher[name]
        shown = LAUNCHER.read_text().partition("# max_workers: 3\n")[2]
        for key in yaml.safe_load(OWN_MACHINES)["provider"] | {"ssh_private_key": ""}:
            assert f"#   {key}:" in shown
        prepared(launcher | yaml.safe_load(OWN_MACHINES))

    def test_workers_have_room_for_workers_and_the_head_for_none(
        self, launcher: dict[str, Any]
    ) -> None:
        kinds = launcher["available_node_types"]
        pool = PoolSection()  # type: ignore[call-arg]
        gpu = kinds["gpu"]
        assert (gpu["min_workers"], kinds["head"]["resources"]) == (0, {"CPU": 0, "GPU": 0})
        assert gpu["resources"]["CPU"] >= pool.cpus_per_worker
        assert gpu["resources"]["GPU"] >= max(pool.gpus_per_worker, 1)
        assert gpu["max_workers"] * gpu["resources"]["GPU"] >= pool.workers
        assert launcher["max_workers"] >= gpu["max_workers"]
        assert launcher["head_node_type"] == "head"

    def test_the_doors_are_closed(self, launcher: dict[str, Any]) -> None:
        head, worker = launcher["head_start_ray_commands"], launcher["worker_start_ray_commands"]
        for commands in (head, worker):
            start = commands[-1]
            before, _, _ = start.partition("ray start")
            assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token" in before
        assert "--dashboard-host=127.0.0.1" in head[-1]
        assert "--num-cpus=0 --num-gpus=0" in head[-1]
        assert "0.0.0.0" not in LAUNCHER.read_text()
        assert "~/.ray/auth_token" in launcher["file_mounts"]

    def test_it_installs_the_ray_that_we_test(self, launcher: dict[str, Any]) -> None:
        pinned = next(
            line for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line.startswith("ray==")
        ).removeprefix("ray")  # fmt: skip
        install = next(one for one in launcher["setup_commands"] if "pip install" in one)
        assert f'"ray[default]{pinned}"' in install
        assert install.endswith("~/evomerge")
        assert f'rayVersion: "{pinned.removeprefix("==")}"' in MANIFEST.read_text()


class TestManifest:
    def test_the_parts_fit_together(self, documents: dict[str, Any]) -> None:
        assert list(documents) == ["RayJob", "PersistentVolumeClaim", "NetworkPolicy"]
        spec = documents["RayJob"]["spec"]
        cluster = spec["rayClusterSpec"]
        assert spec["backoffLimit"] == 3
        assert spec["shutdownAfterJobFinishes"] is True
        assert cluster["authOptions"] == {"mode": "token"}
        assert spec["entrypoint"].startswith("exec python -m evomerge run ")
        claim = documents["PersistentVolumeClaim"]["metadata"]["name"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for group in groups:
            pod = group["template"]["spec"]
            volumes = {one["name"]: one for one in pod["volumes"]}
            assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim
            assert pod["securityContext"]["runAsNonRoot"] is True
            (container,) = pod["containers"]
            assert {one["name"] for one in container["volumeMounts"]} == set(volumes)
            # Tokens come from a Secret, never from the file.
            assert "env" not in container
            assert [list(one) for one in container["envFrom"]] == [["secretRef"]]
        grace = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
        assert grace == {"RAY_JOB_STOP_WAIT_TIME_S": str(jobs.GRACE_SECONDS)}

    def test_workers_have_room_for_workers_and_the_head_for_none(
        self, documents: dict[str, Any]
    ) -> None:
        cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
        pool = PoolSection()  # type: ignore[call-arg]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        (group,) = cluster["workerGroupSpecs"]
        assert group["minReplicas"] == 0
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for ray, kubernetes, each in (
            ("num-cpus", "cpu", pool.cpus_per_worker),
            ("num-gpus", "nvidia.com/gpu", max(pool.gpus_per_worker, 1)),
        ):
            assert group["rayStartParams"][ray] == limits[kubernetes]
            assert float(limits[kubernetes]) >= each
        assert group["maxReplicas"] * int(limits["nvidia.com/gpu"]) >= pool.workers

    def test_the_published_schema_accepts_it(self, documents: dict[str, Any]) -> None:
        path = os.environ.get("KUBERAY_RAYJOB_CRD")
        if not path:
            pytest.skip("needs KUBERAY_RAYJOB_CRD: the operator's ray.io_rayjobs.yaml")
        crd = yaml.load(Path(path).read_bytes(), Loader=yaml.CSafeLoader)
        version = next(one for one in crd["spec"]["versions"] if one["name"] == "v1")
        schema = closed(version["schema"]["openAPIV3Schema"])
        job = documents["RayJob"]
        jsonschema.validate(job, schema)
        job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParms"] = {}
        with pytest.raises(jsonschema.ValidationError, match="rayStartParms"):
            jsonschema.validate(job, schema)


def closed(schema: Any) -> Any:
    """Return a schema in which unknown keys are errors; the API server drops them silently."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(one) for name, one in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made
