"""Open the encoder that the settings name; only its own module is imported."""

from __future__ import annotations

from recipes.retrieval.encoders.base import EncoderSettings, ModelEncoder, PageEncoder


def load_encoder(settings: EncoderSettings) -> PageEncoder:
    """Load the encoder that the settings name.

    Raises:
        EncoderError: there is no such model, or the settings do not fit it.
    """
    if settings.kind == "imported":
        from recipes.retrieval.encoders.imported import ImportedEncoder

        return ImportedEncoder(settings)
    return load_model_encoder(settings)


def load_model_encoder(settings: EncoderSettings) -> ModelEncoder:
    """Load an encoder that runs a model; raises as `load_encoder`."""
    if settings.encode_with == "vllm":
        from recipes.retrieval.encoders.vllm import VllmEncoder

        return VllmEncoder(settings)
    from recipes.retrieval.encoders.sentence import LateEncoder, SentenceEncoder

    return LateEncoder(settings) if settings.kind == "late" else SentenceEncoder(settings)
