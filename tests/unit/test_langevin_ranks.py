"""Two processes that share gradients get the same noise and stay the same bit for bit; pieces get their own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.optim import AdamW

from imagekiln.optim.langevin import langevin


def replica(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = langevin(AdamW(list(model.named_parameters()), lr=0.01), diffusion=1e-4, seed=3)
    torch.manual_seed(100 + rank)  # each has data of its own
    for _ in range(15):
        x = torch.randn(8, 4)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()
    torch.save(model.state_dict(), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_replicas_stay_the_same_bit_for_bit(tmp_path):
    mp.start_processes(replica, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert tensor.isfinite().all()
