"""The vLLM engine: grouped sampling on a background event loop, and weight updates while it runs.

Weights arrive by `transfer_*` (see `rollout.vllm.weights_out`) or, in the same process, by `load_weights`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import tempfile
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import safetensors.torch
import torch

from rollout.config import InputsConfig, RolloutConfig
from rollout.engine import EngineError, EngineFailed, EngineOptions, check_sampling
from rollout.files import write_bytes, write_text
from rollout.inputs.images import PromptError
from rollout.inputs.processor import InputProcessor, preparing
from rollout.turns.environment import load_environment
from rollout.turns.episode import begin_episodes
from rollout.types import Observation, Prompt, RolloutGroup, SamplingParams
from rollout.vllm.launch import TOWER, environment, max_model_len, model_overrides, prepare, start_timeout_s
from rollout.vllm.loop import BackgroundLoop
from rollout.vllm.requests import build_request, is_broken_off, prompts_at_once, sampling_params, to_group
from rollout.vllm.turns import Conversations
from rollout.vllm.vision import vision_arguments
from rollout.vllm.wire import HeldChecksum, buckets

Result = TypeVar("Result")
Listener = Callable[[list[int] | Observation], None]

CHUNK_BYTES = 64 << 20
"""Size of the pieces in which `load_weights` hands weights to the engine's processes."""
POLL_S = 0.5


class VllmEngine:
    """Samples with vLLM. Its methods may be called from several threads; `generate` from one at a time.

    Attributes:
        weights_version: of the weights that new requests will be sampled with.
        backend: of the weight transfer, "gloo", "nccl" or "ipc"; `build_sender` must be given the same.
        num_workers: tensor-parallel size.
    """

    def __init__(self, model_path: str, rollout: RolloutConfig, inputs: InputsConfig, **options: Any) -> None:
        """Start vLLM for a model folder.

        Args:
            options: fields of `EngineOptions`.

        Raises:
            ConfigError: a setting cannot work with this model and these devices.
            EngineFailed: the engine did not start.
        """
        chosen = EngineOptions(**options)
        arguments, variables, self.backend = prepare(model_path, rollout, inputs, chosen)
        self.name = chosen.name
        self.processor = processor = InputProcessor(model_path, inputs, **chosen.source)
        arguments |= vision_arguments(processor, arguments)
        if arguments.get("sleep_preserve_parameter_names") == [TOWER]:
            arguments["sleep_preserve_parameter_names"] = list(processor.family.engine_tower)
        arguments["hf_overrides"] = model_overrides(processor.family, arguments.get("hf_overrides", {}))
        self.num_workers = rollout.vllm.tensor_parallel_size
        self.weights_version = 0
        self._rollout, self._config = rollout, rollout.vllm
        self._make_environment = load_environment(rollout.turns)
        # An environment may first finish the answer that it owes to an earlier turn.
        self._longest_answer_s = 2 * rollout.turns.timeout_s if self._make_environment else 0.0
        self._can_sleep = rollout.vllm.sleep_level > 0 and self.backend != "gloo"
        self._max_model_len = max_model_len(rollout, inputs)
        self._prompt_pixels = (inputs.max_images + inputs.max_videos * inputs.max_frames) * inputs.max_pixels
        self._broken = ""
        self._received: set[str] | None = None
        self._adapter: Any = None
        self._num_requests = 0
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="vllm-inputs")
        self._episodes = ThreadPoolExecutor(max_workers=self._config.max_num_seqs, thread_name_prefix="episodes")
        self._loop = BackgroundLoop("vllm-loop")
        self._llm: Any = None
        with environment(variables):
            self._start(arguments)
        self._adapter_folder = tempfile.TemporaryDirectory(prefix="rsgrpo-adapter-", ignore_cleanup_errors=True)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, stop: Callable[[], bool] | None = None
    ) -> Iterator[RolloutGroup]:
        """Yield one group per prompt as soon as its last rollout is finished, in any order.

        The prompt's id and `sampling.seed` fix the random draws, but the logits depend on rounding within vLLM's
        batches: equal seeds usually give equal responses, not always. With top_p < 1 or top_k > 0 the log-probabilities
        are those of the truncated distribution. Closing the iterator, and `stop`, abort the requests still running.
        Several calls may run at once, from several threads.

        Raises:
            EngineFailed: the engine died, or no token came for `stall_timeout_s`; groups already yielded are valid.
        """
        finished: queue.SimpleQueue[RolloutGroup] = queue.SimpleQueue()
        check_sampling(sampling)
        self._refuse_if_broken()
        with self._sampling(self._sample_all(prompts, sampling, finished)) as work:
            for _ in prompts:
                group = self._next(finished, work, stop)
                if group is None:
                    return
                yield group

    def stream(self, prompt: Prompt, sampling: SamplingParams) -> Generator[str | Observation | RolloutGroup]:
        """Yield one response's text in pieces as its tokens come, then its group, as `generate` would.

        Observations come between the turns. Closing the iterator aborts the request. Raises EngineFailed as `generate`
        does.
        """
        updates: queue.SimpleQueue[list[int] | Observation | RolloutGroup] = queue.SimpleQueue()

        async def sample() -> None:
            updates.put(await self._sample(prompt, replace(sampling, group_size=1), updates.put))

        def received(work: Future[None]) -> Iterator[list[int] | Observation | RolloutGroup]:
            while (update := self._next(updates, work)) is not None:
                yield update

        check_sampling(sampling)
        self._refuse_if_broken()
        with self._sampling(sample()) as work:
            yield from self.processor.pieces(received(work))

    def count_vision(self, prompts: Sequence[Prompt]) -> list[tuple[int, int, int]]:
        """Return (tokens, vision tokens among them, vision features) of each prompt as vLLM rendered it."""
        counts = []
        for prompt in prompts:
            request, _ = build_request(self.processor, prompt, 1, self._max_model_len)
            with self._update("count_vision"):
                (rendered,) = self._run(self._llm.renderer.render_cmpl_async([request], skip_mm_cache=True))
            token_ids_T = list(rendered["prompt_token_ids"])
            items = [item for kind in rendered["mm_kwargs"].values() for item in kind] if prompt.images else []
            grids = torch.stack([self.processor.family.requested_grid(item) for item in items]) if items else None
            num_features = self.processor.family.num_features(self.processor.image_processor, grids)
            vision_ids = (self.processor.image_token_id, self.processor.video_token_id)
            num_vision = len([token for token in token_ids_T if token in vision_ids])
            counts.append((len(token_ids_T), num_vision, num_features))
        return counts

    def stats(self) -> dict[str, float]:
        """Return counts since the last call: prompt and generated tokens, seconds, tokens/s, prefix-cache hit rate."""
        return self._progress.take()

    @contextlib.contextmanager
    def _sampling(self, work: Coroutine[Any, Any, None]) -> Iterator[Future[None]]:
        """Run `work` on the loop for the duration of a block; leaving the block cancels it."""
        future = self._loop.submit(work)
        self._progress.start()
        try:
            yield future
        finally:
            future.cancel()
            self._progress.stop()

    async def _sample_all(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, finished: queue.SimpleQueue[RolloutGroup]
    ) -> None:
        room = asyncio.Semaphore(prompts_at_once(self._config.max_num_seqs, sampling.group_size, self._prompt_pixels))

        async def sample(prompt: Prompt) -> None:
            async with room:
                finished.put(await self._sample(prompt, sampling))

        async with asyncio.TaskGroup() as tasks:
            for prompt in prompts:
                tasks.create_task(sample(prompt))

    async def _sample(self, prompt: Prompt, sampling: SamplingParams, listen: Listener | None = None) -> RolloutGroup:
        """Sample one group; a fault of the prompt itself becomes the group's error.

        listen: receives the first response's tokens so far whenever there are new ones, and observations.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineGenerateError

        in_thread = asyncio.get_running_loop().run_in_executor
        most_added = sampling.max_tokens + self._rollout.max_observation_tokens
        try:
            with preparing(prompt):
                request, num_tokens = await in_thread(
                    self._pool, build_request, self.processor, prompt, most_added, self._max_model_len
                )
            if self._make_environment is not None:
                episodes = await in_thread(
                    self._episodes,
                    begin_episodes,
                    self._make_environment,
                    prompt,
                    sampling.group_size,
                    self.processor,
                    self._rollout.turns,
                    listen,
                )
                ask = partial(self._finished, prompt, listen=listen)
                streams = listen is not None
                conversations = Conversations(prompt, sampling, self.processor, self._episodes, ask, streams)
                return await conversations.group(episodes, request, num_tokens)
            params = sampling_params(self.processor, prompt, sampling, streams=listen is not None)
            output = await self._finished(prompt, request, params, listen)
            if listen is None and is_broken_off(output):  # such as an image that both sides' caches disagree about
                output = await self._finished(prompt, request, params)
        except PromptError as error:
            return RolloutGroup(prompt, (), error=str(error))
        except (VLLMClientError, EngineGenerateError) as error:
            if self._llm.errored:
                raise
            return RolloutGroup(prompt, (), num_tokens, error=f"vLLM refused the prompt: {error.__cause__ or error}")
        return to_group(self.processor, prompt, sampling, num_tokens, output)

    async def _finished(
        self,
        prompt: Prompt,
        request: dict[str, Any],
        params: Any,
        listen: Listener | None = None,
    ) -> Any:
        """Return vLLM's output of a request, when it is finished."""
        self._num_requests += 1
        (rendered,) = await self._llm.renderer.render_cmpl_async([request])
        stream = self._llm.generate(rendered, params, f"{self._num_requests}:{prompt.id}", lora_request=self._adapter)
        async for output in stream:
            if listen is not None:
                listen(list(output.outputs[0].token_ids))
        return output

    def _next(
        self, results: queue.SimpleQueue[Result], work: Future[None], stop: Callable[[], bool] | None = None
    ) -> Result | None:
        """Wait for the next result of `work`; None once told to `stop`. Raise the reason if it ends or stalls."""
        while stop is None or not stop():
            is_over = work.done()
            with contextlib.suppress(queue.Empty):
                return results.get(timeout=0 if is_over else POLL_S)
            if is_over:
                self._raise_cause(work)
            idle_s = self._progress.idle_s()
            if idle_s > self._config.stall_timeout_s + self._longest_answer_s:
                self._broken = f"no token for {idle_s:.0f} s (rollout.vllm.stall_timeout_s)"
                raise EngineFailed(f"{self.name} stalled: {self._broken}")
        return None

    def _raise_cause(self, work: Future[None]) -> NoReturn:
        """Raise why sampling ended without the groups that were asked for."""
        cause = work.exception()
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, EngineError):
            raise cause
        self._broken = f"{type(cause).__name__}: {cause}"
        raise EngineFailed(f"{self.name} died: {self._broken}") from cause

    # ---- weights ---------------------------------------------------------------------------------------------------

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand weights to the engine's processes by their Hugging Face names; may be called several times.

        Each layer must arrive whole: weight and bias, and every part that vLLM fuses (q, k and v; gate and up).
        """
        with self._update("load_weights"):
            if self._received is None:
                self._begin()
                self._rpc("receive_start")
            for bucket in buckets(named_tensors, CHUNK_BYTES):
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket}
                self._rpc("receive_chunk", safetensors.torch.save(tensors))
                self._received |= tensors.keys()  # type: ignore[operator]

    def finish_weights(self, version: int) -> None:
        """Use the loaded weights, drop all caches made under the old ones, and let sampling resume."""
        with self._update("finish_weights"):
            if self._received is not None:
                self._check_whole_layers()
                self._rpc("receive_finish")
            self._commit(version)

    def transfer_init(self, info: dict[str, Any]) -> None:
        """Join the sender's group."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._run(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info)))

    def transfer_start(self) -> None:
        """Let running requests end, make new ones wait, and expect weights."""
        with self._update("transfer_start"):
            self._begin()
            self._run(self._llm.start_weight_update())

    def transfer_update(self, info: dict[str, Any]) -> None:
        """Receive one bucket."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        with self._update("transfer_update"):
            self._run(self._llm.update_weights(WeightTransferUpdateRequest(update_info=info)))
            self._received |= set(info["names"])  # type: ignore[operator]

    def transfer_finish(self, version: int) -> None:
        """Do what `finish_weights` does, for weights that came by `transfer_update`."""
        with self._update("transfer_finish"):
            self._check_whole_layers()
            self._run(self._llm.finish_weight_update())
            self._commit(version)

    def load_adapter(self, chunk: bytes, config: dict[str, Any], version: int) -> None:
        """Sample with a LoRA adapter (tensors in peft's names, its adapter_config) on the base weights from now on."""
        from vllm.lora.request import LoRARequest

        folder = Path(self._adapter_folder.name)
        with self._update("load_adapter"):
            self._begin()
            if self._adapter is not None:
                self._run(self._llm.remove_lora(self._adapter.lora_int_id))
            write_text(folder / "adapter_config.json", json.dumps(config))
            write_bytes(folder / "adapter_model.safetensors", chunk)
            self._adapter = LoRARequest(f"version-{version}", version + 1, str(folder))
            if not self._run(self._llm.add_lora(self._adapter)):
                raise EngineError("vLLM did not accept the adapter")
            self._commit(version)

    def checksums(self, names: list[str]) -> list[list[HeldChecksum]]:
        """Return `WeightReceiver.resident_checksums` of each worker of the engine."""
        held: list[list[HeldChecksum]] = self._rpc("resident_checksums", list(names))
        return held

    def _begin(self) -> None:
        """Wait until running requests have ended, or stop them where they are; later ones then wait for `_commit`."""
        mode = "keep" if self._config.in_flight else "wait"
        self._run(self._llm.pause_generation(mode=mode, clear_cache=False))
        self._received = set()

    def _commit(self, version: int) -> None:
        self._run(self._llm.update_weight_version(str(version)))
        # Three caches: keys and values, preprocessed images (the engine's copy must match ours), image features. What
        # was stopped computes its keys and values again, under the new weights; its images stay, the tower is frozen.
        if not self._run(self._llm.reset_prefix_cache(reset_running_requests=self._config.in_flight)):
            raise EngineError("vLLM did not reset its prefix cache: requests are still running")
        if not self._config.in_flight:
            self._run(self._llm.reset_mm_cache())
            self._run(self._llm.reset_encoder_cache())
        self._received = None
        self.weights_version = version
        self._run(self._llm.resume_generation())

    def _check_whole_layers(self) -> None:
        """Refuse layers of which only a part arrived: the rest would silently be uninitialised memory."""
        missing = self._rpc("missing_parts", sorted(self._received or ()))[0]
        if missing:
            raise EngineError(f"only parts of some layers arrived. Missing: {', '.join(missing[:4])}")

    @contextlib.contextmanager
    def _update(self, what: str) -> Iterator[None]:
        """Mark the engine as broken when a change of it fails half-way: it must not sample with mixed weights."""
        self._refuse_if_broken()
        try:
            yield
        except Exception as error:
            self._broken = f"{what}: {error}"
            raise EngineFailed(f"{self.name}: {self._broken}") from error

    # ---- life ------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Release GPU memory as `rollout.vllm.sleep_level` says, once running requests have ended; no-op on CPU."""
        if self._can_sleep:
            with self._update("sleep"):
                self._run(self._llm.sleep(self._config.sleep_level, mode="wait"))

    def wake(self, parts: list[str] | None = None) -> None:
        """Allocate the memory again; after level 2 the weights must be sent before sampling.

        parts: ["weights"] or ["kv_cache"], so that a sync can run before the cache is allocated; None is both.
        """
        if self._can_sleep:
            with self._update("wake"):
                self._run(self._llm.wake_up(parts))

    def close(self) -> None:
        """Stop the engine's processes."""
        if self._llm is not None:
            if self._llm.output_handler is not None:  # it would mistake the end of the processes for a crash
                self._loop.cancel(self._llm.output_handler)
            sockets = self._llm.engine_core.resources.ctx
            self._llm.shutdown(timeout=5.0)
            self._llm = None
            self._broken = "closed"
            self._loop.stop()
            sockets.destroy(linger=0)  # vLLM leaves its zmq context to the garbage collector, which warns
            self._pool.shutdown(wait=False)
            self._episodes.shutdown(wait=False)
            self._adapter_folder.cleanup()

    def _start(self, arguments: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from rollout.vllm.stats import Progress

        self._progress = Progress()

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[lambda *_: self._progress])

        try:
            self._llm = self._run(start(), start_timeout_s())
            self._run(self._llm.update_weight_version(str(self.weights_version)))
        except Exception as error:
            self._loop.stop()
            raise EngineFailed(
                f"{self.name} did not start: {error}. vLLM's own log above has the cause. If memory is short, lower "
                "inputs.max_prompt_tokens, inputs.max_images or rollout.vllm.engine_args.max_num_seqs, or raise "
                "rollout.vllm.gpu_memory_utilization or tensor_parallel_size."
            ) from error

    def _run(self, work: Coroutine[Any, Any, Result], timeout_s: float | None = None) -> Result:
        return self._loop.run(work, timeout_s or self._config.sync_timeout_s)

    def _rpc(self, method: str, *args: Any) -> Any:
        return self._run(self._llm.collective_rpc(method, args=args))

    def _refuse_if_broken(self) -> None:
        if self._broken:
            raise EngineFailed(f"{self.name} is no longer usable ({self._broken}). Start another.")
