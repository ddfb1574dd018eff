"""What a training step needs: bytes on each GPU, FLOPs, and hours, for FSDP2, DDP or a single GPU.

Master weights, gradients and moments are float32 shards; under FSDP2 a unit (a block, an embedding, the pair of heads)
is gathered in bfloat16 while it runs. Activations are what autograd keeps for the backward pass, counted tensor by
tensor; the logits exist for one chunk of targets at a time.

With LoRA the backbone is frozen: it has no gradients and no moments, may be bfloat16, and its weights cost no FLOPs in
the backward pass; the matrices that LoRA adds are trained as everything else is.

Letters: L layers, m branch layer, k vertical layers, D width, A query heads, G key/value heads, E head width,
F feed-forward width, T tokens (samples times sequence length), r and c bytes of the residual stream and of GEMM inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from flashar_pl.grid import make_plan
from flashar_pl.models.base import STAGE1_ROLES
from flashar_pl.models.lora import TARGETS, LoraConfig
from flashar_pl.models.losses import chunk_size
from flashar_pl.options import check_least
from flashar_pl.planner.sizes import Linear, ModelSizes

Moments = Literal["fp32", "bf16", "8bit"]
"""What the two moments of AdamW are kept in; 8-bit blocks of 256 values have a float32 scale each."""
MOMENT_BYTES = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 * (1 + 4 / 256)}
"""Bytes of both moments per parameter."""
CONTEXT_BYTES = 2 * 10**9
"""CUDA context, kernels and communication buffers of one process."""
FRAGMENTATION = 0.06
"""Share of a GPU that the allocator cannot use."""


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained."""

    grid: tuple[int, int]
    plan: str = "diagonal"
    gpus: int = 8
    samples: int = 1
    """Samples of one forward on one GPU."""
    accumulate: int = 1
    """Forwards per optimiser step."""
    sharded: bool = True
    """FSDP2. False: every GPU holds everything, with autocast to bfloat16."""
    replicas: int = 1
    """Copies of the shards (hybrid sharding); gpus is a multiple."""
    moments: Moments = "fp32"
    offload: bool = False
    """Keep shards, gradients and moments in CPU memory (FSDP2 only)."""
    background: bool = False
    """Write checkpoints from a copy of shards and moments in CPU memory (FSDP2 only)."""
    checkpointing: bool = True
    """Keep only the inputs of blocks and run each again in the backward pass."""
    mixed: bool = True
    """bfloat16 compute; False = float32 throughout."""
    ema: bool = False
    prefix: int | None = None
    """Prefix positions; None = usual for the model."""
    lora: LoraConfig | None = None
    total_steps: int = 50_000
    stage1_share: float = 0.2

    def __post_init__(self) -> None:
        check_least(self, gpus=1, samples=1, accumulate=1, replicas=1, total_steps=1)
        if self.gpus % self.replicas:
            raise ValueError(f"{self.gpus} GPUs cannot hold {self.replicas} replicas; expected a divisor of gpus.")
        if self.offload and not self.sharded:
            raise ValueError("only sharded parameters can be kept in CPU memory; use FSDP2, which also takes one GPU.")

    @property
    def shards(self) -> int:
        """GPUs that share one copy of the parameters."""
        return self.gpus // self.replicas if self.sharded else 1

    def prefix_length(self, sizes: ModelSizes) -> int:
        """Positions before the image."""
        return sizes.backbone.conditioning.positions if self.prefix is None else self.prefix

    def length(self, sizes: ModelSizes) -> int:
        """Positions of one sequence: the prefix, and every slot but those of the last step."""
        return self.prefix_length(sizes) + make_plan(self.plan, *self.grid, row_end=sizes.backbone.row_ends).n_inputs


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU."""

    weights: int
    ema: int
    gradients: int
    moments: int
    activations: int
    loss: int
    """Logits of the chunks that are alive, and gradients of the hidden states."""
    transient: int
    """Gathered units and their unsharded gradients; without sharding the bfloat16 copies of autocast."""
    context: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


def added(sizes: ModelSizes, lora: LoraConfig | None) -> int:
    """Parameters of LoRA's matrices."""
    if lora is None:
        return 0
    return sizes.backbone.n_layer * _added(sizes.linears, lora) + sizes.text_layers[0] * _added(sizes.mlp, lora)


def _added(linears: Iterable[Linear], lora: LoraConfig) -> int:
    return sum(lora.rank * (linear.n_in + linear.n_out) for linear in linears if linear.name in lora.targets)


def frozen(sizes: ModelSizes, lora: LoraConfig | None) -> int:
    """Parameters that never train."""
    return 0 if lora is None else sizes.parameters["backbone"]


def trainable(sizes: ModelSizes, stage: int, lora: LoraConfig | None) -> int:
    """Parameters that train in a stage; a raster model has no stage 1."""
    if stage == 1:
        return sum(sizes.parameters[role] for role in STAGE1_ROLES)
    return sizes.n_parameters - frozen(sizes, lora) + added(sizes, lora)


def weight_bytes(sizes: ModelSizes, lora: LoraConfig | None) -> int:
    """Bytes of one copy of the parameters."""
    low = 2 if lora is not None and lora.base == "bf16" else 4
    return 4 * trainable(sizes, 2, lora) + low * frozen(sizes, lora)


def training_memory(sizes: ModelSizes, setup: TrainingSetup, stage: int = 2) -> TrainingMemory:
    """Peak bytes on one GPU in a stage. In stage 1 the moments of frozen parameters do not exist yet."""
    on_gpu = 0 if setup.offload else 1 / setup.shards
    trains, averaged = trainable(sizes, stage, setup.lora), trainable(sizes, 2, setup.lora)
    return TrainingMemory(
        weights=int(on_gpu * weight_bytes(sizes, setup.lora)) + 4 * sizes.buffer_elements,
        ema=int(on_gpu * setup.ema * 4 * averaged),
        gradients=int(on_gpu * 4 * trains),
        moments=int(on_gpu * MOMENT_BYTES[setup.moments] * trains),
        activations=activation_bytes(sizes, setup, stage),
        loss=loss_bytes(sizes, setup),
        transient=transient_bytes(sizes, setup, stage),
        context=CONTEXT_BYTES,
    )


def memory_of_stages(sizes: ModelSizes, setup: TrainingSetup) -> dict[int, TrainingMemory]:
    """`training_memory` of every stage that the run has."""
    stages = (1, 2) if sizes.flashar and setup.stage1_share > 0 else (2,)
    return {stage: training_memory(sizes, setup, stage) for stage in stages}


def peak_total(sizes: ModelSizes, setup: TrainingSetup) -> int:
    """Bytes of the larger stage."""
    return max(memory.total for memory in memory_of_stages(sizes, setup).values())


def usable(gpu_bytes: int) -> int:
    """Bytes of a GPU that can be planned with."""
    return int(gpu_bytes * (1 - FRAGMENTATION))


def host_bytes(sizes: ModelSizes, setup: TrainingSetup) -> int:
    """CPU memory of one process for offloaded weights, gradients and moments, and for what a checkpoint copies."""
    trains = trainable(sizes, 2, setup.lora)
    state = weight_bytes(sizes, setup.lora) + (MOMENT_BYTES[setup.moments] + 4 * setup.ema) * trains
    return int(((setup.offload + setup.background) * state + setup.offload * 4 * trains) / setup.shards)


def block_activations(sizes: ModelSizes, residual: int, compute: int) -> int:
    """Bytes per token that one block keeps for its backward pass."""
    block = sizes.backbone.block
    dim, query, keys = block.dim, block.n_head * block.head_dim, block.n_kv_head * block.head_dim
    norms = 2 * ((residual + compute) * dim + 4)  # input, result for the GEMM, 1 / rms: the fused kernel of GPUs
    attention = compute * ((query + 2 * keys) + query + keys + query)  # qkv, rotated q and k, output
    normed = block.qk_norm != "none"
    upcast = normed and compute < residual  # autocast keeps q and k in float32 from their norms to the kernel
    if block.n_head != block.n_kv_head:  # output and q in the order of heads; a cast from float32 is that copy too
        attention += compute * query * (1 if upcast else 2)
    if normed:
        attention += 4 * (query + keys) * upcast + 4 * (block.n_head + block.n_kv_head)
    log_sums = 4 * block.n_head
    feed_forward = compute * 4 * block.ffn_dim  # both halves of w13, silu, product
    masks = dim * ((block.resid_dropout > 0) + (block.ffn_dropout > 0))
    return norms + attention + log_sums + feed_forward + masks


def adapted_block_activations(sizes: ModelSizes, lora: LoraConfig, residual: int, compute: int) -> int:
    """The same of a frozen block with LoRA: no gradients of weights need the inputs of projections without LoRA."""
    block, rest = sizes.backbone.block, [name for name in TARGETS if name not in lora.targets]
    inputs = {"wqkv": block.dim, "wo": 0, "w13": block.dim, "w2": block.ffn_dim}  # attention keeps its output itself
    unneeded = compute * sum(inputs[name] for name in rest)
    low_rank = compute * lora.rank * len(lora.targets)  # what goes between the two matrices
    return block_activations(sizes, residual, compute) - unneeded + low_rank


def activation_bytes(sizes: ModelSizes, setup: TrainingSetup, stage: int = 2) -> int:
    """Bytes that autograd keeps on one GPU between forward and backward, without logits."""
    compute = 2 if setup.mixed else 4
    residual = 2 if setup.mixed and setup.sharded else 4  # autocast adds bfloat16 to a float32 embedding
    tokens = setup.samples * setup.length(sizes)
    layers = sizes.backbone.n_layer + sizes.vertical_layers if stage == 2 else sizes.vertical_layers
    own = full = block_activations(sizes, residual, compute)  # own: of a block of the backbone
    if setup.lora is not None:
        own = adapted_block_activations(sizes, setup.lora, residual, compute)
    branches = 1 + sizes.flashar if stage == 2 else 1
    final_norm = (4 + residual) * sizes.dim * branches
    text, text_layers = setup.samples * setup.prefix_length(sizes), sum(sizes.text_layers[2 - stage :])
    of_text = text * compute * 4 * sizes.backbone.block.ffn_dim  # of a layer
    if not setup.checkpointing:
        backbone = layers - sizes.vertical_layers
        return tokens * (backbone * own + sizes.vertical_layers * full + final_norm) + text_layers * of_text
    largest = max(own, full) if sizes.vertical_layers else own
    return tokens * (layers * residual * sizes.dim + largest + final_norm) + bool(text_layers) * of_text


def loss_bytes(sizes: ModelSizes, setup: TrainingSetup) -> int:
    """Chunks of logits alive at once (five), and hidden states at the targets with their gradients."""
    targets = setup.samples * setup.grid[0] * setup.grid[1]
    chunk = chunk_size(targets, sizes.head_rows, "cuda")
    return 5 * 4 * chunk * sizes.head_rows + targets * sizes.dim * 4 * 2 * (1 + sizes.flashar)


def transient_bytes(sizes: ModelSizes, setup: TrainingSetup, stage: int = 2) -> int:
    """What exists while a unit runs. The largest unit decides: units follow one another."""
    low = 2 if setup.mixed else 4
    heads = sizes.head_rows * sizes.dim * (1 + sizes.flashar)
    if not setup.sharded:
        cast = 0 if setup.lora is not None and setup.lora.base == "bf16" else sizes.backbone.n_layer
        copies = (cast + sizes.vertical_layers) * sizes.block_weights + heads + added(sizes, setup.lora)
        copies += (bool(cast) * sizes.text_layers[0] + sizes.text_layers[1]) * sizes.mlp_weights
        return 2 * copies if setup.mixed else 0
    # a gradient, that in float32 for the reduction, and its new shard where there is one of earlier forwards to add to
    gradient = low + 4 + (4 / setup.shards if setup.accumulate > 1 else 0)
    block = sizes.block_parameters * (3 * low + gradient)  # itself, the next one and its gather buffer
    if setup.lora is not None and not sizes.vertical_layers:
        low_rank = _added((*sizes.linears, *sizes.mlp * bool(sizes.text_layers[0])), setup.lora)
        block = sizes.block_parameters * 3 * low + low_rank * (3 * low + gradient)
    trained = heads if stage == 2 else sizes.head_rows * sizes.dim * sizes.flashar
    both_heads = heads * low + trained * gradient  # float32 sums over chunks; the reduction reuses their place
    embedding = sizes.embedding_parameters * (low + (gradient if stage == 2 and setup.lora is None else 0))
    return int(max(block, both_heads, embedding)) + sizes.block_parameters * low  # one more block is gathered ahead


# --- time ---------------------------------------------------------------------------------------------------------


def step_flops(sizes: ModelSizes, setup: TrainingSetup, stage: int = 2) -> int:
    """FLOPs of one optimiser step on one GPU.

    A backward pass costs two forwards (inputs and weights), recomputation one more. Heads are never recomputed. In
    stage 1 nothing flows into the backbone: only the vertical layers have a backward pass, and of the horizontal head
    only the logits are computed. With LoRA the weights of the backbone's projections have no gradient.
    """
    length = setup.length(sizes)
    tokens, targets = setup.samples * length, setup.samples * setup.grid[0] * setup.grid[1]
    projections = 2 * tokens * sizes.block_weights
    layer = projections + 4 * tokens * length * sizes.backbone.block.n_head * sizes.backbone.block.head_dim
    text = setup.samples * setup.prefix_length(sizes)  # positions where an MLP of text runs too
    of_text = [2 * text * sizes.mlp_weights * layers for layers in sizes.text_layers]
    low_rank = tokens * added(sizes, setup.lora)
    if setup.lora is not None:
        low_rank -= (tokens - text) * sizes.text_layers[0] * _added(sizes.mlp, setup.lora)
    backbone = sizes.backbone.n_layer * layer + of_text[0] + 2 * low_rank
    vertical = sizes.vertical_layers * layer + of_text[1]
    head = 2 * targets * sizes.head_rows * sizes.dim
    passes = 4 if setup.checkpointing else 3
    if stage == 1:
        return setup.accumulate * (backbone + passes * vertical + head + 3 * sizes.flashar * head)
    needless = 0 if setup.lora is None else sizes.backbone.n_layer * projections + of_text[0]
    return setup.accumulate * (passes * (backbone + vertical) - needless + 3 * head * (1 + sizes.flashar))


def training_time(sizes: ModelSizes, setup: TrainingSetup, peak: float, mfu: float) -> dict[str, Any]:
    """Seconds per step in both stages, hours and GPU-hours of the run, at `mfu` of `peak` FLOP/s per GPU."""
    flops = [step_flops(sizes, setup, stage) for stage in (1, 2)]
    seconds = [count / (peak * mfu) for count in flops]
    share = setup.stage1_share if sizes.flashar else 0.0
    hours = setup.total_steps * (share * seconds[0] + (1 - share) * seconds[1]) / 3600
    return {
        "step_flops_per_gpu": {"stage1": flops[0], "stage2": flops[1]},
        "step_seconds": {"stage1": seconds[0], "stage2": seconds[1]},
        "hours": hours,
        "gpu_hours": hours * setup.gpus,
    }
