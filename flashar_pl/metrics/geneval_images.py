"""What GenEval sees in an image: objects by a Mask2Former, their colours by a CLIP, both through transformers.

The official script runs mmdet's Mask2Former (Swin-S, COCO instances) and open_clip's ViT-L/14. Here the same
architectures come from local directories, with preprocessing and postprocessing written out after mmdet 2 and open_clip
and without torchvision. The CLIP weights are the same; the Mask2Former weights published for transformers are not those
of mmdet, so scores shift: compare results of one detector only.

Shapes: h x w image, h' x w' detector input, Q queries, C = 80 classes, N detections, n crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flashar_pl.image_files import Unreadable, cut_strip, open_rgb
from flashar_pl.metrics.geneval import Detection
from flashar_pl.metrics.geneval_entries import CLASS_NAMES, COLORS
from flashar_pl.pretrained import pretrained

SHORT_SIDE, LONG_SIDE, DIVISOR = 800, 1333, 32
"""The detector's input: the short side becomes 800 unless the long one would pass 1333; padded to multiples of 32."""
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BEST = 100
"""(query, class) pairs kept per image."""
CLIP_SIDE = 224
CLIP_THINNEST = 64
"""A longer side is cut to this many shorter ones before it is resized: one of 4,000 took 0.8 GB and 6 s."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BACKGROUND = "#999"
"""What hides everything but the object from the colour classifier."""
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


@dataclass(frozen=True, eq=False)
class Segment(Detection):
    """A detection with its mask."""

    mask: np.ndarray | None = None
    """(h, w) bool."""


def open_image(path: str | Path) -> Image.Image:
    """An image file as RGB. Raises ValueError where it cannot be read."""
    try:
        return open_rgb(path)
    except Unreadable as error:
        raise ValueError(f"{path} cannot be scored: {error}") from error


# --- detection --------------------------------------------------------------------------------------------------------


def detector_input(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """(1, 3, h', w') float32 for the detector, and the size (rows, columns) before padding."""
    width, height = image.size
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))  # a strip is a pixel high
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None].float()  # (1, 3, h, w)
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    pixels = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    return F.pad(pixels, (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR)), size


def detections_of(
    class_logits: Tensor, mask_logits: Tensor, padded: tuple[int, int], size: tuple[int, int], original: tuple[int, int]
) -> dict[str, list[Segment]]:
    """Detections by class name from the outputs for one image, as mmdet 2 makes them.

    The score of a (query, class) pair is its class probability times the mean mask probability inside the mask; the 100
    pairs with the largest class probability are kept. A box reaches from the first to behind the last mask pixel.

    Args:
        class_logits: (Q, C + 1), the last class being "no object".
        mask_logits: (Q, a, b) at the detector's stride.
        padded, size, original: (rows, columns) of the padded input, of the image in it, and of the file.
    """
    if class_logits.shape[-1] != len(CLASS_NAMES) + 1:
        raise ValueError(
            f"the detector has {class_logits.shape[-1] - 1} classes; expected COCO's {len(CLASS_NAMES)} "
            "(facebook/mask2former-swin-small-coco-instance)."
        )
    probabilities = class_logits.float().softmax(-1)[:, :-1]  # (Q, C)
    best, index = probabilities.flatten().topk(min(BEST, probabilities.numel()))
    query, label = index // len(CLASS_NAMES), index % len(CLASS_NAMES)  # (N,)
    masks = F.interpolate(mask_logits[query].float()[None], size=padded, mode="bilinear", align_corners=False)
    masks = masks[:, :, : size[0], : size[1]]
    masks = F.interpolate(masks, size=original, mode="bilinear", align_corners=False)[0]  # (N, h, w)
    inside = masks > 0
    area = inside.flatten(1).sum(1)
    quality = (masks.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
    found: dict[str, list[Segment]] = {}
    for k, name in enumerate(CLASS_NAMES[i] for i in label.tolist()):
        mask = inside[k].cpu().numpy()
        found.setdefault(name, []).append(Segment(_box(mask), float(best[k] * quality[k]), mask))
    return found


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) around a mask (h, w); all 0 where it is empty."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class Detector:
    """A Mask2Former with COCO's classes, from a directory in transformers' format. ValueError where there is none."""

    def __init__(self, directory: str | Path, device: torch.device | str = "cpu") -> None:
        example = "facebook/mask2former-swin-small-coco-instance"
        self.model = pretrained(
            "Mask2FormerForUniversalSegmentation", directory, example, "detector", dtype=torch.float32
        )
        self.model.to(device).eval()
        self.device = device

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> dict[str, list[Segment]]:
        """All detections in an image, by class name."""
        pixels, size = detector_input(image)
        output = self.model(pixel_values=pixels.to(self.device))
        _check_finite("detector", output.class_queries_logits, output.masks_queries_logits)
        padded = (pixels.shape[2], pixels.shape[3])
        original = (image.height, image.width)
        return detections_of(output.class_queries_logits[0], output.masks_queries_logits[0], padded, size, original)


# --- colour -----------------------------------------------------------------------------------------------------------


def object_crop(
    image: Image.Image,
    box: Sequence[float],
    mask: np.ndarray | None,
    background: str | None = BACKGROUND,
    crop: bool = True,
) -> Image.Image:
    """The object alone: everything outside mask (h, w) bool in the background colour (None: unchanged), cut to its box.

    Edges of the box are rounded half to even; what lies outside the image is black.
    """
    shown = image
    if mask is not None:
        blank = image.copy() if background is None else Image.new("RGB", image.size, color=background)
        shown = Image.composite(image, blank, Image.fromarray(mask))
    if not crop:
        return shown
    return shown.crop(tuple(float(edge) for edge in box[:4]))  # type: ignore[arg-type]


def clip_input(images: Sequence[Image.Image]) -> Tensor:
    """(n, 3, 224, 224) float32 for CLIP: short side to 224, bicubic, centre crop, normalised."""
    return torch.stack([_clip_pixels(image) for image in images])


def _clip_pixels(image: Image.Image) -> Tensor:
    image = cut_strip(image, CLIP_THINNEST)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    longer = int(CLIP_SIDE * long / short)
    size = (CLIP_SIDE, longer) if width <= height else (longer, CLIP_SIDE)
    resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - CLIP_SIDE) / 2), round((size[1] - CLIP_SIDE) / 2)
    cut = resized.crop((left, top, left + CLIP_SIDE, top + CLIP_SIDE))
    pixels = torch.from_numpy(np.asarray(cut).transpose(2, 0, 1).copy()).float() / 255  # (3, 224, 224)
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


class ColorClassifier:
    """Zero-shot colours by CLIP: the colour whose mean text embedding is nearest to the crop's.

    From a directory in transformers' format. ValueError where there is none.
    """

    def __init__(self, directory: str | Path, device: torch.device | str = "cpu") -> None:
        example = "openai/clip-vit-large-patch14"
        self.model = pretrained("CLIPModel", directory, example, "CLIP model", dtype=torch.float32)
        self.model.to(device).eval()
        self.tokenizer = pretrained("CLIPTokenizer", directory, example, "CLIP model")
        self.device = device
        self._weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Image.Image, name: str, found: Sequence[Detection]) -> list[str]:
        """One of GenEval's colours for each detection of the class `name`."""
        if not found:
            return []
        crops = [object_crop(image, d.box, d.mask if isinstance(d, Segment) else None) for d in found]
        features = self.image_features(clip_input(crops).to(self.device))  # (n, E)
        scores = F.normalize(features, dim=-1) @ self._classifier(name)  # (n, colours)
        _check_finite("CLIP model", scores)
        return [COLORS[i] for i in scores.argmax(1).tolist()]

    def image_features(self, pixels: Tensor) -> Tensor:
        """(n, 3, 224, 224) -> (n, E). The model's own method returns another type in transformers 5."""
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """n texts -> (n, E)."""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt").to(self.device)
        return self.model.text_projection(self.model.text_model(**tokens).pooler_output)

    def _classifier(self, name: str) -> Tensor:
        """(E, colours): unit vectors, means of the templates' unit vectors."""
        if name not in self._weights:
            rows = []
            for color in COLORS:
                texts = [template.format(color=color, name=name) for template in TEMPLATES]
                embedded = F.normalize(self.text_features(texts), dim=-1)  # (templates, E)
                rows.append(F.normalize(embedded.mean(0), dim=0))
            self._weights[name] = torch.stack(rows, dim=1)
        return self._weights[name]


def _check_finite(what: str, *outputs: Tensor) -> None:
    """ValueError for NaN or infinity, which would count as an image without objects, or as the first colour."""
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise ValueError(f"the {what} gives NaN or infinity; its weights are broken.")
