"""`flashar fit`, `validate`, `test`, `predict`: run directory, stored configuration, precedence, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_toys import tiny_backbone

from flashar_pl.data.shards import Manifest, ShardWriter
from flashar_pl.mark import own
from flashar_pl.training.logger import RunLogger
from flashar_pl.training.module import FlashARModule
from flashar_pl.training.run_directory import continued
from flashar_pl.training.stored_config import CONFIG_KEY, read_config
from flashar_pl.training.words import Words

TINY = {"dim": 16, "n_layer": 2, "n_head": 2, "multiple_of": 8, "vocab_size": 17, "num_classes": 10}
SAVE = {"filename": "last", "every_n_train_steps": 2, "enable_version_counter": False}
RASTER = {
    "seed_everything": 1,
    "trainer": {
        "default_root_dir": "runs/raster",
        "max_steps": 4,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 1,
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": SAVE}],
    },
    "model": {"backbone": {"options": TINY}, "optimiser": {"lr": 0.01}},
    "data": {"shards": "digits", "batch_size": 32, "validation_batch_size": 50},
}


def change(config: dict, **changes) -> dict:
    """A copy with dotted keys (written with __) replaced."""
    copy = json.loads(json.dumps(config))
    for key, value in changes.items():
        *path, last = key.split("__")
        inner = copy
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return copy


@pytest.fixture(scope="session")
def trained(tmp_path_factory, shards) -> Path:
    """A directory with raster.yaml, flashar.yaml and a run of each, made by `flashar fit`."""
    from flashar_pl.cli import main

    place = tmp_path_factory.mktemp("trained")
    raster = change(RASTER, data__shards=shards)
    flashar = change(
        raster,
        trainer__default_root_dir="runs/flashar",
        model__flashar={"branch_layer": 1},
        model__init_from="runs/raster/checkpoints/last.ckpt",
    )
    before = Path.cwd()
    os.chdir(place)
    try:
        for name, config in (("raster", raster), ("flashar", flashar)):
            Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
            assert main(["fit", "--config", f"{name}.yaml"]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def runs(trained, tmp_path, monkeypatch) -> Path:
    """A private copy of `trained`, as the current directory."""
    place = tmp_path / "work"
    shutil.copytree(trained, place)
    monkeypatch.chdir(place)
    return place


def listing(place: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(place.rglob("*")) if p.is_file()}


LAST = "runs/raster/checkpoints/last.ckpt"


def test_a_fit_leaves_events_checkpoints_and_its_full_configuration(runs):
    assert list(Path("runs/raster").glob("events.out.tfevents.*"))
    text = Path("runs/raster/config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["model"]["aux_weight"] == 0.05  # defaults are written out
    assert config["trainer"]["accumulate_grad_batches"] == 1
    assert "ckpt_path" not in config
    content = torch.load(LAST, weights_only=True)
    assert content[CONFIG_KEY] == own(text)
    assert read_config(LAST) == config


def test_a_new_fit_never_writes_into_an_existing_run(refused, runs):
    """Nor into a run of other settings, which are named, or over one whose checkpoints are gone."""
    before = listing(runs)
    message = refused("fit", "--config", "raster.yaml", "--data.validation_batch_size", 20, "--model.ema_decay", 0.9)
    assert "runs/raster exists" in message
    assert ": data.validation_batch_size: 50 -> 20; model.ema_decay: None -> 0.9. Nothing was written" in message
    assert "--checkpoint runs/raster/checkpoints/last.ckpt" in message
    assert listing(runs) == before
    Path(LAST).rename(Path(LAST).with_name(".last.ckpt.7.part"))
    assert "has no whole checkpoint, but runs/raster/checkpoints/.last" in refused("fit", "--config", "raster.yaml")
    Path("runs/raster/config.yaml").unlink()
    assert "without the config.yaml of a run" in refused("fit", "--config", "raster.yaml")


def test_the_same_command_continues_a_run_until_it_is_finished(run, runs, monkeypatch):
    """Guards a user, or a queue, that has to know which checkpoint is the last; the weights are those of one go."""
    whole = torch.load(LAST, weights_only=True)["state_dict"]
    shutil.rmtree("runs/raster")
    step = FlashARModule.training_step

    def interrupted(self, *batch):
        if self.trainer.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(FlashARModule, "training_step", interrupted)
    assert run("fit", "--config", "raster.yaml")[0] == 130
    monkeypatch.setattr(FlashARModule, "training_step", step)
    assert run("fit", "--config", "raster.yaml", "--data.num_workers", 0)[0] == 0
    content = torch.load(LAST, weights_only=True)
    assert content["global_step"] == 4
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in whole.items())
    before = listing(runs)
    assert run("fit", "--config", "raster.yaml")[0] == 0
    assert listing(runs) == before


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(tmp_path):
    (tmp_path / ".config.yaml.7.part").write_text("trainer: {max_steps: 1}\n" * 9)
    curves = RunLogger(tmp_path, name="", version="")
    curves.save()
    assert continued(tmp_path, {}) is None, "killed after the file of its curves, it was refused for ever"
    curves.experiment.add_text("config", "what another program has written" * 4)
    curves.save()
    with pytest.raises(ValueError, match=r"exists, without the config\.yaml of a run"):
        continued(tmp_path, {})
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 1}\n")
    assert continued(tmp_path, {"trainer": {"max_steps": 1}}) is None
    (tmp_path / "checkpoints").mkdir()
    now = {"trainer": {"max_steps": 1, "devices": 2, "new": 3}}
    assert continued(tmp_path, now) is None, "an option that a new version has"
    with pytest.raises(ValueError, match=r": trainer\.new: None -> 3\. Nothing"):
        continued(tmp_path, now, ["trainer.new"])
    torch.save({"a": torch.ones(1)}, tmp_path / "checkpoints" / "whole.ckpt")
    for at, name in enumerate(("whole.ckpt", "a.ckpt", "b.ckpt"), start=1):
        if at > 1:
            (tmp_path / "checkpoints" / name).write_text("torn")
        os.utime(tmp_path / "checkpoints" / name, (at, at))
    with pytest.raises(ValueError, match=r"b\.ckpt is not a torch file.* whole one: --checkpoint .*whole\.ckpt"):
        continued(tmp_path, {"trainer": {"max_steps": 1}})


def test_a_second_process_in_a_run_directory_is_refused(refused, runs):
    """Guards two processes that continue one run: the last writer won, silently."""
    before = torch.load(LAST, weights_only=True)["global_step"]
    hold = "import fcntl, sys; f = open('runs/raster/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
    hold += "print('process 7 on node3', file=f, flush=True); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        message = refused("fit", "--ckpt_path", LAST, "--trainer.max_steps", 6)
        other.communicate()
    assert "runs/raster is in use by process 7 on node3" in message
    assert torch.load(LAST, weights_only=True)["global_step"] == before


def test_continuing_takes_checkpoint_then_yaml_then_command_line(run, runs, caplog):
    """Guards LightningCLI's own rule, by which the checkpoint silently wins over both."""
    over = {"data": {"validation_batch_size": 20}, "trainer": {"max_steps": 5, "log_every_n_steps": 2}}
    Path("over.yaml").write_text(yaml.safe_dump(over))
    old = Path("runs/raster/config.yaml").read_text()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        words = ("--trainer.max_steps", 6, "--config", "over.yaml")  # the file comes last and still loses
        code, _, err = run("fit", "--ckpt_path", LAST, *words)
    assert code == 0, err
    config = yaml.safe_load(Path("runs/raster/config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 6  # command line
    assert config["data"]["validation_batch_size"] == 20  # YAML
    assert config["trainer"]["log_every_n_steps"] == 2
    assert config["model"]["optimiser"]["lr"] == 0.01  # checkpoint, against the default 2e-5
    assert config["data"]["batch_size"] == 32
    assert Path("runs/raster/config.1.yaml").read_text() == old
    printed = caplog.text + err
    for line in (
        "trainer.max_steps: 4 -> 6",
        "data.validation_batch_size: 50 -> 20",
        "trainer.log_every_n_steps: 1 -> 2",
    ):
        assert line in printed
    assert "optimiser" not in printed
    assert torch.load(LAST, weights_only=True)["global_step"] == 6


def test_validate_needs_the_path_only_and_agrees_with_score(run, trained, work):
    """From another directory, without YAML: model, data and trainer settings come out of the checkpoint."""
    checkpoint = trained / "runs/flashar/checkpoints/last.ckpt"
    code, out, err = run("validate", "--ckpt_path", checkpoint, "--trainer.limit_val_batches", "1.0")
    assert code == 0, err
    assert re.search(r"\| val/nll +\| +\d[\d.]{,5} \|", out)
    nll = json.loads(Path("runs/flashar/validate.json").read_text())["metrics"]["val/nll"]
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert [p.name for p in Path("runs/flashar/gate").iterdir()] == [f"validate_step_{step:07d}.png"]
    data = read_config(str(checkpoint))["data"]["shards"]
    _, out, _ = run("score", "--checkpoint", checkpoint, "--data", data, "--split", "validation")
    assert json.loads(out)["nll_nats_per_image"] == pytest.approx(nll, abs=2e-3)


def test_test_and_predict_need_the_path_only(run, runs):
    code, out, err = run("test", "--ckpt_path", LAST)
    assert code == 0, err
    assert "wrote runs/raster/test.json" in out
    nll = json.loads(Path("runs/raster/test.json").read_text())["metrics"]["test/nll"]
    code, out, err = run("predict", "--ckpt_path", LAST)
    assert code == 0, err
    with np.load("runs/raster/predictions.npz") as found:
        assert found["index"].tolist() == list(range(297))
        assert found["nll"].mean() == pytest.approx(nll, abs=2e-3)
    assert f"{nll:.1f}"[:4] in out
    assert json.loads(Path("runs/raster/predict.json").read_text())["metrics"]["images"] == 297
    before = Path("runs/raster/predictions.npz").stat().st_mtime_ns
    assert run("predict", "--ckpt_path", LAST)[0] == 0
    assert Path("runs/raster/predictions.npz").stat().st_mtime_ns == before


def test_configuration_of_a_sharded_checkpoint_is_found(tmp_path):
    """Guards LightningCLI's blindness to directories: their configuration stands in meta.pt."""
    folder = tmp_path / "step.ckpt"
    folder.mkdir()
    text = yaml.safe_dump({"trainer": {"max_steps": 3}, "ckpt_path": "x"})
    torch.save({"flashar": {"format": 1, "model": {}}, CONFIG_KEY: text}, folder / "meta.pt")
    assert read_config(str(folder)) == {"trainer": {"max_steps": 3}}
    assert Words.read(["--ckpt_path", str(folder)]).checkpoint() == str(folder)
    (folder / "meta.pt").unlink()
    with pytest.raises(ValueError, match=r"no file .*meta\.pt"):
        read_config(str(folder))


def test_help_of_a_training_verb_is_readable(run):
    code, out, _ = run("fit", "--help")
    assert code == 0
    assert out.startswith("usage: flashar fit [--config")
    assert "\n  flashar fit --config experiments/demo_raster.yaml\n" in out
    assert "m, the layer at which the vertical branch forks off" in " ".join(
        run("fit", "--model.flashar.help")[1].split()
    )
    assert "Base learning rate" in out
    assert "--data.batch_size BATCH_SIZE" in run("fit", "--data.help", "CodesDataModule")[1]


# --- bad input: a clear error before any long work, nothing left behind -----------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "closest"),
    [
        ("model.lrr", 3, "model.optimiser.lr"),
        ("model.flashar.branch_layr", 1, "model.flashar.branch_layer"),
        ("data.batchsize", 1, "data.batch_size"),
        ("trainer.max_step", 1, "trainer.max_steps"),
    ],
)
def test_unknown_configuration_keys_name_the_closest(refused, trained, work, key, value, closest):
    config = yaml.safe_load((trained / "raster.yaml").read_text())
    Path("run.yaml").write_text(yaml.safe_dump(config))
    wrong = change(config, **{key.replace(".", "__"): value})
    Path("wrong.yaml").write_text(yaml.safe_dump(wrong))
    for words in (["wrong.yaml"], ["run.yaml", f"--{key}", value]):
        message = refused("fit", "--config", *words)
        assert f"no configuration key '{key}'" in message
        assert closest in message.split("closest:")[1]
    assert sorted(p.name for p in work.iterdir()) == ["run.yaml", "wrong.yaml"]


def test_unknown_preset_option_and_wrong_values(refused, trained, work):
    shutil.copy(trained / "raster.yaml", "run.yaml")
    base = ("fit", "--config", "run.yaml")
    assert "llamagen-b" in refused(*base, "--model.backbone.preset", "llamagen-c")
    assert "did you mean dim" in refused(*base, "--model.backbone.options.dimm", 8)
    assert "model.optimiser.lr is 'fast'; expected float" in refused(*base, "--model.optimiser.lr", "fast")
    lora = ("--model.init_from", "run.yaml", "--model.flashar.branch_layer", 1)
    message = refused(*base, *lora, "--model.lora.rank", 0)
    assert message.startswith("flashar: error: lora.rank is 0, alpha 0.0")
    assert "model.ema_decay is 'x'; expected float or null." in refused(*base, "--model.ema_decay", "x")
    assert "model.flashar.fusion is 'sum'" in refused(*base, "--model.flashar.fusion", "sum")
    assert "model.backbone.options is '3'; expected dict." in refused(*base, "--model.backbone.options", 3)
    sharded = ("--trainer.strategy", "flashar_pl.training.ShardedStrategy")
    message = refused(*base, *sharded, "--trainer.strategy.replicas", 0)
    assert message.strip() == "flashar: error: strategy.replicas is 0; expected 1 or more."
    assert "closest: compute" in refused(*base, *sharded, "--trainer.strategy.compte", "bf16")
    assert "cfg_scale is -1.0; expected 0 or more" in refused(*base, "--model.validation.cfg_scale", -1)
    assert "no.yaml" in refused("fit", "--config", "no.yaml")
    assert "--config" in refused("fit")
    assert [p.name for p in work.iterdir()] == ["run.yaml"]


def test_what_is_missing_is_named_with_the_command_that_makes_it(refused, trained, work):
    shutil.copy(trained / "flashar.yaml", "run.yaml")
    base = ("fit", "--config", "run.yaml", "--trainer.default_root_dir", "runs/new")
    message = refused(*base, "--data.shards", "data/digits")
    assert "looked for data/digits/manifest.json" in message
    assert "flashar tokenize digits --out data/digits" in message
    message = refused(*base)
    assert "runs/raster/checkpoints/last.ckpt" in message
    assert "flashar fit --config experiments/demo_raster.yaml" in message
    words = ("--model.validation.features", "runs/classifier", "--model.validation.samples", 4)
    message = refused(*base, "--model.init_from", trained / LAST, *words)
    assert re.search(r"flashar classifier --data \S+ --out runs/classifier", message)
    assert [p.name for p in work.iterdir()] == ["run.yaml"]


def test_checkpoint_of_another_size_or_kind(refused, runs):
    before = listing(runs)
    new = ("--trainer.default_root_dir", "runs/new")
    other = refused("fit", "--config", "flashar.yaml", *new, "--model.backbone.options.dim", 32)
    assert "dim 16 (this run: 32)" in other
    flashar = "runs/flashar/checkpoints/last.ckpt"
    kind = refused("fit", "--config", "raster.yaml", *new, "--model.init_from", flashar)
    assert "is a FlashAR model" in kind
    size = refused("fit", "--ckpt_path", LAST, "--model.backbone.options.n_layer", 3)
    assert "backbone.n_layer 2 (this run: 3)" in size
    kind = refused("fit", "--ckpt_path", LAST, "--config", "flashar.yaml", *new)
    assert "kind 'raster' (this run: 'flashar')" in kind
    assert "--model.init_from" in kind
    assert "holds another run" in refused("fit", "--ckpt_path", LAST, "--trainer.default_root_dir", "runs/flashar")
    assert "no such checkpoint" in refused("validate", "--ckpt_path", "runs/none.ckpt")
    assert listing(runs) == before
    assert not Path("runs/new").exists()


def test_foreign_damaged_and_incomplete_checkpoints(refused, runs):
    torch.save({"model": tiny_backbone().to_official()}, "official.pt")
    assert "--model.init_from official.pt" in refused("fit", "--config", "raster.yaml", "--ckpt_path", "official.pt")
    Path("text.ckpt").write_text("hello")
    assert "text.ckpt is not a torch file" in refused("validate", "--ckpt_path", "text.ckpt")
    content = torch.load(LAST, weights_only=True)
    name = "net.backbone.norm.weight"
    del content["state_dict"][name]
    torch.save(content, "incomplete.ckpt")
    assert name in refused("validate", "--ckpt_path", "incomplete.ckpt", "--config", "raster.yaml")
    assert "backbone.norm.weight" in refused(
        "generate", "--checkpoint", "incomplete.ckpt", "--classes", 1, "--out", "s"
    )


def test_data_that_does_not_fit(refused, run, runs, shards):
    """Codes outside the vocabulary, another grid, another vocabulary."""
    new = ("--trainer.default_root_dir", "runs/new")
    manifest = Manifest.load(shards)
    with ShardWriter(
        "small", name="small", tokenizer=manifest.tokenizer, grid=(4, 4), vocabulary=17, condition=manifest.condition,
        block=8, shard_blocks=4,
    ) as writer:  # fmt: skip
        for split in ("train", "validation", "test"):
            codes, ids = np.zeros((32, 4, 4), dtype=np.int64), np.arange(32)
            writer.write(split, codes, ids=ids, labels=ids % 10)
    message = refused("validate", "--ckpt_path", LAST, "--data.shards", "small")
    assert "trained on a grid of 8 x 8 codes, the shards of 'small' have 4 x 4" in message
    far = ("--trainer.default_root_dir", "made/for/it")
    message = refused("fit", "--config", "raster.yaml", *far, "--model.backbone.options.vocab_size", 9)
    assert "vocabulary of 17, the model has 9" in message
    assert not Path("made").exists(), "a refused run leaves the folders above its own"
    shutil.copytree(shards, "damaged")
    damage("damaged", "train")
    message = refused("fit", "--config", "raster.yaml", *new, "--data.shards", "damaged")
    assert "outside the vocabulary of 17" in message
    assert not Path("runs/new").exists()
    damage("damaged", "test")
    message = refused("score", "--checkpoint", LAST, "--data", "damaged")
    assert "outside the vocabulary of 17" in message


def damage(directory: str, split: str) -> None:
    """Set the last code of every block of a split to 200."""
    for shard in Manifest.load(directory).shards(split):
        with Path(directory, shard.path).open("r+b") as file:
            for record in shard.records:
                offset, size = record.members["codes.npy"]
                for back in range(1, 64 * record.samples, 64):
                    file.seek(offset + size - back)
                    file.write(bytes([200]))


def test_tools_of_lightning_are_refused_in_words(refused, runs, monkeypatch):
    base = ("fit", "--config", "raster.yaml", "--trainer.default_root_dir", "runs/new")
    assert "LearningRateFinder; expected none" in refused(*base, "--trainer.callbacks+=LearningRateFinder")
    assert "seed_everything is true" in refused(*base, "--seed_everything", "true")
    assert "expected a number from 0 to 4294967295" in refused(*base, "--seed_everything", "-1")
    for name, value in {"JOB_ID": 1, "NTASKS": 2, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_NAME": "job"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert "start the command with srun, or" in refused(*base)
    assert not Path("runs/new").exists()


def test_paths_in_the_home_directory(run, trained, work, monkeypatch):
    """Where no shell expands ~: in a YAML, behind an equals sign, in quotes."""
    monkeypatch.setenv("HOME", str(trained))
    config = yaml.safe_load((trained / "flashar.yaml").read_text())
    Path("run.yaml").write_text(yaml.safe_dump(change(config, model__init_from=f"~/{LAST}", trainer__max_steps=2)))
    code, _, err = run("fit", "--config", "run.yaml", "--trainer.default_root_dir=~/runs/mine")
    assert code == 0, err
    last = "~/runs/mine/checkpoints/last.ckpt"
    assert run("generate", f"--checkpoint={last}", "--classes", 1, "--codes-only", "--out", "~/codes")[0] == 0
    assert (trained / "codes").is_dir()
    assert sorted(path.name for path in work.iterdir()) == ["run.yaml"]


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_named_in_a_yaml_is_found(work):
    Path("last.ckpt").touch()
    Path("run.yaml").write_text("ckpt_path: last.ckpt\n")
    assert Words.read(["--config", "run.yaml"]).checkpoint() == "last.ckpt"
    assert Words.read(["--config=run.yaml", "--ckpt_path=null"]).checkpoint() is None
    assert Words.read(["--config=run.yaml", "--checkpoint", "null"]).checkpoint() is None


# --- true processes --------------------------------------------------------------------------------------------------


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "flashar_pl.cli", *[str(word) for word in words]]


@pytest.mark.slow
def test_two_devices_from_the_command_line(runs):
    """Guards the second process: it must read the same configuration and not refuse the directory of the first."""
    words = ("--trainer.default_root_dir", "runs/two", "--trainer.devices", 2, "--data.validation_batch_size", 50)
    done = subprocess.run(
        command("fit", "--config", "flashar.yaml", *words, "--trainer.strategy", "ddp"),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    content = torch.load("runs/two/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 4
    assert read_config("runs/two/checkpoints/last.ckpt")["trainer"]["devices"] == "2"


@pytest.mark.slow
def test_ctrl_c_exits_130_without_traceback(runs):
    """And names the newest checkpoint, wherever it is."""
    words = ("--trainer.default_root_dir", "runs/long", "--trainer.max_steps", 100000)
    save = json.dumps({"class_path": "ModelCheckpoint", "init_args": SAVE | {"dirpath": "runs/kept"}})
    words = (*words, "--trainer.callbacks", f"[{save}]")
    process = subprocess.Popen(
        command("fit", "--config", "raster.yaml", *words),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )
    deadline = time.monotonic() + 60
    while not Path("runs/kept/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert re.search(r"Interrupted at step \d+\. Continue .* with: flashar fit --checkpoint runs/kept/last\.ckpt", err)
