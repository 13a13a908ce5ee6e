from dataclasses import replace
from typing import Any

from benchmarks import lineage
from tests.benchmarks.reports import make_variant

SOURCE = {"stage": "source", "model": "/models/minilm"}
PRUNE = {"stage": "prune", "settings": {"heads": 0.25, "path": "/a/b/c"}, "sha256": "ab"}
EIGHT = {"stage": "quantize", "settings": {"scheme": "dynamic"}}


def variant(name: str, *entries: dict[str, Any]) -> Any:
    return replace(make_variant(name, 10, 20, 86), lineage=list(entries))


def test_what_lineages_share_is_one_stage() -> None:
    base, pruned, both, eight = (
        variant("base", SOURCE),
        variant("pruned", SOURCE, PRUNE),
        variant("both", SOURCE, PRUNE, EIGHT),
        variant("int8", SOURCE, EIGHT),
    )
    (root,) = lineage.tree([base, pruned, both, eight])
    assert (root.stage, root.settings, root.variants) == ("source", "model minilm", ["base"])
    prune, quantize = root.then
    assert (prune.settings, prune.variants) == ("heads 0.25 · path c", ["pruned"])
    assert [made.variants for made in prune.then] == [["both"]]
    assert quantize.variants == ["int8"]


def test_lineages_that_share_nothing_and_that_say_nothing() -> None:
    found = lineage.tree([variant("a", SOURCE), variant("b"), variant("c", EIGHT)])
    assert [made.stage for made in found] == ["source", "not recorded", "quantize"]
