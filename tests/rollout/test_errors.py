"""How a program ends: exit codes and messages."""

from __future__ import annotations

import pytest

from rollout.errors import ConfigError, InputError, RsgrpoError, listed, run_program


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(RsgrpoError("it broke")), 1, "error: it broke\n"),
        (raising(InputError("wrong")), 2, "error: wrong\n"),
        (raising(ConfigError("wrong")), 2, "error: wrong\n"),
        (raising(OSError("disk")), 1, "error: disk\n"),
        (raising(KeyboardInterrupt()), 130, "Stopped; rows are kept.\n"),
        (
            raising(ModuleNotFoundError("no", name="faiss.contrib")),
            2,
            "error: faiss.contrib is not installed; install the extra, for example with "
            '`pip install -e ".[retrieval]"`\n',
        ),
    ],
)
def test_exit_codes(work, code, message, capsys):
    assert run_program(work, kept="rows are kept", extras={"faiss": "retrieval"}) == code
    assert capsys.readouterr().err == message


def test_an_unknown_missing_module_is_a_bug_of_ours():
    with pytest.raises(ModuleNotFoundError):
        run_program(raising(ModuleNotFoundError("no", name="numpi")))


def test_long_lists_are_counted():
    assert listed(["a", "b"], 2) == "  a\n  b"
    assert listed(["a", "b", "c"], 1) == "  a\n  ... and 2 more"
