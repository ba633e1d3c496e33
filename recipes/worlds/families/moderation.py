"""Moderation: members report, appeal and ask; posts are hidden or kept, strikes counted, reports passed on."""

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

MARKS = Word("visible|hidden|held|removed")

AUTHOR = (
    Jump("strict", Over("post.prior_strikes", "strike limit", likely=0.4)),
    Jump("strict", Says("first step", "mute")),
    Do("warn"),
    End("author warned"),
    "strict",
    Do("mute", {"days": By("mute days")}),
    End("author muted"),
)

FAMILY = Family(
    name="moderation",
    places="[the moderation desk|the trust team] of [a forum|a social network|a video site|a marketplace]",
    requester="member",
    records={
        "member|account|reader": Record(
            {
                "rank|trust_level": Word("newcomer|regular|veteran|partner"),
                "mode|standing": Word("active|limited|locked"),
                "strikes|own_strikes": Number(0, 10),
                "week_reports|filed_this_week": Number(0, 12),
            }
        ),
        "post|entry|upload": Record(
            {
                "medium|form": Word("text|image|video|link"),
                "risk_score|danger_score": Number(0, 99),
                "views|reach": Number(0, 900),
                "prior_strikes|author_strikes": Number(0, 14),
                "queue_mark|desk_mark": MARKS,
                "site_mark|public_mark": MARKS,
            }
        ),
        "report|complaint|notice": Record(
            {
                "member": Ref("member"),
                "post": Ref("post"),
                "reason|category": Word("spam|insult|threat|scam|hoax"),
                "severity|gravity": Word("minor|medium|serious|extreme"),
                "backers|votes": Number(1, 40),
                "hours_waiting|hours_open": Number(0, 120),
                "step|progress": Word("filed|reviewed|closed"),
            }
        ),
        "sanction|penalty|measure": Record(
            {
                "member": Ref("member"),
                "post": Ref("post"),
                "sort|penalty_type": Word("warning|mute|ban|freeze"),
                "days_since|days_passed": Number(0, 60),
                "issuer|imposed_by": Word("robot|moderator|council"),
                "past_appeals|appeals_made": Number(0, 9),
            }
        ),
    },
    rules={
        "appeal window|appeal days": Limit(7, 45, by="sanction.sort"),
        "risk ceiling|removal score": Limit(30, 90, 5, rare="report.reason"),
        "zero tolerance|instant ground": Choice(of="report.reason"),
        "binding mark|mark that counts": Choice(fields=("post.queue_mark", "post.site_mark")),
        "special team|expert team": Choice("harbor|granite|willow|ember", by="report.reason", missing=0.3),
        "first step|first answer": Choice("warn|mute"),
        "strike limit|strike ceiling": Limit(4, 9),
        "report quota|weekly quota": Limit(4, 11, by="member.rank"),
        "arbiter|second opinion": Choice("senior|legal|safety|jury"),
        "mute days|mute length": Limit(4, 30),
        "backing|backers needed": Limit(5, 30),
        "answer hours|reply hours": Limit(12, 72, 6),
    },
    actions={
        "hide|conceal|take_down": Action("post", {"ground|basis": Word("spam")}, {"queue_mark": "hidden"}),
        "restore|reinstate|put_back": Action("post", sets={"queue_mark": "visible", "site_mark": "visible"}),
        "pass_on|route|refer": Action("report", {"queue|desk": Word("harbor")}, {"step": "referred"}),
        "second_look|recheck": Action(
            "report", {"panel|judge": Word("legal")}, gives={"finding|verdict": Word("uphold|dismiss|unsure")}
        ),
        "warn|caution": Action("post"),
        "mute|silence": Action("post", {"days|span": Number(1, 99)}),
        "hear|hold_hearing": Action(
            "sanction", {"panel|judge": Word("legal")}, gives={"outcome|judgement": Word("accept|reject|reduce")}
        ),
        "lift|revoke|annul": Action("sanction", sets={"sort": "lifted"}),
        "widen|raise_cap": Action("member", {"cap|allowance": Number(1, 99)}),
        "pin|spotlight": Action("post", {"corner|spot": Word("x")}),
    },
    kinds={
        "offence|abuse report": Kind(
            "a reported offence to examine",
            (
                "[please|] examine {id} [soon|today]",
                "[I|we] ask you to examine {id}",
                "{id} is about a [bad|clear] offence",
                "[has|did] anybody [seen|look at] the offence in {id}",
            ),
            "report",
            (
                Read("report"),
                Stop("closed before", Is("report.step", "closed", likely=0.15)),
                Stop("weekly quota is used", Over("member.week_reports", "report quota")),
                Read("post", by="report.post"),
                Stop("already out of sight", Counts("binding mark", "visible", likely=0.8), unless=True),
                Jump("remove", Is("report.reason", rule="zero tolerance", likely=0.25)),
                Jump("remove", Over("post.risk_score", "risk ceiling", likely=0.4)),
                Do("second_look", {"panel": By("arbiter")}),
                Stop("kept online", Is("second_look.finding", "uphold", likely=0.6), unless=True),
                "remove",
                Do("hide", {"ground": Of("report.reason")}),
                Check("post"),
                *AUTHOR,
            ),
        ),
        "escalation|handing up": Kind(
            "a report to escalate to specialists",
            (
                "[please|] escalate {id} [now|today]",
                "{id} should go to [your|the] specialists",
                "[I|we] want {id} to be seen by specialists",
            ),
            "report",
            (
                Read("report"),
                Stop("no team for that", Says("special team", "none")),
                Jump("up", Is("report.severity", "extreme", likely=0.3)),
                Stop("not grave enough", Is("report.severity", "minor", likely=0.2)),
                Stop("too few backers", Over("report.backers", "backing", likely=0.65), unless=True),
                "up",
                Do("pass_on", {"queue": By("special team")}),
                Check("report"),
                End("escalated"),
            ),
        ),
        "appeal|objection": Kind(
            "an appeal against a sanction",
            (
                "[I|we] appeal against {id}",
                "[here is|this is] [my|our] appeal against {id}",
                "{id} is unfair, [please take my|I file an] appeal",
            ),
            "sanction",
            (
                Read("sanction"),
                Stop("window has closed", Over("sanction.days_since", "appeal window", likely=0.3)),
                Stop("council is final", Is("sanction.issuer", "council", likely=0.2)),
                Jump("lift", Is("sanction.issuer", "robot", likely=0.4)),
                Do("hear", {"panel": By("arbiter")}),
                Stop("appeal rejected", Is("hear.outcome", "accept", likely=0.6), unless=True),
                "lift",
                Do("lift"),
                Check("sanction"),
                Read("post", by="sanction.post"),
                Jump("back", Counts("binding mark", "hidden", likely=0.5)),
                End("lifted"),
                "back",
                Do("restore"),
                Check("post"),
                End("lifted, post restored"),
            ),
        ),
        "restoring|put back": Kind(
            "something hidden that its writer wants restored",
            (
                "[please|] get {id} restored [soon|]",
                "{id} was hidden by mistake, [I think|it seems]",
                "[I|we] want {id} restored, it breaks no rule",
            ),
            "post",
            (
                Read("post"),
                Stop("already visible", Counts("binding mark", "visible", likely=0.2)),
                Stop("removed for good", Counts("binding mark", "removed", likely=0.25)),
                Stop("needs an appeal", Over("post.prior_strikes", "strike limit", likely=0.3)),
                Do("restore"),
                Check("post"),
                End("restored"),
            ),
        ),
        "posting cap|daily cap": Kind(
            "a higher number of posts a day",
            (
                "[please|] let me write a higher number a day, {many}",
                "[can|may] I have a higher daily number, say {many}",
                "[I|we] need a higher daily number: {many}",
            ),
            "member",
            (
                Stop("newcomers must wait", Is("member.rank", "newcomer")),
                Jump("grant", Is("member.rank", "partner")),
                Stop("too many strikes", Over("member.strikes", "strike limit")),
                "grant",
                Do("widen", {"cap": Asked("many")}),
                End("granted"),
            ),
            {"many": Number(12, 95)},
        ),
        "strike count|strike list": Kind(
            "how many strikes somebody has",
            (
                "how many strikes do I have",
                "[please|] tell me [my strikes|how many strikes I got]",
                "[which|how many] strikes stand against me [now|]",
            ),
            "member",
            (
                Jump("many", Over("member.strikes", "strike limit")),
                End("below the limit", "member.strikes"),
                "many",
                End("over the limit", "member.strikes"),
            ),
        ),
        "rude author|scolding": Kind(
            "a rude author to be warned or muted",
            (
                "the author of {id} is rude [to me|to everybody|]",
                "[please|] do something about the rude tone of {id}",
                "{id} is [so|very] rude, talk to its author",
            ),
            "post",
            (
                Read("post"),
                Stop("not to be seen", Counts("binding mark", "visible", likely=0.8), unless=True),
                *AUTHOR,
            ),
        ),
        "private matter|exposure": Kind(
            "private things shown without leave",
            (
                "{id} shows my {what}, that is private",
                "my {what} is private, but {id} shows it",
                "[please|] keep my {what} private, {id} has it",
            ),
            "post",
            (
                Read("post"),
                Stop("no longer visible", Counts("binding mark", "visible", likely=0.75), unless=True),
                Do("hide", {"ground": Asked("what")}),
                Check("post"),
                End("covered up"),
            ),
            {"what": Word("phone|salary|photo|diary")},
        ),
        "slow report|reminder": Kind(
            "a report without an answer for many hours",
            (
                "[I|we] wait for an answer [to|about] {id}",
                "when [do|will] [I|we] get an answer to {id}",
                "{id} has had no answer [yet|for days|so far]",
            ),
            "report",
            (
                Read("report"),
                Stop("it is closed", Is("report.step", "closed", likely=0.2)),
                Jump("late", Over("report.hours_waiting", "answer hours", likely=0.5)),
                End("still within time", "report.hours_waiting"),
                "late",
                Do("pass_on", {"queue": By("arbiter")}),
                Check("report"),
                End("hurried along"),
            ),
        ),
    },
    opening=(
        Read("member"),
        Stop("account is locked", Is("member.mode", "locked", likely=0.06)),
    ),
)
