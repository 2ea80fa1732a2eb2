"""What `cluster/kuberay` and the image say: right by Kubernetes' schemas, closed to the outside, fit for a checkpoint.

Not KubeRay's CRDs, which no package ships: `cluster/kuberay/kustomization.yaml` says how and when those were checked.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from data_prep.__main__ import _parser
from eiwtrain.config import prices
from eiwtrain.config.file import load_config
from eiwtrain.data.cache import default_cache_dir
from eiwtrain.driver.main_job import resume_command

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).parents[2]
KUBE = ROOT / "cluster" / "kuberay"
APPLIED = (".", "cluster", "prep", "train", "try")
KUBERNETES = "1.37"

# of KubeRay v1.7.0's CRDs, those that are in use here
OF_RAYJOB = {
    "entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "submitterPodTemplate", "submitterConfig", "rayClusterSpec",
}  # fmt: skip
OF_RAYCLUSTER = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
}  # fmt: skip
OF_HEAD = {"rayStartParams", "template"}
OF_WORKERS = OF_HEAD | {"groupName", "replicas", "minReplicas", "maxReplicas"}


def tool(name):
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    return found or pytest.skip(f"{name} is not installed")


def render(folder):
    done = subprocess.run([tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def applied():
    """Return (folder, object) of all that is applied."""
    return [(folder, each) for folder in APPLIED for each in render(KUBE / folder)]


@pytest.fixture(scope="module")
def clusters(applied):
    """Return the spec of the RayCluster of each folder."""
    specs = {"RayCluster": lambda spec: spec, "RayJob": lambda spec: spec["rayClusterSpec"]}
    return {folder: specs[each["kind"]](each["spec"]) for folder, each in applied if each["kind"] in specs}


@pytest.fixture(scope="module")
def templates(applied, clusters):
    """Return every pod template, without what KubeRay adds."""
    found = [each["spec"]["template"] for _, each in applied if each["kind"] in ("Deployment", "StatefulSet")]
    found += [each["spec"]["submitterPodTemplate"] for _, each in applied if each["kind"] == "RayJob"]
    return found + [template for spec in clusters.values() for template in groups(spec)]


def groups(spec):
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def values(tree, key):
    """Return all values of a key anywhere in a tree."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if name == key:
            yield value
        yield from values(value, key)


def settings():
    lines = (KUBE / "settings" / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def entrypoint(folder):
    """Return the words of a job's command, with its variables expanded as by the submitter's shell."""
    text = yaml.safe_load((KUBE / folder / "rayjob.yaml").read_text())["spec"]["entrypoint"]
    return shlex.split(re.sub(r"\$(\w+)", lambda found: settings()[found[1]], text))


def test_everything_is_valid_by_kubernetes_schemas(applied, templates):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    objects = [each for _, each in applied if not each["apiVersion"].startswith("ray.io/")]
    objects += [{"apiVersion": "v1", "kind": "PodTemplate", "metadata": {}, "template": each} for each in templates]
    assert len(objects) > 15
    for each in objects:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_ray_objects_have_only_fields_that_were_checked(applied, clusters):
    for _, each in applied:
        if each["kind"] == "RayJob":
            assert set(each["spec"]) <= OF_RAYJOB
    for spec in clusters.values():
        assert set(spec) <= OF_RAYCLUSTER
        assert set(spec["headGroupSpec"]) <= OF_HEAD
        for group in spec["workerGroupSpecs"]:
            assert {"groupName", "minReplicas", "maxReplicas"} <= set(group) <= OF_WORKERS
            assert 0 <= group["minReplicas"] <= group["maxReplicas"]


def test_every_file_is_part_of_something_that_is_applied():
    seen = set()

    def visit(folder):
        if (file := folder / "kustomization.yaml") in seen:
            return
        seen.add(file)
        content = yaml.safe_load(file.read_text())
        named = content.get("resources", []) + content.get("components", [])
        named += [patch["path"] for patch in content.get("patches", []) if "path" in patch]
        named += [name for each in content.get("configMapGenerator", []) for name in each["envs"]]
        for path in ((folder / name).resolve() for name in named):
            if path.is_dir():
                visit(path)
            else:
                seen.add(path)

    spots = sorted((KUBE / "spot").iterdir())
    for folder in (*(KUBE / name for name in APPLIED), *spots):
        visit(folder.resolve())
    files = {file for file in KUBE.rglob("*") if file.is_file() and file.name != "drain.sh"}
    assert files == seen
    assert len(spots) == 3


@pytest.fixture(params=["gke", "eks", "aks"])
def spot(request, tmp_path):
    """Return (cloud, a copy of the folder whose settings name that cloud's spot nodes)."""
    kube = shutil.copytree(KUBE, tmp_path / "kuberay")
    setting = kube / "settings" / "kustomization.yaml"
    text, named = setting.read_text(), "# components: [../spot/gke]"
    assert named in text
    setting.write_text(text.replace(named, f"components: [../spot/{request.param}]"))
    return request.param, kube


def test_spot_nodes_hold_workers_and_not_the_head(spot):
    cloud, kube = spot
    (job,) = render(kube / "train")
    head, worker = (template["spec"] for template in groups(job["spec"]["rayClusterSpec"]))
    ((label, value),) = worker["nodeSelector"].items()
    (terms,) = values(head["affinity"], "matchExpressions")
    (term,) = (term for term in terms if term["key"] == label)
    assert term["operator"] == "DoesNotExist" or (term["operator"] == "NotIn" and value in term["values"])
    tolerated = [toleration["key"] for toleration in worker["tolerations"]]
    assert tolerated == ["nvidia.com/gpu"] + [label] * (cloud != "eks")


def test_a_spot_worker_drains_within_what_its_cloud_grants(spot):
    cloud, kube = spot
    (job,) = render(kube / "train")
    head, worker = (next(values(template, "preStop")) for template in groups(job["spec"]["rayClusterSpec"]))
    granted = {"gke": 25, "aks": 30, "eks": 120}[cloud]
    assert granted - 30 <= int(worker["exec"]["command"][-1]) < granted
    assert int(head["exec"]["command"][-1]) == 90


def test_data_prep_stays_off_spot_and_gpu_nodes(spot, clusters):
    (job,) = render(spot[1] / "prep")
    for spec in (clusters["prep"], job["spec"]["rayClusterSpec"]):
        head, worker = (template["spec"] for template in groups(spec))
        assert not worker["nodeSelector"]
        assert not worker["tolerations"]
        assert worker["affinity"] == head["affinity"]


def test_all_but_workers_of_training_stay_where_they_are(applied, clusters, templates):
    head = clusters["train"]["headGroupSpec"]["template"]
    workers = [group["template"] for spec in clusters.values() for group in spec["workerGroupSpecs"]]
    others = [template for template in templates if template not in workers]
    assert len(others) == 9
    assert all(template["spec"]["affinity"] == head["spec"]["affinity"] for template in others)
    stays = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    jobs = [each["spec"] for _, each in applied if each["kind"] == "RayJob"]
    kept = [template for spec in clusters.values() for template in groups(spec)]
    kept += [job["submitterPodTemplate"] for job in jobs]
    assert all(template["metadata"]["annotations"] == stays for template in kept)
    assert [job["submitterConfig"] for job in jobs] == [{"backoffLimit": 100}] * 3


def test_no_pod_restarts_in_place_or_gets_service_variables(clusters, templates):
    assert all(spec["autoscalerOptions"]["version"] == "v2" for name, spec in clusters.items() if name != "prep")
    assert all(template["spec"]["enableServiceLinks"] is False for template in templates)


def test_one_image_serves_all_but_the_database(templates):
    images = {image for template in templates for image in values(template, "image")}
    assert len(images) == 2
    assert [image for image in images if not image.startswith("postgres:")] == ["REGISTRY/eiwtrain:0.1.0"]
    assert all(re.search(r":\d+\.\d", image) for image in images)


def test_secrets_are_there_by_reference_alone(applied):
    secret = re.compile(r"KEY|SECRET|PASSWORD|TOKEN", re.IGNORECASE)
    assert not [each for _, each in applied if each["kind"] == "Secret"]
    referred = set()
    for _, each in applied:
        for variables in values(each, "env"):
            for variable in variables:
                if secret.search(variable["name"]):
                    assert "value" not in variable, variable["name"]
                    reference = variable["valueFrom"]["secretKeyRef"]
                    referred.add((reference["name"], reference["key"]))
        for variables in (each.get("data") or {}) if each["kind"] == "ConfigMap" else ():
            assert not secret.search(variables)
    aws = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    assert referred == {("eiwtrain", name) for name in (*aws, "POSTGRES_PASSWORD")}
    # the operator keeps the token of a RayCluster in a secret of its name
    assert "eiwtrain" not in [each["metadata"]["name"] for _, each in applied if each["kind"] == "RayCluster"]
    text = "".join(file.read_text() for file in KUBE.rglob("*.yaml"))
    assert not re.search(r"://[^/\s:]+:(?!\$\()[^/\s]+@", text)  # no password in a URI


def test_nothing_is_open_to_the_outside(applied, clusters):
    for _, each in applied:
        assert each["kind"] not in ("Ingress", "Gateway", "HTTPRoute")
        assert not {*values(each, "type")} & {"LoadBalancer", "NodePort"}
        assert not {*values(each, "serviceType")} - {"ClusterIP"}
        for key in ("hostNetwork", "hostPID", "hostIPC", "hostPort", "hostPath", "privileged", "enableIngress"):
            assert not list(values(each, key)), key
    assert all(spec["authOptions"] == {"mode": "token"} for spec in clusters.values())
    policies = {each["metadata"]["name"]: each["spec"] for _, each in applied if each["kind"] == "NetworkPolicy"}
    assert all(policy["policyTypes"] == ["Ingress"] for policy in policies.values())
    assert policies["within-namespace"]["ingress"] == [{"from": [{"podSelector": {}}]}]
    outside = [name for name, policy in policies.items() if list(values(policy, "namespaceSelector"))]
    assert outside == ["operator-to-job-api"]
    assert list(values(policies["operator-to-job-api"], "port")) == [8265]


def test_pods_are_what_the_namespace_lets_in(applied, clusters, templates):
    (namespace,) = (each for _, each in applied if each["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    contexts = []
    for template in templates:
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        contexts += [container["securityContext"] for container in template["spec"]["containers"]]
    contexts += [
        spec["autoscalerOptions"]["securityContext"] for spec in clusters.values() if "autoscalerOptions" in spec
    ]
    assert all(each == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}} for each in contexts)
    assert all(each.get("metadata", {}).get("namespace") == "eiwtrain" for _, each in applied if each != namespace)


def test_the_grace_period_has_room_for_the_checkpoint(clusters):
    for spec in clusters.values():
        for template in groups(spec):
            (container,) = template["spec"]["containers"]
            env = {variable["name"]: variable.get("value") for variable in container["env"]}
            assert env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0"  # preStop is what drains
            *command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
            assert command == ["bash", "/home/ray/eiwtrain/cluster/kuberay/drain.sh"]
            assert int(seconds) >= 60
            assert template["spec"]["terminationGracePeriodSeconds"] >= int(seconds) + 30
            if template is spec["headGroupSpec"]["template"]:
                assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) == int(seconds)


def test_the_head_does_no_work_and_the_training_fits_its_workers(clusters, monkeypatch, tmp_path):
    for name, value in settings().items():
        monkeypatch.setenv(name, value)
    python, *module, file = entrypoint("train")[:4]
    assert [python, *module] == ["python", "-m", "eiwtrain.run"]
    config = load_config(str(ROOT / file), entrypoint("train")[4:])
    assert config.run.storage == settings()["EIWTRAIN_STORAGE"]
    assert config.data.path.startswith(settings()["EIWTRAIN_DATA"])
    for spec in (clusters["train"], clusters["cluster"]):
        head = spec["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert not list(values(head, "nvidia.com/gpu"))
        (group,) = spec["workerGroupSpecs"]
        assert spec["enableInTreeAutoscaling"] is True
        assert config.max_workers <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == config.workers.gpus == 1
        assert int(container["resources"]["requests"]["cpu"]) >= config.workers.cpus
        (mount,) = (each["mountPath"] for each in container["volumeMounts"] if each["name"] == "cache")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert config.data.cache_dir is None
        assert (mount, default_cache_dir().parent) == ("/tmp", tmp_path)  # below a mount, which is root's, and not one
        (volume,) = (each for each in group["template"]["spec"]["volumes"] if each["name"] == "cache")
        assert int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) << 30 > config.data.cache_bytes


def test_a_price_by_worker_group_is_that_of_a_node(clusters, monkeypatch):
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    for spec in clusters.values():
        for group in spec["workerGroupSpecs"]:
            monkeypatch.setenv("RAY_NODE_TYPE_NAME", group["groupName"])  # as KubeRay does
            assert prices.of_node({group["groupName"]: 2.5}, ResourceAndLabelSpec._get_default_labels(None)) == 2.5


def test_the_first_try_is_a_small_run_on_one_gpu(applied, clusters, monkeypatch):
    for name, value in settings().items():
        monkeypatch.setenv(name, value)
    (job,) = (each for folder, each in applied if folder == "try")
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "eiwtrain.run"]
    config = load_config(str(ROOT / words[3]), words[4:])
    assert config.data.prepare == "photos"
    assert (config.max_workers, config.workers.gpus, job["metadata"]["name"]) == (1, 1, "try")
    (group,) = clusters["try"]["workerGroupSpecs"]
    assert group["maxReplicas"] == 1
    (container,) = group["template"]["spec"]["containers"]
    assert int(container["resources"]["requests"]["cpu"]) >= config.workers.cpus
    assert job["spec"]["backoffLimit"] == 0


@pytest.mark.parametrize("folder", ["train", "try"])
def test_a_stopped_run_names_the_page_that_resumes_it(clusters, folder, monkeypatch):
    (container,) = clusters[folder]["headGroupSpec"]["template"]["spec"]["containers"]
    (said,) = (each["value"] for each in container["env"] if each["name"] == "EIWTRAIN_COMMAND")
    monkeypatch.setenv("EIWTRAIN_COMMAND", said)
    assert resume_command(["x.yaml"]) == said
    page, _, place = said.removeprefix("kubectl: ").partition(", ")
    assert f"\n## {place}\n" in (ROOT / page).read_text()


def test_data_preps_command_exists_and_waits_for_its_workers(clusters):
    python, *module = entrypoint("prep")[:3]
    assert [python, *module] == ["python", "-m", "data_prep"]
    assert importlib.util.find_spec("data_prep.__main__")
    args = _parser().parse_args(entrypoint("prep")[3:])
    assert args.output.startswith(settings()["EIWTRAIN_DATA"])
    (group,) = clusters["prep"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert not clusters["prep"]["enableInTreeAutoscaling"]
    assert not list(values(clusters["prep"], "nvidia.com/gpu"))


@pytest.mark.parametrize("node", ["worker", "head"])
def test_a_pod_that_ends_drains_its_node_and_waits(tmp_path, node):
    """Return a stand-in for /proc, and a `ray` that notes its arguments and, unless it stays, ends what waits."""
    raylet, job = (tmp_path / "proc" / pid / "cmdline" for pid in ("42", "43"))
    raylet.parent.mkdir(parents=True)
    job.parent.mkdir()
    ends = raylet if node == "worker" else job
    (tmp_path / "ray").write_text(f'#!/bin/bash\nprintf "%s|" "$@" >> {tmp_path}/asked\n[ "$STAYS" ] || : > {ends}\n')
    (tmp_path / "ray").chmod(0o755)

    def drain(seconds, stays=""):
        env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "STAYS": stays}
        command = ["bash", str(KUBE / "drain.sh"), str(seconds), str(tmp_path / "proc")]
        subprocess.run(command, env=env, timeout=50, check=True)

    drain(100)
    assert not (tmp_path / "asked").exists()  # nothing runs
    raylet.write_bytes(b"raylet\0--node_id=c0ffee\0--agent=ray --head\0" + b"--head\0" * (node == "head"))
    if node == "head":
        job.write_bytes(b"ray::JobSupervisor\0\0")
    began = time.monotonic()
    drain(2, stays="yes")
    assert time.monotonic() - began > 1
    drain(100)  # ends long before, or runs out of time
    first, second = re.findall(r"drain-node.*?remaining-seconds\|\d+", (tmp_path / "asked").read_text())
    assert "|--node-id|c0ffee|--reason|DRAIN_NODE_REASON_PREEMPTION|" in first
    assert (first.rpartition("|")[2], second.rpartition("|")[2]) == ("2", "100")


def test_the_image_is_pinned_and_has_what_the_package_needs():
    pinned = dict(
        line.split("==") for line in (ROOT / "cluster" / "constraints.txt").read_text().splitlines() if "==" in line
    )
    docker = (ROOT / "cluster" / "Dockerfile").read_text()
    assert re.search(r"^FROM nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04$", docker, re.MULTILINE)
    assert f"torch=={pinned['torch']}\n" in docker
    assert docker.rindex("USER 1000") > docker.rindex("RUN ")
    assert {"psycopg2-binary", "boto3", "gcsfs", "google-cloud-storage"} <= set(pinned)
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in docker  # GKE's driver
    if tomllib is None:
        pytest.skip("tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["gpu"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[wanted.name]), text


def test_the_image_holds_the_source_and_nothing_else():
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert allowed == {"eiwtrain", "data_prep", "cluster", "configs"}
    assert all((ROOT / name).is_dir() for name in allowed)
    assert "\n*\n" in (ROOT / ".dockerignore").read_text()


def test_hadolint_finds_nothing():
    done = subprocess.run([tool("hadolint"), str(ROOT / "cluster" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
