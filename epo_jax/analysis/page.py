"""The report's page: all that it shows as one JSON object, and the HTML file around it, which html/ draws."""

import datetime
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from epo_jax.analysis import curves, results, subject
from epo_jax.analysis.arms import arms_of, differing_keys, reference_arm, settings
from epo_jax.analysis.columns import columns_of
from epo_jax.analysis.measures import MEASURES
from epo_jax.analysis.read import IID, OOD, Run
from epo_jax.runs.metrics import Row, plain

HTML = Path(__file__).parent / "html"

# The measures whose relation to success the page shows.
SCATTERED = ("change_std", "roughness", "highest_ratio")


def summarize(
    runs: Sequence[Run],
    title: str,
    megabytes: float = 4.0,
    from_step: int | None = None,
    reference: str | None = None,
    left_out: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """All that the page shows, in JSON's own types.

    Args:
        runs: at least one.
        title: heading of the page.
        megabytes: at most so much of episodes to read.
        from_step: Succ is the mean of the evaluations after so many RL steps; None: the last one.
        reference: the arm that the others are compared with; None: the first.
        left_out: (folder, reason) of what could not be read.

    Raises:
        UserError: no arm is called `reference`.
    """
    arms = arms_of(runs)
    base = reference_arm(arms, reference)
    columns = columns_of(runs)
    final = {arm.name: {column.key: results.success(arm, column, from_step) for column in columns} for arm in arms}
    if columns:
        first = columns[0].key
        arms = sorted(arms, key=lambda arm: -(final[arm.name][first]["mean"] if final[arm.name][first] else -1.0))
    differing = differing_keys([settings(each) for each in runs if each.config])
    described = [
        {
            "name": arm.name,
            "runs": [_run(each) for each in arm.runs],
            "settings": {key: arm.runs[0].config.get(key) for key in differing},
            "final": final[arm.name],
            "measures": results.measures(arm),
            "collapses": results.collapses(arm),
            "versus": None if arm is base else results.versus(arm, base, columns, from_step),
            "success": {column.key: curves.success_curve(arm, column) for column in columns},
            "curves": {key: curves.curve(arm, key) for key in (*(key for key, *_ in curves.CURVES), *curves.CORRIDOR)},
            "turns": curves.turn_entropy(arm),
        }
        for arm in arms
    ]
    number = {id(each): (i, each.name) for i, arm in enumerate(arms) for each in arm.runs}
    episodes, stored = choose_episodes(runs, megabytes, lambda each: number[id(each)])
    return plain(
        {
            "title": title,
            "subject": subject.subject(runs),
            "facts": subject.facts(runs),
            "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "steps": max(each.steps for each in runs),
            "from_step": from_step,
            "reference": base.name,
            "columns": [{"key": column.key, "title": column.title(runs)} for column in columns],
            "measures": [measure._replace(of=None)._asdict() for measure in MEASURES],
            "differences": results.difference_keys(columns),
            "curves": [curve for curve in curves.CURVES if any(curves.points_of(each, curve.key) for each in runs)],
            "scatters": [results.scatter(arms, key, from_step) for key in SCATTERED],
            "arms": described,
            "differing": differing,
            "lacking": lacking(runs),
            "left_out": left_out,
            "episodes": episodes,
            "stored": stored,
        }
    )


def _run(each: Run) -> dict[str, Any]:
    return {"name": each.name, "seed": each.config.get("seed"), "steps": each.steps}


def choose_episodes(runs: Sequence[Run], megabytes: float, place: Callable[[Run], tuple[int, str]]) -> tuple[list[Row], int]:
    """The episodes that go into the page, and how many there are.

    Of every run in turn the next of its newest step, then of its first, then of the others, until `megabytes` are full.
    """
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
    return bool(curves.points_of(each, key))


def lacking(runs: Sequence[Run]) -> list[str]:
    """A sentence for each thing that some runs lack."""
    has: dict[str, Callable[[Run], bool]] = {
        "a config (config.json), so each is an arm of its own": lambda each: bool(each.config),
        "all RL steps of its config (train.steps)": lambda each: each.steps >= each.config.get("train.steps", 0),
        f"evaluations of {OOD} (eval.jsonl)": lambda each: bool(each.evaluated(OOD)),
        f"evaluations of {IID} (eval.jsonl)": lambda each: bool(each.evaluated(IID)),
        "the corridor": functools.partial(_measured, "corridor_high"),
        "entropy by turn index": lambda each: any("entropy_turn_0" in row for row in each.metrics),
        "episodes to read (trajectories.jsonl)": lambda each: bool(each.episodes),
        "a record of its device (processes.jsonl)": lambda each: bool(each.processes),
    }
    for curve in curves.CURVES:
        has[f"the metric {curve.key}"] = functools.partial(_measured, curve.key)
    sentences = []
    for what, holds in has.items():
        without = [each.name for each in runs if not holds(each)]
        if len(without) == len(runs):
            sentences.append(f"No run has {what}.")
        elif without:
            more = f" and {len(without) - 8} more" if len(without) > 8 else ""
            sentences.append(f"{', '.join(without[:8])}{more}: without {what}.")
    return sentences


def render(summary: dict[str, Any]) -> str:
    """The page as one text.

    What runs wrote reaches it as JSON, in which no "<" is left to end the element that holds it; the page shows it as text, never
    as markup.
    """
    text = (HTML / "report.html").read_text(encoding="utf-8")
    data = json.dumps(summary, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    parts = {name: (HTML / name).read_text(encoding="utf-8") for name in ("report.css", "charts.js", "report.js")}
    for name, content in (*parts.items(), ("data", data)):
        before, after = text.split(f"{{{{ {name} }}}}")
        text = before + content + after
    return text
