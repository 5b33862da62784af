"""What the network of a Config costs, counted on the network itself without computing anything: weights, FLOPs, memory."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from models.layers import DiTBlock
from models.masking import TokenMask, count_kept
from utils.config import model_arguments


def count_flops(run):
    """FLOPs of run(), counted by torch."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def count_weights(config):
    """Trained weights of the network."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(**model_arguments(config)).parameters() if p.requires_grad)


def make_inputs(net, batch, mask_ratio):
    """Arguments of the forward pass, without contents: (x, c_noise, class labels, mask)."""
    x, c_noise = torch.empty(batch, net.in_channels, net.in_size, net.in_size), torch.ones(batch)
    labels = torch.empty(batch, dtype=torch.int64) if net.num_classes else None
    num_keep, order = count_kept(net.num_tokens, mask_ratio), torch.empty(batch, net.num_tokens, dtype=torch.int64)
    return x, c_noise, labels, TokenMask(order, num_keep) if num_keep < net.num_tokens else None


def model_flops(config, mask_ratio=0.0, training=False):
    """FLOPs of one image through the network; with `training` forward and backward."""
    with torch.device("meta"):
        net = build_model(**model_arguments(config)).model
        inputs = make_inputs(net, 1, mask_ratio)
    return count_flops(lambda: net(*inputs).sum().backward() if training else net(*inputs))


def kept_bytes(config, mask_ratio, amp, batch):
    """(bytes that autograd keeps for the backward pass of a batch; of them the inputs of the blocks; number of blocks).

    Weights are not counted. Without activation checkpointing, whatever the config says.
    Half precision is counted with float16, in which attention on a CPU is one kernel, as it is on a GPU, and keeps the same tensors.
    """
    kept, block_inputs = {}, []
    with FakeTensorMode():  # shapes without contents, but with addresses that tell which tensors share memory
        net = build_model(**model_arguments(config) | {"activation_checkpointing": False}).model
        weights = {p.untyped_storage()._cdata for p in net.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # the storage itself, so that no other gets its address
            return tensor

        for block in net.modules():
            if isinstance(block, DiTBlock):
                block.register_forward_pre_hook(lambda _, arguments: block_inputs.append(arguments[0].nbytes))
        autocast = contextlib.nullcontext() if amp == "no" else torch.autocast("cpu", torch.float16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            net(*make_inputs(net, batch, mask_ratio))
        return sum(storage.nbytes() for storage in kept.values()), sum(block_inputs), len(block_inputs)
