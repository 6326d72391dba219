"""What a run says about itself: metrics.jsonl, eval.jsonl, TensorBoard events, and the lines a person follows.

One row of metrics.jsonl per RL step, one row of eval.jsonl per evaluated split. Fields that the console and the figures
read (a row may hold more):

    metrics  step, success, reward, entropy (nats), corridor_low, corridor_high (nats, None before there is a history),
             tokens_per_second (sampled), rollout_seconds, update_seconds
    eval     step (RL steps taken so far), split, won, episodes, success, low, high (Wilson interval), types
             ({task type: [won, episodes]})
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tensorboardX import SummaryWriter

from epo_jax.files import write_atomically

Row = dict[str, Any]


class MetricWriter:
    """Writes the rows of the run in `workdir`, from RL step `step` on.

    Rows of a killed run that lie beyond the checkpoint it resumes from are dropped, as they will be written again:
    metrics of `step` and later, evaluations after `step`. So each step has one row however often the run was killed.
    """

    def __init__(self, workdir: Path, step: int = 0):
        workdir = Path(workdir)
        self._metrics = workdir / "metrics.jsonl"
        self._evaluations = workdir / "eval.jsonl"
        keep_rows(self._metrics, lambda row: row["step"] < step)
        keep_rows(self._evaluations, lambda row: row["step"] <= step)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step if step else None)

    def train(self, row: Mapping[str, Any]) -> Row:
        """Adds the row of an RL step; returns it as written (plain numbers, None where not finite)."""
        row = plain(row)
        # One unbuffered write of one line: a kill leaves the whole line, or a torn last line that `read_rows` skips.
        with open(self._metrics, "ab", buffering=0) as file:
            file.write((json.dumps(row) + "\n").encode())
            os.fsync(file.fileno())  # a checkpoint that outlives the machine must not outlive its rows
        self._scalars("train", row, row["step"])
        return row

    def evaluation(self, row: Mapping[str, Any]) -> Row:
        """Adds the row of an evaluated split; replaces the row of the same step and split, if there is one."""
        row = plain(row)
        keep_rows(self._evaluations, lambda other: (other["step"], other["split"]) != (row["step"], row["split"]))
        rows = [*read_rows(self._evaluations), row]
        write_atomically(self._evaluations, "".join(json.dumps(each) + "\n" for each in rows))
        self._scalars(f"eval/{row['split']}", row, row["step"])
        return row

    def close(self) -> None:
        self._tensorboard.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _scalars(self, prefix: str, row: Row, step: int) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)
        self._tensorboard.flush()


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl file; [] when there is none. A torn line (the writer was killed) is skipped."""
    if not Path(path).exists():
        return []
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def keep_rows(path: Path, wanted: Callable[[Row], bool]) -> None:
    """Drops the rows of a .jsonl file that are not `wanted`, if there is one."""
    if path.exists():
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if wanted(row)))


def plain(value: Any) -> Any:
    """JSON's own types: array scalars become numbers, non-finite numbers None, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def wilson(won: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a success rate; z = 1.96 covers 95 %. (0, 1) for no episodes."""
    if episodes == 0:
        return 0.0, 1.0
    rate = won / episodes
    scale = 1 + z * z / episodes
    centre = (rate + z * z / (2 * episodes)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes * episodes))
    # At no success and at full success one bound is exactly 0 or 1, which rounding would miss.
    return (0.0 if won == 0 else centre - half), (1.0 if won == episodes else centre + half)


def evaluation_row(step: int, split: str, outcomes: Iterable[tuple[str, bool]]) -> Row:
    """The eval.jsonl row of a split from (task type, won) of each of its episodes."""
    types: dict[str, list[int]] = {}
    for kind, success in outcomes:
        counts = types.setdefault(kind, [0, 0])
        counts[0] += bool(success)
        counts[1] += 1
    won = sum(counts[0] for counts in types.values())
    episodes = sum(counts[1] for counts in types.values())
    low, high = wilson(won, episodes)
    return {
        "step": step,
        "split": split,
        "success": won / max(episodes, 1),
        "low": low,
        "high": high,
        "won": won,
        "episodes": episodes,
        "types": dict(sorted(types.items())),
    }


def evaluation_table(row: Mapping[str, Any]) -> str:
    """An evaluation as a table: success with its 95 % interval, per task type and in all."""
    counted = [*row["types"].items(), ("all", [row["won"], row["episodes"]])]
    width = max(len(name) for name, _ in counted)
    lines = [f"{row['split']} after {row['step']} RL steps"]
    for name, (won, episodes) in counted:
        low, high = wilson(won, episodes)
        lines.append(
            f"  {name:<{width}}  {won:>4}/{episodes:<4} {_percent(won / max(episodes, 1)):>6}"
            f"  [{_percent(low)}, {_percent(high)}]"
        )
    return "\n".join(lines)


def progress_line(row: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """The console line of an RL step (numbered from 1 for people, from 0 in the files)."""
    low, high = row.get("corridor_low"), row.get("corridor_high")
    corridor = "[  -  ,   -  ]" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"
    return (
        f"step {row['step'] + 1:>{len(str(steps))}}/{steps}"
        f"  success {_percent(row['success']):>6}"
        f"  reward {_number(row['reward'], 6, 2)}"
        f"  entropy {_number(row['entropy'], 5, 3)} {corridor}"
        f"  {_number(row['tokens_per_second'], 6, 0)} tok/s"
        f"  rollout {_number(row['rollout_seconds'], 5, 1)}s"
        f"  update {_number(row['update_seconds'], 5, 1)}s"
        f"  left {clock(seconds_left)}"
    )


def seconds_left(durations: Sequence[float], steps_left: int) -> float:
    """Time to the end from the seconds of past steps: the median of the last ten, so that a compile does not count."""
    return median(durations[-10:]) * steps_left if durations else math.nan


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None, width: int, digits: int) -> str:
    """Right-aligned; a missing (not finite) number is a dash rather than a failure of the console."""
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
