"""The tables of the report in Markdown: success, entropy, and differences from the reference arm."""

from collections.abc import Iterable, Sequence
from typing import Any

from epo_jax.analysis.measures import BY_KEY, MEASURES, Measure


def markdown(summary: dict[str, Any]) -> str:
    """All tables of a summary (`page.summarize`), each with a heading."""
    tables = [_success(summary), _entropy(summary)]
    if len(summary["arms"]) > 1:
        tables.append(_differences(summary))
    return "\n\n".join(tables)


def _success(summary: dict[str, Any]) -> str:
    columns = summary["columns"]
    heads = [column["title"] for column in columns] + [f"best {column['title']}" for column in columns]
    measures = [measure for measure in MEASURES if measure.unit in ("share", "steps")]
    rows = []
    for arm in summary["arms"]:
        found = [arm["final"][column["key"]] for column in columns]
        last = [_share(each, each["values"]) if each else "–" for each in found]
        best = [_share(each["best"], each["best_values"]) if each and each["best"] else "–" for each in found]
        collapsed = [_collapsed(arm["collapses"][name]) for name in ("entropy", "success")]
        rows.append([arm["name"], *last, *best, *(_cell(measure, arm) for measure in measures), *collapsed])
    titles = [measure.title for measure in measures]
    return _table("Success in %", ["arm", *heads, *titles, "collapses of entropy", "of success"], rows)


def _entropy(summary: dict[str, Any]) -> str:
    measures = [measure for measure in MEASURES if measure.unit not in ("share", "steps")]
    rows = [[arm["name"], *(_cell(measure, arm) for measure in measures)] for arm in summary["arms"]]
    return _table("Entropy H_k of RL step k in nats per token", ["arm", *(measure.title for measure in measures)], rows)


def _differences(summary: dict[str, Any]) -> str:
    """Succ in points, the highest ratio, roughness and std(dH) by seed, and the p values of collapses."""
    shares = {column["key"]: f"{column['title']}, points" for column in summary["columns"]}
    kept = [*shares, "highest_ratio", "roughness", "change_std"]
    rows = []
    for arm in summary["arms"]:
        if arm["versus"]:
            cells = [_difference(arm["versus"]["differences"].get(key), 100 if key in shares else 1) for key in kept]
            rows.append([arm["name"], *cells, *(f"{arm['versus']['p'][name]:.3g}" for name in ("entropy", "success"))])
    heads = [shares.get(key) or BY_KEY[key].title for key in kept]
    title = f"Difference from {summary['reference']} of the same seed; p of Fisher's exact test of collapses"
    return _table(title, ["arm", *heads, "p, collapses of entropy", "p, of success"], rows)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(found: dict[str, Any], values: Sequence[float]) -> str:
    """As "50.0 [38.1, 61.9] (48, 52)": mean, interval, runs."""
    each = ", ".join(f"{100 * value:.0f}" for value in values)
    return f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}] ({each})"


def _cell(measure: Measure, arm: dict[str, Any]) -> str:
    found, scale = arm["measures"][measure.key], 100 if measure.unit == "share" else 1
    if measure.unit == "steps":
        return ", ".join("never" if value is None else str(value) for value in found["values"])
    if found["mean"] is None:
        return "–"
    interval = "" if found["low"] is None else f" [{scale * found['low']:.3g}, {scale * found['high']:.3g}]"
    return f"{scale * found['mean']:.3g}{interval}"


def _collapsed(steps: Sequence[int | None]) -> str:
    """As "2 of 5 (steps 12, 30)"."""
    at = [step for step in steps if step is not None]
    return f"{len(at)} of {len(steps)}" + (f" (step{'s' * (len(at) > 1)} {', '.join(map(str, at))})" if at else "")


def _difference(found: dict[str, Any] | None, scale: int) -> str:
    """As "+2.1 [-1.0, 5.2] (+1, +3)": mean, interval, seeds."""
    if not found:
        return "–"
    each = ", ".join(f"{scale * value:+.3g}" for value in found["values"])
    interval = "" if found["low"] is None else f" [{scale * found['low']:+.3g}, {scale * found['high']:+.3g}]"
    return f"{scale * found['mean']:+.3g}{interval} ({each})"
