"""Images of one step on two Ray nodes: bytes through the object store, and seconds of the driver.

Before: every hop carries the prompts with their images: prefetch, engine and back, reward worker and back, update.
After: the images are stored once, and what travels refers to them. Both sides end with the same images on each rank.

    python -m benchmarks.images [--prompts 32] [--images 12] [--megabytes 1]
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from rollout.inputs.images import bytes_of
from rollout.inputs.stored import store_images
from rollout.types import Prompt

RANKS = 2
REFERENCE_BYTES = 256


class Echo:
    """An engine, a reward worker or a rank of the learner, as far as images are concerned."""

    def same(self, prompt: Prompt) -> Prompt:
        """Return the prompt as groups did: with its images."""
        return prompt

    def bare(self, prompt: Prompt) -> Prompt:
        """Return the prompt as groups do: without them."""
        return replace(prompt, images=())

    def nothing(self, prompts: Sequence[Prompt]) -> None:
        """Receive a call for all ranks."""

    def read(self, prompts: Sequence[Prompt], rank: int) -> int:
        """Read this rank's share of the images; return a checksum."""
        share = prompts[rank::RANKS]
        return sum(sum(bytes_of(image)[:64]) for p in share for image in p.images if not isinstance(image, str))


def before(prompts: Sequence[Prompt], engine: Any, rewards: Any, ranks: Sequence[Any]) -> list[int]:
    """Send a step's prompts as they are; return the ranks' checksums."""
    whole = ray.put(prompts)
    ray.get([rank.nothing.remote(whole) for rank in ranks])
    sampled = ray.get([engine.same.remote(prompt) for prompt in prompts])
    scored = ray.get([rewards.same.remote(prompt) for prompt in sampled])
    learned = ray.put(scored)
    return ray.get([rank.read.remote(learned, index) for index, rank in enumerate(ranks)])


def after(prompts: Sequence[Prompt], engine: Any, rewards: Any, ranks: Sequence[Any]) -> list[int]:
    """Store the images once and send references; return the same."""
    stored = [store_images(prompt) for prompt in prompts]
    whole = ray.put(stored)
    ray.get([rank.nothing.remote(whole) for rank in ranks])
    ray.get([engine.bare.remote(prompt) for prompt in stored])
    ray.get([rewards.bare.remote(prompt) for prompt in stored])
    learned = ray.put(stored)
    return ray.get([rank.read.remote(learned, index) for index, rank in enumerate(ranks)])


def store_bytes(prompts: Sequence[Prompt]) -> tuple[int, int]:
    """Return the bytes that cross the object store before and after; a reference counts as its pickled size."""
    whole = sum(len(pickle.dumps(prompt)) for prompt in prompts)
    bare = sum(len(pickle.dumps(replace(prompt, images=()))) for prompt in prompts)
    images = sum(len(bytes_of(image)) for p in prompts for image in p.images if not isinstance(image, str))
    references = sum(len(p.images) for p in prompts) * REFERENCE_BYTES
    return 6 * whole, images + 4 * (bare + references) + 2 * bare


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--megabytes", type=float, default=1.0, help="of one image")
    options = parser.parse_args()
    node: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 2 << 30}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node, resources={"other": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    untyped: Any = ray.remote(Echo)
    engine, rewards, first = (untyped.options(num_cpus=0.1).remote() for _ in range(3))
    second = untyped.options(num_cpus=0.1, resources={"other": 0.1}).remote()
    rng = np.random.default_rng(0)
    size = int(options.megabytes * 2**20)
    prompts = [
        Prompt(f"p{n}", "<image>" * options.images + "?", tuple(rng.bytes(size) for _ in range(options.images)))
        for n in range(options.prompts)
    ]
    ray.get([actor.nothing.remote([]) for actor in (engine, rewards, first, second)])
    print(f"{options.prompts} prompts of {options.images} images of {options.megabytes:g} MB, two nodes\n")
    print(
        "| images | MB through the store | ratio | CPU s of the driver | ratio | seconds |\n|---|---|---|---|---|---|"
    )
    results: list[tuple[list[int], int, float]] = []
    crossing = store_bytes(prompts)
    for name, step in (("in every hop", before), ("stored once", after)):
        started, cpu = time.perf_counter(), time.process_time()
        sums = step(prompts, engine, rewards, (first, second))
        driver_s, seconds = time.process_time() - cpu, time.perf_counter() - started
        num_bytes = crossing[len(results)]
        results.append((sums, num_bytes, driver_s))
        print(
            f"| {name} | {num_bytes / 2**20:,.0f} | {results[0][1] / num_bytes:.1f} "
            f"| {driver_s:.2f} | {results[0][2] / driver_s:.1f} | {seconds:.1f} |",
            flush=True,
        )
    assert results[0][0] == results[1][0]
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
