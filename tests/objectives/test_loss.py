import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epo_jax.objectives import entropy
from epo_jax.objectives.loss import Hyper, ObjectiveConfig, epo_loss, loss_rows, record, smoothing_terms
from tests.objectives.problems import NUM, ONE_PER_ROW, PACKED, TURNS, advantages, pack, trajectories

STEPS = 8
PAST = (0.7, 0.9)  # mean entropies of the steps before
BASE = ObjectiveConfig(num_trajectories=NUM, max_turns=TURNS, max_tokens=40)
# Strong enough that every part of the loss matters, with a corridor narrow enough to be left on both sides.
HYPER = Hyper(lam=0.5, alpha=0.8, kappa_l=0.8, kappa_r=1.2, kl_coef=0.3)
few = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def past(objective):
    history = entropy.init_history(STEPS, TURNS if objective.history_index == "turn" else None)
    width = history.values.shape[1]
    for value in PAST:
        history = entropy.append(history, value * (1.0 + 0.2 * jnp.arange(width)), jnp.ones(width))
    return history


@functools.partial(
    jax.jit, static_argnames=("objective", "split"), compiler_options={"xla_backend_optimization_level": 0}
)
def total(rows, advantage, hyper, objective, split=None, history=None):
    """The mini-batch's (loss, sums), added up over micro-batches of `split` rows; differentiable."""

    def whole(log_prob, token_entropy):
        table = loss_rows(
            rows["mask"], rows["trajectory"], rows["turn"], rows["old_log_prob"], rows["ref_log_prob"],
            advantage[rows["trajectory"]] * rows["mask"], hyper, objective,
            behaviour_log_prob=rows["ref_log_prob"], behaviour_entropy=rows["old_entropy"], key=jax.random.key(0),
        )  # fmt: skip
        past_steps = past(objective) if history is None else history
        smoothing = smoothing_terms(past_steps, 2, STEPS, rows["old_entropy"], table, hyper, objective)
        count = log_prob.shape[0]
        parts = [
            epo_loss(*jax.tree.map(lambda x: x[s], (log_prob, token_entropy, table)), smoothing, hyper, objective)  # noqa: B023
            for s in (slice(i, i + (split or count)) for i in range(0, count, split or count))
        ]
        loss, sums = jax.tree.map(lambda *x: sum(x), *parts)
        return loss, sums

    (loss, sums), gradients = jax.value_and_grad(whole, (0, 1), has_aux=True)(rows["log_prob"], rows["entropy"])
    return loss, sums, gradients


def by_token(field, rows):
    """The policy tokens' entries, episode after episode."""
    return np.concatenate([np.asarray(field)[(rows["trajectory"] == i) & (rows["mask"] > 0)] for i in range(NUM)])


def written_out(episodes, advantage, hyper, center, beta):
    """Eq. 2-6 in float64 as loops over episodes, turns and tokens; returns (loss, gradients) by token. Without a history
    `center` is None."""
    with jax.enable_x64(True):
        keep = [e["mask"] > 0 for e in episodes]
        ends = np.cumsum([k.sum() for k in keep])[:-1]

        def loss(log_prob, token_entropy):
            surrogate, kls, l_h, l_smooth = [], [], [], []
            for e, k, a, lp, h in zip(
                episodes, keep, advantage, jnp.split(log_prob, ends), jnp.split(token_entropy, ends), strict=True
            ):
                ratio = jnp.exp(lp - e["old_log_prob"][k])
                gain = jnp.minimum(a * ratio, a * jnp.clip(ratio, 1 - hyper.clip_low, 1 + hyper.clip_high))
                surrogate.append(-(jnp.maximum(gain, hyper.dual_clip * a) if a < 0 else gain))
                difference = e["ref_log_prob"][k] - lp
                kls.append(jnp.exp(difference) - difference - 1)
                low, high = (0.0, jnp.inf) if center is None else (hyper.kappa_l * center, hyper.kappa_r * center)
                penalty = hyper.alpha * (jnp.maximum(low - h, 0.0) + jnp.maximum(h - high, 0.0))
                turns = [e["turn"][k] == t for t in sorted(set(e["turn"][k]))]
                if not turns:
                    continue
                l_h.append(jnp.stack([h[t].mean() for t in turns]).mean())
                l_smooth.append(jnp.stack([penalty[t].mean() for t in turns]).mean())
            return (
                jnp.concatenate(surrogate).mean()
                - hyper.lam * (jnp.stack(l_h).mean() - beta * jnp.stack(l_smooth).mean())
                + hyper.kl_coef * jnp.concatenate(kls).mean()
            )

        kept = [(e["log_prob"][k], e["entropy"][k]) for e, k in zip(episodes, keep, strict=True)]
        tokens = [jnp.concatenate(x) for x in zip(*kept, strict=True)]
        return jax.device_get(jax.value_and_grad(loss, (0, 1))(*tokens))


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


@pytest.mark.parametrize("layout", [ONE_PER_ROW, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_paper_written_out_in_float64(name, layout):
    change, scale, unknown = PROBLEMS[name]
    episodes, advantage = change(trajectories(0)), scale * advantages(0)
    rows = pack(episodes, layout, 60)
    history = entropy.init_history(STEPS) if unknown else None
    loss, _, gradients = total(rows, jnp.asarray(advantage, jnp.float32), HYPER, BASE, history=history)
    center, beta = None if unknown else np.mean(PAST), 1 + np.exp(-HYPER.gamma * 2 / (STEPS // 2))
    expected, expected_gradients = written_out(episodes, advantage, HYPER, center, beta)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(by_token(found, rows), exact, rtol=1e-4, atol=1e-7)
        assert (np.asarray(found)[rows["mask"] == 0] == 0).all()


VARIANTS = {
    "paper": {},
    "turn scope, turn history, gate": {
        "penalty_scope": "turn", "history_index": "turn", "turn_gate": True, "entropy_aggregation": "token-mean",
    },
    "trajectory scope": {"penalty_scope": "trajectory", "entropy_aggregation": "seq-mean-token-mean"},
    "batch scope": {"penalty_scope": "batch", "aggregation": "seq-mean-token-sum"},
    "gspo": {"ratio_scope": "trajectory", "aggregation": "seq-mean-token-sum-norm", "truncated_importance": True},
    "kl-cov": {"token_control": "kl_cov", "kl": "none", "aggregation": "trajectory"},
    "siren": {"entropy_term": "siren", "history": "initial", "kl": "abs"},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_split_packing_padding_and_row_order_change_nothing(name):
    """One episode a row, in one piece; or packed in another order between empty rows, two rows at a time."""
    objective, hyper = dataclasses.replace(BASE, **VARIANTS[name]), HYPER._replace(cov_fraction=0.3)

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
    objective = dataclasses.replace(BASE, **VARIANTS[name])
    base = HYPER._replace(cov_fraction=0.3, turn_decay=0.5)

    @given(seeds)
    @settings(few, max_examples=2)
    def check(seed):
        rows, advantage = pack(trajectories(seed), PACKED, 60), jnp.asarray(advantages(seed), jnp.float32)
        rng = np.random.default_rng(seed)
        members = [jax.tree.map(lambda x: jnp.float32(x * rng.uniform(0.8, 1.2)), base) for _ in range(3)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
        mapped = jax.vmap(lambda hyper: total(rows, advantage, hyper, objective))(stacked)
        for m, hyper in enumerate(members):
            alone = total(rows, advantage, hyper, objective)
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
    history = record(past(BASE), rows["old_entropy"], rows["mask"], rows["trajectory"], rows["turn"], HYPER, BASE)
    assert history.count == 3
    np.testing.assert_allclose(history.values[2, 0], by_token(rows["old_entropy"], rows).mean(), rtol=1e-5)
    by_turn = dataclasses.replace(BASE, history_index="turn")
    history = record(past(by_turn), rows["old_entropy"], rows["mask"], rows["trajectory"], rows["turn"], HYPER, by_turn)
    last = np.asarray(rows["old_entropy"])[(rows["turn"] == 2) & (rows["mask"] > 0)].mean()
    np.testing.assert_allclose(history.values[2, 2], last, rtol=1e-5)


def test_truncated_importance_scales_the_surrogate_alone():
    rows, advantage = pack(trajectories(0), PACKED, 60), jnp.asarray(advantages(0), jnp.float32)
    rows["ref_log_prob"] = rows["old_log_prob"] - jnp.log(1.5)  # what `total` gives as the sampler's
    plain, scaled = (
        total(rows, advantage, HYPER, dataclasses.replace(BASE, truncated_importance=on))[1] for on in (False, True)
    )
    np.testing.assert_allclose(scaled["policy_loss"], 1.5 * plain["policy_loss"], rtol=1e-5)
    np.testing.assert_allclose(scaled["kl"], plain["kl"], rtol=1e-6)


def test_full_kl_takes_the_place_of_the_estimate():
    rows = pack(trajectories(0), PACKED, 60)
    part = loss_rows(
        rows["mask"], rows["trajectory"], rows["turn"], rows["old_log_prob"], rows["ref_log_prob"],
        jnp.zeros_like(rows["mask"]), HYPER, BASE,
    )  # fmt: skip
    objective = dataclasses.replace(BASE, kl="full")
    smoothing = smoothing_terms(past(BASE), 2, STEPS, rows["old_entropy"], part, HYPER, objective)
    given_kl = rows["value"]
    sums = epo_loss(rows["log_prob"], rows["entropy"], part, smoothing, HYPER, objective, given_kl)[1]
    np.testing.assert_allclose(sums["kl"], by_token(given_kl, rows).mean(), rtol=1e-4, atol=1e-6)
