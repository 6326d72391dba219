"""The settings as text."""

from pathlib import Path

from epo_jax.settings.describe import help_text, markdown
from epo_jax.settings.table import SECTIONS, SETTINGS, SWEEP


def test_the_page_is_that_of_the_table():
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == markdown(), "write it again: python -m epo_jax.settings > docs/settings.md"


def test_every_row_of_the_page_has_all_columns():
    rows = [line for line in markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(SETTINGS)
    for row in rows:
        assert row.replace("\\|", "").count("|") == 9, row


def test_help_has_every_setting_with_its_meaning():
    text = " ".join(help_text((*SECTIONS, SWEEP), {}).split())
    for setting in SETTINGS:
        assert f" {setting.key}=" in text and setting.meaning in text, setting.key


def test_help_with_a_config_has_its_values_and_its_environment():
    text = help_text(SECTIONS, {"env.name": "scienceworld", "epo.lam": 0.5})
    assert "epo.lam=0.5\n" in text and "env.level=L1" in text and "env.train_games" not in text
