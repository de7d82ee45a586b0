"""Qwen2-VL and Qwen2.5-VL, every size: features replace the embeddings of image tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from rollout.families.base import Family
from rollout.families.windows import WINDOWS


class Qwen2VL(Family):
    """The adapter of transformers' `qwen2_vl`."""

    model_type = "qwen2_vl"
    reads_videos = True
    # A mask per kind of layer is taken as it is.
    no_mask: ClassVar[dict[str, Any]] = {"attention_mask": {"full_attention": None}}

    def checkpoint_name(self, name: str) -> str:
        if name.startswith(self.language_prefix):
            return "model." + name.removeprefix(self.language_prefix)
        return name.removeprefix("model.") if name.startswith(self.vision_prefixes) else name

    def position_ids(
        self,
        model: Any,
        token_ids_BT: torch.Tensor,
        image_grid_thw: torch.Tensor | None,
        is_token_BT: torch.Tensor | None = None,
        video_steps: Sequence[float] = (),
    ) -> torch.Tensor:
        """Return transformers' positions, and for rows with videos the published ones.

        Text behind a video goes on after its largest position, that of time included, as in Qwen's code and in vLLM.
        transformers 5.19 leaves time out there, though its `generate` does not.
        """
        if not video_steps or self.stamps_frames or image_grid_thw is None:
            return super().position_ids(model, token_ids_BT, image_grid_thw, is_token_BT, video_steps)
        grids, intervals = iter(image_grid_thw.tolist()), iter(self.time_intervals(model, video_steps))
        merge = model.config.vision_config.spatial_merge_size
        positions_3BT = torch.zeros(3, *token_ids_BT.shape, dtype=torch.long, device=token_ids_BT.device)
        for row, kinds_T in enumerate(self.vision_kinds(model, token_ids_BT)):
            is_token_T = torch.ones_like(kinds_T).bool() if is_token_BT is None else is_token_BT[row]
            pieces: list[torch.Tensor] = []
            start = 0
            for kind, run in itertools.groupby(kinds_T[is_token_T].tolist()):
                if kind == 0:
                    piece = torch.arange(len(list(run))).expand(3, -1)
                else:
                    frames, height, width = next(grids)
                    times = (torch.arange(frames, dtype=torch.float64) * (next(intervals) if kind == 2 else 1)).long()
                    sides = torch.arange(height // merge), torch.arange(width // merge)
                    piece = torch.cartesian_prod(times, *sides).T
                pieces.append(piece + start)
                start = int(pieces[-1].max()) + 1
            positions_3BT[:, row, is_token_T] = torch.cat(pieces, 1).to(positions_3BT.device)
        return positions_3BT

    def time_intervals(self, model: Any, video_steps: Sequence[float]) -> list[float]:
        """Return how far apart the positions of each video's temporal patches lie."""
        return [1.0] * len(video_steps)

    def whole_inputs(
        self,
        model: Any,
        token_ids_BT: torch.Tensor,
        pixel_values: torch.Tensor | None,
        grid: torch.Tensor | None,
        video_steps: Sequence[float] = (),
    ) -> dict[str, Any]:
        found = super().whole_inputs(model, token_ids_BT, pixel_values, grid, video_steps)
        if not video_steps or self.stamps_frames:
            return found
        return found | {"position_ids": self.position_ids(model, token_ids_BT, grid, video_steps=video_steps)}


class Qwen25VL(Qwen2VL):
    """The adapter of transformers' `qwen2_5_vl`: most blocks of the tower attend within windows."""

    model_type = "qwen2_5_vl"

    def time_intervals(self, model: Any, video_steps: Sequence[float]) -> list[float]:
        seconds = torch.tensor(video_steps, dtype=torch.float32).tolist()  # as processors hand them on
        return [model.config.vision_config.tokens_per_second * step for step in seconds]

    def attend_by(self, model: Any, attention: str) -> Any:
        tower: Any = self.vision_tower(model)
        tower.config._attn_implementation = WINDOWS
        return super().attend_by(model, attention)
