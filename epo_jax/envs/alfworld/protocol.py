"""ALFWorld as an environment: household tasks in text, on the original dataset or on generated games.

If ALFWORLD_DATA names a folder, all its games are used, whatever the number of games in the options. Otherwise games are
generated once into the cache folder. Options:

    data_dir                 cache folder; "" means $EPO_JAX_DATA, else ~/.cache/epo_jax
    train_games, valid_seen_games, valid_unseen_games, max_receptacles, seed      what to generate (`games`)
    workers                  processes that generate games and expert episodes
    max_turns                longest expert episode
    hesitation               probability of an episode with a wasted turn before every action (default 0)
    mistakes                 probability of an impossible action before each action, excluded from the loss (default 0)
    hints                    "admissible" lists the valid commands at every turn (default "none")
"""

import collections
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from epo_jax.common import progress
from epo_jax.common.errors import UserError, explain
from epo_jax.common.files import OTHER_CACHE, cache_folder, expand_user, from_cache, write_to_cache
from epo_jax.envs.alfworld.env import AlfworldEnv
from epo_jax.envs.alfworld.games import GENERATOR_VERSION
from epo_jax.envs.alfworld.jobs import run_jobs
from epo_jax.envs.alfworld.rename import rename as rename
from epo_jax.envs.alfworld.rooms import TASK_TYPES
from epo_jax.envs.base import SPLITS, Demonstration, Task, from_fields

HINTS = ("none", "admissible")
INDEX_VERSION = 2
DEMONSTRATION_VERSION = 5
_GAME_FILES = {"game.tw-pddl", "traj_data.json"}
_INDEX = "index.json"  # written last: a folder with it is complete

Index = dict[str, list[Task]]


def prepare(options: dict[str, Any]) -> None:
    """Makes the games and their index, unless they are on disk.

    Raises:
        UserError: the packages are not installed, ALFWORLD_DATA contains no games, the cache cannot be written, or an option
        has an
            invalid value.
    """
    if importlib.util.find_spec("alfworld") is None:
        raise UserError(
            "the Python package alfworld is missing; install it (pip install --no-deps alfworld: its data is enough, its "
            "dependencies are not used)."
        )
    if options.get("hints", "none") not in HINTS:
        raise UserError(f"env.hints={options['hints']!r} is not known; choose one of {', '.join(HINTS)}.")
    _index(options)


def _index(options: dict[str, Any]) -> Path:
    """Returns the path of the index of games; makes or finds the games if it is missing."""
    path = _index_path(options)
    if path.exists():
        return path
    if (data := _real_data()) is not None:
        write_to_cache(path, json.dumps(_index_real_data(data)))
    else:
        _generate(options)
    return path


def list_tasks(split: str, options: dict[str, Any]) -> list[Task]:
    """Returns the games of a split, {"id", "type", "file"}, in a fixed order."""
    if split not in SPLITS:
        raise UserError(f"{split!r} is not a split; choose one of {', '.join(SPLITS)}.")
    path = _index(options)
    root = _real_data() or path.parent / "json_2.1.1"
    with from_cache(path, "it is made again"):
        index = json.loads(path.read_text())
        return [{**task, "file": str(root / task["file"])} for task in index[split]]


def narrowed(options: dict[str, Any], split: str, number: int) -> dict[str, Any]:
    """Returns options with fewer games, among them game `number` of `split`, as long as the games have not been generated.

    Games do not depend on how many there are, so this game is the one that the options name.
    """
    count = options[f"{split}_games"]
    if number >= count or _real_data() is not None or _index_path(options).exists():
        return options
    return {**options, **{f"{other}_games": number + 1 if other == split else 0 for other in SPLITS}}


def make_env(options: dict[str, Any]) -> AlfworldEnv:
    return AlfworldEnv(_lists_admissible(options))


def demonstrations(tasks: list[Task], options: dict[str, Any]) -> list[Demonstration]:
    """Returns one expert episode for each task, cached on disk; `won` is False if not even the walkthrough of the game wins.

    A task may occur several times, with new hesitations and mistakes each time. Each of the two options gives the expert
    `max_turns` additional turns.
    """
    if not tasks:
        return []
    hesitation = options.get("hesitation", 0.0)
    mistakes = options.get("mistakes", 0.0)
    max_turns = options["max_turns"] * (1 + (hesitation > 0) + (mistakes > 0))
    admissible = _lists_admissible(options)
    key = [DEMONSTRATION_VERSION, max_turns, hesitation, mistakes, admissible, [task["file"] for task in tasks]]
    if (data := _real_data()) is not None:
        key.append(_contents(data))
    path = _cache(options) / "demonstrations" / f"{_digest(key)}.jsonl"
    if path.exists():
        with from_cache(path, "the expert plays again"):
            episodes = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        times: collections.Counter[str] = collections.Counter()
        playing = []
        for task in tasks:
            playing.append({**task, "seed": f"{task['id']}/{times[task['id']]}"})
            times[task["id"]] += 1
        share = -(-len(tasks) // max(1, options["workers"]))
        common = {"job": "demonstrations", "admissible": admissible}
        common |= {"max_turns": max_turns, "hesitation": hesitation, "mistakes": mistakes}
        jobs = [{**common, "tasks": playing[start : start + share]} for start in range(0, len(tasks), share)]
        with progress.shown("alfworld: episodes of the expert, played once", len(tasks), "episodes") as reach:
            episodes = run_jobs(jobs, reach)
        print(f"alfworld: {len(tasks)} expert episodes played", flush=True)
        write_to_cache(path, "".join(json.dumps(e) + "\n" for e in episodes))
    return [
        Demonstration(task, tuple(map(from_fields, e["observations"])), tuple(e["actions"]), tuple(e["mistakes"]))
        for task, e in zip(tasks, episodes, strict=True)
    ]


# ---------------------------------------------------------------------------------------------- folders


def _lists_admissible(options: dict[str, Any]) -> bool:
    return options.get("hints", "none") == "admissible"


def _cache(options: dict[str, Any]) -> Path:
    return cache_folder(options.get("data_dir", "")) / "alfworld"


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def _index_path(options: dict[str, Any]) -> Path:
    data = _real_data()
    if data is not None:
        return _cache(options) / f"real-{_digest([INDEX_VERSION, str(data), _contents(data)])}" / _INDEX
    package = importlib.metadata.version("alfworld")
    counts = [options[f"{split}_games"] for split in SPLITS]
    key = [GENERATOR_VERSION, package, counts, options["max_receptacles"], options["seed"]]
    return _cache(options) / f"generated-{_digest(key)}" / _INDEX


# ---------------------------------------------------------------------------------------------- real data


def _real_data() -> Path | None:
    """Returns the folder of the splits in $ALFWORLD_DATA, or None if that is not set."""
    name = os.environ.get("ALFWORLD_DATA")
    if not name:
        return None
    folder = expand_user(name, "ALFWORLD_DATA").absolute()
    if (folder / "json_2.1.1").is_dir():
        folder = folder / "json_2.1.1"
    if not any((folder / split).is_dir() for split in SPLITS):
        raise UserError(f"ALFWORLD_DATA={name} has no json_2.1.1 folder with {', '.join(SPLITS)}; download the data or unset it.")
    return folder


def _contents(data: Path) -> list[tuple[str, int, int]]:
    """Returns path, size and time of every file that a game is read from.

    Any added, repaired or deleted trial changes the result. The files, thousands of them, are not opened.
    """
    files = []
    for split in SPLITS:
        for folder, _, names in os.walk(data / split):
            for name in _GAME_FILES.intersection(names):
                about = os.stat(os.path.join(folder, name))
                files.append((os.path.relpath(os.path.join(folder, name), data), about.st_size, about.st_mtime_ns))
    return sorted(files)


def _index_real_data(data: Path) -> Index:
    """Finds the games that the loader of the package plays: solvable, no sliced objects, no movable receptacles."""
    print(f"alfworld: indexing the games in {data} (once, and again when they change)", flush=True)
    index: Index = {split: [] for split in SPLITS}
    for split in SPLITS:
        for path in sorted((data / split).rglob("game.tw-pddl")):
            name = str(path.parent.relative_to(data))
            task_type = next((t for t in TASK_TYPES if path.parts[-3].startswith(f"{t}-")), None)
            if task_type and "movable" not in name and "Sliced" not in name and _solvable(path):
                index[split].append({"id": name, "type": task_type, "file": f"{name}/{path.name}"})
    if not any(index.values()):
        raise UserError(f"{data} holds no playable game.tw-pddl file; run alfworld-download, or unset ALFWORLD_DATA.")
    return index


def _solvable(path: Path) -> bool:
    """Whether the file marks the game as solvable; a search, because parsing thousands of files is slow."""
    try:
        return re.search(rb'"solvable"\s*:\s*true', path.read_bytes()) is not None
    except OSError as error:  # a game skipped here would be missing from the index forever
        raise UserError(f"{path} cannot be read {explain(error, 'restore the data')}.") from None


# ---------------------------------------------------------------------------------------------- generated data


def _generate(options: dict[str, Any]) -> None:
    """Generates the games in a folder next to the target, which keeps finished games if this is interrupted."""
    target = _index_path(options).parent
    games = [{"split": split, "index": i} for split in SPLITS for i in range(options[f"{split}_games"])]
    workers = max(1, options["workers"])
    print(f"alfworld: generating {len(games)} games (once)", flush=True)
    partial = target.with_name(f".partial-{target.name}")
    unfinished = target.with_name(f".partial-{os.getpid()}")  # one game of each worker
    try:
        partial.mkdir(parents=True, exist_ok=True)
        common = {
            "job": "games",
            "root": str(partial / "json_2.1.1"),
            "unfinished": str(unfinished),
            "seed": options["seed"],
            "max_receptacles": options["max_receptacles"],
        }
        jobs = [{**common, "games": games[k::workers]} for k in range(workers)]
        with progress.shown("alfworld: games", len(games), "games") as reach:
            answers = run_jobs(jobs, reach)
        print(f"alfworld: {len(games)} games made and played to their end", flush=True)
        index: Index = {split: [] for split in SPLITS}
        for game in sorted(answers, key=lambda g: g["index"]):
            file = f"{game['folder']}/game.tw-pddl"
            index[game["split"]].append({"id": game["folder"], "type": game["type"], "file": file})
        if not target.exists():  # another process may have been faster
            (partial / _INDEX).write_text(json.dumps(index))
            os.rename(partial, target)
    except OSError as error:
        if not target.exists():
            raise UserError(f"cannot write games to {target}: {error.strerror}; {OTHER_CACHE}.") from None
    finally:
        for left in unfinished.parent.glob(f"{unfinished.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        if not isinstance(sys.exception(), KeyboardInterrupt):
            shutil.rmtree(partial, ignore_errors=True)
