"""Flags of XLA: those that the tests' own process runs with, and those of a command that a test starts."""

import os

# Most of a test's time is compilation of a program that then runs for milliseconds. Without optimization, and with the plain
# code generator in place of the one by MLIR, it takes a third of the processor time; splitting it between threads gains nothing
# where several processes test. Programs of users are compiled otherwise: whole commands in test_main.py are, and
# `./launch/local numerics` repeats the tests of numbers with the default generator.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
DEVICES = "--xla_force_host_platform_device_count="


def of_tests() -> str:
    """XLA_FLAGS for the tests' own process: quick programs, eight fake devices, and what they were called with, which wins."""
    return " ".join([*QUICK, f"{DEVICES}8", os.environ.get("XLA_FLAGS", "")])


def of_command(*own: str) -> str:
    """XLA_FLAGS for a command: those that the tests were called with, such as a CPU's instructions, and its own."""
    added = (*QUICK, DEVICES)
    return " ".join([*(x for x in os.environ.get("XLA_FLAGS", "").split() if not x.startswith(added)), *own])
