"""L_EPO and its variants written out in float64, as loops over episodes, turns and tokens: what the code is held against.

Everything here takes lists with one array per episode, of its policy tokens alone, and knows nothing of packing.
"""

import jax
import jax.numpy as jnp
import numpy as np


def average(x: list, turn: list, mode: str, max_tokens: int, max_turns: int, decay: float = 0.0):
    """The average that `mode` names; episodes without tokens count in none."""
    if mode == "token-mean":
        return sum(h.sum() for h in x) / sum(t.size for t in turn)
    sequences = []
    for h, t in zip(x, turn, strict=True):
        if not t.size:
            continue
        match mode:
            case "trajectory":
                sequences.append(turn_mean(h, t, max_turns, decay))
            case "seq-mean-token-mean":
                sequences.append(h.mean())
            case "seq-mean-token-sum":
                sequences.append(h.sum())
            case "seq-mean-token-sum-norm":
                sequences.append(h.sum() / max_tokens)
    return sum(sequences) / len(sequences)


def turn_mean(h, turn, max_turns, decay):
    """Mean over turns, turn t weighing exp(-decay t / max_turns), of the mean over the turn's tokens."""
    share = {t: np.exp(-decay * t / max_turns) for t in sorted(set(turn.tolist()))}
    return sum(w * h[turn == t].mean() for t, w in share.items()) / sum(share.values())


def center(past: np.ndarray, mode: str, hyper) -> np.ndarray:
    """Hbar of the steps `past` [k, I]."""
    age = np.arange(len(past))[::-1]
    match mode:
        case "cumulative":
            weight = np.ones(len(past))
        case "sliding":
            weight = age < hyper.window
        case "ema":
            weight = hyper.ema_decay**age
        case "initial":
            weight = age == len(past) - 1
    return (weight[:, None] * past).sum(0) / weight.sum()


def beta(kind: str, k: int, total: int, gamma: float) -> float:
    half = total // 2
    match kind:
        case "exponential":
            return 1 + np.exp(-gamma * k / half)
        case "constant":
            return 1.0
        case "mean":
            return sum(beta("exponential", step, total, gamma) for step in range(total)) / total
        case "two_stage":
            early = 1 - 0.2 * (1 - np.exp(-2 * k / half))
            return early if k <= half else 0.8 * np.exp(-3 * (k - half) / (total - half))


def coefficient(past: np.ndarray, now: float, hyper, kind: str) -> float:
    if kind == "fixed":
        return hyper.lam
    lam = hyper.lam
    for step in past.mean(1):
        lam = min(max(lam + hyper.target_delta * np.sign(hyper.target_entropy - step), 0.0), hyper.target_cap)
    return lam if now <= hyper.target_entropy else 0.0


def peaks(h: np.ndarray, quantile: float) -> np.ndarray:
    return h >= np.sort(h)[-max(int((1 - quantile) * h.size + 1e-4), 1)] if h.size else h > 0


def penalty(h, low, high, kind):
    if kind == "indicator":
        return jax.lax.stop_gradient(1.0 - ((h > low) & (h < high)))
    return jnp.maximum(low - h, 0.0) + jnp.maximum(h - high, 0.0)


def measured(h, turn, everything, objective, decay):
    """What each token of an episode is judged by."""
    match objective.penalty_scope:
        case "token":
            return h
        case "turn":
            return sum(jnp.where(turn == t, h[turn == t].mean(), 0.0) for t in set(turn.tolist()))
        case "trajectory":
            by_turn = objective.entropy_aggregation == "trajectory"
            return jnp.full(h.shape, turn_mean(h, turn, objective.max_turns, decay) if by_turn else h.mean())
        case "batch":
            return jnp.full(h.shape, everything)


def log_ratios(log_prob, old, turn, scope):
    difference = log_prob - old
    match scope:
        case "token":
            return difference
        case "turn":
            return sum(jnp.where(turn == t, difference[turn == t].mean(), 0.0) for t in set(turn.tolist()))
        case "trajectory":
            return jnp.full(difference.shape, difference.mean())


def kl(kind, difference):
    return {
        "none": 0.0 * difference,
        "k1": difference,
        "abs": abs(difference),
        "k2": difference**2 / 2,
        "k3": jnp.exp(-difference) + difference - 1,
    }[kind]


def of_largest_covariance(old, advantage, fraction):
    """The tokens that KL-Cov charges, episode by episode."""
    spread = [np.full(o.size, a) for o, a in zip(old, advantage, strict=True)]
    flat, a = np.concatenate(old), np.concatenate(spread)
    share = (flat - flat.mean()) * (a - a.mean())
    chosen = share >= np.sort(share)[-max(int(fraction * share.size + 1e-4), 1)]
    return np.split(chosen, np.cumsum([o.size for o in old])[:-1])


def gae(reward, value, discount, lam) -> np.ndarray:
    """Advantages of one episode's policy tokens."""
    out, following, value_after = np.zeros(len(reward)), 0.0, 0.0
    for i in reversed(range(len(reward))):
        following = reward[i] + discount * value_after - value[i] + discount * lam * following
        out[i], value_after = following, value[i]
    return out


def value_and_gradients(episodes, advantage, hyper, objective, past: np.ndarray, step: int, total_steps: int):
    """(loss, (gradient by log-probability, gradient by entropy)), tokens of all episodes in a row; `past` [k, I]. An advantage
    is one number for an episode or one for each of its tokens. The sampler of truncated importance sampling is taken to be
    the reference, as in `test_loss.total`."""
    keep = [e["mask"] > 0 for e in episodes]
    turn, old, ref, sampled = (
        [e[name][k] for e, k in zip(episodes, keep, strict=True)]
        for name in ("turn", "old_log_prob", "ref_log_prob", "old_entropy")
    )
    ends = np.cumsum([k.sum() for k in keep])[:-1]
    shape = (objective.max_tokens, objective.max_turns)
    gate = objective.max_turns // 2 if objective.turn_gate else 0

    def entropy_mean(x, where=None):
        chosen = [np.ones(t.size, bool) for t in turn] if where is None else where
        parts = zip(*((a[c], t[c]) for a, t, c in zip(x, turn, chosen, strict=True)), strict=True)
        return average(*map(list, parts), objective.entropy_aggregation, *shape, hyper.turn_decay)

    def entropy_term(h):
        one = entropy_mean([np.ones(t.size) for t in turn])
        lam = coefficient(past, entropy_mean(sampled) / one, hyper, objective.coefficient)
        lam *= np.exp(-hyper.step_decay * step / total_steps)
        if objective.entropy_term == "siren":
            top = [peaks(x, hyper.peak_quantile) for x in sampled]
            return lam * (entropy_mean(h, top) - past[0].mean()) ** 2
        smooth = [jnp.zeros(t.size) for t in turn]
        if len(past):
            middle = np.broadcast_to(center(past, objective.history, hyper), objective.max_turns)
            whole = entropy_mean(h) / one
            smooth = [
                jnp.where(t >= gate, hyper.alpha * penalty(
                    measured(x, t, whole, objective, hyper.turn_decay),
                    hyper.kappa_l * middle[t], hyper.kappa_r * middle[t], objective.penalty,
                ), 0.0) if t.size else x
                for x, t in zip(h, turn, strict=True)
            ]  # fmt: skip
        weight = beta(objective.phase, step, objective.phase_steps or total_steps, hyper.gamma)
        return -lam * (entropy_mean(h) - weight * entropy_mean(smooth))

    def loss(log_prob, token_entropy):
        log_prob, h = jnp.split(log_prob, ends), jnp.split(token_entropy, ends)
        charged = of_largest_covariance(old, advantage, hyper.cov_fraction)
        surrogate, divergence = [], []
        for i, a in enumerate(advantage):
            log_ratio = log_ratios(log_prob[i], old[i], turn[i], objective.ratio_scope) if turn[i].size else log_prob[i]
            ratio = jnp.exp(log_ratio)
            gain = jnp.minimum(a * ratio, a * jnp.clip(ratio, 1 - hyper.clip_low, 1 + hyper.clip_high))
            gain = jnp.where(a < 0, jnp.maximum(gain, hyper.dual_clip * a), gain)
            if objective.truncated_importance:
                gain *= np.minimum(np.exp(old[i] - ref[i]), hyper.importance_cap)
            if objective.token_control == "kl_cov":
                gain -= hyper.cov_coef * charged[i] * abs(log_ratio)
            surrogate.append(-gain)
            divergence.append(kl(objective.kl, log_prob[i] - ref[i]))
        base = average(surrogate, turn, objective.aggregation, *shape)
        return base + entropy_term(h) + hyper.kl_coef * average(divergence, turn, objective.aggregation, *shape)

    with jax.enable_x64(True):
        flat = [jnp.concatenate([e[name][k] for e, k in zip(episodes, keep, strict=True)]) for name in ("log_prob", "entropy")]
        run = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return jax.device_get(run(*flat))
