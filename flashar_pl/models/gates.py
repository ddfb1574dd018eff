"""What weighs the horizontal against the vertical logits where both heads predict a cell (Eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashar_pl.numerics import full_precision, wide


class FusionGate(nn.Module):
    """g = sigmoid(MLP([h^H; h^V])) in float32 (Eq. 7). The last layer starts at zero, so g starts at 0.5."""

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        """dim: of each of both inputs. hidden: width in between, None = the paper's max(64, dim // 8)."""
        super().__init__()
        self.hidden = nn.Linear(2 * dim, max(64, dim // 8) if hidden is None else hidden, bias=False)
        self.out = nn.Linear(self.hidden.out_features, 1)
        self.start_even()

    def reset_parameters(self) -> None:
        """New weights, for a gate that was built without memory."""
        self.hidden.reset_parameters()
        self.start_even()

    def start_even(self) -> None:
        """g = 0.5 everywhere."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def features(self, h: Tensor, v: Tensor) -> Tensor:
        """What the MLP reads, (..., 2D) float32."""
        return wide(torch.cat([h, v], dim=-1))

    def forward(self, h: Tensor, v: Tensor) -> Tensor:
        """h, v (..., D) -> (...) float32, the weight of the horizontal logits."""
        with full_precision(h.device.type):
            x = self.features(h, v)
            x = nn.functional.silu(nn.functional.linear(x, wide(self.hidden.weight)))
            x = nn.functional.linear(x, wide(self.out.weight), wide(self.out.bias))
            return torch.sigmoid(x.squeeze(-1))


class LogitGate(FusionGate):
    """The gate of the authors' LlamaGen code. It reads the logits of both heads, without gradients, as one vector of
    mean 0 and mean square 1 clipped to [-6, 6]; so only the gate itself learns from it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary, max(32, vocabulary // 512))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.hidden.weight, std=self.hidden.in_features**-0.5)
        self.start_even()

    @torch.no_grad()
    def features(self, h: Tensor, v: Tensor) -> Tensor:
        x = super().features(h, v)
        x = x - x.mean(-1, keepdim=True)
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).clamp_(-6, 6)
