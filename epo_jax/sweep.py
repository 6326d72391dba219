"""Trains many runs at once: the members of a sweep, which differ in coefficients and seeds, in one compiled program.

    python -m epo_jax.sweep --config=configs/ablation.py:laptop --workdir=sweeps/first

`--config.sweep.arms`, `.seeds` and `.over` say who the members are (`epo_jax.training.grid`). Each has a run folder of its own,
WORKDIR/members/NAME, as `epo_jax.main` would have left it; WORKDIR/sweep.json lists them with what tells them apart, and
WORKDIR/warm_start/seedN keeps what the members of a seed begin with.

What members share is done once: the environments' processes, expert episodes and warm start of a seed, the evaluation before
the first step, compilation. Arms that need another program are trained one after the other.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from epo_jax.command import parse, run
from epo_jax.common import compilation, keys
from epo_jax.common.errors import Stopped, UserError, explain
from epo_jax.common.files import write_atomically
from epo_jax.common.stopping import StopRequest
from epo_jax.envs.base import Task, environment
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models import attention, lora, weights
from epo_jax.models.decoder import DecoderConfig, Params, decoder_config, with_adapters
from epo_jax.models.members import Members
from epo_jax.models.tokenizer import ChatTokenizer, load_tokenizer
from epo_jax.parallel.mesh import devices_in_use
from epo_jax.rollout import prompts, scheduler
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.runs import checkpoint, figures, frozen_base, lock, wandb_log
from epo_jax.runs.folder import Command, open_workdir, record_changes, write_config
from epo_jax.runs.metrics import MetricWriter, Row, clock, read_rows, seconds_left
from epo_jax.runs.policies import decoder_of_run, fit_vocabulary, keep_decoder, load_pretrained, load_source
from epo_jax.runs.trajectory_log import TrajectoryLog
from epo_jax.training import flops, warm_start
from epo_jax.training.batch import step_batch
from epo_jax.training.evaluation import episodes_of, row_of
from epo_jax.training.from_config import learner_config
from epo_jax.training.grid import Member, programs, refuse_static
from epo_jax.training.initial_policy import blank_params, clone_experts, expert_demonstrations, expert_trajectories, own_tokenizer
from epo_jax.training.members import make_members_step, member_mesh, stack
from epo_jax.training.record import step_row
from epo_jax.training.resume import refuse_changes_of_state, splits_to_evaluate
from epo_jax.training.state import abstract_state, init_state
from epo_jax.training.tasks import step_episodes


def main(argv: list[str]) -> None:
    # ---------------------------------------------------------------- the sweep: refuse bad input before anything is written
    for argument in argv:
        if match := re.match(r"--?config\.sweep\.over\.([^=]+)", argument):
            refuse_static(match[1])
    command = parse(argv, sweep=True)
    with StopRequest(command.workdir) as stop, lock.hold(command.workdir):
        run_programs(command, stop)


def run_programs(command: Command, stop: StopRequest) -> None:
    print(devices_in_use(), flush=True)
    compilation.keep_programs()
    config = command.config
    groups = programs(config)
    refuse_what_members_cannot_share(config)
    attention.check_rows(config.train.rows_tokens)
    if config.metrics.wandb_project:
        wandb_log.package(config.metrics.wandb_project)
    pretrained = functools.cache(functools.partial(published, config))
    if not command.resume:
        pretrained()
    env_options = config.env.to_dict()
    env = environment(config.env.name)
    env.prepare(env_options)
    tasks = {split: env.list_tasks(split, env_options) for split in ("train", *config.eval.splits)}
    ledger = Ledger(command.workdir, groups)
    if command.resume:
        ledger.refuse_other_members()
        going = [some for members in groups for some in alike(members, ledger.vocabulary)]
        for members in going:
            if (model := ledger.model(members[0])) is not None:
                refuse_changes_of_state(members[0].config, command.changes, model)
        steps = {member.name: step for some in going for step in [resume_point(some, ledger) or 0] for member in some}
    open_workdir(command)
    kept = command.workdir / "warm_start"
    beginner = functools.cache(functools.partial(begin, config, tasks["train"], pretrained, kept, stop))

    # ---------------------------------------------------------------- one program after the other
    folders = [ledger.folder(member) for member in sum(groups, [])]
    with lock.hold(*folders), EnvPool(config.env.name, env_options, config.env.workers) as pool:
        ledger.open()
        if command.resume:
            record_changes(command.changes, command.workdir, min(steps.values()))
            for member in sum(groups, []):
                record_changes(command.changes, ledger.folder(member), steps[member.name])
        for number, members in enumerate(groups, start=1):
            with stop.now():  # a request that came when the last program had done its last step
                pass
            print(f"program {number} of {len(groups)}, {len(members)} members: " + ", ".join(m.name for m in members), flush=True)
            for some in alike(members, lambda member: ledger.model(member) or beginner(member.coefficients["seed"]).model):
                train(command, some, ledger, beginner, tasks, pool, stop)

    # ---------------------------------------------------------------- results
    for member in sum(groups, []):
        figures.draw(ledger.folder(member))
    for name, step in ledger.stopped.items():
        print(f"{name} stopped at RL step {step + 1}: its parameters were no longer finite")
    print(f"wrote {command.workdir}/sweep.json and the run folders of {sum(map(len, groups))} members")
    if len(ledger.stopped) == len(folders):
        raise UserError("Every member of the sweep stopped, as none stayed finite; lower config.optim.lr in a new one.")


def refuse_what_members_cannot_share(config) -> None:
    """Raises UserError for settings of single runs that a sweep has no use for."""
    sizes = {"rollout.devices": (config.rollout.devices, 1)} | {f"mesh.{axis}": (size, 0) for axis, size in config.mesh.items()}
    for key, (size, alone) in sizes.items():
        if size > 1:
            raise UserError(
                f"config.{key}={size} must be {alone} in a sweep, whose members are spread over devices instead "
                "(config.sweep.devices)."
            )
    if config.checkpoint.folder:
        raise UserError(
            f"config.checkpoint.folder={config.checkpoint.folder!r} must be '' in a sweep; each member has a folder."
        )
    for key in ("at_once", "devices"):
        if config.sweep[key] < 0:
            raise UserError(f"config.sweep.{key}={config.sweep[key]} must be zero or positive.")
    if config.init_from.state == "everything" and config.init_from.run:
        raise UserError(
            "config.init_from.state='everything' must be 'weights' in a sweep, whose members begin at RL step 0; a single run "
            "(python -m epo_jax.main) can go on from another's whole state."
        )
    own_bases = (config.warm_start.episodes or not config.model.path) and not config.init_from.run
    if config.model.lora_rank and len(set(config.sweep.seeds)) > 1 and own_bases:
        raise UserError(
            f"config.sweep.seeds={config.sweep.seeds}: with config.model.lora_rank members share their base, which would be "
            "another for each seed here; take one seed, or a config.model.path with config.warm_start.episodes=0."
        )


class Beginner(NamedTuple):
    """The policy that the members of a seed begin with, adapters included; `kept` is the model folder of its weights without
    them, None where there is none."""

    tokenizer: ChatTokenizer
    model: DecoderConfig
    params: Params
    kept: Path | None


def published(config) -> tuple[ChatTokenizer, DecoderConfig, Params] | None:
    """The policy that all seeds begin with, if one is named: another run's, or a published model."""
    if config.init_from.run:
        return load_source(config)[:3]
    return load_pretrained(config) if config.model.path else None


def begin(config, train_tasks: list[Task], pretrained: Callable, kept: Path, stop: StopRequest, seed: int) -> Beginner:
    """The beginner of a seed: cloned from experts, which is done once and kept as a model folder in `kept`.

    The base of adapters is kept there too, unless it is a published model.
    """
    config = ConfigDict(config.to_dict())
    config.seed = seed
    folder, source = kept / f"seed{seed}", pretrained()
    saved = (folder / "config.json").exists()  # written last
    cloned = saved and not config.init_from.run
    demonstrations = [] if saved or config.init_from.run else expert_demonstrations(config, train_tasks)
    if source is not None:
        tokenizer, model, params = source
    else:
        tokenizer = load_tokenizer(folder) if cloned else own_tokenizer(config, demonstrations)
        model = fit_vocabulary(decoder_config(config.model), tokenizer, folder)
        params = {} if cloned else blank_params(config, model, tokenizer)
    if cloned:
        try:
            params = weights.load_params(folder, model)
        except UserError as error:
            what = explain(error, "move that folder away, and the warm start is made again")
            raise UserError(f"The weights in {folder} cannot be read {what}.") from error
    elif demonstrations:
        print(f"seed {seed}:", end=" ")
        # The weights that are cloned are given away; pretrained ones are needed again.
        shown = expert_trajectories(config, tokenizer, demonstrations)
        stop.defer()
        params = clone_experts(config, model, jax.tree.map(jnp.copy, params), shown, folder / "updates", stop)
    if not saved and (demonstrations or (config.model.lora_rank and (config.init_from.run or not config.model.path))):
        tokenizer.save(folder)
        weights.save_params(folder, dataclasses.replace(model, lora=None), lora.split(params)[0])
        warm_start.clear(folder / "updates")
    if config.model.lora_rank and not model.lora:
        model = with_adapters(model, config.model)
        params = lora.join(params, lora.init_adapters(model, keys.key(seed, "adapters")))
    return Beginner(tokenizer, model, params, folder if (folder / "config.json").exists() else None)


def alike(members: list[Member], key: Callable[[Member], Any]) -> list[list[Member]]:
    """Those members of a program together that train one model: tokenizers that were made for each seed may define different
    numbers of ids, and a program has those that it must not sample as constants."""
    found: dict[Any, list[Member]] = {}
    for member in members:
        found.setdefault(key(member), []).append(member)
    return list(found.values())


class Ledger:
    """sweep.json: the members, what tells them apart, and at which RL step those stopped that are no longer finite."""

    def __init__(self, workdir: Path, groups: list[list[Member]]):
        self._workdir, self._members, self.name = workdir, sum(groups, []), workdir.name
        path = workdir / "sweep.json"
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["members"] if path.exists() else []
            self._before = [m["name"] for m in before]
            self.stopped: dict[str, int] = {m["name"]: m["stopped"] for m in before if m["stopped"] is not None}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read {explain(error, 'put a copy back')}.") from None

    def open(self) -> None:
        """Makes the members' run folders and writes sweep.json."""
        for member in self._members:
            self.folder(member).mkdir(parents=True, exist_ok=True)
            write_config(member.config, self.folder(member))
        self.write()

    def folder(self, member: Member) -> Path:
        return self._workdir / "members" / member.name

    def vocabulary(self, member: Member) -> int | None:
        """Size of a member's tokenizer; None before it has one."""
        folder = self.folder(member) / "tokenizer"
        return load_tokenizer(folder).vocab_size if folder.exists() else None

    def model(self, member: Member) -> DecoderConfig | None:
        """The decoder that a member trains, from its run folder; None before it has a checkpoint."""
        folder = self.folder(member)
        if checkpoint.newest(checkpoint.place(folder)) is None:
            return None
        return decoder_of_run(folder, member.config, load_tokenizer(folder / "tokenizer"))

    def refuse_other_members(self) -> None:
        """Raises UserError if the sweep had other members before."""
        before, now = ({*names} for names in (self._before, [m.name for m in self._members]))
        if before and before != now:
            raise UserError(
                f"--resume: the sweep had other members ({', '.join(sorted(before ^ now))}); leave those changes out."
            )

    def stop(self, member: Member, step: int) -> None:
        self.stopped[member.name] = step
        self.write()

    def go_back(self, members: list[Member], step: int) -> None:
        """Forgets what will be found again when these members go on from RL step `step`."""
        for member in members:
            if self.stopped.get(member.name, -1) >= step:
                del self.stopped[member.name]
        self.write()

    def write(self) -> None:
        members = [{"name": m.name, "coefficients": m.coefficients, "stopped": self.stopped.get(m.name)} for m in self._members]
        write_atomically(self._workdir / "sweep.json", json.dumps({"members": members}, indent=1) + "\n")


def last_common_step(held: list[set[int]], stopped: list[int | None]) -> int | None:
    """The newest RL step that all members have a checkpoint of, but for those that had stopped by then."""
    for step in sorted(set().union(*held), reverse=True):
        if all(step in steps for steps, stop in zip(held, stopped, strict=True) if stop is None or stop >= step):
            return step
    return None


def resume_point(members: list[Member], ledger: Ledger) -> int | None:
    """The RL step from which the members of a program go on; None where they have yet to begin.

    Raises:
        UserError: a member lacks checkpoints that others hold. A sweep that is killed while it saves leaves some members one
            checkpoint ahead, which is made again; more than that has been lost, and going back would lose the others' too.
    """
    folders = [ledger.folder(member) for member in members]
    stopped = [ledger.stopped.get(member.name) for member in members]
    held = [checkpoint.steps(checkpoint.place(folder)) for folder in folders]
    step = last_common_step(held, stopped)
    ahead = [{later for later in steps if step is None or later > step} for steps in held]
    began = any(read_rows(folder / "metrics.jsonl") for folder in folders)
    if max(map(len, ahead)) > 1 or (step is None and began):
        behind = min(range(len(members)), key=lambda i: max(held[i], default=-1) if stopped[i] is None else math.inf)
        lacking = ", ".join(map(str, sorted(set().union(*ahead) - held[behind]))) or "those of every step"
        go_on = "begin in a new folder" if step is None else f"move the other members' after step {step} away to go on from there"
        raise UserError(
            f"--resume: {folders[behind] / 'checkpoints'} lacks checkpoints that the sweep saved ({lacking}); put them back, or "
            f"{go_on}."
        )
    return step


def train(
    command: Command,
    members: list[Member],
    ledger: Ledger,
    beginner: Callable[[int], Beginner],
    tasks: dict[str, list[Task]],
    pool: EnvPool,
    stop: StopRequest,
) -> None:
    """Trains the members of one program to their end, from their last checkpoints where they have any."""
    sweep, config = command.config.sweep, members[0].config
    steps, groups = config.train.steps, config.rollout.groups
    folders, seeds = [ledger.folder(m) for m in members], [m.coefficients["seed"] for m in members]
    if all(member.name in ledger.stopped for member in members):
        return

    # ---------------------------------------------------------------- states
    # Two checkpoints, so that the members have one in common whenever the sweep is killed.
    managers = [checkpoint.open_manager(checkpoint.place(folder), max(2, config.checkpoint.keep)) for folder in folders]
    found = resume_point(members, ledger)
    first_step = found or 0
    ledger.go_back(members, first_step)
    if found is None:
        beginners = [beginner(seed) for seed in seeds]
        tokenizers, model = [b.tokenizer for b in beginners], beginners[0].model
        learner = learner_config(config, model, members[0].objective)
        states = [init_state(learner, b.params) for b in beginners]
        base = states[0].base
        for folder, tokenizer in zip(folders, tokenizers, strict=True):
            tokenizer.save(folder / "tokenizer")
        refer_to_base(folders, base, beginners[0].kept)
    else:
        tokenizers = [load_tokenizer(folder / "tokenizer") for folder in folders]
        model = decoder_of_run(folders[0], config, tokenizers[0])
        learner = learner_config(config, model, members[0].objective)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_state(learner))
        base = frozen_base.load(folders[0], config, model, like.base, found) if model.lora else {}
        # One that stopped earlier has no checkpoint of `found`, and will not move.
        at = [found if found in manager.all_steps() else None for manager in managers]
        states = [checkpoint.restore(manager, like, step)[0] for manager, step in zip(managers, at, strict=True)]
        if model.lora and not frozen_base.is_kept(folders[0]):  # version 1 had it in each checkpoint
            frozen_base.store(folders[0], model, base)
            refer_to_base(folders[1:], base, folders[0] / "model")
    for folder in folders:
        keep_decoder(folder, config, model)
    for manager in managers:  # what a kill left some members ahead of others; now that all are restored
        for later in [step for step in manager.all_steps() if found is None or step > found]:
            manager.delete(later)
    states = stack([state._replace(base={}) for state in states])
    alive = np.array([member.name not in ledger.stopped for member in members])

    # ---------------------------------------------------------------- programs
    mesh = member_mesh(len(members), sweep.devices)
    at_once = sweep.at_once or (1 if jax.default_backend() == "cpu" else len(members) // mesh.size)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("member"))
    states = jax.device_put(states, spread)
    base = jax.device_put(base, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    members_step = make_members_step(learner, at_once, mesh)
    hypers = stack([member.hyper for member in members])
    settings = dataclasses.replace(prompts.rollout_config(config), at_once=at_once)
    rollout_keys, evaluation_keys = ([keys.key(seed, purpose) for seed in seeds] for purpose in ("rollout", "evaluation"))

    def collect(episodes: list[list[scheduler.Episode]], own_keys, *sampling):
        players = list(map(scheduler.Player, episodes, tokenizers, own_keys))
        policies = Members(base, states.params)
        return scheduler.collect(players, policies, pool, model, settings, prompts.SamplingConfig(*sampling))

    def played(step: int) -> tuple[list[list[list[Trajectory]]], scheduler.RolloutStats]:
        """The rounds of every member, as many as dynamic sampling asks for, and what all of them took."""
        rounds: list[list[list[Trajectory]]] = [[] for _ in members]
        wanting, stats, attempt = alive, scheduler.RolloutStats(), 0
        while wanting.any():
            episodes = [
                step_episodes(tasks["train"], member.config, step, attempt) if wants else []
                for member, wants in zip(members, wanting, strict=True)
            ]
            sampled, spent = collect(episodes, rollout_keys, config.rollout.temperature)
            for mine, new, wants in zip(rounds, sampled, wanting, strict=True):
                mine += [new] if wants else []
            stats, attempt = stats + spent, attempt + 1
            again = members[0].objective.drop_uniform_groups and attempt <= config.rollout.resample
            wanting = np.array([
                bool(again and wants and scheduler.choose_groups(mine, groups)[1])
                for mine, wants in zip(rounds, wanting, strict=True)
            ])  # fmt: skip
        return rounds, stats

    with contextlib.ExitStack() as stack_of_writers:
        for manager in managers:  # whatever ends the loop, saves under way are waited for
            stack_of_writers.callback(manager.close)
        project, group = config.metrics.wandb_project, ledger.name
        writers = [
            stack_of_writers.enter_context(
                MetricWriter(folder, first_step, wandb_log.begin(project, folder, member.config.to_dict(), group))
            )
            for folder, member in zip(folders, members, strict=True)
        ]
        kept = config.metrics
        logs = [
            TrajectoryLog(folder, first_step, tokenizer, kept.trajectories, kept.trajectories_megabytes)
            for folder, tokenizer in zip(folders, tokenizers, strict=True)
        ]

        def evaluate_all(step: int, splits: Sequence[str] = config.eval.splits) -> None:
            # Before the first step, members of one seed are one policy.
            players = [alive[i] and (step > 0 or i == seeds.index(seeds[i])) for i in range(len(members))]
            rows = []
            for split in splits:
                episodes = [episodes_of(tasks[split]) if plays else [] for plays in players]
                sampling = config.eval.temperature, config.eval.top_k, config.eval.top_p
                with stop.now_or(functools.partial(end_early, step)):
                    sampled, stats = collect(episodes, evaluation_keys, *sampling)
                for i in np.flatnonzero(alive):
                    mine = sampled[i] if players[i] else sampled[seeds.index(seeds[i])]
                    rows.append((members[i].name, writers[i].evaluation(row_of(split, step, mine, stats.seconds))))
                    logs[i].write(step, split, mine)
            print(evaluations_table(rows), flush=True)

        def save_all() -> None:
            for manager in managers:  # so that no member is ever more than one checkpoint behind another
                manager.wait_until_finished()
            for i in np.flatnonzero(alive):
                checkpoint.save(managers[i], jax.tree.map(lambda x, i=i: x[i], states))

        def end_early(step: int) -> None:
            for manager in managers:
                manager.wait_until_finished()
            if any(step not in managers[i].all_steps() for i in np.flatnonzero(alive)):
                save_all()
            for manager in managers:
                manager.wait_until_finished()
            raise Stopped(stop.sentence(f"{step} RL steps done and saved"))

        # ------------------------------------------------------------ the loop
        stop.defer()
        if first_step == 0:
            if config.eval.before:
                evaluate_all(0)
        elif missing := {split for i in np.flatnonzero(alive) for split in splits_to_evaluate(config, folders[i], first_step)}:
            evaluate_all(first_step, [split for split in config.eval.splits if split in missing])
        if found is None:
            save_all()
            for manager in managers:  # from here on a killed sweep can be resumed
                manager.wait_until_finished()
        durations = []
        for step in range(first_step, steps):
            started = time.perf_counter()
            with stop.now_or(functools.partial(end_early, step)):
                rounds, stats = played(step)
            rolled_out = time.perf_counter()
            if step == first_step:
                scheduler.warn_full([t for sampled in rounds if sampled for t in sampled[0]], settings)
            living, batches, uniform = np.flatnonzero(alive), [None] * len(members), [0] * len(members)
            trained: list[list[Trajectory]] = [[] for _ in members]
            for i in living:
                trained[i], uniform[i] = scheduler.choose_groups(rounds[i], groups)
                batches[i] = step_batch(members[i].config, members[i].objective, step, trained[i], learner.micro_rows)
            empty = jax.tree.map(np.zeros_like, batches[living[0]])
            batches = stack([empty if batch is None else batch for batch in batches])
            states, metrics, still = members_step(states, base, batches, hypers, alive)
            metrics, still = jax.device_get((metrics, still))
            updated = time.perf_counter()

            seconds = {"rollout_seconds": rolled_out - started, "update_seconds": updated - rolled_out}
            rows = []
            for i in living:
                own = [t for sampled in rounds[i] for t in sampled]
                shared = dataclasses.replace(
                    stats, policy_tokens=sum(t.num_policy_tokens for t in own), env_steps=sum(len(t.actions) for t in own)
                )
                told = {name: float(values[i]) for name, values in metrics.items()}
                row = step_row(members[i].config, step, rounds[i], uniform[i], shared, told) | seconds
                row |= flops.rates(learner, own, trained[i], **seconds, devices=mesh.size)
                rows.append(writers[i].train(row | {"env_restarts": pool.restarts, "rows": int(batches.rows[i].sum())}))
                if kept.trajectories_every and step % kept.trajectories_every == 0:
                    logs[i].write(step, "train", rounds[i][0])
                if not still[i]:
                    print(f"{members[i].name} stops: its parameters are no longer finite", flush=True)
                    ledger.stop(members[i], step)
            alive = still
            done = step + 1
            durations.append(updated - started)
            print(progress_of_all(rows, steps, seconds_left(durations, steps - done)), flush=True)
            if not alive.any():
                break
            if done == steps or (config.eval.every and done % config.eval.every == 0):
                evaluate_all(done)
            if done == steps or done % config.checkpoint.every == 0:
                save_all()
            if stop.asked and done < steps:
                end_early(done)


def refer_to_base(folders: list[Path], base: Params, kept: Path | None) -> None:
    """Writes into run folders where the frozen base of their adapters is: in `kept`, None for the published model."""
    if jax.tree.leaves(base):
        digest = frozen_base.digest(base)
        for folder in folders:
            frozen_base.refer(folder, digest, kept and os.path.relpath(kept, folder / "model"))


def progress_of_all(rows: list[Row], steps: int, seconds: float) -> str:
    """The console line of an RL step: means over the members, and the range where it says more."""
    mean = {name: np.mean([row[name] for row in rows if row[name] is not None] or [math.nan]) for name in ("success", "entropy")}
    low, high = min(row["success"] for row in rows), max(row["success"] for row in rows)
    return (
        f"step {rows[0]['step'] + 1:>{len(str(steps))}}/{steps}  {len(rows)} members"
        f"  success {mean['success']:6.1%} [{low:.0%}, {high:.0%}]"
        f"  entropy {mean['entropy']:5.3f}"
        f"  {sum(row['tokens_per_second'] for row in rows):6.0f} tok/s"
        f"  rollout {rows[0]['rollout_seconds']:5.1f}s  update {rows[0]['update_seconds']:5.1f}s"
        f"  left {clock(seconds)}"
    )


def evaluations_table(rows: list[tuple[str, Row]]) -> str:
    """A line for each member and split: success with its 95 % interval."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(
        f"  {name:<{width}}  {row['split']:<12} after {row['step']} steps  {row['won']:>4}/{row['episodes']:<4}"
        f" {row['success']:6.1%}  [{row['low']:.1%}, {row['high']:.1%}]"
        for name, row in rows
    )


if __name__ == "__main__":
    sys.exit(run(main))
