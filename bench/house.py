"""`python -m bench house`: size, style and import graph of a checkout, read from its source alone.

A room is a folder or a loose file of a package. Imports inside functions count like all others.
"""

import ast
from collections import defaultdict
from collections.abc import Container, Iterator
from pathlib import Path

from bench.document import table_head, table_row

FOLDERS = {
    "dac_fast": "dac_fast",
    "dac_kernels": "kernels/dac_kernels",
    "bench": "bench",
    "tests": "tests",
}
LONGEST_LINE = 100

Function = ast.FunctionDef | ast.AsyncFunctionDef
Graph = dict[str, set[str]]


def markdown(root: Path) -> str:
    """The figures per folder; the circles between modules and rooms; the arrows between rooms."""
    columns = {name: figures(root / folder) for name, folder in FOLDERS.items()}
    lines = table_head(["", *columns])
    for figure in columns["bench"]:
        lines.append(table_row([figure, *(str(column[figure]) for column in columns.values())]))
    modules = imports(root)
    rooms: Graph = defaultdict(set)
    for module, others in modules.items():
        rooms[room(module)] |= {room(other) for other in others} - {room(module)}
    for kind, graph in (("modules", modules), ("rooms", rooms)):
        found = circles(graph)
        lines += ["", f"Circles between {kind}: {len(found)}"]
        lines += [f"- {' ↔ '.join(circle)}" for circle in found]
    lines += ["", f"Arrows between rooms: {sum(map(len, rooms.values()))}", ""]
    lines += table_head(["room", "imports"])
    lines += [table_row([name, ", ".join(sorted(rooms[name]))]) for name in sorted(rooms)]
    return "\n".join(lines)


def figures(folder: Path) -> dict[str, int]:
    """What is counted in the Python files of a folder."""
    files = sorted(folder.rglob("*.py"))
    texts = [path.read_text() for path in files]
    widths = [len(line) for text in texts for line in text.splitlines()]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    packed = [packed_names(node) for node in nodes]
    functions = [node for node in nodes if isinstance(node, Function) and not is_kernel(node)]
    return {
        "files": len(files),
        "loose files": sum(path.parent == folder and path.stem != "__init__" for path in files),
        "lines": len(widths),
        "lines of the longest file": max(len(text.splitlines()) for text in texts),
        "longest line": max(widths),
        f"lines over {LONGEST_LINE}": sum(width > LONGEST_LINE for width in widths),
        "packed assignments of 2 names": packed.count(2),
        "packed assignments of more": sum(count > 2 for count in packed),
        "functions": len(functions),
        "untyped arguments": sum(map(untyped_arguments, functions)),
        "untyped returns": sum(f.returns is None and f.name != "__init__" for f in functions),
    }


def is_kernel(function: Function) -> bool:
    """Whether Triton compiles the function: its arguments have no Python types."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def untyped_arguments(function: Function) -> int:
    """How many arguments have no annotation, `self` and `cls` apart."""
    a = function.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return sum(x.annotation is None and x.arg not in ("self", "cls") for x in arguments)


def packed_names(node: ast.AST) -> int:
    """How many names one statement gives a value each; taking one value apart does not count."""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
        return 0
    several = isinstance(node.value, ast.Tuple | ast.List | ast.GeneratorExp | ast.ListComp)
    return len(node.targets[0].elts) if several else 0


def imports(root: Path) -> Graph:
    """Per module of the three packages, the modules of theirs that it imports."""
    paths = {}
    for package in ("dac_fast", "dac_kernels", "bench"):
        folder = root / FOLDERS[package]
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            paths[".".join(parts).removesuffix(".__init__")] = path
    return {module: set(imported(path, paths)) - {module} for module, path in paths.items()}


def imported(path: Path, known: Container[str]) -> Iterator[str]:
    """The known modules that a file imports; all imports here are absolute ones."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                # The name is a module of a package, or something in a module.
                candidates = (f"{node.module}.{alias.name}", f"{node.module}")
                yield from [name for name in candidates if name in known][:1]


def room(module: str) -> str:
    """`dac_fast.model` of `dac_fast.model.layers`."""
    return ".".join(module.split(".")[:2])


def circles(graph: Graph) -> list[list[str]]:
    """The sets of nodes that all reach each other."""
    reach = {node: reachable(graph, node) for node in graph}
    found = {
        frozenset(other for other in reach[node] if node in reach[other])
        for node in graph
        if node in reach[node]
    }
    return sorted(map(sorted, found))


def reachable(graph: Graph, start: str) -> set[str]:
    """The nodes that one gets to from a node by one arrow or more."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found
