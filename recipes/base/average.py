"""Average bases: `python recipes/base/average.py BASE BASE ... -o OUT`.

Each anneal goes on from the one before and ends elsewhere in the same valley; their mean lies lower than any of them
(Wortsman et al., "Model soups", 2022, arXiv:2203.05482). `benchmarks/base_errors.py` tells whether it does. The card of
the mean holds the cards of all of them, but for their probes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from make import PROBES, opening, write_card

from engrain.model import load_base, save_base, stored_dtype

MEAN = """\
The weights are the mean of those of the bases below (`recipes/base/average.py`).

"""


def main(
    bases: Annotated[list[Path], typer.Argument(help="of one shape and tokenizer")],
    out: Annotated[Path, typer.Option("-o", help="where the mean goes")],
    probes: Annotated[Path | None, typer.Option(help="where `engrain base probe` measured it, for the card")] = None,
) -> None:
    first, *others = (load_base(path) for path in bases)
    if any(one.tokenizer.get_vocab() != first.tokenizer.get_vocab() for one in others):
        raise typer.BadParameter("expected bases with one tokenizer; average those that one recipe made")
    total = {name: weight / len(bases) for name, weight in first.model.state_dict().items()}
    for one in others:
        for name, weight in one.model.state_dict().items():
            total[name] += weight / len(bases)
    first.model.load_state_dict(total)
    first.model.to(stored_dtype(bases[0]))  # type: ignore[arg-type]
    digests = [one.digest for one in (first, *others)]
    parameters = sum(parameter.numel() for parameter in first.model.parameters())
    own = "\n".join(how_made(path, digest, parameters) for path, digest in zip(bases, digests, strict=True))
    digest = save_base(first, out)
    write_card(out, parameters, MEAN + own, probes)
    typer.echo(f"{out}: {digest[:12]}, the mean of {', '.join(one[:12] for one in digests)}")


def how_made(base: Path, digest: str, parameters: int) -> str:
    """A part of the mean's card: what the card of one of its bases says of how that came to be."""
    if not (base / "README.md").is_file():
        raise typer.BadParameter(f"{base}: expected README.md, its card; average bases as the recipe left them")
    card = (base / "README.md").read_text(encoding="utf-8").removeprefix(opening(parameters))
    return f"## {digest[:12]}\n\n{card.partition(PROBES)[0].rstrip()}\n"


if __name__ == "__main__":
    typer.run(main)
