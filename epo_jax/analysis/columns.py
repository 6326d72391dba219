"""What success is of: a split, at a temperature, by a rule for "won"; each is a column of the table."""

from collections.abc import Sequence
from typing import NamedTuple

from epo_jax.analysis.measures import BY_KEY
from epo_jax.analysis.read import IID, OOD, Run
from epo_jax.runs.metrics import Row

SHORT = {"OOD": OOD, "IID": IID}


class Column(NamedTuple):
    """Evaluations of one kind.

    Attributes:
        split: of eval.jsonl.
        temperature: None for that of config.eval.
        reference: whether an episode is won by the rule of the authors' reference implementation (`won_reference`).
    """

    split: str
    temperature: float | None = None
    reference: bool = False

    @property
    def key(self) -> str:
        """Its name: "valid_unseen", "valid_unseen@1" at temperature 1, "valid_unseen+reference" by the other rule."""
        temperature = "" if self.temperature is None else f"@{self.temperature:g}"
        return f"{self.split}{temperature}{'+reference' * self.reference}"

    def title(self, runs: Sequence[Run]) -> str:
        """Its heading: "OOD, T = 0.4"; without the temperature where runs do not know it or differ."""
        name = {split: short for short, split in SHORT.items()}.get(self.split, self.split)
        known = {each.config.get("eval.temperature") for each in runs} if self.temperature is None else {self.temperature}
        temperature = f", T = {known.pop():g}" if len(known) == 1 and None not in known else ""
        return f"{name}{temperature}{', reference rule' * self.reference}"

    def evaluations(self, each: Run) -> list[Row]:
        """The evaluations of a run, whose `won` and `success` are by the column's rule."""
        rows = each.evaluated(self.split, self.temperature)
        if not self.reference:
            return rows
        rows = [row | {"won": row["won_reference"], "types": {}} for row in rows if row.get("won_reference") is not None]
        return [row | {"success": row["won"] / max(1, row["episodes"])} for row in rows]


def columns_of(runs: Sequence[Run]) -> list[Column]:
    """The columns of all evaluations: OOD first, and of each split first that of config.eval and of our rule."""
    rows = [row for each in runs for row in each.evaluations]
    found = {Column(row["split"], row.get("temperature")) for row in rows}
    found |= {Column(row["split"], row.get("temperature"), True) for row in rows if row.get("won_reference") is not None}
    order = {split: i for i, split in enumerate(SHORT.values())}

    def place(column: Column) -> tuple:
        return (
            order.get(column.split, len(order)), column.split, column.reference,
            column.temperature is not None, column.temperature or 0.0,
        )  # fmt: skip

    return sorted(found, key=place)


def column_of(key: str) -> Column | None:
    """The column whose key this is, also after "best "; None for a measure.

    Raises:
        ValueError: the temperature is no number.
    """
    if key in BY_KEY:
        return None
    rest = key.removeprefix("best ")
    split, _, temperature = rest.removesuffix("+reference").partition("@")
    return Column(SHORT.get(split, split), float(temperature) if temperature else None, rest.endswith("+reference"))
