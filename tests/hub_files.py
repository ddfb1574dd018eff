"""Directories of models in transformers' format, in miniature: random weights, a tokenizer of bytes."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flashar_pl.tokenizers.rank_text import NAMES, RANKS, VISION_TOKENS

TEXT = {
    "vocab_size": 340, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 262, "bos_token_id": 256,
}  # fmt: skip
CODES, OFFSET = 30, 300
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 8, "attn_resolutions": []}
SPECIAL = {
    "emu3": ("<|extra_203|>", "<|image start|>", "<|image token|>", "<|extra_200|>"),
    "janus": ("<｜begin▁of▁sentence｜>", "<begin_of_image>"),
    "chameleon": ("<s>", "<racm3:break>"),
    "lumina_mgpt": ("<s>", "<racm3:break>", "<reserved08706>", "<reserved08799>", "<reserved08801>", "<reserved08802>"),
    "simplear": ("<|t2i|>", "<|soi|>"),
    "glm_image": ("<sop>", "<eop>", "<|dit_token_16384|>"),
    "x_omni": ("<SOM>", "<IMAGE>"),
    "mammothmoda2": (),
    "qwen2": ("<|image|>",),
}
"""Their ids begin at 256."""


CODE_OF_ITS_OWN = ("x_omni", "mammothmoda2", "simplear")
ROW_END = 256 + NAMES.index("<|endofline|>")
"""Of the tiny MammothModa2: where tokens of images begin. Its codes begin 8 later."""


def write_ranks(directory: Path) -> dict[str, int]:
    """MammothModa2's files: a rank for every byte, and names of tokens of images."""
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (directory / RANKS).write_text("\n".join(lines))
    names = [
        "<|image start|>",
        "<|image token|>",
        "<|image end|>",
        *(f"<|visual token {i:06d}|>" for i in range(CODES)),
    ]
    (directory / VISION_TOKENS).write_text("\n".join(names))
    return {}


def _of_images(family: str, state: dict[str, torch.Tensor], text: int) -> dict[str, torch.Tensor]:
    """A Qwen2 of 2 layers under the names of a family that has an embedding, a head and more for tokens of images."""
    own = {"x_omni": ("mm_embed_tokens", "mm_head"), "mammothmoda2": ("gen_embed_tokens", "gen_head")}[family]
    for key, other in zip(("model.embed_tokens.weight", "lm_head.weight"), own, strict=True):
        whole, place = state.pop(key), key.rpartition(".")[0].rpartition(".")[0]
        kept = key.replace(".embed", ".lm_embed") if family == "x_omni" else key
        state[kept], state[f"{place}.{other}.weight".lstrip(".")] = whole[:text].clone(), whole[text:].clone()
    if family == "x_omni":
        norm = state.pop("model.norm.weight")
        return {**state, "model.lm_norm.weight": norm, "model.mm_norm.weight": norm + 0.1}
    layer = {key.replace(".mlp.", ".gen_mlp."): value + 0.1 for key, value in state.items() if "layers.1.mlp" in key}
    return {f"llm_model.{key}": value for key, value in (state | layer).items()}


def write_tokenizer(directory: Path, special: tuple[str, ...]) -> dict[str, int]:
    """A token for every byte, then the special ones; the ids of those."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(list(special))
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=list(special))
    saved.save_pretrained(directory)
    return {name: made.token_to_id(name) for name in special}


def _network(family: str, ids: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """A model of transformers, and what config.json says beside its own fields."""
    if family == "emu3":
        names = {"<image>": 290, **ids, **{f"<|visual token {i:06d}|>": OFFSET + i for i in range(CODES)}}
        vq = {**VQ, "codebook_size": CODES, "latent_channels": 4, "embed_dim": 4, "hidden_size": 32,
              "temporal_downsample_factor": 1}  # fmt: skip
        config = transformers.Emu3Config(vq_config=vq, text_config=TEXT, vocabulary_map=names)
        return transformers.Emu3ForConditionalGeneration(config), {}
    if family in ("chameleon", "lumina_mgpt"):
        letters = str.maketrans("0123456789", "ABCDEFGHIJ")
        codes = {f"IMGIMG{str(i).translate(letters)}Z": OFFSET + CODES - 1 - i for i in range(CODES)}
        vq = {**VQ, "num_embeddings": CODES, "latent_channels": 32, "resolution": 16}
        config = transformers.ChameleonConfig(**TEXT, vq_config=vq, vocabulary_map={"<image>": 290, **ids, **codes})
        name = "ChameleonXLLMXForConditionalGeneration"
        other = {"architectures": [name]} if family == "lumina_mgpt" else {}
        return transformers.ChameleonForConditionalGeneration(config), other
    if family == "glm_image":
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1]}
        config = transformers.GlmImageConfig(
            text_config={**TEXT, "vision_vocab_size": 40, "rope_parameters": rope},
            vision_config={
                "depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 32, "intermediate_size": 32,
                "patch_size": 2,
            },
            vq_config={"num_embeddings": CODES, "embed_dim": 8, "latent_channels": 32}, image_token_id=290,
            image_start_token_id=ids["<|dit_token_16384|>"], image_end_token_id=291,
        )  # fmt: skip
        return transformers.GlmImageForConditionalGeneration(config), {}
    if family == "janus":
        vq = {**VQ, "num_embeddings": CODES, "projection_dim": 32, "image_token_embed_dim": 32, "latent_channels": 32}
        vision = {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 12, "patch_size": 4,
            "projection_dim": 32, "num_image_tokens": 6,
        }  # fmt: skip
        text = {**TEXT, "model_type": "llama", "rms_norm_eps": 1e-6}
        config = transformers.JanusConfig(text_config=text, vq_config=vq, vision_config=vision, image_token_id=290)
        return transformers.JanusForConditionalGeneration(config), {}
    size = {"simplear": 256 + len(ids) + 64000, "mammothmoda2": ROW_END + 40}.get(family, 340)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**TEXT, "vocab_size": size}))
    if family == "simplear":
        return model, {"architectures": ["SimpARForCausalLM"], "model_type": "simpar_qwen2"}
    if family == "x_omni":
        sizes = {"num_mm_adap_layers": 1, "num_mm_head_layers": 0, "mm_vocab_size": 84, "image_vocab_size": CODES}
        return model, {**sizes, "model_type": "x-omni", "vocab_size": 256, "visual_token_offset": OFFSET}
    if family == "mammothmoda2":
        text = {**TEXT, "vocab_size": ROW_END, "gen_vocab_size": 40, "moe_type": "ffn-1:2"}
        codes = {"num_visual_codes": CODES, "visual_token_offset": ROW_END + 8}
        return model, {"model_type": "mammothmoda2", "llm_config": {"text_config": text}, **codes}
    return model, {"visual_token_offset": OFFSET, "num_visual_codes": CODES, "boi_token_id": 256}


def write_hub(directory: Path, family: str, sharded: bool = False) -> Path:
    """A model with weights large enough that every token matters."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = write_ranks(directory) if family == "mammothmoda2" else write_tokenizer(directory, SPECIAL[family])
    torch.manual_seed(0)
    model, other = _network(family, ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "vqmodel" not in name:
                parameter.normal_(0, 0.15)
    model.save_pretrained(directory, max_shard_size="60KB" if sharded else "1GB")
    config = json.loads((directory / "config.json").read_text())
    if family in ("x_omni", "mammothmoda2"):
        state = _of_images(
            family, load_file(directory / "model.safetensors"), {"x_omni": 256, "mammothmoda2": ROW_END}[family]
        )
        save_file(state, directory / "model.safetensors")
    if family in CODE_OF_ITS_OWN:  # as its authors save it; nothing of it is run
        (directory / "modeling_own.py").write_text("raise SystemExit('code of a checkpoint was run')")
        other = {**other, "auto_map": {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.LM"}}
    (directory / "config.json").write_text(json.dumps({**config, **other}))
    return directory
