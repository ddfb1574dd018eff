"""The LlamaGen VQ tokenizer: parity with the official code, sizes read from tensors, strict loading, precision."""

import pytest
import torch
from pretend_gpu import PretendGPU
from torch.utils._python_dispatch import TorchDispatchMode

from flashar_pl.tokenizers import VQ16, PixelTokenizer, build_tokenizer, conv_tokenizer, vq16
from flashar_pl.tokenizers.conv_tokenizer import TokenizerSpec, best_codes
from flashar_pl.tokenizers.convnet import NetSpec
from flashar_pl.tokenizers.vq16 import VQ_PRESETS


def small_spec(
    widths=(32, 32, 64), stem=32, blocks=1, codes=50, dim=4, latent=16, attention=None, decoder_widths=None
) -> TokenizerSpec:
    attention = attention or (False,) * (len(widths) - 1) + (True,)
    down = decoder_widths or widths
    return TokenizerSpec(
        NetSpec(stem, widths, blocks, attention, latent),
        NetSpec(down[-1], down, blocks + 1, attention, latent),
        codes,
        dim,
    )


def small_vq(**sizes) -> VQ16:
    torch.manual_seed(0)
    return VQ16(small_spec(**sizes))


def test_codes_are_the_official_ones(vq_golden):
    state, io = vq_golden
    tokenizer = VQ16.from_official(state)
    assert (tokenizer.downsample, tokenizer.vocabulary) == (4, 64)
    codes = tokenizer.encode_float(io["in/image"])
    assert codes.dtype == torch.int64
    assert torch.equal(codes, io["out/indices"].view(2, 8, 8))


@pytest.mark.parametrize(
    ("codes", "pixels"), [("out/indices", "out/decoded"), ("in/random_indices", "out/decoded_random")]
)
def test_pixels_are_the_official_ones(vq_golden, codes, pixels):
    state, io = vq_golden
    decoded = VQ16.from_official(state).decode_float(io[codes].view(2, 8, 8))
    torch.testing.assert_close(decoded, io[pixels], atol=2e-4, rtol=1e-4)


def test_export_is_bit_exact(vq_golden):
    state, _ = vq_golden
    out = VQ16.from_official(state).to_official()
    assert out.keys() == state.keys()
    assert all(torch.equal(out[name], state[name]) and out[name].dtype == state[name].dtype for name in state)
    bare = {name: value for name, value in state.items() if name != "quantize.codebook_used"}
    assert VQ16.from_official(bare).to_official().keys() == bare.keys()


def test_loading_copies(vq_golden):
    """A change to the caller's tensors must not reach the tokenizer, nor one to an export."""
    state = {name: value.clone() for name, value in vq_golden[0].items()}
    tokenizer = VQ16.from_official(state)
    state["encoder.conv_in.weight"].zero_()
    tokenizer.to_official()["encoder.conv_in.weight"].zero_()
    assert torch.equal(tokenizer.encoder.conv_in.weight, vq_golden[0]["encoder.conv_in.weight"])
    assert not any(p.requires_grad for p in tokenizer.parameters())


@pytest.mark.parametrize(
    ("sizes", "f"),
    [
        ({}, 4),
        ({"widths": (32, 64, 64, 96), "blocks": 2}, 8),
        ({"widths": (32, 32, 32, 64, 64), "stem": 64, "codes": 7, "dim": 8, "latent": 24}, 16),
        ({"decoder_widths": (64, 32, 96)}, 4),
        ({"attention": (False, True, True)}, 4),
        ({"widths": (32,), "blocks": 3}, 1),
    ],
)
def test_every_size_is_read_from_the_tensors(sizes, f):
    model = small_vq(**sizes)
    twin = VQ16.from_official(model.to_official())
    assert twin.spec.encoder == model.spec.encoder
    assert twin.spec.decoder == model.spec.decoder
    assert (twin.vocabulary, twin.spec.dim, twin.downsample) == (model.vocabulary, model.spec.dim, f)
    images = torch.randint(0, 256, (2, 3, 2 * f, 3 * f), dtype=torch.uint8)
    codes = twin.encode(images)
    assert codes.shape == (2, 2, 3)
    assert torch.equal(codes, model.encode(images))
    pixels = twin.decode(codes)
    assert pixels.shape == images.shape
    assert torch.equal(pixels, model.decode(codes))


@pytest.mark.parametrize(("name", "count", "f"), [("vq16", 71_883_403, 16), ("vq8", 70_109_835, 8)])
def test_published_sizes(name, count, f):
    with torch.device("meta"):
        model = VQ16(VQ_PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count
    assert (model.downsample, model.vocabulary) == (f, 16384)


def test_strict_loading_names_the_tensors(vq_golden):
    state, _ = vq_golden
    with pytest.raises(ValueError, match=r"1 missing keys \(decoder\.mid\.1\.k\.bias"):
        VQ16.from_official({n: v for n, v in state.items() if n != "decoder.mid.1.k.bias"})
    with pytest.raises(ValueError, match=r"unknown keys \(loss\.w"):
        VQ16.from_official({**state, "loss.w": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"quant_conv\.weight has shape \(4, 32, 1, 1\)"):
        VQ16.from_official({**state, "quant_conv.weight": torch.zeros(4, 32, 1, 1)})
    with pytest.raises(ValueError, match=r"'encoder\.conv_in\.weight' is missing|'encoder\.conv_blocks.*is missing"):
        VQ16.from_official({"tok_embeddings.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("container", ["model", "state_dict", None, "safetensors"])
def test_file_containers(tmp_path, container):
    model = small_vq()
    state = model.to_official()
    file = tmp_path / ("vq.safetensors" if container == "safetensors" else "vq.pt")
    if container == "safetensors":
        from safetensors.torch import save_file

        save_file(state, file)
    else:
        torch.save({container: state, "steps": 7} if container else state, file)
    loaded = build_tokenizer({"kind": "vq16", "weights": str(file)})
    assert loaded.config() == {"kind": "vq16", "weights": str(file), "decode_dtype": "float32"}
    again = build_tokenizer(loaded.config())
    assert all(torch.equal(value, again.to_official()[name]) for name, value in state.items())


def test_files_that_are_no_weights(tmp_path):
    """A pickle with other classes is refused, not executed."""
    pickled, folder = tmp_path / "args.pt", tmp_path / "folder"
    torch.save({"model": small_vq().to_official(), "args": torch.nn.Linear(1, 1)}, pickled)
    with pytest.raises(ValueError, match="read safely"):
        VQ16.from_file(pickled)
    folder.mkdir()
    with pytest.raises(ValueError, match="is a directory, not a VQ weights file"):
        VQ16.from_file(folder)


def test_the_other_published_file_is_refused(tmp_path, monkeypatch):
    """VQ-8 weights under kind vq16 would give a grid of twice the side: found out only after hours of tokenising."""
    eight = small_spec(widths=(32, 32, 32, 64))
    monkeypatch.setattr(vq16, "VQ_PRESETS", {"vq16": small_spec(widths=(32, 32, 32, 32, 64)), "vq8": eight})
    torch.save({"model": VQ16(eight).to_official()}, tmp_path / "vq8.pt")
    with pytest.raises(ValueError, match=r"holds vq8 \(8 pixels per code\), not vq16: use vq8"):
        build_tokenizer({"kind": "vq16", "weights": str(tmp_path / "vq8.pt")})
    assert build_tokenizer({"kind": "vq8", "weights": str(tmp_path / "vq8.pt")}).config()["kind"] == "vq8"


def test_uint8_rules(vq_golden):
    """Official: ToTensor and Normalize(0.5) in, clamp(127.5 x + 128) truncated out."""
    tokenizer = VQ16.from_official(vq_golden[0])
    values = torch.tensor([-2.0, -1.0, -0.99, -0.5, 0.0, 0.0039, 0.5, 0.999, 1.0, 3.0])
    assert tokenizer.to_uint8(values).tolist() == [0, 0, 1, 64, 128, 128, 191, 255, 255, 255]
    grey = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(tokenizer.from_uint8(grey), grey.float().div(255).sub(0.5).div(0.5))
    images = torch.randint(0, 256, (1, 3, 16, 24), dtype=torch.uint8)
    assert torch.equal(tokenizer.encode(images), tokenizer.encode_float(images.float().div(255).sub(0.5).div(0.5)))
    codes = torch.randint(0, 64, (1, 4, 6))
    assert torch.equal(tokenizer.decode(codes), tokenizer.to_uint8(tokenizer.decode_float(codes)))


def test_lookup_and_decoding_use_unit_vectors(vq_golden):
    """Rows of the stored codebook have any length; only their direction counts."""
    state, io = vq_golden
    lengths = torch.rand(64, 1) * 10 + 0.1
    stretched = {**state, "quantize.embedding.weight": state["quantize.embedding.weight"] * lengths}
    tokenizer = VQ16.from_official(stretched)
    assert torch.equal(tokenizer.encode_float(io["in/image"]).flatten(1), io["out/indices"])
    decoded = tokenizer.decode_float(io["out/indices"].view(2, 8, 8))
    torch.testing.assert_close(decoded, io["out/decoded"], atol=2e-4, rtol=1e-4)


class _Largest(TorchDispatchMode):
    """Records the largest 2-D tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 2:
            self.numel = max(self.numel, out.numel())
        return out


def test_lookup_never_holds_all_scores(monkeypatch):
    rows, table = torch.randn(700, 8), torch.randn(500, 8)
    expected = (rows.double() @ table.double().t()).argmax(dim=1)
    monkeypatch.setattr(conv_tokenizer, "LOOKUP_ELEMENTS", 20_000)
    with _Largest() as largest:
        codes = best_codes(rows, table)
    assert torch.equal(codes, expected)
    assert largest.numel <= 20_000
    monkeypatch.setattr(conv_tokenizer, "LOOKUP_ELEMENTS", 1)  # a budget below one row still works
    assert torch.equal(best_codes(rows, table), expected)
    assert best_codes(torch.ones(1, 2), torch.ones(5, 2)).item() == 0  # the first of equals, as argmin of distances


def test_encoding_ignores_the_callers_precision(vq_golden):
    """Codes flip under autocast and TF32, which training switches on around the tokenizer."""
    state, io = vq_golden
    tokenizer = VQ16.from_official(state)
    seen = []
    tokenizer.quant_conv.register_forward_hook(
        lambda module, args, out: seen.append(
            (
                *(out.dtype, torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision),
                torch.backends.cuda.matmul.allow_tf32,  # an error where torch's two settings disagree
            )
        )
    )
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", torch.bfloat16):
            codes = tokenizer.encode_float(io["in/image"].bfloat16().float())
            decoded = tokenizer.decode_float(codes)
            assert torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before
    assert seen == [(torch.float32, "ieee", "ieee", False)]
    assert torch.equal(codes, tokenizer.encode_float(io["in/image"].bfloat16().float()))
    assert torch.equal(decoded, tokenizer.decode_float(codes))


def test_weights_must_stay_float32(vq_golden):
    tokenizer = VQ16.from_official(vq_golden[0]).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"must stay float32.*decode_dtype='bfloat16'"):
        tokenizer.encode_float(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="must stay float32"):
        tokenizer.decode(torch.zeros(1, 2, 2, dtype=torch.int64))


def test_half_precision_weights_load_as_float32(vq_golden):
    """The golden weights are bfloat16 numbers, so a bfloat16 file must give the same tokenizer."""
    state, io = vq_golden
    half = {n: v if n == "quantize.codebook_used" else v.bfloat16() for n, v in state.items()}
    tokenizer = VQ16.from_official(half)
    assert torch.equal(tokenizer.encode_float(io["in/image"]).flatten(1), io["out/indices"])


def test_bfloat16_decoding(vq_golden):
    """Measured on these weights: mean error 0.008, at most 0.07 (0.9 and 8 grey levels)."""
    state, io = vq_golden
    tokenizer = VQ16.from_official(state)
    tokenizer.opened("vq.pt", "bfloat16")
    decoded = tokenizer.decode_float(io["in/random_indices"].view(2, 8, 8))
    assert decoded.dtype == torch.float32
    error = (decoded - io["out/decoded_random"]).abs()
    assert 1e-3 < error.mean() < 0.02
    assert error.max() < 0.15
    assert torch.equal(tokenizer.encode_float(io["in/image"]).flatten(1), io["out/indices"])
    assert tokenizer.config()["decode_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="expected one of float32, bfloat16"):
        tokenizer.opened("vq.pt", "float16")


@pytest.mark.gpu
def test_gpu_gives_the_official_codes(vq_golden):
    state, io = vq_golden
    tokenizer = VQ16.from_official(state).to("cuda")
    codes = tokenizer.encode_float(io["in/image"].cuda())
    assert torch.equal(codes.flatten(1).cpu(), io["out/indices"])
    torch.testing.assert_close(tokenizer.decode_float(codes).cpu(), io["out/decoded"], atol=2e-4, rtol=1e-4)


def test_the_dtype_of_pixels_is_chosen_by_name_or_by_device(vq_golden, monkeypatch):
    """bf16 by default on a GPU that has it, nowhere else; the rounded decoder is no second set of weights of the
    module, and encoding stays as it is."""
    state, io = vq_golden
    tokenizer = VQ16.from_official(state)
    codes = io["out/indices"].view(2, 8, 8)
    exact = tokenizer.decode_float(codes)
    names = list(tokenizer.state_dict())
    tokenizer.decode_in(None)
    assert tokenizer.decode_dtype == "float32"
    tokenizer.decode_in("bf16")
    rounded = tokenizer.decode_float(codes)
    assert rounded.dtype == torch.float32
    assert rounded.is_contiguous()
    assert 0 < (rounded - exact).abs().mean() < 0.02
    assert list(tokenizer.state_dict()) == names
    tokenizer.decode_in("fp32")
    assert torch.equal(tokenizer.decode_float(codes), exact)
    for capability, found in (((7, 5), "float32"), ((8, 0), "bfloat16")):
        with PretendGPU(visible=True):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
            on_gpu = VQ16.from_official(state).to("cuda")
            on_gpu.decode_in(None)
            monkeypatch.undo()
        assert on_gpu.decode_dtype == found
    with pytest.raises(ValueError, match="pixel_dtype is bf16, which PixelTokenizer does not have"):
        PixelTokenizer(17).decode_in("bf16")
