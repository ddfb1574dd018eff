"""From own images to a post-trained Emu3.5 in miniature: the lines of docs/training.md, each a process of its own.

The parts have tests of their own; this one guards what passes between them, and that the page can be followed.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import emu_files
import numpy as np
import pytest
import torch
from PIL import Image

from flashar_pl.commands.plot import read_scalars
from flashar_pl.data.shards import Manifest, ShardReader
from flashar_pl.tokenizers import build_tokenizer

pytest.importorskip("tiktoken")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXACT = {
    "model.backbone.options.condition_dropout": 0.0,
    "model.optimiser.state": "fp32",
    "trainer.strategy.init_args.compute": "fp32",
    "trainer.callbacks+": "hang.Hang",
}
"""Nothing is drawn or rounded differently on another number of processes; and the run can be stopped."""
KILLED_AT = 13


def documented() -> dict[str, list[list[str]]]:
    """Words of the commands of the page's first section, by verb."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    section = text.split("## The whole way in miniature")[1].split("At 34 B")[0].replace("\\\n", "")
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    found: dict[str, list[list[str]]] = {}
    for line in lines:
        words = shlex.split(line)
        if words[0] == "flashar":
            verb = " ".join(words[1:3]) if words[1] == "tokenize" else words[1]
            found.setdefault(verb, []).append(words[1:])
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What a user has at the start. The base model has smaller weights than elsewhere in the tests: with saturated
    attention, gradients near zero turn rounding errors into steps of AdamW."""
    root = tmp_path_factory.mktemp("chain")
    emu_files.write_images(root / "own", 56, 0, "train")
    emu_files.write_images(root / "own", 9, 56, "held_out")
    emu_files.write_base(root / "data/emu35_tiny/model", scale=2)
    emu_files.write_ibq(root / "data/emu35_tiny/tokenizer")
    (root / "experiments").symlink_to(ROOT / "experiments")
    return root


def environment(**more: str) -> dict[str, str]:
    """Of a new process: without what Lightning leaves in this one."""
    left = ("PL_", "MASTER_", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)} | more


def flashar(place: Path, words: list[str]) -> str:
    """Run a command in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "flashar_pl.cli", *words], cwd=place, env=environment(), timeout=150,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-4000:]}"
    return done.stdout


def kill(place: Path, words: list[str], at: int) -> str:
    """Start a fit, and end its whole launch with SIGKILL while it stands before step `at`; what it printed."""
    with (place / "killed.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flashar_pl.cli", *words], cwd=place, env=environment(HANG_AT=str(at)), stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 120
        while not (place / "hanging").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert process.poll() is None, (place / "killed.log").read_text()[-4000:]
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert (place / "hanging").exists()
    return (place / "killed.log").read_text()


def exact(words: list[str]) -> list[str]:
    return [*words, *(part for key, value in EXACT.items() for part in (f"--{key}", str(value)))]


def curve(run: Path, tag: str) -> dict[int, float]:
    return dict(zip(*read_scalars(run)[tag], strict=True))


def check_shards(place: Path, words: dict[str, list[list[str]]]) -> None:
    """Tokenise; every image is in the data set of its shape, with its own caption."""
    printed = [flashar(place, line) for line in words["tokenize text-image"]]
    assert "56 of 56 images are in the shards (8 of 2x8 codes, 48 of 4x4 codes)" in printed[0]
    assert "captions: 0 empty" in printed[0]
    assert "everything is as the manifest says" in flashar(place, *words["tokenize check"])
    assert len(list(place.glob("check*.png"))) == 2
    for grid, wide in (("4x4", False), ("2x8", True)):
        manifest = Manifest.load(place / "data/own" / grid)
        assert (manifest.vocabulary, manifest.condition.kind) == (emu_files.CODES, "text")
        for split, n, start in (("train", 56, 0), ("validation", 9, 56)):
            ids = [i for i in range(n) if ((i + start) % emu_files.WIDE == 0) == wide]
            reader = ShardReader(manifest, split)
            samples = reader.read(np.arange(len(reader)))
            captions = [item["caption"] for item in json.loads((place / "own" / _list(split)).read_text())]
            assert sorted(samples.ids.tolist()) == ids
            assert samples.texts == [captions[i] for i in samples.ids]


def _list(split: str) -> str:
    return {"train": "train.json", "validation": "held_out.json"}[split]


def check_pictures(folder: Path, tokenizer: Path) -> None:
    """The PNG files are what the tokenizer makes of the codes."""
    codes = np.load(folder / "codes.npy")
    assert codes.shape == (4, 4, 4)
    model = build_tokenizer({"kind": "ibq", "weights": str(tokenizer)})
    with torch.no_grad():
        wanted = model.decode(torch.from_numpy(codes)).permute(0, 2, 3, 1).numpy()
    files = sorted(folder.glob("0*.png"))
    assert len(files) == 4
    for file, pixels in zip(files, wanted, strict=True):
        drawn = np.asarray(Image.open(file))
        assert drawn.shape == (64, 64, 3)
        assert np.abs(drawn.astype(int) - pixels.astype(int)).max() <= 1


def test_from_own_images_to_a_post_trained_model(place: Path) -> None:
    words = documented()
    assert list(words) == ["tokenize text-image", "tokenize check", "fit", "convert", "generate", "plot"]
    check_shards(place, words)
    start, again = words["fit"]

    reference = [word.replace("runs/own", "runs/whole") for word in exact(start)]
    said = flashar(place, reference)
    assert "67,025 parameters on 2 x cpu" in said, "averaged weights are no further parameters"
    assert "Stage 1 at step 0 of 20: vertical, vertical_head, gate train." in said
    assert "Stage 2 at step 4 of 20: backbone," in said
    killed = kill(place, exact(start), KILLED_AT)
    assert "on 2 x cpu" in killed
    run = place / "runs/own"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step=10.ckpt"]
    said = flashar(place, [*again, "--config", "runs/own/config.yaml"])  # no checkpoint may name hang.Hang by itself
    assert "devices: 2 -> '1'" in said or "devices: '2' -> '1'" in said, said
    assert "Stage 2 at step 10 of 20" in said
    assert "Stage 1" not in said

    flashar(place, *words["convert"])
    flashar(place, *words["generate"])
    check_pictures(place / "pictures", place / "data/emu35_tiny/tokenizer")
    checkpoint = "runs/own/checkpoints/step=20.ckpt"
    direct = [{"models/own": checkpoint, "pictures": "direct"}.get(word, word) for word in words["generate"][0]]
    flashar(place, direct)
    assert np.array_equal(np.load(place / "direct/codes.npy"), np.load(place / "pictures/codes.npy"))

    assert flashar(place, *words["plot"]).splitlines()[2].replace("|", " ").split()[:2] == ["own", "20"]
    assert (place / "curves.png").stat().st_size > 10_000
    check_curves(place)


def check_curves(place: Path) -> None:
    """The killed and continued run equals the one that was neither, in every point; none is missing."""
    for tag in ("train/loss", "train/horizontal", "val/nll", "train/stage", "lr/backbone"):
        found, wanted = curve(place / "runs/own", tag), curve(place / "runs/whole", tag)
        assert list(found) == list(wanted), tag
        assert list(found.values()) == pytest.approx(list(wanted.values()), abs=1e-4, rel=1e-5), tag
    losses = curve(place / "runs/own", "train/loss")
    assert list(losses) == list(range(1, 21))
    assert losses[20] < losses[1] - 1
    stages = curve(place / "runs/own", "train/stage")
    assert [step for step in stages if stages[step] == 2] == list(range(5, 21))
