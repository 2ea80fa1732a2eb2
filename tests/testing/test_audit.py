"""The audit's lines."""

import json

from eiwtrain.testing.audit import Audit


def test_a_file_for_each_worker_with_a_line_for_each_event(monkeypatch, tmp_path):
    monkeypatch.setenv("EIWTRAIN_AUDIT", str(tmp_path / "audit"))
    for rank in range(2):
        audit = Audit(rank, 2, step=5)
        audit.made(5, [3, rank])
    files = sorted((tmp_path / "audit").iterdir())
    assert len(files) == 2
    rows = sorted((json.loads(line) for f in files for line in f.read_text().splitlines()), key=lambda r: r["rank"])
    assert [r.get("restored") for r in rows] == [5, None, 5, None]
    assert rows[1].items() >= {"rank": 0, "world_size": 2, "step": 5, "indices": [3, 0]}.items()
    assert rows[0]["time"] <= rows[1]["time"]


def test_off_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("EIWTRAIN_AUDIT", raising=False)
    monkeypatch.chdir(tmp_path)
    Audit(0, 1, 0).made(0, [1])
    assert not list(tmp_path.iterdir())
