import math
from pathlib import Path

import torch
from helpers import tiny_config

from eiwtrain.config import Config
from eiwtrain.train import agreed
from eiwtrain.train.objective import MicroBatch

CONFIG = Config.model_validate(tiny_config(Path("/x")))


def micro_batch(bits, entropy):
    batch = MicroBatch(torch.ones(2), CONFIG, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    batch.sums, batch.entropy = torch.tensor([bits, 0.5], dtype=torch.float64), torch.tensor(entropy)
    return batch


def test_ranks_sum_up_their_numbers_and_rank_0_gives_the_entropies():
    own = [[1.0, 2.0], [3.0, math.nan]]
    first = agreed.pack(
        [micro_batch(1.0, [[9.0, 9.0]] * 2), micro_batch(2.0, own)], [1.0, 0.0, 1.0, True, False, True], 0
    )
    second = agreed.pack(
        [micro_batch(4.0, [[7.0, math.inf], [math.nan, 7.0]])] * 2, [2.0, 0.0, 0.0, False, False, False], 1
    )
    numbers = agreed.beside(torch.tensor(5.0), first + second).tolist()
    assert numbers[0] == 5.0
    sums, entropy = agreed.unpack(numbers[1:])
    assert sums == agreed.StepSums(
        bits=11.0, penalty=2.0, faults=3.0, again=0.0, stop=1.0, save=1.0, look=0.0, compare=1.0
    )
    torch.testing.assert_close(entropy, torch.tensor(own, dtype=torch.float64), equal_nan=True)


def test_what_is_not_finite_stays_so():
    nan = agreed.pack([micro_batch(math.nan, [[1.0, 1.0]])], [0.0] * 6, 0)
    sums, _ = agreed.unpack(nan.tolist())
    assert math.isnan(sums.bits)
    assert agreed.beside(math.inf, nan)[0] == math.inf
