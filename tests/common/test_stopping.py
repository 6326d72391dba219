"""Commands that are asked to stop: they end soon, with one sentence, without a traceback, and take their children along."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from epo_jax.common import stopping

ROOT = Path(__file__).resolve().parents[2]

# A command whose main thread is at CALL when the signal comes.
COMMAND = """
import sys, time, hashlib
from epo_jax.common import stopping
from epo_jax.command import run
from epo_jax.envs.workers.pool import EnvPool
def main(argv):
    with EnvPool("toy", {{}}, workers=1) as pool:
        pool.reset(0, {{"id": "red-1", "type": "red", "colour": "red", "digit": "1"}})
        pool.get()
        try:
            {before}
            print("ready", *stopping.process_groups, flush=True)
            {call}
        finally:
            print("unwound", flush=True)
sys.exit(run(main))
"""
SLEEP = "time.sleep(60)"
# As a compilation: it lets other threads run, and does not end for a signal.
COMPILE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"

# Where Python has nobody to raise an exception to.
FINALIZER = "type('Late', (), {{'__del__': lambda self: time.sleep(60)}})(); time.sleep(60)"


def command(call: str, before: str = "pass") -> str:
    """A program that is ready, after `before`, when what `call` does can be interrupted."""
    return COMMAND.format(call=call, before=before)


@contextlib.contextmanager
def start(*command, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def wait_for(process, text: str) -> None:
    """Until the process prints it."""
    printed = ""
    while text not in printed:
        printed = process.stdout.readline()
        assert printed, process.stderr.read()


def group_ends(group: int) -> bool:
    """Whether no process of the group is left, soon."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("numbers", "call", "code", "said"),
    [
        ([signal.SIGINT], SLEEP, 75, "stopped as asked\n"),
        ([signal.SIGTERM], SLEEP, 75, "stopped as asked\n"),
        ([signal.SIGHUP, signal.SIGHUP], SLEEP, 75, "stopped as asked\n"),  # by the kernel and by the shell
        ([signal.SIGINT], FINALIZER.format(), 75, "stopped as asked\n"),
        ([signal.SIGINT], COMPILE, 75, "stopped as asked\n"),
    ],
    ids=["Ctrl-C", "SIGTERM", "closed terminal", "in a finalizer", "while it compiles"],
)
def test_a_signal_ends_a_command(numbers, call, code, said):
    """It goes to the whole foreground group, as a terminal sends it."""
    with start("-c", command(call)) as process:
        _, *groups = process.stdout.readline().split()
        time.sleep(call == COMPILE)  # until it is inside
        for number in numbers:
            os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err, out) == (code, said, "" if call == COMPILE else "unwound\n")
        assert len(groups) == 1 and all(group_ends(int(group)) for group in groups)


def test_a_second_signal_ends_at_once_what_would_be_saved():
    """While it compiles, where Python's own handlers are not called."""
    with start("-c", command(COMPILE, "stop = stopping.StopRequest('.').__enter__(); stop.defer()")) as process:
        _, group = process.stdout.readline().split()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "asked to stop: what is done will be saved; ask again to end at once\n"
        time.sleep(stopping._ECHO + 0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err, out) == (128 + signal.SIGTERM, "", "")
        assert group_ends(int(group))


def test_what_is_ignored_stays_so():
    """nohup, and jobs in the background of a script."""
    program = command("time.sleep(1)")
    with start("-c", f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{program}") as process:
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err, out) == (0, "", "unwound\n")


@pytest.mark.parametrize("lines", ["print('x' * 100000)", "[print('x', flush=True) for _ in range(2)]"])
def test_a_closed_pipe_ends_a_command_without_a_word(lines):
    with start("-c", command(f"time.sleep(0.5); {lines}")) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 128 + signal.SIGPIPE


def test_a_run_in_a_closed_pipe_is_saved(tmp_path):
    with start("-m", "epo_jax.main", "--config=benchmarks/kill.py", f"--workdir={tmp_path / 'run'}",
               "--config.warm_start.steps=500") as process:  # fmt: skip
        wait_for(process, "warm start 50/500")
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 75, err
        assert err.endswith(f"updates of the warm start done and saved; go on with --workdir={tmp_path / 'run'} --resume\n")
        assert "Traceback" not in err and err.count("\n") == 2


@pytest.mark.parametrize(
    ("arguments", "ready"),
    [
        (["epo_jax.envs.play", "--env=toy"], "turn 1 of"),
        (["epo_jax.sweep", "--config=tests/toy_sweep.py", "--workdir={folder}"], "program 1 of"),
    ],
    ids=["play", "sweep"],
)
def test_commands_end_in_one_sentence(tmp_path, arguments, ready):
    with start("-m", *(argument.format(folder=tmp_path / "out") for argument in arguments), stdin=subprocess.PIPE) as process:
        wait_for(process, ready)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75 and "Traceback" not in err
        assert err.splitlines()[-1].startswith("stopped as asked")
