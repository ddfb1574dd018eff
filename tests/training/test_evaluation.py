"""What a validation measures, against plain computations."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from training_toys import CLASSES, ValidationConfig, fit, make_data, make_module, make_trainer

from flashar_pl.backbones.condition import Batch, ClassIds, TextFeatures
from flashar_pl.decoding import generate
from flashar_pl.decoding.samples import draw
from flashar_pl.grid import diagonal_plan
from flashar_pl.metrics.classifier import ClassifierFeatures
from flashar_pl.metrics.distribution import frechet_distance, inception_score
from flashar_pl.models import RasterAR
from flashar_pl.pictures import gate_picture, sheet, tile
from flashar_pl.tokenizers import PixelTokenizer
from flashar_pl.training.validation import LossSums, SampleConditions, for_sampling, sample_set

ALL = {"limit_val_batches": 1.0, "limit_test_batches": 1.0}


def validate(
    tmp_path: Path, shards: str, module, verb: str = "validate", batch: int = 4, **trainer
) -> dict[str, float]:
    """Results of one pass over the validation (or test) split, with random but not untrained weights."""
    torch.manual_seed(5)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    data = make_data(shards, validation_batch_size=batch)
    [results] = getattr(make_trainer(tmp_path, **{**ALL, **trainer}), verb)(module, datamodule=data, verbose=False)
    return results


def whole_split(shards: str, split: str = "validation"):
    from flashar_pl.data.reader import ShardReader
    from flashar_pl.data.shards import Manifest

    reader = ShardReader(Manifest.load(shards), split)
    samples = reader.read(np.arange(len(reader)))
    return torch.from_numpy(samples.codes), torch.from_numpy(samples.labels)


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_means_are_over_images_not_over_batches(tmp_path: Path, toy_shards: str, verb: str) -> None:
    """13 images in batches of 4: a mean of batch means, or padding that counts, would be off."""
    module = make_module()
    results = validate(tmp_path, toy_shards, module, verb)
    split, prefix = ("validation", "val") if verb == "validate" else ("test", "test")
    codes, labels = whole_split(toy_shards, split)
    module.net.eval()
    with torch.no_grad():
        losses = module.net.loss(codes, labels)
    for name in ("loss", "fused", "horizontal", "vertical"):
        assert results[f"{prefix}/{name}"] == pytest.approx(float(losses[name]), rel=1e-5)
    assert results[f"{prefix}/nll"] == pytest.approx(float(losses["nll"].mean()), rel=1e-5)
    gate = losses["gate"][:, 1:, 1:]
    assert results[f"{prefix}/gate_mean"] == pytest.approx(float(gate.mean()), rel=1e-5)
    entropy = -(gate * gate.log() + (1 - gate) * (1 - gate).log())
    assert results[f"{prefix}/gate_entropy"] == pytest.approx(float(entropy.mean()), rel=1e-4)


def test_likelihood_under_the_chosen_plan(tmp_path: Path, toy_shards: str) -> None:
    """validation.plan raster scores the horizontal head alone, in raster order, and shows no gate."""
    module = make_module(validation=ValidationConfig(plan="raster"))
    results = validate(tmp_path, toy_shards, module)
    codes, labels = whole_split(toy_shards)
    logits = module.net.eval().backbone.raster_logits(codes, labels)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="sum") / len(codes)
    assert results["val/nll"] == pytest.approx(float(nll), rel=1e-5)
    assert "val/gate_mean" not in results


def test_fid_and_accuracy_match_plain_computations(tmp_path: Path, toy_shards: str, toy_classifier: str) -> None:
    """11 samples in batches of 4 against the decoded images of the split; 3 more are only shown."""
    config = ValidationConfig(
        samples=11, grid_images=14, sample_batch=4, features=toy_classifier, cfg_scale=1.5, seed=3, top_k=6
    )
    module = make_module(validation=config)
    results = validate(tmp_path, toy_shards, module)
    classes = torch.arange(12) % CLASSES
    parts = [
        generate(module.net, classes[i : i + 4], (4, 4), cfg_scale=1.5, top_k=6, seeds=list(range(3 + i, 7 + i)))
        for i in (0, 4, 8)
    ]
    decode = PixelTokenizer(8).decode
    classifier = ClassifierFeatures.load(toy_classifier)
    drawn, real = decode(torch.cat(parts)[:11]), decode(whole_split(toy_shards)[0])
    wanted = frechet_distance(classifier(drawn).double().numpy(), classifier(real).double().numpy())
    assert results["val/fid"] == pytest.approx(wanted, rel=1e-4)
    score = inception_score(classifier.extract(drawn).logits, kind="logits")
    assert results["val/is"] == pytest.approx(score, rel=1e-5)
    assert results["val/accuracy"] == pytest.approx(classifier.accuracy(drawn, classes[:11]))


def test_averaged_weights_are_the_ones_measured(tmp_path: Path, toy_shards: str) -> None:
    module = make_module(ema_decay=0.5)
    results = validate(tmp_path, toy_shards, module)  # copies the (random) weights into the average
    before = results["val/nll"]
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.zero_()
    data = make_data(toy_shards)
    [again] = make_trainer(tmp_path, **ALL).validate(module, datamodule=data, verbose=False)
    assert again["val/nll"] == pytest.approx(before, rel=1e-6)


def test_a_fit_writes_scalars_pictures_and_their_png(tmp_path: Path, toy_shards: str, toy_classifier: str) -> None:
    """Every name that plots and reports read; the distance only in every second validation."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = ValidationConfig(samples=6, grid_images=4, features=toy_classifier, fid_every=2)
    module = make_module(validation=config)
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    fit(
        tmp_path, toy_shards, module, max_steps=9, logger=logger, log_every_n_steps=3, limit_val_batches=1.0,
        val_check_interval=3, check_val_every_n_epoch=None, num_sanity_val_steps=1,
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    train = {"loss", "fused", "horizontal", "vertical", "stage", "tokens_per_second"}
    assert {f"train/{name}" for name in train} <= scalars.keys()
    assert {f"lr/{role}" for role in module.net.roles().values()} <= scalars.keys()
    assert {"val/nll", "val/fused", "val/gate_mean", "val/gate_entropy"} <= scalars.keys()
    assert [value for _, value in scalars["train/stage"]] == [2, 2, 2]
    assert len(scalars["val/nll"]) == 3
    assert len(scalars["val/fid"]) == len(scalars["val/is"]) == len(scalars["val/accuracy"]) == 1
    assert set(events.Tags()["images"]) == {"val/samples", "val/gate_map"}
    names = [f"val_step_{step:07d}.png" for step in (3, 6, 9)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "gate").iterdir()) == names
    picture = np.asarray(Image.open(tmp_path / "samples" / names[0]).convert("RGB"))
    codes, labels = whole_split(toy_shards)
    first = [int((labels == label).nonzero()[0]) for label in range(CLASSES)]
    real = sheet([("real", PixelTokenizer(8).decode(codes[first]))], [str(label) for label in range(CLASSES)])
    top = real.shape[1]  # the rows above the samples; these stand at the same columns, further right by their name
    assert picture.shape[0] == top + 2 * 64 + 2 + 12  # 4 samples of 3 classes
    assert (picture[:top, -real.shape[2] + 60 :] == real[:, :, 60:].permute(1, 2, 0).numpy()).all()
    assert len(np.unique(picture[top:])) > 2


def test_a_sample_does_not_depend_on_the_number_of_ranks() -> None:
    """Every rank runs as many batches, so that ranks that act together (FSDP) never wait for one that is done."""
    module = make_module()
    module.configure_model()
    config = ValidationConfig(grid_images=1, sample_batch=2, seed=4)
    conditions = SampleConditions(module.net, 5).join().condition
    runs = []
    for ranks in (1, 2, 3):
        codes = torch.full((5, 4, 4), -1)
        for rank in range(ranks):
            samples = sample_set(config, 5, diagonal_plan(4, 4), conditions)
            batches = samples.batches_of_rank(rank, ranks)
            assert len(batches) == -(-3 // ranks)
            for drawn in draw(module.net, PixelTokenizer(8), samples, batches):
                assert (codes[drawn.index] == -1).all(), "drawn twice"
                codes[drawn.index] = drawn.codes
        runs.append(codes)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("make", [tiny.flashar, lambda: RasterAR(tiny.backbone())])
def test_the_copy_for_sampling(make) -> None:
    """It holds the rounded weights, once; any other precision samples from the model itself."""
    model = make()
    copy = for_sampling(model, "bf16-mixed")
    for name, value in copy.state_dict().items():
        torch.testing.assert_close(value.float(), model.state_dict()[name], rtol=2**-8, atol=0)
    codes = generate(copy, torch.arange(3), (3, 3), copy.plan_name, seeds=1)
    assert torch.equal(codes, generate(copy, torch.arange(3), (3, 3), copy.plan_name, seeds=1))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert for_sampling(model, "32-true") is model


def test_text_conditions_come_from_validation_samples() -> None:
    """A model without classes samples the first captions it validated on, and starts again behind the last."""
    conditions = SampleConditions(tiny.flashar(condition="text"), limit=2)
    batch = tiny.captions([2, 5, 3])
    conditions.collect(
        Batch(
            torch.zeros(3, 4, 4, dtype=torch.int64), batch, torch.tensor([True, False, True]), torch.tensor([7, 4, 9])
        )
    )
    samples = sample_set(ValidationConfig(sample_batch=3), 3, diagonal_plan(4, 4), conditions.join().condition)
    chosen = samples.entries(samples.condition, 0)
    assert isinstance(chosen, TextFeatures)
    assert torch.equal(chosen.features, batch.features[[0, 2, 0]])
    assert torch.equal(chosen.mask, batch.mask[[0, 2, 0]])


def test_real_images_are_the_first_of_their_kind() -> None:
    """Of a class the first image of the split, wherever its batch comes; of captions the image of each one."""
    codes = torch.arange(5)[:, None, None].expand(5, 4, 4)
    valid, index = torch.tensor([True] * 4 + [False]), torch.tensor([3, 0, 5, 1, 9])
    classes = SampleConditions(tiny.flashar(), limit=9, shown=2)
    classes.collect(Batch(codes, ClassIds(torch.tensor([1, 2, 1, 2, 0])), valid, index))
    assert {label: int(image[0, 0]) for label, image in classes.join().real.items()} == {1: 0}
    captions = SampleConditions(tiny.flashar(condition="text"), limit=3, shown=2)
    captions.collect(Batch(codes, tiny.captions([1, 2, 3, 4, 5]), valid, torch.tensor([3, 4, 5, 6, 9])))
    chosen = captions.join()
    assert chosen.numbers == [3, 4, 5]
    assert {number: int(image[0, 0]) for number, image in chosen.real.items()} == {3: 0, 4: 1}


def test_padding_counts_nothing() -> None:
    """A batch of padding only: no division by zero, no change."""
    plan = diagonal_plan(2, 2)
    module = make_module()
    module.configure_model()
    codes, labels = torch.zeros(2, 2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    sums = LossSums(plan, torch.device("cpu"))
    for valid in ([True, True], [False, False], [True, False]):
        mask = torch.tensor(valid)
        sums.add(module.net.eval().loss(codes, labels, valid=mask), mask)
    result = sums.reduce(lambda values: values)
    assert result["nll"] == pytest.approx(4 * float(np.log(8)))  # an untrained head is uniform over 8 codes
    with pytest.raises(ValueError, match="no samples"):
        LossSums(plan, torch.device("cpu")).reduce(lambda values: values)


def test_tiles_and_gate_colours() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 80, 64)
    sheet = tile(images)  # 2 rows of 3, no enlargement
    assert sheet.shape == (3, 162, 196)
    assert [int(sheet[0, 0, 0]), int(sheet[0, 0, 66]), int(sheet[0, 82, 0]), int(sheet[0, 82, 132])] == [0, 1, 3, 255]
    assert tile(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape == (3, 64, 64)
    picture = gate_picture(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    corners = picture[:, [0, 0, -1], [0, -1, 0]].T.tolist()
    assert corners == [[255, 0, 0], [0, 0, 255], [255, 255, 255]]


def test_samples_of_a_mixed_run_are_drawn_in_bfloat16(tmp_path: Path, toy_shards: str, monkeypatch) -> None:
    """Decoding in float32 would take twice as long on a GPU; the trained weights must not change."""
    seen = []

    def watched(model, *args):
        seen.append({name: parameter.dtype for name, parameter in model.named_parameters()})
        return draw(model, *args)

    monkeypatch.setattr("flashar_pl.training.drawn_samples.draw", watched)
    module = make_module(validation=ValidationConfig(grid_images=2, sample_batch=2))
    pictures = []
    for _ in range(2):
        validate(tmp_path, toy_shards, module, precision="bf16-mixed")
        [picture] = (tmp_path / "samples").iterdir()
        pictures.append(picture.read_bytes())
        module = make_module(validation=ValidationConfig(grid_images=2, sample_batch=2))
    assert pictures[0] == pictures[1]
    module.configure_model()
    roles = module.net.roles()
    wanted = {name: torch.float32 if role == "gate" else torch.bfloat16 for name, role in roles.items()}
    assert seen == [wanted, wanted]


def events_of(directory: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_the_validation_before_the_first_step(tmp_path: Path, toy_shards: str, toy_classifier: str) -> None:
    """Step 0 is the whole split on the first weights, its points stand at 0, and training is what it is without it.
    Points, pictures and texts of one step have one number."""
    found = {}
    for at_start in (True, False):
        config = ValidationConfig(samples=6, grid_images=4, features=toy_classifier, at_start=at_start)
        logger = TensorBoardLogger(str(tmp_path / str(at_start)), name="", version="")
        module = fit(
            tmp_path / str(at_start), toy_shards, make_module(validation=config), max_steps=10, logger=logger,
            log_every_n_steps=4, limit_val_batches=1.0, val_check_interval=5, check_val_every_n_epoch=None,
        )  # fmt: skip
        found[at_start] = (events_of(tmp_path / str(at_start)), module)
    events, module = found[True]
    for tag in ("val/nll", "val/fid"):
        assert [event.step for event in events.Scalars(tag)] == [0, 5, 10]
        other = [(event.step, event.value) for event in found[False][0].Scalars(tag)]
        assert [(event.step, event.value) for event in events.Scalars(tag)][1:] == other
    for tag in ("val/samples", "val/gate_map"):
        assert [event.step for event in events.Images(tag)] == [0, 5, 10]
    assert events.Scalars("val/gate_mean")[0].value == 0.5  # an untrained gate
    assert [event.step for event in events.Scalars("train/loss")] == [3, 4, 8]  # 3 is the first step of stage 2
    assert [event.value for event in events.Scalars("train/stage")] == [2, 2, 2]
    assert [event.step for event in events.Tensors("train/stage/text_summary")] == [0, 2]
    assert [event.value for event in events.Scalars("train/gradient_norm")] > [0.0] * 3
    hours = [event.value for event in events.Scalars("train/device_hours")]
    assert 0 < hours[0] < hours[1] < hours[2] < events.Scalars("train/hours")[2].value + 1e-9
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    for (name, a), b in zip(module.state_dict().items(), found[False][1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_raster_run_has_no_stage_and_no_vertical_curve(tmp_path: Path, toy_shards: str, caplog) -> None:
    """Guards curves that are zero or constant in every run of their kind."""
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    fit(
        tmp_path, toy_shards, make_module(flashar=False), max_steps=2, logger=logger, log_every_n_steps=1,
        limit_val_batches=1.0,
    )  # fmt: skip
    events = events_of(tmp_path)
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "lr/backbone"} <= tags
    assert not {"train/stage", "train/vertical", "val/vertical", "val/gate_mean"} & tags
    texts = [bytes(event.tensor_proto.string_val[0]).decode() for event in events.Tensors("train/stage/text_summary")]
    assert texts == ["Training at step 0 of 2: backbone, horizontal_head train."]


def test_a_sheet_has_every_image_once_below_its_head() -> None:
    """Guards pictures with a blank band, and columns that are not those of their heads."""
    images = torch.zeros(6, 3, 64, 64, dtype=torch.uint8)
    images[:] = torch.arange(10, 16, dtype=torch.uint8)[:, None, None, None]
    picture = sheet([("real", images[:2]), ("two\nlines", images[2:])], ["a", "a name that is far too long"])
    middle = {}
    for value in range(10, 16):
        rows, columns = (picture == value).all(0).nonzero().T
        assert len(rows) >= 64 * 64
        middle[value] = (int(rows.median()), int(columns.median()))
    assert abs(middle[10][1] - middle[12][1]) <= 1 >= abs(middle[12][1] - middle[14][1])
    assert abs(middle[11][1] - middle[13][1]) <= 1 >= abs(middle[13][1] - middle[15][1])
    assert middle[10][0] < middle[12][0] < middle[14][0]
    assert middle[12][0] - middle[10][0] > middle[14][0] - middle[12][0] + 5  # blocks stand apart
    empty = "".join("x" if each else " " for each in (picture == 255).all(0).all(1).tolist())
    assert max(map(len, empty.split())) <= 20


def test_many_heads_stand_in_parts_below_each_other() -> None:
    """Guards sheets of 16 classes wider than a screen, and images below the head of another one."""
    images = torch.arange(1, 8, dtype=torch.uint8)[:, None, None, None].expand(7, 3, 64, 64)
    heads = [str(i) for i in range(4)]
    picture = sheet([("real", images[:4]), ("samples", images)], heads, columns=3)
    assert picture.shape[2] == sheet([("real", images[:2]), ("samples", images[:2])], heads[:2]).shape[2]
    below = sheet([("real", images[2:4]), ("samples", images[[2, 3, 6]])], heads[2:])
    assert torch.equal(picture[:, -below.shape[1] :], below)
    above = sheet([("real", images[:2]), ("samples", images[[0, 1, 4, 5]])], heads[:2])
    assert torch.equal(picture[:, : above.shape[1]], above)
