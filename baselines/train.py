"""Train the small DDPM on one process (provisional)."""
import argparse
import math
import time
from copy import deepcopy
from pathlib import Path

import torch

from baselines.ddpm import noise_loss, schedule, small_unet
from utils.data.crops import TrainingCrops
from utils.files import append_line, write_whole


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag, default in {"iterations": 4000, "batch_size": 16, "patch_size": 64, "seed": 2025, "warm_up": 80}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    for flag in ("train_dir", "cache_dir", "model_dir"):
        parser.add_argument(f"--{flag}", type=Path)
    args = parser.parse_args()
    args.model_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    net, scheduler = small_unet(), schedule()
    ema = deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.learning_rate, fused=True)
    crops = TrainingCrops(args.train_dir, args.patch_size, args.seed, cache_dir=args.cache_dir)
    print(crops.notice, len(crops.names), "pictures")
    path, first, cpu = args.model_dir / "state.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first, cpu = state["iteration"], state["cpu_seconds"]
    saved, total, started = time.monotonic(), 0.0, time.process_time()
    for i in range(first, args.iterations):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + i)
        x = torch.stack([crops[i * args.batch_size + k] for k in range(args.batch_size)]).float() / 255
        way = int(torch.randint(8, (), generator=generator))
        x = torch.rot90(x.flip(-1) if way >= 4 else x, way % 4, (-2, -1))
        rise = min(1, (i + 1) / args.warm_up)
        fall = 0.5 * (1 + math.cos(math.pi * max(0, i - args.warm_up) / (args.iterations - args.warm_up)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rise * fall
        loss = noise_loss(net, scheduler, x, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(args.ema, (1 + i) / (10 + i))
        with torch.no_grad():
            for mean, now in zip(ema.parameters(), net.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        total += float(loss.detach())
        if (i + 1) % 100 == 0:
            seconds = cpu + time.process_time() - started
            append_line(args.model_dir / "log.txt", f"{i + 1} loss {total / 100:.5f} cpu {seconds:.0f} s")
            total = 0.0
        if time.monotonic() - saved > 300 or i + 1 == args.iterations:
            state = {"model": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                     "iteration": i + 1, "cpu_seconds": cpu + time.process_time() - started}
            write_whole(path, lambda file, state=state: torch.save(state, file))
            saved = time.monotonic()


if __name__ == "__main__":
    main()
