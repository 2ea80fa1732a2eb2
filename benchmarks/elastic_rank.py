"""Run one rank of an epoch that is killed and resumed, by one data loader's own documented way to resume.

    eiwtrain            the step alone is the state                                     docs/resuming.md
    LitData             StreamingDataLoader.state_dict(), also for other world sizes and numbers of processes
                        README, "Pause, resume data streaming"                  https://github.com/Lightning-AI/litData
    MosaicML Streaming  StreamingDataLoader.state_dict(), "called on rank zero"
                        https://docs.mosaicml.com/projects/streaming/en/latest/distributed_training/fast_resumption.html
                        https://docs.mosaicml.com/projects/streaming/en/latest/distributed_training/elastic_determinism.html
    torchdata           StatefulDataLoader.state_dict() over webdataset, for the processes of a rank "but not across
                        ranks": each rank keeps its own         https://docs.pytorch.org/data/0.11/
                        webdataset has no state, so the loader fast-forwards it, and it must shuffle the same way each
                        time: `detshuffle`

`benchmarks.elastic` runs it as `python -m benchmarks.elastic_rank TASK` with an interpreter that has the loader, once
for each rank. They take steps together, as training would. Rank 0 writes the samples of each step. After each `every`
steps the state is saved; after step `die_after` every rank sends itself SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SHARD = 48
"""Images a shard."""

Loader = tuple[Iterable[Any], Callable[[], Any]]
"""A pair of the rest of the epoch, in batches of labels, and the function that returns the state."""


def loader(task: Mapping[str, Any], rank: int, ranks: int, step: int, state: Any) -> Loader:
    """Return the loader of this rank, from the beginning or, where there is a state, from there."""
    batch, processes, url = task["batch"] // ranks, task["processes"], task["url"]
    if task["peer"] == "eiwtrain":
        return _ours(url, task["images"], task["batch"], processes, rank, ranks, step), lambda: None
    made: Any
    if task["peer"] == "LitData":
        import litdata

        # By default several ranks drop the batches of the epoch's end that are not all ranks' and processes'.
        rows = litdata.StreamingDataset(url, shuffle=True, drop_last=False)
        made = litdata.StreamingDataLoader(rows, batch_size=batch, num_workers=processes, collate_fn=_labels)
    elif task["peer"] == "MosaicML":
        import streaming

        dataset = streaming.StreamingDataset(local=url, shuffle=True, batch_size=batch)
        made = streaming.StreamingDataLoader(dataset, batch_size=batch, num_workers=processes, collate_fn=_labels)
    else:
        import webdataset
        from torchdata.stateful_dataloader import StatefulDataLoader

        shards = sorted(str(path) for path in Path(url).glob("*.tar"))
        split = {"nodesplitter": webdataset.split_by_node, "shardshuffle": len(shards), "detshuffle": True, "seed": 0}
        samples = webdataset.WebDataset(shards, **split).compose(webdataset.detshuffle(1000, initial=100, seed=0))
        made = StatefulDataLoader(samples.decode("pil"), batch_size=batch, num_workers=processes, collate_fn=_labels)
    if state is not None:
        made.load_state_dict(state)
    return made, made.state_dict


def _ours(url: str, images: int, batch: int, processes: int, rank: int, ranks: int, step: int) -> Iterator[Any]:
    from eiwtrain import data

    reader = data.ShardReader(url, data.load_manifest(url), "train")
    share = {"rank": rank, "world_size": ranks, "workers": processes}
    stream = data.train_batches(
        reader, seed=0, start_step=step, global_batch=batch, micro_batch=batch // ranks, **share
    )
    for _ in range(step, images // batch):
        (found,) = next(stream)
        yield found.labels[found.indices >= 0]


def _labels(samples: list[dict[str, Any]]) -> Any:
    import torch

    return torch.tensor([int(sample["cls" if "cls" in sample else "label"]) for sample in samples])


def write(peer: str, source: str, output: str, images: int) -> None:
    """Write the first images of a folder of folders, one image each, as a data set; the label is the image's number."""
    paths = sorted(Path(source).rglob("*.png"))[:images]
    items = [(number, path.read_bytes()) for number, path in enumerate(paths)]
    if peer == "LitData":
        import litdata

        litdata.optimize(
            _same, [{"label": n, "image": png} for n, png in items], output, chunk_size=SHARD, num_workers=1
        )
    elif peer == "MosaicML":
        import streaming

        limit = SHARD * max(len(png) for _, png in items)
        with streaming.MDSWriter(out=output, columns={"image": "bytes", "label": "int"}, size_limit=limit) as sink:
            for number, png in items:
                sink.write({"image": png, "label": number})
    else:
        import webdataset

        Path(output).mkdir()
        with webdataset.ShardWriter(f"{output}/%06d.tar", maxcount=SHARD, verbose=0) as sink:
            for number, png in items:
                sink.write({"__key__": f"{number:06d}", "png": png, "cls": number})


def _same(item: dict[str, Any]) -> dict[str, Any]:
    return item


def train(task: Mapping[str, Any]) -> None:
    """Make the steps of an epoch, from the newest state on, together with the other ranks."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    folder = Path(task["folder"])
    step = max((int(path.stem.partition("-")[0]) for path in folder.glob("*-0.pt")), default=0)
    state = None
    if step and task["peer"] != "eiwtrain":
        own = folder / f"{step}-{rank if task['peer'] == 'torchdata' else 0}.pt"
        state = torch.load(own, weights_only=False) if own.exists() else None
    if task["peer"] == "MosaicML":
        import streaming

        streaming.base.util.clean_stale_shared_memory()  # after a kill, as their "FAQs and Tips" say
        distributed.barrier()
    batches, state_of = loader(task, rank, ranks, step, state)
    audit = (folder / f"{time.time_ns()}.jsonl").open("a", buffering=1) if rank == 0 else None
    _note(audit, {"restored": step})
    rest = iter(batches)
    while True:
        batch = next(rest, None)
        everyone: list[Any] = [None] * ranks
        distributed.all_gather_object(everyone, None if batch is None else batch.tolist())
        found = [label for share in everyone for label in share or ()]
        if not found:
            break
        _note(audit, {"step": step, "indices": found})
        step += 1
        if step % task["every"] == 0:
            torch.save(state_of(), folder / f"{step}-{rank}.tmp")
            distributed.barrier()
            (folder / f"{step}-{rank}.tmp").rename(folder / f"{step}-{rank}.pt")
            distributed.barrier()
        if step == task["die_after"]:
            os.kill(os.getpid(), signal.SIGKILL)


def _note(audit: Any, what: dict[str, Any]) -> None:
    if audit is not None:
        audit.write(json.dumps({"time": time.time()} | what) + "\n")


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        write(**job) if "output" in job else train(job)
    os._exit(0)  # some loaders take long to leave
