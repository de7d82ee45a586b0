"""Encode pages and queries with VisRAG-Ret in an environment of its own: `python visrag_ret.py --help`.

VisRAG-Ret (MiniCPM-V 2.0) comes with code that runs under transformers 4.40 only, so this file imports nothing of the
package: copy it there. It writes the folder that `--kind imported` reads. The model's own code is run only with
--trust-remote-code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUERY_PREFIX = "Represent this query for retrieving relevant documents: "


def weighted_mean(hidden_BTD: Any, mask_BT: Any) -> Any:
    """Return unit vectors: tokens weighted by their place among the tokens that are not padding."""
    weights_BT = (mask_BT * mask_BT.cumsum(dim=1)).to(hidden_BTD.dtype)
    pooled_BD = (hidden_BTD * weights_BT.unsqueeze(-1)).sum(dim=1) / weights_BT.sum(dim=1, keepdim=True)
    return pooled_BD / pooled_BD.norm(dim=1, keepdim=True)


def encode(model: Any, tokenizer: Any, texts: Sequence[str], images: Sequence[Any], batch_size: int) -> np.ndarray:
    """Return (N, D) float16: a page is an image with an empty text, a query a text with no image."""
    import torch

    parts = []
    for start in range(0, len(texts), batch_size):
        chosen = slice(start, start + batch_size)
        with torch.no_grad():
            found = model(text=list(texts[chosen]), image=list(images[chosen]), tokenizer=tokenizer)
        pooled = weighted_mean(found.last_hidden_state.float(), found.attention_mask)
        parts.append(pooled.cpu().numpy().astype(np.float16))
    return np.concatenate(parts)


def main() -> None:
    """Encode what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a page store")
    parser.add_argument("--queries", type=Path, help="jsonl with text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="openbmb/VisRAG-Ret")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()
    if not options.trust_remote_code:
        parser.error("VisRAG-Ret runs code that comes with it: consent with --trust-remote-code")
    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, torch_dtype=torch.bfloat16).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "encoder.json").write_text(json.dumps({"model": options.model, "pooling": "weighted_mean"}))
    rows = pq.read_table(options.store / "pages.parquet", columns=["page_id", "image"]).to_pylist()
    parts = []
    for start in range(0, len(rows), options.batch_size):
        chosen = rows[start : start + options.batch_size]
        images = [Image.open(options.store / row["image"]).convert("RGB") for row in chosen]
        parts.append(encode(model, tokenizer, [""] * len(images), images, options.batch_size))
        print(f"{start + len(chosen)}/{len(rows)} pages", flush=True)
    np.save(options.out / "pages.npy", np.concatenate(parts))
    (options.out / "page_ids.txt").write_text("".join(f"{row['page_id']}\n" for row in rows))
    if options.queries:
        found = [json.loads(line) for line in options.queries.read_text().splitlines() if line.strip()]
        texts = [row.get("text") or row.get("query") or row["question"] for row in found]
        prefixed = [QUERY_PREFIX + text for text in texts]
        np.save(
            options.out / "queries.npy", encode(model, tokenizer, prefixed, [None] * len(texts), options.batch_size)
        )
        (options.out / "queries.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


if __name__ == "__main__":
    main()
