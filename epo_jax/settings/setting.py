"""What the declaration of a setting consists of, and the rules that a value can be held to."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple


class Rule(NamedTuple):
    """A condition on a value; `words` completes the sentence "config.KEY=VALUE must be ..."."""

    words: str
    holds: Callable[[Any], bool]


COUNT = Rule("a whole number of at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Rule("zero or positive", lambda value: value >= 0)
POSITIVE = Rule("positive", lambda value: value > 0)
SHARE = Rule("in [0, 1]", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = Rule("in [0, 1)", lambda value: 0 <= value < 1)
SHARE_ABOVE_0 = Rule("in (0, 1]", lambda value: 0 < value <= 1)
ALL_OR_COUNT = Rule("-1 (all) or at least 1", lambda value: value == -1 or value >= 1)
DEVICES = Rule("a number of devices, or 0 (or -1) for an automatic one", lambda value: value >= -1)
SEED = Rule("a whole number from 0 to 4294967295, as random keys are made from 32 bits", lambda value: 0 <= value < 2**32)


class Setting(NamedTuple):
    """One key of the config.

    Attributes:
        key: section and name, as in `--config.epo.lam=0.002`.
        default: its value in `base_config`. None means that a whole number may be given.
        meaning: what it does, in a sentence.
        unit: of its value.
        rule: what a value must be. None passes every rule.
        choices: the allowed values, if it names a variant; those of its items, if it is a tuple.
        by_env: the default for an environment where it is another one.
        ppo: the paper's value for PPO in an environment where it is another one (`columns`).
        paper: the value in the paper, and where it is given.
        reference: the value in the authors' reference implementation, if the paper does not give it or has another one.
        traced: its field of `Hyper`, if it is a coefficient that a compiled program takes as data, so that a sweep may vary it.
        static: its field of `ObjectiveConfig`, if it selects the program of the objective.
        resume: whether a resumed run may change it: "free" for that process alone, "recorded" for good, which changes.jsonl
            records, "fixed" never.
        added: (the last version of the config format without it, the value that reproduces what that version did).
    """

    key: str
    default: Any
    meaning: str
    rule: Rule | None = None
    choices: tuple[str, ...] = ()
    unit: str = ""
    by_env: Mapping[str, Any] = {}  # noqa: RUF012  never written to
    ppo: Mapping[str, Any] = {}  # noqa: RUF012
    paper: str = ""
    reference: str = ""
    traced: str = ""
    static: str = ""
    resume: Literal["free", "recorded", "fixed"] = "fixed"
    added: tuple[int, Any] | None = None

    def default_for(self, env: str) -> Any:
        """The default for environment `env`."""
        return self.by_env.get(env, self.default)


class Section(NamedTuple):
    """Settings that belong together, of environment `env` alone unless that is empty."""

    name: str
    title: str
    settings: tuple[Setting, ...]
    env: str = ""
