"""What runs are about, for titles and for the page's list of settings: game, model, method, seeds, device and time."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from epo_jax.analysis.read import Run
from epo_jax.runs import subject as of_run


def subject(runs: Sequence[Run]) -> str:
    """For example "ALFWorld · new model, 3 layers of width 128 · seeds 0 to 4"; without what no config tells."""
    return " · ".join(text for text in (_each(_game, runs), _each(_model, runs), seeds(runs)) if text)


def seeds(runs: Sequence[Run]) -> str:
    """The seeds of runs: "seed 1" or "seeds 0 to 4"."""
    found = sorted({each.config["seed"] for each in runs if "seed" in each.config})
    if len(found) > 2 and found == [*range(found[0], found[-1] + 1)]:
        return f"seeds {found[0]} to {found[-1]}"
    return f"seed{'s' * (len(found) > 1)} {', '.join(map(str, found))}" if found else ""


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(name, text) of what runs were made with, as far as they tell; differences are listed with "or"."""
    found = {
        "Game": _each(_game, runs),
        "Model": _each(_model, runs),
        "Method": _each(_text("{algo.name}"), runs),
        "Seeds": seeds(runs).partition(" ")[2],
        "RL": _each(_text("{train.steps} RL steps of {rollout.groups} tasks x {rollout.group_size} episodes"), runs),
        "Optimizer": _each(_optimizer, runs),
        "Entropy": _each(_text("lam {epo.lam}, alpha {epo.alpha}, kappa {epo.kappa_l} to {epo.kappa_r}"), runs),
        "Prompts": _each(_text("{agent.context}, {agent.style}, {agent.max_tokens} tokens"), runs),
        "Initial policy": _each(_initial, runs),
        "Evaluation": _each(_text("temperature {eval.temperature}, every {eval.every} RL steps"), runs),
        "Device": _unique(row.get("device") for each in runs for row in each.processes),
        "Time": _time(runs),
        "Options": _unique(row.get("arguments") for each in runs for row in each.processes[:1]),
    }
    return [(name, text) for name, text in found.items() if text]


def _game(each: Run) -> str:
    return of_run.game(each.config)


def _model(each: Run) -> str:
    return of_run.model(each.config, each.processes)


def _text(template: str) -> Callable[[Run], str]:
    """A function from a run to the template with the settings that it names; "" if the run lacks one."""

    def fill(each: Run) -> str:
        parts = template.split("{")
        text = parts[0]
        for part in parts[1:]:
            key, _, rest = part.partition("}")
            if key not in each.config:
                return ""
            text += f"{each.config[key]}{rest}"
        return text

    return fill


def _optimizer(each: Run) -> str:
    by_turn = each.config.get("algo.mini_batches_by") == "turn"
    sizes = "mini-batches of {algo.mini_batch_turns} turns" if by_turn else "{algo.mini_batches} mini-batches"
    return _text(f"learning rate {{optim.lr}}, {sizes}")(each)


def _initial(each: Run) -> str:
    config = each.config
    if config.get("init_from.run"):
        return f"the policy of {config['init_from.run']}"
    if config.get("warm_start.episodes"):
        return f"cloned from {config['warm_start.episodes']} expert episodes in {config['warm_start.steps']} updates"
    return ""


def _time(runs: Sequence[Run]) -> str:
    """The time of the longest and the shortest run."""
    rows = [each.metrics[-1] for each in runs if each.metrics]
    minutes = sorted(row["wall_seconds"] / 60 for row in rows if row.get("wall_seconds"))
    if not minutes:
        return ""
    low, high = f"{minutes[0]:.3g}", f"{minutes[-1]:.3g}"
    several = " each; members of a sweep that were computed together have one time" if len(runs) > 1 else ""
    return f"{low if low == high else f'{low} to {high}'} minutes{several}"


def _each(read: Callable[[Run], Any], runs: Sequence[Run]) -> str:
    return _unique(map(read, runs))


def _unique(texts: Iterable[Any], most: int = 4) -> str:
    """The different texts, joined by "or"."""
    found = [str(text) for text in dict.fromkeys(texts) if text]
    return " or ".join(found[:most]) + (f" or {len(found) - most} others" if len(found) > most else "")
