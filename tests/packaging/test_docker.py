"""The container files: who runs as whom, what is in which image, whose each volume is, that every command exists."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from src.cli import app
from src.jobs.spec import FederatedTrainingSpec
from src.jobs.specs import load_job_file, spec_from_proto
from src.learning.installed import known_tasks

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
COMPOSE = DOCKER / "docker-compose.yml"
DEV = DOCKER / "docker-compose.dev.yml"
HOSTS = {name: DOCKER / f"{name}.yml" for name in ("aggregator", "party")}
"""A node on a host of its own."""
PARTIES = ("party-a", "party-b", "party-c")
NODES = ("aggregator", *PARTIES)
KIT_OF = {**{name: f"kit-{name}" for name in NODES}, "job": "kit-scientist"}

Stages = dict[str, tuple[str, list[tuple[str, str]]]]
"""Name → (what it is built from, its instructions with their arguments)."""


@pytest.fixture(scope="module")
def stages() -> Stages:
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    found: Stages = {}
    for line in filter(str.strip, text.splitlines()):
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]  # else: a wrong line
            found[name] = (base, [])
        elif found:
            found[name][1].append((instruction, re.sub(r"\s+", " ", rest)))
    return found


def compose(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def lineage(stages: Stages, name: str) -> list[tuple[str, str]]:
    """The instructions of a stage after those of the stages it is built from."""
    base, own = stages[name]
    return [*(lineage(stages, base) if base in stages else []), *own]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Target → source (and mode) of a service's short volumes."""
    return {target.partition(":")[0]: source for source, _, target in (v.partition(":") for v in service["volumes"])}


def parse(arguments: list[str]) -> None:
    """Raises what the command line's own parser raises; runs nothing."""
    command: Any = typer.main.get_command(app)
    words = list(arguments)
    while hasattr(command, "list_commands"):
        context = command.make_context("sotto", words[:1], resilient_parsing=True)
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"no command {name!r}"
        command = found
    command.make_context("sotto", words)


# ------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("target", ["aggregator", "party", "provision", "dev"])
def test_an_image_runs_as_a_numeric_user_that_is_not_root(stages: Stages, target: str) -> None:
    users = [rest for instruction, rest in lineage(stages, target) if instruction == "USER"]
    assert users[-1] == "10001:10001"


def test_only_the_stages_that_only_build_have_sources_and_build_tools(stages: Stages) -> None:
    for target in ("aggregator", "party", "provision", "dev"):
        copies = [rest for instruction, rest in lineage(stages, target) if instruction == "COPY"]
        assert all(rest.startswith("--from=") or " docker/" in rest for rest in copies)
        assert stages["runtime"][0] == stages["builder"][0], "the environment needs the interpreter it was made with"


def test_the_aggregators_image_has_no_torch_and_the_partys_has_its_cpu_build(stages: Stages) -> None:
    installs = {
        name: [rest for instruction, rest in stages[f"{name}-env"][1] if instruction == "RUN" and "pip install" in rest]
        for name in ("aggregator", "party")
    }
    assert "[" not in installs["aggregator"][0], "no extra: the base package needs no torch"
    assert "--torch-backend cpu" in installs["party"][0]
    assert "[demo]" in installs["party"][0]
    assert stages["aggregator-env"][0] == "builder"
    assert ("COPY", "--from=aggregator-env /opt/sotto /opt/sotto") in stages["aggregator"][1]


def test_what_is_installed_is_pinned(stages: Stages) -> None:
    installs = [rest for _, own in stages.values() for i, rest in own if i == "RUN" and "pip install" in rest]
    assert len(installs) == 4
    assert all("--constraint constraints.txt" in rest or "uv==" in rest for rest in installs)


def test_no_image_is_given_a_secret(stages: Stages) -> None:
    for _, own in stages.values():
        for instruction, rest in own:
            assert not (instruction in {"ARG", "ENV"} and re.search(r"(?i)secret|password|token|_key", rest))
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    files = {"constraints.txt", "LICENSE", "NOTICE", "README.md", "pyproject.toml", "setup.py"}
    assert allowed == files | {"src", "docker/*.sh"}
    assert "\n*\n" in (ROOT / ".dockerignore").read_text(), "everything else stays outside"


def test_images_start_with_commands_that_exist(stages: Stages) -> None:
    for target in ("aggregator", "party"):
        commands = [rest for instruction, rest in stages[target][1] if instruction == "CMD"]
        parse(yaml.safe_load(commands[-1]))
    entry = [rest for instruction, rest in stages["runtime"][1] if instruction == "ENTRYPOINT"]
    assert entry == ['["sotto"]']


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"  # the package brings the binary
    done = subprocess.run(
        [hadolint, DOCKERFILE, DOCKER / "task.Dockerfile"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == ""


@pytest.mark.parametrize("script", sorted(path.name for path in DOCKER.glob("*.sh")))
def test_a_script_can_be_executed_and_parsed(script: str) -> None:
    path = DOCKER / script
    assert path.stat().st_mode & stat.S_IXUSR
    done = subprocess.run(["/bin/sh", "-n", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------------------ Compose


def test_a_kit_is_mounted_by_its_own_node_alone_and_read_only() -> None:
    services = compose(COMPOSE)["services"]
    for kit in KIT_OF.values():
        users = {
            name for name, service in services.items() if any(kit == v.partition(":")[0] for v in service["volumes"])
        }
        assert users == {"provision", *(name for name, own in KIT_OF.items() if own == kit)}
    for name, kit in KIT_OF.items():
        assert f"{kit}:/kit:ro" in services[name]["volumes"]
    assert set(mounts(services["provision"]).values()) == set(KIT_OF.values())


def test_a_state_is_nobody_elses() -> None:
    services = compose(COMPOSE)["services"]
    for name in NODES:
        assert mounts(services[name])["/state"] == f"state-{name}"
        assert services[name]["environment"]["SOTTO__STATE_DIR"] == "/state"
    used = [
        source for service in services.values() for source in mounts(service).values() if source.startswith("state-")
    ]
    assert len(used) == len(set(used)) == len(NODES)


def test_every_service_gives_up_what_it_does_not_need() -> None:
    document = compose(COMPOSE)
    for name, service in document["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "ports", "user", "secrets"} & set(service), name
    assert document["networks"]["federation"]["internal"] is True
    assert document["services"]["provision"]["network_mode"] == "none"


def test_provisioning_ends_before_the_aggregator_starts_and_that_before_the_others() -> None:
    services = compose(COMPOSE)["services"]
    assert services["aggregator"]["depends_on"]["provision"]["condition"] == "service_completed_successfully"
    for name in (*PARTIES, "job"):
        assert services[name]["depends_on"]["aggregator"]["condition"] == "service_healthy"


@pytest.mark.parametrize("service", [*NODES, "job"])
def test_a_service_runs_a_command_that_exists(service: str) -> None:
    parse(compose(COMPOSE)["services"][service]["command"])


def test_the_provisioning_script_runs_a_command_that_exists_for_the_volumes_there_are() -> None:
    script = (DOCKER / "provision.sh").read_text()
    (line,) = re.findall(r"^sotto (.*)$", script, re.MULTILINE)
    parse(line.split())
    (listed,) = re.findall(r'^kits="(.*)"$', script, re.MULTILINE)
    assert {f"/kits/{kit}" for kit in listed.split()} == set(mounts(compose(COMPOSE)["services"]["provision"]))
    assert "in aggregator party-a party-b party-c scientist;" in DOCKERFILE.read_text()
    host, _, port = line.rpartition(" ")[2].partition(":")
    assert host in compose(COMPOSE)["services"]
    assert f"EXPOSE {port}\n" in DOCKERFILE.read_text()


@pytest.mark.parametrize("comment", re.findall(r"run --rm job (jobs .*)$", COMPOSE.read_text(), re.MULTILINE))
def test_a_command_in_a_comment_exists(comment: str) -> None:
    parse(comment.split())


def test_a_command_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(Exception, match="--and-dance"):
        parse(["jobs", "submit", "/etc/sotto/job.yaml", "--and-dance"])


def test_the_job_is_one_that_the_parties_can_take() -> None:
    spec = spec_from_proto(load_job_file(DOCKER / "job.yaml"))
    assert isinstance(spec, FederatedTrainingSpec)
    assert spec.task in known_tasks()
    assert spec.local_training.epsilon < 4.0, "the budget that provisioning writes"
    assert spec.priced_rounds <= 10_000, "likewise"
    assert mounts(compose(COMPOSE)["services"]["job"])["/etc/sotto/job.yaml"] == "./job.yaml"


# ------------------------------------------------------------------------------------------------ hosts of their own


@pytest.mark.parametrize("name", HOSTS)
def test_a_node_on_a_host_of_its_own_is_run_as_in_the_federation_on_one(name: str) -> None:
    """The same command, the same things given up; kit and data from this host, read-only, and a state that stays."""
    (service,) = compose(HOSTS[name])["services"].values()
    other = compose(COMPOSE)["services"]["party-a" if name == "party" else name]
    for key in ("command", "environment", "init", "read_only", "tmpfs", "cap_drop", "security_opt", "restart"):
        assert service[key] == other[key], key
    assert service["image"] == f"${{SOTTO_IMAGE:-{other['image']}}}"
    assert "build" not in service
    by_target = {
        each.split(":")[-2] if each.endswith(":ro") else each.split(":")[-1]: each for each in service["volumes"]
    }
    assert set(by_target) == {"/kit", "/state", *(["/data"] if name == "party" else [])}
    assert all(each.endswith(":ro") and each.startswith("${") for at, each in by_target.items() if at != "/state")
    assert list(compose(HOSTS[name])["volumes"]) == ["state"]
    assert ("ports" in service) == (name == "aggregator")


def test_a_task_of_ones_own_is_installed_where_the_images_python_looks_and_nothing_else_changes() -> None:
    text = (DOCKER / "task.Dockerfile").read_text()
    assert "pip --python /opt/sotto/bin/python install" in text
    assert "uv venv /opt/sotto" in DOCKERFILE.read_text()
    assert [line for line in text.splitlines() if line.startswith("USER")] == ["USER 0:0", "USER 10001:10001"]
    assert "ENTRYPOINT" not in text


def said_in_the_documents() -> list[str]:
    """Every command of sotto's that docs/containers.md and the Compose files' comments give a container."""
    text = "\n".join(path.read_text() for path in (ROOT / "docs/containers.md", *HOSTS.values())).replace("\\\n", " ")
    found = re.findall(r"run --rm (?:party|aggregator|job) ((?:party|budget|jobs|aggregator) .*)$", text, re.MULTILINE)
    return found + re.findall(r" sotto-(?:party|aggregator) +((?:party|jobs|aggregator) .*)$", text, re.MULTILINE)


def test_every_command_in_the_documents_exists() -> None:
    commands = said_in_the_documents()
    assert len(commands) >= 6
    for command in commands:
        parse(command.split())


# -------------------------------------------------------------------------------------------------------- development


def test_development_mounts_sources_read_only_and_never_hides_the_stubs() -> None:
    services = compose(DEV)["services"]
    assert set(services) == {*NODES, "job"}
    for service in services.values():
        by_target = {volume["target"]: volume for volume in service["volumes"]}
        for source in ("src", "proto", "scripts", "generate_grpc.sh"):
            assert by_target[f"/checkout/{source}"]["source"] == f"../{source}"
            assert by_target[f"/checkout/{source}"]["read_only"] is True
            assert (DOCKER / f"../{source}").exists()
        stubs = by_target["/checkout/src/communication/generated"]
        assert (stubs["type"], stubs["tmpfs"]["mode"]) == ("tmpfs", 0o1777)
        assert service["build"]["target"] == "dev"


def test_development_makes_the_stubs_before_it_starts_anything() -> None:
    script = (DOCKER / "dev-entrypoint.sh").read_text()
    assert script.index("./generate_grpc.sh") < script.index('exec python3 -m src "$@"')
    help_ = [sys.executable, "-m", "src", "--help"]
    assert subprocess.run(help_, cwd=ROOT, capture_output=True, timeout=60, check=False).returncode == 0


def test_docker_compose_accepts_the_files() -> None:
    docker = shutil.which("docker")
    version = [docker or "docker", "compose", "version"]
    if docker is None or subprocess.run(version, capture_output=True, timeout=30, check=False).returncode != 0:
        pytest.skip("docker compose is not installed")
    for files in ([COMPOSE], [COMPOSE, DEV], *([file] for file in HOSTS.values())):
        arguments = [argument for file in files for argument in ("--file", str(file))]
        done = subprocess.run(
            [docker, "compose", *arguments, "config", "--quiet"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=os.environ | {"KIT": "/kit", "DATA": "/data"},
        )
        assert done.returncode == 0, done.stderr
