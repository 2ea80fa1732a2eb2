import io
from dataclasses import replace

import pytest

from eiwtrain.terminal import console

PROGRESS = console.TrainingLine(
    step=120, max_steps=6000, images=3840, bits_per_dim=5.1234, images_per_second=85.31, data_wait=0.012, faults=0,
    goodput=0.87, eta=3725.0,
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_training_line_has_what_a_person_needs():
    line = console.training_line(PROGRESS)
    for part in (
        "120/6,000",
        "3,840 images",
        "5.123 bits/dim (ELBO)",
        "85.3 images/s",
        "data wait 1%",
        "goodput 87%",
        "ETA 1:02:05",
    ):
        assert part in line
    assert "storage" not in line
    assert "3 storage faults retried" in console.training_line(replace(PROGRESS, faults=3))


def test_the_training_line_has_costs_where_there_are_prices():
    assert "cost" not in console.training_line(PROGRESS)
    line = console.training_line(replace(PROGRESS, cost=1234.5, cost_at_end=9000.0, wasted=0.0021))
    assert "cost 1,234.50 of 9,000.00, 0.0021 wasted" in line


def test_without_a_terminal_each_line_stands_alone(capsys):
    c = console.Console()
    c.progress(PROGRESS)
    c.note("hello")
    out = capsys.readouterr().out
    assert out.splitlines() == [console.training_line(PROGRESS), "hello"]
    assert "\r" not in out


def test_a_terminal_line_is_overwritten_and_notes_stay(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    c = console.Console()
    c.progress(PROGRESS)
    c.progress(PROGRESS)
    c.note("hello")
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().endswith("\r\033[Khello\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65, "1:05"), (7384, "2:03:04"), (2_073_900, "24d 00:05"), (-3, "0:00")]
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text
