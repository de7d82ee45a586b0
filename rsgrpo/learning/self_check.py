"""Compare the shared-prefix forward with transformers' own, once at the start of a run and on the real weights.

Blank images are run once too: a model that does not look at its images is caught before it is trained.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import torch

from rollout.inputs.processor import PromptInputs
from rsgrpo.learning.packing import EncodedResponse, build_micro_batch
from rsgrpo.learning.passes import move
from rsgrpo.learning.policy import PlainRow, Policy
from rsgrpo.learning.prompt_store import PromptEncoder, PromptStore
from rsgrpo.learning.response_rows import response_row
from rsgrpo.types import MicroBatch, RsgrpoError, TrainGroup

logger = logging.getLogger(__name__)

# Largest mean |difference| of logprobs: float32 forwards differ by rounding, bfloat16 ones by its noise.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_NUM_SAMPLES = 2


def check_policy(
    policy: Policy, prompts: PromptStore, encoder: PromptEncoder, groups: Sequence[TrainGroup], device: torch.device
) -> None:
    """Compare the shared-prefix log-probabilities of the smallest group with the plain forward's. Collective.

    Raises:
        RsgrpoError: they differ, or blank images change nothing.
    """
    lengths = prompts.count_tokens([group.prompt for group in groups])
    has_images = any(group.prompt.images for group in groups)
    candidates = [index for index, group in enumerate(groups) if group.prompt.images or not has_images]
    group = groups[min(candidates, key=lambda index: (lengths[index], index))]
    samples = group.samples[:_NUM_SAMPLES]
    rows = [response_row(f"group {group.prompt.id}, sample {index}", sample) for index, sample in enumerate(samples)]
    has_images = has_images or any(row is not None and row.images for row in rows)
    encoded = [
        None if row is None else EncodedResponse(prompts.encode(row), torch.from_numpy(row.own_T)) for row in rows
    ]
    batch = move(build_micro_batch([(prompts.encode(group.prompt), samples)], encoded=encoded), device)
    inputs = encoder.encode(group.prompt)
    policy.eval()
    with torch.no_grad():
        shared_N = policy(batch, 1.0, False).logprobs_N
        plain_rows = [
            _plain_row(inputs, sample.token_ids_T, np.arange(len(sample.token_ids_T)), (), device)
            if row is None
            else _plain_row(inputs, row.token_ids_R, row.own_T, [encoder.encode_images(row.images)], device)
            for sample, row in zip(samples, rows, strict=True)
        ]
        plain = [policy(row, 1.0, False) for row in plain_rows]
        plain_N = torch.cat([scores.logprobs_N for scores in plain])
        difference = (shared_N - plain_N).abs()
        tolerance = _TOLERANCE[policy.compute_dtype]
        logger.info("self-check: shared-prefix logprobs differ by %.2g on average", difference.mean().item())
        if not difference.mean() <= tolerance:
            raise RsgrpoError(
                f"learner.self_check: on prompt {group.prompt.id} the shared-prefix logprobs differ from the plain "
                f"forward's by {difference.mean():.3g} on average and {difference.max():.3g} at most (limit "
                f"{tolerance:g} on average): this model does not work with torch {torch.__version__} and the attention "
                "kernel. Try learner.attention=sdpa"
            )
        if has_images and torch.equal(shared_N, policy(_blank(batch), 1.0, False).logprobs_N):
            raise RsgrpoError(
                f"learner.self_check: blank images give exactly the same logprobs on prompt {group.prompt.id}: the "
                "model does not see its images. Check the model's folder and its processor"
            )


def _plain_row(
    inputs: PromptInputs, response_R: np.ndarray, own_T: np.ndarray, read: Sequence[PromptInputs], device: torch.device
) -> PlainRow:
    """Return a prompt with one response, of which the tokens at `own_T` are scored.

    read: the images of the response.
    """
    pixels = [part.pixel_values for part in (inputs, *read) if part.pixel_values is not None]
    grids = [part.image_grid_thw for part in (inputs, *read) if part.image_grid_thw is not None]
    return PlainRow(
        token_ids_T=torch.tensor([*inputs.token_ids_T, *response_R.tolist()], device=device),
        scored_N=torch.from_numpy(len(inputs.token_ids_T) + own_T).to(device),
        pixel_values=torch.cat(pixels).to(device) if pixels else None,
        image_grid_thw=torch.cat(grids).to(device) if grids else None,
        video_steps=tuple(step for part in (inputs, *read) for step in part.video_steps),
    )


def _blank(batch: MicroBatch) -> MicroBatch:
    features = None if batch.features is None else torch.zeros_like(batch.features)
    pixels = None if batch.pixel_values is None else torch.zeros_like(batch.pixel_values)
    return dataclasses.replace(batch, features=features, pixel_values=pixels)
