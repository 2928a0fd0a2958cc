"""DistributedDataParallel and DTensor on two processes: gradients equal those of one process with all the rows."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from programs import python_path

WORLD_SIZE = 2
HERE = Path(__file__).resolve()

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@pytest.mark.parametrize(
    "check", ["ddp", "dtensor_eager", "dtensor_inference", "dtensor_probed", "dtensor_compile", "tensor_parallel"]
)
def test_two_processes(device: str, check: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.device_count() < WORLD_SIZE:
        pytest.skip("needs a CUDA device for each process")
    # They meet at a file: a port found free here could be taken by another process before they bind it.
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE), device, check, str(rank), str(tmp_path / "rendezvous")],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert f"{check} holds" in output


def problem(device: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    tensors = (
        torch.randn(8, 5, dtype=torch.float64),
        torch.randn(4, 5, dtype=torch.float64),
        torch.randn(8, 4, dtype=torch.float64),
        torch.randn(4, dtype=torch.float64),
    )
    return tuple(tensor.to(device) for tensor in tensors)  # of each process, its own current one


def exact(device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    from torchintro import reference

    leaves = [tensor.requires_grad_() for tensor in problem(device)]
    loss = reference.linear_mse_loss(*leaves[:3], linear_bias=leaves[3])
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def ddp(device: str, rank: int) -> None:
    import torchintro

    x, w, t, b = problem(device)
    criterion = torchintro.LinearMSELoss(5, 4, dtype=torch.float64, device=device)
    with torch.no_grad():
        criterion.linear.weight.copy_(w)
        criterion.linear.bias.copy_(b)
    parallel = torch.nn.parallel.DistributedDataParallel(criterion)
    rows = slice(rank * 4, rank * 4 + 4)
    parallel(x[rows], t[rows]).backward()
    _, gradients = exact(device)
    torch.testing.assert_close(criterion.linear.weight.grad, gradients[1])
    torch.testing.assert_close(criterion.linear.bias.grad, gradients[3])


def distribute(device: str, parameter_placements: str):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh(device, (WORLD_SIZE,))
    batch, outputs = {"batch": (Shard(0), Replicate()), "outputs": (Replicate(), Shard(0))}[parameter_placements]
    target = Shard(1) if parameter_placements == "outputs" else Shard(0)
    placements = [batch, outputs, target, outputs]
    return [
        distribute_tensor(tensor, mesh, [placement]).requires_grad_()
        for tensor, placement in zip(problem(device), placements, strict=True)
    ]


def check_dtensors(function, leaves: list) -> None:
    loss = function(*leaves)
    loss.backward()
    expected_loss, gradients = exact(loss.device.type)
    torch.testing.assert_close(loss.detach().full_tensor(), expected_loss)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad.full_tensor(), gradient)


def call(x, w, t, b):
    import torchintro

    return torchintro.linear_mse_loss(x, w, t, linear_bias=b)


def dtensor_eager(device: str, rank: int) -> None:
    check_dtensors(call, distribute(device, "batch"))


def tensor_parallel(device: str, rank: int) -> None:
    check_dtensors(call, distribute(device, "outputs"))


def dtensor_compile(device: str, rank: int) -> None:
    check_dtensors(torch.compile(call, backend="aot_eager", fullgraph=True), distribute(device, "batch"))


def dtensor_inference(device: str, rank: int) -> None:
    """Without autograd a call reaches DTensor itself, whose rules for both operators are ours."""
    with torch.inference_mode():
        leaves = [leaf.detach() for leaf in distribute(device, "batch")]
        loss = call(*leaves)
        results = torch.ops.torchintro._linear_mse_loss_grads(*leaves, None, "mean", [True] * 4)
        expected_loss, gradients = exact_outside_inference(device)
        torch.testing.assert_close(loss.full_tensor(), expected_loss)
        for result, expected in zip(results, [expected_loss, *gradients], strict=True):
            torch.testing.assert_close(result.full_tensor(), expected)


def dtensor_probed(device: str, rank: int) -> None:
    """Asking whether there is such a module, without importing it, does not use up the rules' registration."""
    import torchintro  # noqa: F401

    assert importlib.util.find_spec("torch.distributed.tensor") is not None
    dtensor_inference(device, rank)


def exact_outside_inference(device: str):
    with torch.inference_mode(False), torch.enable_grad():
        return exact(device)


def main(device: str, check: str, rank: str, rendezvous: str) -> int:
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(rank))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=int(rank), world_size=WORLD_SIZE)
    try:
        globals()[check](device, dist.get_rank())
    except Exception:
        traceback.print_exc()
        return 1
    print(f"{check} holds")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without Python's finalization: gloo's threads may still hold tensors, and one that lets go of a tensor in those
    # moments ends the process with SIGABRT (https://github.com/pytorch/pytorch/pull/179291).
    os._exit(status)
