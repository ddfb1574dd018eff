"""experiments/cluster: the scripts run, with a stand-in for Slurm that starts the tasks of a job on this machine."""

import copy
import functools
import os
import re
import signal
import stat
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, chdir, suppress
from pathlib import Path

import pytest
import torch
import yaml
from emu_tiny_data import write
from pair import Pair, clean_environment
from processes import free_port

from flashar_pl.checkpoints.sharded import SafeReader, read_meta, read_sharded
from flashar_pl.cli import main
from flashar_pl.training import planned
from flashar_pl.training.planned import PlannedRun

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "experiments" / "cluster"
TINY = ROOT / "experiments" / "emu35_tiny.yaml"
SCRIPTS = sorted(path for path in CLUSTER.iterdir() if path.suffix in (".sbatch", ".sh"))

WORDS = """#!/bin/bash
echo "$(basename "$0") $*" >> said.txt
exit ${CODE:-0}
"""
SRUN = """#!/bin/bash
# The tasks of a job on one node, with the variables that Slurm gives them.
echo "srun $*" >> said.txt
shift  # --kill-on-bad-exit=1
for TASK in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$TASK SLURM_LOCALID=$TASK SLURM_NODEID=0 "$@" &
    PIDS="$PIDS $!"
done
for PID in $PIDS; do wait "$PID" || WORST=$?; done
exit ${WORST:-0}
"""
TORCHRUN = f"""#!/bin/bash
exec {sys.executable} -m torch.distributed.run "$@"
"""
FLASHAR = f"""#!/bin/bash
exec {sys.executable} -m flashar_pl.cli "$@"
"""


def programs(folder: Path, **texts: str) -> Path:
    """A folder of scripts for PATH."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run(script: str, place: Path, *words: str, **variables: str) -> int:
    """Run a template in `place`; its exit code. What it started is in place/said.txt or said by place/log.txt."""
    environment = clean_environment() | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", **variables}
    with (place / "log.txt").open("a") as log:
        done = subprocess.run(
            ["bash", str(CLUSTER / script), *words], cwd=place, env=environment, timeout=240, stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    return done.returncode


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax_and_mode(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert script.suffix == ".sbatch" or script.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (1, False)])
def test_only_a_run_that_was_asked_to_stop_is_queued_again(tmp_path: Path, code: int, again: bool) -> None:
    """A broken run that queues itself for ever would burn the allocation."""
    srun = WORDS.replace("${CODE:-0}", str(code))
    programs(tmp_path / "bin", flashar=WORDS, srun=srun, scontrol=WORDS)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_CPUS_PER_TASK": "8"}
    assert run("emu35_34b.sbatch", tmp_path, **slurm) == code
    said = (tmp_path / "said.txt").read_text().splitlines()
    assert said.pop(0) == "flashar plan --config experiments/emu35_34b.yaml --gpus 32 --replicas 4"
    assert said[0] == (
        "srun --kill-on-bad-exit=1 flashar fit --config experiments/emu35_34b.yaml --trainer.default_root_dir "
        "runs/emu35_34b --trainer.num_nodes 4 --trainer.strategy.init_args.replicas 4"
    )
    assert said[1:] == (["scontrol requeue 7"] if again else [])


def test_no_run_is_moved_and_no_checkpoint_chosen(tmp_path: Path) -> None:
    """Guards a job that began again at step 0 because it saw no checkpoint at that moment: `fit` knows better."""
    programs(tmp_path / "bin", flashar=WORDS, srun=WORDS, scontrol=WORDS)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "8", "RUN": "runs/x"}
    (tmp_path / "a.yaml").write_text("trainer: {devices: 8}\n")
    assert run("emu35_34b.sbatch", tmp_path, **slurm, CONFIG="a.yaml") == 0
    (tmp_path / "runs/x/checkpoints/last.ckpt").mkdir(parents=True)
    assert run("emu35_34b.sbatch", tmp_path, **slurm, CONFIG="a.yaml", SLURM_RESTART_COUNT="2") == 0
    said = (tmp_path / "said.txt").read_text().splitlines()
    assert said[:2] == said[2:]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]


def test_a_recipe_without_shards_gets_no_replicas(tmp_path: Path) -> None:
    """Guards the recipes of DDP, whose strategy is a word: replicas of a class that is not named are an error."""
    programs(tmp_path / "bin", flashar=WORDS, srun=WORDS, scontrol=WORDS, torchrun=WORDS)
    (tmp_path / "a.yaml").write_text("trainer: {devices: 8}\n")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8", "CONFIG": "a.yaml"}
    assert run("emu35_34b.sbatch", tmp_path, **slurm) == 0
    assert run("torchrun.sh", tmp_path, "node0", "2", "a.yaml") == 0
    said = (tmp_path / "said.txt").read_text().splitlines()
    assert said[1].endswith("fit --config a.yaml --trainer.default_root_dir runs/emu35_34b --trainer.num_nodes 2")
    assert said[2].endswith("fit --config a.yaml --trainer.num_nodes 2")


def test_a_plan_that_does_not_go_with_the_nodes_ends_the_job(tmp_path: Path) -> None:
    """Guards a job that queues for a day and ends in an error of every task; BATCH reaches plan and fit."""
    programs(tmp_path / "bin", srun=WORDS, flashar=WORDS)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8", "BATCH": "16"}
    assert run("emu35_34b.sbatch", tmp_path, **slurm, CODE="2") == 2
    assert run("emu35_34b.sbatch", tmp_path, **slurm) == 0
    said = (tmp_path / "said.txt").read_text().splitlines()
    assert [line.split()[0] for line in said] == ["flashar", "flashar", "srun"]
    assert "--gpus 16 --batch 16 --replicas 2" in said[0]
    assert said[2].endswith("--data.batch_size 16")


ADVERTISED = re.compile(r"(?:BATCH=(\d+) )?(?:CONFIG=(\S+yaml) RUN=\S+ )?sbatch(?: --nodes (\d+))? experiments/cluster")
BY_HAND = re.compile(r"torchrun\.sh \S+ (\d+) (experiments/\S+yaml)(?: --data\.batch_size (\d+))?")
TABLE = re.compile(r"^\| (\d) \| (?:as it is|`BATCH=(\d+)`)", re.M)


def advertised() -> set[tuple[str, int, int | None]]:
    """(recipe, nodes, global batch or None) of every command that a template, a recipe or a page shows."""
    texts = [path.read_text() for path in (*SCRIPTS, *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*.yaml"))]
    usual, found = "experiments/emu35_34b.yaml", set[tuple[str, int, int | None]]()
    for text in texts:
        for batch, config, nodes in ADVERTISED.findall(text):
            found.add((config or usual, int(nodes or 1), int(batch) if batch else None))
        for nodes, config, batch in BY_HAND.findall(text):
            found.add((config, int(nodes), int(batch) if batch else None))
        for nodes, batch in TABLE.findall(text):
            found.add((usual, int(nodes), int(batch) if batch else None))
    others = ("experiments/llamagen_l_256.yaml", "experiments/llamagen_xl_256.yaml")
    return found | {(config, nodes, None) for config in others for nodes in (1, 2, 4, 8)}


def test_every_advertised_number_of_nodes_goes_with_its_recipe(monkeypatch) -> None:
    """Guards a batch of 8 that 16 GPUs were told to share: the command of the largest recipe could not start."""
    parse = planned.parsed_config
    once = functools.cache(lambda *words: parse(list(words)))
    monkeypatch.setattr(planned, "parsed_config", lambda words: copy.deepcopy(once(*words)))
    shown = advertised()
    assert {nodes for config, nodes, _ in shown if config.endswith("emu35_34b.yaml")} == {1, 2, 4, 8}
    for config, nodes, batch in sorted(shown, key=str):
        setup = PlannedRun.of_files([str(ROOT / config)], 8 * nodes, batch).setup
        assert setup.samples >= 1, (config, nodes)
    with pytest.raises(ValueError, match=r"batch_size 8 .*no multiple of 32 GPUs.*--batch 32.*BATCH=32"):
        PlannedRun.of_files([str(ROOT / "experiments/emu35_34b.yaml")], 32)


def test_torchrun_takes_a_configuration_or_a_checkpoint(tmp_path: Path) -> None:
    programs(tmp_path / "bin", torchrun=WORDS)
    assert run("torchrun.sh", tmp_path, "node0", "2", "a.yaml") == 0
    assert run("torchrun.sh", tmp_path, "node0", "2", "runs/a/checkpoints/last.ckpt", "--data.num_workers", "3") == 0
    first, second = (tmp_path / "said.txt").read_text().splitlines()
    assert "--nnodes 2 --nproc-per-node 8 " in first
    assert "--rdzv-endpoint node0:29500 " in first
    assert first.endswith("fit --config a.yaml --trainer.num_nodes 2 --trainer.strategy.init_args.replicas 2")
    assert "fit --ckpt_path runs/a/checkpoints/last.ckpt " in second
    assert second.endswith("--data.num_workers 3")


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(Path("data/emu35_tiny"))
    return tmp_path


HERE = Path(__file__).parents[:3]
"""Where the callback of the next test, what it imports and the package are."""


@pytest.mark.slow
def test_a_preempted_slurm_job_ends_as_asked_and_continues(place: Path) -> None:
    """Two tasks; one of them gets SIGUSR1 in the middle of a step. The first job saves, exits with 75 and is queued
    again; the same script then runs to the end."""
    programs(place / "bin", srun=SRUN, scontrol=WORDS, flashar=FLASHAR)
    config = yaml.safe_load(TINY.read_text())
    config["trainer"]["callbacks"] = [
        {"class_path": "sharded_ranks.Ask", "init_args": {"rank": 1}},
        {"class_path": "flashar_pl.training.preemption.StopOnSignal"},
    ]
    config["trainer"] |= {"max_steps": 6, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    slurm = {
        "SLURM_JOB_ID": "23456", "SLURM_JOB_NAME": "tiny", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_CPUS_PER_TASK": "1",
        "CONFIG": "tiny.yaml", "RUN": "runs/emu35_tiny", "PYTHONPATH": os.pathsep.join(map(str, HERE)),
    }  # fmt: skip
    assert run("emu35_34b.sbatch", place, **slurm) == 75, Path("log.txt").read_text()[-4000:]
    assert [path.name for path in Path("runs/emu35_tiny/checkpoints").iterdir()] == ["stopped.ckpt"]
    assert run("emu35_34b.sbatch", place, **slurm) == 0, Path("log.txt").read_text()[-4000:]
    said = [line.split()[:2] for line in Path("said.txt").read_text().splitlines()]
    assert said == [["srun", "--kill-on-bad-exit=1"], ["scontrol", "requeue"], ["srun", "--kill-on-bad-exit=1"]]
    log = Path("log.txt").read_text()
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in log
    assert "Asked to stop at step 3" in log
    assert "at step 3 of 6" in log.split("Asked to stop")[1]
    assert "`max_steps=6` reached" in log


@pytest.mark.slow
def test_torchrun_for_real(place: Path) -> None:
    """The launch by hand on one node of two processes."""
    programs(place / "bin", torchrun=TORCHRUN)
    words = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "0"]
    assert run("torchrun.sh", place, "localhost", "1", str(TINY), *words, GPUS="2", PORT=free_port()) == 0, Path(
        "log.txt"
    ).read_text()[-4000:]
    log = Path("log.txt").read_text()
    assert "parameters on 2 x cpu" in log
    assert "`max_steps=2` reached" in log


def end_all(mark: str) -> list[int]:
    """SIGKILL to every process that has `mark` in its environment: torchrun's processes are in sessions of their own,
    and outlive an agent that is killed. The processes that there were."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if mark.encode() in file.read_bytes():
                found.append(int(file.parent.name))
                os.kill(found[-1], signal.SIGKILL)
    return found


def two_nodes(place: Path, *words: str, timeout: float = 240) -> list[int]:
    """torchrun.sh on two "nodes" of one process each, on this machine; how each agent ended. What node N said is added
    to place/N.txt. Nothing that was started is left.
    """
    environment = clean_environment() | {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(map(str, HERE)),
        "GPUS": "1", "PORT": free_port(), "STARTED_BY": str(uuid.uuid4()),
    }  # fmt: skip
    command = ["bash", str(CLUSTER / "torchrun.sh"), "localhost", "2", *words]
    agents, end = [], time.monotonic() + timeout
    with ExitStack() as stack:
        stack.callback(end_all, environment["STARTED_BY"])
        for node in range(2):
            log = stack.enter_context((place / f"{node}.txt").open("a"))
            agents.append(subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log))
        with suppress(subprocess.TimeoutExpired):
            for agent in agents:
                agent.wait(max(0, end - time.monotonic()))
        codes = [agent.poll() for agent in agents]
        left = end_all(environment["STARTED_BY"])
        for agent in agents:
            agent.wait()
    said = "\n".join(f"node {node}:\n{(place / f'{node}.txt').read_text()[-3000:]}" for node in range(2))
    hung = [node for node, code in enumerate(codes) if code is None]
    assert not hung, f"nodes {hung} had not ended after {timeout} s\n{said}"
    assert not left, f"processes {left} outlived their agents\n{said}"
    return codes


def fit_in(folder: Path, *words: object) -> int:
    """The command's exit code, on the ranks of this process's group."""
    with chdir(folder):
        return main(["fit", *map(str, words)])


def everything(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and moments of a sharded checkpoint."""
    return read_sharded(checkpoint, {name: name for name in SafeReader(checkpoint).names()})


@pytest.mark.slow
def test_a_node_that_dies_ends_the_other_and_the_same_words_continue(pair: Pair, place: Path) -> None:
    """Two torchrun agents, a copy of the shards on each. One dies in step 6, after the switch of stages (2) and the
    checkpoint of step 4; the end is that of a run without this. Guards a node that waits for ever for a dead one, and
    a second start that begins at step 0 or draws other samples."""
    programs(place / "bin", torchrun=TORCHRUN)
    config = yaml.safe_load(TINY.read_text())
    config["trainer"] |= {"devices": 1, "max_steps": 10, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 4
    flag = {"node": 1, "step": 6, "flag": str(place / "flag")}
    config["trainer"]["callbacks"].append({"class_path": "sharded_ranks.NodeDies", "init_args": flag})
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    broken, whole = (["tiny.yaml", "--trainer.default_root_dir", root] for root in ("runs/broken", "runs/whole"))

    Path("flag").touch()
    codes = two_nodes(place, *broken)
    assert -signal.SIGKILL in codes
    assert 0 not in codes
    assert not Path("flag").exists()
    kept = Path("runs/broken/checkpoints")
    assert [path.name for path in kept.iterdir()] == ["step=4.ckpt"]
    assert two_nodes(place, *broken) == [0, 0]
    assert "at step 4 of 10" in Path("0.txt").read_text() + Path("1.txt").read_text()
    one_node = ["--trainer.devices", 2, "--trainer.strategy.init_args.replicas", 2]
    assert pair(fit_in, place, "--config", *whole, *one_node) == [0, 0]

    found, wanted = (Path("runs") / name / "checkpoints" / "step=10.ckpt" for name in ("broken", "whole"))
    assert read_meta(found)["global_step"] == 10
    ends = everything(found), everything(wanted)
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, atol=1e-5, rtol=1e-4, msg=name)
