"""A file is a plug-in: names, loading, and what is refused."""

import sys
import types
from abc import ABC, abstractmethod

import pytest

from transect import probes, registry
from transect.errors import InputError
from transect.probes.base import Probe


class Base(ABC):
    @abstractmethod
    def act(self) -> int: ...


class Inside(Base):
    def act(self) -> int:
        return 1


@pytest.fixture
def package(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with good, empty, double and hidden modules."""
    name = "plugged_things"
    folder = tmp_path / name
    folder.mkdir()
    plugin = "from test_registry import Base\n\nclass {}(Base):\n    def act(self): return {}\n"
    files = {
        "__init__": "",
        "base": "",
        "_hidden": plugin.format("Hidden", 0),
        "straight": plugin.format("Straight", 2) + "from test_registry import Inside\n",
        "empty": "from test_registry import Base, Inside\n",
        "double": plugin.format("One", 1) + plugin.format("Two", 2),
    }
    for module, text in files.items():
        (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def test_available_lists_files_without_importing_them(package: str):
    assert registry.available(package) == ("double", "empty", "straight")
    assert f"{package}.straight" not in sys.modules


def test_load_takes_the_class_of_the_file_and_not_an_imported_one(package: str):
    found = registry.load(package, "straight", Base)
    assert found.__name__ == "Straight"
    assert found().act() == 2


@pytest.mark.parametrize(("module", "count"), [("empty", 0), ("double", 2)])
def test_a_file_defines_exactly_one(package: str, module: str, count: int):
    with pytest.raises(TypeError, match=f"defines {count}"):
        registry.load(package, module, Base)


@pytest.mark.parametrize("name", ["base", "_hidden", "absent", ""])
def test_unknown_names_are_refused(package: str, name: str):
    with pytest.raises(InputError, match="known are double, empty, straight"):
        registry.load(package, name, Base)


def test_the_nearest_name_is_suggested():
    with pytest.raises(InputError, match=r"unknown probe 'nonlinarity'.*did you mean 'nonlinearity'"):
        registry.load("transect.probes", "nonlinarity", Probe)


def test_from_outside(monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("outside_things")
    module.Inside, module.Base, module.number = Inside, Base, 7
    monkeypatch.setitem(sys.modules, "outside_things", module)
    assert registry.load("transect.probes", "outside_things:Inside", Base) is Inside
    for wrong in ("outside_things:Base", "outside_things:number", "outside_things:absent", "no_such_module:Inside"):
        with pytest.raises(InputError, match=r"outside_things|no_such_module"):
            registry.load("transect.probes", wrong, Base)


def test_probes_by_attribute():
    assert probes.Nonlinearity is registry.load("transect.probes", "nonlinearity", Probe)
    with pytest.raises(AttributeError, match="probes are ablation, commutativity, contribution, jump"):
        _ = probes.Absent
