"""Invoices: accounts payable pays bills against orders, within tolerances, currencies, terms and approvals."""

from worlds.spec import (
    Action,
    Asked,
    By,
    Check,
    Choice,
    Counts,
    Do,
    End,
    Family,
    Is,
    Jump,
    Kind,
    Limit,
    Number,
    Of,
    Over,
    Read,
    Record,
    Ref,
    Says,
    Stop,
    Word,
)

RELEASE = (
    Stop("no approver known", Says("approving team", "none")),
    Do("request_approval", {"team": By("approving team")}),
    Stop("refused by approver", Is("request_approval.answer", "granted", likely=0.7), unless=True),
)

FAMILY = Family(
    name="invoices",
    places="[accounts payable|the invoice desk|the bookkeeping office] of a [hospital|university|factory|city council]",
    requester="buyer",
    records={
        "buyer|purchaser|officer": Record(
            {
                "grade|seniority|position": Word("junior|senior|head"),
                "training|policy_course|course_state": Word("current|expired|planned"),
                "building|campus|wing": Word("north|south|harbor|hill"),
            }
        ),
        "invoice|bill|voucher": Record(
            {
                "vendor": Ref("vendor"),
                "order": Ref("order"),
                "amount|total|gross": Number(50, 4800),
                "currency|tender|billing_currency": Word("euro|dollar|pound|franc|yen"),
                "price_gap|price_variance|markup_percent": Number(0, 30),
                "age_days|days_open|days_outstanding": Number(0, 120),
                "issued_on|invoice_date|billed_on": Number(0, 340, day=True),
                "twin_check|copy_check|match_scan": Word("single|similar|identical"),
                "cost_line|expense_class|ledger": Word("freight|energy|software|cleaning|rent"),
                "status|progress": Word("received|matched|approved|paid"),
                "posting|booking": Word("received|matched|approved|paid"),
            }
        ),
        "order|contract|requisition": Record(
            {
                "buyer": Ref("buyer"),
                "department|division|section": Word("lab|fleet|kitchen|office|garage"),
                "receipt|goods_receipt|intake": Word("awaited|partial|complete"),
                "units_short|shortfall|quantity_gap": Number(0, 40),
                "budget_used|spent_percent|budget_share": Number(20, 130),
                "phase|stage": Word("open|frozen|closed"),
            }
        ),
        "vendor|supplier|seller": Record(
            {
                "standing|rating|vendor_class": Word("preferred|regular|trial|barred"),
                "bank_check|account_check|details_check": Word("confirmed|pending|failed"),
                "country|seat|home_market": Word("france|poland|japan|brazil"),
            }
        ),
    },
    rules={
        "approval threshold|free amount|signing limit": Limit(400, 4400, 200, by="buyer.grade"),
        "price tolerance|price margin|allowed gap": Limit(4, 24, rare="invoice.cost_line"),
        "unit tolerance|count margin": Limit(4, 30),
        "book currency|house currency|base currency": Choice(of="invoice.currency"),
        "approving team|signing team|release desk": Choice(
            "treasury|controlling|audit|purchasing", by="order.department", missing=0.3
        ),
        "similar bills|lookalike rule": Choice("reject|review|ignore"),
        "valid status|status that counts|status source": Choice(fields=("invoice.status", "invoice.posting")),
        "payment term|due time|days to pay": Limit(14, 90, 2, by="invoice.cost_line"),
        "paying bank|house bank": Choice("granite|crown|meridian|lantern"),
        "budget cap|spending cap": Limit(60, 110, 5),
        "closing date|books closed on": Limit(60, 320, day=True),
        "dispute window|claim period": Limit(20, 100, 5),
        "no advances|barred grade": Choice(of="buyer.grade"),
    },
    actions={
        "pay|disburse|pay_out": Action(
            "invoice", {"amount|sum": Number(1, 9999), "bank|source": Word("crown")}, {"status": "paid"}
        ),
        "request_approval|seek_consent|ask_release": Action(
            "invoice", {"team|desk": Word("audit")}, gives={"answer|verdict|decision": Word("granted|refused")}
        ),
        "hold|park|suspend": Action("invoice", {"days|period": Number(1, 120)}, {"status": "held"}),
        "void|cancel|strike_out": Action("invoice", sets={"status": "void"}),
        "count_goods|ask_warehouse|query_stock": Action(
            "order", gives={"reply|stock_answer|count_result": Word("full|short|damaged")}
        ),
        "claim_credit|demand_credit": Action("order", {"units|quantity": Number(1, 99)}),
        "advance|prepay": Action("order", {"amount|sum": Number(1, 9999), "bank|source": Word("crown")}),
        "update_bank|change_account": Action("vendor", {"account|bank_account": Number(1000, 9999)}),
        "archive|scan|file": Action("invoice"),
    },
    kinds={
        "settlement|payment run": Kind(
            "an invoice to settle, a payout",
            (
                "[please|could you] settle {id} [today|this week]",
                "{id} [is ready|looks fine], please settle it",
                "[start|make|release] the payout [for|of] {id}",
                "can you settle {id} [for me|]",
            ),
            "invoice",
            (
                Read("invoice"),
                Stop("rejected, wrong currency", Is("invoice.currency", rule="book currency", likely=0.8), unless=True),
                Jump("unique", Is("invoice.twin_check", "single", likely=0.6)),
                Stop("rejected, identical copy", Is("invoice.twin_check", "identical", likely=0.2)),
                Stop("similar bill exists", Says("similar bills", "reject")),
                "unique",
                Stop("after the closing", Over("invoice.issued_on", "closing date", likely=0.2)),
                Read("order", "invoice.order"),
                Stop("waiting for goods", Is("order.receipt", "complete", likely=0.75), unless=True),
                Jump("small", Over("invoice.amount", "approval threshold", likely=0.5), unless=True),
                *RELEASE,
                "small",
                Do("pay", {"amount": Of("invoice.amount"), "bank": By("paying bank")}),
                Check("invoice"),
                End("paid in full", "invoice.amount"),
            ),
        ),
        "price dispute|overpricing": Kind(
            "an invoice priced too high, overcharged",
            (
                "{id} is priced above [what we agreed|the offer]",
                "we were overcharged [on|in] {id}",
                "{id} [seems|looks] overcharged, [look into it|what now]",
                "[I believe|it seems that] {id} is priced too high",
            ),
            "invoice",
            (
                Read("invoice"),
                Stop("paid before dispute", Counts("valid status", "paid", likely=0.2)),
                Stop("within tolerance", Over("invoice.price_gap", "price tolerance", likely=0.7), unless=True),
                Stop("dispute too late", Over("invoice.age_days", "dispute window", likely=0.3)),
                Do("hold", {"days": By("dispute window")}),
                Check("invoice"),
                End("held for dispute", "invoice.price_gap"),
            ),
        ),
        "short delivery|goods not received": Kind(
            "goods that came short or incomplete",
            (
                "the [delivery|consignment] on {id} was incomplete",
                "{id} came in short [again|]",
                "[I think|] we are short of goods on {id}",
                "[my|the] goods from {id} are incomplete",
            ),
            "order",
            (
                Read("order"),
                Stop("order is closed", Is("order.phase", "closed", likely=0.2)),
                Jump("counted", Is("order.receipt", "partial", likely=0.45)),
                Do("count_goods"),
                Stop("all goods arrived", Is("count_goods.reply", "full", likely=0.35)),
                Jump("claim", Is("count_goods.reply", "damaged", likely=0.3)),
                "counted",
                Stop("shortfall is small", Over("order.units_short", "unit tolerance", likely=0.65), unless=True),
                "claim",
                Do("claim_credit", {"units": Of("order.units_short")}),
                Check("order"),
                End("credit claimed", "order.units_short"),
            ),
        ),
        "prepayment|down payment": Kind(
            "money in advance, a deposit",
            (
                "[pay|send] an advance of {sum} on {id}",
                "{id} needs a deposit of {sum}",
                "[please|] release a deposit of {sum} for {id}",
                "they [want|ask for] {sum} in advance for {id}",
            ),
            "order",
            (
                Read("order"),
                Stop("order not open", Is("order.phase", "open", likely=0.75), unless=True),
                Stop("grade not allowed", Is("buyer.grade", rule="no advances")),
                Stop("budget is spent", Over("order.budget_used", "budget cap", likely=0.3)),
                Do("advance", {"amount": Asked("sum"), "bank": By("paying bank")}),
                Check("order"),
                End("deposit paid"),
            ),
            {"sum": Number(100, 3000)},
        ),
        "vendor details|changed details": Kind(
            "a new bank account",
            (
                "the bank account of {id} is [now|] {account}",
                "{id} [moved|switched] to account {account}",
                "[change|set] the bank details of {id} to {account}",
            ),
            "vendor",
            (
                Read("vendor"),
                Stop("seller is barred", Is("vendor.standing", "barred", likely=0.2)),
                Stop("details not confirmed", Is("vendor.bank_check", "confirmed", likely=0.7), unless=True),
                Do("update_bank", {"account": Asked("account")}),
                Check("vendor"),
                End("account changed"),
            ),
            {"account": Number(1000, 9999)},
        ),
        "withdrawal|retraction": Kind(
            "an invoice to withdraw or retract",
            (
                "[please|kindly] withdraw {id} [again|now]",
                "{id} was sent by mistake, [please|] withdraw it",
                "the seller [wants|asks us] to retract {id}",
                "[can|could] you retract {id}",
            ),
            "invoice",
            (
                Read("invoice"),
                Stop("paid, too late", Counts("valid status", "paid", likely=0.2)),
                Jump("strike", Counts("valid status", "approved", likely=0.5), unless=True),
                Read("order", "invoice.order"),
                *RELEASE,
                "strike",
                Do("void"),
                Check("invoice"),
                End("withdrawn"),
            ),
        ),
        "maturity|due date": Kind(
            "invoices that may be overdue or mature",
            (
                "is {id} overdue [by now|already|yet]",
                "[tell me|let me know] if {id} is overdue",
                "does {id} mature [soon|this week]",
            ),
            "invoice",
            (
                Read("invoice"),
                Jump("late", Over("invoice.age_days", "payment term", likely=0.5)),
                End("not due yet", "invoice.age_days"),
                "late",
                End("overdue", "invoice.age_days"),
            ),
        ),
        "budget state|spending": Kind(
            "how much budget an order has used",
            (
                "how much budget is [left|gone] on {id}",
                "what share of {id} is used [by now|up]",
                "tell me the budget [state|use] of {id}",
            ),
            "order",
            (Read("order"), End("share spent", "order.budget_used")),
        ),
        "double billing|copy search": Kind(
            "a duplicate, billed twice",
            (
                "could {id} [perhaps|maybe|] be a duplicate",
                "{id} may be billed twice, [check it|have a look]",
                "[I think|it seems] {id} is a duplicate",
                "[did they|did the seller] send {id} twice",
            ),
            "invoice",
            (
                Read("invoice"),
                Stop("one of a kind", Is("invoice.twin_check", "single", likely=0.3)),
                Jump("copy", Is("invoice.twin_check", "identical", likely=0.35)),
                Stop("similar but allowed", Says("similar bills", "ignore")),
                Jump("copy", Says("similar bills", "reject")),
                Do("hold", {"days": By("dispute window")}),
                Check("invoice"),
                End("held for review"),
                "copy",
                Do("void"),
                Check("invoice"),
                End("voided as copy"),
            ),
        ),
    },
    opening=(
        Read("buyer"),
        Stop("buyer needs training", Is("buyer.training", "expired", likely=0.05)),
    ),
)
