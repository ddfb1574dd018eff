"""`flashar animate`: what is grey when, on both clocks."""

import numpy as np
import pytest
import torch
from PIL import Image

from flashar_pl.commands import animate as module
from flashar_pl.commands.animate import AnimateOptions, animate, columns_of
from flashar_pl.options import ModelOptions
from flashar_pl.tokenizers.base import GREY

HEIGHT = module.LINE + module.GAP // 2


def frames(path) -> list[np.ndarray]:
    """All pictures of an animation as RGB."""
    with Image.open(path) as film:
        found = []
        for i in range(film.n_frames):
            film.seek(i)
            found.append(np.asarray(film.convert("RGB")).astype(int))
    return found


def decoded(picture: np.ndarray, left: int, side: int = 64) -> np.ndarray:
    """(8, 8) bool: cells of one 8 x 8 image, enlarged to 64 pixels, that are not grey any more."""
    cells = picture[HEIGHT : HEIGHT + side, left : left + side].reshape(8, side // 8, 8, side // 8, 3)
    return (np.abs(cells - GREY) > 20).any(axis=(1, 3, 4))


@pytest.fixture
def light_codes(monkeypatch):
    """Every code is white, so that grey means: not decoded."""
    from flashar_pl.decoding.samples import decode_all

    def decode(tokenizer, codes):
        return decode_all(tokenizer, codes.clamp(max=16).where(codes < 0, torch.full_like(codes, 16)))

    monkeypatch.setattr("flashar_pl.decoding.samples.decode_all", decode)


def test_cells_appear_when_their_step_has_ended(run, flashar_model, light_codes, work):
    """Guards the clock: 16 frames for 64 raster steps, so frame i shows 4 i cells and 4 i diagonals."""
    code, out, err = run(
        *("animate", "--checkpoint", flashar_model, "--classes", 3, "--num-images", 1, "--frames", 16),
        *("--out", "film.webp", "--seconds", 3.2),
    )
    assert code == 0, err
    assert "raster 64, diagonal 15" in out
    film = frames("film.webp")
    p, q = np.divmod(np.arange(64).reshape(8, 8), 8)
    right = 2 * module.GAP + module.NARROWEST
    assert len(film) == 17
    for i in (0, 1, 2, 3, 7, 16):
        assert (decoded(film[i], module.GAP) == (8 * p + q < 4 * i)).all()
        assert (decoded(film[i], right) == (p + q < 4 * i)).all()
    gate = film[0][HEIGHT : HEIGHT + 64, 3 * module.GAP + 2 * module.NARROWEST :][:, :64]
    assert (np.abs(gate - GREY) < 20).all()
    assert not list(work.glob("*part*"))


def test_time_is_measured_step_by_step(run, flashar_model, raster_model, work):
    """Guards the second clock and another model on the raster side."""
    code, out, err = run(
        *("animate", "--checkpoint", flashar_model, "--raster", raster_model, "--classes", "0-3", "--num-images", 1),
        *("--frames", 8, "--clock", "time", "--out", "film.gif", "--cfg-scale", 2),
    )
    assert code == 0, err
    assert "4 images, clock time (raster 64, " in out
    assert out.count(" ms") == 2
    film = frames("film.gif")
    assert 2 <= len(film) <= 9
    sheet = 2 * 64 + 2
    assert film[0].shape == (max(module.NARROWEST, sheet) + 2 * (module.LINE + module.GAP), 3 * 170 + 4 * 12, 3)


def test_the_diagonal_side_draws_what_generate_draws(run, flashar_model, work, monkeypatch):
    """Guards seeds and conditions: both commands must show the same images."""
    seen = []
    monkeypatch.setattr(module, "draw_frames", lambda sides, *rest: seen.extend(sides) or [Image.new("RGB", (9, 9))])
    model = ModelOptions(flashar_model)
    animate(AnimateOptions(classes="3,7", num_images=2, seed=5, out="film.webp"), model)
    assert run("generate", "--checkpoint", flashar_model, "--classes", "3,7", "--num-images", 2, "--seed", 5,
               "--codes-only", "--out", "samples")[0] == 0  # fmt: skip
    assert (np.load("samples/codes.npy") == seen[1].codes.numpy()).all()
    assert seen[0].samples.plan == "raster"
    assert (seen[0].codes != seen[1].codes).any()


def test_what_cannot_be_animated_is_refused(refused, raster_model, flashar_model, work):
    asked = ("animate", "--classes", 3)
    message = refused(*asked, "--checkpoint", raster_model, "--out", "film.webp")
    assert "is a raster model; expected a FlashAR checkpoint" in message
    message = refused(*asked, "--checkpoint", flashar_model, "--out", "film.mp4")
    assert "ends in .webp or .gif" in message
    (work / "film.gif").touch()
    assert "exists" in refused(*asked, "--checkpoint", flashar_model, "--out", "film.gif")


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (4, 2), (10, 5), (7, 7), (12, 4)])
def test_sheets_have_no_empty_place(n, columns):
    assert columns_of(n) == columns


def test_guidance_is_that_of_the_model_where_none_is_given(run, flashar_model, work, monkeypatch):
    """Guards pictures of a published model without the guidance that it needs, as `generate` gives it."""
    asked = []
    monkeypatch.setattr("flashar_pl.backbones.llamagen.LlamaGen.published_cfg_scale", 3.0)
    monkeypatch.setattr(module, "decode_both", lambda draw, source, other, request, compute: asked.append(request))
    with pytest.raises(TypeError):  # nothing was drawn
        animate(AnimateOptions(classes="3", out="film.webp"), ModelOptions(str(flashar_model)))
    assert asked[0].sampling.cfg_scale == 3.0
