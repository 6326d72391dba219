"""The warm start: experts become the token batches that the learner trains on, and the loss is the cross-entropy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.envs import agent, toy
from epo_jax.envs.base import environment
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models.decoder import DecoderConfig, bind, init_params
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.rollout import prompts, scheduler
from epo_jax.rollout.collect import Player, collect
from epo_jax.rollout.episode import Answer, Episode
from epo_jax.rollout.packing import BatchShape, pack
from epo_jax.training import sft
from epo_jax.training.optim import OptimConfig

DEMONSTRATIONS = toy.demonstrations(toy.list_tasks("train", {}), {})
TOKENIZER = train_tokenizer([t for d in DEMONSTRATIONS for pair in sft.transcript(d, "bare") for t in pair], 400)
SETTINGS = prompts.RolloutConfig(slots=4, max_turns=2, max_tokens=128, max_policy_tokens=128, response_tokens=64, style="bare")
MODEL = DecoderConfig(TOKENIZER.vocab_size, 16, 1, 2, 1, 8, 16)


def test_only_the_answers_are_policy_tokens():
    demonstration = DEMONSTRATIONS[4]
    trajectory = sft.to_trajectory(demonstration, TOKENIZER, SETTINGS)
    said = [TOKENIZER.decode([i for i, t in zip(trajectory.tokens, trajectory.turn, strict=True) if t == turn])
            for turn in range(2)]  # fmt: skip
    assert tuple(said) == demonstration.actions
    assert demonstration.observations[0].text in TOKENIZER.decode(trajectory.tokens)
    assert demonstration.goal in TOKENIZER.decode(trajectory.tokens)


def test_mistakes_are_read_and_not_valid():
    sound = sft.to_trajectory(DEMONSTRATIONS[4], TOKENIZER, SETTINGS)
    erring = sft.to_trajectory(dataclasses.replace(DEMONSTRATIONS[4], mistakes=(0,)), TOKENIZER, SETTINGS)
    assert (erring.tokens, erring.turn) == (sound.tokens, sound.turn) and set(sound.turn) == {-1, 0, 1}
    assert (sound.valid, erring.valid) == ([True, True], [False, True])


def test_the_loss_is_the_cross_entropy_of_actions_plus_weighted_prompts():
    """Mistaken answers are in neither mean: they are read and not imitated, however much the prompts weigh."""
    experts = [dataclasses.replace(d, mistakes=(i % 2,) * (i < 3)) for i, d in enumerate(DEMONSTRATIONS[:5])]
    trajectories = [sft.to_trajectory(d, TOKENIZER, SETTINGS) for d in experts]
    params = init_params(MODEL, jax.random.key(0))
    on_actions, on_prompts = [], []
    for t in trajectories:
        tokens = jnp.asarray(t.tokens)[None]
        hidden = bind(MODEL, params)(tokens, jnp.arange(tokens.size)[None], jnp.ones_like(tokens))[0]
        log_probs = jax.nn.log_softmax(hidden @ params["embedding"].T)[jnp.arange(tokens.size - 1), tokens[0, 1:]]
        for log_prob, turn in zip(log_probs, t.turn[1:], strict=True):
            if turn < 0 or t.valid[turn]:
                (on_actions if turn >= 0 else on_prompts).append(-float(log_prob))
    packed = pack(trajectories, BatchShape(128, 128, 2))
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), packed.by_row())
    loss, actions = sft.cloning_loss(MODEL, params, rows, 0.3)
    np.testing.assert_allclose(actions, np.mean(on_actions), rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(on_actions) + 0.3 * np.mean(on_prompts), rtol=1e-5)


def test_cloning_lowers_the_cross_entropy_and_is_deterministic():
    trajectories = [sft.to_trajectory(d, TOKENIZER, SETTINGS) for d in DEMONSTRATIONS]

    def run():
        params = init_params(MODEL, jax.random.key(0))
        cloning = sft.warm_start(params, trajectories, MODEL, OptimConfig(1e-2, 30), 128, 4, 0.1, 0)
        return [state.cross_entropy for state in cloning]

    curve = run()
    assert curve[-1] < 0.5 * curve[0]
    assert curve == run()


def test_a_window_repeats_an_action_as_a_policys_would_be_read():
    shouting = dataclasses.replace(DEMONSTRATIONS[4], actions=("BLUE", "1"))
    for style in agent.STYLES:
        (_, answer), (message, _) = sft.transcript(shouting, style, agent.Window(1))
        assert "BLUE" in answer and "BLUE" not in message and "blue" in message.replace("blue door", "")


# ---------------------------------------------------------------------------------------------- the prompts of a rollout

CONTEXTS = {"chat": None, "window": agent.Window(2, older_actions=True)}
FEW = {f"{split}_{unit}": 3 for split in ("train", "valid_seen", "valid_unseen") for unit in ("games", "variations")}
COMMON = {**FEW, "workers": 1, "max_turns": 20}
ALFWORLD = {**COMMON, "seed": 3, "max_receptacles": 6, "hesitation": 0.5, "mistakes": 0.3}
# Letters tell the unknown substances of a use-thermometer apart.
SCIENCEWORLD = {**COMMON, "simplification": "easy", "tasks": ("lifespan-longest-lived", "use-thermometer"), "train_variations": 1}
SHORT = {"tasks": ("lifespan-longest-lived",), "train_variations": 2}


class Reciter:
    """A lane whose policy says `answers[episode, turn]`."""

    members, prompt_tokens = 1, 0
    prefill_seconds = decode_seconds = 0.0

    def __init__(self, answers, size):
        self.answers, self.size = answers, size

    def keep(self, rows):
        self.size = len(rows)

    def play(self, turns):
        said = {row: self.answers[turn.episode, turn.turn] for row, turn in turns.items()}
        return {row: Answer(list(ids), [0.0] * len(ids), [0.0] * len(ids)) for row, ids in said.items()}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "name, options",
    [
        ("toy", COMMON),
        *(("alfworld", {**ALFWORLD, "hints": hints}) for hints in ("none", "admissible")),
        *(("scienceworld", {**SCIENCEWORLD, "hints": hints}) for hints in ("none", "objects")),
        ("scienceworld", {**SCIENCEWORLD, **SHORT, "hints": "admissible"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("hints", ""),
)
def test_experts_are_shown_what_a_rollout_shows(name, options, data_dir, monkeypatch):
    """In every style and context, cut to fit or not: the ids that a policy reads which gives the expert's answers."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    env, options = environment(name), {**options, "data_dir": data_dir}
    env.prepare(options)
    experts = env.demonstrations(env.list_tasks("train", options)[:3], options)
    assert len(experts) >= 2 and all(expert.won for expert in experts)
    turns = max(len(expert.actions) for expert in experts)
    with EnvPool(name, options, workers=1) as pool:
        for style in agent.STYLES:
            texts = [text for e in experts for w in CONTEXTS.values() for pair in sft.transcript(e, style, w) for text in pair]
            tokenizer = train_tokenizer(texts, 500)
            for window in CONTEXTS.values():
                settings = dataclasses.replace(SETTINGS, style=style, window=window, max_turns=turns, max_tokens=100_000)
                settings = dataclasses.replace(settings, max_policy_tokens=100_000, response_tokens=200)
                whole = [sft.to_trajectory(expert, tokenizer, settings) for expert in experts]
                played = recite(pool, tokenizer, settings, experts, monkeypatch)
                check(whole, played, experts)
                if window is not None and turns > 2:
                    room = longest_prompt(played) - 5
                    tight = dataclasses.replace(settings, max_tokens=room + settings.response_tokens)
                    cut = [sft.to_trajectory(expert, tokenizer, tight) for expert in experts]
                    check(cut, recite(pool, tokenizer, tight, experts, monkeypatch), experts)
                    assert [t.tokens for t in cut] != [t.tokens for t in whole]


def recite(pool, tokenizer, settings, experts, monkeypatch):
    """The trajectories of a rollout in which the experts speak."""
    answers = {
        (i, turn): tokenizer.answer(agent.expert_answer(action, settings.style))
        for i, expert in enumerate(experts)
        for turn, action in enumerate(expert.actions)
    }
    monkeypatch.setattr(scheduler, "Lane", lambda model, params, size, *_: Reciter(answers, size))
    episodes = [Episode(i, expert.task, i) for i, expert in enumerate(experts)]
    player = Player(episodes, tokenizer, jax.random.key(0))
    return collect([player], {}, pool, MODEL, settings, prompts.SamplingConfig(1.0))[0][0]


def check(shown, played, experts):
    for theirs, ours, expert in zip(shown, played, experts, strict=True):
        assert ours.won and ours.actions == list(expert.actions) == theirs.actions
        assert (theirs.tokens, theirs.starts) == (ours.tokens, ours.starts)
        assert theirs.turn == ours.turn
        assert theirs.valid == [turn not in expert.mistakes for turn in range(len(expert.actions))]


def longest_prompt(trajectories):
    return max(t.turn[start:end].count(-1) for t in trajectories for start, end in t.contexts)
