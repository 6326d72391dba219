"""Nothing recorded is left out: `golden.check` compares every array of a function, and here every function is checked."""

import numpy as np

from tests.parity import golden, test_golden_actor, test_golden_advantages, test_golden_losses, test_golden_masked
from tests.parity.test_golden_raising import ANSWERS

MODULES = (test_golden_actor, test_golden_advantages, test_golden_losses, test_golden_masked)


def test_golden_every_recorded_function_is_reproduced():
    reproduced = [function for module in MODULES for function in module.REPRODUCED]
    assert sorted(reproduced) == sorted({case["function"] for case in golden.manifest()})
    assert ANSWERS.keys() == {case["function"] for case in golden.manifest() if case.get("raises")}


def test_golden_every_stored_array_is_in_the_manifest():
    for file in sorted({case["file"] for case in golden.manifest()}):
        listed = {
            f"{case['case']}__{kind}__{name}"
            for case in golden.manifest() if case["file"] == file
            for kind, field in (("in", "inputs"), ("out", "outputs"), ("grad", "grads"))
            for name, *_ in case[field]
        }  # fmt: skip
        assert listed == set(np.load(golden.FOLDER / file).files), file
    assert {case["file"] for case in golden.manifest()} == {path.name for path in golden.FOLDER.glob("*.npz")}
