"""A sweep, from its config to its results.

Programs run one after the other, the members of each together.

A member is a run whose folder is WORKDIR/members/NAME; `epo_jax.main` could resume it. What members share is done once: worker
processes, expert episodes and the warm start of a seed, the evaluation before the first step, compilation.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from epo_jax.common.errors import UserError, explain
from epo_jax.common.stopping import StopRequest
from epo_jax.envs.base import Task
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models import attention, lora, weights
from epo_jax.models.decoder import DecoderConfig, Params, decoder_config
from epo_jax.models.tokenizer import ChatTokenizer, load_tokenizer
from epo_jax.rollout import prompts
from epo_jax.runs import checkpoint, figures, lock, processes, profiling, wandb_log
from epo_jax.runs.folder import Command, open_workdir, record_changes
from epo_jax.runs.ledger import Ledger, Member
from epo_jax.runs.policies import decoder_of_run, fit_vocabulary, keep_decoder
from epo_jax.settings.columns import column_line
from epo_jax.training import initial_policy, loop, warm_start
from epo_jax.training.from_config import learner_config
from epo_jax.training.grid import programs, refuse_what_members_cannot_share
from epo_jax.training.initial_policy import InitialPolicy
from epo_jax.training.members import place_members
from epo_jax.training.resume import Restored, begins_at, refer_to_base, refuse_changes_of_state, restore, source_state
from epo_jax.training.run import FEW_STEPS, is_finished, list_tasks, open_files, written
from epo_jax.training.state import LearnerConfig, init_state


class SeedPolicy(NamedTuple):
    """The initial policy of the members of a seed.

    Attributes:
        params: with adapters, if the config asks for them.
        folder: the model folder of the weights without adapters; None for a published model.
    """

    tokenizer: ChatTokenizer
    model: DecoderConfig
    params: Params
    folder: Path | None


class Sweep(NamedTuple):
    """What all programs of a sweep share.

    `policy_of_seed` makes the initial policy of a seed, once.
    """

    command: Command
    ledger: Ledger
    policy_of_seed: Callable[[int], SeedPolicy]
    tasks: dict[str, list[Task]]
    pool: EnvPool
    profile_steps: tuple[int | None, int | None]
    stop: StopRequest


def train(command: Command, stop: StopRequest) -> None:
    """Trains every member of a sweep, from its checkpoints if there are any.

    Raises:
        UserError: bad input, before anything is written; or every member diverged.
        Stopped: the process was asked to stop, and the sweep can be resumed.
    """
    # ---------------------------------------------------------------- refuse bad input before anything is written
    config, workdir = command.config, command.workdir
    profile_steps = profiling.window(command.flags.profile_steps, config.train.steps)
    if line := column_line(config):
        print(line)
    groups = programs(config)
    members = sum(groups, [])
    refuse_what_members_cannot_share(config)
    attention.check_rows(config.train.rows_tokens)
    if config.metrics.wandb_project:
        wandb_log.package(config.metrics.wandb_project)
    named = named_policies(config)
    ledger = Ledger(workdir, members)
    if not command.resume:
        for seed in config.sweep.seeds:
            named(seed)
        for member in members:
            checkpoint.refuse_used(ledger.checkpoints(member))
    first_steps = {member.name: begins_at(config) for member in members}
    if command.resume:
        first_steps |= check_resumed(command, groups, ledger)
    profiling.refuse_past(profile_steps, min(first_steps.values()))
    if command.resume and not command.changes and is_over(ledger, members, first_steps):
        print(f"{workdir} is finished: its {len(members)} members have done their RL steps, so there is nothing to resume")
        return
    tasks = list_tasks(config)
    open_workdir(command)
    policy_of_seed = functools.cache(functools.partial(begin, config, tasks["train"], named, workdir / "warm_start", stop))

    # ---------------------------------------------------------------- one program after the other
    folders = [folder for member in members for folder in written(member.config, ledger.folder(member))]
    with lock.hold(*folders), EnvPool(config.env.name, config.env.to_dict(), config.env.workers) as pool:
        ledger.open()
        record_changes(command.changes, workdir, min(first_steps.values()))
        for member in members:
            record_changes(command.changes, ledger.folder(member), first_steps[member.name])
        sweep = Sweep(command, ledger, policy_of_seed, tasks, pool, profile_steps, stop)
        for number, group in enumerate(groups, start=1):
            with stop.now():  # a request that came when the last program had done its last step
                pass
            print(f"program {number} of {len(groups)}, {len(group)} members: " + ", ".join(m.name for m in group), flush=True)
            for some in alike(group, lambda member: ledger.model(member) or policy_of_seed(member.config.seed).model):
                if command.changes or not all(member.name in ledger.stopped for member in some):
                    train_program(sweep, some)

    # ---------------------------------------------------------------- results
    for member in members:
        figures.draw(ledger.folder(member))
    for name, step in ledger.stopped.items():
        print(f"{name} stopped at RL step {step + 1}: its updates had no finite gradient any more")
    print(f"wrote {workdir}/sweep.json and the run folders of {len(members)} members")
    if config.train.steps <= FEW_STEPS:
        print(f"Runs of {config.train.steps} RL steps show that everything works; they are too short to learn anything.")
    if len(ledger.stopped) == len(members):
        raise UserError("Every member of the sweep stopped, as none stayed finite; lower config.optim.lr in a new one.")


def check_resumed(command: Command, groups: list[list[Member]], ledger: Ledger) -> dict[str, int]:
    """{member's name: RL step from which it continues}, of those that have begun.

    Raises:
        UserError: the sweep had other members, its changes are impossible, or checkpoints are gone.
    """
    ledger.refuse_other_members()
    steps = {}
    for some in (some for group in groups for some in alike(group, ledger.vocabulary)):
        if (model := ledger.model(some[0])) is not None:
            refuse_changes_of_state(some[0].config, command.changes, model)
        if (step := ledger.resume_point(some)) is not None:
            steps |= dict.fromkeys((member.name for member in some), step)
    return steps


def is_over(ledger: Ledger, members: list[Member], first_steps: dict[str, int]) -> bool:
    """Whether no member has anything left to do: some have finished, and others may have stopped."""
    going = [member for member in members if member.name not in ledger.stopped]
    return bool(going) and all(is_finished(m.config, ledger.folder(m), first_steps[m.name]) for m in going)


def alike(members: list[Member], key: Callable[[Member], Any]) -> list[list[Member]]:
    """The members of one objective, grouped by the model that they train.

    `key` is a function of that model. Tokenizers that were made for each seed may define different numbers of ids, and a program
    has the ids that it must not sample as constants.
    """
    found: dict[Any, list[Member]] = {}
    for member in members:
        found.setdefault(key(member), []).append(member)
    return list(found.values())


def train_program(sweep: Sweep, members: list[Member]) -> None:
    """Trains the members of one program from their last common checkpoint."""
    began = time.perf_counter()
    ledger, config = sweep.ledger, members[0].config
    folders = [ledger.folder(member) for member in members]
    # Two checkpoints, so that the members have one in common whenever the sweep is killed.
    keep, keep_best = max(2, config.checkpoint.keep), config.checkpoint.keep_best
    managers = [checkpoint.open_manager(ledger.checkpoints(member), keep, keep_best) for member in members]
    found = ledger.resume_point(members)
    first_step = begins_at(config) if found is None else found
    ledger.go_back(members, first_step)

    # ---------------------------------------------------------------- the states
    if found is None:
        policies = [sweep.policy_of_seed(member.config.seed) for member in members]
        tokenizers, model = [each.tokenizer for each in policies], policies[0].model
    else:
        tokenizers = [load_tokenizer(folder / "tokenizer") for folder in folders]
        model = decoder_of_run(folders[0], config, tokenizers[0])
    learner = learner_config(config, model, members[0].objective)
    placement = place_members(learner, len(members), sweep.command.config.sweep)
    if found is None:
        restored = begin_members(members, folders, policies, learner, placement.home)
        del policies
    else:
        restored = restore(folders, managers, config, learner, placement.home, found)
        restored = restored.forgiven() if sweep.command.changes else restored
    for folder, state in zip(folders, restored.own, strict=True):
        keep_decoder(folder, config, model)
        parameters = sum(p.size for p in jax.tree.leaves(state.params))
        processes.record(folder, first_step, parameters, sweep.command.arguments)
    for manager in managers:  # what a kill left some members ahead of others; now that all are restored
        for later in [step for step in manager.all_steps() if found is None or step > found]:
            manager.delete(later)
    states = placement.place(restored.base, restored.own)
    living = [i for i, member in enumerate(members) if member.name not in ledger.stopped]
    host = loop.Host(first_step, living, restored.progress, found is not None, began)
    del restored

    # ---------------------------------------------------------------- the loop
    with contextlib.ExitStack() as stack:
        for manager in managers:  # whatever ends the loop, saves under way are waited for
            stack.callback(manager.close)
        profile = stack.enter_context(profiling.Profile(sweep.command.workdir / "profile", *sweep.profile_steps))
        files = []
        for member, folder, manager, tokenizer in zip(members, folders, managers, tokenizers, strict=True):
            wandb_run = wandb_log.begin(config.metrics.wandb_project, folder, member.config.to_dict(), ledger.name)
            files.append(open_files(stack, config, folder, manager, first_step, tokenizer, wandb_run))
        settings = dataclasses.replace(prompts.rollout_config(config), at_once=placement.at_once)
        run = loop.Run(
            members, files, learner, placement, tokenizers, settings, sweep.pool, sweep.tasks, profile, sweep.stop, ledger
        )
        loop.begin(run, states, host)
        loop.train(run, states, host)


def begin_members(
    members: list[Member], folders: list[Path], policies: list[SeedPolicy], learner: LearnerConfig, home: Mesh
) -> Restored:
    """The states of members that begin; writes tokenizers and base."""
    for folder, policy in zip(folders, policies, strict=True):
        policy.tokenizer.save(folder / "tokenizer")
    source = members[0].config.init_from
    if source.run and source.state == "everything":
        begun = [source_state(m.config, learner, home, policy.params) for m, policy in zip(members, policies, strict=True)]
        refer_to_base(folders, begun[0].base, policies[0].folder)
        return Restored(begun[0].base, [each.own[0] for each in begun], [each.progress[0] for each in begun])
    states = [init_state(learner, policy.params) for policy in policies]
    base = states[0].base
    refer_to_base(folders, base, policies[0].folder)
    own = [jax.tree.map(jnp.copy, state._replace(base={})) for state in states]  # the members of a seed share a policy
    return Restored(base, own, [checkpoint.Progress()] * len(own))


def named_policies(config) -> Callable[[int], InitialPolicy | None]:
    """The named policy of a seed, as a function that loads each policy once."""

    @functools.cache
    def load(seed: int) -> InitialPolicy | None:
        return initial_policy.named_policy(of_seed(config, seed))

    return lambda seed: load(seed if "{seed}" in config.init_from.run else config.sweep.seeds[0])


def of_seed(config, seed: int) -> ConfigDict:
    """The config with another seed."""
    config = ConfigDict(config.to_dict())
    config.seed = seed
    return config


def begin(
    config, tasks: list[Task], named: Callable[[int], InitialPolicy | None], kept: Path, stop: StopRequest, seed: int
) -> SeedPolicy:
    """The initial policy of the members of a seed.

    Its warm start is done once and kept as a model folder in `kept`, and so is the base of adapters unless it is a published
    model.
    """
    config = of_seed(config, seed)
    folder, other_run = kept / f"seed{seed}", bool(config.init_from.run)
    saved = (folder / "config.json").exists()  # written last
    if saved and not other_run:
        policy = saved_policy(config, folder, named(seed))
        params = policy.params
    else:
        policy = initial_policy.plan(config, tasks, named(seed), folder)
        params = initial_policy.initial_params(config, policy)
        if policy.experts:
            print(f"seed {seed}:", end=" ")
            stop.defer()
            params = jax.tree.map(jnp.copy, params)  # cloning donates them, and other seeds need those of a named policy
            params = initial_policy.clone_experts(config, policy.model, params, policy.experts, folder / "updates", stop)
    adapted = config.model.lora_rank and (other_run or not config.model.path)
    if not saved and (policy.experts or adapted):
        policy.tokenizer.save(folder)
        weights.save_params(folder, dataclasses.replace(policy.model, lora=None), lora.split(params)[0])
        warm_start.clear(folder / "updates")
    model, params = initial_policy.add_adapters(config, policy.model, params)
    return SeedPolicy(policy.tokenizer, model, params, folder if (folder / "config.json").exists() else None)


def saved_policy(config, folder: Path, named: InitialPolicy | None) -> InitialPolicy:
    """The policy after the warm start that an earlier process kept in `folder`."""
    tokenizer = named.tokenizer if named else load_tokenizer(folder)
    model = named.model if named else fit_vocabulary(decoder_config(config.model), tokenizer, folder)
    try:
        return InitialPolicy(tokenizer, model, weights.load_params(folder, model), [])
    except UserError as error:
        what = explain(error, "move that folder away, and the warm start is made again")
        raise UserError(f"The weights in {folder} cannot be read {what}.") from error
