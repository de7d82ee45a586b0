"""The learner: one rank's share of the policy and its optimiser. A step packs, runs every micro-batch, and steps.

Every rank is given the same full list of groups. Ray, hydra and engines are not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rollout.config import Dtype, InputsConfig
from rollout.families.features import FeatureCache
from rollout.inputs.processor import InputProcessor
from rollout.types import Prompt
from rsgrpo.algorithm.loss import SurrogateConfig, policy_loss, step_totals, supervised_loss
from rsgrpo.config.train import AlgorithmConfig, LearnerConfig, ModelConfig
from rsgrpo.learning.attention import choose_attention
from rsgrpo.learning.context import make_team
from rsgrpo.learning.export import adapter_config, adapter_weights, export_folder, full_weights
from rsgrpo.learning.feature_cache import FeatureFolder, tower_fingerprint
from rsgrpo.learning.fsdp import (
    compute_dtype,
    fill,
    give_back,
    init_distributed,
    make_mesh,
    require_process_group,
    resolve_device,
    shard,
    share_of_cores,
)
from rsgrpo.learning.layers.four_bits import pack_base, require_packing
from rsgrpo.learning.optimizer import NonFiniteSteps, Optimizer, merge_updates
from rsgrpo.learning.packing import Packing
from rsgrpo.learning.passes import LossOf, Passes
from rsgrpo.learning.policy import (
    Policy,
    add_lora,
    empty_model,
    load_model,
    recompute,
    refuse_trained_tower,
    require_same_tokens,
    scale_adapters,
    shrink_frozen,
)
from rsgrpo.learning.prompt_store import PromptEncoder, PromptStore
from rsgrpo.learning.self_check import check_policy
from rsgrpo.learning.state import Saver, keep_groups, load_state
from rsgrpo.types import RsgrpoError, TrainGroup

__all__ = ["Learner", "init_distributed"]


class Learner:
    """One rank of the learner, or of the frozen reference or teacher when `trainable` is false.

    Args:
        temperature: of the rollouts; supervised steps always use 1.
        total_steps: calls of `update` or `supervised_update` in the whole run; the learning-rate schedule spans them.
        same_tokens_as: folder of a model whose tokens mean the same here; empty checks nothing.
        debug_dir: where the batch of a run that stops on bad gradients is saved; None saves nothing.
        encoder: turns prompts into tokens and pixels; None makes one from the model's folder.
        hf_model: a model that is already loaded; None loads `model.path`.
    """

    def __init__(
        self,
        model: ModelConfig,
        learner: LearnerConfig,
        inputs: InputsConfig,
        *,
        algorithm: AlgorithmConfig | None = None,
        temperature: float = 1.0,
        total_steps: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        trainable: bool = True,
        same_tokens_as: str = "",
        debug_dir: str | Path | None = None,
        encoder: PromptEncoder | None = None,
        hf_model: Any = None,
    ) -> None:
        self.model_config, self.config, self.inputs = model, learner, inputs
        self.algorithm = algorithm or AlgorithmConfig()
        self._surrogate = SurrogateConfig.of(self.algorithm)
        self.temperature, self.seed, self.rank, self.debug_dir = temperature, seed, rank, debug_dir
        self.device = resolve_device(learner.device)
        require_process_group(rank, world_size, self.device)
        if num_threads := learner.num_threads or share_of_cores(self.device):
            torch.set_num_threads(num_threads)
        self.encoder = encoder or InputProcessor(
            model.path, inputs, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        if same_tokens_as and same_tokens_as != model.path:
            require_same_tokens(model.path, same_tokens_as)
        frozen_tower = model.freeze_vision or not trainable
        refuse_trained_tower(model, learner, frozen_tower=frozen_tower)
        self.policy = self._build_policy(hf_model, trainable, frozen_tower)
        self._passes = Passes(
            self.policy,
            self._prompt_store(),
            self.device,
            max_tokens=learner.max_tokens_per_micro_batch,
            filler_token_id=self.encoder.eos_token_id,
            banned_token_ids=self.encoder.banned_token_ids,
            balance_coef=learner.balance_coef,
        )
        self._optimizer: Optimizer | None = None
        if trainable:
            tower = self.policy.family.vision_tower(self.policy.hf).parameters()
            self._optimizer = Optimizer(self.policy.trainable().values(), tower, learner, total_steps)
            self._saver = Saver(self.policy, self._optimizer)
        self._unchecked = learner.self_check and trainable
        torch.manual_seed(seed + rank)

    @property
    def weights_version(self) -> int:
        """Optimiser steps taken."""
        return 0 if self._optimizer is None else self._optimizer.updates

    def _build_policy(self, hf: Any, trainable: bool, frozen_tower: bool) -> Policy:
        """Load, adapt and shard. With several ranks only rank 0 reads the weights; the others start empty."""
        model, learner = self.model_config, self.config
        source = None
        if hf is None:
            source = load_model(model) if self.rank == 0 else None
            hf = source if dist.get_world_size() == 1 else empty_model(model)
        if model.lora.rank:
            for unadapted in [hf] if source is None or source is hf else [hf, source]:
                add_lora(unadapted, model.lora, seed=self.seed)
        if model.lora.base_bits == 4:
            require_packing(self.device, dist.get_world_size())
            pack_base(hf, self.device)
        dtype = compute_dtype(learner.precision)
        if not trainable:
            hf.requires_grad_(False)
        policy = Policy(
            hf,
            banned_token_ids=self.encoder.banned_token_ids,
            attention=choose_attention(learner.attention, self.device, dtype),
            logits_chunk_tokens=learner.logits_chunk_tokens,
            frozen_tower=frozen_tower,
            compute_dtype=dtype,
            team=make_team(learner.context_parallel),
        )
        if trainable:
            recompute(policy, learner.gradient_checkpointing)
        shrink_frozen(policy, source or (hf if self.rank == 0 else None))
        shard(policy, learner, self.device, make_mesh(self.device, learner.replicas))
        if next(hf.parameters()).is_meta:
            fill(policy, source, learner, self.device)
        return policy

    def _prompt_store(self) -> PromptStore:
        family, hf, learner = self.policy.family, self.policy.hf, self.config
        folder = None
        if learner.feature_cache:
            pixels = self.encoder.image_processor.to_dict()
            normalisation = {key: pixels.get(key) for key in ("image_mean", "image_std", "rescale_factor")}
            fingerprint = tower_fingerprint(family.vision_tower(hf), hf.config.vision_config.to_dict(), normalisation)
            folder = FeatureFolder(Path(learner.feature_cache), fingerprint, int(learner.feature_cache_gb * 2**30))
        return PromptStore(
            self.encoder,
            lambda tokens_T, grid, steps: family.position_ids(hf, tokens_T[None], grid, video_steps=steps)[:, 0],
            self._count_features,
            self.policy.encode_images if self.policy.frozen_tower else None,
            FeatureCache(learner.vision_cache_mb << 20),
            folder,
            ahead=learner.encode_ahead,
            team=self.policy.team,
            is_vision=lambda tokens_T: family.vision_kinds(hf, tokens_T) > 0,
        )

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Start to decode the images of prompts that are being sampled, and return at once.

        Every rank gets all prompts. This only saves time: an update decodes whatever is not ready when it needs it.
        """
        self._passes.prefetch(prompts)

    def update(self, groups: Sequence[TrainGroup], loss_weights_K: Sequence[float]) -> dict[str, float]:
        """Take the optimiser steps of one batch of rollouts (`algorithm.updates_per_step` of them). Collective.

        Every rank gets the same groups. Returns metrics of the whole batch, the same on every rank.

        Raises:
            RsgrpoError: groups that cannot be trained on, or `learner.max_bad_steps` consecutive non-finite steps.
        """
        optimizer = self._trainer()
        parts = np.array_split(np.arange(len(groups)), self.algorithm.updates_per_step)
        chunks = [part.tolist() for part in parts if len(part)]
        packings = self._passes.pack(groups, chunks)
        num_terms = groups[0].samples[0].scope_KT.shape[0]
        if len(loss_weights_K) != num_terms:
            raise RsgrpoError(f"got {len(loss_weights_K)} loss weights for {num_terms} loss terms; give one per term")
        self._self_check(groups)
        on_policy = len(chunks) == 1 and self.algorithm.on_policy_shortcut
        old = None if on_policy else self._passes.logprobs(groups, packings, self.temperature)
        results = []
        for chunk, packing in zip(chunks, packings, strict=True):
            samples = [sample for index in chunk for sample in groups[index].samples]
            totals = step_totals(samples, loss_weights_K, self.device)
            num_active = float(totals.active_K.sum())
            if num_active or self._surrogate.distill_coef:
                metrics = self._passes.run(
                    groups,
                    packing,
                    partial(policy_loss, totals=totals, config=self._surrogate),
                    temperature=self.temperature,
                    old=old,
                    entropy_gradient=self._surrogate.entropy_coef != 0,
                )
                metrics |= self._take_step(groups)
            else:
                metrics = {"actor/skipped": 1.0, "actor/lr": optimizer.lr}
            results.append({"actor/active_terms": num_active, **metrics})
        optimizer.step += 1
        give_back(self.policy, self.device)
        return merge_updates(results) | self._passes.work()

    def gradient(
        self, groups: Sequence[TrainGroup], loss_weights_K: Sequence[float], algorithm: AlgorithmConfig
    ) -> torch.Tensor:
        """Return the gradient of one on-policy batch's loss under `algorithm`, without a step. Collective.

        Flat float32 on the CPU, over all trained parameters in their order; zeros where no term is active.
        """
        optimizer, surrogate = self._trainer(), SurrogateConfig.of(algorithm)
        [packing] = self._passes.pack(groups, [range(len(groups))])
        totals = step_totals([sample for group in groups for sample in group.samples], loss_weights_K, self.device)
        if totals.active_K.any():
            loss_of = partial(policy_loss, totals=totals, config=surrogate)
            self._passes.run(groups, packing, loss_of, temperature=self.temperature)
        return optimizer.take_gradient()

    def supervised_update(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Take one optimiser step on the mean negative log-likelihood per response token. Collective."""
        optimizer = self._trainer()
        packing, loss_of = self._supervised(groups)
        self._self_check(groups)
        metrics = self._passes.run(groups, packing, loss_of, temperature=1.0)
        metrics |= self._take_step(groups) | self._passes.work()
        optimizer.step += 1
        give_back(self.policy, self.device)
        return metrics

    def supervised_loss(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        """Return the metrics of `supervised_update` without updating any weight. Collective."""
        packing, loss_of = self._supervised(groups)
        metrics = self._passes.run(groups, packing, loss_of, temperature=1.0, learn=False)
        give_back(self.policy, self.device)
        return metrics

    def _supervised(self, groups: Sequence[TrainGroup]) -> tuple[Packing, LossOf]:
        [packing] = self._passes.pack(groups, [range(len(groups))])
        total = sum(len(sample.token_ids_T) for group in groups for sample in group.samples)
        return packing, lambda scores, batch: supervised_loss(scores, response_tokens=total)

    def logprobs(
        self, groups: Sequence[TrainGroup], reference: bool = False, temperature: float | None = None
    ) -> list[list[np.ndarray]]:
        """Return the (T,) float32 log-probabilities of every response. Collective.

        Experts that rollouts were sampled with are replayed, but a reference or a teacher takes its own.

        Args:
            reference: of the model as it was loaded. LoRA adapters are switched off for it; a learner with
                `trainable=False` is the reference already.
            temperature: None takes that of the rollouts.

        Raises:
            RsgrpoError: `reference` of a learner that trains all weights.
        """
        if reference and self._optimizer is not None and not self.model_config.lora.rank:
            raise RsgrpoError(
                "this learner trains all weights and has no reference model. Set model.lora.rank > 0, or create "
                "a second Learner with trainable=False"
            )
        packings = self._passes.pack(groups, [range(len(groups))])
        with scale_adapters(self.policy.hf, 0.0 if reference else 1.0):
            mine = self._passes.logprobs(
                groups,
                packings,
                self.temperature if temperature is None else temperature,
                replays=self._optimizer is not None and not reference,
            )
        give_back(self.policy, self.device)
        found = self._passes.gather(mine)
        return [[found[g, s] for s in range(len(group.samples))] for g, group in enumerate(groups)]

    def count_vision(self, prompts: Sequence[Prompt]) -> list[tuple[int, int, int]]:
        """Return, of each prompt as the policy takes it, (tokens, image tokens among them, image features)."""
        counts = []
        for prompt in prompts:
            encoded = self._passes.prompts.encode(prompt, whole=True)
            num_image_tokens, num_features = self._count_features(encoded.token_ids_T, encoded.image_grid_thw)
            if encoded.features:
                num_features = sum(map(len, encoded.features))
            counts.append((len(encoded.token_ids_T), num_image_tokens, num_features))
        return counts

    def _count_features(self, token_ids_T: torch.Tensor, image_grid_thw: torch.Tensor | None) -> tuple[int, int]:
        """Return how many image tokens there are, and how many features the images become."""
        num_features = self.policy.family.num_features(self.encoder.image_processor, image_grid_thw)
        return int((self.policy.family.vision_kinds(self.policy.hf, token_ids_T) > 0).sum()), num_features

    def gather_weights(
        self, *, every_rank: bool = False, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every trained weight, whole, under the model's own names; adapters are merged in float32. Collective.

        Tensors have the layout of published checkpoints (`Family.published`).

        Every rank must iterate to the end; only rank 0 is given tensors unless `every_rank`. A frozen tower is left
        out: engines that loaded the same folder have it.
        """
        for name, whole in full_weights(self.policy, with_vision=not self.policy.frozen_tower, dtype=dtype):
            if self.rank == 0 or every_rank:
                yield name, whole

    def gather_adapter(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the adapters' tensors, whole, under peft's names, on every rank. Collective."""
        yield from adapter_weights(self.policy, dtype)

    def adapter_config(self) -> dict[str, Any] | None:
        """Return peft's adapter_config of what `gather_adapter` yields; None without adapters."""
        return adapter_config(self.model_config.lora) if self.model_config.lora.rank else None

    def save(self, folder: str | Path) -> None:
        """Write trained weights, optimiser, counters and random state, to load onto any number of ranks. Collective.

        Raises:
            RsgrpoError: the disk has no room for it, or it could not be written.
        """
        self.begin_save(folder)
        self._saver.is_saved(wait=True)

    def begin_save(self, folder: str | Path) -> None:
        """Begin to write what `save` writes, and learn on meanwhile; waits for the write before. Collective.

        Raises:
            RsgrpoError: the disk has no room for it.
        """
        self._trainer()
        self._saver.begin(Path(folder))

    def is_saved(self) -> bool:
        """Return whether this rank has nothing left to write.

        Raises:
            RsgrpoError: it could not be written.
        """
        return self._saver.is_saved()

    def load(self, folder: str | Path) -> None:
        """Resume exactly where `save` was called. Collective."""
        load_state(self.policy, self._trainer(), Path(folder), seed=self.seed)

    def export(self, folder: str | Path, dtype: torch.dtype | Dtype | None = None) -> None:
        """Write a Hugging Face folder with tokenizer and processor. Collective.

        dtype: of the weights, or its name; None keeps float32.

        Raises:
            RsgrpoError: the disk has no room for it.
        """
        chosen = compute_dtype(dtype) if isinstance(dtype, str) else dtype
        export_folder(self.policy, self.model_config, self.inputs, Path(folder), dtype=chosen)

    def _trainer(self) -> Optimizer:
        if self._optimizer is None:
            raise RsgrpoError("this Learner has no optimiser, because it was created with trainable=False")
        return self._optimizer

    def _take_step(self, groups: Sequence[TrainGroup]) -> dict[str, float]:
        try:
            return self._trainer().take_step()
        except NonFiniteSteps as error:
            if self.debug_dir is None:
                raise
            path = Path(self.debug_dir) / f"bad_batch_{self._trainer().step}.pt"
            if self.rank == 0:
                keep_groups(groups, path)
            raise NonFiniteSteps(f"{error}; the batch is in {path}") from error

    def _self_check(self, groups: Sequence[TrainGroup]) -> None:
        if self._unchecked:
            check_policy(self.policy, self._passes.prompts, self.encoder, groups, self.device)
            self._unchecked = False
