"""Sources of raw samples: the order is torchvision's, tars are read whole or refused, lists say what is wrong."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from flashar_pl.data.captions import CaptionList
from flashar_pl.data.code_files import NpyCodes, NpyFolders, PtCodes
from flashar_pl.data.folders import LOOP
from flashar_pl.data.images import Unreadable
from flashar_pl.data.manifest import ConditionSpec, Manifest
from flashar_pl.data.sources import EMPTY, ImageFolder, Names, TarSource, class_id, read_classes
from flashar_pl.data.tars import NO_TAR, find_tars, tar_records


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
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
    with pytest.raises(ValueError, match="no images in its class folders"):
        ImageFolder(str(tmp_path / "empty"))


def test_hidden_and_empty_folders_are_no_classes_and_all_is_accounted_for(tmp_path):
    """Guards every label: .ipynb_checkpoints and @eaDir became classes 0 and 1."""
    touch(
        tmp_path, ".ipynb_checkpoints/x.jpg", "@eaDir/1.jpg/thumb.jpg", ".DS_Store", "empty/.keep", "top.jpg",
        "list.txt", "b/1.JFIF", "b/2.avif", "b/3.Gif", "b/._4.jpg", "b/5.heic", "b/.git/6.jpg", "a/@eaDir/7.jpg",
        "a/8.jpg",
    )  # fmt: skip
    source = ImageFolder(str(tmp_path))
    assert [(source.where(i)[-6:], source.read(i)[1]) for i in range(len(source))] == [
        ("/8.jpg", 0), ("1.JFIF", 1), ("2.avif", 1), ("/3.Gif", 1),
    ]  # fmt: skip
    assert source.class_names == ("a", "b")
    left_out = {"hidden": 7, "not named as an image": 2, "images outside the class folders": 1, EMPTY: 1}
    assert source.account.facts == {"found": 15, "used": 4, "left_out": left_out}
    assert "2 not named as an image (such as b/5.heic)" in str(source.account)


def test_looped_links_are_not_followed_twice(tmp_path):
    """A link to a parent folder multiplied every image by the depth at which the system gives up."""
    touch(tmp_path, "set/a/1.jpg", "set/a/sub/2.jpg", "set/b/3.jpg", "elsewhere/4.jpg")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/a/sub/here").symlink_to(tmp_path / "set/a")
    (tmp_path / "set/c").symlink_to(tmp_path / "set")
    (tmp_path / "set/b/more").symlink_to(tmp_path / "elsewhere")
    source = ImageFolder(str(tmp_path / "set"))
    assert [Path(source.where(i)).name for i in range(len(source))] == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert source.account.left_out == {LOOP: 3, EMPTY: 1}


def test_the_fingerprint_sees_a_new_file(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    before = ImageFolder(str(tmp_path)).fingerprint()
    assert ImageFolder(str(tmp_path)).fingerprint() == before
    touch(tmp_path, "a/2.jpg")
    assert ImageFolder(str(tmp_path)).fingerprint() != before


def test_tars_of_images_and_class_ids(tmp_path):
    write_tar(tmp_path / "b.tar", {"z/3.jpg": b"three", "z/3.cls": b"4\n", "z/3.json": b"{}"})
    write_tar(tmp_path / "a.tar", {"1.JPEG": b"one", "1.cls": b"0", "2.cls": b"1", "4.png": b"four", "5.txt": b"five"})
    touch(tmp_path, "c.tar.gz", "d.tgz")  # a shard that was not unpacked is no silent loss
    source = TarSource(str(tmp_path), ("jpg", "jpeg", "png"), "cls", num_classes=5)
    assert len(source) == 4
    assert source.known_bad() == [1, 2]
    left_out = {NO_TAR: 2, "records without jpg and cls": 1}
    assert source.account.facts == {"found": 7, "used": 4, "left_out": left_out}
    assert source.read(0) == (b"one", 0)
    assert source.read(3) == (b"three", 4)
    assert pickle.loads(pickle.dumps(source)).read(3) == (b"three", 4)
    assert source.where(3) == f"{tmp_path}/b.tar: z/3"
    for index, message in [(1, "no jpg"), (2, "no cls")]:
        with pytest.raises(Unreadable, match=message):
            source.read(index)
    source = TarSource(str(tmp_path), ("jpg", "jpeg", "png"), "cls", num_classes=4)
    assert source.known_bad() == [1, 2, 3]
    with pytest.raises(Unreadable, match=r"'4' is no class id 0 .. 3"):
        source.read(3)


def test_tars_of_class_names(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.jpg": b"one", "1.cls": b"dog"})
    assert TarSource(str(tmp_path), ("jpg",), "cls", ["cat", "dog"]).read(0)[1] == 1
    assert TarSource(str(tmp_path), ("jpg",), "cls", ["cat", "dog"]).class_names == ("cat", "dog")
    with pytest.raises(Unreadable, match="'dog' is not in the list of classes"):
        TarSource(str(tmp_path), ("jpg",), "cls", ["cat"]).read(0)


@pytest.mark.parametrize("text", [b"\xc2\xb2", b"-1", b"1.0", b"", b"9" * 5000, b"\xff"])
def test_labels_that_are_no_ids(text):
    """Guards against int(): a superscript two is a digit, too."""
    with pytest.raises(Unreadable, match=r"no class id 0 \.\. 4"):
        class_id(text, None, 5)
    assert class_id(b"\xef\xbb\xbf3\r\n", None, 5) == 3


def entries(*names: str) -> list[tuple[str, bytes]]:
    return [(name, b"1" if name.endswith("cls") else name.encode()) for name in names]


def test_repeated_keys_lose_no_image(tmp_path):
    """Guards against a dictionary of members, in which the second of two images of one key wins."""
    write_tar(tmp_path / "a.tar", [*entries("0.jpg", "0.cls"), ("0.jpg", b"other"), ("0.cls", b"2")])
    source = TarSource(str(tmp_path), ("jpg",), "cls", num_classes=5)
    assert [source.read(i) for i in range(len(source))] == [(b"0.jpg", 1), (b"other", 2)]


def test_hidden_members_are_left_out_and_counted(tmp_path):
    """Tars made on a Mac hold ._NAME beside NAME."""
    names = ("._0.jpg", "0.jpg", "._0.cls", "0.cls", "__MACOSX/1.jpg", "./.git/2.jpg", "./a/3.jpg", "./a/3.cls")
    write_tar(tmp_path / "a.tar", entries(*names))
    write_tar(tmp_path / "._a.tar", entries("4.jpg", "4.cls"))
    source = TarSource(str(tmp_path), ("jpg",), "cls", num_classes=5)
    assert [source.read(i)[0] for i in range(len(source))] == [b"0.jpg", b"./a/3.jpg"]
    assert str(source.account) == "found 7 entries, used 2, left out 5: 5 hidden (such as ._a.tar)"


def test_concatenated_tars_are_read_to_the_end(tmp_path):
    """cat a.tar b.tar > both.tar: tar readers stop at the first end mark."""
    a = write_tar(tmp_path / "a", entries("0.jpg", "0.cls")).read_bytes()
    b = write_tar(tmp_path / "b", entries("0.jpg", "0.cls", "1.jpg", "1.cls")).read_bytes()
    (tmp_path / "both.tar").write_bytes(a + bytes(512 * 5) + b + b)
    source = TarSource(str(tmp_path / "both.tar"), ("jpg",), "cls", num_classes=5)
    assert [source.read(i)[0] for i in range(len(source))] == [b"0.jpg", b"0.jpg", b"1.jpg", b"0.jpg", b"1.jpg"]
    (tmp_path / "both.tar").write_bytes(a + b"\xff" * 1024)
    with pytest.raises(ValueError, match=r"both\.tar has no end mark at byte 10240"):
        TarSource(str(tmp_path / "both.tar"), ("jpg",), "cls", num_classes=5)
    (tmp_path / "both.tar").write_bytes(bytes(10240))
    assert list(tar_records(tmp_path / "both.tar")) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [(("0.jpg", "1.jpg", "0.cls", "1.cls"), "2 records do not stand side by side, such as those of '0'.*--sort=name"),
     (("0.jpg", "0.jpg", "0.cls", "0.cls"), "1 records do not stand side by side"),
     (("v1.0.jpg", "v1.0.cls"), "rename files with more dots.*'v1' of .*a.tar, which holds 0.jpg, 0.cls"),
     (("0.jpg", "0.json"), "the first one, '0', lacks cls.*not from .json"),
     (("0.cls", "0.json"), "the first one, '0', lacks an image"),
     (("._0.jpg",), "no records of jpg and cls.*found 1 entries, used 0, left out 1: 1 hidden")],
)  # fmt: skip
def test_tars_that_are_not_webdatasets_say_why(tmp_path, names, message):
    write_tar(tmp_path / "a.tar", entries(*names))
    with pytest.raises(ValueError, match=message):
        TarSource(str(tmp_path), ("jpg",), "cls", num_classes=5)


@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80\0\0\0" + b"\x7f" * 8, b"77777777777\0"])
def test_sizes_that_no_file_has(tmp_path, size):
    """Sizes in base 256 may be negative, or overflow an offset."""
    data = bytearray(write_tar(tmp_path / "a.tar", entries("0.jpg", "0.cls")).read_bytes())
    data[124:136] = size
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar.*again"):
        list(tar_records(tmp_path / "a.tar"))


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


def test_what_exists_is_no_pattern(tmp_path, monkeypatch):
    """Guards paths such as "my [v2] data", and ~ where no shell expands it."""
    folder = tmp_path / "my [v2] {a,b} data"
    folder.mkdir()
    tar = write_tar(folder / "x-[0].tar", {"1.jpg": b""})
    monkeypatch.setenv("HOME", str(tmp_path))
    for location in (tar, folder, f"{folder}/x*.tar", f"{folder}/{{x,y}}-*.tar", f"~/{folder.name}"):
        assert find_tars(str(location)) == [tar]
    with pytest.raises(ValueError, match="No tars"):
        find_tars(f"{tmp_path}/{{x-*.tar")


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
    assert str(source.account) == "found 3 entries, used 2, left out 1: 1 edits an input image (such as item 1)"
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
    [("{", r"list\.json, line 1: not JSON"), ("[]", "no list of objects"), ('{"a": 1}', "no list of objects"),
     ('[{"caption": "a", "image": "a", "input_image": "b"}]', "Every item .* edits")],
)  # fmt: skip
def test_bad_lists_name_the_item(tmp_path, text, message):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        CaptionList(str(tmp_path / "list.json"))


def test_an_item_that_cannot_be_used_is_named_and_the_others_are(tmp_path):
    """Also guards files elsewhere: a list names images below its folder only."""
    items: list[dict[str, object]] = [{"caption": "caf\u00e9", "image": "a.png"}, {"caption": 3, "image": "a.png"}]
    items += [{"caption": "half of \ud83d", "image": "a.png"}, {"caption": "", "image": ["a.png", "b.png"]}]
    items += [{"caption": "", "image": name} for name in ("/etc/passwd", "../a.png", "x/../../a.png")]
    touch(tmp_path, "set/a.png")
    (tmp_path / "set/list.json").write_text(json.dumps(items), encoding="utf-8-sig")  # as Windows writes it
    source = CaptionList(str(tmp_path / "set/list.json"))
    assert source.read(0) == (b"set/a.png", "caf\u00e9")
    assert source.known_bad() == list(range(1, 7))
    reasons = ["caption is '3'", "lone surrogate", "image is", "passwd is not below", "not below", "not below"]
    for i, reason in enumerate(reasons, start=1):
        assert source.where(i) == f"{tmp_path}/set/list.json, item {i}"
        with pytest.raises(Unreadable, match=reason):
            source.read(i)
    assert CaptionList(str(tmp_path / "set/list.json"), "/").known_bad() == [1, 2, 3], "typed: any file"


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


@pytest.mark.parametrize(
    "label", [np.array(["cat"]), np.array([1.5]), np.array([10]), np.array([-1]), np.array([1, 2])]
)
def test_a_label_that_cannot_be_used_is_no_crash(tmp_path, label):
    source = npy_folders(tmp_path)
    np.save(tmp_path / "labels" / "1.npy", label)
    with pytest.raises(Unreadable, match=r"labels/1.npy "):
        source.read(1)
    assert source.read(2)[1] == 2


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


@pytest.mark.parametrize(
    "wrong",
    [{"class_names": ["a"]}, {"class_names": ["a", "a"]}, {"class_names": ["a", 1]}, {"class_names": ["a", "\x1b[2J"]},
     {"class_names": 3}, {"accounts": []}, {"accounts": {"train": {}}}, {"accounts": {"train": 1}},
     {"accounts": {"train": {"found": 1, "used": -1, "left_out": {}}}},
     {"accounts": {"train": {"found": 1, "used": 1, "left_out": {"x": "y"}}}}],
)  # fmt: skip
def test_names_and_accounts_of_a_manifest_are_checked_for_form(tmp_path, wrong):
    condition = ConditionSpec("class", num_classes=2)
    facts = {"name": "x", "tokenizer": {}, "grid": (1, 1), "vocabulary": 2, "condition": condition}
    path = Manifest(**facts, class_names=("a", "b")).save(tmp_path)
    assert Manifest.load(tmp_path).class_names == ("a", "b")
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        Manifest.load(tmp_path)
