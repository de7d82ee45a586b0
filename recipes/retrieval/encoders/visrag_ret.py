"""Encode pages and queries with VisRAG-Ret in an environment of its own: `python visrag_ret.py --help`.

VisRAG-Ret (MiniCPM-V 2.0) comes with code that runs under transformers 4.40 only, so this file imports nothing of the
package: copy it there. It writes the folder that `--kind imported` reads, and resumes when it is run again. The model's
own code is run only with --trust-remote-code.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("PNG", "JPEG")  # of a store's pages; Pillow reads others by starting programs
QUERY_PREFIX = "Represent this query for retrieving relevant documents: "


def weighted_mean(hidden_BTD: Any, mask_BT: Any) -> Any:
    """Return unit vectors: tokens weighted by their position among the tokens that are not padding."""
    weights_BT = (mask_BT * mask_BT.cumsum(dim=1)).to(hidden_BTD.dtype)
    pooled_BD = (hidden_BTD * weights_BT.unsqueeze(-1)).sum(dim=1) / weights_BT.sum(dim=1, keepdim=True)
    return pooled_BD / pooled_BD.norm(dim=1, keepdim=True)


def encode(model: Any, tokenizer: Any, items: Sequence[str | Path], batch_size: int) -> np.ndarray:
    """Return (N, D) float16. A page is the path of its image and goes in with an empty text; a query is a text."""
    import torch
    from PIL import Image

    parts = []
    for start in range(0, len(items), batch_size):
        chosen = items[start : start + batch_size]
        texts = [item if isinstance(item, str) else "" for item in chosen]
        images = [
            None if isinstance(item, str) else Image.open(item, formats=FORMATS).convert("RGB") for item in chosen
        ]
        with torch.no_grad():
            found = model(text=texts, image=images, tokenizer=tokenizer)
        pooled = weighted_mean(found.last_hidden_state.float(), found.attention_mask)
        parts.append(pooled.cpu().numpy().astype(np.float16))
    return np.concatenate(parts)


def encode_pages(model: Any, tokenizer: Any, store: Path, out: Path, batch_size: int, part_pages: int) -> None:
    """Write OUT/pages.npy and OUT/page_ids.txt, one part at a time; finished parts are kept."""
    import pyarrow.parquet as pq

    rows = pq.read_table(store / "pages.parquet", columns=["page_id", "image"]).to_pylist()
    parts = []
    for start in range(0, len(rows), part_pages):
        chosen = rows[start : start + part_pages]
        ids = "".join(f"{row['page_id']}\n" for row in chosen)
        part, names = out / f"part-{start:09d}.npy", out / f"part-{start:09d}.txt"
        if not (part.exists() and names.exists() and names.read_text() == ids):
            names.unlink(missing_ok=True)
            images = [store / row["image"] for row in chosen]
            _save(part, encode(model, tokenizer, images, batch_size))
            names.write_text(ids)  # marks the part as complete
        parts.append(part)
        print(f"{start + len(chosen)}/{len(rows)} pages", flush=True)
    (out / "page_ids.txt").write_text("".join(f"{row['page_id']}\n" for row in rows))
    _save(out / "pages.npy", np.concatenate([np.load(part) for part in parts]))
    for leftover in out.glob("part-*"):
        leftover.unlink()


def encode_queries(model: Any, tokenizer: Any, queries: Path, out: Path, batch_size: int) -> None:
    """Write OUT/queries.npy and OUT/queries.jsonl."""
    found = [json.loads(line) for line in queries.read_text().split("\n") if line.strip()]
    texts = [row.get("text") or row.get("query") or row["question"] for row in found]
    _save(out / "queries.npy", encode(model, tokenizer, [QUERY_PREFIX + text for text in texts], batch_size))
    (out / "queries.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


def _save(file: Path, values: np.ndarray) -> None:
    with open(f"{file}.writing", "wb") as stream:
        np.save(stream, values)
    os.replace(f"{file}.writing", file)


def main() -> None:
    """Encode what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a page store")
    parser.add_argument("--queries", type=Path, help="jsonl with text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="openbmb/VisRAG-Ret")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--part-pages", type=int, default=1024, help="the most pages that are encoded again after a crash"
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    if not options.trust_remote_code:
        parser.error("VisRAG-Ret needs code that comes with the model; add --trust-remote-code to allow it")
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, torch_dtype=torch.bfloat16).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "encoder.json").write_text(json.dumps({"model": options.model, "pooling": "weighted_mean"}))
    encode_pages(model, tokenizer, options.store, options.out, options.batch_size, options.part_pages)
    if options.queries:
        encode_queries(model, tokenizer, options.queries, options.out, options.batch_size)


if __name__ == "__main__":
    main()
