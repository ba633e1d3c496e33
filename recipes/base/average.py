"""Average bases: `python recipes/base/average.py BASE BASE ... -o OUT`.

Each anneal goes on from the one before and ends elsewhere in the same valley; their mean lies lower than any of them
(Wortsman et al., "Model soups", 2022, arXiv:2203.05482). `benchmarks/base_errors.py` tells whether it does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engrain.model import load_base, save_base, stored_dtype


def main(
    bases: Annotated[list[Path], typer.Argument(help="of one shape and tokenizer")],
    out: Annotated[Path, typer.Option("-o", help="where the mean goes")],
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
    typer.echo(
        f"{out}: {save_base(first, out)[:12]}, the mean of {', '.join(one.digest[:12] for one in (first, *others))}"
    )


if __name__ == "__main__":
    typer.run(main)
