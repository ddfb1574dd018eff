"""Plants small faults in the core, one at a time, and asks its tests: `make mutants`.

    python tests/mutants.py [--sample 60] [--seed 0] [--only sampling.py] [--out mutants.json]

Each fault changes one operator, constant or condition of a file of CORE in a copy of the checkout. A fault that the
tests of that file do not see survives, and is printed; it is either one that changes nothing (say, < for <= where
equality cannot happen) or a hole in the tests.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch  # noqa: F401
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).parents[1]
CORE = {
    "flashar_pl/grid.py": ["tests/grid", "tests/backbones/test_masks.py", "tests/decoding/test_fast_equals_slow.py"],
    "flashar_pl/sampling.py": ["tests/sampling", "tests/decoding/test_generate.py"],
    "flashar_pl/models/losses.py": ["tests/models/test_losses.py", "tests/models/test_flashar.py"],
    "flashar_pl/training/stages.py": ["tests/training/test_stages.py", "tests/training/test_module.py"],
    "flashar_pl/training/optim.py": [
        "tests/training/test_stages.py", "tests/training/test_resume.py::test_settings_of_the_optimiser_may_change",
    ],
    "flashar_pl/training/save_point.py": ["tests/training/test_save_point.py", "tests/training/test_stopping.py"],
    "flashar_pl/training/whole_steps.py": ["tests/training/test_intervals.py"],
    "flashar_pl/training/averaging.py": [
        "tests/training/test_module.py::test_averages_move_once_per_optimiser_step",
        "tests/training/test_resume.py::test_averaging_may_begin_and_end_on_resume", "tests/training/test_lora.py",
    ],
    "flashar_pl/training/finite.py": ["tests/training/test_finite.py"],
    "flashar_pl/data/order.py": ["tests/data/test_data_order.py", "tests/data/test_data_loader.py"],
    "flashar_pl/data/batches.py": ["tests/data/test_grids.py", "tests/data/test_mixture.py"],
    "flashar_pl/data/mixture.py": ["tests/data/test_mixture.py"],
    "flashar_pl/data/reader.py": ["tests/data/test_shards.py"],
    "flashar_pl/checkpoints/safetensors_files.py": [
        "tests/checkpoints/test_damage.py", "tests/reliability/test_checkpoints.py",
        "tests/backbones/test_emu35_weights.py",
    ],
    "flashar_pl/training/sharded": [
        "tests/training/test_fsdp_units.py", "tests/training/test_fsdp.py", "tests/training/test_fsdp_moments.py",
    ],
}  # fmt: skip
"""Files, or folders of them, and the tests that must notice a fault there."""
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Faulty forms of one node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand
    if isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)


def skipped(node: ast.AST) -> bool:
    """Messages, checks of arguments that only word an error, and annotations: no fault of theirs is one of the core."""
    return isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.arg | ast.Import | ast.ImportFrom)


def sites(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, place in a list) of every node that may be replaced."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not skipped(child):
                yield tree, name, i
                yield from sites(child)


def faults(path: Path) -> list[tuple[int, str, str, str]]:
    """(line, before, after, whole source) of every fault that can be planted in a file."""
    tree = ast.parse(path.read_text())
    found = []
    for parent, name, i in list(sites(tree)):
        field = getattr(parent, name)
        node = field if i is None else field[i]
        for other in variants(node):
            other = ast.copy_location(copy.deepcopy(other), node)
            if i is None:
                setattr(parent, name, other)
            else:
                field[i] = other
            text = ast.unparse(ast.fix_missing_locations(tree))
            found.append((node.lineno, ast.unparse(node), ast.unparse(other), text))  # type: ignore[attr-defined]
            if i is None:
                setattr(parent, name, node)
            else:
                field[i] = node
    return found


def passes(place: Path, tests: list[str], timeout: float) -> bool | None:
    """Whether the tests pass in a checkout; None = they did not end in time. In a fork, which has torch already."""
    child = os.fork()
    if not child:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        os.chdir(place)
        os.environ.update(PYTHONPATH=str(place), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        sys.dont_write_bytecode = True
        sys.path[:0] = [str(place)]
        try:
            os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
        finally:
            os._exit(1)
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant faults in the core and ask its tests.")
    parser.add_argument("--sample", type=int, default=60, help="number of faults in all, spread over the files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path has this, a regular expression")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one fault")
    parser.add_argument("--out", type=Path, default=None, help="JSON of every fault and what became of it")
    asked = parser.parse_args()
    files = {
        str(path.relative_to(ROOT)): tests
        for place, tests in CORE.items()
        for path in ([ROOT / place] if place.endswith(".py") else sorted((ROOT / place).glob("*.py")))
        if re.search(asked.only, str(path.relative_to(ROOT))) and path.name != "__init__.py"
    }
    chosen = []
    for number, name in enumerate(files):
        here = faults(ROOT / name)
        share = (number + 1) * asked.sample // len(files) - number * asked.sample // len(files)
        chosen += [(name, *fault) for fault in random.Random(asked.seed).sample(here, min(share, len(here)))]
    random.Random(asked.seed).shuffle(chosen)  # so that a run that is stopped has some of every file
    assert not any(name.startswith("flashar_pl") for name in sys.modules), "forks must import the faulty files"
    results = []
    with tempfile.TemporaryDirectory(prefix="mutants") as scratch:
        place = Path(scratch) / "checkout"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "data/digits"))
        for tests in {tuple(tests) for tests in files.values()}:
            if not passes(place, list(tests), 2 * asked.timeout):
                raise SystemExit(f"{' '.join(tests)} fails without a fault")
        for name, line, before, after, text in chosen:
            original = (place / name).read_text()
            (place / name).write_text(text)
            start, outcome = time.monotonic(), passes(place, files[name], asked.timeout)
            (place / name).write_text(original)
            state = {True: "survived", False: "killed", None: "timeout"}[outcome]
            result = {"file": name, "line": line, "before": before, "after": after, "state": state}
            results.append(result | {"seconds": round(time.monotonic() - start, 1)})
            if outcome or outcome is None:
                print(f"{state}: {name}:{line}: {before}  ->  {after}", flush=True)
            if asked.out:
                asked.out.write_text(json.dumps(results, indent=1) + "\n")
    counts = {state: sum(each["state"] == state for each in results) for state in ("killed", "timeout", "survived")}
    print(json.dumps({"faults": len(results), **counts}))


if __name__ == "__main__":
    main()
