"""Progress of a pass over data."""

import itertools
import re

from mambavision.running import progress


def test_slow_batches_are_logged_one_by_one(caplog, monkeypatch):
    now = itertools.count(0, 6.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: False, raising=False)
    with caplog.at_level("INFO"), progress.progress("epoch 0", 5, interval=50) as line:
        assert [line.step(lambda: "loss 1") for _ in range(5)] == [False] * 4 + [True]
    first, *_, last = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"epoch 0 \[\d/5\] loss 1  ETA 0:\d\d:\d\d", first)
    assert last == "epoch 0 [5/5] loss 1"
