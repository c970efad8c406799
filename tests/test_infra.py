"""infra: what a machine without Slurm, Kubernetes and Docker can check of the files for them."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import AliasChoices, BaseModel

from solo.artifact import CHECKOUT
from solo.train import launch

INFRA = CHECKOUT / "infra"
K8S = [p for p in sorted(INFRA.glob("k8s/*.yaml")) if p.stem != "kustomization"]
KINDS = {"Deployment", "StatefulSet", "Job"}


def objects(*paths: Path) -> list[dict[str, Any]]:
    return [found for path in paths for found in yaml.safe_load_all(path.read_text())]


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, spec and pod of everything that has pods."""
    for found in objects(*K8S):
        if found["kind"] in KINDS:
            yield found["metadata"]["name"], found["spec"], found["spec"]["template"]


def environment(pod: dict[str, Any]) -> dict[str, str]:
    return {e["name"]: e.get("value", "") for e in pod["spec"]["containers"][0].get("env", [])}


def test_the_batch_script_is_sound() -> None:
    script = INFRA / "slurm" / "recipe.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    none = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert none.returncode == 2 and none.stderr.startswith("error: no recipe; use sbatch ")
    signal = re.search(r"--signal=B:USR1@(\d+)", script.read_text())
    assert signal and int(signal[1]) > launch.GRACE_S + 60  # Slurm may be a minute late


def test_every_setting_is_one_that_the_code_reads() -> None:
    code = "".join(p.read_text() for folder in ("solo", "flows") for p in (CHECKOUT / folder).rglob("*.py"))
    used = {
        name
        for path in INFRA.rglob("*")
        if path.suffix in {".yaml", ".sbatch", ".md"}
        for name in re.findall(r"\bSOLO_[A-Z_]+[A-Z]\b", path.read_text())
    }
    assert {"SOLO_HEAD", "SOLO_HOSTS", "SOLO_ROOT"} < used
    of_parts = {"SOLO_TRAIN_DEPLOYMENT", "SOLO_EVALUATE_DEPLOYMENT"}  # read as SOLO_{part}_DEPLOYMENT
    assert not {name for name in used - of_parts if name not in code}


def test_every_setting_of_prefect_is_one_that_it_has() -> None:
    from prefect.settings.models.root import Settings

    def names(model: type[BaseModel]) -> Iterator[str]:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from names(field.annotation)
            yield f"{model.model_config.get('env_prefix', '')}{name}".upper()
            if isinstance(field.validation_alias, AliasChoices):
                yield from (str(choice).upper() for choice in field.validation_alias.choices)

    redis = {"PREFECT_REDIS_MESSAGING_HOST", "PREFECT_REDIS_MESSAGING_PORT"}  # of prefect-redis, in the server's image
    known = set(names(Settings)) | redis
    services = objects(INFRA / "compose" / "compose.yaml")[0]["services"].values()
    given = {name for service in services for name in service.get("environment", ()) if name.startswith("PREFECT")} | {
        name for _, _, pod in pods() for name in environment(pod) if name.startswith("PREFECT")
    }
    assert len(given) > 15 and not given - known


def test_the_services_of_the_server_are_named_guarded_and_local() -> None:
    made = objects(INFRA / "compose" / "compose.yaml")[0]
    services = made["services"]
    assert set(services) == {"postgres", "redis", "migrate", "server", "services", "store"}
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert {v.split(":")[0] for v in service.get("volumes", ())} <= set(made["volumes"])
        assert not service["image"].endswith(":latest") and ":" in service["image"]
        for name, value in service.get("environment", {}).items():
            assert "PASSWORD" not in name or "${" in value
    assert services["server"]["environment"] == services["services"]["environment"]  # else they are two servers


def test_pods_have_what_they_mount_and_time_for_a_checkpoint() -> None:
    claims = {o["metadata"]["name"] for o in objects(*K8S) if o["kind"] == "PersistentVolumeClaim"}
    names = set()
    for name, spec, pod in pods():
        names.add(name)
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            assert {m["name"] for m in container["volumeMounts"]} <= set(volumes)
        assert {
            v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v
        } <= claims
        labels = spec.get("selector", {}).get("matchLabels", {"app": name})
        assert labels.items() <= pod["metadata"]["labels"].items()
        if environment(pod).get("SOLO_ROOT"):
            # Prefect lets a run go 30 s after it asked, ours ask the ranks and give them their grace.
            assert pod["spec"]["terminationGracePeriodSeconds"] > launch.GRACE_S + 30
    assert names == {"solo-prefect", "solo-worker", "solo-train", "solo-gpu"}


def test_hosts_of_a_stage_meet_at_a_service_and_are_as_many_as_told() -> None:
    services = {o["metadata"]["name"]: o["spec"] for o in objects(*K8S) if o["kind"] == "Service"}
    for name, spec, pod in pods():
        if "SOLO_HOSTS" not in (told := environment(pod)):
            continue
        n = spec.get("replicas", spec.get("completions"))
        assert int(told["SOLO_HOSTS"]) == n == spec.get("parallelism", n)
        service = spec.get("serviceName") or pod["spec"]["subdomain"]
        assert (
            services[service]["clusterIP"] == "None"
            and services[service]["selector"].items() <= pod["metadata"]["labels"].items()
        )
        script = pod["spec"]["containers"][0]["args"][0]
        assert f"solo join {name}-0.{service}:29400" in script and "SOLO_HEAD=$POD_IP:29400" in script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_image_copies_what_is_there() -> None:
    lines = (INFRA / "image" / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied and all((CHECKOUT / name).exists() for name in copied)


@pytest.mark.optional
@pytest.mark.parametrize("path", K8S, ids=lambda p: p.stem)
def test_manifests_are_what_kubernetes_takes(path: Path) -> None:
    """`pip install kubernetes-validate`: Kubernetes' own schemas, an unknown field being an error."""
    validate = pytest.importorskip("kubernetes_validate").validate
    for found in objects(path):
        validate(found, "1.33", strict=True)
