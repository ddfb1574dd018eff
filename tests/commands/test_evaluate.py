"""`flashar evaluate`: results, files, and refusals. Processes, kills and resumption: test_evaluate_processes.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_toys import tiny_backbone
from evaluate_toys import evaluation, sample_images, save_classifier
from PIL import Image

from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.runs import CHECKPOINT_KEY
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.evaluate.identity import path_digest
from flashar_pl.evaluate.samples import sample_labels
from flashar_pl.metrics import distribution, table
from flashar_pl.metrics.extractor import FeatureExtractor, Features
from flashar_pl.metrics.features import load_extractor
from flashar_pl.metrics.reference import ReferenceStatistics, reference_from_batches
from flashar_pl.metrics.table import choose_metrics
from flashar_pl.models import RasterAR
from flashar_pl.tokenizers import PixelTokenizer


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("features") / "classifier")


@pytest.fixture
def base(work, flashar_model, shards, classifier, tmp_path_factory, monkeypatch) -> list[object]:
    """A short evaluation against the test digits, in an empty directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    return evaluation(flashar_model, shards, classifier)


def real_images(shards: str) -> torch.Tensor:
    from flashar_pl.data.shards import Manifest, ShardReader

    codes = ShardReader(Manifest.load(shards), "test").read(np.arange(297)).codes
    return PixelTokenizer(17).decode(torch.from_numpy(codes))


def result_of(folder: str) -> dict:
    return json.loads((Path(folder) / "evaluation.json").read_text())


def test_results_equal_plain_computations(run, base, flashar_model, shards, classifier):
    """Guards the whole chain: labels, seeds, decoding, features, moments, and the count of a padded last batch."""
    code, out, err = run(*base, "--cfg-scale", 1.5, "--seed", 3, "--out", "eval")
    assert code == 0, err
    result = result_of("eval")
    images, codes = sample_images(flashar_model, 75, 3, 1.5)
    assert (np.load("eval/codes.npy") == codes.numpy()).all()
    assert np.load("eval/codes.npy").dtype == np.uint8
    extractor = load_extractor(classifier)
    drawn, real = extractor.extract(images), extractor(real_images(shards))
    precision, recall = distribution.precision_recall(drawn.pool, real, 3)
    expected = {
        "fid": distribution.frechet_distance(drawn.pool.double(), real.double()),
        "is": distribution.inception_score(drawn.logits, kind="logits"),
        "precision": precision,
        "recall": recall,
        "f1": distribution.f1_score(precision, recall),
    }
    assert list(result["metrics"]) == list(expected)
    assert result["metrics"] == pytest.approx(expected, rel=1e-5)
    assert set(result["left_out"]) == {"sfid", "kid"}
    assert "kid        left out: 75 images; it needs 1,000" in out
    assert sorted(p.name for p in Path("eval").iterdir()) == ["codes.npy", "evaluation.json", "grid.png"]


def test_the_report_says_everything_a_result_depends_on(run, base, classifier):
    assert run(*base, "--labels", "random", "--metrics", "fid", "--out", "eval")[0] == 0
    result = result_of("eval")
    assert list(result["metrics"]) == ["fid"]
    assert result["samples"]["features"] == load_extractor(classifier).fingerprint()
    assert len(result["samples"]["checkpoint_sha256"]) == len(result["samples"]["codes_sha256"]) == 64
    facts = result["reference"]
    assert (facts["kind"], facts["split"], facts["images"], facts["feature_rows"]) == ("shards", "test", 297, 297)
    assert result["settings"]["labels"] == "random"
    assert result["checkpoint"]["model"]["kind"] == "flashar"
    assert (result["samples"]["plan"], result["samples"]["image_size"]) == ("diagonal", [8, 8])
    assert result["versions"]["torch"] == torch.__version__
    assert result["run"]["images_drawn"] == 75
    assert Image.open("eval/grid.png").size == (8 * 64 + 7 * 2, 4 * 64 + 3 * 2)
    assert result["samples"]["grid_classes"] == list(range(8))


def test_npz_is_what_the_adm_evaluator_reads_and_equal_sets_have_distance_zero(run, base, flashar_model):
    """Guards the order of axes and the padding rows."""
    assert run(*base, "--save-npz", "--out", "first")[0] == 0
    with np.load("first/samples.npz") as archive:
        assert archive.files == ["arr_0"]
        stored = archive["arr_0"]
    images, _ = sample_images(flashar_model, 75, 0, 1.0)
    assert stored.dtype == np.uint8
    assert (stored == images.permute(0, 2, 3, 1).numpy()).all()
    words = [*base]
    words[words.index("--reference") + 1] = "first/samples.npz"
    code, out, err = run(*words, "--metrics", "fid,precision,recall", "--out", "second")
    assert code == 0, err
    assert result_of("second")["metrics"] == {"fid": 0.0, "precision": 1.0, "recall": 1.0}
    assert "fid        0\n" in out
    assert result_of("second")["reference"]["arrays"] == {"arr_0": [75, 8, 8, 3]}


def test_references_of_every_kind_agree_and_are_computed_once(run, base, shards, monkeypatch):
    """The same images as shards, PNG files, an .npz of images, and an .npz of their moments."""
    images = real_images(shards)
    Path("real/deeper").mkdir(parents=True)
    for i, image in enumerate(images):
        folder = "real" if i % 2 else "real/deeper"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{folder}/{i:03d}.png")
    np.savez("real.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    extractor = load_extractor(base[base.index("--features") + 1])
    reference_from_batches(extractor, [images]).save("moments.npz")
    results = []
    for i, place in enumerate((shards, "real", "real.npz", "moments.npz")):
        words = [*base, "--cache", "cache", "--out", f"eval{i}"]
        words[words.index("--reference") + 1] = place
        assert run(*words)[0] == 0
        results.append(result_of(f"eval{i}"))
    for result in results[1:]:
        assert result["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-6, abs=1e-8)
        assert result["reference"]["images"] == 297
    assert len(list(Path("cache").iterdir())) == 3

    def again(*args, **kwargs):
        raise AssertionError("computed twice")

    monkeypatch.setattr("flashar_pl.evaluate.reference.reference_from_batches", again)
    for i, place in enumerate((shards, "real", "real.npz")):
        words = [*base, "--cache", "cache", "--metrics", "fid", "--out", f"again{i}"]
        words[words.index("--reference") + 1] = place
        assert run(*words)[0] == 0
        assert result_of(f"again{i}")["metrics"]["fid"] == results[i]["metrics"]["fid"]


def test_hashes_of_directories_follow_every_weight_file_and_no_card(tmp_path):
    """Sharded checkpoints keep their weights in files of other names than converted models."""
    folder = tmp_path / "model"
    (folder / "shards").mkdir(parents=True)
    for name in ("config.json", "shards/__0_0.distcp"):
        (folder / name).write_text("one")
    first = path_digest(folder)
    for name in ("README.md", ".cache"):
        (folder / name).write_text("a card")
    assert path_digest(folder) == first
    (folder / "shards/__0_0.distcp").write_text("two")
    second = path_digest(folder)
    assert second != first
    (folder / "shards/__0_0.distcp").rename(folder / "shards/__1_0.distcp")
    assert path_digest(folder) not in (first, second)


def test_balanced_labels_alternate_and_random_labels_are_uniform():
    """Labels sorted by class would leave 100 classes in each 5,000-image part of the Inception Score."""
    assert sample_labels("balanced", 7, 3, 0) == [0, 1, 2, 0, 1, 2, 0]
    drawn = np.bincount(sample_labels("random", 5000, 10, 4), minlength=10)
    assert drawn.sum() == 5000
    assert drawn.min() > 400
    assert len(set(drawn.tolist())) > 1
    assert sample_labels("random", 50, 10, 4) == sample_labels("random", 50, 10, 4)
    assert sample_labels("random", 50, 10, 4) != sample_labels("random", 50, 10, 5)


class Spatial(FeatureExtractor):
    num_features, num_spatial, num_classes = 6, 40, 3

    def extract(self, images: torch.Tensor) -> Features:
        x = images.float().flatten(2) / 64  # (B, 3, 64)
        return Features(torch.cat([x.mean(2), x.std(2)], 1), x[:, 0, 10:50], x.amax(2))

    def fingerprint(self) -> str:
        return "spatial"


def statistics(n: int | None, rows: int | None, spatial: bool = True) -> ReferenceStatistics:
    square = np.eye(40) if spatial else None
    kept = None if rows is None else np.zeros((rows, 6), np.float32)
    return ReferenceStatistics(np.zeros(6), np.eye(6), n, None if square is None else square[0], square, kept)


def test_metrics_that_are_not_possible_are_left_out_with_a_reason_or_refused():
    everything, nothing = choose_metrics(None, Spatial(), statistics(5000, 2000), 5000, None)
    assert everything == ["fid", "sfid", "is", "precision", "recall", "f1", "kid"]
    assert nothing == {}
    chosen, left_out = choose_metrics(None, Spatial(), statistics(None, None, spatial=False), 5000, None)
    assert chosen == ["fid", "is"]
    assert left_out["sfid"] == "the reference has no spatial moments (mu_s, sigma_s)"
    assert set(left_out) == {"sfid", "precision", "recall", "f1", "kid"}
    with pytest.raises(ValueError, match="not possible: sfid: the reference has no spatial moments"):
        choose_metrics(["fid", "sfid"], Spatial(), statistics(50, 50, spatial=False), 50, None)
    with pytest.raises(ValueError, match="kid: 999 images; it needs 1,000 on either side"):
        choose_metrics(["kid"], Spatial(), statistics(5000, 2000), 999, None)
    with pytest.raises(ValueError, match="unknown FID"):
        choose_metrics(["FID"], Spatial(), statistics(50, 50), 50, None)


def test_too_few_samples_are_refused_on_either_side():
    """40 spatial features have a singular covariance up to 40 samples."""
    assert "sfid" in choose_metrics(None, Spatial(), statistics(41, 41), 41, None)[0]
    with pytest.raises(ValueError, match="40 samples are too few for sfid: its covariance of 40 features needs 41"):
        choose_metrics(None, Spatial(), statistics(50, 50), 40, None)
    with pytest.raises(ValueError, match="30 reference images are too few for sfid"):
        choose_metrics(["sfid"], Spatial(), statistics(30, 30), 100, None)
    assert "sfid" in choose_metrics(None, Spatial(), statistics(30, 30), 20, 20)[0]
    with pytest.raises(ValueError, match=r"19 samples are too few for fid: .* needs 20"):
        choose_metrics(["fid"], Spatial(), statistics(30, 30), 19, 20)


def test_spatial_features_and_kid_from_parts(run, base, monkeypatch):
    """sFID and KID go through the part files too."""
    monkeypatch.setattr("flashar_pl.evaluate.samples.load_extractor", lambda path: Spatial())
    monkeypatch.setitem(table.FEWEST, "kid", 50)
    assert run(*base, "--cache", "cache", "--save-npz", "--out", "eval")[0] == 0
    result = result_of("eval")
    assert list(result["metrics"]) == ["fid", "sfid", "is", "precision", "recall", "f1", "kid"]
    with np.load("eval/samples.npz") as archive:
        rows = Spatial().extract(torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2))
    [stored] = Path("cache").iterdir()
    with np.load(stored) as archive:
        moments = archive["mu_s"], archive["sigma_s"]
        kid = distribution.kernel_distance(rows.pool, archive["features"], subset_size=50)
    spatial = rows.spatial.double()
    sfid = distribution.frechet_distance_from_moments(spatial.mean(0), spatial.T.cov(), *moments)
    assert result["metrics"]["sfid"] == pytest.approx(sfid, rel=1e-6)
    assert result["metrics"]["kid"] == pytest.approx(kid, rel=1e-6)


def test_bad_input_is_refused_and_writes_nothing(refused, base, work, classifier, raster_model, shards):
    def changed(name: str, value: object) -> list[object]:
        words = [*base, "--out", "eval"]
        words[words.index(name) + 1] = value
        return words

    words = [*base, "--out", "eval"]
    assert "20 samples are too few for fid: its covariance of 32 features" in refused(*changed("--num-samples", 20))
    assert "no feature extractor at nothing" in refused(*changed("--features", "nothing"))
    assert "no reference at nothing" in refused(*changed("--reference", "nothing"))
    assert "unknown fidd" in refused(*words, "--metrics", "fid,fidd")
    assert "--branch-layer" in refused(*changed("--checkpoint", raster_model), "--plan", "diagonal")
    assert "cannot be resized to 16 x 16" in refused(*words, "--resize", 16)
    assert "no 'test' split" in refused(*changed("--reference", _without_test_split(work, shards)))
    text = RasterAR(tiny_backbone(condition="text", caption_dim=12))
    save_model("text", text, Description(text.config(), (8, 8), {"kind": "pixels", "levels": 17}))
    assert "conditioned on text" in refused(*changed("--checkpoint", "text"))
    assert not Path("eval").exists()


def _without_test_split(work: Path, shards: str) -> str:
    manifest = json.loads((Path(shards) / "manifest.json").read_text())
    del manifest["splits"]["test"]
    (work / "other").mkdir()
    (work / "other" / "manifest.json").write_text(json.dumps(manifest))
    return "other"


def test_reference_images_of_another_size_are_refused(refused, base, work):
    """Inception resizes whatever it gets: 256-pixel statistics against 384-pixel samples would pass unseen."""
    moments = {"mu": np.zeros(32), "sigma": np.eye(32), "features": np.zeros((40, 32))}
    np.savez("larger.npz", arr_0=np.zeros((40, 16, 16, 3), np.uint8), **moments)
    words = [*base, "--out", "eval"]
    words[words.index("--reference") + 1] = "larger.npz"
    assert "samples are 8 x 8 pixels, the reference images 16 x 16" in refused(*words)
    Path("mixed").mkdir()
    for i, side in enumerate((8, 8, 9)):
        Image.new("RGB", (side, side)).save(f"mixed/{i}.png")
    words[words.index("--reference") + 1] = "mixed"
    assert "expected reference images of one size: --reference-crop centre" in refused(*words)


def test_reference_images_of_mixed_sizes_are_cropped_by_rule(run, refused, base, work):
    """Guards the place of the crop and its note: a stretched or corner-cut reference gives another distance."""
    from flashar_pl.data.images import centre_crop

    rng = np.random.default_rng(0)
    for name in ("mixed", "cut"):
        Path(name).mkdir()
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 256, (9 + i % 3, 8 + i % 5, 3), dtype=np.uint8))
        image.save(f"mixed/{i:02d}.png")
        Image.fromarray(centre_crop(image, 8).transpose(1, 2, 0)).save(f"cut/{i:02d}.png")
    found = {}
    for name, more in (("mixed", ("--reference-crop", "centre")), ("cut", ())):
        words = [*base, "--metrics", "fid", "--cache", "cache", "--out", f"eval-{name}", *more]
        words[words.index("--reference") + 1] = name
        code, _, err = run(*words)
        assert code == 0, err
        found[name] = json.loads(Path(f"eval-{name}/evaluation.json").read_text())
    assert found["mixed"]["metrics"] == found["cut"]["metrics"]
    assert found["mixed"]["reference"]["crop"] == "centre square of 8 pixels"
    words = [*base, "--out", "e", "--reference-crop", "centre"]
    assert "--reference-crop is for a directory of images" in refused(*words)


def test_a_finished_or_foreign_directory_is_never_touched(run, refused, base):
    assert run(*base, "--metrics", "is", "--out", "eval")[0] == 0
    before = sorted((p.name, p.stat().st_mtime_ns) for p in Path("eval").iterdir())
    assert "holds a finished evaluation" in refused(*base, "--out", "eval")
    Path("mine").mkdir()
    assert "exists and holds no settings.json" in refused(*base, "--out", "mine")
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in Path("eval").iterdir())
    assert not list(Path("mine").iterdir())


def test_every_kept_checkpoint_of_a_run_is_measured_once(run, refused, base, flashar_model, shards, classifier):
    """Two files of one step are one, a second call measures what is new, and other settings are never mixed in."""
    folder = Path("run/checkpoints")
    folder.mkdir(parents=True)
    net = load_model(flashar_model).model
    description = Description(net.config(), (8, 8), {"kind": "pixels", "levels": 17}, {})
    weights = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    stored = {"state_dict": weights, CHECKPOINT_KEY: description.to_dict(), "pytorch-lightning_version": "2.5"}
    for name, step in (("a", 20), ("last", 20), ("b", 10)):
        torch.save({**stored, "global_step": step}, folder / f"{name}.ckpt")
    words = ["evaluate", "--run", "run", *base[3:], "--metrics", "fid"]
    code, out, err = run(*words)
    assert code == 0, err
    assert [line.split()[1:4:2] for line in out.splitlines()[2:4]] == [["b.ckpt", "10"], ["a.ckpt", "20"]]
    measured = json.loads(Path("run/evaluation/checkpoints.json").read_text())["checkpoints"]
    assert [entry["step"] for entry in measured] == [10, 20]
    assert measured[0]["metrics"] == measured[1]["metrics"] == result_of("run/evaluation/step_0000010")["metrics"]
    written = Path("run/evaluation/step_0000010/evaluation.json").stat().st_mtime_ns
    torch.save({**stored, "global_step": 30}, folder / "c.ckpt")
    assert run(*words)[0] == 0
    measured = json.loads(Path("run/evaluation/checkpoints.json").read_text())["checkpoints"]
    assert [entry["step"] for entry in measured] == [10, 20, 30]
    assert Path("run/evaluation/step_0000010/evaluation.json").stat().st_mtime_ns == written
    assert "was measured with seed 0 (now 4); choose another --out" in refused(*words, "--seed", 4)
    assert "--checkpoint and --run are both given" in refused(*words, "--checkpoint", flashar_model)
    assert "no *.ckpt in none/checkpoints" in refused("evaluate", "--run", "none", *base[3:])
    assert "--out is missing" in refused(*base)
