"""The settings as text: docs/settings.md, and what `--help` lists."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from epo_jax.settings.setting import Section, Setting
from epo_jax.settings.table import SECTIONS, SWEEP

_INTRODUCTION = """# Settings

Every key of a config. A config file (`configs/*.py`) changes defaults, and the command line overrides single keys:
`--config.epo.lam=0.002`. `python -m epo_jax.settings > docs/settings.md` writes this page from `epo_jax/settings/table.py`.

* **paper**: the value in the paper (arXiv 2509.22576, version 2) and where it is given; "reference:" is the value in the authors'
  reference implementation, if it differs or the paper gives none. "table" is the paper's table of hyperparameters.
* **code**: a field of `Hyper` is a coefficient, which a compiled program takes as data, so that a sweep may vary it
  (`--config.sweep.over.KEY`). A field of `ObjectiveConfig` selects the program.
* **resume**: "free": a resumed run may have another value. "recorded": it may change the value for good, and changes.jsonl
  records when. "fixed": it keeps the value.
"""

_HEADING = "Settings, each an option --config.KEY=VALUE (docs/settings.md has their ranges and the paper's values)"


def markdown() -> str:
    """The page docs/settings.md."""
    return _INTRODUCTION + "".join(map(_table, (*SECTIONS, SWEEP)))


def _table(section: Section) -> str:
    header = ("key", "default", "unit", "meaning", "values", "paper", "code", "resume")
    rows = [header, ("---",) * len(header), *map(_row, section.settings)]
    name = f"`{section.name}`: " * bool(section.name)
    return f"\n## {name}{section.title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(setting: Setting) -> tuple[str, ...]:
    others = "".join(f"; {env}: `{_text(value)}`" for env, value in setting.by_env.items())
    values = ", ".join(f"`{_text(choice)}`" for choice in setting.choices)
    paper = [setting.paper] * bool(setting.paper) + [f"reference: {setting.reference}"] * bool(setting.reference)
    code = f"`Hyper.{setting.traced}`" if setting.traced else f"`ObjectiveConfig.{setting.static}`" * bool(setting.static)
    row = (
        f"`{setting.key}`", f"`{_text(setting.default)}`{others}", setting.unit, setting.meaning,
        values or (setting.rule.words if setting.rule else ""), "; ".join(paper), code, setting.resume,
    )  # fmt: skip
    return tuple(cell.replace("|", "\\|").replace("<", "&lt;") for cell in row)


def help_text(sections: Iterable[Section], values: Mapping[str, Any], heading: str = _HEADING) -> str:
    """The meaning of every key, for a terminal.

    Args:
        sections: what to list; of the sections of environments, those of the config's alone, if there is one.
        values: the values of a config, by key; empty: the defaults.
        heading: the first line.
    """
    width, lines = min(shutil.get_terminal_size().columns, 130), [heading]
    for section in sections:
        if section.env in ("", values.get("env.name", section.env)):
            lines.append(f"\n{f'{section.name}: ' * bool(section.name)}{section.title}")
            for setting in section.settings:
                lines.append(f"  {setting.key}={_text(values.get(setting.key, setting.default))}")
                others = {} if values else setting.by_env
                text = "".join([
                    setting.meaning,
                    f" One of {', '.join(map(_text, setting.choices))}." * bool(setting.choices),
                    *(f" On {env}: {_text(value)}." for env, value in others.items()),
                    f" [{setting.unit}]" * bool(setting.unit),
                ])  # fmt: skip
                wrapped = textwrap.wrap(text, width - 6, break_on_hyphens=False)
                lines.append(textwrap.indent("\n".join(wrapped), " " * 6))
    return "\n".join(lines)


def _text(value: Any) -> str:
    return str(value) or '""'
