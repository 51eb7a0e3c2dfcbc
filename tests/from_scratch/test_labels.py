"""What a label column may hold, and which classes the networks see."""

import io
import json

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from trainers.autoencoder import Autoencoder
from trainers.config import AutoencoderConfig, GanConfig, ImagesConfig, loading
from trainers.errors import UserError
from trainers.from_scratch.image_sets import load_images
from trainers.gan import Gan

TEXT, WHOLE = datasets.Value("string"), datasets.Value("int64")


def write_split(folder, split, labels, feature):
    """A data set of a picture for each label, with the column "label" of that type."""
    folder.mkdir(exist_ok=True)
    rng, pictures = np.random.default_rng(len(labels)), []
    for _ in labels:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (28, 28), dtype=np.uint8)).save(buffer, "png")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features)
    rows.to_parquet(folder / f"{split}.parquet")


@pytest.fixture
def load(tmp_path):
    """A function: labels of the training split, their type, those of the test split -> both sets
    of pictures."""

    def load_both(train, feature=WHOLE, test=None, **more):
        for split, labels in (("train", train), ("test", test or train)):
            write_split(tmp_path / "rows", split, labels, feature)
        config = ImagesConfig(dataset_name=str(tmp_path / "rows"), label_column="label", **more)
        return [load_images(config, "cpu", held_out) for held_out in (False, True)]

    return load_both


NAMED = datasets.ClassLabel(names=["bird", "cat", "dog"])
USABLE = {
    "from 0": ([1, 0, 2], WHOLE, [1, 0, 2], ["0", "1", "2"]),
    "from 1": ([3, 1, 2], WHOLE, [2, 0, 1], ["1", "2", "3"]),
    "with gaps": ([10, 300, 10, 20], WHOLE, [0, 2, 0, 1], ["10", "20", "300"]),
    "negative": ([-5, 5, 0], WHOLE, [0, 2, 1], ["-5", "0", "5"]),
    "minus and plus one": ([1, -1, 1], WHOLE, [1, 0, 1], ["-1", "1"]),
    "texts": (["dog", "cat ", "dog"], TEXT, [1, 0, 1], ["cat", "dog"]),
    "numbers as texts": (["10", "9", "2"], TEXT, [2, 1, 0], ["2", "9", "10"]),
    "yes or no": ([True, False, True], datasets.Value("bool"), [1, 0, 1], ["0", "1"]),
    "whole floats": ([2.0, 1.0, 2.0], datasets.Value("float32"), [1, 0, 1], ["1", "2"]),
    "names": ([2, 0, 1], NAMED, [2, 0, 1], ["bird", "cat", "dog"]),
    "names without pictures of the first": ([2, 1, 2], NAMED, [1, 0, 1], ["cat", "dog"]),
}


@pytest.mark.parametrize(("labels", "feature", "expected", "names"), USABLE.values(), ids=USABLE)
def test_classes_are_numbered_from_0_without_a_gap_and_keep_their_names(
    load, labels, feature, expected, names
):
    for images in load(labels, feature):
        assert images.labels.tolist() == expected
        assert list(images.class_names) == names


REFUSED = {
    "none": ([0, None, 1, None], WHOLE, r"2 of 4 rows have no class, but None"),
    "unknown": ([0, -1, 2], WHOLE, r"1 of 3 rows have no class, but -1"),
    "unknown of names": ([0, -1, 1], NAMED, r"1 of 3 rows have no class, but -1"),
    "empty text": (["a", " ", "b"], TEXT, r"1 of 3 rows have no class, but ''"),
    "not a number": ([1.0, float("nan")], datasets.Value("float32"), r"1 of 2 rows have no class"),
    "measures": ([0.5, 1.0], datasets.Value("float64"), r"row 0 .* is 0.5, which is no class"),
    "lists": ([[0], [1, 2]], datasets.List(WHOLE), r"row 0 .* is \[0\], which is no class"),
}


@pytest.mark.parametrize(("labels", "feature", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_class_is_refused_with_the_split_the_count_and_a_remedy(
    load, labels, feature, message
):
    with pytest.raises(UserError, match=rf"split 'train'.*{message}.*label_column to null"):
        load(labels, feature)


def test_unlabeled_rows_of_the_test_split_are_refused_before_training(load):
    with pytest.raises(UserError, match=r"split 'test': 3 of 3 rows have no class, but -1"):
        load([0, 1], test=[-1, -1, -1])


def test_a_class_that_only_the_test_split_has_is_named(load):
    with pytest.raises(UserError, match=r"'test' has 2 classes that no training .*: dog, fox\. "):
        load(["cat", "ape"], TEXT, ["cat", "dog", "fox"])


def test_a_class_that_the_test_split_lacks_is_no_mistake(load):
    train, test = load([0, 1, 2], test=[2, 0])
    assert train.class_names == test.class_names
    assert test.labels.tolist() == [2, 0]


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write_split(tmp_path / "rows", "train", [0, 1], WHOLE)
    config = ImagesConfig(
        dataset_name=str(tmp_path / "rows"), label_column="class", test_split=None
    )
    with pytest.raises(UserError, match=r"label_column: .* no column 'class', it has image, label"):
        load_images(config, "cpu")


def test_a_column_that_numbers_the_pictures_is_warned_of(load):
    with pytest.warns(UserWarning, match="each of the 9 training pictures has a class of its own"):
        load(list(range(9)))


@pytest.mark.parametrize(
    ("labels", "feature", "only_label"),
    [([7, 3, 7], WHOLE, 7), (["cat", "ape", "cat"], TEXT, "cat"), ([1, 0, 1], NAMED, "cat")],
)
def test_one_class_is_chosen_by_its_value_or_its_name(load, labels, feature, only_label):
    train, test = load(labels, feature, only_label=only_label)
    assert train.labels.tolist() == [1, 1]
    assert test.labels.tolist() == [1, 0, 1]


def test_an_anomaly_may_be_of_a_class_that_training_lacks(load):
    train, test = load([4, 4], test=[4, 2, 9], only_label=4)
    assert train.labels.tolist() == [0, 0]
    assert test.labels.tolist() == [0, 1, 2]


def test_a_class_that_is_not_there_is_named_with_those_that_are(load):
    with pytest.raises(UserError, match="label 5: there is no picture; its classes are 1, 2"):
        load([1, 2], only_label=5)


# In the trainers


def make_data(folder, train, test, **more):
    for split, labels in (("train", train), ("test", test)):
        write_split(folder / "rows", split, labels, WHOLE)
    return {"dataset_name": str(folder / "rows"), "label_column": "label", **more}


def make_gan(folder, train, test, conditional=False, **more):
    config = GanConfig(
        model={"width": 8, "conditional": conditional},
        output_dir=folder / "run",
        data=make_data(folder, train, test, **more),
    )
    return Gan(config, Accelerator(cpu=True))


def make_autoencoder(folder, train, test, use="reconstruct", **more):
    config = AutoencoderConfig(
        use=use,
        model={"width": 8, "latent_dim": 2},
        output_dir=folder / "run",
        data=make_data(folder, train, test, **more),
    )
    return Autoencoder(config, Accelerator(cpu=True))


def test_a_conditional_generator_has_no_class_that_it_never_saw(tmp_path):
    task = make_gan(tmp_path, [1, 2, 3] * 4, [1, 2, 3] * 4, conditional=True)
    assert task.model.config.classes == 3
    assert "0 is '1', 1 is '2', 2 is '3'" in task.usage_example()


def test_a_gan_of_one_class_cannot_be_measured_by_a_classifier_of_classes(tmp_path):
    with pytest.raises(UserError, match=r"validation.features: .* of one class"):
        make_gan(tmp_path, [1] * 12, [1] * 12)


def test_a_gan_of_one_class_is_not_conditional(tmp_path):
    data = make_data(tmp_path, [1, 2] * 6, [1, 2] * 6, only_label=2)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"kind": "gan", "model": {"conditional": True}, "data": data}))
    with pytest.raises(UserError, match=r"model.conditional: .* there is one class"):
        loading.load_config(path, [])


def test_a_gan_of_one_class_is_compared_with_pictures_of_that_class(tmp_path):
    held_out = [1] * 12 + [2] * 8
    data = make_data(tmp_path, [1, 2] * 6, held_out, only_label=1)
    config = GanConfig(
        model={"width": 8}, data=data, validation={"features": "inception"}, output_dir=tmp_path
    )
    assert len(Gan(config, Accelerator(cpu=True)).test_images) == 12


def test_an_autoencoder_of_one_class_is_measured_on_that_class_and_for_anomalies_on_all(tmp_path):
    split = [1, 2, 1, 3]
    reconstruct = make_autoencoder(tmp_path, split, split, only_label=1)
    assert len(reconstruct.test_images) == 2
    anomaly = make_autoencoder(tmp_path, split, split, use="anomaly", only_label=1)
    assert len(anomaly.test_images) == 4


@pytest.mark.parametrize(
    ("use", "test", "undefined"),
    [
        ("reconstruct", [1, 1], {"linear_probe"}),
        ("anomaly", [1, 1, 1], {"auroc", "found"}),
        ("anomaly", [2, 3], {"auroc", "psnr", "ssim"}),
    ],
)
def test_figures_that_one_class_does_not_define_are_named_so(tmp_path, use, test, undefined):
    task = make_autoencoder(tmp_path, [1, 1, 2, 3], test, use=use, only_label=1)
    task.finish(1)
    figures = json.loads((tmp_path / "run/figures.json").read_text())
    nowhere = "not defined on these pictures"
    assert {name for name, value in figures.items() if value == nowhere} == undefined
    card = (tmp_path / "run/README.md").read_text()
    for name in undefined:
        assert f"Held out: {name} | not defined" in card.replace("\\", "")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_test_pictures_are_measured_and_need_no_plot(tmp_path, count):
    task = make_autoencoder(tmp_path, [0, 1] * 3, [0, 1, 0][:count])
    task.finish(1)
    figures = json.loads((tmp_path / "run/figures.json").read_text())
    assert all(isinstance(figures[name], float) for name in ("psnr", "ssim", "linear_probe"))


def test_one_file_is_not_both_what_is_learnt_from_and_what_is_held_out(tmp_path):
    path = tmp_path / "config.yaml"
    data = {"dataset_name": "some.parquet"}
    path.write_text(json.dumps({"kind": "autoencoder", "data": data}))
    with pytest.raises(UserError, match=r"data.test_split: a single .parquet file has one split"):
        loading.load_config(path, [])
    assert loading.load_config(path, ["data.test_split=null"]).data.test_split is None


def test_held_out_pictures_that_are_trained_on_and_large_batches_are_warned_of(tmp_path, capsys):
    data = make_data(tmp_path, [0, 1], [0, 1])
    train = {"train_batch_size": 3}
    config = AutoencoderConfig(data=data, train=train, output_dir=tmp_path / "run")
    Autoencoder(config, Accelerator(cpu=True))
    messages = capsys.readouterr().out
    assert "2 of 2 held-out pictures are also training pictures" in messages
    assert "train_batch_size: 3 is more than the 2 training pictures" in messages
