"""Talks to a policy: a prompt, a chat, or an episode of its game.

    epo-jax generate --play                 watch the agent of the demonstration play; --interactive: act in its place
    epo-jax generate runs/first --play      watch that of a run
    epo-jax generate /models/Qwen2.5-3B-Instruct --prompt="Where would you look for an apple?"
    epo-jax generate /models/Qwen2.5-3B-Instruct      a chat, one line a turn

The folder is a run's (its newest checkpoint, or that of --step) or a Hugging Face model folder or hub name.
"""

import argparse
import re
import sys

from rich.console import Console
from rich.text import Text

from epo_jax.command import ArgumentParser, add_base_option, number_type, run
from epo_jax.common import compilation, keys
from epo_jax.common.errors import UserError, nearest
from epo_jax.configs import alfworld
from epo_jax.envs import agent
from epo_jax.envs.base import SPLITS, Observation, Task, environment
from epo_jax.models.decoder import unstack
from epo_jax.parallel import mesh
from epo_jax.rollout import prompts
from epo_jax.rollout.episode import Turn
from epo_jax.rollout.lane import Lane, Programs, Sampler
from epo_jax.runs.policies import Policy, load
from epo_jax.settings.config import base_config
from epo_jax.settings.setting import COUNT, NOT_NEGATIVE, SEED, SHARE_ABOVE_0

_MOST_TOKENS = 1 << 15


def main(argv: list[str]) -> None:
    options = _parse(argv[1:])
    plays, shipped = options.play or options.interactive, options.checkpoint is None
    if shipped and not plays:
        raise UserError("name a folder first, for example epo-jax generate runs/first; only --play needs none.")
    config = base_config()
    config.model.dtype = options.dtype
    config.agent.max_tokens = 1  # the room in a context is what the model has
    print(mesh.devices_in_use(), file=sys.stderr)
    compilation.keep_programs()
    policy = load(str(alfworld.AGENT) if shipped else options.checkpoint, options.step, config, base=options.base)
    if shipped:
        policy = policy._replace(config=alfworld.get_config("demo"))
    sampling = prompts.SamplingConfig(options.temperature, options.top_k, options.top_p)
    sampler = Sampler(keys.key(options.seed, "evaluation"), policy.tokenizer.stop_ids, sampling, options.max_tokens)
    if plays:
        if policy.config is None:
            raise UserError(f"--play: {options.checkpoint} is no run folder, so it has no game; use --prompt.")
        play(policy, sampler, options.split, options.task, options.interactive)
    elif options.prompt is not None:
        speaker = Speaker(policy, sampler, options.max_tokens, room_of(policy))
        print(speaker.answer(policy.tokenizer.first(options.prompt), fresh=True))
    else:
        chat(policy, sampler, options.max_tokens)


def room_of(policy: Policy) -> int:
    """Most tokens of a conversation outside a game: the positions of the model, up to a bound on the cache."""
    return min(policy.model.max_positions, _MOST_TOKENS)


class Speaker:
    """One conversation with a policy: what it has read stays in the cache."""

    def __init__(self, policy: Policy, sampler: Sampler, response_tokens: int, max_tokens: int, episode: int = 0):
        self._tokenizer, self._episode, self._budget = policy.tokenizer, episode, response_tokens
        self._max_tokens = max_tokens
        params = unstack(policy.model, policy.params)
        self._lane = Lane(policy.model, params, 1, max_tokens, sampler._replace(block=response_tokens), Programs())
        self._unread: list[int] = []
        self._held = 0
        self.turn = 0

    @property
    def last(self) -> int | None:
        """The token that the last turn ended with."""
        return self._unread[-1] if self._unread else None

    def answer(self, ids: list[int], fresh: bool = False) -> str:
        """Reads `ids`, in a new context where `fresh`, and answers."""
        ids = ids if fresh else self._unread + ids
        self._held = len(ids) + (0 if fresh else self._held)
        if self._held + self._budget > self._max_tokens:
            what = "The prompt" if self._held == len(ids) else "The conversation"
            raise UserError(
                f"{what} has {self._held} tokens, which with an answer of up to {self._budget} do not fit in the "
                f"{self._max_tokens} that there is room for; shorten it, or lower --max_tokens."
            )
        said = self._lane.play({0: Turn(ids, fresh, self._episode, self.turn, 0, self._budget)})[0].tokens
        self.turn += 1
        self._held += len(said) - 1
        self._unread = said[-1:]
        return self._tokenizer.decode(said)

    def hear(self, ids: list[int], fresh: bool) -> None:
        """Takes `ids` as read and said by somebody else in the policy's place."""
        self._unread = ids if fresh else self._unread + ids
        self._held = 0 if fresh else self._held
        self.turn += 1


def chat(policy: Policy, sampler: Sampler, response_tokens: int) -> None:
    """Answers lines from standard input until it ends."""
    if policy.tokenizer.frame.rewrites == "turns":
        raise UserError("The model's chat template changes earlier turns, so a chat cannot be appended to; use --prompt.")
    if policy.tokenizer.frame.rewrites:
        print("(The chat template drops the thoughts of earlier turns; this chat keeps them.)", file=sys.stderr)
    speaker = Speaker(policy, sampler, response_tokens, room_of(policy))
    tokenizer = policy.tokenizer
    for line in _lines("you: "):
        ids = tokenizer.following(line, speaker.last) if speaker.turn else tokenizer.first(line)
        print(f"policy: {speaker.answer(ids, fresh=speaker.turn == 0)}", flush=True)


class Screen:
    """Prints a game: in color and wrapped at words on a terminal, as plain lines elsewhere."""

    def __init__(self):
        self._console = Console(highlight=False, emoji=False)

    def text(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=not self._console.is_terminal)

    def line(self, name: str, text: str, style: str, wrap: bool = True) -> None:
        whole = not (wrap and self._console.is_terminal)
        self._console.print(Text.assemble((f"{name}: ", "dim"), (text, style)), soft_wrap=whole)


def play(policy: Policy, sampler: Sampler, split: str, wanted: str | None, interactive: bool) -> None:
    """Plays an episode of the run's environment: what is seen, said, done and got at each turn.

    Sampled as `evaluate` samples the same task: with its seed and settings, the episode is the one that it counted.
    """
    config = policy.config
    env, env_options = environment(config.env.name), config.env.to_dict()
    if wanted is None or wanted.isdecimal():
        env_options = env.narrowed(env_options, split, int(wanted or 0))
    env.prepare(env_options)
    number, task = _task(env.list_tasks(split, env_options), split, wanted)
    settings = prompts.rollout_config(config)
    speaker = Speaker(policy, sampler, settings.response_tokens, settings.max_tokens, episode=number)
    game = env.make_env(env_options)
    first = observation = game.reset(task)
    screen = Screen()
    screen.line("task", task["id"], "dim", wrap=False)
    screen.text(observation.goal, "bold")
    history: list[tuple[str, str]] = []
    lines = _lines("act (Enter: the agent): ") if interactive else None
    while not observation.done and len(history) < settings.max_turns:
        screen.text(f"\n[{len(history) + 1}] {observation.text}")
        given = "" if lines is None else next(lines, None)
        if given is None:
            return
        answer, parsed = _act(policy.tokenizer, settings, speaker, first, history, observation, given)
        for thought in re.findall(r"<think>(.*?)</think>", answer, re.DOTALL):
            screen.line("thought", thought.strip(), "italic")
        if answer != parsed.action:
            screen.line("answer", answer, "dim")
        screen.line("action", parsed.action or "(none)", "bold cyan" if parsed.action else "bold red")
        history.append((observation.text, parsed.action))
        observation = game.step(parsed.action)
        screen.line("reward", f"{observation.reward:g}", "bold green" if observation.reward > 0 else "dim")
    screen.text(f"\n{observation.text}")
    outcome, style = ("won", "bold green") if observation.won else ("not won", "bold red")
    screen.text(f"{outcome}, score {observation.score:g}, {len(history)} turns", style)


def _act(tokenizer, settings, speaker: Speaker, first: Observation, history, observation: Observation, given: str):
    """(answer, parsed action) of a turn: the policy's, or `given` in its place."""
    ids = prompts.next_prompt(tokenizer, settings, first, history, observation, speaker.last)
    fresh, opened = settings.window is not None or not history, tokenizer.frame.opened
    if given:
        answer = agent.expert_answer(given, settings.style, opened)
        speaker.hear(ids + tokenizer.answer(answer), fresh)
    else:
        answer = speaker.answer(ids, fresh)
    return answer, agent.parse_action(answer, settings.style == "tagged", opened)


def _task(tasks: list[Task], split: str, wanted: str | None) -> tuple[int, Task]:
    """A task with its number in the split, by number or id; the first one when None."""
    wanted = "0" if wanted is None else wanted
    for number, task in enumerate(tasks):
        if wanted in (str(number), task["id"]):
            return number, task
    near = nearest(wanted, [task["id"] for task in tasks])
    raise UserError(f"--task={wanted}: {split} has tasks 0 to {len(tasks) - 1}; give one of these or a task's id{near}.")


def _lines(prompt: str):
    """Lines from standard input until it ends; the prompt is shown to a person only."""
    while True:
        if sys.stdin.isatty():
            print(prompt, end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="epo-jax generate", description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_folder("checkpoint", "run folder, model folder or hub name", required=False)
    parser.add_argument("--step", type=number_type(int, NOT_NEGATIVE),
                        help="RL steps of the run's checkpoint; the newest if left out")  # fmt: skip
    add_base_option(parser)
    parser.add_argument("--prompt", help="one message to answer")
    parser.add_argument("--play", action="store_true", help="play an episode of the run's environment")
    parser.add_argument("--interactive", action="store_true", help="play, asking before each turn for an action of yours")
    parser.add_argument("--split", default="valid_unseen", choices=SPLITS)
    parser.add_argument("--task", help="number in the split, or id; the first if left out")
    parser.add_argument("--temperature", default=0.4, type=number_type(float, NOT_NEGATIVE))
    parser.add_argument("--top_k", default=0, type=number_type(int, NOT_NEGATIVE), help="0 = all tokens")
    parser.add_argument("--top_p", default=1.0, type=number_type(float, SHARE_ABOVE_0))
    parser.add_argument("--max_tokens", default=512, type=number_type(int, COUNT),
                        help="of an answer, outside a game")  # fmt: skip
    parser.add_argument("--seed", default=0, type=number_type(int, SEED))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of a model folder's arithmetic")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run(main))
