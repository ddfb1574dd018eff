"""The Inception network of FID (2015 TensorFlow weights), through torch-fidelity's one model file.

torch-fidelity's package imports torchvision, which a CPU build of torch cannot load. Its Inception file needs only
torch, so that file alone is imported, inside an empty shell of the package.

Shapes: B images, D = 2048 pooled features, S = 17 * 17 * 7 = 2023 spatial features, C = 1008 classes.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from flashar_pl.metrics.extractor import FeatureExtractor, Features, check_images, state_digest
from flashar_pl.tensor_files import read_tensors

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
SPATIAL_CHANNELS = 7
"""The ADM evaluator keeps the first 7 of 192 channels."""
PACKAGE = "torch_fidelity"


def side_directory() -> Path:
    """Where `make setup` puts torch-fidelity: beside the environment, outside sys.path."""
    return Path(sys.prefix) / "share" / "flashar_pl" / PACKAGE


def load_fidelity_module() -> ModuleType:
    """torch-fidelity's Inception module without the package around it; sys.modules is left as it was.

    Raises ValueError where torch-fidelity is neither on sys.path nor in the side directory.
    """
    spec = importlib.machinery.PathFinder.find_spec(PACKAGE, [*sys.path, str(side_directory())])
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"torch-fidelity 0.4.0 was not found on sys.path or in {side_directory()}. "
            f"Type: pip install --no-deps --target {side_directory()} torch-fidelity==0.4.0"
        )
    shell = ModuleType(PACKAGE)
    shell.__path__ = list(spec.submodule_search_locations)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == PACKAGE}
    sys.modules[PACKAGE] = shell
    try:
        return importlib.import_module(f"{PACKAGE}.feature_extractor_inceptionv3")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(before)


def build_network(state: dict[str, Tensor]) -> nn.Module:
    """torch-fidelity's FeatureExtractorInceptionV3 with outputs 2048 and logits_unbiased, holding `state`.

    Its constructor reads weights with weights_only=False or over the network. Without a path it asks one function of
    its module for a state dict; that function, in this private copy of the module, hands over the one given here.
    """
    module = load_fidelity_module()
    module.load_state_dict_from_url = lambda url, progress=False: state  # type: ignore[attr-defined]
    try:
        return module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except RuntimeError as error:
        raise ValueError(f"these are not the weights of {WEIGHTS_FILE}: {str(error)[:400]}.") from error


class InceptionFeatures(FeatureExtractor):
    """Pool (B, 2048), spatial (B, 2023) and bias-free logits (B, 1008) of the 2015 Inception network, in float32.

    The spatial features are the ADM evaluator's `mixed_6/conv:0`, first 7 channels, flattened row, column, channel.
    In the TensorFlow graph mixed, mixed_1 ... mixed_10 are Mixed_5b ... 5d, 6a ... 6e, 7a ... 7c, and torch-fidelity's
    weight converter maps `mixed_6/conv/conv2d_params` to `Mixed_6d.branch1x1.conv`: the layer is certain. `:0` is read
    as its output after batch norm and ReLU, the last operations of that scope in listings of the graph; this step has
    not been checked against a run of the graph itself.
    """

    num_features = 2048
    num_spatial = 17 * 17 * SPATIAL_CHANNELS
    num_classes = 1008

    def __init__(self, weights: str | Path) -> None:
        """weights: torch-fidelity's file. Raises ValueError where it or torch-fidelity is missing, or it is another."""
        super().__init__()
        file = Path(weights).expanduser()
        if not file.is_file():
            raise ValueError(
                f"no Inception weights at {file}. Download {WEIGHTS_FILE} (96 MB) from {WEIGHTS_URL} and give its "
                "path; nothing is downloaded for you."
            )
        try:
            state = read_tensors(file)
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}. Expected {WEIGHTS_FILE}, from {WEIGHTS_URL}.") from error
        self.network = build_network(state)
        self._fingerprint = "inception-2015-" + state_digest(state)
        self._tap: Tensor | None = None
        tap = self.network.get_submodule("Mixed_6d.branch1x1")
        tap.register_forward_hook(lambda module, inputs, output: setattr(self, "_tap", output))

    def extract(self, images: Tensor) -> Features:
        """Features of uint8 images (B, 3, h, w), which the network resizes to 299 x 299 as TensorFlow did."""
        pool, logits = self.network(check_images(images))  # (B, 2048), (B, 1008)
        assert self._tap is not None
        tap, self._tap = self._tap, None  # (B, 192, 17, 17)
        spatial = tap[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).reshape(len(images), -1)  # (B, 2023)
        return Features(pool.reshape(len(images), -1), spatial.float(), logits.reshape(len(images), -1))

    def fingerprint(self) -> str:
        """Hash of the weights."""
        return self._fingerprint
