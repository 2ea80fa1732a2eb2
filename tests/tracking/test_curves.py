import re
from pathlib import Path

import eiwtrain
from eiwtrain.tracking.curves import LOST_TIME, MEANINGS
from eiwtrain.train.goodput import KINDS

ROOT = Path(eiwtrain.__file__).parents[1]


def test_the_page_on_mlflow_lists_exactly_these_curves():
    table = (
        (ROOT / "docs" / "mlflow.md").read_text().partition("| curve | meaning |\n|---|---|\n")[2].partition("\n\n")[0]
    )
    assert table.splitlines() == [f"| `{name}` | {meaning} |" for name, meaning in MEANINGS.items()]


def test_no_other_file_names_a_curve_by_itself():
    name = re.compile(f"""["']({"|".join({curve.split("/")[0] for curve in MEANINGS})})/""")
    files = set((ROOT / "eiwtrain").rglob("*.py")) - {ROOT / "eiwtrain" / "tracking" / "curves.py"}
    assert [str(f) for f in files if name.search(f.read_text())] == []


def test_each_kind_of_time_that_is_not_productive_has_a_curve():
    assert set(LOST_TIME) == {*KINDS, "other"} - {"productive"}
