"""Images in Ray's object store: a prompt's are put there once, and each process reads those that it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from rollout.inputs.images import bytes_of, name_of, with_bytes
from rollout.types import Prompt


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One compressed image of a prompt in the object store; it travels as a reference.

    ref: Ray's reference to the (bytes,) uint8 arrays of the prompt's images. index: which of them. name: for messages.
    """

    ref: Any
    index: int
    name: str

    def read(self) -> bytes:
        """Return the image's bytes; a node fetches the images of a prompt once."""
        content: bytes = ray.get(self.ref)[self.index].tobytes()
        return content


def store_images(prompt: Prompt) -> Prompt:
    """Return the prompt with its images in the object store, where they stay as long as someone has the result.

    Paths stay as they are, and so do images that lie there already.
    """
    loose = [image for image in prompt.images if not isinstance(image, str | StoredImage)]
    if not loose:
        return prompt
    # Arrays, unlike bytes, are copied into the store once and not at all out of it.
    ref = ray.put(tuple(np.frombuffer(bytes_of(image), np.uint8) for image in loose))
    stored = (StoredImage(ref, index, name_of(image)) for index, image in enumerate(loose))
    images = (image if isinstance(image, str | StoredImage) else next(stored) for image in prompt.images)
    return replace(prompt, images=tuple(images))


async def read_images(prompt: Prompt) -> Prompt:
    """Return the prompt with the bytes of its stored images, without holding up the event loop."""
    for image in prompt.images:
        if isinstance(image, StoredImage):
            await image.ref
    return with_bytes(prompt)
