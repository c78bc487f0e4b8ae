"""Several processes doing one run (torchrun), and models in parts (FSDP2)."""

import contextlib
import os
from types import MethodType

import numpy as np
import torch
import torch.distributed as dist


@contextlib.contextmanager
def several_processes():
    """Under torchrun, the process group; else nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first_process(objects):
    if many_processes():
        dist.broadcast_object_list(objects)
    return objects


def rank():
    return dist.get_rank() if many_processes() else 0


def many_processes():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share(items):
    """This process's part of a list, one in so many; alone, all of it."""
    return all_shares(items)[rank()]


def all_shares(items):
    """Every process's share, in the order of their ranks."""
    size = dist.get_world_size() if many_processes() else 1
    return [items[start::size] for start in range(size)]


def all_sum(tensor):
    """The sum over the processes, in place."""
    if many_processes():
        dist.all_reduce(tensor)
    return tensor


def gather(items):
    """The lists of all processes' shares, put together again in the order before `share`."""
    if not many_processes():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    together = [None] * sum(map(len, parts))
    for start, part in enumerate(parts):
        together[start :: len(parts)] = part
    return together


def seed_of(*numbers):
    """A seed for `rollout.generate` that depends on all of these numbers and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 2


def is_part(tensor):
    """Is it one process's part of a tensor (FSDP's)?"""
    return hasattr(tensor, "full_tensor")


def in_parts(model):
    return any(map(is_part, model.parameters()))


def whole(tensor):
    """All processes' parts, together; of any other tensor, itself."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def put_together(state):
    """A state dict without parts: a collective where there are any (--fsdp)."""
    if isinstance(state, dict):
        return {name: put_together(value) for name, value in state.items()}
    return whole(state).cpu() if is_part(state) else state


def take_apart(state, like):
    """Replace the tensors in a state dict by this process's parts, where the parameters of the same
    names are parts."""
    from torch.distributed.tensor import distribute_tensor

    for name, value in state.items():
        parameter = like.get(name)
        if is_part(parameter) and value.shape == parameter.shape:
            where = parameter.device_mesh, parameter.placements
            state[name] = distribute_tensor(value.to(parameter.device), *where)


def shard(model, decoder=None):
    """FSDP2: each process keeps a part of every weight, its gradient and its moments in Adam. A
    pass gathers a layer's weights when it comes to the layer, and forgets them behind it. model: a
    `ValueModel`, or a policy, of which a whole copy is kept to decode with, of the dtype `decoder`.
    Make the optimizer afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    from plumbing.attention import keep_copy
    from plumbing.logprobs import check_head, masked_logprobs

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    is_policy = hasattr(model, "get_output_embeddings")
    if is_policy:
        check_head(model)
        keep_copy(model, decoder)
    names = (model if is_policy else model.backbone)._no_split_modules or ()
    for layer in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if is_policy:  # `token_logprobs` calls backbone and head, not the model
        model.logprobs_in_parts = MethodType(masked_logprobs, model)
        register_fsdp_forward_method(model, "logprobs_in_parts")
