"""Training speed beside a plain PyTorch loop of the same shape: `python -m models.train_bench --preset 5m`.

The plain loop is written as nanoGPT is (github.com/karpathy/nanoGPT): one fused projection for q, k, v and one for
gate and up, rotations computed once, SDPA, cross-entropy over all logits, clipping and fused AdamW; no logs, no
checkpoints, no accelerate. Both learn from random tokens in blocks of the same size. Rounds of the two alternate,
after a warm-up; tokens/s are medians over rounds, with the ratio of each pair of neighbours beside them.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.device import DeviceOptions
from models.network.config import ModelConfig
from models.training.presets import preset
from models.training.options import BETAS, TrainerOptions
from runtime.cli import arg, run, table


@dataclass(frozen=True, kw_only=True)
class BenchOptions(DeviceOptions):
    """Compare the trainer's tokens/s with those of a plain PyTorch loop of the same shape."""
    preset: str = arg("5m", help="size of the model")
    vocab_size: int = arg(4096, help="size of the vocabulary")
    context: int = arg(256, help="tokens of a block")
    batch: int = arg(16, help="blocks of an update")
    steps: int = arg(5, help="updates of a round")
    rounds: int = arg(5, help="rounds of each, alternating")
    precision: str = arg("fp32", help="of the products; bf16 is mixed precision", choices=("fp32", "bf16"))
    threads: int | None = arg(None, help="threads of PyTorch (by default its own choice)")


def main(argv=None) -> int:
    return run(BenchOptions, "bench", argv)


if __name__ == "__main__":          # before the imports of the work (see runtime/cli.py)
    raise SystemExit(main())

import torch
import torch.nn.functional as F
from torch import nn

from models.network.decoder import Decoder
from models.network.rope import rotations
from models.training.trainer import Trainer


class PlainLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        layer, d, h = config.layers[0], config.head_dim, config.hidden_size
        self.sizes, self.d = [layer.heads * d, layer.kv_heads * d, layer.kv_heads * d], d
        self.norm1, self.norm2 = nn.RMSNorm(h), nn.RMSNorm(h)
        self.qkv, self.o = nn.Linear(h, sum(self.sizes), bias=False), nn.Linear(layer.heads * d, h, bias=False)
        self.gate_up, self.down = nn.Linear(h, 2 * layer.mlp_size, bias=False), nn.Linear(layer.mlp_size, h, bias=False)

    def forward(self, x, cos, sin):
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, -1, self.d).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(self.sizes, -1))
        q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.o(y.transpose(1, 2).reshape(b, s, -1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class PlainModel(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in config.layers)
        self.norm = nn.RMSNorm(config.hidden_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        cos, sin = rotations(config.rope(config.layers[0]), config.head_dim, torch.arange(config.context_length), config.context_length)
        self.register_buffer("cos", cos), self.register_buffer("sin", sin)

    def forward(self, ids, labels):
        x, s = self.embed(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:s], self.sin[:s])
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


class PlainLoop:
    def __init__(self, config: ModelConfig, rows, options: BenchOptions, device: torch.device):
        self.model, self.data, self.batch, self.device = PlainModel(config).to(device), rows, options.batch, device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=BETAS, weight_decay=0.1, fused=True)

    def train_step(self):
        ids, labels = self.data.rows(np.random.randint(0, len(self.data), self.batch))
        with self.autocast:
            loss = self.model(torch.from_numpy(ids).to(self.device), torch.from_numpy(labels).to(self.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class RandomBlocks:
    lengths = None

    def __init__(self, options: BenchOptions):
        self.tokens = np.random.default_rng(0).integers(0, options.vocab_size, (256, options.context + 1))

    def __len__(self):
        return len(self.tokens)

    def rows(self, indices):
        return self.tokens[indices, :-1], self.tokens[indices, 1:]


def bench(options: BenchOptions) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    config, rows = preset(options.preset, options.vocab_size, options.context, eos=0).config, RandomBlocks(options)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainerOptions(out=Path(folder) / "run", steps=10**6, batch=options.batch, micro_batch=options.batch,
                                  learning_rate=1e-3, warmup=0, precision=options.precision, device=options.device)
        ours = Trainer(Decoder(config), settings, rows, rows, save=lambda module, out, metrics: None, inputs={})
        plain = PlainLoop(config, rows, options, ours.accelerator.device)
        tokens = options.steps * options.batch * options.context
        speeds = {"plain": [], "ours": []}
        for number in range(options.rounds + 1):
            for name, loop in (("plain", plain), ("ours", ours)):
                start = time.perf_counter()
                for _ in range(options.steps):
                    done = loop.train_step()
                if loop is ours:
                    done.read()                                          # the device is asked to, and has not made, the last ones
                if number:                                           # the first round warms up
                    speeds[name].append(tokens / (time.perf_counter() - start))
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in (("plain", plain.model), ("ours", ours.module))}
    title = f"{options.preset}, {options.batch} x {options.context} tokens an update, {options.precision}, " \
            f"{torch.get_num_threads()} threads"
    print(table([{"loop": name, "parameters": sizes[name], "tokens/s": round(statistics.median(values)),
                  "least": round(min(values)), "most": round(max(values))} for name, values in speeds.items()], title=title))
    ratios = sorted(o / p for o, p in zip(speeds["ours"], speeds["plain"]))
    print(f"ours / plain: median {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
