"""The family that docs/backbones.md adds, exactly as its page has it, against `transformers`' own module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashar_pl.backbones import from_transformers
from flashar_pl.backbones.families import ARCHITECTURES, KNOWN, PRESETS
from flashar_pl.decoding import generate
from flashar_pl.models import FlashAR

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs/backbones.md"
EOL, FIRST, CODES = 3, 60, 30
"""Row end; codes are the last tokens, which config.json of a Mistral does not say."""
PROMPTS = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9])]


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """What the block defines; the tables of families are as before afterwards."""
    section = PAGE.read_text(encoding="utf-8").split("## Add yours")[1]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code) == 1
    assert len(code[0].splitlines()) <= 100
    before = [(table, dict(table)) for table in (KNOWN, ARCHITECTURES, PRESETS)]
    names: dict[str, Any] = {"__name__": "page"}
    try:
        exec(compile(code[0], str(PAGE), "exec"), names)
        yield names
    finally:
        for table, content in before:
            table.clear()
            table.update(content)


def mistral() -> tuple[Any, dict[str, Any]]:
    """Random weights in float64, far from uniform, and what config.json says."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=FIRST + CODES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, sliding_window=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model, {**config.to_dict(), "num_visual_codes": CODES, "eol_token_id": EOL}


@torch.no_grad()
def test_the_family_of_the_page_reads_draws_and_writes_as_transformers_does(page: dict[str, Any]) -> None:
    """Guards the page, and what it leaves to `Decoder`: names of tensors, codes at the end, row ends, positions."""
    model, values = mistral()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    backbone = from_transformers(state, values)
    assert backbone.config.model_type == page["MISTRAL"].name
    assert (backbone.config.usual_grid, backbone.config.cfg_scale) == ((16, 16), 3.0)
    codes = generate(backbone, PROMPTS, (2, 3), plan="raster", greedy=True)
    logits = backbone.raster_logits(codes, PROMPTS)
    assert torch.equal(logits.argmax(-1), codes)
    for i, prompt in enumerate(PROMPTS):
        rows = torch.cat([FIRST + codes[i], torch.full((2, 1), EOL)], dim=1).flatten()
        theirs = model(torch.cat([prompt, rows])[None]).logits[0, len(prompt) - 1 : -1].view(2, 4, -1)[:, :3, FIRST:]
        torch.testing.assert_close(logits[i].double(), theirs, atol=1e-5, rtol=1e-5)
        assert theirs.std() > 0.05
    diagonal = FlashAR(backbone, branch_layer=1)
    drawn = generate(diagonal, PROMPTS, (2, 3), greedy=True)
    assert torch.equal(diagonal(drawn, PROMPTS).fused.argmax(-1), drawn)
    back = backbone.to_transformers()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_the_family_of_the_page_refuses_what_it_does_not_read(page: dict[str, Any]) -> None:
    read, values = page["read_mistral"], mistral()[1]
    with pytest.raises(ValueError, match="sets sliding_window to 4096; expected null"):
        read({**values, "sliding_window": 4096})
    with pytest.raises(ValueError, match=r"config.json lacks num_visual_codes"):
        read({name: value for name, value in values.items() if name != "num_visual_codes"})
    template = page["MISTRAL"].template
    whole = template.prompt("a fox", 2, 3) + template.image(2, 3)
    assert whole == "<s>[INST] Draw a fox [/INST]<image>2x3"
    assert all(token in whole for token in template.special)


def test_the_tables_are_as_they_were() -> None:
    """The page's family would be a choice of every later test."""
    assert "mistral" not in KNOWN
