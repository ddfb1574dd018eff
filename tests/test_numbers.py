"""Numbers of the pages' tables are those of the committed result files."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of every row of the Markdown table whose header begins with `header`."""
    found: list[list[str]] = []
    lines = iter(text.splitlines())
    for line in lines:
        if re.sub(r" +", " ", line).startswith(header):
            next(lines)
            for row in lines:
                if not row.startswith("|"):
                    return found
                found.append([cell.strip() for cell in row.strip("|").split("|")])
    return found


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def shows(cell: str, value: float) -> bool:
    """Whether the first number of a cell is the value at that number of digits, half a last digit off at most."""
    number = re.search(r"[-+]?[\d,]*\.?\d+", cell)
    assert number is not None, cell
    text = number[0].replace(",", "")
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5001 * 10**-digits


def test_a_number_that_was_not_measured_is_seen() -> None:
    """The tests below must be able to fail."""
    assert shows("1.47", 1.4671)
    assert shows("35 %", 35.4)
    assert not shows("1.46", 1.4671)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_decoding_times(dtype: str) -> None:
    measured = (RESULTS / f"decode_llamagen_b_{dtype}_cpu" / "table.md").read_text(encoding="utf-8")
    by_key = {(row[2], row[0]): row for row in rows(measured, "| plan ")}
    by_key["-", "plain raster"] = by_key.pop(("plain", "plain raster"))
    shown = [row for row in rows(page("performance.md"), "| dtype | weights | plan |") if row[0] == dtype]
    assert {(row[1], row[2]) for row in shown} == set(by_key)
    columns = {3: 4, 4: 5, 5: 7, 6: 9, 7: 10, 8: 12, 9: 13, 10: 14, 13: 15}  # of the page: of the file
    for row in shown:
        found = by_key[row[1], row[2]]
        for here, there in columns.items():
            if row[here] != "-":
                assert shows(row[here], float(found[there].rstrip("%"))), (row, here, found[there])


def test_rounded_weights() -> None:
    found = json.loads((RESULTS / "formats_demo.json").read_text())["rows"]
    shown = rows(page("performance.md"), "| weights | MB | NLL")
    assert [row[0] for row in shown] == [each["format"] for each in found]
    for row, each in zip(shown, found, strict=True):
        assert shows(row[1], each["bytes"] / 1e6)
        assert shows(row[2], each["nll"])
        for cell, name in zip(row[3:], ("nll_change", "same_first", "same_greedy", "same_drawn"), strict=True):
            assert not cell or shows(cell, each[name] * (1 if name == "nll_change" else 100)), (row, name)


def test_pixels() -> None:
    found = json.loads((RESULTS / "pixels_cpu.json").read_text())
    trained, (vq,) = found["trained"], found["published"]
    dtypes = ("fp32", "bf16")
    expected = [
        [*(vq["seconds"][name]["cpu_s"] for name in dtypes), vq["psnr_bf16_to_fp32"]],
        [*(trained["fid_to_real"][name] for name in dtypes), trained["psnr_bf16_to_fp32"]],
    ]
    shown = rows(page("performance.md"), "| pixels | fp32 | bf16 |")
    for row, values in zip(shown, expected, strict=True):
        assert all(shows(cell, value) for cell, value in zip(row[1:], values, strict=True))


def test_the_demo() -> None:
    """README's first table is that of the committed report."""
    found = json.loads((RESULTS / "demo.json").read_text())["report"]["rows"]
    shown = rows((ROOT / "README.md").read_text(encoding="utf-8"), "| | decoding steps")
    assert [row[0] for row in shown] == [each["name"] for each in found.values()]
    for row, each in zip(shown, found.values(), strict=True):
        values = (each["steps"], each["nll_nats_per_image"], each["fid"], each["accuracy"])
        for cell, value in zip(row[1:], (*values, each["ms_per_image"]["median"], each["speed_up"]), strict=True):
            assert shows(cell, value), (row, value)


def test_the_cost_of_comparing_checkpoints() -> None:
    found = json.loads((RESULTS / "verifying.json").read_text())
    text = re.search(r"the comparison is (\d+ %) of the\nCPU time of a load of ([\d.]+) s", page("training.md"))
    assert text is not None
    assert shows(text[1], 100 * found["cpu_share"])
    assert shows(text[2], found["cpu_seconds_without"])


def test_training_steps() -> None:
    shown = rows(page("performance.md"), "| model, batch | stage |")
    assert len(shown) == 12
    for row in shown:
        size, batch = row[0].lower().split(", ")
        found = json.loads((RESULTS / f"train_llamagen_{size}_{batch}_cpu.json").read_text())["rows"]
        each = next(x for x in found if (str(x["stage"]), x["loss"]) == (row[1], row[2]))
        assert shows(row[3], 1000 * each["time"]["cpu_s"]), row
        assert shows(row[4], each["tokens_per_s"]), row
        for cell, name in zip(row[5:8], ("step_bytes", "loss_bytes", "loss_resident_bytes"), strict=True):
            assert shows(cell, each[name] / 2**20), (row, name)
        assert shows(row[8], each["time"]["repeats"]), row


def test_killed_runs() -> None:
    seeds = [json.loads(path.read_text()) for path in RESULTS.glob("kills_*.json")]
    shown = rows(page("reliability.md"), "| | runs | kills")
    for row, kinds in zip(shown, ("single", "ddp", "fsdp", "background"), strict=True):
        parts = [each[kinds] for each in seeds if each.get(kinds)]
        sums = [sum(part[name] for part in parts) for name in ("trials", "kills", "SIGKILL", "SIGTERM", "SIGINT",
                                                                "same_end", "same_curves", "left_over")]  # fmt: skip
        assert [int(number) for number in re.findall(r"\d+", " ".join(row[1:]))] == sums


@pytest.mark.parametrize(
    ("file", "header"), [("digits", "| | run | test NLL |"), ("digits_losses", "| changed | run |")]
)
def test_the_study_of_the_digits(file: str, header: str) -> None:
    found = json.loads((ROOT / "docs" / "results" / f"{file}.json").read_text())["rows"]
    shown = {row[1].strip("`"): row for row in rows(page("ablations.md"), header)}
    assert shown.keys() | {"raster", "paper"} == found.keys()
    for name, row in shown.items():
        each = found[name]
        assert shows(row[2], each["nll"]["value"])
        if each["difference"] is not None:
            assert shows(row[3], each["difference"]["value"])
            assert shows(row[4], each["difference"]["standard_error"])
            for cell, value in zip(row[5].split(" to "), each["difference"]["interval_95"], strict=True):
                assert shows(cell, value), row
    assert {run["commit"] for each in found.values() for run in each["runs"]} == {"5c3bf7c4c19a"}


def test_the_study_of_the_scenes() -> None:
    """The tables of the page are made from the file, and every evaluation is of one commit."""
    spec = importlib.util.spec_from_file_location("scenes_study", ROOT / "benchmarks" / "scenes.py")
    assert spec is not None
    assert spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    found = json.loads((ROOT / "docs" / "results" / "scenes.json").read_text())
    text = page("results/scenes.md")
    assert study.insert(text, study.page(found)) == text
    runs = [run for row in found["rows"].values() for run in row["runs"]]
    assert {run["commits"]["evaluation"] for run in runs} == {"c4e3cb1d0745"}
    assert "commit c4e3cb1d0745" in text
    said, first, raster = " ".join(text.partition(study.END)[2].split()), found["pairs"][0], found["rows"]["raster"]
    for pattern, name in (
        (r"image (\S+) points more images are torn", "inside"),
        (r"in (\S+) points more two objects", "clash"),
        (r"reason (\S+) points more show too many", "surplus"),
        (r"costs (\S+) points of exact", "exact"),
        (r"scenes, (\S+) points of GenEval's", "correct"),
        (r"altogether, (\S+) points", "torn"),
    ):
        assert shows(re.search(pattern, said)[1], abs(100 * first[name]["value"])), name
    assert shows(re.search(r"mean and (\S+) nats", said)[1], first["nats"]["value"])
    control = next(pair for pair in found["pairs"] if pair["ours"] == "raster, trained on")
    steps = re.search(r"control, give (\S+) points of exact scenes and (\S+) nats,", said)
    assert all(map(shows, steps.groups(), (100 * control["exact"]["value"], -control["nats"]["value"])))
    control = next(pair for pair in found["pairs"] if pair["other"] == "raster, trained on")
    steps = re.search(r"against it FlashAR costs (\S+) points and (\S+) nats", said)
    assert all(map(shows, steps.groups(), (-100 * control["exact"]["value"], control["nats"]["value"])))
    drawn, blocks = re.search(r"(\S+) % of its images are torn, (\S+) % exact", said), found["rows"]["BlockDiffusion"]
    assert all(map(shows, drawn.groups(), (100 * blocks["torn"]["share"], 100 * blocks["exact"]["share"])))
    shares = re.search(
        r"tears (\S+) % of its images instead of (\S+) %, and shows (\S+) % exactly instead of (\S+) %", said
    )
    p0, p1 = raster["runs"]
    values = (p1["torn"], p0["torn"], p1["exact"], p0["exact"])
    assert all(shows(cell, 100 * each["share"]) for cell, each in zip(shares.groups(), values, strict=True))


def test_coupled_diagonals() -> None:
    measured = json.loads((ROOT / "docs" / "results" / "coupling.json").read_text(encoding="utf-8"))["rows"]
    shown = rows(page("results/beyond.md"), "| model | coupling | torn")
    for (_, _, *cells), row in zip(shown, measured, strict=True):
        values = (row["torn"]["share"], row["exact"]["share"], row["legal"], row["illegal"])
        assert all(map(shows, cells, values)), row["name"]


def test_codes_of_a_diagonal_that_see_one_another() -> None:
    results, text = ROOT / "docs" / "results", page("results/beyond.md")
    found = json.loads((results / "intra.json").read_text(encoding="utf-8"))
    for (_, *cells), run in zip(rows(text, "| FlashAR | plain | 2 groups"), found.values(), strict=True):
        for cell, row in zip(cells, [row for row in run["rows"] if "coupling" not in row], strict=True):
            assert all(map(shows, cell.split(", "), (row["nll"], row["torn"]["share"]))), (cell, row)
    cost = json.loads((results / "intra_cost.json").read_text(encoding="utf-8"))["rows"]
    said = re.search(r"takes (\S+) times the multiplications; CPU time\s+(\S+) \(2 groups\) and (\S+) times", text)
    assert said is not None
    assert all(map(shows, said.groups(), (cost[2]["gmac_ratio"], cost[1]["cpu_ratio"], cost[2]["cpu_ratio"])))


def test_videos_by_direction() -> None:
    found = json.loads((ROOT / "docs" / "results" / "video.json").read_text(encoding="utf-8"))["rows"]
    shown = rows(page("video.md"), "| model | steps |")
    assert len(shown) == len(found)
    for (_, steps, *cells), row in zip(shown, found, strict=True):
        assert steps == str(row["steps"])
        by = row["by_direction"]
        for cell, name in zip(cells, ("right", "down", "left", "up", "all"), strict=False):
            assert shows(cell, by[name]["nll"]), (cell, row["checkpoint"])
        if row is not found[0]:
            gap, error = re.findall(r"[-+]?[\d.]+", cells[5])
            assert shows(gap, by["all"]["gap_percent"])
            assert shows(error, 100 * by["all"]["gap_standard_error"] / found[0]["by_direction"]["all"]["nll"])


def test_training_on_drawn_samples() -> None:
    found = json.loads((ROOT / "docs" / "results" / "drawn.json").read_text())["rows"]
    shown = rows(page("results/beyond.md"), "| trained on |")
    assert [row[0].split()[0].replace(",", "") for row in shown[1:]] == [*found][1:4]
    for row, each in zip(shown, found.values(), strict=False):
        assert shows(row[1], each["nll"]["value"])
        if each["difference"] is not None:
            assert shows(row[2], each["difference"]["value"])
            for cell, value in zip(row[3].split(" to "), each["difference"]["interval_95"], strict=True):
                assert shows(cell, value), row


def test_time_against_quality() -> None:
    found = {row["name"]: row for row in json.loads((ROOT / "docs/results/dial.json").read_text())["rows"].values()}
    shown = rows(page("results/beyond.md"), "| | forwards |")
    assert {row[0] for row in shown} == {name for name in found if name != "FlashAR" and "training-free" not in name}
    for row in shown:
        each = found[row[0]]
        values = [each.get("forwards", each["steps"]), each["nll_nats_per_image"], each["fid"], each["accuracy"]]
        for cell, value in zip(row[1:], [*values, each["ms_per_image"]["median"], each["speed_up"]], strict=True):
            assert shows(cell, value), (row, cell)


def test_the_study_of_the_emoji() -> None:
    found = json.loads((ROOT / "docs/results/emoji.json").read_text(encoding="utf-8"))
    shown = rows(page("results/emoji.md"), "| | forwards | NLL, nats |")
    assert [row[0] for row in shown] == [each["name"] for each in found["rows"].values()]
    for row, each in zip(shown, found["rows"].values(), strict=True):
        values = [each[name] for name in ("steps", "nll_nats_per_image", "fid", "accuracy")]
        values += [1e3 * each["with_pixels"]["cpu_s"]] if "with_pixels" in each else []
        assert all(map(shows, row[1:], values)), row
    commits = {each["commit"] for each in (*found["trained"].values(), found["versions"])}
    assert commits == set(re.findall(r"commit ([0-9a-f]{12})", page("results/emoji.md")))


def test_the_layer_that_the_probe_names() -> None:
    found = json.loads((ROOT / "docs/results/probe.json").read_text(encoding="utf-8"))
    text = page("results/beyond.md")
    probes = {f"{name}, {model}": probe for name, each in found.items() for model, probe in each["probes"].items()}
    for row, (name, probe) in zip(rows(text, "| raster model | embeddings |"), probes.items(), strict=True):
        assert row[0] == name
        assert all(map(shows, row[1:], [*probe["weights"], probe["branch_layer"]])), row
    runs = [(name, each, run) for name, each in found.items() for run in each["runs"]]
    for row, (name, each, run) in zip(rows(text, "| run | raster |"), runs, strict=True):
        assert row[0] == f"{name}, {run['raster']}, seed {run['seed']}"
        assert shows(row[1], each["raster"][run["raster"]]["nll"])
        for cell, m in zip(row[2:], "1234", strict=True):
            measured = run["by_branch_layer"].get(m)
            assert cell == "-" if measured is None else shows(cell, measured["nll"]), row
