"""Traits that no published family has, each against a module of `transformers` that has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flashar_pl.backbones import build_backbone, from_transformers
from flashar_pl.backbones.decoder_config import DecoderConfig
from flashar_pl.backbones.families import ARCHITECTURES, KNOWN, PRESETS, register_family
from flashar_pl.backbones.families.base import Family, code_settings, text_settings
from flashar_pl.decoding import generate
from flashar_pl.grid import raster_plan
from flashar_pl.models import FlashAR
from flashar_pl.models.probe import LayerProbe, layer_states

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CODES = {"visual_token_offset": 50, "num_visual_codes": 30}
PROMPTS = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9])]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
PARTLY = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
JOINED = {"feed_forward.w13": ("mlp.gate_up_proj",)}
MADE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "granite": ({}, {"logit_scale": 0.25}),
    "glm": ({"block_names": JOINED}, {"rope_interleaved": True, "rope_width": 4, "output_bias": False}),
    "stablelm": ({}, {"norm": "layer", "rope_width": 4, "qkv_bias": True, "norm_eps": 1e-5}),
}
"""Families of this file: what they say beside their text settings."""
JUDGES: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Llama", {"hidden_act": "gelu"}),
    "gelu_tanh": ("Qwen2", {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": ("Qwen3", {"hidden_act": "relu", "head_dim": 16}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, **LLAMA3}}),
    "yarn": ("Qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, **YARN}}),
    "logit_scale": ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 8**-0.5}),
    "interleaved": ("Glm", {"head_dim": 8, "attention_bias": True, "rope_parameters": PARTLY}),
    "layer_norm": ("StableLm", {"use_qkv_bias": True, "rope_parameters": PARTLY}),
}


@pytest.fixture(autouse=True)
def families() -> Iterator[None]:
    """The families of this file are known; the tables are as before afterwards."""
    before = [(table, dict(table)) for table in (KNOWN, ARCHITECTURES, PRESETS)]

    def reader(own: dict[str, Any]) -> Callable[[Any], DecoderConfig]:
        defaults = {"rms_norm_eps": 1e-5, "rope_theta": 1e4}
        return lambda values: DecoderConfig(**{**text_settings(values, "", defaults), **code_settings(values), **own})

    for name, (options, own) in MADE.items():
        register_family(Family((name,), reader(own), **options))
    yield
    for table, content in before:
        table.clear()
        table.update(content)


def network(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of transformers in float64, far from uniform, and its config.json."""
    kind, options = JUDGES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TEXT, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model, {**config.to_dict(), **CODES}


@torch.no_grad()
@pytest.mark.parametrize("name", JUDGES)
def test_a_trait_is_read_and_computed_as_transformers_does(name: str) -> None:
    """Guards activations, scaled and interleaved RoPE, LayerNorm, scaled logits, and the diagonal cache with them."""
    model, values = network(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    backbone = from_transformers(state, values)
    codes = torch.randint(0, 30, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    found = backbone.raster_logits(codes, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        theirs = model(torch.cat([prompt, codes[i].flatten() + 50])[None]).logits[0, len(prompt) - 1 : -1, 50:80]
        torch.testing.assert_close(found[i].double(), theirs.view(3, 5, 30), atol=1e-5, rtol=1e-5)
        assert theirs.std() > 0.05
    back = backbone.to_transformers()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    assert build_backbone(backbone.config_dict()).config == backbone.config
    flashar = FlashAR(backbone, branch_layer=1)
    drawn = generate(flashar, PROMPTS, (3, 5), greedy=True)
    assert torch.equal(flashar(drawn, PROMPTS).fused.argmax(-1), drawn)


def test_scaled_rope_of_no_use_is_refused() -> None:
    model, values = network("llama3")

    def refused(match: str, **changes: Any) -> None:
        rope = {**values["rope_parameters"], **changes}
        with pytest.raises(ValueError, match=match):
            from_transformers(model.state_dict(), {**values, "rope_parameters": rope})

    refused("sets rope_parameters to .*'longrope'", rope_type="longrope")
    refused("sets rope_parameters to", rope_type=["llama3"])
    refused("expected a base above 1 and numbers from 1e-6 to 1e9 as factor, low_freq_factor", factor=0)
    refused("expected a base above 1 and numbers", high_freq_factor=1.0)
    refused("expected a base above 1 and numbers", rope_theta=1.0)
    with pytest.raises(ValueError, match=r"sets hidden_act to \['gelu'\]"):
        from_transformers(model.state_dict(), {**values, "hidden_act": ["gelu"]})


def test_a_model_that_only_has_the_names_of_llama_is_not_read_as_one() -> None:
    """Guards against logits that are wrong unsaid: Granite and Mistral have Llama's tensors, and traits besides."""
    model, values = network("gelu")
    state, near = model.state_dict(), {"embedding_multiplier": 1.0, "sliding_window": None, "logit_scale": 1}
    assert from_transformers(state, {**values, **near}).config.activation == "gelu"
    for name, value in (("embedding_multiplier", 12.0), ("sliding_window", 16), ("final_logit_softcapping", 30.0)):
        with pytest.raises(ValueError, match=f"sets {name} to {value}, which a model of type llama does not have"):
            from_transformers(state, {**values, name: value})
    for name, why in (("gemma", "1 is added to its norms"), ("minicpm", "logits are scaled")):
        with pytest.raises(ValueError, match=f"This one is left out because .*{why}"):
            from_transformers(state, {**values, "model_type": name})
    qwen, of_qwen = network("gelu_tanh")
    assert of_qwen["use_sliding_window"] is False
    from_transformers(qwen.state_dict(), {**of_qwen, "sliding_window": 32})


@torch.no_grad()
@pytest.mark.parametrize("name", ["yarn", "layer_norm", "logit_scale"])
def test_a_probe_starts_as_the_backbones_own_norm_and_head(name: str) -> None:
    """Guards `flashar probe` against an RMSNorm in place of a LayerNorm, and logits without their scale."""
    model, values = network(name)
    backbone, plan = from_transformers(model.state_dict(), values), raster_plan(3, 5)
    codes = torch.randint(0, 30, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    states = layer_states(backbone, codes, PROMPTS, plan)
    _, found = LayerProbe(backbone, [2]).nll(states, codes, plan)
    logits = backbone.head(backbone.norm(states[2]))[:, plan.slot[:10]]  # (B, 10, rows): what is above another cell
    below = codes.flatten(1)[:, 5:] + backbone.first_code
    torch.testing.assert_close(
        found.double(), -logits.log_softmax(-1).gather(-1, below[..., None])[..., 0], atol=1e-4, rtol=1e-4
    )
