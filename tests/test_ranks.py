"""Work on several ranks: shares, meetings, and errors that end all of them."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from pair import Pair

from flashar_pl.options import RankOptions
from flashar_pl.ranks import Rank, run_on_ranks


def record(out: str, wrong: int | None, rank: Rank) -> int:
    names = rank.first(lambda: [f"part{i}" for i in range(5)])
    for i in rank.share(len(names)):
        (Path(out) / names[i]).write_text(str(rank.rank))
    if rank.rank == wrong:
        raise ValueError(f"rank {rank.rank} found wrong input")
    rank.barrier()
    assert len(list(Path(out).iterdir())) == 5
    return rank.rank + 10


def test_one_device_is_this_process_without_a_group() -> None:
    import torch.distributed as dist

    seen: list[Rank] = []
    run_on_ranks(seen.append, RankOptions(), device="cpu")
    assert seen == [Rank(0, 1, torch.device("cpu"))]
    assert list(seen[0].share(4)) == [0, 1, 2, 3]
    assert seen[0].first(lambda: 7) == 7
    assert not dist.is_initialized()


def ended(out: str, wrong: int | None) -> int | str:
    try:
        return run_on_ranks(partial(record, out, wrong), RankOptions(2), device="cpu")
    except ValueError as error:
        return str(error)


def test_ranks_share_the_work_and_an_error_of_any_ends_all(pair: Pair, tmp_path: Path) -> None:
    for name, wrong, expected in (("whole", None, [10, 11]), ("wrong", 1, ["rank 1 found wrong input"] * 2)):
        out = tmp_path / name
        out.mkdir()
        assert pair(ended, str(out), wrong) == expected
        assert {path.name: path.read_text() for path in out.iterdir()} == {f"part{i}": str(i % 2) for i in range(5)}


@pytest.mark.slow
def test_an_error_of_a_spawned_rank_ends_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^rank 1 found wrong input$"):
        run_on_ranks(partial(record, str(tmp_path), 1), RankOptions(2), device="cpu")


SCRIPT = """
import atexit
import sys
from functools import partial
from test_ranks import record
from flashar_pl.ranks import run_on_ranks
from flashar_pl.options import RankOptions
import torch.distributed as dist
atexit.register(lambda: sys.stderr.write(f"group left: {not dist.is_initialized()}\\n"))  # runs last
number = run_on_ranks(partial(record, sys.argv[1], None), RankOptions(), device="cpu")
sys.stdout.write(f"{number}\\n")  # one write each: two ranks share the pipe
"""


@pytest.mark.slow
def test_ranks_of_torchrun(tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(out)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split()) == ["10", "11"]
    assert done.stderr.count("group left: True") == 2  # else gloo's threads abort one end in five ("terminate called")


@pytest.mark.parametrize(("devices", "message"), [(0, "devices is 0; expected 1 or more with device cpu")])
def test_devices_that_do_not_exist(devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_on_ranks(lambda rank: None, RankOptions(devices), device="cpu")


def test_devices_beside_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "evaluate")
    with pytest.raises(ValueError, match="devices is 2, but 4 processes were started on each machine; leave it out"):
        run_on_ranks(lambda rank: None, RankOptions(2), device="cpu")
