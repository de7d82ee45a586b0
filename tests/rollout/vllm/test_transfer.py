"""Weights into the real vLLM (its CPU build): in process, over gloo from one and two ranks, as an adapter."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from multiprocessing.connection import Connection

import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("vllm", reason="vLLM is not installed")

from rollout.engine import EngineFailed
from rollout.types import Prompt, SamplingParams
from rollout.vllm.peers import Peer, Peers, TransferError, local_peer
from rollout.vllm.weights_out import AdapterSender, _Verifier, build_sender
from tests.rollout.parity import assert_greedy_parity, reference_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture
def prompts(page_images):
    long = "page 1 shows a code 4 and an amount 7 " * 4  # several blocks, so that stale prefixes would be reused
    return [
        Prompt("two", f"{long} <image> and <image> what amount is on page 2?", tuple(page_images[:2])),
        Prompt("none", f"{long} insufficient to answer?"),
    ]


def versions(engine, prompts):
    groups = list(engine.generate(prompts, SamplingParams(group_size=2, max_tokens=2)))
    return {rollout.weights_version for group in groups for rollout in group.rollouts}


def test_weights_loaded_in_process_replace_the_old_ones_and_all_caches(engine, attentive_model_path, prompts):
    assert_greedy_parity(engine, reference_model(attentive_model_path), prompts, GREEDY)
    assert versions(engine, prompts) == {0}
    moved = reference_model(attentive_model_path, seed=1)
    half = len(list(moved.named_parameters())) // 2
    engine.load_weights(list(moved.named_parameters())[:half])
    engine.load_weights(list(moved.named_parameters())[half:])
    engine.finish_weights(1)
    assert_greedy_parity(engine, moved, prompts, GREEDY)  # the same images and prefixes as before
    assert versions(engine, prompts) == {1}


def test_weights_sent_over_gloo_by_one_rank_arrive_whole(engine, attentive_model_path, prompts):
    sender = build_sender([local_peer(engine)], backend=engine.backend, bucket_bytes=100_000, timeout_s=60)
    for version in (2, 3):
        moved = reference_model(attentive_model_path, seed=version)
        sender.send(moved.named_parameters(), version)
        assert_greedy_parity(engine, moved, prompts, GREEDY)
        assert versions(engine, prompts) == {version}
    sender.close()


def test_weights_of_the_language_model_alone_leave_the_tower_as_it_is(engine, attentive_model_path, prompts):
    base = reference_model(attentive_model_path)
    engine.load_weights(base.named_parameters())
    engine.finish_weights(4)
    moved = reference_model(attentive_model_path, seed=5)
    engine.load_weights([(name, tensor) for name, tensor in moved.named_parameters() if ".visual." not in name])
    engine.finish_weights(5)
    moved.model.visual.load_state_dict(base.model.visual.state_dict())
    assert_greedy_parity(engine, moved, prompts, GREEDY)


def test_weights_of_two_fsdp_ranks_arrive_whole(engine, attentive_model_path, prompts):
    context = mp.get_context("forkserver")  # the ranks share its imports
    context.set_forkserver_preload(["tests.rollout.parity"])
    ours, theirs = context.Pipe()
    serving = threading.Thread(target=serve, args=(engine, ours), daemon=True)
    serving.start()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined,unused-ignore]
    ranks = [
        context.Process(
            target=learner_rank, args=(rank, store.port, attentive_model_path, theirs if rank == 0 else None)
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=150)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert_greedy_parity(engine, reference_model(attentive_model_path, seed=6), prompts, GREEDY)
    assert versions(engine, prompts) == {6}


def serve(engine, connection: Connection):
    """Carry calls from another process to the engine, as a Ray actor would."""
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        connection.send(getattr(engine, method)(*args))


def learner_rank(rank, port, model_path, connection):
    """One FSDP2 rank that holds half of every tensor."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined,unused-ignore]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = reference_model(model_path, seed=6)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def call(method, args):
        connection.send((method, args))

        def wait(timeout_s):
            if not connection.poll(timeout_s):
                raise TimeoutError
            return connection.recv()

        return wait

    sender = build_sender([Peer("engine 0", 1, call)], backend="gloo", rank=rank, timeout_s=60)
    sender.send(((name, shard.full_tensor()) for name, shard in model.named_parameters()), 6)
    sender.close()
    dist.destroy_process_group()


def test_layers_that_come_in_part_are_seen_before_they_are_used(engine, attentive_model_path):
    names = [name for name, _ in reference_model(attentive_model_path).named_parameters()]
    assert engine._rpc("missing_parts", names) == [[]]
    assert engine._rpc("missing_parts", [name for name in names if ".visual." in name]) == [[]]
    (missing,) = engine._rpc(
        "missing_parts", [name for name in names if name.endswith("layers.0.mlp.gate_proj.weight")]
    )
    assert missing == ["language_model.model.layers.0.mlp.gate_up_proj.weight (up_proj)"]
    (missing,) = engine._rpc("missing_parts", [name for name in names if name.endswith("qkv.weight")])
    assert "visual.blocks.1.attn.qkv.bias (qkv)" in missing


def test_stale_weights_are_found_by_their_checksums(engine, attentive_model_path):
    moved = reference_model(attentive_model_path, seed=7)
    engine.load_weights(moved.named_parameters())
    engine.finish_weights(7)
    verifier = _Verifier(Peers([local_peer(engine)], 60), every=1)
    list(verifier.outgoing(moved.named_parameters()))
    verifier.check(7)
    moved.model.language_model.layers[1].self_attn.k_proj.bias += 1e-4
    list(verifier.outgoing(moved.named_parameters()))
    with pytest.raises(
        TransferError, match=r"the values of .*layers\.1\.self_attn\.q_proj\.bias \+ .* on engine 0 are not"
    ):
        verifier.check(8)


def test_an_adapter_alone_gives_what_the_merged_model_gives(engine, attentive_model_path, prompts):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    base = reference_model(attentive_model_path)
    engine.load_weights(base.named_parameters())
    engine.finish_weights(8)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    peft_model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for version in (9, 10):
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        adapter = get_peft_model_state_dict(peft_model)
        settings = {**config.to_dict(), "peft_type": "LORA", "target_modules": ["q_proj", "v_proj", "down_proj"]}
        settings = {key: value for key, value in settings.items() if isinstance(value, str | int | float | list)}
        AdapterSender([local_peer(engine)], settings).send(adapter.items(), version)
        assert_greedy_parity(engine, peft_model, prompts, GREEDY)
        assert versions(engine, prompts) == {version}


def test_an_engine_without_a_sign_of_life_is_reported_as_failed(engine, prompts, monkeypatch):
    monkeypatch.setattr(engine, "_config", dataclasses.replace(engine._config, stall_timeout_s=3))
    (process,) = engine._llm.engine_core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(EngineFailed, match="engine 0 stalled: no token for 3 s"):
            list(engine.generate(prompts, GREEDY))
        with pytest.raises(EngineFailed, match="Start another"):
            list(engine.generate(prompts, GREEDY))
    finally:
        os.kill(process.pid, signal.SIGCONT)
        engine._broken = ""  # for the tests that follow


# The last test of the module: it takes the engine with it.
def test_an_engine_killed_in_mid_step_is_reported_at_once(engine):
    (process,) = engine._llm.engine_core.resources.engine_manager.processes
    many = [Prompt(f"p{index}", f"amount {index}?") for index in range(32)]
    groups = engine.generate(many, SamplingParams(group_size=8, max_tokens=48))
    assert next(groups).error is None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineFailed, match="engine 0 died"):
        list(groups)
    with pytest.raises(EngineFailed, match="Start another"):
        engine.finish_weights(11)
