"""Random episodes as plain lists, and their packing into rows: what the tests of losses and advantages share."""

import jax
import jax.numpy as jnp
import numpy as np

from epo_jax.objectives.batch import NO_ARRAYS, Old, Rows, TokenBatch
from epo_jax.objectives.loss import weigh

NUM, TURNS, GROUPS = 6, 3, 2  # trajectories, turns at most, groups
FIELDS = (
    "mask", "turn", "reward", "valid", "value", "log_prob", "old_log_prob", "ref_log_prob", "entropy", "old_entropy",
)  # fmt: skip


def trajectories(seed: int) -> list[dict[str, np.ndarray]]:
    """`NUM` episodes of 1 to `TURNS` turns: observation tokens (mask 0) before 1 to 4 policy tokens of each turn."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(NUM):
        mask, turn, reward, valid = [], [], [], []
        for t in range(rng.integers(1, TURNS + 1)):
            seen, said = rng.integers(0, 3), rng.integers(1, 5)
            mask += [0.0] * seen + [1.0] * said
            turn += [t] * (seen + said)
            reward += [0.0] * (seen + said - 1) + [float(rng.integers(0, 3))]
            valid += [float(rng.random() < 0.8)] * (seen + said)
        size = len(mask)
        old = -rng.exponential(1.0, size)
        entropy = rng.gamma(2.0, 0.4, size)
        columns = (
            mask, turn, reward, valid, rng.normal(size=size), old + 0.3 * rng.normal(size=size), old,
            old + 0.3 * rng.normal(size=size), np.maximum(entropy + 0.1 * rng.normal(size=size), 0.0), entropy,
        )  # fmt: skip
        fields = zip(FIELDS, columns, strict=True)
        episodes.append({k: np.asarray(v, np.int32 if k == "turn" else np.float64) for k, v in fields})
    return episodes


def advantages(seed: int) -> np.ndarray:
    return np.random.default_rng(seed + 1).normal(size=NUM)


def episode_keys(seed: int = 0):
    """What Clip-Cov draws from, a key for each trajectory."""
    return jax.random.split(jax.random.key(seed), NUM)


def pack(episodes: list[dict], layout: list[list[int]], length: int) -> dict[str, jnp.ndarray]:
    """[B, T] arrays of every field and `trajectory`; `layout` names the episodes of each row, 0 where padding."""
    rows = {k: np.zeros((len(layout), length), np.int32 if k == "turn" else np.float32) for k in FIELDS}
    rows["trajectory"] = np.zeros((len(layout), length), np.int32)
    for r, members in enumerate(layout):
        start = 0
        for i in members:
            size = episodes[i]["mask"].size
            for k in FIELDS:
                rows[k][r, start : start + size] = episodes[i][k]
            rows["trajectory"][r, start : start + size] = i
            start += size
    return {k: jnp.asarray(v) for k, v in rows.items()}


ONE_PER_ROW = [[i] for i in range(NUM)]
PACKED = [[4, 1], [2], [], [0, 5, 3], [], []]


def batch_of(rows: dict, returns=None, group=None, anchor=None) -> TokenBatch:
    """The rows as a batch, without what the model reads; the sampler's log-probabilities are the reference's."""
    return NO_ARRAYS._replace(
        policy_mask=rows["mask"], trajectory=rows["trajectory"], turn=rows["turn"],
        reward=rows["reward"] * rows["mask"], valid=rows["valid"],
        behaviour_log_prob=rows["ref_log_prob"], behaviour_entropy=rows["old_entropy"],
        returns=jnp.asarray(np.zeros(NUM) if returns is None else returns, jnp.float32),
        group=jnp.asarray(np.zeros(NUM) if group is None else group, jnp.int32),
        anchor=jnp.zeros((NUM, TURNS), jnp.int32) if anchor is None else jnp.asarray(anchor, jnp.int32),
    )  # fmt: skip


def old_of(rows: dict, advantage=None) -> Old:
    """What is known of the rows before an update."""
    return Old(
        rows["old_log_prob"], rows["old_entropy"], rows["value"] * rows["mask"], rows["ref_log_prob"], rows["mask"], advantage,
        advantage,
    )  # fmt: skip


def weighed(rows: dict, advantage, hyper, objective, keys=None) -> Rows:
    """The rows as the loss sees them."""
    return weigh(batch_of(rows), old_of(rows, advantage), hyper, objective, episode_keys() if keys is None else keys)


def episodes_of(rows: dict, returns, group, anchor=None) -> tuple[TokenBatch, Old]:
    """What advantages are estimated from."""
    return batch_of(rows, returns, group, anchor), old_of(rows)
