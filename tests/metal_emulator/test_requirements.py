"""Where the emulator cannot run, its tests say so; under CI they fail."""

import sys

import pytest

from tests.metal_emulator import requirements


@pytest.fixture(autouse=True)
def linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(requirements.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("CI", raising=False)


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def with_compiler(monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def without_libclang(monkeypatch, with_compiler):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)


def test_missing_compiler_skips_with_the_command_that_installs_it(without_compiler):
    with pytest.raises(pytest.skip.Exception, match=r"needs g\+\+: apt-get install g\+\+"):
        requirements.require()


def test_missing_libclang_skips_with_the_command_that_installs_it(without_libclang):
    with pytest.raises(pytest.skip.Exception, match="needs libclang: pip install libclang"):
        requirements.require()


@pytest.mark.parametrize("what", ["without_compiler", "without_libclang"])
def test_what_is_missing_fails_under_ci(what, request, monkeypatch):
    request.getfixturevalue(what)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="the Metal emulator needs"):
        requirements.require()


def test_other_system_skips_even_under_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(pytest.skip.Exception, match="runs on Linux"):
        requirements.require()


def test_nothing_happens_where_all_is_there(with_compiler, monkeypatch):
    monkeypatch.setattr(requirements, "find_spec", lambda name: object())
    monkeypatch.setenv("CI", "true")
    requirements.require()
