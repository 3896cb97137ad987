"""Stage 2: latent pretraining. A SmolVLM2 trunk learns to predict the latent action from frame t and the instruction.

    python vla.py --laq-ckpt runs/laq/laq.pt2 --trunk tiny                               # CPU, nothing downloaded
    torchrun --nproc_per_node=4 vla.py --laq-ckpt runs/laq/laq.pt2 \\
        --trunk HuggingFaceTB/SmolVLM2-500M-Video-Instruct --dtype bfloat16 --batch-size 256 --lr 1e-4
    sbatch sbatch/vla.sh                                                                 # Slurm
    python vla.py --resume runs/vla/last.pt ...                                          # --export-only: just stage2/

In: RLDS episodes through data_oxe.py (no actions), and laq.pt2, which labels every batch as it comes.
Out, in OUT: stage2/ (trunk/ and tokenizer/ as transformers saves them, heads.safetensors, manifest.json
`smolvla_shared.v1`), last.pt, metrics.jsonl.

The head is a flow-matching model of the latent vectors given one readout token of the trunk (SmolVLA,
arXiv 2506.01844; LAPA, 2410.11758). `accuracy` is that of the codes nearest to the expected latent, on held-out episodes,
beside always answering with the most frequent code.

Letters: B batch, L text tokens, P image tokens, S latent tokens, K codes, D code width, W trunk width, N flow width.
"""
import base64
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors.torch import load as safetensors_load, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm
from transformers import AutoTokenizer, ByT5Tokenizer, SmolVLMConfig, SmolVLMModel, logging as transformers_logging

import data_oxe

transformers_logging.disable_progress_bar()


@dataclass
class Config:
    laq_ckpt: str = "runs/laq/laq.pt2"
    """Labeller that laq.py exported."""
    out: str = "runs/vla"
    """Folder for checkpoints, metrics, pictures and hand-over files."""
    data: str = "data"
    """Folder or gs:// bucket with NAME/VERSION datasets."""
    mix: str = "metaworld_corner4"
    """Datasets or mixes with weights, 'a:0.3,b:0.7' or 'oxe29'; `python data_oxe.py list` shows the names."""
    val_fraction: float = 0.1
    """Share of episodes held out for validation."""
    weights: str = "given"
    """Shares of the mix: as 'given' in it, 'equal', or 'proportionate' to the datasets' frames."""
    holdout: str = ""
    """'KEY~REGEX': validate on the episodes whose feature KEY (or 'instruction') matches, instead of --val-fraction."""
    pairs_per_episode: int = 8
    """Samples drawn from an episode each time it is read; 0: all."""
    shuffle_mb: float = 256.0
    """Encoded pictures held for shuffling; more of them mix more episodes."""
    resize: str = "cpu"
    """Where pictures are resized: 'cpu', or 'gpu' where the CPU cannot keep up."""
    max_bad: float = 0.001
    """Share of bad episodes (unreadable, too short, not finite ...) to skip with a warning before stopping."""
    trunk: str = "tiny"
    """'tiny' (random, byte tokenizer, 64 px), or a SmolVLM2 name or folder whose weights are loaded."""
    text_layers: int = 16
    """Layers of the language model that are kept, as in SmolVLA; 'tiny' has fewer."""
    text_len: int = 32
    """Instruction tokens; shorter ones are padded, longer ones cut."""
    head_width: int = 256
    """Width of the flow-matching head."""
    head_depth: int = 2
    """Residual blocks of the flow-matching head."""
    flow_samples: int = 8
    """Noise levels a sample: the head is cheap beside the trunk, so each readout trains it several times."""
    shift: int = 0
    """Random shift of training images in pixels; hurts a policy where camera and robot are bolted down."""
    steps: int = 1000
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
class Trunk(nn.Module):
    """SmolVLM without its language-model output: images, instruction -> one readout vector.

    images uint8 (B, H, W, 3), ids int64 (B, L), mask int64 (B, L) -> (B, W). The vision tower, the connector and the
    language model are called one by one: the usual forward drops all-black images as padding.
    """

    def __init__(self, vlm: SmolVLMModel):
        super().__init__()
        self.vlm = vlm
        self.width, self.image_size = vlm.config.text_config.hidden_size, vlm.config.vision_config.image_size
        self.readout = nn.Parameter(0.02 * torch.randn(self.width))     # an extra last token that sees all others

    def forward(self, images, ids, mask):
        B = images.shape[0]                                             # len() would fix the batch size in an export
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1                                  # (B, 3, H, W)
        image = self.vlm.connector(self.vlm.vision_model(pixel_values=x).last_hidden_state)  # (B, P, W)
        text = self.vlm.text_model.get_input_embeddings()(ids)                              # (B, L, W)
        tokens = torch.cat([image, text, self.readout.expand(B, 1, -1).to(text.dtype)], 1)
        seen = torch.cat([mask.new_ones(B, image.shape[1]), mask, mask.new_ones(B, 1)], 1)
        h = self.vlm.text_model(inputs_embeds=tokens, attention_mask=seen, use_cache=False).last_hidden_state
        return h[:, -1].float()                                                             # (B, W)


class FlowHead(nn.Module):
    """Flow matching (Lipman et al., 2210.02747) of a flat vector given a condition, with SmolVLA's conventions:
    x_t = t noise + (1 - t) x, the network predicts noise - x, sampling goes from t = 1 to 0 in Euler steps.

    loss(x (B, N), cond (B, W), weight (B, N)) -> scalar; sample(cond, noise (B, N), steps) -> (B, N)
    """

    def __init__(self, n: int, cond: int, width: int, depth: int):
        super().__init__()
        period = 4e-3 * (4 / 4e-3) ** torch.linspace(0, 1, 32)
        self.register_buffer("frequency", 2 * math.pi / period, persistent=False)
        self.input, self.time, self.cond = nn.Linear(n, width), nn.Linear(64, width), nn.Linear(cond, width)
        self.mod = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
                                 for _ in range(depth))
        self.output = nn.Linear(width, n)
        for layer in [*self.mod, self.output]:                          # blocks start as identity, output as zero
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, cond):
        """Velocity (B, N) at x (B, N), t (B,)."""
        angle = t[:, None] * self.frequency                                                 # (B, 32)
        c = F.silu(self.cond(cond) + self.time(torch.cat([angle.sin(), angle.cos()], 1)))   # (B, width)
        h = self.input(x) + c
        for mod, mlp in zip(self.mod, self.mlp):
            scale, bias, gate = mod(c).chunk(3, 1)
            h = h + gate * mlp(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + bias)
        return self.output(F.layer_norm(h, h.shape[-1:]))

    def loss(self, x, cond, weight, samples: int):
        """Mean squared velocity error over `samples` noise levels each. t ~ Beta(1.5, 1) as in SmolVLA, then shifted
        towards noise (SD3, 2403.03206): in many dimensions x_t gives x away unless t is close to 1."""
        x, cond, weight = (a.repeat(samples, *[1] * (a.ndim - 1)) for a in (x, cond, weight))
        t = torch.rand(len(x), device=x.device) ** (1 / 1.5) * 0.999 + 0.001                # Beta(1.5, 1) by inversion
        t = 4 * t / (1 + 3 * t)
        noise = torch.randn_like(x)
        v = self(t[:, None] * noise + (1 - t[:, None]) * x, t, cond)
        error = ((v - (noise - x)).square() * weight).sum(1) / weight.sum(1).clamp(min=1)
        return error.mean()                             # of samples: the same whatever the split into processes

    def sample(self, cond, noise, steps: int):
        x = noise
        for i in range(steps):
            t = torch.full_like(x[:, 0], 1 - i / steps)
            x = x - self(x, t, cond) / steps
        return x


def load_trunk(name: str, text_layers: int, tokenizer: str = "") -> tuple[Trunk, object]:
    """'tiny' built from a config, or pretrained weights by name or folder; absent weights are an error, never random."""
    if name == "tiny":
        size = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=2, num_attention_heads=4)
        config = SmolVLMConfig(vision_config=dict(image_size=64, patch_size=8, **size), scale_factor=2, image_token_id=383,
                               text_config=dict(model_type="llama", vocab_size=384, num_key_value_heads=4, pad_token_id=0,
                                                bos_token_id=1, eos_token_id=1, **size))
        return Trunk(SmolVLMModel(config)), ByT5Tokenizer()
    try:
        words = AutoTokenizer.from_pretrained(tokenizer or name)
        vlm, info = SmolVLMModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError) as e:
        fail(f"no pretrained SmolVLM2 at '{name}' ({str(e).splitlines()[0]}); give a Hugging Face name that this machine "
             f"can reach, a folder with config, weights and tokenizer, or 'tiny'")
    if info["missing_keys"]:
        fail(f"weights of '{name}' lack {len(info['missing_keys'])} tensors, first {sorted(info['missing_keys'])[0]}")
    vlm.text_model.layers = vlm.text_model.layers[:text_layers]
    vlm.config.text_config.num_hidden_layers = len(vlm.text_model.layers)
    return Trunk(vlm), words


class Tokens:
    """Instructions -> ids, mask int64 (B, L); each sentence is tokenized once."""

    def __init__(self, tokenizer, length: int):
        self.tokenizer, self.length, self.cache = tokenizer, length, {}
        tokenizer.padding_side = "right"                # kept by save_pretrained, so that a robot pads alike
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, texts: list[str], device):
        for s in set(texts) - self.cache.keys():
            x = self.tokenizer(s, padding="max_length", max_length=self.length, truncation=True)
            self.cache[s] = (x["input_ids"], x["attention_mask"])
        ids, mask = zip(*(self.cache[s] for s in texts))
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# end of the model
def whiten(codebook: torch.Tensor) -> torch.Tensor:
    """(S, K, D) -> (S, K, R), R = min(K - 1, D): each token's codes in coordinates of zero mean and unit covariance.

    A regression onto raw vectors is dominated by few directions, and the mean of several codes lies nearest to
    whichever code is short; here distinct codes are about equally far apart.
    """
    K, D = codebook.shape[1:]
    u, s, _ = torch.linalg.svd(codebook - codebook.mean(1, keepdim=True), full_matrices=False)
    u = u * (s > 1e-4 * s[:, :1])[:, None]              # equal codes leave directions without meaning
    return u[..., :min(K - 1, D)] * K ** 0.5


class LatentPolicy(nn.Module):
    """Trunk and latent head. forward(images, ids, mask, codes (B, S)) -> flow-matching loss of the whitened latents."""

    def __init__(self, cfg: Config, trunk: Trunk, codebook: torch.Tensor):
        super().__init__()
        self.cfg, self.trunk = cfg, trunk
        self.register_buffer("latents", whiten(codebook))                                   # (S, K, R)
        S, _, R = self.latents.shape
        self.head = FlowHead(S * R, trunk.width, cfg.head_width, cfg.head_depth)

    def forward(self, images, ids, mask, codes):
        x = self.latents[torch.arange(codes.shape[1], device=codes.device), codes].flatten(1)  # (B, S*R)
        return self.head.loss(x, self.trunk(images, ids, mask), torch.ones_like(x), self.cfg.flow_samples)

    def predict(self, images, ids, mask):
        """Codes (B, S) nearest to the expected latent: one Euler step from noise."""
        S, _, R = self.latents.shape
        noise = torch.randn(len(images), S * R, generator=torch.Generator().manual_seed(0)).to(self.latents)
        x = self.head.sample(self.trunk(images, ids, mask), noise, 1).view(-1, S, 1, R)     # (B, S, 1, R)
        return (x - self.latents).square().sum(-1).argmin(-1)                               # (B, S)


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


# ---------------------------------------------------------------------------------------------- hand-over files
def refuse_pickles(path: Path):
    """A torch.export archive may carry pickled payloads, which run code when loaded: such a file is not opened."""
    try:
        with zipfile.ZipFile(path) as z:
            names = [n for n in z.namelist() if n.endswith(("weights_config.json", "constants_config.json"))]
            configs = [json.loads(z.read(n)) for n in names]
    except (OSError, zipfile.BadZipFile) as e:
        fail(f"'{path}' is not a torch.export archive ({e})")
    if len(configs) != 2 or any(entry.get("use_pickle") for c in configs for entry in c["config"].values()):
        fail(f"'{path}' holds pickled payloads or an unknown layout; export it again with this project's scripts")


def load_labeller(path: str, device):
    """laq.pt2 -> (program, manifest, codebook (S, K, D)); the stored probe frames must give the stored codes."""
    if not Path(path).is_file():
        fail(f"no labeller at --laq-ckpt '{path}'; laq.py writes OUT/laq.pt2")
    refuse_pickles(Path(path))
    extra = {"manifest.json": "", "tensors.safetensors.b64": ""}
    program = torch.export.load(path, extra_files=extra)
    manifest = json.loads(extra["manifest.json"] or "{}")
    if manifest.get("schema") != "laq.v1":
        fail(f"'{path}': schema is {manifest.get('schema')!r}, expected 'laq.v1'")
    tensors = safetensors_load(base64.b64decode(extra["tensors.safetensors.b64"]))
    shape = tuple(manifest[k] for k in ("tokens", "codes", "code_dim"))
    if tuple(tensors["codebook"].shape) != shape:
        fail(f"'{path}': codebook is {tuple(tensors['codebook'].shape)}, its manifest says {shape}")
    codes, _ = program.module()(tensors["probe_frames"])
    if not torch.equal(codes, tensors["probe_codes"]):
        fail(f"'{path}': the probe frames give codes {codes.tolist()}, expected {tensors['probe_codes'].tolist()}")
    if device.type == "cuda":
        program = torch.export.passes.move_to_device_pass(program, str(device))
    return program.module(), manifest, tensors["codebook"]


def publish(partial: Path, final: Path):
    """Puts a finished hand-over folder in place; an older one is whole until then."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def export(model: LatentPolicy, cfg: Config, step: int, tokenizer, labeller: dict):
    """OUT/stage2: trunk with tokenizer as transformers saves them, readout and head, manifest."""
    final = Path(cfg.out) / "stage2"
    partial = final.with_name(".stage2.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.trunk.vlm.save_pretrained(partial / "trunk")
    tokenizer.save_pretrained(partial / "tokenizer")        # not in trunk/: AutoTokenizer would go by the model's type
    heads = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith("trunk.vlm.")}
    save_file(heads, partial / "heads.safetensors")
    manifest = {"schema": "smolvla_shared.v1", "trunk": cfg.trunk, "dtype": "float32", "image_size": model.trunk.image_size,
                "text_len": cfg.text_len, "latent_dim": model.head.output.out_features, "action_dim": 0,
                "flow": {"width": cfg.head_width, "depth": cfg.head_depth},
                "labeller": labeller, "step": step, "config": asdict(cfg), "torch": torch.__version__}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    publish(partial, final)


# ---------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model: LatentPolicy, cfg: Config, loader, labeller, tokens, laq_size: int, device) -> dict:
    """On held-out episodes: flow loss, accuracy of the nearest codes, and that of the most frequent code."""
    model.eval()
    predicted, truth, losses = [], [], []
    for i, batch in enumerate(loader.first(cfg.eval_batches)):
        torch.manual_seed(i)
        frames = data_oxe.to_device(batch, device, loader.image_size)["frames"]
        codes, _ = labeller(data_oxe.fit(frames, laq_size))
        images, (ids, mask) = data_oxe.fit(frames[:, 0], model.trunk.image_size), tokens(batch["instruction"], device)
        losses.append(model(images, ids, mask, codes).item())
        predicted.append(model.predict(images, ids, mask).cpu().numpy())
        truth.append(codes.cpu().numpy())
    model.train()
    predicted, truth = np.concatenate(predicted), np.concatenate(truth)                     # (samples, S)
    majority = np.mean([np.bincount(c).max() / len(c) for c in truth.T])                    # knows the answers' counts
    return {"loss": np.mean(losses), "accuracy": (predicted == truth).mean(), "accuracy_majority": majority,
            "accuracy_all_tokens": (predicted == truth).all(1).mean()}


def describe(m: dict) -> str:
    return (f"nearest-code accuracy {m['accuracy']:.3f} (majority code {m['accuracy_majority']:.3f}), "
            f"all tokens {m['accuracy_all_tokens']:.3f} | flow loss {m['loss']:.3f}")


# ---------------------------------------------------------------------------------------------- main
def main(cfg: Config):
    rank, world, device = setup(cfg)
    labeller, laq_manifest, codebook = load_labeller(cfg.laq_ckpt, device)
    trunk, tokenizer = load_trunk(cfg.trunk, cfg.text_layers)
    local, micro = cfg.batch_size // world, cfg.micro_batch or cfg.batch_size // world
    options = {k: getattr(cfg, k) for k in ("data", "mix", "weights", "val_fraction", "holdout", "pairs_per_episode", "resize",
                                            "max_bad")}
    laq_size = laq_manifest["image_size"]
    common = dict(**options, image_size=max(laq_size, trunk.image_size), horizon_s=laq_manifest["config"]["horizon_s"])
    loader = data_oxe.Loader(split="train", batch_size=local, seed=cfg.seed, shuffle_mb=cfg.shuffle_mb, rank=rank,
                             world=world, **common)
    val_loader = data_oxe.Loader(split="val", batch_size=64, seed=1, shuffle_mb=8, **common)
    for name in loader.horizon.keys() & laq_manifest["horizon"].keys():
        if loader.horizon[name] != laq_manifest["horizon"][name]:
            fail(f"'{cfg.laq_ckpt}' labels pairs of '{name}' that are {laq_manifest['horizon'][name]} apart; the registry now "
                 f"says {loader.horizon[name]}")
    tokens = Tokens(tokenizer, cfg.text_len)
    model = LatentPolicy(cfg, trunk, codebook).to(device)
    optimizer = make_optimizer(cfg, model, device)
    start = load_checkpoint(cfg, model, optimizer, loader) if cfg.resume else 0
    if not torch.allclose(model.latents.cpu(), whiten(codebook), atol=1e-4):
        fail(f"--resume '{cfg.resume}' was trained on another labeller than '{cfg.laq_ckpt}': their codebooks differ")
    if cfg.export_only:
        return export(model, cfg, start, tokenizer, laq_manifest) if rank == 0 else None
    train = DDP(model, broadcast_buffers=False) if world > 1 else model
    train = torch.compile(train) if cfg.compile else train
    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    log, stop, batches, clock = Logger(cfg, rank, start), StopFlag(), loader.to(device), time.time()
    log.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, episodes {loader.counts}")

    for step in range(start, cfg.steps + 1):                                    # one more round, to evaluate and save
        stopping, last = stop(device), step == cfg.steps
        if not stopping and (last or step % cfg.eval_every == 0):
            metrics = evaluate(model, cfg, val_loader, labeller, tokens, laq_size, device)
            log.print(f"step {step}: {describe(metrics)}")
            log.log(step, {}, **{f"val_{k}": v for k, v in metrics.items()})
        if stopping or last or (step > start and step % cfg.save_every == 0):
            save_checkpoint(cfg, step, model, optimizer, loader)
        if stopping or last:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr_at(cfg, step)
        step_seed(cfg, step, rank, world)
        batch = next(batches)
        frames = batch["frames"]
        with torch.no_grad():
            codes, _ = labeller(data_oxe.fit(frames, laq_size))
        images = random_shift(data_oxe.fit(frames[:, 0], trunk.image_size), cfg.shift)
        ids, mask = tokens(batch["instruction"], device)
        pieces = [slice(i, i + micro) for i in range(0, local, micro)]
        total = 0.0
        for piece in pieces:
            if world > 1:
                train.require_backward_grad_sync = piece is pieces[-1]
            with amp:
                loss = train(images[piece], ids[piece], mask[piece], codes[piece])
            (loss / len(pieces)).backward()
            total += loss.detach() / len(pieces)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if not torch.isfinite(norm):
            fail(f"gradient norm {norm.item()} at step {step}, episodes {batch['episode'].tolist()}; "
                 f"the last good checkpoint is '{cfg.out}/last.pt'")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if log.on:
            log.bar.update()
        if step % cfg.log_every == 0:
            if world > 1:
                dist.all_reduce(total)
                total /= world
            rate = cfg.batch_size * cfg.log_every / (time.time() - clock)
            clock = time.time()
            log.log(step, {"loss": total}, loss=total, grad_norm=norm, lr=lr_at(cfg, step), samples_per_s=rate)
    if rank == 0 and not stop.signal:
        export(model, cfg, cfg.steps, tokenizer, laq_manifest)
        log.print(f"trunk and latent head: {cfg.out}/stage2")
    log.close()
    if stop.signal:
        print(f"stopped; continue with --resume {cfg.out}/last.pt", file=sys.stderr)
    leave(128 + stop.signal if stop.signal else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
