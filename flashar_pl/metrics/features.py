"""One door to the feature extractors: Inception for real images, a small classifier for tiny ones."""

from __future__ import annotations

from pathlib import Path

from flashar_pl.metrics.classifier import CONFIG_FILE, ClassifierFeatures
from flashar_pl.metrics.extractor import FeatureExtractor
from flashar_pl.metrics.inception import WEIGHTS_FILE, WEIGHTS_URL, InceptionFeatures


def load_extractor(path: str | Path) -> FeatureExtractor:
    """That of a directory made by ClassifierFeatures.save, or of torch-fidelity's weight file. Raises ValueError."""
    given = Path(path).expanduser()
    if given.is_dir():
        return ClassifierFeatures.load(given)
    if given.is_file():
        return InceptionFeatures(given)
    raise ValueError(
        f"no feature extractor at {given}; expected a directory with {CONFIG_FILE} (flashar classifier) or the file "
        f"{WEIGHTS_FILE} ({WEIGHTS_URL})."
    )
