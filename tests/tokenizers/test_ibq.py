"""The Emu3.5 IBQ tokenizer: parity with the official code, both file formats, names, settings."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flashar_pl.tokenizers import IBQ, build_tokenizer
from flashar_pl.tokenizers.ibq import IBQ_SPEC, read_ibq_settings

PUBLISHED = {
    "codebook_size": 131072, "embed_dim": 256, "double_z": False, "z_channels": 256, "resolution": 256,
    "in_channels": 3, "out_ch": 3, "ch": 256, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 4,
    "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip
SMALL = {
    "ch": 32, "ch_mult": [1, 2, 3], "num_res_blocks": 1, "attn_resolutions": [128], "resolution": 256, "z_channels": 16,
    "in_channels": 3, "out_ch": 3, "double_z": False, "dropout": 0.0,
}  # fmt: skip


def small_state(**changes):
    torch.manual_seed(0)
    return IBQ(read_ibq_settings({**SMALL, **changes}, codes=40, dim=24)).to_official()


def test_codes_and_pixels_are_the_official_ones(ibq_golden):
    state, settings, io = ibq_golden
    tokenizer = IBQ.from_official(state, settings)
    assert (tokenizer.downsample, tokenizer.vocabulary) == (16, 256)
    assert torch.equal(tokenizer.encode(io["image_u8"]), io["indices"])
    assert torch.equal(tokenizer.encode_float(io["image"]), io["indices"])
    torch.testing.assert_close(tokenizer.decode_float(io["indices"]), io["decoded"], atol=2e-4, rtol=1e-4)
    random = tokenizer.decode_float(io["random_indices"])
    torch.testing.assert_close(random, io["random_decoded"], atol=2e-4, rtol=1e-4)


def test_uint8_rules(ibq_golden):
    """clamp((x + 1) 127.5), truncated. Rounding instead would move half of all pixels by one."""
    state, settings, io = ibq_golden
    tokenizer = IBQ.from_official(state, settings)
    assert torch.equal(tokenizer.to_uint8(io["random_decoded"]), io["random_decoded_u8"])
    assert torch.equal(tokenizer.from_uint8(io["image_u8"]), io["image"])
    pixels = tokenizer.decode(io["random_indices"])
    changed = pixels != io["random_decoded_u8"]
    assert changed.float().mean() < 1e-3  # values within rounding of a whole number
    assert (pixels.int() - io["random_decoded_u8"].int()).abs().max() <= 1


def test_export_is_bit_exact(ibq_golden):
    state, settings, _ = ibq_golden
    out = IBQ.from_official(state, settings).to_official()
    assert out.keys() == state.keys()
    assert all(torch.equal(out[name], state[name]) for name in state)


def test_code_is_the_largest_dot_product(ibq_golden):
    """Unlike the VQ, nothing is normalised: a longer code vector wins more often, and is not the nearest."""
    state, settings, io = ibq_golden
    table = state["quantize.embedding.weight"]
    latents = io["quant_conv_out"].movedim(1, -1)  # (1, 4, 4, 32)
    expected = (latents @ table.t()).argmax(dim=-1)
    assert torch.equal(expected, io["indices"])
    stretched = table * torch.linspace(0.2, 3, len(table))[:, None]
    tokenizer = IBQ.from_official({**state, "quantize.embedding.weight": stretched}, settings)
    codes = tokenizer.encode(io["image_u8"])
    assert torch.equal(codes, (latents @ stretched.t()).argmax(dim=-1))
    assert not torch.equal(codes, io["indices"])


def test_published_size_and_names():
    with torch.device("meta"):
        model = IBQ(read_ibq_settings(PUBLISHED, 131072, 256))
        assert model.spec == IBQ_SPEC
    assert sum(p.numel() for p in model.parameters()) == 455_336_963
    assert sum(p.numel() for p in model.encoder.parameters()) == 184_533_760
    assert sum(p.numel() for p in model.decoder.parameters()) == 237_117_187
    assert (model.downsample, model.vocabulary) == (16, 131072)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.to_official().items()}
    assert len(shapes) == 543
    assert sum(name.startswith("encoder.") for name in shapes) == 244
    assert sum(name.startswith("decoder.") for name in shapes) == 294
    assert shapes["encoder.down.4.attn.3.proj_out.weight"] == (1024, 1024, 1, 1)
    assert shapes["encoder.down.3.downsample.conv.weight"] == (512, 512, 3, 3)
    assert shapes["decoder.up.4.attn.4.q.bias"] == (1024,)
    assert shapes["decoder.up.1.upsample.conv.weight"] == (256, 256, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert shapes["decoder.conv_in.weight"] == (1024, 256, 3, 3)
    assert shapes["encoder.mid.attn_1.k.weight"] == (1024, 1024, 1, 1)
    assert shapes["quantize.embedding.weight"] == (131072, 256)


def test_attention_may_sit_at_any_level():
    state = small_state()
    assert "encoder.down.1.attn.0.q.weight" in state
    assert "decoder.up.1.attn.1.q.weight" in state
    assert not any(".2.attn." in name or ".0.attn." in name.split("mid")[0] for name in state)
    tokenizer = IBQ.from_official(state, SMALL)
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 2, 3)
    assert tokenizer.decode(codes).shape == images.shape
    assert small_state(attn_resolutions=[]).keys() < state.keys()


@pytest.mark.parametrize("layout", ["safetensors", "ckpt", "ckpt bare", "ckpt nested yaml"])
def test_published_file_formats(tmp_path, layout):
    state = small_state()
    if layout == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
        flat = {"model_type": "Emu3p5VisionVQ", "codebook_size": 40, "embed_dim": 24, **SMALL}
        (tmp_path / "config.json").write_text(json.dumps(flat))
        weights = tmp_path / "model.safetensors"
    else:
        torch.save(state if layout == "ckpt bare" else {"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
        inner = {"n_embed": 40, "embed_dim": 24, "ddconfig": SMALL}
        content = {"model": {"init_args": inner}} if "nested" in layout else inner
        (tmp_path / "config.yaml").write_text(json.dumps(content))  # JSON is YAML
        weights = tmp_path / "model.ckpt"
    for place in (tmp_path, weights):
        tokenizer = build_tokenizer({"kind": "ibq", "weights": str(place)})
        assert tokenizer.vocabulary == 40
        assert all(torch.equal(value, state[name]) for name, value in tokenizer.to_official().items())
        again = build_tokenizer(tokenizer.config())
        assert torch.equal(again.decode(torch.zeros(1, 2, 2).long()), tokenizer.decode(torch.zeros(1, 2, 2).long()))


def test_settings_file_elsewhere(tmp_path):
    save_file(small_state(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"config\.json does not exist; expected a settings file"):
        IBQ.from_files(tmp_path / "weights.safetensors")
    (tmp_path / "mine.yaml").write_text(json.dumps({"ddconfig": SMALL}))
    config = {"kind": "ibq", "weights": str(tmp_path / "weights.safetensors"), "settings": str(tmp_path / "mine.yaml")}
    tokenizer = build_tokenizer(config)
    assert tokenizer.config() == {**config, "decode_dtype": "float32"}
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor model\.ckpt"):
        IBQ.from_files(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attn_resolutions": [64]}, r"missing keys .*attn.*unknown keys .*attn"),
        ({"ch": 64}, r"encoder\.conv_in\.weight has shape \(32, 3, 3, 3\); this model expects \(64, 3, 3, 3\)"),
        ({"out_ch": 4}, "out_ch = 4"),
        ({"embed_dim": 25}, "embed_dim = 25, but the codebook's tensor says 24"),
    ],
)
def test_settings_that_disagree_with_the_tensors(change, words):
    with pytest.raises(ValueError, match=words):
        IBQ.from_official(small_state(), {**SMALL, **change})


def test_incomplete_settings():
    with pytest.raises(ValueError, match="lack ch_mult, resolution"):
        read_ibq_settings({k: v for k, v in SMALL.items() if k not in ("ch_mult", "resolution")}, codes=2, dim=2)
    with pytest.raises(ValueError, match=r"unknown keys \(loss\.logvar"):
        IBQ.from_official({**small_state(), "loss.logvar": torch.zeros(1)}, SMALL)


def test_encoding_stays_float32(ibq_golden):
    state, settings, io = ibq_golden
    tokenizer = IBQ.from_official(state, settings)
    tokenizer.decode_dtype = "bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(io["image_u8"]), io["indices"])
    error = (tokenizer.decode_float(io["random_indices"]) - io["random_decoded"]).abs()
    assert 1e-3 < error.mean() < 0.02  # measured: 0.005, at most 0.06


@pytest.mark.gpu
def test_gpu_gives_the_official_codes(ibq_golden):
    state, settings, io = ibq_golden
    tokenizer = IBQ.from_official(state, settings).to("cuda")
    assert torch.equal(tokenizer.encode(io["image_u8"].cuda()).cpu(), io["indices"])
    decoded = tokenizer.decode_float(io["indices"].cuda()).cpu()
    torch.testing.assert_close(decoded, io["decoded"], atol=2e-4, rtol=1e-4)
