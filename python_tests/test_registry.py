"""Nothing public is untested: a new op, function or module without an entry fails here."""

from bad_calls import BAD, GOOD
from compositions import ABSTRACT, ALL, FUNCTIONS, MODULES, NOT_DIFFERENTIABLE
from op_entries import OPS

import neuromod_ext as nm
from neuromod_ext import _ops


def test_kernels_are_what_is_tested() -> None:
    assert _ops.LOAD_ERROR is None
    assert _ops.EXTENSION


def test_every_op_has_an_entry() -> None:
    assert set(OPS) == set(_ops.NAMES) == set(BAD) == set(GOOD)
    assert [name for name, op in OPS.items() if op.name != name] == []


def test_every_function_has_an_entry() -> None:
    assert {entry.subject for entry in FUNCTIONS} | set(NOT_DIFFERENTIABLE) == set(
        nm.functional.__all__
    )


def test_every_module_has_an_entry() -> None:
    assert {entry.subject for entry in MODULES} | set(ABSTRACT) == set(nm.nn.__all__)


def test_entries_are_told_apart() -> None:
    assert len({entry.id for entry in ALL}) == len(ALL)
