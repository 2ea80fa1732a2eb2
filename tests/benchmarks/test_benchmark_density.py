"""The benchmark of density: what it trains, that it repeats, and what its table says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_shards

from benchmarks import density, density_report, density_subject, environments, peers
from benchmarks.density_variants import GLOW, TINY, VARIANTS

Row = dict[str, Any]

SMALL = {"levels": 2, "units": 1, "steps": 1, "conditioner": {"hidden": 4, "depth": 1, "growth": 2}}
PEER = """
import torch
from torch import nn

class Even(nn.Module):
    def __init__(self, exact, dims):
        super().__init__()
        self.exact, self.nats = exact, dims * torch.log(torch.tensor(256.0))
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        assert x.dtype == (torch.uint8 if self.exact else torch.float32)
        return self.weight * 0 - self.nats * self.exact + torch.zeros(len(x))

def make(image_shape, exact=False):
    return Even(exact, torch.Size(image_shape).numel())
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peer")
    (folder / "peer.py").write_text(PEER)
    return folder


def job(fields: Row, **changes: Any) -> Row:
    job = {"variant": "a", "seed": 0, "seconds": 0.2, "fields": fields, "images": 4, "iwbo": 1, "device": "cpu"}
    return job | changes


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_model(name: str) -> None:
    fields = VARIANTS[name]
    if "peer" in fields and not peers.installed(fields["peer"]):
        pytest.skip(f"{fields['peer']} is not installed")
    density_subject.check(fields, (3, 16, 16), {})
    subject = density_subject.make(fields, (3, 16, 16), None)
    bits, _ = subject.bits(
        subject.model, torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.rand(2, *subject.noise_shape)
    )
    assert bits.isfinite().all()


def test_a_bound_has_its_elbo_and_a_tighter_one_with_their_names(url: str) -> None:
    fields = {
        **TINY,
        **SMALL,
        "published": ["attention", "norm"],
        "optimizer": "adamax",
        "augment": "eta",
    }
    row = density_subject.train(job(fields, iwbo=4), url, None)
    assert row["steps"] >= 1
    assert row["spent"] >= 0.2
    assert 5 < row["iwbo_bits_per_dim"] <= row["bits_per_dim"] < 20
    assert row["estimator"].startswith("ELBO")
    assert row["iwbo_estimator"].startswith("IWBO(4)")


@pytest.mark.parametrize("exact", [False, True])
def test_a_peer_of_a_folder_is_scored_by_its_own_estimator(url: str, folder: Path, exact: bool) -> None:
    row = density_subject.train(job({"peer": "even", "exact": exact}, iwbo=2), url, folder)
    assert row["bits_per_dim"] == pytest.approx(8, abs=1e-6)
    assert row["estimator"].startswith("exact" if exact else "ELBO")
    assert ("iwbo_bits_per_dim" in row) != exact


def test_all_variants_see_the_same_images(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []
    make = density_subject.make

    def watched(*args: Any) -> density_subject.Subject:
        subject, images = make(*args), list[torch.Tensor]()
        seen.append(images)

        def bits(model: Any, pixels: torch.Tensor, noise: torch.Tensor) -> Any:
            images.append(pixels)
            return subject.bits(model, pixels, noise)

        return density_subject.Subject(subject.model, bits, subject.dims, subject.noise_shape, subject.bound)

    monkeypatch.setattr(density_subject, "make", watched)
    for fields in (
        {**GLOW, "levels": 1},
        {**TINY, **SMALL, "units": 2},
    ):  # other noise
        density_subject.train(job({**fields, "batch": 2}, seconds=0.05), url, None)
    first, second = seen[0], seen[3]  # each makes three models
    assert torch.equal(first[1], second[1])


def test_a_diverged_run_is_null_and_not_a_number_in_the_table(url: str) -> None:
    subject = density_subject.make({**GLOW, "levels": 1}, (3, 8, 8), None)
    for parameter in subject.model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    assert density_subject.score(subject, subject.model, images, 1, torch.device("cpu"))["bits_per_dim"] is None
    row = {"variant": "a", "seed": 0, "seconds": 1, "bits_per_dim": None, "steps": 1, "parameters": 5, "iwbo": 1}
    assert "| not finite |" in density_report.table([{**row, "estimator": "ELBO"}], ["a"])


def run(file: Path, url: str, *arguments: str) -> int:
    return density.main(["--data", url, "--json", str(file), "--seconds", "0.1", "--images", "4", *arguments])


def lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_is_a_row_and_a_point(url: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    assert run(file, url, "--seeds", "1", "--peer", f"even={folder}", "--plot", str(plot)) == 0
    assert "| even | 0.1 | 1 | 1 |" in capsys.readouterr().out
    assert [row["variant"] for row in lines(file)] == ["even"]
    assert plot.stat().st_size > 1000


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Return the jobs that run, in place of their processes."""
    jobs: list[Row] = []

    def child(python: str, module: str, task: Row) -> Row:
        jobs.append(task["job"])
        if task["job"]["variant"] == "bad":
            raise environments.FailedError("ValueError: bad")
        return task["job"] | {"bits_per_dim": 4.0, "steps": 3, "parameters": 5, "estimator": "ELBO, one draw"}

    monkeypatch.setattr(environments, "child", child)
    return jobs


def test_only_what_is_missing_is_run(url: str, tmp_path: Path, ran: list[Row]) -> None:
    file = tmp_path / "rows.jsonl"
    assert run(file, url, "--seeds", "2", "none") == 0
    assert [(j["variant"], j["seed"]) for j in ran] == [("none", 0), ("none", 1)]
    assert run(file, url, "--seeds", "3", "--jobs", "2", "none", "soft") == 0
    assert {(j["variant"], j["seed"]) for j in ran[2:]} == {("none", 2), ("soft", 0), ("soft", 1), ("soft", 2)}
    for other in (["none", "--seconds", "0.2"], ["none", "--images", "3"], ["none", "--iwbo", "2"], ['none={"lr": 1}']):
        before = len(ran)
        assert run(file, url, "--seeds", "1", *other) == 0
        assert len(ran) == before + 1
    assert len(lines(file)) == len(ran)


def test_only_the_best_go_on_to_the_next_budget(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Row] = []

    def child(python: str, module: str, task: Row) -> Row:
        jobs.append(task["job"])
        bits = {1: 3.0, 2: 1.0, 3: 2.0, 4: None}[task["job"]["fields"]["batch"]]
        return task["job"] | {"bits_per_dim": bits, "steps": 3, "parameters": 5, "estimator": "ELBO, one draw"}

    monkeypatch.setattr(environments, "child", child)
    variants = [f'{name}={{"batch": {n}}}' for n, name in enumerate("abcd", 1)]
    file = tmp_path / "rows.jsonl"
    command = [*variants, "--seconds", "1", "2", "3", "--keep", "2", "1", "--seeds", "2"]
    assert density.main(["--data", url, "--json", str(file), "--images", "4", *command]) == 0
    assert ["".join(j["variant"] for j in jobs if j["seconds"] == n) for n in (1, 2, 3)] == ["abcdabcd", "bcbc", "bb"]


def test_rows_of_other_images_or_of_another_peer_are_not_taken(
    url: str, folder: Path, tmp_path: Path, ran: list[Row]
) -> None:
    file, other, changed = tmp_path / "rows.jsonl", tmp_path / "other", tmp_path / "changed"
    write_shards(other, n=30)
    changed.mkdir()
    (changed / "peer.py").write_text(PEER + "# another\n")
    for data_set, peer in ((url, folder), (str(other), folder), (url, changed), (url, folder)):
        assert run(file, data_set, "--seeds", "1", "--peer", f"even={peer}") == 0
    assert len(ran) == 3


def test_a_row_that_was_not_written_to_its_end_is_run_again(url: str, tmp_path: Path, ran: list[Row]) -> None:
    file = tmp_path / "rows.jsonl"
    assert run(file, url, "--seeds", "2", "none") == 0
    file.write_bytes(file.read_bytes()[:-9])
    assert run(file, url, "--seeds", "2", "none") == 0
    assert [j["seed"] for j in ran] == [0, 1, 1]
    assert [row["seed"] for row in lines(file)] == [0, 1]


def test_a_failed_run_leaves_the_others_their_rows(
    url: str, tmp_path: Path, ran: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    assert run(file, url, "--seeds", "1", "bad={}", "none") == 1
    assert "ValueError: bad" in capsys.readouterr().err
    assert [row["variant"] for row in lines(file)] == ["none"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing"], "nothing"),
        (["a={"], "JSON"),
        (["a=[]"], "object"),
        (['a={"level": 2}'], "level"),
        (['a={"levels": 9}'], "levels"),
        (['a={"optimizer": "adams"}'], "adams"),
        (['a={"options": {"beta": 1}}'], "beta"),
        (['a={"batch": 0}'], "batch"),
        (['a={"augment": "turn"}'], "augment"),
        (['a={"published": ["all"]}'], "published"),
        (['a={"peer": "tarflow"}'], "--peer"),
        (["--peer", "a"], "NAME=FOLDER"),
        (["--peer", "normflows=."], "normflows"),
        (["--peer", "a=/nowhere"], "peer.py"),
        (["--seconds", "nan"], "--seconds"),
        (["--seeds", "0"], "--seeds"),
        (["--keep", "2"], "--keep"),
        (["--keep", "0", "--seconds", "1", "2"], "--keep"),
        (["--data", "/nowhere", "none"], "/nowhere"),
    ],
)
def test_bad_input_is_named_before_anything_runs(
    url: str, tmp_path: Path, ran: list[Row], capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "rows.jsonl", url, *arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not ran


def test_differences_are_between_runs_of_one_seed_and_budget() -> None:
    def row(variant: str, seed: int, bits: float, seconds: float = 7) -> Row:
        own = {"variant": variant, "seed": seed, "seconds": seconds, "bits_per_dim": bits, "steps": 10, "iwbo": 1}
        return own | {"parameters": 5, "estimator": "ELBO, one draw"}

    rows = [row("a", 0, 4.0), row("a", 1, 5.0), row("b", 0, 4.1), row("b", 1, 5.1), row("b", 2, 9.0), row("b", 0, 3, 9)]
    text = density_report.table(rows, ["a", "b"]).splitlines()
    assert text[2] == "| a | 7 | 2 | 5 | 10 | ELBO | 4.500 ± 0.500 | +0.000 ± 0.000 |"
    assert text[3].endswith("| +0.100 ± 0.000 |")
    assert text[4] == "| b | 9 | 1 | 5 | 10 | ELBO | 3.000 |  |"
