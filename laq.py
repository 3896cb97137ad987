"""Stage 1: latent action quantization. Learns S discrete tokens for what happens between frame t and frame t+k.

    python laq.py --data data --mix metaworld_corner4                          # CPU or one GPU
    torchrun --nproc_per_node=4 laq.py --size base --batch-size 256 --dtype bfloat16 --compile     # four GPUs
    sbatch sbatch/laq.sh                                                       # Slurm
    python laq.py --resume runs/laq/last.pt                                    # continue; --export-only: just export
    python laq.py --analyze runs/laq/last.pt                                   # what the tokens mean, on held-out episodes

In: RLDS episodes through data_oxe.py; no action is used for training (unless --action-fraction), only to measure.
Out, in OUT: laq.pt2 (frozen labeller for vla.py), last.pt (to resume), metrics.jsonl, pairs.png, analysis/.

Reconstruction alone learns to copy frame t while the codes carry nothing: PSNR rises, shuffling the codes over the
batch changes nothing. What turns that around: the encoder sees the difference of the frames and is read out patch by
patch, so that its outputs tell pairs apart from the first step; moving pixels weigh more; coarse optical flow is read
linearly from the latents and finely from the decoder; dead codes are re-seeded from encoder outputs. Look at
`psnr_shuffled` and `probe_r2` beside their baselines; PSNR itself says little.

Ideas: LAPA (arXiv 2410.11758), Genie (2402.15391), LAOM (2502.00379: some action labels), VQ-VAE (1711.00937), NSVQ
(Vali and Backstrom 2022), FSQ (2309.15505), DIS (Kroeger et al. 2016), RAFT (2003.12039).
Letters: B batch, S latent tokens, K codes, D code width, P patches, W width, H image height, A action width.
"""
import base64
import copy
import html
import json
import math
import os
import pickle
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data_oxe

SIZES = {   # what --size sets, unless given: patch, width, layers of the ViT; channels of the CNN's first level
    "tiny": dict(image_size=64, patch=8, width=128, layers=2, decoder_layers=2, channels=16),
    "base": dict(image_size=224, patch=16, width=768, layers=12, decoder_layers=6, channels=64),
    "lapa": dict(image_size=256, patch=32, width=1024, layers=16, decoder_layers=8, channels=64)}
FLOW_GRID, SUMMARY = 16, 4                      # cells a side of the flow target, and of what the latents must say linearly


@dataclass
class Config:
    out: str = "runs/laq"
    """Folder for checkpoints, metrics, pictures and hand-over files."""
    data: str = "data"
    """Folder or gs:// bucket with NAME/VERSION datasets."""
    mix: str = "metaworld_corner4"
    """Datasets or mixes with weights, 'a:0.3,b:0.7' or 'oxe29'; `python data_oxe.py list` shows the names."""
    horizon_s: float | None = None
    """Seconds between the two frames; None: each dataset's own."""
    val_fraction: float = 0.1
    """Share of episodes held out for validation."""
    weights: str = "given"
    """Shares of the mix: as 'given' in it, 'equal', or 'proportionate' to the datasets' frames."""
    holdout: str = ""
    """'KEY~REGEX': validate on the episodes whose feature KEY (or 'instruction') matches, instead of --val-fraction."""
    pairs_per_episode: int = 8
    """Samples drawn from an episode each time it is read; 0: all."""
    min_motion: float = 0.0
    """Leaves out pairs whose thumbnails differ by less, mean absolute difference in grey levels; 0: none."""
    shuffle_mb: float = 256.0
    """Encoded pictures held for shuffling; more of them mix more episodes."""
    resize: str = "cpu"
    """Where pictures are resized: 'cpu', or 'gpu' where the CPU cannot keep up."""
    max_bad: float = 0.001
    """Share of bad episodes (unreadable, too short, not finite ...) to skip with a warning before stopping."""
    size: str = "tiny"
    """Preset of the six sizes below: tiny (64 px, for a CPU), base (224 px) or lapa (256 px, as large as LAPA). The larger two
    want --lr 1e-4 --warmup-steps 1000."""
    arch: str = "vit"
    """Encoder and decoder: 'vit' or 'cnn'."""
    image_size: int | None = None
    """Pixels a side."""
    patch: int | None = None
    """Pixels a side of a ViT patch."""
    width: int | None = None
    """Width of the ViT."""
    layers: int | None = None
    """ViT blocks of the encoder."""
    decoder_layers: int | None = None
    """ViT blocks of the decoder."""
    channels: int | None = None
    """Channels of the CNN's first level; its three others have 2, 4 and 8 times as many."""
    quantizer: str = "nsvq"
    """'nsvq' (noise substitution), 'vq' (straight-through) or 'fsq' (finite scalars)."""
    tokens: int = 2
    """S, latent tokens a pair."""
    codes: int = 64
    """K, codes a token."""
    code_dim: int = 256
    """D, width of a code; narrow codes say less to whoever reads them linearly."""
    shared_codebook: bool = False
    """One codebook for all tokens instead of one each (vq, nsvq)."""
    levels: tuple[int, ...] = (8, 8)
    """Levels of fsq's dimensions; their product is K."""
    beta: float = 0.25
    """Weight of the commitment loss (vq, nsvq)."""
    ema: float = 0.0
    """Decay of codes that follow encoder outputs by moving averages instead of the codebook loss (vq), such as 0.99."""
    reseed_every: int = 20
    """Steps between re-seeding codes used less than a quarter of their share from encoder outputs; 0: never."""
    motion_weight: float = 10.0
    """How much more a fully changed pixel weighs than a still one."""
    flow_weight: float = 1.0
    """Weight of predicting optical flow, by the decoder and coarsely by the latents alone; 0: off."""
    flow_warmup: int = 0
    """Steps over which the flow weight rises from 0."""
    flow_teacher: str = "dis"
    """'dis' (OpenCV, no weights) or 'raft' (torchvision and its weights must be there)."""
    features: str = ""
    """Frozen vision model whose features of frame t+k are predicted too, such as facebook/dinov2-small."""
    action_fraction: float = 0.0
    """Share of the episodes with actions whose actions also supervise the latents (LAOM needed 0.025)."""
    shift: int = 4
    """Random shift of training images in pixels; hurts a policy where camera and robot are bolted down."""
    crop: float = 0.0
    """Random zoom: up to this share of the image's side is cut away, the same for both frames."""
    color: float = 0.0
    """Random contrast, and brightness of each channel, by up to this share, the same for both frames."""
    steps: int = 1200
    """Optimizer steps; 0 exports the untrained model, as a control."""
    batch_size: int = 32
    """Samples a step over all processes."""
    micro_batch: int = 0
    """Samples a forward pass on one process, for gradient accumulation; 0: all at once."""
    lr: float = 2e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW weight decay of matrices."""
    grad_clip: float = 1.0
    """Maximum gradient norm."""
    dtype: str = "float32"
    """float32, or bfloat16 autocast."""
    compile: bool = False
    """torch.compile the training step."""
    eval_every: int = 400
    """Steps between validations."""
    eval_batches: int = 16
    """Batches of a validation."""
    save_every: int = 250
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    seed: int = 0
    """Seed of initialization, data order and augmentation."""
    wandb: bool = False
    """Also log to Weights & Biases (WANDB_MODE=offline works)."""
    resume: str = ""
    """Checkpoint last.pt to continue from."""
    export_only: bool = False
    """With --resume: write the hand-over again and stop."""
    analyze: str = ""
    """Checkpoint to analyze instead of training, with its own settings unless given: OUT/analysis/report.html."""


# ---------------------------------------------------------------------------------------------- encoders and decoders
class Block(nn.Module):
    """Pre-norm transformer block that starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // (64 if width > 256 else 32)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):                                                       # (B, P, W)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def patchify(x, p: int):
    """(B, C, H, H) -> (B, P, C*p*p)"""
    return F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)


def unpatchify(x, p: int):
    """(B, P, C*p*p) -> (B, C, sqrt(P)*p, sqrt(P)*p)"""
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]), -1)), p)


def motion(a, b, side: int):
    """How much each cell of a (side, side) grid changed, (B, 1, side, side) in 0..1. Encoders are read out through this
    gate: where nothing moves they see nothing, so all still pairs have the same codes, whatever they show."""
    return torch.tanh(20 * F.adaptive_avg_pool2d((b - a).abs().mean(1, keepdim=True), side))


class ViTEncoder(nn.Module):
    """Frame t and the difference, patch by patch -> latents. Read out from all patches: with blocks that start as the
    identity this is a linear map of the input at first, so outputs differ between pairs; query tokens collapse."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, P, W = cfg, (cfg.image_size // cfg.patch) ** 2, cfg.width
        self.embed, self.place = nn.Linear(6 * cfg.patch ** 2, W), nn.Parameter(0.02 * torch.randn(P, W))
        self.blocks, self.norm = nn.Sequential(*[Block(W) for _ in range(cfg.layers)]), nn.LayerNorm(W)
        self.thin, self.out = nn.Linear(W, 16), nn.Linear(16 * P, cfg.tokens * cfg.code_dim)

    def forward(self, a, b):                                                    # (B, 3, H, H) each
        x = self.embed(patchify(torch.cat([a, 3 * (b - a)], 1), self.cfg.patch)) + self.place      # (B, P, W)
        gate = motion(a, b, math.isqrt(x.shape[1])).flatten(2).transpose(1, 2)  # (B, P, 1)
        x = self.thin(self.norm(self.blocks(x))) * gate                         # (B, P, 16)
        return self.out(x.flatten(1)).unflatten(1, (self.cfg.tokens, -1))       # (B, S, D)


class ViTDecoder(nn.Module):
    """Frame t and the latents, which enter as tokens -> frame t+k, flow, hidden map."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, P, W = cfg, (cfg.image_size // cfg.patch) ** 2, cfg.width
        self.embed, self.token = nn.Linear(3 * cfg.patch ** 2, W), nn.Linear(cfg.code_dim, W)
        self.place = nn.Parameter(0.02 * torch.randn(cfg.tokens + P, W))
        self.blocks, self.norm = nn.Sequential(*[Block(W) for _ in range(cfg.decoder_layers)]), nn.LayerNorm(W)
        self.to_pixels, self.to_flow = nn.Linear(W, 3 * cfg.patch ** 2), nn.Linear(W, 8)
        nn.init.zeros_(self.to_pixels.weight)                                   # starts as a copy of frame t

    def forward(self, a, q):                                                    # (B, 3, H, H), (B, S, D)
        x = torch.cat([self.token(q), self.embed(patchify(a, self.cfg.patch))], 1) + self.place     # (B, S+P, W)
        x = self.norm(self.blocks(x)[:, self.cfg.tokens:])                      # (B, P, W)
        return a + unpatchify(self.to_pixels(x), self.cfg.patch), unpatchify(self.to_flow(x), 2), unpatchify(x, 1)


class Residual(nn.Module):
    """Two convolutions around which the input passes; starts as the identity."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c, 3, 1, 1),
                                  nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c, 3, 1, 1))
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x):
        return x + self.body(x)


def level(i: int, o: int) -> nn.Sequential:
    """Halves the side."""
    return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), Residual(o), Residual(o))


class CNNEncoder(nn.Module):
    """Frame t and the difference -> four levels, 1/16 of the side -> latents, read out from a 4x4 grid."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, widths = cfg, [cfg.channels * m for m in (1, 2, 4, 8)]
        self.levels = nn.Sequential(*[level(i, o) for i, o in zip([6, *widths], widths)])
        self.norm, self.out = nn.GroupNorm(8, widths[3]), nn.Linear(16 * widths[3], cfg.tokens * cfg.code_dim)

    def forward(self, a, b):                                                    # (B, 3, H, H) each
        x = F.silu(self.norm(self.levels(torch.cat([a, 3 * (b - a)], 1))))      # (B, 8c, H/16, H/16)
        x = F.adaptive_avg_pool2d(x * motion(a, b, x.shape[-1]), 4)             # (B, 8c, 4, 4)
        return self.out(x.flatten(1)).unflatten(1, (self.cfg.tokens, -1))       # (B, S, D)


class CNNDecoder(nn.Module):
    """The encoder mirrored, a U-Net over frame t; latents enter at its coarsest level as a map and scale its channels."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, latent = cfg, cfg.tokens * cfg.code_dim
        c = [cfg.channels * m for m in (1, 2, 4, 8)]
        self.down = nn.ModuleList([level(i, o) for i, o in zip([3, *c], c)])
        self.map, self.scale = nn.Linear(latent, 16 * c[2]), nn.Linear(latent, c[3])
        self.up = nn.ModuleList([nn.Sequential(nn.Conv2d(i, o, 3, 1, 1), Residual(o), Residual(o))
                                 for i, o in zip([c[3] + c[2], c[2], c[1], c[0]], [c[2], c[1], c[0], c[0]])])
        self.to_pixels, self.to_flow = nn.Conv2d(c[0], 3, 3, 1, 1), nn.Conv2d(c[1], 2, 3, 1, 1)
        nn.init.zeros_(self.to_pixels.weight)                                   # starts as a copy of frame t

    def forward(self, a, q):                                                    # (B, 3, H, H), (B, S, D)
        skips, z = [a], q.flatten(1)
        for down in self.down:
            skips.append(down(skips[-1]))                                       # (B, c, H/2), ... (B, 8c, H/16)
        x = skips.pop() * (1 + self.scale(z)[..., None, None])
        hidden = torch.cat([x, F.interpolate(self.map(z).unflatten(1, (-1, 4, 4)), x.shape[2:])], 1)
        for i, up in enumerate(self.up):
            hidden = F.interpolate(up(hidden), scale_factor=2)
            if i < 3:
                hidden = hidden + skips.pop()
            if i == 1:
                middle = hidden                                                 # (B, 2c, H/4, H/4)
        return a + torch.tanh(self.to_pixels(hidden)), self.to_flow(middle), middle


# ---------------------------------------------------------------------------------------------- quantizers
def mean_of_ranks(x):
    """Mean of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


class Quantizer(nn.Module):
    """What VQ and FSQ have in common. Nothing changes inside forward: the loop calls observe and reseed.

    forward(z (B, S, D)) -> what the decoder gets (B, S, D), codes (B, S), loss. codes(z) -> nearest codes.
    lookup(codes) -> vectors (B, S, D). codebook() -> (S, K, D).
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("usage", torch.full((cfg.tokens, cfg.codes), 1.0 / cfg.codes))     # running share of each code

    def lookup(self, codes):
        return self.codebook()[torch.arange(self.cfg.tokens, device=codes.device), codes]

    @torch.no_grad()
    def observe(self, z, codes):
        """Follows the share of each code over all processes."""
        self.usage.lerp_(mean_of_ranks(F.one_hot(codes, self.cfg.codes).float().mean(0)), 0.05)

    def reseed(self, z, everything: bool = False) -> int:
        return 0


class VQ(Quantizer):
    """Nearest code of a codebook for each token. `nsvq`: noise as long as the quantization error takes its place in
    training, so that no gradient is copied past the rounding (Vali and Backstrom 2022)."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        books, K, D = 1 if cfg.shared_codebook else cfg.tokens, cfg.codes, cfg.code_dim
        self.books = nn.Parameter(torch.randn(books, K, D), requires_grad=not cfg.ema)
        self.register_buffer("shares", torch.full((books, K), 1.0 / K))         # running, for ema: of each code,
        self.register_buffer("sums", torch.zeros(books, K, D))                  # and of its encoder outputs times share

    def codebook(self):
        return self.books.expand(self.cfg.tokens, -1, -1)                       # (S, K, D)

    def codes(self, z):
        book = self.codebook()
        dot = torch.einsum("bsd,skd->bsk", z, book)
        return (book.square().sum(-1) - 2 * dot).argmin(-1)                     # (B, S)

    def forward(self, z):
        codes = self.codes(z)
        q = self.lookup(codes)
        loss = self.cfg.beta * F.mse_loss(z, q.detach())
        if self.cfg.quantizer == "nsvq":
            noise = torch.randn_like(z)
            return z + noise * ((z - q).norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)), codes, loss
        return z + (q - z).detach(), codes, loss + (0 if self.cfg.ema else F.mse_loss(q, z.detach()))

    @torch.no_grad()
    def observe(self, z, codes):
        """With `ema` also moves the codes towards the mean of their encoder outputs."""
        super().observe(z, codes)
        if self.cfg.ema:
            hot = F.one_hot(codes, self.cfg.codes).float()                      # (B, S, K)
            shares, sums = mean_of_ranks(hot.mean(0)), mean_of_ranks(torch.einsum("bsk,bsd->skd", hot, z) / len(z))
            if self.cfg.shared_codebook:
                shares, sums = shares.mean(0, keepdim=True), sums.mean(0, keepdim=True)
            self.shares.lerp_(shares, 1 - self.cfg.ema)
            self.sums.lerp_(sums, 1 - self.cfg.ema)
            self.books.copy_(self.sums / self.shares.clamp(min=1e-6)[..., None])

    @torch.no_grad()
    def reseed(self, z, everything: bool = False) -> int:
        """Moves codes used less than a quarter of their share onto encoder outputs z (B, S, D), rank 0's on every rank; an
        output seeds one code at most, so that with few outputs some codes wait for the next time."""
        S, K, shared, moved = self.cfg.tokens, self.cfg.codes, self.cfg.shared_codebook, 0
        dead = ((self.usage.mean(0, keepdim=True) if shared else self.usage) < 0.25 / K) | everything    # (books, K)
        order = torch.randperm(len(z)).to(z.device)
        for s, book in enumerate(dead):
            k = book.nonzero().flatten()[:len(z)]
            self.books[s, k] = z[order[:len(k)], k % S if shared else s]
            self.usage[slice(None) if shared else s, k] = self.shares[s, k] = 1.0 / K
            self.sums[s, k] = self.books[s, k] / K
            moved += len(k)
        if dist.is_initialized():
            for x in (self.books.data, self.sums):
                dist.broadcast(x, 0)
        return moved


class FSQ(Quantizer):
    """Each token is projected to a few dimensions that are bounded and rounded to fixed levels (arXiv 2309.15505); all
    combinations of levels are the K codes. Projections are standardized by their running mean and deviation, so that all
    levels stay in use wherever the encoder's outputs lie: there is nothing to re-seed."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.down = nn.Parameter(torch.randn(cfg.tokens, cfg.code_dim, len(cfg.levels)))
        self.up = nn.Parameter(torch.randn(cfg.tokens, len(cfg.levels), cfg.code_dim))
        self.register_buffer("center", torch.zeros(cfg.tokens, len(cfg.levels)))
        self.register_buffer("deviation", torch.ones(cfg.tokens, len(cfg.levels)))
        grids = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in cfg.levels], indexing="ij")
        self.register_buffer("levels", torch.tensor(cfg.levels) - 1.0)
        self.register_buffer("grid", torch.stack(grids, -1).flatten(0, -2))     # (K, levels)
        self.register_buffer("places", torch.tensor([math.prod(cfg.levels[i + 1:]) for i in range(len(cfg.levels))]))

    def codebook(self):
        return torch.einsum("kl,sld->skd", self.grid, self.up)                  # (S, K, D)

    def project(self, z):
        return torch.einsum("bsd,sdl->bsl", z, self.down)

    def levels_of(self, z):
        """-> bounded (B, S, levels) in -1..1, and the index of the nearest level."""
        y = torch.tanh((self.project(z) - self.center) / self.deviation)
        return y, ((y + 1) / 2 * self.levels).round()

    def codes(self, z):
        return (self.levels_of(z)[1].long() * self.places).sum(-1)              # row of the grid

    def forward(self, z):
        y, index = self.levels_of(z)
        y = y + (index / self.levels * 2 - 1 - y).detach()
        return torch.einsum("bsl,sld->bsd", y, self.up), (index.long() * self.places).sum(-1), z.new_zeros(())

    @torch.no_grad()
    def observe(self, z, codes, rate: float = 0.05):
        super().observe(z, codes)
        x = self.project(z)
        self.center.lerp_(mean_of_ranks(x.mean(0)), rate)
        variance = mean_of_ranks((x - self.center).square().mean(0))
        self.deviation.copy_(self.deviation.square().lerp(variance, rate).sqrt().clamp(min=1e-4))

    @torch.no_grad()
    def reseed(self, z, everything: bool = False) -> int:
        if everything:
            self.observe(z, self.codes(z), 1.0)
        return 0


# ---------------------------------------------------------------------------------------------- model
class LAQ(nn.Module):
    """Encoder of a frame pair, quantizer, decoder conditioned on frame t.

    encode(frames uint8 (B, 2, H, H, 3)) -> (codes int64 (B, S), vectors float32 (B, S, D))
    forward(frames, flow (B, 2, 16, 16), targets) -> loss, parts, z, codes: what a training step needs
    """

    def __init__(self, cfg: Config, feature_dim: int = 0, action_dim: int = 0, datasets: int = 1):
        super().__init__()
        self.cfg, vit, latent = cfg, cfg.arch == "vit", cfg.tokens * cfg.code_dim
        self.encoder, self.decoder = (ViTEncoder(cfg), ViTDecoder(cfg)) if vit else (CNNEncoder(cfg), CNNDecoder(cfg))
        self.quantizer = FSQ(cfg) if cfg.quantizer == "fsq" else VQ(cfg)
        self.to_summary = nn.Linear(latent, 2 * SUMMARY ** 2)
        if cfg.action_fraction:
            self.to_action = nn.Linear(latent, datasets * action_dim)
            self.register_buffer("action_scale", torch.ones(datasets, 2, action_dim))               # mean, 1/std
        if feature_dim:
            self.to_features = nn.Conv2d(cfg.width if vit else 2 * cfg.channels, feature_dim, 1)

    def features(self, frames):
        """-> unquantized z (B, S, D), each token of unit variance."""
        z = self.encoder(*self.to_float(frames).unbind(1))                      # (B, S, D)
        return F.layer_norm(z.float(), (self.cfg.code_dim,))

    def encode(self, frames):
        codes = self.quantizer.codes(self.features(frames))
        return codes, self.quantizer.lookup(codes)

    @staticmethod
    def to_float(frames):
        """uint8 (B, 2, H, H, 3) -> float (B, 2, 3, H, H) in -0.5..0.5."""
        return frames.permute(0, 1, 4, 2, 3).float() / 255 - 0.5

    def forward(self, frames, flow, flow_weight: float, features=None, actions=None):
        """features: of frame t+k (B, F, h, w). actions: (values (B, A), dataset (B,), labelled bool (B,))."""
        cfg = self.cfg
        a, b = self.to_float(frames).unbind(1)                                  # (B, 3, H, H) each
        z = self.features(frames)                                               # (B, S, D)
        with torch.autocast(z.device.type, enabled=False):                      # nearest codes need all digits
            latent, codes, quantizer_loss = self.quantizer(z)
        pred, pred_flow, hidden = self.decoder(a, latent)
        moved = F.avg_pool2d((b - a).abs().amax(1, keepdim=True), 5, 1, 2)      # (B, 1, H, H) in 0..1
        weight = 1 + cfg.motion_weight * (4 * moved).clamp(max=1)
        weight = weight / weight.mean((1, 2, 3), keepdim=True)                  # samples count alike, in any batch
        summary = F.adaptive_avg_pool2d(flow, SUMMARY).flatten(1)               # (B, 2*4*4)
        parts = {"pixel": (weight * (pred - b).abs()).mean(), "quantizer": quantizer_loss,
                 "flow": (F.adaptive_avg_pool2d(pred_flow, FLOW_GRID) - flow).abs().mean(),
                 "summary": (self.to_summary(latent.flatten(1)) - 4 * summary).abs().mean()}
        loss = 10 * parts["pixel"] + quantizer_loss + flow_weight * (parts["flow"] + 2 * parts["summary"])
        if features is not None:
            got = F.interpolate(self.to_features(hidden), features.shape[2:], mode="bilinear")
            parts["features"] = 1 - F.cosine_similarity(got, features, 1).mean()
            loss = loss + parts["features"]
        if actions is not None:
            values, dataset, labelled = actions
            mean, scale = self.action_scale[dataset].unbind(1)                  # (B, A) each
            got = self.to_action(latent.flatten(1)).unflatten(1, (len(self.action_scale), -1))
            got = got[torch.arange(len(got), device=got.device), dataset]
            error = (got - (values - mean) * scale).square().mean(1)
            parts["action"] = (error * labelled).mean()
            loss = loss + parts["action"] / cfg.action_fraction
        return loss, {k: v.detach() for k, v in parts.items()}, z.detach(), codes


# ---------------------------------------------------------------------------------------------- flow and augmentation
def optical_flow(frames, workers: ThreadPoolExecutor | None = None) -> np.ndarray:
    """DIS optical flow of uint8 pairs, (B, 2, H, W, 3) or a list of (2, H, W, 3), computed at 128 pixels a side at most:
    float32 (B, 2, 16, 16), in cells of that grid."""
    def one(pair):
        side = min(128, pair.shape[1])
        a, b = (cv2.resize(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), (side, side), interpolation=cv2.INTER_AREA) for x in pair)
        flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(a, b, None)
        return cv2.resize(flow, (FLOW_GRID, FLOW_GRID), interpolation=cv2.INTER_AREA) * (FLOW_GRID / side)
    return np.stack(list((workers.map if workers else map)(one, frames))).transpose(0, 3, 1, 2)


def load_raft(device):
    """-> fn(frames uint8 (B, 2, H, H, 3)) -> flow as optical_flow gives it, by torchvision's small RAFT."""
    try:
        from torchvision.models.optical_flow import Raft_Small_Weights, raft_small
        net = raft_small(weights=Raft_Small_Weights.DEFAULT).eval().requires_grad_(False).to(device)
    except Exception as e:                                                      # no torchvision, no weights, no network
        fail(f"--flow-teacher raft needs torchvision and its RAFT weights ({type(e).__name__}: {str(e).splitlines()[0]}); "
             f"install the torchvision of this torch, or take dis")

    @torch.no_grad()
    def flow(frames):
        a, b = (F.interpolate(x, (128, 128), mode="bilinear", antialias=True) for x in (2 * LAQ.to_float(frames)).unbind(1))
        return F.adaptive_avg_pool2d(net(a, b, num_flow_updates=6)[-1], FLOW_GRID) * (FLOW_GRID / 128)
    return flow


def load_features(name: str, device):
    """-> (fn(images uint8 (B, H, H, 3)) -> features (B, F, h, w), F) of a frozen DINOv2, SigLIP or another ViT."""
    from transformers import AutoModel
    try:
        net = AutoModel.from_pretrained(name)
    except (OSError, ValueError) as e:
        fail(f"--features '{name}': no such model in transformers' cache or on the hub ({str(e).splitlines()[0]})")
    net = getattr(net, "vision_model", net).eval().requires_grad_(False).to(device)
    side = net.config.image_size
    mean, std = ((0.5, 0.5) if "siglip" in net.config.model_type else
                 (torch.tensor(x, device=device)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))))

    @torch.no_grad()
    def features(images):
        x = F.interpolate(images.permute(0, 3, 1, 2).float() / 255, (side, side), mode="bilinear", antialias=True)
        x = net(pixel_values=(x - mean) / std).last_hidden_state
        grid = (side // net.config.patch_size) ** 2
        return unpatchify(x[:, x.shape[1] - grid:], 1)                          # without class and register tokens
    return features, net.config.hidden_size


def augment(frames: torch.Tensor, flow: torch.Tensor, cfg: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random zoom, shift and colours on both frames of a pair, and on its flow."""
    B, H, device = len(frames), frames.shape[2], frames.device
    u = torch.rand(B, 7, device=device)
    if cfg.shift or cfg.crop:
        zoom = 1 - cfg.crop * u[:, 0]                                           # share of the side that is kept
        reach = (1 - zoom[:, None]) + 2 * cfg.shift / H
        theta = torch.zeros(B, 2, 3, device=device)
        theta[:, 0, 0] = theta[:, 1, 1] = zoom
        theta[:, :, 2] = reach * (2 * u[:, 1:3] - 1)
        if not cfg.crop:                                                        # whole pixels stay sharp
            theta[:, :, 2] = (theta[:, :, 2] * H / 2).round() * 2 / H

        def sample(x):                                                          # (B, C, h, w)
            grid = F.affine_grid(theta, x.shape, align_corners=False)
            return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        x = frames.permute(0, 1, 4, 2, 3).flatten(1, 2).float()                 # (B, 6, H, H)
        frames = sample(x).round().to(torch.uint8).unflatten(1, (2, 3)).permute(0, 1, 3, 4, 2)
        flow = sample(flow) / zoom[:, None, None, None]
    if cfg.color:
        gain, bias = 1 + cfg.color * (2 * u[:, 3:4] - 1), 128 * cfg.color * (2 * u[:, 4:7] - 1)
        x = (frames.float() - 128) * gain[:, :, None, None, None] + 128 + bias[:, None, None, None]
        frames = x.round().clamp(0, 255).to(torch.uint8)
    return frames, flow


# ---------------------------------------------------------------------------------------------- shared by the stages
def fail(message: str):
    """A user's error: one line, exit code 1, no traceback."""
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {message}")


def setup(cfg) -> tuple[int, int, torch.device]:
    """Joins torchrun's process group if there is one; checks what all stages share. -> rank, world size, device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for name in ("batch_size", "eval_every", "eval_batches", "save_every", "log_every"):
        if getattr(cfg, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be at least 1")
    if cfg.batch_size % world:
        fail(f"--batch-size {cfg.batch_size} is not divisible by the {world} processes; "
             f"{cfg.batch_size // world * world or world} would be")
    if cfg.micro_batch and cfg.batch_size // world % cfg.micro_batch:
        fail(f"--micro-batch {cfg.micro_batch} does not divide the {cfg.batch_size // world} samples a process")
    if cfg.dtype not in ("float32", "bfloat16"):
        fail(f"--dtype '{cfg.dtype}' is neither float32 nor bfloat16")
    if cfg.resume and not Path(cfg.resume).is_file():
        fail(f"no checkpoint at --resume '{cfg.resume}'")
    if cfg.export_only and not cfg.resume:
        fail("--export-only needs --resume CHECKPOINT")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(cfg.seed)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    return rank, world, device


def leave(code: int):
    """Ends the process; under torchrun without destructors: gloo's joins threads that may wait for the GIL that it holds."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def lr_at(cfg, step: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to min_lr."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(cfg, model: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def save_checkpoint(cfg, step: int, model: nn.Module, optimizer, loader):
    """OUT/last.pt, written under another name first; all ranks call it, as each has its own place in the data.
    Randomness is a function of (seed, step): no RNG state is kept."""
    data = [loader.state_dict()]
    if dist.is_initialized():
        data = data * dist.get_world_size()
        dist.all_gather_object(data, loader.state_dict())
        if dist.get_rank() > 0:
            return
    partial = Path(cfg.out) / ".last.pt.partial"
    torch.save({"step": step, "config": asdict(cfg), "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "data": data}, partial)
    partial.rename(Path(cfg.out) / "last.pt")


def load_checkpoint(cfg, model: nn.Module, optimizer, loader) -> int:
    """Restores all of save_checkpoint. Exits, naming the fields, when the run would not be the same. -> step"""
    try:
        state = torch.load(cfg.resume, map_location="cpu", weights_only=True)
        stored = state["config"]
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as e:
        fail(f"--resume '{cfg.resume}' is not a checkpoint of this script ({type(e).__name__}); give OUT/last.pt")
    free = {"out", "data", "max_bad", "resume", "export_only", "wandb", "eval_every", "save_every", "log_every", "compile"}
    differ = [f"{f.name} was {stored.get(f.name)!r}, is {getattr(cfg, f.name)!r}" for f in fields(cfg)
              if f.name not in free and stored.get(f.name) != getattr(cfg, f.name)]
    if differ:
        fail(f"--resume '{cfg.resume}' is of another run: {'; '.join(differ)}")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(state["data"]) != world and not cfg.export_only:
        fail(f"--resume '{cfg.resume}' was saved by {len(state['data'])} processes, these are {world}: start as many")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if not cfg.export_only:
        loader.load_state_dict(state["data"][rank])
    return state["step"]


class Logger:
    """metrics.jsonl, Weights & Biases, progress bar; silent but on rank 0. Lines after a resumed step are dropped."""

    def __init__(self, cfg, rank: int, start: int):
        self.on, self.path, self.wandb = rank == 0, Path(cfg.out) / "metrics.jsonl", None
        if not self.on:
            return
        kept = [x for x in self.path.read_text().splitlines() if json.loads(x)["step"] < start] \
            if start and self.path.exists() else []
        self.path.write_text("".join(x + "\n" for x in kept))
        if cfg.wandb:
            import wandb
            self.wandb = wandb.init(project="nanolapa", name=Path(cfg.out).name, dir=cfg.out, config=asdict(cfg))
        self.bar = tqdm(total=cfg.steps, initial=start, desc=Path(cfg.out).name, unit="step", mininterval=2)

    def log(self, step: int, show: dict, **values):
        """Writes `values` and shows `show` in the bar."""
        if not self.on:
            return
        values = {k: float(v) for k, v in values.items()}
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)
        self.bar.set_postfix({k: f"{float(v):.3g}" for k, v in show.items()}, refresh=False)

    def print(self, text: str):
        if self.on:
            self.bar.write(text)

    def close(self):
        if self.on:
            self.bar.close()
            if self.wandb:
                self.wandb.finish()


class StopFlag:
    """Ctrl-C and SIGTERM ask for a checkpoint at the next step, on all ranks at once; a second signal kills."""

    def __init__(self):
        self.received = self.signal = 0                 # by this process; agreed on by all of them
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.catch)

    def catch(self, number, frame):
        if self.received:
            raise SystemExit(128 + number)
        self.received = number

    def __call__(self, device) -> bool:
        flag = torch.tensor(self.received, device=device)
        if dist.is_initialized():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.signal = int(flag)
        return bool(self.signal)


def step_seed(cfg, step: int, rank: int, world: int):
    """All randomness of a step is a function of (seed, step, rank), so that a resumed run equals an unbroken one."""
    torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)


# ---------------------------------------------------------------------------------------------- evaluation
def ridge(x, y, x_val, alpha: float = 1e-2) -> np.ndarray:
    """Ridge regression of y (N, m) on x (N, n), both standardized -> predictions for x_val, float64."""
    x, y, x_val = (np.asarray(v, np.float64) for v in (x, y, x_val))
    m, s, mean = x.mean(0), x.std(0) + 1e-8, y.mean(0)
    x, x_val = (x - m) / s, (x_val - m) / s
    return mean + x_val @ np.linalg.solve(x.T @ x + alpha * len(x) * np.eye(x.shape[1]), x.T @ (y - mean))


def r2(pred, y) -> np.ndarray:
    """Explained share of the variance of each column of y."""
    return 1 - ((y - pred) ** 2).mean(0) / y.var(0).clip(1e-12)


def spread(y):
    """Columns of y in units of their standard deviation."""
    return (y - y.mean(0)) / y.std(0).clip(1e-6)


def ssim(x, y):
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, H) of range 1, 7x7 windows -> (B,)."""
    mean = lambda v: F.avg_pool2d(v, 7, 1)
    mx, my = mean(x), mean(y)
    vx, vy, c = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    value = (2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4))
    return value.mean((1, 2, 3))


def weighted_flow(flow: np.ndarray) -> np.ndarray:
    """Flow fields (N, 2, h, w) -> their mean weighted by magnitude, (N, 2): which way the moving parts move."""
    magnitude = np.linalg.norm(flow, axis=1, keepdims=True) + 1e-6
    return (flow * magnitude).sum((2, 3)) / magnitude.sum((2, 3))


@torch.no_grad()
def collect(model: LAQ, control: LAQ, cfg: Config, loader, device, decode: bool = True, keep: bool = False) -> dict:
    """What metrics and pictures need of a loader's first batches: arrays over N samples. "mse" (N, 4): of the prediction,
    with another sample's codes, with the tokens' codes in reverse, and of frame t; "ssim" (N, 2): prediction, frame t;
    "frames" with `keep`."""
    out, motion = {}, loader.motion_dims
    model.eval()
    for batch in loader.first(cfg.eval_batches):
        frames = data_oxe.to_device(batch, device, cfg.image_size)["frames"]
        codes, q = model.encode(frames)
        a, b = model.to_float(frames).unbind(1)
        row = dict(codes=codes, vectors=q.flatten(1), control=control.encode(frames)[1].flatten(1),
                   difference=(b - a).mean((2, 3)), pooled=F.adaptive_avg_pool2d(b - a, 8).flatten(1))
        if decode:
            pictures = [model.decoder(a, x)[0] for x in (q, q.roll(1, 0), q.flip(1))] + [a]
            row |= dict(still=model.encode(torch.stack([frames[:, 0]] * 2, 1))[0],
                        mse=torch.stack([(x - b).square().mean((1, 2, 3)) for x in pictures], 1),
                        ssim=torch.stack([ssim(x + 0.5, b + 0.5) for x in (pictures[0], a)], 1))
        if keep:
            row["frames"] = frames
        flow = optical_flow(frames.cpu().numpy())
        row = {**{k: v.cpu().numpy() for k, v in row.items()}, "mean_flow": flow.mean((2, 3)), "flow": weighted_flow(flow),
               "instruction": np.array(batch["instruction"], object), "motion": batch["action_sum"][:, motion],
               **{k: batch[k] for k in ("dataset", "episode", "state")}}
        for k, v in row.items():
            out.setdefault(k, []).append(v)
    model.train()
    return {k: np.concatenate(v) for k, v in out.items()}


def entropy(codes, K: int) -> np.ndarray:
    """Of each token's codes (N, S), in nats: (S,)"""
    share = np.stack([np.bincount(c, minlength=K) for c in codes.T]) / max(1, len(codes))
    return -(share * np.log(share.clip(1e-12))).sum(1)


def varying(*samples: dict) -> np.ndarray:
    """Which action columns can be probed: those that vary in all of the samples, none where one has under 8. bool (m,)"""
    if min(len(x["motion"]) for x in samples) < 8:
        return np.zeros(samples[0]["motion"].shape[1], bool)
    return np.all([x["motion"].std(0) > 1e-6 for x in samples], 0)


PROBES = {"": "vectors", "_random_quantizer": "control", "_pixel_difference": "difference", "_mean_flow": "mean_flow",
          "_pooled_difference": "pooled"}


def metrics_of(fit: dict, val: dict, cfg: Config) -> dict:
    """Metrics of one dataset's samples as collect gives them; probes are fitted on `fit`, of training episodes. The pooled
    difference is 192 unquantized numbers, far more than S*log2(K) bits can carry: a ceiling more than a baseline."""
    psnr = -10 * np.log10(val["mse"].mean(0))
    h, sequence = entropy(val["codes"], cfg.codes), np.unique(val["codes"], axis=0, return_inverse=True)[1].reshape(-1, 1)
    still, n = np.unique(val["still"], axis=0, return_counts=True)
    own, size = (val["codes"] == still[n.argmax()]).all(1), np.abs(val["difference"]).mean(1)
    m = {"psnr": psnr[0], "psnr_shuffled": psnr[1], "psnr_reversed": psnr[2], "psnr_copy": psnr[3],
         "ssim": val["ssim"][:, 0].mean(), "ssim_copy": val["ssim"][:, 1].mean(),
         "codes_used": np.mean([len(set(c)) for c in val["codes"].T]) / cfg.codes, "perplexity": np.exp(h).mean(),
         **{f"entropy_{i}": v for i, v in enumerate(h)}, "entropy_joint": entropy(sequence, sequence.max() + 1)[0],
         "still_same": n.max() / n.sum(), "still_elsewhere": own.mean(),
         "still_elsewhere_motion": size[own].mean() / size.mean() if own.any() else 0.0}
    moving = varying(fit, val)
    if moving.any():
        y, y_val = fit["motion"][:, moving], val["motion"][:, moving]
        for name, key in PROBES.items():
            pred = ridge(fit[key], y, val[key])
            m |= {f"probe_r2{name}": r2(pred, y_val).mean(), f"probe_mse{name}": ((pred - y_val) ** 2).mean()}
            m |= {f"probe_r2_{i}": v for i, v in enumerate(r2(pred, y_val))} if not name else {}
    return m


def evaluate(model: LAQ, control: LAQ, cfg: Config, val_loader, probe_loader, device) -> dict:
    """Metrics on held-out episodes, mean over datasets and, if several, of each as NAME/metric."""
    fit = collect(model, control, cfg, probe_loader, device, decode=False)
    val = collect(model, control, cfg, val_loader, device)
    each = {}
    for i, name in enumerate(val_loader.names):
        rows = [{k: v[x["dataset"] == i] for k, v in x.items()} for x in (fit, val)]
        if len(rows[1]["dataset"]):
            each[name] = metrics_of(*rows, cfg)
    keys = dict.fromkeys(k for m in each.values() for k in m)
    mean = {k: np.mean([m[k] for m in each.values() if k in m]) for k in keys}
    return mean | ({f"{n}/{k}": v for n, m in each.items() for k, v in m.items()} if len(each) > 1 else {})


def describe(m: dict, cfg: Config) -> str:
    probe = f"probe R2 {m['probe_r2']:.2f} (random quantizer {m['probe_r2_random_quantizer']:.2f}, pixel difference " \
            f"{m['probe_r2_pixel_difference']:.2f}, mean flow {m['probe_r2_mean_flow']:.2f})" if "probe_r2" in m else "no actions"
    return (f"psnr {m['psnr']:.2f} dB (copy frame t {m['psnr_copy']:.2f}, codes shuffled {m['psnr_shuffled']:.2f}) | "
            f"codes used {m['codes_used']:.0%}, perplexity {m['perplexity']:.1f} of {cfg.codes} | {probe}")


@torch.no_grad()
def picture(model: LAQ, cfg: Config, val_loader, device, columns: int = 8):
    """OUT/pairs.png: held-out pairs, predictions, and frame t under the codes of the next column's pair."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    frames = data_oxe.to_device(next(val_loader.first(1)), device, cfg.image_size)["frames"][:columns]
    codes, q = model.encode(frames)
    a, b = model.to_float(frames).unbind(1)
    rows = {"frame t": a, "true t+k": b, "predicted": model.decoder(a, q)[0],
            "codes of the\nnext column": model.decoder(a, q.roll(-1, 0))[0]}
    fig, axes = plt.subplots(4, len(frames), figsize=(1.3 * len(frames) + 1, 5.6), squeeze=False)
    for line, (label, images) in zip(axes, rows.items()):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for ax, x in zip(line, images):
            ax.imshow((x.permute(1, 2, 0).float().cpu().numpy() + 0.5).clip(0, 1))
            ax.set(xticks=[], yticks=[])
    for ax, c in zip(axes[0], codes.tolist()):
        ax.set_title(" ".join(map(str, c)), fontsize=8)
    fig.tight_layout(h_pad=0.2, w_pad=0.2)
    fig.savefig(Path(cfg.out) / "pairs.png", dpi=90)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------- analysis
def nmi(x, y) -> float:
    """Normalized mutual information of two labelings (N,)."""
    table = np.zeros((x.max() + 1, y.max() + 1))
    np.add.at(table, (x, y), 1 / len(x))
    px, py = table.sum(1, keepdims=True), table.sum(0, keepdims=True)
    h = [-(p * np.log(p.clip(1e-12))).sum() for p in (px, py)]
    return (table * np.log(table.clip(1e-12) / (px * py).clip(1e-12))).sum() / max(1e-12, math.sqrt(h[0] * h[1]))


def cosine(x, y):
    """Of rows (N, n): (N,)"""
    return (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)).clip(1e-9)


def more_metrics(fit: dict, val: dict, cfg: Config, rng) -> dict:
    """What --analyze adds to metrics_of for one dataset."""
    text = np.unique(val["instruction"].astype(str), return_inverse=True)[1]
    mean_nmi = lambda labels: np.mean([nmi(labels, c) for c in val["codes"].T])
    m = {"nmi_instruction": mean_nmi(text), "nmi_instruction_shuffled": mean_nmi(rng.permutation(text))}
    moving = varying(fit, val)
    if not moving.any():
        return m
    y, y_val = fit["motion"][:, moving], val["motion"][:, moving]
    length, length_val = np.linalg.norm(y, axis=1), np.linalg.norm(y_val, axis=1)
    movers = length_val > np.median(length)
    pred, bits = ridge(fit["vectors"], y, val["vectors"]), y_val[:, :3] > np.median(y[:, :3], 0)
    cell, h = (bits * 2 ** np.arange(bits.shape[1])).sum(1), entropy(val["codes"], cfg.codes).mean()
    given = sum((cell == c).mean() * entropy(val["codes"][cell == c], cfg.codes).mean() for c in set(cell))
    return m | {"token_entropy": h, "token_entropy_given_action_octant": given,
                "probe_direction_cosine": cosine(pred, y_val)[movers].mean(),
                "probe_direction_cosine_of_mean": cosine(y.mean(0, keepdims=True), y_val)[movers].mean(),
                "probe_r2_magnitude": r2(ridge(fit["vectors"], length[:, None], val["vectors"]), length_val[:, None]).mean()}


@torch.no_grad()
def transfers(model: LAQ, a_frames, b_frames, a_flow) -> tuple[torch.Tensor, np.ndarray]:
    """Codes of pairs A applied to frames B -> the pictures, and the cosine of their flow with A's, for the half of A that
    moves most."""
    pred = torch.cat([model.decoder(model.to_float(b[:, :1])[:, 0], model.encode(a)[1])[0]
                      for a, b in zip(a_frames.split(64), b_frames.split(64))])
    after = ((pred + 0.5) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    flow = weighted_flow(optical_flow(torch.stack([b_frames[:, 0], after], 1).cpu().numpy()))
    size = np.linalg.norm(a_flow, axis=1)
    return after, cosine(flow, a_flow)[size >= np.median(size)]


def analyze(cfg: Config):
    """OUT/analysis: report.html with all figures inside, the figures as PNG, metrics.json. Held-out episodes, samples drawn
    by (seed, step). The tokens looked at closely are chosen once: the commonest codes of the most varied position."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    check(cfg)
    device = setup(cfg)[2]
    state = torch.load(cfg.analyze, map_location="cpu", weights_only=True)
    fit_loader, val_loader = (make_loader(cfg, x, 64, 1000 * cfg.seed + state["step"], 64) for x in ("train", "val"))
    weights = {k: v for k, v in state["model"].items() if not k.startswith(("to_action", "to_features", "action_scale"))}
    torch.manual_seed(cfg.seed)
    model, control = LAQ(cfg).to(device), LAQ(cfg).to(device)
    model.load_state_dict({**model.state_dict(), **weights})                    # all but the heads that only training needs
    seed_codebooks([control], cfg, fit_loader, device)
    print(f"reading and labelling {2 * cfg.eval_batches * 64} pairs ...")
    fit = collect(model, control, cfg, fit_loader, device, decode=False)
    val = collect(model, control, cfg, val_loader, device, keep=True)
    frames = torch.from_numpy(val.pop("frames")).to(device)
    names, rng, S, K = val_loader.names, np.random.default_rng(state["step"]), cfg.tokens, cfg.codes
    of = [np.flatnonzero(val["dataset"] == i) for i in range(len(names))]
    pick = lambda x, rows: {k: v[rows] for k, v in x.items()}
    fits = [pick(fit, fit["dataset"] == i) for i in range(len(names))]
    metrics = {n: metrics_of(fits[i], pick(val, of[i]), cfg) | more_metrics(fits[i], pick(val, of[i]), cfg, rng)
               for i, n in enumerate(names) if len(of[i])}
    for i, n in [(i, n) for i, n in enumerate(names) if n in metrics]:          # codes of A on frames of every dataset
        for j, other in [(j, other) for j, other in enumerate(names) if other in metrics]:
            rows = rng.choice(of[j], len(of[i]))
            cosines = transfers(model, frames[of[i]], frames[rows], val["flow"][of[i]])[1]
            metrics[n][f"transfer_cosine_to_{other}"] = cosines.mean()
        others = [f for k, f in enumerate(fits) if k != i and varying(f).any()]
        if others and "probe_r2" in metrics[n]:                                 # in units of each dataset's spread
            x, y = (np.concatenate([f(o) for o in others]) for f in (lambda o: o["vectors"], lambda o: spread(o["motion"])))
            y_val = spread(val["motion"][of[i]])
            moving = y_val.std(0) > 0.5                                         # 1, or 0 where this dataset has no such action
            metrics[n]["probe_r2_left_out"] = r2(ridge(x, y, val["vectors"][of[i]]), y_val)[moving].mean()
    position = int(entropy(val["codes"], K).argmax())
    code = val["codes"][:, position]
    inspected = [k for k in np.bincount(code, minlength=K).argsort()[::-1][:6] if (code == k).any()]
    plt.rcParams["axes.titlesize"] = 8
    color = plt.get_cmap("tab20" if K > 10 else "tab10")
    colors = color(np.arange(K) % color.N)
    flow = val["flow"] - np.array([val["flow"][o].mean(0) if len(o) else [0, 0] for o in of])[val["dataset"]]
    arrows = np.array([[flow[o][code[o] == k].mean(0) if (code[o] == k).any() else [np.nan] * 2 for k in range(K)] for o in of])
    within = np.mean([flow[code == k].var(0).sum() for k in set(code)])
    unit = arrows / np.linalg.norm(arrows, axis=2, keepdims=True).clip(1e-9)
    consistency = {"within_token_variance": within, "flow_variance": flow.var(0).sum()}
    if len(names) > 1:
        turn = [np.nanmean(np.degrees(np.arccos((unit[i] * unit[j]).sum(1).clip(-1, 1))))
                for i in range(len(names)) for j in range(i)]
        consistency |= {"across_dataset_variance": np.nanmean(np.nanvar(arrows, 0).sum(-1)), "mean_angle_degrees": np.mean(turn)}
    folder, made = Path(cfg.out) / "analysis", {}
    folder.mkdir(parents=True, exist_ok=True)

    def figure(name: str, title: str, rows: int, columns: int, draw, w: float = 2.6, h: float = 0):
        fig, axes = plt.subplots(rows, columns, figsize=(w * columns, (h or w) * rows), squeeze=False)
        draw(axes)
        fig.tight_layout()
        fig.savefig(folder / f"{name}.png", dpi=80)
        plt.close(fig)
        made[name] = title

    def image(ax, x, title=""):
        ax.imshow(x.cpu().numpy())
        ax.set(xticks=[], yticks=[], title=title)

    def scatter(axes):
        for line, o, n in zip(axes, of, names):
            for ax, key, title in zip(line, ("flow", "motion", "state"), (f"{n}: mean flow", "action", "state")):
                if val[key].shape[1] > 1:
                    ax.scatter(*val[key][o, :2].T, c=color(code[o] % color.N), s=4)
                ax.set(title=title)

    def compass(axes):
        reach = np.nanmax(np.abs(arrows)) * 1.1
        for ax, arrow, n in zip(axes.flat, arrows, names):
            ax.quiver(*np.zeros((2, K)), arrow[:, 0], -arrow[:, 1], color=colors, angles="xy", scale_units="xy", scale=1)
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=n)

    def usage(axes):
        shares = [np.stack([np.bincount(c, minlength=K) for c in val["codes"][o].T]).ravel() / max(1, len(o)) for o in of]
        axes[0, 0].imshow(np.array(shares), aspect="auto")
        axes[0, 0].set(yticks=range(len(names)), yticklabels=names, xlabel=f"code, {S} positions of {K}")
        top, n = np.unique(val["codes"], axis=0, return_counts=True)
        best = n.argsort()[::-1][:30]
        axes[1, 0].bar([" ".join(map(str, top[i])) for i in best], n[best] / len(code))
        axes[1, 0].tick_params(axis="x", rotation=90, labelsize=7)
        axes[1, 0].set_ylabel(f"share, of {len(n)} sequences")
        axes[2, 0].bar(range(K), np.sort(np.bincount(code, minlength=K))[::-1] / len(code))
        axes[2, 0].set(xlabel=f"codes of position {position} by frequency", ylabel="share")

    def gallery(axes):
        for line, k in zip(axes, inspected):
            rows = rng.permutation(np.flatnonzero(code == k))[:4]
            for i, ax in enumerate(line):
                if i // 2 < len(rows):
                    image(ax, frames[rows[i // 2], i % 2], f"code {k}, {'t+k' if i % 2 else 't'}")
                else:
                    ax.axis("off")

    def grid(axes):
        for line, k in zip(axes, inspected):
            a, b = rng.choice(np.flatnonzero(code == k)), rng.integers(len(code))
            both = transfers(model, frames[[a, a]], frames[[a, b]], val["flow"][[a, a]])[0]
            shown = optical_flow(torch.stack([frames[b, 0], both[1]])[None].cpu().numpy())[0]
            for ax, x, title in zip(line, (*frames[a], both[0], frames[b, 0], both[1]),
                                    ("frame t", "true t+k", "predicted", "another frame", "transferred")):
                image(ax, x, title)
            axis = np.arange(0, FLOW_GRID, 2)
            line[5].quiver(axis, axis, shown[0, ::2, ::2], shown[1, ::2, ::2], angles="xy", scale_units="xy", scale=0.5)
            line[5].set(xticks=[], yticks=[], ylim=(FLOW_GRID, -1), aspect="equal", title=f"its flow; code {k}")

    def books(axes):
        for s, (ax, book) in enumerate(zip(axes[0], model.quantizer.codebook().detach().cpu())):
            u, v, _ = torch.pca_lowrank(book, min(2, *book.shape))
            xy = (u * v).numpy()
            area = 4 + 200 * np.bincount(val["codes"][:, s], minlength=K) / len(code)
            ax.scatter(xy[:, 0], xy[:, -1], c=colors, s=area)
            ax.set(title=f"position {s}")
    D = len(names)
    figure("motion", f"Codes of position {position} (colors) over mean flow in grid cells, actions and state", D, 3, scatter)
    figure("compass", "Mean flow of each code, centred for each dataset", -(-D // 4), min(D, 4), compass, 4)
    figure("usage", "Codes used by each dataset, commonest sequences, histogram", 3, 1, usage, 6, 2.5)
    figure("gallery", "Held-out pairs of the inspected codes", len(inspected), 8, gallery, 1.3)
    figure("transfer", "Codes applied to their own frame and to another", len(inspected), 6, grid, 1.6)
    figure("codebook", "Codebooks, first two principal components; area is usage", 1, S, books)
    metrics = {"checkpoint": cfg.analyze, "step": state["step"], "tokens": consistency, **metrics}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1, default=float) + "\n")
    rows = [(n, k, f"{v:.3f}") for n, m in metrics.items() if isinstance(m, dict) for k, v in m.items()]
    table = "".join(f"<tr><td>{html.escape(n)}<td>{html.escape(k)}<td>{v}" for n, k, v in rows)
    pictures = "".join(f'<h2>{html.escape(title)}</h2><img src="data:image/png;base64,'
                       f'{base64.b64encode((folder / f"{name}.png").read_bytes()).decode()}">' for name, title in made.items())
    (folder / "report.html").write_text(
        f"<!doctype html><meta charset=utf-8><title>latent actions</title><style>body{{font:14px sans-serif;margin:2em}}"
        f"td{{padding:0 1em}}img{{max-width:100%}}</style><h1>{html.escape(cfg.analyze)}, step {state['step']}</h1>"
        f"{pictures}<h2>Metrics on held-out episodes</h2><table>{table}</table>")
    for row in rows:
        print(*row)
    print(f"report: {folder}/report.html")


# ---------------------------------------------------------------------------------------------- hand-over
class Labeller(nn.Module):
    """What is exported: frames uint8 (B, 2, H, W, 3) -> codes int64 (B, S), vectors float32 (B, S, D)."""

    def __init__(self, model: LAQ):
        super().__init__()
        self.model = model

    def forward(self, frames):
        return self.model.encode(frames)


@torch.no_grad()
def export(model: LAQ, cfg: Config, step: int, loader):
    """OUT/laq.pt2: the frozen labeller as a torch.export program (float32, CPU), with manifest, codebook and probe."""
    labeller = Labeller(copy.deepcopy(model).float().cpu().eval())
    labeller.model.decoder = None
    probe = data_oxe.to_device(next(loader.first(1)), "cpu", cfg.image_size)["frames"][:4].clone()
    batch = torch.export.Dim("B", min=1, max=65536)
    program = torch.export.export(labeller, (probe,), dynamic_shapes=({0: batch},))
    codes, _ = labeller(probe)
    manifest = {"schema": "laq.v1", "tokens": cfg.tokens, "codes": cfg.codes, "code_dim": cfg.code_dim,
                "image_size": cfg.image_size, "horizon": loader.horizon, "mix": cfg.mix, "step": step,
                "config": asdict(cfg), "torch": torch.__version__}
    tensors = {"codebook": labeller.model.quantizer.codebook().detach(), "probe_frames": probe, "probe_codes": codes}
    tensors = base64.b64encode(safetensors_bytes({k: v.clone(memory_format=torch.contiguous_format)
                                                  for k, v in tensors.items()})).decode()
    program.example_inputs = None                                               # would be stored as a pickle
    partial = Path(cfg.out) / ".partial.laq.pt2"
    warnings.filterwarnings("ignore", "No complete tensor found")               # of views; both are saved whole
    torch.export.save(program, partial, extra_files={"manifest.json": json.dumps(manifest), "tensors.safetensors.b64": tensors})
    partial.rename(Path(cfg.out) / "laq.pt2")


# ---------------------------------------------------------------------------------------------- main
def check(cfg: Config):
    """Fills in the sizes of --size; exits when settings do not go together."""
    choices = {"size": SIZES, "arch": ("vit", "cnn"), "quantizer": ("vq", "nsvq", "fsq"), "flow_teacher": ("dis", "raft")}
    for name, known in choices.items():
        if getattr(cfg, name) not in known:
            fail(f"--{name.replace('_', '-')} '{getattr(cfg, name)}' is none of {', '.join(known)}")
    for name, value in SIZES[cfg.size].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.arch == "vit" and (cfg.image_size % cfg.patch or cfg.width % 32 or cfg.width > 256 and cfg.width % 64):
        fail(f"--image-size {cfg.image_size} must be a multiple of --patch {cfg.patch}, --width {cfg.width} of 32 (64 above 256)")
    if cfg.arch == "cnn" and (cfg.image_size % 16 or cfg.channels % 8):
        fail(f"--image-size {cfg.image_size} must be a multiple of 16 and --channels {cfg.channels} of 8")
    if cfg.quantizer == "fsq" and math.prod(cfg.levels) != cfg.codes:
        fail(f"--levels {' '.join(map(str, cfg.levels))} make {math.prod(cfg.levels)} codes, --codes is {cfg.codes}")
    if cfg.quantizer == "fsq" and min(cfg.levels) < 2:
        fail(f"--levels {' '.join(map(str, cfg.levels))}: each must be at least 2")


def make_loader(cfg: Config, split: str, batch_size: int, seed: int, shuffle_mb: float, **more) -> data_oxe.Loader:
    same = ("data", "mix", "weights", "val_fraction", "holdout", "pairs_per_episode", "resize", "max_bad", "image_size",
            "horizon_s", "min_motion")
    return data_oxe.Loader(split=split, batch_size=batch_size, seed=seed, shuffle_mb=shuffle_mb, need_instruction=False,
                           **{k: getattr(cfg, k) for k in same}, **more)


@torch.no_grad()
def seed_codebooks(models, cfg: Config, loader, device):
    """Puts all codes on encoder outputs of as many pairs as a codebook has codes."""
    step_seed(cfg, 0, 0, 1)
    z = [[m.features(data_oxe.to_device(b, device, cfg.image_size)["frames"]) for m in models]
         for b in loader.first(math.ceil(cfg.codes / 64))]
    for m, outputs in zip(models, zip(*z)):
        m.quantizer.reseed(torch.cat(outputs), everything=True)


def matmul_rate(device, dtype: str) -> float:
    """FLOP/s of this machine's matrix products, best of five."""
    n, best = (8192 if device.type == "cuda" else 1536), 0.0
    x = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    for _ in range(5):
        began = time.perf_counter()
        (x @ x)[0, 0].item()
        best = max(best, 2 * n ** 3 / (time.perf_counter() - began))
    return best


def flops_per_sample(model: LAQ, cfg: Config, device) -> int:
    """Of forward and backward, matrix products and convolutions only, as model FLOP utilisation counts them."""
    frames = torch.zeros(2, 2, cfg.image_size, cfg.image_size, 3, dtype=torch.uint8, device=device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:       # the CPU's fused kernel is not counted
        model(frames, torch.zeros(2, 2, FLOW_GRID, FLOW_GRID, device=device), 1.0)[0].backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() // 2


def labelled(cfg: Config, batch: dict) -> np.ndarray:
    """Which samples of a batch may show their actions to the latents: a fixed choice of whole episodes. bool (B,)"""
    draw = (batch["dataset"] * 1_000_003 + batch["episode"] * 7919 + cfg.seed) * 2654435761 % (1 << 32) / (1 << 32)
    return batch["has_action"] & (draw < cfg.action_fraction)


def main(cfg: Config):
    check(cfg)
    rank, world, device = setup(cfg)
    local, micro = cfg.batch_size // world, cfg.micro_batch or cfg.batch_size // world
    loader = make_loader(cfg, "train", local, cfg.seed, cfg.shuffle_mb, rank=rank, world=world)
    val_loader, probe_loader = make_loader(cfg, "val", 64, 1, 8), make_loader(cfg, "train", 64, 2, 8)
    if cfg.action_fraction and not loader.action_dim:
        fail(f"--action-fraction {cfg.action_fraction}: no dataset of --mix '{cfg.mix}' has actions; leave it out")
    features, feature_dim = load_features(cfg.features, device) if cfg.features else (None, 0)
    raft = load_raft(device) if cfg.flow_teacher == "raft" else None
    sizes = dict(feature_dim=feature_dim, action_dim=loader.action_dim, datasets=len(loader.names))
    layout = torch.channels_last if cfg.arch == "cnn" else torch.contiguous_format      # a third faster on a CPU
    control, model = (LAQ(cfg, **sizes).to(device, memory_format=layout) for _ in range(2))
    optimizer = make_optimizer(cfg, model, device)
    start = load_checkpoint(cfg, model, optimizer, loader) if cfg.resume else 0
    if cfg.export_only:
        return export(model, cfg, start, val_loader) if rank == 0 else None
    seed_codebooks([control, model] if start == 0 else [control], cfg, probe_loader, device)
    if start == 0 and cfg.action_fraction:
        seen = [b for b in probe_loader.first(cfg.eval_batches)]
        for i in range(len(loader.names)):
            x = np.concatenate([b["action_sum"][b["dataset"] == i] for b in seen])
            if len(x) > 1:
                model.action_scale[i] = torch.from_numpy(np.stack([x.mean(0), (x.std(0) > 1e-6) / x.std(0).clip(1e-6)]))
    flops = local * flops_per_sample(model, cfg, device)
    train = DDP(model, broadcast_buffers=False) if world > 1 else model
    train = torch.compile(train) if cfg.compile else train
    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    workers = ThreadPoolExecutor(min(8, os.cpu_count()))

    def targets(batch):                                                         # made beside the training step
        flow = {"flow": optical_flow(batch["frames"], workers)} if cfg.flow_weight and not raft else {}
        return {"labelled": labelled(cfg, batch), **flow}

    def losses(batch, piece, step):
        """Loss of a piece of a batch as augment left it."""
        frames, flow = batch["frames"][piece], batch["flow"][piece]
        weight = torch.tensor(cfg.flow_weight * min(1.0, (step + 1) / max(1, cfg.flow_warmup)), device=device)
        more = {}
        if features:
            more["features"] = features(frames[:, 1])
        if cfg.action_fraction:
            more["actions"] = batch["action_sum"][piece], batch["dataset"][piece], batch["labelled"][piece]
        with amp:
            return train(frames, flow, weight, **more)

    log, stop, batches = Logger(cfg, rank, start), StopFlag(), loader.to(device, targets)
    log.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {flops / local / 1e9:.2f} GFLOP a sample, "
              f"episodes {loader.counts}")
    peak, waited, busy, timed = matmul_rate(device, cfg.dtype), 0.0, 0.0, 0

    for step in range(start, cfg.steps + 1):                                    # one more round, to evaluate and save
        stopping, last = stop(device), step == cfg.steps
        if not stopping and (last or step % cfg.eval_every == 0):
            metrics = evaluate(model, control, cfg, val_loader, probe_loader, device)
            log.print(f"step {step}: {describe(metrics, cfg)}")
            log.log(step, {}, **{f"val_{k}": v for k, v in metrics.items()})
        if stopping or last or (step > start and step % cfg.save_every == 0):
            save_checkpoint(cfg, step, model, optimizer, loader)
        if stopping or last:
            break
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(cfg, step)
        step_seed(cfg, step, rank, world)
        batch = next(batches)
        waited += time.perf_counter() - began
        if raft:
            batch["flow"] = raft(batch["frames"])
        flow = batch.get("flow", torch.zeros(local, 2, FLOW_GRID, FLOW_GRID, device=device))
        batch["frames"], batch["flow"] = augment(batch["frames"], flow, cfg)
        pieces = [slice(i, i + micro) for i in range(0, local, micro)]
        total, z, codes = 0.0, [], []
        for piece in pieces:
            if world > 1:
                train.require_backward_grad_sync = piece is pieces[-1]
            loss, parts, *outputs = losses(batch, piece, step)
            (loss / len(pieces)).backward()
            total += loss.detach() / len(pieces)
            z, codes = [*z, outputs[0]], [*codes, outputs[1]]
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if not torch.isfinite(norm):
            fail(f"gradient norm {norm.item()} at step {step}, episodes {batch['episode'].tolist()}; "
                 f"the last good checkpoint is '{cfg.out}/last.pt'")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.quantizer.observe(torch.cat(z), torch.cat(codes))
        if cfg.reseed_every and step % cfg.reseed_every == 0:
            model.quantizer.reseed(torch.cat(z))
        busy, timed = busy + time.perf_counter() - began, timed + 1
        if log.on:
            log.bar.update()
        if step % cfg.log_every == 0:
            total = mean_of_ranks(total)
            log.log(step, {"loss": total, **parts}, loss=total, grad_norm=norm, lr=lr_at(cfg, step), data_wait=waited / busy,
                    samples_per_s=cfg.batch_size * timed / busy, mfu=flops * timed / busy / peak, **parts)
            waited, busy, timed = 0.0, 0.0, 0
    if rank == 0 and not stop.signal:
        export(model, cfg, cfg.steps, val_loader)
        picture(model.eval(), cfg, val_loader, device)
        log.print(f"labeller {cfg.out}/laq.pt2, pictures {cfg.out}/pairs.png")
    log.close()
    if stop.signal:
        print(f"stopped; continue with --resume {cfg.out}/last.pt", file=sys.stderr)
    leave(128 + stop.signal if stop.signal else 0)


if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__)
    if cfg.analyze:                                         # its own settings, but those given on the command line
        try:
            stored = torch.load(cfg.analyze, map_location="cpu", weights_only=True)["config"]
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as e:
            fail(f"--analyze '{cfg.analyze}' is not a checkpoint of this script ({type(e).__name__}); give OUT/last.pt")
        cfg = tyro.cli(Config, default=Config(**{f.name: stored[f.name] for f in fields(Config) if f.name in stored}))
    (analyze if cfg.analyze else main)(cfg)
