"""A checkpoint as the commands use it: model, grid and tokenizer, on a device, in a dtype.

torch is imported inside the functions: `--help` must not wait for it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashar_pl.checkpoints.named_paths import IN_TOKENIZER, named_paths, refusal, typed_tokenizer
from flashar_pl.checkpoints.repositories import locate
from flashar_pl.options import CodeOptions, DeviceOptions, ModelOptions, PixelDtype, parse_grid, parse_tokenizer

if TYPE_CHECKING:
    import torch

    from flashar_pl.checkpoints.description import Description
    from flashar_pl.models import GridModel
    from flashar_pl.tokenizers import Tokenizer


@dataclass
class Source:
    """A loaded checkpoint."""

    model: GridModel
    description: Description
    path: str
    kind: str
    """What kind of file it was."""
    grid: tuple[int, int] | None
    """(H, W); None = neither the checkpoint nor the user said it."""
    tokenizer: dict[str, Any] | None
    """Argument of `build_tokenizer`; None = unknown."""
    device: torch.device | None = None
    """Where the model is to be drawn with; None = where it is. A model that is to be rounded waits on the CPU."""
    _decoder: Tokenizer | None = field(default=None, init=False, repr=False)

    def need_grid(self) -> tuple[int, int]:
        """The grid; where neither said it, the usual one of a model that knows many. Raises ValueError where there is
        none."""
        if self.grid is None and self.model.backbone.many_grids:
            return self.model.backbone.usual_grid
        if self.grid is None:
            raise ValueError(f"{self.path} ({self.kind}) does not say which grid it was trained on; add --grid 16x16.")
        return self.grid

    def need_tokenizer(self) -> dict[str, Any]:
        """The tokenizer's config. Raises ValueError where it is not known, or in a strange place."""
        if self.tokenizer in (None, {"kind": "ibq"}):  # the latter: of ready codes, whose tokenizer was not given
            raise ValueError(
                f"{self.path} ({self.kind}) does not say which tokenizer decodes its codes; add --tokenizer "
                "vq16:FILE (published LlamaGen weights), multi_scale_vq:FILE (VAR), the directory of "
                "BAAI/Emu3.5-VisionTokenizer (Emu3.5) or of a model with one"
                f"{'' if self.model.reads_tokenizer else '; generate draws codes without images with --codes-only'}."
            )
        for name in IN_TOKENIZER:
            if (path := self.tokenizer.get(name)) in self.description.strange:
                raise refusal(self.path, "tokenizer", str(path), f"add {typed_tokenizer(self.tokenizer)}")
        return self.tokenizer

    def matching_tokenizer(self, device: str, pixel_dtype: PixelDtype | None = None) -> Tokenizer:
        """The tokenizer that decodes the checkpoint's codes, on a device. ValueError where it is not the model's, or
        cannot decode in that dtype. pixel_dtype: see `PixelOptions`; None = as in an earlier call, if there was one."""
        from flashar_pl.devices import find_device
        from flashar_pl.tokenizers import build_tokenizer

        if made := self._decoder is None:
            self._decoder = build_tokenizer(self.need_tokenizer()).to(find_device(device))
            self._decoder.check_decodes()
            self.model.use_tokenizer(self._decoder)
        if made or pixel_dtype is not None:
            self._decoder.decode_in(pixel_dtype)
        return self._decoder

    @property
    def dtype(self) -> str:
        """Of the weights."""
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
        return names[str(next(self.model.parameters()).dtype).removeprefix("torch.")]

    def facts(self) -> dict[str, Any]:
        """Plain values for reports."""
        return {
            "path": self.path,
            "kind": self.kind,
            "parameters": count_parameters(self.model),
            "model": self.model.config(),
            "grid": None if self.grid is None else list(self.grid),
            "tokenizer": self.tokenizer,
            "training": self.description.training,
        }


def count_parameters(model: GridModel) -> int:
    """Number of parameters of a model, whatever form its weights are in (see `flashar_pl.decoding.prepare`)."""
    from flashar_pl.checkpoints.description import build_on_meta

    return sum(p.numel() for p in build_on_meta(model.config()).parameters())


def open_checkpoint(options: ModelOptions, compute: DeviceOptions = DeviceOptions(), stored: bool = False) -> Source:
    """Read a checkpoint of any kind. Options given here win over what the file says.

    Weights that `compute` wants rounded are left on the CPU, see `Source.device`.

    stored: keep the dtype of the file. compute.dtype None = fp32, but for directories of released weights, which hold
    tens of GB, stored.

    Raises:
        ValueError: no such file, another format, an unknown device or dtype, a branch layer for a FlashAR model, groups
            for one without an `IntraHead`, n_head for a checkpoint that says it. Every message names the file.
    """
    import torch

    from flashar_pl.backbones import import_backbone
    from flashar_pl.checkpoints.official import is_official_directory
    from flashar_pl.checkpoints.weights import OFFICIAL_FILE, load_model
    from flashar_pl.devices import find_device
    from flashar_pl.layers.rounded import ROUNDED
    from flashar_pl.models.flashar import FlashAR
    from flashar_pl.models.intra import check_groups
    from flashar_pl.numerics import dtype_from_name

    if options.backbone_class is not None:
        import_backbone(options.backbone_class)
    path = locate(options.checkpoint, options.download)
    stored = stored or (compute.dtype is None and is_official_directory(path))
    device, dtype = find_device(compute.device), None if stored else dtype_from_name(compute.dtype or "fp32")
    rounded = isinstance(compute, CodeOptions) and compute.weight_format in ROUNDED
    place = torch.device("cpu") if rounded else device
    given_grid, given_tokenizer = parse_grid(options.grid), parse_tokenizer(options.tokenizer)
    if not Path(path).exists():
        raise ValueError(f"no checkpoint {path}; expected a .ckpt, .pt or .safetensors file or a converted directory.")
    loaded = load_model(path, options.weights, options.n_head, place, dtype)
    if loaded.source.startswith(f"{OFFICIAL_FILE} ("):
        print(f"{path}: {loaded.source}.", file=sys.stderr)
    model = loaded.model
    if options.n_head is not None and not loaded.source.startswith(OFFICIAL_FILE):
        raise ValueError(
            f"--n-head is for official files of unpublished sizes, {path} is a {loaded.source}; leave it out."
        )
    if options.branch_layer is not None:
        if isinstance(model, FlashAR):
            raise ValueError(
                f"{path} is a FlashAR model (branch layer {model.branch_layer}); leave out --branch-layer."
            )
        model = FlashAR(model.backbone, options.branch_layer)
    if options.groups is not None:
        if model.dual_head.intra is None:
            raise ValueError(f"{path} was not trained with model.flashar.intra; leave out --groups.")
        check_groups(options.groups)
        model.dual_head.intra.groups = options.groups
    description = loaded.description
    description.settle(Path(path))
    if given_tokenizer is not None:
        description.strange -= named_paths(given_tokenizer, {})
    return Source(
        model=model.to(device=place, dtype=dtype).eval().requires_grad_(False),
        description=description,
        path=str(path),
        kind=loaded.source,
        grid=given_grid or description.grid,
        tokenizer=given_tokenizer or description.tokenizer,
        device=device,
    )


def check_plan(model: GridModel, plan: str | None, grid: tuple[int, int]) -> str:
    """The plan's name (None = the model's own). ValueError if this model cannot run it."""
    return model.make_plan(plan, *grid).name


def check_top_k(model: GridModel, top_k: int) -> None:
    """ValueError for more codes than the model has, which would keep all of them like 0."""
    if top_k > model.backbone.vocabulary:
        raise ValueError(f"top_k is {top_k}; expected 0 (off) to {model.backbone.vocabulary}, the number of codes.")
