"""What a run is about, in words: its game, model, method and seed, for titles of figures."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from epo_jax.runs.metrics import Row

_ENVIRONMENTS = {"alfworld": "ALFWorld", "scienceworld": "ScienceWorld"}


def subject(config: Mapping[str, Any], processes: Sequence[Row] = ()) -> str:
    """For example "ALFWorld, 19 turns · new model, 3 layers of width 128 · grpo+epo · seed 1".

    Args:
        config: settings by their dotted keys; what it lacks is left out.
        processes: rows of processes.jsonl.
    """
    seed = f"seed {config['seed']}" if "seed" in config else ""
    return " · ".join(text for text in (game(config), model(config, processes), config.get("algo.name", ""), seed) if text)


def game(config: Mapping[str, Any]) -> str:
    """The environment and its limit of turns."""
    name = config.get("env.name", "")
    turns = f", {config['env.max_turns']} turns" if "env.max_turns" in config else ""
    return f"{_ENVIRONMENTS.get(name, name)}{turns}" if name else ""


def model(config: Mapping[str, Any], processes: Sequence[Row] = ()) -> str:
    """The published model, or the size of a new one."""
    path, layers = str(config.get("model.path", "")), config.get("model.num_layers")
    counted = [row["parameters"] for row in processes if row.get("parameters")]
    size = [f"{_short(counted[-1])} parameters trained"] if counted else []
    if path:  # a hub name has two parts; of a folder the last is enough
        return ", ".join([path if path.count("/") == 1 and path[0] not in "/.~" else PurePath(path).name, *size])
    return ", ".join(["new model", *size, f"{layers} layers of width {config.get('model.d_model')}"]) if layers else ""


def _short(count: int) -> str:
    """A large number with two digits: "0.71M", "36M", "3.1B"."""
    return f"{count / 1e9:.2g}B" if count >= 1e9 else f"{count / 1e6:.2g}M" if count < 1e8 else f"{round(count, -7) / 1e6:.0f}M"
