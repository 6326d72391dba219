"""Trains an agent with EPO.

    python -m epo_jax.main --config=configs/alfworld.py:laptop --workdir=runs/alfworld

Read `train` from top to bottom: it is the whole run. On several hosts each of them runs it (epo_jax/parallel/hosts.py).
"""

import contextlib
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from epo_jax.command import parse, run
from epo_jax.common import compilation, keys
from epo_jax.common.errors import Stopped, UserError
from epo_jax.common.stopping import StopRequest
from epo_jax.envs.base import environment
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models import attention, lora
from epo_jax.models.decoder import decoder_config, param_axes, with_adapters
from epo_jax.models.tokenizer import load_tokenizer
from epo_jax.parallel import hosts, mesh
from epo_jax.rollout import prompts, scheduler
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.runs import checkpoint, figures, frozen_base, lock, profiling, wandb_log
from epo_jax.runs.folder import Command, open_workdir, record_changes
from epo_jax.runs.metrics import MetricWriter, evaluation_table, progress_line, read_rows, seconds_left
from epo_jax.runs.policies import decoder_of_run, fit_vocabulary, keep_decoder, load_pretrained, load_source
from epo_jax.runs.trajectory_log import TrajectoryLog
from epo_jax.training import flops, warm_start
from epo_jax.training.batch import step_batch
from epo_jax.training.evaluation import evaluate
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.initial_policy import (
    blank_params,
    clone_experts,
    expert_demonstrations,
    expert_trajectories,
    keep_base,
    own_tokenizer,
)
from epo_jax.training.optim import stuck
from epo_jax.training.record import step_row
from epo_jax.training.resume import refuse_changes_of_state, source_state, splits_to_evaluate
from epo_jax.training.state import abstract_state_on, init_state_on, state_shardings
from epo_jax.training.step import batch_shardings, make_train_step
from epo_jax.training.tasks import step_episodes


def main(argv: list[str]) -> None:
    command = parse(argv, define_flags)
    with (
        StopRequest(command.workdir) as stop,
        hosts.joined(command.flags),
        lock.hold(*written(command)) if hosts.is_first() else contextlib.nullcontext(),
    ):
        compilation.keep_programs()
        train(command, stop)


def written(command: Command) -> list[Path]:
    """The folders on this machine in which the run writes."""
    folder = command.config.checkpoint.folder
    return [command.workdir, *([Path(folder)] if folder and "://" not in folder else [])]


def define_flags(values: flags.FlagValues) -> None:
    hosts.define_flags(values)
    profiling.define_flag(values)


def train(command: Command, stop: StopRequest) -> None:
    # ---------------------------------------------------------------- the run: refuse bad input before anything is written
    began = time.perf_counter()
    config, workdir = command.config, command.workdir
    profile_first, profile_end = profiling.window(command.flags.profile_steps, config.train.steps)
    objective, hyper = objective_and_hyper(config)
    print(mesh.devices_in_use(), flush=True)
    devices = mesh.make_mesh(**config.mesh.to_dict())
    scheduler.check_devices(config.rollout.devices)
    attention.check_rows(config.train.rows_tokens)
    checkpoints = checkpoint.place(workdir, config.checkpoint.folder)
    if config.checkpoint.folder and not command.resume:
        checkpoint.refuse_used(checkpoints)
    # A run that was killed before its first checkpoint begins anew.
    resumed = command.resume and checkpoint.newest(checkpoints) is not None
    if command.resume and not resumed and read_rows(workdir / "metrics.jsonl"):
        raise UserError(f"--resume: {checkpoints} holds none of the run's checkpoints; put them back, or begin in a new folder.")
    if resumed:
        tokenizer = load_tokenizer(workdir / "tokenizer")
        model = decoder_of_run(workdir, config, tokenizer)
    elif config.init_from.run:
        tokenizer, model, params, _, _ = load_source(config, devices)
    elif config.model.path:
        tokenizer, model, params = load_pretrained(config, devices)
    else:
        model = decoder_config(config.model)
    mesh.check(devices, model, config.train.rows_tokens)
    trained = with_adapters(model, config.model) if config.model.lora_rank else model
    state_shardings(learner_config(config, trained, objective, mesh.row_shards(devices)), devices)  # refuses what it cannot share
    env_options = config.env.to_dict()
    env = environment(config.env.name)
    env.prepare(env_options)
    train_tasks = env.list_tasks("train", env_options)
    eval_tasks = {split: env.list_tasks(split, env_options) for split in config.eval.splits}
    task_ids = [task["id"] for tasks in (train_tasks, *eval_tasks.values()) for task in tasks]
    hosts.agree("config and tasks", [config.to_dict(), task_ids])
    print(f"{len(train_tasks)} training tasks; evaluation on " + ", ".join(f"{len(t)} {s}" for s, t in eval_tasks.items()))
    wandb_run = wandb_log.begin(config.metrics.wandb_project, workdir, config.to_dict()) if hosts.is_first() else None
    if not resumed:
        demonstrations = [] if config.init_from.run else expert_demonstrations(config, train_tasks)
        if not config.model.path and not config.init_from.run:
            tokenizer = own_tokenizer(config, demonstrations)
            model = fit_vocabulary(model, tokenizer, workdir)
        shown = expert_trajectories(config, tokenizer, demonstrations)

    # ---------------------------------------------------------------- the run folder
    if hosts.is_first():
        open_workdir(command)
    hosts.check_shared(workdir)
    manager = checkpoint.open_manager(checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    if devices.size > 1:
        print("mesh: " + ", ".join(f"{n} {axis}" for axis, n in devices.shape.items()))

    # ---------------------------------------------------------------- the policy that RL begins with
    if not resumed:
        if not config.model.path and not config.init_from.run:
            params = blank_params(config, model, tokenizer)
            params = mesh.place(params, mesh.shardings(devices, params, param_axes(model)))
        if hosts.is_first():
            tokenizer.save(workdir / "tokenizer")
        print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters, {tokenizer.vocab_size} tokens of vocabulary")
        if shown:
            stop.defer()
            params = clone_experts(config, model, params, shown, workdir / "warm_start", stop)
        if config.model.lora_rank:
            keep_base(config, workdir, model, params, published=bool(config.model.path) and not demonstrations)
        if config.model.lora_rank and not model.lora:
            model = with_adapters(model, config.model)
            adapters = lora.init_adapters(model, keys.key(config.seed, "adapters"))
            _, axes = lora.split(param_axes(model))
            params = lora.join(params, mesh.place(adapters, mesh.shardings(devices, adapters, axes)))

    # ---------------------------------------------------------------- learner
    learner = learner_config(config, model, objective, mesh.row_shards(devices))
    if resumed:
        refuse_changes_of_state(config, command.changes, model)
        base_kept = all(hosts.gather(frozen_base.is_kept(workdir)))  # else a run of version 1, with the base in each checkpoint
        like = abstract_state_on(learner, devices)
        state, before = checkpoint.restore(manager, like)
        if model.lora:
            state = state._replace(base=frozen_base.load(workdir, config, model, like.base))
            if not base_kept:
                frozen_base.store(workdir, model, state.base)
    elif config.init_from.run and config.init_from.state == "everything":
        state, before = source_state(config, learner, devices, params)
    else:
        state, before = init_state_on(learner, params, devices), checkpoint.Progress()
    print(f"{sum(p.size for p in jax.tree.leaves(state.params)):,} parameters are trained")
    train_step = make_train_step(learner, devices)
    first_step, best, skipped = int(state.step), before.best, 0 if command.changes else before.skipped
    if profile_first is not None and profile_first < first_step:
        asked = command.flags.profile_steps
        raise UserError(f"--profile_steps={asked}: the run goes on from step {first_step}; name later steps.")

    if hosts.is_first():
        keep_decoder(workdir, config, model)
        record_changes(command.changes, workdir, first_step)

    # ---------------------------------------------------------------- rollout
    settings = prompts.rollout_config(config)
    kept = config.metrics

    with contextlib.ExitStack() as stack:
        stack.callback(manager.close)  # whatever ends the loop, a save under way is waited for
        pool = stack.enter_context(EnvPool(config.env.name, env_options, config.env.workers))
        profile = stack.enter_context(profiling.Profile(workdir / "profile", profile_first, profile_end))
        if hosts.is_first():
            writer = stack.enter_context(MetricWriter(workdir, first_step, wandb_run))
            log = TrajectoryLog(workdir, first_step, tokenizer, kept.trajectories, kept.trajectories_megabytes)

        def evaluate_all(step: int, splits: Sequence[str] = config.eval.splits) -> float:
            success = checkpoint.NOT_EVALUATED
            for split in splits:
                with stop.now_or(functools.partial(end_early, step)):
                    row, played = evaluate(
                        split, eval_tasks[split], step, pool, tokenizer, model, state.policy(), settings,
                        config.eval.temperature, config.seed, config.eval.top_k, config.eval.top_p,
                    )  # fmt: skip
                if hosts.is_first():
                    print(evaluation_table(writer.evaluation(row)), flush=True)
                    log.write(step, split, played)
                success = row["success"]
            return success

        def wall_seconds() -> float:
            return before.wall_seconds + time.perf_counter() - began

        def save(success: float = checkpoint.NOT_EVALUATED) -> None:
            checkpoint.save(manager, state, checkpoint.Progress(wall_seconds(), best, skipped), success)

        def end_early(step: int) -> None:
            manager.wait_until_finished()
            if step not in manager.all_steps():
                save()
            manager.wait_until_finished()
            raise Stopped(stop.sentence(f"{step} RL steps done and saved"))

        def play(step: int, attempt: int) -> tuple[list[Trajectory], scheduler.RolloutStats]:
            with stop.now_or(functools.partial(end_early, step)):
                episodes, key = step_episodes(train_tasks, config, step, attempt), keys.key(config.seed, "rollout")
                player, sampling = scheduler.Player(episodes, tokenizer, key), prompts.SamplingConfig(config.rollout.temperature)
                (trajectories,), stats = scheduler.collect([player], state.policy(), pool, model, settings, sampling)
                return trajectories, stats

        # ------------------------------------------------------------ the loop
        stop.defer()
        evaluated = checkpoint.NOT_EVALUATED
        if first_step == 0:
            if config.eval.before:
                evaluated = evaluate_all(0)
        elif missing := splits_to_evaluate(config, workdir, first_step):
            evaluated = evaluate_all(first_step, missing)
        best = max(best, evaluated)
        if not resumed:
            save(evaluated)
            manager.wait_until_finished()  # from here on a killed run can be resumed
        elif best != before.best or (first_step and evaluated != checkpoint.NOT_EVALUATED):
            checkpoint.rank(manager, first_step, before._replace(best=best), evaluated)
        if hosts.is_first():
            warm_start.clear(workdir / "warm_start")
        durations = []
        for step in range(first_step, config.train.steps):
            profile.begin(step)
            started = time.perf_counter()
            sampled, stats = play(step, 0)
            rounds = [sampled]
            trajectories, uniform = scheduler.choose_groups(rounds, config.rollout.groups)
            while objective.drop_uniform_groups and uniform and len(rounds) <= config.rollout.resample:
                more, spent = play(step, len(rounds))
                rounds, stats = [*rounds, more], stats + spent
                trajectories, uniform = scheduler.choose_groups(rounds, config.rollout.groups)
            if stop.asked:
                end_early(step)
            rolled_out = time.perf_counter()
            batch = step_batch(config, objective, step, trajectories, learner.micro_rows)
            batch = mesh.place(batch, batch_shardings(devices))
            state, metrics = train_step(state, batch, hyper)
            metrics = {name: float(value) for name, value in metrics.items()}
            updated = time.perf_counter()
            skipped = skipped + 1 if stuck(metrics) else 0
            if skipped >= config.train.max_skipped:
                raise UserError(
                    f"No update of the last {skipped} RL steps had a finite gradient; the weights are as before them: lower the "
                    f"rate with --workdir={workdir} --resume --config.optim.lr=RATE, or begin from an earlier checkpoint with "
                    f"--config.init_from.run={workdir} --config.init_from.step=STEP in another --workdir."
                )

            seconds = {"rollout_seconds": rolled_out - started, "update_seconds": updated - rolled_out}
            speeds = flops.rates(learner, sum(rounds, []), trajectories, **seconds, devices=devices.size)
            seconds["wall_seconds"] = wall_seconds()
            restarts, asked = zip(*hosts.gather([pool.restarts, stop.asked_here]), strict=True)
            counts = {"env_restarts": sum(restarts), "rows": int(batch.rows.sum())}
            done = step + 1
            profile.finish(done)
            durations.append(updated - started)
            if hosts.is_first():
                if step == first_step:
                    scheduler.warn_full(sampled, settings)
                row = writer.train(step_row(config, step, rounds, uniform, stats, metrics) | seconds | speeds | counts)
                if kept.trajectories_every and step % kept.trajectories_every == 0:
                    log.write(step, "train", sampled)
                print(progress_line(row, config.train.steps, seconds_left(durations, config.train.steps - done)), flush=True)
            last, improved, success = done == config.train.steps, False, checkpoint.NOT_EVALUATED
            if last or (config.eval.every and done % config.eval.every == 0):
                success = evaluate_all(done)
                improved, best = success > best, max(success, best)
            if last or done % config.checkpoint.every == 0 or (improved and config.checkpoint.keep_best):
                save(success)
            if not last and (manager.reached_preemption(done) or any(asked)):
                end_early(done)

    # ---------------------------------------------------------------- results
    for path in figures.draw(workdir) if hosts.is_first() else ():
        print(f"wrote {path}")
    if skipped:
        raise UserError(
            f"No update of the last {skipped} RL steps had a finite gradient: the run is over, but its weights are as before "
            "them; begin a new one with a lower config.optim.lr, from a checkpoint of this one with "
            f"--config.init_from.run={workdir}."
        )


if __name__ == "__main__":
    sys.exit(run(main))
