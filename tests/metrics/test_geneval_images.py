"""What GenEval sees: crops as the official script makes them, detections as mmdet makes them, CLIP's input."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flashar_pl import pretrained
from flashar_pl.metrics.geneval import COLORS, Detection
from flashar_pl.metrics.geneval_images import (
    ColorClassifier,
    Detector,
    Segment,
    clip_input,
    detections_of,
    detector_input,
    object_crop,
    open_image,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
CROPS = json.loads((GOLDEN / "geneval_crops.json").read_text())["crops"]


@pytest.mark.parametrize("case", CROPS, ids=lambda case: case["key"])
def test_crops_are_the_official_ones(case: dict) -> None:
    """Rounding of edges, black outside, background colour, and objects without a mask."""
    with np.load(GOLDEN / "geneval_crops.npz") as arrays:
        image, expected = arrays["image"], arrays[f"{case['key']}/crop"]
        packed = arrays[f"{case['key']}/mask"] if case["mask"] else None
    mask = None if packed is None else np.unpackbits(packed, axis=1)[:, : image.shape[1]].astype(bool)
    background = {"original": None, "#999 (default)": "#999"}.get(case["bgcolor"], case["bgcolor"])
    crop = object_crop(Image.fromarray(image), case["box"], mask, background, case["crop"] == "1")
    assert (np.asarray(crop) == expected).all()


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "inner"), [((512, 512), (800, 800)), ((256, 512), (667, 1333)), ((600, 400), (1200, 800))]
)
def test_the_detectors_input_keeps_the_ratio(size: tuple[int, int], inner: tuple[int, int]) -> None:
    pixels, found = detector_input(random_image(*size))
    assert found == inner
    padded = tuple(-(-edge // 32) * 32 for edge in inner)
    assert pixels.shape == (1, 3, *padded)
    assert pixels[..., inner[0] :, :].abs().sum() == pixels[..., inner[1] :].abs().sum() == 0


def test_the_detectors_input_is_normalised_by_channel() -> None:
    pixels, _ = detector_input(Image.new("RGB", (512, 512), (255, 0, 100)))
    expected = [(255 - 123.675) / 58.395, -116.28 / 57.12, (100 - 103.53) / 57.375]
    assert pixels[0, :, 400, 400].tolist() == pytest.approx(expected, rel=1e-5)


def test_detections_from_queries() -> None:
    """Class probability times mask quality; a box ends behind the last pixel; one query can name two classes."""
    classes = torch.full((2, 81), -20.0)
    classes[0, 2], classes[0, 80] = 3.0, 3.0 - np.log(3.0)  # car 3/4, no object 1/4
    classes[1, 0], classes[1, 15] = 1.0, 1.0  # person and cat, 1/2 each
    masks = torch.full((2, 8, 8), -4.0)
    masks[0, 2:4, 4:7] = 4.0
    masks[1, 0:8, 0:2] = 2.0
    found = detections_of(classes, masks, (8, 8), (8, 8), (8, 8))
    [car] = [d for d in found["car"] if d.score > 0.3]
    assert car.box == (4.0, 2.0, 7.0, 4.0)
    assert car.score == pytest.approx(0.75 * torch.sigmoid(torch.tensor(4.0)).item(), rel=1e-4)
    assert car.mask is not None
    assert car.mask.shape == (8, 8)
    assert car.mask.sum() == 6
    for name in ("person", "cat"):
        [best] = [d for d in found[name] if d.score > 0.3]
        assert best.box == (0.0, 0.0, 2.0, 8.0)
        assert best.score == pytest.approx(0.5 * torch.sigmoid(torch.tensor(2.0)).item(), rel=1e-4)
    assert sum(len(list_) for list_ in found.values()) == 100


def test_padding_is_cut_before_masks_are_resized() -> None:
    """A mask over the left half of the image, not of the padded input."""
    classes = torch.full((1, 81), -20.0)
    classes[0, 0] = 5.0
    masks = torch.full((1, 8, 16), -4.0)
    masks[0, :, :4] = 4.0  # half of the 8 columns that hold the image
    [person, *_] = detections_of(classes, masks, (32, 64), (32, 32), (16, 16))["person"]
    assert person.box == (0.0, 0.0, 8.0, 16.0)


def test_a_detector_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="has 132 classes; expected COCO's 80"):
        detections_of(torch.zeros(1, 133), torch.zeros(1, 4, 4), (8, 8), (8, 8), (8, 8))


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000)])
def test_strips_are_scored(size: tuple[int, int], monkeypatch) -> None:
    """The detector had no rows to look at, and CLIP's input was 896,000 x 224 on the way."""
    pixels, shape = detector_input(random_image(*size))
    assert (min(shape), pixels.shape[-2] % 32, pixels.shape[-1] % 32) == (1, 0, 0)
    sides, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, to, *a: sides.append(max(to)) or resize(image, to, *a))
    assert clip_input([random_image(*size)]).shape == (1, 3, 224, 224)
    assert sides == [64 * 224]


def test_clip_input_is_cropped_in_the_middle() -> None:
    wide = np.zeros((224, 448, 3), np.uint8)
    wide[:, 112:336] = 255
    pixels = clip_input([Image.fromarray(wide), Image.fromarray(wide.transpose(1, 0, 2)), random_image(3, 1)])
    assert pixels.shape == (3, 3, 224, 224)
    white = torch.tensor(
        [(1 - m) / s for m, s in ((0.48145466, 0.26862954), (0.4578275, 0.26130258), (0.40821073, 0.27577711))]
    )
    for k in (0, 1):
        assert torch.allclose(pixels[k], white[:, None, None].expand(3, 224, 224), atol=1e-5)


def test_images_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    random_image(4, 8).save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == (4, 8)


def test_missing_models_are_named(tmp_path: Path) -> None:
    for build, name in (
        (Detector, "mask2former-swin-small-coco-instance"),
        (ColorClassifier, "clip-vit-large-patch14"),
    ):
        with pytest.raises(ValueError, match=f"config.json is missing.*{name}"):
            build(tmp_path / "nothing")


def test_a_directory_is_data(tmp_path: Path, monkeypatch) -> None:
    """Code and pickles that stand in it are not run, and what transformers finds wrong is said in one line."""
    asked: list[dict[str, object]] = []

    class Reader:
        @classmethod
        def from_pretrained(cls, place: Path, **options: object) -> None:
            asked.append(options)
            raise OSError("no file named model.safetensors")

    stub = SimpleNamespace(Mask2FormerForUniversalSegmentation=Reader, CLIPModel=Reader)
    monkeypatch.setitem(sys.modules, "transformers", stub)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "theirs.Model"}}')
    for kind in (Detector, ColorClassifier):
        with pytest.raises(ValueError, match=r"no file named model\.safetensors.*the weights as safetensors"):
            kind(tmp_path)
    assert [(each["trust_remote_code"], each["use_safetensors"]) for each in asked] == [(False, True)] * 2


def test_broken_networks_see_nothing_silently() -> None:
    """NaN is above no threshold, and its largest entry is the first: no objects, red ones."""
    image, nan = random_image(8, 8), torch.full((1, 5, 81), math.nan)
    detector = Detector.__new__(Detector)
    detector.device = "cpu"
    detector.model = lambda pixel_values: SimpleNamespace(class_queries_logits=nan, masks_queries_logits=nan)
    with pytest.raises(ValueError, match="the detector gives NaN or infinity"):
        detector(image)
    colors = ColorClassifier.__new__(ColorClassifier)
    colors.device, colors._weights = "cpu", {"car": torch.ones(4, 10)}
    colors.image_features = lambda pixels: torch.full((1, 4), math.inf)
    with pytest.raises(ValueError, match="the CLIP model gives NaN or infinity"):
        colors(image, "car", [Detection((0, 0, 4, 4), 0.5)])


def test_no_other_file_reads_directories_of_transformers() -> None:
    package = Path(pretrained.__file__).parent
    found = [file.name for file in package.rglob("*.py") if "local_files_only" in file.read_text()]
    assert sorted(found) == ["pretrained.py", "repositories.py"], "the latter finds directories and reads none"


@pytest.mark.slow
def test_real_networks_of_transformers_run(tmp_path: Path) -> None:
    """Random weights through transformers' own classes: the calls and shapes, not the accuracy."""
    transformers = pytest.importorskip("transformers")
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, num_attention_heads=2, num_queries=5, encoder_layers=1, decoder_layers=2, num_labels=80,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Mask2FormerForUniversalSegmentation(config).eval().save_pretrained(tmp_path / "detector")
    image = random_image(40, 60)
    found = Detector(tmp_path / "detector")(image)
    assert sum(len(segments) for segments in found.values()) == 100
    assert all(segment.mask is not None and segment.mask.shape == (40, 60) for s in found.values() for segment in s)

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(chr(c) for c in range(97, 123)),
        *(f"{chr(c)}</w>" for c in range(97, 123)),
        "ab</w>",
        "-</w>",
        "-",
    ]
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "clip" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    clip = transformers.CLIPConfig(
        text_config={**small, "vocab_size": len(words), "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**small, "image_size": 224, "patch_size": 112}, projection_dim=8,
    )  # fmt: skip
    transformers.CLIPModel(clip).eval().save_pretrained(tmp_path / "clip")
    classify = ColorClassifier(tmp_path / "clip")
    mask = np.zeros((40, 60), bool)
    mask[5:20, 5:30] = True
    objects = [Segment((5, 5, 30, 20), 0.9, mask), Detection((0, 0, 10, 10), 0.5)]
    colors = classify(image, "car", objects)
    assert len(colors) == 2
    assert set(colors) <= set(COLORS)
    assert classify(image, "car", []) == []
    with torch.no_grad():
        features = classify.image_features(clip_input([object_crop(image, (5, 5, 30, 20), mask)]))
        scores = []
        for c in COLORS:
            texts = (f"a photo of a {c} car", f"a photo of a {c}-colored car", f"a photo of a {c} object")
            alone = torch.cat([classify.text_features([text]) for text in texts])  # without padding
            scores.append(torch.nn.functional.normalize(alone, dim=-1).mean(0))
        official = classify.model.get_image_features(
            pixel_values=clip_input([object_crop(image, (5, 5, 30, 20), mask)])
        )
        official = official if isinstance(official, torch.Tensor) else official.pooler_output
    torch.testing.assert_close(features, official)
    nearest = torch.stack([torch.cosine_similarity(features, s[None])[0] for s in scores]).argmax()
    assert colors[0] == COLORS[nearest]


def test_a_mask_without_pixels_has_an_empty_box_and_no_score() -> None:
    found = detections_of(torch.zeros(1, 81), torch.full((1, 4, 4), -1.0), (8, 8), (8, 8), (8, 8))
    assert all(d.score == 0 and d.box == (0.0, 0.0, 0.0, 0.0) for segments in found.values() for d in segments)
