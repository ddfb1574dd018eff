"""`flashar evaluate` on two ranks and after a kill: always the same result."""

import fcntl
import json
import os
import signal
from pathlib import Path

import pytest
from evaluate_toys import FORK, evaluation, on_two_ranks, save_classifier

from flashar_pl import files
from flashar_pl.cli import main


@pytest.fixture(scope="module")
def words(tmp_path_factory, flashar_model, shards) -> list[str]:
    """75 samples in 5 batches of 16: an odd number of batches, and a partial last one."""
    folder = tmp_path_factory.mktemp("evaluate")
    given = evaluation(flashar_model, shards, save_classifier(folder / "classifier"))
    return [str(word) for word in (*given, "--labels", "random", "--seed", 7, "--cache", folder / "cache")]


@pytest.fixture(scope="module")
def expected(words, tmp_path_factory) -> dict:
    """The result of one process that nothing disturbed."""
    out = tmp_path_factory.mktemp("plain") / "eval"
    assert main([*words, "--out", str(out)]) == 0
    return result_of(out)


def result_of(out: Path) -> dict:
    """Everything but the facts about the run itself."""
    result = json.loads((out / "evaluation.json").read_text())
    del result["run"]
    return result


def test_two_ranks_give_the_same_file(words, expected, tmp_path):
    """Guards seeds and labels by global index, the shape of every batch, and sums in one order: not one bit differs."""
    assert on_two_ranks([*words, "--out", str(tmp_path / "eval")]) == [0, 0]
    assert result_of(tmp_path / "eval") == expected
    run = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["run"]
    assert (run["processes"], run["images_drawn"]) == (2, 75)


def test_wrong_input_ends_every_rank_with_one_line(words, tmp_path, capfd):
    """Rank 1 must not wait for a rank 0 that alone has found a wrong setting."""
    assert on_two_ranks([*words, "--out", str(tmp_path / "eval"), "--metrics", "sfid"]) == [2, 2]
    assert capfd.readouterr().err.count("flashar: error: not possible: sfid") == 1
    assert not (tmp_path / "eval").exists()


def killed_in_part(words: list[str], batch: int) -> int | None:
    """Exit code of a run that is killed while it stores a part."""

    def run() -> None:
        fsync = os.fsync

        def dying(descriptor: int) -> None:
            if f"{batch:06d}.safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        files.os.fsync = dying
        os._exit(main(words))

    process = FORK.Process(target=run)
    process.start()
    process.join(timeout=60)
    return process.exitcode


def test_a_killed_run_continues(words, expected, tmp_path, capsys):
    """Killed in the third part, once more in the fourth, then finished; a part cut off by a crash is drawn again."""
    out = tmp_path / "eval"
    assert killed_in_part([*words, "--out", str(out)], 2) == -signal.SIGKILL
    assert not (out / "evaluation.json").exists()
    assert sorted(p.name for p in (out / "parts").glob("[0-9]*")) == [f"{k:06d}.safetensors" for k in (0, 1)]
    assert len(list((out / "parts").glob(".*"))) == 1
    assert killed_in_part([*words, "--out", str(out)], 3) == -signal.SIGKILL
    cut = out / "parts" / "000001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    kept = (out / "parts" / "000000.safetensors").stat().st_mtime_ns

    def unchanged(*args):
        assert (out / "parts" / "000000.safetensors").stat().st_mtime_ns == kept
        raise InterruptedError("stopped before the parts are removed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashar_pl.evaluate.run.measure", unchanged)
        assert main([*words, "--out", str(out)]) == 2
    assert main([*words, "--out", str(out)]) == 0
    assert result_of(out) == expected
    assert sorted(p.name for p in out.iterdir()) == ["codes.npy", "evaluation.json", "grid.png"]


def test_stored_parts_are_not_mixed_with_other_settings(words, tmp_path, capsys):
    out = tmp_path / "eval"
    killed_in_part([*words, "--out", str(out)], 1)
    assert main([*words, "--out", str(out), "--cfg-scale", "2"]) == 2
    assert "holds samples drawn with cfg_scale 1.0, this run has 2.0" in capsys.readouterr().err
    other = [*words, "--out", str(out)]
    other[other.index("--batch-size") + 1] = "8"
    assert main(other) == 2
    assert "batch_size 16, this run has 8" in capsys.readouterr().err
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([*words, "--out", str(out)]) == 2
    assert "another process is drawing samples" in capsys.readouterr().err
    assert main([*words, "--out", str(out), "--metrics", "is"]) == 0, "metrics and reference may change"


def test_a_run_continues_when_other_memory_is_free(words, tmp_path, monkeypatch):
    """Weight format auto packs 16-bit weights where a copy fits; whether it did must not tie the stored samples."""
    mine = [*words, "--dtype", "bf16", "--out", str(tmp_path / "eval")]

    def stopped(*args):
        raise InterruptedError("stopped before the parts are removed")

    with monkeypatch.context() as patch:
        patch.setattr("flashar_pl.evaluate.run.measure", stopped)
        patch.setattr("flashar_pl.devices.available_memory", lambda device: 0)
        assert main(mine) == 2
    assert main(mine) == 0
