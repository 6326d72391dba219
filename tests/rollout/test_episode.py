"""The state machine of an episode, without JAX: what it reads, what its turns cost, when it ends."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest

from epo_jax.envs import agent
from epo_jax.envs.base import Observation
from epo_jax.rollout.episode import Answer, Episode, LiveEpisode, Turn
from epo_jax.rollout.prompts import RolloutConfig

STOP, OPEN, REPLY = 0, 1, 2
CHAT = RolloutConfig(slots=1, max_turns=3, max_tokens=200, max_policy_tokens=200, response_tokens=4, style="bare", block=3)
WINDOW = dataclasses.replace(CHAT, window=agent.Window(1))


class Characters:
    """A tokenizer with a token for each character; a message is OPEN, its text, REPLY."""

    stop_ids = (STOP,)
    frame = SimpleNamespace(opened="")

    def first(self, text):
        return [OPEN, *map(ord, text), REPLY]

    def following(self, text, last):
        return [*([] if last == STOP else [STOP]), *self.first(text)]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i > REPLY)


def live(config=CHAT) -> LiveEpisode:
    return LiveEpisode(Episode(7, {"id": "t", "type": "t"}, 5), Characters(), config)


def seen(text, goal="g", **fields) -> Observation:
    return Observation(text=text, goal=goal, **fields)


def block(text, *stop) -> Answer:
    ids = [*map(ord, text), *stop]
    return Answer(ids, [-0.1 * i for i in ids], [0.5] * len(ids))


def said(text) -> Answer:
    return block(text, STOP)


def test_importing_it_imports_no_jax():
    program = "import sys, epo_jax.rollout.episode; print('jax' in sys.modules, 'tokenizers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).split() == ["False", "False"]


def test_an_episode_that_is_won():
    """Chat: the next prompt begins with the token that ended the last turn, which the cache does not hold."""
    episode = live()
    assert episode.next_turn() is None
    episode.on_observation(seen("ab"))
    first = [OPEN, *map(ord, "ab\ng"), REPLY]
    assert episode.next_turn() == Turn(first, True, episode=7, turn=0, position=0, budget=3)
    assert episode.on_tokens(said("go")) == "go"
    assert episode.next_turn() is None and not episode.ended
    episode.on_observation(seen("cd", reward=1.0, score=50.0))
    following = [OPEN, *map(ord, "cd"), REPLY]
    assert episode.next_turn() == Turn([STOP, *following], False, episode=7, turn=1, position=0, budget=3)
    assert episode.on_tokens(said("up")) == "up"
    episode.on_observation(seen("ef", reward=2.0, score=100.0, won=True, won_reference=False, done=True))
    assert episode.ended and episode.next_turn() is None
    t = episode.trajectory
    assert (t.goal, t.group, t.episode, t.starts) == ("g", 5, 7, [0])
    assert t.tokens == [*first, *map(ord, "go"), STOP, *following, *map(ord, "up"), STOP]
    assert t.turn == [-1] * 6 + [0] * 3 + [-1] * 4 + [1] * 3
    assert (t.observations, t.actions) == (["ab", "cd", "ef"], ["go", "up"])
    assert (t.rewards, t.valid) == ([1.0, 2.0], [True, True])
    assert (t.won, t.won_reference, t.score, t.truncated, t.full) == (True, False, 100.0, False, False)
    assert t.log_prob[6:8] == [-0.1 * ord("g"), -0.1 * ord("o")] and t.entropy[6:10] == [0.5, 0.5, 0.5, 0.0]


def test_an_answer_in_blocks_ends_with_its_budget():
    """Blocks of 3, a budget of 4: one token is left for the second block, which reads the last token of the first."""
    episode = live()
    episode.on_observation(seen("ab"))
    assert episode.on_tokens(block("xyz")) is None
    assert episode.next_turn() == Turn([ord("z")], False, episode=7, turn=0, position=3, budget=1)
    assert episode.on_tokens(block("w")) == "xyzw"
    episode.on_observation(seen("cd"))
    # No stop token ended the turn, so the template's token closes it.
    assert episode.next_turn().prompt == [ord("w"), STOP, OPEN, *map(ord, "cd"), REPLY]
    assert episode.trajectory.turn.count(0) == 4


def test_a_window_is_a_new_context_at_each_turn():
    episode = live(WINDOW)
    episode.on_observation(seen("ab"))
    length = len(episode.next_turn().prompt)
    episode.on_tokens(said("go"))
    episode.on_observation(seen("cd", reward=1.0))
    turn = episode.next_turn()
    assert turn.fresh and turn.prompt == [OPEN, *map(ord, "ab\n> go\ncd\ng"), REPLY]
    assert episode.trajectory.starts == [0, length + 3]


def test_an_answer_without_a_command_is_an_action_all_the_same():
    episode = live()
    episode.on_observation(seen("ab"))
    assert episode.on_tokens(said("")) == "" and episode.trajectory.valid == [False]


def test_the_turn_limit_ends_it():
    episode = live(dataclasses.replace(CHAT, max_turns=1))
    episode.on_observation(seen("ab"))
    episode.on_tokens(said("go"))
    episode.on_observation(seen("cd", reward=1.0))
    t = episode.trajectory
    assert episode.ended and episode.next_turn() is None
    assert (t.truncated, t.full, t.won, t.rewards) == (True, False, False, [1.0])
    assert t.tokens[-1] == STOP and len(t.observations) == 2, "a prompt was appended that no turn reads"


@pytest.mark.parametrize("config", [CHAT, WINDOW], ids=["chat", "window"])
def test_it_ends_if_the_next_turn_has_no_room(config):
    """The second prompt with an answer takes `need` tokens of the context: enough room, and one token less."""
    probe = live(config)
    probe.on_observation(seen("ab"))
    probe.on_tokens(said("go"))
    probe.on_observation(seen("x" * 50))
    context = len(probe.trajectory.tokens) - (probe.trajectory.starts[-1] if config.window else 0)
    need = context + config.response_tokens
    for room in (need, need - 1):
        episode = live(dataclasses.replace(config, max_tokens=room))
        episode.on_observation(seen("ab"))
        episode.on_tokens(said("go"))
        episode.on_observation(seen("x" * 50))
        if config.window and room < need:
            prompt = Characters().decode(episode.next_turn().prompt)
            assert not episode.ended and prompt == "x" * 50 + "\ng", "the window is cut to fit"
        else:
            assert episode.ended == episode.trajectory.full == episode.trajectory.truncated == (room < need)
        assert episode.lacking == 0


def test_it_ends_before_its_policy_tokens_could_pass_their_limit():
    episode = live(dataclasses.replace(CHAT, max_policy_tokens=6))
    episode.on_observation(seen("ab"))
    episode.on_tokens(said("go"))
    episode.on_observation(seen("cd"))
    assert episode.ended and episode.trajectory.full and episode.trajectory.num_policy_tokens == 3
    enough = live(dataclasses.replace(CHAT, max_policy_tokens=7))
    enough.on_observation(seen("ab"))
    enough.on_tokens(said("go"))
    enough.on_observation(seen("cd"))
    assert not enough.ended


def test_a_first_prompt_without_room_is_counted():
    """OPEN, five characters, REPLY and an answer of 4."""
    episode = live(dataclasses.replace(CHAT, max_tokens=10))
    episode.on_observation(seen("", goal="goals"))
    assert episode.ended and episode.trajectory.full and episode.lacking == 11 and not episode.trajectory.tokens
