import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epo_jax.objectives import entropy, registry, spec
from epo_jax.objectives.batch import Current
from epo_jax.objectives.loss import epo_loss, record, smoothing_terms
from epo_jax.objectives.spec import Hyper, ObjectiveConfig
from epo_jax.settings.table import Aggregation, HistoryMode, Penalty, PenaltyScope, Phase
from tests import rounding
from tests.objectives import transcription
from tests.objectives.problems import NUM, ONE_PER_ROW, PACKED, TURNS, advantages, episodes_of, pack, trajectories, weighed

STEPS = 8
PAST = (0.7, 0.9)  # mean entropies of the steps before
BASE = ObjectiveConfig(num_trajectories=NUM, max_turns=TURNS, max_tokens=40)
# Strong enough that every part of the loss matters, with a corridor narrow enough to be left on both sides.
HYPER = Hyper(
    lam=0.5,
    alpha=0.8,
    kappa_l=0.8,
    kappa_r=1.2,
    kl_coef=0.3,
    window=1.0,
    ema_decay=0.5,
    cov_fraction=0.3,
    peak_quantile=0.6,
    importance_cap=2.0,
)
few = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def past(objective):
    history = entropy.init_history(STEPS, TURNS if objective.history_index == "turn" else None)
    width = history.values.shape[1]
    for value in PAST:
        history = entropy.append(history, value * (1.0 + 0.2 * jnp.arange(width)), jnp.ones(width))
    return history


def sliced(rows, tree):
    """Those rows of everything that has rows."""
    return jax.tree.map(lambda x: x[rows] if x.ndim == 2 and x.shape != (NUM, TURNS) else x, tree)


@functools.partial(jax.jit, static_argnames=("objective", "split"))
def total(rows, advantage, hyper, objective, split=None, history=None):
    """The mini-batch's (loss, sums), added up over micro-batches of `split` rows; differentiable."""

    def whole(log_prob, token_entropy):
        table = weighed(rows, advantage[rows["trajectory"]] * rows["mask"], hyper, objective)
        past_steps = past(objective) if history is None else history
        smoothing = smoothing_terms(past_steps, 2, STEPS, table, hyper, objective)
        count = log_prob.shape[0]
        parts = [
            epo_loss(*sliced(s, (Current(log_prob, token_entropy), table)), smoothing, hyper, objective)
            for s in (slice(i, i + (split or count)) for i in range(0, count, split or count))
        ]
        loss, sums = jax.tree.map(lambda *x: sum(x), *parts)
        return loss, sums

    (loss, sums), gradients = jax.value_and_grad(whole, (0, 1), has_aux=True)(rows["log_prob"], rows["entropy"])
    return loss, sums, gradients


def by_token(field, rows):
    """The policy tokens' entries, episode after episode."""
    return np.concatenate([np.asarray(field)[(rows["trajectory"] == i) & (rows["mask"] > 0)] for i in range(NUM)])


def shortened(episodes):
    """Only the first turn of each."""
    return [{name: value[e["turn"] == 0] for name, value in e.items()} for e in episodes]


def certain(episodes):
    """The policy is sure of every token."""
    return [{**e, "entropy": 0.0 * e["entropy"], "old_entropy": 0.0 * e["entropy"]} for e in episodes]


def one_silent(episodes):
    """The third episode says nothing."""
    return [*episodes[:2], {**episodes[2], "mask": 0.0 * episodes[2]["mask"]}, *episodes[3:]]


PROBLEMS = {
    "as sampled": (lambda episodes: episodes, 1.0, False),
    "no advantage": (lambda episodes: episodes, 0.0, False),
    "empty history": (lambda episodes: episodes, 1.0, True),
    "one turn": (shortened, 1.0, False),
    "zero entropy": (certain, 1.0, False),
    "an episode without policy tokens": (one_silent, 1.0, False),
}


def loss_rounding(episodes, advantage, objective):
    """Of the loss, whose terms have both signs: a token adds its advantage times a ratio, and its entropy."""
    keep = [e["mask"] > 0 for e in episodes]
    sizes = [np.abs(a) * np.exp(np.abs(e["log_prob"] - e["old_log_prob"])[k]) + e["entropy"][k]
             for e, a, k in zip(episodes, advantage, keep, strict=True)]  # fmt: skip
    turns = [e["turn"][k] for e, k in zip(episodes, keep, strict=True)]
    mean = transcription.average(sizes, turns, objective.aggregation, objective.max_tokens, TURNS)
    return rounding.bound(sum(map(len, sizes)), mean)


def agrees_with_the_formula(episodes, advantage, hyper, objective, layout, split=None, empty_history=False):
    """Loss and gradients by every token, against float64."""
    rows = pack(episodes, layout, 60)
    history = entropy.init_history(STEPS) if empty_history else None
    loss, _, gradients = total(rows, jnp.asarray(advantage, jnp.float32), hyper, objective, split, history)
    width = past(objective).values.shape[1]
    steps = np.array(PAST if not empty_history else ())[:, None] * (1.0 + 0.2 * np.arange(width))
    expected, exact = transcription.value_and_gradients(episodes, advantage, hyper, objective, steps, 2, STEPS)
    np.testing.assert_allclose(loss, expected, rtol=0, atol=loss_rounding(episodes, advantage, objective))
    for found, gradient in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(by_token(found, rows), gradient, rtol=1e-4, atol=1e-6)
        assert (np.asarray(found)[rows["mask"] == 0] == 0).all()


@pytest.mark.parametrize("layout", [ONE_PER_ROW, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_paper_written_out_in_float64(name, layout):
    change, scale, empty = PROBLEMS[name]
    agrees_with_the_formula(change(trajectories(0)), scale * advantages(0), HYPER, BASE, layout, empty_history=empty)


# Fields of ObjectiveConfig and Hyper. Together they hold every value of every choice that the loss knows.
VARIANTS = {
    "paper": {},
    "turn": {
        "penalty_scope": "turn", "history_index": "turn", "turn_gate": True, "entropy_aggregation": "token-mean",
        "history": "sliding",
    },
    "trajectory": {
        "penalty_scope": "trajectory", "turn_decay": 0.5, "history": "ema", "kl": "k1", "aggregation": "seq-mean-token-mean",
    },
    "batch": {
        "penalty_scope": "batch", "kappa_r": 0.5, "kappa_l": 0.4, "aggregation": "seq-mean-token-sum", "phase": "constant",
        "kl": "k2",
    },
    "indicator": {
        "penalty": "indicator", "phase": "two_stage", "phase_steps": 3, "entropy_aggregation": "seq-mean-token-sum",
    },
    "gspo": {
        "ratio_scope": "trajectory", "aggregation": "seq-mean-token-sum-norm", "truncated_importance": True, "kl": "abs",
    },
    "gspo by turn": {
        "ratio_scope": "turn", "entropy_aggregation": "seq-mean-token-sum-norm", "penalty_scope": "trajectory", "phase": "mean",
        "step_decay": 0.7,
    },
    "clip-cov": {"token_control": "clip_cov", "cov_low": 0.0},
    "kl-cov": {"token_control": "kl_cov", "kl": "none", "aggregation": "trajectory"},
    "siren": {"entropy_term": "siren", "history": "initial", "entropy_aggregation": "seq-mean-token-mean"},
    "target": {"coefficient": "target", "target_entropy": 3.0, "target_delta": 0.1, "target_cap": 0.65},
}  # fmt: skip


def variant(name):
    return registry.override(BASE, HYPER, VARIANTS[name])


def test_the_variants_hold_every_choice():
    choices = {
        "aggregation": get_args(Aggregation), "entropy_aggregation": get_args(Aggregation),
        "kl": set(get_args(spec.KLKind)) - {"full"},  # test_full_kl_takes_the_place_of_the_estimate
        "ratio_scope": get_args(spec.Scope), "penalty": get_args(Penalty), "phase": get_args(Phase),
        "penalty_scope": get_args(PenaltyScope), "history": get_args(HistoryMode),
        "history_index": ("global", "turn"), "turn_gate": (False, True), "truncated_importance": (False, True),
        "token_control": registry.TOKEN_CONTROLS, "entropy_term": registry.ENTROPY_TERMS,
        "coefficient": registry.COEFFICIENTS,
    }  # fmt: skip
    for field, values in choices.items():
        assert {getattr(variant(name)[0], field) for name in VARIANTS} == set(values), field


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"clip-cov"}))  # whose random tokens test_controls has
def test_every_variant_written_out_in_float64(name):
    """With an episode that says nothing, packed, in micro-batches. What is linearised at the entropies as sampled is
    compared there."""
    objective, hyper = variant(name)
    episodes = one_silent(trajectories(1))
    if name in ("batch", "siren"):
        episodes = [{**e, "entropy": e["old_entropy"]} for e in episodes]
    agrees_with_the_formula(episodes, advantages(1), hyper, objective, PACKED, split=2)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_corridor_never_contains_the_current_step(name):
    """Whatever this step's entropies are, the centre is the same; the next step's is another."""
    objective, hyper = variant(name)
    rows, history = pack(trajectories(0), PACKED, 60), past(objective)

    @jax.jit
    def seen(history, sampled):
        table = weighed({**rows, "old_entropy": sampled}, 0.0 * rows["mask"], hyper, objective)
        return smoothing_terms(history, 2, STEPS, table, hyper, objective).center

    @given(st.floats(0.0, 10.0, width=32))
    @few
    def check(scale):
        np.testing.assert_array_equal(seen(history, rows["old_entropy"]), seen(history, scale * rows["old_entropy"]))

    check()
    tripled = {**rows, "old_entropy": 3.0 * rows["old_entropy"]}
    later = record(history, *episodes_of(tripled, None, None), hyper, objective)
    moved = jnp.abs(seen(later, rows["old_entropy"]) - seen(history, rows["old_entropy"]))
    assert (moved > 0.1).all() or objective.history == "initial"


@pytest.mark.parametrize("name", VARIANTS)
def test_split_packing_padding_and_row_order_change_nothing(name):
    """One episode a row, in one piece; or packed in another order between empty rows, two rows at a time."""
    objective, hyper = variant(name)

    @given(seeds)
    @settings(few, max_examples=4)
    def check(seed):
        episodes, advantage = trajectories(seed), jnp.asarray(advantages(seed), jnp.float32)
        results = []
        for layout, length, split in ((ONE_PER_ROW, 24, None), (PACKED, 60, 2)):
            rows = pack(episodes, layout, length)
            loss, sums, gradients = total(rows, advantage, hyper, objective, split)
            results.append((loss, sums, [by_token(g, rows) for g in gradients]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *results)

    check()


@pytest.mark.parametrize("name", VARIANTS)
def test_vmap_over_coefficients_is_a_loop(name):
    """Every coefficient at once, in every variant: three members whose values all differ."""
    objective, hyper = variant(name)
    base = hyper._replace(turn_decay=0.5, step_decay=0.5)

    @given(seeds)
    @settings(few, max_examples=2)
    def check(seed):
        rows, advantage = pack(trajectories(seed), PACKED, 60), jnp.asarray(advantages(seed), jnp.float32)
        rng = np.random.default_rng(seed)
        members = [jax.tree.map(lambda x: x * rng.uniform(0.8, 1.2), base) for _ in range(3)]
        stacked = jax.tree.map(lambda *x: jnp.float32(x), *members)
        mapped = jax.vmap(lambda hyper: total(rows, advantage, hyper, objective, split=2))(stacked)
        for m, hyper in enumerate(members):
            alone = total(rows, advantage, hyper, objective, split=2)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a[m], b, rtol=1e-5, atol=1e-6), mapped, alone)  # noqa: B023

    check()


def entropy_gradient(rows, objective, hyper=HYPER, **kwargs):
    """Gradient by the entropies, split into what the corridor adds and what the plain bonus gives."""
    advantage = jnp.zeros(NUM)
    with_, without = (
        total(rows, advantage, hyper._replace(alpha=alpha), objective, **kwargs)[2][1] for alpha in (hyper.alpha, 0.0)
    )
    return with_ - without, without


def test_the_first_step_has_no_corridor():
    rows = pack(trajectories(0), PACKED, 60)
    corridor, bonus = entropy_gradient(rows, BASE, history=entropy.init_history(STEPS))
    assert (corridor == 0).all() and (bonus[rows["mask"] > 0] < 0).all()


def test_the_corridor_penalty_counts_from_its_first_step_on():
    rows, advantage = pack(trajectories(0), PACKED, 60), jnp.asarray(advantages(0), jnp.float32)
    usual, without = (total(rows, advantage, HYPER._replace(alpha=alpha), BASE)[0] for alpha in (HYPER.alpha, 0.0))
    assert usual != without
    for start_step, expected in ((0, usual), (2, usual), (3, without)):  # `total` is RL step 2
        assert total(rows, advantage, HYPER._replace(start_step=start_step), BASE)[0] == expected, start_step


def test_the_weight_of_the_entropy_term_falls_with_the_rl_step():
    """`total` is RL step 2 of 8: the whole term, bonus and corridor, has exp(-2 d / 8) of its weight."""
    rows, advantage = pack(trajectories(0), PACKED, 60), jnp.asarray(advantages(0), jnp.float32)
    none, full, falling = (
        total(rows, advantage, HYPER._replace(lam=lam, step_decay=decay), BASE)[0]
        for lam, decay in ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0))
    )
    np.testing.assert_allclose(falling - none, np.exp(-0.25) * (full - none), rtol=1e-5)


def test_hinge_pushes_back_and_indicator_does_not():
    rows = pack(trajectories(0), PACKED, 60)
    hinge, _ = entropy_gradient(rows, BASE)
    indicator, _ = entropy_gradient(rows, dataclasses.replace(BASE, penalty="indicator"))
    center, keep = np.mean(PAST), rows["mask"] > 0
    assert (hinge[keep & (rows["entropy"] > HYPER.kappa_r * center)] > 0).all()
    assert (hinge[keep & (rows["entropy"] < HYPER.kappa_l * center)] < 0).all()
    assert (indicator == 0).all()


def test_gate_closes_the_corridor_for_early_turns():
    rows = pack(trajectories(0), PACKED, 60)
    gated, _ = entropy_gradient(rows, dataclasses.replace(BASE, turn_gate=True))
    opened, _ = entropy_gradient(rows, BASE)
    np.testing.assert_array_equal(gated, jnp.where(rows["turn"] >= TURNS // 2, opened, 0.0))


def test_batch_scope_compares_the_mean_of_the_batch():
    """Single tokens far outside do not matter while the batch's mean entropy is inside."""
    rows = pack(trajectories(0), PACKED, 60)
    objective = dataclasses.replace(BASE, penalty_scope="batch", entropy_aggregation="token-mean")
    mean = by_token(rows["old_entropy"], rows).mean()
    inside = HYPER._replace(kappa_l=0.9 * mean / np.mean(PAST), kappa_r=1.1 * mean / np.mean(PAST))
    above = HYPER._replace(kappa_l=0.0, kappa_r=0.9 * mean / np.mean(PAST))
    assert (entropy_gradient(rows, objective, inside)[0] == 0).all()
    assert (entropy_gradient(rows, objective, above)[0][rows["mask"] > 0] > 0).all()


def test_record_appends_the_sampled_entropy_of_this_step():
    rows = pack(trajectories(0), PACKED, 60)
    history = record(past(BASE), *episodes_of(rows, None, None), HYPER, BASE)
    assert history.count == 3
    np.testing.assert_allclose(history.values[2, 0], by_token(rows["old_entropy"], rows).mean(), rtol=1e-5)
    by_turn = dataclasses.replace(BASE, history_index="turn")
    history = record(past(by_turn), *episodes_of(rows, None, None), HYPER, by_turn)
    last = np.asarray(rows["old_entropy"])[(rows["turn"] == 2) & (rows["mask"] > 0)].mean()
    np.testing.assert_allclose(history.values[2, 2], last, rtol=1e-5)


def test_truncated_importance_scales_the_surrogate_alone():
    rows, advantage = pack(trajectories(0), PACKED, 60), jnp.asarray(advantages(0), jnp.float32)
    rows["ref_log_prob"] = rows["old_log_prob"] - jnp.log(1.5)  # what `total` gives as the sampler's
    plain, scaled = (total(rows, advantage, HYPER, dataclasses.replace(BASE, truncated_importance=on))[1] for on in (False, True))
    # Advantages have both signs, and a k3 is what is left of exp(-d) + d - 1.
    atol = 1.5 * loss_rounding(trajectories(0), advantages(0), BASE)
    np.testing.assert_allclose(scaled["policy_loss"], 1.5 * plain["policy_loss"], rtol=0, atol=atol)
    difference = by_token(rows["log_prob"] - rows["ref_log_prob"], rows)
    atol = rounding.bound(difference.size, np.mean(np.exp(-difference) + np.abs(difference) + 1.0))
    np.testing.assert_allclose(scaled["kl"], plain["kl"], rtol=0, atol=atol)


def test_full_kl_takes_the_place_of_the_estimate():
    rows = pack(trajectories(0), PACKED, 60)
    part = weighed(rows, jnp.zeros_like(rows["mask"]), HYPER, BASE)
    objective = dataclasses.replace(BASE, kl="full")
    smoothing = smoothing_terms(past(BASE), 2, STEPS, part, HYPER, objective)
    given_kl = rows["value"]
    sums = epo_loss(Current(rows["log_prob"], rows["entropy"], given_kl), part, smoothing, HYPER, objective)[1]
    np.testing.assert_allclose(sums["kl"], by_token(given_kl, rows).mean(), rtol=1e-4, atol=1e-6)
