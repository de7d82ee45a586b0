"""The steps of the day, in order of value: `python -m benchmarks.gpu_day` takes them from the top."""

from __future__ import annotations

from benchmarks.gpu_day.day import Step

STEPS = (
    Step("learner_7b", "learner:ratios_7b", 1.5, "a step at 7B shape beside plain and best; share of the matmul peak"),
    Step("learner_3b", "learner:ratios_3b", 1.0, "the same at 3B shape"),
    Step("device_tests", "device_tests:run", 1.5, "pytest -m gpu: learner, embedded engine, and vLLM if installed"),
    Step("rl_demo", "rl:demo", 3.0, "RS-GRPO on the demo in one process", ("hydra", "sklearn")),
    Step("rl_3b", "rl:shaped", 2.0, "RL steps of a 3B-shaped model in one process: seconds of each phase", ("hydra",)),
    Step("mismatch", "mismatch:run", 0.5, "log-probabilities of sampler and learner, in bfloat16 and float32"),
    Step("exactness", "learner:exactness", 0.5, "gradients of ours, best and plain in float32 at 3B width"),
    Step("attention", "attention:run", 1.0, "attention back ends: milliseconds, share of the peak, error"),
    Step("memory", "memory:run", 1.5, "peak memory of whole updates (3B; 7B with adapters) against the plan"),
    Step("checkpointing", "learner:checkpointing", 1.0, "ways of gradient checkpointing at 3B shape"),
    Step("growth", "learner:growth", 2.0, "seconds against prompt length and group size at 3B shape"),
    Step("vllm_throughput", "engines:throughput", 5.0, "vLLM beside the embedded engine: tokens/s", ("vllm",)),
    Step("vllm_sync", "engines:sync", 4.0, "weight sync, sleep and wake of a 3B-shaped engine", ("vllm",)),
    Step("ray_placement", "engines:placement", 8.0, "the demo under Ray with vLLM", ("ray", "vllm", "hydra")),
)
