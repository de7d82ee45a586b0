"""How long a step waits for its checkpoint: written at once, and in the background. Both read back the same state.

python benchmarks/checkpoint.py [--hidden 1024] [--layers 8] [--threads 1]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    """Save the state of one learner in both ways and print both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the random model")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the random model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Print the seconds that a step waits, and the seconds until the checkpoint is there."""
    import numpy as np
    import torch

    from recipes.demo.model import build_model, save_model_folder, train_tokenizer
    from rollout.config import InputsConfig
    from rollout.types import Prompt
    from rsgrpo.config.learner import LearnerConfig, ModelConfig
    from rsgrpo.learning.learner import Learner
    from rsgrpo.types import Sample, TrainGroup

    tokenizer = train_tokenizer(["a page and a question"] * 50, vocab_size=300)
    heads = options.hidden // 64
    model = build_model(
        tokenizer, hidden_size=options.hidden, num_layers=options.layers, num_heads=heads, num_kv_heads=heads
    )
    save_model_folder(model, tokenizer, folder / "model")
    settings = LearnerConfig(device="cpu", precision="float32", num_threads=options.threads, lr=1e-4)
    model_config = ModelConfig(path=str(folder / "model"))
    learner = Learner(model_config, settings, InputsConfig(), total_steps=9)
    ones = np.ones((1, 8), dtype=bool)
    samples = tuple(
        Sample(np.arange(8) + index, ones, np.full((1, 8), sign, dtype=np.float32))
        for index, sign in enumerate((1.0, -1.0))
    )
    groups = [TrainGroup(Prompt("p", "a question"), samples)]
    learner.update(groups, [1.0])

    waited: dict[str, float] = {}
    whole: dict[str, float] = {}
    saves: dict[str, Callable[[Path], Any]] = {"at once": learner.save, "in the background": learner.begin_save}
    for name, save in saves.items():
        target = folder / name
        since = time.perf_counter()
        save(target)
        waited[name] = time.perf_counter() - since
        while not learner.is_saved():
            time.sleep(0.01)
        whole[name] = time.perf_counter() - since
        again = Learner(model_config, settings, InputsConfig(), total_steps=9)
        again.load(target)
        for (key, one), (_, other) in zip(learner.gather_weights(), again.gather_weights(), strict=True):
            assert torch.equal(one, other), key
    num_bytes = sum(path.stat().st_size for path in (folder / "at once").rglob("*") if path.is_file())
    print(
        f"a checkpoint of {num_bytes / 1e9:.2f} GB, {options.threads} thread(s); both sides read back equal weights\n"
    )
    print("| written | the step waits, s | ratio | whole after, s |\n|---|---|---|---|")
    for name in saves:
        print(f"| {name} | {waited[name]:.2f} | {waited['at once'] / waited[name]:.1f} | {whole[name]:.2f} |")


if __name__ == "__main__":
    main()
