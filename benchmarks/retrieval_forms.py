"""Pairs of handwritten forms and their content in words: `python -m benchmarks.retrieval_forms --out demo/retrieval`.

A page shows two scanned digits, a code and an amount; its query says them. 100 held-out pages, one for each content,
are of scans that training never sees. Afterwards:

    python -m recipes.train_retriever recipe=forms base_model=demo/model
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from recipes.forms import Scans, Split, draw_pool

PER_CONTENT: dict[Split, int] = {"train": 30, "val": 1}


def main() -> None:
    """Write train.jsonl and held_out.jsonl with their pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/retrieval"))
    out = parser.parse_args().out
    scans, rng = Scans(), Random(0)
    names: dict[Split, str] = {"train": "train", "val": "held_out"}
    for split, name in names.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for number, page in enumerate(draw_pool(scans, split, PER_CONTENT[split], rng)):
            scans.render(page).save(folder / f"{number:05d}.png")
            query = f"code {page.code} amount {page.amount}"
            rows.append({"query": query, "image": f"{name}/{number:05d}.png"})
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} pairs: {out / name}.jsonl")


if __name__ == "__main__":
    main()
