"""Stage 1: latent action quantization. S discrete tokens for what happens from frame t to t+k.

    python laq.py --data data --mix metaworld_corner4                   # CPU or one GPU
    torchrun --nproc_per_node=4 laq.py --size base --batch-size 256 --dtype bfloat16 --compile
    sbatch sbatch/laq.sh                                                # Slurm
    python laq.py --resume runs/laq/last.pt                             # go on, or --export-only
    python laq.py --analyze runs/laq/last.pt                            # what the tokens mean

In: RLDS episodes through data_oxe.py; actions only measure (unless --action-fraction).
Out, in OUT: laq.pt2 (frozen labeller for vla.py), decoder.pt2 (what codes do to a picture), last.pt
(to resume), metrics.jsonl, pairs.png, analysis/.

Reconstruction alone learns to copy frame t while the codes carry nothing: PSNR rises, shuffling the
codes over the batch changes nothing. What turns that around: the encoder sees the difference of the
frames and is read out patch by patch, so that its outputs tell pairs apart from the first step;
moving pixels weigh more; coarse optical flow is read linearly from the latents and finely from the
decoder; dead codes are re-seeded from encoder outputs. Look at `psnr_shuffled` and `probe_r2`
beside their baselines; PSNR itself says little.

Ideas: LAPA (arXiv 2410.11758), Genie (2402.15391), LAOM (2502.00379: some action labels), VQ-VAE
(1711.00937), NSVQ (Vali and Backstrom 2022), FSQ (2309.15505), DIS (Kroeger et al. 2016), RAFT
(2003.12039).
Letters: B batch, S latent tokens, K codes, D code width, P patches, W width, H image height,
A action width.
"""
import base64
import contextlib
import copy
import html
import itertools
import json
import math
import os
import pickle
import secrets
import shutil
import signal
import sys
import time
import traceback
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import cv2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data_oxe

matplotlib.use("Agg")
FLOW_GRID = 16                              # cells a side of the flow that the decoder predicts
SUMMARY_GRID = 4                            # ... and of the flow that is linear in the latents


@dataclass(frozen=True)
class Size:
    """What --size sets."""
    image_size: int                         # pixels a side
    patch: int                              # pixels a side of a ViT patch
    width: int                              # W of the ViT
    layers: int                             # ViT blocks of the encoder
    decoder_layers: int                     # ViT blocks of the decoder
    channels: int                           # of the CNN's first level; then 2, 4, 8 times as many
    lr: float                               # peak learning rate
    warmup_steps: int


SIZES = {
    "tiny": Size(image_size=64, patch=8, width=128, layers=2, decoder_layers=2, channels=16,
                 lr=2e-3, warmup_steps=50),
    "base": Size(image_size=224, patch=16, width=768, layers=12, decoder_layers=6, channels=64,
                 lr=1e-4, warmup_steps=1000),
    "lapa": Size(image_size=256, patch=32, width=1024, layers=16, decoder_layers=8, channels=64,
                 lr=1e-4, warmup_steps=1000),
}


@dataclass
class Config(data_oxe.DataConfig):
    out: str = "runs/laq"                   # checkpoints, metrics, hand-over files
    overwrite: bool = False                 # start anew in an OUT that holds a run or its files

    # frame pairs
    horizon_s: float | None = None          # seconds between the frames; None: each dataset's own
    min_motion: float = 0.0                 # leave out pairs that differ by fewer grey levels

    # model
    size: Literal["tiny", "base", "lapa"] = "tiny"  # 64 px, for a CPU; 224; 256, as large as LAPA's
    image_size: int | None = None           # pixels a side; None: the size's
    arch: Literal["vit", "cnn"] = "vit"     # encoder and decoder
    quantizer: Literal["nsvq", "vq", "fsq"] = "nsvq"    # codes learn; codes learn; fixed levels
    tokens: int = 2                         # S, latent tokens a pair
    codes: int = 64                         # K, codes a token
    code_dim: int = 256                     # D; narrow codes say less when read linearly
    levels: tuple[int, ...] = (8, 8)        # of fsq's dimensions; their product is K

    # losses
    beta: float = 0.25                      # weight of the commitment loss (vq, nsvq)
    reseed_every: int = 20                  # steps between moving rarely used codes; 0: never
    motion_weight: float = 10.0             # how much more a fully changed pixel weighs
    flow_weight: float = 1.0                # predict optical flow; 0: off
    flow_warmup: int = 0                    # steps over which the flow weight rises from 0
    flow_teacher: Literal["dis", "raft"] = "dis"    # OpenCV's, or torchvision's with its weights
    features: str = ""                      # vision model to predict, as facebook/dinov2-small
    action_fraction: float = 0.0            # share of episodes whose actions train the latents

    # augmentation, the same for both frames
    shift: int = 4                          # random shift, pixels
    crop: float = 0.0                       # random zoom: share of the side that may be cut away
    color: float = 0.0                      # random contrast and brightness, share

    # optimization
    steps: int = 1200                       # optimizer steps; 0 exports the untrained model
    batch_size: int = 32                    # samples a step over all processes
    micro_batch: int = 0                    # samples a forward pass (gradients add up); 0: all
    lr: float | None = None                 # peak learning rate; None: by --size or --trunk
    final_lr: float = 0.05                  # at the end of the cosine, as a share of the peak
    warmup_steps: int | None = None         # of linear warm-up; None: by --size or --trunk
    weight_decay: float = 0.01              # AdamW's, of matrices
    grad_clip: float = 1.0                  # maximum gradient norm
    dtype: Literal["float32", "bfloat16"] = "float32"   # bfloat16: autocast
    compile: bool = False                   # torch.compile the model's forward and backward
    parallel: Literal["ddp", "fsdp"] = "ddp"    # each process holds the model, or a share of it

    # run
    eval_every: int = 400                   # steps between validations
    eval_batches: int = 16                  # batches of 64 in a validation
    save_every: int = 250                   # steps between checkpoints; the last three are kept
    keep_every: int = 0                     # ... that stay longer: ten, and each tenth for good
    scratch: str = ""                       # the nodes' own disk, for last.pt; '': all in OUT
    log_every: int = 10                     # steps between lines of metrics.jsonl
    seed: int = 0                           # of weights, data order, noise and augmentation
    wandb: bool = False                     # also log to Weights & Biases
    resume: str = ""                        # last.pt to continue, in its folder; auto: OUT's if any
    export_only: bool = False               # with --resume: write the hand-over again and stop
    analyze: str = ""                       # checkpoint to analyze, instead of training


# ------------------------------------------------------------ model and losses
class LAQ(nn.Module):
    """Encoder of a frame pair, quantizer, decoder conditioned on frame t.

    encode(frames uint8 (B, 2, H, H, 3)) -> codes int64 (B, S), vectors float32 (B, S, D)
    """

    entries = "labels", "next_frame"                                    # see shard

    def __init__(self, cfg: Config, feature_dim: int = 0, action_dim: int = 0, datasets: int = 1):
        super().__init__()
        self.cfg = cfg
        make_encoder, make_decoder, hidden_width = ARCHS[cfg.arch]
        self.encoder = make_encoder(cfg)
        self.decoder = make_decoder(cfg)
        self.quantizer = QUANTIZERS[cfg.quantizer](cfg)
        latent = cfg.tokens * cfg.code_dim
        self.to_summary = nn.Linear(latent, 2 * SUMMARY_GRID ** 2)
        if not cfg.flow_weight:                                         # DDP wants no unused ones
            self.to_summary.requires_grad_(False)
            self.decoder.to_flow.requires_grad_(False)
        if cfg.action_fraction:
            self.to_action = nn.Linear(latent, datasets * action_dim)
            self.register_buffer("action_mean", torch.zeros(datasets, action_dim))
            self.register_buffer("action_scale", torch.ones(datasets, action_dim))  # 1 / std
        if feature_dim:
            width = hidden_width(SIZES[cfg.size])
            self.to_features = nn.Conv2d(width, feature_dim, 1)

    def forward(self, batch: dict) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """A batch as Targets.on_device makes it -> losses by name, z (B, S, D), codes (B, S)."""
        a, b = self.to_float(batch["frames"]).unbind(1)                 # (B, 3, H, H) each
        z = self.outputs(batch["frames"])                               # (B, S, D)
        with torch.autocast(z.device.type, enabled=False):              # codes need all digits
            latent, codes, quantizer_loss = self.quantizer(z)
        prediction, flow, hidden = self.decoder(a, latent)

        error = self.pixel_weight(a, b) * (prediction - b).abs()
        parts = {"pixel": error.mean(), "quantizer": quantizer_loss}
        if "flow" in batch:
            true_flow = batch["flow"]                                   # (B, 2, 16, 16)
            flow = F.adaptive_avg_pool2d(flow, FLOW_GRID)
            parts["flow"] = (flow - true_flow).abs().mean()
            coarse = F.adaptive_avg_pool2d(true_flow, SUMMARY_GRID)     # (B, 2, 4, 4)
            summary = self.to_summary(latent.flatten(1))                # of 4 * coarse: about 1
            parts["summary"] = (summary - 4 * coarse.flatten(1)).abs().mean()
        if "features" in batch:
            parts["features"] = self.feature_loss(hidden, batch["features"])
        if "labelled" in batch:
            parts["action"] = self.action_loss(latent, batch)
        return parts, z.detach(), codes

    @staticmethod
    def to_float(frames):
        """uint8 (B, 2, H, H, 3) -> float (B, 2, 3, H, H), frame t in -0.5..0.5, frame t+k in the
        light of frame t: each colour has its mean and deviation. So drifting light is no motion."""
        channels_first = frames.permute(0, 1, 4, 2, 3)
        a, b = (channels_first.float() / 255 - 0.5).unbind(1)           # (B, 3, H, H) each
        mean, its_mean = (x.mean((2, 3), keepdim=True) for x in (a, b))
        std, its_std = (x.std((2, 3), keepdim=True) for x in (a, b))
        standard = (b - its_mean) / its_std.clamp(min=1e-3)
        return torch.stack([a, standard * std + mean], 1)

    def outputs(self, frames):
        """The encoder's, unquantized: z (B, S, D), each token of unit variance."""
        a, b = self.to_float(frames).unbind(1)                          # (B, 3, H, H) each
        z = self.encoder(a, b)                                          # (B, S, D)
        return F.layer_norm(z.float(), (self.cfg.code_dim,))

    def encode(self, frames):
        return self.labels(frames)[:2]

    def labels(self, frames):
        """-> codes and vectors as encode gives them, and the unquantized latents (B, S, D)"""
        latents = self.outputs(frames)
        codes = self.quantizer.codes(latents)
        return codes, self.quantizer.lookup(codes), latents

    def next_frame(self, a, latent):
        return self.decoder(a, latent)[0]                               # (B, 3, H, H)

    def layers(self) -> list[nn.Module]:
        return [*self.encoder.blocks, *self.decoder.blocks]

    def pixel_weight(self, a, b):
        """(B, 1, H, H): more where the frames differ; of mean 1 in each sample, so that samples
        count alike in any batch."""
        change = (b - a).abs().amax(1, keepdim=True)                    # (B, 1, H, H) in 0..1
        moved = 4 * F.avg_pool2d(change, kernel_size=5, stride=1, padding=2)
        weight = 1 + self.cfg.motion_weight * moved.clamp(max=1)
        return weight / weight.mean((1, 2, 3), keepdim=True)

    def feature_loss(self, hidden, features):
        """Cosine distance to a vision model's features (B, F, h, w) of frame t+k."""
        hidden = self.to_features(hidden)
        hidden = F.interpolate(hidden, features.shape[2:], mode="bilinear")
        return 1 - F.cosine_similarity(hidden, features, 1).mean()

    def action_loss(self, latent, batch):
        """Squared error of the executed motion of the labelled samples, read linearly, in units of
        its deviation; each dataset has a read-out of its own."""
        dataset = batch["dataset"]                                      # (B,)
        mean, scale = self.action_mean[dataset], self.action_scale[dataset]
        target = (batch["action_sum"] - mean) * scale                   # (B, A)
        readouts = self.to_action(latent.flatten(1)).unflatten(1, self.action_mean.shape)
        row = torch.arange(len(dataset), device=dataset.device)
        error = (readouts[row, dataset] - target).square().mean(1)      # (B,)
        return (error * batch["labelled"]).mean()


def loss_weights(cfg: Config, step: int) -> dict[str, float]:
    """What each part of the loss counts at a step; found by trial, so that none drowns."""
    risen = min(1.0, (step + 1) / max(1, cfg.flow_warmup))
    flow = risen * cfg.flow_weight
    return {"pixel": 10.0,
            "quantizer": 1.0,
            "flow": flow,
            "summary": 2 * flow,
            "features": 1.0,
            "action": 1 / max(cfg.action_fraction, 1e-9)}


# ------------------------------------------------------------ encoders and decoders
class ViTEncoder(nn.Module):
    """Frame t and the difference, patch by patch -> latents. Read out from all patches: with blocks
    that start as the identity this is a linear map of the input at first, so outputs differ between
    pairs; query tokens collapse."""

    def __init__(self, cfg: Config):
        super().__init__()
        size = SIZES[cfg.size]
        self.tokens, self.patch = cfg.tokens, size.patch
        patches = patches_of(cfg)                                       # P
        self.embed = nn.Linear(6 * size.patch ** 2, size.width)
        self.position = nn.Parameter(0.02 * torch.randn(patches, size.width))
        self.blocks = blocks(size.width, size.layers)
        self.norm = nn.LayerNorm(size.width)
        self.narrow = nn.Linear(size.width, 16)
        self.out = nn.Linear(16 * patches, cfg.tokens * cfg.code_dim)

    def forward(self, a, b):                                            # (B, 3, H, H) each
        x = torch.cat([a, 3 * (b - a)], 1)                              # (B, 6, H, H)
        x = self.embed(patchify(x, self.patch)) + self.position         # (B, P, W)
        x = self.blocks(x)
        x = self.narrow(self.norm(x))                                   # (B, P, 16)
        gate = motion_gate(a, b, math.isqrt(x.shape[1]))                # (B, 1, sqrt(P), sqrt(P))
        x = x * gate.flatten(2).transpose(1, 2)
        z = self.out(x.flatten(1))                                      # (B, S*D)
        return z.unflatten(1, (self.tokens, -1))                        # (B, S, D)


class ViTDecoder(nn.Module):
    """Frame t and the latents, which enter as tokens -> frame t+k, flow, hidden map."""

    def __init__(self, cfg: Config):
        super().__init__()
        size = SIZES[cfg.size]
        self.tokens, self.patch = cfg.tokens, size.patch
        pixels = 3 * size.patch ** 2
        self.embed = nn.Linear(pixels, size.width)
        self.token = nn.Linear(cfg.code_dim, size.width)
        positions = torch.randn(cfg.tokens + patches_of(cfg), size.width)
        self.position = nn.Parameter(0.02 * positions)
        self.blocks = blocks(size.width, size.decoder_layers)
        self.norm = nn.LayerNorm(size.width)
        self.to_pixels = nn.Linear(size.width, pixels)
        self.to_flow = nn.Linear(size.width, 2 * 2 ** 2)
        nn.init.zeros_(self.to_pixels.weight)                           # at first a copy of frame t

    def forward(self, a, latent):                                       # (B, 3, H, H), (B, S, D)
        tokens = self.token(latent)                                     # (B, S, W)
        patches = self.embed(patchify(a, self.patch))                   # (B, P, W)
        x = torch.cat([tokens, patches], 1) + self.position             # (B, S+P, W)
        x = self.blocks(x)
        x = self.norm(x[:, self.tokens:])                               # (B, P, W)
        change = unpatchify(self.to_pixels(x), self.patch)              # (B, 3, H, H)
        flow = unpatchify(self.to_flow(x), 2)
        return a + change, flow, unpatchify(x, 1)


class Block(nn.Module):
    """Pre-norm transformer block that starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // (64 if width > 256 else 32)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):                                               # (B, P, W)
        qkv = self.qkv(self.norm1(x))                                   # (B, P, 3 * W)
        by_head = qkv.unflatten(2, (3, self.heads, -1))
        q, k, v = by_head.permute(2, 0, 3, 1, 4)                        # (B, heads, P, .) each
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = attended.transpose(1, 2).flatten(2)                  # (B, P, W)
        x = x + self.proj(attended)
        hidden = F.gelu(self.up(self.norm2(x)))                         # (B, P, 4 * W)
        return x + self.down(hidden)


def blocks(width: int, layers: int) -> nn.Sequential:
    return nn.Sequential(*[Block(width) for _ in range(layers)])


def patches_of(cfg: Config) -> int:
    side = cfg.image_size // SIZES[cfg.size].patch
    return side ** 2


def patchify(x, patch: int):
    """(B, C, H, H) -> (B, P, C*patch*patch)"""
    return F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)


def unpatchify(x, patch: int):
    """(B, P, C*patch*patch) -> (B, C, sqrt(P)*patch, sqrt(P)*patch)"""
    side = math.isqrt(x.shape[1])
    grid = x.transpose(1, 2).unflatten(2, (side, -1))
    return F.pixel_shuffle(grid, patch)


def motion_gate(a, b, side: int):
    """How much each cell of a (side, side) grid changed, (B, 1, side, side) in 0..1. Encoders are
    read out through it: where nothing moves they see nothing, so all still pairs have the same
    codes, whatever they show."""
    change = (b - a).abs().mean(1, keepdim=True)                        # (B, 1, H, H)
    of_cell = F.adaptive_avg_pool2d(change, side)
    return torch.tanh(20 * of_cell)


class CNNEncoder(nn.Module):
    """Frame t and the difference -> four levels, 1/16 of the side -> latents, from a 4x4 grid."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.tokens = cfg.tokens
        widths = level_widths(cfg)
        self.levels = nn.Sequential(*levels_from(6, widths))
        self.norm = nn.GroupNorm(8, widths[3])
        self.out = nn.Linear(16 * widths[3], cfg.tokens * cfg.code_dim)

    def forward(self, a, b):                                            # (B, 3, H, H) each
        x = self.levels(torch.cat([a, 3 * (b - a)], 1))                 # (B, 8c, H/16, H/16)
        gate = motion_gate(a, b, x.shape[-1])                           # (B, 1, H/16, H/16)
        x = F.silu(self.norm(x)) * gate
        x = F.adaptive_avg_pool2d(x, 4)                                 # (B, 8c, 4, 4)
        z = self.out(x.flatten(1))                                      # (B, S*D)
        return z.unflatten(1, (self.tokens, -1))                        # (B, S, D)


class CNNDecoder(nn.Module):
    """The encoder mirrored, a U-Net over frame t; latents enter at its coarsest level as a map and
    scale its channels."""

    def __init__(self, cfg: Config):
        super().__init__()
        c1, c2, c3, c4 = widths = level_widths(cfg)
        latent = cfg.tokens * cfg.code_dim
        self.down = nn.ModuleList(levels_from(3, widths))
        self.map = nn.Linear(latent, 16 * c3)
        self.scale = nn.Linear(latent, c4)
        changes = (c4 + c3, c3), (c3, c2), (c2, c1), (c1, c1)
        self.up = nn.ModuleList([level(i, o, stride=1) for i, o in changes])
        self.to_pixels = nn.Conv2d(c1, 3, 3, 1, 1)
        self.to_flow = nn.Conv2d(c2, 2, 3, 1, 1)
        nn.init.zeros_(self.to_pixels.weight)                           # at first a copy of frame t

    def forward(self, a, latent):                                       # (B, 3, H, H), (B, S, D)
        skips, z = [a], latent.flatten(1)
        for down in self.down:
            skips.append(down(skips[-1]))                               # the last: (B, 8c, H/16)
        scale = 1 + self.scale(z)[..., None, None]                      # (B, 8c, 1, 1)
        coarsest = skips.pop() * scale
        latent_map = self.map(z).unflatten(1, (-1, 4, 4))
        latent_map = F.interpolate(latent_map, coarsest.shape[2:])
        x = torch.cat([coarsest, latent_map], 1)
        for i, up in enumerate(self.up):
            x = F.interpolate(up(x), scale_factor=2)
            if i < 3:
                x = x + skips.pop()
            if i == 1:
                hidden = x                                              # (B, 2c, H/4, H/4)
        change = torch.tanh(self.to_pixels(x))                          # (B, 3, H, H)
        return a + change, self.to_flow(hidden), hidden


class Residual(nn.Module):
    """Two convolutions around which the input passes; starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, 1, 1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, 1, 1))
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x):
        return x + self.body(x)


def level(channels_in: int, channels: int, stride: int = 2) -> nn.Sequential:
    """Divides the side by the stride."""
    down = nn.Conv2d(channels_in, channels, 3, stride, padding=1)
    return nn.Sequential(down, Residual(channels), Residual(channels))


def levels_from(channels_in: int, widths: list[int]) -> list[nn.Sequential]:
    return [level(i, o) for i, o in zip([channels_in, *widths], widths)]


def level_widths(cfg: Config) -> list[int]:
    return [SIZES[cfg.size].channels * m for m in (1, 2, 4, 8)]


# encoder, decoder, width of the decoder's hidden map
ARCHS = {"vit": (ViTEncoder, ViTDecoder, lambda size: size.width),
         "cnn": (CNNEncoder, CNNDecoder, lambda size: 2 * size.channels)}


# ------------------------------------------------------------ quantizers
class Quantizer(nn.Module):
    """What VQ and FSQ have in common. Nothing changes inside forward: the loop calls observe and
    reseed.

    forward(z (B, S, D)) -> what the decoder gets (B, S, D), codes (B, S), loss
    codes(z) -> nearest codes; lookup(codes) -> vectors (B, S, D); codebook() -> (S, K, D)
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        share = torch.full((cfg.tokens, cfg.codes), 1.0 / cfg.codes)
        self.register_buffer("usage", share)                            # running share of each code

    def lookup(self, codes):
        token = torch.arange(self.cfg.tokens, device=codes.device)
        return self.codebook()[token, codes]

    @torch.no_grad()
    def observe(self, z, codes):
        """Follows the share of each code over all processes."""
        share = F.one_hot(codes, self.cfg.codes).float().mean(0)        # (S, K)
        self.usage.lerp_(mean_of_ranks(share), 0.05)

    def reseed(self, z, everything: bool = False) -> int:
        """Moves rarely used codes onto outputs z (B, S, D). -> how many"""
        return 0


class VQ(Quantizer):
    """Nearest code of a codebook for each token, with straight-through gradients."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.vectors = nn.Parameter(torch.randn(cfg.tokens, cfg.codes, cfg.code_dim))

    def codebook(self):
        return self.vectors                                             # (S, K, D)

    def codes(self, z):
        z, vectors = exact(z), exact(self.vectors)
        dot = torch.einsum("bsd,skd->bsk", z, vectors)
        distance = vectors.square().sum(-1) - 2 * dot                   # less z's own length
        return distance.argmin(-1)                                      # (B, S)

    def forward(self, z):
        codes = self.codes(z)
        nearest = self.lookup(codes)                                    # (B, S, D)
        commitment = self.cfg.beta * F.mse_loss(z, nearest.detach())
        loss = commitment + F.mse_loss(nearest, z.detach())
        return z + (nearest - z).detach(), codes, loss

    @torch.no_grad()
    def reseed(self, z, everything: bool = False) -> int:
        """Codes used less than a quarter of their share; rank 0's outputs on every rank. An output
        seeds one code at most, so that with few outputs some codes wait for the next time."""
        rare = (self.usage < 0.25 / self.cfg.codes) | everything        # (S, K)
        order = torch.randperm(len(z)).to(z.device)
        vectors, moved = joined(self.vectors.data), 0
        for token in range(self.cfg.tokens):
            code = rare[token].nonzero().flatten()[:len(z)]
            output = order[:len(code)]
            vectors[token, code] = z[output, token]
            self.usage[token, code] = 1.0 / self.cfg.codes
            moved += len(code)
        if dist.is_initialized():
            dist.broadcast(vectors, 0)
        self.vectors.copy_(divided(vectors, self.vectors))
        return moved


class NSVQ(VQ):
    """Noise as long as the quantization error takes its place in training, so that no gradient is
    copied past the rounding, and codes learn from what the decoder loses (Vali and Backstrom)."""

    def forward(self, z):
        codes = self.codes(z)
        nearest = self.lookup(codes)                                    # (B, S, D)
        loss = self.cfg.beta * F.mse_loss(z, nearest.detach())
        noise = torch.randn_like(z)
        error = (z - nearest).norm(dim=-1, keepdim=True)                # (B, S, 1)
        stretch = error / noise.norm(dim=-1, keepdim=True)
        return z + noise * stretch, codes, loss


class FSQ(Quantizer):
    """Each token is projected to a few dimensions that are bounded and rounded to fixed levels
    (arXiv 2309.15505); all combinations of levels are the K codes. Projections are standardized by
    their running mean and deviation, so that all levels stay in use wherever the encoder's outputs
    lie: there is nothing to re-seed."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        S, D, n = cfg.tokens, cfg.code_dim, len(cfg.levels)
        self.down = nn.Parameter(torch.randn(S, D, n))
        self.up = nn.Parameter(torch.randn(S, n, D))
        self.register_buffer("center", torch.zeros(S, n))
        self.register_buffer("deviation", torch.ones(S, n))
        ticks = [torch.linspace(-1, 1, count) for count in cfg.levels]
        grid = torch.cartesian_prod(*ticks).view(-1, n)                 # (K, n)
        place_values = [math.prod(cfg.levels[i + 1:]) for i in range(n)]
        self.register_buffer("grid", grid)
        self.register_buffer("highest", torch.tensor(cfg.levels) - 1.0)
        self.register_buffer("place_values", torch.tensor(place_values))

    def codebook(self):
        return torch.einsum("kl,sld->skd", self.grid, self.up)          # (S, K, D)

    def project(self, z):
        z, down = exact(z), exact(joined(self.down))
        return torch.einsum("bsd,sdl->bsl", z, down).float()

    def levels_of(self, z):
        """-> bounded (B, S, n) in -1..1, and the index of the nearest level."""
        standard = (self.project(z) - self.center) / self.deviation
        bounded = torch.tanh(standard)
        index = ((bounded + 1) / 2 * self.highest).round()
        return bounded, index.nan_to_num(0)

    def codes(self, z):
        _, index = self.levels_of(z)
        return (index.long() * self.place_values).sum(-1)               # row of the grid

    def forward(self, z):
        bounded, index = self.levels_of(z)
        level = index / self.highest * 2 - 1
        rounded = bounded + (level - bounded).detach()
        latent = torch.einsum("bsl,sld->bsd", rounded, self.up)
        codes = (index.long() * self.place_values).sum(-1)
        return latent, codes, z.new_zeros(())

    @torch.no_grad()
    def observe(self, z, codes, rate: float = 0.05):
        super().observe(z, codes)
        x = self.project(z)
        self.center.lerp_(mean_of_ranks(x.mean(0)), rate)
        variance = mean_of_ranks((x - self.center).square().mean(0))
        variance = self.deviation.square().lerp(variance, rate)
        self.deviation.copy_(variance.sqrt().clamp(min=1e-4))

    @torch.no_grad()
    def reseed(self, z, everything: bool = False) -> int:
        if everything:
            self.observe(z, self.codes(z), 1.0)
        return 0


def exact(x):
    """On a GPU in float64, as float32 products have ten bits there (TF32): codes are near each
    other."""
    return x if x.device.type == "cpu" else x.double()


QUANTIZERS = {"nsvq": NSVQ, "vq": VQ, "fsq": FSQ}


# ------------------------------------------------------------ what the losses compare with
class Targets:
    """What the losses need beside the loader's arrays: flow, features, who shows its actions."""

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg = cfg
        self.raft = None
        self.features, self.feature_dim = None, 0
        if cfg.flow_weight and cfg.flow_teacher == "raft":
            self.raft = load_raft(device)
        if cfg.features:
            self.features, self.feature_dim = load_features(cfg.features, device)

    def in_loader(self, batch: dict) -> dict:
        """More arrays for a batch, made in the loader's threads beside the training step."""
        more = {}
        if self.cfg.flow_weight and not self.raft:
            more["flow"] = optical_flow(batch["frames"])
        if self.cfg.action_fraction:
            more["labelled"] = labelled(self.cfg, batch)
        return more

    @torch.no_grad()
    def on_device(self, batch: dict) -> dict:
        """The tensors that LAQ.forward takes: augmented, with what a network computes."""
        frames, flow = batch["frames"], batch.get("flow")
        if self.raft:
            flow = self.raft(frames)
        frames, flow = augment(frames, flow, self.cfg)
        inputs = {"frames": frames}
        if flow is not None:
            inputs["flow"] = flow
        if self.features:
            pieces = frames[:, 1].split(self.cfg.micro_batch or len(frames))
            inputs["features"] = torch.cat([self.features(images) for images in pieces])
        if self.cfg.action_fraction:
            inputs |= {k: batch[k] for k in ("action_sum", "dataset", "labelled")}
        return inputs


@cache
def flow_workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, data_oxe.threads_here()))


def optical_flow(frames) -> np.ndarray:
    """DIS optical flow of uint8 pairs, (B, 2, H, W, 3) or a list of (2, H, W, 3), computed at 128
    pixels a side at most: float32 (B, 2, 16, 16), in cells of that grid."""
    flow = np.stack(list(flow_workers().map(flow_of_pair, frames)))
    return flow.transpose(0, 3, 1, 2)


def flow_of_pair(pair: np.ndarray) -> np.ndarray:
    side = min(128, pair.shape[1])
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pair]
    small = [cv2.resize(x, (side, side), interpolation=cv2.INTER_AREA) for x in grey]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = dis.calc(*small, None)                                       # (side, side, 2), pixels
    flow = cv2.resize(flow, (FLOW_GRID, FLOW_GRID), interpolation=cv2.INTER_AREA)
    return flow * (FLOW_GRID / side)


def labelled(cfg: Config, batch: dict) -> np.ndarray:
    """Which samples may show actions to the latents, bool (B,): a fixed choice of episodes."""
    number = batch["dataset"] * 1_000_003 + batch["episode"] * 7919 + cfg.seed
    scrambled = number * 2654435761 % (1 << 32)                         # a hash
    chosen = scrambled / (1 << 32) < cfg.action_fraction
    return batch["has_action"] & chosen


def augment(frames: torch.Tensor, flow: torch.Tensor | None, cfg: Config):
    """The same random zoom, shift and colours on both frames of uint8 (B, 2, H, H, 3), and on their
    flow (B, 2, h, w). -> frames, flow"""
    u = torch.rand(len(frames), 7, device=frames.device)
    if cfg.shift or cfg.crop:
        zoom, theta = random_window(u[:, :3], frames.shape[2], cfg)
        channels_first = frames.permute(0, 1, 4, 2, 3)
        x = channels_first.flatten(1, 2).float()                        # (B, 6, H, H)
        x = sample(x, theta).round().to(torch.uint8)
        channels_first = x.unflatten(1, (2, 3))
        frames = channels_first.permute(0, 1, 3, 4, 2)
        if flow is not None:
            flow = sample(flow, theta) / zoom[:, None, None, None]
    if cfg.color:
        contrast = cfg.color * (2 * u[:, 3] - 1)                        # (B,)
        brightness = 128 * cfg.color * (2 * u[:, 4:7] - 1)              # (B, 3)
        gain = 1 + contrast[:, None, None, None, None]
        x = (frames.float() - 128) * gain + 128
        x = x + brightness[:, None, None, None]                         # (B, 2, H, H, 3)
        frames = x.round().clamp(0, 255).to(torch.uint8)
    return frames, flow


def random_window(u: torch.Tensor, height: int, cfg: Config):
    """u (B, 3) uniform -> share of the side that is kept (B,), affine maps of it (B, 2, 3)."""
    zoom = 1 - cfg.crop * u[:, 0]
    reach = (1 - zoom) + 2 * cfg.shift / height                         # in half sides
    direction = 2 * u[:, 1:3] - 1                                       # (B, 2) in -1..1
    offset = reach[:, None] * direction
    if not cfg.crop:                                                    # whole pixels stay sharp
        pixels = (offset * height / 2).round()
        offset = pixels * 2 / height
    identity = torch.eye(2, device=u.device)
    scale = zoom[:, None, None] * identity                              # (B, 2, 2)
    theta = torch.cat([scale, offset[:, :, None]], 2)
    return zoom, theta


def sample(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) through affine maps (B, 2, 3); edges are repeated."""
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


# ------------------------------------------------------------ evaluation
@torch.no_grad()
def label(model: LAQ, control: LAQ, frames) -> dict:
    """What probes read of uint8 pairs (B, 2, H, H, 3), as tensors of B rows."""
    codes, vectors, latents = model.labels(frames)
    _, its_vectors, its_latents = control.labels(frames)
    a, b = model.to_float(frames).unbind(1)                             # (B, 3, H, H) each
    difference = b - a
    pooled = F.adaptive_avg_pool2d(difference, 8)
    return {"codes": codes,                                             # (B, S)
            "vectors": vectors.flatten(1),                              # (B, S*D)
            "latents": latents.flatten(1),                              # unquantized
            "control": its_vectors.flatten(1),
            "control_latents": its_latents.flatten(1),
            "difference": difference.mean((2, 3)),                      # (B, 3)
            "pooled": pooled.flatten(1),                                # (B, 192)
            "picture": F.adaptive_avg_pool2d(a, 8).flatten(1)}          # of frame t, (B, 192)


@torch.no_grad()
def decode(model: LAQ, frames, other) -> dict:
    """How well pairs are predicted. other: int64 (B,), for each pair another one of its dataset.

    "mse" (B, 4): of the prediction, with the other pair's codes, with the tokens in reverse, and of
    frame t. "ssim" (B, 2): of the prediction and of frame t. "still" (B, S): codes of (t, t).
    """
    a, b = model.to_float(frames).unbind(1)                             # (B, 3, H, H) each
    _, latent = model.encode(frames)
    images = [model.next_frame(a, latent),
              model.next_frame(a, latent[other]),
              model.next_frame(a, latent.flip(1)),
              a]
    errors = [(image - b).square().mean((1, 2, 3)) for image in images]
    similarity = [ssim(image + 0.5, b + 0.5) for image in (images[0], a)]
    still_pairs = frames[:, [0, 0]]
    still, _ = model.encode(still_pairs)
    return {"still": still,
            "mse": torch.stack(errors, 1),
            "ssim": torch.stack(similarity, 1)}


def collect(model: LAQ, control: LAQ, cfg: Config, loader, device, decoded: bool = False,
            keep: bool = False) -> dict:
    """A loader's first batches with what label() says of them, flow, actions and instructions:
    arrays of N rows; with `decoded` also decode(), with `keep` the frames."""
    rows = []
    model.eval()
    for batch in loader.peek(cfg.eval_batches):
        frames = data_oxe.to_device(batch, device, cfg.image_size)["frames"]
        row = label(model, control, frames)
        if decoded:
            other = another_of_its_dataset(batch["dataset"])
            row |= decode(model, frames, torch.from_numpy(other).to(device))
            row["has_other"] = torch.from_numpy(other != np.arange(len(other)))
        row = {name: value.cpu().numpy() for name, value in row.items()}
        flow = optical_flow(frames.cpu().numpy())
        row |= {"mean_flow": flow.mean((2, 3)), "main_flow": weighted_flow(flow)}
        row |= {name: batch[name] for name in ("action_sum", "dataset", "episode", "state")}
        row["instruction"] = np.array(batch["instruction"], object)
        if keep:
            row["frames"] = frames.cpu().numpy()
        rows.append(row)
    model.train()
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def another_of_its_dataset(dataset: np.ndarray) -> np.ndarray:
    """For each of B samples the number of another one of its dataset, where there is one: (B,)"""
    other = np.arange(len(dataset))
    for i in np.unique(dataset):
        rows = np.flatnonzero(dataset == i)
        other[rows] = np.roll(rows, 1)
    return other


def evaluate(model: LAQ, control: LAQ, cfg: Config, loaders: dict, device) -> dict:
    """Metrics on held-out episodes: mean over datasets, how codes are used by all of them together,
    and, if there are several, the metrics of each as NAME/metric. Probes are fitted on training
    episodes."""
    val_loader = loaders["val"]
    fit = collect(model, control, cfg, loaders["many"], device)
    few = collect(model, control, cfg, loaders["few"], device) if "few" in loaders else None
    val = collect(model, control, cfg, val_loader, device, decoded=True)
    each = {}
    for i, name in enumerate(val_loader.names):
        rows, dims = rows_of(val, i), val_loader.motion_dims[name]
        if not len(rows["dataset"]):
            continue
        each[name] = metrics_of(rows_of(fit, i), rows, dims, cfg)
        if few:
            each[name] |= few_label_probes(rows_of(few, i), rows, dims)
    metrics = mean_of_datasets(each)
    metrics |= code_use(val, cfg)
    metrics["samples"] = len(val["dataset"])
    if len(each) > 1:
        for name, its in each.items():
            metrics |= {f"{name}/{key}": value for key, value in its.items()}
    return metrics


def mean_of_datasets(each: dict) -> dict:
    """{dataset: {metric: value}} -> {metric: its mean over those that have it}"""
    means = {}
    for name in dict.fromkeys(name for metrics in each.values() for name in metrics):
        values = [metrics[name] for metrics in each.values() if name in metrics]
        means[name] = np.mean(values, 0)
    return means


def describe(m: dict, cfg: Config) -> str:
    probe = "no probe: no actions, or too few samples (--eval-batches)"
    if "probe_r2" in m:
        probe = (f"probe R2 {m['probe_r2']:.2f} "
                 f"(random quantizer {m['probe_r2_random_quantizer']:.2f}, "
                 f"pixel difference {m['probe_r2_pixel_difference']:.2f}, "
                 f"mean flow {m['probe_r2_mean_flow']:.2f})")
    return (f"psnr {m['psnr']:.2f} dB (copy frame t {m['psnr_copy']:.2f}, "
            f"codes shuffled {m['psnr_shuffled']:.2f}) | codes used {m['codes_used']:.0%}, "
            f"perplexity {m['perplexity']:.1f} of {cfg.codes} | {probe}")


def rows_of(samples: dict, dataset: int) -> dict:
    """Of what collect() gives, one dataset's rows."""
    rows = samples["dataset"] == dataset
    return {name: value[rows] for name, value in samples.items()}


def metrics_of(fit: dict, val: dict, dims: list[int], cfg: Config) -> dict:
    """All metrics of one dataset's samples; dims: columns of its actions that are motion."""
    columns = varying(fit, val, dims)
    return {"samples": len(val["codes"]),
            **reconstruction(val),
            **code_use(val, cfg),
            **stillness(val),
            **foresight(fit, val, cfg),
            **probes(fit, val, columns, cfg),
            **meaning(fit, val, columns, cfg)}


def reconstruction(val: dict) -> dict:
    """PSNR in dB: as it is, with another sample's codes, with reversed ones, of frame t; SSIM."""
    error = val["mse"].mean(0)                                          # (4,)
    if val["has_other"].any():                              # else no gap: the codes were its own
        costs = val["mse"][:, 1] - val["mse"][:, 0]
        error[1] = error[0] + costs[val["has_other"]].mean()
    psnr, shuffled, backwards, copied = -10 * np.log10(error)
    similarity, similarity_copied = val["ssim"].mean(0)
    return {"psnr": psnr,
            "psnr_shuffled": shuffled,
            "psnr_reversed": backwards,
            "psnr_copy": copied,
            "ssim": similarity,
            "ssim_copy": similarity_copied}


def code_use(val: dict, cfg: Config) -> dict:
    """How many codes are used, and how evenly. Tokens that repeat each other have a joint entropy
    far below the sum of their own."""
    codes = val["codes"]                                                # (N, S)
    used = [len(np.unique(column)) / cfg.codes for column in codes.T]
    each = entropy(codes, cfg.codes)                                    # (S,)
    sequences, sequence = np.unique(codes, axis=0, return_inverse=True)
    joint = entropy(sequence.reshape(-1, 1), len(sequences))            # (1,)
    return {"codes_used": np.mean(used),
            "perplexity": np.exp(each).mean(),
            "entropy_joint": joint[0],
            **{f"entropy_{i}": value for i, value in enumerate(each)}}


def stillness(val: dict) -> dict:
    """Still pairs should share one sequence of codes, which no moving pair has (elsewhere)."""
    sequences, count = np.unique(val["still"], axis=0, return_counts=True)
    commonest = sequences[count.argmax()]                               # (S,)
    has_it = (val["codes"] == commonest).all(1)                         # (N,)
    motion = np.abs(val["difference"]).mean(1)                          # (N,)
    motion_of_them = motion[has_it].sum() / max(1, has_it.sum())
    return {"still_same": count.max() / count.sum(),
            "still_elsewhere": has_it.mean(),
            "still_elsewhere_motion": motion_of_them / motion.mean()}


def foresight(fit: dict, val: dict, cfg: Config) -> dict:
    """How often frame t, in 8x8 colours, and the instruction tell the codes, by kernel ridge, and
    how often the commonest code is right: is there something for stage 2 to predict?"""
    if len(np.unique(fit["episode"])) < 2:
        return {}
    codes = torch.from_numpy(fit["codes"])                              # (N, S)
    its_codes = torch.from_numpy(val["codes"])
    known = np.unique(fit["instruction"].astype(str))                   # (I,)

    def inputs(rows):
        text = rows["instruction"].astype(str)
        which_one = text[:, None] == known                              # (N, I)
        picture = torch.from_numpy(rows["picture"])                     # (N, 192)
        return [picture, torch.from_numpy(which_one).double()]
    which = F.one_hot(codes, cfg.codes).double()                        # (N, S, K)
    probe = KernelRidge(inputs(fit), which.flatten(1), fit["episode"])
    told = probe(inputs(val)).unflatten(1, which.shape[1:])
    commonest = which.sum(0).argmax(-1)                                 # (S,)
    right = told.argmax(-1) == its_codes                                # (N, S)
    right_by_chance = commonest == its_codes
    return {"codes_foreseen": right.numpy().mean(),
            "codes_majority": right_by_chance.numpy().mean()}


# The pooled difference is 192 unquantized numbers, more than S*log2(K) bits can carry: a ceiling.
PROBES = {"": "vectors", "_random_quantizer": "control", "_pixel_difference": "difference",
          "_mean_flow": "mean_flow", "_pooled_difference": "pooled"}
SAMPLES_A_DEGREE = 2                        # a probe is fitted on so many for each of its freedoms


def probes(fit: dict, val: dict, columns: list[int], cfg: Config) -> dict:
    """Held-out R2 and MSE of ridge probes to the executed motion, from latents and baselines; none
    where samples are too few for the probe's width."""
    target = fit["action_sum"][:, columns]
    truth = val["action_sum"][:, columns]
    out = {}
    for name, key in PROBES.items():
        freedoms = min(fit[key].shape[1], cfg.tokens * cfg.codes)       # vectors are of S*K kinds
        if not columns or len(target) < SAMPLES_A_DEGREE * freedoms:
            continue
        prediction = ridge(fit[key], target, val[key])
        each, error = r2(prediction, truth), (prediction - truth) ** 2
        out |= {f"probe_r2{name}": each.mean(), f"probe_mse{name}": error.mean()}
        if key == "vectors":
            out |= {f"probe_r2_{i}": value for i, value in enumerate(each)}
            out |= directions(fit, val, prediction, target, truth)
    return out


FEW_LABEL_PROBES = {"": "latents", "_codes": "vectors", "_random_quantizer": "control_latents",
                    "_pooled_difference": "pooled"}


def few_label_probes(few: dict, val: dict, dims: list[int]) -> dict:
    """Held-out R2 of the executed motion, read by kernel ridge from unquantized latents, codes and
    baselines, fitted on few episodes a task (evaluation_loaders): what finetune.py's decoder can
    do."""
    columns = varying(few, val, dims)
    if not columns or len(np.unique(few["episode"])) < 2:
        return {}
    target = torch.from_numpy(few["action_sum"][:, columns])
    truth = torch.from_numpy(val["action_sum"][:, columns])
    out = {}
    for name, key in FEW_LABEL_PROBES.items():
        probe = KernelRidge([torch.from_numpy(few[key])], target, few["episode"])
        prediction = probe([torch.from_numpy(val[key])])
        out[f"few_label_r2{name}"] = r2_of_all(prediction, truth, target.std(0))
    return out


def report_card(m: dict, cfg: Config) -> str:
    """Whether the latents are worth a second stage, one check a line with its figures."""
    gap = m["psnr"] - m["psnr_shuffled"]
    used = m["codes_used"]
    checks = [(used >= 0.5, f"codes used {used:.0%} (at least 50%)"),
              (gap >= 0.5, f"shuffled codes cost {gap:.2f} dB (at least 0.5)")]
    if "codes_foreseen" in m:
        told, commonest = m["codes_foreseen"], m["codes_majority"]
        checks.append((told >= commonest + 0.02,
                       f"codes that frame t and the instruction tell {told:.0%} (at least two "
                       f"points above the commonest code's {commonest:.0%})"))
    if "few_label_r2" in m:
        mine = m["few_label_r2"]
        few = f"{cfg.episodes_per_task or 2} labelled episodes a task"
        text = f"motion from {few}: R2 {mine:.2f}, of codes {m['few_label_r2_codes']:.2f}"
        for what in ("random quantizer", "pooled difference"):
            other = m[f"few_label_r2_{what.replace(' ', '_')}"]
            beside = f"{text} ({what} {other:.2f})"
            checks.append((mine > other, beside))
    lines = [f"  {'pass' if good else 'FAIL'}  {what}" for good, what in checks]
    good = all(passed for passed, _ in checks)
    verdict = "stage 2 on these latents would teach no more than on a control, and may hurt"
    if good:
        verdict = "worth a second stage"
    return "\n".join(["report card", *lines, f"  {verdict}"])


class KernelRidge:
    """Ridge regression of y (M, m) on features [x1 (M, n1), ...] in closed form: what few labels
    can say. map(features) -> y; float64.

    Its kernel is Gaussian, near the rows of the fit, and in part linear, which also reaches beyond
    them; each feature counts by its own mean square. The penalty is that of the least error on
    left-out episodes, which needs no second fit: with G = (K + penalty)^-1 and c = G y, rows o have
    the residuals G_oo^-1 c_o when they are left out. r2: explained share of the variance of
    left-out episodes.
    """

    most = 2048                                                         # rows that it is fitted on
    linear = 0.3                                            # weight of the linear part, beside 1

    def __init__(self, features: list, y: torch.Tensor, episode: np.ndarray):
        rows = np.random.default_rng(0).permutation(len(y))[:self.most]
        features = [x[rows].double() for x in features]
        y, episode = y[rows].double(), episode[rows]
        self.center = [x.mean(0) for x in features]
        self.rows = [x - center for x, center in zip(features, self.center)]
        self.unit = [x.square().sum(1).mean() + 1e-12 for x in self.rows]
        self.mean = y.mean(0)
        y, best = y - self.mean, math.inf
        left_out = [torch.from_numpy(np.flatnonzero(episode == e)) for e in np.unique(episode)]
        values, vectors = torch.linalg.eigh(self.kernel(features))
        projected = vectors.T @ y
        for penalty in (0.1, 0.3, 1.0, 3.0):
            inverse = vectors / (values + penalty)                      # G = inverse @ vectors.T
            weights, error = inverse @ projected, 0.0
            for o in left_out:
                block = inverse[o] @ vectors[o].T                       # G_oo
                residual = torch.linalg.solve(block, weights[o])
                error += residual.square().sum().item()
            if error < best:
                best, self.weights = error, weights
        spread = y.square().sum().item()
        self.r2 = 1 - best / max(spread, 1e-12)

    def kernel(self, features: list) -> torch.Tensor:
        """Of Q rows and those of the fit, (Q, M)."""
        distance = product = 0.0
        for x, center, rows, unit in zip(features, self.center, self.rows, self.unit):
            x = x.to(rows) - center
            distance = distance + torch.cdist(x, rows).square() / unit
            product = product + x @ rows.T / unit
        return (-distance).exp() + self.linear * product

    def __call__(self, features: list) -> torch.Tensor:
        return self.mean + self.kernel(features) @ self.weights


def r2_of_all(prediction, y, unit) -> float:
    """Explained share of the variance of y (M, m), its columns in their units (m,)."""
    left = ((prediction - y) / unit).square().sum()
    whole = ((y - y.mean(0)) / unit).square().sum()
    return 1 - (left / whole).item()


def directions(fit: dict, val: dict, prediction, target, truth) -> dict:
    """How well the probe tells which way the moving half moves, and how far all move."""
    length = np.linalg.norm(target, axis=1, keepdims=True)              # (N, 1)
    true_length = np.linalg.norm(truth, axis=1, keepdims=True)
    movers = true_length[:, 0] >= np.median(true_length)
    to_prediction = cosine(prediction, truth)
    to_mean = cosine(target.mean(0, keepdims=True), truth)
    magnitude = ridge(fit["vectors"], length, val["vectors"])
    return {"probe_direction_cosine": to_prediction[movers].mean(),
            "probe_direction_cosine_of_mean": to_mean[movers].mean(),
            "probe_r2_magnitude": r2(magnitude, true_length).mean()}


def meaning(fit: dict, val: dict, columns: list[int], cfg: Config) -> dict:
    """What codes share with the instruction, beside shuffled ones, and how much of their entropy
    (nats) is left once the octant of the motion is known."""
    codes = val["codes"]                                                # (N, S)
    _, text = np.unique(val["instruction"].astype(str), return_inverse=True)
    shuffled = np.random.default_rng(0).permutation(text)
    out = {"nmi_instruction": np.mean([nmi(text, column) for column in codes.T]),
           "nmi_instruction_shuffled": np.mean([nmi(shuffled, column) for column in codes.T])}
    if columns:
        motion = val["action_sum"][:, columns[:3]]                      # (N, 3)
        typical = np.median(fit["action_sum"][:, columns[:3]], 0)
        bits = motion > typical
        octant = bits @ 2 ** np.arange(bits.shape[1])                   # (N,)
        left = 0.0
        for cell in np.unique(octant):
            rows = octant == cell
            each = entropy(codes[rows], cfg.codes)                      # (S,)
            left += rows.mean() * each.mean()
        out["token_entropy"] = entropy(codes, cfg.codes).mean()
        out["token_entropy_given_action_octant"] = left
    return out


def varying(fit: dict, val: dict, dims: list[int]) -> list[int]:
    """Those of the action columns dims that vary in both samples; none if one has under 8 rows."""
    motions = fit["action_sum"], val["action_sum"]
    if min(map(len, motions)) < 8:
        return []
    deviation = np.minimum(*(motion.std(0) for motion in motions))
    return [i for i in dims if deviation[i] > 1e-6]


def ridge(x, y, x_val, alpha: float = 1e-2) -> np.ndarray:
    """Ridge regression of y (N, m) on x (N, n), standardized -> predictions for x_val, float64.
    Columns that hardly vary are not blown up: in x_val they may."""
    x, y, x_val = (np.asarray(v, np.float64) for v in (x, y, x_val))
    center, deviation = x.mean(0), x.std(0)
    scale = np.maximum(deviation, 0.01 * deviation.mean() + 1e-8)
    x = (x - center) / scale
    x_val = (x_val - center) / scale
    mean = y.mean(0)
    penalty = alpha * len(x) * np.eye(x.shape[1])
    squares = x.T @ x + penalty                                         # (n, n)
    products = x.T @ (y - mean)                                         # (n, m)
    slope = np.linalg.solve(squares, products)
    return mean + x_val @ slope


def r2(prediction, y) -> np.ndarray:
    """Explained share of the variance of each column of y."""
    error = ((y - prediction) ** 2).mean(0)
    left = error / y.var(0).clip(1e-12)
    return 1 - left


def entropy(codes, K: int) -> np.ndarray:
    """Of each token's codes (N, S), in nats: (S,)"""
    counts = [np.bincount(column, minlength=K) for column in codes.T]
    share = np.stack(counts) / max(1, len(codes))                       # (S, K)
    surprise = -np.log(share.clip(1e-12))
    return (share * surprise).sum(1)


def nmi(x, y) -> float:
    """Normalized mutual information of two labelings (N,)."""
    joint = np.zeros((x.max() + 1, y.max() + 1))
    np.add.at(joint, (x, y), 1 / len(x))
    p_x = joint.sum(1, keepdims=True)
    p_y = joint.sum(0, keepdims=True)
    independent = p_x * p_y
    ratio = joint.clip(1e-12) / independent.clip(1e-12)
    information = (joint * np.log(ratio)).sum()
    entropies = [-(p * np.log(p.clip(1e-12))).sum() for p in (p_x, p_y)]
    product = max(1e-24, math.prod(entropies))
    return information / math.sqrt(product)


def cosine(x, y):
    """Of rows (N, n): (N,)"""
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return (x * y).sum(1) / lengths.clip(1e-9)


def ssim(x, y):
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, H) of range 1 -> (B,)."""
    window = partial(F.avg_pool2d, kernel_size=7, stride=1)
    mean_x, mean_y = window(x), window(y)
    xx, yy, xy = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    variance = window(x * x) - xx + window(y * y) - yy                  # of x and of y
    covariance = window(x * y) - xy
    luminance = (2 * xy + 1e-4) / (xx + yy + 1e-4)
    structure = (2 * covariance + 9e-4) / (variance + 9e-4)
    similarity = luminance * structure
    return similarity.mean((1, 2, 3))


def weighted_flow(flow: np.ndarray) -> np.ndarray:
    """Flow fields (N, 2, h, w) -> their mean weighted by magnitude, (N, 2): which way the moving
    parts move."""
    magnitude = np.linalg.norm(flow, axis=1, keepdims=True) + 1e-6
    total = (flow * magnitude).sum((2, 3))
    return total / magnitude.sum((2, 3))


# ------------------------------------------------------------ main
def main(cfg: Config) -> int:
    check(cfg)
    rank, world, device = setup(cfg)
    local = cfg.batch_size // world                                     # samples a process
    micro = cfg.micro_batch or local                                    # samples a forward pass
    load = partial(data_oxe.Loader, image_size=cfg.image_size, horizon_s=cfg.horizon_s,
                   min_motion=cfg.min_motion, demonstrations=False)
    loader = load(cfg, "train", local, seed=cfg.seed, rank=rank, world=world)
    loaders = evaluation_loaders(cfg, load)
    targets = Targets(cfg, device)
    control = make_model(cfg, loader, targets, device)                  # never trained: a baseline
    model = make_model(cfg, loader, targets, device)
    fit_to_data([control] if cfg.resume else [control, model], cfg, loaders["many"], device)
    flops = flops_a_sample(model, cfg, device)
    train = wrap(model, cfg, device)
    optimizer = make_optimizer(cfg, model)
    start = load_checkpoint(cfg, model, optimizer, loader, rank, world) if cfg.resume else 0
    if cfg.export_only:
        export(model, cfg, start, loaders["val"])
        return 0
    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    log = Logger(cfg, rank, world, start, flops, device)
    log.print(f"{size_of(model)}, {flops / 1e9:.2f} GFLOP a sample")
    log.print(loader.summary())
    save = Saver(cfg, model, optimizer, loader)
    stop_flag, batches = StopFlag(cfg, device), loader.to(device, targets.in_loader)

    for step in range(start, cfg.steps + 1):                            # one more: evaluates, saves
        stop, last = stop_flag(step), step == cfg.steps
        if not stop and (last or step % cfg.eval_every == 0):
            with log.paused():
                metrics = evaluate(model, control, cfg, loaders, device)
            log.validation(step, metrics, describe(metrics, cfg))
            save.judge(step, metrics["psnr_shuffled"] - metrics["psnr"])
        if stop or last or (step > start and save.due(step)):
            with log.paused():
                save(step, wait=stop or last)
        if stop or last:
            break

        start_step(cfg, step, optimizer, rank, world)                   # learning rate, randomness
        with log.waiting():
            batch = next(batches)
        weights, means, seen = loss_weights(cfg, step), {}, []
        for piece, share, is_last in pieces(targets.on_device(batch), micro):
            train.require_backward_grad_sync = is_last                  # DDP: average once a step
            with amp:
                parts, z, codes = train(piece)
            loss = sum(weights[name] * part for name, part in parts.items())
            (loss * share).backward()
            for name, part in {"loss": loss, **parts}.items():
                means[name] = means.get(name, 0.0) + share * part.detach()
            seen.append((z, codes))
        means["grad_norm"] = clip_gradients(model, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        z, codes = (torch.cat(x) for x in zip(*seen))                   # (B, S, D), (B, S)
        model.quantizer.observe(z, codes)
        if cfg.reseed_every and step % cfg.reseed_every == 0:
            model.quantizer.reseed(z)
        log.step(step, means, batch)

    if not stop:
        export(model, cfg, cfg.steps, loaders["val"])
        log.print(f"labeller {cfg.out}/laq.pt2, pictures {cfg.out}/pairs.png\n"
                  f"{report_card(metrics, cfg)}")
    return log.close(stop)


# ------------------------------------------------------------ a reader may stop here
def check(cfg: Config):
    """Fills in what the size says; exits where settings of the model do not go together."""
    size = SIZES[cfg.size]
    for name in ("image_size", "lr", "warmup_steps"):
        if getattr(cfg, name) is None:
            setattr(cfg, name, getattr(size, name))
    cfg.warmup_steps = min(cfg.warmup_steps, cfg.steps // 4)            # of a short run less
    multiple = size.patch if cfg.arch == "vit" else 16
    if cfg.image_size < multiple or cfg.image_size % multiple:
        fail(f"--image-size {cfg.image_size} must be a multiple of {multiple} "
             f"(--size {cfg.size} --arch {cfg.arch})")
    if cfg.parallel == "fsdp" and cfg.arch == "cnn":
        fail("--parallel fsdp divides transformer layers, --arch cnn has none; give --parallel ddp")
    if cfg.quantizer == "fsq":
        levels = " ".join(map(str, cfg.levels))
        product = math.prod(cfg.levels)
        if product != cfg.codes:
            fail(f"--levels {levels} make {product} codes, --codes is {cfg.codes}")
        if min(cfg.levels) < 2:
            fail(f"--levels {levels}: each must be at least 2")


def evaluation_loaders(cfg, load) -> dict:
    """Held-out episodes, and training episodes to fit probes on: many, and, of a mix that has
    actions and is not too large to look for them, at most two of each instruction, or
    --episodes-per-task."""
    loaders = {"val": load(cfg, "val", 64, seed=1, shuffle_mb=8),
               "many": load(cfg, "train", 64, seed=2, shuffle_mb=8)}
    if not loaders["many"].action_dim:
        return loaders
    episodes = sum(plan.used for plan in loaders["many"].plans)
    if episodes <= 5000:
        every_pair = replace(cfg, pairs_per_episode=0)
        loaders["few"] = load(every_pair, "train", 64, seed=2, shuffle_mb=8,
                              at_most=cfg.episodes_per_task or 2)
    else:
        warn(f"no probe from few labels: of {episodes} training episodes, more than 5000, it would "
             f"take long to find those of each instruction")
    return loaders


def make_model(cfg: Config, loader, targets: Targets, device) -> LAQ:
    if cfg.action_fraction and not loader.action_dim:
        fail(f"--action-fraction {cfg.action_fraction}: no dataset of --mix '{cfg.mix}' has "
             f"actions; leave it out")
    model = LAQ(cfg, targets.feature_dim, loader.action_dim, len(loader.names))
    channels_last = torch.channels_last if cfg.arch == "cnn" else torch.contiguous_format
    return model.to(device, memory_format=channels_last)                # a third faster on a CPU


@torch.no_grad()
def fit_to_data(models: list[LAQ], cfg: Config, loader, device):
    """Puts all codes on encoder outputs of as many pairs as a codebook has codes; gives the last
    model the units of the actions that train it."""
    torch.manual_seed(cfg.seed * 1_000_003)
    pairs = [data_oxe.to_device(batch, device, cfg.image_size)["frames"]
             for batch in loader.peek(math.ceil(cfg.codes / 64))]
    for model in models:
        z = torch.cat([model.outputs(frames) for frames in pairs])
        model.quantizer.reseed(z, everything=True)
    if cfg.action_fraction:
        fit_actions(models[-1], cfg, loader)


def fit_actions(model: LAQ, cfg: Config, loader):
    """Mean and deviation of each dataset's executed motion; constant dimensions count nothing."""
    batches = list(loader.peek(cfg.eval_batches))
    motions = np.concatenate([batch["action_sum"] for batch in batches])            # (N, A)
    dataset = np.concatenate([batch["dataset"] for batch in batches])
    for i in range(len(loader.names)):
        motion = motions[dataset == i]
        if len(motion) > 1:
            deviation = motion.std(0)
            scale = np.where(deviation > 1e-6, 1 / deviation.clip(1e-6), 0.0)
            model.action_mean[i] = torch.from_numpy(motion.mean(0))
            model.action_scale[i] = torch.from_numpy(scale)


def flops_a_sample(model: LAQ, cfg: Config, device) -> int:
    """Of forward and backward."""
    H = cfg.image_size
    frames = torch.zeros(2, 2, H, H, 3, dtype=torch.uint8, device=device)
    inputs = {"frames": frames}
    if cfg.flow_weight:
        inputs["flow"] = torch.zeros(2, 2, FLOW_GRID, FLOW_GRID, device=device)
    return flops_of(model, lambda: model(inputs)[0]) // 2


# ------------------------------------------------------------ hand-over files
class ExportedLabeller(nn.Module):
    """laq.pt2: frames uint8 (B, 2, H, W, 3) -> codes int64 (B, S), their vectors float32 (B, S, D),
    and the unquantized latents float32 (B, S, D), which say more."""

    def __init__(self, model: LAQ):
        super().__init__()
        self.model = model

    def forward(self, frames):
        return self.model.labels(frames)


class ExportedDecoder(nn.Module):
    """decoder.pt2: frame t uint8 (B, H, W, 3), codes int64 (B, S) -> frame t+k uint8 (B, H, W, 3),
    which shows what codes say."""

    def __init__(self, model: LAQ):
        super().__init__()
        self.decoder, self.quantizer = model.decoder, model.quantizer

    def forward(self, frames, codes):
        a = LAQ.to_float(torch.stack([frames, frames], 1))[:, 0]        # (B, 3, H, H)
        return to_uint8(self.decoder(a, self.quantizer.lookup(codes))[0])


@torch.no_grad()
def export(model: LAQ, cfg: Config, step: int, loader):
    """OUT/decoder.pt2 and OUT/laq.pt2: decoder and frozen labeller as torch.export programs
    (float32, CPU), each with manifest, codebook, which ties one to the other, and a probe: inputs
    with what they must give; pairs.png. All ranks call it."""
    model = unsharded(model)
    if model is None:
        return
    model.float().eval()
    picture(model, cfg, loader)
    probe = data_oxe.to_device(next(loader.peek(1)), "cpu", cfg.image_size)
    frames = probe["frames"][:4].clone()
    codes, _ = model.encode(frames)
    manifest = {"schema": "laq.v2", "horizon": loader.horizon, "step": step,
                "config": asdict(cfg), "torch": torch.__version__}
    manifest |= {name: manifest["config"][name]
                 for name in ("tokens", "codes", "code_dim", "image_size", "mix")}
    tensors = {"codebook": model.quantizer.codebook(), "probe_codes": codes}

    decoder, inputs = ExportedDecoder(model), (frames[:, 0].clone(), codes)
    images = {"probe_frames": inputs[0], "probe_images": decoder(*inputs)}
    save_program(decoder, inputs, Path(cfg.out) / "decoder.pt2",
                 manifest | {"schema": "decoder.v1"}, tensors | images)
    model.decoder = None
    save_program(ExportedLabeller(model), (frames,), Path(cfg.out) / "laq.pt2", manifest,
                 tensors | {"probe_frames": frames})


def save_program(module: nn.Module, inputs: tuple, path: Path, manifest: dict, tensors: dict):
    """module(*inputs), each with a first dimension of B, as a program that holds no pickle."""
    batch = torch.export.Dim("B", min=1, max=65536)
    program = torch.export.export(module, inputs, dynamic_shapes=({0: batch},) * len(inputs))
    program.example_inputs = None                                       # would be stored as pickle
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format)
               for k, v in tensors.items()}
    extra = {"manifest.json": json.dumps(manifest),
             "tensors.safetensors.b64": base64.b64encode(safetensors_bytes(tensors)).decode()}
    unfinished = path.with_name(f".partial.{path.name}")
    warnings.filterwarnings("ignore", "No complete tensor found")       # of views; saved whole
    torch.export.save(program, unfinished, extra_files=extra)
    unfinished.rename(path)


@torch.no_grad()
def picture(model: LAQ, cfg: Config, val_loader, columns: int = 8):
    """OUT/pairs.png: held-out pairs, predictions, and frame t under the codes of the next column's
    pair."""
    batch = next(val_loader.peek(1))
    frames = data_oxe.to_device(batch, "cpu", cfg.image_size)["frames"][:columns]
    codes, latent = model.encode(frames)
    a, b = model.to_float(frames).unbind(1)                             # (columns, 3, H, H) each
    rows = {"frame t": a,
            "true t+k": b,
            "predicted": model.next_frame(a, latent),
            "codes of the\nnext column": model.next_frame(a, latent.roll(-1, 0))}
    size = 1.3 * columns + 1, 5.6
    fig, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, (label, images) in zip(axes, rows.items()):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for ax, image in zip(line, to_uint8(images).cpu().numpy()):
            show(ax, image)
    for ax, code in zip(axes[0], codes.tolist()):
        ax.set_title(" ".join(map(str, code)), fontsize=8)
    fig.tight_layout(h_pad=0.2, w_pad=0.2)
    fig.savefig(Path(cfg.out) / "pairs.png", dpi=90)
    plt.close(fig)


def to_uint8(images):
    """float (B, 3, H, H) in -0.5..0.5 -> uint8 (B, H, H, 3)"""
    x = (images.float() + 0.5) * 255
    x = x.round().clamp(0, 255).to(torch.uint8)
    return x.permute(0, 2, 3, 1)


def show(ax, image: np.ndarray, title: str = ""):
    ax.imshow(image)
    ax.set(xticks=[], yticks=[])
    if title:
        ax.set_title(title)


def load_raft(device):
    """-> fn(frames uint8 (B, 2, H, H, 3)) -> flow as optical_flow gives it, by small RAFT."""
    try:
        from torchvision.models.optical_flow import Raft_Small_Weights, raft_small
        net = raft_small(weights=Raft_Small_Weights.DEFAULT)
    except Exception as error:                              # no torchvision, weights or network
        fail(f"--flow-teacher raft needs torchvision and its RAFT weights "
             f"({type(error).__name__}: {str(error).splitlines()[0]}); install the torchvision of "
             f"this torch, or take dis")
    net = net.eval().requires_grad_(False).to(device)

    def flow(frames):
        images = frames.flatten(0, 1).permute(0, 3, 1, 2)               # (2B, 3, H, H)
        images = images.float() / 127.5 - 1
        images = F.interpolate(images, (128, 128), mode="bilinear", antialias=True)
        a, b = images.unflatten(0, (-1, 2)).unbind(1)
        pixels = net(a.contiguous(), b.contiguous(), num_flow_updates=6)[-1]
        flow = F.adaptive_avg_pool2d(pixels, FLOW_GRID)
        return flow * (FLOW_GRID / 128)
    return flow


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                 # mean, deviation
SIGLIP = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def load_features(name: str, device):
    """-> (fn(images uint8 (B, H, H, 3)) -> features (B, F, h, w), F) of a frozen DINOv2, SigLIP or
    another ViT."""
    from transformers import AutoModel
    try:
        net = AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        fail(f"--features '{name}': no such model in transformers' cache or on the hub "
             f"({str(error).splitlines()[0]})")
    net = getattr(net, "vision_model", net).eval().requires_grad_(False).to(device)
    side = net.config.image_size
    colors = SIGLIP if "siglip" in net.config.model_type else IMAGENET
    mean, deviation = torch.tensor(colors, device=device)[..., None, None]          # (3, 1, 1) each

    def features(images):
        x = images.permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        x = net(pixel_values=(x - mean) / deviation).last_hidden_state
        patches = (side // net.config.patch_size) ** 2
        others = x.shape[1] - patches                       # class and register tokens
        return unpatchify(x[:, others:], 1)
    return features, net.config.hidden_size


# ------------------------------------------------------------ plumbing: the same text in each stage
def fail(message: str):
    """A user's error: one line, exit code 1, no traceback."""
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {message}")


def warn(message: str):
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {message}", file=sys.stderr)


# the least that numbers of the stages' Configs may be, but those with a check of their own
LEAST = {"steps": 0, "batch_size": 1, "micro_batch": 0, "lr": 0, "warmup_steps": 0,
         "weight_decay": 0, "grad_clip": 0, "eval_every": 1, "eval_batches": 1, "save_every": 1,
         "keep_every": 0, "log_every": 1,
         "tokens": 1, "codes": 2, "code_dim": 1, "beta": 0, "reseed_every": 0, "motion_weight": 0,
         "flow_weight": 0, "flow_warmup": 0, "shift": 0, "min_motion": 0,
         "chunk": 1, "latent_chunk": 1, "latent_weight": 0, "action_weight": 0, "text_len": 1,
         "lora_rank": 0, "head_width": 1, "head_depth": 0, "cameras": 1}


def check_run(cfg, world: int):
    """Exits where settings that all stages share do not go together."""
    for name, least in LEAST.items():
        value = getattr(cfg, name, None)
        if value is not None and value < least:
            fail(f"--{name.replace('_', '-')} {value} must be at least {least}")
    local = cfg.batch_size // world                                     # samples a process
    if cfg.batch_size % world:
        fail(f"--batch-size {cfg.batch_size} is not divisible by the {world} processes; "
             f"{local * world or world} would be")
    if cfg.micro_batch and local % cfg.micro_batch:
        fail(f"--micro-batch {cfg.micro_batch} does not divide the {local} samples a process")
    if not 0 <= cfg.final_lr <= 1:
        fail(f"--final-lr {cfg.final_lr} is a share of the peak learning rate, from 0 to 1")
    if cfg.scratch and not cfg.keep_every:
        fail(f"--scratch '{cfg.scratch}' is lost with its node: give --keep-every, the steps "
             f"between checkpoints that OUT keeps, too")


def find_run(cfg):
    """Finds the checkpoint to go on from, and its OUT. Exits where there is none, and where a new
    run would overwrite one."""
    if cfg.resume == "auto":
        cfg.resume = choose_checkpoint(cfg)
    elif cfg.resume:
        check_whole(cfg.resume, "--resume")
    if cfg.export_only and not cfg.resume:
        fail("--export-only needs --resume CHECKPOINT")
    if cfg.resume:
        home = Path(cfg.resume).parent
        if cfg.out != type(cfg).out and Path(cfg.out).resolve() != home.resolve():
            fail(f"--resume '{cfg.resume}' goes on in its own folder, but --out is '{cfg.out}'; "
                 f"leave --out away, or copy the checkpoint there")
        cfg.out = str(home)
    elif checkpoints_of(cfg) and not cfg.overwrite:
        fail(f"--out '{cfg.out}' holds a run; continue it with --resume auto, give another "
             f"--out, or --overwrite it")


def setup(cfg) -> tuple[int, int, torch.device]:
    """Joins torchrun's processes, if this is one of them. -> rank, number of processes, device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_run(cfg, world)
    device = find_device()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    find_run(cfg)
    torch.manual_seed(cfg.seed)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    return rank, world, device


def find_device() -> torch.device:
    """This process's GPU, with TF32 products, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return device


def run(main, cfg):
    """Runs a stage and ends the process with the exit code that main returns.

    Processes of torchrun end without destructors: gloo's joins threads that may wait for the GIL,
    which it holds. One that fails does not wait for the others, but before it tells an error that
    may come of another's death, so that torchrun tells of that one first.
    """
    try:
        code = main(cfg)
    except BaseException as error:
        if not dist.is_initialized():
            raise
        code = error.code if isinstance(error, SystemExit) else traceback.format_exc()
        if isinstance(error, RuntimeError):
            time.sleep(5)
        if isinstance(code, str):                                       # or a signal's number
            print(code, file=sys.stderr)
            code = 1
    else:
        if dist.is_initialized():
            dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    raise SystemExit(code)


def lr_at(cfg, step: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to the share final_lr of the peak."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    lowest = cfg.final_lr * cfg.lr
    above = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))          # from 1 to 0
    return lowest + above * (cfg.lr - lowest)


def make_optimizer(cfg, model: nn.Module) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim >= 2]
    others = [p for p in params if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def wrap(model: nn.Module, cfg, device: torch.device) -> nn.Module:
    """The model on the device, as main trains it: its gradients are means over the processes."""
    if cfg.parallel == "fsdp":
        train = shard(model, cfg, device)
    else:
        train = settle(model, device)
        if dist.is_initialized():
            train = DDP(model, forward_sync_buffers=False)
    return torch.compile(train) if cfg.compile else train


def shard(model: nn.Module, cfg, device: torch.device | None = None) -> nn.Module:
    """--parallel fsdp, in place (FSDP2; ZeRO, 1910.02054): of each parameter, its gradient and its
    moments a process holds some rows. A layer's parameters are whole while it runs, in bfloat16
    with that --dtype, and what it computes is computed again for the backward pass; the others are
    whole during the model's forward and backward, in float32. Gradients are averaged at each
    micro-batch: those of whole parameters would not fit. Frozen parameters and LoRA's (peft) are as
    others. A process alone has nothing to share, but computes layers twice all the same.

    With a device, layer after layer comes there whole, from rank 0, before it is divided: so a
    device holds its share and one layer. model.layers() -> transformer layers; entries: names of
    the methods beside forward that are called from outside and read parameters. model.hollow is
    what it was, without values.
    """
    if cfg.parallel != "fsdp":
        return model
    if device:
        settle(model, device, kinds=("_buffers",))
    model.__dict__["hollow"] = hollow(model)                # no part of it, so in no state_dict
    parts = [*model.layers(), model]
    for layer in parts[:-1]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                preserve_rng_state=False)   # layers draw nothing
    precision = MixedPrecisionPolicy()
    if cfg.dtype == "bfloat16":                             # between layers all is float32
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    for part in parts:
        if device:
            settle(part, device)
        if dist.is_initialized():
            policy = precision if part is not model else MixedPrecisionPolicy()
            fully_shard(part, mp_policy=policy, reshard_after_forward=True)
    for name in model.entries if dist.is_initialized() else ():
        register_fsdp_forward_method(model, name)
    return model


@torch.no_grad()
def settle(model: nn.Module, device: torch.device, kinds=("_buffers", "_parameters")) -> nn.Module:
    """Brings to the device, in place, what is not sharded, with rank 0's values: that of others
    may be without any (device meta), as load_trunk leaves it."""
    settled = {}
    for table in [getattr(module, kind) for module in model.modules() for kind in kinds]:
        for name, x in table.items():
            if x is None or isinstance(x, DTensor):
                continue
            if id(x) not in settled:                        # a tied one stays tied
                settled[id(x)] = from_rank_0(x, device)
            table[name] = settled[id(x)]
    return model


def from_rank_0(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter or buffer on the device, the same on all ranks."""
    if x.device != device:
        values = torch.empty_like(x, device=device)
        if not x.is_meta:
            values.copy_(x)
        is_parameter = isinstance(x, nn.Parameter)
        x = nn.Parameter(values, x.requires_grad) if is_parameter else values
    if dist.is_initialized() and x.numel():
        dist.broadcast(x.detach(), 0)
    return x


def hollow(model: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes but no values (device meta); its buffers have theirs."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
             for p in model.parameters()}
    return copy.deepcopy(model, empty)


def unsharded(model: nn.Module) -> nn.Module | None:
    """A whole copy on the CPU, for rank 0; None elsewhere. All ranks call it."""
    rank = int(os.environ.get("RANK", 0))
    if "hollow" not in vars(model):
        return copy.deepcopy(model).cpu() if rank == 0 else None
    state = whole(model.state_dict(), rank == 0)
    if rank:
        return None
    copied = copy.deepcopy(model.hollow)
    copied.load_state_dict(state, assign=True)
    return copied.cpu()


def joined(x: torch.Tensor) -> torch.Tensor:
    """All rows of what may be sharded; then all ranks call it, and it is a copy."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def divided(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's rows of a whole tensor, where `like` is sharded."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def clip_gradients(model: nn.Module, most: float) -> torch.Tensor:
    """-> norm of the whole gradient, before it is clipped"""
    return joined(nn.utils.clip_grad_norm_(model.parameters(), most))


def start_step(cfg, step: int, optimizer, rank: int, world: int):
    """Learning rate and randomness: functions of (seed, step, rank), so a resumed run is equal. A
    group of parameters may learn at a share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(cfg, step) * group.get("share", 1)
    torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)


def pieces(batch: dict, size: int):
    """Micro-batches of a dict of tensors: (piece, its share of the samples, is it the last)."""
    n = len(next(iter(batch.values())))
    for i in range(0, n, size):
        piece = {k: v[i:i + size] for k, v in batch.items()}
        yield piece, size / n, i + size >= n


def of_all_ranks(value) -> list:
    """Every process's value, by rank."""
    values = [value]
    if dist.is_initialized():
        values = values * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def mean_of_ranks(x: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


CHECKPOINTS = "last.pt", "last-1.pt", "last-2.pt"           # newest first
DURABLE = "step_" + 8 * "[0-9]" + ".pt"                     # in OUT; the newest ten are kept


class Saver:
    """The checkpoints of a run. save(step) copies the state; while training goes on, a thread
    writes the copy, each file under another name until it is whole.

    last.pt     every save_every steps; the two before it are kept. In OUT, or with --scratch in a
                folder there; in OUT in any case where the run ends or is stopped
    step_N.pt   every keep_every steps, in OUT: the newest ten, and each tenth for good
    best.pt     of the validation with the smallest error, in OUT

    All ranks call it: each has its own place in the data. Randomness is a function of (seed, step),
    so no state of it is kept. Where the thread fails, the next call ends the run.
    """

    def __init__(self, cfg, model: nn.Module, optimizer, loader):
        self.cfg, self.model, self.optimizer, self.loader = cfg, model, optimizer, loader
        self.thread, self.writing = ThreadPoolExecutor(1), None
        self.out, self.path = Path(cfg.out), Path(cfg.out)
        self.judged = None                                              # step of the last error
        self.least = entry_of(self.out / "best.pt", "least")

    def judge(self, step: int, error: float):
        """A validation's error: the smallest makes best.pt."""
        self.judged, self.error = step, float(error)

    def due(self, step: int) -> bool:
        cfg = self.cfg
        durable = cfg.keep_every and step % cfg.keep_every == 0
        return step % cfg.save_every == 0 or durable or step == self.judged

    def __call__(self, step: int, wait: bool):
        """wait: until all is written, as the run ends here."""
        first = int(os.environ.get("RANK", 0)) == 0
        paths = self.paths(step, wait) if first else []
        data, writes = zip(*of_all_ranks((self.loader.state_dict(), bool(paths))))
        if not any(writes):
            return
        self.finish()
        state = whole({"step": step, "config": asdict(self.cfg), "data": [*data],
                       "model": self.model.state_dict(), "least": self.least,
                       "optimizer": self.optimizer.state_dict()}, keep=first)
        if not first:
            return
        self.writing = self.thread.submit(self.write, state, paths)
        if wait:
            self.finish()
            if self.cfg.scratch:                                        # OUT has a newer one
                shutil.rmtree(fast_folder(self.cfg), ignore_errors=True)

    def paths(self, step: int, wait: bool) -> list[Path]:
        """What a step's state is written to."""
        cfg, paths = self.cfg, []
        if wait or step % cfg.save_every == 0:
            paths.append((self.out if wait else fast_folder(cfg)) / CHECKPOINTS[0])
        if cfg.keep_every and step % cfg.keep_every == 0:
            paths.append(self.out / f"step_{step:08d}.pt")
        if step == self.judged and self.error < self.least:
            self.least = self.error
            paths.append(self.out / "best.pt")
        return paths

    def write(self, state: dict, paths: list[Path]):
        for self.path in paths:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_name(f".{self.path.name}.partial")
            with unfinished.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())                                 # before it gets the name
            if self.path.name == CHECKPOINTS[0]:
                self.make_way(self.path.parent)
            unfinished.rename(self.path)
        for path in sorted(self.out.glob(DURABLE))[:-10] if self.cfg.keep_every else ():
            if int(path.stem[5:]) % (10 * self.cfg.keep_every):
                path.unlink()

    def make_way(self, folder: Path):
        """For a last.pt."""
        last, before, oldest = (folder / name for name in CHECKPOINTS)
        for path, older in ((before, oldest), (last, before)):
            if path.exists():
                path.rename(older)

    def finish(self):
        """Waits for the thread; exits where it failed."""
        try:
            if self.writing:
                self.writing.result()
        except (OSError, RuntimeError) as error:
            folder = self.path.parent
            free = shutil.disk_usage(folder).free / 1e6 if folder.exists() else 0
            fail(f"no checkpoint could be written to '{folder}', where {free:.0f} MB are "
                 f"free ({str(error).splitlines()[0]}); make room and continue with --resume auto")


def whole(state, keep: bool = True, copies: dict | None = None):
    """A copy of nested dicts and lists whose tensors are on the CPU, sharded ones whole; so all
    ranks call it, and those that do not keep the copy get None for a tensor. A tensor that stands
    there several times, as frozen weights may, is copied once."""
    copies = {} if copies is None else copies
    if isinstance(state, dict):
        return {name: whole(value, keep, copies) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep, copies) for value in state]
    if not torch.is_tensor(state):
        return state
    x = joined(state.detach())
    if not keep:
        return None
    if isinstance(state, DTensor):
        return x.to("cpu", copy=True)
    place = x.device, x.data_ptr(), x.dtype, x.shape, x.stride()
    if place not in copies:
        copies[place] = x.to("cpu", copy=True)
    return copies[place]


# what may differ between a run and its continuation
FREE = {"out", "overwrite", "data", "threads", "max_bad", "resume", "export_only", "wandb",
        "eval_every", "save_every", "keep_every", "scratch", "log_every", "compile",
        "parallel", "export_dtype"}


def fast_folder(cfg) -> Path:
    """Of last.pt: OUT, or the run's own in --scratch."""
    run_id = Path(cfg.out) / "run_id"
    if not cfg.scratch or not run_id.exists():
        return Path(cfg.out)
    return Path(cfg.scratch) / f"nanolapa_{run_id.read_text()}"


def checkpoints_of(cfg) -> list[Path]:
    """All of a run that this node sees."""
    folders = dict.fromkeys([Path(cfg.out), fast_folder(cfg)])
    return [path for folder in folders for name in (*CHECKPOINTS, DURABLE, "best.pt")
            for path in folder.glob(name)]


def entry_of(path: Path, name: str) -> float:
    """A number that a checkpoint holds, without reading tensors; inf where it cannot be read."""
    try:
        return float(torch.load(path, map_location="cpu", mmap=True, weights_only=True)[name])
    except Exception:                                           # the reader fails in many ways
        return math.inf


def is_whole(path) -> bool:
    """Whether a checkpoint's parts have the checksums that torch.save gave them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:                                           # the reader fails in many ways
        return False


def newest_checkpoint(cfg) -> tuple[int, str]:
    """Step and path of the newest that is whole, as far as this node sees; (-1, '') where there is
    none. Exits if all are damaged."""
    steps = {str(path): entry_of(path, "step") for path in checkpoints_of(cfg)}
    for path in sorted(steps, key=steps.get, reverse=True):
        if steps[path] < math.inf and is_whole(path):
            return int(steps[path]), path
        warn(f"checkpoint '{path}' is damaged")
    if steps:
        fail(f"--resume auto: all checkpoints of '{cfg.out}' are damaged; start anew with "
             f"--overwrite in place of --resume")
    return -1, ""


def choose_checkpoint(cfg) -> str:
    """--resume auto: the newest of OUT and all nodes' --scratch, the same for all ranks; ''
    where there is none. One process a node looks. What only its node sees is copied to OUT."""
    looks = int(os.environ.get("LOCAL_RANK", 0)) == 0
    mine = newest_checkpoint(cfg) if looks else (-1, "")
    found = of_all_ranks(mine)
    step, path = newest = max(found)
    if not path or Path(path).parent == Path(cfg.out):
        return path
    copied = Path(cfg.out) / f"step_{step:08d}.pt"
    if int(os.environ.get("RANK", 0)) == found.index(newest):
        unfinished = copied.with_name(f".{copied.name}.partial")
        try:
            shutil.copyfile(path, unfinished)
        except OSError as error:
            fail(f"'{path}' cannot be copied to '{cfg.out}' ({error}); make room there")
        unfinished.rename(copied)
    of_all_ranks(None)                                          # it is there
    return str(copied)


def check_whole(path: str, option: str):
    if not Path(path).is_file():
        fail(f"no checkpoint at {option} '{path}'")
    if not is_whole(path):
        fail(f"{option} '{path}' is damaged or is not a checkpoint of this script; give "
             f"OUT/last.pt, or --resume auto, which takes the newest that is whole")


def read_checkpoint(path: str, option: str, mmap: bool = False) -> dict:
    """What Saver wrote; exits where the file is something else. mmap: tensors are read when they
    are used, so that no process holds all of a large one."""
    try:
        state = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        state["config"], state["step"], state["model"], state["optimizer"], state["data"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError,
            pickle.UnpicklingError) as error:
        fail(f"{option} '{path}' is not a checkpoint of this script ({type(error).__name__}); "
             f"give OUT/last.pt")
    return state


def load_checkpoint(cfg, model: nn.Module, optimizer, loader, rank: int, world: int) -> int:
    """Restores all that Saver wrote, also on other many processes or with another --parallel; but
    other many read other data. Exits, naming the fields, where the run would not be the same.
    -> step"""
    state = read_checkpoint(cfg.resume, "--resume", mmap=cfg.parallel == "fsdp")
    if len(steps := set(of_all_ranks(state["step"]))) > 1:
        fail(f"the processes see '{cfg.resume}' at different steps, {sorted(steps)}; --out must "
             f"be on storage that all nodes share")
    stored = state["config"]
    differ = [f"{f.name} was {stored.get(f.name)!r}, is {getattr(cfg, f.name)!r}"
              for f in fields(cfg)
              if f.name not in FREE and stored.get(f.name) != getattr(cfg, f.name)]
    if differ:
        fail(f"--resume '{cfg.resume}' is of another run: {'; '.join(differ)}")
    mine = model.state_dict()
    model.load_state_dict({name: divided(x, mine.get(name)) for name, x in state["model"].items()})
    if cfg.export_only:
        return state["step"]
    load_optimizer(optimizer, state["optimizer"])
    if len(state["data"]) == world:
        loader.load_state_dict(state["data"][rank])
    else:
        warn(f"'{cfg.resume}' was saved by {len(state['data'])} processes, these are {world}: all "
             f"goes on but the data, which each process reads from another place")
        loader.skip(state["step"])
    return state["step"]


def load_optimizer(optimizer, state: dict):
    """Each process takes its rows of the moments."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, moments in state["state"].items():
        for name, x in moments.items():
            if x.ndim:                                                  # all but the count of steps
                moments[name] = divided(x, parameters[number])
    optimizer.load_state_dict(state)


class Logger:
    """metrics.jsonl, a bar and, with --wandb, Weights & Biases; silent but on rank 0.

    Speeds are of training steps alone: what runs under `paused`, such as a validation, does not
    count. Gradient norms are looked at before that and when a line is written, so that no other
    step waits for the GPU.
    """

    def __init__(self, cfg, rank: int, world: int, start: int, flops: int, device: torch.device):
        """flops: of forward and backward of one sample."""
        self.cfg, self.on, self.wandb = cfg, rank == 0, None
        self.device = device
        self.tflop = flops * cfg.batch_size / 1e12                      # a step of all processes
        self.flops = flops * cfg.batch_size / world                     # a step of one process
        self.peak = matmul_rate(device, cfg.dtype)
        self.steps, self.seconds, self.waited = 0, 0.0, {"data_wait": 0.0}      # since a line
        self.norms = []                                                 # since they were looked at
        self.path = Path(cfg.out) / "metrics.jsonl"
        if self.on:
            self.open(start)
        self.began = time.perf_counter()

    def open(self, start: int):
        """A resumed run keeps the lines before its step; a half-written one is left out."""
        self.path.with_name("stopped").unlink(missing_ok=True)
        run_id = self.path.with_name("run_id")
        if not self.cfg.resume:
            for checkpoint in checkpoints_of(self.cfg):                 # of a run to --overwrite
                checkpoint.unlink()
        if not self.cfg.resume or not run_id.exists():
            run_id.write_text(secrets.token_hex(4))
        kept = []
        for line in self.path.read_text().splitlines() if start and self.path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] < start:
                    kept.append(line + "\n")
        self.path.write_text("".join(kept))
        if self.cfg.wandb:
            import wandb
            self.wandb = wandb.init(project="nanolapa", name=self.path.parent.name,
                                    dir=self.cfg.out, config=asdict(self.cfg),
                                    id=run_id.read_text(), resume="allow")
        self.bar = tqdm(total=self.cfg.steps, initial=start, desc=self.path.parent.name,
                        unit="step", mininterval=2)

    @contextlib.contextmanager
    def waiting(self, what: str = "data_wait"):
        """The time is spent waiting for data, or for labels."""
        began = time.perf_counter()
        yield
        self.waited[what] = self.waited.get(what, 0.0) + time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self):
        """The time is not spent on training. Gradients before it were finite."""
        self.check_gradients()
        if self.device.type == "cuda":
            torch.cuda.synchronize()                                    # of steps still queued
        self.seconds += time.perf_counter() - self.began
        yield
        self.began = time.perf_counter()

    def step(self, step: int, values: dict, batch: dict):
        """A step ends. values: of scalar tensors, with "grad_norm"; each log_every-th step writes
        their means over the ranks, and the speed."""
        due = step % self.cfg.log_every == 0
        self.norms.append((step, values["grad_norm"], batch["episode"]))
        if due:                                                         # waits for the device
            self.check_gradients()
            means = mean_of_ranks(torch.stack([v.float() for v in values.values()])).tolist()
        now = time.perf_counter()
        self.steps, self.seconds, self.began = self.steps + 1, self.seconds + now - self.began, now
        if self.on:
            self.bar.update()
        if due and self.on:
            values = dict(zip(values, means))
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)
            self.write(step, {**values, "lr": lr_at(self.cfg, step), **self.speed(),
                              "tflop": (step + 1) * self.tflop})        # since the first step
        if due:
            self.steps, self.seconds, self.waited = 0, 0.0, {"data_wait": 0.0}

    def speed(self) -> dict:
        """Samples a second of all processes, shares of the time spent waiting, and MFU:
        the model's FLOP/s over those of this device's matrix products."""
        return {"samples_per_s": self.steps * self.cfg.batch_size / self.seconds,
                **{what: seconds / self.seconds for what, seconds in self.waited.items()},
                "mfu": self.steps * self.flops / self.seconds / self.peak}

    def check_gradients(self):
        """Exits, naming step and batch, where a gradient norm was not finite."""
        for step, norm, episodes in self.norms:
            if not math.isfinite(norm):
                fail(f"gradient norm {float(norm)} at step {step}, episodes {episodes.tolist()}; "
                     f"the last good checkpoint is '{fast_folder(self.cfg)}/last.pt'")
        self.norms = []

    def validation(self, step: int, metrics: dict, text: str):
        self.print(f"step {step}: {text}")
        self.write(step, {f"val_{name}": value for name, value in metrics.items()})

    def write(self, step: int, values: dict):
        if not self.on:
            return
        values = {k: float(v) for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)

    def print(self, text: str):
        if self.on:
            self.bar.write(text)

    def close(self, stopped: int) -> int:
        """stopped: number of the signal that ended the run, or 0. -> exit code"""
        if self.on:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()
        if self.on and stopped:
            self.path.with_name("stopped").touch()                      # for sbatch/slurm.sh
            print(f"stopped; continue with --resume {self.cfg.out}/last.pt", file=sys.stderr)
        return 128 + stopped if stopped else 0


class StopFlag:
    """Ctrl-C and SIGTERM ask for a checkpoint at the next step, on all ranks at once: these ask
    each other at every log_every-th step, as a GPU waits for the answer. A second Ctrl-C kills; a
    second SIGTERM does not, as Slurm and torchrun may both send one."""

    def __init__(self, cfg, device: torch.device):
        self.every, self.device, self.received = cfg.log_every, device, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if number == signal.SIGINT and self.received:
            raise SystemExit(128 + number)
        self.received = self.received or number

    def __call__(self, step: int) -> int:
        """Number of the signal that any rank received, or 0."""
        if not dist.is_initialized():
            return self.received
        if step % self.every:
            return 0
        flag = torch.tensor(self.received, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


def flops_of(model: nn.Module, forward) -> int:
    """Of forward() -> losses (dict) and their backward pass: matrix products and convolutions
    only, as model FLOP utilisation counts them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(forward().values()).backward()                              # MATH: others go uncounted
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def size_of(model: nn.Module) -> str:
    """Its parameters, in millions, and how many of them learn."""
    every = sum(p.numel() for p in model.parameters()) / 1e6
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    return f"{every:.2f}M parameters, {learning:.2f}M of them trainable"


def matmul_rate(device: torch.device, dtype: str) -> float:
    """FLOP/s of this device's matrix products, best of five."""
    n, best = (8192 if device.type == "cuda" else 1536), 0.0
    x = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    for _ in range(5):
        began = time.perf_counter()
        (x @ x)[0, 0].item()
        best = max(best, 2 * n ** 3 / (time.perf_counter() - began))
    return best


# ------------------------------------------------------------ appendix: laq.py --analyze
# Nothing above needs it. A figure is a function: its docstring is the title, its name the file.
@dataclass
class Findings:
    """What the figures draw: N held-out pairs of all datasets, as collect() gives them."""
    model: LAQ
    names: tuple                            # datasets of the mix
    dims: dict                              # action columns of each that are motion
    val: dict                               # arrays (N, ...)
    frames: torch.Tensor                    # uint8 (N, 2, H, H, 3)
    rng: np.random.Generator

    def __post_init__(self):
        """Which token is looked at is chosen once: the one that varies most, and its commonest
        codes."""
        self.K = self.model.cfg.codes
        codes = self.val["codes"]                                       # (N, S)
        self.position = int(entropy(codes, self.K).argmax())
        self.code = codes[:, self.position]                             # (N,)
        kinds, count = np.unique(self.code, return_counts=True)
        commonest = count.argsort()[::-1]
        self.inspected = kinds[commonest[:6]]

    def rows(self, dataset: int) -> np.ndarray:
        return np.flatnonzero(self.val["dataset"] == dataset)

    def colors(self, codes: np.ndarray) -> np.ndarray:
        palette = plt.get_cmap("tab20" if self.K > 10 else "tab10")
        return palette(codes % palette.N)


def analyze(cfg: Config) -> int:
    """OUT/analysis: metrics.json, each figure as PNG, and report.html with all of it inside. Pairs
    of held-out episodes, drawn by (seed, step)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("run --analyze in one process")
    check_run(cfg, 1)
    check(cfg)
    findings, metrics = find(cfg)
    plt.rcParams["axes.titlesize"] = 8
    folder = Path(cfg.out) / "analysis"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1, default=float) + "\n")
    style = "body{font:14px sans-serif;margin:2em} td{padding:0 1em} img{max-width:100%}"
    page = ["<!doctype html><meta charset=utf-8><title>latent actions</title>",
            f"<style>{style}</style><h1>{html.escape(cfg.analyze)}, step {metrics['step']}</h1>"]
    for plot in PLOTS:
        fig = plot(findings)
        fig.tight_layout()
        png = folder / f"{plot.__name__.removeprefix('plot_')}.png"
        fig.savefig(png, dpi=80)
        plt.close(fig)
        encoded = base64.b64encode(png.read_bytes()).decode()
        page.append(f'<h2>{plot.__doc__}</h2><img src="data:image/png;base64,{encoded}">')
    rows = [(name, key, f"{value:.3f}") for name, values in metrics.items()
            if isinstance(values, dict) for key, value in values.items()]
    cells = [f"<tr><td>{html.escape(name)}<td>{html.escape(key)}<td>{value}"
             for name, key, value in rows]
    page.append(f"<h2>Metrics on held-out episodes</h2><table>{''.join(cells)}</table>")
    (folder / "report.html").write_text("\n".join(page))
    for row in rows:
        print(*row)
    print(f"report: {folder}/report.html")
    return 0


@torch.no_grad()
def find(cfg: Config) -> tuple[Findings, dict]:
    """Reads the checkpoint and the data, labels, measures."""
    state, device = read_checkpoint(cfg.analyze, "--analyze"), find_device()
    step = state["step"]
    seed = 1000 * cfg.seed + step
    load = partial(data_oxe.Loader, cfg, batch_size=64, image_size=cfg.image_size,
                   horizon_s=cfg.horizon_s, min_motion=cfg.min_motion, demonstrations=False,
                   shuffle_mb=64, seed=seed)
    fit_loader, val_loader = load(split="train"), load(split="val")
    torch.manual_seed(cfg.seed)
    unused = "to_action", "to_features", "action_mean", "action_scale"  # only training needs them
    weights = {name: x for name, x in state["model"].items() if not name.startswith(unused)}
    plain = replace(cfg, action_fraction=0.0)
    model, control = LAQ(plain).to(device), LAQ(plain).to(device)
    model.load_state_dict(weights)
    fit_to_data([control], plain, fit_loader, device)

    print(f"reading and labelling {2 * cfg.eval_batches * 64} pairs ...")
    fit = collect(model, control, cfg, fit_loader, device)
    val = collect(model, control, cfg, val_loader, device, decoded=True, keep=True)
    frames = torch.from_numpy(val.pop("frames")).to(device)
    findings = Findings(model, val_loader.names, val_loader.motion_dims, val, frames,
                        np.random.default_rng(step))
    metrics = {"checkpoint": cfg.analyze, "step": step, "tokens": consistency(findings)}
    for i, name in enumerate(val_loader.names):
        if not len(findings.rows(i)):
            continue
        dims = findings.dims[name]
        metrics[name] = metrics_of(rows_of(fit, i), rows_of(val, i), dims, cfg)
        metrics[name] |= transfer_cosines(findings, i)
        metrics[name] |= left_out_probe(findings, fit, i)
    return findings, metrics


def consistency(f: Findings) -> dict:
    """Does a code move things alike, within a dataset and across them?"""
    flow = f.val["main_flow"].copy()                                    # (N, 2)
    for i in range(len(f.names)):
        rows = f.rows(i)
        if len(rows):
            flow[rows] -= flow[rows].mean(0)
    of_code = [flow[f.code == k] for k in np.unique(f.code)]
    variances = [rows.var(0).sum() for rows in of_code]
    out = {"within_token_variance": np.mean(variances), "flow_variance": flow.var(0).sum()}
    if len(f.names) > 1:
        code_flow = flow_of_codes(f)                                    # (datasets, K, 2)
        variance = np.nanvar(code_flow, 0).sum(-1)                      # (K,)
        angles = []
        for one, other in itertools.combinations(code_flow, 2):
            turn = np.arccos(cosine(one, other).clip(-1, 1))            # (K,)
            angles.append(np.nanmean(turn))
        out["across_dataset_variance"] = np.nanmean(variance)
        out["mean_angle_degrees"] = np.degrees(np.mean(angles))
    return out


def flow_of_codes(f: Findings) -> np.ndarray:
    """(datasets, K, 2): mean flow of each code less that of its dataset; NaN where it is unused."""
    out = np.full((len(f.names), f.K, 2), np.nan)
    for i in range(len(f.names)):
        rows = f.rows(i)
        flow = f.val["main_flow"][rows]                                 # (N, 2)
        code, mean = f.code[rows], flow.mean(0)
        for k in np.unique(code):
            out[i, k] = flow[code == k].mean(0) - mean
    return out


def transfer_cosines(f: Findings, dataset: int) -> dict:
    """Codes of a dataset's pairs applied to frames of every dataset: cosine of the prediction's
    flow with the pair's, for the half of the pairs that moves most."""
    rows, out = f.rows(dataset), {}
    flow = f.val["main_flow"][rows]
    length = np.linalg.norm(flow, axis=1)
    movers = length >= np.median(length)                                # (N,)
    for j, other in enumerate(f.names):
        if not len(f.rows(j)):
            continue
        chosen = f.rng.choice(f.rows(j), len(rows))
        onto = f.frames[chosen, 0]                                      # (N, H, H, 3)
        after = transfer(f.model, f.frames[rows], onto)
        pairs = torch.stack([onto, after], 1)
        moved = weighted_flow(optical_flow(pairs.cpu().numpy()))        # (N, 2)
        out[f"transfer_cosine_to_{other}"] = cosine(moved, flow)[movers].mean()
    return out


@torch.no_grad()
def transfer(model: LAQ, pairs: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """Codes of uint8 pairs (B, 2, H, H, 3) applied to frames (B, H, H, 3) -> uint8 (B, H, H, 3)"""
    images = []
    for pair, frame in zip(pairs.split(64), onto.split(64)):
        a = model.to_float(torch.stack([frame, frame], 1))[:, 0]
        _, latent = model.encode(pair)
        images.append(to_uint8(model.next_frame(a, latent)))
    return torch.cat(images)


def left_out_probe(f: Findings, fit: dict, dataset: int) -> dict:
    """R2 on a dataset of a probe that was fitted on the others, in units of each one's spread."""
    val = rows_of(f.val, dataset)
    dims = varying(rows_of(fit, dataset), val, f.dims[f.names[dataset]])
    x, y = [], []
    for i, other in enumerate(f.names):
        rows = rows_of(fit, i)
        its_dims = varying(rows, rows, f.dims[other])
        if i != dataset and dims and set(dims) <= set(its_dims):
            x.append(rows["vectors"])
            y.append(spread(rows["action_sum"][:, dims]))
    if not x:
        return {}
    truth = spread(val["action_sum"][:, dims])
    prediction = ridge(np.concatenate(x), np.concatenate(y), val["vectors"])
    return {"probe_r2_left_out": r2(prediction, truth).mean()}


def spread(y):
    """Columns of y in units of their standard deviation."""
    return (y - y.mean(0)) / y.std(0).clip(1e-6)


def plot_motion(f: Findings):
    """Mean flow in grid cells, actions and state of each dataset, coloured by code"""
    n = len(f.names)
    fig, axes = plt.subplots(n, 3, figsize=(7.8, 2.6 * n), squeeze=False)
    for i, (line, name) in enumerate(zip(axes, f.names)):
        rows = f.rows(i)
        colors = f.colors(f.code[rows])
        values = {f"{name}: mean flow": f.val["main_flow"][rows],
                  "action": f.val["action_sum"][rows][:, f.dims[name]],
                  "state": f.val["state"][rows]}
        for ax, (title, x) in zip(line, values.items()):
            ax.set_title(title)
            if x.shape[1] > 1:
                ax.scatter(x[:, 0], x[:, 1], c=colors, s=4)
    return fig


def plot_compass(f: Findings):
    """Mean flow of each code, centred for each dataset"""
    columns = min(len(f.names), 4)
    lines = math.ceil(len(f.names) / columns)
    size = 4 * columns, 4 * lines
    fig, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    flow = flow_of_codes(f)                                             # (datasets, K, 2)
    reach = 1.1 * np.nanmax(np.abs(flow))
    limits = -reach, reach
    start, colors = np.zeros(f.K), f.colors(np.arange(f.K))
    for ax, arrows, name in zip(axes.flat, flow, f.names):
        right, down = arrows.T
        ax.quiver(start, start, right, -down, color=colors, angles="xy", scale_units="xy", scale=1)
        ax.set(xlim=limits, ylim=limits, aspect="equal", title=name)
    return fig


def plot_usage(f: Findings):
    """Codes used by each dataset, commonest sequences, histogram"""
    fig, (by_dataset, sequences, histogram) = plt.subplots(3, 1, figsize=(6, 7.5))
    codes = f.val["codes"]                                              # (N, S)
    n, S = codes.shape
    shares = []
    for i in range(len(f.names)):
        rows = codes[f.rows(i)]
        count = np.stack([np.bincount(column, minlength=f.K) for column in rows.T])
        shares.append(count.ravel() / max(1, len(rows)))                # (S * K,)
    by_dataset.imshow(np.array(shares), aspect="auto")
    by_dataset.set(yticks=range(len(f.names)), yticklabels=f.names,
                   xlabel=f"code, {S} positions of {f.K}")

    kinds, count = np.unique(codes, axis=0, return_counts=True)
    best = count.argsort()[::-1][:30]
    labels = [" ".join(map(str, kind)) for kind in kinds[best]]
    sequences.bar(labels, count[best] / n)
    sequences.tick_params(axis="x", rotation=90, labelsize=7)
    sequences.set_ylabel(f"share, of {len(count)} sequences")

    count = np.bincount(f.code, minlength=f.K)
    falling = np.sort(count)[::-1]
    histogram.bar(range(f.K), falling / n)
    histogram.set(xlabel=f"codes of position {f.position} by frequency", ylabel="share")
    return fig


def plot_gallery(f: Findings):
    """Held-out pairs of the inspected codes"""
    n = len(f.inspected)
    fig, axes = plt.subplots(n, 8, figsize=(10.4, 1.3 * n), squeeze=False)
    for line, k in zip(axes, f.inspected):
        its_pairs = np.flatnonzero(f.code == k)
        rows = f.rng.permutation(its_pairs)[:4]
        for ax in line[2 * len(rows):]:
            ax.axis("off")
        images = f.frames[rows].flatten(0, 1).cpu().numpy()             # t, t+k, t, t+k ...
        for ax, image, title in zip(line, images, ("t", "t+k") * len(rows)):
            show(ax, image, f"code {k}, {title}")
    return fig


def plot_transfer(f: Findings):
    """Codes applied to their own frame and to another"""
    n = len(f.inspected)
    titles = "frame t", "true t+k", "predicted", "another frame", "transferred"
    fig, axes = plt.subplots(n, 6, figsize=(9.6, 1.6 * n), squeeze=False)
    for line, k in zip(axes, f.inspected):
        a = f.rng.choice(np.flatnonzero(f.code == k))
        b = f.rng.integers(len(f.code))
        pair, onto = f.frames[a], f.frames[b, 0]                        # (2, H, H, 3), (H, H, 3)
        frames = torch.stack([pair[0], onto])
        own, other = transfer(f.model, torch.stack([pair, pair]), frames)
        images = torch.stack([*pair, own, onto, other])
        images = images.cpu().numpy()                                   # (5, H, H, 3)
        *axes_of_images, last = line
        for ax, image, title in zip(axes_of_images, images, titles):
            show(ax, image, title)
        flow = optical_flow(images[None, 3:])[0]                        # (2, 16, 16)
        right, down = flow[:, ::2, ::2]                                 # (8, 8) each
        axis = np.arange(0, FLOW_GRID, 2)
        last.quiver(axis, axis, right, down, angles="xy", scale_units="xy", scale=0.5)
        last.set(xticks=[], yticks=[], ylim=(FLOW_GRID, -1), aspect="equal",
                 title=f"its flow; code {k}")
    return fig


def plot_codebook(f: Findings):
    """Codebooks, first two principal components; area is usage"""
    codebook = f.model.quantizer.codebook().detach().cpu()              # (S, K, D)
    S, K, D = codebook.shape
    colors = f.colors(np.arange(K))
    fig, axes = plt.subplots(1, S, figsize=(2.6 * S, 2.6), squeeze=False)
    for token, ax in enumerate(axes[0]):
        u, s, _ = torch.pca_lowrank(codebook[token], min(2, K, D))
        xy = (u * s).numpy()
        codes = f.val["codes"][:, token]
        share = np.bincount(codes, minlength=K) / len(codes)
        x, y = xy[:, 0], xy[:, -1]                                      # the same, if D is 1
        ax.scatter(x, y, c=colors, s=4 + 200 * share)
        ax.set_title(f"position {token}")
    return fig


PLOTS = (plot_motion, plot_compass, plot_usage, plot_gallery, plot_transfer, plot_codebook)


def stored_config(path: str) -> Config:
    """The settings of a checkpoint, as defaults for its analysis in its own folder."""
    check_whole(path, "--analyze")
    stored = read_checkpoint(path, "--analyze")["config"]
    known = {f.name: stored[f.name] for f in fields(Config) if f.name in stored}
    return Config(**{**known, "out": str(Path(path).parent)})


if __name__ == "__main__":
    cfg = tyro.cli(Config, description=__doc__)
    if cfg.analyze:                                         # but for those on the command line
        cfg = tyro.cli(Config, default=stored_config(cfg.analyze))
    run(analyze if cfg.analyze else main, cfg)
