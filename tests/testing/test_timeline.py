"""The record of a start's parts, which `benchmarks.start` reads."""

import json
import os
import time

from eiwtrain.testing import timeline


def test_a_process_notes_its_parts_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("EIWTRAIN_TIMELINE", str(tmp_path))
    began = time.time()
    timeline.mark("imports")
    timeline.mark("data")
    lines = [json.loads(line) for line in (tmp_path / f"{os.getpid()}.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == ["imports", "data"]
    assert began <= lines[0]["time"] <= lines[1]["time"] <= time.time()
    assert all(line["pid"] == os.getpid() and line["cpu"] > 0 for line in lines)


def test_without_the_variable_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("EIWTRAIN_TIMELINE", raising=False)
    monkeypatch.chdir(tmp_path)
    timeline.mark("imports")
    assert list(tmp_path.iterdir()) == []
