"""``torchintro info``."""

from __future__ import annotations


def test_info_prints_the_report(run, monkeypatch):
    report = {"torchintro": "1.2.3", "a longer label": ["x", "y"]}
    monkeypatch.setattr("torchintro.cli.info.collect", lambda: report)
    assert run("info").stdout == "torchintro      1.2.3\na longer label  ['x', 'y']\n"
