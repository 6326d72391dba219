"""Reads run folders, and says which cannot be read and why."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from epo_jax.common.errors import UserError
from epo_jax.runs import versions
from epo_jax.runs.metrics import Row, plain, read_rows, steps_taken
from epo_jax.settings.config import flatten

IID, OOD = "valid_seen", "valid_unseen"


class Run(NamedTuple):
    """The content of a run folder.

    Attributes:
        name: name of the folder.
        arm: the name that the user gave to a group of runs, if any.
        config: every setting by its dotted key; empty without a config.json.
        metrics: rows of metrics.jsonl.
        evaluations: rows of eval.jsonl.
        episodes: rows of trajectories.jsonl.
        processes: rows of processes.jsonl, one for each process that trained.
    """

    name: str
    arm: str | None
    config: dict[str, Any]
    metrics: list[Row]
    evaluations: list[Row]
    episodes: list[Row] = []  # noqa: RUF012  never written to
    processes: list[Row] = []  # noqa: RUF012  never written to

    @property
    def steps(self) -> int:
        """RL steps taken."""
        return steps_taken(self.metrics, self.evaluations)

    def evaluated(self, split: str, temperature: float | None = None) -> list[Row]:
        """The evaluations of a split, by step; at another temperature than that of config.eval if one is given."""
        rows = [row for row in self.evaluations if row.get("split") == split and row.get("temperature") == temperature]
        return sorted(rows, key=lambda row: row["step"])


def read_all(arguments: Sequence[str]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The runs that can be read, and (folder, reason) of each that cannot.

    Args:
        arguments: run folders and sweep folders, each as FOLDER or NAME=FOLDER.

    Raises:
        UserError: none can be read.
    """
    runs, left_out = [], []
    for text in arguments:
        arm, folder = _name_and_folder(text)
        try:
            members = _members(folder, left_out)
        except UserError as error:
            left_out.append((str(folder), str(error)))
            continue
        for path, name, coefficients in members:
            try:
                runs.append(read_run(path, name, coefficients, arm))
            except UserError as error:
                left_out.append((str(path), str(error)))
    if not runs:
        others = f" (and {len(left_out) - 1} more folders cannot be read)" if len(left_out) > 1 else ""
        raise UserError(left_out[0][1].rstrip(".") + others + ".")
    return runs, left_out


def read_run(folder: Path, name: str, coefficients: dict[str, Any], arm: str | None = None) -> Run:
    """The run in `folder`; `coefficients` replace keys of its config.

    Raises:
        UserError: the folder has no rows, or a config.json that cannot be read.
    """
    metrics, evaluations = (plain(read_rows(folder / name)) for name in ("metrics.jsonl", "eval.jsonl"))
    if not metrics and not evaluations:
        raise UserError(f"{folder} has no metrics.jsonl or eval.jsonl with rows; name the folder of a run or of a sweep.")
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = versions.upgrade(flatten(content), content.get("version", 1))[0] | coefficients
    except FileNotFoundError:
        config = coefficients
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{folder / 'config.json'} cannot be read as the config of a run; restore it or remove it.") from None
    episodes, processes = (read_rows(folder / name) for name in ("trajectories.jsonl", "processes.jsonl"))
    return Run(name, arm, config, metrics, evaluations, episodes, processes)


def _name_and_folder(text: str) -> tuple[str | None, Path]:
    name, _, after = text.partition("=")
    return (None, Path(text)) if Path(text).exists() or not after else (name, Path(after))


def _members(folder: Path, left_out: list[tuple[str, str]]) -> list[tuple[Path, str, dict[str, Any]]]:
    """(folder, name, coefficients) of a run, or of each member of a sweep that has begun; the others join `left_out`."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder of a run or of a sweep.")
    path = folder / "sweep.json"
    if not path.exists():
        return [(folder, folder.name or str(folder), {})]
    try:
        listed = [(str(m["name"]), dict(m["coefficients"])) for m in json.loads(path.read_text(encoding="utf-8"))["members"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not list members with name and coefficients; restore it or name single runs.") from None
    found = [(folder / "members" / name, name, values) for name, values in listed]
    begun = [member for member in found if any((member[0] / f).exists() for f in ("metrics.jsonl", "eval.jsonl"))]
    if not begun:
        raise UserError(f"{folder} holds no run of its members yet; wait for their first step or name single runs.")
    left_out += [(str(path), f"{path} has not begun.") for path, *_ in found if path not in {path for path, *_ in begun}]
    return begun
