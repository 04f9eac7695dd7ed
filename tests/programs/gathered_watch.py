"""One of two processes that watch halves of the samples, and gather them.

    python gathered_watch.py RANK FILE

prints CDNV of all samples, and how many, as the process knows them after `gather`.
"""

import sys

import numpy as np
import torch

from ncjax.torch import watch


def main():
    rank, file = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    rng = np.random.default_rng(0)
    labels = torch.tensor(np.arange(40) % 3)
    features = torch.tensor(rng.normal(size=(40, 5)), dtype=torch.float32)
    layer = torch.nn.Linear(5, 3)
    mine = slice(rank, None, 2)
    with watch(layer) as watched, torch.no_grad(), watched.labels(labels[mine]):
        layer(features[mine])
    watched.gather()
    report = watched.compute().as_dict()
    print(report["cdnv"], report["samples"])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
