"""The families of drafts: every entry has its code, and a draft belongs to one of them."""

import re
from pathlib import Path

import pytest
import torch

import draftwing
from draftwing.drafts.family import Family, Kind
from draftwing.drafts.kinds import FAMILIES, family_of, family_of_draft, methods, resolve_method, suitable_draft
from draftwing.drafts.medusa.network import MedusaConfig, MedusaModel
from draftwing.embedded import EMBEDDED_DRAFTS
from draftwing.engine.tree_plan import TreePlan

SOURCES = Path(draftwing.__file__).parent


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_entry_has_its_code_its_plans_and_its_embedded_drafts(family: Family) -> None:
    assert isinstance(family.kind, Kind)
    for method in family.methods:
        assert family_of(method.name) is family
        assert not family.needs_draft or suitable_draft("tiny", method.name) in EMBEDDED_DRAFTS
        if method.plan != "auto" and (plan := TreePlan.parse(method.plan)).depth:
            family.check_plan(plan, method.name)


def test_methods_have_different_names() -> None:
    assert len(set(methods())) == len(methods())


def test_a_loaded_draft_belongs_to_one_family_which_has_the_default_method() -> None:
    heads = MedusaModel(MedusaConfig(8, 16, num_heads=2))
    assert [family.name for family in FAMILIES if family.kind.owns(heads)] == ["Medusa heads"]
    assert resolve_method(None, heads) == "medusa"
    with pytest.raises(ValueError, match="method: eagle3 cannot use this draft, which is Medusa heads"):
        resolve_method("eagle3", heads)


def test_what_is_no_draft_is_refused_by_its_type() -> None:
    with pytest.raises(ValueError, match=r"draft: expected an EAGLE-1/2 head, .* or a language model, got Linear"):
        family_of_draft(torch.nn.Linear(2, 2))


def test_an_unknown_method_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"method: expected one of plain, ngram, .*draft_model, got 'eagle4'"):
        suitable_draft("tiny", "eagle4")


def test_nothing_outside_a_room_asks_what_a_draft_is() -> None:
    """Training makes drafts, so it knows their networks, and `prepare` stores features for its objectives."""
    networks = re.compile(r"isinstance\([^)]*\b(EagleModel|Eagle3Model|MedusaModel|DraftNetwork)\b")
    names = re.compile(rf"[=!]= \"({'|'.join(methods())})\"")
    for path in SOURCES.rglob("*.py"):
        name, text = str(path.relative_to(SOURCES)), path.read_text(encoding="utf-8")
        if not name.startswith(("drafts/eagle/", "drafts/medusa/", "training/", "cli/prepare.py", "config.py")):
            assert not networks.search(text), name
            assert not names.search(text), name
