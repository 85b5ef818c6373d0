"""Imports go one way, so that a hub's host needs no torch and a device no vLLM; and importing opens nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import costeer_vllm

PACKAGE = costeer_vllm.__name__
SOURCES = Path(costeer_vllm.__file__).parent

# A part may import from any part on a line above its own, and from no other.
LEVELS = [
    ["__init__"],
    ["errors", "addresses"],
    ["steering", "protocol"],
    ["vocab", "delta", "candidates"],
    ["kernels", "request"],
    ["edge", "hub", "engine"],
    ["serve", "offline"],
    ["processes"],
    ["demo"],
    ["bench"],
    ["cli"],
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def modules() -> dict[str, Path]:
    """Every module's name within the package."""
    names = {}
    for path in sorted(SOURCES.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
        names[name.removesuffix(".__init__")] = path
    return names


def part_of(module: str) -> str:
    return module.partition(".")[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST, top_level_only: bool = False) -> Iterator[str]:
    """Absolute names of all that is imported, at any depth or at import time only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_level_only and is_not_run_at_import(node)):
            yield from imported(node, top_level_only)


def is_not_run_at_import(node: ast.AST) -> bool:
    is_for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return is_for_types or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def own(names: Iterator[str]) -> set[str]:
    """The modules of this package among imported names."""
    known = modules()
    found = set()
    for name in names:
        if part_of(name) != PACKAGE:
            continue
        inner = name.partition(".")[2]
        while inner and inner not in known:
            inner = inner.rpartition(".")[0]
        found.add(inner or "__init__")
    return found


def test_every_module_has_its_place() -> None:
    assert {part_of(module) for module in modules()} == set(LEVEL_OF)


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module: str) -> None:
    part = part_of(module)
    for other in own(imported(tree_of(modules()[module]))):
        target = part_of(other)
        assert target == part or LEVEL_OF[target] < LEVEL_OF[part], f"{module} imports {other}"


def test_no_two_modules_import_each_other_at_import_time() -> None:
    graph = {module: own(imported(tree_of(path), top_level_only=True)) - {module} for module, path in modules().items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


FOREIGN = {
    # Not even inside functions: these parts run where it is not installed.
    "hub": {"torch", "vllm", "numpy", "transformers"},
    "edge": {"vllm"},
    "protocol": {"torch", "vllm", "numpy", "transformers"},
    "delta": {"torch", "vllm", "transformers"},
    "request": {"torch", "vllm", "numpy", "transformers"},
    "steering": {"torch", "vllm", "numpy", "transformers"},
    "vocab": {"torch", "vllm", "numpy", "transformers"},
    "errors": {"torch", "vllm", "numpy", "transformers", "msgspec", "zmq"},
    "kernels": {"vllm", "transformers"},
}


def reached_from(part: str) -> set[str]:
    """The part's modules and all modules of ours that they import, and those import, at any depth."""
    reached: set[str] = set()
    todo = {module for module in modules() if part_of(module) == part}
    while todo:
        reached |= todo
        todo = {other for module in todo for other in own(imported(tree_of(modules()[module])))} - reached
    return reached


@pytest.mark.parametrize("part", FOREIGN)
def test_what_a_part_must_do_without(part: str) -> None:
    for module in reached_from(part):
        names = {part_of(name) for name in imported(tree_of(modules()[module]))}
        assert not names & FOREIGN[part], f"{part} reaches {module}"


def test_only_the_engine_knows_vllm() -> None:
    users = {
        part_of(module) for module, path in modules().items() if "vllm" in {part_of(name) for name in imported(tree_of(path))}
    }
    assert users <= {"engine", "bench"}


REPORT = """
import importlib, json, os, sys, threading
for module in sys.argv[1:]:
    importlib.import_module(module)
files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]
zmq = sys.modules.get("zmq")
print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "threads": [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()],
    "sockets": [file for file in files if file.startswith("socket:")],
    "context": bool(zmq and zmq.Context._instance),
    "environment": sorted(name for name in os.environ if name.startswith("COSTEER_")),
}))
"""


def after_importing(*names: str) -> dict[str, list[str]]:
    """What a fresh interpreter has after the imports."""
    run = subprocess.run([sys.executable, "-c", REPORT, *names], capture_output=True, text=True, check=True, timeout=60)
    report: dict[str, list[str]] = json.loads(run.stdout)
    return report


HEAVY = {"torch", "vllm", "numpy", "transformers"}


def test_the_package_itself_is_light() -> None:
    foreign = {"msgspec", "zmq", "fastapi", "httpx", "websockets", "typer", "rich", "prometheus_client"} | HEAVY
    assert not foreign & set(after_importing(PACKAGE)["modules"])


def test_a_hub_needs_neither_torch_nor_numpy_nor_vllm() -> None:
    assert not HEAVY & set(after_importing(f"{PACKAGE}.hub.app")["modules"])


def test_the_command_line_loads_only_what_its_command_needs() -> None:
    assert not (HEAVY | {"zmq", "fastapi", "websockets"}) & set(after_importing(f"{PACKAGE}.cli")["modules"])


def test_the_plugin_that_every_vllm_process_loads_is_light() -> None:
    """vLLM imports it everywhere, also in servers that steer nothing."""
    assert not (HEAVY | {"zmq", "httpx", "msgspec"}) & set(after_importing(f"{PACKAGE}.engine.hooks")["modules"])


def loads(module: str) -> set[str]:
    """The foreign packages that importing a module loads directly or through modules of ours."""
    names = set(imported(tree_of(modules()[module]), top_level_only=True))
    foreign = {part_of(name) for name in names}
    return foreign.union(*(loads(other) for other in own(iter(names)) - {module}))


def test_importing_opens_no_socket_and_starts_no_thread() -> None:
    light = [module for module in modules() if not {"torch", "vllm"} & loads(module)]
    assert {"edge.worker", "hub.app", "engine.link", "engine.hooks", "cli", "processes"} <= set(light)
    report = after_importing(*(f"{PACKAGE}.{module}" for module in light))
    assert {"zmq", "msgspec", "fastapi", "websockets", "httpx"} <= set(report["modules"])  # it was not for want of trying
    for opened in ("threads", "sockets", "context", "environment"):
        assert not report[opened], report


def test_nothing_is_done_at_import_but_defining() -> None:
    """Calls at module level are the kind that makes a value: no thread, no socket, no process, no file."""
    forbidden = {"Thread", "Popen", "run", "socket", "Context", "open", "connect", "install", "basicConfig", "putenv", "seed"}
    for module, path in modules().items():
        for statement in tree_of(path).body:
            if isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign)):
                calls = [node.func for node in ast.walk(statement) if isinstance(node, ast.Call)]
                names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
                assert not names & forbidden, f"{module}, line {statement.lineno}"
