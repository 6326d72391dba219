"""Trains an agent with EPO.

    python -m epo_jax.main --config=configs/alfworld.py:laptop --workdir=runs/alfworld

Read `train` from top to bottom: it is the whole run. On several hosts each of them runs it (epo_jax/hosts.py).
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from epo_jax import (
    checkpoint,
    figures,
    flops,
    frozen_base,
    hosts,
    keys,
    lock,
    mesh,
    profiling,
    prompting,
    rollout,
    sft,
    wandb_log,
    warm_start,
)
from epo_jax.command import Changes, Command, open_workdir, parse, read_config, record_changes, run
from epo_jax.envs.alfworld_rename import rename
from epo_jax.envs.base import Demonstration, Task, environment
from epo_jax.envs.pool import EnvPool
from epo_jax.errors import Stopped, UserError
from epo_jax.evaluate import evaluate
from epo_jax.folders import decoder_of_run, fit_vocabulary, keep_decoder, load_pretrained, load_source
from epo_jax.learner import batch_shardings, make_train_step
from epo_jax.metrics import MetricWriter, Row, evaluation_table, progress_line, read_rows, seconds_left
from epo_jax.models import attention, lora
from epo_jax.models.decoder import DecoderConfig, Params, decoder_config, init_params, with_adapters
from epo_jax.models.tokenizer import ChatTokenizer, compose_embedding, load_tokenizer, train_tokenizer
from epo_jax.objectives import entropy, registry
from epo_jax.objectives.loss import Hyper, ObjectiveConfig
from epo_jax.optim import OptimConfig, stuck
from epo_jax.stopping import StopRequest
from epo_jax.train_state import (
    LearnerConfig,
    TrainState,
    abstract_state,
    abstract_state_on,
    init_state_on,
    state_shardings,
)
from epo_jax.trajectory import TokenBatch, Trajectory, entropy_by_turn, pack
from epo_jax.trajectory_log import TrajectoryLog


def main(argv: list[str]) -> None:
    command = parse(argv, define_flags)
    with (
        StopRequest(command.workdir) as stop,
        hosts.joined(command.flags),
        lock.hold(*written(command)) if hosts.is_first() else contextlib.nullcontext(),
    ):
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
    rollout.check_devices(config.rollout.devices)
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
            params = mesh.place(params, mesh.shardings(devices, params))
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
            params = lora.join(params, mesh.place(adapters, mesh.shardings(devices, adapters)))

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
        record_changes(command, workdir, first_step)

    # ---------------------------------------------------------------- rollout
    settings = prompting.rollout_config(config)
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

        def play(step: int, attempt: int) -> tuple[list[Trajectory], rollout.RolloutStats]:
            with stop.now_or(functools.partial(end_early, step)):
                return rollout.collect(
                    step_episodes(train_tasks, config, step, attempt),
                    pool,
                    tokenizer,
                    model,
                    state.policy(),
                    keys.key(config.seed, "rollout"),
                    settings,
                    config.rollout.temperature,
                )

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
            trajectories, uniform = rollout.choose_groups(rounds, config.rollout.groups)
            while objective.drop_uniform_groups and uniform and len(rounds) <= config.rollout.resample:
                more, spent = play(step, len(rounds))
                rounds, stats = [*rounds, more], stats + spent
                trajectories, uniform = rollout.choose_groups(rounds, config.rollout.groups)
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
                    rollout.warn_full(sampled, settings)
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


def keep_base(config, workdir: Path, model: DecoderConfig, params: Params, published: bool) -> None:
    """Keeps the frozen base of adapters for the run: by reference where it is a published model as it was."""
    base = lora.split(params)[0]
    if config.init_from.run and model.lora:
        frozen_base.copy(config.init_from.run, workdir, model, base)
    elif published and not config.init_from.run:
        frozen_base.refer(workdir, frozen_base.digest(base), None)
    else:
        frozen_base.store(workdir, model, base)


def source_state(config, learner: LearnerConfig, devices, params: Params) -> tuple[TrainState, checkpoint.Progress]:
    """The whole state of the run that `config.init_from` names; its entropy history gets the length that this run needs."""
    source = config.init_from
    step = None if source.step < 0 else source.step
    with checkpoint.open_reader(checkpoint.place(source.run, read_config(source.run).checkpoint.folder)) as reader:
        steps = checkpoint.history_steps(reader, step)
        like = abstract_state_on(dataclasses.replace(learner, total_steps=steps), devices)
        state, before = checkpoint.restore(reader, like, step)
    base = lora.split(params)[0] if learner.model.lora else {}
    return state._replace(history=entropy.resize(state.history, config.train.steps), base=base), before._replace(skipped=0)


def refuse_changes_of_state(config, changes: Changes, model: DecoderConfig) -> None:
    """Raises UserError for a change by which the train state would have other arrays than the run's checkpoints."""

    def arrays(config) -> list:
        state = abstract_state(learner_config(config, model, objective_and_hyper(config)[0]))
        return [(path, leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]

    for key, (old, new) in changes.items():
        before = ConfigDict(config.to_dict())
        section, _, leaf = key.partition(".")
        before[section][leaf] = old
        if arrays(before) != arrays(config):
            raise UserError(
                f"--resume: config.{key}={new!r} in place of {old!r} changes the arrays of the state that the run saved; begin a "
                "new run from it with config.init_from."
            )


def splits_to_evaluate(config, workdir: Path, step: int) -> list[str]:
    """The splits whose evaluation after RL step `step` is due and missing, as the run was stopped in it."""
    if step != config.train.steps and (not config.eval.every or step % config.eval.every):
        return []
    evaluated = {row["split"] for row in read_rows(workdir / "eval.jsonl") if row["step"] == step}
    return hosts.gather([split for split in config.eval.splits if split not in evaluated])[0]


def expert_demonstrations(config, tasks: list[Task]) -> list[Demonstration]:
    """Expert episodes of tasks drawn by the run's seed, each followed by its renamed copies where they are asked for; lost
    ones only with `warm_start.lost`.

    Raises:
        UserError: experts are asked for and there is nothing to clone.
    """
    settings, env = config.warm_start, environment(config.env.name)
    if not settings.episodes:
        return []
    drawn = keys.generator(config.seed, "demonstrations").permutation(len(tasks))[: settings.episodes]
    chosen = [tasks[i] for i in drawn]
    times = 1 + settings.copies
    demonstrations = env.demonstrations([task for task in chosen for _ in range(times)], config.env.to_dict())
    if times > 1:
        copies = [d for i, d in enumerate(demonstrations) if i % times]
        demonstrations = demonstrations[::times] + rename(copies, config.seed)
    asked = len(chosen) * times
    missing = asked - len(demonstrations)
    lost = sum(not d.won for d in demonstrations)
    kept = demonstrations if settings.lost else [d for d in demonstrations if d.won]
    told = (
        f"of {asked} expert episodes, {missing} do not exist within config.env.max_turns={config.env.max_turns} turns and {lost} "
        "are lost"
    )
    if not kept:
        clone_lost = ", set config.warm_start.lost=True to clone lost ones," if lost else ""
        raise UserError(
            f"config.warm_start.episodes={settings.episodes}: there is nothing to clone: {told}; raise "
            f"config.env.max_turns{clone_lost} or set config.warm_start.episodes=0 to train without a warm start."
        )
    if missing or lost:
        print(f"warm start: {told}" + ", which are cloned as well (config.warm_start.lost)" * (settings.lost and lost > 0))
    return kept


def expert_trajectories(config, tokenizer: ChatTokenizer, demonstrations: list[Demonstration]) -> list[Trajectory]:
    """The expert episodes in tokens, those whose contexts all fit in `agent.max_tokens`.

    Raises:
        UserError: none fits.
    """
    play = prompting.rollout_config(config)
    trajectories = [sft.to_trajectory(d, tokenizer, play) for d in demonstrations]
    fitting = [t for t in trajectories if t.longest_context <= config.agent.max_tokens]
    if not demonstrations:
        return []
    if not fitting:
        raise UserError(
            f"config.agent.max_tokens={config.agent.max_tokens}: none of the {len(trajectories)} expert episodes of the warm "
            f"start fits, the shortest needs {min(t.longest_context for t in trajectories)} tokens; raise it and "
            "config.train.rows_tokens, or set config.warm_start.episodes=0."
        )
    mean = np.mean([len(t.tokens) for t in fitting])
    print(
        f"warm start on {len(fitting)} expert episodes, {mean:.0f} tokens each"
        + f"; {len(trajectories) - len(fitting)} do not fit in config.agent.max_tokens={config.agent.max_tokens}"
        * (len(fitting) < len(trajectories)),
        flush=True,
    )
    return fitting


def own_tokenizer(config, demonstrations: list[Demonstration]) -> ChatTokenizer:
    """A tokenizer made from what the experts saw and did, of config.model.vocab_size tokens.

    Texts that do not yield as many give a multiple of 32, which costs some rare merges: the tokenizers of other seeds then
    define the same ids, and a sweep trains those seeds in one program.
    """
    window = prompting.window_of(config)
    texts = [text for d in demonstrations for pair in sft.transcript(d, config.agent.style, window) for text in pair]
    phrases, size = environment(config.env.name).phrases, config.model.vocab_size
    tokenizer = train_tokenizer(texts, size, phrases)
    rounded = tokenizer.vocab_size // 32 * 32
    if rounded < tokenizer.vocab_size < size:
        tokenizer = train_tokenizer(texts, rounded, phrases)
    return tokenizer


def blank_params(config, model: DecoderConfig, tokenizer: ChatTokenizer) -> Params:
    """Weights to train from scratch."""
    params = jax.jit(init_params, static_argnums=0)(model, keys.key(config.seed, "weights"))
    params["embedding"] = compose_embedding(np.asarray(params["embedding"]), tokenizer, config.seed)
    return params


def step_batch(
    config, objective: ObjectiveConfig, step: int, trajectories: list[Trajectory], micro_rows: int
) -> TokenBatch:
    """What the learner sees of RL step `step`, in micro-batches of `micro_rows`: the mini-batches of every epoch, each of which
    deals the episodes to them in another order."""
    # The release's mini-batches are cut from turns, inside the train step, and are the same in every epoch.
    mini_batches, epochs = (1, 1) if objective.released else (config.algo.mini_batches, config.algo.epochs)
    orders = np.stack([
        keys.generator(config.seed, "mini-batches", step, epoch).permutation(len(trajectories)) for epoch in range(epochs)
    ])  # fmt: skip
    return pack(
        trajectories,
        config.train.rows_tokens,
        config.train.rows_policy_tokens,
        config.env.max_turns,
        mini_batches,
        micro_rows,
        orders,
        *contexts(config),
        seed=config.seed,
    )


def step_row(
    config, step: int, rounds: list[list[Trajectory]], uniform: int, stats: rollout.RolloutStats, metrics: dict[str, float]
) -> Row:
    """The row of metrics.jsonl that the episodes and the learner's metrics of an RL step come to."""
    # Of the first round: what the policy does on tasks as they come, not on those chosen by their returns.
    sampled, center = rounds[0], metrics["corridor_center"]
    played = [t for trajectories in rounds for t in trajectories]
    policy_tokens = sum(t.num_policy_tokens for t in played)
    return {
        "step": step,
        "success": np.mean([t.won for t in sampled]),
        "reward": np.mean([sum(t.rewards) for t in sampled]),
        "score": np.mean([t.score for t in sampled]),
        "turns": np.mean([len(t.actions) for t in sampled]),
        "invalid_actions": 1.0 - np.mean([v for t in sampled for v in t.valid]),
        "tokens": np.mean([len(t.tokens) for t in sampled]),
        "truncated": np.mean([t.truncated for t in sampled]),
        "full_context": np.mean([t.full for t in sampled]),
        "rollout_rounds": len(rounds),
        "uniform_groups": uniform,
        "corridor_low": config.epo.kappa_l * center if step else None,
        "corridor_high": config.epo.kappa_r * center if step else None,
        **{f"entropy_turn_{turn}": entropy for turn, entropy in entropy_by_turn(sampled).items()},
        "prompt_tokens": sum(len(t.tokens) for t in played) - policy_tokens,
        "policy_tokens": policy_tokens,
        "tokens_per_second": stats.policy_tokens / stats.seconds,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "env_wait_seconds": stats.env_wait_seconds,
        "env_steps": stats.env_steps,
        **metrics,
        "learner_entropy": metrics["entropy"],
        "entropy": metrics["behaviour_entropy"],
    }


def step_episodes(tasks: list[Task], config, step: int, attempt: int) -> list[rollout.Episode]:
    """The episodes of a round of RL step `step`: round 0 goes through the training split pass by pass, the rounds that
    replace uniform groups draw from all of it."""
    groups = config.rollout.groups
    if attempt:
        drawn = keys.generator(config.seed, "resampling", step, attempt).permutation(len(tasks))
        chosen = [tasks[drawn[i % len(tasks)]] for i in range(groups)]
    else:
        chosen = step_tasks(tasks, config.seed, step, groups)
    return grouped_episodes(chosen, step + attempt * config.train.steps, config.rollout.group_size)


def step_tasks(tasks: list[Task], seed: int, step: int, groups: int) -> list[Task]:
    """The tasks of RL step `step`: the training split in an order shuffled anew for each pass over it."""
    chosen = []
    for position in range(step * groups, (step + 1) * groups):
        epoch, place = divmod(position, len(tasks))
        chosen.append(tasks[keys.generator(seed, "tasks", epoch).permutation(len(tasks))[place]])
    return chosen


def contexts(config) -> tuple[int, int]:
    """(most contexts of a trajectory, contexts that fit in a row of the learner's however long they are)."""
    if config.agent.context == "chat":
        return 1, 1
    by_tokens = config.train.rows_tokens // config.agent.max_tokens
    by_policy_tokens = config.train.rows_policy_tokens // config.agent.response_tokens
    return config.env.max_turns, min(by_tokens, by_policy_tokens)


def grouped_episodes(tasks: list[Task], number: int, size: int) -> list[rollout.Episode]:
    """`size` episodes of each task, one group a task. With a `number` of its own for each round of a run, no id is used
    twice."""
    first = number * len(tasks) * size
    return [rollout.Episode(first + i, tasks[i // size], group=i // size) for i in range(len(tasks) * size)]


def clone_experts(
    config, model: DecoderConfig, params: Params, trajectories: list[Trajectory], folder: Path, stop: StopRequest
) -> Params:
    """The warm start, with a line now and then; returns the cloned parameters. `params` are donated.

    Asked to stop, it leaves its updates in `folder`, from where it goes on.

    Raises:
        Stopped: then.
    """
    settings, optim = config.warm_start, cloning_optim(config)
    rows = max(1, settings.batch_tokens // config.train.rows_tokens)
    found = warm_start.restore(folder, params, optim)
    if found is not None:
        print(f"the first {found.updates} updates of the warm start are done", flush=True)
    cloning = sft.warm_start(
        params, trajectories, model, optim, config.train.rows_tokens, rows, settings.prompt_weight, config.seed, found
    )
    started = time.perf_counter()
    for cloned in cloning:
        params, updates = cloned.params, cloned.updates
        if updates % max(1, settings.steps // 10) == 0:
            seconds = time.perf_counter() - started
            told = f"warm start {updates}/{settings.steps}  cross-entropy {cloned.cross_entropy:.3f} nats/token  {seconds:.0f} s"
            print(told, flush=True)
        if stop.asked and updates < settings.steps:
            warm_start.save(folder, cloned)
            raise Stopped(stop.sentence(f"{updates} updates of the warm start done and saved"))
    return params


def cloning_optim(config) -> OptimConfig:
    """The optimizer of the warm start."""
    settings = config.warm_start
    return OptimConfig(
        settings.lr,
        settings.steps,
        weight_decay=config.optim.weight_decay,
        floor_ratio=0.1,
        b2=0.98,
        muon=settings.optimizer == "muon",
    )


def objective_and_hyper(config) -> tuple[ObjectiveConfig, Hyper]:
    """The objective of the arm that `algo.name` names, with the config's choices and coefficients."""
    algo, epo = config.algo, config.epo
    objective = ObjectiveConfig(
        gae_scope=algo.gae_scope,
        whiten=algo.whiten,
        format_penalty_place=algo.format_penalty_place,
        aggregation=algo.aggregation,
        kl=algo.kl_kind if algo.kl_coef else "none",
        kl_place=algo.kl_place,
        kl_controller=algo.kl_controller,
        recompute_old_log_prob=_recomputes_old_log_prob(config),
        truncated_importance=algo.importance_cap > 0,
        penalty=epo.penalty,
        penalty_scope=epo.scope,
        history=epo.history,
        history_index=epo.history_index,
        phase=epo.phase,
        turn_gate=epo.turn_gate,
        nucleus=config.control.nucleus,
        entropy_aggregation=epo.aggregation,
        num_trajectories=config.rollout.groups * config.rollout.group_size,
        max_turns=config.env.max_turns,
        max_tokens=config.agent.max_tokens,
        turn_tokens=config.agent.response_tokens,
        mini_turns=algo.released_mini_turns,
        micro_turns=algo.released_micro_turns,
    )
    coefficients = {**config.control.to_dict(), **epo.to_dict(), **algo.to_dict(), "gamma": epo.gamma, "discount": algo.gamma}
    coefficients["lr"] = config.optim.lr
    hyper = Hyper(**{name: value for name, value in coefficients.items() if name in Hyper._fields})
    objective, hyper = registry.arm(algo.name, objective, hyper)
    return objective, jax.tree.map(np.float32, hyper)


def _recomputes_old_log_prob(config) -> bool:
    """Whether the log-probabilities before the update are the learner's own: on request, and off float32, where sampler and
    learner, two programs, round so differently that ratios of the two are no longer 1 before the first update."""
    rollout = config.rollout
    exact = config.model.dtype == "float32" and rollout.dtype in ("", "float32") and not rollout.cache_dtype
    return config.algo.old_log_prob == "learner" or (config.algo.old_log_prob == "auto" and not exact)


def learner_config(config, model, objective: ObjectiveConfig, row_shards: int = 1) -> LearnerConfig:
    """What is static about the run's train step, on a mesh that deals rows to `row_shards`."""
    algo = config.algo
    updates = config.train.steps * (1 if objective.released else algo.epochs * algo.mini_batches)

    def optim(**changes) -> OptimConfig:
        settings = config.optim.to_dict() | {"lr": 1.0} | changes  # the rates themselves are in Hyper
        return OptimConfig(updates=updates, released=objective.released, **settings)

    critic = {"warmup_ratio": 0.0, "floor_ratio": 1.0} if objective.released else {}  # the release's critic has one rate

    return LearnerConfig(
        model=model,
        objective=objective,
        optim=optim(),
        critic_optim=optim(**critic) if objective.estimator == "gae" else None,
        reference=objective.kl != "none",
        epochs=algo.epochs,
        micro_rows=algo.micro_batch_rows * row_shards,
        total_steps=config.train.steps,
        temperature=config.rollout.temperature,
        critic=algo.critic,
        episode_policy_tokens=(
            config.env.max_turns * config.agent.response_tokens if config.agent.context == "window" else None
        ),
    )


if __name__ == "__main__":
    sys.exit(run(main))
