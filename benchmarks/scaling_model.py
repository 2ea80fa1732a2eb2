"""How long a step, a checkpoint and a preemption take at any number of workers: formulas, with what goes into them.

Not for measuring, nor for printing: that is `benchmarks.scaling`; what each formula means is in `docs/SCALING.md`.
Seconds, bytes, bytes a second. A worker has one GPU (or one core); a machine has `Network.node` workers and goes as a
whole. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from eiwtrain import config
from eiwtrain.train.pace import young_daly

THREADS = 4  # that fetch shards in each worker (`eiwtrain.data.prefetch`)
COMMIT_SECONDS = 1.0  # of a checkpoint beside its bytes: parts agreed on, looked up, a manifest; some six requests


@dataclass(frozen=True)
class Network:
    """What collectives run over: machines of `node` workers, fast links inside and slower ones between.

    Attributes:
        inside: one way, of each worker to those of its machine.
        between: one way, of each machine, all its links together.
        call: seconds of a collective that are there however near the others are.
        inside_hop, between_hop: seconds for each hop.
    """

    node: int
    inside: float
    between: float
    call: float
    inside_hop: float = 0.0
    between_hop: float = 0.0

    def nodes(self, workers: int) -> int:
        """Machines that so many workers are on."""
        return math.ceil(workers / self.node)


@dataclass(frozen=True)
class Job:
    """What a config asks for; see `benchmarks.scaling.job_of`."""

    flops: float
    """FLOPs of a training step, forward and backward, for each image."""
    forward_flops: float
    """FLOPs of a forward pass, for each image."""
    operations: int
    """Operations that the host starts for each micro-batch, forward and backward, whatever its size."""
    gradient_bytes: int
    buckets: int
    """Buckets in which gradients are reduced at ZeRO stages 1 to 3, one after the other."""
    tensors: int
    """Parameters, counted as tensors."""
    checkpoint_bytes: int
    zero_stage: int
    image_bytes: float
    """Bytes of an image in a shard."""
    images: int
    """Images in the training split."""
    global_batch: int
    micro_batch: int
    max_steps: int
    eval_every: int
    eval_images: int
    lanes: int = 64
    cache_bytes: float = 64 * 2**30
    """On each machine."""
    loader_workers: int = 1
    max_failures: int = 3
    update_operations: int = 0
    """Operations that the host starts once a step, after the micro-batches."""


@dataclass(frozen=True)
class Cluster:
    """What a job runs on."""

    network: Network
    flops_per_second: float
    """FLOPs a second of each worker, as achieved in large products."""
    launch_seconds: float
    """Seconds to start one operation; the host starts one after the other, and the GPU runs them meanwhile."""
    connection: float
    """Bytes a second of each connection to the bucket."""
    decoded: float
    """Images a second that a core reads and decodes."""
    copy: float
    """Bytes a second from a worker's device to the host's memory."""
    start_seconds: float
    """Seconds from a fault to the next step, without reading the checkpoint."""


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    rows: int
    """Images of a micro-batch of each worker."""
    accumulation: int
    padded: float
    """Share of the rows that are padding."""
    compute: float
    host_bound: bool
    """Whether starting the operations takes longer than computing them."""
    communication: float
    data: float
    """Seconds that training waits for images."""
    images_per_second: float

    @property
    def seconds(self) -> float:
        """Seconds of the step in all."""
        return self.compute + self.communication + self.data


def batching(global_batch: int, micro_batch: int, workers: int) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step) of each worker."""
    return config.batching(config.Train(global_batch=global_batch, micro_batch=micro_batch), workers)


def padded_share(global_batch: int, micro_batch: int, workers: int) -> float:
    """Share of the rows of a step that have weight zero: 0 where the workers divide the batch."""
    rows, accumulation = batching(global_batch, micro_batch, workers)
    return 1.0 - global_batch / (workers * rows * accumulation)


def passes(zero_stage: int, accumulation: int) -> int:
    """How often a step sends the gradients' bytes round: a reduce-scatter or an all-gather is one, an all-reduce two.

    As counted in the engine: DeepSpeed all-reduces gradients at stages 1 and 2 as well, each rank keeping its share
    (`use_multi_rank_bucket_allreduce`), stage 2 for each micro-batch, and gathers the weights afterwards. At stage 3
    each micro-batch gathers weights and scatters gradients, and their average gathers them once more.
    """
    return {0: 2, 1: 3, 2: 2 * accumulation + 1, 3: 2 * accumulation + 1}[zero_stage]


def calls(zero_stage: int, accumulation: int, tensors: int, buckets: int) -> int:
    """Collectives of a step. At stage 0 all gradients are one tensor."""
    reductions = accumulation * buckets
    return {0: 2, 1: buckets + 3, 2: reductions + 3, 3: tensors + accumulation + reductions + 2}[zero_stage]


def transfer_seconds(sent: float, times: float, collectives: int, workers: int, network: Network) -> float:
    """Return seconds of hierarchical collectives over all workers: inside each machine, then between machines.

    An all-reduce of S bytes (`times` = 2) over n workers in a ring takes `2 (n - 1) / n S / bandwidth` and a latency
    for each hop (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009). Hops go round the ring inside a
    machine, and up and down a tree between machines, as NCCL has it.
    """
    if workers == 1:
        return 0.0
    inside, nodes = min(workers, network.node), network.nodes(workers)
    a_pass = (inside - 1) / inside * sent / network.inside + (nodes - 1) / nodes * sent / network.between
    hops = 2 * (inside - 1) * network.inside_hop + 2 * math.ceil(math.log2(nodes)) * network.between_hop
    return times * a_pass + collectives * (network.call + hops)


def communication_seconds(job: Job, network: Network, workers: int) -> float:
    """Return communication seconds of a step. None overlaps with computing: the engine sets `overlap_comm` to false."""
    _, accumulation = batching(job.global_batch, job.micro_batch, workers)
    count = calls(job.zero_stage, accumulation, job.tensors, job.buckets)
    return transfer_seconds(job.gradient_bytes, passes(job.zero_stage, accumulation), count, workers, network)


def compute_seconds(flops: float, operations: float, cluster: Cluster) -> float:
    """Return seconds of one micro-batch: the longer of computing it and of starting its operations."""
    return max(flops / cluster.flops_per_second, operations * cluster.launch_seconds)


def step(job: Job, cluster: Cluster, workers: int) -> Step:
    """One optimizer step on so many workers.

    Raises:
        ValueError: there are more workers than images in the global batch, which a config may not ask for either.
    """
    if workers > job.global_batch:
        raise ValueError(f"{workers} workers cannot share a global batch of {job.global_batch}")
    rows, accumulation = batching(job.global_batch, job.micro_batch, workers)
    compute = accumulation * compute_seconds(rows * job.flops, job.operations, cluster)
    compute += job.update_operations * cluster.launch_seconds  # behind the read of the norm, so nothing hides them
    communication = communication_seconds(job, cluster.network, workers)
    share = job.global_batch / workers
    decode = share / cluster.decoded
    fetch = share * job.image_bytes * duplicates(job.lanes, cluster.network.nodes(workers))
    fetch /= THREADS * cluster.connection
    ahead = compute + communication
    exposed = max(0.0, max(decode / job.loader_workers, fetch) - ahead) if job.loader_workers else decode
    return Step(
        rows,
        accumulation,
        padded_share(job.global_batch, job.micro_batch, workers),
        compute,
        job.operations * cluster.launch_seconds > rows * job.flops / cluster.flops_per_second,
        communication,
        exposed,
        job.global_batch / (ahead + exposed),
    )


def duplicates(lanes: int, nodes: int) -> float:
    """How many machines read each lane of the sample stream, on average: 1 while machines divide the lanes.

    Exact where lanes divide the global batch, and workers as well: each machine reads a chunk of the lanes in a row.
    """
    touched = sum(-(-lanes * (k + 1) // nodes) - lanes * k // nodes for k in range(nodes))
    return touched / lanes


def misses(epoch: int, share: float, data_bytes: float, cache_bytes: float) -> float:
    """Share of what a machine reads in an epoch (the first is 1) that it has to fetch.

    Each epoch a machine reads a `share` of the shards, drawn each time; its cache holds what it fetched in the last
    epochs, as many as fit.
    """
    kept = cache_bytes // (share * data_bytes)
    return (1.0 - share) ** min(epoch - 1, kept)


def fetched_bytes(job: Job, workers: int, epochs: int, network: Network) -> float:
    """Return the bytes that all machines fetch from the bucket in this number of epochs."""
    nodes = network.nodes(workers)
    share, total = duplicates(job.lanes, nodes) / nodes, job.images * job.image_bytes
    return nodes * share * total * sum(misses(e + 1, share, total, job.cache_bytes) for e in range(epochs))


def stall_seconds(job: Job, cluster: Cluster, workers: int) -> float:
    """For which a checkpoint holds training: moments that are sharded are all-reduced, a tensor at a time (at stage 3
    weights are gathered too), then each worker copies its share to the host."""
    times, tensors = {0: (0, 0), 1: (4, 2), 2: (4, 2), 3: (5, 3)}[job.zero_stage]
    collectives = tensors * job.tensors
    gathered = transfer_seconds(job.gradient_bytes, times, collectives, workers, cluster.network)
    return gathered + job.checkpoint_bytes / workers / cluster.copy


def write_seconds(job: Job, cluster: Cluster, workers: int) -> float:
    """Return seconds from the beginning of a checkpoint to its commit; each worker uploads its share."""
    upload = job.checkpoint_bytes / workers / cluster.connection
    return stall_seconds(job, cluster, workers) + upload + COMMIT_SECONDS


def restart_seconds(job: Job, cluster: Cluster) -> float:
    """Return seconds from a fault to the next step, at most: as if one worker read the whole checkpoint. Each part is
    read by one worker and sent to the others."""
    return cluster.start_seconds + job.checkpoint_bytes / cluster.connection


def evaluation_share(job: Job, cluster: Cluster, workers: int) -> float:
    """Return evaluation's share of the whole time: forward passes over the held-out images, dealt to the workers, and
    some six on rank 0 alone (samples at two temperatures, reconstructions, drift, entropies), while others wait."""
    rows, _ = batching(job.global_batch, job.micro_batch, workers)
    batches = math.ceil(job.eval_images / (rows * workers))
    # a forward pass starts a third of the operations
    forward = compute_seconds(rows * job.forward_flops, job.operations / 3, cluster)
    evaluation = (batches + 6) * forward
    return evaluation / (evaluation + job.eval_every * step(job, cluster, workers).seconds)


@dataclass(frozen=True)
class Losses:
    """What preemptions and checkpoints leave of the time."""

    mtbf: float
    """Between two preemptions of any machine."""
    interval: float
    """Between two checkpoints, as `checkpoint.every=auto` sets it."""
    goodput: float
    """Share of the wall time that goes into steps that count, where machines go without a word."""
    with_notice: float
    """The same where the cluster drains a node before it goes: no step is lost."""
    gives_up: float
    """Seconds after which `run.max_failures` is expected to end the run, where machines go without a word."""


def losses(job: Job, cluster: Cluster, workers: int, machine_mtbf: float) -> Losses:
    """Return the losses if each machine is preempted once in `machine_mtbf` seconds, at random (a Poisson process).

    At n machines the rate is n times that of one. Each preemption costs a restart of all workers without the machine,
    and another when its successor is there (one alone where there is no other machine). What was trained since the
    last checkpoint that was committed is lost.
    """
    nodes = cluster.network.nodes(workers)
    mtbf = machine_mtbf / nodes
    stall, write = stall_seconds(job, cluster, workers), write_seconds(job, cluster, workers)
    interval = young_daly(stall, mtbf, write)
    once = restart_seconds(job, cluster)
    down = once if nodes == 1 else 2 * once
    useful = 1.0 - evaluation_share(job, cluster, workers)
    return Losses(
        mtbf,
        interval,
        useful * goodput(interval, stall, down + write, mtbf),
        useful * available(down + write, mtbf) * interval / (interval + stall),
        gives_up_seconds(once + interval + write, mtbf, job.max_failures),
    )


def available(down: float, mtbf: float) -> float:
    """Share of the time outside restarts of `down` seconds each, which start again when they are hit."""
    return math.exp(-down / mtbf)


def goodput(interval: float, stall: float, down: float, mtbf: float) -> float:
    """Share of the time that goes into work that counts, at checkpoints every `interval` seconds of work.

    Exact for failures at random: J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart
    dumps, Future Generation Computer Systems 22(3), 2006, equation 13. `down` is what a failure costs beyond the
    work since the last checkpoint; a checkpoint that is written beside training adds the time it takes, as that much
    more work is done again.
    """
    x = (interval + stall) / mtbf
    if x > 500.0:  # exp(-x) is 0 for any purpose
        return 0.0
    return available(down, mtbf) * interval / (mtbf * math.expm1(x))


def gives_up_seconds(window: float, mtbf: float, max_failures: int) -> float:
    """Expected time to `max_failures + 1` failures in a row without a checkpoint between, i.e. so many gaps in a row,
    less one, that are shorter than `window`: start, interval and writing. Infinite where it does not come about.

    The first run of k successes in trials of probability p takes `(1 - p^k) / (p^k (1 - p))` trials on average
    (W. Feller, An Introduction to Probability Theory and Its Applications 1, XIII.7); a trial takes `mtbf` on average.
    """
    p = -math.expm1(-window / mtbf)
    some = p**max_failures
    if some < 1e-300:
        return math.inf
    return mtbf * (1 + (max_failures if p == 1.0 else (1 - some) / (some * (1 - p))))
