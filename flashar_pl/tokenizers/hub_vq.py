"""Image tokenizers that lie in directories of models in transformers' format, run by transformers' own modules.

Shapes: B images of h x w pixels, H = h / f, W = w / f for f pixels per code.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashar_pl.console import needing
from flashar_pl.numerics import strict_float32, without_memory
from flashar_pl.pretrained import refused
from flashar_pl.tensor_files import read_part
from flashar_pl.text_files import BROKEN, read_json, reason
from flashar_pl.tokenizers.base import Tokenizer

CLASSES = {
    "emu3": "Emu3VQVAE", "janus": "JanusVQVAE", "chameleon": "ChameleonVQVAE", "glm_image": "GlmImageVQVAE",
}  # fmt: skip
"""By `model_type` of the model around them."""
PART, EYE = "vqmodel.", "visual."
"""In the names of their tensors, after what stands before them; in those of GLM-Image's image encoder."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PIXELS = {"rescale_factor": 1 / 255, "image_mean": 0.5, "image_std": 0.5}
"""Where preprocessor_config.json does not say them: uint8 to [-1, 1]."""
CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
"""The same for GLM-Image."""


def holds_vq(directory: str | Path) -> bool:
    """Whether config.json of a directory is that of a model with such a tokenizer."""
    config = Path(directory).expanduser() / "config.json"
    return config.is_file() and str(read_json(config).get("model_type")) in CLASSES


class HubVQ(Tokenizer):
    """The VQ of Emu3, Janus or Chameleon, in float32. transformers has no decoder of Chameleon's."""

    network: Any
    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, directory: str | Path, pixels: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.directory = network.float().requires_grad_(False).eval(), str(directory)
        self.vocabulary = network.quantize.embedding.num_embeddings
        self.downsample = 2 ** (len(getattr(network.config, "channel_multiplier", "x")) - 1)
        self.decodes = hasattr(network, "decoder")
        try:
            self.factor = float(pixels["rescale_factor"])
            mean, std = (torch.tensor(pixels[name], dtype=torch.float32) for name in ("image_mean", "image_std"))
            mean, std = (values.expand(3).reshape(3, 1, 1) for values in (mean, std))
            usable = 0 < self.factor < math.inf and mean.isfinite().all() and std.isfinite().all() and (std > 0).all()
        except BROKEN:
            usable = False
        if not usable:
            raise ValueError(f"{directory}: preprocessor_config.json has {pixels}; expected finite numbers above 0.")
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @classmethod
    def from_directory(cls, weights: str | Path) -> HubVQ:
        """The one in a model's directory; the model's other tensors are not read.

        Raises:
            ValueError: there is none, files are damaged or incomplete, or transformers is not installed.
        """
        folder = Path(weights).expanduser()
        if not holds_vq(folder):
            raise ValueError(f"{folder} holds no image tokenizer; expected a model of type {', '.join(CLASSES)}.")
        values = read_json(folder / "config.json")
        kind, stored = values["model_type"], folder / "preprocessor_config.json"
        given = read_json(stored) if stored.is_file() else {}
        pixels = PIXELS | (CLIP if kind == "glm_image" else {})
        pixels |= {key: given[key] for key in PIXELS if given.get(key) is not None}
        network = _network(folder, CLASSES[kind], values.get("vq_config") or {}, PART)
        if kind == "glm_image":
            eye = _network(folder, "GlmImageVisionModel", values.get("vision_config") or {}, EYE)
            return GlmVQ(network, eye, folder, pixels)
        return cls(network, folder, pixels)

    def config(self) -> dict[str, Any]:
        return {"kind": "hub", "weights": self.directory}

    @torch.no_grad()
    def encode_float(self, images: Tensor) -> Tensor:
        self.check_images(images, floating=True)
        height, width = (side // self.downsample for side in images.shape[-2:])
        sizes = {"image_sizes": torch.tensor([images.shape[-2:]] * len(images))}
        with strict_float32(images.device.type):
            found = self.network.encode(images.float(), **(sizes if self._is_emu3 else {})).image_tokens
        codes = torch.stack(list(found)) if self._is_emu3 else found
        return codes.reshape(len(images), height, width)

    @torch.no_grad()
    def decode_float(self, codes: Tensor) -> Tensor:
        self.check_codes(codes)
        self.check_decodes()
        with strict_float32(codes.device.type):
            if self._is_emu3:
                return self.network.decode(codes).float()
            self.network.quantize.quant_state_dims = list(codes.shape[1:])
            return self.network.decode(codes.flatten(1)).float()

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images, floating=False)
        return self.encode_float((images.float() * self.factor - self.mean) / self.std)

    def decode(self, codes: Tensor) -> Tensor:
        pixels = (self.decode_float(codes) * self.std + self.mean) / self.factor
        return pixels.clamp(0, 255).to(torch.uint8)

    @property
    def _is_emu3(self) -> bool:
        return type(self.network).__name__ == "Emu3VQVAE"


class GlmVQ(HubVQ):
    """GLM-Image's: codes of what its image encoder sees in patches. There is no decoder of them but diffusion."""

    def __init__(self, network: Any, eye: Any, directory: str | Path, pixels: dict[str, Any]) -> None:
        super().__init__(network, directory, pixels)
        if eye.spatial_merge_size != 1:
            raise ValueError(f"spatial_merge_size of vision_config is {eye.spatial_merge_size}; expected 1.")
        self.eye, self.downsample = eye.float().requires_grad_(False).eval(), eye.patch_size

    @torch.no_grad()
    def encode_float(self, images: Tensor) -> Tensor:
        self.check_images(images, floating=True)
        f, (height, width) = self.downsample, (side // self.downsample for side in images.shape[-2:])
        patches = images.float().unflatten(2, (height, f)).unflatten(4, (width, f))  # (B, 3, H, f, W, f)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * f * f)  # (B H W, 3 f f)
        sizes = torch.tensor([[1, height, width]] * len(images), device=images.device)
        with strict_float32(images.device.type):
            seen = self.eye(patches, grid_thw=sizes).last_hidden_state.view(len(images), height, width, -1)
            codes = self.network.encode(seen.permute(0, 3, 1, 2).contiguous()).image_tokens
        return codes.view(len(images), height, width)


def _network(folder: Path, name: str, settings: dict[str, Any], part: str) -> Any:
    """A module of transformers with its tensors of a directory. Raises ValueError."""
    with needing("the image tokenizer", "hf"):
        import transformers
    try:
        tensors, levels = _tensors(folder, part), settings.get("channel_multiplier", ())
        layers = max(settings.get("num_res_blocks", 0), settings.get("depth", 0), len(levels))
        if layers > max(9, len(tensors)):
            raise ValueError(f"config.json describes more layers than the {len(tensors)} tensors")
        config = getattr(transformers, f"{name.removesuffix('Model')}Config")(**settings)
        with without_memory():
            network = getattr(transformers, name)(config)
        missing, left = network.load_state_dict(tensors, strict=False, assign=True)
        if missing or left:
            raise ValueError(f"{len(missing)} tensors are missing, {len(left)} unknown: {[*missing, *left][:4]}")
        return network
    except refused() as error:
        raise ValueError(f"{folder} holds no {name} that can be read: {reason(error)}.") from error


def _tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """Tensors of a module by its own names; part: what stands before those."""
    files = {SINGLE}
    if (folder / INDEX).is_file():
        named = read_json(folder / INDEX).get("weight_map") or {}
        files = {Path(str(file)).name for key, file in named.items() if part in key}
    return {name: tensor for file in sorted(files) for name, tensor in read_part(folder / file, part).items()}
