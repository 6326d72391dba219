"""The turn scheduler: the same trajectories whatever the timing, and every limit kept."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epo_jax.common.errors import UserError
from epo_jax.envs import agent, base, toy
from epo_jax.envs.workers.pool import EnvPool
from epo_jax.models import generate
from epo_jax.models.decoder import DecoderConfig, init_params, param_axes
from epo_jax.models.tokenizer import train_tokenizer
from epo_jax.parallel import mesh
from epo_jax.rollout import lane, prompts, scheduler
from epo_jax.rollout.collect import Player, collect, warn_full
from epo_jax.rollout.episode import Episode, LiveEpisode
from epo_jax.rollout.packing import BatchShape, pack
from epo_jax.training.policy_tokens import policy_statistics
from tests.envs import wander_env

OPTIONS = {"name": "toy"}
TASKS = toy.list_tasks("train", OPTIONS)
TEXTS = [f"red blue green {i} {toy.GOAL} you see a door. the number is" for i in range(10)]
TOKENIZER = train_tokenizer([*TEXTS, wander_env.GOAL, " ".join(wander_env.WORDS)], 400)
MODEL = DecoderConfig(TOKENIZER.vocab_size, 16, 1, 2, 1, 8, 16)
SETTINGS = prompts.RolloutConfig(slots=8, max_turns=2, max_tokens=160, max_policy_tokens=64, response_tokens=5, style="bare")
EPISODES = [Episode(100 + i, TASKS[i // 2], i // 2) for i in range(14)]


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def stirred(params):
    """In fresh parameters attention writes nothing, and what the cache holds would not matter; these answer at some length."""
    stirred = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    return {**stirred, "embedding": stirred["embedding"].at[TOKENIZER.stop_id].multiply(3.0)}


def play(params, workers=1, settings=SETTINGS, episodes=EPISODES, key=0):
    with EnvPool("toy", OPTIONS, workers) as pool:
        return played_in(pool, settings, episodes, TOKENIZER, params, jax.random.key(key))


def played_in(pool, settings, episodes, tokenizer, params, key, **sampling):
    players, sampling = [Player(episodes, tokenizer, key)], prompts.SamplingConfig(1.0, **sampling)
    (trajectories,), stats = collect(players, params, pool, MODEL, settings, sampling)
    return trajectories, stats


def ids(trajectories):
    return [t.tokens for t in trajectories]


# Episodes of one to nine turns in fewer slots, so that slots are used again; answers longer than a block; short prompts and
# long ones.
CHAT = dataclasses.replace(SETTINGS, max_turns=5, max_tokens=256, max_policy_tokens=64, block=3, ahead=1)
WINDOW = dataclasses.replace(CHAT, window=agent.Window(2))
WANDERERS = [Episode(7 * i, {"id": f"w{i // 3}", "type": "t"}, i // 3) for i in range(18)]


@pytest.fixture
def wander(stirred, monkeypatch):
    monkeypatch.setitem(base.ENVIRONMENTS, "wander", "tests.envs.wander_env")

    def play(settings, workers=1, delay=0.0, episodes=WANDERERS, params=stirred, tokenizer=TOKENIZER, **sampling):
        with EnvPool("wander", {"delay": delay}, workers) as pool:
            return played_in(pool, settings, episodes, tokenizer, params, jax.random.key(3), **sampling)

    return play


def record(trajectories):
    """Everything about trajectories, floats to the last bit."""
    return [dataclasses.asdict(t) for t in trajectories]


@pytest.mark.parametrize("settings", [CHAT, WINDOW], ids=["chat", "window"])
def test_worker_count_and_delays_change_no_bit(wander, settings):
    """One worker at full speed, two and four with answers that come up to 30 ms late, in any order."""
    quick, _ = wander(settings)
    assert len({len(t.actions) for t in quick}) > 2 and {t.truncated for t in quick} == {True, False}
    for workers in (2, 4):
        late, stats = wander(settings, workers, delay=0.03)
        assert record(late) == record(quick)
        assert stats.env_steps == sum(len(t.actions) for t in quick)


@pytest.mark.parametrize("settings", [CHAT, WINDOW], ids=["chat", "window"])
def test_the_number_of_slots_changes_float_sums_only(wander, settings):
    """4, 8 and 16 slots compute in batches of other shapes: the same tokens, statistics equal to 1e-5 nats."""
    want = wander(settings)[0]
    for slots in (4, 16):
        got = wander(dataclasses.replace(settings, slots=slots))[0]
        for a, b in zip(want, got, strict=True):
            assert (a.tokens, a.turn, a.actions, a.rewards) == (b.tokens, b.turn, b.actions, b.rewards)
            np.testing.assert_allclose(a.log_prob, b.log_prob, atol=1e-5)
            np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-5)


@pytest.mark.parametrize("settings", [CHAT, WINDOW], ids=["chat", "window"])
def test_the_learner_scores_what_was_sampled(wander, stirred, settings):
    """Packed rows without a cache against decode with one: many turns, slots used again, prompts shared, turns in blocks."""
    trajectories, _ = wander(settings)
    contexts = (settings.max_turns, 2) if settings.window else (1, 1)
    batch = pack(trajectories, BatchShape(256, 64, 5, 2, 1, *contexts))
    worst, seen = 0.0, 0
    for m in range(2):
        rows = jax.tree.map(lambda x, m=m: jnp.asarray(x[m]), batch.by_row())
        log_prob, entropy = policy_statistics(MODEL, stirred, rows, 1.0)
        mask = batch.policy_mask[m] > 0
        np.testing.assert_allclose(log_prob[mask], batch.behaviour_log_prob[m][mask], atol=1e-4)
        np.testing.assert_allclose(entropy[mask], batch.behaviour_entropy[m][mask], atol=1e-4)
        ratio = np.exp(np.asarray(log_prob)[mask] - batch.behaviour_log_prob[m][mask])
        worst, seen = max(worst, np.abs(ratio - 1.0).max()), seen + mask.sum()
    assert worst < 1e-4 and seen == sum(t.num_policy_tokens for t in trajectories)


def test_a_window_is_the_prompt_of_its_turn(wander):
    """Every turn is a context of its own that reads as the agent's message for it, cut to fit; nothing else is in it."""
    for settings in (WINDOW, dataclasses.replace(WINDOW, max_tokens=48)):
        fits = lambda message, s=settings: prompts.fits(TOKENIZER, s, message)  # noqa: E731
        trajectories, _ = wander(settings)
        lengths = []
        for t in trajectories:
            first = base.Observation(text=t.observations[0], goal=wander_env.GOAL)
            assert len(t.contexts) == len(t.actions) == len(t.valid)
            for turn, (start, end) in enumerate(t.contexts):
                seen = base.Observation(text=t.observations[turn], goal=wander_env.GOAL)
                past = list(zip(t.observations[:turn], t.actions[:turn], strict=True))
                prompt = TOKENIZER.first(agent.window_message(first, past, seen, "bare", settings.window, fits))
                assert t.tokens[start : start + len(prompt)] == prompt
                assert t.turn[start:end] == [-1] * len(prompt) + [turn] * (end - start - len(prompt))
                lengths.append(end - start)
        assert max(lengths) <= settings.max_tokens
    assert max(lengths) > 40, "no window was cut"


def test_a_prompt_that_a_group_shares_is_read_once(wander):
    """A lane of four with three members of a group and one of another: two first prompts are read."""
    settings = dataclasses.replace(CHAT, slots=4, lanes=1, max_turns=1, response_tokens=3)
    trajectories, stats = wander(settings, episodes=WANDERERS[:4])
    opening = [t.turn.index(0) for t in trajectories]
    assert opening[0] == opening[1] == opening[2] and stats.prompt_tokens == opening[0] + opening[3]


def test_a_shared_prompt_is_copied_to_the_rows_that_share_it_and_nowhere_else(wander, monkeypatch):
    """The same bits as a new cache whose rows are taken from the old one; and the cache is taken only for more room."""
    calls = {"copy": 0, "take": 0}

    def whole(cache, source, target, columns):
        """A new cache, with every row's source in it."""
        calls["copy"] += 1
        size, capacity = len(cache.lengths), cache.layers[0][0].shape[-1]
        rows = np.arange(size)
        rows[target[target < size]] = source[target < size]
        return take(cache, rows, capacity)

    def counted(cache, slots, capacity):
        calls["take"] += 1
        assert capacity > cache.layers[0][0].shape[-1] or len(slots) < len(cache.lengths)
        return take(cache, slots, capacity)

    take, settings = generate.take_slots, dataclasses.replace(CHAT, lanes=1)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "copy_slots", whole)
        want = record(wander(settings)[0])
    assert calls["copy"] > 2
    monkeypatch.setattr(generate, "take_slots", counted)
    assert record(wander(settings)[0]) == want and calls["take"] < calls["copy"]


def test_shapes_come_from_a_small_table(wander, max_traces):
    """However many turns are played, the programs are those of the table; and a second rollout compiles none."""
    settings = dataclasses.replace(CHAT, slots=10, max_tokens=512)  # shapes that no other test has compiled
    table = lane.most_programs(5, 512)
    assert table == 1 * 2 * (1 + 2 * 5)  # sizes, capacities, one decode, widths for all rows and for a quarter
    max_traces(generate.decode, 2)
    max_traces(generate.extend, table - 2)
    for max_turns in (2, 5, 8):
        wander(dataclasses.replace(settings, max_turns=max_turns))


def test_truncated_sampling_keeps_to_the_likeliest_tokens(wander):
    """With top_k = 1 every token is certain, whatever the temperature."""
    for t in wander(CHAT, top_k=1)[0]:
        assert not any(t.entropy) and not any(t.log_prob)
    free, narrow = ([h for t in wander(CHAT, top_p=p)[0] for h in t.entropy] for p in (1.0, 0.5))
    assert np.mean(narrow) < np.mean(free)


@pytest.mark.parametrize(
    ("options", "nats"),
    [({"dtype": "bfloat16"}, 0.015), ({"cache_dtype": "int8"}, 0.007)],
)
def test_sampling_in_fewer_bits_moves_log_probabilities_by_so_much(wander, stirred, options, nats):
    """What the learner (float32) says of tokens that were sampled in fewer bits: close, and measurably not the same."""
    trajectories, _ = wander(dataclasses.replace(CHAT, **options))
    batch = pack(trajectories, BatchShape(256, 64, 5))
    rows = jax.tree.map(lambda x: jnp.asarray(x[0]), batch.by_row())
    mask = batch.policy_mask[0] > 0
    gap = np.abs(np.asarray(policy_statistics(MODEL, stirred, rows, 1.0)[0]) - batch.behaviour_log_prob[0])[mask]
    # Four other seeds: means of .0099 to .0106 and .0044 to .0052; the largest gap is that of one unlikely token.
    assert 1e-5 < gap.mean() < nats and gap.max() < 0.2


def test_devices_that_share_the_rows_sample_the_same(wander):
    want = wander(CHAT)[0]
    got = wander(dataclasses.replace(CHAT, devices=4))[0]
    same_but_for_rounding(want, got)


def test_a_mesh_samples_the_same_as_one_device(wander, stirred, monkeypatch):
    words = MODEL.vocab_size + MODEL.vocab_size % 2
    model = dataclasses.replace(MODEL, vocab_size=words, num_heads=4, num_kv_heads=2, head_dim=4)
    monkeypatch.setitem(globals(), "MODEL", model)
    params = stirred | {"embedding": jnp.pad(stirred["embedding"], ((0, words - len(stirred["embedding"])), (0, 0)))}
    on = mesh.make_mesh(1, 2, 2)
    settings = dataclasses.replace(CHAT, max_turns=2)
    want = wander(settings, params=params)[0]
    spread = jax.device_put(params, mesh.shardings(on, params, param_axes(model)))
    same_but_for_rounding(want, wander(settings, params=spread)[0])

    # In bfloat16 a draw may fall on the next token; up to there it is one episode.
    settings = dataclasses.replace(settings, dtype="bfloat16")
    agreed = 0
    for one, other in zip(*(wander(settings, params=p)[0] for p in (params, spread)), strict=True):
        parted = [a != b for a, b in zip(one.tokens, other.tokens, strict=False)]
        same = parted.index(True) if True in parted else len(parted)
        np.testing.assert_allclose(other.log_prob[:same], one.log_prob[:same], atol=0.05)
        agreed += sum(t >= 0 for t in one.turn[:same])
    assert agreed > 20


def same_but_for_rounding(want, got):
    for a, b in zip(want, got, strict=True):
        assert (a.tokens, a.actions) == (b.tokens, b.actions)
        np.testing.assert_allclose(a.log_prob, b.log_prob, atol=1e-5)


@pytest.mark.parametrize("lanes", range(1, 8))
def test_episodes_are_assigned_to_lanes_whole_and_evenly(lanes):
    def assigned(groups, lanes):
        episodes = [Episode(i, {"id": "t"}, g) for i, g in enumerate(groups)]
        return scheduler._assign([LiveEpisode(episode, TOKENIZER, SETTINGS) for episode in episodes], lanes)

    for sizes in ([8, 8, 8, 8], [1] * 13, [20], [3, 9, 1, 5]):
        groups = [g for g, n in enumerate(sizes) for _ in range(n)]
        assignments = assigned(groups, lanes)
        assert sorted(live.episode.id for a in assignments for live in a) == list(range(len(groups)))
        assert max(map(len, assignments)) <= -(-len(groups) // lanes)
    groups_of_lanes = [{live.episode.group for live in a} for a in assigned([i // 8 for i in range(32)], 4)]
    assert list(map(len, groups_of_lanes)) == [1] * 4


def test_pieces_read_every_prompt_to_its_end_at_little_cost():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = sorted(rng.integers(1, 400, rng.integers(1, 16)).tolist())
        widths = lane.pieces(tuple(lengths), 16)
        assert sum(widths) >= max(lengths) and sum(widths[:-1]) < max(lengths)
    assert lane.pieces((9,) * 14 + (20, 30), 16) == (16, 16)
    assert lane.pieces((60,) * 16, 16) == (64,)
    assert lane.pieces((1,) * 15 + (60,), 16) == (1, 64)  # a token of every row, then the long prompt in a quarter of them
    assert len(lane.pieces((5000,), 16)) < 12


def test_every_stop_token_ends_a_turn_and_the_templates_closes_it(wander, stirred):
    """Turns that end with either of two stop tokens or with their budget; the learner scores what was sampled, no more."""
    other = TOKENIZER.backend.token_to_id("<|pad|>")
    both = dataclasses.replace(TOKENIZER, frame=dataclasses.replace(TOKENIZER.frame, stops=("<|pad|>",)))
    params = {**stirred, "embedding": stirred["embedding"].at[other].set(0.8 * stirred["embedding"][TOKENIZER.stop_id])}
    endings = set()
    for settings in (CHAT, WINDOW):
        for t in wander(settings, params=params, tokenizer=both)[0]:
            for turn in range(len(t.actions)):
                said = [token for token, at in zip(t.tokens, t.turn, strict=True) if at == turn]
                assert not {*both.stop_ids} & {*said[:-1]} and (len(said) == 5 or said[-1] in both.stop_ids)
                assert t.actions[turn] == agent.parse_action(TOKENIZER.decode(said), tags=False).action
                closed = [] if said[-1] == TOKENIZER.stop_id else [TOKENIZER.stop_id]
                endings.add(said[-1] if said[-1] in both.stop_ids else None)
                if settings is CHAT and turn + 1 < len(t.actions):
                    start = max(i for i, at in enumerate(t.turn) if at == turn) + 1
                    prompt = t.tokens[start : t.turn.index(turn + 1)]
                    assert prompt == closed + TOKENIZER.following(t.observations[turn + 1], TOKENIZER.stop_id)
    assert endings == {other, TOKENIZER.stop_id, None}


def test_worker_count_and_slots_do_not_change_the_trajectories(params):
    want = ids(play(params)[0])
    assert ids(play(params, workers=3)[0]) == want
    for slots in (2, 14):
        assert ids(play(params, settings=dataclasses.replace(SETTINGS, slots=slots))[0]) == want
    assert ids(play(params, key=1)[0]) != want


def test_an_episode_does_not_depend_on_its_companions(params):
    want = ids(play(params)[0])
    assert ids(play(params, episodes=EPISODES[5:8])[0]) == want[5:8]


def test_a_trajectory_is_what_was_said(params):
    trajectories, stats = play(params)
    for episode, t in zip(EPISODES, trajectories, strict=True):
        assert (t.task, t.group) == (episode.task, episode.group)
        assert len(t.tokens) == len(t.turn) == len(t.log_prob) == len(t.entropy)
        assert len(t.actions) == len(t.rewards) == len(t.valid) == 2 and len(t.observations) == 3
        assert t.tokens[: len(TOKENIZER.first("x")) - 1]
        opening = TOKENIZER.first(f"{t.observations[0]}\n{toy.GOAL}")
        assert t.tokens[: len(opening)] == opening and t.turn[: len(opening)] == [-1] * len(opening)
        for turn, action in enumerate(t.actions):
            said = [token for token, at in zip(t.tokens, t.turn, strict=True) if at == turn]
            assert 1 <= len(said) <= SETTINGS.response_tokens
            assert agent.parse_action(TOKENIZER.decode(said), tags=False).action == action
        policy = np.array(t.turn) >= 0
        assert (np.array(t.log_prob)[policy] < 0).all() and not np.array(t.log_prob)[~policy].any()
        assert t.won == (sum(t.rewards) == 10.0) and not t.truncated
    assert stats.policy_tokens == sum(t.num_policy_tokens for t in trajectories) and stats.env_steps == 28


def test_a_context_without_room_for_any_first_prompt_is_refused_with_the_number_that_does(params):
    with pytest.raises(UserError, match=r"config.agent.max_tokens=12 has no room .* set it to (\d+),") as refused:
        play(params, settings=dataclasses.replace(SETTINGS, max_tokens=12))
    enough = int(re.search(r"set it to (\d+),", str(refused.value))[1])
    assert all(t.actions for t in play(params, settings=dataclasses.replace(SETTINGS, max_tokens=enough))[0])


def test_turn_and_token_limits_end_an_episode(params, capsys):
    one_turn, _ = play(params, settings=dataclasses.replace(SETTINGS, max_turns=1))
    assert all(len(t.actions) == 1 and t.truncated and not t.won for t in one_turn)
    opening = max(len(t.tokens) for t in one_turn)
    tight = dataclasses.replace(SETTINGS, max_tokens=opening + 6)
    cut, _ = play(params, settings=tight)
    assert all(len(t.tokens) <= opening + 6 for t in cut) and any(t.truncated for t in cut)
    assert all(t.full == t.truncated for t in cut) and not any(t.full for t in one_turn)
    warn_full(cut, tight)
    assert f"warning: {sum(t.full for t in cut)} of {len(cut)} episodes ended" in capsys.readouterr().out
    warn_full(one_turn, tight)
    assert capsys.readouterr().out == ""
    silent, _ = play(params, settings=dataclasses.replace(SETTINGS, max_policy_tokens=8))
    assert all(t.num_policy_tokens <= 8 for t in silent) and any(t.truncated for t in silent)


def test_fault_6_a_finished_episode_generates_nothing(params):
    """Episodes of one and of two turns side by side: the short ones cost no tokens after their end."""
    lengths = [len(t.tokens) for t in play(params)[0]]
    tight = dataclasses.replace(SETTINGS, max_tokens=max(lengths) - 1)
    trajectories, stats = play(params, settings=tight)
    turns = [len(t.actions) for t in trajectories]
    assert set(turns) == {1, 2}, "the token budget no longer ends some episodes early: choose another"
    assert stats.env_steps == sum(turns)
    assert stats.policy_tokens == sum(t.num_policy_tokens for t in trajectories)


def test_a_second_rollout_compiles_nothing(params, max_traces):
    play(params)
    for function in (generate.decode, generate.extend, generate.take_slots, generate.copy_slots):
        max_traces(function, 0)
    play(params, key=5)


def test_the_cost_of_rounds_adds_up():
    total = scheduler.RolloutStats(seconds=1.0, env_steps=2) + scheduler.RolloutStats(seconds=0.5, env_steps=3)
    assert total == scheduler.RolloutStats(seconds=1.5, env_steps=5)
