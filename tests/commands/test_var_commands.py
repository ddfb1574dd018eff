"""VAR through the commands, from official files: codes of its authors' code, and a directory of ours."""

import json

import numpy as np
import pytest
import torch
import var_golden
from evaluate_toys import evaluation
from PIL import Image

from flashar_pl.checkpoints.description import build_model
from flashar_pl.checkpoints.weights import load_model
from flashar_pl.metrics.classifier import ClassifierFeatures
from flashar_pl.models.baselines import VAR
from flashar_pl.planner.decode import DecodeJob
from flashar_pl.planner.sizes import model_sizes
from flashar_pl.tokenizers import build_tokenizer

TINY = {"preset": "var-d16", "depth": 2, "embed_dim": 32, "num_heads": 2, "vocab_size": 64, "code_dim": 8}


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> tuple[str, str]:
    """Weights of a tiny VAR and of its tokenizer, as published."""
    folder = tmp_path_factory.mktemp("var")
    names = folder / "var_d2.pth", folder / "vae.pth"
    for name, golden in zip(names, ("var_tiny", "vqvae_tiny"), strict=True):
        torch.save(var_golden.read(golden).state, name)
    return str(names[0]), f"multi_scale_vq:{names[1]}"


@pytest.mark.parametrize(("scale", "given"), [("1.5", ()), ("0", ("--cfg-scale", 0)), ("4", ("--cfg-scale", 4))])
def test_generate_draws_what_the_authors_code_draws(run, work, files, scale, given):
    """Guidance is VAR's own, and its published one without an option; images are those of the tokenizer."""
    io = var_golden.read("var_tiny_generate").io
    classes = ",".join(map(str, io["in/label"].tolist()))
    words = ("--checkpoint", files[0], "--tokenizer", files[1], "--classes", classes, "--num-images", 1, "--greedy")
    code, out, err = run("generate", *words, *given, "--out", "out")
    assert code == 0, err
    assert "scales plan" in out
    assert torch.equal(torch.from_numpy(np.load("out/codes.npy"))[:, 0], io[f"out/cfg{scale}/idx"])
    if (image := io.get(f"out/cfg{scale}/image")) is not None:
        first = np.asarray(Image.open(next(iter(sorted(work.glob("out/0*.png"))))))
        assert np.abs(first - 255 * image[0].permute(1, 2, 0).numpy()).max() <= 1.1  # truncated, not rounded


def test_a_directory_of_ours_draws_the_same_and_goes_back_bit_for_bit(run, work, files):
    assert run("convert", files[0], "--tokenizer", files[1], "--out", "own")[0] == 0
    for name, words in (("a", ("--checkpoint", files[0], "--tokenizer", files[1])), ("b", ("--checkpoint", "own"))):
        code, _, err = run("generate", *words, "--classes", 3, "--top-k", 20, "--codes-only", "--out", name)
        assert code == 0, err
    assert (np.load("a/codes.npy") == np.load("b/codes.npy")).all()
    assert run("convert", "own", "--to", "official", "--out", "back.pth")[0] == 0
    official, back = (torch.load(name) for name in (files[0], "back.pth"))
    assert back["model"].keys() == official.keys()
    assert all(torch.equal(back["model"][key], official[key]) for key in official)
    assert isinstance(VAR.from_pretrained("own"), VAR)


def test_evaluate_measures_its_images(run, work, files, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    tokenizer = build_tokenizer({"kind": "multi_scale_vq", "weights": files[1].partition(":")[2]})
    tokenizer.quantize.set_scales((1, 2, 3, 4))
    images = tokenizer.decode(torch.randint(0, 64, (80, 30), generator=torch.Generator().manual_seed(0)))
    np.savez("real.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    features = ClassifierFeatures((images.shape[2], images.shape[3]), 10, 32).save(work / "features")
    words = evaluation(files[0], "real.npz", str(features))
    code, _, err = run(*words, "--tokenizer", files[1], "--out", "eval")
    assert code == 0, err
    result = json.loads((work / "eval/evaluation.json").read_text())
    assert result["samples"]["plan"] == "scales"
    assert result["samples"]["cfg_scale"] == 1.5
    assert result["metrics"]["fid"] > 0
    assert np.load("eval/codes.npy").shape == (75, 1, 30)


def test_benchmark_needs_no_tokenizer(run, files):
    code, out, err = run("benchmark", "--checkpoint", files[0], "--repeats", 1)
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith("| scales")]
    assert len(rows) == 2  # the times, and the speed-up
    assert "raster" not in rows[0]


@pytest.mark.parametrize("shared", [False, True])
def test_the_floor_counts_every_scale_and_the_modulation_once(shared):
    """A scale feeds the positions that it predicts; what follows from the class alone is computed once."""
    sizes = model_sizes({"backbone": {**TINY, "shared_aln": shared}})
    job = DecodeJob(sizes, "scales", sizes.backbone.usual_grid, guided=False)
    assert (sizes.model.plans, sizes.backbone.usual_grid) == (("scales",), (1, 680))
    assert tuple(n for n, _, _ in job.calls) == (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
    modulations = sum(linear.parameters for linear in sizes.condition_linears)
    assert modulations == 32 * 32 * (2 + 6 * (1 if shared else 2))
    block, head = 12 * 32 * 32, 64 * 32
    assert sum(gemm.flops for each in job.forwards for gemm in each.gemms) == 2 * (
        680 * (2 * block + head) + modulations
    )
    with torch.device("meta"):
        assert sizes.n_parameters == sum(p.numel() for p in build_model(sizes.config).parameters())


def test_partial_images_show_the_scales_drawn_so_far(files):
    vq = var_golden.tokenizer()
    ids = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(1))
    assert torch.equal(vq.decode_partial(ids[:, None]), vq.decode(ids))
    partial = ids[:, None].clone()
    partial[..., 14:] = -1  # the last of four scales
    expected = vq.to_uint8(vq.decode_latents(vq.quantize.running_sums(ids)[2]))
    assert torch.equal(vq.decode_partial(partial), expected)
    assert (vq.decode_partial(partial.fill_(-1)) == 128).all()


def test_wrong_input_is_named(run, refused, work, files, shards, raster_model, vq):
    checkpoint, tokenizer = files
    draw = ("generate", "--checkpoint", checkpoint, "--classes", 3, "--out", "out")
    assert "add --tokenizer vq16:FILE (published LlamaGen weights), multi_scale_vq:FILE (VAR)" in refused(*draw)
    assert "add --tokenizer" in refused(*draw, "--codes-only")
    assert "the tokenizer is VQ16, and VAR draws codes of several scales" in refused(*draw, "--tokenizer", f"vq16:{vq}")
    message = refused(*draw, "--tokenizer", tokenizer, "--grid", "16x16")
    assert "grid is 16 x 16; the grid of this VAR model is 1x30" in message
    assert "VAR's guidance grows over the scales" in refused(*draw, "--tokenizer", tokenizer, "--cfg-interval", 3)
    assert "a var model does not have; expected plain" in refused(
        *draw, "--tokenizer", tokenizer, "--weight-format", "packed"
    )
    assert "nothing of a VAR model is compiled" in refused(*draw, "--tokenizer", tokenizer, "--runner", "compiled")
    path = tokenizer.partition(":")[2]
    given = json.dumps({"kind": "multi_scale_vq", "weights": path, "patch_nums": [1, 2, 4]})
    assert "patch_nums [1, 2, 4] and [1, 2, 3, 4]" in refused(*draw, "--tokenizer", given)
    assert "multi-scale VQ (VAR's tokenizer) weights, which decode codes" in refused(
        "generate", "--checkpoint", path, "--classes", 3, "--out", "out"
    )
    assert "plans has 'raster'; expected some of scales" in refused(
        "benchmark", "--checkpoint", checkpoint, "--plans", "raster"
    )
    refused("score", "--checkpoint", checkpoint, "--data", shards)
    assert not (work / "out").exists()
    assert load_model(checkpoint).model.config()["backbone"]["patch_nums"] == [1, 2, 3, 4]
