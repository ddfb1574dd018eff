"""Image tokenizers inside directories in transformers' format, against the modules of the model itself."""

import json
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hub_files import CODES, write_hub  # noqa: E402

from flashar_pl.options import parse_tokenizer  # noqa: E402
from flashar_pl.tokenizers import build_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub(tmp_path_factory.mktemp("janus") / "model", "janus", sharded=True)


def test_codes_and_images_are_those_of_the_model_itself(janus: Path) -> None:
    """Guards the choice of shards, names of tensors, the range of pixels and grids of other sizes."""
    theirs = transformers.JanusForConditionalGeneration.from_pretrained(janus).model.vqmodel
    ours = build_tokenizer(parse_tokenizer(str(janus)))
    assert (ours.vocabulary, ours.downsample) == (CODES, 2)
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes = ours.encode(images)
    assert codes.unique().numel() > 1
    with torch.no_grad():
        expected = theirs.encode(images.float() / 127.5 - 1).image_tokens
    assert torch.equal(codes, expected.reshape(2, 4, 6))
    side = theirs.config.num_patches  # the only size that theirs knows
    square = torch.randint(0, CODES, (2, side, side), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        drawn = theirs.decode(square.flatten(1))
    torch.testing.assert_close(ours.decode_float(square), drawn)
    assert ours.decode(codes).shape == (2, 3, 8, 12)
    assert build_tokenizer(ours.config()).directory == str(janus)


@pytest.mark.slow
def test_emu3_and_chameleon(tmp_path: Path) -> None:
    """Guards the extra axis of Emu3's video tokenizer, and that Chameleon's missing decoder is named."""
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    emu = build_tokenizer({"kind": "ibq", "weights": str(write_hub(tmp_path / "emu3", "emu3"))})
    codes = emu.encode(images)
    assert codes.shape == (2, 4, 6)
    with torch.no_grad():
        theirs = transformers.Emu3ForConditionalGeneration.from_pretrained(tmp_path / "emu3").model.vqmodel
        torch.testing.assert_close(emu.decode_float(codes), theirs.decode(codes))
    chameleon = build_tokenizer({"kind": "hub", "weights": str(write_hub(tmp_path / "cham", "chameleon"))})
    assert chameleon.encode(images).shape == (2, 4, 6)
    with pytest.raises(ValueError, match=r"no decoder in transformers; generate .* --codes-only"):
        chameleon.decode(codes)


def test_what_is_missing_is_named(janus: Path, tmp_path: Path) -> None:
    other = write_hub(tmp_path / "qwen2", "qwen2")
    with pytest.raises(ValueError, match="holds no image tokenizer; expected a model of type emu3, janus, chameleon"):
        build_tokenizer({"kind": "hub", "weights": str(other)})
    endless = {"model_type": "janus", "vq_config": {"num_res_blocks": 10**12}}
    (other / "config.json").write_text(json.dumps({"model_type": []}))
    with pytest.raises(ValueError, match="holds no image tokenizer"):
        build_tokenizer({"kind": "hub", "weights": str(other)})
    (other / "config.json").write_text(json.dumps(endless))
    with pytest.raises(ValueError, match=r"config\.json describes more layers than the 0 tensors"):
        build_tokenizer({"kind": "hub", "weights": str(other)})
    (other / "config.json").write_text(json.dumps({**json.loads((janus / "config.json").read_text())}))
    with pytest.raises(ValueError, match=re.escape("holds no JanusVQVAE that can be read") + ".* tensors are missing"):
        build_tokenizer({"kind": "hub", "weights": str(other)})
