"""`flashar reproduce`: every command of every row is one that its parser takes; the page of results has all rows."""

import re
from pathlib import Path

import pytest

from flashar_pl.cli import COMMANDS, load, split_verb
from flashar_pl.commands import reproduce as module
from flashar_pl.commands.arguments import parse
from flashar_pl.commands.reproduce import read_tables, reproduce
from flashar_pl.decoding.prompts import read_classes, read_prompts
from flashar_pl.options import parse_classes
from flashar_pl.recipes import find_recipe

TABLES = read_tables()
ROWS = [(table, row) for table, content in TABLES.items() for row in content["rows"]]
PAGE = Path(__file__).parents[2] / "docs" / "results" / "README.md"


def test_every_command_is_taken():
    """LightningCLI's options of `fit` are parsed once for each different command: it is the slow part."""
    seen = set()
    for table, row in ROWS:
        for stage in TABLES[table]["rows"][row].steps:
            assert not re.search(r"\{\w+\}", " ".join(stage.words)), (table, row)
            if (words := tuple(stage.words)) not in seen:
                seen.add(words)
                name, rest = split_verb(list(words))
                if not COMMANDS[name].trains:
                    parse(load(COMMANDS[name]), f"flashar {name}", rest)
    assert len(seen) > 40


@pytest.mark.slow
def test_every_training_run_is_taken():
    from flashar_pl.training.lightning_cli import ExperimentCLI

    runs = {tuple(s.words) for table, row in ROWS for s in TABLES[table]["rows"][row].steps if s.words[0] == "fit"}
    for words in runs:
        ExperimentCLI("fit", list(words[1:]), parse_only=True)


def test_every_file_is_named_with_its_source():
    for table, row in ROWS:
        for name, where in TABLES[table]["rows"][row].needs.items():
            assert where.startswith("flashar reproduce ") == name.startswith("runs/"), (table, row, name)
    needs = TABLES["figure6"]["rows"]["llamagen-xxl-flashar"].needs
    assert needs["runs/llamagen_xxl_256/checkpoints/last.ckpt"] == "flashar reproduce table1 --row llamagen-xxl-flashar"


def test_the_page_of_results_has_every_row():
    """Guards a row that the page forgets, and numbers of the paper that are mistyped in one of the two places."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    for table, row in ROWS:
        command = f"`flashar reproduce {table} --row {row}`"
        [line] = [line for line in lines if command in line]
        wanted = list(TABLES[table]["rows"][row].paper.values())
        assert line.strip("| ").split(" | ")[2].split() == wanted, (table, row)


def test_a_row_is_printed_with_what_is_missing(run, refused, work):
    code, out, _ = run("reproduce", "table1", "--row", "llamagen-l-flashar")
    assert code == 0
    assert "flashar fit --config experiments/llamagen_l_256.yaml\n" in out
    assert "FID 3.16, IS 289.0" in out
    assert "missing here: weights/c2i_L_256.pt (huggingface.co/FoundationVision/LlamaGen)" in out
    code, out, _ = run("reproduce", "table5")
    assert "| average | 4.36 |" in out
    assert "known: table1" in refused("reproduce", "table9")
    assert "did you mean llamagen-l-flashar" in refused("reproduce", "table1", "--row", "llamagen-l-flash")
    assert "needs --row" in refused("reproduce", "table1", "--run")
    assert "needs weights/Emu3.5-Image" in refused("reproduce", "table3", "--row", "emu35-raster", "--run")


def test_a_row_runs_what_is_not_there_yet(work, monkeypatch):
    row = TABLES["table1"]["rows"]["llamagen-l-flashar"]
    for name in row.needs:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("bench/llamagen-l").mkdir(parents=True)
    Path("runs/llamagen_l_256").mkdir(parents=True)  # training is asked again: it may be unfinished
    ran = []
    monkeypatch.setattr(module, "run_process", lambda stage: ran.append(stage.words[0]))
    reproduce("table1", row="llamagen-l-flashar", run=True)
    assert ran == ["tokenize", "tokenize", "fit", "evaluate"]


def test_prompts_and_classes_of_the_paper_travel_with_the_package(work):
    """In an empty directory, by the names that `generate` takes."""
    prompts = read_prompts(None, "experiments/paper/appendix_a_prompts.txt")
    assert len(prompts) == 16
    assert prompts[0].startswith("A vibrant editorial food photograph of a steaming bowl of ramen")
    assert prompts[-1].endswith("calm nature photography mood.")
    classes = read_classes("experiments/paper/figure6_classes.txt")
    assert parse_classes(classes) == [387, 90, 250, 933, 437, 979, 985]
    assert find_recipe("experiments/paper/tables.yaml").is_file()
    with pytest.raises(ValueError, match=r"no classes at mine\.txt"):
        read_classes("mine.txt")
