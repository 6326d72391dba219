"""Columns of success: splits, temperatures and rules for "won"."""

import pytest

from epo_jax.analysis.columns import Column, column_of, columns_of
from epo_jax.analysis.read import IID, OOD, Run
from tests.analysis.test_results import evaluation, run


def test_every_split_temperature_and_rule_is_a_column():
    given = [run(0, [evaluation(5, 8, temperature=1.0), evaluation(5, 4), evaluation(5, 1, split=IID)])]
    columns = columns_of(given)
    assert columns == [Column(OOD), Column(OOD, 1.0), Column(IID)]
    assert [column.key for column in columns] == [OOD, f"{OOD}@1", IID]
    assert [column.title(given) for column in columns] == ["OOD, T = 0.4", "OOD, T = 1", "IID, T = 0.4"]
    assert Column(OOD).title([given[0], Run("b", None, {}, [], [])]) == "OOD", "the temperature of the other is not known"


def test_the_reference_rule_counts_what_it_counts_as_won():
    """Of 20 episodes 4 were completed, and 9 won by the other rule; an evaluation without it is no evaluation by it."""
    given = run(0, [evaluation(5, 4, won_reference=9, types={"find": [4, 20]}), evaluation(9, 5, won_reference=None)])
    assert columns_of([given]) == [Column(OOD), Column(OOD, None, True)]
    (row,) = Column(OOD, None, True).evaluations(given)
    assert (row["step"], row["won"], row["success"], row["types"]) == (5, 9, 0.45, {})
    assert [row["won"] for row in Column(OOD).evaluations(given)] == [4, 5]
    assert Column(OOD, None, True).title([given]) == "OOD, T = 0.4, reference rule"


@pytest.mark.parametrize("column", [Column(OOD), Column(IID, 1.0), Column("train", 0.0, True), Column(OOD, None, True)])
def test_a_key_names_its_column(column):
    assert column_of(column.key) == column_of(f"best {column.key}") == column
    assert column_of("roughness") is None
