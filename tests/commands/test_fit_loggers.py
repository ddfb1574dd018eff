"""Lightning's loggers and callbacks by their class, from YAML and command line."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from flashar_pl.training.lightning_cli import parsed_config
from flashar_pl.training.stored_config import read_config
from flashar_pl.training.words import merged

OPTIONS = {"dim": 16, "n_layer": 2, "n_head": 2, "multiple_of": 8, "vocab_size": 17, "num_classes": 10}
RUN = {
    "model": {
        "backbone": {"options": OPTIONS},
        "flashar": {"branch_layer": 1},
        "optimiser": {"lr": 0.01},
    },
    "data": {"batch_size": 32},
    "trainer": {
        "default_root_dir": "run", "accelerator": "cpu", "max_steps": 5, "log_every_n_steps": 1,
        "limit_val_batches": 1, "val_check_interval": 5, "check_val_every_n_epoch": None,
    },
}  # fmt: skip


@pytest.fixture
def base(shards, tmp_path, monkeypatch) -> tuple[str, ...]:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    return ("fit", "--config", "run.yaml", "--data.shards", shards)


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open(encoding="utf-8")))


def test_csv_logger_and_learning_rate_monitor(run, base) -> None:
    """Guards a logger that writes elsewhere than the run directory, checkpoints that follow it, and rates that only our
    own callback knew: the monitor reads the scheduler."""
    words = ("--trainer.logger", "CSVLogger", "--trainer.callbacks+=LearningRateMonitor")
    code, _, err = run(*base, *words)
    assert code == 0, err
    [metrics] = Path("run").rglob("metrics.csv")
    logged = rows(metrics)
    assert any(row["val/nll"] for row in logged)
    watched = [row for row in logged if row.get("lr-AdamW/gate")]
    own = [row for row in logged if row["lr/gate"]]
    assert len(watched) == len(own) == 5
    for role in ("backbone", "gate"):
        rates = [float(row[f"lr/{role}"]) for row in own]  # Lightning logs these in float32
        assert [float(row[f"lr-AdamW/{role}"]) for row in watched] == pytest.approx(rates, rel=1e-6)
    rates = [float(row["lr/backbone"]) for row in own]
    assert rates[0] == 0  # stage 1 is one step of five
    assert rates[1] > rates[2] > rates[4] > 0
    [checkpoint] = Path("run/checkpoints").glob("*.ckpt")
    assert Path("run/config.yaml").is_file()
    logger = read_config(str(checkpoint))["trainer"]["logger"]
    assert logger["class_path"] == "lightning.pytorch.loggers.CSVLogger"
    assert "save_dir" not in logger["init_args"], "it follows from default_root_dir"

    again = ("--ckpt_path", checkpoint, "--trainer.default_root_dir", "again", "--trainer.max_steps", 6)
    assert run("fit", *again)[0] == 0
    assert list(Path("again").rglob("metrics.csv"))
    assert len(list(Path("run").rglob("metrics.csv"))) == 1


def test_several_loggers_from_a_yaml(run, base) -> None:
    loggers = [{"class_path": "CSVLogger"}, {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "boards"}}]
    Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers, "max_steps": 1}}), encoding="utf-8")
    code, _, err = run(*base, "--config", "loggers.yaml")
    assert code == 0, err
    assert list(Path("run").rglob("metrics.csv"))
    assert list(Path("boards").rglob("events.out.tfevents.*"))


def test_a_callback_given_anew_has_its_own_settings_only(base) -> None:
    """Guards a ModelCheckpoint by a metric that kept every_n_train_steps of the recipe's, and was ranked by nothing."""
    steps, best = ({"class_path": "ModelCheckpoint", "init_args": values} for values in (
        {"filename": "last", "every_n_train_steps": 2}, {"monitor": "val/nll"},
    ))  # fmt: skip
    Path("steps.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [steps], "logger": "CSVLogger"}}))
    Path("best.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [best]}, "data": {"seed": 5}}))
    words = [*base[1:], "--config", "steps.yaml"]
    for other in (["--config", "best.yaml"], [f"--trainer.callbacks=[{json.dumps(best)}]"]):
        values = parsed_config([*words, *other])
        [saver] = values["trainer"]["callbacks"]
        assert (saver["init_args"]["monitor"], saver["init_args"]["every_n_train_steps"]) == ("val/nll", None)
        assert values["trainer"]["logger"]["class_path"].endswith("CSVLogger")
        assert values["data"]["batch_size"] == 32
    both = parsed_config([*words, "--trainer.callbacks+=LearningRateMonitor"])["trainer"]["callbacks"]
    assert [each["class_path"].rpartition(".")[2] for each in both] == ["ModelCheckpoint", "LearningRateMonitor"]


def test_files_that_say_more_of_one_class() -> None:
    """The same class under its short or long name is changed, another one replaced, a list too."""
    old = {"class_path": "a.Sharded", "init_args": {"replicas": 1, "offload": True}}
    assert merged({"s": old}, {"s": {"class_path": "Sharded", "init_args": {"replicas": 2}}})["s"]["init_args"] == {
        "replicas": 2, "offload": True,
    }  # fmt: skip
    assert merged({"s": old}, {"s": {"replicas": 2}})["s"]["init_args"]["offload"]
    assert merged({"s": old}, {"s": {"class_path": "b.Sharded"}})["s"] == {"class_path": "b.Sharded"}
    assert merged({"data": {"seed": 1}}, {"data": {"class_path": "Codes", "init_args": {}}})["data"]["init_args"] == {}
    mixed = merged({"data": {"seed": 1}}, {"data": {"class_path": "x.CodesDataModule", "init_args": {"window": 3}}})
    assert mixed["data"]["init_args"] == {"seed": 1, "window": 3}


@pytest.mark.parametrize(("logger", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_missing_package_is_one_line(refused, base, logger: str, package: str) -> None:
    message = refused(*base, "--trainer.logger", logger)
    assert f"lightning.pytorch.loggers.{logger}: " in message
    assert f"pip install -U '{package}" in message
    assert not Path("run").exists()
