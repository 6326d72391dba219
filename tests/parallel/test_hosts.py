"""Runs of several processes on this machine: what they learn is what one learns, and none outlives another."""

import concurrent.futures
import contextlib
import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from epo_jax import main as program
from epo_jax.common.errors import UserError
from epo_jax.parallel import hosts
from epo_jax.runs.metrics import read_rows
from tests.processes import ROOT, Processes, apart, learnt

SINGLE = "--config=tests/toy_sweep.py:single"

# Processes of two devices each that gather weights, place rows of which each has its own, exchange bytes and trajectories, and
# then numbers until one of them dies, fails or is busy.
EXCHANGE = """
import sys
import time
import jax
import numpy as np
from absl import flags
from epo_jax import command
from epo_jax.parallel import hosts, mesh
from epo_jax.common.errors import UserError
from epo_jax.rollout.episode import Episode
from epo_jax.rollout.exchange import of_all_processes
from epo_jax.rollout.trajectory import Trajectory

def main(argv):
    values = flags.FlagValues()
    hosts.define_flags(values)
    mode = values(argv)[1:]
    with hosts.joined(values):
        weights = {"lm_head": np.arange(32, dtype=np.float32).reshape(4, 8)}
        on = mesh.make_mesh(1, 2, 2)
        spread = mesh.place(weights, mesh.shardings(on, weights, {"lm_head": ("vocab", "embed")}))
        here = mesh.on_this_host(spread)["lm_head"]
        assert here.sharding.device_set == set(jax.local_devices()) and not here.is_fully_replicated
        np.testing.assert_array_equal(here, weights["lm_head"])

        on = mesh.make_mesh(2, 2, 1)
        rows, own = np.arange(1, 9), sorted(mesh.own_rows(on, 8))
        assert sorted(sum(hosts.gather(own), [])) == list(range(8))
        filled = np.zeros_like(rows)
        filled[own] = rows[own]
        for shard in mesh.place(filled, jax.NamedSharding(on, mesh.spec("rows"))).addressable_shards:
            np.testing.assert_array_equal(shard.data, rows[shard.index])

        for size in (0, 1, 7, 8, 255, 256, 10001):
            sent = [bytes([p]) * (size if p else size // 3) for p in range(values.processes)]
            assert hosts.gather_bytes(sent[values.process]) == sent
        played = Trajectory({"id": "t"}, goal="g")
        played.append_observation("a room")
        played.append_prompt([3, values.process])
        episodes = [Episode(i, {"id": "t"}) for i in range(values.processes)]
        together = of_all_processes(episodes, [played])
        assert [t.tokens[1] for t in together] == list(range(values.processes))
        assert len({tuple(t.anchors) for t in together}) == 1 and sum(t.goal == "g" for t in together) == 1
        for i in range(10**6):
            if hosts.gather([i, values.process]) != [[i, p] for p in range(values.processes)]:
                raise AssertionError
            print("together", i, flush=True)
            if mode == ["fail"] and i == 3:
                raise UserError("the game is damaged.")
            if mode == ["busy"] and i == 3:
                time.sleep(600)

sys.exit(command.run(main))
"""


@pytest.fixture(scope="module", autouse=True)
def killed(tmp_path_factory):
    """Two pairs of processes, of which process i of pair i is killed. The other one takes half a minute to find out, in which
    other tests run; it may take a minute. Gives its exit code, as a future, and its pair."""
    with contextlib.ExitStack() as stack:
        pairs = [
            stack.enter_context(Processes(2, tmp_path_factory.mktemp("killed"), "-c", EXCHANGE, devices=2)) for _ in range(2)
        ]
        executor, ends = stack.enter_context(concurrent.futures.ThreadPoolExecutor()), []
        for victim, pair in enumerate(pairs):
            wait_for(pair, "together 3")
            pair.each[victim].send_signal(signal.SIGKILL)
            ends.append(executor.submit(pair.each[1 - victim].wait, 60))
        yield list(zip(ends, pairs, strict=True))


def test_two_processes_learn_what_one_does_and_one_continues_what_two_began(tmp_path):
    """Two processes take two RL steps; one takes them again from the checkpoint before the first."""
    two, one = tmp_path / "two", tmp_path / "one"
    options = ("--config.train.steps=2", "--config.warm_start.steps=3", "--config.eval.before=False", "--config.eval.every=0",
               "--config.optim.lr=3e-4", "--config.rollout.groups=3", "--config.mesh.fsdp=2",
               "--config.warm_start.optimizer=muon", "--config.warm_start.batch_tokens=192")  # fmt: skip
    with Processes(2, tmp_path, "-m", "epo_jax.main", SINGLE, f"--workdir={two}", *options) as running:
        assert running.codes(300) == [0, 0], running.said(0)[-2000:] + running.said(1)[-2000:]
        assert "mesh: 1 data, 2 fsdp, 1 tensor" in running.said(0) and "step 2/2" in running.said(0)
        assert "step" not in running.said(1)
    shutil.copytree(two, one)
    for step in (1, 2):
        shutil.rmtree(one / "checkpoints" / str(step))
    with Processes(1, tmp_path, "-m", "epo_jax.main", f"--workdir={one}", "--resume", devices=2) as running:
        assert running.codes(300) == [0], running.said(0)[-2000:]
    assert apart(learnt(one, 2), learnt(two, 2)) < 1e-5
    assert apart(learnt(two, 0), learnt(two, 2)) > 3e-4
    for name in ("metrics.jsonl", "eval.jsonl"):
        again, once = ([json.loads(line) for line in (folder / name).read_text().splitlines()] for folder in (one, two))
        for a, b in zip(again, once, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                if isinstance(a[key], float) and "second" not in key:
                    np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-5, err_msg=key)
    # The sample of episodes is the same, those that the second process played included.
    again, once = (list(map(story, read_rows(folder / "trajectories.jsonl"))) for folder in (one, two))
    assert again == once and len(once) > 6


def story(row):
    """An episode of trajectories.jsonl without numbers that rounding changes."""
    return {**row, "turns": [{key: turn[key] for key in ("observation", "tokens", "action")} for turn in row["turns"]]}


def test_a_notice_to_one_process_stops_all_after_the_same_step(tmp_path):
    """SIGTERM is what a machine that is about to be taken away sends."""
    options = ("--config.train.steps=900", "--config.warm_start.steps=3", "--config.eval.before=False", "--config.eval.every=0",
               "--config.checkpoint.every=900")  # fmt: skip
    run = tmp_path / "run"
    with Processes(2, tmp_path, "-m", "epo_jax.main", SINGLE, f"--workdir={run}", *options) as running:
        wait_for(running, "step   2/900")
        running.each[1].send_signal(signal.SIGTERM)
        assert running.codes(60) == [75, 75], running.said(0)[-2000:] + running.said(1)[-2000:]
        said = running.said(0) + running.said(1)
    last = max(int(folder.name) for folder in (run / "checkpoints").iterdir())
    assert last >= 2 and said.count(f"stopped as asked, {last} RL steps done and saved") == 2


def test_what_one_process_refuses_ends_the_others_with_its_words(tmp_path):
    with Processes(2, tmp_path, "-c", EXCHANGE, only={0: ("fail",)}, devices=2) as running:
        assert running.codes(60) == [2, 1]
        assert "error: the game is damaged.\n" in running.said(0)
        assert "error: process 0 on " in running.said(1) and "failed: UserError: the game is damaged." in running.said(1)


def test_a_process_that_fails_while_the_others_are_busy_is_named(tmp_path):
    with Processes(2, tmp_path, "-c", EXCHANGE, only={0: ("busy",), 1: ("fail",)}, devices=2) as running:
        assert running.codes(60) == [1, 2]
        assert "error: the game is damaged.\n" in running.said(1)
        assert "error: process 1 on " in running.said(0) and "has failed" in running.said(0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_a_message(killed, victim):
    end, running = killed[victim]
    assert end.result() != 0
    told = running.said(1 - victim)
    if victim:
        assert "error: process 1 on " in told and "no sign of life" in told and "--resume" in told
    else:
        assert "another task died" in told or "error: process 0" in told


def test_hosts_use_public_jax_alone():
    private = re.compile(r"\b(jax|jaxlib|orbax|flax|optax)(\.\w+)*\._\w+\b")
    assert not [file for file in (ROOT / "epo_jax").rglob("*.py") if private.search(file.read_text())]


def wait_for(running: Processes, text: str, seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while text not in running.said(0):
        assert time.monotonic() < until and all(p.poll() is None for p in running.each), running.said(0) + running.said(1)
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--processes=2"], "--coordinator is missing"),
        (["--processes=2", "--process=2", "--coordinator=host:1"], "--process=2 must be from 0 to 1"),
        (["--processes=2", "--process=1", "--coordinator=host"], "--coordinator=host has no port"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(tmp_path, options, culprit):
    with pytest.raises(UserError, match=culprit):
        program.main(["main", SINGLE, f"--workdir={tmp_path / 'run'}", *options])
    assert not (tmp_path / "run").exists()


def test_shares_are_neighbours_and_make_up_the_whole(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda i=process: i)
        shares.append(hosts.share(list(range(8))))
    assert shares == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_processes_with_other_tasks_are_refused(monkeypatch):
    hosts.agree("tasks", [1])
    monkeypatch.setattr(hosts, "gather", lambda digest: [digest, digest, "another"])
    with pytest.raises(UserError, match="tasks of process 2 differ from those of process 0"):
        hosts.agree("tasks", [1])


def test_a_run_folder_that_is_not_everybodys_is_refused(monkeypatch, tmp_path):
    (tmp_path / "config.json").touch()
    hosts.check_shared(tmp_path)
    monkeypatch.setattr(hosts, "_SILENCE", 0.0)
    with pytest.raises(UserError, match="other is not one folder for all: process 0 does not see"):
        hosts.check_shared(tmp_path / "other")
