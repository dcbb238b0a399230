"""Plug-ins: whatever another package does, only who asks for it hears of it, in one line."""

import sys
import types

import pytest

from fastunlearn import plugins
from fastunlearn.cli import methods
from fastunlearn.errors import UserError
from fastunlearn.methods import all_methods, get_method


def raises(error):
    def load():
        raise error

    return load


FAULTS = {
    "an import that fails": (raises(ImportError("no module named x")), "ImportError: no module named x"),
    "an exit": (raises(SystemExit(7)), "SystemExit: 7"),
    "a bug": (raises(ZeroDivisionError("division by zero")), "ZeroDivisionError: division by zero"),
    "a name that is not there": (raises(AttributeError("module 'x' has no attribute 'Y'")), "AttributeError"),
    "a text": (lambda: "esd", "is a str, not a fastunlearn.methods.Method"),
    "a class": (lambda: types.SimpleNamespace, "is a type, not a fastunlearn.methods.Method"),
    "nothing": (lambda: None, "is a NoneType, not a fastunlearn.methods.Method"),
}


@pytest.fixture(params=FAULTS.values(), ids=FAULTS)
def faulty(request, monkeypatch):
    load, words = request.param
    entry = types.SimpleNamespace(name="theirs", value="theirs:METHOD", load=load)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == "fastunlearn.methods" else [])
    return words


def test_a_faulty_plug_in_is_named_and_harms_nobody_else(faulty, refused, cli, capsys, tmp_path):
    assert "theirs" not in all_methods()
    assert get_method("esd").name == "esd"
    with pytest.raises(UserError, match=r"^the method 'theirs' of another package cannot be loaded: "):
        get_method("theirs")
    line = refused("train", "--forget", "star", "--method", "theirs", "--output", tmp_path / "run")
    assert faulty in line
    methods.methods_table()
    said = " ".join(capsys.readouterr().out.split())
    assert "theirs: cannot be loaded (" in said
    assert faulty in said
    assert cli("methods").status == 0
    assert not list(tmp_path.iterdir())


def test_what_a_plug_in_prints_at_import_does_not_mix_with_our_output(monkeypatch, capsys):
    def load():
        print("hello from theirs")
        sys.stdout.write("and again")
        return get_method("esd")

    entry = types.SimpleNamespace(name="theirs", value="theirs:METHOD", load=load)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == "fastunlearn.methods" else [])
    assert "theirs" in all_methods()
    assert capsys.readouterr().out == ""
