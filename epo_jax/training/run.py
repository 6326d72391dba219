"""A single run, from its config to its results.

On several hosts each of them runs it (epo_jax/parallel/hosts.py).
"""

import contextlib
import time
from pathlib import Path

import jax
from jax.sharding import Mesh

from epo_jax.common.errors import UserError
from epo_jax.common.stopping import StopRequest
from epo_jax.envs.base import Task, environment
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models import attention
from epo_jax.models.decoder import DecoderConfig, decoder_config, with_adapters
from epo_jax.models.tokenizer import ChatTokenizer, load_tokenizer
from epo_jax.parallel import hosts, mesh
from epo_jax.rollout import prompts
from epo_jax.rollout.collect import check_devices
from epo_jax.runs import checkpoint, figures, processes, profiling, wandb_log
from epo_jax.runs.folder import Command, open_workdir, record_changes, train_longer
from epo_jax.runs.ledger import Member
from epo_jax.runs.metrics import MetricWriter, gains, read_rows
from epo_jax.runs.policies import decoder_of_run, keep_decoder
from epo_jax.runs.trajectory_log import TrajectoryLog
from epo_jax.settings.columns import column_line
from epo_jax.training import initial_policy, loop, warm_start
from epo_jax.training.from_config import learner_config, objective_and_hyper
from epo_jax.training.initial_policy import InitialPolicy
from epo_jax.training.members import in_turns
from epo_jax.training.resume import Restored, missing_evaluations, refuse_changes_of_state, restore, source_state
from epo_jax.training.state import LearnerConfig, init_state_on, state_shardings

FEW_STEPS = 5  # a run of so few is a test of the installation


def train(command: Command, stop: StopRequest) -> None:
    """Trains a run to its end, from its newest checkpoint if any.

    Raises:
        UserError: bad input, before anything is written; or training diverged.
        Stopped: the process was asked to stop, and the run can be resumed.
    """
    # ---------------------------------------------------------------- refuse bad input before anything is written
    began = time.perf_counter()
    config, workdir = command.config, command.workdir
    profile_steps = profiling.window(command.flags.profile_steps, config.train.steps)
    member = Member("", config, {}, *objective_and_hyper(config))
    print(mesh.devices_in_use(), flush=True)
    if line := column_line(config):
        print(line)
    devices = mesh.make_mesh(**config.mesh.to_dict())
    check_devices(config.rollout.devices)
    attention.check_rows(config.train.rows_tokens)
    checkpoints = checkpoint.place(workdir, config.checkpoint.folder)
    resumed = is_resumed(command, checkpoints)
    if resumed and is_finished(config, workdir, checkpoint.newest(checkpoints)):
        profiling.refuse_past(profile_steps, config.train.steps)
        print(f"{workdir} is finished: it has done its {config.train.steps} RL steps, so there is nothing to resume; "
              f"{train_longer(workdir, 2 * config.train.steps)}")  # fmt: skip
        return
    if resumed:
        tokenizer = load_tokenizer(workdir / "tokenizer")
        model = decoder_of_run(workdir, config, tokenizer)
    else:
        named = initial_policy.named_policy(config, devices)
        model = named.model if named else decoder_config(config.model)
    mesh.check(devices, model, config.train.rows_tokens)
    trained = with_adapters(model, config.model) if config.model.lora_rank else model
    state_shardings(learner_config(config, trained, member.objective, mesh.row_shards(devices)), devices)  # refuses
    tasks = list_tasks(config)
    hosts.agree("config and tasks", [config.to_dict(), [task["id"] for split in tasks.values() for task in split]])
    print(f"{len(tasks['train'])} training tasks; evaluation on "
          + ", ".join(f"{len(tasks[split])} {split}" for split in config.eval.splits))  # fmt: skip
    wandb_run = wandb_log.begin(config.metrics.wandb_project, workdir, config.to_dict()) if hosts.is_first() else None
    if not resumed:
        planned = initial_policy.plan(config, tasks["train"], named, workdir)
        tokenizer, model = planned.tokenizer, planned.model

    # ---------------------------------------------------------------- the run folder
    if hosts.is_first():
        open_workdir(command)
    hosts.check_shared(workdir)
    manager = checkpoint.open_manager(checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    if devices.size > 1:
        print("mesh: " + ", ".join(f"{n} {axis}" for axis, n in devices.shape.items()))

    # ---------------------------------------------------------------- the state
    if resumed:
        learner, restored = continue_run(command, model, devices, manager)
    else:
        learner, restored = begin_run(config, workdir, planned, devices, stop)
        del planned, named  # their weights were donated
    [state], [progress] = restored.own, restored.progress
    trained = sum(p.size for p in jax.tree.leaves(state.params))
    print(f"{trained:,} parameters are trained")
    first_step = int(state.step)
    profiling.refuse_past(profile_steps, first_step)
    if hosts.is_first():
        keep_decoder(workdir, config, model)
        record_changes(command.changes, workdir, first_step)
        processes.record(workdir, first_step, trained, command.arguments)

    # ---------------------------------------------------------------- the loop
    placement = in_turns(learner, devices)
    states = placement.place(restored.base, restored.own)
    del restored, state
    host = loop.Host(first_step, [0], [progress], resumed, began)
    with contextlib.ExitStack() as stack:
        stack.callback(manager.close)  # whatever ends the loop, a save under way is waited for
        pool = stack.enter_context(EnvPool(config.env.name, config.env.to_dict(), config.env.workers))
        profile = stack.enter_context(profiling.Profile(workdir / "profile", *profile_steps))
        files = open_files(stack, config, workdir, manager, first_step, tokenizer, wandb_run)
        settings = prompts.rollout_config(config)
        run = loop.Run([member], [files], learner, placement, [tokenizer], settings, pool, tasks, profile, stop)
        loop.begin(run, states, host)
        if hosts.is_first():
            warm_start.clear(workdir / "warm_start")
        loop.train(run, states, host)

    # ---------------------------------------------------------------- results
    for path in figures.draw(workdir) if hosts.is_first() else ():
        print(f"wrote {path}")
    for line in gains(read_rows(workdir / "eval.jsonl")) if hosts.is_first() else ():
        print(line)
    if config.train.steps <= FEW_STEPS:
        print(f"A run of {config.train.steps} RL steps shows that everything works; it is too short to learn anything.")
    if skipped := host.progress[0].skipped:
        raise UserError(
            f"No update of the last {skipped} RL steps had a finite gradient: the run is over, but its weights are as before "
            "them; begin a new one with a lower config.optim.lr, from a checkpoint of this one with "
            f"--config.init_from.run={workdir}."
        )


def is_resumed(command: Command, checkpoints) -> bool:
    """Whether a run continues from a checkpoint.

    A run that was killed before its first checkpoint begins again.

    Raises:
        UserError: the checkpoints of the run are gone, or those in the folder of a new run are another's.
    """
    if command.config.checkpoint.folder and not command.resume:
        checkpoint.refuse_used(checkpoints)
    resumed = command.resume and checkpoint.newest(checkpoints) is not None
    if command.resume and not resumed and read_rows(command.workdir / "metrics.jsonl"):
        raise UserError(f"--resume: {checkpoints} holds none of the run's checkpoints; put them back, or begin in a new folder.")
    return resumed


def is_finished(config, workdir: Path, step: int) -> bool:
    """Whether a run with a checkpoint of RL step `step` has nothing left to do: no RL step, evaluation or figure."""
    figures_drawn = (workdir / "figures").is_dir() or not hosts.is_first()
    return step >= config.train.steps and figures_drawn and not missing_evaluations(config, workdir, step)


def begin_run(config, workdir: Path, policy: InitialPolicy, devices: Mesh, stop: StopRequest) -> tuple[LearnerConfig, Restored]:
    """The state of a new run after its warm start; donates `policy`."""
    tokenizer, model = policy.tokenizer, policy.model
    params = initial_policy.initial_params(config, policy, devices)
    if hosts.is_first():
        tokenizer.save(workdir / "tokenizer")
    print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters, {tokenizer.vocab_size} tokens of vocabulary")
    if policy.experts:
        stop.defer()
        params = initial_policy.clone_experts(config, model, params, policy.experts, workdir / "warm_start", stop)
    if config.model.lora_rank:
        published = bool(config.model.path) and not policy.experts
        initial_policy.keep_base(config, workdir, model, params, published)
    model, params = initial_policy.add_adapters(config, model, params, devices)
    learner = learner_config(config, model, objective_and_hyper(config)[0], mesh.row_shards(devices))
    if config.init_from.run and config.init_from.state == "everything":
        return learner, source_state(config, learner, devices, params)
    state = init_state_on(learner, params, devices)
    return learner, Restored(state.base, [state._replace(base={})], [checkpoint.Progress()])


def continue_run(command: Command, model: DecoderConfig, devices: Mesh, manager) -> tuple[LearnerConfig, Restored]:
    """The state of a run that is resumed, from its newest checkpoint."""
    config = command.config
    refuse_changes_of_state(config, command.changes, model)
    learner = learner_config(config, model, objective_and_hyper(config)[0], mesh.row_shards(devices))
    restored = restore([command.workdir], [manager], config, learner, devices, None)
    return learner, restored.forgiven() if command.changes else restored


def list_tasks(config) -> dict[str, list[Task]]:
    """The tasks of the training split and of every evaluated split."""
    env, options = environment(config.env.name), config.env.to_dict()
    env.prepare(options)
    return {split: env.list_tasks(split, options) for split in ("train", *config.eval.splits)}


def written(config, workdir: Path) -> list[Path]:
    """The folders on this machine in which a run writes."""
    folder = config.checkpoint.folder
    return [workdir, *([Path(folder)] if folder and "://" not in folder else [])]


def open_files(
    stack: contextlib.ExitStack, config, folder: Path, manager, first_step: int, tokenizer: ChatTokenizer, wandb_run
) -> loop.Files:
    """What a run writes, from RL step `first_step` on; closed with `stack`."""
    kept = config.metrics
    writer = stack.enter_context(MetricWriter(folder, first_step, wandb_run)) if hosts.is_first() else None
    log = TrajectoryLog(folder, first_step, tokenizer, kept.trajectories, kept.trajectories_megabytes)
    return loop.Files(folder, manager, writer, log)
