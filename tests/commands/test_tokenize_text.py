"""`flashar tokenize text-image`: lists and tars with captions, buckets of aspect ratio, the authors' code tars."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from tiny_images import vq_state

from flashar_pl.data.images import BucketCrop, nearest_grid
from flashar_pl.data.shards import Manifest, ShardReader, verify
from flashar_pl.tokenizers import VQ16, build_tokenizer

SIZES = [(40, 40), (80, 40), (40, 80), (60, 45), (41, 39)]
GRIDS = ((4, 4), (3, 6), (6, 3))
SMALL = ("--shard-images", 6, "--block", 2, "--workers", 0, "--batch-size", 2)


def picture(i: int) -> Image.Image:
    pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(SIZES[i % 5], Image.Resampling.BICUBIC)


def caption(i: int) -> str:
    return "" if i == 3 else f"tasse n° {i % 9}"


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    """14 images in the layout of ShareGPT-4o-Image."""
    root = tmp_path_factory.mktemp("list")
    (root / "image").mkdir()
    for i in range(14):
        picture(i).save(root / "image" / f"{i}.png")
    items = [{"input_prompt": caption(i), "output_image": f"image/{i}.png"} for i in range(14)]
    (root / "text_to_image.json").write_text(json.dumps(items))
    return root / "text_to_image.json"


@pytest.fixture
def tokenize(run, vq):
    def call(data: object, out: Path, *words: object) -> tuple[int, str, str]:
        base = ("--data", data, "--out", out, "--tokenizer", "vq16", "--weights", vq)
        return run("tokenize", "text-image", *base, *SMALL, "--buckets", "4x4,3x6,6x3", *words)

    return call


def contents(out: Path) -> dict[int, tuple[str, np.ndarray]]:
    """id -> (caption, codes), over every grid."""
    found = {}
    for path in out.glob("*/manifest.json"):
        reader = ShardReader(Manifest.load(path), "train")
        samples = reader.read(np.arange(len(reader)))
        assert samples.texts is not None
        found |= {
            int(i): (text, codes) for i, text, codes in zip(samples.ids, samples.texts, samples.codes, strict=True)
        }
    return found


def test_a_list_goes_to_one_data_set_for_each_grid(tmp_path, tokenize, listed):
    """Guards the aspect ratio, the pairing of captions and images, and the codes."""
    code, out, _ = tokenize(listed, tmp_path / "s")
    assert code == 0
    assert {path.parent.name for path in (tmp_path / "s").glob("*/manifest.json")} == {"4x4", "3x6", "6x3"}
    assert not list((tmp_path / "s").glob(".*"))
    model = VQ16.from_official(vq_state())
    found = contents(tmp_path / "s")
    assert sorted(found) == list(range(14))
    for i, (text, codes) in found.items():
        width, height = SIZES[i % 5]
        assert codes.shape == nearest_grid(width / height, GRIDS)
        assert text == caption(i)
        data = (listed.parent / "image" / f"{i}.png").read_bytes()
        pixels = torch.from_numpy(BucketCrop(GRIDS, 4)(data))
        np.testing.assert_array_equal(codes, model.encode(pixels[None])[0].numpy())
    for grid in ("4x4", "3x6", "6x3"):
        assert verify(tmp_path / "s" / grid).samples["train"] > 0
    assert "1 empty" in out
    assert "most frequent, 2 times: 'tasse n° 0'" in out


def test_jsonl_and_tars_give_the_codes_of_the_list(tmp_path, tokenize, listed):
    tokenize(listed, tmp_path / "json")
    lines = [json.dumps({"caption": caption(i), "file_name": f"{i}.png"}) for i in range(14)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines) + "\n")
    assert tokenize(tmp_path / "list.jsonl", tmp_path / "jsonl", "--images", listed.parent / "image")[0] == 0
    with webdataset.TarWriter(str(tmp_path / "t.tar"), encoder=False) as tar:
        for i in range(14):
            data = (listed.parent / "image" / f"{i}.png").read_bytes()
            tar.write({"__key__": f"{i:03d}", "png": data, "txt": caption(i).encode()})
    assert tokenize(tmp_path / "t.tar", tmp_path / "tar")[0] == 0
    wanted = contents(tmp_path / "json")
    for name in ("jsonl", "tar"):
        found = contents(tmp_path / name)
        assert {i: text for i, (text, _) in found.items()} == {i: text for i, (text, _) in wanted.items()}
        assert all(np.array_equal(found[i][1], codes) for i, (_, codes) in wanted.items())


def test_restarts_do_not_matter(tmp_path, tokenize, listed, monkeypatch):
    tokenize(listed, tmp_path / "one")
    from flashar_pl.data import encode

    original = encode.ImageEncoder.__call__
    with monkeypatch.context() as patch:
        calls = []

        def dying(self, pixels):
            calls.append(len(pixels))
            if len(calls) == 5:
                raise KeyboardInterrupt
            return original(self, pixels)

        patch.setattr(encode.ImageEncoder, "__call__", dying)
        assert tokenize(listed, tmp_path / "two")[0] == 130
    assert tokenize(listed, tmp_path / "two")[0] == 0
    for grid in ("4x4", "3x6", "6x3"):
        one, two = Manifest.load(tmp_path / "one" / grid), Manifest.load(tmp_path / "two" / grid)
        assert one.splits == two.splits


def test_a_missing_image_is_listed(tmp_path, tokenize, listed):
    shutil.copytree(listed.parent, tmp_path / "copy")
    (tmp_path / "copy" / "image" / "7.png").unlink()
    code, out, _ = tokenize(tmp_path / "copy" / listed.name, tmp_path / "s", "--max-bad-share", 0.1)
    assert code == 0
    assert "unreadable: 1" in out
    assert "image/7.png\tFileNotFoundError" in (tmp_path / "s" / "bad_images.train.txt").read_text()
    assert sorted(contents(tmp_path / "s")) == [i for i in range(14) if i != 7]


def test_the_authors_code_tars(tmp_path, run, refused):
    """torch.save'd int64 grids with a caption; two shapes, one file that is no plain tensor."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 131072, (2, 3) if i % 3 else (4, 4)) for i in range(10)]
    for part in range(2):
        with webdataset.TarWriter(str(tmp_path / f"train.rank{part}.part0.tar"), encoder=False) as tar:
            for i in range(5 * part, 5 * part + 5):
                buffer = io.BytesIO()
                torch.save(torch.from_numpy(codes[i]) if i != 8 else {"codes": 1}, buffer)
                tar.write({"__key__": f"stem{i}", "pt": buffer.getvalue(), "txt": caption(i).encode()})
    words = ("tokenize", "text-image", "--data", f"{tmp_path}/train.*.tar", "--out", tmp_path / "s", *SMALL)
    assert "--image-size, --buckets, --crop and --validation are for images" in refused(*words, "--image-size", 512)
    assert run(*words, "--max-bad-share", 0.1)[0] == 0
    found = contents(tmp_path / "s")
    assert sorted(found) == [i for i in range(10) if i != 8]
    assert all(text == caption(i) and np.array_equal(grid, codes[i]) for i, (text, grid) in found.items())
    manifest = Manifest.load(tmp_path / "s" / "2x3")
    assert (manifest.vocabulary, manifest.tokenizer, manifest.condition.kind) == (131072, {"kind": "ibq"}, "text")
    assert run("tokenize", "check", tmp_path / "s")[0] == 0


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("bomb-went-off"),)


def test_code_tars_run_no_code(tmp_path, run, monkeypatch):
    """A .pt member is a pickle, and tars come from strangers."""
    monkeypatch.chdir(tmp_path)
    with webdataset.TarWriter("train.tar", encoder=False) as tar:
        for i in range(4):
            buffer = io.BytesIO()
            torch.save(Bomb() if i == 2 else torch.full((2, 2), i), buffer)
            tar.write({"__key__": f"stem{i}", "pt": buffer.getvalue(), "txt": b"a cup"})
    assert run("tokenize", "text-image", "--data", "train.tar", "--out", "s", *SMALL, "--max-bad-share", 0.5)[0] == 0
    assert not Path("bomb-went-off").exists()
    assert sorted(contents(Path("s"))) == [0, 1, 3]
    assert "stem2" in Path("s/bad_images.train.txt").read_text()


def test_ibq(tmp_path, run, listed):
    """The Emu3.5 tokenizer from its published directory layout."""
    golden = Path(__file__).parent.parent / "golden" / "ibq"
    settings = json.loads((golden / "ibq_tiny.json").read_text())
    folder = tmp_path / "ibq"
    folder.mkdir()
    from safetensors.torch import load_file, save_file

    state = load_file(golden / "ibq_tiny_state.safetensors")
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings["ddconfig"]))
    model = build_tokenizer({"kind": "ibq", "weights": str(folder)})
    size = 2 * model.downsample
    words = ("--data", listed, "--out", tmp_path / "s", "--weights", folder, "--image-size", size)
    assert run("tokenize", "text-image", *words, *SMALL)[0] == 0
    found = contents(tmp_path / "s")
    assert sorted(found) == list(range(14))
    assert found[0][1].shape == (2, 2)
    assert run("tokenize", "check", tmp_path / "s", "--out", tmp_path / "c.png", "--decode", 2)[0] == 0
    assert len(list(tmp_path.glob("c-*.png"))) == len(list((tmp_path / "s").glob("*/manifest.json"))) > 1


def test_wrong_input_is_refused(tmp_path, refused, listed, vq):
    words = ("tokenize", "text-image", "--data", listed, "--out", tmp_path / "s", "--weights", vq)
    words += ("--tokenizer", "vq16")
    assert "not both" in refused(*words, "--image-size", 16, "--buckets", "4x4")
    assert "expected HEIGHTxWIDTH" in refused(*words, "--buckets", "4x4,wide")
    assert "multiple of 4" in refused(*words, "--image-size", 18)
    assert "--vocabulary is for tars of codes" in refused(*words, "--vocabulary", 9)
    (tmp_path / "bad.json").write_text('[{"a": "b"}]')
    assert "none of which is known" in refused(*words[:3], tmp_path / "bad.json", *words[4:])
    assert not (tmp_path / "s").exists()


def test_two_downloads_become_train_and_validation_shards_of_one_mixture(tmp_path, run, vq, listed):
    """Guards counts that are not what the shards hold, a caption in two splits, and ratios that --crop square keeps."""
    shutil.copytree(listed.parent, tmp_path / "one")
    shutil.copytree(listed.parent, tmp_path / "two")
    items = json.loads(listed.read_text())[:9]
    edits = [{"input_prompt": "make it red", "input_image": "image/1.png", "output_image": "image/2.png"}]
    (tmp_path / "two" / "gen.json").write_text(json.dumps(items + edits))
    both = f"{tmp_path / 'one' / listed.name},{tmp_path / 'two' / 'gen.json'}"
    words = ("--data", both, "--out", tmp_path / "s", "--tokenizer", "vq16", "--weights", vq, *SMALL)
    code, out, err = run("tokenize", "text-image", *words, "--crop", "square", "--image-size", 16, "--validation", 4)
    assert code == 0, err
    counts = {}
    for name in ("one", "two"):
        manifest = Manifest.load(tmp_path / "s" / name / "4x4")
        readers = [ShardReader(manifest, split) for split in ("train", "validation")]
        train, validation = (reader.read(np.arange(len(reader))).texts for reader in readers)
        assert not set(train) & set(validation)
        counts[name] = [len(train), len(validation)]
        assert f"{tmp_path / 's' / name}: {len(train)} train, {len(validation)} validation pairs" in out
    assert [sum(each) for each in counts.values()] == [14, 9]
    assert all(3 <= validation <= 4 for _, validation in counts.values())
    assert f"--data.shards '{{{tmp_path / 's' / 'one'}: {counts['one'][0]}, " in out
    assert "edits an input image" in out
