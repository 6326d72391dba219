"""Plays an environment in the terminal, with the prompts and the parser of a policy.

    epo-jax play --env=scienceworld --task=find-animal/3
    epo-jax play --env=alfworld --split=valid_unseen --expert
    epo-jax play --env=toy --style=bare --window=2

An answer is one line. In the tagged style, a line without tags is an action, and a thought is added before it. An empty line is
an answer too; the end of the input (Ctrl-D) stops the game.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from epo_jax.command import ArgumentParser, run
from epo_jax.common.errors import UserError, nearest
from epo_jax.envs import agent
from epo_jax.envs.base import SPLITS, Environment, Observation, Task, environment
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.settings.config import ENVIRONMENTS, base_config
from epo_jax.settings.describe import help_text
from epo_jax.settings.table import SECTIONS

FEW_GAMES = {f"{split}_games": 12 for split in SPLITS}  # generated in seconds


def read_options(env: str, settings: Sequence[str]) -> dict[str, Any]:
    """Returns the options of `env` with `settings`: "key=value", the value in JSON or plain text."""
    options = base_config(env).env.to_dict()
    options |= {key: few for key, few in FEW_GAMES.items() if key in options}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or (env in ENVIRONMENTS and key not in options):
            near = nearest(key, options)
            raise UserError(f"--option={setting!r} is not understood; write key=value with a key of {', '.join(options)}{near}.")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = None if text == "None" else text
    return options


def find_task(tasks: list[Task], wanted: str) -> Task:
    """Returns the task whose id is `wanted` or begins with it; the first task for ""."""
    matching = [task for task in tasks if task["id"] == wanted] or [task for task in tasks if task["id"].startswith(wanted)]
    if not matching:
        near = difflib.get_close_matches(wanted, [task["id"] for task in tasks], n=1, cutoff=0) or ["none at all"]
        raise UserError(f"--task={wanted!r} is not in this split; the nearest is {near[0]}.")
    return matching[0]


def expert_answers(env: Environment, task: Task, options: dict[str, Any], style: str) -> list[str]:
    shown = env.demonstrations([task], options)
    if not shown:
        raise UserError(f"the expert does not solve {task['id']} in {options['max_turns']} turns; try --option=max_turns=200.")
    return [agent.expert_answer(action, style) for action in shown[0].actions]


def ask(style: str) -> str:
    """Reads an answer from the terminal. Raises EOFError at the end of the input."""
    line = input("> ")
    return line if style == "bare" or "<" in line else agent.expert_answer(line, style)


def play(
    pool: EnvPool, task: Task, style: str, window: agent.Window | None, max_turns: int, answer: Callable[[], str]
) -> Observation:
    """Plays one episode, prints it, and returns the last observation. `answer` returns an answer or raises EOFError."""
    pool.reset(0, task)
    _, observation = pool.get()
    first, history = observation, []
    while not observation.done and len(history) < max_turns:
        message = agent.message(first, history, observation, style, window)
        print(f"\n--- turn {len(history) + 1} of {max_turns}, score {observation.score:g}\n{message}\n")
        try:
            text = answer()
        except EOFError:
            break
        action, valid = agent.parse_action(text, tags=style == "tagged")
        print(f"{text}\n=> {action!r}" + ("" if valid else "  (not a valid answer)"))
        history.append((observation.text, action))
        pool.step(0, action)
        _, observation = pool.get()
    print(f"\n--- {'won' if observation.won else 'not won'} after {len(history)} turns, score {observation.score:g}")
    print(observation.text)
    return observation


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="epo-jax play", description=__doc__,
                            epilog=help_text([s for s in SECTIONS if s.name == "env"], {}, "Keys for --option, without env."),
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--env", required=True, help="alfworld, scienceworld, toy, or a module of your own")
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--task", default="", help="its id, or how the id begins; by default the first of the split")
    parser.add_argument("--style", default="tagged", choices=agent.STYLES)
    parser.add_argument("--window", type=int, metavar="TURNS", help="each turn is one message with so many past turns in it")
    parser.add_argument("--expert", action="store_true", help="let the expert play")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="a key of config.env; may be repeated")
    args = parser.parse_args(argv[1:])
    env, options = environment(args.env), read_options(args.env, args.option)
    options = options if args.task else env.narrowed(options, args.split, 0)
    env.prepare(options)
    task = find_task(env.list_tasks(args.split, options), args.task)
    answers = iter(expert_answers(env, task, options, args.style) if args.expert else ())

    def answer() -> str:
        text = next(answers, None) if args.expert else ask(args.style)
        if text is None:
            raise EOFError
        return text

    window = None if args.window is None else agent.Window(args.window, base_config(args.env).agent.history_actions)
    print(f"{args.env}, {args.split}: {task['id']}")
    with EnvPool(args.env, options, workers=1) as pool:
        play(pool, task, args.style, window, options["max_turns"], answer)


if __name__ == "__main__":
    sys.exit(run(main))
