"""Decoders by configuration against `transformers`' own modules with random weights: logits, drawing, weights back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashar_pl.backbones import Decoder, build_backbone, from_transformers
from flashar_pl.backbones.condition import Prompts
from flashar_pl.checkpoints.transformers import LanguageModel
from flashar_pl.decoding import generate
from flashar_pl.decoding.prepare import prepare
from flashar_pl.models import FlashAR
from flashar_pl.models.lora import LoraConfig, adapt, merge
from flashar_pl.renames import StateDict

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CODES = {"visual_token_offset": 40, "num_visual_codes": 30}
"""In the middle of the vocabulary: tokens follow."""
VQ = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 8, "attn_resolutions": []}
PROMPTS = [torch.tensor([5, 6, 4, 9]), torch.tensor([7, 8, 9, 10, 11, 4, 9])]


def chameleon_map() -> dict[str, int]:
    """30 codes in no order, with gaps."""
    ids = torch.randperm(60, generator=torch.Generator().manual_seed(3))[:30] + 20
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    return {
        "<image>": 3, "<racm3:break>": 4, **{f"IMGIMG{str(i).translate(letters)}Z": int(id) for i, id in enumerate(ids)}
    }  # fmt: skip


def emu3_map() -> dict[str, int]:
    codes = {f"<|visual token {i:06d}|>": 50 + i for i in range(30)}
    return {"<image>": 3, "<|image start|>": 4, "<|extra_200|>": 12, **codes}


def language(kind: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    config = getattr(transformers, f"{kind}Config")(**{**TEXT, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config), {**config.to_dict(), **CODES}


def emu3() -> tuple[Any, dict[str, Any]]:
    vq = {**VQ, "codebook_size": 30, "latent_channels": 4, "temporal_downsample_factor": 1}
    config = transformers.Emu3Config(vq_config=vq, text_config=TEXT, vocabulary_map=emu3_map())
    return transformers.Emu3ForConditionalGeneration(config), config.to_dict()


def chameleon(**changes: Any) -> tuple[Any, dict[str, Any]]:
    vq = {**VQ, "num_embeddings": 30, "latent_channels": 32, "resolution": 16}
    config = transformers.ChameleonConfig(**{**TEXT, **changes}, vq_config=vq, vocabulary_map=chameleon_map())
    return transformers.ChameleonForConditionalGeneration(config), config.to_dict()


def janus() -> tuple[Any, dict[str, Any]]:
    vq = {**VQ, "num_embeddings": 30, "projection_dim": 32, "image_token_embed_dim": 32, "latent_channels": 32}
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 12, "patch_size": 4,
        "projection_dim": 32, "num_image_tokens": 6,
    }  # fmt: skip
    text = {**TEXT, "model_type": "llama", "rms_norm_eps": 1e-6}
    config = transformers.JanusConfig(text_config=text, vq_config=vq, vision_config=vision, image_token_id=3)
    return transformers.JanusForConditionalGeneration(config), config.to_dict()


def glm_image(**changes: Any) -> tuple[Any, dict[str, Any]]:
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "intermediate_size": 32,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    text = {**TEXT, "hidden_size": 64, "vision_vocab_size": 40, "rope_parameters": rope, **changes}
    config = transformers.GlmImageConfig(
        text_config=text, vision_config=vision, image_token_id=60, image_start_token_id=30, image_end_token_id=31,
        vq_config={"num_embeddings": 30, "embed_dim": 8, "latent_channels": 32},
    )  # fmt: skip
    return transformers.GlmImageForConditionalGeneration(config), config.to_dict()


class TwoKinds(torch.nn.Module):
    """An MLP of text, and one of images: what MammothModa2's published code does with token ids."""

    image: Tensor | None = None
    """(1, n, 1) bool, of the forward to come."""

    def __init__(self, mlp: torch.nn.Module, gen_mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp, self.gen_mlp = mlp, gen_mlp

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(TwoKinds.image, self.gen_mlp(x), self.mlp(x))


def mammothmoda2(span: str = "") -> tuple[Any, dict[str, Any]]:
    """A Qwen2 with a second MLP in some layers, 60 tokens of text and 40 of images. Row end 61, codes from 64."""
    config = transformers.Qwen2Config(**{**TEXT, "vocab_size": 100})
    model, begin = transformers.Qwen2ForCausalLM(config), 1 if span else 0
    for layer in model.model.layers[begin:]:
        layer.mlp = TwoKinds(layer.mlp, type(layer.mlp)(config))
    values = {
        **{key: config.to_dict()[key] for key in TEXT}, "vocab_size": 60, "gen_vocab_size": 40,
        "moe_type": f"ffn{span}", "rms_norm_eps": config.rms_norm_eps, "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    places = {"visual_token_offset": 64, "num_visual_codes": 30, "eol_token_id": 61}
    return model, {"model_type": "mammothmoda2", "llm_config": {"text_config": values}, **places}


class TwoNorms(torch.nn.Module):
    """A final norm of text, and one of images."""

    def __init__(self, lm_norm: torch.nn.Module, mm_norm: torch.nn.Module) -> None:
        super().__init__()
        self.lm_norm, self.mm_norm = lm_norm, mm_norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(TwoKinds.image, self.mm_norm(x), self.lm_norm(x))


def x_omni() -> tuple[Any, dict[str, Any]]:
    """A Qwen2 whose first and last layers change tokens of images only, as X-Omni's published code has it.

    60 tokens of text, then 30 codes and 10 others of images.
    """
    config = transformers.Qwen2Config(**{**TEXT, "vocab_size": 100, "num_hidden_layers": 3})
    model = transformers.Qwen2ForCausalLM(config)

    def passing(run: Callable) -> Callable:
        return lambda x, *args, **options: torch.where(TwoKinds.image, run(x, *args, **options), x)

    for layer in (model.model.layers[0], model.model.layers[2]):
        layer.forward = passing(layer.forward)
    model.model.norm = TwoNorms(model.model.norm, type(model.model.norm)(32))
    sizes = {"num_mm_adap_layers": 1, "num_mm_head_layers": 1, "mm_vocab_size": 40, "image_vocab_size": 30}
    return model, {**config.to_dict(), **sizes, "model_type": "x-omni", "vocab_size": 60}


def x_omni_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of X-Omni."""
    found = {key.replace(".norm.", "."): value for key, value in state.items() if key not in SPLIT}
    for key, (text, image) in SPLIT.items():
        found[text], found[image] = state[key][:60].clone(), state[key][60:].clone()
    return found


SPLIT = {
    "model.embed_tokens.weight": ("model.lm_embed_tokens.weight", "model.mm_embed_tokens.weight"),
    "lm_head.weight": ("lm_head.weight", "mm_head.weight"),
}


def mammoth_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of MammothModa2, with a tensor of its diffusion decoder."""
    found = {"gen_vae.encoder.weight": torch.ones(2)}
    for key, value in state.items():
        name = key.replace(".mlp.mlp.", ".mlp.").replace(".mlp.gen_mlp.", ".gen_mlp.")
        name = (
            name.replace("model.", "llm_model.model.language_model.", 1)
            if "lm_head" not in name
            else f"llm_model.{name}"
        )
        if "embed_tokens" in key or "lm_head" in key:
            found[name], value = value[:60].clone(), value[60:].clone()
            name = name.replace("embed_tokens", "gen_embed_tokens").replace("lm_head", "gen_head")
        found[name] = value
    return found


def glm_positions(model: Any, prompt: Tensor, grids: list[tuple[int, ...]]) -> Tensor:
    """(3, 1, n) positions of a prompt (T,), then of images of these grids, the last one drawn first."""
    thw = torch.tensor([[1, *grid] for grid in grids])
    text, _ = model.model.get_rope_index(prompt[None], image_grid_thw=thw)
    drawn = model.model._cached_decode_position_ids.permute(1, 0, 2)[..., : int(thw.prod(1).sum())]
    return torch.cat([text, drawn], dim=-1)


FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "llama": lambda: language("Llama", attention_bias=True, mlp_bias=True, head_dim=16),
    "llama_tied": lambda: language("Llama", tie_word_embeddings=True),
    "qwen2": lambda: language("Qwen2"),
    "qwen3": lambda: language("Qwen3", head_dim=16),
    "emu3": emu3,
    "chameleon": chameleon,
    "chameleon_swin": lambda: chameleon(swin_norm=True),
    "janus": janus,
    "mammothmoda2": mammothmoda2,
    "mammothmoda2_some": lambda: mammothmoda2("-1:99"),
    "x_omni": x_omni,
    "glm_image": glm_image,
    "glm_image_plain": lambda: glm_image(
        attention_bias=False,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3, 2]},
    ),
}


class Judge:
    """A `transformers` model in float64, far from uniform, and what we read of it."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model, self.config = FAMILIES[name]()
        self.model.double().eval()
        for key, parameter in self.model.named_parameters():
            if parameter.is_floating_point() and "norm" not in key:
                parameter.data.normal_(0, 0.15)
            elif "norm" in key:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        if name == "llama_tied":
            self.model.tie_weights()
        self.state = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.prompts = PROMPTS
        if name.startswith("mammothmoda2"):  # with tokens of images in the prefix
            self.state = mammoth_state(self.state)
            self.prompts = [torch.cat([ids, torch.tensor([62, 7, 63])]) for ids in PROMPTS]
        if name == "x_omni":
            self.state = x_omni_state(self.state)
            self.prompts = [torch.cat([ids, torch.tensor([92, 7, 93])]) for ids in PROMPTS]
        self.ours = from_transformers(self.state, self.config)
        self.janus, self.glm = name == "janus", name.startswith("glm_image")
        self.eol = self.ours.config.eol_token_id

    def embed(self, codes: Tensor) -> Tensor:
        """(1, n, D) of codes (n,), by their modules."""
        if self.janus:
            return self.model.prepare_embeddings_for_image_generation(codes[None])
        return self.model.get_input_embeddings()(self.tokens(codes))[None]

    def tokens(self, codes: Tensor) -> Tensor:
        config = self.ours.config
        if config.code_ids is not None:
            return torch.tensor(config.code_ids)[codes]
        assert config.visual_token_offset is not None
        return codes + config.visual_token_offset

    @torch.no_grad()
    def logits(self, codes: Tensor, prompt: Tensor) -> Tensor:
        """(H, W, V) teacher-forced: one forward of their language model over prompt, rows and row ends."""
        x = [self.model.get_input_embeddings()(prompt)[None]]
        for row in codes:
            x.append(self.embed(row))
            if self.eol is not None:
                x.append(self.model.get_input_embeddings()(torch.tensor([[self.eol]])))
        body = self.model.model
        body = getattr(body, "language_model", getattr(body, "text_model", body))
        n, drawn = len(prompt), codes.numel() + codes.shape[0] * (self.eol is not None)
        TwoKinds.image = torch.cat([prompt >= 60, torch.ones(drawn, dtype=torch.bool)])[None, :, None]
        at = {"position_ids": glm_positions(self.model, prompt, [tuple(codes.shape)])} if self.glm else {}
        states = body(inputs_embeds=torch.cat(x, dim=1), use_cache=False, **at).last_hidden_state[0, n - 1 :]
        stride = codes.shape[1] + (self.eol is not None)
        at = torch.arange(codes.shape[0])[:, None] * stride + torch.arange(codes.shape[1])
        if self.janus:
            return self.model.model.generation_head(states)[at]
        return self.model.lm_head(states)[at][..., self.tokens(torch.arange(self.ours.vocabulary))]


@pytest.fixture(scope="module", params=FAMILIES)
def judge(request: pytest.FixtureRequest) -> Judge:
    return Judge(request.param)


def test_teacher_forced_logits_equal_theirs(judge: Judge) -> None:
    """Guards names, biases, norms, positions with and without row ends, and where codes are."""
    assert judge.ours.vocabulary == 30
    for height, width in ((3, 3), (2, 5)):
        codes = torch.randint(0, 30, (2, height, width), generator=torch.Generator().manual_seed(height))
        found = judge.ours.raster_logits(codes, judge.prompts)
        for i, prompt in enumerate(judge.prompts):
            expected = judge.logits(codes[i], prompt)
            torch.testing.assert_close(found[i].double(), expected, atol=1e-5, rtol=1e-5)
            assert expected.std() > 0.05


def test_previews_of_glm_image_stand_where_theirs_do() -> None:
    """Guards both images' positions, a published and another size of preview, and drawing against their `generate`."""
    judge = Judge("glm_image")
    prompts = [torch.cat([ids, torch.tensor([30])]) for ids in PROMPTS]
    for grid, preview in (((4, 6), (2, 3)), ((5, 8), (12, 20))):
        codes, smaller = (torch.randint(0, 30, (2, *size)) for size in (grid, preview))
        whole = [torch.cat([ids, own.flatten()]) for ids, own in zip(prompts, smaller)]
        found = judge.ours.raster_logits(codes, whole)
        for i, ids in enumerate(prompts):
            tokens = torch.cat([whole[i], codes[i].flatten()])[None]
            at = glm_positions(judge.model, ids, [grid, preview])
            with torch.no_grad():
                theirs = judge.model(tokens, position_ids=at).logits[0, len(whole[i]) - 1 : -1, :30]
            torch.testing.assert_close(found[i].double(), theirs.view(*grid, 30), atol=1e-5, rtol=1e-5)
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left", padding_value=0)
    drawn = judge.model.generate(
        padded, attention_mask=(padded != 0).long(), image_grid_thw=torch.tensor([[1, 3, 4], [1, 2, 2]] * 2),
        images_per_sample=torch.tensor([2, 2]), max_new_tokens=16, do_sample=False, eos_token_id=None,
        suppress_tokens=list(range(30, 40)),
    )[:, padded.shape[1] :]  # fmt: skip
    first = generate(judge.ours, prompts, (2, 2), plan="raster", greedy=True)
    then = generate(judge.ours, judge.ours.with_preview(Prompts(prompts), first), (3, 4), plan="raster", greedy=True)
    assert torch.equal(torch.cat([first.flatten(1), then.flatten(1)], dim=1), drawn)
    model, mixed = FlashAR(judge.ours, branch_layer=1), [prompts[0], torch.cat([prompts[1], first[1].flatten()])]
    diagonal = generate(model, mixed, (3, 4), greedy=True)
    assert torch.equal(model(diagonal, mixed).fused.argmax(-1), diagonal)
    with pytest.raises(ValueError, match="7 tokens after the begin of its image; expected none, or the codes of a pre"):
        judge.ours.raster_logits(then, [torch.cat([ids, torch.arange(7)]) for ids in prompts])
    with pytest.raises(ValueError, match="1 of 2 prompts have no preview yet, the others have one; expected all or"):
        judge.ours.preview_grid(Prompts([prompts[0], whole[1]]), (3, 4))
    with pytest.raises(ValueError, match="a prefix begins 2 images; expected one"):
        judge.ours.raster_logits(then, [torch.cat([ids, ids]) for ids in prompts])


def test_weights_come_back_under_their_names(judge: Judge) -> None:
    back = judge.ours.to_transformers()
    assert back.keys() == judge.state.keys()
    assert all(torch.equal(back[key], value) for key, value in judge.state.items())


def test_text_logits_are_in_the_order_of_token_ids(judge: Judge) -> None:
    if judge.janus:
        pytest.skip("its heads score codes only")
    if judge.ours.config.text_layers is not None:
        with pytest.raises(ValueError, match="text of this model has a final norm of its own"):
            judge.ours.token_logits(judge.prompts)
        return
    TwoKinds.image = (judge.prompts[1] >= 60)[None, :, None]
    with torch.no_grad():
        states = judge.model.model(input_ids=judge.prompts[1][None]).last_hidden_state[0]
        expected = judge.model.lm_head(states)
    torch.testing.assert_close(judge.ours.token_logits(judge.prompts)[1].double(), expected, atol=1e-5, rtol=1e-5)


def test_cached_drawing_follows_teacher_forcing(judge: Judge) -> None:
    """Greedy and guided, in both orders: each code is the best one under the logits of the whole image."""
    null = [torch.cat([torch.tensor([1]), judge.prompts[0][-2:]])] * 2
    model = FlashAR(from_transformers(judge.state, judge.config), branch_layer=1)
    codes = generate(judge.ours, judge.prompts, (3, 4), plan="raster", cfg_scale=3.0, greedy=True, unconditional=null)
    logits = [judge.ours.raster_logits(codes, prompts) for prompts in (judge.prompts, null)]
    assert torch.equal((logits[1] + 3.0 * (logits[0] - logits[1])).argmax(-1), codes)
    codes = generate(model, judge.prompts, (3, 4), cfg_scale=3.0, greedy=True, unconditional=null)
    with torch.no_grad():
        fused = [model(codes, prompts).fused for prompts in (judge.prompts, null)]
    assert torch.equal((fused[1] + 3.0 * (fused[0] - fused[1])).argmax(-1), codes)


class CodesOnly(transformers.LogitsProcessor):
    """Leaves the tokens of codes, and after every row its end."""

    def __init__(self, prompt: int, width: int, judge: Judge) -> None:
        self.prompt, self.width, self.eol = prompt, width, judge.eol
        self.tokens = judge.tokens(torch.arange(judge.ours.vocabulary))

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        drawn, allowed = ids.shape[1] - self.prompt, self.tokens
        if self.eol is not None and drawn % (self.width + 1) == self.width:
            allowed = torch.tensor([self.eol])
        return torch.full_like(scores, -torch.inf).index_copy(1, allowed, scores[:, allowed])


def test_guided_greedy_codes_are_those_of_their_generate(judge: Judge) -> None:
    """Guards guidance, row ends and the cache against a loop that is not ours. Chameleon's draws text alone unless its
    list of codes is empty; GLM-Image's has a test of its own; MammothModa2's and X-Omni's layers here know one forward.
    """
    grid, scale = (2, 3), 3.0
    null = [torch.tensor([1, 4, 9]), torch.tensor([1, 12, 4, 9])]
    if judge.janus:
        begin, unseen = (1, 9), torch.tensor(0)
        null = [torch.where(torch.isin(ids, torch.tensor(begin)), ids, unseen) for ids in judge.prompts]
        judge.model.generation_config.generation_kwargs = {"boi_token_id": 9}
        padded = torch.nn.utils.rnn.pad_sequence(judge.prompts, batch_first=True, padding_side="left")
        drawn = judge.model.generate(
            padded, attention_mask=(padded != 0).long(), generation_mode="image", guidance_scale=scale, do_sample=False,
            bos_token_id=1, pad_token_id=0,
        )  # fmt: skip
    elif judge.glm or judge.ours.config.first_image_token:
        pytest.skip("no generate to compare with")
    else:
        if judge.ours.config.code_ids is not None:
            judge.model.model.vocabulary_mapping.image_tokens = []
        n, rows = grid[0] * (grid[1] + (judge.eol is not None)) - (judge.eol is not None), []
        for ids, none in zip(judge.prompts, null, strict=True):
            found = judge.model.generate(
                ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=n, do_sample=False,
                eos_token_id=None, pad_token_id=0, guidance_scale=scale, negative_prompt_ids=none[None],
                negative_prompt_attention_mask=torch.ones_like(none)[None],
                logits_processor=[CodesOnly(len(ids), grid[1], judge)],
            )  # fmt: skip
            rows.append(found[0, len(ids) :])
        drawn = torch.stack(rows)
    codes = generate(judge.ours, judge.prompts, grid, plan="raster", cfg_scale=scale, greedy=True, unconditional=null)
    if not judge.janus:
        codes = judge.tokens(codes)
    if judge.eol is not None:
        codes = torch.nn.functional.pad(codes, (0, 1), value=judge.eol).flatten(1)[:, :-1]
    assert len(codes.unique()) > 1
    assert torch.equal(codes.flatten(1), drawn)


def test_training_moves_both_heads_and_biases(judge: Judge) -> None:
    """The chunked loss equals a plain cross-entropy, gradients of biases included."""
    model = FlashAR(from_transformers(judge.state, judge.config), branch_layer=1).train()
    codes = torch.randint(0, 30, (2, 3, 4), generator=torch.Generator().manual_seed(5))
    losses = model.loss(codes, judge.prompts)
    losses["loss"].backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    silent = [name for name, grad in found.items() if grad is None or not grad.abs().sum() > 0]
    silent = [name for name in silent if "text_feed_forward" not in name]  # of the last block nothing is used
    assert [name for name in silent if name != "dual_head.gate.hidden.weight"] == []  # behind the zeros of its output
    logits = model(codes, judge.prompts).fused
    if judge.ours.config.heads == "visual":
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), codes.flatten())
        torch.testing.assert_close(losses["fused"].double(), expected.double(), atol=1e-6, rtol=1e-6)


def test_packed_weights_and_adapters_know_biases(judge: Judge) -> None:
    """Packed weights compute the same logits; LoRA changes nothing before it is trained, and is merged with biases."""
    model = FlashAR(from_transformers(judge.state, judge.config), branch_layer=1).eval()
    codes = torch.randint(0, 30, (2, 3, 4), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = model(codes, judge.prompts).fused
        found = prepare(model.float(), "packed")(codes, judge.prompts).fused
        torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)
        adapt(model, LoraConfig(rank=2))
        torch.testing.assert_close(model(codes, judge.prompts).fused, expected.float(), atol=1e-4, rtol=1e-4)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        plain = FlashAR(from_transformers(judge.state, judge.config), branch_layer=1).float()
        plain.load_state_dict(dict(merge(dict(model.state_dict()), LoraConfig(rank=2))))
        trained = model(codes, judge.prompts).fused
        torch.testing.assert_close(plain(codes, judge.prompts).fused, trained, atol=1e-4, rtol=1e-4)
        assert (trained - expected).abs().max() > 0.01


def test_a_configuration_survives_as_plain_values(judge: Judge) -> None:
    again = build_backbone(judge.ours.config_dict())
    assert isinstance(again, Decoder)
    assert again.config == judge.ours.config
    assert again.state_dict().keys() == judge.ours.state_dict().keys()


def test_what_mammothmoda2_does_not_have_is_named() -> None:
    judge = Judge("mammothmoda2_some")
    text = judge.config["llm_config"]["text_config"]

    def read(state: dict[str, Tensor] = judge.state, **changes: Any) -> Decoder:
        return from_transformers(state, {**judge.config, "llm_config": {"text_config": {**text, **changes}}})

    with pytest.raises(ValueError, match="moe_type to 'ffn_attention'; expected ffn, or ffn-BEGIN:END"):
        read(moe_type="ffn_attention")
    with pytest.raises(ValueError, match=r"no llm_model.gen_head.weight, and config.json says that it has"):
        read({key: value for key, value in judge.state.items() if "gen_head" not in key})
    with pytest.raises(ValueError, match="row ends are tokens from 59 on; expected those of images, from 60 on"):
        from_transformers(judge.state, {**judge.config, "eol_token_id": 59})
    assert [block.text_feed_forward is None for block in judge.ours.blocks] == [True, False]
    source = LanguageModel(StateDict(judge.state), judge.config, "full")  # a rank reads its own rows only
    for key in (source.config.text_prefix + "embed_tokens.weight", source.config.head_key):
        whole = source.rows(key, 0, 100)
        assert all(torch.equal(source.rows(key, a, b), whole[a:b]) for a, b in ((0, 60), (40, 70), (60, 80), (99, 100)))
    codes = torch.randint(0, 30, (2, 3, 4), generator=torch.Generator().manual_seed(7))
    visual = from_transformers(judge.state, judge.config, heads="visual")
    expected = judge.ours.raster_logits(codes, judge.prompts)
    torch.testing.assert_close(visual.raster_logits(codes, judge.prompts), expected, atol=1e-5, rtol=1e-5)


def test_what_x_omni_does_not_have_is_named() -> None:
    judge = Judge("x_omni")
    codes = torch.randint(0, 30, (2, 3, 4), generator=torch.Generator().manual_seed(7))
    with pytest.raises(ValueError, match="prefix ends with token 9, which is text; expected one of images, from 60 on"):
        judge.ours.raster_logits(codes, PROMPTS)
    with pytest.raises(ValueError, match="num_mm_head_layers to 1 and 3; expected 3 in all at most"):
        from_transformers(judge.state, {**judge.config, "num_mm_head_layers": 3})
    with pytest.raises(ValueError, match=r"state dict has no lm_embed_tokens.weight; expected the weights of a model"):
        from_transformers(Judge("qwen2").state, judge.config)
    visual = from_transformers(judge.state, {**judge.config, "boi_token_id": 92}, heads="visual")
    whole = judge.ours.raster_logits(codes, judge.prompts)
    torch.testing.assert_close(visual.raster_logits(codes, judge.prompts), whole, atol=1e-5, rtol=1e-5)
    assert [ids.tolist() for ids in visual.null_condition(Prompts(judge.prompts))] == [[92, 7, 93]] * 2


@pytest.mark.parametrize("name", ["emu3", "janus", "mammothmoda2", "x_omni", "glm_image", "chameleon", "qwen3"])
def test_an_unknown_model_type_names_the_family_with_such_tensors(name: str) -> None:
    """X-Omni's and MammothModa2's were called a Qwen2's, Emu3's a Llama's: those cannot read them."""
    judge = Judge(name)
    with pytest.raises(
        ValueError, match=f"Its tensors are like those of {name.replace('_o', '-o')}: that as model_type"
    ):
        from_transformers(judge.state, {**judge.config, "model_type": "mystery"})
    if judge.ours.config.preview_side is None:
        with pytest.raises(ValueError, match="draws no preview before an image; expected a batch without previews"):
            judge.ours.with_preview(Prompts(PROMPTS), torch.zeros(2, 2, 2, dtype=torch.int64))


def test_wrong_input_is_named() -> None:
    judge = Judge("qwen2")
    with pytest.raises(
        ValueError, match=r"model_type in config.json is 'qwen2_moe'; known: emu3, .* like those of qwen2"
    ):
        from_transformers(judge.state, {**judge.config, "model_type": "qwen2_moe"})
    with pytest.raises(ValueError, match=r"config.json sets rope_parameters to {'rope_type': 'dynamic'"):
        from_transformers(judge.state, {**judge.config, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}})
    without = {key: value for key, value in judge.state.items() if "layers.1.mlp.up_proj" not in key}
    with pytest.raises(ValueError, match=r"1 missing keys \(model.layers.1.mlp.up_proj.weight\)"):
        from_transformers(without, judge.config)
    with pytest.raises(ValueError, match="num_visual_codes is 51; expected 1 to 50"):
        from_transformers(judge.state, {**judge.config, "num_visual_codes": 51})
    with pytest.raises(ValueError, match='expected one loaded with heads="full"'):
        from_transformers(judge.state, judge.config, heads="visual").to_transformers()
    tied = Judge("llama_tied")
    tied.ours.head.weight.data.add_(1.0)
    del tied.state["lm_head.weight"]
    apart = from_transformers(tied.state, tied.config)
    apart.head.weight.data.add_(1.0)
    with pytest.raises(ValueError, match="training has parted them"):
        apart.to_transformers()


def test_numbers_of_a_configuration_take_no_memory() -> None:
    """8 GB for a vocabulary of 2^31, and endless tables of layers and of a head's dimensions."""
    judge = Judge("chameleon")
    with pytest.raises(ValueError, match=r"shape|no model can be built"):
        from_transformers(judge.state, {**judge.config, "vocab_size": 10**12})
    judge = Judge("glm_image")
    text = {**judge.config["text_config"], "hidden_size": 2**40}
    with pytest.raises(ValueError, match=r"mrope_section is .*; expected 68719476736 in all"):
        from_transformers(judge.state, {**judge.config, "text_config": text})
    judge = Judge("janus")
    vq = {**judge.config["vq_config"], "num_hidden_layers": 10**12}
    with pytest.raises(ValueError, match=r"code_layers is 1,000,000,000,000, more than the"):
        from_transformers(judge.state, {**judge.config, "vq_config": vq})
