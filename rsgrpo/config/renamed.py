"""Keys of the last release that were renamed or removed, and the answer to a user who still sets them."""

from __future__ import annotations

_NOW = {
    "data.prompt_key": "data.columns.prompt",
    "data.answer_key": "data.columns.answer",
    "data.image_key": "data.columns.image",
    "data.question_key": "data.columns.question",
    "data.id_key": "data.columns.id",
    "rollout.vllm.max_model_len": "rollout.vllm.engine_args.max_model_len",
    "rollout.vllm.max_num_seqs": "rollout.vllm.engine_args.max_num_seqs",
    "rollout.vllm.max_num_batched_tokens": "rollout.vllm.engine_args.max_num_batched_tokens",
    "rollout.vllm.block_size": "rollout.vllm.engine_args.block_size",
    "rollout.vllm.enforce_eager": "rollout.vllm.engine_args.enforce_eager",
    "rollout.vllm.prefix_caching": "rollout.vllm.engine_args.enable_prefix_caching",
    "rollout.vllm.mm_cache_gib": "rollout.vllm.engine_args.mm_processor_cache_gb",
    "cluster.rollout_cpus": "cluster.cpus.rollout",
    "cluster.learner_cpus": "cluster.cpus.learner",
    "cluster.reward_cpus": "cluster.cpus.reward",
}
_WHY = {
    "data.num_workers": "rows are always checked in one thread per CPU, at most 32. Remove it.",
    "rollout.vllm.sync": "the devices decide (gloo on CPU, ipc on shared GPUs, else nccl). Remove it.",
    "rollout.vllm.start_timeout_s": "set the environment variable VLLM_ENGINE_READY_TIMEOUT_S instead.",
    "tracking.entity": "write the team before the project: tracking.project=TEAM/PROJECT.",
    "cluster.sync_chunk_mb": "it is always 64. Remove it.",
    "gate.prompts": "it is always 2. Remove it.",
    "gate.tokens": "it is always 32. Remove it.",
    "guards.patience": "each rule has its own: guards.rules={METRIC: {min: 0.1, patience: 5}}.",
}
RENAMED = {old: f"has a new name: {new}" for old, new in _NOW.items()} | {
    old: f"no longer exists: {why}" for old, why in _WHY.items()
}
"""Old key -> what to say after its name."""
