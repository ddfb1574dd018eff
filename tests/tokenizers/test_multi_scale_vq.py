"""VAR's multi-scale VQ: parity with its authors' code, the order of residuals, strict loading."""

import pytest
import torch
import var_golden
from torch import nn

from flashar_pl.tokenizers import MultiScaleVQ
from flashar_pl.tokenizers.convnet import NetSpec
from flashar_pl.tokenizers.multi_scale_codebook import phi_index
from flashar_pl.tokenizers.multi_scale_vq import PATCH_NUMS, MultiScaleSpec, read_spec, tensor_sizes

PIXELS = {"atol": 2e-4, "rtol": 0.0}


def test_ids_and_images_are_the_official_ones():
    _, io, _ = var_golden.read("vqvae_tiny")
    vq = var_golden.tokenizer()
    assert torch.equal(vq.encode_float(io["in/image"]), io["out/idx"])
    torch.testing.assert_close(vq.decode_float(io["out/idx"]), io["out/image_scale3"], **PIXELS)
    torch.testing.assert_close(vq.decode_float(io["in/random_ids"]), io["out/random_ids_image"], **PIXELS)
    sums = vq.quantize.running_sums(io["out/idx"])
    for k in (0, 3):
        torch.testing.assert_close(sums[k], io[f"out/f_hat_scale{k}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(vq.decode_latents(sums[0]), io["out/image_scale0"], **PIXELS)


def test_var_input_is_the_official_one():
    """It must hold the image so far at the size of the next scale, not the vectors of the last one."""
    _, io, _ = var_golden.read("vqvae_tiny")
    torch.testing.assert_close(var_golden.tokenizer().var_input(io["out/idx"]), io["out/var_input"], atol=1e-4, rtol=0)


def test_a_subset_of_scales_counts_its_own_phis():
    """Which phi a scale uses follows from its place among the scales, so a shorter list has other ones."""
    state, io, facts = var_golden.read("vqvae_tiny")
    short = MultiScaleVQ.from_official(state, {**facts["config"], "patch_nums": [1, 4]})
    assert torch.equal(short.encode_float(io["in/image"]), io["out/idx_subset_patch_nums"])
    assert short.to_official()["quantize.ema_vocab_hit_SV"].shape == (4, 64)


@pytest.mark.parametrize("share", [4, 1, 0, 3])
def test_ten_scales(share):
    """Ties between two phis are decided by rounding, and a slip there changes a third of all scales."""
    _, io, facts = var_golden.read("quantizer_k10")
    state = var_golden.read("quantizer_k10").state
    assert phi_index(10, share) == facts["phi_index_per_scale"][f"share{share}"]
    encoder = NetSpec(32, (32,), 1, (True,), 4)
    vq = MultiScaleVQ(
        MultiScaleSpec(encoder, encoder, 32, 4, kernel=3, patch_nums=tuple(facts["patch_nums"]), phis=share)
    )
    own = vq.state_dict()
    for rename in vq.renames():
        (name,) = rename.pieces
        stored = f"share{share}/{name.removeprefix('quantize.')}"
        assert (stored in state) == (name.startswith("quantize.") and "hit" not in name)
        if stored in state:
            own[rename.ours].copy_(state[stored])
    ids = vq.look_up(io[f"in/share{share}/f"])
    assert torch.equal(ids, io[f"out/share{share}/idx"])
    torch.testing.assert_close(vq.latents(ids), io[f"out/share{share}/f_hat_last"], atol=1e-4, rtol=0)
    if share == 4:
        torch.testing.assert_close(vq.var_input(ids), io["out/share4/var_input"], atol=1e-4, rtol=0)


def test_export_is_bit_exact():
    state, _, _ = var_golden.read("vqvae_tiny")
    out = var_golden.tokenizer().to_official()
    assert out.keys() == state.keys()
    assert all(torch.equal(out[name], state[name]) and out[name].dtype == state[name].dtype for name in state)


def test_published_size():
    published = {"ch": 160, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 32, "vocab_size": 4096}
    with torch.device("meta"):
        model = MultiScaleVQ(read_spec({**published, "patch_nums": PATCH_NUMS[256]}, 4096, 32))
    assert sum(p.numel() for p in model.parameters()) == 108_948_355
    assert len(model.to_official()) == 324
    assert (model.downsample, model.length) == (16, 680)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sum(p * p for p in PATCH_NUMS[512]) == 2240
    assert (counts["encoder"], counts["decoder"], counts["quantize"]) == (44_107_872, 64_653_923, 168_064)


def test_uint8_there_and_back():
    vq = var_golden.tokenizer()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    back = vq.to_uint8(vq.from_uint8(images))
    assert (back.int() - images.int()).abs().max() <= 1  # truncated, as published
    ids = vq.encode(images)
    assert ids.shape == (2, 30)
    assert vq.decode(ids).shape == images.shape


def test_strict_loading_names_the_tensors():
    state, _, facts = var_golden.read("vqvae_tiny")
    config = facts["config"]

    def refuse(message, change=None, **settings):
        with pytest.raises(ValueError, match=message):
            MultiScaleVQ.from_official({**state, **(change or {})}, {**config, **settings})

    qkv = "encoder.mid.attn_1.qkv.weight"
    with pytest.raises(ValueError, match=rf"1 missing keys \({qkv}"):
        MultiScaleVQ.from_official({name: value for name, value in state.items() if name != qkv}, config)
    refuse(rf"{qkv} has shape \(64, 64, 1, 1\); this model expects \(192, 64, 1, 1\)", {qkv: torch.zeros(64, 64, 1, 1)})
    refuse(r"unknown keys \(loss\.w", {"loss.w": torch.zeros(1)})
    refuse(r"quantize\.ema_vocab_hit_SV has shape", {"quantize.ema_vocab_hit_SV": torch.zeros(4, 63)})
    refuse(r"missing keys \(quantize\.quant_resi\.qresi\.bias", share_quant_resi=1)
    refuse("vocab_size = 65, but the codebook's tensor says 64", vocab_size=65)
    refuse(r"patch_nums is \[4\]; expected two or more growing", patch_nums=[4])
    refuse("using_znorm", using_znorm=True)
    with pytest.raises(ValueError, match="lack ch_mult"):
        MultiScaleVQ.from_official(state, {key: value for key, value in config.items() if key != "ch_mult"})


def test_wrong_images_and_ids():
    vq = var_golden.tokenizer()
    with pytest.raises(ValueError, match=r"images are 16 x 12 pixels; expected 16 x 16: patch_nums end with 4"):
        vq.encode_float(torch.zeros(1, 3, 16, 12))
    with pytest.raises(ValueError, match=r"ids is \(1, 4, 4\) torch.int64; this tokenizer expects \(B, 30\)"):
        vq.decode_float(torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids lie in 0 \.\. 64; this tokenizer has codes 0 \.\. 63"):
        vq.var_input(torch.tensor([[64] + [0] * 29]))
    with pytest.raises(ValueError, match="float64; they must stay float32"):
        MultiScaleVQ(vq.spec).double().decode_float(torch.zeros(1, 30, dtype=torch.int64))


def test_the_tensors_tell_the_settings():
    vq = var_golden.tokenizer()
    again = MultiScaleVQ.from_official(vq.to_official(), tensor_sizes(vq.to_official()) | {"patch_nums": vq.patch_nums})
    assert again.spec == vq.spec
    assert isinstance(again.quantize.phi, nn.ModuleList)
