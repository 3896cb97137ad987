"""Stage 3: a policy with real actions from few labelled episodes, on a trunk with or without latent
pretraining, and from video whose actions are decoded.

    python finetune.py --init runs/vla/stage2 --laq-ckpt runs/laq/laq.pt2 --episodes-per-task 2
    python finetune.py --init none --trunk tiny --episodes-per-task 2   # the control
    python finetune.py --label-fraction 0.05 --rollout-every 250        # the best by success
    torchrun --nproc_per_node=4 finetune.py --init runs/vla/stage2 --batch-size 256 \\
        --dtype bfloat16
    sbatch sbatch/finetune.sh                                           # Slurm
    python finetune.py --resume runs/finetune/last.pt                   # go on, or --export-only
    python finetune.py --bench-policy runs/finetune/policy              # latency; needs no data
    python finetune.py --bench-policy random --head expert --chunk 50 \\
        --trunk HuggingFaceTB/SmolVLM2-500M-Video-Instruct              # of shapes

In: RLDS episodes with actions through data_oxe.py, a stage2/ folder of vla.py, and laq.pt2.
Out, in OUT: policy/ (policy.pt2, tokenizer files, manifest.json `policy.v1`, weights.safetensors,
and lerobot/, a plugin of LeRobot), last.pt, metrics.jsonl, with --rollout-every rollout/.
policy.pt2 maps (images uint8 (B, H, W, 3), state float32 (B, Ds), ids, mask int64 (B, L), noise
float32 (B, C, A)) to actions float32 (B, C, A) in units of the mix's first dataset; it runs with
torch alone. With --cameras N images are (B, N, H, W, 3), in the order of the manifest's "cameras";
a black one is a missing camera.

Gradient steps on few labels forget what the video taught. So the labelled episodes first teach a
small decoder, in closed form: latents of a frame pair and of the next, with what the trunk made of
the pair and the instruction, -> its action chunk. With it all video is labelled as its batches
come, and the policy learns from true and decoded actions together (inverse dynamics as in VPT,
arXiv 2206.11795, on latents as in LAPO, 2312.10812). --head says how actions are read off the
trunk: by an MLP, SmolVLA's flow-matching expert, a small flow, bins, or a decoder of what stage 2
predicts; each learns from both. The policy's weights are averaged over steps: single ones of cloned
policies differ widely in success (Block et al., 2310.11428).

Letters: B batch, L text tokens, P image tokens, C chunk, A action width, Ds state width, W trunk
width, S latent tokens, D latent width, M rows of a fit.
"""
import base64
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as safetensors_load, load_file, save_file
from torch import nn
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.export.passes import move_to_device_pass
from torch.fx.passes.split_module import split_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (AutoTokenizer, ByT5Tokenizer, Dinov2Config, Dinov2Model, LlamaConfig,
                          LlamaModel, PreTrainedConfig, PreTrainedModel, SiglipVisionConfig,
                          SiglipVisionModel, SmolVLMConfig, SmolVLMModel)
from transformers import logging as transformers_logging
from transformers.modeling_layers import GradientCheckpointingLayer

import data_oxe

transformers_logging.disable_progress_bar()


@dataclass
class Config(data_oxe.DataConfig):
    out: str = "runs/finetune"              # checkpoints, metrics, hand-over files
    overwrite: bool = False                 # start anew in an OUT that holds a run or its files

    # model
    init: str = "runs/vla/stage2"           # stage2/ of vla.py, or 'none': no latent pretraining
    trunk: str = "tiny"                     # 'tiny', 'dual-7b', or a SmolVLM2 name or folder
    random_init: bool = False               # build --trunk with random weights, from its config
    shrink: bool = False                    # with --random-init: a toy of the same shape
    text_layers: int | None = None          # that are kept; None: 16 of SmolVLM2's, else all
    plain_prompt: bool = False              # image and instruction alone, without the trunk's chat
    text_len: int = 32                      # instruction tokens; longer ones are cut
    freeze: Literal["none", "vision", "trunk"] | None = None    # None: vision of dual-7b, else none
    freeze_layers: int = 0                  # first layers of the language model that do not learn
    lora_rank: int = 0                      # of LoRA, which then is all that learns there; 0: none
    lora_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")    # that LoRA changes
    cameras: int = 1                        # N, pictures it sees; black where a dataset has fewer
    head: Literal["mlp", "expert", "flow", "bins", "latent"] = "mlp"    # see HEADS
    head_width: int = 256                   # hidden units of the head
    chunk: int = 8                          # C, actions predicted at once
    use_state: bool = True                  # give the head the robot's proprioception
    blind: bool = False                     # control: a black image, also in the exported policy
    normalize: Literal["quantile", "meanstd"] = "quantile"  # 1st to 99th percentile, or deviation

    # labelled episodes, and video whose actions are decoded
    label_fraction: float = 1.0             # share of --mix's episodes whose actions are read
    laq_ckpt: str = ""                      # laq.py's labeller; 'pooled', a control; '': none
    targets: Literal["vectors", "codes"] = "vectors"    # latents: unquantized, or of the codes
    video: str = ""                         # its mix; '': --mix, all episodes
    video_share: float = 0.5                # of a batch

    # optimization
    steps: int = 600                        # optimizer steps; 0 exports the untrained model
    batch_size: int = 32                    # samples a step over all processes
    micro_batch: int = 0                    # samples a forward pass (gradients add up); 0: all
    lr: float | None = None                 # peak learning rate; None: by --size or --trunk
    trunk_lr: float = 1.0                   # that of the trunk, as a share of --lr
    final_lr: float = 0.0                   # at the end of the cosine, as a share of the peak
    warmup_steps: int | None = None         # of linear warm-up; None: by --size or --trunk
    weight_decay: float = 0.01              # AdamW's, of matrices
    grad_clip: float = 1.0                  # maximum gradient norm
    dtype: Literal["float32", "bfloat16"] = "float32"   # bfloat16: autocast
    compile: bool = False                   # torch.compile the model's forward and backward
    parallel: Literal["ddp", "fsdp"] = "ddp"    # each process holds the model, or a share of it

    # run
    eval_every: int = 250                   # steps between validations
    eval_batches: int = 16                  # batches of 64 in a validation
    rollout_every: int = 0                  # steps between rollouts in the mix's world; 0: none
    rollout_episodes: int = 10              # of each task in them
    save_every: int = 250                   # steps between checkpoints; the last three are kept
    keep_every: int = 0                     # ... that stay longer: ten, and each tenth for good
    scratch: str = ""                       # the nodes' own disk, for last.pt; '': all in OUT
    log_every: int = 10                     # steps between lines of metrics.jsonl
    seed: int = 0                           # of weights, data order, noise and augmentation
    wandb: bool = False                     # also log to Weights & Biases
    resume: str = ""                        # last.pt to continue, in its folder; auto: OUT's if any
    export_only: bool = False               # with --resume: write the hand-over again and stop
    export_dtype: Literal["float32", "bfloat16"] = "float32"    # weights in policy.pt2
    bench_policy: str = ""                  # time this policy/, or 'random': --trunk and --head


# ------------------------------------------------------------ model and loss
class Policy(nn.Module):
    """Trunk, normalization and action head.

    forward(batch of to_inputs) -> losses by name, of normalized action chunks
    act(batch, noise (B, C, A); None: drawn) -> actions (B, C, A) in the units of the first dataset
    """

    entries = "act", "inputs"                                           # see shard

    def __init__(self, cfg: Config, trunk: "Trunk", stats: dict):
        super().__init__()
        self.cfg, self.trunk = cfg, trunk
        self.action_dim, state_dim = (stats[f"{x}_offset"].shape[1] for x in ("action", "state"))
        self.from_state = nn.Linear(state_dim, trunk.width)
        self.head = HEADS[cfg.head](cfg, trunk, self.action_dim)
        for name, value in stats.items():                               # (datasets, A or Ds)
            self.register_buffer(name, value)
        self.register_buffer("error", torch.tensor(torch.inf))          # held out, where evaluated

    def forward(self, batch: dict) -> dict:
        chunk = batch["chunk"].masked_fill(batch["weight"][..., None] == 0, 0)      # (B, C, A)
        error = self.head.loss(self.features(batch), chunk)                         # (B, C, A)
        error = error.mean(2) * batch["weight"]                                     # (B, C)
        parts = {"labelled": (error * ~batch["is_video"][:, None]).mean()}
        if self.cfg.laq_ckpt:
            parts["video"] = (error * batch["is_video"][:, None]).mean()
        return parts

    def act(self, batch: dict, noise=None):
        ids = batch["ids"]
        if noise is None:
            noise = torch.randn(ids.shape[0], self.cfg.chunk, self.action_dim, device=ids.device)
        features = self.features({**batch, "dataset": torch.zeros_like(ids[:, 0])})
        chunk = self.head.predict(features, noise)
        return chunk * self.action_scale[0] + self.action_offset[0]     # (B, C, A)

    def inputs(self, batch: dict):
        """Of a linear read-out."""
        return self.head.inputs(self.features(batch))

    def layers(self) -> list[nn.Module]:
        return [*self.trunk.layers(), *self.head.layers()]

    def features(self, batch: dict) -> "Features":
        images, dataset = batch["images"], batch["dataset"]
        state = (batch["state"] - self.state_offset[dataset]) / self.state_scale[dataset]
        if self.cfg.blind:
            images = torch.zeros_like(images)
        if not self.cfg.use_state:
            state = torch.zeros_like(state)
        tokens, seen = self.trunk.prompt(images, batch["ids"], batch["mask"])
        return Features(self.trunk.hidden(tokens, seen), seen, self.from_state(state))

    def normalized(self, batch: dict):
        """The loader's actions, (B, C, A)."""
        dataset = batch["dataset"]
        offset, scale = self.action_offset[dataset, None], self.action_scale[dataset, None]
        return (batch["actions"] - offset) / scale


class Features(NamedTuple):
    """What a head knows: the trunk's states (B, T, W), of which the last is the readout; which of
    them count (B, T); the robot's state (B, W)."""
    tokens: torch.Tensor
    seen: torch.Tensor
    state: torch.Tensor

    def pooled(self):
        return self.tokens[:, -1] + self.state                          # (B, W)


class ActionHead(nn.Module):
    """An action head.

    loss(features, chunk (B, C, A), normalized) -> error of each number, (B, C, A)
    predict(features, noise (B, C, A)) -> normalized chunk (B, C, A); most need no noise
    """

    def __init__(self, cfg: Config, action_dim: int):
        super().__init__()
        self.shape = cfg.chunk, action_dim                              # C, A

    def layers(self) -> list[nn.Module]:
        return []                                                       # see shard


class ReadOut(ActionHead):
    """A linear read-out, set in closed form before the first step (start_at_closed_form): what few
    labels say is there at once, and what a subclass adds starts as zero."""

    def __init__(self, cfg: Config, action_dim: int, inputs: int):
        super().__init__(cfg, action_dim)
        self.linear = nn.Linear(inputs, cfg.chunk * action_dim)

    def inputs(self, features: Features):
        return features.pooled()


class MLP(ReadOut):
    """--head mlp: an MLP corrects the read-out; squared error."""

    def __init__(self, cfg: Config, trunk: "Trunk", action_dim: int, inputs: int = 0):
        inputs = inputs or trunk.width
        super().__init__(cfg, action_dim, inputs)
        self.mlp = two_layers(inputs, cfg.head_width, cfg.chunk * action_dim)
        start_as_zero(self.mlp[-1])

    def loss(self, features: Features, chunk):
        return (self.predict(features) - chunk).square()

    def predict(self, features: Features, noise=None):
        x = self.inputs(features)
        return (self.linear(x) + self.mlp(x)).unflatten(1, self.shape)


class Latent(MLP):
    """--head latent: the same on what stage 2's head predicts, and the state. Its weights come with
    --init and learn on."""

    def __init__(self, cfg: Config, trunk: "Trunk", action_dim: int):
        prediction = Stage2Head(cfg.init, trunk.width)
        super().__init__(cfg, trunk, action_dim, prediction.width + trunk.width)
        self.prediction = prediction

    def inputs(self, features: Features):
        latent = self.prediction(features.tokens[:, -1])                # (B, N)
        return torch.cat([latent, features.state], 1)


class ActionFlow(ActionHead):
    """--head flow: flow matching, given the readout and the state (FlowHead)."""

    def __init__(self, cfg: Config, trunk: "Trunk", action_dim: int):
        super().__init__(cfg, action_dim)
        self.flow = FlowHead(cfg.chunk * action_dim, trunk.width, cfg.head_width, 2, EULER_STEPS)

    def loss(self, features: Features, chunk):
        errors = self.flow.errors(chunk.flatten(1), features.pooled())  # (draws * B, C * A)
        return errors.unflatten(0, (self.flow.draws, -1)).mean(0).unflatten(1, self.shape)

    def predict(self, features: Features, noise):
        return self.flow.sample(features.pooled(), noise.flatten(1)).unflatten(1, self.shape)


class Bins(ActionHead):
    """--head bins: each number is in one of the bins between 256 even edges from its 1st to its
    99th percentile, as in OpenVLA (2406.09246) after RT-2 (2307.15818), but all at once;
    cross-entropy, the likeliest. What never moves is 0 and the middle of a bin."""

    bins = 255

    def __init__(self, cfg: Config, trunk: "Trunk", action_dim: int):
        super().__init__(cfg, action_dim)
        out = cfg.chunk * action_dim * self.bins
        self.mlp = two_layers(trunk.width, cfg.head_width, out)

    def loss(self, features: Features, chunk):
        scores = self.scores(features).flatten(0, 2).float()            # (B * C * A, bins)
        error = F.cross_entropy(scores, self.bin_of(chunk).flatten(), reduction="none")
        return error.view_as(chunk)

    def predict(self, features: Features, noise=None):
        return self.center_of(self.scores(features).argmax(-1))

    def scores(self, features: Features):
        return self.mlp(features.pooled()).unflatten(1, (*self.shape, self.bins))

    def bin_of(self, x):
        """Of normalized numbers: the percentiles are -1 and 1."""
        return ((x + 1) / 2 * self.bins).long().clamp(0, self.bins - 1)

    def center_of(self, number):
        return 2 * (number + 0.5) / self.bins - 1


EULER_STEPS = 10


class Expert(ReadOut):
    """--head expert: SmolVLA's action expert (2506.01844). Flow matching by a transformer of C
    noised actions: its layers attend in turn to the prefix, which is the trunk's states and a token
    of the robot's, and, causally, among actions; three quarters of the trunk's width, as many
    layers as its language model. Time and x_t are FlowHead's, without its shift.

    Where SmolVLA predicts the velocity, this corrects the read-out to the chunk that x_t is of: the
    velocity is (x_t - chunk) / t. MEASUREMENTS has what that is worth.
    """

    draws = 4                           # noise levels a sample

    def __init__(self, cfg: Config, trunk: "Trunk", action_dim: int):
        super().__init__(cfg, action_dim, trunk.width)
        text = trunk.vlm.config.text_config
        heads, depth = text.num_attention_heads, text.num_hidden_layers
        width = heads * round(0.75 * trunk.width / heads)
        crossing = (depth + 1) // 2
        self.split = crossing, 2, heads, width // heads
        self.prefix = nn.Sequential(nn.LayerNorm(trunk.width),
                                    nn.Linear(trunk.width, 2 * crossing * width))
        frequency = FlowHead.frequencies(width // 2)
        self.register_buffer("frequency", frequency, persistent=False)
        self.input = nn.Linear(action_dim, width)
        self.time = two_layers(width + 2 * len(frequency), width, width)
        self.place = nn.Parameter(0.02 * torch.randn(cfg.chunk, width))
        self.blocks = nn.ModuleList(ExpertLayer(width, heads, crosses=i % 2 == 0)
                                    for i in range(depth))
        self.output = nn.Linear(width, action_dim)
        start_as_zero(self.output)

    def layers(self) -> list[nn.Module]:
        return [*self.blocks]

    def loss(self, features: Features, chunk):
        t = FlowHead.draw_times(self.draws, len(chunk), 1, 1, device=chunk.device)
        x = t * torch.randn_like(chunk.expand(self.draws, -1, -1, -1)) + (1 - t) * chunk
        read_out, keys_values, seen = self.look(features)
        prefix = (read_out.repeat(self.draws, 1, 1), keys_values.repeat(1, 1, self.draws, 1, 1, 1),
                  seen.repeat(self.draws, 1, 1, 1))
        predicted = self.chunk_of(x.flatten(0, 1), t.flatten(0, 1), prefix)
        return (predicted.view_as(x) - chunk).square().mean(0)

    def predict(self, features: Features, noise):
        prefix, x = self.look(features), noise                          # once a chunk
        for i in range(EULER_STEPS):
            t = torch.full_like(x[:, :1, :1], 1 - i / EULER_STEPS)
            x = x - (x - self.chunk_of(x, t, prefix)) / (EULER_STEPS - i)
        return x

    def look(self, features: Features):
        """-> read-out (B, C, A), keys and values of the layers that cross, (crossing, 2, B, heads,
        T + 1, d), and which tokens count, (B, 1, 1, T + 1)"""
        tokens = torch.cat([features.tokens, features.state[:, None]], 1)
        seen = F.pad(features.seen, (0, 1), value=1).bool()
        keys_values = self.prefix(tokens.to(self.place.dtype)).unflatten(2, self.split)
        read_out = self.linear(self.inputs(features).to(self.place.dtype)).float()
        return (read_out.unflatten(1, self.shape), keys_values.permute(2, 3, 0, 4, 1, 5),
                seen[:, None, None])

    def chunk_of(self, x, t, prefix):
        """x (B, C, A), t (B, 1, 1). Parameters may be of another type (program_of)."""
        read_out, keys_values, seen = prefix
        angle = t * self.frequency                                      # (B, 1, width / 2)
        time = torch.cat([angle.sin(), angle.cos()], 2).to(self.place.dtype)
        h = self.input(x.to(self.place.dtype))                          # (B, C, width)
        h = self.time(torch.cat([h, time.expand(-1, h.shape[1], -1)], 2)) + self.place
        for i, block in enumerate(self.blocks):
            h = block(h, *keys_values[i // 2], seen) if block.crosses else block(h)
        return read_out + self.output(F.layer_norm(h, h.shape[-1:])).float()


class ExpertLayer(nn.Module):
    """Attention to keys and values (B, heads, T, d), or else to the actions before each, then an
    MLP. h (B, C, width) -> the same."""

    def __init__(self, width: int, heads: int, crosses: bool):
        super().__init__()
        self.split, self.crosses = (-1, heads, width // heads), crosses
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query = nn.Linear(width, width if crosses else 3 * width)  # or query, key and value
        self.out = nn.Linear(width, width)
        self.mlp = two_layers(width, 4 * width, width)

    def forward(self, h, keys=None, values=None, seen=None):
        query = self.query(self.norms[0](h)).unflatten(2, self.split)
        query = query.permute(2, 0, 3, 1, 4)                            # (1 or 3, B, heads, C, d)
        if self.crosses:
            mixed = F.scaled_dot_product_attention(query[0], keys, values, attn_mask=seen)
        else:
            mixed = F.scaled_dot_product_attention(*query, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norms[1](h))


def two_layers(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs))


def start_as_zero(layer: nn.Linear):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


# a new one is a class that keeps to ActionHead
HEADS = {"mlp": MLP, "expert": Expert, "flow": ActionFlow, "bins": Bins, "latent": Latent}


class Decoder:
    """What labelled episodes say about video. decoder(batch of frames t, t+k, t+2k) -> normalized
    action chunks from t (B, C, A), by kernel ridge from the latents of both pairs, as a robot
    follows its commands late, and the readouts of the first two frames, of the trunk as it was
    before any step: that knows picture and instruction, before and after. Each labelled sample is
    shown twice, as it is and shaken. It looks from the first camera alone: with further ones,
    which it has of the first frame, it read less (R2 .81 in place of .86).

    metrics: held-out R2, beside that of pooled pixel differences in place of the latents, of the
    readouts without latents, and of the first frame's readout alone, which sees no change.
    """

    def __init__(self, cfg: Config, model: Policy, episodes: int, labeller, tokens, device):
        """episodes: how many are labelled."""
        self.targets, self.labeller = cfg.targets, labeller
        self.tokens, self.device = tokens, device
        self.trunk = twin(model, cfg, "trunk").eval()
        self.shape = cfg.chunk, model.action_dim
        load = partial(data_oxe.Loader, image_size=max(labeller.image_size, self.trunk.image_size),
                       horizon_s=labeller.manifest["config"]["horizon_s"], follow=1,
                       chunk=cfg.chunk, fraction=cfg.label_fraction)
        pairs = max(8, KernelRidge.most // episodes)                    # of each; whole if few
        fit_loader = load(replace(cfg, pairs_per_episode=pairs), "train", 64, seed=2, shuffle_mb=8)
        labeller.check(cfg, fit_loader)
        torch.manual_seed(cfg.seed)
        fit = self.collect(model, fit_loader, math.ceil(KernelRidge.most / 64), shaken)
        if len(np.unique(fit["episode"])) < 2:
            fail(f"--laq-ckpt '{cfg.laq_ckpt}': a decoder is fitted on frame pairs of two labelled "
                 f"episodes at least, --mix '{cfg.mix}' has fewer")
        val = self.collect(model, load(cfg, "val", 64, seed=1, shuffle_mb=8), cfg.eval_batches)
        maps, self.metrics = {}, {"rows": len(fit["chunk"])}
        readouts = "readout", "later_readout"
        for name, features in {"": ("latent", "later_latent", *readouts),
                               "_pooled_difference": ("pooled", "later_pooled", *readouts),
                               "_readouts": readouts,
                               "_frame": ("readout",)}.items():
            x, x_val = ([rows[feature] for feature in features] for rows in (fit, val))
            maps[name] = KernelRidge(x, fit["chunk"], fit["episode"])
            unit = fit["chunk"].std(0).clamp(min=1e-3)
            self.metrics[f"r2{name}"] = r2_of_all(maps[name](x_val), val["chunk"], unit)
        self.map = maps[""]

    def __call__(self, batch: dict) -> torch.Tensor:
        features = list(self.features(batch).values())
        return self.map(features).float().unflatten(1, self.shape)

    @torch.no_grad()
    def features(self, batch: dict) -> dict:
        first, second = pairs_of(batch["frames"])
        return {"latent": self.latent(first), "later_latent": self.latent(second),
                "readout": self.readout(batch, 0), "later_readout": self.readout(batch, 1)}

    def latent(self, pair):
        codes, latents = self.labeller(pair)                            # (B, S), (B, S, D)
        latents = latents if self.targets == "vectors" else self.labeller.lookup(codes)
        return latents.flatten(1)

    def readout(self, batch: dict, frame: int):
        images = data_oxe.resize_to(batch["frames"][:, frame], self.trunk.image_size)
        return self.trunk(images, *self.tokens(batch["instruction"], self.device))

    def describe(self) -> str:
        m = self.metrics
        return (f"decoder of actions, fitted on {m['rows']} labelled pairs: held-out R2 "
                f"{m['r2']:.2f} (pooled differences for latents {m['r2_pooled_difference']:.2f}, "
                f"readouts alone {m['r2_readouts']:.2f}, frame t alone {m['r2_frame']:.2f})")

    def collect(self, model: Policy, loader, batches: int, *changes) -> dict:
        """A loader's distinct labelled pairs whose chunk is whole, as tensors of M rows; then the
        same pairs with changed frames."""
        rows, seen = [], set()
        for batch in loader.peek(batches):
            places = list(zip(*(batch[name].tolist() for name in ("dataset", "episode", "step"))))
            new = np.array([place not in seen for place in places])
            seen.update(places)
            if not new.any():                                           # all have been read
                break
            new &= batch["has_action"] & batch["action_mask"].all(1)
            tensors = data_oxe.to_device(batch, self.device, loader.image_size)
            episode = (batch["dataset"] * 1_000_003 + batch["episode"])[new]
            for frames in (tensors["frames"], *(change(tensors["frames"]) for change in changes)):
                row = self.features({**tensors, "frames": frames})
                first, second = pairs_of(frames)
                row |= {"pooled": PooledDifference()(first)[1].flatten(1),
                        "later_pooled": PooledDifference()(second)[1].flatten(1),
                        "chunk": model.normalized(tensors).flatten(1)}
                row = {name: value[torch.from_numpy(new)] for name, value in row.items()}
                rows.append(row | {"episode": episode})
        join = {name: torch.cat for name in rows[0]} | {"episode": np.concatenate}
        return {name: join[name]([row[name] for row in rows]) for name in join}


def pairs_of(frames):
    """(B, 3, H, W, 3) -> of frames t, t+k and of t+k, t+2k: (B, 2, H, W, 3) each."""
    return frames[:, :2], frames[:, 1:]


def shaken(frames, shift: float = 1 / 32, light: float = 0.1):
    """uint8 (B, T, H, W, 3): each picture moved by up to this share of its side, each of its
    colours lighter or darker by up to this share. What was done depends on neither."""
    images = frames.flatten(0, 1).permute(0, 3, 1, 2).float()                       # (B*T, 3, H, W)
    random = 2 * torch.rand(len(images), 5, device=images.device) - 1               # -1..1
    move = torch.eye(2, 3).to(images).repeat(len(images), 1, 1)
    move[:, :, 2] = 2 * shift * random[:, :2]               # the picture reaches from -1 to 1
    grid = F.affine_grid(move, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, mode="nearest", padding_mode="border",
                           align_corners=False)
    images = images * (1 + light * random[:, 2:, None, None])
    images = images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return images.unflatten(0, frames.shape[:2])


def statistics(loader, how: str, batches: int = 32) -> dict:
    """Offset and scale of actions and state from the labelled episodes that a loader reads, a row a
    dataset: {'action_offset': (datasets, A), ...}."""
    rows = list(loader.peek(batches))
    names = "action_offset", "action_scale", "state_offset", "state_scale"
    table = {name: [] for name in names}
    for i, name in enumerate(loader.names):
        mine = [batch["dataset"] == i for batch in rows]
        if not any(x.any() for x in mine):
            fail(f"none of the first {sum(map(len, mine))} samples is of dataset '{name}', so its "
                 f"actions have no scale; give it a larger share of --mix")
        actions = [b["actions"][x][b["action_mask"][x]] for b, x in zip(rows, mine)]
        state = [b["state"][x] for b, x in zip(rows, mine)]
        for what, values in (("action", actions), ("state", state)):
            offset, scale = normalization(np.concatenate(values), how)
            table[f"{what}_offset"].append(offset)
            table[f"{what}_scale"].append(scale)
    return {name: torch.tensor(np.stack(values), dtype=torch.float32)
            for name, values in table.items()}


def normalization(x: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Of samples (N, n): offset and scale (n,) that take them to about -1..1."""
    if how == "quantile":
        low, high = np.quantile(x, [0.01, 0.99], axis=0)
        offset, scale = (low + high) / 2, (high - low) / 2
    else:
        offset, scale = x.mean(0), x.std(0)
    return offset, np.where(scale < 1e-4, 1.0, scale)                   # a constant stays one


class Trunk(nn.Module):
    """A vision-language model without its output layer: images, instruction -> a readout vector.

    images uint8 (B, H, W, 3), ids int64 (B, L), mask int64 (B, L) -> (B, W). The language model
    reads `before`, the image, `between`, the instruction, `after`, and then an extra token,
    <ACTION>, which sees all others and is the readout. The three are token ids of the chat that the
    model was trained on. Positions skip padding, as in training; but without skip_padding it takes
    some: so `tiny` was measured.
    Of N cameras, images (B, N, H, W, 3), it reads one picture after the other, as SmolVLA does
    (2506.01844); but one of a further camera that is all black, as missing ones are, goes unseen.

    Pictures come as squares, as SmolVLM's processor makes them of any. The vision tower, the
    connector and the language model are called one by one: SmolVLM's forward drops all-black images
    as padding.
    """

    entries = ()

    def __init__(self, vlm, before=(), between=(), after=(), skip_padding: bool = True):
        super().__init__()
        self.vlm, self.skip_padding = vlm, skip_padding
        self.width = vlm.config.text_config.hidden_size
        self.image_size = vlm.config.vision_config.image_size
        for name, ids in {"before": before, "between": between, "after": after}.items():
            ids = torch.tensor(ids, dtype=torch.int64)
            self.register_buffer(name, ids, persistent=False)           # the tokenizer holds them
        readout = 0.02 * torch.randn(self.width)
        self.readout = nn.Parameter(readout)                # an extra last token sees the others

    def forward(self, images, ids, mask):
        return self.read(*self.prompt(images, ids, mask))[:, 0]                     # (B, W)

    def layers(self) -> list[nn.Module]:
        return [x for x in self.vlm.modules() if isinstance(x, GradientCheckpointingLayer)]

    def prompt(self, images, ids, mask):
        """-> embeddings (B, T, W) up to the readout, which of them count (B, T)"""
        cameras = images.unbind(1) if images.ndim == 5 else [images]
        image = [self.vlm.connector(self.see(camera)) for camera in cameras]        # each (B, P, W)
        B, P = image[0].shape[:2]                               # len() would fix B in an export
        shown = [mask.new_ones(B, P)]
        for camera in cameras[1:]:
            there = camera.flatten(1).any(1, keepdim=True)                          # (B, 1)
            shown.append(there.to(mask.dtype).expand(-1, P))
        parts = self.before, self.between, self.after
        before, between, after = (part.expand(B, -1) for part in parts)
        words = torch.cat([before, between, ids, after], 1)
        text = self.vlm.text_model.get_input_embeddings()(words)                    # (B, L, W)
        n = len(self.before)
        start, rest = text[:, :n], text[:, n:]
        readout = self.readout.expand(B, 1, -1).to(text.dtype)
        tokens = torch.cat([start, *image, rest, readout], 1)                       # (B, T, W)
        first, second = mask.new_ones(B, n), mask.new_ones(B, len(self.between))
        last = mask.new_ones(B, len(self.after) + 1)
        return tokens, torch.cat([first, *shown, second, mask, last], 1)

    def read(self, tokens, seen, more=None):
        """What prompt gives, and embeddings that follow the readout, (B, E, W) -> hidden states of
        the readout and of these, (B, 1 + E, W)"""
        return self.hidden(tokens, seen, more)[:, tokens.shape[1] - 1:]

    def hidden(self, tokens, seen, more=None):
        """The same -> hidden states of all, (B, T + E, W)"""
        if more is not None:
            tokens = torch.cat([tokens, more.to(tokens.dtype)], 1)                  # (B, T, W)
            seen = F.pad(seen, (0, more.shape[1]), value=1)
        positions = seen.cumsum(1) - 1 if self.skip_padding else None
        T = tokens.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
        seen = causal & seen.bool()[:, None, None]          # (B, 1, T, T), taken as it is; of a
        # (B, T) mask transformers asks the GPU whether it is all ones
        hidden = self.vlm.text_model(inputs_embeds=tokens, attention_mask=seen,
                                     position_ids=positions, use_cache=False)
        return hidden.last_hidden_state.float()

    def see(self, images):
        """Features of all patches, (B, patches, vision width). The vision tower's own forward asks
        the GPU whether a mask of ones is one."""
        tower = self.vlm.vision_model
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1                          # (B, 3, H, W)
        side = self.image_size // tower.patch_size
        everywhere = torch.ones(x.shape[0], side, side, dtype=torch.bool, device=x.device)
        x = x.to(tower.embeddings.patch_embedding.weight.dtype)         # of an export
        x = tower.embeddings(pixel_values=x, patch_attention_mask=everywhere)
        return tower.post_layernorm(tower.encoder(inputs_embeds=x).last_hidden_state)


class FlowHead(nn.Module):
    """Flow matching (Lipman et al., 2210.02747) of a flat vector given a condition, with SmolVLA's
    conventions: x_t = t noise + (1 - t) x, the network predicts noise - x, sampling goes from t = 1
    to 0 in Euler steps.

    loss(x (B, N), cond (B, W), weight (B, N)) -> scalar; sample(cond, noise (B, N)) -> (B, N)
    """

    draws = 8               # noise levels a sample: the head is cheap beside the trunk

    def __init__(self, n: int, cond: int, width: int, depth: int, steps: int):
        super().__init__()
        self.steps = steps                                                  # Euler steps
        self.register_buffer("frequency", self.frequencies(32), persistent=False)
        self.input = nn.Linear(n, width)
        self.time = nn.Linear(64, width)
        self.cond = nn.Linear(cond, width)
        self.mod = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth))
        self.output = nn.Linear(width, n)
        for layer in [*self.mod, self.output]:              # blocks start as identity, output 0
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @staticmethod
    def frequencies(count: int):
        period = 4e-3 * (4 / 4e-3) ** torch.linspace(0, 1, count)
        return 2 * math.pi / period

    @staticmethod
    def draw_times(*shape: int, device):
        """Beta(1.5, 1), as in SmolVLA, by inversion, above 0.001."""
        u = torch.rand(shape, device=device)
        return u ** (1 / 1.5) * 0.999 + 0.001

    def forward(self, x, t, cond):
        """Velocity (B, N) at x (B, N), t (B,)."""
        angle = t[:, None] * self.frequency                                         # (B, 32)
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))                  # (B, width)
        c = F.silu(self.cond(cond) + time)
        h = self.input(x) + c
        for mod, mlp in zip(self.mod, self.mlp):
            scale, bias, gate = mod(c).chunk(3, 1)
            standard = F.layer_norm(h, h.shape[-1:])
            h = h + gate * mlp(standard * (1 + scale) + bias)
        return self.output(F.layer_norm(h, h.shape[-1:]))

    def loss(self, x, cond, weight):
        weight = weight.repeat(self.draws, 1)
        error = self.errors(x, cond) * weight
        error = error.sum(1) / weight.sum(1).clamp(min=1)
        return error.mean()                     # of samples: alike however processes divide them

    def errors(self, x, cond):
        """Squared velocity errors (draws * B, N). Times are shifted towards noise (SD3,
        2403.03206): in many dimensions x_t gives x away unless t is close to 1."""
        x, cond = (a.repeat(self.draws, 1) for a in (x, cond))
        t = self.draw_times(len(x), device=x.device)
        t = 4 * t / (1 + 3 * t)
        noise = torch.randn_like(x)
        x_t = t[:, None] * noise + (1 - t[:, None]) * x
        velocity = self(x_t, t, cond)
        return (velocity - (noise - x)).square()

    def sample(self, cond, noise):
        x = noise
        for i in range(self.steps):
            t = torch.full_like(x[:, 0], 1 - i / self.steps)
            x = x - self(x, t, cond) / self.steps
        return x


class Tokens:
    """Instructions -> ids, mask int64 (B, L); each sentence is tokenized once."""

    def __init__(self, tokenizer, length: int):
        self.tokenizer, self.length, self.cache = tokenizer, length, {}
        tokenizer.padding_side = "right"                    # kept by save_pretrained, for the robot
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, texts: list[str], device):
        for text in set(texts) - self.cache.keys():
            self.cache[text] = np.array(self.tokenize(text))            # (2, L)
        rows = np.stack([self.cache[text] for text in texts], 1)        # (2, B, L)
        return data_oxe.send(rows, device).unbind()                     # waits for no GPU

    def tokenize(self, text: str) -> tuple[list, list]:
        whole = self.tokenizer(text)["input_ids"]
        if len(whole) > self.length:
            warn(f"--text-len {self.length} cuts the {len(whole)} tokens of '{text}'")
        x = self.tokenizer(text, padding="max_length", max_length=self.length, truncation=True)
        return x["input_ids"], x["attention_mask"]


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


# ------------------------------------------------------------ evaluation
def to_inputs(batch: dict, model: Policy, tokens, device, decoder: Decoder | None = None) -> dict:
    """The loader's batch on the device -> what Policy takes. With a decoder it is video: it has no
    state, all of it counts, and its chunks are decoded."""
    ids, mask = tokens(batch["instruction"], device)
    images = data_oxe.resize_to(pictures(batch), model.trunk.image_size)
    inputs = {"images": images, "ids": ids, "mask": mask}
    if decoder:
        first = torch.zeros_like(batch["dataset"])                      # (B,)
        return inputs | {
            "dataset": first, "state": model.state_offset[first], "chunk": decoder(batch),
            "weight": torch.ones(len(ids), model.cfg.chunk, device=device),
            "is_video": torch.ones_like(first, dtype=torch.bool)}
    return inputs | {
        "dataset": batch["dataset"], "state": batch["state"], "chunk": model.normalized(batch),
        "weight": batch["action_mask"].float(),
        "is_video": torch.zeros_like(batch["dataset"], dtype=torch.bool)}


def pictures(batch: dict):
    """What a policy sees, (B, H, W, 3), or of N cameras (B, N, H, W, 3)."""
    if "views" not in batch:
        return batch["frames"][:, 0]
    return torch.cat([batch["frames"][:, :1], batch["views"]], 1)


class Nearest:
    """What copying does: nearest(batch) -> the actions (B, C, A) of that labelled training frame
    which looks most alike, by colours in 8x8 cells, among those of the same instruction where there
    are any. Of the first dataset."""

    def __init__(self, loader, device, batches: int = 32):
        cells, actions, texts = [], [], []
        for batch in loader.peek(batches):
            mine = batch["dataset"] == 0
            texts.append(np.array(batch["instruction"])[mine])
            batch = data_oxe.to_device(batch, device, loader.image_size)
            cells.append(self.cells_of(batch)[torch.from_numpy(mine)])
            actions.append(batch["actions"][torch.from_numpy(mine)])
        self.cells, self.actions = torch.cat(cells), torch.cat(actions)     # (M, N*192), (M, C, A)
        self.texts = np.concatenate(texts)

    def cells_of(self, batch: dict):
        images = pictures(batch).flatten(0, -4).permute(0, 3, 1, 2).float() / 255
        return F.adaptive_avg_pool2d(images, 8).reshape(len(batch["dataset"]), -1)

    def __call__(self, batch: dict):
        distance = torch.cdist(self.cells_of(batch), self.cells)                    # (B, M)
        same = np.array(batch["instruction"])[:, None] == self.texts
        other = torch.from_numpy(~same & same.any(1, keepdims=True)).to(distance.device)
        return self.actions[distance.masked_fill(other, math.inf).argmin(1)]


@torch.no_grad()
def evaluate(model: Policy, cfg: Config, loader, nearest: Nearest, tokens, device) -> dict:
    """On held-out episodes: loss, and mean absolute and squared error of actions, over all
    dimensions and of each, beside those of the mean action and of the nearest labelled frame's;
    errors are of the first dataset, whose units the policy speaks."""
    model.eval()
    torch.manual_seed(cfg.seed)                                         # the same noise each time
    losses, errors = [], {"": [], "_mean_action": [], "_nearest": []}
    for batch in loader.peek(cfg.eval_batches):
        batch = data_oxe.to_device(batch, device, loader.image_size)
        inputs = to_inputs(batch, model, tokens, device)
        losses.append(model(inputs)["labelled"].item())
        actions = batch["actions"]                                      # (B, C, A)
        mask = batch["action_mask"] & (batch["dataset"] == 0)[:, None]
        guesses = model.act(inputs), actions[mask].mean(0), nearest(batch)
        for who, guess in zip(errors, guesses):                         # the mean knows the answers
            errors[who].append((guess - actions)[mask].cpu())
    model.train()
    out = {"loss": np.mean(losses)}
    for who, error in errors.items():
        error = torch.cat(error)                                        # (steps, A)
        for name, each in {"error": error.abs(), "mse": error.square()}.items():
            out[f"action_{name}{who}"] = each.mean(1).mean().item()
            out |= {f"action_{name}{who}_{i}": x for i, x in enumerate(each.mean(0).tolist())}
    return out


def describe(m: dict) -> str:
    each = [f"{m[name]:.2f}" for name in m if re.fullmatch(r"action_error_\d+", name)]
    success = f" | success {m['success']:.2f} in rollouts" if "success" in m else ""
    return (f"held-out action error {m['action_error']:.3f} (nearest labelled frame's action "
            f"{m['action_error_nearest']:.3f}, mean action {m['action_error_mean_action']:.3f}), "
            f"by dimension {' '.join(each)} | loss {m['loss']:.3f}{success}")


def judged(m: dict, cfg: Config) -> float:
    """What the best policy has least of: held-out error, or, with --rollout-every, failed episodes,
    of equally many the error."""
    if not cfg.rollout_every:
        return m["action_error"]
    if "failures" not in m:                                             # none were due
        return math.inf
    return m["failures"] + m["action_error"] / (1 + m["action_error"])


# ------------------------------------------------------------ main
def main(cfg: Config) -> int:
    pretraining = read_stage2(cfg)
    check(cfg, pretraining)
    rank, world, device = setup(cfg)
    local = cfg.batch_size // world                                     # samples a process
    labeller = load_labeller(cfg.laq_ckpt, device) if cfg.laq_ckpt else None
    trunk, tokenizer = load_stage2(cfg, pretraining)
    tokens = Tokens(tokenizer, cfg.text_len)
    loader = Sources(cfg, trunk.image_size, labeller, local, rank, world)
    fit_loader, val_loader = labelled_loaders(cfg, trunk.image_size)
    rollouts = Rollouts(cfg, tokenizer, loader.labelled, pretraining)
    model = make_model(cfg, trunk, fit_loader)
    flops = flops_a_sample(model, cfg)
    train = wrap(model, cfg, device)
    start_at_closed_form(model, cfg, tokens, fit_loader, device)
    nearest = Nearest(fit_loader, device)
    decoder = Decoder(cfg, model, loader.episodes, labeller, tokens, device) if labeller else None
    average, best = twin(model, cfg), twin(model, cfg)
    kept = nn.ModuleDict({"model": model, "average": average, "best": best})
    optimizer = slow_down(make_optimizer(cfg, model), model.trunk, cfg.trunk_lr)
    start = load_checkpoint(cfg, kept, optimizer, loader, rank, world) if cfg.resume else 0
    if cfg.export_only:
        export(best, cfg, start, tokenizer, loader.labelled, pretraining)
        return 0
    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    log = Logger(cfg, rank, world, start, flops, device)
    log.print(f"{size_of(model)}, {flops / 1e9:.2f} GFLOP a sample\n{loader.summary()}")
    if decoder:
        log.validation(start, decoder.metrics, decoder.describe())
    save = Saver(cfg, kept, optimizer, loader)
    stop_flag, batches = StopFlag(cfg, device), loader.to(device)

    for step in range(start, cfg.steps + 1):                            # one more: evaluates, saves
        stop, last = stop_flag(step), step == cfg.steps
        if not stop and (last or step % cfg.eval_every == 0):
            with log.paused():
                metrics = evaluate(average, cfg, val_loader, nearest, tokens, device)
                metrics |= rollouts(average, step, stop_flag)           # {} where none are due
            log.validation(step, metrics, describe(metrics))
            save.judge(step, keep_best(best, average, judged(metrics, cfg)))
            stop = rollouts.stopped                                     # --resume repeats them
        if stop or last or (step > start and save.due(step)):
            with log.paused():
                save(step, wait=stop or last)
        if stop or last:
            break

        start_step(cfg, step, optimizer, rank, world)                   # learning rate, randomness
        with log.waiting():
            sources = next(batches)
        means, kinds = {}, zip(sources, (None, decoder))                # labelled, video
        inputs = [to_inputs(batch, model, tokens, device, how) for batch, how in kinds]
        inputs = {name: torch.cat([x[name] for x in inputs]) for name in inputs[0]}
        for piece, share, is_last in pieces(inputs, cfg.micro_batch or local):
            train.require_backward_grad_sync = is_last                  # DDP: average once a step
            with amp:
                parts = train(piece)
            loss = sum(parts.values())
            (loss * share).backward()
            for name, part in {"loss": loss, **parts}.items():
                means[name] = means.get(name, 0.0) + share * part.detach()
        means["grad_norm"] = clip_gradients(model, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        follow(average, model, step)
        log.step(step, means, sources[0])
    if not stop:
        export(best, cfg, cfg.steps, tokenizer, loader.labelled, pretraining)
        log.print(f"policy: {cfg.out}/policy")
    return log.close(stop)


# ------------------------------------------------------------ a reader may stop here
def labelled_loaders(cfg: Config, image_size: int) -> tuple:
    """Labelled training episodes, to fit on and to copy from, and held-out ones."""
    load = partial(data_oxe.Loader, cfg, batch_size=64, image_size=image_size, horizon_s=0.0,
                   chunk=cfg.chunk, fraction=cfg.label_fraction, cameras=cfg.cameras, shuffle_mb=8)
    return load("train", seed=0), load("val", seed=1)


def make_model(cfg: Config, trunk: Trunk, loader) -> Policy:
    """In the units of a loader's episodes."""
    freeze(trunk, cfg)
    torch.manual_seed(cfg.seed)                             # the same head whatever the trunk drew
    return Policy(cfg, trunk, statistics(loader, cfg.normalize))


@torch.no_grad()
def start_at_closed_form(model: Policy, cfg: Config, tokens, loader, device, penalty: float = 0.1):
    """Sets a linear read-out to the ridge regression of a loader's chunks on the features, so that
    iteration 0 acts already."""
    if not isinstance(model.head, ReadOut):
        return
    head = model.head
    tensors = (data_oxe.to_device(batch, device, loader.image_size)
               for batch in loader.peek(cfg.eval_batches))
    batches = [to_inputs(batch, model, tokens, device) for batch in tensors]
    x = torch.cat([model.inputs(batch) for batch in batches]).double()                  # (M, n)
    y = torch.cat([batch["chunk"].flatten(1) for batch in batches]).double()
    weight = torch.cat([batch["weight"].mean(1, keepdim=True) for batch in batches]).double()
    total = weight.sum()
    center, mean = (weight * x).sum(0) / total, (weight * y).sum(0) / total
    x, y = x - center, y - mean
    scale = (weight * x.square()).sum(0).div(total).sqrt()
    scale = scale.clamp(min=0.01 * scale.mean().item() + 1e-8)
    x = x / scale
    gram = x.T @ (weight * x) / total + penalty * torch.eye(len(scale)).to(x)
    slope = torch.linalg.solve(gram, x.T @ (weight * y) / total) / scale[:, None]
    solution = {"weight": slope.T, "bias": mean - center @ slope}
    for name, value in solution.items():
        value = mean_of_ranks(value.float().contiguous())               # to the last digit the same
        parameter = head.linear.get_parameter(name)
        parameter.copy_(divided(value, parameter))


def frozen_of(model: nn.Module) -> dict:
    """What deepcopy need not copy."""
    return {id(p): p for p in model.parameters() if not p.requires_grad}


def twin(model: Policy, cfg: Config, part: str = "") -> nn.Module:
    """A copy of the model or of a part, sharded as it is; unless sharded, it shares what is
    frozen."""
    mine = model.get_submodule(part)
    if not isinstance(model, FSDPModule):
        return copy.deepcopy(mine, frozen_of(mine))
    copied = shard(copy.deepcopy(model.hollow.get_submodule(part)), cfg)
    state = {name: x.clone() for name, x in mine.state_dict().items()}
    copied.load_state_dict(state, assign=True)
    return copied


@torch.no_grad()
def follow(average: Policy, model: Policy, step: int):
    """The average's weights follow the model's: of ten steps at first, later of a hundred."""
    decay = min(0.99, (step + 1) / (step + 10))
    its, new = ([p for p in x.parameters() if p.requires_grad] for x in (average, model))
    torch._foreach_lerp_(its, new, 1 - decay)


@torch.no_grad()
def keep_best(best: Policy, model: Policy, error: float) -> float:
    """Takes the weights of a model that errs less. -> its error"""
    if error < best.error:
        best.load_state_dict(model.state_dict())
        best.error.fill_(error)
    return error


def slow_down(optimizer, part: nn.Module, share: float):
    """A part of the model learns at a share of the learning rate: see start_step."""
    mine = {id(p) for p in part.parameters()}
    for group in list(optimizer.param_groups) if share != 1 else ():
        slow = [p for p in group["params"] if id(p) in mine]
        group["params"] = [p for p in group["params"] if id(p) not in mine]
        optimizer.add_param_group({**group, "params": slow, "share": share})
    return optimizer


class Rollouts:
    """Success of the policy while it learns, each rollout_every steps and at the end: rollout.py,
    in a process of its own on rank 0's node, acts in the world and on the tasks of the mix's first
    dataset. Training waits for it, so that a resumed run is equal; the first is of step 0, so that
    a simulator that does not start is told at once. Results, videos, log: OUT/rollout/step_N.

    rollouts(model, step, stop_flag) -> {"success": share, "failures": number of episodes}; {} where
    none are due, or a signal, `stopped`, came meanwhile. All ranks call it. Episodes in which the
    simulator crashed count as failures.
    """

    seeds = 1           # block of environment seeds, to choose by: another than rollout.py's own

    def __init__(self, cfg: Config, tokenizer, loader, pretraining: dict):
        self.cfg, self.handed, self.group = cfg, (tokenizer, loader, pretraining), None
        self.stopped = 0
        if not cfg.rollout_every:
            return
        name = loader.names[0]
        world, tasks = data_oxe.world_of(cfg.data, name)
        self.command = [sys.executable, str(Path(__file__).with_name("rollout.py")),
                        "--world", world, "--tasks", *tasks,
                        "--episodes", str(cfg.rollout_episodes), "--seed", str(self.seeds)]
        if level := re.search(r"_distract(\d+)$", name):
            self.command += ["--distract", str(int(level[1]) / 100)]
        if dist.is_initialized():                           # whose other ranks wait long
            self.group = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def __call__(self, model: Policy, step: int, stop_flag) -> dict:
        every = self.cfg.rollout_every
        if not every or step % every and step != self.cfg.steps:
            return {}
        folder = Path(self.cfg.out) / f"rollout/step_{step:08d}"
        first = int(os.environ.get("RANK", 0)) == 0
        if first:
            shutil.rmtree(folder, ignore_errors=True)       # rollouts that did not end
        export(model, replace(self.cfg, out=str(folder)), step, *self.handed, to_lerobot=False)
        found = [self.run(folder, stop_flag) if first else None]
        if self.group:
            dist.broadcast_object_list(found, 0, self.group)
        self.stopped = found[0].pop("signal", 0)
        return found[0]

    def run(self, folder: Path, stop_flag) -> dict:
        alone = {name: value for name, value in os.environ.items()
                 if name not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        command = [*self.command, "--policy", str(folder / "policy"), "--out", str(folder)]
        path = folder / "log.txt"
        with path.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=alone,
                                       start_new_session=True)          # Ctrl-C comes to us alone
            while process.poll() is None:
                time.sleep(0.1)
                if stop_flag.received:
                    process.terminate()
                    process.wait()
                    return {"signal": stop_flag.received}
        if process.returncode:
            said = path.read_text().strip().rpartition("\n")[2]
            fail(f"--rollout-every: rollout.py ended with {process.returncode} ({said}); "
                 f"see '{path}'")
        shutil.rmtree(folder / "policy")
        results = json.loads((folder / "results.json").read_text())
        ended, crashed = results["tasks"]["all"], results["crashed"]
        episodes, successes = ended["episodes"] + len(crashed), ended["successes"]
        return {"success": successes / episodes, "failures": episodes - successes}


class Sources:
    """The labelled episodes and, with a labeller, the video: iterates over [batch, batch]."""

    def __init__(self, cfg: Config, image_size: int, labeller, local: int, rank: int, world: int):
        video = round(cfg.video_share * local) if labeller else 0
        if labeller and not 0 < video < local:
            fail(f"--video-share {cfg.video_share} of {local} samples a process is {video} of "
                 f"video; both kinds need one")
        load = partial(data_oxe.Loader, split="train", chunk=cfg.chunk, seed=cfg.seed, rank=rank,
                       world=world, cameras=cfg.cameras)
        self.labelled = load(cfg, batch_size=local - video, image_size=image_size, horizon_s=0.0,
                             fraction=cfg.label_fraction)
        self.loaders = [self.labelled]
        self.episodes = sum(plan.used for plan in self.labelled.plans)
        check_widths(self.labelled)
        data_oxe.check_cameras(self.labelled.plans, cfg.cameras)
        if labeller:
            every = replace(cfg, mix=cfg.video or cfg.mix, episodes_per_task=0)
            self.loaders.append(load(every, batch_size=video,
                                     image_size=max(image_size, labeller.image_size),
                                     horizon_s=labeller.manifest["config"]["horizon_s"], follow=1))
            if cfg.video:                                               # --mix: see Decoder
                labeller.check(every, self.loaders[1])

    def to(self, device):
        return zip(*(loader.to(device) for loader in self.loaders))

    def summary(self) -> str:
        names = "labelled", "video"
        return "\n".join(f"{name}: {x.summary()}" for name, x in zip(names, self.loaders))

    def state_dict(self) -> list:
        return [loader.state_dict() for loader in self.loaders]

    def load_state_dict(self, states: list):
        for loader, state in zip(self.loaders, states):
            loader.load_state_dict(state)

    def skip(self, batches: int):
        for loader in self.loaders:
            loader.skip(batches)


def check(cfg: Config, pretraining: dict):
    """Fills in learning rate and warm-up: a large trunk wants a tenth of tiny's rate; and what the
    trunk of a stage 2 is. Exits where settings do not go together."""
    if cfg.laq_ckpt == "pooled" and cfg.targets == "codes":
        fail("--laq-ckpt pooled has no codes; give --targets vectors")
    if cfg.video and not cfg.laq_ckpt:
        fail(f"--video '{cfg.video}' needs --laq-ckpt, which decodes its actions")
    if cfg.shrink and not cfg.random_init:
        fail("--shrink makes a toy of the trunk, which can only be random; give --random-init too")
    if cfg.head == "latent" and not pretraining:
        fail("--head latent decodes what stage 2 predicts, --init none has no stage 2; give --init")
    if cfg.head == "bins" and cfg.normalize != "quantile":
        fail(f"--head bins divides percentiles; give --normalize quantile, not {cfg.normalize}")
    if not 0 < cfg.label_fraction <= 1:
        fail(f"--label-fraction {cfg.label_fraction} is a share of the episodes, above 0 and at "
             f"most 1")
    if cfg.label_fraction < 1 and cfg.episodes_per_task:
        fail(f"--label-fraction {cfg.label_fraction} and --episodes-per-task "
             f"{cfg.episodes_per_task} both choose the labelled episodes; give one")
    if cfg.trunk_lr <= 0:
        fail(f"--trunk-lr {cfg.trunk_lr} is a share of --lr, above 0; --freeze trunk keeps the "
             f"trunk as it is")
    every = max(1, cfg.eval_every)
    if cfg.rollout_every < 0 or cfg.rollout_every % every or cfg.rollout_episodes < 1:
        fail(f"--rollout-every {cfg.rollout_every} must be a multiple of --eval-every "
             f"{cfg.eval_every}, as rollouts are a part of validation, and --rollout-episodes "
             f"{cfg.rollout_episodes} at least 1")
    cfg.trunk = pretraining.get("trunk", cfg.trunk)
    tiny = cfg.trunk == "tiny"
    if cfg.freeze is None:
        cfg.freeze = "vision" if cfg.trunk == "dual-7b" else "none"
    if cfg.lr is None:
        cfg.lr = 1e-3 if tiny else 1e-4
    if cfg.warmup_steps is None:
        cfg.warmup_steps = min(50 if tiny else 1000, cfg.steps // 4)


def freeze(trunk: Trunk, cfg: Config):
    """Leaves to learn what --freeze, --freeze-layers and --lora-rank say; the readout always."""
    vlm = trunk.vlm
    layers = vlm.text_model.layers
    if not 0 <= cfg.freeze_layers <= len(layers):
        fail(f"--freeze-layers {cfg.freeze_layers}: the language model of '{cfg.trunk}' has "
             f"{len(layers)} layers")
    parts = {"none": [], "vision": [vlm.vision_model], "trunk": [vlm]}[cfg.freeze]
    for part in [*parts, *layers[:cfg.freeze_layers]]:
        part.requires_grad_(False)
    if cfg.lora_rank:
        vlm.text_model = with_lora(vlm.text_model, cfg)


def with_lora(text_model: nn.Module, cfg: Config) -> nn.Module:
    """Low-rank changes of frozen matrices (2106.09685), in all layers after --freeze-layers."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        fail("--lora-rank needs peft: pip install peft")
    first = cfg.freeze_layers
    linear = {f"layers.{i}.{name}": name.rpartition(".")[2]
              for i, layer in enumerate(text_model.layers[first:], first)
              for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    for name in cfg.lora_modules:
        if name not in linear.values():
            fail(f"--lora-modules {name}: the language model of '{cfg.trunk}' has no such matrix "
                 f"after its first {first} layers (--freeze-layers), only "
                 f"{', '.join(sorted(set(linear.values()))) or 'none'}")
    paths = [path for path, name in linear.items() if name in cfg.lora_modules]
    lora = LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules=paths)
    with warnings.catch_warnings():                         # peft asks for what is to be renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(text_model, lora)


def check_widths(loader):
    """Exits where the datasets of a mix have actions of different widths, or none."""
    widths = {plan.name: len(data_oxe.kinds_of(plan.entry.action)) for plan in loader.plans}
    if min(widths.values()) < max(1, loader.action_dim):
        fail(f"a policy learns actions of one width from all of --mix, but these are {widths} wide")


def flops_a_sample(model: Policy, cfg: Config) -> int:
    """Of forward and backward; of shapes, so that nothing is computed."""
    model = hollow(model).to("meta")
    images, state, ids, mask, chunk = example_of(model, cfg, "meta")
    yes = torch.ones_like(ids[:, 0], dtype=torch.bool)
    inputs = {"images": images, "state": state, "ids": ids, "mask": mask, "chunk": chunk,
              "weight": chunk[..., 0], "is_video": yes, "dataset": torch.zeros_like(ids[:, 0])}
    return flops_of(model, lambda: model(inputs)) // 2


def example_of(model: Policy, cfg: Config, device="cpu") -> tuple:
    """Two samples of policy.pt2's inputs: images, state, ids, mask, noise."""
    side, words = model.trunk.image_size, (2, cfg.text_len)
    cameras = (cfg.cameras,) if cfg.cameras > 1 else ()
    with torch.device(device):
        return (torch.zeros(2, *cameras, side, side, 3, dtype=torch.uint8),
                torch.zeros(2, model.state_offset.shape[1]),
                torch.ones(words, dtype=torch.int64), torch.ones(words, dtype=torch.int64),
                torch.zeros(2, cfg.chunk, model.action_offset.shape[1]))


# ------------------------------------------------------------ hand-over files
class Labeller:
    """laq.pt2. labeller(frames uint8 (B, 2, H, H, 3)) -> codes int64 (B, S), unquantized latents
    float32 (B, S, D), in full float32; a file of schema laq.v1 has the codes' vectors instead.

    image_size: what it was trained on; codebook (S, K, D); manifest.
    """

    def __init__(self, program, manifest: dict, codebook: torch.Tensor):
        self.program, self.manifest, self.codebook = program, manifest, codebook
        self.image_size = manifest["image_size"]
        self.graphs = {}                                                # by the frames' shape

    def __call__(self, frames):
        frames = data_oxe.resize_to(frames, self.image_size)
        if frames.device.type != "cuda":
            return self.label(frames)
        if frames.shape not in self.graphs:
            self.graphs[frames.shape] = self.record(frames)
        graph, given, labels = self.graphs[frames.shape]
        given.copy_(frames)
        graph.replay()
        return tuple(x.clone() for x in labels)

    def label(self, frames):
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")                   # near codes differ little
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            codes, *_, latents = self.program(frames)
        torch.set_float32_matmul_precision(precision)
        return codes, latents

    @torch.no_grad()
    def record(self, frames) -> tuple:
        """A CUDA graph: one call starts all kernels, as a GPU is done with a small quantizer's
        before Python has called them. -> it, and the tensors that it reads and writes"""
        given, stream = frames.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):                                          # what is done only once
                self.label(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):    # the loader goes on
            labels = self.label(given)
        return graph, given, labels

    def lookup(self, codes):
        """The vectors of codes (B, S), (B, S, D)."""
        token = torch.arange(codes.shape[1], device=codes.device)
        return self.codebook.to(codes.device)[token, codes]

    def check(self, cfg, loader):
        """Exits where it labels other pairs than the loader gives; warns where validation may hold
        what it was trained on."""
        mine, its = loader.horizon, self.manifest["horizon"]
        for name in mine.keys() & its.keys():
            if mine[name] != its[name]:
                fail(f"'{cfg.laq_ckpt}' labels pairs of '{name}' that are {its[name]} apart; the "
                     f"registry now says {mine[name]}")
        warn_of_holdout(cfg, self.manifest["config"], cfg.laq_ckpt)


class PooledDifference(Labeller):
    """'pooled' in place of a file: the difference of the frames in 8x8 cells, 192 numbers of which
    nothing is learned. A control; it has no codes."""

    def __init__(self):
        manifest = {"schema": "pooled", "image_size": 64, "horizon": {},
                    "config": {"horizon_s": None}}
        super().__init__(None, manifest, None)

    def __call__(self, frames):
        frames = data_oxe.resize_to(frames, self.image_size)
        channels_first = frames.permute(0, 1, 4, 2, 3)
        a, b = (channels_first.float() / 255).unbind(1)                 # (B, 3, H, H) each
        cells = F.adaptive_avg_pool2d(b - a, 8)                         # (B, 3, 8, 8)
        return None, cells.flatten(1)[:, None]

    def check(self, cfg, loader):
        """There is nothing that could not fit."""


def load_labeller(path: str, device: torch.device) -> Labeller:
    """Exits where the file does not fit its manifest, or the stored probe frames do not give the
    stored codes."""
    if path == "pooled":
        return PooledDifference()
    if not Path(path).is_file():
        fail(f"no labeller at --laq-ckpt '{path}'; laq.py writes OUT/laq.pt2, 'pooled' needs no "
             f"file")
    program, extra = open_program(path)
    try:
        manifest = json.loads(extra["manifest.json"])
        tensors = safetensors_load(base64.b64decode(extra["tensors.safetensors.b64"]))
        if manifest["schema"] not in ("laq.v1", "laq.v2"):
            fail(f"'{path}': schema is {manifest['schema']!r}, expected 'laq.v2'")
        manifest["image_size"], manifest["horizon"], manifest["config"]["horizon_s"]
        probe, probe_codes = tensors["probe_frames"], tensors["probe_codes"]
        shape = tuple(manifest[k] for k in ("tokens", "codes", "code_dim"))
        if tuple(tensors["codebook"].shape) != shape:
            fail(f"'{path}': codebook is {tuple(tensors['codebook'].shape)}, its manifest says "
                 f"{shape}")
    except (KeyError, ValueError, SafetensorError) as error:
        fail(f"'{path}' is damaged or no labeller ({type(error).__name__}: {error})")
    if device.type != "cpu":
        program = move_to_device_pass(program, str(device))
    labeller = Labeller(program.module(), manifest, tensors["codebook"])
    if device.type != "meta":                                           # which computes nothing
        codes = labeller(probe.to(device))[0].cpu()
        if not torch.equal(codes, probe_codes):
            fail(f"'{path}': the probe frames give codes {codes.tolist()}, expected "
                 f"{probe_codes.tolist()}")
    return labeller


# All that an archive by laq.py or finetune.py may hold: its members, its operators (a model of your
# own may need others: add them) and, by the name of their field, the texts of its JSON, of which
# torch evaluates some.
MEMBERS = (r"data/weights/(weight_\d+|model_weights_config\.json)"
           r"|data/constants/(tensor_\d+|model_constants_config\.json)"
           r"|data/sample_inputs/model\.pt|models/model\.json|extra/[\w.]+"
           r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)")
OPERATORS = """
    __and__ _assert_tensor_metadata abs adaptive_avg_pool2d add addmm alias all amax amin any arange
    argmax argmin avg_pool2d batch_norm bmm bucketize cat chunk clamp concat contiguous conv2d
    cos cumsum detach div dropout einsum elu embedding eq erf exp expand flatten floor full
    full_like gather ge gelu group_norm gt index index_select layer_norm le leaky_relu linear
    log log_softmax logical_and logical_not lt masked_fill matmul max max_pool2d maximum mean
    min minimum mul nan_to_num ne neg new_ones one_hot ones pad permute pixel_shuffle
    pixel_unshuffle pow reciprocal relu repeat reshape rms_norm roll round rsqrt
    scaled_dot_product_attention select sigmoid sign silu sin slice softmax split sqrt square
    squeeze stack std sub sum sym_size tanh tile to topk transpose tril triu unbind unflatten
    unsqueeze upsample_bilinear2d upsample_nearest2d var view view_as where zeros zeros_like"""
SYMBOL = r"Symbol\('s\d+', positive=True, integer=True\)"
SIZE = r"L\['\w+'\]\.size\(\)\[\d+\]"
TREE = r'([\[\]{}:, 1]|null|"(type|context|children_spec|builtins\.(tuple|dict)|null|\[\])")*'
DOTTED = ("key", "fqn", "parameter_name", "buffer_name", "torch_version")
COMMENTS = ("stack_trace", "nn_module_stack", "torch_fn")
TEXTS = {"target": rf"torch\.ops\.aten\.({'|'.join(OPERATORS.split())})\.[A-Za-z]\w*",
         "expr_str": rf"{SYMBOL}|Mul\(Integer\(\d+\), {SYMBOL}\)",
         "guards_code": f"{SIZE} == {SIZE}",
         "in_spec": TREE, "out_spec": TREE,
         "path_name": r"(weight|tensor)_\d+",
         "as_string": r"[\w,>-]*",                              # 'tanh', einsum's 'bsd,skd->bsk'
         **dict.fromkeys(DOTTED, r"[\w.+]*"), **dict.fromkeys(COMMENTS, r"(?s:.*)")}


def texts(part, field: str = ""):
    """All texts of parsed JSON, each with the name of its field; that name comes as a "key"."""
    if isinstance(part, dict):
        for name, value in part.items():
            yield "key", name
            yield from texts(value, name)
    elif isinstance(part, list):
        for value in part:
            yield from texts(value, field)
    elif isinstance(part, str):
        yield field, part


def foreign(archive):
    """What an archive holds and no export of this project does."""
    members = archive.get_file_names()
    yield from (f"member {n[:80]!r}" for n in members if not re.fullmatch(MEMBERS, n, re.ASCII))
    if archive.read_bytes("data/sample_inputs/model.pt"):
        yield "pickled inputs in 'data/sample_inputs/model.pt'"
    for member in members:
        if not member.endswith(".json") or member.startswith("extra/"):
            continue
        content = json.loads(archive.read_string(member))
        for name, payload in content.get("config", {}).items():
            if payload["use_pickle"] is not False:
                yield f"pickled {name[:80]!r} in '{member}'"
        for field, text in texts(content):
            if not re.fullmatch(TEXTS.get(field, r"\w*"), text, re.ASCII):
                yield f"{field} {text[:80]!r} in '{member}'"


def open_program(path):
    """laq.pt2 or policy.pt2 -> (ExportedProgram, {name: text} of its extra files), or exits.

    The bytes that are loaded are those that were checked. Promised: no pickle and no library of the
    file is loaded, of its text only names and sizes become code, and the program has no operators
    but those above. Not promised: that torch, which parses it, has no faults; that the program is
    small, ends, or does what its author says. A .pt2 is a program: load only what you trust.
    """
    from torch.export.pt2_archive import PT2ArchiveReader
    from torch.export.pt2_archive._package import load_pt2     # export.load also tries old layouts
    try:
        data = Path(path).read_bytes()
        if damaged := zipfile.ZipFile(io.BytesIO(data)).testzip():      # torch does not look
            raise ValueError(f"the checksum of {damaged} is wrong")
        found = next(foreign(PT2ArchiveReader(io.BytesIO(data))), None)
        if found is None:
            contents = load_pt2(io.BytesIO(data))
            return contents.exported_programs["model"], contents.extra_files
        reason = f"holds {found}"
    except Exception as e:                                      # the readers fail in many ways
        reason = f"cannot be read ({type(e).__name__}: {str(e).partition(chr(10))[0][:200]})"
    fail(f"'{path}' {reason}; load only files you trust, "
         f"or export it again with this project's scripts")


def check_sums(folder: Path):
    """Exits where the files of a hand-over folder are not those that were exported."""
    path = folder / "SHA256SUMS"
    if not path.is_file():
        return warn(f"'{folder}' has no SHA256SUMS, so damage may go unseen")
    differ = set(path.read_text(errors="replace").splitlines()) ^ set(file_sums(folder))
    if differ:
        names = sorted({line.partition("  ")[2] for line in differ})
        fail(f"'{folder}/{names[0]}' is damaged or missing, or was not exported: its checksum is "
             f"not that of SHA256SUMS; export the folder again")


def read_stage2(cfg: Config) -> dict:
    """The manifest of --init; exits where the folder does not fit. 'none': {}"""
    if cfg.init == "none":
        return {}
    path = Path(cfg.init) / "manifest.json"
    if not path.is_file():
        fail(f"no stage2 folder at --init '{cfg.init}' (manifest.json is missing); vla.py writes "
             f"OUT/stage2, 'none' starts without one")
    check_sums(Path(cfg.init))
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        fail(f"'{path}' is damaged ({error}); export it again: vla.py --resume ... --export-only")
    for key, here in {"schema": "smolvla_shared.v1", "text_len": cfg.text_len}.items():
        if manifest.get(key) != here:
            fail(f"--init '{cfg.init}': {key} is {manifest.get(key)!r}, expected {here!r}")
    if not isinstance(manifest.get("config"), dict) or "text_layers" not in manifest["config"]:
        fail(f"'{path}' is damaged: it lacks the settings of the run that wrote it")
    warn_of_holdout(cfg, manifest["config"], cfg.init)
    return manifest


def load_stage2(cfg: Config, manifest: dict) -> tuple[Trunk, object]:
    """-> trunk with its readout, tokenizer; from --trunk where there is no stage 2."""
    if not manifest:
        return load_trunk(cfg)
    folder = Path(cfg.init)
    stored = manifest["config"]
    cfg = replace(cfg, trunk=manifest["trunk"], text_layers=stored["text_layers"],
                  plain_prompt=stored.get("plain_prompt", True))
    trunk, tokenizer = load_trunk(cfg, str(folder))
    readout = stage2_heads(folder, "trunk.readout")[""]
    if readout.shape != trunk.readout.shape:
        fail(f"--init '{folder}': readout is {tuple(readout.shape)}, trunk is {trunk.width} wide")
    words = trunk.vlm.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        fail(f"--init '{folder}': its tokenizer has {len(tokenizer)} tokens, its trunk knows "
             f"{words}")
    trunk.readout.data.copy_(readout)
    return trunk, tokenizer


def stage2_heads(folder: Path, prefix: str) -> dict:
    """What stage 2 learned beside the trunk: tensors by what follows a prefix of their names."""
    try:
        tensors = load_file(folder / "heads.safetensors")
        found = {name.removeprefix(prefix): x for name, x in tensors.items()
                 if name.startswith(prefix)}
        if not found:
            raise KeyError(prefix)
    except (OSError, SafetensorError, KeyError) as error:
        fail(f"'{folder}/heads.safetensors' is damaged or missing "
             f"({type(error).__name__}: {error}); write it again: vla.py --resume --export-only")
    return found


class Stage2Head(nn.Module):
    """The head that stage 2 trained: readout (B, W) -> the expected target (B, N), latents or
    actions, or probabilities of codes."""

    def __init__(self, init: str, trunk_width: int):
        super().__init__()
        manifest = json.loads((Path(init) / "manifest.json").read_text())
        mode, self.width = manifest["mode"], manifest["latent_dim"]
        if mode == "codes":
            fail(f"--head latent reads one head's prediction, --init '{init}' is of --mode codes, "
                 f"which writes its codes as text; give one of another --mode")
        if mode == "head":
            self.codes = stage2_heads(Path(init), "target.codebook")[""].shape[1]
            self.head = nn.Linear(trunk_width, self.width)
        else:
            self.codes, sizes = 0, manifest["flow"]
            self.head = FlowHead(self.width, trunk_width, sizes["width"], sizes["depth"], steps=1)
        try:
            self.head.load_state_dict(stage2_heads(Path(init), "head."))
        except RuntimeError:
            fail(f"--head latent reads a flow or --mode head, --init '{init}' is of --mode {mode}; "
                 f"give another --head")

    def forward(self, readout):
        if self.codes:
            return self.head(readout).unflatten(1, (-1, self.codes)).softmax(-1).flatten(1)
        noise = readout.new_ones(self.width).expand(readout.shape[0], -1)
        return self.head.sample(readout, noise)                         # as in vla.py


def warn_of_holdout(cfg, earlier: dict, path: str):
    """Validation is only held out if the stage before held out the same."""
    for name in ("val_fraction", "holdout"):
        if earlier.get(name) != getattr(cfg, name):
            warn(f"'{path}' was trained with {name} {earlier.get(name)!r}, this is "
                 f"{getattr(cfg, name)!r}: validation may hold episodes that it has seen")


def tiny_config() -> SmolVLMConfig:
    size = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=2, num_attention_heads=4)
    vision = dict(image_size=64, patch_size=8, **size)
    text = dict(model_type="llama", vocab_size=384, num_key_value_heads=4, pad_token_id=0,
                bos_token_id=1, eos_token_id=1, **size)
    return SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=2, image_token_id=383)


def tiny(cfg, stage2: str) -> tuple[Trunk, object]:
    """Random, and so without a chat that it knows."""
    if stage2:
        vlm = pretrained("SmolVLM2", SmolVLMModel, f"{stage2}/trunk")
        tokenizer = pretrained("tokenizer", AutoTokenizer, f"{stage2}/tokenizer")
    else:
        vlm, tokenizer = SmolVLMModel(tiny_config()), ByT5Tokenizer()
    return Trunk(vlm, skip_padding=False), tokenizer


# What --random-init builds without a network, from the configs of these names. Of vision and text:
# width, MLP, layers, heads (and key-value heads); then pixels, patch, and side of a pixel shuffle.
SMOLVLM2 = {
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct":
        ((768, 3072, 12, 12), (576, 1536, 30, 9, 3), 512, 16, 4),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct":
        ((768, 3072, 12, 12), (960, 2560, 32, 15, 5), 512, 16, 4),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct":
        ((1152, 4304, 27, 16), (2048, 8192, 24, 32, 32), 384, 14, 3)}
# the chat before an image, between it and the instruction, and after, as SmolVLM's processor lays
# it out for one picture
SMOLVLM2_CHAT = ("<|im_start|>User:<fake_token_around_image><global-img>",
                 "<fake_token_around_image>", "<end_of_utterance>\nAssistant:")


def smolvlm2(cfg, stage2: str) -> tuple[Trunk, object]:
    """--trunk by its Hugging Face name or from a folder."""
    if stage2:
        vlm = pretrained("SmolVLM2", SmolVLMModel, f"{stage2}/trunk")
        tokenizer = pretrained("tokenizer", AutoTokenizer, f"{stage2}/tokenizer")
    elif cfg.random_init:
        vlm, tokenizer = random_smolvlm2(cfg)
    else:
        vlm = pretrained("SmolVLM2", SmolVLMModel, cfg.trunk)
        tokenizer = pretrained("tokenizer", AutoTokenizer, cfg.trunk)
    keep_layers(vlm, 16 if cfg.text_layers is None else cfg.text_layers)
    return Trunk(vlm, *chat_ids(cfg, tokenizer, SMOLVLM2_CHAT)), tokenizer


def random_smolvlm2(cfg) -> tuple[SmolVLMModel, object]:
    if cfg.trunk in SMOLVLM2:
        vision, text, pixels, patch, shuffle = SMOLVLM2[cfg.trunk]
        vision = sizes(*vision, image_size=pixels, patch_size=patch)
        text = sizes(*text, vocab_size=49280, model_type="llama")
        tokenizer = byte_tokenizer(SMOLVLM2_CHAT)
    else:
        config = pretrained("SmolVLM2", SmolVLMConfig, cfg.trunk)
        vision, text = config.vision_config.to_dict(), config.text_config.to_dict()
        shuffle = config.scale_factor
        tokenizer = pretrained("tokenizer", AutoTokenizer, cfg.trunk)
    if cfg.shrink:
        vision, text = shrunk(vision), shrunk(text)
        vision["image_size"] = 2 * vision["patch_size"] * shuffle       # four image tokens
    config = SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=shuffle)
    return SmolVLMModel(config), tokenizer


class DualConfig(PreTrainedConfig):
    model_type = "dual"
    sub_configs_defaults = {"vision_config": SiglipVisionConfig, "dinov2_config": Dinov2Config,
                            "text_config": LlamaConfig}
    vision_config: dict | PreTrainedConfig | None = None
    dinov2_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None


class DualVLM(PreTrainedModel):
    """Two vision towers, whose features of a patch go side by side into a language model, as in
    Prismatic VLMs (2402.07865) and OpenVLA (2406.09246)."""

    config_class = DualConfig
    _supports_sdpa = True

    def __init__(self, config: DualConfig):
        super().__init__(config)
        self.vision_model = nn.ModuleDict({"siglip": SiglipVisionModel(config.vision_config),
                                           "dinov2": Dinov2Model(config.dinov2_config)})
        self.connector = self.make_connector()
        self.text_model = LlamaModel(config.text_config)
        self.post_init()

    def make_connector(self) -> nn.Module:
        both = self.config.vision_config.hidden_size + self.config.dinov2_config.hidden_size
        width = self.config.text_config.hidden_size
        return nn.Sequential(nn.LayerNorm(both), nn.Linear(both, width), nn.GELU(),
                             nn.Linear(width, width), nn.LayerNorm(width))

    def get_input_embeddings(self):
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.text_model.set_input_embeddings(value)


class DualTrunk(Trunk):
    """Trunk on a DualVLM: each tower gets pictures in its own mean and deviation."""

    def __init__(self, vlm: DualVLM, *chat):
        super().__init__(vlm, *chat)
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's: DINOv2
        for name, values in {"mean": mean, "deviation": deviation}.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def see(self, images):
        """Features of all patches, (B, patches, widths of both towers): their grids are equal."""
        towers = self.vlm.vision_model
        x = images.permute(0, 3, 1, 2).float() / 255                    # (B, 3, H, W)
        siglip = towers["siglip"](2 * x - 1).last_hidden_state
        dinov2 = towers["dinov2"]((x - self.mean) / self.deviation).last_hidden_state
        return torch.cat([siglip, dinov2[:, 1:]], -1)                   # without the class token


DUAL = ("google/siglip-so400m-patch14-224", "facebook/dinov2-large", "meta-llama/Llama-2-7b-hf")
DUAL_CHAT = "<s>", "", ""                                               # Llama 2 as such has none


def dual_7b(cfg, stage2: str) -> tuple[Trunk, object]:
    """Pictures of 224 pixels: 16 x 16 patches of 14 for either tower."""
    if stage2:
        vlm = pretrained("dual trunk", DualVLM, f"{stage2}/trunk")
        tokenizer = pretrained("tokenizer", AutoTokenizer, f"{stage2}/tokenizer")
    elif cfg.random_init:
        vlm, tokenizer = random_dual(cfg), byte_tokenizer(DUAL_CHAT)
    else:
        vlm = join(pretrained("SigLIP", SiglipVisionModel, DUAL[0], vision_use_head=False),
                   pretrained("DINOv2", Dinov2Model, DUAL[1], use_mask_token=False),
                   pretrained("Llama", LlamaModel, DUAL[2]))
        tokenizer = pretrained("tokenizer", AutoTokenizer, DUAL[2], add_bos_token=False)
    keep_layers(vlm, cfg.text_layers)
    return DualTrunk(vlm, *chat_ids(cfg, tokenizer, DUAL_CHAT)), tokenizer


def random_dual(cfg) -> DualVLM:
    image = dict(image_size=224, patch_size=14)
    siglip = sizes(1152, 4304, 27, 16, vision_use_head=False, **image)
    dinov2 = sizes(1024, 4096, 24, 16, use_mask_token=False, **image)
    llama = sizes(4096, 11008, 32, 32)
    if cfg.shrink:
        siglip, dinov2, llama = shrunk(siglip), shrunk(dinov2), shrunk(llama)
        siglip["image_size"] = dinov2["image_size"] = 28                # four image tokens
    return DualVLM(DualConfig(vision_config=siglip, dinov2_config=dinov2, text_config=llama))


def join(siglip: SiglipVisionModel, dinov2: Dinov2Model, llama: LlamaModel) -> DualVLM:
    """DINOv2's position embeddings, learned at 518 pixels, are fitted to SigLIP's size once, not at
    each step."""
    embeddings, pixels = dinov2.embeddings, siglip.config.image_size
    patches = (pixels // dinov2.config.patch_size) ** 2
    image = torch.zeros(1, 1 + patches, dinov2.config.hidden_size)
    fitted = embeddings.interpolate_pos_encoding(image, pixels, pixels)
    embeddings.position_embeddings = nn.Parameter(fitted.detach().clone())
    dinov2.config.image_size = pixels
    config = DualConfig(vision_config=siglip.config, dinov2_config=dinov2.config,
                        text_config=llama.config)
    with torch.device("meta"):                                          # the parts follow
        vlm = DualVLM(config)
    vlm.vision_model = nn.ModuleDict({"siglip": siglip, "dinov2": dinov2})
    vlm.connector, vlm.text_model = vlm.make_connector(), llama
    return vlm


TRUNKS = {"tiny": tiny, "dual-7b": dual_7b}         # a new one is a function; other names: SmolVLM2


def load_trunk(cfg, stage2: str = "") -> tuple[Trunk, object]:
    """--trunk and its tokenizer: tiny and --random-init are random; else weights that are absent
    are an error. With a folder of vla.py it is the one that was trained. Ranks but the first
    build shapes without values (device meta), which settle or shard fills: a node has memory for
    one of them."""
    if cfg.trunk == "tiny" and not stage2 and (cfg.plain_prompt or cfg.text_layers is not None):
        fail("--trunk tiny has no chat and always two layers; leave --plain-prompt and "
             "--text-layers out")
    if cfg.text_layers is not None and cfg.text_layers < 1:
        fail(f"--text-layers {cfg.text_layers} must be at least 1")
    follows = dist.is_initialized() and dist.get_rank() > 0
    with torch.device("meta") if follows else contextlib.nullcontext():
        return TRUNKS.get(cfg.trunk, smolvlm2)(cfg, stage2)


def pretrained(what: str, kind, name: str, **options):
    """kind.from_pretrained of transformers; exits where weights are absent or do not fit. On device
    meta they are not read."""
    is_model = issubclass(kind, PreTrainedModel)
    shapes_only = torch.get_default_device().type == "meta"
    if not is_model:
        options |= dict(trust_remote_code=False)                # without it, it asks
    elif not shapes_only:
        options |= dict(dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True,
                        output_loading_info=True)
    try:
        if is_model:                            # else another family's is built at its full size
            family = kind.config_class.model_type.split("_")[0]
            its = kind.config_class.get_config_dict(name)[0].get("model_type", "")
            if its.split("_")[0] != family:
                raise ValueError(f"its config says '{its}', not '{family}'")
        if is_model and shapes_only:
            return kind(kind.config_class.from_pretrained(name, **options)).eval()
        made = kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        fail(f"no pretrained {what} at '{name}' ({str(error).splitlines()[0]}); give a Hugging "
             f"Face name that this machine can reach, a folder with config, weights and tokenizer, "
             f"or 'tiny'")
    if not is_model:
        return made
    model, info = made
    missing = sorted(info["missing_keys"])
    if missing:
        fail(f"weights of '{name}' lack {len(missing)} tensors of a {what}, the first is "
             f"{missing[0]}")
    return model


def keep_layers(vlm, layers: int | None):
    """The first layers of the language model; None: all."""
    vlm.text_model.layers = vlm.text_model.layers[:layers]
    vlm.config.text_config.num_hidden_layers = len(vlm.text_model.layers)


def sizes(width: int, mlp: int, layers: int, heads: int, pairs: int = 0, **more) -> dict:
    """A transformer's sizes as configs name them; pairs: key-value heads, where these are fewer."""
    if pairs:
        more["num_key_value_heads"] = pairs
    return dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
                num_attention_heads=heads, **more)


def shrunk(sizes: dict) -> dict:
    """A toy of the same shape: as many heads, but narrow and two layers deep."""
    heads = sizes["num_attention_heads"]
    return sizes | dict(hidden_size=8 * heads, intermediate_size=16 * heads, num_hidden_layers=2,
                        head_dim=8)


def byte_tokenizer(chat: tuple) -> ByT5Tokenizer:
    """Needs no files. With the markers of a chat."""
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(markers(chat), special_tokens=True)
    return tokenizer


def markers(chat: tuple) -> list[str]:
    return list(dict.fromkeys(re.findall(r"<[^<>]+>", "".join(chat))))


def chat_ids(cfg, tokenizer, chat: tuple) -> list[list[int]]:
    """Token ids of the three parts of a chat; with --plain-prompt none."""
    if cfg.plain_prompt:
        return [[], [], []]
    unknown = [x for x in markers(chat)
               if tokenizer.convert_tokens_to_ids(x) in (None, tokenizer.unk_token_id)]
    if unknown:
        fail(f"the tokenizer of '{cfg.trunk}' does not know {unknown[0]}, a marker of the chat "
             f"that this trunk was trained on; --plain-prompt goes without")
    return [tokenizer(part, add_special_tokens=False)["input_ids"] for part in chat]


def file_sums(folder: Path) -> list[str]:
    """Lines as sha256sum writes them, of all files but hidden ones and SHA256SUMS itself."""
    lines = []
    for path in sorted(folder.rglob("[!.]*")):
        if path.is_file() and path.name != "SHA256SUMS":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder)}")
    return lines


def publish(unfinished: Path, final: Path):
    """Puts a finished hand-over folder in place, with the checksums of its files; an older one is
    whole until then."""
    (unfinished / "SHA256SUMS").write_text("\n".join(file_sums(unfinished)) + "\n")
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    unfinished.rename(final)
    shutil.rmtree(old, ignore_errors=True)


class Program(nn.Module):
    """What is exported: (images, state, ids, mask, noise) -> actions."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy = policy

    def forward(self, images, state, ids, mask, noise):
        batch = {"images": images, "state": state, "ids": ids, "mask": mask}
        return self.policy.act(batch, noise)


@torch.no_grad()
def program_of(policy: Policy, cfg: Config):
    """The policy as an ExportedProgram on the CPU. With --export-dtype bfloat16 so are the
    parameters of trunk and expert, not what goes in and out, nor units and frequencies; the other
    heads cost nothing."""
    policy.float().eval()
    large = [policy.trunk.vlm]
    if isinstance(policy.head, Expert):
        large.append(policy.head)
    for parameter in nn.ModuleList(large).parameters():
        parameter.data = parameter.data.to(getattr(torch, cfg.export_dtype))
    batch = torch.export.Dim("B", min=1, max=4096)
    program = torch.export.export(Program(policy), example_of(policy, cfg),
                                  dynamic_shapes=({0: batch},) * 5)
    program.example_inputs = None                                       # would be stored as pickle
    return program


@torch.no_grad()
def export(model: Policy, cfg: Config, step: int, tokenizer, loader, pretraining: dict,
           to_lerobot: bool = True):
    """OUT/policy: the policy as a torch.export program (CPU), tokenizer, manifest, weights, and
    LeRobot's package. All ranks call it."""
    policy = unsharded(model)
    if policy is None:
        return
    folder = Path(cfg.out) / ".policy.partial"
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    policy.float()
    if cfg.lora_rank:
        policy.trunk.vlm.text_model = policy.trunk.vlm.text_model.merge_and_unload()
    weights = {k: v.contiguous() for k, v in policy.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    torch.export.save(program_of(policy, cfg), folder / "policy.pt2")
    manifest = {"schema": "policy.v1", "image_size": policy.trunk.image_size,
                "cameras": cameras_of(loader, cfg.cameras),
                "text_len": cfg.text_len, "chunk": cfg.chunk, "action_dim": loader.action_dim,
                "state_dim": loader.state_dim, "units_of": loader.names[0],
                "datasets": loader.source_size, "episodes": loader.counts, "blind": cfg.blind,
                "head": cfg.head, "dtype": cfg.export_dtype, "pretraining": pretraining,
                "step": step, "config": asdict(cfg), "torch": torch.__version__}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    if to_lerobot and cfg.head != "latent":                             # which needs stage2/
        export_to_lerobot(folder, policy, cfg, tokenizer, loader)
    publish(folder, Path(cfg.out) / "policy")


def cameras_of(loader, count: int) -> list[str]:
    """The keys of the first dataset's pictures, in their order; '' for one that it lacks."""
    entry = loader.plans[0].entry
    keys = [entry.image, *entry.cameras.split()][:count]
    return keys + [""] * (count - len(keys))


# ------------------------------------------------------------ --bench-policy
def bench(cfg: Config) -> int:
    """Latency of a policy/ folder's program, or of one with random weights, actions of seven and a
    state of eight numbers, on the CPU and, where there is one, a GPU: a table and OUT/bench.json.
    Needs no data and no TensorFlow."""
    if cfg.bench_policy == "random":
        program = program_of(random_policy(cfg), cfg)
    else:
        check_sums(Path(cfg.bench_policy))
        program, _ = open_program(Path(cfg.bench_policy) / "policy.pt2")
    on_gpu, threads = find_device().type == "cuda", torch.get_num_threads()         # TF32, as ever
    millions = sum(x.numel() for x in program.parameters()) / 1e6
    print(f"{cfg.bench_policy}: {millions:.1f}M parameters; torch {torch.__version__}, {threads} "
          f"CPU threads; ms of the first call, then medians")
    print(f"{'':5s} batch", *(f"{name:>8s}" for name in BENCHED))
    rows = []
    for device in ["cpu", "cuda"] if on_gpu else ["cpu"]:
        each = 0.0                                                      # ms a sample
        for batch in (1, 8, 32):
            if each * batch > 15_000:
                print(f"{device:5s} {batch:5d} left out, it would take {each * batch / 1e3:.0f} s")
                continue
            times = time_program(program, device, batch)
            each = times["steady"] / batch
            print(f"{device:5s} {batch:5d}", *(f"{times[x]:8.5g}" if x in times else 7 * " " + "-"
                                               for x in BENCHED), flush=True)
            rows.append({"device": device, "batch": batch, **times})
    found = {"policy": cfg.bench_policy, "threads": threads, "torch": torch.__version__,
             "rows": rows, "config": asdict(cfg)}
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    (Path(cfg.out) / "bench.json").write_text(json.dumps(found, indent=1))
    return 0


BENCHED = "first", "steady", "graph", "vision", "prefix", "head", "peak MB"


def random_policy(cfg: Config) -> Policy:
    if cfg.head == "latent":
        fail("--bench-policy random has no stage 2, whose head --head latent reads; give a folder")
    widths = {"action": 7, "state": 8}
    stats = {f"{x}_{y}": torch.full((1, width), float(y == "scale"))
             for x, width in widths.items() for y in ("offset", "scale")}
    return Policy(cfg, load_trunk(replace(cfg, random_init=True))[0], stats)


@torch.no_grad()
def time_program(program, device: str, batch: int) -> dict:
    """BENCHED; "graph" on a GPU. The peak is of the process so far, or of the GPU's tensors."""
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        program = move_to_device_pass(copy.deepcopy(program), device)
    examples = [node.meta["val"] for node in program.graph.nodes
                if node.name in program.graph_signature.user_inputs]
    inputs = [torch.ones(batch, *x.shape[1:], dtype=x.dtype, device=device) for x in examples]
    times = dict(zip(("first", "steady"), time_call(program.module(), inputs, device)))
    if on_gpu:
        times["graph"] = time_call(as_graph(program.module(), inputs), [], device)[1]
    parts, given = in_parts(program.module()), []
    modules = [getattr(parts, f"submod_{i}") for i in range(3)]
    hooks = [module.register_forward_pre_hook(lambda module, args: given.append(args))
             for module in modules]
    parts(*inputs)
    for hook in hooks:
        hook.remove()
    for name, module, args in zip(("vision", "prefix", "head"), modules, given):
        times[name] = time_call(module, args, device)[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return times | {"peak MB": torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak}


def as_graph(module, inputs: list):
    """A CUDA graph: what the module asks of the GPU, recorded once, to replay without Python
    between kernels."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):                                              # warm-up, as it asks for
            module(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(*inputs)
    return graph.replay


def in_parts(program: nn.Module) -> nn.Module:
    """A loaded program as three modules, one after the other: vision; prefix, which is the language
    model and what the head reads off it once a chunk; head."""
    nodes = list(program.graph.nodes)
    paths = [[*node.meta.get("nn_module_stack", {"": ("", "")}).values()][-1][0] for node in nodes]
    seen = max(i for i, path in enumerate(paths) if re.search(r"\.(vision_model|connector)", path))
    read = min(i for i, path in enumerate(paths) if re.match(r"policy\.head\.(?!prefix)", path))
    part = {node.name: (i > seen) + (i >= read) for i, node in enumerate(nodes)}
    return split_module(program, program, lambda node: part[node.name])


def time_call(call, inputs, device: str, seconds: float = 2.0) -> tuple[float, float]:
    """ms of the first call and, of two others at least, the median."""
    times = []
    while len(times) < 3 or (sum(times[1:]) < 1e3 * seconds and len(times) < 101):
        began = time.perf_counter()
        call(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return times[0], float(np.median(times[1:]))


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


# ------------------------------------------------------------ a policy of LeRobot
# policy/lerobot is a package that `pip install` takes and LeRobot's commands find: this file, its
# data_oxe.py, and pretrained_model/, in the form in which lerobot-train writes its checkpoints.
LEROBOT_TYPE, STATE, ACTION = "hlrp_smolvla_shared", "observation.state", "action"
PLUGIN = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "lerobot_policy_nanolapa"
version = "1.0.0"
requires-python = ">=3.12"
dependencies = ["lerobot>=0.6.1,<0.7", "transformers>=5.4", "tyro"]

[tool.hatch.build.targets.wheel]
only-include = ["lerobot_policy_nanolapa.py", "data_oxe.py"]
"""
AS_IT_IS = {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}    # Policy normalizes


def export_to_lerobot(policy_folder: Path, policy: Policy, cfg: Config, tokenizer, loader):
    """Writes POLICY_FOLDER/lerobot; needs no LeRobot."""
    folder, side = policy_folder / "lerobot", policy.trunk.image_size
    model = folder / "pretrained_model"
    model.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PLUGIN)
    shutil.copyfile(__file__, folder / "lerobot_policy_nanolapa.py")
    shutil.copyfile(data_oxe.__file__, folder / "data_oxe.py")
    try:
        os.link(policy_folder / "weights.safetensors", model / "model.safetensors")
    except OSError:                                                     # a disk without links
        shutil.copyfile(policy_folder / "weights.safetensors", model / "model.safetensors")
    save_trunk(policy.trunk, tokenizer, model)
    further = cameras_of(loader, cfg.cameras)[1:]
    cameras = ["observation.image", *(key.replace("/", ".") or f"observation.image_{i}"
                                      for i, key in enumerate(further, 2))]
    inputs = {camera: {"type": "VISUAL", "shape": [3, side, side]} for camera in cameras}
    if loader.state_dim:
        inputs[STATE] = {"type": "STATE", "shape": [loader.state_dim]}
    outputs = {ACTION: {"type": "ACTION", "shape": [loader.action_dim]}}
    settings = asdict(replace(cfg, lora_rank=0))                        # merged by now
    config = {"type": LEROBOT_TYPE, "settings": settings, "cameras": cameras,
              "input_features": inputs, "output_features": outputs,
              "normalization_mapping": AS_IT_IS, "push_to_hub": False}
    asis = {"eps": 1e-8, "features": {}, "norm_map": AS_IT_IS}
    on_cpu = {"device": "cpu", "float_dtype": None}
    before = {"rename_observations_processor": {"rename_map": {}}, "to_batch_processor": {},
              "device_processor": on_cpu, "normalizer_processor": asis}
    after = {"unnormalizer_processor": asis, "device_processor": on_cpu}
    files = {"config": config}
    for name, steps in {"policy_preprocessor": before, "policy_postprocessor": after}.items():
        steps = [{"registry_name": step, "config": values} for step, values in steps.items()]
        files[name] = {"name": name, "steps": steps}
    for name, content in files.items():
        (model / f"{name}.json").write_text(json.dumps(content, indent=1))


def save_trunk(trunk: Trunk, tokenizer, folder: Path):
    """FOLDER/trunk: what tells the trunk's shape and reads its text, without weights."""
    trunk.vlm.config.save_pretrained(folder / "trunk")
    tokenizer.save_pretrained(folder / "trunk")
    chat = {name: getattr(trunk, name).tolist() for name in ("before", "between", "after")}
    chat["skip_padding"] = trunk.skip_padding
    (folder / "trunk/chat.json").write_text(json.dumps(chat))


def empty_trunk(folder: Path) -> tuple[Trunk, object]:
    """The trunk that save_trunk described, whose weights are still to come; its tokenizer."""
    kind = json.loads((folder / "trunk/config.json").read_text())["model_type"]
    config, vlm, trunk = {"smolvlm": (SmolVLMConfig, SmolVLMModel, Trunk),
                          "dual": (DualConfig, DualVLM, DualTrunk)}[kind]
    vlm = vlm(config.from_pretrained(folder / "trunk"))
    chat = json.loads((folder / "trunk/chat.json").read_text())
    chat.setdefault("skip_padding", bool(chat["before"]))               # of an older folder
    return trunk(vlm, *chat.values()), pretrained("tokenizer", AutoTokenizer, str(folder / "trunk"))


def statistics_of(stats: dict, config) -> dict:
    """Policy's offsets and scales: mean and deviation, as LeRobot's quantiles of a dataset are
    means of the episodes'. Exits where some are missing."""
    out = {}
    for what, key, feature in (("action", ACTION, config.action_feature),
                               ("state", STATE, config.robot_state_feature)):
        width, its = feature.shape[0] if feature else 0, stats.get(key, {})
        if width and not its.keys() >= {"mean", "std"}:
            fail(f"the dataset's statistics of '{key}' lack mean and std, without which it has "
                 f"no scale; there are {sorted(its)}")
        offset, scale = (torch.as_tensor(its[name] if width else []).float().reshape(1, width)
                         for name in ("mean", "std"))
        out[f"{what}_offset"] = offset
        out[f"{what}_scale"] = torch.where(scale < 1e-4, 1.0, scale)
    return out


def empty_statistics(path: Path) -> dict:
    """Of the shapes that a file's have; exits where it has none."""
    names = [f"{what}_{part}" for what in ("action", "state") for part in ("offset", "scale")]
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except (OSError, SafetensorError) as error:
        fail(f"'{path}' has no statistics of actions and state ({error})")
    return {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}


def check_features(config, cfg: Config, stats: dict):
    """Exits where the dataset or the environment is of another robot."""
    for what, feature in (("action", config.action_feature),
                          ("state", config.robot_state_feature)):
        its = feature.shape[0] if feature else 0
        if its != (width := stats[f"{what}_offset"].shape[1]):
            fail(f"the policy's {what} is {width} wide, that of the dataset or environment {its}")
    if len(config.cameras) != cfg.cameras:
        fail(f"--policy.cameras {config.cameras}: the policy sees {cfg.cameras}")
    if not 0 <= config.n_action_steps <= cfg.chunk:
        fail(f"--policy.n_action_steps {config.n_action_steps} of a chunk of {cfg.chunk}")


def inputs_of(batch: dict, cameras: list[str], policy: Policy, tokens, learns: bool) -> dict:
    """LeRobot's batch -> what Policy takes. It holds a picture (B, 3, H, W), uint8 or 0..1, a
    camera, observation.state (B, Ds), task (list of B str), and, to learn, action (B, C, A) and
    action_is_pad (B, C). Raises ValueError where one lacks or has another shape."""
    views = [picture_of(batch, camera, policy.trunk.image_size) for camera in cameras]
    B, device, texts = len(views[0]), views[0].device, batch.get("task")
    if not isinstance(texts, list | tuple) or len(texts) != B:
        raise ValueError(f"'task' must be {B} instructions, is {texts!r}")
    chunk = B, policy.cfg.chunk, policy.action_dim
    none_padded = torch.zeros(chunk[:2], dtype=torch.bool, device=device)
    actions = torch.zeros(chunk, device=device)
    if learns:
        actions = numbers_of(batch, ACTION, chunk, device)
    told = {"frames": views[0][:, None], "instruction": list(texts),
            "state": numbers_of(batch, STATE, (B, policy.state_offset.shape[1]), device),
            "actions": actions,
            "action_mask": ~(batch.get("action_is_pad", none_padded) if learns else none_padded),
            "dataset": torch.zeros(B, dtype=torch.int64, device=device)}
    if len(views) > 1:
        told["views"] = torch.stack(views[1:], 1)
    return to_inputs(told, policy, tokens, device)


def picture_of(batch: dict, camera: str, side: int):
    """uint8 (B, S, S, 3)"""
    x = batch.get(camera)
    if x is None:
        there = [name for name in batch if name.startswith("observation.image")]
        raise ValueError(f"there is no camera '{camera}', only {there}; say which is it: "
                         f"--rename_map={{NAME: {camera}}}")
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"'{camera}' must be (B, 3, H, W), is {tuple(x.shape)}")
    x = (255 * x).round().clamp(0, 255).to(torch.uint8) if x.is_floating_point() else x
    return data_oxe.resize_to(x.permute(0, 2, 3, 1), side)


def numbers_of(batch: dict, name: str, shape: tuple, device):
    if not shape[-1]:
        return torch.zeros(shape, device=device)
    x = batch.get(name)
    if x is None or tuple(x.shape) != shape:
        its = "missing" if x is None else tuple(x.shape)
        raise ValueError(f"'{name}' must be {shape}, is {its}")
    return x.float().to(device)


if __name__ == "lerobot_policy_nanolapa":                   # as which policy/lerobot installs it
    from huggingface_hub import snapshot_download
    from lerobot.configs import NormalizationMode
    from lerobot.configs import PreTrainedConfig as LeRobotConfig
    from lerobot.optim import AdamWConfig
    from lerobot.optim.schedulers import CosineAnnealingWithWarmupSchedulerConfig as CosineConfig
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.processor import make_default_policy_processor_steps
    from lerobot.processor import make_policy_processor_pipelines

    @LeRobotConfig.register_subclass(LEROBOT_TYPE)
    @dataclass
    class NanoLapaConfig(LeRobotConfig):
        stage2: str = ""            # of vla.py, to train from; 'none': from settings' trunk
        settings: dict = field(default_factory=dict)        # of Config: of model and optimizer
        cameras: list[str] = field(default_factory=list)    # it sees; none: the dataset's only one
        n_action_steps: int = 0     # of a chunk, before the next is predicted; 0: all
        normalization_mapping: dict[str, NormalizationMode] = field(
            default_factory=lambda: dict.fromkeys(AS_IT_IS, NormalizationMode.IDENTITY))

        def stage(self) -> tuple[Config, dict]:
            """finetune.py's settings, and stage 2's manifest where it trains from one."""
            if unknown := set(self.settings) - {f.name for f in fields(Config)}:
                fail(f"--policy.settings has {sorted(unknown)[0]!r}, unknown to this plugin")
            cfg = Config(**self.settings)
            if cfg.head == "latent":
                fail("--policy.settings: head 'latent' needs stage 2's folder; give another head")
            if self.pretrained_path:
                return cfg, {}
            if cfg.final_lr:
                fail(f"--policy.settings: final_lr {cfg.final_lr}, but LeRobot's cosine ends at 0")
            if cfg.head == "bins":
                fail("--policy.settings: head 'bins' divides percentiles, which LeRobot's datasets "
                     "do not have; give another head")
            if not self.stage2:
                fail("--policy.stage2 must be a folder of vla.py, or 'none': without either the "
                     "trunk would be random")
            cfg.init, cfg.normalize = self.stage2, "meanstd"                # see statistics_of
            pretraining = read_stage2(cfg)
            check(cfg, pretraining)
            return cfg, pretraining

        def validate_features(self):
            """Finds the only camera; exits where there is a choice, or none."""
            there = list(self.image_features)
            if not self.cameras and len(there) == 1:
                self.cameras = there
            missing = [name for name in self.cameras if name not in there]
            if missing or not self.cameras:
                fail(f"--policy.cameras {self.cameras} must name what the policy sees of {there}")
            if not self.action_feature:
                fail(f"there is no '{ACTION}' to learn; the features are "
                     f"{[*self.input_features, *self.output_features]}")
            self.input_features = {name: feature for name, feature in self.input_features.items()
                                   if name in (*self.cameras, STATE)}

        def get_optimizer_preset(self) -> AdamWConfig:
            cfg, _ = self.stage()
            return AdamWConfig(lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay,
                               grad_clip_norm=cfg.grad_clip)

        def get_scheduler_preset(self) -> CosineConfig:
            cfg, _ = self.stage()
            return CosineConfig(num_warmup_steps=cfg.warmup_steps)

        @property
        def action_delta_indices(self) -> list[int]:
            return list(range(Config(**self.settings).chunk))

        observation_delta_indices = reward_delta_indices = None

    class NanoLapaPolicy(PreTrainedPolicy):
        """Policy behind LeRobot's interface."""

        config_class, name = NanoLapaConfig, LEROBOT_TYPE

        def __init__(self, config: NanoLapaConfig, dataset_stats: dict | None = None, **others):
            super().__init__(config)
            config.validate_features()
            cfg, pretraining = config.stage()
            if config.pretrained_path:
                trunk, tokenizer = empty_trunk(Path(config.pretrained_path))
                stats = empty_statistics(Path(config.pretrained_path) / "model.safetensors")
            else:
                cfg.cameras = len(config.cameras)
                trunk, tokenizer = load_stage2(cfg, pretraining)
                settle(trunk, torch.device(config.device))              # rank 0's values
                stats = statistics_of(dataset_stats or {}, config)
            freeze(trunk, cfg)
            config.settings = asdict(cfg)
            self.policy, self.tokens = Policy(cfg, trunk, stats), Tokens(tokenizer, cfg.text_len)
            check_features(config, cfg, stats)
            self.to(config.device)                                      # as the trunk is
            self.reset()

        @classmethod
        def from_pretrained(cls, pretrained_name_or_path, *, config=None, revision=None, **options):
            path = Path(pretrained_name_or_path)
            if not path.is_dir():                                       # a name of the hub
                path = Path(snapshot_download(str(path), revision=revision))
            config = config or LeRobotConfig.from_pretrained(path)
            config.pretrained_path = path
            return super().from_pretrained(path, config=config, **options)

        @classmethod
        def _load_as_safetensor(cls, model, path: str, device: str, strict: bool):
            try:
                model.policy.load_state_dict(load_file(path))           # all of it, always
            except (RuntimeError, OSError, SafetensorError) as error:
                fail(f"'{path}' does not fit its config.json: {' '.join(str(error).split())}")
            return model

        def _save_pretrained(self, folder: Path, state_dict: dict | None = None):
            self.config._save_pretrained(folder)
            state = {name.removeprefix("policy."): x.contiguous()
                     for name, x in (state_dict or self.state_dict()).items()}
            save_file(state, folder / "model.safetensors")
            save_trunk(self.policy.trunk, self.tokens.tokenizer, folder)

        def inputs(self, batch: dict, learns: bool) -> dict:
            return inputs_of(batch, self.config.cameras, self.policy, self.tokens, learns)

        def get_optim_params(self) -> list[dict]:
            cfg = self.policy.cfg
            optimizer = make_optimizer(cfg, self.policy)
            groups = slow_down(optimizer, self.policy.trunk, cfg.trunk_lr).param_groups
            return [{"params": group["params"], "weight_decay": group["weight_decay"],
                     "lr": cfg.lr * group.get("share", 1)} for group in groups]

        def forward(self, batch: dict):
            parts = self.policy(self.inputs(batch, learns=True))
            return sum(parts.values()), {name: part.item() for name, part in parts.items()}

        @torch.no_grad()
        def predict_action_chunk(self, batch: dict, **noise):
            return self.policy.act(self.inputs(batch, learns=False), **noise)       # (B, C, A)

        def select_action(self, batch: dict, **noise):
            if not self.queue:
                chunk = self.predict_action_chunk(batch, **noise)
                self.queue.extend(chunk[:, :self.config.n_action_steps or None].unbind(1))
            return self.queue.popleft()                                             # (B, A)

        def reset(self):
            self.queue = deque()

    def make_hlrp_smolvla_shared_pre_post_processors(config, dataset_stats=None):
        """Names, batch and device: the policy itself normalizes."""
        steps = make_default_policy_processor_steps(config)
        return make_policy_processor_pipelines(
            [steps.rename_observations, steps.add_batch_dim, steps.to_device, steps.normalize],
            [steps.unnormalize, steps.to_cpu])


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    run(bench if config.bench_policy else main, config)
