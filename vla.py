"""Stage 2: latent pretraining. A vision-language trunk learns to predict the latent action from
frame t and the instruction.

    python vla.py --laq-ckpt runs/laq/laq.pt2 --trunk tiny              # CPU, nothing downloaded
    torchrun --nproc_per_node=4 vla.py --laq-ckpt runs/laq/laq.pt2 --batch-size 256 \\
        --trunk HuggingFaceTB/SmolVLM2-500M-Video-Instruct --dtype bfloat16
    sbatch sbatch/vla.sh                                                # Slurm
    python vla.py --resume runs/vla/last.pt                             # go on, or --export-only
    python vla.py --analyze runs/vla/last.pt                            # is it really learning?

In: RLDS episodes through data_oxe.py (no actions), and laq.pt2, which labels each batch it sees.
Out, in OUT: stage2/ (trunk/ and tokenizer/ as transformers saves them, heads.safetensors,
manifest.json `smolvla_shared.v1`), last.pt, metrics.jsonl, analysis/.

The trunk reads a last token, <ACTION>, and what it makes of that is its readout, which stage 3 goes
on with. --mode says what predicts latents from it:
    latent_flow flow matching of the vectors (SmolVLA, arXiv 2506.01844)
    head        logits of each position's codes (LAPA, 2410.11758)
    codes       the language model itself: <ACTION> <ACT_7> <ACT_3> </ACTION>
    actions     flow matching of true action chunks, of all video: the oracle
    multitask   latent_flow, and actions of the datasets that have any
`accuracy` is that of the codes nearest to the prediction, on held-out episodes. Beside it, as
beside every metric, stands what takes no learning (always the most frequent code) and what is left
when the picture or the instruction is another sample's.

Letters: B batch, L text tokens, P image tokens, S latent tokens, K codes, D code width,
R whitened width, W trunk width, N width of a target, V words of the tokenizer.
"""
import base64
import contextlib
import copy
import hashlib
import html
import io
import itertools
import json
import math
import os
import pickle
import re
import secrets
import shutil
import signal
import sys
import textwrap
import time
import traceback
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load, save_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.export.passes import move_to_device_pass
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
matplotlib.use("Agg")


@dataclass
class Config(data_oxe.DataConfig):
    out: str = "runs/vla"                   # checkpoints, metrics, hand-over files
    overwrite: bool = False                 # start anew in an OUT that holds a run or its files

    # what is predicted
    mode: str = "latent_flow"               # above: what is predicted, and how; one of MODES
    laq_ckpt: str = "runs/laq/laq.pt2"      # laq.py's labeller; 'pooled', a control; '': none
    targets: Literal["vectors", "codes"] = "vectors"    # latents: unquantized, or of the codes
    latent_chunk: int = 1                   # consecutive pairs whose latents are predicted at once
    parallel_decode: bool = False           # --mode codes: all positions' codes in one pass
    latent_weight: float = 1.0              # --mode multitask: of the latents' loss
    action_weight: float = 1.0              # ... and of the actions'
    null: Literal["", "permuted", "frame"] = ""     # control: other pairs' latents, or still pairs'
    chunk: int = 8                          # C, actions predicted at once

    # model
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
    head_width: int = 256                   # hidden units of the head
    head_depth: int = 2                     # residual blocks of the flow-matching head

    # optimization
    steps: int = 1000                       # optimizer steps; 0 exports the untrained model
    batch_size: int = 32                    # samples a step over all processes
    micro_batch: int = 0                    # samples a forward pass (gradients add up); 0: all
    lr: float | None = None                 # peak learning rate; None: by --size or --trunk
    final_lr: float = 0.1                   # at the end of the cosine, as a share of the peak
    warmup_steps: int | None = None         # of linear warm-up; None: by --size or --trunk
    weight_decay: float = 0.01              # AdamW's, of matrices
    grad_clip: float = 1.0                  # maximum gradient norm
    dtype: Literal["float32", "bfloat16"] = "float32"   # bfloat16: autocast
    compile: bool = False                   # torch.compile the model's forward and backward
    parallel: Literal["ddp", "fsdp"] = "ddp"    # each process holds the model, or a share of it

    # run
    eval_every: int = 250                   # steps between validations
    eval_batches: int = 16                  # batches of 64 in a validation
    save_every: int = 250                   # steps between checkpoints; the last three are kept
    keep_every: int = 0                     # ... that stay longer: ten, and each tenth for good
    scratch: str = ""                       # the nodes' own disk, for last.pt; '': all in OUT
    log_every: int = 10                     # steps between lines of metrics.jsonl
    seed: int = 0                           # of weights, data order, noise and augmentation
    wandb: bool = False                     # also log to Weights & Biases
    resume: str = ""                        # last.pt to continue, in its folder; auto: OUT's if any
    export_only: bool = False               # with --resume: write the hand-over again and stop
    overfit: bool = False                   # learn the first batch by heart, and validate on it
    analyze: str = ""                       # checkpoint to analyze, instead of training


# ------------------------------------------------------------ model and loss
class LatentPolicy(nn.Module):
    """A mode: trunk, target and a head that a subclass adds.

    needs: what of a pair it learns from: "latents", "codes", "actions" (see make_target); it is
        built with a target for each, and judged by the first
    read(batch of to_inputs) -> what the trunk makes of it: the readout (B, W), or a prompt
    loss(batch, read) -> its parts by name, which main sums
    expect(read) -> readout (B, W), the expected target (B, N)
    target(batch) -> target, weight (B, N); width: N
    code_scores(prediction) -> (B, S, K), the higher the likelier a code; None without codes
    hand_over(vlm, tokenizer): puts what it learned beside readout and head into stage2/'s
    """

    needs = ("latents",)
    entries = "predict", "judge"                                        # see shard

    def __init__(self, trunk: "Trunk", target: nn.Module):
        super().__init__()
        self.trunk, self.target, self.width = trunk, target, target.width

    def forward(self, batch: dict) -> dict:
        return self.loss(batch, self.read(batch))

    def predict(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return self.expect(self.read(batch))

    def judge(self, batch: dict) -> tuple:
        """Both at once: parts of the loss, readout, expected target."""
        read = self.read(batch)
        return self.loss(batch, read), *self.expect(read)

    def read(self, batch: dict):
        return self.trunk(batch["images"], batch["ids"], batch["mask"])             # (B, W)

    def layers(self) -> list[nn.Module]:
        return self.trunk.layers()

    def load_state_dict(self, state: dict, **options):
        """Exits where a checkpoint is of another labeller, which its codes tell, or of latents or
        actions of another width."""
        buffers = dict(self.target.named_buffers())
        name = "codebook" if "codebook" in buffers else next(iter(buffers))
        mine = buffers[name]
        its = state.get(f"target.{name}", mine)
        remedy = "go on with those that the run began with"
        if its.shape != mine.shape:
            fail(f"the checkpoint's {name}, {tuple(its.shape)}, is not that of --laq-ckpt or "
                 f"--mix, {tuple(mine.shape)}; {remedy}")
        if name == "codebook" and not torch.equal(its.to(mine), mine):
            fail(f"the checkpoint's codebook is not that of --laq-ckpt: of equal shape, "
                 f"{tuple(mine.shape)}, but with other values; {remedy}")
        return super().load_state_dict(state, **options)

    def code_scores(self, prediction):
        return self.target.scores(prediction)

    def hand_over(self, vlm, tokenizer):
        """There is nothing else."""


class LatentFlow(LatentPolicy):
    """Flow matching of the target, given the readout."""

    def __init__(self, cfg: Config, trunk: "Trunk", target: nn.Module):
        super().__init__(trunk, target)
        self.head = FlowHead(self.width, trunk.width, cfg.head_width, cfg.head_depth, steps=1)

    def loss(self, batch: dict, readout) -> dict:
        target, weight = self.target(batch)                             # (B, N) each
        return {"flow": self.head.loss(target, readout, weight)}

    def expect(self, readout) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a flow from noise to targets one Euler step gives their mean, wherever it starts: here
        as far out as the noise that the head has seen."""
        noise = torch.ones_like(readout[:, :1]).expand(-1, self.width)
        return readout, self.head.sample(readout, noise)


class TrueActions(LatentFlow):
    """The same of true action chunks."""

    needs = ("actions",)


class Head(LatentPolicy):
    """LAPA's: logits of each position's codes, linear in the readout (2410.11758)."""

    needs = ("codes",)

    def __init__(self, cfg: Config, trunk: "Trunk", target: nn.Module):
        super().__init__(trunk, target)
        self.head = nn.Linear(trunk.width, self.width)

    def loss(self, batch: dict, readout) -> dict:
        logits = self.logits(readout).flatten(0, 1)                     # (B * S, K)
        return {"codes": F.cross_entropy(logits, batch["codes"].flatten())}

    def expect(self, readout) -> tuple[torch.Tensor, torch.Tensor]:
        return readout, self.logits(readout).softmax(-1).flatten(1)

    def logits(self, readout):
        return self.head(readout).float().unflatten(1, (self.target.S, self.target.K))


class CodeTokens(LatentPolicy):
    """Codes as language: after the prompt come <ACTION>, which is the readout, <ACT_i> for the code
    i of each position, and </ACTION>. Cross-entropy of each next token among all that the tokenizer
    knows; the prompt itself is not predicted.

    With --parallel-decode S - 1 learned queries follow <ACTION>, and it and they predict a code
    each at once. They too see only what stands before them: so <ACTION> reads as in finetune.py.

    The output layer is the input layer. Where the pretrained model had another one (Llama 2 has),
    words begin with wrong logits; they only compete with the codes in the softmax of the loss.
    """

    needs = ("codes",)

    def __init__(self, cfg: Config, trunk: "Trunk", target: nn.Module):
        super().__init__(trunk, target)
        self.parallel = cfg.parallel_decode
        tokens = 0.02 * torch.randn(target.K + 1, trunk.width)
        self.tokens = nn.Parameter(tokens)                              # <ACT_0> ... </ACTION>
        if self.parallel:
            self.queries = nn.Parameter(0.02 * torch.randn(target.S - 1, trunk.width))

    def read(self, batch: dict):
        return self.trunk.prompt(batch["images"], batch["ids"], batch["mask"])

    def loss(self, batch: dict, prompt) -> dict:
        answer = batch["codes"]                                         # (B, S)
        if self.parallel:
            hidden = self.ask(prompt)                                   # (B, S, W)
        else:
            hidden = self.trunk.read(*prompt, self.tokens[answer])      # (B, S + 1, W)
            answer = F.pad(answer, (0, 1), value=self.target.K)         # (B, S + 1)
        words = self.trunk.vlm.text_model.get_input_embeddings().weight             # (V, W)
        of_words = F.linear(hidden, words)                              # output as the input layer
        of_codes = F.linear(hidden, self.tokens)
        logits = torch.cat([of_words, of_codes], -1).float()            # (B, S + 1, V + K + 1)
        answer = len(words) + answer                                    # codes come after words
        return {"codes": F.cross_entropy(logits.flatten(0, 1), answer.flatten())}

    def expect(self, prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """The grammar is <ACTION>, S times <ACT_i>, </ACTION>: at the codes' places only <ACT_i>
        count. One after the other each is given the likeliest before it."""
        if self.parallel:
            hidden = self.ask(prompt)
            return hidden[:, 0], self.codes(hidden).flatten(1)
        codes = []
        said = self.tokens[:0].expand(len(prompt[0]), -1, -1)           # (B, 0, W)
        for _ in range(self.target.S):
            hidden = self.trunk.read(*prompt, said)
            codes.append(self.codes(hidden[:, -1]))                     # (B, K)
            likeliest = self.tokens[codes[-1].argmax(-1)]               # (B, W)
            said = torch.cat([said, likeliest[:, None]], 1)
        return hidden[:, 0], torch.cat(codes, 1)

    def ask(self, prompt):
        queries = self.queries.expand(len(prompt[0]), -1, -1)
        return self.trunk.read(*prompt, queries)

    def codes(self, hidden):
        """(..., W) -> probabilities (..., K) by the grammar."""
        return F.linear(hidden, self.tokens[:-1]).float().softmax(-1)

    def hand_over(self, vlm, tokenizer):
        """<ACTION>, <ACT_i> and </ACTION> join the tokenizer and the language model's input."""
        first = len(tokenizer)
        codes = [f"<ACT_{i}>" for i in range(self.target.K)]
        tokenizer.add_tokens(["<ACTION>", *codes, "</ACTION>"], special_tokens=True)
        words = max(len(vlm.get_input_embeddings().weight), len(tokenizer))
        vlm.resize_token_embeddings(words, mean_resizing=False)
        rows = torch.cat([self.trunk.readout[None], self.tokens])
        vlm.get_input_embeddings().weight.data[first:len(tokenizer)] = rows


class Multitask(LatentFlow):
    """Latents of all samples and, of those that have any, true action chunks, by a flow each."""

    needs = ("latents", "actions")

    def __init__(self, cfg: Config, trunk: "Trunk", target: nn.Module, actions: nn.Module):
        super().__init__(cfg, trunk, target)
        self.actions = actions
        self.latent_weight, self.action_weight = cfg.latent_weight, cfg.action_weight
        self.action_head = FlowHead(actions.width, trunk.width, cfg.head_width, cfg.head_depth,
                                    steps=1)

    def loss(self, batch: dict, readout) -> dict:
        """Each part is the mean over the samples of the whole step that have it, so that it does
        not depend on how micro-batches and processes divide them."""
        chunk, counts = self.actions(batch)
        counts = counts * batch["has_action"][:, None]
        action = self.action_head.loss(chunk, readout, counts)          # mean over all B
        share = batch["labelled_share"].mean().clamp(min=1e-9)          # of the step
        latent = super().loss(batch, readout)["flow"]
        return {"flow": self.latent_weight * latent, "actions": self.action_weight * action / share}


# a new one is a class that keeps to LatentPolicy
MODES = {"latent_flow": LatentFlow, "head": Head, "codes": CodeTokens, "actions": TrueActions,
         "multitask": Multitask}


class OneHot(nn.Module):
    """Target: a pair's codes themselves. batch -> target (B, N), weight (B, N)"""

    def __init__(self, codebook: torch.Tensor):
        super().__init__()
        self.register_buffer("codebook", codebook)                      # (S, K, D)
        self.S, self.K = codebook.shape[:2]
        self.width = self.S * self.K                                    # N

    def forward(self, batch: dict):
        target = F.one_hot(batch["codes"], self.K).flatten(1).float()
        return target, torch.ones_like(target)

    def scores(self, prediction):
        """(B, N) -> (B, S, K)"""
        return prediction.unflatten(1, (self.S, self.K))


class Codes(nn.Module):
    """Target: the whitened vectors of a pair's codes. batch -> target (B, N), weight (B, N)"""

    def __init__(self, codebook: torch.Tensor):
        super().__init__()
        self.register_buffer("codebook", codebook)                      # (S, K, D)
        self.register_buffer("latents", whiten(codebook))               # (S, K, R)
        self.S, _, self.R = self.latents.shape
        self.width = self.S * self.R                                    # N

    def forward(self, batch: dict):
        token = torch.arange(self.S, device=self.latents.device)
        target = self.latents[token, batch["codes"]].flatten(1)
        return target, torch.ones_like(target)

    def scores(self, prediction):
        """(B, N) -> (B, S, K): how near each code is."""
        latent = prediction.view(-1, self.S, 1, self.R)
        return -(latent - self.latents).square().sum(-1)


class Vectors(nn.Module):
    """Target: the first principal components of a pair's unquantized latents, each of unit
    variance. A few directions hold most of a latent's variance, and what moves most need not be
    the robot."""

    def __init__(self, latents: torch.Tensor, codebook: torch.Tensor | None = None,
                 width: int = 16):
        """latents (M, S*D): a sample. codebook (S, K, D): of the labeller, if it has one."""
        super().__init__()
        center = latents.mean(0)
        _, scale, basis = torch.linalg.svd(latents - center, full_matrices=False)
        deviation = scale.clamp(min=1e-4 * scale[0]) / len(latents) ** 0.5
        scaled = basis / deviation[:, None]
        basis = scaled[:width].T                                        # (S*D, N)
        self.width = basis.shape[1]
        self.register_buffer("center", center)
        self.register_buffer("basis", basis)
        self.register_buffer("codebook", codebook)

    def forward(self, batch: dict):
        latents = batch["latents"].flatten(1)
        kind = "cuda" if latents.is_cuda else "cpu"
        with torch.autocast(kind, enabled=False):                       # as exact as the labels
            target = (latents - self.center) @ self.basis
        return target, torch.ones_like(target)

    def scores(self, prediction):
        """(B, N) -> (B, S, K): how near each code is to the latents that are meant."""
        if self.codebook is None:
            return None
        S, _, D = self.codebook.shape
        latents = self.center + prediction @ torch.linalg.pinv(self.basis)          # (B, S*D)
        difference = latents.view(-1, S, 1, D) - self.codebook          # (B, S, K, D)
        return -difference.square().sum(-1)


class Actions(nn.Module):
    """Target: the true action chunk, in units of each dataset's deviation."""

    def __init__(self, stats: dict, chunk: int):
        super().__init__()
        self.register_buffer("offset", stats["action_offset"])          # (datasets, A)
        self.register_buffer("scale", stats["action_scale"])
        self.width = chunk * self.offset.shape[1]                       # N

    def forward(self, batch: dict):
        offset, scale = (x[batch["dataset"], None] for x in (self.offset, self.scale))
        target = (batch["actions"] - offset) / scale                    # (B, C, A)
        weight = batch["action_mask"][..., None].expand_as(target).float()
        return target.flatten(1), weight.flatten(1)

    def scores(self, prediction):
        """There are no codes."""


def whiten(codebook: torch.Tensor) -> torch.Tensor:
    """(S, K, D) -> (S, K, R), R = min(K - 1, D): each token's codes in coordinates of zero mean and
    unit covariance.

    A regression onto raw vectors is dominated by few directions, and the mean of several codes lies
    nearest to whichever code is short; here distinct codes are about equally far apart.
    """
    K, D = codebook.shape[1:]
    centered = codebook - codebook.mean(1, keepdim=True)
    u, s, _ = torch.linalg.svd(centered, full_matrices=False)
    means_something = s > 1e-4 * s[:, :1]                   # not between codes that are equal
    u = u * means_something[:, None]
    return u[..., :min(K - 1, D)] * K ** 0.5


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


# ------------------------------------------------------------ evaluation
@torch.no_grad()
def to_inputs(batch: dict, cfg: Config, labeller, trunk: Trunk, tokens, device,
              labelled: bool = True) -> dict:
    """The loader's batch on the device -> images, ids, mask and, if `labelled`, what the target is
    made of."""
    frames = batch["frames"]                                            # (B, 1 + n, H, H, 3)
    ids, mask = tokens(batch["instruction"], device)
    inputs = {"images": data_oxe.resize_to(frames[:, 0], trunk.image_size), "ids": ids,
              "mask": mask}
    if not labelled:
        return inputs
    if "actions" in MODES[cfg.mode].needs:                  # all ranks come here with their batches
        inputs |= {k: batch[k] for k in ("actions", "action_mask", "has_action", "dataset")}
        share = mean_of_ranks(batch["has_action"].float().mean())
        inputs["labelled_share"] = share.expand(len(frames))
    if not needs_labels(cfg):
        return inputs
    if cfg.null == "frame":
        frames = frames[:, :1].expand_as(frames)
    codes, latents = label_pairs(labeller, frames)
    labels = {"latents": latents}
    if codes is not None:
        labels["codes"] = codes
    if cfg.null == "permuted":                                          # of the batch's pairs
        labels = {name: x.roll(1, 0) for name, x in labels.items()}
    return inputs | labels


@torch.no_grad()
def label_pairs(labeller, frames) -> tuple:
    """Frames (B, 1 + n, H, H, 3), n = --latent-chunk -> codes (B, S), latents (B, S, D) of all
    consecutive pairs: S counts the labeller's tokens of each."""
    B = len(frames)
    pairs = torch.stack([frames[:, :-1], frames[:, 1:]], 2)             # (B, n, 2, H, H, 3)
    codes, latents = labeller(pairs.flatten(0, 1))
    if codes is not None:                                               # 'pooled' has none
        codes = codes.reshape(B, -1)
    return codes, latents.reshape(B, -1, latents.shape[-1])


class Evaluation:
    """Is it learning? Metrics on held-out episodes, each beside what takes no learning: the
    commonest codes and the mean target of training episodes, and (`_image_only`,
    `_instruction_only`) the prediction where the other input is another sample's.

    Called, it gives the mean over datasets and, if there are several, the metrics of each as
    NAME/metric. Those that are sums over samples, but no baseline or ablation, come with `_low` and
    `_high`, 95% of a bootstrap over episodes, of which each dataset has FEW_EPISODES or more, and
    with `_trend`, the change since the last call, and its own two.
    """

    def __init__(self, model: LatentPolicy, cfg: Config, loaders: dict, inputs_of):
        self.collect = partial(collect, model, cfg, inputs_of)
        self.loaders, self.names = loaders, loaders["val"].names
        self.before = {}                                    # {metric: it and its draws}
        known = labels_of(model, cfg, inputs_of, loaders["many"])
        present = np.unique(known["dataset"])
        self.baselines = {i: baseline_of(rows_of(known, i)) for i in present}
        self.mix = mix_of(known["dataset"], self.names, "mix_train")

    def __call__(self) -> dict:
        val = self.collect(self.loaders["val"], held_out=True)
        probed = ("few", "many") if val["whole"].any() else ()
        fits = {name: self.collect(self.loaders[name]) for name in probed if name in self.loaders}
        each = {}
        for i, baseline in self.baselines.items():
            rows = rows_of(val, i)
            if not len(rows["dataset"]):
                continue
            its_fits = {label: rows_of(fit, i) for label, fit in fits.items()}
            each[self.names[i]] = measure(rows, baseline) | action_probes(rows, its_fits)
        counts = {key: sum(its[key] for its in each.values()) for key in ("samples", "episodes")}
        metrics = self.intervals("", mean_of_datasets(each) | counts)
        metrics["loss"] = val["loss"].mean()
        if len(self.names) > 1:
            metrics |= mix_of(val["dataset"], self.names, "mix") | self.mix
            for name, its in each.items():
                metrics |= self.intervals(f"{name}/", its)
        return metrics

    def intervals(self, prefix: str, metrics: dict) -> dict:
        """Of each metric its value; of what is resampled, but no baseline or ablation, interval and
        trend."""
        out = {}
        for name, value in metrics.items():
            name = f"{prefix}{name}"
            if np.ndim(value) == 0:
                out[name] = value
                continue
            if name.endswith(("_mean", "_majority", "_only")):
                out[name] = value[0]
                continue
            found = {name: value}
            if name in self.before:
                found[f"{name}_trend"] = value - self.before[name]
            self.before[name] = value
            for key, values in found.items():
                out[key], low_high = values[0], np.quantile(values[1:], [0.025, 0.975])
                if np.isfinite(low_high).all():             # else a dataset has too few episodes
                    out[f"{key}_low"], out[f"{key}_high"] = low_high
        return out


@torch.no_grad()
def collect(model: LatentPolicy, cfg: Config, inputs_of, loader, held_out: bool = False) -> dict:
    """Of a loader's first batches, arrays of M rows: readout (M, W), prediction (M, N), actions
    (M, C*A), `whole`: none of these is past the end; of held-out ones also what judge() gives and
    `has_other`: another sample's half of the input was there for it."""
    rows, device, others = [], next(model.parameters()).device, Others()
    model.eval()
    for i, batch in enumerate(loader.peek(cfg.eval_batches)):
        torch.manual_seed(i)
        tensors = data_oxe.to_device(batch, device, loader.image_size)
        inputs = inputs_of(tensors, labelled=held_out)
        if held_out:
            swapped, has_other = others(inputs, batch["dataset"])
            row = judge(model, inputs, swapped) | {"has_other": torch.from_numpy(has_other)}
        else:
            readout, prediction = model.predict(inputs)
            row = {"readout": readout, "prediction": prediction}
        row = {name: value.cpu().numpy() for name, value in row.items()}
        row["actions"] = batch["actions"].reshape(len(batch["actions"]), -1)
        row["whole"] = batch["has_action"] & batch["action_mask"].all(1)
        row |= {"dataset": batch["dataset"], "episode": batch["episode"]}
        rows.append(row)
    model.train()
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


# what of the input is another sample's
SWAPPED = {"": (), "_image_only": ("ids", "mask"), "_instruction_only": ("images",)}


class Others:
    """others(inputs, dataset (B,)) -> of each sample the picture and the instruction of another one
    of its dataset; whether there was one (B,). Of each dataset one sample is kept for the batches
    to come, where it may have only one."""

    def __init__(self):
        self.dataset, self.kept = np.zeros(0, int), {}

    def __call__(self, inputs: dict, dataset: np.ndarray) -> tuple[dict, np.ndarray]:
        B, every = len(dataset), np.concatenate([dataset, self.dataset])
        other = np.arange(len(every))
        for i in np.unique(dataset):
            rows = np.flatnonzero(every == i)
            other[rows] = np.roll(rows, 1)
        other = other[:B]
        self.dataset, first = np.unique(every, return_index=True)
        swapped = {}
        for key in ("images", "ids", "mask"):
            x = inputs[key]
            if key in self.kept:
                x = torch.cat([x, self.kept[key]])
            self.kept[key], swapped[key] = x[first], x[other]
        return swapped, other != np.arange(B)


def judge(model: LatentPolicy, inputs: dict, others: dict) -> dict:
    """Loss, target and weight (B, N), readout, codes (B, S) and, of the whole input and of each
    half alone, the prediction and its likeliest codes (B, S, 5)."""
    target, weight = model.target(inputs)
    parts, readout, prediction = model.judge(inputs)
    loss = sum(parts.values()).expand(len(target))
    row = {"target": target, "weight": weight, "loss": loss, "readout": readout}
    for name, swapped in SWAPPED.items():
        if swapped:
            shown = inputs | {key: others[key] for key in swapped}
            _, prediction = model.predict(shown)
        row[f"prediction{name}"] = prediction
        scores = model.code_scores(prediction)                          # (B, S, K)
        if scores is not None:
            best = scores.topk(min(5, scores.shape[-1])).indices
            row |= {"codes": inputs["codes"], f"likeliest{name}": best}
    return row


def baseline_of(known: dict) -> dict:
    """What one dataset's training episodes say without a model: the mean target (N,), its codes,
    the five commonest of each position (S, 5) and the commonest sequence (S,)."""
    weight = known["weight"]
    total = (known["target"] * weight).sum(0)
    baseline = {"mean": total / weight.sum(0).clip(1e-9)}
    if "codes" in known:
        codes = known["codes"]
        count = histograms(codes, codes.max() + 1)
        kinds, times = np.unique(codes, axis=0, return_counts=True)
        baseline |= {"codes": codes, "sequence": kinds[times.argmax()],
                     "majority": np.argsort(-count, 1, kind="stable")[:, :5]}
    return baseline


def measure(val: dict, baseline: dict) -> dict:
    """All metrics of one dataset's held-out samples but those of actions; see resampled. All are of
    the same samples: those that have a target, and another one to swap halves with."""
    counted = val["weight"].any(1) & val["has_other"]
    val = {key: x[counted] for key, x in val.items()}
    metrics = {"samples": counted.sum(), "episodes": len(np.unique(val["episode"]))}
    if not counted.any():
        return metrics
    metrics |= errors(val, baseline)
    if "likeliest" in val:
        metrics |= accuracies(val, baseline) | population(val, baseline)
    return metrics


def errors(val: dict, baseline: dict) -> dict:
    """Squared and absolute error and cosine of predicted vectors, beside those of the mean vector
    of training; target_r2: the share of that one's squared error which is explained."""
    out, target, weight = {}, val["target"], val["weight"]
    mean = np.broadcast_to(baseline["mean"], target.shape)
    of_mean = (((mean - target) * weight) ** 2).sum(1)
    for name in ("_mean", *SWAPPED):
        guess = val[f"prediction{name}"] if name in SWAPPED else mean
        error = (guess - target) * weight
        squared, numbers = (error ** 2).sum(1), weight.sum(1)                       # (M,) each
        alike = cosine(guess * weight, target * weight)
        out[f"mse{name}"] = resampled(val, squared, numbers)
        out[f"mae{name}"] = resampled(val, np.abs(error).sum(1), numbers)
        out[f"cosine{name}"] = resampled(val, alike)
        if name in SWAPPED:
            out[f"target_r2{name}"] = 1 - resampled(val, squared, of_mean)
    return out


def accuracies(val: dict, baseline: dict) -> dict:
    """Is the code among the likeliest one or five? `_majority`: the commonest codes of training."""
    out, codes = {}, val["codes"]                                                   # (M, S)
    for name in (*SWAPPED, "_majority"):
        guess = val[f"likeliest{name}"] if name in SWAPPED else baseline["majority"]
        right = guess == codes[..., None]                                           # (M, S, 5)
        for key, each in {"accuracy": right[..., 0], "top5": right.any(-1)}.items():
            out[f"{key}{name}"] = resampled(val, each.mean(1))
            if name in ("", "_majority"):
                of_position = enumerate(each.mean(0))
                out |= {f"{key}_{i}{name}": value for i, value in of_position}
    sequences = {"": val["likeliest"][..., 0], "_majority": baseline["sequence"]}
    for name, sequence in sequences.items():
        right = (sequence == codes).all(1)
        out[f"accuracy_all_tokens{name}"] = resampled(val, right)
    return out


def population(val: dict, baseline: dict) -> dict:
    """Predicted codes as a population beside the true ones, means over positions: how many there
    are, their entropy (nats), and how far their histogram is from the true one; `_train`: how far
    that of training's codes is."""
    codes = {"": val["likeliest"][..., 0], "_true": val["codes"], "_train": baseline["codes"]}
    K = 1 + max(x.max() for x in codes.values())
    counts = {name: histograms(x, K) for name, x in codes.items()}      # (S, K) each
    out = {}
    for name in ("", "_true"):
        each = entropy_of(counts[name])                                 # (S,)
        used = (counts[name] > 0).sum(1)
        out |= {f"code_entropy{name}": each.mean(), f"codes_unique{name}": used.mean()}
        out |= {f"code_entropy_{i}{name}": value for i, value in enumerate(each)}
    for name in ("", "_train"):
        kl, js = divergences(counts[name], counts["_true"])
        out |= {f"code_kl{name}": kl.mean(), f"code_js{name}": js.mean()}
    return out


def action_probes(val: dict, fits: dict) -> dict:
    """What the trunk knows about actions, where the dataset has them: held-out R2 of a kernel ridge
    from the prediction and from the readout to action chunks, fitted on few training episodes a
    task (evaluation_loaders) and on many."""
    out = {}
    for label, fit in fits.items():
        for feature in ("prediction", "readout"):
            r2 = action_r2(fit, val, feature)
            if r2 is not None:
                out[f"action_r2_{label}_{feature}"] = r2
    return out


def describe(m: dict, cfg: Config, step: int) -> str:
    """Each metric beside what takes no learning, a line a theme; the verdict, but of an untrained
    model; of several datasets tables."""
    lines = []
    if "accuracy" in m:
        positions = (f"{what} {' '.join(pairs)}" for what, pairs in by_position(m).items())
        lines += [describe_score(m, "top-1", "accuracy"), describe_score(m, "top-5", "top5"),
                  wrapped("position", ", ".join(positions)),
                  f"codes     {m['codes_unique']:.1f} unique (true {m['codes_unique_true']:.1f}), "
                  f"KL {beside(m, 'code_kl', 'train')}, JS {beside(m, 'code_js', 'train')}"]
    if "mse" in m:
        lines += [describe_score(m, "target R2", "target_r2"),
                  f"target    MSE {beside(m, 'mse', 'mean')}, MAE {beside(m, 'mae', 'mean')}, "
                  f"cosine {beside(m, 'cosine', 'mean')}"]
    few = f"{cfg.episodes_per_task or 2} a task"
    for name, labels in {"few": few, "many": "many"}.items():
        key = f"action_r2_{name}"
        if f"{key}_readout" in m:
            score = describe_score(m, "action R2", f"{key}_prediction")
            datasets = sum(x.endswith(f"/{key}_readout") for x in m)
            of = f", {datasets} datasets" if datasets else ""
            lines.append(f"{score}, readout {m[f'{key}_readout']:.3f} (episodes: {labels}{of})")
    if "mix_unique" in m:
        lines.append(f"mix       {m['mix_unique']:.0f} datasets, entropy {m['mix_entropy']:.3f} "
                     f"(train {m['mix_train_unique']:.0f}, {m['mix_train_entropy']:.3f})")
    if step:
        lines.append(wrapped("verdict", verdict(m)[1]))
    lines += tables_of(m)
    legend = "value [95%], change [95%], what it stands beside"
    body = textwrap.indent("\n".join(lines), "  ")
    counts = f"{m['samples']} samples, {m['episodes']} episodes"
    return f"loss {m['loss']:.3f} | {counts} | {legend}\n{body}"


def verdict(m: dict) -> tuple[bool | None, str]:
    """Are predictions of every dataset better than what takes no learning? None: of no dataset can
    it be said. Datasets with too few samples are not judged but counted."""
    better, worse, what = "accuracy", "accuracy_majority", "majority code"
    if "accuracy" not in m:                                             # of errors less is better
        better, worse, what = "mse_mean", "mse", "mean target"
    judged = [x for x in datasets_of(m) if x + better in m and m[f"{x}samples"] >= FEWEST]
    bad = [x for x in judged if m[x + better] < m[x + worse]]
    if not judged:
        return None, f"no verdict: no dataset has {FEWEST} held-out samples (--eval-batches)"
    every = sum(name.endswith("/mix") for name in m) or 1               # also those with none
    rest = f"; {every - len(judged)} cannot be judged, of too few samples held out or in training"
    if every == len(judged):
        rest = ""
    if not bad:
        return True, f"no worse than the {what} on any of {len(judged)} datasets{rest}"
    names = ", ".join(x[:-1] for x in bad if x)
    names = f" ({names})" if names else ""
    return False, (f"worse than the {what} on {len(bad)} of {len(judged)} datasets{names}: "
                   f"pretraining on these would hurt{rest}")


def report_card(first: dict, last: dict, cfg: Config) -> str:
    """Whether this stage taught something, one check a line with its figures. first: of the
    untrained model; {} where nothing tells it."""
    r2 = last.get("target_r2", math.nan)                    # no action of held-out episodes
    checks = [verdict(last),
              (None if math.isnan(r2) else r2 > 0.02,
               f"R2 of the target {number(r2)} (above .02)")]
    if "accuracy" in last:
        mine, majority = last["accuracy"], last["accuracy_majority"]
        other = last.get("accuracy_instruction_only", math.nan)
        checks.append((mine > max(majority, other),
                       f"nearest-code accuracy {mine:.3f} (majority code {majority:.3f}, the "
                       f"instruction with another sample's picture {other:.3f})"))
    if "action_r2_few_readout" in first.keys() & last.keys():
        names = "action_r2_few_readout", "action_r2_few_prediction"
        mine, before = (max(m[name] for name in names) for m in (last, first))
        few = f"{cfg.episodes_per_task or 2} labelled episodes a task"
        checks.append((mine > max(before, 0),
                       f"actions from {few}: R2 {mine:.2f} (at the start {before:.2f})"))
    marks = {True: "pass", False: "FAIL", None: "  ? "}
    lines = [f"  {marks[good]}  {what}" for good, what in checks]
    found = {good for good, _ in checks}
    summary = "the trunk learned from the video"
    if False in found:
        summary = "a policy from this trunk may be worse than one without it"
    if None in found:
        summary = "too few held-out samples to say what the trunk learned"
    if cfg.overfit:
        summary = "all of the one batch of --overfit: nothing here is of held-out episodes"
    return "\n".join(["report card", *lines, f"  {summary}"])


# ------------------------------------------------------------ main
def main(cfg: Config) -> int:
    check(cfg)
    rank, world, device = setup(cfg)
    local = cfg.batch_size // world                                     # samples a process
    if cfg.null == "permuted" and local == 1:
        fail(f"--null permuted gives a process's samples each other's latents, but --batch-size "
             f"{cfg.batch_size} leaves each process one; give at least {2 * world}")
    labeller, trunk, tokenizer, inputs_of, load = load_stage(cfg, device)
    loader = load(cfg, "train", local, seed=cfg.seed, rank=rank, world=world)
    loaders = evaluation_loaders(cfg, load) | ({"val": loader} if cfg.overfit else {})
    labeller.check(cfg, loader)

    model = make_model(cfg, trunk, labeller, loaders["many"], device)
    flops = flops_a_sample(model, loaders["val"], inputs_of, device)
    train = wrap(model, cfg, device)
    optimizer = make_optimizer(cfg, model)
    start = load_checkpoint(cfg, model, optimizer, loader, rank, world) if cfg.resume else 0
    if cfg.export_only:
        export(model, cfg, start, tokenizer, labeller.manifest)
        return 0
    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    log = Logger(cfg, rank, world, start, flops, device)
    log.print(f"{size_of(model)}, {flops / 1e9:.2f} GFLOP a sample")
    log.print(loader.summary())
    save = Saver(cfg, model, optimizer, loader)
    evaluate = Evaluation(model, cfg, loaders, inputs_of)
    stop_flag, batches = StopFlag(cfg, device), batches_of(cfg, loader, device)

    for step in range(start, cfg.steps + 1):                            # one more: evaluates, saves
        stop, last = stop_flag(step), step == cfg.steps
        if not stop and (last or step % cfg.eval_every == 0):
            with log.paused():
                metrics = evaluate()
            log.validation(step, metrics, describe(metrics, cfg, step))
            save.judge(step, metrics["loss"])
        if stop or last or (step > start and save.due(step)):
            with log.paused():
                save(step, wait=stop or last)
        if stop or last:
            break

        start_step(cfg, step, optimizer, rank, world)                   # learning rate, randomness
        with log.waiting():
            batch = next(batches)
        with log.waiting("label_wait"):
            inputs = inputs_of(batch)
        means = {}
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
        log.step(step, means, batch)

    if not stop:
        export(model, cfg, cfg.steps, tokenizer, labeller.manifest)
        untrained = validations_of(cfg.out).get(0, {})
        log.print(f"trunk and head: {cfg.out}/stage2\n{report_card(untrained, metrics, cfg)}")
    return log.close(stop)


# ------------------------------------------------------------ a reader may stop here
def needs_labels(cfg: Config) -> bool:
    """Whether a labeller has to look at pairs."""
    return not {"latents", "codes"}.isdisjoint(MODES[cfg.mode].needs)


def check(cfg: Config):
    """Fills in learning rate and warm-up: a large trunk wants a tenth of tiny's rate. Exits where
    settings do not go together."""
    if cfg.mode not in MODES:
        fail(f"unknown --mode '{cfg.mode}'; there are {', '.join(MODES)}")
    needs, labels = MODES[cfg.mode].needs, needs_labels(cfg)
    if labels and not cfg.laq_ckpt:
        fail(f"--mode {cfg.mode} needs --laq-ckpt, the laq.pt2 of laq.py")
    if cfg.laq_ckpt == "pooled" and "codes" in needs:
        fail(f"--laq-ckpt pooled has no codes, which --mode {cfg.mode} predicts; give the laq.pt2 "
             f"of laq.py")
    if cfg.laq_ckpt == "pooled" and cfg.targets == "codes" and labels:
        fail("--laq-ckpt pooled has no codes; give --targets vectors")
    if cfg.targets == "codes" and "latents" not in needs:
        fail(f"--targets codes are those of latents, which --mode {cfg.mode} does not learn; leave "
             f"it out")
    if cfg.latent_chunk > 1 and not labels:
        fail(f"--latent-chunk {cfg.latent_chunk} is a number of frame pairs whose latents are "
             f"predicted; --mode {cfg.mode} needs 1")
    if cfg.parallel_decode and cfg.mode != "codes":
        fail(f"--parallel-decode is a way to predict --mode codes, this is --mode {cfg.mode}")
    if cfg.null and not labels:
        fail(f"--null {cfg.null} is a control of latents; --mode {cfg.mode} has none")
    if cfg.shrink and not cfg.random_init:
        fail("--shrink makes a toy of the trunk, which can only be random; give --random-init too")
    tiny = cfg.trunk == "tiny"
    if cfg.freeze is None:
        cfg.freeze = "vision" if cfg.trunk == "dual-7b" else "none"
    if cfg.lr is None:
        cfg.lr = 1e-3 if tiny else 1e-4
    if cfg.overfit:
        cfg.eval_batches = 1
    if cfg.warmup_steps is None:
        cfg.warmup_steps = min(50 if tiny else 1000, cfg.steps // 4)


def load_stage(cfg: Config, device) -> tuple:
    """-> labeller, trunk, tokenizer; inputs_of(batch) as to_inputs makes them; load(cfg, split,
    batch_size, ...) of a Loader of the pairs that the labeller labels."""
    labeller = load_labeller(cfg.laq_ckpt if needs_labels(cfg) else "pooled", device)
    trunk, tokenizer = load_trunk(cfg)
    freeze(trunk, cfg)
    inputs_of = partial(to_inputs, cfg=cfg, labeller=labeller, trunk=trunk,
                        tokens=Tokens(tokenizer, cfg.text_len), device=device)
    load = partial(data_oxe.Loader, image_size=max(labeller.image_size, trunk.image_size),
                   horizon_s=labeller.manifest["config"]["horizon_s"], chunk=cfg.chunk,
                   consecutive=cfg.latent_chunk)
    return labeller, trunk, tokenizer, inputs_of, load


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


def batches_of(cfg: Config, loader, device):
    """The loader's on the device; with --overfit the first one, over and over."""
    if not cfg.overfit:
        return loader.to(device)
    return itertools.repeat(data_oxe.to_device(next(loader.peek(1)), device, loader.image_size))


def make_model(cfg: Config, trunk: Trunk, labeller, loader, device) -> LatentPolicy:
    mode = MODES[cfg.mode]
    targets = [make_target(what, cfg, labeller, loader, device) for what in mode.needs]
    return mode(cfg, trunk, *targets)


@torch.no_grad()
def make_target(what: str, cfg: Config, labeller, loader, device) -> nn.Module:
    """Of what a mode needs, with the units of the loader's first batches."""
    if what == "actions":
        if not loader.action_dim:
            fail(f"--mode {cfg.mode} learns actions, but no dataset of --mix '{cfg.mix}' has any; "
                 f"give --mode latent_flow")
        if not needs_labels(cfg):
            check_widths(loader)
        return Actions(statistics(loader, "meanstd"), cfg.chunk)
    codebook = labeller.codebook                                        # (S, K, D)
    if codebook is not None:                                            # 'pooled' has none
        codebook = codebook.repeat(cfg.latent_chunk, 1, 1)              # for each pair the same
    if what == "codes":
        return OneHot(codebook)
    if what != "latents":
        fail(f"--mode {cfg.mode} needs '{what}'; there are latents, codes and actions")
    if cfg.targets == "codes":
        return Codes(codebook)
    sample = []
    for batch in loader.peek(cfg.eval_batches):
        frames = data_oxe.to_device(batch, device, loader.image_size)["frames"]
        _, latents = label_pairs(labeller, frames)
        sample.append(latents.flatten(1))
    latents = torch.cat(sample)                                         # (M, S*D)
    if (latents == latents[0]).all():
        fail("the labeller gives all pairs the same latents, of which nothing can be learned")
    return Vectors(latents, codebook, width=16 * cfg.latent_chunk)


def check_widths(loader):
    """Exits where the datasets of a mix have actions of different widths, or none."""
    widths = {plan.name: len(data_oxe.kinds_of(plan.entry.action)) for plan in loader.plans}
    if min(widths.values()) < max(1, loader.action_dim):
        fail(f"a policy learns actions of one width from all of --mix, but these are {widths} wide")


def flops_a_sample(model: LatentPolicy, loader, inputs_of, device) -> int:
    """Of forward and backward, without the labeller's; of shapes, so that nothing is computed."""
    batch = data_oxe.to_device(next(loader.peek(1)), device, loader.image_size)
    two = {name: x[:2].to("meta") for name, x in inputs_of(batch).items()}
    model = hollow(model).to("meta")
    return flops_of(model, lambda: model(two)) // 2


# ------------------------------------------------------------ what an evaluation computes
@torch.no_grad()
def labels_of(model: LatentPolicy, cfg: Config, inputs_of, loader) -> dict:
    """Of a loader's first batches, arrays of M rows: target and weight (M, N), codes (M, S)."""
    rows, device = [], next(model.parameters()).device
    for batch in loader.peek(cfg.eval_batches):
        tensors = data_oxe.to_device(batch, device, loader.image_size)
        inputs = inputs_of(tensors, labelled=True)
        target, weight = model.target(inputs)
        row = {"target": target, "weight": weight}
        if "codes" in inputs:
            row["codes"] = inputs["codes"]
        row = {name: value.cpu().numpy() for name, value in row.items()}
        rows.append(row | {"dataset": batch["dataset"]})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def rows_of(samples: dict, dataset: int) -> dict:
    """Of what collect() gives, one dataset's rows."""
    rows = samples["dataset"] == dataset
    return {name: value[rows] for name, value in samples.items()}


def cosine(x, y):
    """Of rows (N, n): (N,)"""
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return (x * y).sum(1) / lengths.clip(1e-9)


def histograms(codes: np.ndarray, K: int) -> np.ndarray:
    """Of each position of codes (M, S), (S, K)."""
    return np.stack([np.bincount(column, minlength=K) for column in codes.T])


def entropy_of(count: np.ndarray) -> np.ndarray:
    """Of histograms (S, K), in nats: (S,)"""
    share = count / count.sum(1, keepdims=True).clip(1)
    surprise = -np.log(share.clip(1e-12))
    return (share * surprise).sum(1)


def divergences(count: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL from histograms (S, K) to the true ones, each code counted half a time more so that none
    is impossible, and Jensen-Shannon, in nats: (S,) each."""
    def shares(x):
        return x / x.sum(1, keepdims=True).clip(1)
    p, q = shares(count + 0.5), shares(true + 0.5)
    kl = (p * np.log(p / q)).sum(1)
    p, q = shares(count), shares(true)
    apart = (entropy_of(p) + entropy_of(q)) / 2
    return kl, entropy_of((p + q) / 2) - apart


FEWEST = 16                                 # samples of a dataset of which something can be said
FEW_EPISODES = 5                            # fewer say nothing of how much episodes differ


def action_r2(fit: dict, val: dict, feature: str) -> np.ndarray | None:
    """Held-out R2 of action chunks read from a feature, resampled; None without labelled rows of
    two episodes."""
    known, asked = fit["whole"], val["whole"]
    episode = fit["episode"][known]
    if min(known.sum(), asked.sum()) < FEWEST or len(np.unique(episode)) < 2:
        return None
    x, y = (torch.from_numpy(fit[name][known]) for name in (feature, "actions"))
    x_val, y_val = (torch.from_numpy(val[name][asked]) for name in (feature, "actions"))
    probe = KernelRidge([x], y, episode)
    unit = y.std(0).clamp(min=1e-3)
    left, whole = (((guess - y_val) / unit).square().sum(1).numpy()     # (M,)
                   for guess in (probe([x_val]), y_val.mean(0)))
    return 1 - resampled({key: val[key][asked] for key in ("dataset", "episode")}, left, whole)


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


def resampled(rows: dict, part: np.ndarray, whole=1.0) -> np.ndarray:
    """A metric that is the sum of part (M,) over that of whole (M,), or the mean of part: of a
    dataset's samples, then of draws of their episodes, of FEW_EPISODES at least, or else nan.
    (1 + draws,)"""
    _, episode = np.unique(rows["episode"], return_inverse=True)
    episodes = episode.max() + 1
    times = drawn_times(episodes, rows["dataset"][0])

    def total(x):
        return times @ np.bincount(episode, np.broadcast_to(x, len(episode)))
    found = total(part) / total(whole).clip(1e-12)
    if episodes < FEW_EPISODES:
        found[1:] = math.nan
    return found


@cache
def drawn_times(n: int, seed: int, draws: int = 1000) -> np.ndarray:
    """How often each of n episodes counts, (1 + draws, n): once, then as drawn n times with
    replacement; of a dataset always the same, so that two evaluations can be compared draw by
    draw."""
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    return np.concatenate([np.ones((1, n)), times])


def validations_of(folder) -> dict[int, dict]:
    """Those that stand in a run's metrics.jsonl, by their steps."""
    path, found = Path(folder) / "metrics.jsonl", {}
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):                 # the last of a killed run
            line = json.loads(text)
            if "val_loss" in line:
                its = {name.removeprefix("val_"): value for name, value in line.items()}
                found[line["step"]] = its
    return found


def mean_of_datasets(each: dict) -> dict:
    """{dataset: {metric: value}} -> {metric: its mean over those that have it}"""
    means = {}
    for name in dict.fromkeys(name for metrics in each.values() for name in metrics):
        values = [metrics[name] for metrics in each.values() if name in metrics]
        means[name] = np.mean(values, 0)
    return means


def mix_of(dataset: np.ndarray, names, key: str) -> dict:
    """Each dataset's share of the samples (M,), how many datasets there are and how evenly, their
    entropy as a share of the largest possible one."""
    share = np.bincount(dataset, minlength=len(names)) / len(dataset)
    entropy, = entropy_of(share[None])
    largest = max(math.log(len(names)), 1e-9)
    return {f"{key}_unique": (share > 0).sum(),
            f"{key}_entropy": entropy / largest,
            **{f"{name}/{key}": value for name, value in zip(names, share)}}


def datasets_of(m: dict) -> list[str]:
    """Prefixes of the metrics of each dataset; one that is empty, where there is one dataset."""
    return [key.removesuffix("samples") for key in m if key.endswith("/samples")] or [""]


def describe_score(m: dict, label: str, name: str) -> str:
    """A metric, its interval, its trend and what stands beside it."""
    text = f"{label:9} {number(m[name])}"
    if f"{name}_low" in m:
        text += f" [{number(m[f'{name}_low'])}, {number(m[f'{name}_high'])}]"
    if f"{name}_trend_low" in m:
        change, low, high = (number(m[f"{name}_trend{end}"], "+") for end in ("", "_low", "_high"))
        text += f" {change} [{low}, {high}]"
    others = {"majority": "majority", "image_only": "image", "instruction_only": "instr."}
    its = [f"{label} {number(m[f'{name}_{other}'])}" for other, label in others.items()
           if f"{name}_{other}" in m]
    return ", ".join([text, *its])


def beside(m: dict, name: str, other: str) -> str:
    """A metric and its baseline."""
    return f"{number(m[name])} ({other} {number(m[f'{name}_{other}'])})"


def by_position(m: dict, prefix: str = "") -> dict[str, list[str]]:
    """What is compared -> of each position both numbers."""
    positions = [*itertools.takewhile(lambda i: f"{prefix}top5_{i}" in m, itertools.count())]

    def pairs(name, other, form):
        keys = [f"{prefix}{name}_{i}" for i in positions]
        both = (f"{m[key]:{form}}/{m[f'{key}_{other}']:{form}}" for key in keys)
        return [pair.replace("%", "") for pair in both]
    return {"top-1/majority %": pairs("accuracy", "majority", ".0%"),
            "top-5/majority %": pairs("top5", "majority", ".0%"),
            "entropy/true": pairs("code_entropy", "true", ".1f")}


def wrapped(label: str, text: str, width: int = 10) -> str:
    """For a terminal of 100 columns, less the indent of describe."""
    return textwrap.fill(f"{label:{width}}{text}", 98, subsequent_indent=" " * width)


# of each dataset, headed by what they stand for: 14 columns for its name, 7 for a metric
TABLES = {
    "codes": {
        "accuracy": "top-1", "accuracy_low": "low", "accuracy_high": "high",
        "accuracy_trend": "change", "accuracy_majority": "major.", "accuracy_image_only": "image",
        "accuracy_instruction_only": "instr.", "top5": "top-5", "top5_majority": "major.",
        "codes_unique": "unique", "codes_unique_true": "true"},
    "target": {
        "mse": "MSE", "mse_mean": "mean", "mae": "MAE", "mae_mean": "mean", "cosine": "cosine",
        "cosine_mean": "mean", "target_r2": "R2", "target_r2_low": "low", "target_r2_high": "high",
        "target_r2_trend": "change", "target_r2_image_only": "image",
        "target_r2_instruction_only": "instr."},
    "population": {
        "code_kl": "KL", "code_kl_train": "train", "code_js": "JS", "code_js_train": "train",
        "samples": "n", "episodes": "eps.", "mix": "share", "mix_train": "train",
        "action_r2_few_prediction": "few R2", "action_r2_few_readout": "read.",
        "action_r2_many_prediction": "all R2", "action_r2_many_readout": "read."}}


def tables_of(m: dict) -> list[str]:
    """Lines of tables with a line a dataset, where there are several."""
    prefixes, lines = datasets_of(m), []
    if prefixes == [""]:
        return []
    for title, columns in TABLES.items():
        keys = [key for key in columns if any(f"{prefix}{key}" in m for prefix in prefixes)]
        if not keys:
            continue
        head = "".join(f"{columns[key]:>7}" for key in keys)
        lines += ["", f"{title:14}{head}"]
        for prefix in prefixes:
            cells = "".join(f"{number(m.get(f'{prefix}{key}')):>7}" for key in keys)
            lines.append(f"{shortened(prefix):14}{cells}")
    if "accuracy" in m:
        lines += ["", wrapped("by position", " | ".join(by_position(m)), 15)]
        for prefix in prefixes:
            cells = (" ".join(f"{pair:>5}" for pair in pairs).ljust(len(what))
                     for what, pairs in by_position(m, prefix).items())
            lines.append(wrapped(shortened(prefix), " | ".join(cells), 15))
    return lines


def shortened(prefix: str) -> str:
    """A dataset's name in 14 columns: both ends tell it from others, which a test holds."""
    name = prefix.removesuffix("/").removesuffix(data_oxe.RLDS)
    return f"{name[:10]}…{name[-3:]}" if len(name) > 14 else name


def number(value: float | None, sign: str = "") -> str:
    """In six characters at most."""
    if value is None:
        return "-"
    if isinstance(value, (int, np.integer)):
        return str(value)
    size = abs(value)
    digits = ".3f" if size < 9.9995 else ".1f" if size < 999.95 else ".0e"
    return f"{value:{sign}{digits}}"


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


def warn_of_holdout(cfg, earlier: dict, path: str):
    """Validation is only held out if the stage before held out the same."""
    for name in ("val_fraction", "holdout"):
        if earlier.get(name) != getattr(cfg, name):
            warn(f"'{path}' was trained with {name} {earlier.get(name)!r}, this is "
                 f"{getattr(cfg, name)!r}: validation may hold episodes that it has seen")


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


def export(model: LatentPolicy, cfg: Config, step: int, tokenizer, labeller: dict):
    """OUT/stage2: trunk and tokenizer as transformers saves them, readout and head, manifest. All
    ranks call it."""
    model = unsharded(model)
    if model is None:
        return
    folder = Path(cfg.out) / ".stage2.partial"
    shutil.rmtree(folder, ignore_errors=True)
    vlm, tokenizer = model.trunk.vlm, copy.deepcopy(tokenizer)
    if cfg.lora_rank:
        vlm.text_model = vlm.text_model.merge_and_unload()
    model.hand_over(vlm, tokenizer)
    vlm.save_pretrained(folder / "trunk")
    tokenizer.save_pretrained(folder / "tokenizer")         # AutoTokenizer would go by the trunk's
    heads = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()
             if not name.startswith("trunk.vlm.")}
    save_file(heads, folder / "heads.safetensors")
    manifest = {"schema": "smolvla_shared.v1", "step": step,
                "trunk": cfg.trunk, "image_size": model.trunk.image_size, "text_len": cfg.text_len,
                "mode": cfg.mode, "latent_dim": model.target.width, "action_dim": 0,
                "flow": {"width": cfg.head_width, "depth": cfg.head_depth},
                "labeller": labeller, "config": asdict(cfg),
                "dtype": "float32", "torch": torch.__version__}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    publish(folder, Path(cfg.out) / "stage2")


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


# ------------------------------------------------------------ appendix: vla.py --analyze
# Nothing above needs it. A figure is a function -> figure, numbers for its JSON; or None, where
# there is nothing to draw. Its docstring is the title, its name that of the files.
@dataclass
class Findings:
    """What the figures draw: M held-out pairs of all datasets, drawn by (seed, step)."""
    names: tuple                            # datasets of the mix
    pairs: dict                             # lists and arrays of M rows, see look_at
    decoder: object                         # load_decoder's, or None
    history: dict                           # {step: metrics of a validation}
    rng: np.random.Generator

    def __post_init__(self):
        self.codes = self.pairs.get("codes")                            # (M, S), or None
        if self.codes is not None:
            self.likeliest = self.pairs["scores"].argmax(-1)            # (M, S)
            self.K = self.pairs["scores"].shape[-1]


def analyze(cfg: Config) -> int:
    """OUT/analysis: metrics.json, each figure as PNG with its numbers as JSON, and report.html with
    all of it inside."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("run --analyze in one process")
    check_run(cfg, 1)
    check(cfg)
    findings, metrics, step = find(cfg)
    description = describe(metrics, cfg, step)
    if cfg.overfit:
        description += "\n  of held-out episodes, while --overfit learned one batch by heart"
    plt.rcParams["axes.titlesize"] = 8
    folder = Path(cfg.out) / "analysis"
    folder.mkdir(parents=True, exist_ok=True)
    save_numbers(folder / "metrics.json", {"checkpoint": cfg.analyze, "step": step, **metrics})
    style = "body{font:14px sans-serif;margin:2em} td{padding:0 1em} img{max-width:100%}"
    page = ["<!doctype html><meta charset=utf-8><title>latent pretraining</title>",
            f"<style>{style}</style><h1>{html.escape(cfg.analyze)}, step {step}</h1>",
            f"<pre>{html.escape(description)}</pre>"]
    for plot in FIGURES:
        drawn = plot(findings)
        if drawn is None:
            continue
        fig, numbers = drawn
        png = folder / f"{plot.__name__.removeprefix('plot_')}.png"
        fig.savefig(png, dpi=80, bbox_inches="tight")
        plt.close(fig)
        save_numbers(png.with_suffix(".json"), numbers)
        encoded = base64.b64encode(png.read_bytes()).decode()
        page.append(f'<h2>{plot.__doc__}</h2><img src="data:image/png;base64,{encoded}">')
    page.append(f"<h2>Metrics on held-out episodes</h2><table>{rows_of_html(metrics)}</table>")
    (folder / "report.html").write_text("\n".join(page))
    print(f"{description}\nreport: {folder}/report.html")
    return 0


def rows_of_html(m: dict) -> str:
    """A row a metric; the first column is of all datasets, more are of each."""
    prefixes = list(dict.fromkeys(["", *datasets_of(m)]))
    rows = [["", *(prefix.removesuffix("/") for prefix in prefixes)]]
    for name in dict.fromkeys(key.rpartition("/")[2] for key in m):
        values = (m.get(f"{prefix}{name}") for prefix in prefixes)
        rows.append([name, *("" if value is None else f"{value:.3f}" for value in values)])
    return "".join("<tr><td>" + "<td>".join(map(html.escape, row)) for row in rows)


def save_numbers(path: Path, content):
    """numpy's arrays and numbers as lists and numbers."""
    path.write_text(json.dumps(content, indent=1, default=lambda x: np.asarray(x).tolist()) + "\n")


def find(cfg: Config) -> tuple[Findings, dict, int]:
    """Reads the checkpoint and the data. -> findings, metrics as main's evaluations, step"""
    state, device = read_checkpoint(cfg.analyze, "--analyze"), find_device()
    labeller, trunk, _, inputs_of, load = load_stage(cfg, device)
    loaders = evaluation_loaders(cfg, load)
    model = make_model(cfg, trunk, labeller, loaders["many"], device).to(device)
    model.load_state_dict(state["model"])

    print(f"reading and labelling {3 * cfg.eval_batches * 64} pairs ...")
    metrics = Evaluation(model, cfg, loaders, inputs_of)()
    step = state["step"]
    shown = load(cfg, "val", 64, seed=1000 * cfg.seed + step, shuffle_mb=64)
    pairs = look_at(model, cfg, inputs_of, shown)
    decoder = load_decoder(cfg.laq_ckpt, labeller, device)
    history = validations_of(Path(cfg.analyze).parent)
    findings = Findings(shown.names, pairs, decoder, history, np.random.default_rng(step))
    return findings, metrics, step


@torch.no_grad()
def look_at(model: LatentPolicy, cfg: Config, inputs_of, loader) -> dict:
    """Of a loader's first batches: frames uint8 (M, 1 + n, H, H, 3), instruction, dataset, episode,
    step and, where there are codes, codes (M, S) and the model's scores of each (M, S, K)."""
    rows, device = [], next(model.parameters()).device
    model.eval()
    for batch in loader.peek(cfg.eval_batches):
        tensors = data_oxe.to_device(batch, device, loader.image_size)
        inputs = inputs_of(tensors)
        _, prediction = model.predict(inputs)
        scores = model.code_scores(prediction)
        row = {name: batch[name] for name in ("dataset", "episode", "step")}
        row["frames"] = tensors["frames"].cpu().numpy()
        row["instruction"] = np.array(batch["instruction"], object)
        if scores is not None:
            row |= {"codes": inputs["codes"].cpu().numpy(), "scores": scores.cpu().numpy()}
        rows.append(row)
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def load_decoder(laq_ckpt: str, labeller, device):
    """laq.py's decoder.pt2 beside the labeller: fn(frame t uint8 (B, H, H, 3), codes (B, S)) ->
    frame t+k uint8 (B, h, h, 3) of its own size, on the device, wherever these are; None where
    there is none. Exits where it is not that labeller's, or its stored probe does not give the
    stored pictures."""
    if labeller.codebook is None:                           # 'pooled' or '' is no file's name
        return None
    path = Path(laq_ckpt).with_name("decoder.pt2")
    if not path.is_file():
        return None
    program, extra = open_program(path)
    try:
        manifest = json.loads(extra["manifest.json"])
        tensors = safetensors_load(base64.b64decode(extra["tensors.safetensors.b64"]))
        if manifest["schema"] != "decoder.v1":
            fail(f"'{path}': schema is {manifest['schema']!r}, expected 'decoder.v1'")
        names = "probe_frames", "probe_codes", "probe_images"
        frames, codes, images = (tensors[name].to(device) for name in names)
        codebook, size = tensors["codebook"], manifest["image_size"]
    except (KeyError, ValueError, SafetensorError) as error:
        fail(f"'{path}' is damaged or no decoder ({type(error).__name__}: {error})")
    if not torch.equal(codebook, labeller.codebook):
        fail(f"'{path}' decodes the codes of another labeller than '{laq_ckpt}'; export both "
             f"again: laq.py --export-only --resume")
    if device.type != "cpu":
        program = move_to_device_pass(program, str(device))
    module = program.module()
    off = (module(frames, codes).int() - images.int()).abs().max().item()
    if off > 2:                                                         # grey levels: of rounding
        fail(f"'{path}': the probe gives pictures that are {off} grey levels off")
    def decode(frames, codes):
        now = data_oxe.resize_to(frames.to(device), size)
        return module(now, codes[:, :len(codebook)].to(device))         # codes of the first pair
    return decode


def plot_trend(f: Findings):
    """Validations over steps, with 95% intervals, beside their baselines"""
    steps = [*f.history]
    if not steps:
        return None
    curves = {"nearest code": ("accuracy", "accuracy_majority", "accuracy_image_only",
                               "accuracy_instruction_only"),
              "R2 of the target": ("target_r2", "target_r2_image_only",
                                   "target_r2_instruction_only"),
              "R2 of actions": [f"action_r2_{label}_{feature}" for label in ("few", "many")
                                for feature in ("prediction", "readout")]}
    values = {name: [metrics.get(name, math.nan) for metrics in f.history.values()]
              for names in curves.values() for curve in names
              for name in (curve, f"{curve}_low", f"{curve}_high")}
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    for ax, (title, names) in zip(axes, curves.items()):
        for name in names:
            if not np.isfinite(values[name]).any():
                continue
            line, = ax.plot(steps, values[name], marker=".", label=name)
            ax.fill_between(steps, values[f"{name}_low"], values[f"{name}_high"], alpha=0.2,
                            color=line.get_color())
        lowest, highest = ax.get_ylim()
        bottom = min(0, lowest) if title == "nearest code" else max(-0.5, lowest)
        ax.set(title=title, xlabel="step", ylim=(bottom, max(0.1, highest)))
        if ax.lines:
            ax.legend(fontsize=7)
    return fig, {"step": steps, **values}


def plot_pairs(f: Findings, n: int = 8):
    """Held-out pairs, true and predicted codes (green: right), and what each do to frame t"""
    rows = f.rng.permutation(len(f.pairs["dataset"]))[:n]
    frames = torch.from_numpy(f.pairs["frames"][rows])
    now = frames[:, 0]                                                  # (n, H, H, 3)
    columns = {"frame t": now, "frame t+k": frames[:, 1]}
    numbers = {key: f.pairs[key][rows].tolist() for key in ("instruction", "episode", "step")}
    numbers["dataset"] = [f.names[i] for i in f.pairs["dataset"][rows]]
    if f.codes is not None:
        for name, codes in {"true": f.codes[rows], "predicted": f.likeliest[rows]}.items():
            numbers[name] = codes.tolist()
            if f.decoder:
                columns[f"{name} codes,\ndecoded"] = f.decoder(now, torch.from_numpy(codes))
    n, width = len(rows), len(columns)
    fig, axes = plt.subplots(n, 1 + width, squeeze=False, width_ratios=[1.3] + [1] * width,
                             figsize=(1.7 * width + 2.2, 1.7 * n))
    for i, (first, *others) in enumerate(axes):
        describe_pair(first, {name: values[i] for name, values in numbers.items()})
        for ax, (title, images) in zip(others, columns.items()):
            show(ax, images[i].cpu().numpy(), title if i == 0 else "")
    fig.tight_layout()
    return fig, numbers


def describe_pair(ax, pair: dict):
    ax.axis("off")
    words, dataset = (textwrap.fill(pair[name], 24) for name in ("instruction", "dataset"))
    where = f"episode {pair['episode']}, step {pair['step']}"
    ax.text(0, 1, f"{words}\n{dataset}\n{where}", va="top", fontsize=8, linespacing=1.4)
    if "true" not in pair:
        return
    for height, name in ((0.2, "true"), (0.02, "predicted")):
        ax.text(0, height, name, fontsize=8)
        for i, (code, true) in enumerate(zip(pair[name], pair["true"])):
            color = "black" if name == "true" else "green" if code == true else "firebrick"
            ax.text(0.48 + 0.17 * i, height, code, fontsize=8, weight="bold", color=color)


def plot_histograms(f: Findings):
    """How often each code is true and predicted, by position"""
    if f.codes is None:
        return None
    M, S = f.codes.shape
    true, predicted = (histograms(codes, f.K) for codes in (f.codes, f.likeliest))
    fig, axes = plt.subplots(S, 1, figsize=(9, 2 * S), squeeze=False)
    for i, ax in enumerate(axes[:, 0]):
        order = np.argsort(-true[i], kind="stable")
        its_true, its_predicted = true[i][order], predicted[i][order]
        ax.bar(range(f.K), its_true / M, color="lightgrey", label="true")
        ax.step(range(f.K), its_predicted / M, where="mid", label="predicted")
        title = (f"position {i}: {(its_predicted > 0).sum()} codes predicted, "
                 f"{(its_true > 0).sum()} true")
        ax.set(title=title, ylabel="share", xlim=(-1, f.K))
    axes[-1, 0].set_xlabel("codes, the commonest first")
    axes[0, 0].legend(fontsize=7, loc="upper right")
    fig.tight_layout()
    return fig, {"true": true, "predicted": predicted}


def plot_calibration(f: Findings, bins: int = 10):
    """How sure predictions are, and how often they are right, by position"""
    if f.codes is None:
        return None
    what, rows, sure = confidence_of(torch.from_numpy(f.pairs["scores"]).double(), f.codes)
    right = (f.likeliest == f.codes)[rows]                              # (rows, S)
    n, S = right.shape
    fig, axes = plt.subplots(1, S, figsize=(3.4 * S, 3.4), squeeze=False, layout="constrained")
    numbers = {"confidence_is": what, "confidence": [], "accuracy": [], "error": []}
    for i, ax in enumerate(axes[0]):
        order = np.argsort(sure[:, i])
        parts = np.array_split(order, min(bins, n))
        x = np.array([sure[part, i].mean() for part in parts])
        y = np.array([right[part, i].mean() for part in parts])
        error = np.average(np.abs(x - y), weights=[len(part) for part in parts])
        for name, value in (("confidence", x), ("accuracy", y), ("error", error)):
            numbers[name].append(value)
        ax.plot([0, 1], [0, 1], color="lightgrey")
        ax.plot(x, y, marker="o")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", ylabel="right",
               title=f"position {i}: off by {error:.2f} on average")
    fig.supxlabel(what, fontsize=8)
    return fig, numbers


def confidence_of(scores, codes: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """scores (M, S, K), codes (M, S) -> what the confidence is, rows that it may be judged on, it
    (rows, S). Distances say which code is nearer, not how much likelier: one number, found on every
    other row, makes probabilities of them."""
    rows = np.arange(len(scores))
    if (scores >= 0).all():
        return "probability", rows, scores.amax(-1).numpy()
    known = scores[::2].flatten(0, 1)                                   # (rows * S, K)
    known_codes = torch.from_numpy(codes[::2]).flatten()

    def surprise(scale):
        return F.cross_entropy(known / scale, known_codes)
    scale = min(np.geomspace(1e-3, 1e4, 71), key=surprise)
    sure = (scores[1::2] / scale).softmax(-1).amax(-1).numpy()
    return f"softmax of -distance² / {scale:.2g}, fitted on the other pairs", rows[1::2], sure


def plot_confusion(f: Findings):
    """Which code is predicted for which: shares of a true code's pairs, the commonest first"""
    if f.codes is None:
        return None
    S = f.codes.shape[1]
    count = np.zeros((S, f.K, f.K), int)                                # true, predicted
    fig, axes = plt.subplots(1, S, figsize=(4 * S, 3.6), squeeze=False, layout="constrained")
    for i, ax in enumerate(axes[0]):
        np.add.at(count[i], (f.codes[:, i], f.likeliest[:, i]), 1)
        true = count[i].sum(1, keepdims=True)                           # (K, 1)
        order = np.argsort(-true[:, 0], kind="stable")
        share = count[i] / true.clip(1)
        image = ax.imshow(share[order][:, order], vmin=0, vmax=1, cmap="magma_r")
        ax.set(title=f"position {i}", xlabel="predicted", ylabel="true")
    fig.colorbar(image, ax=axes[0].tolist(), shrink=0.7)
    return fig, {"count": count}


FIGURES = plot_trend, plot_pairs, plot_histograms, plot_calibration, plot_confusion


def show(ax, image: np.ndarray, title: str = ""):
    ax.imshow(image)
    ax.set(xticks=[], yticks=[])
    if title:
        ax.set_title(title)


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
