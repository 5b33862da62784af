"""The optimizer's state and the average of the weights, divided among the processes (train.shard).

Weights and gradients stay whole on every process, as DDP keeps them. Each weight has one owner, which alone steps it, averages it and
keeps what that takes. So every number is the same as without, bit for bit, and a checkpoint has the same form. This works with any
optimizer that leaves a weight without a gradient alone.
"""

from utils import distributed


def divide(net, num_processes):
    """{weight: rank of its owner} for what is trained of `net`: the largest first, each to the process that has least so far."""
    load, owners = [0] * num_processes, {}
    for weight in sorted((p for p in net.parameters() if p.requires_grad), key=lambda p: -p.numel()):
        owners[weight] = load.index(min(load))
        load[owners[weight]] += weight.numel()
    return owners


def share_steps(optimizer, owners):
    """From now on each process steps its own weights only, and sends them to the others after every step."""
    ranks = {weight: owners[weight] for group in optimizer.param_groups for weight in group["params"]}
    own = [rank == distributed.rank() for rank in ranks.values()]

    def leave_others_alone(*_):
        for weight, is_own in zip(ranks, own):
            if not is_own:
                weight.grad = None

    def load_own(optimizer, saved):
        return saved | {"state": {i: moments for i, moments in saved["state"].items() if own[i]}}

    optimizer.register_step_pre_hook(leave_others_alone)
    optimizer.register_step_post_hook(lambda *_: distributed.share(ranks))
    optimizer.register_load_state_dict_pre_hook(load_own)


def gather(ema, opt, net, owners):
    """The state dicts of average and optimizer with the parts of all processes, on rank 0. Collective. net: has the weights' names."""
    averages = {name: ema[name] for name, weight in net.named_parameters() if owners.get(weight) == distributed.rank()}
    moments = {(i, name): value for i, values in opt["state"].items() for name, value in values.items()}
    state = {}
    for (i, name), value in sorted(distributed.collect(moments).items(), key=lambda item: item[0][0]):
        state.setdefault(i, {})[name] = value
    return ema | distributed.collect(averages), opt | {"state": state}
