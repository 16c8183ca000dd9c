"""The house rules, checked on every module: layering, sizes, docstrings, no prints."""

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("blip_core", "storage", "flows")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in MODULES]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

FORBIDDEN = {
    "blip_core": {"storage", "flows", "prefect", "duckdb", "pyarrow", "pandas", "fsspec", "rich"},
    "storage": {"blip_core", "flows", "prefect", "torch", "timm", "transformers"},
    "flows": set(),
}
BARE_MACHINE = {
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "PIL",
    "blip_core",
}
"""All that blip_core may need when it is imported: a GPU box has no more."""

PREFECT_MODULES = {
    "flows/artifacts.py",
    "flows/bootstrap.py",
    "flows/progress.py",
    "flows/stages.py",
    "flows/tasks.py",
}
"""The seam inside the seam: steps, settings and commands do not know Prefect."""


@pytest.fixture(params=MODULES, ids=IDS)
def module(request: pytest.FixtureRequest) -> Path:
    return request.param


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name.split(".")[0], node
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], node


def test_imports_point_one_way(module: Path) -> None:
    package = module.relative_to(ROOT).parts[0]
    wrong = {name for name, _ in _imports(_tree(module))} & FORBIDDEN[package]
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_only_the_seam_imports_prefect(module: Path) -> None:
    if "prefect" in {name for name, _ in _imports(_tree(module))}:
        assert str(module.relative_to(ROOT)) in PREFECT_MODULES


def test_blip_core_imports_on_a_bare_machine(module: Path) -> None:
    if module.relative_to(ROOT).parts[0] != "blip_core":
        return
    stdlib = set(importlib.import_module("sys").stdlib_module_names)
    top_level = [
        node for node in _tree(module).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    needed = {name for node in top_level for name, _ in _imports(node)}
    assert needed <= stdlib | BARE_MACHINE, f"{module}: {sorted(needed - stdlib - BARE_MACHINE)}"


def test_files_and_functions_stay_short(module: Path) -> None:
    lines = module.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{module}: {lines} lines"
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            assert size <= MAX_FUNCTION_LINES, f"{module}:{node.lineno} {node.name}: {size} lines"


def test_modules_say_what_they_are_for(module: Path) -> None:
    assert ast.get_docstring(_tree(module)), f"{module} has no docstring"


def test_nothing_prints(module: Path) -> None:
    calls = (node for node in ast.walk(_tree(module)) if isinstance(node, ast.Call))
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


@pytest.mark.parametrize("package", ["blip_core", "storage"])
def test_public_names_exist_are_sorted_and_documented(package: str) -> None:
    public = importlib.import_module(package)
    assert list(public.__all__) == sorted(public.__all__)
    for name in public.__all__:
        value = getattr(public, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{package}.{name} has no docstring"


def test_direct_dependencies_are_imported_somewhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    used = {name.lower() for path in MODULES for name, _ in _imports(_tree(path))}
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=\[ ;]", requirement)[0].lower()
        module = {"pillow": "pil", "pyyaml": "yaml", "tensorboard": "torch", "fastapi": "prefect"}
        imported = module.get(name, name.replace("-", "_"))
        assert imported in used, f"{name} is declared but never imported"


def test_every_lock_line_is_an_exact_version() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.!\-]+", pin) for pin in pins)
    assert "dataclasses" not in {pin.split("==")[0].lower() for pin in pins}
