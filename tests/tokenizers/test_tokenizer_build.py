"""build_tokenizer and the border checks every tokenizer shares."""

import subprocess
import sys

import pytest
import torch

from flashar_pl.tokenizers import PixelTokenizer, build_tokenizer


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"levels": 17}, ["no 'kind'", "pixels", "vq16", "ibq"]),
        ({"kind": "pixel", "levels": 17}, ["did you mean pixels?"]),
        ({"kind": "pixels"}, ["levels is None; expected a whole number"]),
        ({"kind": "vq16", "weigths": "x"}, ["did you mean weights?"]),
        ({"kind": "vq16"}, ["no VQ weights file", "vq_ds16_c2i.pt", "nothing is downloaded"]),
        ({"kind": "vq8", "weights": "/nowhere/vq.pt"}, ["/nowhere/vq.pt does not exist", "vq_ds8_c2i.pt"]),
        ({"kind": "ibq", "weights": "/nowhere"}, ["/nowhere does not exist", "Emu3.5-VisionTokenizer"]),
    ],
)
def test_bad_configs_say_what_to_do(config, words):
    with pytest.raises(ValueError) as caught:
        build_tokenizer(config)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.slow
def test_import_is_light():
    """A command that only needs a config must not wait for Lightning, safetensors or tiktoken; one that draws images
    from a checkpoint not for torch's compiler and sharding, which took half of its 6 seconds."""
    code = (
        "import sys, flashar_pl.tokenizers \n"
        "light = ('lightning', 'safetensors', 'tiktoken', 'transformers', 'PIL', 'webdataset')\n"
        "print([m for m in light if m in sys.modules])\n"
        "import flashar_pl.decoding, flashar_pl.checkpoints.weights, flashar_pl.models.baselines\n"
        "from flashar_pl.numerics import torch, without_memory\n"
        "with without_memory():\n"
        "    made = torch.nn.Sequential(torch.nn.Embedding(2, 2), torch.nn.Linear(2, 2))\n"
        "assert all(weight.is_meta for weight in made.parameters())\n"
        "print([m for m in ('torch._dynamo', 'sympy', 'torch.distributed.tensor') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_image_borders():
    tokenizer = PixelTokenizer(17)
    tokenizer.downsample = 16
    with pytest.raises(ValueError, match=r"\(3, 8, 8\); expected \(B, 3, h, w\)"):
        tokenizer.encode(torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"40 x 33 pixels; both sides must be multiples of 16.*32 x 32"):
        tokenizer.encode(torch.zeros(1, 3, 40, 33, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"float32; expected uint8 here \(encode_float takes"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="uint8; expected floating point"):
        tokenizer.encode_float(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_code_borders():
    tokenizer = PixelTokenizer(17)
    with pytest.raises(ValueError, match=r"codes lie in 0 \.\. 17; this tokenizer has codes 0 \.\. 16"):
        tokenizer.decode(torch.tensor([[[0, 17]]]))
    with pytest.raises(ValueError, match=r"expected \(B, H, W\) int64"):
        tokenizer.decode(torch.zeros(4, 4, dtype=torch.int64))
    assert tokenizer.decode(torch.zeros(0, 4, 4, dtype=torch.int64)).shape == (0, 3, 4, 4)
