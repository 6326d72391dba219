"""The records of a run: metrics.jsonl, eval.jsonl, TensorBoard events, and the lines of the console.

One row of metrics.jsonl per RL step, one row of eval.jsonl per evaluated split. Fields that the console and the figures
read (a row may hold more):

    metrics  step, success, reward, entropy (nats), corridor_low, corridor_high (nats, None before there is a history),
             tokens_per_second (sampled), rollout_seconds, update_seconds
    eval     step (RL steps taken so far), split, temperature (only if not config.eval.temperature), won, episodes, success, low,
             high (Wilson interval), types ({task type: [won, episodes]})

docs/metrics.md has every field.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any, NamedTuple

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from epo_jax.common.files import append, write_atomically
from epo_jax.common.progress import clock
from epo_jax.runs import wandb_log

Row = dict[str, Any]


class MetricWriter:
    """Writes the rows of the run in `workdir`, from RL step `step` on.

    Rows of a killed run past the checkpoint that it resumes from will be written again: metrics of `step` and later,
    evaluations after `step`. So each step has one row however often the run was killed. The old ones move to
    metrics.superseded.jsonl and eval.superseded.jsonl.

    With a `wandb_run` (`wandb_log.begin`) the numbers go there as well; it ends with the writer.
    """

    def __init__(self, workdir: Path, step: int = 0, wandb_run=None):
        workdir = Path(workdir)
        self._metrics = workdir / "metrics.jsonl"
        self._evaluations = workdir / "eval.jsonl"
        for path, last in ((self._metrics, step - 1), (self._evaluations, step)):
            superseded = [row for row in read_rows(path) if row["step"] > last]
            if superseded:
                with open(path.with_suffix(".superseded.jsonl"), "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in superseded)
            keep_rows(path, _no_later_than(last))
        (workdir / "tensorboard").mkdir(exist_ok=True)
        # Without a thread of its own, as in `SummaryWriter`, which a full disk would end without a word.
        self._tensorboard = EventsWriter(str(workdir / "tensorboard" / "events"))
        if step:  # what was written of this and later steps is void
            start = SessionLog(status=SessionLog.START)
            self._tensorboard.write_event(Event(wall_time=time.time(), step=step, session_log=start))
        self._wandb = wandb_run
        if wandb_run is not None:
            write_atomically(workdir / wandb_log.ID, f"{wandb_run.id}\n")

    def train(self, row: Mapping[str, Any]) -> Row:
        """Adds the row of an RL step; returns it as written (plain numbers, None where not finite)."""
        row = plain(row)
        # On disk before the step's checkpoint. A kill leaves the whole line, or a torn last one that `read_rows` skips.
        append(self._metrics, json.dumps(row) + "\n")
        self._scalars("train", row, row["step"])
        return row

    def evaluation(self, row: Mapping[str, Any]) -> Row:
        """Adds the row of an evaluated split; replaces that of the same step, split and temperature, if there is one."""
        row = plain(row)
        about = "step", "split", "temperature"
        keep_rows(self._evaluations, lambda other: any(other.get(key) != row.get(key) for key in about))
        rows = [*read_rows(self._evaluations), row]
        write_atomically(self._evaluations, "".join(json.dumps(each) + "\n" for each in rows))
        further = f"/temperature_{row['temperature']:g}" if at_another_temperature(row) else ""
        self._scalars(f"eval/{row['split']}{further}", row, row["step"])
        return row

    def close(self) -> None:
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _scalars(self, prefix: str, row: Row, step: int) -> None:
        numbers = {k: value for k, value in row.items() if isinstance(value, int | float)}
        scalars = {f"{prefix}/{k}": value for k, value in numbers.items() if k not in ("step", "temperature")}
        for name, value in scalars.items():
            self._tensorboard.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **scalars})


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


def steps_taken(metrics: Iterable[Row], evaluations: Iterable[Row]) -> int:
    """RL steps of a run: a row of metrics.jsonl is numbered by the steps before it, one of eval.jsonl by all steps."""
    return max((*(row["step"] + 1 for row in metrics), *(row["step"] for row in evaluations)), default=0)


def _no_later_than(last: int) -> Callable[[Row], bool]:
    return lambda row: row["step"] <= last


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


def wilson(won: float, episodes: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a success rate; z = 1.96 covers 95 %. (0, 1) for no episodes."""
    if episodes == 0:
        return 0.0, 1.0
    rate = won / episodes
    scale = 1 + z * z / episodes
    center = (rate + z * z / (2 * episodes)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes * episodes))
    # At no success and at full success one bound is exactly 0 or 1, which rounding would miss.
    return (0.0 if won == 0 else center - half), (1.0 if won == episodes else center + half)


def interval_of_plays(won: Sequence[int], plays: int) -> tuple[float, float]:
    """Wilson's interval of the success of games that were each won `won` times of `plays`.

    Plays of one game resemble each other: they count as the number of independent episodes whose success would vary as much as
    the games' does (Kish's effective sample size), which is at least the number of games.
    """
    games, episodes = len(won), len(won) * plays
    if plays == 1 or games == 0:
        return wilson(sum(won), episodes)
    rate = sum(won) / episodes
    spread = variance([w / plays for w in won]) / games if games > 1 else 0.0
    effective = rate * (1 - rate) / spread if spread else games
    effective = min(max(effective, games), episodes)
    return wilson(rate * effective, effective)


def pass_at_k(plays: int, won: int, k: int) -> float:
    """Probability that at least one of `k` plays is won, estimated without bias from `won` of `plays` (arXiv 2107.03374,
    eq. 1): 1 - C(plays - won, k) / C(plays, k)."""
    return 1.0 - math.comb(plays - won, k) / math.comb(plays, k)


class Outcome(NamedTuple):
    """What came of one episode.

    Attributes:
        kind, game: type and id of its task.
        won: the task was completed.
        score: task progress in [0, 100].
        turns: turns played; `invalid` of them held no action.
        won_reference: won by the rule of the reference implementation; None where that is `won`.
    """

    kind: str
    game: str
    won: bool
    score: float
    turns: int
    invalid: int
    won_reference: bool | None = None


def evaluation_row(step: int | None, split: str, outcomes: Iterable[Outcome]) -> Row:
    """The eval.jsonl row of a split whose games were all played the same number of times."""
    outcomes = list(outcomes)
    kinds = sorted({outcome.kind for outcome in outcomes})
    by_type = {kind: _scores([outcome for outcome in outcomes if outcome.kind == kind]) for kind in kinds}
    types = {kind: [scores["won"], scores["episodes"]] for kind, scores in by_type.items()}
    return {"step": step, "split": split, **_scores(outcomes), "types": types, "by_type": by_type}


def _scores(outcomes: Sequence[Outcome]) -> Row:
    won: dict[str, int] = {}
    for outcome in outcomes:
        won[outcome.game] = won.get(outcome.game, 0) + bool(outcome.won)
    episodes, turns = len(outcomes), sum(outcome.turns for outcome in outcomes)
    plays = episodes // max(len(won), 1)
    low, high = interval_of_plays(list(won.values()), plays)
    row: Row = {
        "success": sum(won.values()) / max(episodes, 1),
        "low": low,
        "high": high,
        "won": sum(won.values()),
        "episodes": episodes,
        "score": sum(outcome.score for outcome in outcomes) / max(episodes, 1),
        "turns": turns / max(episodes, 1),
        "invalid_actions": sum(outcome.invalid for outcome in outcomes) / max(turns, 1),
    }
    if any(outcome.won_reference is not None for outcome in outcomes):
        row["won_reference"] = sum(bool(outcome.won_reference) for outcome in outcomes)
    if plays > 1:
        ks = sorted({2**i for i in range(plays.bit_length())} | {plays})
        row["pass_at"] = {k: fmean(pass_at_k(plays, each, k) for each in won.values()) for k in ks}
    return row


def at_another_temperature(row: Mapping[str, Any]) -> bool:
    """Whether an evaluation was not at config.eval.temperature; rows of those that were have no temperature."""
    return row.get("temperature") is not None


def evaluated(row: Mapping[str, Any]) -> str:
    """What was evaluated, in words."""
    return f"{row['split']} at temperature {row['temperature']:g}" if at_another_temperature(row) else row["split"]


def gains(evaluations: Sequence[Row]) -> list[str]:
    """A line for each split: success, with its interval, at the first and at the last evaluation of a run."""
    lines, rows = [], [row for row in evaluations if not at_another_temperature(row)]
    for split in dict.fromkeys(row["split"] for row in rows):
        mine = [row for row in rows if row["split"] == split]
        ends = [mine[0], mine[-1]] if len(mine) > 1 else mine
        parts = [
            f"{100 * row['success']:.0f} % [{100 * row['low']:.0f}, {100 * row['high']:.0f}] after {row['step']} RL steps"
            for row in ends
        ]
        lines.append(f"success on {split}: {', '.join(parts)} ({mine[-1]['episodes']} episodes)")
    return lines


def evaluation_table(row: Mapping[str, Any]) -> str:
    """An evaluation as a table, per task type and in all: success with its 95 % interval, what else was counted, pass@k."""
    counted = [*row["by_type"].items(), ("all", row)]
    width = max(len(name) for name, _ in counted)
    lines = [evaluated(row) if row["step"] is None else f"{evaluated(row)} after {row['step']} RL steps"]
    for name, scores in counted:
        passed = "".join(f"  pass@{k} {_percent(share)}" for k, share in scores.get("pass_at", {}).items())
        reference = f"  won by the reference rule {scores['won_reference']}" if "won_reference" in scores else ""
        lines.append(
            f"  {name:<{width}}  {scores['won']:>4}/{scores['episodes']:<4} {_percent(scores['success']):>6}"
            f"  [{_percent(scores['low'])}, {_percent(scores['high'])}]  score {scores['score']:.1f}"
            f"  turns {scores['turns']:.1f}  invalid {_percent(scores['invalid_actions'])}{reference}{passed}"
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


def members_line(rows: Sequence[Row], steps: int, seconds_left: float) -> str:
    """The console line of an RL step of a sweep: means over the members, and the range of their success."""
    mean = {name: fmean([row[name] for row in rows if row[name] is not None] or [math.nan]) for name in ("success", "entropy")}
    low, high = (pick(row["success"] for row in rows) for pick in (min, max))
    return (
        f"step {rows[0]['step'] + 1:>{len(str(steps))}}/{steps}  {len(rows)} members"
        f"  success {mean['success']:6.1%} [{low:.0%}, {high:.0%}]"
        f"  entropy {mean['entropy']:5.3f}"
        f"  {sum(row['tokens_per_second'] for row in rows):6.0f} tok/s"
        f"  rollout {rows[0]['rollout_seconds']:5.1f}s  update {rows[0]['update_seconds']:5.1f}s"
        f"  left {clock(seconds_left)}"
    )


def members_table(names: Sequence[str], rows: Sequence[Row]) -> str:
    """An evaluation of a sweep's members on one split: a line for each, success with its 95 % interval."""
    width = max(map(len, names))
    return "\n".join(
        f"  {name:<{width}}  {evaluated(row):<12} after {row['step']} steps  {row['won']:>4}/{row['episodes']:<4}"
        f" {row['success']:6.1%}  [{row['low']:.1%}, {row['high']:.1%}]"
        for name, row in zip(names, rows, strict=True)
    )


def seconds_left(durations: Sequence[float], steps_left: int) -> float:
    """Time to the end from the seconds of past steps: the median of the last ten.

    The first step compiles, and does not count; without another, the time is unknown.
    """
    return median(durations[1:][-10:]) * steps_left if len(durations) > 1 else math.nan


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None, width: int, digits: int) -> str:
    """Right-aligned; a missing (not finite) number is a dash rather than a failure of the console."""
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
