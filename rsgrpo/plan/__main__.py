"""Estimate what a run needs before anything is rented: `python -m rsgrpo.plan recipe=evisrag_7b [plan.gpu=a100] ...`.

It takes every key that training takes, plus `plan.*` (the assumptions) and the size of the cluster. Arithmetic only: no
model, data or GPU is touched. Seconds are estimates from assumed rates; bytes and FLOPs follow from the sizes.
"""

from __future__ import annotations

from rsgrpo import cli
from rsgrpo.config.checks import validate
from rsgrpo.plan.config import PlanConfig, device_of
from rsgrpo.plan.fitting import fitting_overrides, idle, shortages, with_overrides
from rsgrpo.plan.memory import devices_memory, host_memory, trainable_params
from rsgrpo.plan.model_sizes import ModelSizes, sizes_of
from rsgrpo.plan.times import disk_bytes, mean_lengths, mean_observation_tokens, num_devices, phases


def main(config: PlanConfig) -> None:
    """Print the plan."""
    validate(config)
    sizes, source = sizes_of(config.model.path)
    print(render(config, sizes, source))


def render(config: PlanConfig, sizes: ModelSizes, source: str) -> str:
    """Return the plan as text."""
    device, rollout, learner = device_of(config), config.rollout, config.learner
    name = "cpu" if learner.device == "cpu" else config.plan.gpu
    name += ", memory as given" if config.plan.gpu_memory_gib else ""
    trained = trainable_params(config, sizes)
    lines = [
        f"Plan of {config.name}: {_counted(learner.num_ranks, 'learner rank')} and "
        f"{_counted(rollout.num_workers, f'{rollout.engine} engine')}, "
        f"{config.cluster.placement}, on {num_devices(config)} x {name} ({device.memory_gib:g} GiB)",
        f"Model: {source}: {sizes.language_params / 1e9:.3g} B decoder + {sizes.vision_params / 1e9:.3g} B vision "
        f"parameters, {trained / 1e9:.3g} B of them trained{_active(sizes)}",
    ]
    for kind, memory in devices_memory(config, sizes).items():
        lines += ["", f"Memory of one device, {kind}:"]
        for phase, parts in (("always", memory.static), ("learning", memory.learning), ("sampling", memory.sampling)):
            lines += [f"  {phase:<9} {part:<22} {gib:8.2f} GiB" for part, gib in parts.items() if gib]
        lines.append(f"  {'peak':<9} {'':<22} {memory.peak:8.2f} GiB of {device.memory_gib:g}")
    host = host_memory(config, sizes)
    lines += ["", "Memory of one node's CPUs:"]
    lines += [f"  {part:<32} {gib:8.2f} GiB" for part, gib in host.items() if gib]
    lines.append(f"  {'together':<32} {sum(host.values()):8.2f} GiB")
    lines.append(f"Disk for the run folder: {disk_bytes(config, sizes) / 1e9:,.0f} GB")
    missing = shortages(config, sizes)
    if not missing:
        lines += ["", *step_lines(config, sizes)]
    lines += [f"WARNING: {warning}" for warning in (*missing, *idle(config))]
    if missing:
        lines.append(advice(config, sizes))
    return "\n".join(lines)


def step_lines(config: PlanConfig, sizes: ModelSizes) -> list[str]:
    """Return the phases of a step, their sum, and what it assumes."""
    device, rollout, assumed = device_of(config), config.rollout, config.plan
    prompt_tokens, response_tokens = mean_lengths(config)
    observed = mean_observation_tokens(config)
    found = phases(config, sizes)
    flops, seconds = sum(phase.flops for phase in found), sum(phase.seconds for phase in found)
    lines = [
        f"One step: {config.algorithm.prompts_per_step} prompts x {rollout.group_size} rollouts of "
        f"{prompt_tokens:,.0f} + {response_tokens:,.0f} tokens"
        f"{f' + {observed:,.0f} of observations' if observed else ''}:",
        *(f"  {phase.name:<32} {phase.flops / 1e15:10.3g} PFLOP {phase.seconds:10.1f} s" for phase in found),
        f"  {'step':<32} {flops / 1e15:10.3g} PFLOP {seconds:10.1f} s",
    ]
    if config.total_steps:
        lines.append(f"  {config.total_steps} steps: {config.total_steps * seconds / 3600:.2f} hours")
    read = f"what a response reads {assumed.observation_fill:.0%} of its limits, " if observed else ""
    filtered = f"the filter keeps {assumed.kept_by_filter:.0%} of groups, " if config.algorithm.filter.enabled else ""
    return [
        *lines,
        "",
        f"Assumed: {assumed.mfu:.0%} of {device.flops / 1e12:g} TFLOP/s in prefill and training, "
        f"{assumed.decode_bandwidth:.0%} of {device.bandwidth / 1e9:,.0f} GB/s in decode,",
        f"  prompts {assumed.prompt_fill:.0%} and responses {assumed.response_fill:.0%} of their limits, {read}"
        f"{filtered}{config.inputs.max_images} images per prompt, weights sent at {assumed.sync_gb_per_s:g} GB/s, "
        f"checkpoints written at {assumed.disk_gb_per_s:g} GB/s.",
        "  Left out: validation, rewards, traffic between tensor-parallel devices.",
        "  Change any of it with plan.KEY=VALUE. Counted, not assumed: parameters, FLOPs, state, activations, cache.",
    ]


def _active(sizes: ModelSizes) -> str:
    if not sizes.idle_params:
        return ""
    return f"; a token passes {(sizes.language_params - sizes.idle_params) / 1e9:.3g} B of the decoder"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def advice(config: PlanConfig, sizes: ModelSizes) -> str:
    """Return the least change with which the run fits, planned again."""
    overrides = fitting_overrides(config, sizes)
    if overrides is None:
        return "It fits with none of the changes that were tried: take more or larger GPUs, or a smaller model"
    changed = with_overrides(config, overrides)
    peaks = ", ".join(f"{kind} {memory.peak:.1f} GiB" for kind, memory in devices_memory(changed, sizes).items())
    given = " ".join(f"{key}={str(value).lower()}" for key, value in overrides.items())
    return f"It fits with: {given}\n  planned again: {peaks} of {device_of(config).memory_gib:g}"


if __name__ == "__main__":
    cli.run(main, PlanConfig, "config")
