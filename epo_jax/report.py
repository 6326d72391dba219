"""Makes one page of run folders to share: a single HTML file that needs no network.

    python -m epo_jax.report runs/first runs/second --out report.html
    python -m epo_jax.report grpo=runs/a grpo=runs/b epo=runs/c --out report.html     arms by name
    python -m epo_jax.report runs/sweep --out report.html                             every member of a sweep

Runs form an arm if their configs differ only in the seed and in settings that change no result (workers, folders, how often the
run saves): its curves are means with the range of its runs. A run with a name before it joins the arm of that name. A folder with
a sweep.json ({"members": [{"name": ..., "coefficients": {key: value}}, ...]}) stands for the runs in its members/. The command
also prints the page's table in Markdown.

This module computes the numbers; runs/page/ draws them.
"""

import argparse
import datetime
import functools
import json
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from epo_jax.command import ArgumentParser, check_output, run, write_output
from epo_jax.common.errors import UserError
from epo_jax.runs import versions
from epo_jax.runs.folder import RESUME_MAY_CHANGE
from epo_jax.runs.metrics import Row, at_another_temperature, plain, read_rows, wilson
from epo_jax.settings.config import flatten

PAGE = Path(__file__).parent / "runs" / "page"
IID, OOD = "valid_seen", "valid_unseen"

# What the page draws over RL steps: (key of metrics.jsonl, title, unit).
CURVES = (
    ("success", "Success of training episodes", "share won"),
    ("entropy", "Entropy of sampled tokens", "nats per token"),
    ("beta", "Phase weight β_k", ""),
    ("outside_corridor", "Tokens outside the corridor", "share"),
    ("reward", "Return of training episodes", "mean"),
    ("kl", "KL to the reference policy", "nats per token"),
    ("approx_kl", "KL to the policy before the update (k1 estimate)", "nats per token"),
    ("clip_fraction", "Clipped tokens", "share"),
)
_CORRIDOR = ("corridor_low", "corridor_high")

# Points of a curve, and columns of a heat map, at most; more steps are averaged in equal bins.
POINTS = 150
COLUMNS = 60
_BOOTSTRAP = 4000


class Run(NamedTuple):
    """What was read from a run folder; `config` is flat, and empty without a config.json; `arm` is the name given, if any."""

    name: str
    arm: str | None
    config: dict[str, Any]
    metrics: list[Row]
    evaluations: list[Row]
    episodes: list[Row]


class Arm(NamedTuple):
    """Runs that are taken as repetitions of each other."""

    name: str
    runs: list[Run]


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m epo_jax.report", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, sweep folder, or NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="the HTML file to write")
    parser.add_argument("--title", default="Training runs", help="heading of the page")
    parser.add_argument("--megabytes", type=float, default=4.0, help="most of episodes to read in the page; 4 if left out")
    options = parser.parse_args(argv[1:])
    out = options.out
    check_output(out, "report.html")
    runs = [run for text in options.runs for run in read_argument(text)]
    summary = summarize(runs, options.title, options.megabytes)
    page = render(summary)
    write_output(out, page)
    print(table(summary))
    print(f"wrote {out}: {len(runs)} runs, {len(page.encode()) / 1e6:.1f} MB")


# -------------------------------------------------------------------- reading


def read_argument(text: str) -> list[Run]:
    """The runs that one argument names.

    Raises:
      UserError: there is no such folder, or it holds no run, or its sweep.json cannot be read.
    """
    name, _, after = text.partition("=")
    arm, folder = (None, Path(text)) if Path(text).exists() or not after else (name, Path(after))
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder of a run or of a sweep.")
    if (folder / "sweep.json").exists():
        return [read_run(*member, arm) for member in _members(folder)]
    return [read_run(folder, folder.name or str(folder), {}, arm)]


def read_run(folder: Path, name: str, coefficients: dict[str, Any], arm: str | None) -> Run:
    """The run in `folder`; `coefficients` replace keys of its config."""
    metrics, evaluations = (plain(read_rows(folder / name)) for name in ("metrics.jsonl", "eval.jsonl"))
    if not metrics and not evaluations:
        raise UserError(f"{folder} has no metrics.jsonl or eval.jsonl with rows; name the folder of a run or of a sweep.")
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = versions.upgrade(flatten(content), content.get("version", 1))[0] | coefficients
    except FileNotFoundError:
        config = coefficients
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{folder / 'config.json'} cannot be read as the config of a run; restore it or take it away.") from None
    return Run(name, arm, config, metrics, evaluations, read_rows(folder / "trajectories.jsonl"))


def _members(sweep: Path) -> list[tuple[Path, str, dict[str, Any]]]:
    """(folder, name, coefficients) of each member that has begun."""
    path = sweep / "sweep.json"
    try:
        listed = [(str(m["name"]), dict(m["coefficients"])) for m in json.loads(path.read_text(encoding="utf-8"))["members"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not list members with name and coefficients; restore it or name single runs.") from None
    found = [(sweep / "members" / name, name, values) for name, values in listed]
    found = [member for member in found if any((member[0] / f).exists() for f in ("metrics.jsonl", "eval.jsonl"))]
    if not found:
        raise UserError(f"{sweep} holds no run of its members yet; wait for their first step or name single runs.")
    return found


# -------------------------------------------------------------------- arms


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Runs in arms: those given one name, and those whose configs tell them apart by the seed alone."""
    groups: dict[Any, list[Run]] = {}
    for i, each in enumerate(runs):
        key = each.arm or (json.dumps(settings(each), sort_keys=True) if each.config else i)
        groups.setdefault(key, []).append(each)
    members = list(groups.values())
    differing = differing_keys(runs)
    names = [arm_name(group, differing) for group in members]
    # Where the names do not tell arms apart, folders do.
    told = [f"{name} ({group[0].name})" if names.count(name) > 1 else name for name, group in zip(names, members, strict=True)]
    return [Arm(name, group) for name, group in zip(told, members, strict=True)]


def settings(each: Run) -> dict[str, Any]:
    """What decides a run's result, but for the seed."""
    return {key: value for key, value in each.config.items() if key != "seed" and key not in RESUME_MAY_CHANGE}


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The settings that all runs have and that are not the same in all."""
    configs = [settings(each) for each in runs if each.config]
    shared = set.intersection(*map(set, configs)) if configs else set()
    return sorted(key for key in shared if len({json.dumps(config[key]) for config in configs}) > 1)


def arm_name(group: list[Run], differing: list[str]) -> str:
    first = group[0]
    if first.arm:
        return first.arm
    if first.config and 0 < len(differing) <= 3:
        told = {key: "" if key == "algo.name" else f"{key.rpartition('.')[2]} " for key in differing}
        return ", ".join(f"{name}{first.config[key]}" for key, name in told.items())
    return first.name if len(group) == 1 else f"{first.name} and {len(group) - 1} more"


# -------------------------------------------------------------------- numbers


def summarize(runs: Sequence[Run], title: str, megabytes: float) -> dict[str, Any]:
    """All that the page shows, in JSON's own types."""
    arms = arms_of(runs)
    results = [result(arm) for arm in arms]
    order = sorted(range(len(arms)), key=lambda i: -(results[i][OOD]["mean"] if results[i][OOD] else -1))
    arms, results = [arms[i] for i in order], [results[i] for i in order]
    differing = differing_keys(runs)
    told = []
    for arm, numbers in zip(arms, results, strict=True):
        config = arm.runs[0].config
        told.append(
            {
                "name": arm.name,
                "runs": [{"name": each.name, "seed": each.config.get("seed")} for each in arm.runs],
                "settings": {key: config.get(key) for key in differing},
                "result": numbers,
                "success": {split: success_curve(arm, split) for split in (OOD, IID)},
                "curves": {key: curve(arm, key) for key in (*(key for key, *_ in CURVES), *_CORRIDOR)},
                "turns": turn_entropy(arm),
            }
        )
    number = {id(each): (i, each.name) for i, arm in enumerate(arms) for each in arm.runs}
    episodes, stored = choose_episodes(runs, megabytes, lambda each: number[id(each)])
    return plain(
        {
            "title": title,
            "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "curves": CURVES,
            "arms": told,
            "differing": differing,
            "lacking": lacking(runs),
            "episodes": episodes,
            "stored": stored,
        }
    )


def result(arm: Arm) -> dict[str, Any]:
    """The arm's row of the table. Success is that of each run's last evaluation."""
    last = [max((row["step"] for row in (*each.metrics, *each.evaluations)), default=0) for each in arm.runs]
    half = [_later_half(each) for each in arm.runs]
    half = [values for values in half if values]
    return {
        OOD: final_success(arm, OOD),
        IID: final_success(arm, IID),
        "steps": [min(last), max(last)],
        "entropy": fmean(map(fmean, half)) if half else None,
        "entropy_variance": fmean(np.var(values) for values in half) if half else None,
        "steps_to_70": [steps_to(each, 0.7) for each in arm.runs],
    }


def final_success(arm: Arm, split: str) -> dict[str, Any] | None:
    """Mean success of the runs' last evaluations of `split`, with its 95 % interval; None where there is none."""
    last = [max(rows, key=lambda row: row["step"]) for each in arm.runs if (rows := _evaluated(each, split))]
    if not last:
        return None
    counts = [(row["won"], row["episodes"]) for row in last]
    low, high = interval(counts)
    types: dict[str, list[int]] = {}
    for row in last:
        for kind, (won, episodes) in row.get("types", {}).items():
            total = types.setdefault(kind, [0, 0])
            total[0] += won
            total[1] += episodes
    mean = fmean(won / max(1, episodes) for won, episodes in counts)
    return {"mean": mean, "low": low, "high": high, "step": max(row["step"] for row in last), "counts": counts, "types": types}


def interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95 % interval of the mean success of runs that won `won` of `episodes` each: Wilson's for one run; for several the
    percentiles of a bootstrap that draws runs, and then episodes within each. Few runs make it too narrow."""
    if len(counts) == 1:
        return wilson(*counts[0])
    rng = np.random.default_rng(0)
    won, episodes = np.array(counts).T
    drawn = rng.integers(len(counts), size=(_BOOTSTRAP, len(counts)))
    means = (rng.binomial(episodes[drawn], (won / episodes)[drawn]) / episodes[drawn]).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def steps_to(each: Run, share: float, window: int = 10) -> int | None:
    """RL steps until training success, as the mean of the last `window` steps, reached `share`; None if it never did."""
    success = [row["success"] for row in each.metrics if row.get("success") is not None]
    ends = range(window, len(success) + 1)
    return next((end for end in ends if fmean(success[end - window : end]) >= share), None)


def success_curve(arm: Arm, split: str) -> dict[str, list] | None:
    """Success at each evaluated step: mean over runs, with the lowest and the highest run; of a single run, with its Wilson
    interval."""
    found: dict[int, list[tuple[int, int]]] = {}
    for each in arm.runs:
        for row in _evaluated(each, split):
            found.setdefault(row["step"], []).append((row["won"], row["episodes"]))
    points = []
    for step, counts in sorted(found.items()):
        rates = [won / max(1, episodes) for won, episodes in counts]
        low, high = wilson(*counts[0]) if len(arm.runs) == 1 else (min(rates), max(rates))
        points.append((step, fmean(rates), low, high))
    return _columns(points)


def curve(arm: Arm, key: str) -> dict[str, list] | None:
    """A metric over RL steps: mean over runs, and the lowest and the highest run where there are several. Steps are averaged in
    bins where there are more than `POINTS`. None where no run has it."""
    width = _bin_width(arm, POINTS)
    found: dict[int, list[float]] = {}
    for each in arm.runs:
        for place, value in _binned(each.metrics, width, lambda row: row.get(key)).items():
            found.setdefault(place, []).append(value)
    middle = (width - 1) / 2
    columns = _columns([(width * b + middle, fmean(v), min(v), max(v)) for b, v in sorted(found.items())])
    # With one run both edges are the line itself, and most of a page of a hundred runs.
    return columns and (columns if len(arm.runs) > 1 else {"x": columns["x"], "y": columns["y"]})


def turn_entropy(arm: Arm) -> dict[str, Any] | None:
    """Entropy by turn index: `entropy`[column][turn], nats, mean over runs of `width` RL steps from `first` on; None where
    no run has it. Rows of metrics.jsonl hold it as entropy_turn_0, entropy_turn_1, ..."""
    width = _bin_width(arm, COLUMNS)
    keys = {key for each in arm.runs for row in each.metrics for key in row if key.startswith("entropy_turn_")}
    turns = sorted(int(key.rpartition("_")[2]) for key in keys if key.rpartition("_")[2].isdigit())
    cells = [
        [_binned(each.metrics, width, operator.methodcaller("get", f"entropy_turn_{turn}")) for each in arm.runs]
        for turn in turns
    ]
    places = sorted({place for row in cells for binned in row for place in binned})
    if not places:
        return None
    columns = [
        [_mean([binned[place] for binned in row if place in binned]) for row in cells]
        for place in range(places[0], places[-1] + 1)
    ]
    return {"first": width * places[0], "width": width, "turns": turns, "entropy": columns}


def _binned(rows: Iterable[Row], width: int, read: Callable[[Row], float | None]) -> dict[int, float]:
    """Mean of what `read` finds in each bin of `width` steps."""
    found: dict[int, list[float]] = {}
    for row in rows:
        value = read(row)
        if value is not None:
            found.setdefault(row["step"] // width, []).append(value)
    return {place: fmean(values) for place, values in found.items()}


def _bin_width(arm: Arm, most: int) -> int:
    last = max((row["step"] for each in arm.runs for row in each.metrics), default=0)
    return -(-(last + 1) // most)


def _columns(points: list[tuple]) -> dict[str, list] | None:
    """{"x": ..., "y": ..., "low": ..., "high": ...} with five digits, which is more than a screen shows."""
    if not points:
        return None
    named = zip(("x", "y", "low", "high"), zip(*points, strict=True), strict=True)
    return {name: [_short(value) for value in column] for name, column in named}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _mean(values: list[float]) -> float | None:
    return _short(fmean(values)) if values else None


def _evaluated(each: Run, split: str) -> list[Row]:
    return [row for row in each.evaluations if row.get("split") == split and not at_another_temperature(row)]


def _later_half(each: Run) -> list[float]:
    values = [row["entropy"] for row in each.metrics if row.get("entropy") is not None]
    return values[len(values) // 2 :]


# -------------------------------------------------------------------- episodes, and what is not there


def choose_episodes(runs: Sequence[Run], megabytes: float, place: Callable[[Run], tuple[int, str]]) -> tuple[list[Row], int]:
    """The episodes that go into the page, and how many there are: of every run in turn the next of its newest step, then of
    its first, then of the others, until `megabytes` are full."""
    queues = []
    for each in runs:
        steps = sorted({row["step"] for row in each.episodes}, reverse=True)
        rank = {step: i for i, step in enumerate([*steps[:1], *steps[-1:], *steps[1:-1]])}
        queues.append(sorted(each.episodes, key=lambda row: rank[row["step"]]))
    chosen, room = [], 1e6 * megabytes
    for nth in range(max(map(len, queues), default=0)):
        for each, queue in zip(runs, queues, strict=True):
            if nth < len(queue) and (size := len(json.dumps(queue[nth]))) <= room:
                room -= size
                arm, name = place(each)
                chosen.append({**queue[nth], "arm": arm, "run": name})
    return chosen, sum(map(len, queues))


def _measured(key: str, each: Run) -> bool:
    return any(row.get(key) is not None for row in each.metrics)


def lacking(runs: Sequence[Run]) -> list[str]:
    """A sentence for each thing that some runs lack."""
    has: dict[str, Callable[[Run], bool]] = {
        "a config (config.json), so each is an arm of its own": lambda each: bool(each.config),
        f"evaluations of {OOD} (eval.jsonl)": lambda each: bool(_evaluated(each, OOD)),
        f"evaluations of {IID} (eval.jsonl)": lambda each: bool(_evaluated(each, IID)),
        "the corridor": functools.partial(_measured, "corridor_high"),
        "entropy by turn index": lambda each: any("entropy_turn_0" in row for row in each.metrics),
        "episodes to read (trajectories.jsonl)": lambda each: bool(each.episodes),
    }
    for key, *_ in CURVES:
        has[f"the metric {key}"] = functools.partial(_measured, key)
    told = []
    for what, holds in has.items():
        without = [each.name for each in runs if not holds(each)]
        if len(without) == len(runs):
            told.append(f"No run has {what}.")
        elif without:
            more = f" and {len(without) - 8} more" if len(without) > 8 else ""
            told.append(f"{', '.join(without[:8])}{more}: without {what}.")
    return told


# -------------------------------------------------------------------- the page


def table(summary: dict[str, Any]) -> str:
    """The page's table in Markdown: success in %, of all runs with its 95 % interval and of each; entropy in nats per token."""

    def success(found) -> str:
        if not found:
            return "–"
        each = ", ".join(f"{100 * won / max(1, episodes):.0f}" for won, episodes in found["counts"])
        return f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}] ({each})"

    head = "| arm | OOD success | IID success | entropy, later half | its variance | RL steps to 70 % |"
    lines = [head, "| --- " * (head.count("|") - 1) + "|"]
    for arm in summary["arms"]:
        found = arm["result"]
        entropy = (f"{value:.3g}" if value is not None else "–" for value in (found["entropy"], found["entropy_variance"]))
        steps = ", ".join("never" if steps is None else str(steps) for steps in found["steps_to_70"])
        lines.append("| " + " | ".join((arm["name"], success(found[OOD]), success(found[IID]), *entropy, steps)) + " |")
    return "\n".join(lines)


def render(summary: dict[str, Any]) -> str:
    """The page as one text. What runs wrote reaches it as JSON, in which no "<" is left to end the element that holds it;
    the page puts it on the screen as text, never as markup."""
    text = (PAGE / "report.html").read_text(encoding="utf-8")
    data = json.dumps(summary, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    for name, content in (
        ("report.css", (PAGE / "report.css").read_text(encoding="utf-8")),
        ("charts.js", (PAGE / "charts.js").read_text(encoding="utf-8")),
        ("report.js", (PAGE / "report.js").read_text(encoding="utf-8")),
        ("data", data),
    ):
        before, after = text.split(f"{{{{ {name} }}}}")
        text = before + content + after
    return text


if __name__ == "__main__":
    sys.exit(run(main))
