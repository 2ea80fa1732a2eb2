"""The benchmark of checkpoints runs, and its table has ours as the measure."""

import json

from benchmarks import checkpoint


def test_each_way_is_measured(tmp_path, capsys):
    rows = tmp_path / "rows.json"
    assert checkpoint.main(["--megabytes", "1", "--ranks", "2", "--rounds", "1", "--json", str(rows)]) == 0
    found = json.loads(rows.read_text())
    assert [row["way"] for row in found] == [
        checkpoint.OURS,
        checkpoint.WAITED,
        checkpoint.TORCH_ASYNC,
        checkpoint.TORCH,
    ]
    assert all(0 < row["held"] <= row["written"] for row in found)
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| MB | ranks | way | held, s | to ours | written, s |"
    assert "| 1 | 2 | beside training |" in table[2]
    assert "| 1.00 |" in table[2]
