"""The house stays in order: no circle of imports, one place for each option, help texts without torch."""

import ast
from pathlib import Path

import flashar_pl

ROOT = Path(flashar_pl.__file__).parent
MODULES = {
    ".".join(("flashar_pl", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, inside functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    found = {each for each in found if each in MODULES}
    # a package that is named only on the way to one of its modules is no arrow of its own
    return {each for each in found if not any(other.startswith(f"{each}.") for other in found)} - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach one another (strongly connected components of more than one)."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def test_circles_are_found() -> None:
    """The test below must be able to fail."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_modules_import_one_another() -> None:
    assert circles({name: imports(name) for name in MODULES}) == []


def test_weights_are_read_and_written_in_one_room() -> None:
    """Others may write what they alone read: Lightning's file of a run, parts of features."""
    calls = {"load_file", "save_file", "safe_open", "torch.load", "torch.save", "dcp.load", "dcp.save"}
    found = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                found.add(name)
    rooms = {name for name in found if not name.startswith("flashar_pl.checkpoints.")}
    own = {"training.checkpoints", "evaluate.parts"}
    assert rooms == {"flashar_pl.tensor_files", *(f"flashar_pl.{name}" for name in own)}


def test_every_option_group_is_declared_once() -> None:
    """Two declarations of one option drift apart: another default here, another help text there."""
    shared = {
        *("cfg_scale", "cfg_interval", "top_k", "top_p", "greedy", "temperature", "weights", "n_head", "branch_layer"),
        *("tokenizer", "backbone_class", "device", "dtype", "batch_size", "plan", "runner", "weight_format", "grid"),
        *("assets", "text_encoder", "negative_prompt", "aspect_ratio", "image_size", "devices", "num_nodes"),
    }
    from flashar_pl.cli import COMMANDS, load
    from flashar_pl.commands.arguments import options_of

    homes: dict[str, set[str]] = {name: set() for name in shared}
    for name, command in COMMANDS.items():
        if command.trains:
            continue
        # what `tokenize` calls weights are a tokenizer's, its image size is that of what it writes
        own = {"weights", "tokenizer", "batch_size", "image_size", "grid"} if name.startswith("tokenize") else set()
        for option in options_of(load(command)):
            if option.name in shared - own:
                homes[option.name].add(option.text)
    assert {name: texts for name, texts in homes.items() if len(texts) > 1} == {}
