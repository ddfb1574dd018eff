"""Private names of libraries: few, each in one file for its library, and the library still has them.

A name is private if it begins with one underscore. What the package itself defines under such a name is its own.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flashar_pl"
ALLOWED = {
    "training/lightning_private.py": {
        "_ddp_kwargs", "_defer_save_until_validation", "_save_on_train_epoch_end", "_every_n_train_steps",
    },
    "layers/torch_private.py": {
        "_python_dispatch", "_dynamo", "_reorder_linear_weight", "_linear_pointwise", "_int_mm",
    },
    "training/sharded/quantised_adamw.py": {"_new_buffer"},
}  # fmt: skip
"""File -> names. The files say what each is for."""
LIBRARIES = ("lightning", "torch", "torchao", "torchmetrics", "jsonargparse", "webdataset", "argparse")
FORMATTERS = {"_fill_text", "_format_action_invocation"}
"""Methods of argparse's help formatters that are made to be overridden; Python's own formatters override them."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def sources() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Every name that the package defines: functions, classes, arguments, variables and attributes of self."""
    own: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                    own.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    own.add(name)
                case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self")):
                    own.add(name)
    return own


def mentions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of private names in attributes, imports, and text given to getattr and its kind."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if private(name):
                yield node.lineno, name
            case ast.Import(names=aliases):
                yield from ((node.lineno, part) for a in aliases for part in a.name.split(".") if private(part))
            case ast.ImportFrom(module=module, names=aliases) if not (module or "").startswith("flashar_pl"):
                parts = [*(module or "").split("."), *(a.name for a in aliases)]
                yield from ((node.lineno, part) for part in parts if private(part))
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                if private(name):
                    yield node.lineno, name


@cache
def names_in(kind: type) -> frozenset[str]:
    """Private names in the source of a class; classes made in C have none."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        source = " ".join(vars(kind))
    return frozenset(re.findall(r"\b_[a-z]\w*", source))


def inherited(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of private names that a class of the package takes over from a library's class: ones that it reads,
    sets or overrides and that the source of the library's class has."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
    if not classes:
        return
    module = importlib.import_module(
        "flashar_pl." + path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    )
    for node in classes:
        kind = getattr(module, node.name)
        bases = [base for base in kind.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
        theirs = frozenset().union(*map(names_in, bases))
        for inner in ast.walk(node):
            match inner:
                case ast.Attribute(attr=name, value=ast.Name(id="self")) if private(name) and name in theirs:
                    yield inner.lineno, name
                case ast.FunctionDef(name=name) if private(name) and name in theirs:
                    yield inner.lineno, name


def test_private_names_are_in_one_file_for_each_library() -> None:
    trees = sources()
    own, wrong = own_names(trees), []
    for path, tree in trees.items():
        allowed = ALLOWED.get(path, set()) | FORMATTERS
        found = {(line, name) for line, name in mentions(tree) if name not in own} | set(inherited(path, tree))
        wrong += [f"{path}:{line}: {name}" for line, name in sorted(found) if name not in allowed]
    assert not wrong, "private names of a library; use a public one, or move it to the library's file:\n" + "\n".join(
        wrong
    )
    assert sum(len(names) for names in ALLOWED.values()) <= 12
    for path, names in ALLOWED.items():
        unused = names - {name for _, name in mentions(trees[path])}
        assert not unused, f"{path} no longer uses {unused}: take it off the list"


def test_the_scan_finds_what_it_looks_for() -> None:
    tree = ast.parse("import torch._dynamo\nfrom a._b import c\nx._hidden\ngetattr(x, '_other')\nx.__dict__\nx.open")
    assert sorted(name for _, name in mentions(tree)) == ["_b", "_dynamo", "_hidden", "_other"]


# --- the libraries still have them -----------------------------------------------------------------------------------


def test_lightnings_strategy_still_has_its_name() -> None:
    from lightning.pytorch.strategies import DDPStrategy

    from flashar_pl.training.lightning_private import ddp_options

    options = ddp_options(DDPStrategy(static_graph=False))
    assert options == {"static_graph": False}, "DDPStrategy no longer keeps DDP's arguments in _ddp_kwargs"
    strategy = DDPStrategy()
    ddp_options(strategy)["find_unused_parameters"] = True
    assert "_ddp_kwargs" in inspect.getsource(DDPStrategy), "DDPStrategy no longer hands _ddp_kwargs to DDP"
    assert ddp_options(strategy) == {"find_unused_parameters": True}


def test_lightnings_checkpoints_still_have_their_names() -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    text = inspect.getsource(ModelCheckpoint)
    for name in ("_defer_save_until_validation", "_save_on_train_epoch_end"):
        assert text.count(f"self.{name}") > 2, f"ModelCheckpoint no longer decides by {name}"


def test_torch_still_has_its_names() -> None:
    import torch

    from flashar_pl.layers import torch_private

    with torch_private.recompile_limit(3):
        assert torch._dynamo.config.recompile_limit == 3, "torch._dynamo.config has no recompile_limit"
    assert all(issubclass(kind, Exception) for kind in torch_private.compile_errors())
    seen = []

    class Watch(torch_private.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2) + 1
    assert seen, "TorchDispatchMode no longer sees operators"
    if torch.backends.mkldnn.is_available():
        weight, x = torch.randn(24, 16, dtype=torch.float32), torch.randn(3, 16)
        packed = torch_private.pack_linear(weight, 16)
        assert packed is not None, "torch.ops.mkldnn has no _reorder_linear_weight"
        torch.testing.assert_close(torch_private.packed_linear(x, packed), x @ weight.T, atol=1e-4, rtol=1e-4)
    ones = torch.ones(17, 32, dtype=torch.int8)
    assert torch_private.integer_product(ones, ones.T).unique().tolist() == [32]


def test_torchao_still_has_its_name() -> None:
    pytest.importorskip("torchao")
    import torch
    from torchao.optim import AdamW8bit

    optimiser = AdamW8bit([torch.nn.Parameter(torch.zeros(64, 64))])
    buffer = optimiser._new_buffer(optimiser.param_groups[0]["params"][0], True)
    assert buffer.shape == (64, 64), "AdamW8bit._new_buffer no longer makes a moment of a parameter"
