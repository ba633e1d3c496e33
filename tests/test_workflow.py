"""Workflows: the context that a compiled agent's prompt leaves out, and tenants that come later."""

from __future__ import annotations

import pytest
from desk import workflow

from engrain.context import Context, Section
from engrain.errors import WorkflowError


def test_a_context_holds_what_is_named():
    assert workflow.context("acme") == Context((workflow.tenants["acme"],))
    assert workflow.context("") == Context()
    context = workflow.context("acme", phase="look", tool="refund_order")
    assert [(one.kind, one.name) for one in context.sections] == [
        ("tenant", "acme"),
        ("phase", "look"),
        ("tool", "refund_order"),
    ]
    assert {rule.text for rule in context.rules} == {
        "Refund at most 50 euros.",
        "look: find the order.",
        "look: call only find_order",
        "refund_order: Pay the amount of an order back",
        "refund_order.order_id (string, required): The order's number",
        "refund_order.amount (integer, required): How much, in euros",
    }


def test_an_unknown_name_is_an_error():
    for arguments, message in (
        (("initech",), "unknown tenant 'initech'; this workflow has .*'acme', 'globex'"),
        (("acme", "rest"), "unknown phase 'rest'; this workflow has .*'act', 'look'"),
        (("acme", "", "buy"), "unknown tool 'buy'; this workflow has .*'find_order'"),
    ):
        with pytest.raises(WorkflowError, match=message):
            workflow.context(*arguments)


def test_a_tenant_can_come_later():
    section = Section("tenant", "initech", ("Refund at most 7 euros.",))
    more = workflow.with_tenant(section)
    assert more.context("initech") == Context((section,))
    assert "Refund at most 7 euros." in more.system("initech", "full")
    assert "initech" not in workflow.tenants and more.context("acme") == workflow.context("acme")
    with pytest.raises(WorkflowError, match="expected a tenant's section, got phase 'look'"):
        workflow.with_tenant(Section("phase", "look", ("find the order.",)))
