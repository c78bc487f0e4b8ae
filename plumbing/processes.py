"""Several processes doing one run (torchrun), and models in parts (FSDP2)."""

import contextlib
import os
import time
import warnings
from types import MethodType

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
        # PyTorch's own caches keep the group, and so its threads, alive. After a collective, such a
        # thread drops the tensors a moment later than we hear the result, and needs the interpreter
        # for that. If the interpreter is shutting down by then, the process aborts.
        time.sleep(0.3)


def from_first_process(objects):
    if many_processes():
        dist.broadcast_object_list(objects)
    return objects


def rank():
    return dist.get_rank() if many_processes() else 0


def many_processes():
    return dist.is_available() and dist.is_initialized()


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


def sum_gradients(model):
    """The sum of the processes' gradients, in place."""
    for parameter in model.parameters():
        if is_part(parameter.grad):
            parameter.grad *= dist.get_world_size()  # FSDP has taken the mean
        elif parameter.grad is not None:
            all_sum(parameter.grad)


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


def is_part(tensor):
    """Is it one process's part of a tensor (FSDP's)?"""
    return hasattr(tensor, "full_tensor")


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


def shard(model, dtype=None):
    """FSDP2: each process keeps a part of every weight, its gradient and its moments in Adam. A
    pass gathers a layer's weights when it comes to the layer, and forgets them behind it. model: a
    policy, whose `rollout.Engine` is made before, or a `ValueModel`. The optimizer comes after.
    dtype: of the weights that are gathered, torch.bfloat16 in a run under autocast, which would
    cast them anyway."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    from plumbing.batches import shares_prompts
    from plumbing.logprobs import check_head, masked_logprobs

    is_critic = not hasattr(model, "get_output_embeddings")
    backbone = model.backbone if is_critic else model.base_model
    shares_prompts(model)  # tries it while the weights are whole
    how = {"mesh": init_device_mesh(backbone.device.type, (dist.get_world_size(),))}
    if is_critic:
        fsdp.fully_shard(model.head, **how)  # float32, always: bfloat16 has 0.996, then 1
        # It returns views, which nobody changes in place.
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
    else:
        check_head(model)
    if dtype is not None:
        # Sums stay float32, as under autocast: of gradients over the processes, and of what the
        # layers add to the embeddings.
        how["mp_policy"] = fsdp.MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        backbone.get_input_embeddings().register_forward_hook(lambda *call: call[-1].float())
    layers = backbone._no_split_modules or ()  # names of classes
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fsdp.fully_shard(module, **how)
    fsdp.fully_shard(model, **how)
    if not is_critic:  # `token_logprobs` calls backbone and head, not the model
        model.logprobs_in_parts = MethodType(masked_logprobs, model)
        fsdp.register_fsdp_forward_method(model, "logprobs_in_parts")
