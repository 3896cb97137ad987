"""Stage 1: latent action quantization. Learns S discrete tokens for what happens between frame t and frame t+k.

    python laq.py --data data --mix metaworld_corner4                          # CPU or one GPU
    torchrun --nproc_per_node=4 laq.py --batch-size 256 --dtype bfloat16       # four GPUs
    sbatch sbatch/laq.sh                                                       # Slurm
    python laq.py --resume runs/laq/last.pt                                    # continue; --export-only: just export

In: RLDS episodes through data_oxe.py; no action is used for training, only to measure.
Out, in OUT: laq.pt2 (frozen labeller for vla.py), last.pt (to resume), metrics.jsonl, pairs.png.

Reconstruction alone learns to copy frame t while the codes carry nothing: PSNR rises, shuffling the codes over the
batch changes nothing. Four things turn that around: the encoder sees the difference of the frames, moving pixels
weigh more, dead codes are re-seeded from encoder outputs, and the decoder also predicts optical flow. Look at
`psnr_shuffled` and `probe_r2` beside their baselines; PSNR itself says little.

Idea: LAPA (arXiv 2410.11758), Genie (2402.15391). Letters: B batch, S latent tokens, K codes, D code width, H W image.
"""
import base64
import copy
import json
import math
import os
import pickle
import signal
import sys
import time
import warnings
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
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data_oxe


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
    image_size: int = 64
    """Pixels a side, a multiple of 16."""
    width: int = 32
    """Channels of the first convolution; deeper ones have 2, 3 and 4 times as many."""
    tokens: int = 4
    """S, latent tokens a pair."""
    codes: int = 16
    """K, codes a token; each token has a codebook of its own."""
    code_dim: int = 32
    """D, width of a code."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    motion_weight: float = 10.0
    """How much more a fully changed pixel weighs than a still one."""
    flow_weight: float = 1.0
    """Weight of predicting optical flow (DIS, OpenCV) in units of a 16x16 grid; 0: off."""
    shift: int = 4
    """Random shift of training images in pixels; hurts a policy where camera and robot are bolted down."""
    reseed_every: int = 20
    """Steps between replacing codes used less than a tenth of their share, in the first 80% of the steps."""
    steps: int = 1500
    """Optimizer steps; 0 exports the untrained model, as a control."""
    batch_size: int = 32
    """Samples a step over all processes."""
    micro_batch: int = 0
    """Samples a forward pass on one process, for gradient accumulation; 0: all at once."""
    lr: float = 1e-3
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
    eval_every: int = 250
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


# ---------------------------------------------------------------------------------------------- model
def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.SiLU())


class Decoder(nn.Module):
    """Frame t and the latents -> frame t+k and optical flow. A small U-Net; the latents enter at its coarsest scale."""

    def __init__(self, cfg: Config):
        super().__init__()
        w, side, latent = cfg.width, cfg.image_size // 16, cfg.tokens * cfg.code_dim
        c1, c2, c3 = w, 2 * w, 3 * w
        self.down1, self.down2, self.down3 = conv(3, c1, 2), conv(c1, c2, 2), conv(c2, c3, 2)
        self.film, self.grid = nn.Linear(latent, 2 * c3), nn.Linear(latent, c2 * (2 * side) ** 2)
        self.up3 = nn.Sequential(conv(c3 + c2, c3), nn.Conv2d(c3, c2, 1), nn.Upsample(scale_factor=2))
        self.up2 = nn.Sequential(conv(c2, c2), nn.Conv2d(c2, c1, 1), nn.Upsample(scale_factor=2))
        self.up1 = conv(c1, c1)
        self.to_flow, self.to_pixels = nn.Conv2d(c2, 2, 3, 1, 1), nn.Conv2d(c1, 12, 3, 1, 1)
        nn.init.zeros_(self.to_pixels.weight)                                   # starts as a copy of frame t

    def forward(self, frame, latent):
        """frame float (B, 3, H, W) in -0.5..0.5, latent (B, S, D) -> frame t+k, flow (B, 2, H/4, W/4)."""
        f1 = self.down1(frame)                                                  # (B, c1, H/2, W/2)
        f2 = self.down2(f1)                                                     # (B, c2, H/4, W/4)
        f3 = self.down3(f2)                                                     # (B, c3, H/8, W/8)
        z = latent.flatten(1)                                                   # (B, S*D)
        grid = self.grid(z).unflatten(1, (-1, *f3.shape[2:]))                   # (B, c2, H/8, W/8)
        scale, bias = self.film(z)[..., None, None].chunk(2, 1)                 # (B, c3, 1, 1) each
        x = self.up3(torch.cat([f3 * (1 + scale) + bias, grid], 1)) + f2        # (B, c2, H/4, W/4)
        flow = self.to_flow(x)                                                  # (B, 2, H/4, W/4)
        x = self.up1(self.up2(x) + f1)                                          # (B, c1, H/2, W/2)
        return frame + F.pixel_shuffle(self.to_pixels(x), 2), flow              # (B, 3, H, W)


class LAQ(nn.Module):
    """Encoder of a frame pair, quantizer with one codebook a token, decoder conditioned on frame t.

    encode(frames uint8 (B, 2, H, W, 3)) -> (codes int64 (B, S), vectors float32 (B, S, D))
    forward(frames, flow (B, 2, 16, 16)) -> loss, parts, codes, z: what a training step needs
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, w, side = cfg, cfg.width, cfg.image_size // 16
        S, K, D = cfg.tokens, cfg.codes, cfg.code_dim
        c1, c2, c3, c4 = w, 2 * w, 3 * w, 4 * w
        self.encoder = nn.Sequential(conv(6, c1, 2), conv(c1, c2, 2), conv(c2, c3, 2), conv(c3, c4, 2), conv(c4, c4),
                                     nn.Flatten(), nn.Linear(c4 * side * side, S * D))
        self.codebook = nn.Parameter(torch.randn(S, K, D))
        self.register_buffer("usage", torch.full((S, K), 1.0 / K))              # running share of each code
        self.decoder = Decoder(cfg)

    def features(self, frames):
        """-> unquantized z (B, S, D), each token normalized to unit variance."""
        a, b = self.to_float(frames).unbind(1)                                  # (B, 3, H, W) each
        z = self.encoder(torch.cat([a, 3 * (b - a)], 1))                        # (B, S*D)
        return F.layer_norm(z.float().view(-1, self.cfg.tokens, self.cfg.code_dim), (self.cfg.code_dim,))

    def quantize(self, z):
        """Nearest code of each token's codebook: codes (B, S), vectors (B, S, D)."""
        d = (z[:, :, None] - self.codebook).square().sum(-1)                    # (B, S, K)
        codes = d.argmin(-1)                                                    # (B, S)
        return codes, self.lookup(codes)

    def lookup(self, codes):
        return self.codebook[torch.arange(self.cfg.tokens, device=codes.device), codes]

    def encode(self, frames):
        return self.quantize(self.features(frames))

    @staticmethod
    def to_float(frames):
        """uint8 (B, 2, H, W, 3) -> float (B, 2, 3, H, W) in -0.5..0.5."""
        return frames.permute(0, 1, 4, 2, 3).float() / 255 - 0.5

    def forward(self, frames, flow):
        cfg = self.cfg
        z = self.features(frames)
        codes, q = self.quantize(z)
        a, b = self.to_float(frames).unbind(1)
        pred, pred_flow = self.decoder(a, z + (q - z).detach())                  # straight-through
        moved = F.avg_pool2d((b - a).abs().amax(1, keepdim=True), 5, 1, 2)      # (B, 1, H, W) in 0..1
        weight = 1 + cfg.motion_weight * (4 * moved).clamp(max=1)
        weight = weight / weight.mean((1, 2, 3), keepdim=True)                  # samples count alike, in any batch
        parts = {"pixel": (weight * (pred - b).abs()).mean(),
                 "codebook": F.mse_loss(q, z.detach()), "commit": F.mse_loss(z, q.detach())}
        loss = 10 * parts["pixel"] + parts["codebook"] + cfg.beta * parts["commit"]
        parts["flow"] = (F.adaptive_avg_pool2d(pred_flow, flow.shape[-2:]) - flow).abs().mean()
        loss = loss + cfg.flow_weight * parts["flow"]
        return loss, {k: v.detach() for k, v in parts.items()}, codes, z.detach()

    @torch.no_grad()
    def track_usage(self, codes):
        """Running share of each code, over all processes."""
        counts = F.one_hot(codes, self.cfg.codes).float().sum(0)                # (S, K)
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.usage.lerp_(counts / counts.sum(1, keepdim=True), 0.05)

    @torch.no_grad()
    def reseed(self, z, everything: bool = False):
        """Moves codes used less than a tenth of their share onto encoder outputs z (B, S, D), rank 0's on every rank."""
        dead = self.usage < 0.1 / self.cfg.codes                                # (S, K)
        if everything:
            dead = torch.ones_like(dead)
        order = torch.randperm(len(z)).tolist()                                 # no output twice for one token
        for s, k in dead.nonzero().tolist():
            self.codebook[s, k] = z[order[k % len(z)], s]
            self.usage[s, k] = 1.0 / self.cfg.codes
        if dist.is_initialized():
            dist.broadcast(self.codebook.data, 0)
        return int(dead.sum())


def optical_flow(frames: np.ndarray, grid: int = 16) -> torch.Tensor:
    """DIS optical flow (Kroeger et al. 2016) of uint8 pairs (B, 2, H, W, 3), in grid cells: float32 (B, 2, grid, grid)."""
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    out = []
    for a, b in frames:
        flow = dis.calc(cv2.cvtColor(a, cv2.COLOR_RGB2GRAY), cv2.cvtColor(b, cv2.COLOR_RGB2GRAY), None)
        out.append(cv2.resize(flow, (grid, grid), interpolation=cv2.INTER_AREA))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2) * (grid / frames.shape[2])


def random_shift(frames: torch.Tensor, pixels: int) -> torch.Tensor:
    """Shifts each sample of uint8 (B, ..., H, W, 3) by up to `pixels`, edges repeated (DrQ, arXiv 2004.13649)."""
    if not pixels:
        return frames
    B, H, W = frames.shape[0], frames.shape[-3], frames.shape[-2]
    dy, dx = torch.randint(-pixels, pixels + 1, (2, B, 1), device=frames.device)
    rows = (torch.arange(H, device=frames.device) + dy).clamp(0, H - 1)         # (B, H)
    cols = (torch.arange(W, device=frames.device) + dx).clamp(0, W - 1)         # (B, W)
    flat = frames.reshape(B, -1, H, W, 3)
    b = torch.arange(B, device=frames.device)[:, None, None]
    return flat.transpose(1, 2).transpose(2, 3)[b, rows[:, :, None], cols[:, None]].permute(0, 3, 1, 2, 4).reshape(frames.shape)


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
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


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
def ridge_r2(x, y, x_val, y_val, alpha: float = 1e-2) -> np.ndarray:
    """Held-out R2 of a ridge probe for each column of y; x and y are standardized by the fitting data."""
    x, y, x_val, y_val = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, y, x_val, y_val))
    m, s = x.mean(0), x.std(0) + 1e-8
    x, x_val, mean = (x - m) / s, (x_val - m) / s, y.mean(0)
    w = np.linalg.solve(x.T @ x + alpha * len(x) * np.eye(x.shape[1]), x.T @ (y - mean))
    return 1 - ((y_val - mean - x_val @ w) ** 2).sum(0) / ((y_val - y_val.mean(0)) ** 2).sum(0).clip(1e-12)


@torch.no_grad()
def evaluate(model: LAQ, cfg: Config, val_loader, probe_loader, device) -> dict:
    """Metrics on held-out episodes. The probe is fitted on latents of training episodes, tested on held-out ones."""
    model.eval()

    def collect(loader):
        out = {"vectors": [], "diff": [], "action": [], "codes": []}
        err = np.zeros(3)
        for batch in loader.first(cfg.eval_batches):
            frames = data_oxe.to_device(batch, device, cfg.image_size)["frames"]
            codes, q = model.encode(frames)
            a, b = model.to_float(frames).unbind(1)
            shuffled = q.roll(1, 0)
            err += [F.mse_loss(x, b).item() for x in (model.decoder(a, q)[0], model.decoder(a, shuffled)[0], a)]
            for key, value in dict(vectors=q.flatten(1), codes=codes, diff=(b - a).mean((2, 3))).items():
                out[key].append(value.cpu().numpy())
            out["action"].append(batch["action_sum"][:, loader.motion_dims])
        return {k: np.concatenate(v) for k, v in out.items()}, -10 * np.log10(err / cfg.eval_batches)

    fit, _ = collect(probe_loader)
    val, (psnr, shuffled, copy) = collect(val_loader)
    share = np.stack([np.bincount(c, minlength=cfg.codes) for c in val["codes"].T]) / len(val["codes"])     # (S, K)
    entropy = -(share * np.log(share.clip(1e-12))).sum(1)                                                   # (S,)
    r2 = ridge_r2(fit["vectors"], fit["action"], val["vectors"], val["action"])
    base = ridge_r2(fit["diff"], fit["action"], val["diff"], val["action"])
    model.train()
    return {"psnr": psnr, "psnr_shuffled": shuffled, "psnr_copy": copy, "codes_used": (share > 0).mean(),
            "perplexity": np.exp(entropy).mean(), "probe_r2": r2.mean(), "probe_r2_pixel_difference": base.mean(),
            **{f"probe_r2_{i}": v for i, v in enumerate(r2)}}


def describe(m: dict, cfg: Config) -> str:
    return (f"psnr {m['psnr']:.2f} dB (copy frame t {m['psnr_copy']:.2f}, codes shuffled {m['psnr_shuffled']:.2f}) | "
            f"codes used {m['codes_used']:.0%}, perplexity {m['perplexity']:.2f} of {cfg.codes} | "
            f"probe R2 {m['probe_r2']:.2f} (mean pixel difference {m['probe_r2_pixel_difference']:.2f})")


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
    tensors = base64.b64encode(safetensors_bytes({"codebook": labeller.model.codebook.detach().clone(),
                                                  "probe_frames": probe, "probe_codes": codes})).decode()
    program.example_inputs = None                                               # would be stored as a pickle
    partial = Path(cfg.out) / ".partial.laq.pt2"
    warnings.filterwarnings("ignore", "No complete tensor found")               # of views; both are saved whole
    torch.export.save(program, partial, extra_files={"manifest.json": json.dumps(manifest), "tensors.safetensors.b64": tensors})
    partial.rename(Path(cfg.out) / "laq.pt2")


# ---------------------------------------------------------------------------------------------- main
def main(cfg: Config):
    rank, world, device = setup(cfg)
    if cfg.image_size % 16 or cfg.width % 8:
        fail(f"--image-size {cfg.image_size} must be a multiple of 16 and --width {cfg.width} of 8")
    local, micro = cfg.batch_size // world, cfg.micro_batch or cfg.batch_size // world
    options = {k: getattr(cfg, k) for k in ("data", "mix", "weights", "val_fraction", "holdout", "pairs_per_episode", "resize",
                                            "max_bad")}
    common = dict(**options, image_size=cfg.image_size, horizon_s=cfg.horizon_s, min_motion=cfg.min_motion,
                  need_instruction=False)
    loader = data_oxe.Loader(split="train", batch_size=local, seed=cfg.seed, shuffle_mb=cfg.shuffle_mb, rank=rank,
                             world=world, **common)
    val_loader = data_oxe.Loader(split="val", batch_size=64, seed=1, shuffle_mb=8, **common)
    probe_loader = data_oxe.Loader(split="train", batch_size=64, seed=2, shuffle_mb=8, **common)
    model = LAQ(cfg).to(device, memory_format=torch.channels_last)             # a third faster than NCHW on a CPU
    optimizer = make_optimizer(cfg, model, device)
    start = load_checkpoint(cfg, model, optimizer, loader) if cfg.resume else 0
    if cfg.export_only:
        return export(model, cfg, start, val_loader) if rank == 0 else None
    if start == 0:                                                              # codes start on encoder outputs
        step_seed(cfg, 0, 0, 1)
        first = data_oxe.to_device(next(probe_loader.first(1)), device, cfg.image_size)["frames"]
        with torch.no_grad():
            model.reseed(model.features(first), everything=True)
    train = DDP(model, broadcast_buffers=False) if world > 1 else model
    train = torch.compile(train) if cfg.compile else train
    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    log, stop, batches, clock = Logger(cfg, rank, start), StopFlag(), loader.to(device), time.time()
    log.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, episodes {loader.counts}")

    for step in range(start, cfg.steps + 1):                                    # one more round, to evaluate and save
        stopping, last = stop(device), step == cfg.steps
        if not stopping and (last or step % cfg.eval_every == 0):
            metrics = evaluate(model, cfg, val_loader, probe_loader, device)
            log.print(f"step {step}: {describe(metrics, cfg)}")
            log.log(step, {}, **{f"val_{k}": v for k, v in metrics.items()})
        if stopping or last or (step > start and step % cfg.save_every == 0):
            save_checkpoint(cfg, step, model, optimizer, loader)
        if stopping or last:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr_at(cfg, step)
        step_seed(cfg, step, rank, world)
        batch = next(batches)
        frames = random_shift(batch["frames"], cfg.shift)
        flow = (optical_flow(frames.cpu().numpy()) if cfg.flow_weight else torch.zeros(local, 2, 1, 1)).to(device)
        pieces = [slice(i, i + micro) for i in range(0, local, micro)]
        total, codes, z = 0.0, [], []
        for piece in pieces:
            if world > 1:
                train.require_backward_grad_sync = piece is pieces[-1]
            with amp:
                loss, parts, *outputs = train(frames[piece], flow[piece])
            (loss / len(pieces)).backward()
            total += loss.detach() / len(pieces)
            codes, z = [*codes, outputs[0]], [*z, outputs[1]]
        model.track_usage(torch.cat(codes))
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if not torch.isfinite(norm):
            fail(f"gradient norm {norm.item()} at step {step}, episodes {batch['episode'].tolist()}; "
                 f"the last good checkpoint is '{cfg.out}/last.pt'")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % cfg.reseed_every == 0 and step < 0.8 * cfg.steps:
            model.reseed(torch.cat(z))
        if log.on:
            log.bar.update()
        if step % cfg.log_every == 0:
            if world > 1:
                dist.all_reduce(total)
                total /= world
            rate = cfg.batch_size * cfg.log_every / (time.time() - clock)
            clock = time.time()
            log.log(step, {"loss": total, **parts}, loss=total, grad_norm=norm, lr=lr_at(cfg, step), samples_per_s=rate,
                    **parts)
    if rank == 0 and not stop.signal:
        export(model, cfg, cfg.steps, val_loader)
        picture(model.eval(), cfg, val_loader, device)
        log.print(f"labeller {cfg.out}/laq.pt2, pictures {cfg.out}/pairs.png")
    log.close()
    if world > 1:
        dist.barrier()                                      # gloo's threads must be done: leaving can deadlock on the GIL
        dist.destroy_process_group()
    if stop.signal:
        print(f"stopped; continue with --resume {cfg.out}/last.pt", file=sys.stderr)
        raise SystemExit(128 + stop.signal)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
