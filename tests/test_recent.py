from __future__ import annotations

import pytest

from engrain.recent import Recent


def test_it_is_bounded_by_size_and_keeps_what_was_used_last() -> None:
    kept = Recent[str](5, len)
    kept["a"], kept["b"] = "aa", "bbb"
    assert kept["a"] == "aa"  # used after b
    kept["c"] = "cc"
    assert "b" not in kept and kept["c"] == "cc" and kept.total == 4 and len(kept) == 2
    kept["a"] = "a"  # in place of the old one
    assert kept.total == 3
    kept["d"] = "much too large"
    assert len(kept) == 1 and kept["d"] and kept.total == 14
    assert kept.get("d", "") == kept["d"] and kept.get("a", "none") == "none"
    assert kept.pop("d") and not kept.pop("d") and kept.total == 0
    with pytest.raises(KeyError):
        kept["d"]
