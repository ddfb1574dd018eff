"""VAR: parity with its authors' code, cached against teacher-forced, guidance over the scales, strict loading."""

from math import log

import pytest
import torch
import var_golden
from tiny import CLOSE

from flashar_pl.decoding import Engine
from flashar_pl.models.baselines import VAR
from flashar_pl.models.baselines.var_transformer import PRESETS, VARConfig, VARTransformer
from flashar_pl.sampling import filter_logits, guide
from flashar_pl.tokenizers import MultiScaleVQ

MODELS = ["var_tiny", "var_saln_tiny", "var_nol2norm_tiny"]
TWO = torch.tensor([3, 7])


def forced(name):
    io = var_golden.read(name).io
    return io["in/gt_idx"], io["in/x_BLCv_wo_first_l"], io["in/label"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_official_ones(name):
    _, io, facts = var_golden.read(name)
    model = var_golden.model(name)
    assert sum(p.numel() for p in model.parameters()) == facts["n_params"]
    torch.testing.assert_close(model.logits(*forced(name)), io["out/logits"], **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_official_ones(name):
    io = var_golden.read(name).io
    model = var_golden.model(name)
    loss = model.loss(*forced(name))["loss"]
    loss.backward()
    torch.testing.assert_close(loss.detach(), io["out/ce_loss"], atol=1e-5, rtol=0)
    parameters = dict(model.named_parameters())
    for key in (key for key in io if key.startswith("out/grad/")):
        torch.testing.assert_close(
            parameters[f"backbone.{key.removeprefix('out/grad/')}"].grad, io[key], atol=1e-6, rtol=1e-4
        )


def test_the_clamp_of_the_temperature_matters_here():
    """Otherwise parity would say nothing about it."""
    model = var_golden.model()
    scales = [block.attn.scale_mul_1H11 for block in model.backbone.blocks]
    assert max(float(scale.detach().max()) for scale in scales) > log(100)


@pytest.mark.parametrize(
    ("name", "scale"), [*((name, scale) for name in MODELS for scale in ("0", "1.5")), ("var_tiny", "4")]
)
def test_greedy_ids_are_the_official_ones(name, scale):
    """Guidance grows from none at the first scale to cfg_scale at the last; 0 is none."""
    single = name == "var_tiny"
    io = var_golden.read("var_tiny_generate" if single else name).io
    stem = f"cfg{scale}" if single else f"gen/cfg{scale}"
    steps = []
    ids = var_golden.model(name).generate(
        io["in/label" if single else "in/gen/label"],
        tokenizer=var_golden.tokenizer(),
        cfg_scale=float(scale),
        greedy=True,
        on_scale=lambda k, logits: steps.append(logits),
    )
    assert torch.equal(ids, io[f"out/{stem}/idx"])
    assert [step.shape[1] for step in steps] == [1, 4, 9, 16]
    if f"out/{stem}/step_logits" in io:
        torch.testing.assert_close(torch.cat(steps, dim=1), io[f"out/{stem}/step_logits"], **CLOSE)
    if f"out/{stem}/image" in io:
        image = (var_golden.tokenizer().decode_float(ids) + 1) / 2
        torch.testing.assert_close(image, io[f"out/{stem}/image"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_unconditional_ids_are_the_official_ones(name):
    io = var_golden.read("var_tiny_generate" if name == "var_tiny" else name).io
    official = io["out/uncond/idx" if name == "var_tiny" else "out/gen/uncond/idx"]
    ids = var_golden.model(name).generate(
        torch.tensor([10]), tokenizer=var_golden.tokenizer(), cfg_scale=0, greedy=True
    )
    assert torch.equal(ids, official)


def test_a_recorded_sample():
    """The authors' ids, fed back: logits before the filter, what the filter keeps, and the image."""
    io = var_golden.read("var_tiny_generate").io
    model, vq = var_golden.model(), var_golden.tokenizer()
    ids, classes = io["in/sampled_cfg1.5/idx"], io["in/label"]
    given, null = (model.logits(ids, vq.var_input(ids), of) for of in (classes, torch.full_like(classes, 10)))
    level = model.backbone.level()
    guided = torch.stack([guide(given[:, i], null[:, i], 1 + 1.5 * k / 3) for i, k in enumerate(level.tolist())], 1)
    torch.testing.assert_close(guided, io["out/sampled_cfg1.5/step_logits"], **CLOSE)
    kept = filter_logits(guided, top_k=10, top_p=0.9).isfinite()
    assert torch.equal(kept, io["out/sampled_cfg1.5/kept"])
    assert kept.gather(-1, ids[..., None]).all()
    torch.testing.assert_close((vq.decode_float(ids) + 1) / 2, io["out/sampled_cfg1.5/image"], atol=2e-4, rtol=0)


def test_the_filter_keeps_what_the_authors_keep():
    _, io, facts = var_golden.read("sampling_filter")
    for name, case in facts["cases"].items():
        logits = io["in/logits_tied" if name == "tied" else "in/logits"]
        kept = filter_logits(logits, top_k=case["top_k"], top_p=case["top_p"] or 1.0).isfinite()  # theirs: 0 is off
        assert torch.equal(kept, io[f"out/kept_{name}"]), case


@pytest.mark.parametrize("name", MODELS)
def test_cached_drawing_sees_what_teacher_forcing_sees(name):
    """Every scale, drawn at random with guidance, in float64: a wrong mask, place or cache length would show."""
    model, vq, steps = var_golden.model(name).double(), var_golden.tokenizer(), []
    ids = model.generate(
        TWO, tokenizer=vq, cfg_scale=3.0, top_k=30, seeds=5, on_scale=lambda k, logits: steps.append(logits)
    )
    x = vq.var_input(ids)
    given, null = model.logits(ids, x, TWO), model.logits(ids, x, torch.full_like(TWO, 10))
    t = 3.0 * model.backbone.level()[:, None] / 3
    torch.testing.assert_close(torch.cat(steps, dim=1), (1 + t) * given - t * null, atol=1e-12, rtol=1e-12)


def test_a_sample_depends_on_its_seed_alone():
    model, vq = var_golden.model(), var_golden.tokenizer()

    def draw(classes, seeds):
        return model.generate(torch.tensor(classes), tokenizer=vq, cfg_scale=1.5, top_k=20, top_p=0.95, seeds=seeds)

    both = draw([3, 7], 11)
    assert torch.equal(both, draw([3, 7], [11, 12]))
    assert torch.equal(both.flip(0), draw([7, 3], [12, 11]))
    assert not torch.equal(both, draw([3, 7], 12))


def test_no_position_sees_a_larger_scale():
    """x of the last scale must not reach the logits of smaller ones."""
    model = var_golden.model()
    ids, x, classes = forced("var_tiny")
    changed = torch.cat([x[:, :13], x[:, 13:] + 1], dim=1)  # the last scale begins at position 14 of 30
    before, after = model.logits(ids, x, classes), model.logits(ids, changed, classes)
    assert torch.equal(before[:, :14], after[:, :14])
    assert not torch.equal(before[:, 14:], after[:, 14:])
    level = model.backbone.level()
    assert torch.equal(level[:, None] >= level[None], var_golden.read("var_tiny").io["dbg/attn_bias_allowed"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_is_bit_exact(name, dtype):
    state, _, facts = var_golden.read(name)
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    out = VAR.from_official({"model": state}, facts["config"]).to_official()
    assert out.keys() == state.keys()
    assert all(torch.equal(out[key], state[key]) and out[key].dtype == state[key].dtype for key in state)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("var-d16", 310_283_520),
        ("var-d20", 600_917_136),
        ("var-d24", 1_033_399_360),
        ("var-d30", 2_010_020_356),
        ("var-d36-s", 2_353_893_904),
    ],
)
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = VAR(VARTransformer(PRESETS[name]))
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.sizes.embed_dim / model.sizes.num_heads == 64


def test_strict_loading_names_the_tensors():
    state, _, facts = var_golden.read("var_tiny")
    config = facts["config"]

    def refuse(message, change=None, without="", **settings):
        changed = {key: value for key, value in state.items() if key != without}
        with pytest.raises(ValueError, match=message):
            VAR.from_official({**changed, **(change or {})}, {**config, **settings})

    refuse(r"1 missing keys \(head\.bias\)", without="head.bias")
    refuse(r"1 missing keys \(lvl_1L\)", without="lvl_1L")
    refuse(r"1 unknown keys \(loss\.w\)", {"loss.w": torch.zeros(1)})
    refuse(r"head\.weight has shape \(64, 40\); this model expects \(64, 48\)", {"head.weight": torch.zeros(64, 40)})
    refuse(r"pos_1LC has shape \(1, 30, 48\); this model expects \(1, 39, 48\)", patch_nums=[1, 2, 3, 5])
    refuse(r"attn_bias_for_masking .* is not that of patch_nums \[1, 2, 3, 4\]",
           {"attn_bias_for_masking": torch.zeros(1, 1, 30, 30)})  # fmt: skip
    refuse(r"missing keys \(blocks\.0\.ada_gss", shared_aln=True)
    refuse(r"unknown keys \(blocks\.0\.attn\.scale_mul_1H11", attn_l2_norm=False)
    refuse("embed_dim 48 is not a multiple of num_heads 5", num_heads=5)
    refuse(r"missing keys \(word_embed\.weight\)", without="word_embed.weight")
    with pytest.raises(ValueError, match=r"the checkpoint holds multi-scale VQ .* weights; expected VAR"):
        VAR.from_official(var_golden.read("vqvae_tiny").state, config)
    with pytest.raises(ValueError, match="lack depth"):
        VAR.from_official(state, {key: value for key, value in config.items() if key != "depth"})


def test_another_tokenizer_is_named():
    state, _, facts = var_golden.read("vqvae_tiny")
    other = MultiScaleVQ.from_official(state, {**facts["config"], "patch_nums": [1, 2, 4]})
    with pytest.raises(ValueError, match=r"patch_nums \[1, 2, 4\] and \[1, 2, 3, 4\]"):
        var_golden.model().generate(TWO, tokenizer=other)
    smaller = {**state, "quantize.embedding.weight": torch.zeros(50, 8)}
    smaller["quantize.ema_vocab_hit_SV"] = torch.zeros(4, 50)
    other = MultiScaleVQ.from_official(smaller, {**facts["config"], "vocab_size": 50})
    with pytest.raises(ValueError, match="codes 50 and 64"):
        var_golden.model().generate(TWO, tokenizer=other)


def test_wrong_input_is_named():
    model, vq = var_golden.model(), var_golden.tokenizer()
    ids, x, classes = forced("var_tiny")
    for call, message in (
        (lambda: model.logits(ids[:, 1:], x, classes), r"this VAR model expects \(B, 30\)"),
        (lambda: model.logits(ids, x[:, 1:], classes), r"x has shape \(3, 28, 8\); expected \(3, 29, 8\)"),
        (lambda: model.logits(ids, x, classes + 9), r"classes lie in .* this model has 0 \.\. 9, and 10 = no class"),
        (
            lambda: model.generate(TWO, tokenizer=vq, cfg_scale=-1.0),
            r"cfg_scale is -1.0; expected 0 or more \(0 = no guidance\)",
        ),
        (lambda: model.generate(TWO.float(), tokenizer=vq), r"classes is \(2,\) torch.float32"),
        (lambda: Engine(model, "graphs"), r"a VAR model is not recorded in graphs; use eager\."),  # nor compiled
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_broken_logits_end_the_drawing():
    """Some legal code would be drawn from NaN."""
    model = var_golden.model()
    model.backbone.lvl_embed.weight.data[2] = float("nan")
    with pytest.raises(ValueError, match="logits of decoding step 2 are NaN or infinite"):
        model.generate(TWO, tokenizer=var_golden.tokenizer(), cfg_scale=0, greedy=True)


def test_a_first_scale_of_several_positions():
    """p_0 > 1: the class stands at p_0^2 positions, and x leaves out as many."""
    torch.manual_seed(0)
    config = VARConfig(2, 16, 2, vocab_size=9, num_classes=4, patch_nums=(2, 3), code_dim=4)
    model = VAR(VARTransformer(config)).eval()
    ids = torch.randint(0, 9, (2, 13))
    logits = model.logits(ids, torch.randn(2, 9, 4), torch.tensor([0, 4]))
    assert logits.shape == (2, 13, 9)
    assert model.backbone.pos_start.shape == (1, 4, 16)
    assert logits.isfinite().all()
