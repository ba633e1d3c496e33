"""Contexts: equal meaning has an equal digest, and an edit touches nothing but its rule."""

from __future__ import annotations

import pytest

from engrain.context import Context, Rule, Section
from engrain.errors import InputError

ACME = Section("tenant", "acme", ("refunds over  40 need\n finance", "returns within 30 days"))
PAY = Section("tool", "pay", ("pay(order: string): refund an order",))


def test_order_and_white_space_do_not_change_the_digest_and_meaning_does():
    turned = Section("tenant", "acme", ("returns within 30 days", "refunds over 40 need finance"))
    assert Context((ACME, PAY)).digest() == Context((PAY, turned)).digest()
    assert Context((ACME, PAY)).rules == Context((PAY, turned)).rules
    changed = Section("tenant", "acme", ("returns within 31 days", "refunds over 40 need finance"))
    assert Context((ACME,)).digest() != Context((changed,)).digest()


def test_a_rule_is_the_same_for_two_tenants_and_not_for_two_kinds():
    other = Section("tenant", "brown", ("returns within 30 days",))
    shared = set(Context((ACME,)).rules) & set(Context((other,)).rules)
    assert {rule.text for rule in shared} == {"returns within 30 days"}
    assert Rule("tenant", "x").digest != Rule("tool", "x").digest


def test_edits_leave_every_other_rule_alone():
    context = Context((ACME, PAY))
    rule = Rule("tenant", "returns within 30 days")
    assert set(context.without(rule).rules) == set(context.rules) - {rule}
    edited = context.replacing(rule, "returns within 60 days")
    assert set(edited.rules) == set(context.rules) - {rule} | {Rule("tenant", "returns within 60 days")}
    assert edited.replacing(Rule("tenant", "returns within 60 days"), rule.text).digest() == context.digest()


def test_an_unknown_rule_is_an_error():
    with pytest.raises(InputError, match="no tool rule 'returns"):
        Context((ACME, PAY)).without(Rule("tool", "returns within 30 days"))
