"""From captioned images to a drawn one, on a directory in transformers' format: tokenize, fit a recipe, generate."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")

from hub_files import CODES, write_hub  # noqa: E402

from flashar_pl.data.shards import Manifest, ShardReader  # noqa: E402

ROOT = Path(__file__).parents[2]
GRID, N = (2, 4), 8
RECIPES = {"janus": "janus_pro_1b", "emu3": "emu3_gen_8b", "lumina_mgpt": "lumina_mgpt_7b", "glm_image": "glm_image_ar"}
NO_DECODER = ("lumina_mgpt", "glm_image")
"""Of transformers."""
READY = {"x_omni": "x_omni_7b", "mammothmoda2": "mammothmoda2_ar", "glm_image": "glm_image_ar"}
CPU = {
    "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.strategy": "auto",
    "trainer.max_steps": 3, "trainer.callbacks": "[]", "trainer.val_check_interval": 3, "data.num_workers": 0,
    "data.batch_size": 2, "model.flashar.branch_layer": 1, "model.optimiser.state": "fp32",
    "model.optimiser.lr": 1e-3, "trainer.default_root_dir": "run",
}  # fmt: skip
"""A recipe on the tiny model: sizes from its directory, three steps on this machine. What it draws at validations it
draws here too."""


def write_images(folder: Path) -> Path:
    """Images of 8 x 16 pixels, twice as large as 2 x 4 codes of the tiny VQs, and their list."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(N):
        Image.fromarray(random.integers(0, 256, (8, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    items = [{"input_prompt": f"fox {i}", "output_image": f"{i}.png"} for i in range(N)]
    (folder / "list.json").write_text(json.dumps(items))
    return folder / "list.json"


def write_codes(folder: Path, first: int, preview: bool) -> str:
    """A tar of codes with captions, pt + txt, and with previews of 2 x 4 codes."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(first, first + N):
            codes, drawn = io.BytesIO(), torch.randint(0, CODES, GRID, generator=torch.Generator().manual_seed(i))
            torch.save({"codes": drawn, "preview": drawn.flip(0)} if preview else drawn, codes)
            for kind, content in (("pt", codes.getvalue()), ("txt", f"fox {i}".encode())):
                entry = tarfile.TarInfo(f"{i:04d}.{kind}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return str(folder / "00000.tar")


def fit_and_draw(run, directory: Path, recipe: str, *codes_only: str) -> np.ndarray:
    """Three steps of a recipe on shards/, then the codes of an image that its checkpoint draws."""
    changed = {
        **CPU, "model.backbone.directory": directory, "model.init_from": directory, "data.prompts": directory,
        "data.shards": "shards",
    }  # fmt: skip
    words = [word for name, value in changed.items() for word in (f"--{name}", value)]
    words = ["fit", "--config", ROOT / "experiments" / f"{recipe}.yaml", *words]
    if codes_only:  # its validations would end a run after hours
        code, _, err = run(*words, "--model.validation.grid_images", 2)
        assert code == 2, err
        assert "model.validation.grid_images 0" in err or "no tokenizer weights file" in err
        assert not Path("run").exists()
    code, _, err = run(*words)
    assert code == 0, err
    words = ["--prompt", "fox 1", "--num-images", 1, "--out", "drawn", "--grid", "2x4"]
    code, _, err = run("generate", "--checkpoint", next(Path("run").rglob("*.ckpt")), *words, *codes_only)
    assert code == 0, err
    drawn = np.load("drawn/codes.npy")
    assert drawn.shape == (1, *GRID)
    assert 0 <= drawn.min() <= drawn.max() < CODES
    return drawn


@pytest.mark.slow
@pytest.mark.parametrize("family", READY)
def test_a_recipe_trains_on_ready_codes(run, work: Path, family: str) -> None:
    """Guards families whose image tokenizer runs elsewhere: captions in their template, weights, a diagonal image."""
    directory = write_hub(work / "model", family)
    words = ("--out", "shards", "--vocabulary", CODES, "--workers", 0, "--block", 2)
    for split, first in (("train", 0), ("validation", N)):
        tar = write_codes(work / split, first, family == "glm_image")
        code, _, err = run("tokenize", "text-image", "--data", tar, *words, "--split", split)
        assert code == 0, err
    fit_and_draw(run, directory, READY[family], "--codes-only")


def network(directory: Path) -> torch.nn.Module:
    """The image tokenizer of the model, as transformers reads it."""
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    name = {"janus": "Janus", "emu3": "Emu3", "chameleon": "Chameleon"}[kind]
    return getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(directory).model.vqmodel


@pytest.mark.slow
@pytest.mark.parametrize("family", RECIPES)
def test_a_recipe_trains_on_codes_of_the_models_own_tokenizer(run, work: Path, family: str) -> None:
    """Guards what passes between the commands: codes, captions in their template, weights, the run's tokenizer."""
    directory = write_hub(work / "model", family)
    listed = write_images(work / "images")
    base = ("--data", listed, "--weights", directory, "--buckets", f"{GRID[0]}x{GRID[1]}", "--out", "shards")
    code, _, err = run("tokenize", "text-image", *base, "--validation", 2, "--workers", 0, "--block", 2)
    assert code == 0, err
    manifest = Manifest.load(next(Path("shards").rglob("manifest.json")))
    assert (manifest.grid, manifest.vocabulary) == (GRID, CODES)
    reader = ShardReader(manifest, "train")
    samples = reader.read(np.arange(len(reader)))
    half = torch.stack([pixels(work / "images" / f"{text.split()[1]}.png") for text in samples.texts])
    sizes = {"image_sizes": torch.tensor([half.shape[-2:]] * len(half))} if family == "emu3" else {}
    if family == "glm_image":
        shrunk = torch.nn.functional.interpolate(half, (22, 44), mode="bicubic", antialias=True).round().clamp(0, 255)
        assert samples.previews is not None
        assert samples.previews.shape == (len(half), 11, 22)
        assert (samples.previews == glm_codes(directory, shrunk)).mean() > 0.99  # a rounded pixel may differ
        expected = torch.from_numpy(glm_codes(directory, half))
    else:
        with torch.no_grad():
            found = network(directory).encode(half / 127.5 - 1, **sizes).image_tokens
        expected = torch.stack(list(found)) if family == "emu3" else found
    assert len(np.unique(samples.codes)) > 4
    assert np.array_equal(samples.codes.reshape(len(half), -1), expected.reshape(len(half), -1).numpy())

    fit_and_draw(run, directory, RECIPES[family], *(["--codes-only"] if family in NO_DECODER else []))
    assert bool(list(Path("drawn").glob("*.png"))) == (family not in NO_DECODER)


def glm_codes(directory: Path, images: torch.Tensor) -> np.ndarray:
    """(n, H, W) of images (n, 3, h, w), 0 to 255, by the image processor and the modules of transformers."""
    model = transformers.GlmImageForConditionalGeneration.from_pretrained(directory).model
    processor = transformers.GlmImageImageProcessor(patch_size=2, merge_size=1, temporal_patch_size=1, do_resize=False)
    given = processor([each.to(torch.uint8) for each in images], return_tensors="pt")
    with torch.no_grad():
        seen = model.get_image_features(given["pixel_values"], given["image_grid_thw"]).pooler_output
        return model.get_image_tokens(seen).view(len(images), *(side // 2 for side in images.shape[2:])).numpy()


def pixels(path: Path) -> torch.Tensor:
    """(3, 4, 8) float32, 0 to 255: the image at the size of its codes, as tokenize makes it."""
    image = Image.open(path).resize((8, 4), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
