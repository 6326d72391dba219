"""Which episodes an RL step plays: a pure function of the seed and of the number of RL steps done."""



from epo_jax.common import keys
from epo_jax.envs.base import Task
from epo_jax.rollout import scheduler


def step_episodes(tasks: list[Task], config, step: int, attempt: int) -> list[scheduler.Episode]:
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


def grouped_episodes(tasks: list[Task], number: int, size: int) -> list[scheduler.Episode]:
    """`size` episodes of each task, one group a task. With a `number` of its own for each round of a run, no id is used
    twice."""
    first = number * len(tasks) * size
    return [scheduler.Episode(first + i, tasks[i // size], group=i // size) for i in range(len(tasks) * size)]
