import pathlib

import pytest

from tests.objectives import golden

TESTS = "".join(p.read_text() for p in pathlib.Path(__file__).parent.glob("test_golden_*.py"))


@pytest.mark.parametrize("function", sorted({case["function"] for case in golden.manifest()}))
def test_every_recorded_function_is_reproduced_somewhere(function):
    assert f'"{function}"' in TESTS, f"{function} is recorded in {golden.FOLDER} but no test reproduces it."
