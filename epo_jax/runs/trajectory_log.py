"""Episodes that a run keeps for people to read: trajectories.jsonl, a sample of bounded size.

One row per episode:

    step      RL steps that its policy had taken
    split     "train", or the split that was evaluated
    task      the task's id; `type`, its type; `goal`, the task in words
    won, score (0 to 100), truncated, as in `Trajectory`
    turns     of each turn: observation (before it), tokens (pieces of the answer's text; joined they are the answer),
              entropy (nats, of the distribution that each was sampled from), action (as it was read), valid, reward
    end       what was seen last
"""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from epo_jax.common.files import append, write_atomically
from epo_jax.models.tokenizer import ChatTokenizer
from epo_jax.parallel import hosts
from epo_jax.rollout.trajectory import Trajectory
from epo_jax.runs.metrics import Row, keep_rows, plain

# Bytes of the longest character in UTF-8: a piece that is still broken after as many tokens stays so.
_CHARACTER = 4


class TrajectoryLog:
    """Writes the sample of the run in `workdir`, from RL step `step` on.

    On several hosts, each makes the rows of the episodes that it played, and the first one writes all.

    Rows past the checkpoint that a killed run resumes from are dropped, as in `MetricWriter`. A file that
    outgrows its bound loses whole steps from its middle, so that what is left is spread over the run. (Of a run that was killed
    after that, other steps than of one left alone.)

    Args:
        episodes: most episodes written of those given at once; 0 writes none.
        megabytes: bound on the file.
    """

    def __init__(self, workdir: Path, step: int, tokenizer: ChatTokenizer, episodes: int, megabytes: float):
        self._path = Path(workdir) / "trajectories.jsonl"
        self._tokenizer, self._episodes, self._bytes = tokenizer, episodes, int(1e6 * megabytes)
        # Episodes of step k are sampled before its update, evaluations of step k come after k updates.
        # A run that starts from step 0 evaluates that policy again.
        if hosts.is_first():
            keep_rows(self._path, lambda row: 0 < step and row["step"] < step + (row.get("split") != "train"))

    def write(self, step: int, split: str, trajectories: Sequence[Trajectory]) -> None:
        """Adds a sample of `trajectories`, as many of each task type as of the others.

        All processes must call this together.
        """
        chosen = [trajectories[i] for i in spread([t.task["type"] for t in trajectories], self._episodes)]
        own = [episode_row(step, split, t, self._tokenizer) for t in chosen if t.observations]
        rows = list(itertools.chain.from_iterable(hosts.gather(own)))  # in the order of `trajectories`, as shares are
        if not rows or not hosts.is_first():
            return
        append(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        if self._path.stat().st_size > self._bytes:
            # To half the bound, so that the next sample does not need it again.
            write_atomically(self._path, "".join(thin(self._path.read_text().splitlines(keepends=True), self._bytes // 2)))


def episode_row(step: int, split: str, trajectory: Trajectory, tokenizer: ChatTokenizer) -> Row:
    """The row of one episode."""
    t = trajectory
    said: list[tuple[list[int], list[float]]] = [([], []) for _ in t.actions]
    for token, turn, entropy in zip(t.tokens, t.turn, t.entropy, strict=True):
        if turn >= 0:
            said[turn][0].append(token)
            said[turn][1].append(round(entropy, 4))
    turns = [
        {
            "observation": t.observations[u],
            "tokens": pieces(ids, tokenizer),
            "entropy": entropies,
            "action": t.actions[u],
            "valid": t.valid[u],
            "reward": t.rewards[u] if u < len(t.rewards) else 0.0,
        }
        for u, (ids, entropies) in enumerate(said)
    ]
    about = {"task": str(t.task["id"]), "type": str(t.task["type"]), "goal": t.goal}
    outcome = {"won": t.won, "score": t.score, "truncated": t.truncated}
    end = t.observations[-1] if t.observations else ""
    return plain({"step": step, "split": split, **about, **outcome, "turns": turns, "end": end})


def pieces(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[str]:
    """The text that each token of an answer brings, special ones by their names, those the tokenizer lacks by their numbers.

    Where several tokens make one character, the last brings it and the others "".
    """
    texts, pending = [], []
    for token in ids:
        pending.append(token)
        special = "" if tokenizer.decode([token]) else tokenizer.backend.id_to_token(token) or f"<|{token}|>"
        text = tokenizer.decode(pending) + special
        if text.endswith("\ufffd") and len(pending) < _CHARACTER and len(texts) + 1 < len(ids):
            texts.append("")
        else:
            texts.append(text)
            pending = []
    return texts


def spread(types: Sequence[str], count: int) -> list[int]:
    """Indices of `count` items (of all where there are fewer): the first of each type, then the second, and so on."""
    seen: Counter[str] = Counter()
    rounds = []
    for i, kind in enumerate(types):
        rounds.append((seen[kind], i))
        seen[kind] += 1
    return sorted(i for _, i in sorted(rounds)[:count])


def thin(lines: list[str], most: int) -> list[str]:
    """Leaves at most `most` bytes of the rows `lines`: drops the step whose loss leaves the smallest gap, again and again;
    of the first and the last step, which stay, rows from the end on."""
    steps: dict[int, list[str]] = {}
    for line in lines:
        steps.setdefault(json.loads(line)["step"], []).append(line)
    sizes = {step: sum(len(line.encode()) for line in rows) for step, rows in steps.items()}
    kept = sorted(steps)
    while len(kept) > 2 and sum(sizes[step] for step in kept) > most:
        del kept[min(range(1, len(kept) - 1), key=lambda i: kept[i + 1] - kept[i - 1])]
    left = [line for step in kept for line in steps[step]]
    size = sum(len(line.encode()) for line in left)
    while size > most:
        size -= len(left.pop().encode())
    return left
