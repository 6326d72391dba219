"""The training loop, for one run or the members of a sweep.

The members share a program; a run is a sweep of one.

`train` is the whole of it: each RL step samples episodes, packs them, takes one train step, writes what came of it, and now and
then evaluates and saves. Everything that a function needs is in `Run`, which never changes, in `States` on the devices, and in
`Host`, which is what the host remembers from step to step.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import NamedTuple

import orbax.checkpoint as ocp

from epo_jax.common import keys, progress
from epo_jax.common.errors import Stopped, UserError
from epo_jax.common.stopping import StopRequest
from epo_jax.envs.base import Task
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models.tokenizer import ChatTokenizer
from epo_jax.objectives.batch import TokenBatch
from epo_jax.parallel import hosts
from epo_jax.rollout.collect import Player, collect, warn_full
from epo_jax.rollout.episode import Episode
from epo_jax.rollout.prompts import RolloutConfig, SamplingConfig
from epo_jax.rollout.scheduler import RolloutStats
from epo_jax.rollout.trajectory import Trajectory, choose_groups
from epo_jax.runs import checkpoint, figures, metrics, profiling
from epo_jax.runs.checkpoint import NOT_EVALUATED, Progress
from epo_jax.runs.ledger import Ledger, Member
from epo_jax.runs.trajectory_log import TrajectoryLog
from epo_jax.training import flops
from epo_jax.training.batch import step_batch
from epo_jax.training.evaluation import Evaluation, episodes_of, evaluations, row_of
from epo_jax.training.members import Placement, States
from epo_jax.training.optim import stuck
from epo_jax.training.record import step_row
from epo_jax.training.resume import begins_at, missing_evaluations
from epo_jax.training.state import LearnerConfig
from epo_jax.training.tasks import step_episodes


class Files(NamedTuple):
    """What a member writes.

    On several hosts, the first one alone has a writer.
    """

    folder: Path
    manager: ocp.CheckpointManager
    writer: metrics.MetricWriter | None
    log: TrajectoryLog


@dataclasses.dataclass(frozen=True)
class Run:
    """The members of one program, and what the loop needs.

    Attributes:
        members, files, tokenizers: one for each member. The members' configs differ in coefficients and seeds alone.
        placement: where the members are computed.
        settings: of a rollout.
        tasks: of each split.
        ledger: of a sweep, in which a member may stop while others continue; None for a single run.
    """

    members: list[Member]
    files: list[Files]
    learner: LearnerConfig
    placement: Placement
    tokenizers: list[ChatTokenizer]
    settings: RolloutConfig
    pool: EnvPool
    tasks: dict[str, list[Task]]
    profile: profiling.Profile
    stop: StopRequest
    ledger: Ledger | None = None

    @property
    def config(self):
        """What all members' configs share."""
        return self.members[0].config


@dataclasses.dataclass
class Host:
    """What the host remembers from step to step.

    Attributes:
        first_step: RL steps done before this process.
        living: indices of the members that have not stopped.
        progress: of each member; `wall_seconds` of earlier processes.
        resumed: whether there is a checkpoint of `first_step` already.
        began: when this process began with these members, on `time.perf_counter`.
        durations: seconds of each RL step of this process.
    """

    first_step: int
    living: list[int]
    progress: list[Progress]
    resumed: bool
    began: float
    durations: list[float] = dataclasses.field(default_factory=list)

    def wall_seconds(self, i: int) -> float:
        """Cumulative wall-clock seconds of member `i`, including earlier processes."""
        return self.progress[i].wall_seconds + time.perf_counter() - self.began


class Played(NamedTuple):
    """The episodes of a member in an RL step.

    Attributes:
        rounds: all of them. The first round has the tasks as they come; later ones replace uniform groups.
        chosen: those to train on; `uniform` of their groups have one return.
    """

    rounds: list[list[Trajectory]]
    chosen: list[Trajectory]
    uniform: int


def train(run: Run, states: States, host: Host) -> None:
    """Trains the members to the end, or until every member has stopped.

    Raises:
        Stopped: the process was asked to stop; all members are saved.
        UserError: a single run cannot go on, as no gradient is finite.
    """
    config, hypers = run.config, [member.hyper for member in run.members]
    for step in range(host.first_step, config.train.steps):
        run.profile.begin(step)
        started = time.perf_counter()
        with run.stop.now_or(functools.partial(end_early, run, states, host, step)):
            played, stats = sample(run, states, host.living, step)
        sampled = time.perf_counter()
        batches = pack(run, played, step)
        compiles = " (its program is compiled first, which takes about half a minute)" * (step == host.first_step)
        with progress.shown(f"update of RL step {step + 1}{compiles}"):
            states, learned = run.placement.update(states, batches, hypers)
        seconds = {"rollout_seconds": sampled - started, "update_seconds": time.perf_counter() - sampled}
        done, last = step + 1, step + 1 == config.train.steps
        run.profile.finish(done)
        record(run, host, step, played, batches, learned, stats, seconds)
        if not continuing(run, host, step, learned):
            break
        success, improved = not_evaluated(run), False
        if last or (config.eval.every and done % config.eval.every == 0):
            success = evaluate(run, states, host, done, evaluations(config.eval))
            improved = raise_best(host, success)
            if not last:  # at the end, the run draws them itself
                draw(run)
        if last or done % config.checkpoint.every == 0 or (improved and config.checkpoint.keep_best):
            save(run, states, host, success)
        if not last and asked_to_stop(run, done):
            end_early(run, states, host, done)


def begin(run: Run, states: States, host: Host) -> None:
    """The evaluation and the checkpoint that are due before `train`.

    They are those of step 0, or what a process left out when it was stopped.

    Raises:
        Stopped: as `train`.
    """
    run.stop.defer()
    config, step, before = run.config, host.first_step, list(host.progress)
    if step == 0:
        due = evaluations(config.eval) if config.eval.before else []
    else:
        missing = {each for i in host.living for each in missing_evaluations(config, run.files[i].folder, step)}
        due = [evaluation for evaluation in evaluations(config.eval) if evaluation in missing]
    success = evaluate(run, states, host, step, due) if due else not_evaluated(run)
    raise_best(host, success)
    if not host.resumed:
        save(run, states, host, success)
        wait_for_saves(run)  # from here on a killed run can be resumed
        return
    for i in host.living:
        if host.progress[i] != before[i] or (step and success[i] != NOT_EVALUATED):
            checkpoint.rank(run.files[i].manager, step, host.progress[i], success[i])


def sample(run: Run, states: States, living: list[int], step: int) -> tuple[list[Played | None], RolloutStats]:
    """Plays the episodes of RL step `step` for each living member.

    With dynamic sampling (DAPO), a member plays up to `rollout.resample` more rounds while groups of its episodes are uniform:
    have one return.
    """
    config, resamples = run.config, run.learner.objective.drop_uniform_groups
    played: list[Played | None] = [None] * len(run.members)
    stats, waiting = RolloutStats(), living
    for attempt in range(1 + config.rollout.resample if resamples else 1):
        episodes = [
            step_episodes(run.tasks["train"], member.config, step, attempt) if i in waiting else []
            for i, member in enumerate(run.members)
        ]
        sampled, spent = play(run, states, episodes, "rollout", SamplingConfig(config.rollout.temperature))
        stats += spent
        for i in waiting:
            rounds = [*(played[i].rounds if played[i] else []), sampled[i]]
            played[i] = Played(rounds, *choose_groups(rounds, config.rollout.groups))
        waiting = [i for i in waiting if played[i].uniform]
        if not waiting:
            break
    return played, stats


def play(
    run: Run, states: States, episodes: list[list[Episode]], purpose: str, sampling: SamplingConfig
) -> tuple[list[list[Trajectory]], RolloutStats]:
    """Plays each member's episodes with its policy.

    `purpose` names the stream of random numbers.
    """
    players = [
        Player(mine, tokenizer, keys.key(member.config.seed, purpose))
        for mine, tokenizer, member in zip(episodes, run.tokenizers, run.members, strict=True)
    ]
    return collect(players, run.placement.policies(states), run.pool, run.learner.model, run.settings, sampling, purpose)


def pack(run: Run, played: list[Played | None], step: int) -> list[TokenBatch | None]:
    """The batch of every member that played."""
    return [
        mine and step_batch(member.config, member.objective, step, mine.chosen, run.learner.micro_rows, run.placement.home)
        for member, mine in zip(run.members, played, strict=True)
    ]


def record(
    run: Run,
    host: Host,
    step: int,
    played: list[Played | None],
    batches: list[TokenBatch | None],
    learned: list[dict[str, float]],
    stats: RolloutStats,
    seconds: dict[str, float],
) -> None:
    """Writes what RL step `step` resulted in, and prints its line.

    Args:
        learned: metrics of each member's train step.
        seconds: `rollout_seconds` and `update_seconds`, of all members together.
    """
    config, rows = run.config, []
    if config.metrics.trajectories_every and step % config.metrics.trajectories_every == 0:
        for i in host.living:
            run.files[i].log.write(step, "train", played[i].rounds[0])
    restarts = sum(hosts.gather(run.pool.restarts))
    host.durations.append(sum(seconds.values()))
    if not hosts.is_first():
        return
    if step == host.first_step:
        warn_full([t for i in host.living for t in played[i].rounds[0]], run.settings)
    for i in host.living:
        rounds, chosen, uniform = played[i]
        row = step_row(run.members[i].config, step, rounds, uniform, stats, learned[i])
        row |= seconds | {"wall_seconds": host.wall_seconds(i)}
        row |= flops.rates(run.learner, sum(rounds, []), chosen, **seconds, devices=run.placement.mesh.size)
        row |= {"env_restarts": restarts, "rows": int(batches[i].rows.sum())}
        rows.append(run.files[i].writer.train(row))
    left = metrics.seconds_left(host.durations, config.train.steps - step - 1)
    print(metrics.progress_line(rows[0], config.train.steps, left) if len(run.members) == 1 else
          metrics.members_line(rows, config.train.steps, left), flush=True)  # fmt: skip


def continuing(run: Run, host: Host, step: int, learned: list[dict[str, float]]) -> bool:
    """Counts RL steps without a finite gradient; whether any member continues.

    Raises:
        UserError: a single run had `train.max_skipped` of them in a row. A member of a sweep stops.
    """
    most = run.config.train.max_skipped
    for i in list(host.living):
        skipped = host.progress[i].skipped + 1 if stuck(learned[i]) else 0
        host.progress[i] = host.progress[i]._replace(skipped=skipped)
        if skipped >= most and run.ledger is None:
            raise UserError(
                f"No update of the last {skipped} RL steps had a finite gradient; the weights are as before them: lower the "
                f"rate with --workdir={run.files[i].folder} --resume --config.optim.lr=RATE, or begin from an earlier "
                f"checkpoint with --config.init_from.run={run.files[i].folder} --config.init_from.step=STEP in another --workdir."
            )
        if skipped >= most:
            host.living.remove(i)
            run.ledger.stop(run.members[i], step)
            print(f"{run.members[i].name} stops: no update of its last {skipped} RL steps had a finite gradient", flush=True)
    return bool(host.living)


def evaluate(run: Run, states: States, host: Host, step: int, due: list[Evaluation]) -> list[float]:
    """Evaluates every living member; its success on the last split at `eval.temperature`."""
    seeds, success = [member.config.seed for member in run.members], not_evaluated(run)
    # Before the first step, members of one seed are one policy.
    players = [i if step > begins_at(run.config) else seeds.index(seeds[i]) for i in range(len(seeds))]
    playing = {players[i] for i in host.living}
    for evaluation in due:
        split, ranks = evaluation.split, evaluation.temperature is None
        with run.stop.now_or(functools.partial(end_early, run, states, host, step)):
            episodes = [episodes_of(run.tasks[split]) if i in playing else [] for i in range(len(seeds))]
            sampled, stats = play(run, states, episodes, "evaluation", evaluation.sampling(run.config.eval))
        rows = []
        for i in host.living:
            trajectories = sampled[players[i]]
            row = row_of(evaluation, step, trajectories, stats.seconds)
            if ranks:
                success[i] = row["success"]
                run.files[i].log.write(step, split, trajectories)
            if hosts.is_first():
                rows.append(run.files[i].writer.evaluation(row))
        if hosts.is_first():
            warn_full([t for i in playing for t in sampled[i]], run.settings)
            print(metrics.evaluation_table(rows[0]) if len(run.members) == 1 else
                  metrics.members_table([run.members[i].name for i in host.living], rows), flush=True)  # fmt: skip
    return success


def draw(run: Run) -> None:
    """Draws the curves so far of a single run."""
    if hosts.is_first() and run.ledger is None:
        figures.draw(run.files[0].folder)


def not_evaluated(run: Run) -> list[float]:
    """The success of members that were not evaluated."""
    return [NOT_EVALUATED] * len(run.members)


def raise_best(host: Host, success: list[float]) -> bool:
    """Keeps the best success of each member; whether one of them improved."""
    improved = [i for i in host.living if success[i] > host.progress[i].best]
    for i in improved:
        host.progress[i] = host.progress[i]._replace(best=success[i])
    return bool(improved)


def save(run: Run, states: States, host: Host, success: list[float]) -> None:
    """Starts writing a checkpoint of every living member, ranked by `success`."""
    wait_for_saves(run)  # so that no member is ever more than one checkpoint behind another
    for i in host.living:
        progress = host.progress[i]._replace(wall_seconds=host.wall_seconds(i))
        checkpoint.save(run.files[i].manager, run.placement.member(states, i), progress, success[i])


def wait_for_saves(run: Run) -> None:
    """Returns once every checkpoint is on disk."""
    for files in run.files:
        files.manager.wait_until_finished()


def asked_to_stop(run: Run, done: int) -> bool:
    """Whether all processes stop now, as one was asked to.

    A machine that is about to be taken away counts too.
    """
    return run.files[0].manager.reached_preemption(done) or any(hosts.gather(run.stop.asked_here))


def end_early(run: Run, states: States, host: Host, step: int) -> None:
    """Saves what is not saved yet after `step` RL steps; raises Stopped."""
    wait_for_saves(run)
    if any(step not in run.files[i].manager.all_steps() for i in host.living):
        save(run, states, host, not_evaluated(run))
    wait_for_saves(run)
    raise Stopped(run.stop.sentence(f"{step} RL steps done and saved"))
