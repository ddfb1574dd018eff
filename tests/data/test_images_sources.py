"""Sources of raw samples: the order is torchvision's, tars are read whole or refused, lists say what is wrong."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from flashar_pl.data.code_files import NpyCodes, NpyFolders, PtCodes
from flashar_pl.data.images import Unreadable
from flashar_pl.data.sources import CaptionList, ImageFolder, Names, TarSource, read_classes
from flashar_pl.data.tars import find_tars, tar_records


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_folder_order_and_labels_are_torchvisions(tmp_path):
    """Guards comparability: ids are those of the upstream code files, labels those of the published models."""
    touch(tmp_path, "b/2.JPEG", "b/10.jpg", "b/sub/1.png", "b/readme.txt", "a/z.webp", "a/A.jpg", "c/x.jpeg", "top.jpg")
    source = ImageFolder(str(tmp_path))
    found = [(source.read(i)[0].decode(), source.read(i)[1]) for i in range(len(source))]
    assert found == [
        ("a/A.jpg", 0), ("a/z.webp", 0), ("b/10.jpg", 1), ("b/2.JPEG", 1), ("b/sub/1.png", 1), ("c/x.jpeg", 2),
    ]  # fmt: skip
    assert source.condition.num_classes == 3


def test_a_list_of_classes_fixes_the_ids(tmp_path):
    touch(tmp_path, "data/a/1.jpg", "data/c/1.jpg")
    (tmp_path / "classes.txt").write_text("c\nb\na\n")
    classes = read_classes(str(tmp_path / "classes.txt"))
    source = ImageFolder(str(tmp_path / "data"), classes)
    assert [(source.where(i)[-7:], source.read(i)[1]) for i in range(2)] == [("c/1.jpg", 0), ("a/1.jpg", 2)]
    assert source.condition.num_classes == 3
    with pytest.raises(ValueError, match="folders that the list of classes lacks: a"):
        ImageFolder(str(tmp_path / "data"), ["b", "c"])
    (tmp_path / "twice.txt").write_text("a\na\n")
    with pytest.raises(ValueError, match="each must differ"):
        read_classes(str(tmp_path / "twice.txt"))


def test_folders_without_classes_or_images_are_refused(tmp_path):
    touch(tmp_path, "flat/1.jpg", "empty/a/readme.txt")
    with pytest.raises(ValueError, match="no class folders"):
        ImageFolder(str(tmp_path / "flat"))
    with pytest.raises(ValueError, match="no images"):
        ImageFolder(str(tmp_path / "empty"))


def test_the_fingerprint_sees_a_new_file(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    before = ImageFolder(str(tmp_path)).fingerprint()
    assert ImageFolder(str(tmp_path)).fingerprint() == before
    touch(tmp_path, "a/2.jpg")
    assert ImageFolder(str(tmp_path)).fingerprint() != before


def test_tars_of_images_and_class_ids(tmp_path):
    write_tar(tmp_path / "b.tar", {"z/3.jpg": b"three", "z/3.cls": b"4\n", "z/3.json": b"{}"})
    write_tar(tmp_path / "a.tar", {"1.JPEG": b"one", "1.cls": b"0", "2.cls": b"1", "4.png": b"four"})
    source = TarSource(str(tmp_path), ("jpg", "jpeg", "png"), "cls", num_classes=5)
    assert len(source) == 4
    assert source.read(0) == (b"one", 0)
    assert source.read(3) == (b"three", 4)
    assert pickle.loads(pickle.dumps(source)).read(3) == (b"three", 4)
    assert source.where(3) == f"{tmp_path}/b.tar: z/3"
    for index, message in [(1, "no jpg"), (2, "no cls")]:
        with pytest.raises(Unreadable, match=message):
            source.read(index)
    with pytest.raises(ValueError, match=r"3.cls holds '4'; expected a class id 0 .. 3"):
        TarSource(str(tmp_path), ("jpg", "jpeg", "png"), "cls", num_classes=4)


def test_tars_of_class_names(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.jpg": b"one", "1.cls": b"dog"})
    assert TarSource(str(tmp_path), ("jpg",), "cls", ["cat", "dog"]).read(0)[1] == 1
    with pytest.raises(ValueError, match="'dog', which the list of classes lacks"):
        TarSource(str(tmp_path), ("jpg",), "cls", ["cat"])


def test_patterns_of_tars(tmp_path):
    for name in ("x-0.tar", "x-1.tar", "y.tar"):
        write_tar(tmp_path / name, {"1.jpg": b""})
    assert [path.name for path in find_tars(f"{tmp_path}/x-{{0..1}}.tar")] == ["x-0.tar", "x-1.tar"]
    assert [path.name for path in find_tars(f"{tmp_path}/x-*.tar")] == ["x-0.tar", "x-1.tar"]
    assert len(find_tars(str(tmp_path))) == 3
    with pytest.raises(ValueError, match=r"x-2.tar does not exist"):
        find_tars(f"{tmp_path}/x-{{0..2}}.tar")
    with pytest.raises(ValueError, match="No tars"):
        find_tars(f"{tmp_path}/z*.tar")


@pytest.mark.parametrize("damage", ["header", "cut", "cut at a member", "gz", "text"])
def test_a_damaged_tar_is_refused_not_shortened(tmp_path, damage):
    """Guards against silent loss: tarfile ends quietly at a damaged header."""
    members = {f"{i}.{kind}": bytes([i]) * 600 for i in range(5) for kind in ("jpg", "txt")}
    path = write_tar(tmp_path / "a.tar", members)
    assert len(list(tar_records(path))) == 5
    data = path.read_bytes()
    step = 512 + 1024
    if damage == "gz":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a"), io.BytesIO())
    else:
        path.write_bytes(
            {
                "header": data[: 4 * step] + b"\xff" * 512 + data[4 * step + 512 :],
                "cut": data[: 4 * step + 700],
                "cut at a member": data[: 4 * step],
                "text": b"no tar" * 200,
            }[damage]
        )
    with pytest.raises(ValueError, match=r"a\.tar.*again"):
        list(tar_records(path))


def test_caption_lists(tmp_path):
    touch(tmp_path, "images/a.png", "images/b.png")
    items = [
        {"input_prompt": "<image> a caption\u2028with breaks ", "output_image": "images/a.png"},
        {"input_prompt": "make it blue", "output_image": "x.png", "input_image": ["y.png"]},
        {"input_prompt": "", "output_image": ["images/b.png"]},
    ]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(items))
    source = CaptionList(str(path))
    assert len(source) == 2
    assert source.skipped == {"edits an input image": 1}
    assert source.read(0) == (b"images/a.png", "a caption\u2028with breaks")
    assert source.read(1) == (b"images/b.png", "")
    lines = tmp_path / "list.jsonl"
    lines.write_text(
        "\n".join(json.dumps({"words": i["input_prompt"], "file": "a.png"}, ensure_ascii=False) for i in items)
    )
    source = CaptionList(str(lines), str(tmp_path / "images"), "words", "file")
    assert [source.read(i)[1] for i in range(3)] == ["a caption\u2028with breaks", "make it blue", ""]
    with pytest.raises(ValueError, match=r"words, file, none of which .* --caption-key"):
        CaptionList(str(lines))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "no list of objects"), ('{"a": 1}', "no list of objects"),
     ('[{"caption": 3, "image": "a"}]', "Item 0 .* caption = 3"),
     ('[{"caption": "a", "image": ["a", "b"]}]', "Item 0 .* expected text"),
     ('[{"caption": "a", "image": "a", "input_image": "b"}]', "Every item .* edits")],
)  # fmt: skip
def test_bad_lists_name_the_item(tmp_path, text, message):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        CaptionList(str(tmp_path / "list.json"))


def npy_folders(root: Path, n: int = 3) -> NpyFolders:
    for name in ("codes", "labels"):
        (root / name).mkdir()
    for i in range(n):
        np.save(root / "codes" / f"{i}.npy", np.arange(i, i + 12, dtype=np.int64).reshape(1, 2, 6))
        np.save(root / "labels" / f"{i}.npy", np.array([i]))
    return NpyFolders(str(root / "codes"), str(root / "labels"), 10)


def test_npy_code_files(tmp_path):
    source = npy_folders(tmp_path)
    assert source.layout((2, 3)) == (2, (2, 3))
    data, label = source.read(2)
    assert label == 2
    np.testing.assert_array_equal(NpyCodes(2, (2, 3), 100)(data), np.arange(2, 14).reshape(2, 2, 3))
    with pytest.raises(Unreadable, match=r"vocabulary of 13 allows 0 \.\. 12"):
        NpyCodes(2, (2, 3), 13)(data)
    with pytest.raises(Unreadable, match=r"others have \(1, 3, 4\)"):
        NpyCodes(3, (2, 2), 100)(data)
    with pytest.raises(ValueError, match="add --grid"):
        source.layout(None)
    (tmp_path / "codes" / "1.npy").unlink()
    with pytest.raises(ValueError, match=r"lacks 1, such as 1.npy"):
        NpyFolders(str(tmp_path / "codes"), str(tmp_path / "labels"), 10)


def test_pickled_npy_files_do_not_run(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(Unreadable, match=r"no \.npy file"):
        NpyCodes(1, (1, 1), 10)((tmp_path / "x.npy").read_bytes())


@pytest.mark.parametrize("header", [b"{'descr': (", b"{'descr': '<i8', 'shape': (1", b"\x00\xff", b"1 +", b"'"])
def test_a_damaged_npy_header_is_no_crash(header):
    """numpy raises ValueError, SyntaxError or tokenize.TokenError, as the version of Python has it."""
    content = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117) + b"\n" + bytes(8)
    with pytest.raises(Unreadable, match=r"no \.npy file"):
        NpyCodes(1, (1, 1), 10)(content)


class Runs:
    def __reduce__(self):
        return (print, ("this file ran code",))


@pytest.mark.parametrize("value", [Runs(), {"a": 1}, torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)])
def test_pt_members_hold_plain_codes_only(value, capsys):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with pytest.raises(Unreadable):
        PtCodes(10)(buffer.getvalue())
    assert capsys.readouterr().out == ""
    buffer = io.BytesIO()
    torch.save(torch.tensor([[1, 2, 9]]), buffer)
    assert PtCodes(10)(buffer.getvalue()).tolist() == [[[1, 2, 9]]]
    with pytest.raises(Unreadable, match="vocabulary of 9"):
        PtCodes(9)(buffer.getvalue())


def test_names_survive_unusual_bytes():
    names = ["a", "", "é/ü", b"\xff\xfe".decode("utf-8", "surrogateescape")]
    packed = Names(names)
    assert [packed[i] for i in range(len(packed))] == names
