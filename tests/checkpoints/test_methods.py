"""A reader that is given another method's weights names the method it holds, for every pair."""

import json
import shutil

import emu_files
import pytest
import torch
import var_golden

from flashar_pl.backbones.llamagen import LlamaGen, LlamaGenConfig
from flashar_pl.checkpoints.description import Description
from flashar_pl.checkpoints.var import read_var_file
from flashar_pl.checkpoints.weights import load_model, save_model
from flashar_pl.models import FlashAR, RasterAR
from flashar_pl.models.baselines import PAR, VAR, BlockDiffusion
from flashar_pl.models.baselines.var_transformer import VARConfig, VARTransformer

SIZES = {"dim": 16, "n_layer": 2, "n_head": 2, "vocab_size": 11, "num_classes": 3}
MODELS = {
    "raster": lambda: RasterAR(backbone()),
    "FlashAR": lambda: FlashAR(backbone(), 1),
    "NAR": lambda: FlashAR(backbone(), 2, 1, "average", "fused"),
    "PAR": lambda: PAR(backbone()),
    "BlockDiffusion": lambda: BlockDiffusion(backbone(), "row"),
    "VAR": lambda: VAR(
        VARTransformer(VARConfig(1, 16, 2, vocab_size=11, num_classes=3, patch_nums=(1, 2), code_dim=4))
    ),
}
WRITTEN = {
    "raster": lambda model: model.backbone.to_official(),
    "NAR": lambda model: model.to_nar(),
    **dict.fromkeys(("PAR", "BlockDiffusion", "VAR"), lambda model: model.to_official()),
}
READERS = {
    "raster": lambda state: LlamaGen.from_official(state, 2),
    "NAR": lambda state: FlashAR.from_nar(state, 2),
    "PAR": lambda state: PAR.from_official(state, SIZES),
    "BlockDiffusion": lambda state: BlockDiffusion.from_official(state, SIZES, "row"),
    "VAR": lambda state: VAR.from_official(state, var_golden.read("var_tiny").facts["config"]),
}


def backbone() -> LlamaGen:
    return LlamaGen(LlamaGenConfig(**SIZES, multiple_of=8))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("held", MODELS)
def test_official_readers_name_what_they_are_given(held, reader):
    """Official weights of another method, and the tensors of our own models."""
    model = MODELS[held]()
    own = {"NAR": "FlashAR"}.get(held, held)
    with pytest.raises(ValueError, match=f"the checkpoint holds {own} .of flashar-pl. weights; expected"):
        READERS[reader](model.state_dict())
    if held in WRITTEN and held != reader:
        name = {"raster": "LlamaGen"}.get(held, held)
        with pytest.raises(ValueError, match=f"the checkpoint holds {name}.* weights; expected"):
            READERS[reader](WRITTEN[held](model))


def test_a_small_file_of_var_takes_no_more_memory_than_it_has(monkeypatch):
    """By its largest level, by the largest number of a block, or by the square of its positions."""
    state = MODELS["VAR"]().to_official()
    monkeypatch.setattr("flashar_pl.checkpoints.var.tables", None)  # which makes (L, L)
    with pytest.raises(ValueError, match=r"numbers the scales \[8589934592\]; expected 0, 1, 2"):
        read_var_file({**state, "lvl_1L": torch.full((1, 5), 2**33)}, 2)
    with pytest.raises(ValueError, match=r"missing keys \(blocks\.1\."):
        read_var_file({**state, "blocks.9999999999.ffn.fc1.bias": torch.zeros(64)}, 2)
    side = 99
    many = {"lvl_1L": torch.tensor([[0] + [1] * side**2]), "pos_1LC": torch.zeros(1, 1, 16).expand(1, 1 + side**2, 16)}
    with pytest.raises(ValueError, match=r"attn_bias_for_masking of .* is not that of patch_nums \[1, 99\]"):
        read_var_file({**state, **many}, 2)


def test_a_directory_of_impossible_sizes_is_named(tmp_path):
    """A hang, and a RuntimeError of torch without the directory."""
    emu_files.write_released(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    for changed, message in (
        ({"vertical_layers": 10**12}, "vertical_layers is 1,000,000,000,000, more than the"),
        ({"backbone_config": values["backbone_config"] | {"hidden_size": -1}}, "no model can be built from its desc"),
    ):
        file.write_text(json.dumps(values | changed))
        with pytest.raises(ValueError, match=f"{tmp_path.name}.*{message}"):
            load_model(tmp_path)


def test_a_converted_var_has_no_more_blocks_than_tensors(directories, tmp_path):
    shutil.copytree(directories / "VAR", tmp_path / "v")
    file = tmp_path / "v" / "config.json"
    values = json.loads(file.read_text())
    values["model"]["backbone"]["depth"] = 10**12
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="depth is 1,000,000,000,000, more than the"):
        load_model(tmp_path / "v")


def test_a_file_of_odd_shapes_is_named(tmp_path):
    torch.save({"tok_embeddings.weight": torch.zeros(3)}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt cannot be read: it holds other names, types or shapes .*IndexError"):
        load_model(tmp_path / "odd.pt")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    for name, make in MODELS.items():
        model = make()
        save_model(folder / name, model, Description(model=model.config(), grid=model.only_grid or (4, 4)))
    return folder


@pytest.mark.parametrize("held", MODELS)
def test_a_directory_of_another_method_is_named(directories, held):
    for kind in (RasterAR, FlashAR, PAR, BlockDiffusion, VAR):
        if isinstance(MODELS[held](), kind):
            assert MODELS[held]().method == held
            continue
        with pytest.raises(ValueError, match=f"holds a {held} model, not a {kind.__name__}"):
            kind.from_pretrained(directories / held)


@pytest.mark.parametrize("held", [name for name in MODELS if name != "raster"])
def test_a_run_names_what_it_cannot_start_from(directories, held):
    from flashar_pl.checkpoints.initialise import initialise

    for name in ("raster", "FlashAR", "PAR", "BlockDiffusion"):
        model = MODELS[name]()
        if name != held and {name, held} != {"FlashAR", "NAR"}:
            with pytest.raises(ValueError, match=f"is a {held} model and this run trains a {name} model"):
                initialise(model, directories / held)


def test_what_is_new_is_counted(directories):
    """A mask and the embedding of time are in no raster file."""
    from flashar_pl.checkpoints.initialise import initialise

    model = MODELS["BlockDiffusion"]()
    new = 16 + 2 * (16 * 16 + 16)
    report = initialise(model, directories / "raster")
    assert (report.new, report.cloned) == (new, 0)
    assert report.loaded == sum(p.numel() for p in model.parameters()) - new
    assert torch.equal(
        model.backbone.head.weight, RasterAR.from_pretrained(directories / "raster").backbone.head.weight
    )
