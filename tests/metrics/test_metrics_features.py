"""Feature extractors: the small classifier, and Inception with random weights."""

import json
import sys

import pytest
import torch
from random_inception import save_random_inception

from flashar_pl.metrics import inception
from flashar_pl.metrics.classifier import ClassifierFeatures, train_classifier
from flashar_pl.metrics.extractor import FeatureExtractor, Features, extract_features
from flashar_pl.metrics.features import load_extractor
from flashar_pl.metrics.inception import InceptionFeatures


def toy_images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright quarter on noise; the class says which quarter."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 3, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (count,), generator=generator)
    for image, label in zip(images, labels):
        row, column = divmod(int(label), 2)
        image[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] += 80
    return images, labels


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = load_digits()
    images = torch.from_numpy((data.images * 255 / 16).round()).to(torch.uint8)
    return images[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data.target).long()


def test_classifier_learns_digits():
    """Demo features and class accuracy rest on it: a broken one still gives numbers."""
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    model = train_classifier(images[train], labels[train], epochs=10)
    assert model.accuracy(images[test], labels[test]) > 0.96
    features = extract_features(model, images[test])
    assert tuple(features.pool.shape) == (len(test), 32)
    assert bool((features.pool > 0).any(dim=1).all())


def test_classifier_is_deterministic_and_leaves_the_random_state_alone():
    images, labels = toy_images(64, 0)
    state = torch.get_rng_state()
    first, second = (train_classifier(images, labels, epochs=2, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != train_classifier(images, labels, epochs=2, seed=4).fingerprint()


def test_features_ignore_mixed_precision():
    """Validation runs under the trainer's bf16 autocast: features in bf16 would shift every metric."""
    images, _ = toy_images(16, 0)
    model = ClassifierFeatures((6, 6), 4)
    plain = extract_features(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images).dtype == torch.bfloat16
        mixed = extract_features(model, images)
    assert mixed.pool.dtype == torch.float32
    assert torch.equal(mixed.pool, plain.pool)


def test_classifier_round_trip(tmp_path):
    images, labels = toy_images(64, 1)
    model = train_classifier(images, labels, epochs=2)
    model.save(tmp_path / "classifier")
    loaded = load_extractor(tmp_path / "classifier")
    assert isinstance(loaded, ClassifierFeatures)
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded.predict(images, batch_size=5), model.predict(images))
    with pytest.raises(ValueError, match="exists"):
        model.save(tmp_path / "classifier")
    config = json.loads((tmp_path / "classifier" / "classifier.json").read_text())
    (tmp_path / "classifier" / "classifier.json").write_text(json.dumps(config | {"num_features": 8}))
    with pytest.raises(ValueError, match="cannot be read"):
        ClassifierFeatures.load(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"classifier\.json is missing"):
        load_extractor(tmp_path)
    with pytest.raises(ValueError, match="no feature extractor at"):
        load_extractor(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, y: train_classifier(i.float(), y), "expected uint8"),
        (lambda i, y: ClassifierFeatures((8, 8), 4).predict(i), r"expected \(8, 8\)"),
    ],
)
def test_classifier_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*toy_images(32, 2))


@pytest.fixture(scope="module")
def network_and_weights(tmp_path_factory):
    """torch-fidelity's network with random weights, and the same weights as a file."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    return save_random_inception(path), path


def test_inception_equals_torch_fidelity(network_and_weights):
    network, path = network_and_weights
    assert not [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]
    extractor = load_extractor(path)
    assert isinstance(extractor, InceptionFeatures)
    images = torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = extract_features(extractor, images)
    taps = []
    network.Mixed_6d.register_forward_hook(lambda module, inputs, output: taps.append(output))
    pool, logits = network(images)
    assert torch.equal(features.pool, pool)
    assert torch.equal(features.logits, logits)
    assert tuple(features.spatial.shape) == (3, 2023)
    assert float(features.pool.std(dim=0).mean()) > 1e-3
    # Mixed_6d concatenates its 1x1 branch first: same numbers by another way, channels last as in TensorFlow.
    expected = taps[0].permute(0, 2, 3, 1)[..., :7].flatten(1)
    assert torch.equal(features.spatial, expected)
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert extractor.fingerprint().startswith("inception-2015-")


def test_inception_import_keeps_a_loaded_torch_fidelity(monkeypatch, network_and_weights):
    """A CUDA machine may have imported the real package: loading ours must not replace it."""
    owned = {"torch_fidelity": object(), "torch_fidelity.helpers": object()}
    for name, module in owned.items():
        monkeypatch.setitem(sys.modules, name, module)
    inception.load_fidelity_module()
    found = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torch_fidelity"}
    assert found == owned


def test_inception_bad_weights(tmp_path, monkeypatch, network_and_weights):
    name = r"weights-inception-2015-12-05-6726825d\.pth"
    with pytest.raises(ValueError, match=f"(?s){name}.*github.com/toshas/torch-fidelity/releases/download/v0.2.0"):
        InceptionFeatures(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("not a weight file")
    with pytest.raises(ValueError, match=f"read safely.*{name}"):
        InceptionFeatures(tmp_path / "text.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"not the weights of {name}"):
        InceptionFeatures(tmp_path / "other.pth")
    monkeypatch.setattr(inception, "side_directory", lambda: tmp_path)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ValueError, match="pip install --no-deps --target"):
        inception.load_fidelity_module()


def test_features_are_float32_whatever_the_caller_switched_on():
    """Convolutions on GPUs default to TF32, which keeps 10 bits of the mantissa; bfloat16 autocast keeps 7."""
    seen = []

    class Probe(FeatureExtractor):
        num_features = 3

        def fingerprint(self) -> str:
            return "probe"

        def extract(self, images: torch.Tensor) -> Features:
            seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
            return Features(images.float().mean((2, 3)) @ torch.eye(3))

    before = torch.backends.cudnn.conv.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        features = extract_features(Probe(), torch.full((2, 3, 4, 4), 255, dtype=torch.uint8))
    assert seen == [("ieee", "ieee")]
    assert features.pool.dtype == torch.float32
    assert torch.backends.cudnn.conv.fp32_precision == before
