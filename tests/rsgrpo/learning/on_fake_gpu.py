"""The learner's own path on a device without kernels: `python -m tests.rsgrpo.learning.on_fake_gpu`.

Tensors have shapes and a device, but no storage. As on a GPU, tensors of two devices do not mix. The device belongs to
the process for good, so that a test starts this as a program.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoConfig, AutoModelForImageTextToText

from rsgrpo.algorithm.loss import SurrogateConfig, policy_loss, step_totals
from rsgrpo.config.train import AlgorithmConfig
from rsgrpo.learning import attention
from rsgrpo.learning.packing import EncodedPrompt, build_micro_batch
from rsgrpo.learning.passes import move
from rsgrpo.learning.policy import Policy
from rsgrpo.types import MicroBatch, Sample

ALGORITHMS = {
    "token": AlgorithmConfig(),
    "old, reference, cap": AlgorithmConfig(on_policy_shortcut=False, kl_coef=0.1, importance_cap=2.0),
    "cispo, entropy": AlgorithmConfig(ratio="cispo", entropy_coef=0.01),
}


def main() -> None:
    """Print one line of JSON for each algorithm: devices of loss, metrics and gradients."""
    _setup_privateuseone_for_python_backend("fakegpu")
    gpu = torch.device("fakegpu", 0)
    prompt, samples = make_group(num_image_tokens=2000)
    before = [sample.rollout_logprobs_T for sample in samples if sample.rollout_logprobs_T is not None]
    rows = {  # of real tensors: their values lay them out
        name: build_micro_batch([(prompt, samples)], None if algorithm.on_policy_shortcut else before)
        for name, algorithm in ALGORITHMS.items()
    }
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True) as mode:
        make_fake_take(gpu)
        policy = seven_b_wide(gpu)
        for name, algorithm in ALGORITHMS.items():
            batch = move(without_storage(rows[name], mode), gpu)
            print(json.dumps({"algorithm": name} | step(policy, batch, samples, algorithm, gpu)))
        try:
            policy(dataclasses.replace(batch, targets_N=batch.targets_N.cpu()), 1.0, False)
        except RuntimeError as error:
            print(json.dumps({"forgotten on the CPU": type(error).__name__}))


def step(
    policy: Policy, batch: MicroBatch, samples: list[Sample], algorithm: AlgorithmConfig, gpu: torch.device
) -> dict[str, Any]:
    """Run forward, loss and backward; return the devices of everything that they made."""
    surrogate = SurrogateConfig.of(algorithm)
    loss_of = partial(policy_loss, totals=step_totals(samples, [1.0, 1.0], gpu), config=surrogate)
    scores = policy(batch, 1.0, surrogate.entropy_coef != 0)
    output = loss_of(scores, batch)
    torch.autograd.backward(output.loss)
    gradients = [parameter.grad for parameter in policy.trainable().values()]
    devices = {
        "scores": {str(each.device) for each in scores},
        "loss": {str(output.loss.device)},
        "metrics": {str(value.device) for value in output.metrics.values()},
        "gradients": {str(None if gradient is None else gradient.device) for gradient in gradients},
    }
    policy.zero_grad()
    return {part: sorted(found) for part, found in devices.items()}


def without_storage(batch: MicroBatch, mode: FakeTensorMode) -> MicroBatch:
    """Return the row with tensors of the same shapes, still on the CPU."""
    tensors: dict[str, Any] = {
        field.name: mode.from_tensor(value)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **tensors)


def make_group(num_image_tokens: int) -> tuple[EncodedPrompt, list[Sample]]:
    """Return a prompt with an image's features, and ragged responses."""
    rng = np.random.default_rng(0)
    tokens_T = torch.full((num_image_tokens + 50,), 151_655)
    tokens_T[num_image_tokens:] = 9
    prompt = EncodedPrompt(
        tokens_T, torch.zeros(3, len(tokens_T), dtype=torch.int64), features=(torch.zeros(num_image_tokens, 3584),)
    )
    samples = []
    for length in (700, 3, 1536):
        scope_KT = np.ones((2, length), dtype=bool)
        logprobs_T = rng.normal(-1, 0.1, length).astype(np.float32)
        samples.append(
            Sample(rng.integers(0, 300, length), scope_KT, scope_KT.astype(np.float32), logprobs_T, logprobs_T)
        )
    return prompt, samples


def seven_b_wide(device: torch.device) -> Policy:
    """Return a policy of two layers of Qwen2.5-VL-7B on the device."""
    known = json.loads(resources.files("conf").joinpath("model", "known.json").read_text(encoding="utf-8"))
    [values] = [model["config"] for model in known if "7B" in model["name"]]
    text = {key: value for key, value in values["text_config"].items() if key != "layer_types"}
    text |= {"num_hidden_layers": 2, "max_window_layers": 2}
    rest = {key: value for key, value in values.items() if key not in ("model_type", "text_config")}
    build: Any = AutoModelForImageTextToText.from_config
    with torch.device("meta"):
        model = build(AutoConfig.for_model("qwen2_5_vl", text_config=text, **rest), dtype=torch.bfloat16)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    policy = Policy(
        model,
        banned_token_ids=[5],
        attention=attention.SDPA,
        logits_chunk_tokens=4096,
        frozen_tower=True,
        compute_dtype=torch.bfloat16,
    )
    policy.banned_V = policy.banned_V.to(device)
    return policy


def make_fake_take(device: torch.device) -> None:
    """Replace the two things that tensors without storage cannot do: lists on a device, and torch's causal bias."""
    tensor = torch.tensor

    def on_device(data: Any, *, dtype: Any = None, device: Any = None) -> torch.Tensor:
        return tensor(data, dtype=dtype).to(device or "cpu")

    def lower_right(queries: int, keys: int) -> torch.Tensor:
        return torch.ones(queries, keys, dtype=torch.bool, device=device)

    torch.tensor = on_device  # type: ignore[assignment]
    attention.causal_lower_right = lower_right  # type: ignore[assignment,attr-defined]


if __name__ == "__main__":
    main()
