"""The episodes of an RL step.

They are a pure function of the seed and the number of RL steps done.
"""

from epo_jax.common import keys
from epo_jax.envs.base import Task
from epo_jax.rollout.episode import Episode


def step_episodes(tasks: list[Task], config, step: int, attempt: int) -> list[Episode]:
    """The episodes of round `attempt` of RL step `step`.

    Round 0 goes through the training split pass by pass; rounds that replace uniform groups draw from all of it.
    """
    groups = config.rollout.groups
    if attempt:
        drawn = keys.generator(config.seed, "resampling", step, attempt).permutation(len(tasks))
        chosen = [tasks[drawn[i % len(tasks)]] for i in range(groups)]
    else:
        chosen = step_tasks(tasks, config.seed, step, groups)
    return grouped_episodes(chosen, step + attempt * config.train.steps, config.rollout.group_size)


def step_tasks(tasks: list[Task], seed: int, step: int, groups: int) -> list[Task]:
    """The tasks of RL step `step`: the split, shuffled for each pass."""
    chosen = []
    for position in range(step * groups, (step + 1) * groups):
        epoch, place = divmod(position, len(tasks))
        chosen.append(tasks[keys.generator(seed, "tasks", epoch).permutation(len(tasks))[place]])
    return chosen


def grouped_episodes(tasks: list[Task], number: int, size: int) -> list[Episode]:
    """`size` episodes of each task, one group a task.

    If each round of a run has another `number`, all ids differ.
    """
    first = number * len(tasks) * size
    return [Episode(first + i, tasks[i // size], group=i // size) for i in range(len(tasks) * size)]
