"""The trajectories of a rollout for all processes of a run, from those that each process played.

Tokens and their statistics are sent in binary: 4 bytes a token, and 8 more a policy token. Observations are not sent: training
compares them (`anchors`), but does not read them.
"""

import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from epo_jax.parallel import hosts
from epo_jax.rollout.episode import Episode
from epo_jax.rollout.trajectory import Trajectory

# Fields of a trajectory that all processes know beforehand, that are sent in binary, and that are not sent. The rest is JSON.
_KNOWN, _OF_TOKENS, _TEXTS = ("task", "group", "episode"), ("tokens", "turn", "log_prob", "entropy"), ("goal", "observations")
_REST = [f.name for f in dataclasses.fields(Trajectory) if f.name not in (*_KNOWN, *_OF_TOKENS, *_TEXTS)]


def of_all_processes(episodes: Sequence[Episode], played: list[Trajectory]) -> list[Trajectory]:
    """The trajectories of `episodes`, of which this process played its share.

    All processes must call this together.
    """
    if jax.process_count() == 1:
        return played
    rest = sum(hosts.gather([{name: getattr(t, name) for name in _REST} for t in played]), [])
    tokens = itertools.chain.from_iterable(map(from_bytes, hosts.gather_bytes(to_bytes(played))))
    together = [Trajectory(e.task, e.group, e.id, **r, **t) for e, r, t in zip(episodes, rest, tokens, strict=True)]
    for i, own in zip(hosts.share(range(len(episodes))), played, strict=True):
        together[i] = own
    return together


def to_bytes(trajectories: Sequence[Trajectory]) -> bytes:
    """The tokens of trajectories, one after another, and their statistics, as the arrays of an .npz file."""

    def joined(name: str, dtype: type) -> np.ndarray:
        return np.fromiter(itertools.chain.from_iterable(getattr(t, name) for t in trajectories), dtype)

    turn = joined("turn", np.int32)
    run = np.flatnonzero(np.diff(turn, prepend=-2))  # where tokens of another turn begin
    np.savez(
        file := io.BytesIO(),
        length=np.array([len(t.tokens) for t in trajectories], np.int64),
        tokens=joined("tokens", np.int32),
        turn=turn[run],
        run_length=np.diff(run, append=len(turn)),
        log_prob=joined("log_prob", np.float32)[turn >= 0],
        entropy=joined("entropy", np.float32)[turn >= 0],
    )
    return file.getvalue()


def from_bytes(message: bytes) -> Iterator[dict[str, np.ndarray]]:
    """The fields of each trajectory in a message from `to_bytes`."""
    sent = np.load(io.BytesIO(message))
    turn = np.repeat(sent["turn"], sent["run_length"])
    fields = {"tokens": sent["tokens"], "turn": turn}
    for name in ("log_prob", "entropy"):
        fields[name] = np.zeros(len(turn), np.float32)
        fields[name][turn >= 0] = sent[name]
    for start, end in itertools.pairwise([0, *np.cumsum(sent["length"])]):
        yield {name: values[start:end] for name, values in fields.items()}
