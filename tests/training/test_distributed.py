"""Gradients on two processes under plain DistributedDataParallel are those of one process on the joint batch.

In double precision, so that nothing hides behind rounding; with inversion at both levels, against plain autograd.
Measured: in three iterations the v's of the couplings differ by at most 2e-11 of their gradient, and all other
parameters by at most 9e-12.
"""
import io
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from model import IDM, BlockCompressedSensing
from utils import distributed
from utils.errors import UserError

ITERATIONS, SIZE, IMAGES = 3, 32, 4
TOLERANCE = 1e-9


def build(invertible: str) -> IDM:
    """A small network, no parameter of which has its initial value."""
    torch.manual_seed(1)
    net = IDM(block_out_channels=(32, 64), num_steps=2)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = 0.2 if parameter.numel() <= 3 else 0.03
            parameter += scale * (2 * torch.rand_like(parameter) - 1)
    net.invertible = invertible
    return net.double()


def gradients(net: IDM, model: torch.nn.Module, images: slice) -> list[dict[str, torch.Tensor]]:
    """Every parameter's gradient in each iteration, with a step of SGD between them."""
    operator = BlockCompressedSensing.random((SIZE, SIZE), 0.25, 16, torch.Generator().manual_seed(2)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    found = []
    for iteration in range(ITERATIONS):
        x = torch.rand(IMAGES, 1, SIZE, SIZE, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(iteration))[images]
        optimizer.zero_grad()
        (model(operator.A(x), operator) - x).abs().mean().backward()
        found.append({name: parameter.grad.clone() for name, parameter in net.named_parameters()})
        optimizer.step()
    return found


def one_rank(rank: int, port: int, folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": port}.items():
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        process = distributed.start("cpu")
        try:
            assert (process.rank, process.world_size, process.is_main) == (rank, 2, rank == 0)
            assert process.sum([rank + 1, torch.tensor(0.5)]) == [3.0, 1.0]
            assert process.gather(f"rank {rank}") == (["rank 0", "rank 1"] if rank == 0 else [])
            assert process.all_gather(10.0 + rank) == [10.0, 11.0]
            with pytest.raises(UserError, match="missing"), process.main_first():  # the other rank is not left waiting
                raise UserError("missing on both")
            net = build("both")
            share = IMAGES // 2
            found = gradients(net, process.wrap(net), slice(rank * share, (rank + 1) * share))
            torch.save(found, f"{folder}/{rank}.pt")
        finally:
            distributed.stop()
        assert not dist.is_initialized()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_gradients_of_two_processes_equal_those_of_one_on_the_joint_batch(tmp_path):
    multiprocessing.spawn(one_rank, (free_port(), str(tmp_path)), nprocs=2)
    rank0, rank1 = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    net = build("none")
    joint = gradients(net, net, slice(None))  # plain autograd
    worst = {"v": 0.0, "other": 0.0}
    for iteration in range(ITERATIONS):
        assert joint[iteration].keys() == rank0[iteration].keys()
        total = torch.stack([gradient.norm() for gradient in joint[iteration].values()]).norm()
        for name, expected in joint[iteration].items():
            found = rank0[iteration][name]
            assert torch.equal(found, rank1[iteration][name]), (iteration, name)
            kind = "v" if name.endswith(".v") else "other"
            # A bias just before a norm of one channel a group has no gradient but rounding's.
            scale = expected.norm() + (0 if kind == "v" else 1e-6 * total)
            error = float((found - expected).norm() / scale)
            assert error < TOLERANCE, (iteration, name, error)
            worst[kind] = max(worst[kind], error)
    assert sum(name.endswith(".v") for name in joint[0]) > 30
    print("largest relative differences:", worst)


def test_without_a_group_a_process_stands_for_itself(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    process = distributed.start("cpu")
    layer = torch.nn.Linear(1, 1)
    assert process.is_main and process.world_size == 1 and not dist.is_initialized()
    assert process.wrap(layer) is layer
    assert process.sum([1, True, torch.tensor(2.5)]) == [1.0, 1.0, 2.5]
    assert process.gather("alone") == ["alone"] and process.all_gather(3.0) == [3.0]


def test_a_device_that_is_not_there_is_the_users_mistake(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name in ("cuda:99", "meta", "mps:7"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used"):
            distributed.start(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="process 3 of this machine .* there are 1; start fewer"):
        distributed.start("cuda")
    with pytest.raises(UserError, match="--device toaster"):
        distributed.start("toaster")


@pytest.mark.parametrize(("environment", "complaint"), [
    ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR"), ({"RANK": "a", "WORLD_SIZE": "1"}, "'a'"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}, "''")])
def test_an_environment_that_describes_half_a_group_is_the_users_mistake(monkeypatch, environment, complaint):
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"RANK and WORLD_SIZE are set, but.*{complaint}"):
        distributed.start("cpu")


def test_who_waits_for_processes_that_do_not_start_says_so(monkeypatch):
    stderr = io.StringIO()

    def rendezvous(*_, **__):
        until = time.monotonic() + 60
        while not stderr.getvalue().endswith("\n") and time.monotonic() < until:
            time.sleep(0.01)
        raise ValueError("enough")
        yield

    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(distributed, "SAY_AFTER", 0.01)
    monkeypatch.setattr(dist, "rendezvous", rendezvous)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="enough"):
        distributed.start("cpu")
    assert stderr.getvalue() == ("rank 0 is still waiting for the others: RANK and WORLD_SIZE are set, so 4 processes "
                                 "must start and meet at host:7; unset RANK and WORLD_SIZE to run one alone\n")


def test_a_signal_that_nohup_ignores_stays_ignored():
    for handler in (signal.SIG_IGN, signal.SIG_DFL):
        former = signal.signal(signal.SIGHUP, handler)
        try:
            with distributed.stop_on_signal() as asked:
                signal.raise_signal(signal.SIGUSR1 if handler == signal.SIG_IGN else signal.SIGHUP)
                assert asked.is_set() and (signal.getsignal(signal.SIGHUP) == handler) == (handler == signal.SIG_IGN)
            assert signal.getsignal(signal.SIGHUP) == handler
        finally:
            signal.signal(signal.SIGHUP, former)


def test_seeds_differ_wherever_one_of_their_numbers_does():
    seeds = {distributed.seed_of(*numbers) for numbers in [
        (1,), (1, 0), (2,), (1, 2), (2, 1), (1, 2, 0), (1, 2, 3), (1, 3, 2)]}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert distributed.seed_of(1, 2, 3) == distributed.seed_of(1, 2, 3)


def test_processes_confer_at_the_same_iterations_about_once_a_second(monkeypatch):
    """Two processes of different speed, each told the sum over both: 0.02 s an iteration on average."""
    clock = [0.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    process = distributed.Process(0, 2, torch.device("cpu"))
    monkeypatch.setattr(distributed.Process, "sum", lambda self, values: [2 * value for value in values])
    pulse, conferred = distributed.Pulse(process, 1), []
    for iteration in range(1, 401):
        clock[0] += 0.02
        if pulse.due(iteration, urgent=True):  # which only one may know of
            assert pulse.confer(iteration, [1.0]) == [2.0]
            conferred.append(iteration)
    gaps = [later - earlier for earlier, later in zip(conferred, conferred[1:], strict=False)]
    assert gaps[:5] == [2, 4, 8, 16, 32] and set(gaps[6:]) <= {49, 50}
    alone = distributed.Pulse(distributed.Process(0, 1, torch.device("cpu")), 100)
    assert alone.due(3, urgent=True) and not alone.due(3, urgent=False) and alone.due(100, urgent=False)


def test_processes_that_start_anew_meet_one_another_and_not_those_that_died():
    """In the store of the first start, as `torch.distributed.run` keeps it, and in whatever order the ranks come."""
    store, former = dist.HashStore(), set()
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)):
        with ThreadPoolExecutor(3) as pool:
            starts = {}
            for rank in order:
                starts[rank] = pool.submit(distributed.meet, store, rank, 3)
                time.sleep(0.1)  # enough to be misled by what the former start left
            stores = [starts[rank].result(timeout=10) for rank in range(3)]
        stores[0].set("address", f"of {order}")
        assert [other.get("address") for other in stores] == [f"of {order}".encode()] * 3
        former.add(str(store.get("meeting")))
    assert len(former) == 4
