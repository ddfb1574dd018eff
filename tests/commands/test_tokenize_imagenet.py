"""`flashar tokenize imagenet` and `npy`: restarts, processes, damaged images, the codes themselves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import make_images, vq_state

from flashar_pl.data.images import centre_crop, ten_crop
from flashar_pl.data.shards import Manifest, ShardReader, verify
from flashar_pl.ranks import Rank
from flashar_pl.tokenizers import VQ16

CLASSES, EACH = 3, 9  # as make_images has them
SMALL = ("--image-size", 16, "--shard-images", 5, "--block", 3, "--workers", 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture
def tokenize(run, images, vq):
    def call(out: Path, *words: object, source: Path | str = images) -> tuple[int, str, str]:
        return run("tokenize", "imagenet", "--images", source, "--out", out, "--weights", vq, *SMALL, *words)

    return call


def contents(out: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, labels and codes of all crops, in the order of the ids."""
    manifest = Manifest.load(out)
    reader = ShardReader(manifest, split)
    every = np.arange(len(reader))
    crops = [reader.read(every, np.full(len(every), k)) for k in range(manifest.crops)]
    by_id = np.argsort(crops[0].ids)
    return crops[0].ids[by_id], crops[0].labels[by_id], np.stack([c.codes for c in crops], axis=1)[by_id]


def test_ten_crop_codes_are_those_of_the_tokenizer(tmp_path, tokenize, images):
    """Guards the order of images, labels and crops, and the pixels that reach the tokenizer."""
    code, out, _ = tokenize(tmp_path / "s", "--ten-crop", "--crop-range", 1.15)
    assert code == 0
    assert "27 of 27 images are in the shards (27 of 4x4 codes)" in out
    ids, labels, codes = contents(tmp_path / "s")
    assert ids.tolist() == list(range(27))
    assert labels.tolist() == [i // EACH for i in range(27)]
    model = VQ16.from_official(vq_state())
    for i in (0, 10, 26):
        with Image.open(images / f"n{i // EACH}" / f"{i % EACH}.JPEG") as image:
            pixels = torch.from_numpy(centre_crop(image, 18))  # int(16 * 1.15)
        np.testing.assert_array_equal(codes[i], model.encode(ten_crop(pixels[None], 16)[0]).numpy())
    manifest = Manifest.load(tmp_path / "s")
    assert (manifest.crops, manifest.grid, manifest.vocabulary) == (10, (4, 4), 64)
    evaluated = ShardReader(manifest, "train").read(np.arange(27))
    np.testing.assert_array_equal(evaluated.codes, codes[evaluated.ids, 4], "evaluation takes the centre")
    assert manifest.tokenizer["kind"] == "vq16"
    assert verify(tmp_path / "s").labels == {"train": [EACH] * CLASSES}
    assert not list((tmp_path / "s").glob(".*")), "nothing temporary stays"


def test_images_are_shuffled_unless_asked_otherwise(tmp_path, tokenize):
    """Guards against blocks of a single class, which make batches of a few classes."""
    tokenize(tmp_path / "a")
    tokenize(tmp_path / "b", "--keep-order")
    order = {name: ShardReader(Manifest.load(tmp_path / name), "train").read(np.arange(27)).ids for name in "ab"}
    assert order["b"].tolist() == list(range(27))
    assert len(set(order["a"][:9] // EACH)) > 1
    np.testing.assert_array_equal(contents(tmp_path / "a")[2], contents(tmp_path / "b")[2])


def test_image_and_mirror_without_ten_crop(tmp_path, tokenize, images):
    tokenize(tmp_path / "s")
    codes = contents(tmp_path / "s")[2]
    model = VQ16.from_official(vq_state())
    with Image.open(images / "n1" / "4.JPEG") as image:
        pixels = torch.from_numpy(centre_crop(image, 16))
    np.testing.assert_array_equal(codes[13], model.encode(torch.stack([pixels, pixels.flip(-1)])).numpy())


@pytest.mark.slow
def test_two_devices(tmp_path, tokenize, images, vq):
    """Two ranks started by Fabric, through the command line: the shards of one, and one report."""
    tokenize(tmp_path / "one")
    words = ("--images", images, "--out", tmp_path / "two", "--weights", vq, "--devices", 2, "--device", "cpu")
    command = [sys.executable, "-m", "flashar_pl.cli", "tokenize", "imagenet", *words, *SMALL]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("27 of 27 images are in the shards") == 1
    assert Manifest.load(tmp_path / "one").splits == Manifest.load(tmp_path / "two").splits
    assert not list((tmp_path / "two").glob(".*"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_one_after_the_other(tmp_path, tokenize, images, vq, ranks, monkeypatch):
    """Guards the division of parts: every order of ranks, a restart with another number, and only one merge."""
    from flashar_pl.data.jobs import ClassImageOptions, imagenet_job
    from flashar_pl.data.tokenise import tokenise
    from flashar_pl.options import CodecOptions, ShardOptions

    class Alone(Rank):
        """A rank whose fellows come later: they left nothing to wait for."""

        def barrier(self) -> None:
            raise ValueError("the others are not here")

        def first(self, build):
            return build()

    tokenize(tmp_path / "one")
    build = partial(
        imagenet_job, ClassImageOptions(str(images), 16), CodecOptions(weights=vq),
        ShardOptions(str(tmp_path / "many"), workers=0, block=3, shard_images=5),
    )  # fmt: skip
    for rank in reversed(range(1, ranks)):
        with pytest.raises(ValueError, match="not here"):
            tokenise(build, Alone(rank, ranks))
    report = tokenise(build, Rank())
    assert report is not None
    assert report["written"] == 27
    assert Manifest.load(tmp_path / "one").splits == Manifest.load(tmp_path / "many").splits


def in_group(group: int) -> bool:
    """Whether a process of the group still runs; one that has ended and waits for its parent holds nothing."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


@pytest.mark.slow
def test_a_killed_run_continues(tmp_path, tokenize, vq):
    """kill -9 in the middle, with a worker process: the result is that of a run that was never interrupted."""
    source = make_images(tmp_path / "images", each=30)
    out = tmp_path / "killed"
    words = ("--ten-crop", "--workers", "1", "--shard-images", "7")
    command = ["tokenize", "imagenet", "--images", source, "--out", out, "--weights", vq, *SMALL, *words]
    running = subprocess.Popen([sys.executable, "-m", "flashar_pl.cli", *map(str, command)], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob(".train/0*"))) < 3:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    while Path("/proc").exists() and in_group(running.pid):  # its worker holds the lock until it has ended, too
        time.sleep(0.01)
    assert 3 <= len(list(out.glob(".train/0*/part.json"))) < 13
    with pytest.raises(ValueError, match=r"are unfinished: .* it continues"):  # no reader takes it for complete
        Manifest.load(out)
    code, _, err = tokenize(out, *words, source=source)
    assert code == 0, err
    tokenize(tmp_path / "whole", *words, source=source)
    assert Manifest.load(out).splits == Manifest.load(tmp_path / "whole").splits
    assert contents(out)[0].tolist() == list(range(90))
    verify(out)


def test_finished_parts_are_not_done_again(tmp_path, tokenize, monkeypatch):
    """Guards hours of work: only the part that was being written is lost."""
    from flashar_pl.data import encode

    passes = []
    original = encode.ImageEncoder.__call__

    def counting(self, pixels):
        passes.append(len(pixels))
        if sum(passes) > 17:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(encode.ImageEncoder, "__call__", counting)
    assert tokenize(tmp_path / "s", "--batch-size", 4)[0] == 130
    assert len(list((tmp_path / "s" / ".train").glob("0*"))) == 3
    passes.clear()
    assert tokenize(tmp_path / "s", "--batch-size", 4)[0] == 0
    assert sum(passes) == 27 - 15
    passes.clear()
    code, out, _ = tokenize(tmp_path / "s", "--batch-size", 4)
    assert code == 0
    assert "27 of 27" in out
    assert passes == [], "a complete split is left alone"


def test_a_kill_between_moving_tars_and_the_report(tmp_path, tokenize, monkeypatch):
    """Guards the merge: it may be repeated from any point."""
    from flashar_pl.data import tokenise

    for target, name in [(Manifest, "save"), (tokenise, "write_json")]:
        out = tmp_path / name
        calls = []
        kept = getattr(target, name)

        def dying(*args, _name=name, _calls=calls, _kept=kept):
            if "part" in str(args[1 if _name == "save" else 0]) or "job.json" in str(args[0]):
                return _kept(*args)
            _calls.append(args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(target, name, dying)
            assert tokenize(out)[0] == 130
        assert len(calls) == 1
        assert tokenize(out)[0] == 0
        verify(out)
        assert not list(out.glob(".*"))


def test_unreadable_images_are_skipped_counted_and_listed(tmp_path, tokenize, refused, images, vq):
    source = tmp_path / "images"
    shutil.copytree(images, source)
    (source / "n1" / "3.JPEG").write_bytes((source / "n1" / "3.JPEG").read_bytes()[:200])
    (source / "n2" / "0.JPEG").write_bytes(b"")
    words = ("tokenize", "imagenet", "--images", source, "--out", tmp_path / "s", "--weights", vq, *SMALL)
    error = refused(*words)
    assert "of 27 samples cannot be read, more than the share of 0.01" in error
    assert ".JPEG: " in error
    code, out, _ = tokenize(tmp_path / "s", "--max-bad-share", 0.08, source=source)
    assert code == 0
    assert "25 of 27 images are in the shards" in out
    lines = (tmp_path / "s" / "bad_images.train.txt").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["12", f"{source}/n1/3.JPEG"], ["18", f"{source}/n2/0.JPEG"]]
    report = json.loads((tmp_path / "s" / "tokenize-train.json").read_text())
    assert (report["samples"], report["written"], report["unreadable"]) == (27, 25, 2)
    ids, labels, _ = contents(tmp_path / "s")
    assert ids.tolist() == [i for i in range(27) if i not in (12, 18)]
    assert labels.tolist() == [i // EACH for i in ids]


def test_an_image_that_was_away_is_read_after_a_restart(tmp_path, tokenize, images):
    """Guards against loss: a mount that vanished for a while must not leave holes in parts that count as finished."""
    source = tmp_path / "images"
    shutil.copytree(images, source)
    for c in range(CLASSES):  # the names stay listed, the contents are away
        (source / f"n{c}" / "0.JPEG").rename(tmp_path / f"away{c}")
        (source / f"n{c}" / "0.JPEG").symlink_to(tmp_path / "nothing")
    assert tokenize(tmp_path / "s", "--max-bad-share", 0.1, source=source)[0] == 2
    for c in range(CLASSES):
        (source / f"n{c}" / "0.JPEG").unlink()
        (tmp_path / f"away{c}").rename(source / f"n{c}" / "0.JPEG")
    assert "27 of 27" in tokenize(tmp_path / "s", "--max-bad-share", 0.1, source=source)[1]


def test_a_second_split_joins_the_first(tmp_path, tokenize, refused, images, vq):
    assert tokenize(tmp_path / "s")[0] == 0
    first = Manifest.load(tmp_path / "s").splits["train"]
    held_out = make_images(tmp_path / "held_out", each=EACH - 1, seed=1)
    assert tokenize(tmp_path / "s", "--split", "validation", source=held_out)[0] == 0
    manifest = Manifest.load(tmp_path / "s")
    assert list(manifest.splits) == ["train", "validation"]
    assert manifest.splits["train"] == first
    verify(tmp_path / "s")
    words = ("tokenize", "imagenet", "--images", images, "--out", tmp_path / "s", "--split", "test", *SMALL)
    assert "has crops 2, this job makes 10" in refused(*words, "--weights", vq, "--ten-crop")
    assert "has grid (4, 4), this job makes (5, 5)" in refused(*words, "--weights", vq, "--image-size", 20)
    state = vq_state()
    state["quantize.embedding.weight"][0, 0] += 1
    torch.save({"model": state}, tmp_path / "other.pt")
    assert "made with other weights" in refused(*words, "--weights", tmp_path / "other.pt")


def test_another_split_has_the_same_classes(tmp_path, tokenize, refused, images, vq):
    """Guards labels: cow got the id of dog, and a split of fewer classes was refused."""
    assert tokenize(tmp_path / "s")[0] == 0
    fewer = make_images(tmp_path / "fewer", each=2)
    shutil.rmtree(fewer / "n1")
    assert tokenize(tmp_path / "s", "--split", "validation", source=fewer)[0] == 0
    manifest = Manifest.load(tmp_path / "s")
    assert manifest.class_names == ("n0", "n1", "n2")
    assert contents(tmp_path / "s", "validation")[1].tolist() == [0, 0, 2, 2]
    (fewer / "n2").rename(fewer / "cow")
    (tmp_path / "names.txt").write_text("n0\ncow\nn2\n")
    words = ("tokenize", "imagenet", "--images", fewer, "--out", tmp_path / "s", "--split", "test", *SMALL)
    error = refused(*words, "--weights", vq)
    assert "has folders that the shards that are there lack: cow; expected n0, n1, n2." in error
    error = refused(*words, "--weights", vq, "--classes", tmp_path / "names.txt")
    assert "has cow where the shards that are there have n1" in error
    assert (Manifest.load(tmp_path / "s"), (tmp_path / "s" / ".test").exists()) == (manifest, False)


def test_everything_is_accounted_for(tmp_path, tokenize, run):
    source = make_images(tmp_path / "images")
    (source / ".git").mkdir()
    (source / "empty").mkdir()
    (source / "n0" / "notes.txt").write_text("")
    (source / "n1" / "3.JPEG").write_bytes(b"")
    code, out, _ = tokenize(tmp_path / "s", "--max-bad-share", 0.1, source=source)
    assert code == 0
    left_out = "1 hidden (such as .git), 1 folders without images (such as empty), 1 not named as an image (such as n0/"
    assert f"found 30 entries, used 26, left out 4: {left_out}notes.txt), 1 unreadable or without" in out
    account = Manifest.load(tmp_path / "s").accounts["train"]
    assert (account["found"], account["used"], sum(account["left_out"].values())) == (30, 26, 4)
    checked = run("tokenize", "check", tmp_path / "s")[1]
    assert "3 classes, 8 (class 1 n1) to 9 (class 0 n0) samples each" in checked
    assert "of 30 entries of the input 26 were used; 1 hidden; " in checked
    assert tokenize(tmp_path / "s", "--max-bad-share", 0.1, source=source)[1].splitlines()[-4:] == out.splitlines()[-4:]


def test_a_bad_sample_may_end_the_run(tmp_path, tokenize, images):
    source = shutil.copytree(images, tmp_path / "images")
    (source / "n1" / "3.JPEG").write_bytes(b"")
    code, _, error = tokenize(tmp_path / "s", "--on-bad-sample", "stop", "--max-bad-share", 1, source=source)
    assert code == 2
    assert "1 of 27 samples cannot be read, and --on-bad-sample stop allows none" in error
    assert f"{source}/n1/3.JPEG: its beginning is that of no JPEG" in error
    assert tokenize(tmp_path / "s", "--max-bad-share", 1, source=source)[0] == 0


def test_labels_known_to_be_bad_end_the_run_before_any_work(tmp_path, tokenize, images):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "t.tar"), encoder=False) as tar:
        for file in sorted(images.glob("*/*.JPEG")):
            key = f"{file.parent.name}_{file.stem}"
            tar.write({"__key__": key, "jpg": file.read_bytes(), "cls": b"7" if key == "n1_3" else b"1"})
    words = (tmp_path / "s", "--num-classes", 3)
    code, _, error = tokenize(*words, source=tmp_path / "t.tar")
    assert code == 2
    assert "1 of 27 samples" in error
    assert "t.tar: n1_3: the label '7' is no class id 0 .. 2" in error
    assert not (tmp_path / "s").exists()
    assert "26 of 27" in tokenize(*words, "--max-bad-share", 0.1, source=tmp_path / "t.tar")[1]


def test_two_at_once_into_one_directory(tmp_path, tokenize, monkeypatch):
    """Guards against srun without torchrun's variables: both took themselves for the only one, and clashed."""
    from flashar_pl.data import tokenise

    out, run_parts, second = tmp_path / "s", tokenise._run_parts, []

    def interrupted(*words):
        second.append(tokenize(out, "--split", "validation"))
        run_parts(*words)

    monkeypatch.setattr(tokenise, "_run_parts", interrupted)
    assert tokenize(out)[0] == 0
    assert second[0][0] == 2
    assert f"another flashar tokenize is writing to {out}." in second[0][2]
    assert list(Manifest.load(out).splits) == ["train"]


def test_a_restart_with_other_settings_is_refused(tmp_path, tokenize, refused, images, vq):
    assert tokenize(tmp_path / "s")[0] == 0
    words = ("tokenize", "imagenet", "--images", images, "--out", tmp_path / "s", "--weights", vq, *SMALL)
    assert "is complete, but was made with block = 3; this command has 4" in refused(*words, "--block", 4)
    (tmp_path / "s2" / ".train").mkdir(parents=True)
    shutil.copy(tmp_path / "s" / "tokenize-train.json", tmp_path / "s2" / "x")
    settings = json.loads((tmp_path / "s" / "tokenize-train.json").read_text())["settings"]
    (tmp_path / "s2" / ".train" / "job.json").write_text(json.dumps(settings | {"source": "other"}))
    error = refused(*(tmp_path / "s2" if word == tmp_path / "s" else word for word in words))
    assert "was begun with source = 'other'" in error


def test_wrong_input_is_refused_before_any_work(tmp_path, refused, images, vq):
    words = ["tokenize", "imagenet", "--images", images, "--out", tmp_path / "s", "--weights", vq]
    assert "only with --ten-crop" in refused(*words, "--crop-range", 1.1)
    assert "expected 1 or more" in refused(*words, "--ten-crop", "--crop-range", 0.9)
    assert "multiple of 4" in refused(*words, "--image-size", 30)
    assert "share from 0 to 1" in refused(*words, "--max-bad-share", 2)
    assert "--num-classes is for tars" in refused(*words, "--num-classes", 5)
    assert "no VQ weights file was given" in refused(*words[:-2])
    words[3] = tmp_path / "nowhere"
    assert "nowhere" in refused(*words)
    assert not (tmp_path / "s").exists()
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("")
    words[3] = images
    assert "exists and holds no shards" in refused(*words)


def test_tars_give_the_codes_of_the_folder(tmp_path, tokenize, images):
    import webdataset

    files = sorted(images.glob("*/*.JPEG"))
    for k, part in enumerate((files[:11], files[11:])):
        with webdataset.TarWriter(str(tmp_path / f"t-{k}.tar"), encoder=False) as tar:
            for file in part:
                label = file.parent.name[1:].encode()
                tar.write({"__key__": f"{file.parent.name}_{file.stem}", "jpg": file.read_bytes(), "cls": label})
    assert tokenize(tmp_path / "tar", "--num-classes", 3, source=f"{tmp_path}/t-{{0..1}}.tar")[0] == 0
    assert tokenize(tmp_path / "folder")[0] == 0
    for a, b in zip(contents(tmp_path / "tar"), contents(tmp_path / "folder"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_npy_files(tmp_path, run, refused):
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 64, (12, 10, 16)), rng.integers(0, 5, 12)
    for name, values in (("c", codes[:, None]), ("l", labels[:, None])):
        (tmp_path / name).mkdir()
        for i, value in enumerate(values):
            np.save(tmp_path / name / f"{i}.npy", value)
    words = ("tokenize", "npy", "--codes", tmp_path / "c", "--labels", tmp_path / "l", "--out", tmp_path / "s")
    words += ("--shard-images", 5, "--workers", 0)
    assert "has the label" in refused(*words, "--num-classes", 2)
    shutil.rmtree(tmp_path / "s")
    code, out, _ = run(*words, "--num-classes", 5, "--vocabulary", 64)
    assert code == 0, out
    found = contents(tmp_path / "s")
    assert found[0].tolist() == list(range(12))
    np.testing.assert_array_equal(found[1], labels)
    np.testing.assert_array_equal(found[2], codes.reshape(12, 10, 4, 4))
    shutil.rmtree(tmp_path / "s")
    assert "the vocabulary of 60 allows" in refused(*words, "--num-classes", 5, "--vocabulary", 60)
