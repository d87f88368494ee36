"""nanoGPT's small set-up in plain PyTorch, with nothing of transect: what our trainer's loss is held against.

Model and optimizer follow karpathy/nanoGPT (README, "I only have a macbook"): 4 layers, 4 heads, width 128, context 64,
no biases, no dropout, learned positions, tied head; 2,000 steps of 12 random crops, AdamW 1e-3 falling to 1e-4 along a
cosine after 100 steps, betas .9 and .99, decay .1 of matrices and tables, gradient norm at most 1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, LAYERS, HEADS, CONTEXT = 128, 4, 4, 64
STEPS, BATCH, WARMUP, HIGH, LOW = 2000, 12, 100, 1e-3, 1e-4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, _ = x.shape
        q, k, v = (
            part.view(batch, positions, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(WIDTH, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, positions, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if deep else 0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy((self.norm(x) @ self.tokens.weight.T).flatten(0, 1), labels.flatten())


def rate(step: int) -> float:
    if step < WARMUP:
        return HIGH * (step + 1) / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    return LOW + (HIGH - LOW) * (1 + math.cos(math.pi * done)) / 2


def train(text: Tensor, vocab: int, seed: int) -> GPT:
    """A model trained on the ids of a text [tokens]."""
    torch.manual_seed(seed)
    model = GPT(vocab)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        starts = torch.randint(len(text) - CONTEXT, (BATCH,))
        crops = torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])
        loss = model(crops[:, :-1], crops[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def loss_on(model: GPT, text: Tensor) -> float:
    """Mean loss in nats over a text cut into windows of the context, each token but the first of the text once."""
    count = (len(text) - 1) // CONTEXT
    ids = text[: count * CONTEXT].view(count, CONTEXT)
    labels = text[1 : count * CONTEXT + 1].view(count, CONTEXT)
    return (
        sum(
            float(model(ids[at : at + 256], labels[at : at + 256])) * len(ids[at : at + 256])
            for at in range(0, count, 256)
        )
        / count
    )
