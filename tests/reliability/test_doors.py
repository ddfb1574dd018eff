"""Nothing that a file says is imported, executed, fetched or written to: one test for each door."""

import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import save_file

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.opening import open_checkpoint
from flashar_pl.checkpoints.runs import RunCheckpoint
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.cli import main
from flashar_pl.commands.convert import ConvertOptions, convert
from flashar_pl.data.datamodules import CodesDataModule
from flashar_pl.data.encode import check_own, decoder_of, with_weights
from flashar_pl.data.locations import locked
from flashar_pl.data.shards import ConditionSpec, Manifest, ShardWriter
from flashar_pl.data.tars import tar_records
from flashar_pl.data.tokenise import _alone
from flashar_pl.decoding.prompts import find_assets
from flashar_pl.evaluate.identity import SETTINGS
from flashar_pl.evaluate.parts import PartFolder
from flashar_pl.evaluate.reference import load_reference_images
from flashar_pl.files import write_json
from flashar_pl.mark import key_file, marked, own, sign
from flashar_pl.options import ModelOptions
from flashar_pl.tensor_files import read_arrays, read_tensors, read_torch
from flashar_pl.text_files import read_yaml
from flashar_pl.training.carried import carried
from flashar_pl.training.lightning_cli import ExperimentCLI
from flashar_pl.training.module import FlashARModule
from flashar_pl.training.run_directory import only_one
from flashar_pl.training.stored_config import CONFIG_KEY, flatten
from flashar_pl.training.words import Words

SIZES = {"dim": 16, "n_layer": 2, "n_head": 2, "multiple_of": 8, "vocab_size": 8, "num_classes": 3}
RUN = {
    "seed_everything": 3,
    "model": {"backbone": {"options": SIZES}, "flashar": {"branch_layer": 1}, "optimiser": {"lr": 0.01}},
    "data": {"shards": "shards", "batch_size": 4, "validation_batch_size": 5},
    "trainer": {"default_root_dir": "run", "max_steps": 1, "accelerator": "cpu", "limit_val_batches": 1},
}
EVIL = "from pathlib import Path\n\ndef call(*_, **__):\n    Path('DONE').touch()\n\ncall()\n"
"""A module that leaves a trace when it is imported, and again when its function is called."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with shards and a run of one step."""
    place = tmp_path_factory.mktemp("doors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        condition = ConditionSpec("class", num_classes=3)
        with ShardWriter(
            "shards", name="x", tokenizer={"kind": "pixels", "levels": 8}, grid=(4, 4), vocabulary=8,
            condition=condition, block=4,
        ) as writer:  # fmt: skip
            for split in ("train", "validation"):
                codes = (np.arange(8 * 16).reshape(8, 4, 4) + (split == "train")) % 8
                writer.write(split, codes, ids=range(8), labels=np.arange(8) % 3)
        Path("evil.py").write_text(EVIL)
        Path("run.yaml").write_text(yaml.safe_dump(RUN))
        assert main(["fit", "--config", "run.yaml"]) == 0
        patch.undo()
    return place


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same directory as the current one, with the module `evil` within reach; it must not have been used."""
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    before = {path.name for path in home.iterdir()}
    yield home
    assert "evil" not in sys.modules
    assert {path.name for path in home.iterdir()} - before <= {"foreign.ckpt", "runs"}, "it has left traces"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("flashar_pl.training.lightning_cli.rank_zero_info", lines.append)
    return lines


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a configuration with another value at a dotted key."""
    name, _, rest = key.partition(".")
    return {**config, name: changed(config.get(name) or {}, rest, value) if rest else value}


def stranger(*doors: str) -> str:
    """The run's checkpoint as a stranger gives it, with the values of some doors in its configuration."""
    [file] = Path("run/checkpoints").iterdir()
    content = torch.load(file, weights_only=True)
    config = yaml.safe_load(content[CONFIG_KEY])
    for door in doors:
        config = changed(config, *DOORS[door])
    torch.save({**content, CONFIG_KEY: yaml.safe_dump(config)}, "foreign.ckpt")
    return "foreign.ckpt"


def called(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": kind, "init_args": arguments}


DOORS = {
    "pipe": ("data.shards", "pipe:touch DONE; cat shards/{path}"),
    "a url": ("data.shards", "file:///tmp/shards"),
    "data by string": ("data", "evil.call"),
    "data by class_path": ("data", called("evil.call")),
    "a function by string": ("data.text_encoder", "evil.call"),
    "a path of prompts": ("data.prompts", "/etc"),
    "a path of a cache": ("data.cache", "DONE"),
    "a logger": ("trainer.logger", called("lightning.pytorch.loggers.CSVLogger", save_dir="DONE")),
    "a logger by string": ("trainer.logger", "evil.call"),
    "a callback": (
        "trainer.callbacks",
        [called("lightning.pytorch.callbacks.LambdaCallback", on_validation_start="evil.call")],
    ),
    "a callback by string": ("trainer.callbacks", ["evil.call"]),
    "a strategy by string": ("trainer.strategy", "evil.call"),
    "a profiler": (
        "trainer.profiler",
        called("lightning.pytorch.profilers.SimpleProfiler", dirpath="DONE", filename="p"),
    ),
    "a run directory": ("trainer.default_root_dir", "DONE"),
    "a backbone": ("model.backbone", called("evil.call")),
    "weights to start from": ("model.init_from", "/etc/passwd"),
    "features": ("model.validation", {"features": "/etc", "samples": 4}),
    "a word as a number": ("data.num_workers", "evil.call"),
    "a tag": ("trainer.max_steps", {"!!python/name:evil.call": 1}),
}
"""Key of a configuration, and a value that would do something."""


@pytest.mark.parametrize("door", DOORS)
def test_nothing_but_numbers_and_known_words_comes_from_a_checkpoint(door: str) -> None:
    described = {"kind": "llamagen", **SIZES, "condition": "evil.call", "norm_eps": "1e-5 # x"}
    taken = flatten(
        carried("foreign.ckpt", changed(RUN, *DOORS[door]), described, FlashARModule, CodesDataModule, Words((), ()))
    )
    words = {"data.class_path": "flashar_pl.data.datamodules.CodesDataModule", "model.backbone.kind": "llamagen"}
    for key, value in taken.items():
        assert value in (None, {}) or isinstance(value, int | float) or words.get(key) == value, key
    assert taken["model.backbone.options.dim"] == 16
    assert taken["seed_everything"] == 3


def test_sizes_of_a_checkpoint_take_no_memory_and_lists_of_numbers_are_taken() -> None:
    """A list of numbers was lost, so that milestones became a cosine; a million processes were taken."""
    config = changed(changed(RUN, "model.schedule", {"milestones": [0.5], "gamma": 0.1}), "data.num_workers", 10**6)
    described = {"kind": "llamagen", **SIZES}
    taken = carried("foreign.ckpt", config, described, FlashARModule, CodesDataModule, Words((), ()))
    assert taken["model"]["schedule"] == {"milestones": [0.5], "gamma": 0.1}
    assert "num_workers" not in taken["data"]["init_args"]
    for sizes in ({"grid_images": 10**12}, {"grid_images": 1, "sample_batch": 10**12}):
        with pytest.raises(ValueError, match="held in memory"):
            FlashARModule({"options": SIZES}, validation=sizes)


CLASSES = ("pipe", "a path of prompts", "a path of a cache", "a logger", "a callback", "a profiler", "a run directory",
           "a backbone", "weights to start from", "features")  # fmt: skip
STRINGS = ("a url", "a function by string", "a logger by string", "a callback by string", "a strategy by string",
           "a word as a number", "a tag")  # fmt: skip


@pytest.mark.parametrize("doors", [CLASSES, STRINGS, ("data by string",)], ids=("classes", "strings", "data"))
def test_what_a_checkpoint_names_is_told_and_not_done(place: Path, said: list[str], doors: tuple[str, ...]) -> None:
    """Guards `validate --ckpt_path FILE`, which ran the shell command that FILE named as its shards."""
    with pytest.raises(ValueError, match=r"Type what you trust of it, such as --data\.shards DIRECTORY") as error:
        ExperimentCLI("validate", ["--ckpt_path", stranger(*doors)])
    assert str(DOORS[doors[0]][1]) in str(error.value)
    command = ExperimentCLI("validate", ["--ckpt_path", "foreign.ckpt", "--data.shards", "shards"])
    command.run()
    for key, _ in [DOORS[door] for door in doors]:
        assert key == "data.shards" or any(line.strip().startswith(f"--{key}") for line in said), key
    assert command.values["model"]["flashar"]["branch_layer"] == 1
    assert "data" in doors[0] or command.values["data"]["validation_batch_size"] == 5


def test_a_run_directory_continues_itself_where_its_owner_has_written_it(place: Path, said: list[str]) -> None:
    """Guards the way back: what the user's own command wrote is taken whole, of a stranger's directory only numbers."""
    [file] = Path("run/checkpoints").iterdir()
    config = Path("run/config.yaml")
    text = config.read_text()
    assert key_file().stat().st_mode & 0o777 == 0o600
    try:
        assert ExperimentCLI("fit", ["--ckpt_path", str(file)]).values["trainer"]["max_steps"] == 1
        for other in (own(text), text.replace("max_steps: 1", "max_steps: 2"), text + "trainer: {}\n"):
            config.write_text(other)
            with pytest.raises(ValueError, match=r"take it all: --config \S+run/config\.yaml"):
                ExperimentCLI("fit", ["--ckpt_path", str(file)])
        config.write_text(own(text))
        assert ExperimentCLI("fit", ["--ckpt_path", str(file), "--config", str(config)]).checkpoint
    finally:
        config.write_text(text)


@pytest.mark.parametrize("name", ["best_model_path", "last_model_path"])
def test_a_checkpoint_names_no_file_to_remove(place: Path, tmp_path: Path, name: str) -> None:
    """Guards what ModelCheckpoint removes when it saves the next one: it took the path from the checkpoint, and `..`
    in it led anywhere."""
    [file] = Path("run/checkpoints").iterdir()
    content = torch.load(file, weights_only=True)
    victim, folder = tmp_path / "victim", tmp_path / "own" / "checkpoints"
    victim.mkdir()
    [state] = [state for key, state in content["callbacks"].items() if key.startswith("ModelCheckpoint")]
    state |= {"dirpath": str(folder), name: f"{folder}/../../victim"}
    torch.save(content, "foreign.ckpt")
    words = ["--config", "run.yaml", "--ckpt_path", "foreign.ckpt", "--trainer.max_steps", "2"]
    save = "{class_path: ModelCheckpoint, init_args: {save_last: true}}"
    ExperimentCLI(
        "fit", [*words, "--trainer.default_root_dir", str(tmp_path / "own"), f"--trainer.callbacks=[{save}]"]
    ).run()
    assert victim.exists()


def test_a_run_without_a_place_for_the_key_has_no_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert marked("a: 1\n") == "a: 1\n"
    assert own("a: 1\n") is None


# --- paths in a checkpoint -------------------------------------------------------------------------------------------


def with_paths(place: Path, vq: str, **training: Any) -> Path:
    """A converted model that names a tokenizer's file."""
    model = tiny.flashar(vocab_size=17)
    note = Description(model.config(), (4, 4), {"kind": "vq16", "weights": vq}, training)
    save_model(place, model, note)
    return place


@pytest.fixture
def another(empty: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes this process one of another user."""
    return lambda: monkeypatch.setenv("XDG_STATE_HOME", str(empty / "another"))


def test_a_tokenizer_that_a_stranger_names_is_not_opened(empty: Path, vq: str, another, monkeypatch) -> None:
    """Guards `generate` on a downloaded model, which opened whatever path it says; own models go on working."""
    place = with_paths(empty / "model", vq)
    assert open_checkpoint(ModelOptions(str(place))).need_tokenizer()["weights"] == vq
    another()
    opened = []
    monkeypatch.setattr("flashar_pl.tokenizers.build_tokenizer", opened.append)
    source = open_checkpoint(ModelOptions(str(place)))
    with pytest.raises(ValueError, match=rf"names '{vq}' as its tokenizer.*--tokenizer vq16:{vq}"):
        source.matching_tokenizer("cpu")
    assert opened == []
    typed = open_checkpoint(ModelOptions(str(place), tokenizer=f"vq16:{vq}"))
    assert typed.need_tokenizer() == {"kind": "vq16", "weights": vq}


def test_converting_does_not_make_a_path_ones_own(empty: Path, vq: str, another, capsys) -> None:
    """Guards a stranger's path that gets this user's mark on its way; what the user types gets it."""
    place = str(with_paths(empty / "model", vq))
    another()
    convert(ModelOptions(place), ConvertOptions("again"))
    assert "to be typed where it is used" in capsys.readouterr().err
    with pytest.raises(ValueError, match="names"):
        open_checkpoint(ModelOptions("again")).need_tokenizer()
    convert(ModelOptions(place, tokenizer=f"vq16:{vq}"), ConvertOptions("trusted"))
    assert open_checkpoint(ModelOptions("trusted")).need_tokenizer()["weights"] == vq


@pytest.mark.parametrize("name", ["vq.pt", "../vq.pt", "link.pt", "sub/vq.pt"])
def test_a_tokenizer_inside_a_strangers_directory_is_opened(empty: Path, vq: str, name: str, another) -> None:
    """By its relative path; a path or a link that leads out of the directory is not."""
    place = with_paths(empty / "model", name)
    (place / "sub").mkdir()
    for file in (place / "vq.pt", place / "sub" / "vq.pt", empty / "vq.pt"):
        file.write_bytes(Path(vq).read_bytes())
    (place / "link.pt").symlink_to(empty / "vq.pt")
    another()
    source = open_checkpoint(ModelOptions(str(place)))
    if name in ("vq.pt", "sub/vq.pt"):
        assert source.need_tokenizer()["weights"] == str(place / name)
    else:
        with pytest.raises(ValueError, match=f"names '{name}'"):
            source.need_tokenizer()


def with_manifest(place: Path, **tokenizer: Any) -> Path:
    """Shards whose manifest names the files of a tokenizer."""
    condition, sizes = ConditionSpec("class", num_classes=3), {"grid": (4, 4), "vocabulary": 8}
    with ShardWriter(place, name="x", tokenizer={"kind": "vq16", **tokenizer}, condition=condition, **sizes) as writer:
        writer.write("train", np.arange(32).reshape(2, 4, 4) % 8, ids=range(2), labels=[0, 1])
    return place


def settled(place: Path) -> Any:
    """The weights of a manifest that is trusted."""
    manifest = Manifest.load(place)
    check_own(manifest, "add --it FILE")
    return manifest.tokenizer["weights"]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "~/vq.pt", "../vq.pt", "link.pt", "loop", "pipe:touch DONE", "http://host/vq.pt", "x" * 300]
)
def test_a_tokenizer_that_a_strangers_manifest_names_is_not_opened(empty: Path, another, name: str) -> None:
    """Guards `fit`, `report` and `tokenize check` on other people's shards, which opened what they name."""
    with_manifest(empty / "set", weights=name)
    (empty / "vq.pt").touch()
    (empty / "set" / "link.pt").symlink_to(empty / "vq.pt")
    (empty / "set" / "loop").symlink_to("loop")
    assert settled(empty / "set") == name
    another()
    manifest = Manifest.load(empty / "set")
    with pytest.raises(ValueError, match=rf"manifest\.json of .*set names '{re.escape(name)}'.*add --it FILE"):
        check_own(manifest, "add --it FILE")
    for use in (lambda: decoder_of(manifest), lambda: load_reference_images(str(empty / "set"), "train", None)):
        with pytest.raises(ValueError, match="names"):
            use()
    typed = with_weights(manifest, "mine.pt")
    check_own(typed, "")
    assert typed.tokenizer == {"kind": "vq16", "weights": "mine.pt"}
    manifest.save(empty / "set")
    with pytest.raises(ValueError, match="names"):  # writing it again does not make it one's own
        settled(empty / "set")


def test_a_tokenizer_inside_a_data_set_travels_with_it(empty: Path, another) -> None:
    (empty / "set").mkdir()
    (empty / "vq.pt").touch()
    manifest = Manifest.load(with_manifest(empty / "made", weights=str(empty / "set" / "own" / "vq.pt")))
    (empty / "set" / "own").mkdir()
    (empty / "set" / "own" / "vq.pt").touch()
    assert json.loads(manifest.save(empty / "set").read_text())["tokenizer"]["weights"] == "own/vq.pt"
    (empty / "set").rename(empty / "moved")
    another()
    assert settled(empty / "moved") == str(empty / "moved" / "own" / "vq.pt")


def test_training_on_a_strangers_shards_does_not_make_its_paths_ones_own(home: Path, another, monkeypatch) -> None:
    module = FlashARModule.load_from_checkpoint(next((home / "run" / "checkpoints").iterdir()))
    with_manifest(Path("set"), weights="/etc/passwd")
    for marks in (1, 0):
        data = SimpleNamespace(manifest=Manifest.load("set"))
        monkeypatch.setattr(FlashARModule, "trainer", SimpleNamespace(global_step=0, datamodule=data))
        assert len(module.description().to_dict().get("marks", {})) == marks
        another()


def test_prompts_and_references_that_a_stranger_names_are_not_opened(empty: Path, vq: str, another) -> None:
    place = with_paths(empty / "model", vq, prompts="/etc")
    assert open_checkpoint(ModelOptions(str(place))).description.strange == frozenset()
    another()
    source = open_checkpoint(ModelOptions(str(place)))
    with pytest.raises(ValueError, match=r"names '/etc' as its tokenizer of prompts.*--assets /etc"):
        find_assets(source, None)
    with pytest.raises(ValueError, match=r"in elsewhere.*add --assets"):
        find_assets(source, "elsewhere")


def test_a_loaded_module_measures_with_nothing_that_a_stranger_names(place: Path) -> None:
    """Guards `trainer.validate(FlashARModule.load_from_checkpoint(FILE))`, which opened the stored features."""
    content = torch.load(stranger(), weights_only=True)
    content["flashar"]["training"]["settings"]["validation"] |= {"features": "/etc", "samples": 4, "grid_images": 2}
    torch.save(content, "foreign.ckpt")
    with pytest.warns(UserWarning, match="another user's"):
        module = FlashARModule.load_from_checkpoint("foreign.ckpt")
    assert (module.validation.features, module.validation.samples, module.validation.grid_images) == (None, 0, 2)
    content["flashar"]["marks"] = {"/etc": sign("/etc")}
    torch.save(content, "foreign.ckpt")
    assert FlashARModule.load_from_checkpoint("foreign.ckpt").validation.features == "/etc"


def test_a_lock_that_is_a_link_empties_no_file(empty: Path) -> None:
    """Guards `fit`, `evaluate` and `tokenize` in a directory from somebody else: .lock led to a file and emptied it."""
    victim, theirs = empty / "victim", empty / "theirs"
    victim.write_text("mine")
    theirs.mkdir()
    (theirs / ".lock").symlink_to(victim)
    write_json(theirs / SETTINGS, {})
    for hold in (only_one, _alone, locked_below):
        with pytest.raises(ValueError, match=r"\.lock is a link"), hold(theirs):
            raise AssertionError
    with pytest.raises(ValueError, match=r"\.lock is a link"):
        PartFolder(theirs).open({}, 1)
    assert victim.read_text() == "mine"


def locked_below(folder: Path) -> AbstractContextManager[None]:
    return locked(folder / ".lock")


# --- doors that are closed: readers that run nothing ------------------------------------------------------------------


class Pickled:
    """What unpickling would call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("DONE"),)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory in which nothing may be touched."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not Path("DONE").exists()


@pytest.mark.parametrize(
    "read", [read_torch, read_tensors, RunCheckpoint, load_model, FlashARModule.load_from_checkpoint]
)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_torch_files_are_data(empty: Path, read: Callable[..., Any], old: bool) -> None:
    torch.save({"state_dict": {}, "flashar": Pickled()}, "x.ckpt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        read("x.ckpt")


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_numpy_files_are_data(empty: Path, save: Callable[..., None]) -> None:
    with Path("x.npz").open("wb") as file:
        save(file, np.array([Pickled()], dtype=object))
    with pytest.raises(ValueError, match=r"x\.npz"):
        read_arrays("x.npz")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [DONE]", "!!python/name:os.mkdir", "!!python/module:os"]
)
def test_yaml_files_are_data(empty: Path, tag: str) -> None:
    Path("x.yaml").write_text(f"data: !!python/{tag}\n")
    for read in (lambda: read_yaml("x.yaml"), lambda: ExperimentCLI("fit", ["--config", "x.yaml"], parse_only=True)):
        with pytest.raises(ValueError, match=r"x\.yaml.*not YAML"):
            read()


def test_json_names_kinds_of_models_never_what_to_import(empty: Path) -> None:
    Path("model").mkdir()
    for kind in ("os.system", "evil.call"):
        described = {"format": 1, "model": {"kind": "raster", "backbone": {"kind": kind, **SIZES}}}
        Path("model/config.json").write_text(json.dumps(described))
        save_file({name: torch.zeros(1) for name in "abcdef"}, "model/model.safetensors")
        with pytest.raises(ValueError, match="backbone kind is"):
            load_model("model")


def test_tars_are_read_in_place(empty: Path) -> None:
    """Members that lead out of the directory are names of records; links and devices are no members."""
    with tarfile.open("x.tar", "w") as tar:
        for name, kind in (("../DONE", tarfile.REGTYPE), ("/a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.SYMTYPE),
                           ("c.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.CHRTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert [key for key, _ in tar_records(Path("x.tar"))] == ["../DONE", "/a"]
    assert [path.name for path in empty.iterdir()] == ["x.tar"]
