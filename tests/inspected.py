"""Models and functions whose generated code the tests look at."""

import torch
from torch import nn

WIDTH, HIDDEN = 64, 128


class Block(nn.Module):
    """RMSNorm -> Linear -> SiLU -> Linear -> softmax."""

    def __init__(self, width=WIDTH, hidden=HIDDEN, eps=1e-6):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=eps)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return torch.softmax(self.down(nn.functional.silu(self.up(self.norm(x)))), -1)


REDUCTIONS = {
    "sum inner": lambda x: x.sum(-1),
    "sum outer": lambda x: x.sum(0),
    "sum middle": lambda x: x.unflatten(1, (4, -1)).sum(1),
    "sum two dims": lambda x: x.unflatten(1, (4, -1)).sum((0, 2)),
    "sum all": lambda x: x.sum(),
    "mean": lambda x: x.mean(-1),
    "prod": lambda x: (1 + x / 1024).prod(-1),
    "var": lambda x: x.var(-1),
    "std_mean": lambda x: torch.std_mean(x, -1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "layer_norm": lambda x: nn.functional.layer_norm(x, x.shape[-1:]),
    "argmax": lambda x: (x.argmax(-1), x.amin(-1)),
    "any": lambda x: (x > 3).any(-1),
}
