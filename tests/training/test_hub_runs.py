"""Training on models in transformers' format: recipes fit as their headers say; a biased decoder cut over two ranks."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from hub_files import CODES, write_hub
from hub_two_ranks import one_step
from pair import Pair

from flashar_pl.commands.plan import HardwareOptions, RunOptions, plan

FOLDER = Path(__file__).parents[2] / "experiments"
LORA = FOLDER / "one_gpu" / "lora.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["janus_pro_1b", "simplear_0.5b", "emu3_gen_8b", "lumina_mgpt_7b", "x_omni_7b", "mammothmoda2_ar", "glm_image_ar"],
)
def test_a_recipe_fits_where_its_header_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the sizes and the time in the header, and the second configuration for one GPU."""
    path = FOLDER / f"{name}.yaml"
    text = path.read_text()
    gpus, size = re.search(r"# Hardware: (one|8) GPUs? of 80 GB \((\d+) GB", text).groups()
    whole = plan(RunOptions(config=str(path)), HardwareOptions(gpus={"one": 1, "8": 8}[gpus], gpu="h100"))
    assert whole["fits"]
    assert whole["memory"]["stage2"]["total"] / 1e9 == pytest.approx(int(size), abs=1)
    hours = float(re.search(r"# Time: about (\d+) H100 GPU-hours", text)[1])
    assert whole["time"]["gpu_hours"] == pytest.approx(hours, abs=0.6)
    memory, used = (int(n) for n in re.search(r"with LoRA one of (\d+) GB \((\d+) GB\)", text).groups())
    one = plan(RunOptions(config=[str(path), str(LORA)]), HardwareOptions(gpus=1, gpu="h100", gpu_memory=memory))
    assert one["fits"]
    assert one["memory"]["stage2"]["total"] / 1e9 == pytest.approx(used, abs=1)
    capsys.readouterr()


@pytest.mark.parametrize("family", ["qwen2", "glm_image", "x_omni", "mammothmoda2", "janus"])
def test_two_ranks_train_a_biased_decoder_as_one_does(pair: Pair, tmp_path: Path, family: str) -> None:
    """Guards biases of sharded blocks, rows of a head whose codes are followed by text tokens, and rows of queries and
    keys that have another order in the files (GLM-Image, with a preview of 2 x 3 codes in one prompt), and tensors of
    tokens of images beside those of text (X-Omni, whose prompts end with one), MLPs of text (MammothModa2),
    and MLPs around codes (Janus)."""
    directory = write_hub(tmp_path / family, family)
    codes = torch.randint(0, CODES, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    prompts = [torch.tensor([5, 6, 256, 258]), torch.tensor([7, 8, 256, 258, 1, 2, 3, 4, 5, 6])]
    if family == "x_omni":
        prompts[1][-1] = 257
    alone = one_step(directory, codes, prompts)
    halves = pair(one_step, directory, codes, prompts)
    assert any(name.endswith("wqkv.bias") for name in alone) or family == "janus"
    for found in halves:
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)
