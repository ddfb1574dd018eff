"""`flashar evaluate geneval`: the official layout from a tiny Emu3.5 FlashAR checkpoint, and its score."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_toys import on_two_ranks
from PIL import Image
from torch import Tensor

from flashar_pl.checkpoints.weights import load_model
from flashar_pl.decoding import generate
from flashar_pl.metrics.geneval import Detection
from flashar_pl.tokenizers import Tokenizer
from flashar_pl.tokenizers.prompts import PromptTokenizer

CHECKPOINT = Path(__file__).parents[1] / "golden" / "flashar" / "emu_flashar_tiny"
CODES = 384
PROMPTS = [
    {"tag": "single_object", "include": [{"class": "car", "count": 1}], "prompt": "a photo of a car"},
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"},
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
        "prompt": "a photo of two dogs",
    },
]


class Text(PromptTokenizer):
    """Stands for Emu35Text with the tiny model's vocabulary: one id per letter, then the grid."""

    visual_token_offset = 128

    def check_vocabulary(self, size: int, offset: int) -> None:
        assert offset == self.visual_token_offset

    def prompt(self, text: str, **limits: object) -> Tensor:
        return torch.tensor([ord(c) % 100 for c in text])

    def unconditional(self, style: str) -> Tensor:
        return {"official": torch.tensor([1, 2, 3]), "released": torch.tensor([7, 8])}[style]

    def image_prefix(self, height: int, width: int) -> Tensor:
        return torch.tensor([126, height, width, 125])


class Grey(Tokenizer):
    """Stands for IBQ: codes as grey pixels of 4 x 4."""

    vocabulary, downsample = CODES, 4

    def config(self):
        return {"kind": "grey"}

    def decode(self, codes):
        grey = (codes // 2).clamp(max=255).to(torch.uint8)[:, None]
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)

    encode = encode_float = decode_float = lambda self, values: values


@pytest.fixture
def base(work, monkeypatch) -> list[object]:
    """A command line that draws 2 images for each of 3 prompts, in batches of 4."""
    monkeypatch.setattr("flashar_pl.checkpoints.hub.Emu35Text.from_directory", lambda directory: Text())
    monkeypatch.setattr("flashar_pl.tokenizers.build_tokenizer", lambda config: Grey())
    Path("assets").mkdir()
    Path("assets/emu3.tiktoken").touch()
    Path("prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in PROMPTS))
    return [
        *("evaluate", "geneval", "--checkpoint", CHECKPOINT, "--prompts", "prompts.jsonl", "--assets", "assets"),
        *("--tokenizer", "ibq:none", "--grid", "3x4", "--num-images", 2, "--seed", 5, "--dtype", "fp32"),
    ]


def pixels(folder: str) -> dict[str, np.ndarray]:
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)) for p in sorted(Path(folder).rglob("*.png"))}


def test_images_stand_in_the_official_layout_and_are_those_of_plain_generation(run, base):
    """Guards the order of prompts and images, seeds, and the unconditional prompt of released checkpoints."""
    code, _, err = run(*base, "--out", "images")
    assert code == 0, err
    assert "drawing " in err
    assert " prompts into images" in err, "a long command says what it does"
    assert Path("images/00001/metadata.jsonl").read_text() == json.dumps(PROMPTS[1]) + "\n"
    drawn = pixels("images")
    assert list(drawn) == [f"{i:05d}/samples/{j:04d}.png" for i in range(3) for j in range(2)]
    text, model = Text(), load_model(CHECKPOINT).model.float()
    condition = text.conditions([entry["prompt"] for entry in PROMPTS for _ in range(2)], (3, 4))
    null = torch.cat([text.unconditional("released"), text.image_prefix(3, 4)])
    codes = generate(model, condition, (3, 4), cfg_scale=5.0, seeds=5, unconditional=[null] * 6)
    expected = Grey().decode(codes).permute(0, 2, 3, 1).numpy()
    assert all((image == wanted).all() for image, wanted in zip(drawn.values(), expected))


def test_a_stopped_run_draws_what_is_missing(run, refused, base):
    assert run(*base, "--out", "images")[0] == 0
    before = pixels("images")
    lost, kept = Path("images/00002/samples/0001.png"), Path("images/00000/samples/0000.png")
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    assert "1 of 3 prompts in images have fewer than 2 images (first: 00002)" in _score(refused, base)
    assert run(*base, "--out", "images")[0] == 0
    after = pixels("images")
    assert after.keys() == before.keys()
    assert all((after[name] == before[name]).all() for name in before)
    assert kept.stat().st_mtime_ns == stamp
    assert "drawn with cfg_scale 5.0, this run has 2.0" in refused(*base, "--out", "images", "--cfg-scale", 2)


def _score(refused, base) -> str:
    with pytest.MonkeyPatch.context() as patch:
        _stub_models(patch)
        return refused("evaluate", "geneval", "--out", "images", "--detector", _model("d"), "--clip", _model("c"))


def _model(name: str) -> str:
    Path(name).mkdir(exist_ok=True)
    Path(name, "config.json").write_text("{}")
    return name


def _stub_models(patch) -> list[tuple[str, int]]:
    """A detector that sees a car, a red cat, and as many dogs as the number of the image says."""
    asked: list[tuple[str, int]] = []

    class Detector:
        def __init__(self, directory, device):
            self.seen = 0

        def __call__(self, image):
            self.seen += 1
            one = Detection((0, 0, 4, 4), 0.95)
            return {"car": [one], "cat": [Detection((0, 0, 4, 4), 0.5), one], "dog": [one] * (self.seen - 3)}

    class Colors:
        def __init__(self, directory, device):
            pass

        def __call__(self, image, name, found):
            asked.append((name, len(found)))
            return ["red" if len(asked) == 1 else "blue"] * len(found)

    patch.setattr("flashar_pl.metrics.geneval_images.Detector", Detector)
    patch.setattr("flashar_pl.metrics.geneval_images.ColorClassifier", Colors)
    return asked


def test_scores_are_means_over_tasks_and_over_images(run, refused, base, monkeypatch):
    """Both means, the official fields, thresholds of counting, and colours of the best objects only."""
    assert run(*base, "--out", "images")[0] == 0
    asked = _stub_models(monkeypatch)
    words = ("evaluate", "geneval", "--out", "images", "--detector", _model("d"), "--clip", _model("c"))
    code, out, err = run(*words)
    assert code == 0, err
    assert re.search(r"scoring \d+ images of images; reading ", err)
    assert "wrote images/geneval.json" in out
    assert asked == [("cat", 1), ("cat", 1)]
    report = json.loads(Path("images/geneval.json").read_text())
    # cars: 2 of 2; cats: 1 of 2 red; dogs: images 5 and 6 show 2 and 3
    assert report["tasks"] == {
        "single_object": {"correct": 2, "images": 2},
        "colors": {"correct": 1, "images": 2},
        "counting": {"correct": 1, "images": 2},
    }
    assert report["overall"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert report["image_mean"] == pytest.approx(4 / 6)
    assert report["prompt_mean"] == 1.0
    assert report["drawn_with"]["cfg_scale"] == 5.0
    assert "mean over tasks (the official score)  0.6667" in out
    rows = [json.loads(line) for line in Path("images/results.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in rows] == [True, True, True, False, True, False]
    assert rows[3]["reason"] == "expected red cat>=1, found 0 red; and 1 blue"
    assert rows[5]["reason"] == "expected dog<3, found 3"
    assert set(rows[0]) == {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert "would overwrite" in refused(*words)


class Brightness:
    """Stands for both networks: what is seen in an image depends on that image alone."""

    def __init__(self, directory, device):
        pass

    def __call__(self, image, *asked):
        bright = int(np.asarray(image).mean() > 100)
        return ["red" if bright else "blue"] if asked else {"car": [Detection((0, 0, 4, 4), 0.95)] * bright}


def test_two_ranks_draw_and_score_what_one_does(run, base, monkeypatch):
    for name in ("Detector", "ColorClassifier"):
        monkeypatch.setattr(f"flashar_pl.metrics.geneval_images.{name}", Brightness)
    words = [str(word) for word in (*base, "--batch-size", 2, "--detector", _model("d"), "--clip", _model("c"))]
    assert run(*words, "--out", "one")[0] == 0
    assert on_two_ranks([*words, "--out", "two"]) == [0, 0]
    one, two = pixels("one"), pixels("two")
    assert len(one) == 6
    assert all((one[name] == two[name]).all() for name in one)
    assert Path("two/results.jsonl").read_text() == Path("one/results.jsonl").read_text()
    assert sorted(p.name for p in Path("one").iterdir()) == sorted(p.name for p in Path("two").iterdir())


def test_bad_input_is_refused(refused, base, work, raster_model):
    def changed(name: str, value: object) -> list[object]:
        words = [*base, "--out", "images"]
        words[words.index(name) + 1] = value
        return words

    assert "nothing to do" in refused("evaluate", "geneval", "--out", "images")
    assert "are for drawing; add --checkpoint" in refused(
        "evaluate", "geneval", "--out", "images", "--detector", "d", "--clip", "c", "--assets", "assets"
    )
    assert "--clip is missing" in refused("evaluate", "geneval", "--out", "images", "--detector", "d")
    assert "--prompts is missing" in refused(*base[:4], "--out", "images")
    assert "no emu3.tiktoken in nothing" in refused(*changed("--assets", "nothing"))
    assert "no prompts at nothing.jsonl" in refused(*changed("--prompts", "nothing.jsonl"))
    Path("broken.jsonl").write_text('{"tag": "colors"}\n')
    assert 'line 1: expected a JSON object with "tag"' in refused(*changed("--prompts", "broken.jsonl"))
    assert "the tokenizer has 384 codes, the model 17" in refused(*changed("--checkpoint", raster_model))
    assert not Path("images").exists()
    Path("images").mkdir()
    assert "exists and holds no settings.json" in refused(*base, "--out", "images")
    assert "no images in images" in _score(refused, base)
