"""Stage 3: a policy with real actions from few labelled episodes, on a trunk with or without latent
pretraining.

    python finetune.py --init runs/vla/stage2 --episodes-per-task 2     # after vla.py
    python finetune.py --init none --trunk tiny --episodes-per-task 2   # the control
    torchrun --nproc_per_node=4 finetune.py --init runs/vla/stage2 --batch-size 256 \\
        --dtype bfloat16
    sbatch sbatch/finetune.sh                                           # Slurm
    python finetune.py --resume runs/finetune/last.pt                   # go on, or --export-only

In: RLDS episodes with actions through data_oxe.py, and a stage2/ folder of vla.py.
Out, in OUT: policy/ (policy.pt2, tokenizer files, manifest.json `policy.v1`, weights.safetensors),
last.pt, metrics.jsonl. policy.pt2 maps (images uint8 (B, H, W, 3), state float32 (B, Ds), ids,
mask int64 (B, L), noise float32 (B, C, A)) to actions float32 (B, C, A) in units of the
mix's first dataset; it runs with torch alone.

The head is a flow-matching model of the action chunk given the trunk's readout token (SmolVLA,
arXiv 2506.01844).
Letters: B batch, L text tokens, P image tokens, C chunk, A action width, Ds state width, W trunk
width, N width of the flow's vector.
"""
import contextlib
import copy
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
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoTokenizer, ByT5Tokenizer, SmolVLMConfig, SmolVLMModel
from transformers import logging as transformers_logging

import data_oxe

transformers_logging.disable_progress_bar()


@dataclass
class Config(data_oxe.DataConfig):
    out: str = "runs/finetune"              # checkpoints, metrics, hand-over files
    overwrite: bool = False                 # start anew in an OUT that holds a run or its files

    # model
    init: str = "runs/vla/stage2"           # stage2/ of vla.py, or 'none': no latent pretraining
    trunk: str = "tiny"                     # 'tiny' (random, 64 px), or a SmolVLM2 name or folder
    text_layers: int = 16                   # of the language model that are kept, as in SmolVLA
    text_len: int = 32                      # instruction tokens; longer ones are cut
    head_width: int = 256                   # of the flow-matching head
    head_depth: int = 2                     # residual blocks of the flow-matching head
    flow_steps: int = 10                    # Euler steps when sampling
    chunk: int = 8                          # C, actions predicted at once
    use_state: bool = True                  # give the head the robot's proprioception
    blind: bool = False                     # control: a black image, also in the exported policy
    normalize: Literal["quantile", "meanstd"] = "quantile"  # 1st to 99th percentile, or deviation

    # optimization
    steps: int = 600                        # optimizer steps; 0 exports the untrained model
    batch_size: int = 32                    # samples a step over all processes
    micro_batch: int = 0                    # samples a forward pass (gradients add up); 0: all
    lr: float | None = None                 # peak learning rate; None: by --size or --trunk
    final_lr: float = 0.1                   # at the end of the cosine, as a share of the peak
    warmup_steps: int | None = None         # of linear warm-up; None: by --size or --trunk
    weight_decay: float = 0.01              # AdamW's, of matrices
    grad_clip: float = 1.0                  # maximum gradient norm
    dtype: Literal["float32", "bfloat16"] = "float32"   # bfloat16: autocast
    compile: bool = False                   # torch.compile the model's forward and backward

    # run
    eval_every: int = 250                   # steps between validations
    eval_batches: int = 16                  # batches of 64 in a validation
    save_every: int = 250                   # steps between checkpoints
    log_every: int = 10                     # steps between lines of metrics.jsonl
    seed: int = 0                           # of weights, data order, noise and augmentation
    wandb: bool = False                     # also log to Weights & Biases
    resume: str = ""                        # checkpoint last.pt to continue from, in its folder
    export_only: bool = False               # with --resume: write the hand-over again and stop


# ------------------------------------------------------------ model and loss
class Policy(nn.Module):
    """Trunk, normalization and action head.

    forward(batch of to_inputs) -> losses by name, of normalized action chunks
    act(batch, noise (B, C, A)) -> actions (B, C, A) in the units of the first dataset
    """

    def __init__(self, cfg: Config, trunk: "Trunk", stats: dict):
        super().__init__()
        self.cfg, self.trunk = cfg, trunk
        action_dim, state_dim = (stats[f"{x}_offset"].shape[1] for x in ("action", "state"))
        self.head = FlowHead(cfg.chunk * action_dim, trunk.width, cfg.head_width, cfg.head_depth,
                             cfg.flow_steps)
        self.from_state = nn.Linear(state_dim, trunk.width)
        for name, value in stats.items():                               # (datasets, A or Ds)
            self.register_buffer(name, value)

    def forward(self, batch: dict) -> dict:
        dataset = batch["dataset"]                                      # (B,)
        offset, scale = self.action_offset[dataset], self.action_scale[dataset]     # (B, A)
        chunk = (batch["actions"] - offset[:, None]) / scale[:, None]   # (B, C, A)
        weight = batch["action_mask"][..., None].expand_as(chunk).float()
        condition = self.condition(batch, dataset)
        return {"flow": self.head.loss(chunk.flatten(1), condition, weight.flatten(1))}

    def act(self, batch: dict, noise):
        first = torch.zeros_like(batch["ids"][:, 0])                    # (B,)
        x = self.head.sample(self.condition(batch, first), noise.flatten(1))
        return x.view_as(noise) * self.action_scale[0] + self.action_offset[0]      # (B, C, A)

    def condition(self, batch: dict, dataset):
        images, state = batch["images"], batch["state"]
        state = (state - self.state_offset[dataset]) / self.state_scale[dataset]
        if self.cfg.blind:
            images = torch.zeros_like(images)
        if not self.cfg.use_state:
            state = torch.zeros_like(state)
        return self.trunk(images, batch["ids"], batch["mask"]) + self.from_state(state)     # (B, W)


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
    """SmolVLM without its language-model output: images, instruction -> one readout vector.

    images uint8 (B, H, W, 3), ids int64 (B, L), mask int64 (B, L) -> (B, W). The vision tower, the
    connector and the language model are called one by one: the usual forward drops all-black
    images as padding.
    """

    def __init__(self, vlm: SmolVLMModel):
        super().__init__()
        self.vlm = vlm
        self.width = vlm.config.text_config.hidden_size
        self.image_size = vlm.config.vision_config.image_size
        readout = 0.02 * torch.randn(self.width)
        self.readout = nn.Parameter(readout)                # an extra last token sees the others

    def forward(self, images, ids, mask):
        B, text_model = images.shape[0], self.vlm.text_model    # len() would fix B in an export
        image = self.vlm.connector(self.see(images))                                # (B, P, W)
        text = text_model.get_input_embeddings()(ids)                               # (B, L, W)
        readout = self.readout.expand(B, 1, -1).to(text.dtype)
        tokens = torch.cat([image, text, readout], 1)                               # (B, T, W)
        seen = torch.cat([mask.new_ones(B, image.shape[1]), mask, mask.new_ones(B, 1)], 1)
        T = tokens.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
        seen = causal & seen.bool()[:, None, None]          # (B, 1, T, T), taken as it is; of a
        # (B, T) mask transformers asks the GPU whether it is all ones
        hidden = text_model(inputs_embeds=tokens, attention_mask=seen, use_cache=False)
        return hidden.last_hidden_state[:, -1].float()                              # (B, W)

    def see(self, images):
        """Features of all patches, (B, patches, vision width). The vision tower's own forward asks
        the GPU whether a mask of ones is one."""
        tower = self.vlm.vision_model
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1                          # (B, 3, H, W)
        side = self.image_size // tower.patch_size
        everywhere = torch.ones(x.shape[0], side, side, dtype=torch.bool, device=x.device)
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
        period = 4e-3 * (4 / 4e-3) ** torch.linspace(0, 1, 32)
        self.register_buffer("frequency", 2 * math.pi / period, persistent=False)
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

    def forward(self, x, t, cond):
        """Velocity (B, N) at x (B, N), t (B,)."""
        angle = t[:, None] * self.frequency                                         # (B, 32)
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))                  # (B, width)
        c = F.silu(self.cond(cond) + time)
        h = self.input(x) + c
        for mod, mlp in zip(self.mod, self.mlp):
            scale, bias, gate = mod(c).chunk(3, 1)
            h = h + gate * mlp(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + bias)
        return self.output(F.layer_norm(h, h.shape[-1:]))

    def loss(self, x, cond, weight):
        """Mean squared velocity error. t ~ Beta(1.5, 1) as in SmolVLA, then shifted towards noise
        (SD3, 2403.03206): in many dimensions x_t gives x away unless t is close to 1."""
        x, cond, weight = (a.repeat(self.draws, 1) for a in (x, cond, weight))
        t = torch.rand(len(x), device=x.device) ** (1 / 1.5) * 0.999 + 0.001        # by inversion
        t = 4 * t / (1 + 3 * t)
        noise = torch.randn_like(x)
        velocity = self(t[:, None] * noise + (1 - t[:, None]) * x, t, cond)
        error = (velocity - (noise - x)).square() * weight
        error = error.sum(1) / weight.sum(1).clamp(min=1)
        return error.mean()                     # of samples: alike however processes divide them

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
            self.cache[text] = self.tokenize(text)
        ids, mask = zip(*(self.cache[text] for text in texts))
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def tokenize(self, text: str) -> tuple[list, list]:
        whole = self.tokenizer(text)["input_ids"]
        if len(whole) > self.length:
            warn(f"--text-len {self.length} cuts the {len(whole)} tokens of '{text}'")
        x = self.tokenizer(text, padding="max_length", max_length=self.length, truncation=True)
        return x["input_ids"], x["attention_mask"]


# ------------------------------------------------------------ evaluation
def to_inputs(batch: dict, tokens, device) -> dict:
    """The loader's batch on the device -> what Policy takes."""
    ids, mask = tokens(batch["instruction"], device)
    same = {k: batch[k] for k in ("state", "actions", "action_mask", "dataset")}
    return {"images": batch["frames"][:, 0], "ids": ids, "mask": mask, **same}


@torch.no_grad()
def evaluate(model: Policy, cfg: Config, loader, tokens, device) -> dict:
    """On held-out episodes: flow loss, and mean absolute error of sampled actions beside that of
    the mean action; errors are of the first dataset, whose units the policy speaks."""
    model.eval()
    losses, errors, errors_of_mean = [], [], []
    for i, batch in enumerate(loader.peek(cfg.eval_batches)):
        torch.manual_seed(i)
        inputs = to_inputs(data_oxe.to_device(batch, device, loader.image_size), tokens, device)
        losses.append(model(inputs)["flow"].item())
        actions = inputs["actions"]                                     # (B, C, A)
        mask = inputs["action_mask"] & (inputs["dataset"] == 0)[:, None]
        noise = torch.randn(actions.shape, generator=torch.Generator().manual_seed(i))
        error = model.act(inputs, noise.to(device)) - actions
        errors.append(error[mask].abs().mean(1).cpu())
        error_of_mean = actions[mask] - actions[mask].mean(0)           # knows the answers' mean
        errors_of_mean.append(error_of_mean.abs().mean(1).cpu())
    model.train()
    return {"loss": np.mean(losses), "action_error": torch.cat(errors).mean().item(),
            "action_error_mean_action": torch.cat(errors_of_mean).mean().item()}


def describe(m: dict) -> str:
    return (f"held-out action error {m['action_error']:.3f} "
            f"(mean action {m['action_error_mean_action']:.3f}) | flow loss {m['loss']:.3f}")


# ------------------------------------------------------------ main
def main(cfg: Config) -> int:
    pretraining = read_stage2(cfg)
    check(cfg, pretraining)
    rank, world, device = setup(cfg)
    local = cfg.batch_size // world                                     # samples a process
    micro = cfg.micro_batch or local                                    # samples a forward pass
    trunk, tokenizer = load_stage2(cfg, pretraining)
    tokens = Tokens(tokenizer, cfg.text_len)
    load = partial(data_oxe.Loader, cfg, image_size=trunk.image_size, horizon_s=0.0,
                   chunk=cfg.chunk)
    loader = load("train", local, seed=cfg.seed, rank=rank, world=world)
    val_loader = load("val", 64, seed=1, shuffle_mb=8)
    widths = {plan.name: len(data_oxe.kinds_of(plan.entry.action)) for plan in loader.plans}
    if min(widths.values()) < max(1, loader.action_dim):
        fail(f"a policy learns actions of one width from all of --mix, but these are {widths} wide")
    stats = statistics(load("train", 64, image_size=0, seed=0, shuffle_mb=8), cfg.normalize)

    torch.manual_seed(cfg.seed)                             # the same head whatever the trunk drew
    model = Policy(cfg, trunk, stats).to(device)
    optimizer = make_optimizer(cfg, model)
    start = load_checkpoint(cfg, model, optimizer, loader, rank, world) if cfg.resume else 0
    if cfg.export_only:
        if rank == 0:
            export(model, cfg, start, tokenizer, loader, pretraining)
        return 0
    train = DDP(model, forward_sync_buffers=False) if world > 1 else model
    train = torch.compile(train) if cfg.compile else train
    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    flops = flops_a_sample(model, cfg, device)
    log = Logger(cfg, rank, world, start, flops, device)
    log.print(f"{size_of(model)}, {flops / 1e9:.2f} GFLOP a sample\n{loader.summary()}")
    stop_flag, batches = StopFlag(cfg, device), loader.to(device)

    for step in range(start, cfg.steps + 1):                            # one more: evaluates, saves
        stop, last = stop_flag(step), step == cfg.steps
        if not stop and (last or step % cfg.eval_every == 0):
            with log.paused():
                metrics = evaluate(model, cfg, val_loader, tokens, device)
            log.validation(step, metrics, describe(metrics))
        if stop or last or (step > start and step % cfg.save_every == 0):
            with log.paused():
                log.check_gradients()
                save_checkpoint(cfg, step, model, optimizer, loader)
        if stop or last:
            break

        start_step(cfg, step, optimizer, rank, world)                   # learning rate, randomness
        with log.waiting():
            batch = next(batches)
        means = {}
        for piece, share, is_last in pieces(to_inputs(batch, tokens, device), micro):
            train.require_backward_grad_sync = is_last                  # DDP: average once a step
            with amp:
                parts = train(piece)
            loss = sum(parts.values())
            (loss * share).backward()
            for name, part in {"loss": loss, **parts}.items():
                means[name] = means.get(name, 0.0) + share * part.detach()
        means["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.step(step, means, batch)

    if rank == 0 and not stop:
        export(model, cfg, cfg.steps, tokenizer, loader, pretraining)
        log.print(f"policy: {cfg.out}/policy")
    return log.close(stop)


# ------------------------------------------------------------ a reader may stop here
def check(cfg: Config, pretraining: dict):
    """Fills in learning rate and warm-up: a large trunk wants a tenth of tiny's rate."""
    tiny = pretraining.get("trunk", cfg.trunk) == "tiny"
    if cfg.lr is None:
        cfg.lr = 1e-3 if tiny else 1e-4
    if cfg.warmup_steps is None:
        cfg.warmup_steps = min(50 if tiny else 1000, cfg.steps // 4)


def flops_a_sample(model: Policy, cfg: Config, device) -> int:
    """Of forward and backward."""
    images, state, ids, mask, actions = example_of(model, cfg, device)
    inputs = {"images": images, "state": state, "ids": ids, "mask": mask, "actions": actions,
              "action_mask": torch.ones(2, cfg.chunk, dtype=torch.bool, device=device),
              "dataset": torch.zeros_like(ids[:, 0])}
    return flops_of(model, lambda: model(inputs)) // 2


def example_of(model: Policy, cfg: Config, device="cpu") -> tuple:
    """Two samples of policy.pt2's inputs: images, state, ids, mask, noise."""
    side, words = model.trunk.image_size, (2, cfg.text_len)
    with torch.device(device):
        return (torch.zeros(2, side, side, 3, dtype=torch.uint8),
                torch.zeros(2, model.state_offset.shape[1]),
                torch.ones(words, dtype=torch.int64), torch.ones(words, dtype=torch.int64),
                torch.zeros(2, cfg.chunk, model.action_offset.shape[1]))


# ------------------------------------------------------------ hand-over files
def read_stage2(cfg: Config) -> dict:
    """The manifest of --init; exits where the folder does not fit. 'none': {}"""
    if cfg.init == "none":
        return {}
    path = Path(cfg.init) / "manifest.json"
    if not path.is_file():
        fail(f"no stage2 folder at --init '{cfg.init}' (manifest.json is missing); vla.py writes "
             f"OUT/stage2, 'none' starts without one")
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
        return load_trunk(cfg.trunk, cfg.text_layers)
    folder = Path(cfg.init)
    trunk, tokenizer = load_trunk(str(folder / "trunk"), manifest["config"]["text_layers"],
                                  str(folder / "tokenizer"))
    try:
        readout = load_file(folder / "heads.safetensors")["trunk.readout"]
    except (OSError, SafetensorError, KeyError) as error:
        fail(f"'{folder}/heads.safetensors' is damaged or missing "
             f"({type(error).__name__}: {error}); write it again: vla.py --resume --export-only")
    if readout.shape != trunk.readout.shape:
        fail(f"--init '{folder}': readout is {tuple(readout.shape)}, trunk is {trunk.width} wide")
    trunk.readout.data.copy_(readout)
    return trunk, tokenizer


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


def load_trunk(name: str, text_layers: int, tokenizer: str = "") -> tuple[Trunk, object]:
    """'tiny' built from a config, or pretrained weights by name or folder; absent weights are an
    error, never random. -> trunk, tokenizer"""
    if name == "tiny":
        return Trunk(SmolVLMModel(tiny_config())), ByT5Tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer or name)
        vlm, info = SmolVLMModel.from_pretrained(name, dtype=torch.float32,
                                                 attn_implementation="sdpa",
                                                 output_loading_info=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        fail(f"no pretrained SmolVLM2 at '{name}' ({str(error).splitlines()[0]}); give a Hugging "
             f"Face name that this machine can reach, a folder with config, weights and tokenizer, "
             f"or 'tiny'")
    missing = sorted(info["missing_keys"])
    if missing:
        fail(f"weights of '{name}' lack {len(missing)} tensors, the first is {missing[0]}")
    vlm.text_model.layers = vlm.text_model.layers[:text_layers]
    vlm.config.text_config.num_hidden_layers = len(vlm.text_model.layers)
    return Trunk(vlm), tokenizer


def publish(unfinished: Path, final: Path):
    """Puts a finished hand-over folder in place; an older one is whole until then."""
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
def export(model: Policy, cfg: Config, step: int, tokenizer, loader, pretraining: dict):
    """OUT/policy: the policy as a torch.export program (float32, CPU), tokenizer, manifest,
    weights."""
    folder = Path(cfg.out) / ".policy.partial"
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    policy = copy.deepcopy(model).float().cpu().eval()
    weights = {k: v.contiguous() for k, v in policy.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    batch = torch.export.Dim("B", min=1, max=4096)
    program = torch.export.export(Program(policy), example_of(policy, cfg),
                                  dynamic_shapes=({0: batch},) * 5)
    program.example_inputs = None                                       # would be stored as pickle
    torch.export.save(program, folder / "policy.pt2")
    manifest = {"schema": "policy.v1", "image_size": policy.trunk.image_size,
                "text_len": cfg.text_len, "chunk": cfg.chunk, "action_dim": loader.action_dim,
                "state_dim": loader.state_dim, "units_of": loader.names[0],
                "datasets": loader.source_size, "episodes": loader.counts, "blind": cfg.blind,
                "pretraining": pretraining, "step": step, "config": asdict(cfg),
                "torch": torch.__version__}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    publish(folder, Path(cfg.out) / "policy")


# ------------------------------------------------------------ plumbing: the same text in each stage
def fail(message: str):
    """A user's error: one line, exit code 1, no traceback."""
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {message}")


def warn(message: str):
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {message}", file=sys.stderr)


def check_run(cfg, world: int):
    """Exits where settings that all stages share do not go together; sets OUT of a resumed run."""
    for name in ("batch_size", "eval_every", "eval_batches", "save_every", "log_every"):
        if getattr(cfg, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be at least 1")
    local = cfg.batch_size // world                                     # samples a process
    if cfg.batch_size % world:
        fail(f"--batch-size {cfg.batch_size} is not divisible by the {world} processes; "
             f"{local * world or world} would be")
    if cfg.micro_batch and local % cfg.micro_batch:
        fail(f"--micro-batch {cfg.micro_batch} does not divide the {local} samples a process")
    if not 0 <= cfg.final_lr <= 1:
        fail(f"--final-lr {cfg.final_lr} is a share of the peak learning rate, from 0 to 1")
    if cfg.export_only and not cfg.resume:
        fail("--export-only needs --resume CHECKPOINT")
    if cfg.resume:
        home = Path(cfg.resume).parent
        if not Path(cfg.resume).is_file():
            fail(f"no checkpoint at --resume '{cfg.resume}'")
        if cfg.out != type(cfg).out and Path(cfg.out).resolve() != home.resolve():
            fail(f"--resume '{cfg.resume}' goes on in its own folder, but --out is '{cfg.out}'; "
                 f"leave --out away, or copy the checkpoint there")
        cfg.out = str(home)
    elif (Path(cfg.out) / "last.pt").exists() and not cfg.overwrite:
        fail(f"--out '{cfg.out}' holds a run; continue it with --resume {cfg.out}/last.pt, give "
             f"another --out, or --overwrite it")


def setup(cfg) -> tuple[int, int, torch.device]:
    """Joins torchrun's processes, if this is one of them. -> rank, number of processes, device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_run(cfg, world)
    device = find_device()
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
    which it holds. One that fails does not wait for the others.
    """
    try:
        code = main(cfg)
    except BaseException as error:
        if not dist.is_initialized():
            raise
        code = error.code if isinstance(error, SystemExit) else traceback.format_exc()
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
    return lowest + 0.5 * (cfg.lr - lowest) * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(cfg, model: nn.Module) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim >= 2]
    others = [p for p in params if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def start_step(cfg, step: int, optimizer, rank: int, world: int):
    """Learning rate and randomness: functions of (seed, step, rank), so a resumed run is equal."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(cfg, step)
    torch.manual_seed((cfg.seed * 1_000_003 + step) * world + rank)


def pieces(batch: dict, size: int):
    """Micro-batches of a dict of tensors: (piece, its share of the samples, is it the last)."""
    n = len(next(iter(batch.values())))
    for i in range(0, n, size):
        piece = {k: v[i:i + size] for k, v in batch.items()}
        yield piece, size / n, i + size >= n


def mean_of_ranks(x: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def save_checkpoint(cfg, step: int, model: nn.Module, optimizer, loader):
    """OUT/last.pt, written under another name first; all ranks call it: each has its own place in
    the data. Randomness is a function of (seed, step), so no state of it is kept."""
    data = [loader.state_dict()]
    if dist.is_initialized():
        data = data * dist.get_world_size()
        dist.all_gather_object(data, loader.state_dict())
        if dist.get_rank() > 0:
            return
    state = {"step": step, "config": asdict(cfg), "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), "data": data}
    unfinished = Path(cfg.out) / ".last.pt.partial"
    torch.save(state, unfinished)
    unfinished.rename(Path(cfg.out) / "last.pt")


# what may differ between a run and its continuation
FREE = {"out", "overwrite", "data", "threads", "max_bad", "resume", "export_only", "wandb",
        "eval_every", "save_every", "log_every", "compile"}


def read_checkpoint(path: str, option: str) -> dict:
    """What save_checkpoint wrote; exits where the file is something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["config"], state["step"], state["model"], state["optimizer"], state["data"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError,
            pickle.UnpicklingError) as error:
        fail(f"{option} '{path}' is not a checkpoint of this script ({type(error).__name__}); "
             f"give OUT/last.pt")
    return state


def load_checkpoint(cfg, model: nn.Module, optimizer, loader, rank: int, world: int) -> int:
    """Restores all of save_checkpoint. Exits, naming the fields, where the run would not be the
    same. -> step"""
    state = read_checkpoint(cfg.resume, "--resume")
    stored = state["config"]
    differ = [f"{f.name} was {stored.get(f.name)!r}, is {getattr(cfg, f.name)!r}"
              for f in fields(cfg)
              if f.name not in FREE and stored.get(f.name) != getattr(cfg, f.name)]
    if differ:
        fail(f"--resume '{cfg.resume}' is of another run: {'; '.join(differ)}")
    model.load_state_dict(state["model"])
    if cfg.export_only:
        return state["step"]
    if len(state["data"]) != world:
        fail(f"--resume '{cfg.resume}' was saved by {len(state['data'])} processes, these are "
             f"{world}: start as many")
    optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["data"][rank])
    return state["step"]


class Logger:
    """metrics.jsonl, a bar and, with --wandb, Weights & Biases; silent but on rank 0.

    Speeds are of training steps alone: what runs under `paused`, such as a validation, does not
    count. Gradient norms are looked at when a line is written or a checkpoint is due, so that no
    other step waits for the GPU.
    """

    def __init__(self, cfg, rank: int, world: int, start: int, flops: int, device: torch.device):
        """flops: of forward and backward of one sample."""
        self.cfg, self.on, self.wandb = cfg, rank == 0, None
        self.device = device
        self.flops = flops * cfg.batch_size / world                     # a step of one process
        self.peak = matmul_rate(device, cfg.dtype)
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0             # since the last line
        self.norms = []                                                 # since they were looked at
        self.path = Path(cfg.out) / "metrics.jsonl"
        if self.on:
            self.open(start)
        self.began = time.perf_counter()

    def open(self, start: int):
        """A resumed run keeps the lines before its step; a half-written one is left out."""
        if not self.cfg.resume:
            (self.path.parent / "last.pt").unlink(missing_ok=True)      # of a run to --overwrite
        kept = []
        for line in self.path.read_text().splitlines() if start and self.path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] < start:
                    kept.append(line + "\n")
        self.path.write_text("".join(kept))
        if self.cfg.wandb:
            import wandb
            name = self.path.with_name("wandb_id")                      # the same run on resuming
            if not self.cfg.resume or not name.exists():
                name.write_text(secrets.token_hex(4))
            self.wandb = wandb.init(project="nanolapa", name=self.path.parent.name,
                                    dir=self.cfg.out, config=asdict(self.cfg),
                                    id=name.read_text(), resume="allow")
        self.bar = tqdm(total=self.cfg.steps, initial=start, desc=self.path.parent.name,
                        unit="step", mininterval=2)

    @contextlib.contextmanager
    def waiting(self):
        """The time is spent waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self):
        """The time is not spent on training."""
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
            self.write(step, {**values, "lr": lr_at(self.cfg, step), **self.speed()})
        if due:
            self.steps, self.seconds, self.waited = 0, 0.0, 0.0

    def speed(self) -> dict:
        """Samples a second of all processes, share of the time spent waiting for data, and MFU:
        the model's FLOP/s over those of this device's matrix products."""
        return {"samples_per_s": self.steps * self.cfg.batch_size / self.seconds,
                "data_wait": self.waited / self.seconds,
                "mfu": self.steps * self.flops / self.seconds / self.peak}

    def check_gradients(self):
        """Exits, naming step and batch, where a gradient norm was not finite."""
        for step, norm, episodes in self.norms:
            if not math.isfinite(norm):
                fail(f"gradient norm {float(norm)} at step {step}, episodes {episodes.tolist()}; "
                     f"the last good checkpoint is '{self.cfg.out}/last.pt'")
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


if __name__ == "__main__":
    run(main, tyro.cli(Config, description=__doc__))
